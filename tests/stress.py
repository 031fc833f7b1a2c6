"""Kill, race, prune and change for a while, and re-hash every file that is handed out.

STRESS_SECONDS=60 python tests/stress.py          # a naive cache, which must fail; then ours
STRESS_SECONDS=10 python tests/stress.py --naive  # the naive cache alone

Eight processes ask for a few objects, whose content changes now and then at the same size, under an
ETag that is the SHA-256 of the content: so each reader knows what it must find. The locks are
patched to do nothing; processes are killed at random, and prune and clear the cache at random.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import http.client
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, Callable, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from server import Server  # noqa: E402
from subject import s3c  # noqa: E402

KiB, MiB = 1 << 10, 1 << 20
PROCESSES = 8
READS_PER_MINUTE = 2000  # below that, nothing was shown
# In memory, on disk in order, in parallel parts: of a module whose sizes are divided by 16.
OBJECTS = {"small": 5 * KiB, "middle": 300 * KiB, "large": 2 * MiB, "larger": 3 * MiB + 17}
RATE = 12.0 * MiB  # of one connection: a download lasts long enough to be killed
CHUNK = 64 * KiB


class Read(NamedTuple):
    """A file that was handed out, and the hash that it must have for ever."""

    path: str
    sha256: str
    size: int
    received: int


Get = Callable[[str], Read]


# ==== The two caches ==========================================================================


def spoil() -> None:
    """The module with small sizes, with locks that do nothing and no hour of grace."""
    import fcntl

    setattr(fcntl, "flock", lambda *_: None)  # noqa: B010 - for mypy, a function is no variable
    sizes = {"_CHUNK": 1, "_BLOCK": 2, "_WHOLE": 1, "_SPAN": 4, "_SMALL": 8}  # in chunks
    numbers = {name: count * CHUNK for name, count in sizes.items()}
    for name, number in {**numbers, "_GRACE": 0.0, "_USE_GRAIN": 0.0}.items():
        assert hasattr(s3c, name), name
        setattr(s3c, name, number)


def get_ours(cache: str) -> Get:
    """The module, as a user calls it."""

    def get(key: str) -> Read:
        counts: list[int] = []
        found = s3c.get_local_path_for_resource(
            f"s3://stress/{key}",
            cache_dir=cache,
            multipart_threshold_bytes=8 * CHUNK,
            progress=counts.append,
        )
        size = found.size or 0
        received = sum(counts) if found.status == "downloaded" else size
        return Read(str(found.path), (found.etag or "").strip('"'), size, received)

    return get


def get_naively(cache: str) -> Get:
    """What one would write first: a partial file that all share, a map of its chunks, a rename."""
    netloc = os.environ["AWS_ENDPOINT_URL"].partition("://")[2]

    def ask(connection: http.client.HTTPConnection, key: str, index: int) -> tuple[bytes, str, int]:
        span = f"bytes={index * CHUNK}-{(index + 1) * CHUNK - 1}"
        connection.request("GET", f"/stress/{key}", headers={"Range": span})
        answer = connection.getresponse()
        total = int((answer.getheader("Content-Range") or "/0").partition("/")[2])
        return answer.read(), (answer.getheader("ETag") or "").strip('"'), total

    def get(key: str) -> Read:
        connection = http.client.HTTPConnection(netloc, timeout=10)
        data, etag, total = ask(connection, key, 0)
        final, part, map_ = (f"{cache}/{key}.{end}" for end in (etag, "part", "map"))
        if not os.path.exists(final):
            with open(part, "ab"), open(map_, "ab"):
                pass
            with open(part, "r+b") as file, open(map_, "r+b") as done:
                file.truncate(total)
                known = done.read()
                for index in range(-(-total // CHUNK)):
                    if known[index : index + 1] != b"x":
                        file.seek(index * CHUNK)
                        file.write(data if index == 0 else ask(connection, key, index)[0])
                        file.flush()
                        done.seek(index)
                        done.write(b"x")
                        done.flush()
            os.rename(part, final)
            os.unlink(map_)
        connection.close()
        return Read(final, etag, total, total)

    return get


def tidy_ours(cache: str, chance: random.Random) -> None:
    manager = s3c.CacheManager(cache)
    if chance.random() < 0.1:
        manager.clear()
    else:
        manager.prune(max_size_bytes=chance.choice([0, 1, 3, 8]) * MiB)


def tidy_naively(cache: str, chance: random.Random) -> None:
    for path in Path(cache).iterdir():
        if chance.random() < 0.5:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


# ==== A reader: one of eight processes ========================================================


def is_good(read: Read) -> bool | None:
    """Whether a file holds what it must; None if it was pruned meanwhile, which may be."""
    try:
        with open(read.path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest() == read.sha256
    except FileNotFoundError:
        return None


def is_expected(error: Exception) -> bool:
    """An object that changes too often, a file that a `clear` took away: told, and not wrong."""
    if isinstance(error, s3c.CacheError):
        return error.errno in (errno.ENOENT, errno.ENOTEMPTY)
    return isinstance(error, s3c.IntegrityError) and "changed" in str(error)


def tell(out: int, text: str) -> None:
    """One line in one write, so that a kill leaves no half of it."""
    os.write(out, text.encode() + b"\n")


def read_for_ever(naive: bool, cache: str, out: int) -> None:
    chance = random.Random()
    get = get_naively(cache) if naive else get_ours(cache)
    again: deque[tuple[float, Read]] = deque()
    while True:
        if chance.random() < 0.02:
            with contextlib.suppress(s3c.CacheError):
                (tidy_naively if naive else tidy_ours)(cache, chance)
        try:
            read = get(chance.choice(list(OBJECTS)))
            tell(out, f"{_verdict(read)} now {read.size - read.received} {Path(read.path).name}")
            again.append((time.monotonic() + 1, read))
        except Exception as error:
            kind = "refused" if naive or is_expected(error) else "failed"
            tell(out, f"{kind} now 0 {type(error).__name__} {error}")
        while again and again[0][0] < time.monotonic():
            read = again.popleft()[1]
            tell(out, f"{_verdict(read)} later 0 {Path(read.path).name}")


def _verdict(read: Read) -> str:
    return {True: "good", False: "WRONG", None: "gone"}[is_good(read)]


def crew(naive: bool, cache: str, seconds: float, out: int) -> None:
    """Keep eight readers alive, and kill one now and then. A process without threads: it forks."""
    chance, end = random.Random(), time.monotonic() + seconds
    readers: list[int] = []
    killed = 0
    while time.monotonic() < end:
        while len(readers) < PROCESSES:
            readers.append(os.fork())
            if not readers[-1]:
                try:
                    read_for_ever(naive, cache, out)
                finally:
                    os._exit(1)
        time.sleep(chance.uniform(0.02, 0.3))
        victim = readers.pop(chance.randrange(PROCESSES))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        killed += 1
    for reader in readers:
        os.kill(reader, signal.SIGKILL)
        os.waitpid(reader, 0)
    tell(out, f"killed now {killed} readers")


# ==== The harness =============================================================================


def change(server: Server, key: str, chance: random.Random) -> None:
    data = chance.getrandbits(8 * OBJECTS[key]).to_bytes(OBJECTS[key], "big")
    server.put("stress", key, data, etag=f'"{hashlib.sha256(data).hexdigest()}"')


def keep_changing(server: Server, stop: threading.Event) -> None:
    chance = random.Random()
    while not stop.wait(chance.uniform(0.1, 0.6)):
        change(server, chance.choice(list(OBJECTS)), chance)


def run(naive: bool, seconds: float, folder: Path) -> tuple[Counter[str], list[str], int]:
    """Counts by verdict, the lines that need looking at, and how many bytes were sent."""
    results, cache, stop = folder / "results", folder / "cache", threading.Event()
    cache.mkdir()
    with Server() as server, open(results, "ab") as out:
        for key in OBJECTS:
            change(server, key, random.Random())
        server.rate = RATE
        changer = threading.Thread(target=keep_changing, args=(server, stop))
        changer.start()
        command = [sys.executable, __file__, "--crew", str(cache), str(seconds), str(out.fileno())]
        env = {**os.environ, "AWS_ENDPOINT_URL": server.url}
        command += ["--naive"] * naive
        subprocess.run(command, env=env, pass_fds=[out.fileno()], check=True, timeout=seconds + 60)
        stop.set()
        changer.join()
        counts, odd = count(results.read_text(errors="replace").splitlines())
        if not naive:
            odd += [f"WRONG at the end: {e.name}" for e in s3c.CacheManager(cache).verify()]
        return counts, odd, server.bytes_sent


def count(lines: list[str]) -> tuple[Counter[str], list[str]]:
    counts: Counter[str] = Counter()
    for line in lines:
        verdict, when, number, _ = line.split(" ", 3)
        counts[f"{verdict} {when}"] += 1
        counts["reused" if verdict != "killed" else "kills"] += int(number)
    return counts, [line for line in lines if line.startswith(("WRONG", "failed"))]


def report(name: str, counts: Counter[str], sent: int) -> int:
    """Print one line; return the number of wrong reads."""
    reads, wrong = counts["good now"] + counts["WRONG now"], counts["WRONG now"]
    wrong += counts["WRONG later"]
    print(
        f"{name}: {reads} reads re-hashed at once and {counts['good later']} later, {wrong} wrong; "
        f"{counts['kills']} kills, {counts['gone now'] + counts['gone later']} files pruned before "
        f"they were read, {counts['refused now']} calls refused, {counts['failed now']} failed; "
        f"{sent / MiB:.0f} MiB sent, {counts['reused'] / MiB:.1f} MiB of peers and the dead reused",
        flush=True,
    )
    return wrong


def stress(naive: bool, seconds: float) -> tuple[int, Counter[str], list[str]]:
    folder = Path(tempfile.mkdtemp(prefix="s3c-stress-"))
    try:
        counts, odd, sent = run(naive, seconds, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report("naive" if naive else "ours", counts, sent), counts, odd


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--naive", action="store_true", help="stress a naive cache: it must fail")
    parser.add_argument("--crew", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.crew:
        spoil()
        cache, seconds, out = args.crew
        crew(args.naive, cache, float(seconds), int(out))
        return 0
    if not hasattr(os, "fork"):
        print("skipped: it forks and kills")
        return 0
    spoil()
    seconds = float(os.environ.get("STRESS_SECONDS", "60"))
    if not stress(True, seconds if args.naive else max(3.0, seconds / 10))[0]:
        print("FAILED: a naive cache went unnoticed, so the harness shows nothing")
        return 1
    return 0 if args.naive else judge(*stress(False, seconds), seconds)


def judge(wrong: int, counts: Counter[str], odd: list[str], seconds: float) -> int:
    reads = counts["good now"]
    checks: dict[str, Any] = {
        "no wrong read": not wrong and not odd,
        f"at least {READS_PER_MINUTE} reads a minute": reads >= READS_PER_MINUTE * seconds / 60,
        "chunks reused": counts["reused"] > 0,
        "hardly a call refused": counts["refused now"] <= 0.02 * reads,
    }
    for line in odd[:20]:
        print(line)
    failed = [name for name, passed in checks.items() if not passed]
    print(f"FAILED: {', '.join(failed)}" if failed else "passed: " + ", ".join(checks))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
