"""Many resources at once: order, errors, threads, other executors, interrupts, memory."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import BUCKET, Get, Peak, Publish, Run, posix
from server import BYE, RESET, STALL, Server
from subject import name as subject_name
from subject import s3c


@pytest.fixture
def get_all(cache: Path) -> Get:
    """`get_all(uris, **options)` from the test's cache directory."""

    def get_all(uris: Any, **options: Any) -> Any:
        return s3c.get_local_paths_for_resources(uris, **{"cache_dir": cache, **options})

    return get_all


@pytest.fixture
def many(server: Server) -> Callable[[int], list[str]]:
    """`many(count)`: URIs of that many small objects, each with its number in it."""

    def many(count: int) -> list[str]:
        for number in range(count):
            server.put(BUCKET, f"many/{number}.txt", b"%d" % number)
        return [f"s3://{BUCKET}/many/{number}.txt" for number in range(count)]

    return many


def numbers(results: Any) -> list[int]:
    return [int(result.path.read_bytes()) for result in results]


def keys_of(server: Server) -> list[str]:
    return [request.path for request in server.seen]


# ==== What comes back =========================================================================


def test_results_come_in_the_order_asked(many: Callable[[int], list[str]], get_all: Get) -> None:
    uris = many(40)[::-1]
    results = get_all(uris, max_workers=8)
    assert isinstance(results, list)
    assert numbers(results) == list(range(40))[::-1]
    assert [r.uri for r in results] == uris


