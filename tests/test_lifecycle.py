"""Forks, exits, odd homes, read-only roots, power cuts: what a process may meet in its life."""

from __future__ import annotations

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
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import SUBJECT_FILE, MiB, Publish, Run, Spawn, blob, posix
from server import Server
from subject import name as subject_name
from subject import s3c

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


AMID_CALL = """
import SUBJECT as s3c, inspect, os, signal, sys, threading
cache, uri, last = *sys.argv[1:], []
class Late(Exception): pass
class Missing(s3c.NotFoundError): pass
kinds = [KeyboardInterrupt, Late, Missing]
def late(*_): raise kind("late")
signal.signal(signal.SIGINT, late)
def get(where): return s3c.get_local_path_for_resource(uri, cache_dir=where)
def interrupt(step, where):
    def trace(frame, event, function):
        code = frame.f_code
        is_ours = code.co_filename == s3c.__file__ and not code.co_flags & inspect.CO_GENERATOR
        if getattr(function, "__name__", "") == "__enter__": return  # `with` itself, in 3.15
        if event in ("call", "c_return") and is_ours:
            last.append((code.co_name, frame.f_lineno))
            if len(last) == step: signal.raise_signal(signal.SIGINT)
    last.clear()
    sys.setprofile(trace)
    try: return not get(where)
    except (kind, s3c.CacheError): return True
    finally: sys.setprofile(None)
def came_to(step, where):
    told = interrupt(step, where)
    other = threading.Thread(target=get, args=(where,), daemon=True)
    other.start()
    other.join(5)
    get(where)
    came = len(last) >= step
    left = s3c._FLIGHTS or s3c._TURN._taken or s3c._TURN.here.inside
    # That no object is there, a look for a file takes for its own.
    if came and (other.is_alive() or left or not (told or kind is Missing)):
        print(kind.__name__, "in", *last[step - 1], flush=True)
    return came
get(cache)  # imports
for step in range(1, 2000):
    pid = os.fork()
    if not pid:
        came = 0
        for kind in kinds[step % 3 :] + kinds[: step % 3]:  # the first of them has to connect
            came |= came_to(step, f"{cache}/{kind}{step}")
        os._exit(not came)
    if os.waitpid(pid, 0)[1]: break
print(step > 100)
"""


@posix
def test_wherever_a_signals_error_comes_it_is_raised_and_other_threads_get_the_object(
    publish: Publish, run_python: Run, cache: Path
) -> None:
    """At each of our calls, and after each of those into C: that is where Python looks for one."""
    assert run_python(AMID_CALL, cache, publish(b"x"), timeout=100).stdout == "True\n"


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


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_an_interrupt_as_a_thread_starts_is_none_of_its_failures(
    place: int, publish: Publish, run_python: Run, cache: Path
) -> None:
    """CPython may turn it into one: as it waits for the threads of lock, hash, download and end."""
    uri = publish(blob(12 * MiB))
    assert run_python(AMID_START, str(place), cache, uri).stdout == "1 downloaded\n"


AMID_BIRTH = """
import SUBJECT as s3c, os, signal, sys, time
cache, uri, births = *sys.argv[1:], []
signal.signal(signal.SIGALRM, lambda *_: 1 / 0)
def trace(frame, event, function):
    if event == "c_return" and "start_" in function.__name__ and "_thread" in function.__name__:
        births.append(function)
        if len(births) == 2: signal.raise_signal(signal.SIGALRM)
sys.setprofile(trace)
try: s3c.get_local_path_for_resource(uri, cache_dir=cache)
except ZeroDivisionError: sys.setprofile(None)
time.sleep(0.3)
print(len(births), end=" ")
fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
print([at for at in map(os.readlink, filter(os.path.exists, fds)) if "partial" in at])
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts file descriptors")
def test_a_signals_error_as_the_hashs_thread_starts_leaves_no_file_open(
    publish: Publish, run_python: Run, cache: Path
) -> None:
    """CPython then forgets the thread, which does nothing: it cannot be what lets go of a file."""
    assert run_python(AMID_BIRTH, cache, publish(blob(12 * MiB))).stdout == "2 []\n"


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


FORK_WITHIN = """
import SUBJECT as s3c, os, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
cache, uri = sys.argv[1:]
parent, pids = os.getpid(), []
def get(**options): return s3c.get_local_path_for_resource(uri, cache_dir=cache, **options)
def fork(_):
    if not pids:
        pids.append(0)
        other.start()
        time.sleep(0.3)  # by now the other thread waits
        pids[0] = os.fork()
other = threading.Thread(target=get)
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
DEL_MANY = DEL.replace("path_for_resource", "paths_for_resources").replace(
    "get(args[1], cache_dir=args[2])", "get(args[1:2], cache_dir=args[2])[0]"
)
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


@pytest.mark.parametrize("code", [DEL, DEL_MANY], ids=["one", "a batch"])
def test_a_call_in_a_finalizer_returns_or_fails(
    code: str, publish: Publish, run_python: Run, cache: Path
) -> None:
    for size in (10, 20 * MiB):
        done = run_python(code, publish(blob(size)), cache, timeout=15)
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
@pytest.mark.parametrize(
    ("when", "size"),
    [
        *(("after", size) for size in (1000, 3 * MiB, 20 * MiB)),
        *((0, 1000), (2 * MiB, 3 * MiB), (0, 20 * MiB), (12 * MiB, 20 * MiB)),
    ],
)
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
