"""Progress: a callable that gets byte counts, and a bar that only a terminal sees."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import BUCKET, SUBJECT_FILE, MiB, Publish, Run
from server import RESET, Server
from subject import name as subject_name
from subject import s3c


def get(uri: str, cache: Path, **options: Any) -> Any:
    return s3c.get_local_path_for_resource(uri, cache_dir=cache, **options)


# ==== A callable ==============================================================================


@pytest.mark.parametrize("size", [0, 1, 1000, 3 * MiB, 20 * MiB + 1])
def test_the_counts_sum_to_the_size(publish: Publish, cache: Path, size: int) -> None:
    got: list[int] = []
    get(publish(bytes(size)), cache, progress=got.append)
    assert sum(got) == size
    assert all(isinstance(count, int) for count in got)


def test_large_objects_report_as_they_come(publish: Publish, cache: Path) -> None:
    got: list[int] = []
    get(publish(bytes(20 * MiB)), cache, progress=got.append)
    assert len(got) >= 20
    assert max(got) <= 4 * MiB


FOREIGN = [
    lambda: s3c.TransferError("another's", uri="http://other/x", retry="soon"),
    lambda: s3c.IntegrityError("another's", uri="http://other/x"),
    lambda: s3c.NotFoundError("another's", uri="s3://other/x", status=404, code="NoSuchKey"),
    lambda: OSError(28, "another's"),
]


@pytest.mark.parametrize("error", FOREIGN)
@pytest.mark.parametrize("key", ["small", "large", "tree/"])
def test_what_progress_raises_is_the_callers(
    key: str, error: Any, publish: Publish, cache: Path
) -> None:
    """It may have called us for another object: that error is no news of this one."""
    publish(b"x", "tree/a")
    publish(bytes(20 * MiB), "large")
    raised: list[Exception] = []

    def fail(size: int) -> None:
        raised.append(error())
        raise raised[-1]

    with pytest.raises(Exception, match="another's") as caught:
        get(publish(b"x", "small").replace("small", key), cache, progress=fail)
    assert caught.value in raised
    assert str(caught.value) == str(error())


def test_the_sum_holds_after_a_cut_connection(
    server: Server, publish: Publish, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRY_BASE", 0.001)
    data = os.urandom(3 * MiB)
    uri = publish(data, etag='"e"')
    head = f'HTTP/1.1 206 OK\r\nETag: "e"\r\nContent-Length: {len(data)}\r\nx-amz-request-id: 1\r\n'
    head += f"Content-Range: bytes 0-{len(data) - 1}/{len(data)}\r\n\r\n"
    server.say(raw=[head.encode() + data[:MiB], 0.05, RESET])
    got: list[int] = []
    result = get(uri, cache, progress=got.append)
    assert result.path.read_bytes() == data
    assert sum(got) == len(data)


@pytest.mark.parametrize("options", [{}, {"max_age": 60}, {"offline": True}], ids=str)
def test_a_hit_reports_nothing(publish: Publish, cache: Path, options: dict[str, Any]) -> None:
    uri = publish(b"data")
    get(uri, cache)
    got: list[int] = []
    get(uri, cache, progress=got.append, **options)
    assert got == []


def test_a_local_file_reports_nothing(tmp_path: Path, cache: Path) -> None:
    got: list[int] = []
    get(str(tmp_path), cache, progress=got.append)
    assert got == []


def test_an_object_of_any_length_known_or_not_reports(server: Server, cache: Path) -> None:
    server.always(200, bytes(2 * MiB), headers={"Transfer-Encoding": "chunked"}, etag='"e"')
    got: list[int] = []
    get(f"{server.url}/x.bin", cache, progress=got.append)
    assert sum(got) == 2 * MiB


def test_an_error_of_the_callable_ends_the_download_and_is_raised(
    publish: Publish, cache: Path
) -> None:
    def progress(_: int) -> None:
        raise LookupError("stop here")

    uri = publish(bytes(20 * MiB))
    with pytest.raises(LookupError, match="stop here"):
        get(uri, cache, progress=progress)
    assert [e.kind for e in s3c.CacheManager(cache).entries() if e.kind == "object"] == []
    assert get(uri, cache).size == 20 * MiB


# ==== The bar =================================================================================

FETCH = """
import sys, SUBJECT as s3c
cache, *uris = sys.argv[1:]
if len(uris) == 1:
    s3c.get_local_path_for_resource(uris[0], cache_dir=cache, progress=True)
