"""Forks, exits, odd homes, read-only roots, power cuts: what a process may meet in its life."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipapp
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import LIMIT, SUBJECT_FILE, Run, Spawn
from server import Server
from subject import name as subject_name
from subject import s3c

MiB = 1 << 20
Publish = Callable[..., str]
posix = pytest.mark.skipif(os.name != "posix", reason="fork, signals and users are of POSIX")


def blob(size: int) -> bytes:
    block = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(8191))
    return (block * (size // len(block) + 1))[:size]


# ==== Fork ====================================================================================

FORK = """
import SUBJECT as s3c, os, sys
def ask(process):  # each object tells its own name
    for n in range(40):
        uri = f"s3://b/{process}-{n}"
        found = s3c.get_local_path_for_resource(uri, cache_dir=sys.argv[1])
        assert found.path.read_bytes().decode() == uri, uri
s3c.get_local_path_for_resource("s3://b/0-0", cache_dir=sys.argv[1])
children = []
for process in range(1, 5):
    children.append(os.fork())
    if not children[-1]:
        ask(process)
        os._exit(0)
ask(0)
assert not any(os.waitpid(child, 0)[1] for child in children)
print("ok")
"""


@posix
def test_a_fork_shares_no_connection(server: Server, run_python: Run, cache: Path) -> None:
    """With a shared socket, valid answers reach the wrong process."""
    for key in (f"{process}-{n}" for process in range(5) for n in range(40)):
        server.put("b", key, f"s3://b/{key}".encode())
    assert run_python(FORK, cache).stdout == "ok\n"
    assert server.connections == 5


FORK_BUSY = """
import SUBJECT as s3c, os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
cache, large, small = sys.argv[1:]
def get(uri): return s3c.get_local_path_for_resource(uri, cache_dir=cache)
busy = threading.Thread(target=get, args=(large,))
busy.start()
time.sleep(0.3)
for _ in range(10):
    pid = os.fork()
    if not pid:
        get(small)
        os._exit(get(small).status != "revalidated")
    assert os.waitpid(pid, 0)[1] == 0
assert busy.is_alive()
pid = os.fork()
if not pid:  # the same object, which a thread that is not here was downloading
    os._exit(get(large).size != 16 << 20)
assert os.waitpid(pid, 0)[1] == 0
busy.join()
print(get(large).status)
"""


@posix
def test_a_fork_in_the_midst_of_a_download(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    large, small = publish(blob(16 * MiB), key="large"), publish(b"x", key="small")
    server.rate = 5 * MiB
    done = run_python(FORK_BUSY, cache, large, small, timeout=60)
    assert done.stdout == "revalidated\n"


INTERRUPTED = """
import SUBJECT as s3c, faulthandler, os, random, signal, sys, threading, time
cache, *uris = sys.argv[1:]
get = lambda uri: s3c.get_local_path_for_resource(uri, cache_dir=cache)
end = threading.Event()
def go_on(uri):
    while not end.is_set(): get(uri)
def kick():
    begun.wait()  # an interrupt amid `Thread.start` would be another test's
    time.sleep(0.02 * random.random())
    os.kill(os.getpid(), signal.SIGINT)
begun = threading.Event()
def once():
    others = [threading.Thread(target=go_on, args=(uri,)) for uri in uris[1:]]
    for thread in [*others, threading.Thread(target=kick)]: thread.start()
    try:
        begun.set()
        while True: get(uris[0])
    except KeyboardInterrupt: end.set()
    for thread in others: thread.join()
    end.clear()
    begun.clear()
