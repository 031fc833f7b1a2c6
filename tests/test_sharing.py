"""Threads and processes that want the same object at once; and locks that fail, hang or lie."""

from __future__ import annotations

import concurrent.futures
import hashlib
import linecache
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Callable

import pytest
from conftest import Get, MiB, Publish, Run, Spawn, blob, failing, posix
from server import Answer, Request, Server
from subject import s3c


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def later_ranges(server: Server) -> Counter[str]:
    """How often each range but the first, which every asker asks for, was asked for."""
    asked = Counter(request.headers.get("range", "all") for request in server.seen)
    return Counter({name: n for name, n in asked.items() if not name.startswith("bytes=0-")})


def is_one_download(server: Server, size: int) -> bool:
    """Every byte after the first range asked for once."""
    asked = later_ranges(server)
    spans = [[int(n) for n in name[6:].split("-")] for name in asked]
    first = min(start for start, _ in spans)
    return set(asked.values()) == {1} and sum(b - a + 1 for a, b in spans) == size - first


# ==== Threads =================================================================================


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    barrier = threading.Barrier(count)

    def body(_: int) -> Any:
        barrier.wait()
        return work()

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(body, range(count)))


@pytest.mark.parametrize(("count", "size"), [(8, 1000), (8, 3 * MiB), (64, 12 * MiB)])
def test_threads_that_want_a_new_object_download_it_once(
    count: int, size: int, server: Server, publish: Publish, get: Get
) -> None:
    uri, server.latency = publish(blob(size)), 0.4 / count
    found = at_once(count, lambda: get(uri))
    assert len({one.path for one in found}) == 1
    assert Counter(one.status for one in found) == {"downloaded": 1, "revalidated": count - 1}
    assert found[0].path.read_bytes() == blob(size)
    assert server.bytes_sent == size