else:
    s3c.get_local_paths_for_resources(uris, cache_dir=cache, progress=True)
print("done")
"""


def read_terminal(fd: int) -> str:
    """Read until the other side is closed, which Linux says with an error."""
    pieces, give_up = [], time.monotonic() + 20
    while time.monotonic() < give_up:
        if select.select([fd], [], [], 0.1)[0]:
            try:
                piece = os.read(fd, 65536)
            except OSError:
                break
            if not piece:
                break
            pieces.append(piece)
    return b"".join(pieces).decode()


@pytest.fixture
def on_terminal(prelude: str) -> Callable[..., str]:
    """`on_terminal(cache, *uris)`: what a process writes to a terminal that is its stderr.

    It goes away when `read` returns, and the process still has to end well.
    """
    pty = pytest.importorskip("pty", exc_type=ImportError)

    def on_terminal(
        *args: object,
        command: list[str] | None = None,
        read: Callable[[int], str] = read_terminal,
    ) -> str:
        code = prelude + FETCH.replace("SUBJECT", subject_name)
        command = [*(command or [sys.executable, "-c", code]), *map(str, args)]
        ours, theirs = pty.openpty()
        with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL) as child:
            os.close(theirs)
            written = read(ours)
            os.close(ours)
        assert child.returncode == 0, written
        return written

    return on_terminal


def last_line(shown: str) -> str:
    return re.split(r"\r(?:\x1b\[K)?", shown.rstrip())[-1]


def test_a_terminal_sees_one_line_that_is_drawn_again(
    server: Server, publish: Publish, cache: Path, on_terminal: Callable[..., str]
) -> None:
    server.rate = 8e6
    shown = on_terminal(cache, publish(bytes(8_000_000)))
    assert shown.count("\n") == 1
    assert shown.endswith("\n")
    assert shown.count("\r") >= 5


def test_the_bar_has_bytes_rate_share_and_estimate(
    server: Server, publish: Publish, cache: Path, on_terminal: Callable[..., str]
) -> None:
    server.rate = 8e6
    shown = on_terminal(cache, publish(bytes(8_000_000)))
    drawn = re.findall(r"[\d.]+ [kM]?B at ([\d.]+) MB/s, (\d+) % of 8\.0 MB, (\d+) s left", shown)
    assert len(drawn) >= 3
    assert all(1 < float(rate) < 20 for rate, _, _ in drawn[2:])
    shares = [int(share) for _, share, _ in drawn]
    assert shares == sorted(shares)
    assert "8.0 MB at" in last_line(shown)


def test_a_batch_has_one_bar(server: Server, cache: Path, on_terminal: Callable[..., str]) -> None:
    server.rate = 4e6
    for number in range(6):
        server.put(BUCKET, f"{number}.bin", bytes(1_000_000))
    shown = on_terminal(cache, *(f"s3://{BUCKET}/{number}.bin" for number in range(6)))
    assert shown.count("\n") == 1
    assert "6.0 MB at" in last_line(shown)


def test_a_tree_has_one_bar(server: Server, cache: Path, on_terminal: Callable[..., str]) -> None:
    server.rate = 4e6
    for number in range(6):
        server.put(BUCKET, f"tree/{number}.bin", bytes(1_000_000))
    shown = on_terminal(cache, f"s3://{BUCKET}/tree/")
    assert shown.count("\n") == 1
    assert "6.0 MB at" in last_line(shown)


def test_a_hit_draws_no_bar(publish: Publish, cache: Path, on_terminal: Callable[..., str]) -> None:
    uri = publish(b"data")
    get(uri, cache)
    assert on_terminal(cache, uri) == ""


FAIL = """
import sys, SUBJECT as s3c
try:
    s3c.get_local_paths_for_resources(sys.argv[2:], cache_dir=sys.argv[1], progress=True)