"""

INTERRUPTED_OFTEN = f"""
{INTERRUPTED}
for _ in range(40): once()
get(uris[0])  # takes over a turn that an interrupt between two bytecodes left
print(s3c._TURN._taken, len(s3c._POOL.open - set(s3c._POOL._idle)) < 4)
"""


@posix
def test_interrupts_amid_other_threads_leave_them_their_turns_and_hardly_a_socket(
    publish: Publish, run_python: Run, cache: Path
) -> None:
    uris = [publish(b"x", key=f"k{n}") for n in range(5)]
    assert run_python(INTERRUPTED_OFTEN, cache, *uris).stdout == "False True\n"


AMID = f"""{LIMIT}
import SUBJECT as s3c, inspect, os, sys, threading
last, told = [], []
def interrupt(step, number, is_watched, act):
    def trace(frame, event, function):
        code = frame.f_code
        if getattr(function, "__name__", "") == "__enter__": return  # `with` itself, in 3.15
        if code.co_flags & inspect.CO_GENERATOR: return  # it may be its end
        if event in ("call", "c_return") and is_watched(code.co_filename):
            last.append((code.co_name, frame.f_lineno))
            if len(last) == step: signal.raise_signal(number)
    sys.setprofile(trace)
    try: act()
    except (KeyboardInterrupt, TimeoutError) as error: told.append(error)
    finally: sys.setprofile(None)
def sweep(child, stride=1):
    for step in range(1, 9999, stride):
        pid = os.fork()
        if not pid:
            is_good, came = child(step), len(last) >= step
            if came and not (told and is_good):
                print("interrupted in", *last[step - 1], flush=True)
            os._exit(not came)
        if os.waitpid(pid, 0)[1]: break
    print(step > 100)
"""

AMID_CALL = f"""{AMID}
name, cache, uri = sys.argv[1:]
number = signal.SIGINT if name == "Ctrl-C" else signal.SIGALRM
is_ours = lambda file: file == s3c.__file__
def get(where): return s3c.get_local_path_for_resource(uri, cache_dir=where)
def child(step):
    where = f"{{cache}}/{{step}}"
    interrupt(step, number, is_ours, lambda: get(where))
    other = threading.Thread(target=get, args=(where,), daemon=True)
    other.start()
    other.join(5)
    get(where)
    return not (other.is_alive() or s3c._FLIGHTS or s3c._TURN._taken or s3c._TURN._here.inside)
get(cache)  # imports
sweep(child)
"""

AMID_WORK = f"""{AMID}
import shutil
way, cache, uri = sys.argv[1:]
is_files = lambda file: not file.startswith("<str") and "importlib" not in file
def get(): return s3c.get_local_path_for_resource(uri, cache_dir=where)
where = cache
get()
works = dict(
    again=get,
    verify=lambda: s3c.CacheManager(where).verify(),
    prune=lambda: s3c.CacheManager(where).prune(max_size_bytes=0, dry_run=True),
    clear=lambda: s3c.CacheManager(where).clear(),
)
def child(step):
    global where
    where = f"{{cache}}-{{step}}"
    shutil.copytree(cache, where)
    interrupt(step, signal.SIGALRM, is_files, works[way])
    return True
works[way]()  # imports
get()
sweep(child, 3)
"""


@posix
@pytest.mark.parametrize("name", ["Ctrl-C", "a limit of time"])
def test_wherever_a_signals_error_comes_it_is_raised_and_other_threads_get_the_object(
    name: str, publish: Publish, run_python: Run, cache: Path
) -> None:
    """At each of our calls, and after each of those into C: that is where Python looks for one."""
    assert run_python(AMID_CALL, name, cache, publish(b"x"), timeout=100).stdout == "True\n"


@posix
@pytest.mark.parametrize("way", ["again", "verify", "prune", "clear"])
def test_a_limit_of_time_is_kept_wherever_files_are_worked_on(
    way: str, publish: Publish, run_python: Run, cache: Path
) -> None:
    """Its error is what a file raises that is gone: past one of those we go on."""
    tree = publish(b"x", key="tree/a").rpartition("a")[0]
    assert run_python(AMID_WORK, way, cache, tree, timeout=100).stdout == "True\n"


INTERRUPTED_FIRST = f"""
{INTERRUPTED}
way = sys.argv.pop(1)
cache, *uris = sys.argv[1:]
if way == "json":
    get = s3c.get_json
elif way == "tree":
    uris = [os.path.dirname(uri) + "/" for uri in uris]
else:
    path = get
    get = lambda uri: path(uri).path
for _ in range(60):
    pid = os.fork()  # a process that has not imported socket yet
    if not pid:
        faulthandler.dump_traceback_later(10, exit=True)
        once()
        os._exit(0)
    print(os.waitpid(pid, 0)[1])