def test_threads_that_wait_for_one_whose_server_fails_fail_with_it(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken variant: each asks anew, and the last of them waits for as many minutes."""
    monkeypatch.setattr(s3c, "_RETRIES", 1)
    uri, server.latency = publish(b"x"), 0.1
    server.always(500)

    def ask() -> Any:
        with pytest.raises(s3c.TransferError) as failed:
            get(uri)
        return failed.value

    errors = at_once(8, ask)
    assert {(error.status, error.uri) for error in errors} == {(500, uri)}
    assert len(set(map(id, errors))) == 8
    assert len(server.seen) < 6
    assert not s3c._FLIGHTS


def fail_late(server: Server, when: Callable[[Request], bool]) -> None:
    """From now on some requests fail, after half a second."""

    def before(request: Request) -> Any:
        if when(request):
            time.sleep(0.5)
            return Answer(500)
        return None

    server.before = before


def test_threads_that_wait_for_a_tree_whose_file_fails_fail_with_it(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 0)
    tree = publish(b"x", key="tree/x")[:-1]
    fail_late(server, lambda request: request.path.endswith("/x"))
    began = time.monotonic()
    errors = at_once(8, lambda: failing(get, tree))
    assert {error.uri for error in errors} == {tree + "x"}
    assert time.monotonic() - began < 3


def test_threads_that_wait_for_a_changed_large_object_fail_with_it(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 0)
    get(publish(blob(9 * MiB)))
    uri, server.latency = publish(blob(10 * MiB)), 0.1
    fail_late(server, lambda request: "if-match" in request.headers)
    began = time.monotonic()
    assert len(at_once(8, lambda: failing(get, uri))) == 8
    assert time.monotonic() - began < 3


def test_a_ctrl_c_while_a_failure_is_shared_leaves_nobody_waiting(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(s3c, "_RETRIES", 0)
    monkeypatch.setattr(s3c._Flight, "_fail", interrupted)
    uri, _ = publish(b"x"), server.always(500)
    with pytest.raises(KeyboardInterrupt):
        get(uri)
    assert not s3c._FLIGHTS


def test_who_comes_after_a_failure_asks_anew(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 0)
    uri, server.latency = publish(b"x"), 0.1
    server.say(500)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(get, uri) for _ in range(3)]
        assert all(isinstance(call.exception(), s3c.TransferError) for call in calls)
    assert get(uri).status == "downloaded"


def test_threads_that_miss_together_on_kept_connections_download_it_once(
    server: Server, publish: Publish, get: Get
) -> None:
    others = iter([publish(b"x", key=str(n)) for n in range(8)])
    at_once(8, lambda: get(next(others)))  # leaves connections
    uri = publish(blob(MiB // 2))
    sent = server.bytes_sent
    at_once(8, lambda: get(uri))
    assert server.bytes_sent - sent == MiB // 2


def test_threads_that_queue_for_their_turn_download_it_once(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = iter([publish(b"x", key=str(n)) for n in range(4)])
    at_once(4, lambda: get(next(others)))  # leaves connections
    uri, sent = publish(blob(MiB // 2)), server.bytes_sent
    monkeypatch.setattr(s3c, "_TURN_WAIT", 5.0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        entered = s3c._TURN.enter()
        calls = [pool.submit(get, uri) for _ in range(4)]
        while len(s3c._TURN._waiters) < 4:
            time.sleep(0.001)
        s3c._TURN.exit(entered)
        assert {call.result().size for call in calls} == {MiB // 2}
    assert server.bytes_sent - sent == MiB // 2


@pytest.mark.parametrize("size", [1000, 2 * MiB])
def test_who_looked_before_another_thread_was_done_looks_again(
    size: int, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(publish(b"x", key="other"))
    others: list[Any] = []
    uri, list_shard = publish(blob(size)), s3c._list_shard

    def slow(*args: Any) -> Any:  # as on a network file system
        names = list_shard(*args)
        if not others:
            others.append(None)
            others.extend(at_once(1, lambda: get(uri)))
        return names

    monkeypatch.setattr(s3c, "_list_shard", slow)
    statuses = get(uri).status, others[1].status
    assert statuses == ("revalidated", "downloaded")


def test_what_a_batch_has_asked_for_ahead_is_not_kept_twice(
    server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    first = [publish(b"x", key=f"k{n}") for n in range(20)]
    uris = [*first, publish(b"x", key="slow"), publish(blob(MiB // 2), key="asked")]
    server.before = lambda request: time.sleep(0.5 * request.path.endswith("slow"))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        batch = pool.submit(s3c.get_local_paths_for_resources, uris, cache_dir=cache, max_workers=3)
        while len(server.seen) < len(uris):
            time.sleep(0.001)
        single = get(uris[-1])
        assert {single.status, batch.result()[-1].status} == {"downloaded", "revalidated"}


def interrupt_at(step: int, work: Callable[[], Any], functions: set[str]) -> str:
    """Run, with a Ctrl-C at the nth line within these functions: which one; "" if past the last."""
    left, before = [step], sys.gettrace()

    def trace(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_name not in functions:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        # No signal is handled between a block's end and what releases its lock or mark.
        left[0] -= event == "line" and not line.lstrip().startswith("with ")
        if left[0] < 0:
            sys.settrace(before)
            raise KeyboardInterrupt(line)
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt as error:
        return str(error)
    finally:
        sys.settrace(before)
    return ""


def enter_and_exit(turn: Any) -> None:
    turn.exit(turn.enter())


@pytest.mark.parametrize("name", ["leave", "pause", "exit"])
def test_an_interrupt_at_any_line_of_a_turn_leaves_nobody_waiting(name: str) -> None:
    for step in range(50):
        turn = s3c._Turn()
        entered = turn.enter()
        other = threading.Thread(target=enter_and_exit, args=(turn,), daemon=True)
        other.start()
        while not turn._waiters and other.is_alive():  # on a busy machine it is past that
            time.sleep(0.001)
        work = partial(turn.exit, entered) if name == "exit" else getattr(turn, name)
        interrupted = interrupt_at(step, work, {name, "_give"})
        turn.exit(entered)
        other.join(2)
        assert not other.is_alive(), interrupted
        if not interrupted:
            break


def test_a_thread_that_keeps_its_turn_and_does_not_come_back_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3c, "_TURN_WAIT", 0.5)
    turn = s3c._Turn()
    enter_and_exit(turn)  # from here on it is known to come back at once
    entered = turn.enter()
    other = threading.Thread(target=enter_and_exit, args=(turn,), daemon=True)
    other.start()
    while not turn._waiters:
        time.sleep(0.001)
    turn.here.quick, turn.here.since = True, time.monotonic() + 1
    turn.exit(entered)
    assert turn._kept, "the turn was handed on"
    other.join(2)
    assert not other.is_alive()


def test_a_turn_that_a_signal_handler_hands_on_as_it_is_taken_over_is_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Broken variant: who waits looks whether it still does, and leaves the queue a step later."""

    class Waiters(list[Any]):
        def remove(self, gate: Any) -> None:
            turn._give()  # what a handler's call may come to at this very step
            super().remove(gate)

    monkeypatch.setattr(s3c, "_TURN_WAIT", 0.01)
    turn = s3c._Turn()
    turn._waiters = Waiters()
    at_once(1, turn.enter)  # and never comes back
    assert turn.enter()
    turn.exit(True)
    assert not turn._taken


def test_a_call_of_progress_that_fails_leaves_the_call_around_it_its_place(
    publish: Publish, get: Get
) -> None:
    """Broken variant: what fails gives up all that its thread has."""
    left: list[int] = []

    def progress(_: int) -> None:
        with pytest.raises(ValueError, match="bad"):
            get("s3://bad bucket/x")
        left.append(len(s3c._FLIGHTS))

    get(publish(b"data"), progress=progress)
    assert left == [1]


HANDLER = """
import sys, SUBJECT as s3c, signal, time
get = lambda uri=sys.argv[1]: s3c.get_local_path_for_resource(uri, cache_dir=sys.argv[3])
calls, idle = 0, True
def handler(*_):
    global calls, idle
    if idle:
        idle = False
        get(sys.argv[2])
        calls, idle = calls + 1, True
get()
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
end = time.monotonic() + 1.5
while time.monotonic() < end: get()
signal.setitimer(signal.ITIMER_REAL, 0)
print(calls > 100)
"""


@posix
@pytest.mark.parametrize("other", ["data.json", "closes"])
def test_a_signal_handler_may_call_us_at_any_moment(
    other: str, server: Server, publish: Publish, cache: Path, run_python: Run
) -> None:
    """Broken variant: what it takes of the idle connections and does not give back is missed."""

    def before(request: Request) -> Any:
        answer = server._answer(request)
        close = {"Connection": "close"} if request.path.endswith("closes") else {}
        return answer._replace(headers={**answer.headers, **close})

    server.before = before
    uris = publish(b"data"), publish(b"other", key=other)
    assert run_python(HANDLER, *uris, cache).stdout == "True\n"


def test_a_signal_handler_may_ask_for_the_same_missing_object_as_a_call_ends(
    server: Server, get: Get
) -> None:
    """Broken variant: its seat is taken away twice, and the second time is a KeyError."""

    def ask() -> None:
        with pytest.raises(s3c.NotFoundError):
            get("s3://bucket/missing")

    def trace(frame: FrameType, event: str, _: object) -> None:
        if event == "c_return" and frame.f_code.co_name == "_pass_on":
            sys.setprofile(None)  # where Python looks for a signal, one has come
            ask()

    sys.setprofile(trace)
    ask()
    assert not sys.getprofile()


SIGNED = """
import sys, SUBJECT as s3c, signal
get = lambda: s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2], anonymous=False)
class Finder:
    def find_spec(self, name, *_):
        if name == "boto3.session":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGUSR1)
def handler(*_):
    try: get()
    except s3c.S3CacheError: pass  # half of a boto3 is none
signal.signal(signal.SIGUSR1, handler)
sys.meta_path.insert(0, Finder())
print(get().status)
"""


@posix
@pytest.mark.boto3
def test_a_signal_handler_may_call_us_while_boto3_is_set_up(
    publish: Publish, cache: Path, run_python: Run
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    done = run_python(SIGNED, publish(b"data"), cache, env=keys)
    assert done.stdout == "downloaded\n"


PEER = """
import sys, SUBJECT as s3c
print(s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2]).status)
"""


@pytest.mark.parametrize("options", [{"offline": True}, {"max_age": 60}], ids=repr)
def test_what_another_process_has_just_added_is_found_where_nobody_is_asked(
    options: dict[str, Any],
    publish: Publish,
    get: Get,
    run_python: Any,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3c, "_GLANCE", 60.0)
    for _ in range(2):  # and so the shard is remembered
        get(publish(b"old"))
    uri = publish(b"new")
    time.sleep(0.02)  # the file system's clock
    assert run_python(PEER, uri, cache).stdout == "downloaded\n"
    found = get(uri, **options)
    assert (found.status, found.path.read_bytes()) == ("fresh", b"new")


def test_what_is_remembered_of_a_shard_is_no_more_than_is_found_there(
    publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_GLANCE", 60.0)
    uri = publish(b"old")
    get(uri)
    old = get(uri).path  # and so the shard is remembered
    new = old.with_name(old.name.replace(hashlib.md5(b"old").hexdigest(), "new"))
    old.rename(new)  # as if another process had pruned it and brought another
    ident = old.name[:20]
    (entry,) = s3c._Store(str(old.parents[3])).find(ident, False)
    assert entry.path == str(new)


SHARD = "ab"
ONE, OTHER = SHARD + "0" * 18, SHARD + "1" * 18


def add(store: Any, ident: str, ours: bool = True) -> None:
    """Add an entry of one byte, as we do or in one step, as if another process did."""
    name = f"{ident}_os0_1_00000000_name"
    if ours:
        store.add(ident, name, memoryview(b"x"), False)
    else:
        Path(store.shard(ident), name).write_bytes(b"x")


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was listed."""
    listed: list[str] = []
    listdir = os.listdir

    def counted(path: str) -> list[str]:
        listed.append(path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", counted)
    monkeypatch.setattr(s3c, "_GLANCE", 60.0)
    return listed


def test_a_shard_is_listed_once_however_much_we_add(cache: Path, listings: list[str]) -> None:
    store = s3c._Store(str(cache))
    add(store, ONE)
    for number in range(20):
        ident = f"{SHARD}{number:018x}"
        assert len(store.find(ident, False)) == (number == 0)
        add(store, ident)
        assert len(store.find(ident, False)) == 1
    assert len(listings) == 1


@pytest.mark.parametrize(("limit", "count"), [(4096, 1), (999, 2)])
def test_a_shard_of_a_large_cache_is_remembered_unless_it_takes_too_much_memory(
    limit: int, count: int, cache: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_SHARD_LIMIT", limit)
    store = s3c._Store(str(cache))
    Path(store.shard(ONE)).mkdir(parents=True)
    for number in range(1000):
        add(store, f"{SHARD}{number:018x}", ours=False)
    assert [len(store.find(ONE, False)) for _ in range(2)] == [1, 1]
    assert len(listings) == count


def test_what_another_process_adds_to_a_remembered_shard_is_found(
    cache: Path, listings: list[str]
) -> None:
    """Broken variant: what is remembered is good for a second."""
    store = s3c._Store(str(cache))
    add(store, ONE)
    assert store.find(OTHER, False) == []
    time.sleep(0.02)  # the file system's clock
    add(store, OTHER, False)
    assert len(store.find(OTHER, False)) == 1


def test_what_another_process_adds_beside_us_is_found(cache: Path, listings: list[str]) -> None:
    """Broken variant: who adds takes what is remembered for all there is."""
    store = s3c._Store(str(cache))
    add(store, ONE)
    assert store.find(OTHER, False) == []
    time.sleep(0.02)
    add(store, OTHER, False)
    add(store, SHARD + "2" * 18)
    assert len(store.find(OTHER, False)) == 1


def test_what_another_thread_adds_as_we_add_is_found(
    cache: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken variant: who adds last says what is there."""
    store, publish = s3c._Store(str(cache)), s3c._publish
    add(store, ONE)
    assert store.find(OTHER, False) == []

    def publish_and_pause(*args: Any) -> Any:
        final = publish(*args)
        monkeypatch.setattr(s3c, "_publish", publish)
        at_once(1, lambda: add(store, OTHER))
        return final

    monkeypatch.setattr(s3c, "_publish", publish_and_pause)
    add(store, SHARD + "2" * 18)
    assert len(store.find(OTHER, False)) == 1


def interrupted(step: int, work: Callable[[], Any], between: Callable[[], Any]) -> bool:
    """Do work, and something else amid its n-th step; tell whether it has that many."""
    left, before = [step], sys.gettrace()

    def trace(frame: Any, event: str, _: Any) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode":  # only: frames above are traced on under coverage
            left[0] -= 1
            if not left[0]:
                sys.settrace(before)
                between()
        return trace if left[0] > 0 else None

    sys._getframe().f_trace_opcodes = True  # 3.12 looks for that as tracing begins
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return left[0] <= 0


@pytest.mark.parametrize("adds", [True, False])
def test_what_another_thread_adds_at_any_step_of_ours_is_found(
    adds: bool, cache: Path, listings: list[str]
) -> None:
    """Broken variant: two threads count what they add, and one count is lost."""
    store, step, more = s3c._Store(str(cache)), 0, True
    while more:
        step += 1
        ours, other = (f"{step % 256:02x}{step:017x}{n}" for n in (1, 2))
        add(store, f"{ours[:-1]}0")
        assert store.find(ours, False) == []
        work = partial(add, store, ours) if adds else partial(store.find, ours, False, True)
        more = interrupted(step, work, partial(at_once, 1, partial(add, store, other)))
        assert (len(store.find(other, False)), len(store.find(ours, False))) == (more, adds), step
    assert step > 99


def test_what_another_process_adds_as_we_add_is_found_offline(
    publish: Publish, get: Get, cache: Path, listings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken variant: what we added is all that changed meanwhile."""
    store, publish_ours = s3c._Store(str(cache)), s3c._publish
    uri = publish(b"data")
    path = get(uri).path
    aside = path.rename(cache / "aside")
    assert store.find(path.name[:20], False) == []

    def publish_both(*args: Any) -> Any:
        aside.rename(path)
        return publish_ours(*args)

    monkeypatch.setattr(s3c, "_publish", publish_both)
    add(store, path.name[:2] + "0" * 18)
    assert get(uri, offline=True).status == "fresh"


def test_what_is_looked_through_does_not_change_as_another_thread_adds(
    cache: Path, listings: list[str]
) -> None:
    """Broken variant: the place of an object moves, and its neighbour's entry is served."""
    store = s3c._Store(str(cache))
    add(store, ONE)
    assert store.find(OTHER, False) == []
    looked_through = s3c._list_shard(store.shard(ONE))
    before = deepcopy(looked_through)
    add(store, OTHER)
    assert looked_through == before


def test_a_shard_from_the_beginning_of_time_is_listed(cache: Path) -> None:
    """As in an image whose files all have the time 0."""
    store = s3c._Store(str(cache))
    add(store, ONE)
    os.utime(store.shard(ONE), (0, 0))
    assert len(store.find(ONE, False)) == 1


def test_threads_that_find_a_large_object_changed_download_it_once(
    server: Server, publish: Publish, get: Get
) -> None:
    get(publish(blob(9 * MiB)))
    uri, new = publish(blob(12 * MiB)[MiB:]), blob(12 * MiB)[MiB:]
    server.seen.clear()
    results = at_once(4, lambda: get(uri))
    assert {sha(r.path.read_bytes()) for r in results} == {sha(new)}
    assert is_one_download(server, len(new))


def fail_once(failed: list[int], size: int) -> None:
    """A progress function that fails for the first who calls it, when the others wait."""
    if not failed:
        failed.append(size)
        time.sleep(0.3)
        raise ZeroDivisionError


def test_threads_take_over_from_one_that_fails_where_ranges_are_ignored(
    server: Server, publish: Publish, get: Get
) -> None:
    """Broken variant: each gives up its answer for the next, and asks thousands of times."""
    get(publish(blob(9 * MiB), key="first"))
    uri, progress = publish(b"x" + blob(12 * MiB), key="first"), partial(fail_once, [])
    server.ignore_range, server.latency = True, 0.02

    def outcome() -> str:
        try:
            return str(get(uri, progress=progress).status)
        except ZeroDivisionError:
            return "failed"

    outcomes = Counter(at_once(4, outcome))
    assert outcomes == {"failed": 1, "downloaded": 1, "revalidated": 2}
    assert len(server.seen) < 60


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds a peer at work does not wait for it."""
    monkeypatch.setattr(s3c, "_PEER_PATIENCE", 0.0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds a peer at work waits for a second without a sign of it."""
    monkeypatch.setattr(s3c, "_PEER_PATIENCE", 1.0)


@pytest.fixture
def slow_newcomers(server: Server) -> Callable[[], None]:
    """`slow_newcomers()`: from now on, ranges asked for on new connections come late."""

    def slow_newcomers() -> None:
        known = {request.connection for request in server.seen}

        def before(request: Any) -> None:
            if request.connection not in known and "if-match" in request.headers:
                time.sleep(2)

        server.before = before

    return slow_newcomers


def test_a_host_that_did_not_wait_takes_what_a_faster_one_publishes(
    server: Server, publish: Publish, tmp_path: Path, slow_newcomers: Any, impatient: None
) -> None:
    """Two names of one directory are two caches to a process."""
    uri, server.rate, before = publish(blob(14 * MiB)), 16 * MiB, set(threading.enumerate())
    (tmp_path / "one").mkdir()
    (tmp_path / "two").symlink_to(tmp_path / "one")
    get = partial(s3c.get_local_path_for_resource, uri, max_concurrency=2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        fast = pool.submit(get, cache_dir=tmp_path / "one")
        while len(server.seen) < 2:
            time.sleep(0.01)
        slow_newcomers()
        slow = get(cache_dir=tmp_path / "two")
    assert slow.status == "revalidated"
    assert os.path.samefile(slow.path, fast.result().path)
    for thread in set(threading.enumerate()) - before - set(server._threads.values()):
        thread.join(5)
        assert not thread.is_alive(), "it hashes what never comes"


def test_threads_that_want_different_objects_do_not_wait(
    server: Server, publish: Publish, get: Get
) -> None:
    uris = iter([publish(b"x", key=str(n)) for n in range(8)])
    server.latency, began = 0.3, time.monotonic()
    at_once(8, lambda: get(next(uris)))
    assert time.monotonic() - began < 4


def test_who_waits_for_a_failing_thread_tries_on_its_own(
    server: Server, publish: Publish, get: Get
) -> None:
    uri, server.latency = publish(b"data"), 0.05
    server.say(403, code="AccessDenied")

    def outcome() -> str:
        try:
            return str(get(uri).status)
        except s3c.AccessDeniedError:
            return "denied"

    assert Counter(at_once(4, outcome)) == {"denied": 1, "downloaded": 1, "revalidated": 2}


# ==== Processes ===============================================================================

CHILD = """
import SUBJECT as s3c, hashlib, sys, time
print("ready", flush=True)
sys.stdin.readline()
began = time.monotonic()
found = s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2])
seconds = time.monotonic() - began
print(found.status, seconds, hashlib.sha256(found.path.read_bytes()).hexdigest())
"""


def let_go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


@pytest.fixture
def start(spawn: Spawn, cache: Path) -> Callable[..., Any]:
    """`start(uri, env=)`: a process that asks for an object."""

    def start(uri: str, env: dict[str, str] | None = None) -> Any:
        child = spawn(CHILD, uri, cache, env=env)
        let_go(child)
        return child

    return start


@pytest.fixture
def race(spawn: Spawn, cache: Path) -> Callable[..., list[list[str]]]:
    """`race(count, uri, env=)`: status, seconds and hash of so many processes that ask at once."""

    def race(count: int, uri: str, env: dict[str, str] | None = None) -> list[list[str]]:
        children = [spawn(CHILD, uri, cache, env=env) for _ in range(count)]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            let_go(child)
        return [_outcome(child) for child in children]

    return race


def _outcome(child: subprocess.Popen[str]) -> list[str]:
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err
    return out.split()[-3:]


def leftovers(cache: Path) -> list[str]:
    return [p.name for p in cache.rglob("*") if p.name[0] == "." or p.suffix in (".data", ".log")]


def test_processes_that_want_a_new_object_download_it_once(
    race: Any, server: Server, publish: Publish, cache: Path
) -> None:
    size = 24 * MiB
    uri, server.rate = publish(blob(size)), 60 * MiB
    told = race(24, uri)
    assert Counter(status for status, *_ in told) == {"downloaded": 1, "revalidated": 23}
    assert {hash_ for *_, hash_ in told} == {sha(blob(size))}
    assert is_one_download(server, size)
    assert leftovers(cache) == []


def test_who_waits_for_a_killed_process_goes_on_from_there(
    start: Any, server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    size = 24 * MiB
    uri, server.rate = publish(blob(size)), 8 * MiB
    child = start(uri)
    while server.bytes_sent < size // 2:
        time.sleep(0.01)
    threading.Timer(0.3, child.kill).start()
    began, server.rate = time.monotonic(), None
    assert get(uri).path.read_bytes() == blob(size)
    assert time.monotonic() - began < 8
    assert server.bytes_sent < 1.6 * size


SLOW_DISK = "#include <unistd.h>\nint fsync(int fd) { sleep(3); return 0; }"


@posix
def test_a_peer_whose_disk_takes_its_time_is_waited_for(
    start: Any, preload: Any, server: Server, publish: Publish, get: Get, cache: Path, patient: None
) -> None:
    """Broken variant: who waits takes it for dead, and copies all that it has, each for itself."""
    uri, server.rate = publish(blob(24 * MiB)), 16 * MiB
    child = start(uri, env=preload(SLOW_DISK))
    while server.bytes_sent < 4 * MiB:
        time.sleep(0.01)
    assert get(uri).status == "revalidated"
    assert _outcome(child)[0] == "downloaded"


# ==== Broken locks ============================================================================

BROKEN = r"""
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
#include <fcntl.h>
int flock(int fd, int how) {
    int log = open(getenv("FLOCK_CALLS"), O_WRONLY | O_APPEND | O_CREAT, 0666);
    write(log, "x", 1);
    close(log);
    %s
}
"""
LOCKS = {
    "ENOLCK": "errno = ENOLCK; return -1;",
    "EACCES": "errno = EACCES; return -1;",
    "does nothing": "return 0;",
    "always taken": "errno = EWOULDBLOCK; return -1;",
    "hangs": "for (;;) pause();",
}


NFS3 = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>
int flock(int fd, int how) { return 0; }
static int is_stale(int fd) { /* what another host has removed is gone, open or not */
    struct stat found;
    errno = ESTALE;
    return !fstat(fd, &found) && S_ISREG(found.st_mode) && !found.st_nlink;
}
#define NEXT(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
int fsync(int fd) { return is_stale(fd) ? -1 : NEXT(int, fsync, int)(fd); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    if (is_stale(fd)) return -1;
    return NEXT(ssize_t, pwrite64, int, const void *, size_t, off_t)(fd, data, size, at);
}
"""


@posix
def test_who_loses_its_file_to_a_faster_host_takes_what_that_published(
    start: Any, preload: Any, server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    """Where no lock excludes: broken variant, a CacheError (stale file handle)."""
    uri, server.rate = publish(blob(24 * MiB)), 4 * MiB
    child = start(uri, env=preload(NFS3))
    while server.bytes_sent < 4 * MiB:
        time.sleep(0.01)
    server.rate = None
    assert get(uri).status == "downloaded"
    status, _, hash_ = _outcome(child)
    assert (status, hash_) == ("revalidated", sha(blob(24 * MiB)))
    assert leftovers(cache) == []


@posix
@pytest.mark.slow
@pytest.mark.parametrize("lock", LOCKS)
def test_a_broken_lock_changes_nothing_but_the_traffic(
    lock: str, race: Any, preload: Any, publish: Publish, cache: Path, tmp_path: Path
) -> None:
    uri, calls = publish(blob(12 * MiB)), tmp_path / "calls"
    told = race(4, uri, env={**preload(BROKEN % LOCKS[lock]), "FLOCK_CALLS": str(calls)})
    assert {hash_ for *_, hash_ in told} == {sha(blob(12 * MiB))}
    assert max(float(seconds) for _, seconds, _ in told) < 10
    assert calls.exists()  # or the test proves nothing
    assert leftovers(cache) == []


def _plant_link(lock: Path) -> None:
    lock.symlink_to(lock.parents[1] / "victim")


def _plant_no_directory(lock: Path) -> None:
    lock.parent.rmdir()
    lock.parent.write_bytes(b"")


@posix
@pytest.mark.timeout(20)
@pytest.mark.parametrize("plant", [os.mkfifo, os.mkdir, _plant_link, _plant_no_directory])
def test_what_cannot_be_locked_is_no_hindrance(
    plant: Callable[[Path], None], publish: Publish, get: Get, cache: Path
) -> None:
    locks = cache / "aind-s3-cache" / "locks"
    locks.mkdir(parents=True)
    plant(locks / get(publish(b"small")).path.name[:3])
    assert get(publish(blob(12 * MiB))).path.read_bytes() == blob(12 * MiB)
    assert not (locks.parent / "victim").exists()


@posix
@pytest.mark.leftovers
@pytest.mark.parametrize(("begun", "waited"), [(True, (2.0, 9.0)), (False, (0.2, 1.9))])
def test_a_lock_that_a_sleeping_process_holds_is_not_waited_for_long(
    begun: bool, waited: Any, publish: Publish, get: Get, cache: Path, monkeypatch: Any
) -> None:
    """Least of all where it has begun nothing of ours: then it may be for another object."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(s3c, "_PEER_PATIENCE", 2.0)
    ident = get(publish(blob(12 * MiB), key="first")).path.name.partition("_")[0]
    (lock,) = (cache / "aind-s3-cache" / "locks").iterdir()
    if begun:
        (cache / "aind-s3-cache" / "partial" / f"{ident}_peer.log").touch()
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        assert get(publish(b"x" + blob(12 * MiB), key="first")).status == "downloaded"
    assert waited[0] < time.monotonic() - began < waited[1]


@posix
def test_a_peer_that_sleeps_is_waited_for_once_where_ranges_are_ignored(
    server: Server, publish: Publish, get: Get, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken variant: one that gives up its answer for the lock again and again never ends."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(s3c, "_PEER_PATIENCE", 0.2)
    get(publish(blob(12 * MiB), key="first"))
    (lock,) = (cache / "aind-s3-cache" / "locks").iterdir()
    server.ignore_range = True
    server.reset()
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert get(publish(b"x" + blob(12 * MiB), key="first")).status == "downloaded"
    assert len(server.seen) < 9


@posix
def test_lock_files_are_never_removed_by_a_download(
    publish: Publish, get: Get, cache: Path
) -> None:
    """A peer would lock the old inode and a third one the new."""
    get(publish(blob(12 * MiB)))
    (lock,) = (cache / "aind-s3-cache" / "locks").iterdir()
    inode = lock.stat().st_ino
    get(publish(b"x" + blob(12 * MiB)))
    s3c.CacheManager(cache).prune(max_age_days=0, max_size_bytes=0)
    assert lock.stat().st_ino == inode
    assert lock.stat().st_size == 0


UNLOCK = """
import SUBJECT as s3c, fcntl, os, signal, sys, threading, time
cache, first = sys.argv[1:]
get = lambda uri: s3c.get_local_path_for_resource(uri, cache_dir=cache)
flock = fcntl.flock
def slow(fd, how):  # a server that takes its time
    flock(fd, how)
    if how == fcntl.LOCK_UN:
        fcntl.flock = flock
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
fcntl.flock = slow
try: get(first)
except KeyboardInterrupt: print("interrupted")
os.remove(get(first).path)
other = threading.Thread(target=get, args=(first,), daemon=True)
other.start()
other.join(5)
print(other.is_alive())
"""


@posix
def test_an_interrupt_while_a_lock_is_released_leaves_nobody_waiting(
    publish: Publish, run_python: Any, cache: Path
) -> None:
    uri = publish(blob(12 * MiB))
    assert run_python(UNLOCK, cache, uri).stdout == "interrupted\nFalse\n"


LOCKED = """
import SUBJECT as s3c, fcntl, os, signal, sys, threading, time
cache, uri = sys.argv[1:]
get = lambda: s3c.get_local_path_for_resource(uri, cache_dir=cache)
path = get().path
parts = cache + "/aind-s3-cache/partial"
os.makedirs(parts, exist_ok=True)
for end in ("data", "log"):  # what a killed process left
    open(f"{parts}/{path.name[:20]}.0123.dead.{end}", "wb").close()
os.remove(path)
flock = fcntl.flock
fcntl.flock = lambda fd, how: (time.sleep(0.4), flock(fd, how))
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try: get()
except KeyboardInterrupt: print("interrupted")
time.sleep(0.5)
fcntl.flock, began = flock, time.monotonic()
print(get().status, time.monotonic() - began < 3)
"""


@posix
@pytest.mark.leftovers
def test_an_interrupt_while_a_lock_is_awaited_leaves_it_free(
    publish: Publish, run_python: Any, cache: Path
) -> None:
    uri = publish(blob(12 * MiB))
    assert run_python(LOCKED, cache, uri).stdout == "interrupted\ndownloaded True\n"