except s3c.NotFoundError:
    sys.stderr.write("after")
"""


def test_the_bar_ends_its_line_when_the_download_fails(
    server: Server, publish: Publish, cache: Path, on_terminal: Callable[..., str], prelude: str
) -> None:
    server.rate = 4e6
    server.before = lambda request: time.sleep(0.3 if "missing" in request.path else 0)
    uris = [publish(bytes(4_000_000), "a.bin"), f"s3://{BUCKET}/missing"]
    command = [sys.executable, "-c", prelude + FAIL.replace("SUBJECT", subject_name)]
    assert on_terminal(cache, *uris, command=command).endswith("\nafter")


def test_the_bar_is_no_wider_than_a_narrow_terminal(
    server: Server, publish: Publish, cache: Path, on_terminal: Callable[..., str]
) -> None:
    server.rate = 8e6
    shown = on_terminal(cache, publish(bytes(4_000_000)))
    lines = re.split(r"\r(?:\x1b\[K)?|\r?\n", shown)
    assert max(map(len, lines)) < 80


def test_the_bar_of_a_resumed_download_expects_only_what_is_still_to_come(
    publish: Publish, cache: Path, on_terminal: Callable[..., str]
) -> None:
    uri, got = publish(os.urandom(20 * MiB)), [0]

    def interrupt(size: int) -> None:
        got[0] += size
        if got[0] > 16 * MiB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(uri, cache, progress=interrupt)
    shown = last_line(on_terminal(cache, uri))
    assert re.fullmatch(r"1?\d\.\d MB at \S+ [kMG]?B/s", shown), shown


def test_a_terminal_that_goes_away_ends_no_download(
    server: Server, publish: Publish, cache: Path, on_terminal: Callable[..., str]
) -> None:
    server.rate = 8e6
    uri = publish(bytes(4_000_000))
    assert on_terminal(cache, uri, read=lambda fd: os.read(fd, 1).decode()) == "\r"
    assert get(uri, cache).status == "revalidated"


@pytest.mark.parametrize(("quiet", "shown"), [([], True), (["-q"], False)], ids=repr)
def test_the_command_line_has_a_bar_unless_quiet(
    server: Server,
    publish: Publish,
    cache: Path,
    on_terminal: Callable[..., str],
    quiet: list[str],
    shown: bool,
) -> None:
    server.rate = 8e6
    command = [sys.executable, str(SUBJECT_FILE), "get", *quiet, "--cache-dir"]
    assert bool(on_terminal(cache, publish(bytes(2_000_000)), command=command)) is shown


def test_where_stderr_is_no_terminal_nothing_is_drawn(
    server: Server, publish: Publish, cache: Path, run_python: Run
) -> None:
    server.rate = 8e6
    done = run_python(FETCH, cache, publish(bytes(4_000_000)))
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_process_without_stderr_downloads_all_the_same(
    server: Server, publish: Publish, cache: Path, run_python: Run
) -> None:
    """`pythonw` on Windows has None there."""
    uri = publish(bytes(1_000_000))
    done = run_python("import sys; sys.stderr = None\n" + FETCH, cache, uri)
    assert done.stdout == "done\n"


def test_a_process_that_has_closed_its_stderr_downloads_all_the_same(
    publish: Publish, cache: Path, run_python: Run
) -> None:
    done = run_python("import sys; sys.stderr.close()\n" + FETCH, cache, publish(b"data"))
    assert done.stdout == "done\n"


def test_nothing_is_drawn_unless_asked(
    server: Server, publish: Publish, cache: Path, on_terminal: Callable[..., str], prelude: str
) -> None:
    server.rate = 8e6
    code = FETCH.replace("progress=True", "progress=None").replace("SUBJECT", subject_name)
    command = [sys.executable, "-c", prelude + code]
    assert on_terminal(cache, publish(bytes(4_000_000)), command=command) == ""
