"""Crash resume by adopt-by-copy: what a killed download left is used, and nothing wrong ever is."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import NOBODY, Get, MiB, Publish, Spawn, blob, new_client
from server import RESET, Server
from subject import s3c

DAY = 86400.0
SIZE = 32 * MiB
CHUNK: int = s3c._CHUNK
COUNT = SIZE // CHUNK

pytestmark = [
    pytest.mark.leftovers,
    pytest.mark.skipif(os.name != "posix", reason="kills processes by signal"),
]


DATA, OTHER = blob(SIZE), blob(SIZE, 1)

CHILD = """
import SUBJECT as s3c, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as scripts for Slurm do
signal.signal(signal.SIGALRM, lambda *_: 1 / 0)  # a limit of time, with an error of its own
s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2])
"""


def parts(cache: Path) -> Path:
    return cache / "aind-s3-cache" / "partial"


def logged(cache: Path) -> int:
    """How many bytes are noted as done, in whole chunks."""
    lines = sum(log.read_bytes().count(b"\n") for log in parts(cache).glob("*.log"))
    return lines * CHUNK


def start_counting(server: Server) -> None:
    """Count from zero, and not what is still on its way to the dead."""
    sent = -1
    while sent != server.bytes_sent:
        sent = server.bytes_sent
        time.sleep(0.05)
    server.reset()


@pytest.fixture(scope="module")
def lasting_server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(lasting_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """One server for all tests: an orphan belongs to its endpoint, and is made only once."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", lasting_server.url)
    yield lasting_server
    lasting_server.before, lasting_server.ignore_if_match = None, False
    lasting_server.always(None).reset()


@pytest.fixture
def kill(spawn: Spawn, server: Server, cache: Path) -> Callable[..., Path]:
    """`kill(uri, size)`: the data file of a download that is killed half way; counts from zero."""

    def kill(uri: str, size: int = SIZE, number: int = signal.SIGKILL, cache: Path = cache) -> Path:
        server.rate = size // 8
        child = spawn(CHILD, uri, cache)
        while logged(cache) < size // 2:
            assert child.poll() is None, child.communicate()
            time.sleep(0.002)
        child.send_signal(number)
        child.wait(10)
        server.rate = None
        start_counting(server)
        (data,) = parts(cache).glob("*.data")
        return data

    return kill


@pytest.fixture(scope="module")
def orphans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("orphans")


@pytest.fixture
def leave(kill: Any, server: Server, cache: Path, orphans: Path) -> Callable[[str], Path]:
    """`leave(uri)`: what `kill` left of DATA, from the first test that needed it."""

    def leave(uri: str) -> Path:
        kept = orphans / "of-data"
        if not kept.exists():
            kill(uri)
            shutil.copytree(cache, kept)
        elif not cache.exists():
            shutil.copytree(kept, cache)
        server.reset()
        (data,) = parts(cache).glob("*.data")
        return data

    return leave


