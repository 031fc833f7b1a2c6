"""The main job on a fresh machine: `python3 tests/demo.py`.

Needs Python 3.9 or later, no package and no network: a loopback server publishes one public
object, and the real command line is run against it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from server import Server

PROGRAM = Path(__file__).resolve().parents[1] / "aind_s3_cache.py"
BUCKET = "aind-open-data"
SESSION = "exaspim_708373_2024-02-02_11-26-44"
KEY = f"{SESSION}/metadata.json"
URI = f"s3://{BUCKET}/{KEY}"
MISSING = f"s3://{BUCKET}/{SESSION}/no-such-file.json"

# All that a child inherits: what an interpreter needs to start, nothing that configures AWS.
KEPT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "SYSTEMDRIVE", "TEMP", "TMP", "TMPDIR", "LANG")


class Ran(NamedTuple):
    """One command: what it said, what the server saw of it, how long it took."""

    exit: int
    out: str
    err: str
    requests: int
    sent: int
    seconds: float

    @property
    def record(self) -> dict[str, Any]:
        """The record `get --json` printed; empty if it printed anything else."""
        try:
            record = json.loads(self.out)
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    @property
    def content(self) -> bytes:
        """What is in the file at the printed path."""
        path = Path(self.record.get("path", ""))
        return path.read_bytes() if path.is_file() else b""


class Demo:
    """Runs commands, prints what happened, and notes what was not as expected."""

    def __init__(self, server: Server, home: Path) -> None:
        self.server = server
        self.home = home
        self.wrong: list[str] = []
        self.env = {name: os.environ[name] for name in KEPT if name in os.environ}
        self.env.update(
            HOME=str(home),
            USERPROFILE=str(home),
            AIND_S3_CACHE_DIR=str(home / "cache"),
            AWS_ENDPOINT_URL=server.url,
            AWS_EC2_METADATA_DISABLED="true",
            PYTHONIOENCODING="utf-8",
        )

    def run(self, title: str, *args: str) -> Ran:
        self.server.reset()
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *args],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
        seconds = time.perf_counter() - started
        seen, sent = len(self.server.seen), self.server.bytes_sent
        print(f"\n{title}\n  $ aind_s3_cache.py {' '.join(args)}")
        return Ran(done.returncode, done.stdout, done.stderr, seen, sent, seconds)

    def tell(self, ran: Ran, said: str, checks: dict[str, bool]) -> None:
        """Print the outcome; `checks` maps what should be true to whether it is."""
        failed = [expected for expected, met in checks.items() if not met]
        requests = f"{ran.requests} request" + "s" * (ran.requests != 1)
        print(f"  {said}")
        print(f"  exit {ran.exit} · {requests}, {ran.sent} bytes sent · {ran.seconds:.2f} s")
        for expected in failed:
            print(f"  NOT AS EXPECTED: {expected}")
        if failed and ran.err:
            print(f"  stderr: {short(ran.err, 2000)}")
        self.wrong += failed

    def tell_get(self, ran: Ran, checks: dict[str, bool]) -> None:
        name = short(ran.record.get("path", "no path").replace(str(self.home), "~"), 90)
        status, from_cache = ran.record.get("status"), ran.record.get("from_cache")
        said = f"{status} (from_cache={json.dumps(from_cache)}) -> {name}"
        self.tell(ran, said, {"the command succeeds": ran.exit == 0, **checks})


def short(text: str, limit: int = 90) -> str:
    """One line of at most `limit` characters, cut in the middle: both ends tell something."""
    line = " ".join(text.split())
    half = (limit - 1) // 2
    return line if len(line) <= limit else f"{line[:half]}…{line[-half:]}"


def document(session_end: str) -> bytes:
    """The object: metadata as the guide reads it."""
    content = {"session_id": SESSION, "subject_id": "708373", "session_end": session_end}
    return json.dumps(content, indent=2).encode()


def show(demo: Demo) -> None:
    """The five cases."""
    old, new = document("11:26:44"), document("12:05:10, corrected")
    etag = demo.server.put(BUCKET, KEY, old, headers={"Content-Type": "application/json"})

    miss = demo.run("1. A miss: the object is downloaded", "get", "--json", URI)
    demo.tell_get(
        miss,
        {
            "it is downloaded": miss.record.get("status") == "downloaded",
            "it is not from the cache": miss.record.get("from_cache") is False,
            "one request is enough": miss.requests == 1,
            "the file holds the object": miss.content == old,
            "the ETag is the server's": miss.record.get("etag") == etag,
        },
    )

    hit = demo.run("2. A hit: the server says unchanged, nothing is sent", "get", "--json", URI)
    demo.tell_get(
        hit,
        {
            "it is revalidated": hit.record.get("status") == "revalidated",
            "it is from the cache": hit.record.get("from_cache") is True,
            "one request is enough": hit.requests == 1,
            "no content is sent": hit.sent == 0,
            "the path is the same": hit.record.get("path") == miss.record.get("path"),
        },
    )

    demo.server.put(BUCKET, KEY, new, headers={"Content-Type": "application/json"})
    changed = demo.run(
        "3. The object has changed: a new file, the old one stays", "get", "--json", URI
    )
    demo.tell_get(
        changed,
        {
            "it is downloaded": changed.record.get("status") == "downloaded",
            "one request is enough": changed.requests == 1,
            "the file holds the new object": changed.content == new,
            "the old path keeps its content": miss.content == old,
        },
    )

    read = demo.run("4. A JSON document is read and printed", "json", URI)
    demo.tell(
        read,
        short(read.out) or "printed nothing",
        {
            "the command succeeds": read.exit == 0,
            "it prints the document": read.record == json.loads(new),
        },
    )

    missing = demo.run("5. A key that does not exist: one clear line", "get", MISSING)
    demo.tell(
        missing,
        short(missing.err, 160) or "said nothing",
        {
            "the exit status is 1": missing.exit == 1,
            "stderr has one line": len(missing.err.splitlines()) == 1,
            "stdout is empty": not missing.out,
        },
    )


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII terminal shall not end the demo
            stream.reconfigure(errors="replace")
    if not PROGRAM.is_file():
        print(f"{PROGRAM.name} is not beside the tests directory", file=sys.stderr)
        return 2
    version = ".".join(map(str, sys.version_info[:3]))
    with tempfile.TemporaryDirectory(prefix="demo-") as home, Server() as server:
        print(f"Python {version}, {PROGRAM.name} against a loopback S3 server at {server.url}")
        demo = Demo(server, Path(home).resolve())
        show(demo)
    if demo.wrong:
        print(f"\nDEMO FAILED, {len(demo.wrong)} not as expected: {'; '.join(demo.wrong)}")
        return 1
    print("\nDEMO OK: a miss, a hit, a changed object, a JSON read and a missing key.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