def test_results_keep_their_order_when_answers_do_not(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    uris = many(12)
    server.before = lambda request: time.sleep(0.1 if request.path.endswith("/0.txt") else 0)
    assert numbers(get_all(uris, max_workers=4)) == list(range(12))


def test_each_uri_is_asked_for_once(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    a, b = many(2)
    results = get_all([a, b, a, a, b])
    assert numbers(results) == [0, 1, 0, 0, 1]
    assert len(server.seen) == 2


def test_an_empty_batch_is_an_empty_list(server: Server, get_all: Get, cache: Path) -> None:
    assert get_all([]) == []
    assert server.seen == []
    assert not cache.exists()


def test_a_batch_may_hold_resources_of_every_kind(
    server: Server, publish: Publish, get_all: Get, tmp_path: Path
) -> None:
    local = tmp_path / "local.txt"
    local.write_bytes(b"local")
    uri = publish(b"s3", "x/object.txt")
    url = f"{server.url}/{BUCKET}/x/object.txt"
    results = get_all([local, uri, url, str(local), f"s3://{BUCKET}/x/"])
    assert [r.source for r in results] == ["local", "s3", "http", "local", "s3"]
    assert (results[-1].path / "object.txt").read_bytes() == b"s3"


def test_a_second_batch_revalidates(many: Callable[[int], list[str]], get_all: Get) -> None:
    uris = many(20)
    assert {r.status for r in get_all(uris)} == {"downloaded"}
    assert {r.status for r in get_all(uris)} == {"revalidated"}
    assert {r.status for r in get_all(uris, max_age=60)} == {"fresh"}


def test_options_reach_every_resource(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    with pytest.raises(s3c.OfflineError):
        get_all(many(3), offline=True)
    assert server.seen == []


def test_large_objects_come_in_a_batch_too(publish: Publish, get_all: Get) -> None:
    contents = [os.urandom(9 << 20) for _ in range(3)]
    uris = [publish(content, f"{at}.bin") for at, content in enumerate(contents)]
    assert [r.path.read_bytes() for r in get_all(uris)] == contents


def test_many_trees_open_no_more_files_than_a_mac_allows(
    server: Server, get_all: Get, peak: Peak
) -> None:
    """256: each tree took 32 connections, and so a batch of them failed."""
    server.latency = 0.1
    for tree, file in itertools.product(range(16), range(40)):
        server.put(BUCKET, f"{tree}/{file}", b"%d %d" % (tree, file))
    get_all([f"s3://{BUCKET}/{tree}/" for tree in range(16)], progress=peak)
    assert 32 <= peak.most <= 130


def test_more_workers_than_that_are_had_by_who_asks_for_them(
    many: Callable[[int], list[str]], server: Server, get_all: Get, peak: Peak
) -> None:
    server.latency = 0.3
    get_all(many(800), max_workers=120, progress=peak)
    assert peak.most > 100


# ==== What goes in ============================================================================


def test_a_generator_is_read_before_anything_is_asked(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    """As by `Executor.map`: what it yields is all that is kept of it."""
    uris, seen_when_read = many(60), []

    def lazily() -> Iterator[str]:
        for uri in uris:
            seen_when_read.append(len(server.seen))
            yield uri

    assert numbers(get_all(lazily(), max_workers=2)) == list(range(60))
    assert set(seen_when_read) == {0}


def test_a_generator_is_read_by_the_callers_thread(
    many: Callable[[int], list[str]], get_all: Get
) -> None:
    """As a cursor of `sqlite3` insists; and a ContextVar has no value in another one."""
    table = sqlite3.connect(":memory:")
    table.execute("CREATE TABLE objects (uri)")
    table.executemany("INSERT INTO objects VALUES (?)", [(uri,) for uri in many(50)])
    found = get_all(uri for (uri,) in table.execute("SELECT uri FROM objects"))
    assert numbers(found) == list(range(50))
    table.close()


def test_a_generator_needs_no_other_thread(
    get_all: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    for number in range(5):
        (tmp_path / f"{number}.txt").write_bytes(b"%d" % number)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert numbers(get_all(tmp_path / f"{number}.txt" for number in range(5))) == list(range(5))


def test_an_error_of_the_generator_is_the_callers(
    many: Callable[[int], list[str]], get_all: Get
) -> None:
    def failing() -> Iterator[str]:
        yield from many(3)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        get_all(failing(), return_exceptions=True)


@pytest.mark.parametrize("uris", ["s3://bucket/key", Path("x"), b"x"], ids=repr)
def test_one_uri_is_no_batch(get_all: Get, uris: Any) -> None:
    with pytest.raises(TypeError, match="get_local_path_for_resource"):
        get_all(uris)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_agee": 3}, TypeError),
        ({"uri": "x"}, TypeError),
        ({"max_workers": 0}, ValueError),
        ({"max_workers": -1}, ValueError),
        ({"max_concurrency": 0}, ValueError),
    ],
    ids=str,
)
@pytest.mark.parametrize("executor", [False, True], ids=["own", "executor"])
def test_a_wrong_option_is_refused_before_anything_happens(
    server: Server,
    many: Callable[[int], list[str]],
    get_all: Get,
    options: Any,
    error: type[Exception],
    executor: bool,
) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(error, match=next(iter(options))):
        get_all(many(2), return_exceptions=True, executor=pool if executor else None, **options)
    assert server.seen == []


# ==== Errors ==================================================================================


def test_the_first_error_is_raised_and_stops_the_rest(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    uris = many(200)
    server.delete(BUCKET, "many/5.txt")
    with pytest.raises(s3c.NotFoundError, match=r"many/5\.txt"):
        get_all(uris, max_workers=2)
    assert len(server.seen) < 30


def test_errors_can_be_collected_in_their_places(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    uris = [*many(10), "/missing-file", "s3://", f"s3://{BUCKET}/\0"]
    server.delete(BUCKET, "many/3.txt")
    server.on_path("many/7.txt", 403, code="AccessDenied")
    results = get_all(uris, return_exceptions=True, anonymous=True)
    kinds = {at: type(r).__name__ for at, r in enumerate(results) if isinstance(r, Exception)}
    assert kinds.keys() == {3, 7, 10, 11, 12}
    assert [results[at].code for at in (3, 7)] == ["NoSuchKey", "AccessDenied"]
    assert all(isinstance(results[at], ValueError) for at in (11, 12))


def test_what_came_before_an_error_is_in_the_cache(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    uris = many(20)
    server.delete(BUCKET, "many/19.txt")
    with pytest.raises(s3c.NotFoundError):
        get_all(uris, max_workers=1)
    assert numbers(get_all(uris[:19], offline=True)) == list(range(19))


def test_an_uri_that_is_no_text_is_refused(get_all: Get, publish: Publish) -> None:
    with pytest.raises(TypeError):
        get_all([publish(b"x"), 7])


@pytest.mark.parametrize("kind", [list, iter])
def test_a_missing_value_is_an_error_in_its_place(
    kind: Any, publish: Publish, get_all: Get
) -> None:
    uri = publish(b"x")
    results = get_all(kind([uri, float("nan"), None, uri]), return_exceptions=True)
    assert [type(result) for result in results[1:3]] == [TypeError] * 2
    assert "item 2 of uris" in str(results[2])
    assert results[0] == results[3]


def test_a_tree_that_fails_leaves_the_other_trees_alone(server: Server, get_all: Get) -> None:
    server.latency = 0.003
    for tree in range(6):
        for number in range(20):
            server.put(BUCKET, f"tree{tree}/{number}", b"%d" % number)
    server.on_path("tree0/3", 404, code="NoSuchKey")
    uris = [f"s3://{BUCKET}/tree{tree}/" for tree in range(6)]
    results = get_all(uris, return_exceptions=True)
    assert isinstance(results[0], s3c.NotFoundError)
    assert [len(os.listdir(tree)) for tree in results[1:]] == [20] * 5


def seconds_to_fail(get_all: Get, uri: str) -> float:
    began = time.monotonic()
    with pytest.raises(s3c.NotFoundError):
        get_all([uri, f"s3://{BUCKET}/missing"])
    return time.monotonic() - began


def test_an_error_does_not_wait_for_what_another_thread_fetches(
    server: Server, publish: Any, get_all: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 0)
    uri, server.rate = publish(bytes(5 << 20)), 1 << 20
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(get_all, [uri])
        while server.bytes_sent < 1 << 19:
            time.sleep(0.01)
        assert seconds_to_fail(get_all, uri) < 3
        assert not other.done()
        server.close()


def test_an_error_does_not_wait_for_a_handshake(
    server: Server, tls_server: Server, get_all: Get
) -> None:
    tls_server.accept_delay = 5
    assert seconds_to_fail(get_all, f"{tls_server.url}/a") < 3


STALLED_TREE = """
import os, socket, sys, time, SUBJECT as s3c
look_up, calls = socket.getaddrinfo, []
def look_up_slowly(*args, **options):
    calls.append(args)
    if len(calls) > 2:
        time.sleep(8)
    return look_up(*args, **options)
socket.getaddrinfo = look_up_slowly
try:
    s3c.get_local_paths_for_resources(sys.argv[2:], cache_dir=sys.argv[1])
except s3c.NotFoundError:
    os._exit(7)
"""


def test_a_tree_beside_what_fails_leaves_no_directory(
    server: Server, cache: Path, run_python: Run
) -> None:
    """Broken variant: the call was over before the tree's own batch was."""
    for number in range(40):
        server.put(BUCKET, f"t/{number}", b"x")
    server.on_path("/t/", 503)
    server.on_path("/missing", raw=[1.5, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"])
    done = run_python(
        STALLED_TREE, cache, f"s3://{BUCKET}/t/", f"{server.url}/missing", check=False
    )
    assert done.returncode == 7
    assert not list((cache / "aind-s3-cache" / "trees").iterdir())


def test_an_error_ends_the_listing_of_a_tree(server: Server, get_all: Get) -> None:
    server.on_path("list-type", raw=[b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n<a", STALL])
    server.on_path("/missing", raw=[0.5, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"])
    with pytest.raises(s3c.NotFoundError):
        get_all(iter([f"s3://{BUCKET}/t/", f"{server.url}/missing"]))
    assert not s3c._POOL.open - set(s3c._POOL._idle)


def test_an_error_noted_at_the_last_moment_is_not_lost() -> None:
    """Broken variant: errors are looked at, then one fails, then nobody is active any more."""
    looked = threading.Event()

    class Noted(list):  # type: ignore[type-arg]
        def __bool__(self) -> bool:
            noted = len(self) > 0
            looked.set()
            while crew.active:
                time.sleep(0.001)
            return noted

    def work() -> None:
        looked.wait()
        raise LookupError

    crew = s3c._Crew(work, s3c._Stop())
    crew._errors = Noted()
    crew._is_due = lambda: not crew.active
    with pytest.raises(LookupError):
        crew.run(1, lambda active: 0)


FETCH = """
import sys, SUBJECT as s3c
s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2])
"""


@pytest.mark.leftovers
def test_an_error_does_not_wait_for_what_another_process_fetches(
    server: Server, publish: Any, get_all: Get, cache: Path, spawn: Any
) -> None:
    uri, server.rate = publish(bytes(64 << 20)), 1 << 18
    child = spawn(FETCH, uri, cache)
    while server.bytes_sent < 1 << 20:
        time.sleep(0.01)
    assert seconds_to_fail(get_all, uri) < 4
    assert child.poll() is None


def test_an_error_does_not_wait_for_a_long_listing(
    server: Server, publish: Any, get_all: Get
) -> None:
    uris = [publish(b"x", key=f"tree/{n}") for n in range(40)]
    server.page_size = 1
    server.before = lambda request: time.sleep(0.2 * ("list-type" in request.target))
    assert seconds_to_fail(get_all, os.path.dirname(uris[0]) + "/") < 4


def test_an_error_in_a_tree_does_not_wait_for_what_another_thread_fetches(
    server: Server, publish: Any, get_all: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 0)
    uris = [publish(bytes(5 << 20), key="tree/large"), publish(b"x", key="tree/refused")]
    refuse = lambda request: (403, b"") if request.path.endswith("refused") else None  # noqa: E731
    server.rate, server.before = 1 << 20, refuse
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(get_all, uris[:1])
        while server.bytes_sent < 1 << 19:
            time.sleep(0.01)
        began = time.monotonic()
        with pytest.raises(s3c.AccessDeniedError):
            get_all([os.path.dirname(uris[0]) + "/"])
        assert time.monotonic() - began < 3
        assert not other.done()
        server.close()


def test_what_a_stopped_batch_leaves_is_not_called_stale(
    server: Server, many: Any, get_all: Get, caplog: pytest.LogCaptureFixture
) -> None:
    uris = many(2)
    get_all(uris)

    def before(request: Any) -> Any:
        time.sleep(0.1 if request.path.endswith("0.txt") else 1)
        return (403, b"") if request.path.endswith("0.txt") else None

    server.before = before
    with pytest.raises(s3c.AccessDeniedError):
        get_all(iter(uris), stale_if_error=True)
    assert caplog.text == ""


# ==== Workers and connections =================================================================


@pytest.mark.parametrize("workers", [1, 4])
def test_there_is_one_connection_per_worker_at_most(
    server: Server, many: Callable[[int], list[str]], get_all: Get, workers: int
) -> None:
    server.latency = 0.002
    get_all(many(60), max_workers=workers)
    assert server.connections <= workers
    get_all(many(60), max_workers=workers)
    assert server.connections <= workers, "the second batch opened more"


def test_no_more_than_max_workers_ask_at_once(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    busy, most, lock = 0, 0, threading.Lock()

    def watch(_: object) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.005)
        with lock:
            busy -= 1

    server.before = watch
    get_all(many(40), max_workers=5)
    assert 2 <= most <= 5


def test_a_slow_network_is_given_more_workers(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    server.latency = 0.05
    began = time.monotonic()
    get_all(many(150))
    assert time.monotonic() - began < 0.05 * 150 / 4  # three workers would take 2.5 s
    assert 6 < server.connections <= 32


# ==== Asking ahead ============================================================================


def most_at_once(server: Server) -> list[int]:
    """Watch how many requests the server works on; the last number is the most so far."""
    busy, most, lock = [0], [0], threading.Lock()

    def watch(_: object) -> None:
        with lock:
            busy[0] += 1
            most.append(max(most[-1], busy[0]))
        time.sleep(0.003)
        with lock:
            busy[0] -= 1

    server.before = watch
    return most


@pytest.mark.parametrize(("within", "at_once"), [(0.5, range(3, 18)), (0.0, range(1, 2))])
def test_a_worker_asks_ahead_while_objects_come_quickly(
    server: Server,
    many: Callable[[int], list[str]],
    get_all: Get,
    monkeypatch: pytest.MonkeyPatch,
    within: float,
    at_once: range,
) -> None:
    monkeypatch.setattr(s3c, "_AHEAD_WITHIN", within)
    monkeypatch.setattr(s3c._Batch, "_grow", lambda self, active: 0)  # one worker
    most = most_at_once(server)
    assert numbers(get_all(many(40))) == list(range(40))
    assert most[-1] in at_once


def test_what_is_asked_ahead_is_asked_once(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    server.latency = 0.05  # for many workers
    for status in "downloaded", "revalidated":
        server.seen.clear()
        assert {r.status for r in get_all(many(150))} == {status}
        assert sorted(Counter(keys_of(server)).values()) == [1] * 150


def test_what_is_held_is_asked_for_ahead_with_a_condition(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    get_all(many(20))
    server.seen.clear()
    get_all(many(20))
    assert all("if-none-match" in request.headers for request in server.seen)


@pytest.mark.parametrize("options", [{"max_age": 60}, {"offline": True}])
def test_nothing_is_asked_ahead_that_needs_no_request(
    server: Server, many: Callable[[int], list[str]], get_all: Get, options: dict[str, Any]
) -> None:
    uris = many(20)
    get_all(uris)
    server.seen.clear()
    assert numbers(get_all(uris, **options)) == list(range(20))
    assert server.seen == []


@pytest.mark.parametrize("end", [RESET, BYE])
def test_a_connection_that_dies_with_a_request_sent_ahead_costs_a_new_one(
    server: Server,
    many: Callable[[int], list[str]],
    get_all: Get,
    caplog: pytest.LogCaptureFixture,
    end: Any,
) -> None:
    caplog.set_level("DEBUG")
    for number in range(10, 16):
        server.on_path(f"/{number}.txt", raw=[end], times=1)
    assert numbers(get_all(many(40))) == list(range(40))
    assert "retry" not in caplog.text


def test_what_follows_a_head_that_cannot_be_read_is_no_answer(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    """Broken variant: its connection is kept for the next attempt, with the rest of its bytes."""
    body = b'HTTP/1.1 200 OK\r\nContent-Length: 4\r\nETag: "e"\r\n\r\nEVIL'
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d, 7\r\n\r\n" % len(body)
    for number in range(10, 16):
        server.on_path(f"/{number}.txt", raw=[head + body])
    results = get_all(many(20), return_exceptions=True)
    assert {type(result) for result in results[10:16]} == {s3c.TransferError}
    assert numbers(results[:10] + results[16:]) == [*range(10), *range(16, 20)]


def test_who_asks_plainly_takes_no_answer_to_what_was_asked_ahead(
    server: Server, publish: Publish, cache: Path
) -> None:
    """What another thread adds meanwhile becomes a condition, which this server mistakes."""
    url = publish(bytes(9 << 20), etag='W/"new"').replace("s3:/", server.url)
    server.before = lambda asked: (412,) if "if-none-match" in asked.headers else None
    s3c._import_early()
    opt = s3c._Options(cache_dir=cache)
    look = s3c._Fetch(s3c._HTTP(url, opt.access.env), opt)
    assert look.ask_ahead()
    opt.store.add(look.ident, f"{look.ident}_osold_1_00000000_x", memoryview(b"x"), False)
    look.renew()
    assert look.held
    assert look.run().size == 9 << 20
    look.close()


def test_heads_that_begin_and_stall_are_not_waited_for_in_a_row(
    server: Server,
    many: Callable[[int], list[str]],
    get_all: Get,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3c, "_HEAD_TIMEOUT", 0.5)
    monkeypatch.setattr(s3c, "_RETRIES", 0)
    for number in range(1, 16):
        server.on_path(f"/{number}.txt", raw=[b"HTTP/1.1 200 OK\r\n", STALL])
    began = time.monotonic()
    with pytest.raises(s3c.TransferError, match="Timed out"):
        get_all(many(16))
    assert time.monotonic() - began < 3


STOPPED = """
import SUBJECT as s3c, signal, sys, threading, time
s3c._CONNECT_TIMEOUT = 2.5
if sys.argv[1] == "no thread": s3c._start_thread = lambda work: None  # as at exit
def late(*_): raise TimeoutError("the caller's")
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, 0.7)
began = time.monotonic()
try: s3c.get_local_paths_for_resources(sys.argv[3:], cache_dir=sys.argv[2])
except TimeoutError as error: print(error, time.monotonic() - began < 2)
while threading.active_count() > 1: time.sleep(0.01)
print(s3c._ASKED, s3c._POOL.open - set(s3c._POOL._idle))
"""


@posix
@pytest.mark.parametrize("way", ["as usual", "no thread"])
def test_a_batch_that_is_stopped_as_it_connects_leaves_nothing_asked_for(
    way: str, many: Callable[[int], list[str]], cache: Path, deaf: str, run_python: Run
) -> None:
    uris = many(8)
    done = run_python(STOPPED, way, cache, *uris[:4], deaf, *uris[4:])
    assert done.stdout == "the caller's True\n{} set()\n"


def test_an_answer_that_nobody_wanted_is_no_answer_to_the_next_request(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    uris = many(60)
    server.latency = 0.002
    server.on_path("many/20.txt", 403, code="AccessDenied")
    for _ in range(5):
        with pytest.raises(s3c.AccessDeniedError):
            get_all(uris)
        assert numbers(get_all(uris[30:])) == list(range(30, 60))
        assert s3c._POOL.open <= set(s3c._POOL._idle), "a connection is open and not kept"


def test_what_vanishes_while_it_is_asked_for_ahead_is_fetched_again(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    uris = many(30)
    lost = get_all(uris)[15].path

    def lose(request: Any) -> None:  # it has been looked up: it is asked for with a condition
        if request.path.endswith("/15.txt") and "if-none-match" in request.headers:
            lost.unlink()

    server.before = lose
    assert numbers(get_all(uris)) == list(range(30))


def test_bad_uris_are_met_in_their_turn(many: Callable[[int], list[str]], get_all: Get) -> None:
    uris = many(20)
    uris[10:10] = ["ftp://host/x", "s3://", f"s3://{BUCKET}/missing", "/no/such/file"]
    results = get_all(uris, return_exceptions=True)
    kinds = [ValueError, ValueError, s3c.NotFoundError, s3c.NotFoundError]
    assert [isinstance(r, kind) for r, kind in zip(results[10:14], kinds)] == [True] * 4
    assert numbers(results[:10] + results[14:]) == list(range(20))


def test_nothing_is_asked_ahead_for_a_call_that_is_refused(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    urls = [f"{server.url}/{uri[5:]}" for uri in many(20)]
    results = get_all(urls, version_id="v1", return_exceptions=True)
    assert {type(result) for result in results} == {ValueError}
    assert server.seen == []
    assert s3c._POOL.open <= set(s3c._POOL._idle), "a connection is open and not kept"


def test_an_object_that_takes_long_holds_up_nobody(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    came, others_came, waited = list[int](), threading.Event(), list[bool]()

    def before(asked: Any) -> None:
        if asked.path.endswith("/7.txt"):
            waited.append(others_came.wait(5))

    def progress(size: int) -> None:
        came.append(size)
        if len(came) == 39:
            others_came.set()

    server.before = before
    get_all(many(40), progress=progress)
    assert waited == [True]


def test_progress_may_call_us(
    many: Callable[[int], list[str]], get_all: Get, publish: Publish, cache: Path
) -> None:
    other = publish(b"other", "other.txt")
    called: list[int] = []

    def progress(size: int) -> None:
        called.append(s3c.get_local_path_for_resource(other, cache_dir=cache).size)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda uri: get_all([uri], progress=progress), many(12)))
    assert called == [5] * 12
    assert not s3c._TURN._taken, "a turn was never given back"


THREADS = """
import sys, threading, time, SUBJECT as s3c
s3c.get_local_paths_for_resources(sys.argv[2:], cache_dir=sys.argv[1], max_workers=8)
give_up = time.monotonic() + 1
while threading.active_count() > 1 and time.monotonic() < give_up:
    time.sleep(0.01)
print(threading.active_count())
"""


def test_a_batch_leaves_no_threads(
    many: Callable[[int], list[str]], cache: Path, run_python: Run
) -> None:
    assert run_python(THREADS, cache, *many(20)).stdout.strip() == "1"


# ==== Other executors =========================================================================


class InTurn(Executor):
    """The least that an executor can be: its `map` is a plain loop."""

    def map(self, fn: Any, *iterables: Any, **_: Any) -> Any:
        return map(fn, *iterables)


@pytest.fixture(params=["threads", "in turn", "processes"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "in turn":
        yield InTurn()
    elif request.param == "threads":
        with ThreadPoolExecutor(2) as pool:
            yield pool
    else:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as processes:
            yield processes


def test_an_executor_does_the_same_work(
    server: Server, many: Callable[[int], list[str]], get_all: Get, executor: Executor
) -> None:
    uris = many(12)
    results = get_all([*uris, uris[0]], executor=executor)
    assert numbers(results) == [*range(12), 0]
    assert {r.status for r in results} == {"downloaded"}
    assert sorted(keys_of(server)) == sorted(set(keys_of(server)))


def test_an_executor_counts_what_was_downloaded(
    many: Callable[[int], list[str]], get_all: Get, executor: Executor
) -> None:
    counts: list[int] = []
    uris = many(4)
    size = sum(found.size for found in get_all(uris[:2]))
    get_all([*uris, __file__], executor=executor, progress=counts.append)
    assert sum(counts) == size


def test_an_executor_brings_errors_of_our_classes(
    server: Server, many: Callable[[int], list[str]], get_all: Get, executor: Executor
) -> None:
    uris = many(6)
    server.delete(BUCKET, "many/4.txt")
    results = get_all(uris, executor=executor, return_exceptions=True)
    assert numbers(results[:4]) == [0, 1, 2, 3]
    assert isinstance(results[4], s3c.NotFoundError)
    assert (results[4].code, results[4].status, results[4].uri) == ("NoSuchKey", 404, uris[4])
    with pytest.raises(s3c.NotFoundError, match=r"many/4\.txt"):
        get_all(uris, executor=executor)


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_shares_no_connection_with_its_parent(
    server: Server, many: Callable[[int], list[str]], get_all: Get
) -> None:
    uris = many(40)
    get_all(uris[:5], max_workers=3)  # leaves connections open here
    ours = {request.connection for request in server.seen}
    server.reset()
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        assert numbers(get_all(uris, executor=pool)) == list(range(40))
    assert not ours & {request.connection for request in server.seen}


def test_an_executor_is_left_running(publish: Publish, get_all: Get) -> None:
    with ThreadPoolExecutor(1) as pool:
        get_all([publish(b"x")], executor=pool)
        assert pool.submit(int, "7").result() == 7


class Unsendable:
    get_object = None

    def __reduce__(self) -> Any:
        raise TypeError("holds a socket")


def test_a_client_cannot_be_sent_to_another_process(
    server: Server, publish: Publish, get_all: Get
) -> None:
    with ProcessPoolExecutor(1) as pool, pytest.raises(TypeError, match="s3_client") as caught:
        get_all([publish(b"x")], executor=pool, s3_client=Unsendable())
    assert "ProcessPoolExecutor" in str(caught.value)
    assert server.seen == []


@pytest.mark.boto3
def test_a_real_client_works_in_threads_and_is_refused_for_processes(
    server: Server, publish: Publish, get_all: Get
) -> None:
    boto3 = pytest.importorskip("boto3")
    client = boto3.client(
        "s3", "us-west-2", aws_access_key_id="k", aws_secret_access_key="s"
    )  # the endpoint is the environment's
    uris = [publish(b"%d" % at, f"{at}.txt", private=True) for at in range(5)]
    with ThreadPoolExecutor(2) as pool:
        assert numbers(get_all(uris, executor=pool, s3_client=client)) == list(range(5))
    assert numbers(get_all(uris, s3_client=client)) == list(range(5))
    with ProcessPoolExecutor(1) as pool, pytest.raises(TypeError, match="s3_client"):
        get_all(uris, executor=pool, s3_client=client)


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    """A process that stands in `elsewhere`, and not where we do."""
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with ProcessPoolExecutor(1, get_context("spawn"), os.chdir, (elsewhere,)) as pool:
        yield pool


def test_a_relative_cache_dir_means_the_callers_directory(
    publish: Publish, get_all: Get, tmp_path: Path, stranger: Executor
) -> None:
    (result,) = get_all([publish(b"x")], executor=stranger, cache_dir="near")
    assert tmp_path / "near" in result.path.parents


def test_a_relative_path_means_the_callers_file(
    publish: Publish, get_all: Get, tmp_path: Path, stranger: Executor
) -> None:
    for name in ("here.txt", "elsewhere/here.txt"):
        (tmp_path / name).write_text(name)
    results = get_all(["here.txt", publish(b"x")], executor=stranger)
    assert [one.path.read_text() for one in results] == ["here.txt", "x"]


def test_an_executor_that_lost_its_processes_says_so(publish: Publish, get_all: Get) -> None:
    pool = ProcessPoolExecutor(1, get_context("spawn"), signal.raise_signal, (signal.SIGTERM,))
    with pool, pytest.raises(BrokenProcessPool):
        get_all([publish(b"x")], executor=pool, return_exceptions=True)


# ==== Progress ================================================================================


def test_progress_sums_to_what_came(many: Callable[[int], list[str]], get_all: Get) -> None:
    uris = many(50)
    got: list[int] = []
    results = get_all(uris, progress=got.append)
    assert sum(got) == sum(r.size for r in results)
    got.clear()
    get_all(uris, progress=got.append)
    assert sum(got) == 0


def test_what_progress_raises_ends_a_batch_that_collects_errors(
    many: Callable[[int], list[str]], get_all: Get
) -> None:
    """Which is how a caller cancels it."""
    got: list[int] = []

    def cancel(size: int) -> None:
        got.append(size)
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        get_all(many(200), return_exceptions=True, progress=cancel)
    assert len(got) < 100


def test_progress_is_called_by_one_thread_at_a_time(
    many: Callable[[int], list[str]], get_all: Get
) -> None:
    inside, together = threading.Lock(), []

    def progress(_: int) -> None:
        if not inside.acquire(blocking=False):
            together.append(1)
            return
        time.sleep(0.001)
        inside.release()

    get_all(many(40), max_workers=8, progress=progress)
    assert together == []


def test_progress_is_told_by_an_executor_too(
    many: Callable[[int], list[str]], get_all: Get, executor: Executor
) -> None:
    got: list[int] = []
    results = get_all(many(8), executor=executor, progress=got.append)
    assert sum(got) == sum(r.size for r in results)


def test_an_error_of_progress_is_the_callers(
    many: Callable[[int], list[str]], get_all: Get
) -> None:
    def progress(_: int) -> None:
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        get_all(many(5), progress=progress)


@pytest.mark.parametrize("one", [True, False])
def test_an_error_of_progress_keeps_its_history(
    one: bool, many: Callable[[int], list[str]], get: Get, get_all: Get
) -> None:
    def progress(_: int) -> None:
        try:
            int("x")
        except ValueError:
            raise LookupError("enough")  # noqa: B904

    with pytest.raises(LookupError) as caught:
        get(many(1)[0], progress=progress) if one else get_all(many(5), progress=progress)
    assert isinstance(caught.value.__context__, ValueError)
    assert not caught.value.__suppress_context__


# ==== Interrupts ==============================================================================

BATCH = """
import sys, SUBJECT as s3c
uris = [f"s3://aind-open-data/many/{n}.txt" for n in range(1000)]
try:
    s3c.get_local_paths_for_resources(uris, cache_dir=sys.argv[1])
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(params=[40, 400], ids="after {}".format)
def interrupted(
    request: pytest.FixtureRequest,
    server: Server,
    many: Callable[[int], list[str]],
    cache: Path,
    prelude: str,
) -> tuple[float, int, bytes]:
    """A batch of 1,000 in a process of its own, interrupted: seconds it took, exit code, stderr."""
    if os.name == "nt":
        pytest.skip("SIGINT to another process")
    many(1000)
    server.latency = 0.004
    command = [sys.executable, "-c", prelude + BATCH.replace("SUBJECT", subject_name), str(cache)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(server.seen) < request.param and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, errors = child.communicate(timeout=10)
    server.latency = 0
    return time.monotonic() - began, child.returncode, errors


def test_an_interrupt_ends_a_batch_at_once(interrupted: tuple[float, int, bytes]) -> None:
    seconds, code, errors = interrupted
    assert (code, errors) == (130, b"")
    assert seconds < 4


def test_an_interrupted_batch_resumes_from_a_valid_cache(
    server: Server, interrupted: object, get_all: Get, cache: Path
) -> None:
    assert s3c.CacheManager(cache).verify() == []
    held = len(s3c.CacheManager(cache).entries())
    asked = len(server.seen)
    assert 10 < held < 1000
    assert asked - held <= 32, "what was answered was kept, but for what was on its way"
    results = get_all(f"s3://{BUCKET}/many/{number}.txt" for number in range(1000))
    assert numbers(results) == list(range(1000))
    assert sum(result.from_cache for result in results) == held


# ==== Memory ==================================================================================

MEMORY = """
import sys, tracemalloc, SUBJECT as s3c
cache, count = sys.argv[1], int(sys.argv[2])
def get(count):
    uris = (f"s3://aind-open-data/many/{n}.txt" for n in range(count))
    return s3c.get_local_paths_for_resources(uris, cache_dir=cache, max_workers=2, max_age=600)
get(10)
tracemalloc.start()
results = get(count)
held, peak = tracemalloc.get_traced_memory()
print(held // count, peak // count)
"""


def test_memory_grows_by_less_than_a_kibibyte_per_result(
    many: Callable[[int], list[str]], get_all: Get, cache: Path, run_python: Run
) -> None:
    get_all(many(2000))
    held, peak = map(int, run_python(MEMORY, cache, 2000).stdout.split())
    assert held < 1024
    assert peak < 1024