"""


@posix
@pytest.mark.parametrize("way", ["path", "json", "tree"])
def test_an_interrupt_amid_the_first_requests_of_many_threads_leaves_no_import_undone(
    way: str, publish: Publish, run_python: Run, cache: Path
) -> None:
    uris = [publish(b"{}", key=f"k{n}/data.json") for n in range(5)]
    done = run_python(INTERRUPTED_FIRST, way, cache, *uris, timeout=100)
    assert (done.stderr, set(done.stdout.split())) == ("", {"0"})


AMID_IMPORT = f"""{LIMIT}
import SUBJECT as s3c, os, sys
way, name, uri, cache = sys.argv[1:]
get = lambda: s3c.get_local_path_for_resource(uri, cache_dir=cache).path
is_whole = lambda: hasattr(sys.modules.get(name), "__all__")
is_default = lambda: signal.getsignal(signal.SIGINT) is signal.default_int_handler
class Finder:
    def find_spec(self, found, *_):
        if found == name: os.kill(os.getpid(), number)
number = signal.SIGALRM if way == "late" else signal.SIGINT
for found in list(sys.modules):  # coverage has imported much already
    if (found + ".").startswith(name + "."): del sys.modules[found]
if way == "handler": signal.signal(signal.SIGINT, lambda *_: print(is_whole()))
sys.meta_path.insert(0, Finder())
try: print(get().read_text())
except (KeyboardInterrupt, TimeoutError): print(is_whole(), is_default(), get().read_text())
"""


@pytest.mark.parametrize("name", ["hashlib", "socket", "urllib.parse", "pathlib"])
@pytest.mark.parametrize("way", ["ctrl-c", pytest.param("late", marks=posix)])
def test_an_interrupt_or_a_limit_of_time_comes_after_the_imports(
    way: str, name: str, publish: Publish, run_python: Run, cache: Path
) -> None:
    done = run_python(AMID_IMPORT, way, name, publish(b"data"), cache)
    assert done.stdout == "True True data\n"


AMID_CERTIFICATES = f"""{LIMIT}
import SUBJECT as s3c, sys
def trace(frame, event, _):
    if event == "call" and frame.f_code.co_name == "create_default_context":
        signal.raise_signal(signal.SIGALRM)
sys.setprofile(trace)
try: s3c.get_json(sys.argv[1])
except BaseException as error: print(repr(error))
"""


@posix
def test_a_limit_of_time_comes_after_the_certificates_are_loaded(
    tls_server: Server, publish: Publish, run_python: Run
) -> None:
    """Amid that, it was told as a bundle without a certificate."""
    done = run_python(AMID_CERTIFICATES, publish({}))
    assert done.stdout == 'TimeoutError("the caller\'s")\n'


def test_a_handler_of_ones_own_is_called_after_the_imports(
    publish: Publish, run_python: Run, cache: Path
) -> None:
    done = run_python(AMID_IMPORT, "handler", "hashlib", publish(b"data"), cache)
    assert done.stdout == "True\ndata\n"


AMID_WAIT = """
import SUBJECT as s3c, signal, sys, threading, time
place, cache, uri = sys.argv[1:]
def get(): return s3c.get_local_path_for_resource(uri, cache_dir=cache)
places = []
def trace(frame, event, _):
    if event == "call" and frame.f_code.co_name == "_acquire_restore":
        places.append(frame.f_back.f_back.f_code.co_name)
        if len(places) > int(place): signal.raise_signal(signal.SIGINT)
"""

AMID_START = f"""
{AMID_WAIT}
sys.setswitchinterval(10)  # no thread runs before its starter waits for it
sys.setprofile(trace)
try: get()
except KeyboardInterrupt: sys.setprofile(None)
while threading.active_count() > 1: time.sleep(0.01)
print(len(places) - int(place), get().status)
"""


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_interrupt_as_a_thread_starts_is_none_of_its_failures(
    place: int, publish: Publish, run_python: Run, cache: Path
) -> None:
    """CPython's wait for the lock's, the hash's and the download's thread may turn it into one."""
    uri = publish(blob(12 * MiB))
    assert run_python(AMID_START, str(place), cache, uri).stdout == "1 downloaded\n"


FLIGHT = f"""
{AMID_WAIT}
other = threading.Thread(target=get)
other.start()
time.sleep(0.3)
sys.setprofile(trace)
try: get()
finally: sys.setprofile(None)
other.join()
print(get().status)
"""


def test_a_wait_for_another_threads_download_holds_its_lock_whenever_an_interrupt_comes(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    server.rate = 10 * MiB
    done = run_python(FLIGHT, "0", cache, publish(blob(12 * MiB)))
    assert done.stdout == "revalidated\n", done.stderr


WATCHED = {"__enter__", "__exit__", "replace", "_instead", "restore", "end", "_deliver", "call"}


@pytest.fixture
def sigterm() -> Iterator[None]:
    """A handler that raises a TimeoutError."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGTERM, late)
    yield
    signal.signal(signal.SIGTERM, before)