@pytest.fixture
def take_up(
    server: Server, publish: Publish, get: Get, cache: Path, small_parts: None
) -> Callable[[Callable[[Path], Any]], None]:
    """`take_up(damage)`: a download that was broken off half way, its data file damaged, ends well.

    Small sizes: 64 chunks of 16 KiB.
    """

    def take_up(damage: Callable[[Path], Any]) -> None:
        uri, options = publish(DATA[:MiB]), {"multipart_threshold_bytes": 256 << 10}
        with pytest.raises(KeyboardInterrupt):
            get(uri, progress=interrupt_at(MiB // 2), **options)
        start_counting(server)
        (data,) = parts(cache).glob("*.data")
        assert with_log(data).read_bytes().count(b"\n") > 16
        damage(data)
        assert get(uri, **options).path.read_bytes() == DATA[:MiB]
        assert server.bytes_sent <= MiB

    return take_up


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3c, "_PEER_PATIENCE", 0.2)


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.chmod(0o600)
    path.write_bytes(change(path.read_bytes()))


def with_log(data: Path) -> Path:
    return data.with_suffix(".log")


# ==== After kill -9 ===========================================================================


def test_a_killed_download_is_taken_up(
    leave: Any, server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    uri = publish(DATA)
    leave(uri)
    assert get(uri).path.read_bytes() == DATA
    assert server.bytes_sent <= 0.6 * SIZE
    assert list(parts(cache).iterdir()) == []


def test_what_is_fetched_later_is_pinned_to_the_version(
    leave: Any, server: Server, publish: Publish, get: Get
) -> None:
    uri = publish(DATA)
    leave(uri)
    etag = get(uri).etag
    later = [r for r in server.seen if not r.headers["range"].startswith("bytes=0-")]
    assert {request.headers.get("if-match") for request in later} == {etag}


def test_it_may_be_killed_again_and_again(
    leave: Any, server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    """Each attempt adopts what the one before it left, and adds to it."""
    uri = publish(DATA)
    leave(uri)
    for data in parts(cache).glob("*.data"):
        for path in (data, with_log(data)):
            shutil.copy(path, path.with_name(path.name.replace(path.name.split(".")[2], "f" * 16)))
    assert get(uri).path.read_bytes() == DATA
    assert server.bytes_sent <= 0.6 * SIZE


def test_verified_progress_counts_only_what_is_received(
    leave: Any, server: Server, publish: Publish, get: Get
) -> None:
    counts: list[int] = []
    uri = publish(DATA)
    leave(uri)
    get(uri, progress=counts.append)
    assert sum(counts) <= 0.6 * SIZE


# ==== What must not be adopted ================================================================


def _flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _first_logged(data: Path) -> int:
    return int(with_log(data).read_bytes().split()[0], 16) * CHUNK


def test_a_flipped_bit_in_the_orphan(
    leave: Any, server: Server, publish: Publish, get: Get
) -> None:
    uri = publish(DATA)
    data = leave(uri)
    edit(data, _flip(_first_logged(data) + 4711))
    assert get(uri).path.read_bytes() == DATA
    assert server.bytes_sent <= 0.65 * SIZE


@pytest.mark.slow
def test_kill_9_at_half_of_256_mib_and_a_flipped_bit(
    kill: Any, server: Server, publish: Publish, get: Get
) -> None:
    data = blob(256 * MiB)
    uri = publish(data)
    orphan = kill(uri, len(data))
    edit(orphan, _flip(_first_logged(orphan)))
    found = get(uri)
    assert (found.status, found.path.read_bytes() == data) == ("downloaded", True)
    assert server.bytes_sent <= 0.6 * len(data)


@pytest.fixture
def unreadable() -> Iterator[Callable[[Path], None]]:
    """`unreadable(path)`: it can be opened, and reading it is an input/output error."""
    if not sys.platform.startswith("linux") or os.geteuid():
        pytest.skip("to mount a file over another needs root on Linux")
    mounted: list[Path] = []

    def cover(path: Path) -> None:
        memory = f"/proc/{os.getpid()}/mem"  # nothing is at address 0
        done = subprocess.run(["mount", "--bind", memory, path], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("this machine does not mount a file over another")
        mounted.append(path)

    yield cover
    for path in mounted:
        subprocess.run(["umount", path], check=True)
        path.unlink()


def test_an_orphan_that_cannot_be_read_leaves_no_hole(
    leave: Any, unreadable: Any, publish: Publish, get: Get
) -> None:
    """As on NFS, where a file that another host removes is stale in mid-read."""
    uri = publish(DATA)
    unreadable(leave(uri))
    assert get(uri).path.read_bytes() == DATA


def test_a_chunk_given_back_when_all_workers_have_left_is_fetched(
    leave: Any, server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orphan of wrong sums, read so slowly that it holds the last chunk to the end."""
    uri = publish(DATA)
    edit(with_log(leave(uri)), lambda log: b"".join(b"%x 12345678\n" % i for i in range(COUNT)))
    server.rate, crc32, began = SIZE // 4, zlib.crc32, time.monotonic()

    def slow_crc32(data: Any, crc: int = 0) -> int:
        late = time.monotonic() > began + 1
        time.sleep(1 if late and threading.current_thread() is threading.main_thread() else 0)
        return crc32(data, crc)

    monkeypatch.setattr(zlib, "crc32", slow_crc32)
    assert get(uri, max_concurrency=2).path.read_bytes() == DATA
    assert server.bytes_sent < SIZE + 2 * MiB  # each byte once


TORN: dict[str, Callable[[bytes], bytes]] = {
    "cut in a line": lambda log: log[:-3],
    "a line without its end": lambda log: log + b"1f 0000",
    "no line at all": lambda log: b"",
    "zeros, as after a power cut": lambda log: b"\0" * len(log),
    "zeros at the end": lambda log: log[:20] + b"\0" * (len(log) - 20),
    "noise": lambda log: log + bytes(range(256)),
    "numbers out of range": lambda log: log + b"-1 00000000\nffffffff 00000000\n40 00000000\n",
    "short and long sums": lambda log: log + b"1 0\n2 00000000ff\n3\n4 5 6\n\n \n",
    "wrong sums": lambda log: b"".join(b"%x 12345678\n" % i for i in range(64)),
    "wrong sums after right ones": lambda log: (
        log + b"".join(b"%x 0000abcd\n" % i for i in range(64))
    ),
    "chunks swapped": lambda log: log.replace(b"0 ", b"1 ", 1),
    "not of this world": lambda log: "\u0661 \u0662\n".encode() + b"\xff\xfe 00000000\n" + log,
}


@pytest.mark.parametrize("tear", TORN)
def test_a_torn_log_costs_traffic_only(tear: str, take_up: Any) -> None:
    take_up(lambda data: edit(with_log(data), TORN[tear]))


def test_a_log_of_any_length_takes_no_memory(cache: Path) -> None:
    file = s3c._Partial(s3c._Store(str(cache)), "ident", "version", 1, False, True)
    other = os.path.join(parts(cache), file.key + "other")
    for ending, data in ((".data", b"x"), (".log", b"1 00000000\n" * 50_000)):
        Path(other + ending).write_bytes(data)
    tracemalloc.start()
    try:
        assert file.adopt() == 0
        assert tracemalloc.get_traced_memory()[1] < 500_000  # all lines at once: 3 MB
    finally:
        tracemalloc.stop()
        file.close()


def _to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _to_link(path: Path) -> None:
    path.rename(f"{path}.x")
    path.symlink_to(f"{path}.x")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda data: edit(data, lambda _: b""),
    "cut": lambda data: edit(data, lambda all_: all_[: len(all_) // 3]),
    "zeros of the right size": lambda data: edit(data, lambda all_: bytes(len(all_))),
    "gone": Path.unlink,
    "without its log": lambda data: with_log(data).unlink(),
    "a FIFO": _to_fifo,
    "with a FIFO for a log": lambda data: _to_fifo(with_log(data)),
    "a directory": _to_directory,
    "a symlink": _to_link,
    "unreadable": lambda data: data.chmod(0),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_orphan_costs_traffic_only(damage: str, take_up: Any) -> None:
    take_up(DAMAGE[damage])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts file descriptors")
def test_a_directory_in_the_place_of_a_partial_file_keeps_none_open(cache: Path) -> None:
    """A long download looks at it each second, and would have no descriptors left."""
    file = s3c._Partial(s3c._Store(str(cache)), "ident", "version", 1, False, True)
    (parts(cache) / f"{file.key}other.data").mkdir()
    before = os.listdir("/proc/self/fd")
    file.adopt()
    assert os.listdir("/proc/self/fd") == before
    file.close()


@pytest.mark.root
@pytest.mark.parametrize("ending", [".data", ".log"])
def test_another_users_partial_file_is_not_trusted(
    ending: str, leave: Any, server: Server, publish: Publish, get: Get
) -> None:
    if os.geteuid() != 0:
        pytest.skip("to give a file to another user needs root")
    uri = publish(DATA)
    os.chown(leave(uri).with_suffix(ending), NOBODY, NOBODY)
    assert get(uri).path.read_bytes() == DATA
    assert server.bytes_sent == SIZE


def test_what_a_mount_shows_as_anothers_is_used_where_it_shows_ours_so(
    leave: Any, server: Server, publish: Publish, cache: Path, preload: Any, run_python: Any
) -> None:
    """As sshfs does, and exFAT: all is one user's, whoever we are."""
    uri = publish(DATA)
    leave(uri)
    another = "#include <unistd.h>\nuid_t geteuid(void) { return 4242; }"
    run_python(CHILD, uri, cache, env=preload(another))
    assert server.bytes_sent < SIZE


def test_another_version_of_the_same_size_is_not_mixed_in(
    leave: Any, server: Server, publish: Publish, get: Get
) -> None:
    leave(publish(DATA))
    assert get(publish(OTHER)).path.read_bytes() == OTHER
    assert server.bytes_sent == SIZE


def test_another_endpoint_is_another_object(
    kill: Any, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ETag means nothing there."""
    kill(publish(DATA, etag='"same"'))
    with Server() as other:
        other.put("aind-open-data", "data.json", OTHER, etag='"same"')
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.url)
        assert get("s3://aind-open-data/data.json").path.read_bytes() == OTHER


# ==== The object changes ======================================================================


def test_a_change_in_mid_download_drops_what_is_there(
    server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    uri = publish(DATA)

    def change(request: Any) -> None:
        if request.number == 4:
            publish(OTHER)

    server.before = change
    found = get(uri)
    assert found.path.read_bytes() == OTHER
    assert list(parts(cache).iterdir()) == []


def test_a_change_that_the_server_does_not_mind_is_seen(
    server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    """If-Match ignored: every answer's ETag is compared."""
    uri, server.ignore_if_match = publish(DATA), True

    def change(request: Any) -> None:
        if request.number == 4:
            publish(OTHER)

    server.before = change
    assert get(uri).path.read_bytes() == OTHER
    assert list(parts(cache).iterdir()) == []


# ==== When partial files stay, and when they go ===============================================


def stand_still(cache: Path) -> None:
    """As if nobody had written to the partial files for some minutes."""
    for path in parts(cache).glob("*"):
        at = path.stat().st_mtime - 300
        os.utime(path, (at, at))


def interrupt_at(
    size: int, error: type[BaseException] = KeyboardInterrupt
) -> Callable[[int], None]:
    """Return a progress function that breaks a download off."""
    counts: list[int] = []

    def progress(count: int) -> None:
        counts.append(count)
        if sum(counts) >= size:
            raise error

    return progress


@pytest.fixture
def break_off(server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path, quick: None) -> None:
    """The server answers until something is noted, then resets every connection."""
    monkeypatch.setattr(s3c, "_RETRIES", 2)

    def before(request: Any) -> None:
        if logged(cache):
            server.always(raw=[RESET])

    server.before = before


def test_a_failed_transfer_keeps_one_partial_file(
    break_off: None, server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    uri = publish(DATA)
    with pytest.raises(s3c.TransferError):
        get(uri, max_concurrency=2)
    assert sorted(path.suffix for path in parts(cache).iterdir()) == [".data", ".log"]
    kept, server.before = logged(cache), None
    start_counting(server.always(None))
    assert get(uri).path.read_bytes() == DATA
    assert 0 < server.bytes_sent <= SIZE - kept + 8 * MiB
    assert list(parts(cache).iterdir()) == []


def test_credentials_that_expire_keep_the_partial_file(
    server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    """Hours into a download, say: who has logged in anew goes on with it."""
    uri = publish(DATA)
    expired = server._script(400, code="ExpiredToken")
    server.before = lambda _: expired if logged(cache) else None
    with pytest.raises(s3c.AccessDeniedError):
        get(uri, s3_client=new_client(server.url), max_concurrency=2)
    kept, server.before = logged(cache), None
    start_counting(server)
    assert get(uri, s3_client=new_client(server.url)).path.read_bytes() == DATA
    assert 0 < server.bytes_sent <= SIZE - kept + 8 * MiB < SIZE + 8 * MiB


def test_many_that_are_broken_off_leave_one_partial_file(
    publish: Publish, get: Get, cache: Path
) -> None:
    uri = publish(DATA)
    for at in (4, 5, 6):
        stand_still(cache)
        with pytest.raises(KeyboardInterrupt):
            get(uri, max_concurrency=2, progress=interrupt_at(at * MiB))
    assert len(list(parts(cache).glob("*.data"))) == 1


def test_a_dead_partial_file_whose_name_begins_ours_goes_without_it(
    server: Server, publish: Publish, get: Get, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process numbers its files: what is made as number 10 begins like number 1."""
    monkeypatch.setattr(s3c, "_SERIAL", itertools.count(1))
    uri = publish(DATA)
    with pytest.raises(KeyboardInterrupt):
        get(uri, max_concurrency=2, progress=interrupt_at(4 * MiB))
    (data,) = parts(cache).glob("*.data")
    stand_still(cache)
    serial = data.stem.rpartition(".")[2].removeprefix(s3c._process_id())
    monkeypatch.setattr(s3c, "_SERIAL", itertools.count(int(serial + "000", 16)))
    kept = logged(cache)
    start_counting(server)
    assert get(uri).path.read_bytes() == DATA
    assert server.bytes_sent <= SIZE - kept + 8 * MiB
    assert list(parts(cache).iterdir()) == []


@pytest.mark.root
def test_a_disk_without_room_for_both_begins_anew(kill: Any, publish: Publish, mount: Any) -> None:
    """What was killed takes the space that the whole object needs."""
    uri, disk = publish(DATA), mount("size=40m")
    kill(uri, cache=disk)
    found = s3c.get_local_path_for_resource(uri, cache_dir=disk)
    assert found.path.read_bytes() == DATA


@pytest.mark.root
def test_a_quota_without_room_for_both_begins_anew(
    kill: Any, publish: Publish, mount: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which statvfs tells nothing. Who wrote to a partial file just now may live."""
    uri, disk = publish(DATA), mount("size=40m")
    kill(uri, cache=disk)
    monkeypatch.setattr(s3c, "_free", lambda _: None)
    with pytest.raises(s3c.CacheError, match="No space left"):
        s3c.get_local_path_for_resource(uri, cache_dir=disk)
    assert len(list(parts(disk).glob("*.data"))) == 1
    stand_still(disk)
    found = s3c.get_local_path_for_resource(uri, cache_dir=disk)
    assert found.path.read_bytes() == DATA


def test_a_server_that_fails_for_a_while_leaves_no_copies(
    server: Server, publish: Publish, get: Get, cache: Path, quick: None
) -> None:
    """What any worker brings refills the patience of all."""
    uri = publish(DATA)
    most: list[int] = []

    def before(request: Any) -> tuple[Any, ...] | None:
        most.append(len(list(parts(cache).glob("*.data"))) if parts(cache).exists() else 0)
        return (200, b"", {}, (RESET,)) if len(server.seen) % 2 else None

    server.before = before
    assert get(uri, max_concurrency=2).path.read_bytes() == DATA
    assert max(most) <= 1  # a variant that starts again has one for every attempt


def test_patience_with_the_parts_is_all_the_patience_there_is(
    server: Server, publish: Publish, get: Get, quick: None
) -> None:
    uri = publish(DATA)
    server.before = lambda asked: (200, b"", {}, (RESET,)) if "if-match" in asked.headers else None
    with pytest.raises(s3c.TransferError, match="after 9 attempts"):
        get(uri, max_concurrency=2)
    # Two workers, two connections an attempt; and what the first answer brings is progress.
    assert len(server.seen) <= 1 + 6 * 9, "retries of retries"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGALRM])
def test_a_signal_keeps_the_partial_file(
    number: int, kill: Any, server: Server, publish: Publish, get: Get
) -> None:
    uri = publish(DATA)
    kill(uri, number=number)
    assert get(uri).path.read_bytes() == DATA
    assert server.bytes_sent <= 0.6 * SIZE


def test_a_slow_download_is_noted_before_a_block_is_full(
    server: Server, publish: Publish, get: Get, cache: Path, cut: Any
) -> None:
    """The server sends a chunk and a half, then a byte at a time until the chunk is in the log."""
    uri, sent, noted = publish(DATA[: 9 * MiB]), s3c._CHUNK * 3 // 2, []

    def drip(sock: Any) -> None:
        for at in range(sent, sent + 200):
            noted.append(logged(cache))
            if noted[-1]:
                break
            time.sleep(0.05)
            sock.sendall(DATA[at : at + 1])
        sock.sendall(DATA[at : 8 * MiB])

    cut(sent, drip)
    assert get(uri, max_concurrency=1).path.read_bytes() == DATA[: 9 * MiB]
    assert noted[-1] == s3c._CHUNK


class Odd(Exception):
    pass


def _fail(_: int) -> None:
    raise Odd


def test_a_callback_that_cancels_keeps_the_partial_file(
    server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    uri = publish(DATA)
    with pytest.raises(Odd):
        get(uri, max_concurrency=2, progress=interrupt_at(SIZE // 2, Odd))
    kept = logged(cache)
    assert kept > 0
    start_counting(server)
    assert get(uri).path.read_bytes() == DATA
    assert server.bytes_sent <= SIZE - kept + 8 * MiB


def test_a_callback_that_fails_at_once_leaves_nothing(
    publish: Publish, get: Get, cache: Path
) -> None:
    with pytest.raises(Odd):
        get(publish(DATA), progress=_fail)
    assert list(parts(cache).iterdir()) == []


def test_a_wrong_checksum_leaves_nothing(publish: Publish, get: Get, cache: Path) -> None:
    md5 = hashlib.md5(OTHER).hexdigest()
    with pytest.raises(s3c.IntegrityError):
        get(publish(DATA, etag=f'"{md5}"'))
    assert list(parts(cache).iterdir()) == []


def test_a_vanished_object_leaves_nothing(
    server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    uri = publish(DATA)

    def vanish(request: Any) -> None:
        if request.number == 4:
            server.delete("aind-open-data", "data.json")

    server.before = vanish
    with pytest.raises(s3c.NotFoundError):
        get(uri)
    assert list(parts(cache).iterdir()) == []


# ==== Orphans =================================================================================


@pytest.mark.parametrize(("days", "stays"), [(6, True), (8, False)])
def test_orphans_are_collected_by_age(
    days: int, stays: bool, leave: Any, publish: Publish, cache: Path
) -> None:
    data = leave(publish(DATA))
    for path in (data, with_log(data)):
        os.utime(path, (time.time() - days * DAY,) * 2)
    manager = s3c.CacheManager(cache)
    assert [entry.kind for entry in manager.entries()] == ["partial"]
    manager.prune()
    assert data.exists() is with_log(data).exists() is stays


@pytest.mark.parametrize("ending", [".data", ".log"])
def test_half_an_orphan_is_collected_too(ending: str, cache: Path) -> None:
    """Who makes one may be killed between its two files."""
    parts(cache).mkdir(parents=True)
    path = parts(cache) / f"{'0' * 20}.{'1' * 16}.2{ending}"
    path.touch()
    os.utime(path, (1, 1))
    assert len(s3c.CacheManager(cache).prune()) == 1
    assert list(parts(cache).iterdir()) == []


def test_a_partial_file_that_grows_is_no_orphan(leave: Any, publish: Publish, cache: Path) -> None:
    data = leave(publish(DATA))
    os.utime(data, (1, 1))
    s3c.CacheManager(cache).prune(max_age_days=0, max_size_bytes=0)
    assert data.exists()


def test_a_partial_file_is_never_served(leave: Any, publish: Publish, get: Get) -> None:
    uri = publish(DATA)
    leave(uri)
    with pytest.raises(s3c.OfflineError):
        get(uri, offline=True)


def test_a_download_outlives_the_removal_of_its_files(
    server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    """A peer's `clear`, a cleaner of old files: the bytes are fetched again, if need be."""
    uri = publish(DATA)

    def clear(request: Any) -> None:
        if request.number == 8:
            s3c.CacheManager(cache).clear()

    server.before = clear
    assert get(uri).path.read_bytes() == DATA


def slow_terminal(began: float) -> Callable[[int], None]:
    """A progress function that stands still from 0.5 s to 1.9 s."""

    def progress(_: int) -> None:
        if time.monotonic() - began > 0.5:
            time.sleep(max(0.0, began + 1.9 - time.monotonic()))

    return progress


@pytest.mark.parametrize("tag", [None, '"0123456789abcdef0123456789abcdef-2"'], ids=["md5", "-2"])
def test_a_peers_entry_that_goes_again_is_not_taken_for_what_we_brought(
    tag: Any, server: Server, publish: Publish, spawn: Spawn, get: Get, cache: Path, tmp_path: Path
) -> None:
    uri = publish(DATA[: 12 * MiB], **({"etag": tag} if tag else {}))
    twin = s3c.get_local_path_for_resource(uri, cache_dir=tmp_path / "twin").path
    entry, server.rate = cache / twin.relative_to(tmp_path / "twin"), 4 * MiB
    child = spawn(CHILD, uri, cache)
    while not logged(cache):
        time.sleep(0.002)
    child.kill()
    entry.parent.mkdir(parents=True)
    threading.Timer(0.4, shutil.copy, (twin, entry)).start()
    threading.Timer(1.6, lambda: entry.unlink(missing_ok=True)).start()
    found = get(uri, progress=slow_terminal(time.monotonic()), max_concurrency=2)
    server.rate = None
    assert found.path.read_bytes() == DATA[: 12 * MiB]


def test_bytes_that_a_faster_peer_spares_us_are_counted_back(
    server: Server, publish: Publish, get: Get, cache: Path, tmp_path: Path
) -> None:
    uri, server.rate = publish(DATA[: 12 * MiB]), 4 * MiB
    with pytest.raises(KeyboardInterrupt):  # so that there are others to look for
        get(uri, progress=interrupt_at(2 * MiB))
    twin = s3c.get_local_path_for_resource(uri, cache_dir=tmp_path / "twin").path
    counts: list[int] = []

    def progress(size: int) -> None:
        if not counts:
            entry = cache / twin.relative_to(tmp_path / "twin")
            entry.parent.mkdir(parents=True)
            shutil.copy(twin, entry)
        counts.append(size)

    assert get(uri, progress=progress).status == "revalidated"
    assert counts[0] > 0 == sum(counts)