def interrupted_at(step: int, act: Callable[[], object], number: int) -> bool:
    """Act, with a real signal at the nth bytecode: whether one came."""
    left, before = [step], sys.gettrace()
    kind = "line" if sys.version_info[:2] == (3, 12) else "opcode"  # 3.12.1 tells no opcodes

    def trace(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_name not in WATCHED:
            return None
        frame.f_trace_opcodes = True
        left[0] -= event == kind
        if left[0] < 0:
            sys.settrace(None)
            signal.raise_signal(number)
        return trace

    sys.settrace(trace)
    try:
        act()
    except (KeyboardInterrupt, TimeoutError):
        return True
    finally:
        sys.settrace(before)
    assert left[0] >= 0, "the signal is lost"
    return False


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_anywhere_in_an_imports_begin_or_end_is_not_lost_and_keeps_nothing(
    number: int, sigterm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_SIGNALS", [signal.SIGTERM, signal.SIGINT])
    step, imports, before = 0, s3c._Imports(), handlers()
    while interrupted_at(step, lambda: imports.__enter__() or imports.__exit__(), number):
        step += 1
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            assert other.submit(imports._lock.acquire, blocking=False).result(), step
            other.submit(imports._lock.release).result()
        assert (imports._depth, imports._deferral) == (0, None), step
        assert handlers() == before, step
    assert step > 15


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_anywhere_in_the_begin_or_end_of_a_call_is_told_and_keeps_nothing(
    number: int, sigterm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_SIGNALS", [signal.SIGTERM, signal.SIGINT])
    step, before = 0, handlers()
    while interrupted_at(step, s3c._boundary(int), number):
        step += 1
        assert handlers() == before, step
    assert step > 15


def test_what_fails_on_the_way_out_does_not_stand_for_a_limit_of_time(sigterm: None) -> None:
    """As in `shutil.rmtree`, which before 3.13 may close a file again."""

    def act() -> None:
        with s3c._Disk("a file"):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os.close(-1)

    with pytest.raises(TimeoutError):
        s3c._boundary(act)()


def test_of_two_signals_amid_an_import_each_handler_is_called(sigterm: None) -> None:
    with pytest.raises(TimeoutError) as caught, s3c._Imports():
        list(map(signal.raise_signal, [signal.SIGINT, signal.SIGTERM]))
    assert isinstance(caught.value.__context__, KeyboardInterrupt)


def leave_with_a_pause(section: Any, step: int) -> None:
    """Enter, and exit when the main thread waits too, with a pause at the nth bytecode of that."""
    left = [step]

    def trace(frame: Any, event: str, _: object) -> Any:
        frame.f_trace_opcodes = True
        left[0] -= event == "opcode"
        if left[0] == -1:
            time.sleep(0.02)
        return trace

    with section:
        while not section._deferral:
            time.sleep(0.001)
        sys.settrace(trace)
    sys.settrace(None)


def test_the_main_threads_import_may_end_amid_the_end_of_anothers() -> None:
    imports = s3c._Imports()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for step in range(60):
            other = pool.submit(leave_with_a_pause, imports, step)
            while not imports._depth:
                time.sleep(0.001)
            with imports:
                pass
            other.result(5)


FORK_AMID_IMPORT = """
import SUBJECT as s3c, os, signal, sys, threading
imports = s3c._IMPORTS
def fork():
    pid = os.fork()
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not pid: os._exit(is_default and s3c._IMPORTS is not imports)
    print(os.waitpid(pid, 0)[1] >> 8)
thread = threading.Thread(target=fork)
try:
    with imports:
        if sys.argv[1] == "missed": signal.raise_signal(signal.SIGINT)
        thread.start()
        thread.join()
except KeyboardInterrupt: print("interrupted")
"""


@posix
@pytest.mark.parametrize(("missed", "told"), [("none", ""), ("missed", "interrupted\n")])
def test_a_child_that_another_thread_forked_amid_the_imports_can_be_interrupted(
    missed: str, told: str, run_python: Run
) -> None:
    """A Ctrl-C that waits is the parent's: in the child it would come amid what a fork mends."""
    assert run_python(FORK_AMID_IMPORT, missed).stdout == "1\n" + told


FORK_AMID_CALL = f"""{LIMIT}
import SUBJECT as s3c, os, sys, threading
uri, cache = sys.argv[1:]
def fork():
    pid = os.fork()
    if pid: return print(os.waitpid(pid, 0)[1] >> 8)
    try: signal.raise_signal(signal.SIGALRM)
    except TimeoutError: os._exit(3)
def progress(_):
    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
s3c.get_local_path_for_resource(uri, cache_dir=cache, progress=progress)
"""


@posix
def test_a_limit_of_time_is_raised_as_it_is_in_a_child_that_another_thread_forked_amid_a_call(
    publish: Publish, run_python: Run, cache: Path
) -> None:
    assert run_python(FORK_AMID_CALL, publish(b"x"), cache).stdout == "3\n"


FORK_WITHIN = """
import SUBJECT as s3c, os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
cache, uri = sys.argv[1:]
parent, pids = os.getpid(), []
def get(**options): return s3c.get_local_path_for_resource(uri, cache_dir=cache, **options)
def fork(_):
    if not pids:
        time.sleep(0.3)  # by now the other thread waits
        pids.append(os.fork())
other = threading.Timer(0.1, get)
other.start()
print(get(progress=fork).status, flush=True)
if os.getpid() != parent: os._exit(0)
os.waitpid(pids[0], 0)
other.join()
"""


@posix
@pytest.mark.leftovers
def test_a_child_forked_by_a_progress_function_ends_the_download_of_its_own(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    uri, server.rate = publish(blob(900_000)), MiB
    assert run_python(FORK_WITHIN, cache, uri).stdout.split() == ["downloaded"] * 2


FORK_LOCK = """
import SUBJECT as s3c, os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
cache, uri = sys.argv[1:]
def get(uri): return s3c.get_local_path_for_resource(uri, cache_dir=cache)
busy = threading.Thread(target=get, args=(uri,))
busy.start()
time.sleep(0.4)
pid = os.fork()
if not pid:
    time.sleep(60)
busy.join()
os.rename(get(uri).path, cache + "/aside")
began = time.monotonic()
print(get(uri).status, time.monotonic() - began < 6)
os.kill(pid, 9)
os.waitpid(pid, 0)
"""


@posix
def test_a_forked_child_keeps_no_lock_alive(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    uri, server.rate = publish(blob(12 * MiB)), 16 * MiB
    assert run_python(FORK_LOCK, cache, uri).stdout == "downloaded True\n"


POOL = """
import SUBJECT as s3c, multiprocessing, sys
from functools import partial
cache, *uris = sys.argv[1:]
if __name__ == "__main__":
    get = partial(s3c.get_local_path_for_resource, cache_dir=cache)
    get(uris[0])
    with multiprocessing.get_context("fork").Pool(3) as pool:
        print({one.from_cache for one in pool.map(get, uris)})
"""


@posix
def test_a_pool_of_forked_processes(publish: Publish, run_python: Run, cache: Path) -> None:
    uris = [publish(b"x", key=f"k{n}") for n in range(12)]
    done = run_python(POOL, cache, *uris, flags=("-W", "ignore::DeprecationWarning"))
    assert eval(done.stdout) == {True, False}


# ==== The end of the interpreter ==============================================================

AT_EXIT = """
import SUBJECT as s3c, atexit, sys
def late():
    try: print(s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2]).status)
    except s3c.S3CacheError as error: print("failed", error)
atexit.register(late)
"""
DEL = """
import SUBJECT as s3c, os, sys
class Late:
    def __del__(self, get=s3c.get_local_path_for_resource, args=tuple(sys.argv), write=os.write):
        # Not print: nobody promises to flush what is printed so late.
        try: write(1, get(args[1], cache_dir=args[2]).status.encode())
        except BaseException as error: write(1, b"failed " + type(error).__name__.encode())
late = Late()
"""
LATE_THREAD = """
import SUBJECT as s3c, sys, threading, time
def late():
    time.sleep(0.3)  # the main thread has ended by now
    print(s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2]).status)
threading.Thread(target=late).start()
"""
DAEMON = """
import SUBJECT as s3c, sys, threading, time
get = lambda: s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2])
threading.Thread(target=get, daemon=True).start()
time.sleep(0.4)
print("bye")
"""


@pytest.mark.parametrize("size", [10, 3 * MiB, 20 * MiB])
@pytest.mark.parametrize("code", [AT_EXIT, LATE_THREAD], ids=["atexit", "a late thread"])
def test_a_call_at_the_end_returns(
    code: str, size: int, publish: Publish, run_python: Run, cache: Path
) -> None:
    done = run_python(code, publish(blob(size)), cache, timeout=15)
    assert (done.stdout, done.stderr) == ("downloaded\n", "")


def test_a_call_in_a_finalizer_returns_or_fails(
    publish: Publish, run_python: Run, cache: Path
) -> None:
    for size in (10, 20 * MiB):
        done = run_python(DEL, publish(blob(size)), cache, timeout=15)
        assert done.stdout.startswith(("downloaded", "failed")), done.stderr


@pytest.mark.leftovers
def test_a_daemon_threads_download_does_not_keep_the_interpreter(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    uri, server.rate = publish(blob(64 * MiB)), 100_000
    began = time.monotonic()
    assert run_python(DAEMON, uri, cache, timeout=15).stdout == "bye\n"
    assert time.monotonic() - began < 10


GET = """
import SUBJECT as s3c, sys
s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2])
"""


@posix
@pytest.mark.leftovers
@pytest.mark.parametrize("size", [1000, 3 * MiB, 20 * MiB])
def test_an_interrupt_ends_a_stalled_download_within_a_second(
    size: int, server: Server, publish: Publish, spawn: Spawn, cache: Path
) -> None:
    uri, server.rate = publish(blob(size)), 100
    child = spawn(GET, uri, cache)
    while not server.seen:
        time.sleep(0.01)
    time.sleep(0.3)
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert "KeyboardInterrupt" in told


# ==== Homes, users, directories ===============================================================

WHERE = """
import SUBJECT as s3c, os, sys
found = s3c.get_local_path_for_resource(sys.argv[1])
assert s3c.get_local_path_for_resource(sys.argv[1]).status == "revalidated"
print(found.path)
"""


@posix
@pytest.mark.root
@pytest.mark.parametrize("home", ["", "/", "/nonexistent", "/root"])
def test_an_arbitrary_user_of_a_container(
    home: str, publish: Publish, public: Path, as_nobody: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No passwd entry, and a home that is missing or somebody else's."""
    import tempfile

    uri = publish(b"data")
    s3c.get_local_path_for_resource(uri, cache_dir=public)  # everything is imported now
    public.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(public))
    monkeypatch.setenv("HOME", home) if home else monkeypatch.delenv("HOME")
    found = as_nobody(lambda: _as_uid_4711(lambda: s3c.get_local_path_for_resource(uri)))
    assert str(found.path).startswith(f"{public}/aind-s3-cache-")


def _as_uid_4711(function: Callable[[], Any]) -> Any:
    """What `as_nobody` calls is a user with a passwd entry: pretend that it has none."""
    import pwd

    def no_entry(uid: int) -> Any:
        raise KeyError(uid)

    pwd.getpwuid = no_entry
    return function()


def _without_threads(resource: Any, function: Callable[[], Any]) -> Any:
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    with pytest.raises(RuntimeError):
        threading.Thread(target=print).start()
    return function()


@posix
@pytest.mark.root
def test_a_user_who_may_start_no_threads(
    publish: Publish, public: Path, as_nobody: Any, small_parts: None
) -> None:
    resource, data = pytest.importorskip("resource"), blob(MiB)
    uris = [publish(data, key="large"), publish(b"x", key="x"), publish(b"y", key="y")]
    get_all = partial(s3c.get_local_paths_for_resources, uris, cache_dir=public / "theirs")
    s3c.get_local_paths_for_resources(uris, cache_dir=public)  # everything is imported now
    public.chmod(0o1777)
    results = as_nobody(lambda: _without_threads(resource, get_all))
    assert [r.path.read_bytes() for r in results] == [data, b"x", b"y"]


WITHIN = """
import sys; sys.path, (cache, *uris) = PATH_AND_ARGS
import SUBJECT as s3c
for asked in uris, iter(uris):
    print(*(r.size for r in s3c.get_local_paths_for_resources(asked, cache_dir=cache)), flush=True)
    s3c.CacheManager(cache).clear()
"""

SUBINTERPRETER = f"""
import _interpreters, sys
code = {WITHIN!r}.replace("PATH_AND_ARGS", repr((sys.path, sys.argv[1:])))
print(_interpreters.run_string(_interpreters.create(), code))  # its error, or None
"""


def test_a_subinterpreter_that_may_start_no_daemon_threads(
    publish: Publish, run_python: Run, cache: Path
) -> None:
    """As those of `concurrent.futures.InterpreterPoolExecutor`."""
    pytest.importorskip("_interpreters")  # in 3.12 they cannot parse a listing's XML
    publish(b"x", key="tree/a")
    uris = [publish(blob(12 * MiB)), publish(b"y", key="tree/b").rpartition("b")[0]]
    done = run_python(SUBINTERPRETER, cache, *uris)
    assert done.stdout == f"{12 * MiB} 2\n" * 2 + "None\n"


@posix
def test_a_deleted_working_directory(
    publish: Publish, run_python: Run, cache: Path, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    # In such a place Python 3.13.0 imports no further module of its own: so have them all first.
    call = "s3c.get_local_path_for_resource(sys.argv[2])"
    code = f"import SUBJECT as s3c, os, sys; {call}; os.rmdir(os.getcwd())\n" + WHERE
    uris = publish(b"data"), publish(b"other", key="other")
    done = run_python(code, *uris, cwd=gone)
    assert Path(done.stdout.strip()).read_bytes() == b"data"


@posix
def test_a_relative_cache_in_a_deleted_directory_is_one_clear_error(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(OSError, match=r".") as caught:
        s3c.get_local_path_for_resource(publish(b"data"), cache_dir="here")
    assert caught.value.errno == errno.ENOENT
    os.chdir(tmp_path)


READ_ONLY = """
import SUBJECT as s3c, os, sys
uri, held, cache = sys.argv[1:]
try: os.mkdir(cache + "/x")
except OSError: pass
else: sys.exit("not read-only")
print(s3c.get_local_path_for_resource(held, cache_dir=cache).status)
print(s3c.get_json(held))
for options in ({}, {"cache_dir": cache}):
    try: s3c.get_local_path_for_resource(uri, **options)
    except s3c.CacheError as error: print(error.errno, error)
"""


@pytest.mark.root
@pytest.mark.skipif(sys.platform != "linux", reason="mounts as Linux does")
def test_a_read_only_root_file_system(
    publish: Publish, prelude: str, cache: Path, tmp_path: Path
) -> None:
    """All of the machine is read-only, in a mount namespace of the child's own."""
    held, uri = publish({"a": 1}, key="held.json"), publish(b"new", key="new")
    s3c.get_local_path_for_resource(held, cache_dir=cache)
    code, env = prelude + READ_ONLY.replace("SUBJECT", subject_name), dict(os.environ)
    script = 'for m in $(cut -d" " -f2 /proc/mounts | grep -v -e ^/proc -e ^/sys -e ^/dev$);'
    script += ' do mount -o remount,bind,ro "$m" 2>/dev/null; done; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-B", "-c", code]
    done = subprocess.run(
        [*command, uri, held, str(cache)], env=env, capture_output=True, text=True, timeout=30
    )
    if "not read-only" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"this machine cannot make its root read-only: {done.stderr[:80]}")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["revalidated", "{'a': 1}"], done.stderr
    assert len(lines) == 4
    assert lines[3].startswith(f"{errno.EROFS} Cannot use the cache at {cache}")


# ==== Packed ==================================================================================


def test_a_zipapp_works(publish: Publish, cache: Path, tmp_path: Path) -> None:
    source = tmp_path / "app"
    source.mkdir()
    (source / "_s3cache.py").write_bytes(SUBJECT_FILE.read_bytes())
    main = "import _s3cache, sys\nsys.exit(_s3cache.main(sys.argv[1:]))\n"
    (source / "__main__.py").write_text(main)
    zipapp.create_archive(source, tmp_path / "app.pyz")
    command = [sys.executable, str(tmp_path / "app.pyz"), "get", "--cache-dir", str(cache)]
    done = subprocess.run([*command, publish(b"data")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == b"data"


def test_an_optimized_interpreter_checks_as_much(
    publish: Publish, run_python: Run, cache: Path
) -> None:
    """`-OO` takes away assert and docstrings."""
    wrong = publish(blob(9 * MiB), etag=f'"{hashlib.md5(b"other").hexdigest()}"')
    done = run_python(GET, wrong, cache, flags=("-OO",), check=False)
    assert "IntegrityError" in done.stderr


# ==== A power cut =============================================================================


CUT = """
import SUBJECT as s3c, ctypes, fcntl, os, sys
uri, disk = sys.argv[1:3]
there = os.open(disk, os.O_RDONLY)
os.sync()
if sys.argv[3] == "after":
    found = s3c.get_local_path_for_resource(uri, cache_dir=disk)
    # Once names are on disk, so must be what they stand for. What was written out of order, the
    # kernel may have written out in any order: here its end first, which gives the file its size.
    if found.size > 8 << 20:
        end, page = os.open(found.path, os.O_RDONLY), found.size // 4096 * 4096 - 4096
        long = ctypes.c_long
        assert not ctypes.CDLL(None).sync_file_range(end, long(page), long(4096), 7)
    journal = os.open(disk + "/journal", os.O_CREAT | os.O_WRONLY)
    os.fsync(journal)
    fcntl.ioctl(there, 0x8004587D, b"\\2\\0\\0\\0")
else:
    def cut(size, left=[int(sys.argv[3])]):
        left[0] -= size
        if left[0] < 0: fcntl.ioctl(there, 0x8004587D, b"\\2\\0\\0\\0")
    try: s3c.get_local_path_for_resource(uri, cache_dir=disk, progress=cut)
    except s3c.CacheError as error: print(error.errno)
"""


def _remount(image: Path, disk: Path) -> None:
    subprocess.run(["umount", str(disk)], check=True)
    while subprocess.check_output(["losetup", "-j", str(image)]):
        time.sleep(0.05)  # the namespace of another test, made meanwhile, still has it
    subprocess.run(["mount", "-o", "loop", str(image), str(disk)], check=True)


@pytest.mark.root
@pytest.mark.leftovers
@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 3 * MiB, 20 * MiB])
@pytest.mark.parametrize("when", ["after", 0, 500, 2 * MiB, 12 * MiB])
def test_a_power_cut_shows_the_old_state_or_the_new(
    when: Any, size: int, publish: Publish, mount: Any, run_python: Run, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    with open(image, "wb") as file:
        file.truncate(96 * MiB)
    make = shutil.which("mkfs.ext4")  # of e2fsprogs, which small images lack
    if not make or subprocess.run([make, "-q", str(image)]).returncode:
        pytest.skip("this machine makes no ext4")
    disk = mount("loop,commit=600", "ext4", image)
    uri = publish(blob(size))
    done = run_python(CUT, uri, disk, when, check=False)
    if "Inappropriate ioctl" in done.stderr or "not permitted" in done.stderr:
        pytest.skip("this kernel does not pull the plug")
    assert done.returncode == 0, done.stderr
    _remount(image, disk)
    _is_old_or_new(uri, disk, size)


def _is_old_or_new(uri: str, disk: Path, size: int) -> None:
    get = partial(s3c.get_local_path_for_resource, uri, cache_dir=disk)
    try:
        assert get(offline=True).path.read_bytes() == blob(size)
    except s3c.OfflineError:
        pass
    assert get().path.read_bytes() == blob(size)
