"""Downloads: whatever a server does, the file has the object's bytes or there is no file.

The rows of "HTTP semantics" in the fault matrix, each on a real socket, unsigned and through boto3.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import BUCKET, Get, Peak, Publish, Run, new_client, posix
from server import CLOSE, RESET, STALL, Answer, Request, Server, chunked, pick_range, s3_error
from subject import name as subject_name
from subject import s3c

# With `small_parts`: kept in memory; one range, written in order; several ranges.
SMALL, MEDIUM, LARGE = 10_000, 200_000, 1_000_000
SIZES = pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE], ids=["small", "medium", "large"])


def random(size: int) -> bytes:
    return os.urandom(size)


def entries(cache: Path) -> list[str]:
    return [entry.kind for entry in s3c.CacheManager(cache).entries()]


def assert_unpublished(cache: Path) -> None:
    """A partial file may stay, to resume from."""
    assert "object" not in entries(cache)


def ranges(server: Server) -> list[tuple[int, int]]:
    """What the ranges that the server was asked for span, in order of their starts."""
    asked = (pick_range(request.headers.get("range"), 1 << 60) for request in server.seen)
    return sorted(span for span in asked if span)


@pytest.fixture(params=["unsigned", pytest.param("signed", marks=pytest.mark.boto3)])
def fetch(request: pytest.FixtureRequest, server: Server, get: Get) -> Iterator[Get]:
    """`get`, once unsigned and once through a boto3 client; 256 KiB is large."""
    options: dict[str, Any] = {"multipart_threshold_bytes": 256 << 10}
    if request.param == "signed":
        options["s3_client"] = new_client(server.url, read_timeout=0.2)
    yield lambda uri, **more: get(uri, **{**options, **more})
    if request.param == "signed":
        options["s3_client"].close()


@pytest.fixture
def unsigned(get: Get) -> Get:
    """`get`; 256 KiB is large."""
    return lambda uri, **more: get(uri, **{"multipart_threshold_bytes": 256 << 10, **more})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_HEAD_TIMEOUT", "_STALL_TIMEOUT"):
        monkeypatch.setattr(s3c, name, 0.2)


pytestmark = pytest.mark.usefixtures("small_parts", "quick")


# ==== Bodies that end too early ===============================================================


@SIZES
@pytest.mark.parametrize("end", [CLOSE, RESET, STALL], ids=["fin", "reset", "stall"])
@pytest.mark.usefixtures("impatient")
def test_a_body_that_ends_early_is_resumed(
    end: Any, size: int, publish: Publish, fetch: Get, server: Server, cut: Any
) -> None:
    data, came = random(size), min(size // 2, 100_000)
    uri = publish(data)
    cut(came, end, times=2)
    assert fetch(uri).path.read_bytes() == data
    assert all(request.headers["if-match"] for request in server.seen[1:])
    # boto3 loses what it had read for the call that fails; where exactly: see test_transport.py.
    assert any(came - s3c._CHUNK <= start <= came for start, _ in ranges(server))


def test_a_line_that_is_cut_all_the_time_brings_an_object_of_any_size(
    publish: Publish, unsigned: Get, cut: Any
) -> None:
    """What each connection brings is progress, and no storm of retries."""
    data = random(24 * LARGE)
    cut(40_000, CLOSE, times=float("inf"))
    assert unsigned(publish(data)).path.read_bytes() == data


@SIZES
def test_a_body_that_always_ends_early_is_never_published(
    size: int, publish: Publish, fetch: Get, cut: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 2)
    uri = publish(random(size))
    cut(0, CLOSE, times=10**6)
    with pytest.raises(s3c.TransferError):
        fetch(uri)
    assert_unpublished(cache)


@SIZES
def test_every_byte_is_asked_for_once(
    size: int, server: Server, publish: Publish, unsigned: Get
) -> None:
    unsigned(publish(random(size)))
    at = 0
    for start, stop in ranges(server):
        assert start == at
        at = min(stop, size)
    assert at == size


@pytest.mark.parametrize("status", [500, 503, 404, 403])
def test_a_part_that_fails_is_retried_or_ends_it_all(
    status: int, server: Server, publish: Publish, fetch: Get, cache: Path
) -> None:
    data = random(LARGE)
    uri = publish(data)
    server.before = lambda request: (status,) if request.number == 3 else None
    if status >= 500:
        assert fetch(uri).path.read_bytes() == data
    else:
        with pytest.raises(FileNotFoundError):
            fetch(uri)
        assert_unpublished(cache)


# ==== Ranges that are not what was asked for ==================================================


@SIZES
def test_a_server_that_ignores_ranges_sends_everything_once(
    size: int, server: Server, publish: Publish, fetch: Get
) -> None:
    server.ignore_range = True
    data = random(size)
    assert fetch(publish(data)).path.read_bytes() == data
    assert (len(server.seen), server.connections) == (1, 1)


@SIZES
@pytest.mark.parametrize("at", [5000, 150_000])
def test_a_resume_that_is_answered_from_the_start_starts_again(
    at: int, size: int, server: Server, publish: Publish, fetch: Get, cut: Any
) -> None:
    server.ignore_range = True
    data, counts = random(size), list[int]()
    uri = publish(data)
    cut(at, CLOSE)
    assert fetch(uri, progress=counts.append).path.read_bytes() == data
    assert (sum(counts), len(server.seen)) == (size, 1 + (at < size))


@pytest.mark.parametrize("told", [{}, {"etag": '"of-parts-2"'}], ids=["md5", "no md5"])
def test_what_comes_again_with_other_bytes_is_not_kept(
    told: dict[str, str], server: Server, publish: Publish, fetch: Get, cut: Any
) -> None:
    server.ignore_range = True
    data = random(LARGE)
    uri = publish(data, **told)
    cut(LARGE // 2, CLOSE)
    broken, flipped = server.before, bytes([data[0] ^ 1]) + data[1:]
    answers: Any = iter([broken, lambda request: server._answer(request)._replace(body=flipped)])
    server.before = lambda request: next(answers, lambda _: None)(request)
    assert fetch(uri).path.read_bytes() == data
    assert len(server.seen) == 3


def test_a_server_that_stops_to_honour_ranges_is_read_as_one_stream(
    server: Server, publish: Publish, fetch: Get
) -> None:
    data, counts = random(LARGE), list[int]()
    uri = publish(data)

    def before(_: Request) -> None:
        server.ignore_range = len(server.seen) > 1

    server.before = before
    assert fetch(uri, progress=counts.append).path.read_bytes() == data
    assert sum(counts) == LARGE


@SIZES
def test_a_part_under_status_200_is_a_part(
    size: int, server: Server, publish: Publish, fetch: Get
) -> None:
    """As rclone answers; no MD5 here to find out that the rest is missing."""
    data = random(size)
    uri = publish(data, etag='"of-parts-2"')

    def before(request: Request) -> Any:
        answer = server._answer(request)
        return answer._replace(status=200) if answer.status == 206 else None

    server.before = before
    assert fetch(uri).path.read_bytes() == data


def test_a_server_that_refuses_if_match_is_asked_without(
    server: Server, publish: Publish, fetch: Get
) -> None:
    """As VAST does; an object that changes meanwhile is still never mixed."""
    publish(random(LARGE))
    new = random(LARGE)

    def before(request: Request) -> Any:
        if request.number == 4:
            publish(new)
        return s3_error("NotImplemented", 501) if "if-match" in request.headers else None

    server.before = before
    assert fetch(f"s3://{BUCKET}/data.json").path.read_bytes() == new


WRONG = {
    "starts later": "bytes {later}-{last}/{size}",
    "starts earlier": "bytes {earlier}-{last}/{size}",
    "ends later": "bytes {start}-{beyond}/{size}",
    "ends earlier": "bytes {start}-{before_last}/{size}",
    "other total": "bytes {start}-{last}/{more}",
    "unknown total": "bytes {start}-{last}/*",
    "no range": "bytes */{size}",
    "no unit": "{start}-{last}/{size}",
    "other unit": "lines {start}-{last}/{size}",
    "negative": "bytes -{last}/{size}",
    "signs": "bytes +{start}-{last}/{size}",
    "ends beyond the total": "bytes {start}-{last}/{start}",
    "backwards": "bytes {last}-{start}/{size}",
    "two ranges": "bytes {start}-{last}/{size}, bytes {start}-{last}/{size}",
    "junk": "junk",
    "absent": None,
}


EARLIEST = {"other total", "starts earlier"}  # of a first answer: see below; nothing is before 0


def lying(server: Server, which: str, at: int) -> Callable[[Request], Any]:
    """From the request number `at` on, answers say a wrong Content-Range."""

    def before(request: Request) -> Any:
        answer = server._answer(request)
        if len(server.seen) < at or answer.status != 206:
            return None
        span, _, size = answer.headers["Content-Range"].partition(" ")[2].partition("/")
        start, last = map(int, span.split("-"))
        template = WRONG[which]
        told = template and template.format(
            start=start, last=last, size=size, later=start + 1, earlier=start - 1,
            beyond=last + 1, before_last=last - 1, more=int(size) + 1,
        )  # fmt: skip
        return answer._replace(headers={**answer.headers, "Content-Range": told})

    return before


def assert_not_believed(server: Server, get: Get, uri: str, cache: Path) -> None:
    with pytest.raises((s3c.TransferError, s3c.IntegrityError)):
        get(uri)
    assert_unpublished(cache)
    assert len(server.seen) < 10


@pytest.mark.parametrize("which", [name for name in WRONG if name not in EARLIEST])
def test_a_wrong_content_range_of_the_first_answer_is_never_believed(
    which: str, server: Server, publish: Publish, unsigned: Get, cache: Path
) -> None:
    server.before = lying(server, which, 1)
    assert_not_believed(server, unsigned, publish(random(LARGE)), cache)


@pytest.mark.parametrize("which", WRONG)
def test_a_wrong_content_range_of_a_later_answer_is_never_believed(
    which: str, server: Server, publish: Publish, fetch: Get, cache: Path
) -> None:
    server.before = lying(server, which, 2)
    assert_not_believed(server, fetch, publish(random(LARGE)), cache)


def test_a_total_that_is_too_large_is_found_out(
    server: Server, publish: Publish, fetch: Get, cache: Path
) -> None:
    server.before = lying(server, "other total", 1)
    with pytest.raises((s3c.TransferError, s3c.IntegrityError)):
        fetch(publish(random(LARGE)))
    assert_unpublished(cache)


def test_several_ranges_in_one_body_are_refused(server: Server, get: Get, cache: Path) -> None:
    kind = {"Content-Type": "multipart/byteranges; boundary=x"}
    body = b"--x\r\nContent-Range: bytes 0-4/5\r\n\r\n12345\r\n--x--\r\n"
    server.always(206, body, etag='"e"', headers=kind)
    with pytest.raises(s3c.TransferError):
        get(f"{server.url}/a")
    assert_unpublished(cache)


@pytest.mark.parametrize("size", [10, 300_000])
def test_a_body_longer_than_its_range_is_cut_and_its_connection_dropped(
    size: int, server: Server, fetch: Get
) -> None:
    data = random(size)

    def before(request: Request) -> Any:
        start, stop = pick_range(request.headers["range"], size) or (0, size)
        told = {"Content-Range": f"bytes {start}-{stop - 1}/{size}", "ETag": '"e"'}
        return 206, data[start:stop] + b"and more", told

    server.before = before
    assert fetch(f"s3://{BUCKET}/a", max_concurrency=1).path.read_bytes() == data
    assert server.connections == len(server.seen)


def test_a_body_shorter_than_its_range_is_completed(server: Server, fetch: Get) -> None:
    data = random(5000)

    def before(request: Request) -> Any:
        start, stop = pick_range(request.headers["range"], len(data)) or (0, len(data))
        told = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", "ETag": '"e"'}
        return 206, data[start : min(stop, start + 2000)], told

    server.before = before
    assert fetch(f"s3://{BUCKET}/a").path.read_bytes() == data
    assert [start for start, _ in ranges(server)] == [0, 2000, 4000]


# ==== Objects that change =====================================================================


def change(server: Server, publish: Publish, at: int, data: bytes) -> None:
    """The object is replaced right before the answer to request number `at`.

    By another whose ETag is no MD5: nothing but the ETag tells that parts do not belong together.
    """
    hook = server.before

    def before(request: Request) -> Any:
        if request.number == at:
            publish(data, etag='"second-2"')
        return hook(request) if hook else None

    server.before = before


@pytest.mark.parametrize("ignored", [False, True], ids=["412", "no 412"])
@pytest.mark.parametrize("at", [2, 4])
def test_an_object_that_changes_under_the_download_is_fetched_whole(
    at: int, ignored: bool, server: Server, publish: Publish, fetch: Get, cache: Path
) -> None:
    server.ignore_if_match = ignored
    data = random(LARGE)
    uri = publish(random(LARGE), etag='"first-2"')
    change(server, publish, at, data)
    result = fetch(uri)
    assert result.path.read_bytes() == data
    assert result.etag == '"second-2"'
    assert entries(cache) == ["object"]


@pytest.mark.parametrize("ignored", [False, True], ids=["412", "no 412"])
@pytest.mark.parametrize("size", [SMALL, MEDIUM], ids=["small", "medium"])
def test_an_object_that_changes_before_a_resume_is_fetched_whole(
    size: int, ignored: bool, server: Server, publish: Publish, fetch: Get, cut: Any
) -> None:
    server.ignore_if_match = ignored
    data = random(size)
    uri = publish(random(size), etag='"first-2"')
    cut(4000, CLOSE)
    change(server, publish, 2, data)
    assert fetch(uri).path.read_bytes() == data


def test_an_object_that_keeps_changing_comes_in_one_body_at_last(
    server: Server, publish: Publish, unsigned: Get
) -> None:
    """So does one of a web server whose nodes have ETags of their own."""
    contents: list[bytes] = []

    def before(_: Request) -> None:
        contents.append(random(LARGE))
        publish(contents[-1])

    server.before = before
    assert unsigned(f"s3://{BUCKET}/data.json").path.read_bytes() == contents[-1]
    assert [r for r in server.seen if "range" not in r.headers] == server.seen[-1:]


def test_an_object_that_keeps_changing_and_breaks_off_is_an_error(
    server: Server, publish: Publish, unsigned: Get, cache: Path, cut: Any
) -> None:
    cut(300_000, CLOSE, 10**6)
    hook: Any = server.before
    server.before = lambda request: (publish(random(LARGE)), hook(request))[1]
    with pytest.raises(s3c.IntegrityError, match="changed 4 times"):
        unsigned(f"s3://{BUCKET}/data.json")
    assert_unpublished(cache)
    starts = [r.headers.get("range", "bytes=0-").startswith("bytes=0-") for r in server.seen]
    assert sum(starts) == s3c._CHANGES + 1


def test_an_object_that_shrinks_under_the_download_is_fetched_whole(
    server: Server, publish: Publish, unsigned: Get
) -> None:
    uri = publish(random(LARGE))
    change(server, publish, 2, b"short")
    assert unsigned(uri).path.read_bytes() == b"short"


# ==== ETags that pin nothing ==================================================================

UNPINNED: dict[str, dict[str, Any]] = {
    "weak": {"etag": 'W/"weak"'},
    "missing": {"etag": None},
    "missing, and no date": {"etag": None, "headers": {"Last-Modified": None}},
    "overlong": {"etag": '"' + "x" * 200 + '"'},
    "repeated": {"etag": '"a"\r\nETag: "b"'},
    "empty": {"etag": ""},
}


@SIZES
@pytest.mark.parametrize("kind", UNPINNED)
def test_without_a_strong_etag_there_is_one_stream_and_no_if_match(
    kind: str, size: int, server: Server, publish: Publish, unsigned: Get
) -> None:
    data = random(size)
    uri = publish(data, **UNPINNED[kind]).replace("s3:/", server.url)
    assert unsigned(uri).path.read_bytes() == data
    assert not any("if-match" in request.headers for request in server.seen)
    assert len(server.seen) == (2 if size == LARGE else 1)


@SIZES
@pytest.mark.parametrize("kind", UNPINNED)
def test_without_a_strong_etag_nothing_is_resumed(
    kind: str, size: int, server: Server, publish: Publish, unsigned: Get, cut: Any
) -> None:
    data = random(size)
    uri = publish(data, **UNPINNED[kind]).replace("s3:/", server.url)
    cut(5000, CLOSE, times=2)
    assert unsigned(uri).path.read_bytes() == data
    assert {start for start, _ in ranges(server)} == {0}


@pytest.mark.parametrize("frame", ["Content-Length: 99", "Transfer-Encoding: chunked"])
def test_what_cannot_be_resumed_is_retried_however_long_it_took_to_break(
    frame: str, server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRY_TOTAL", 0.8)
    head = f'HTTP/1.1 200 OK\r\nETag: W/"e"\r\n{frame}\r\n\r\n'.encode()
    server.say(raw=[head + b"4\r\n12", 1.0, b"34\r\n", CLOSE])
    server.say(200, b"whole", etag='W/"e"')
    assert get(f"{server.url}/a").path.read_bytes() == b"whole"


@pytest.mark.parametrize("frame", [{}, {"Transfer-Encoding": "chunked"}], ids=["length", "chunks"])
def test_what_cannot_be_resumed_is_not_retried_for_ever(
    frame: dict[str, str], server: Server, publish: Publish, unsigned: Get, cut: Any
) -> None:
    uri = publish(random(SMALL), etag='W/"e"', headers=frame).replace("s3:/", server.url)
    cut(5000, CLOSE, times=999)
    with pytest.raises(s3c.TransferError, match=f"after {s3c._RETRIES + 1} attempts"):
        unsigned(uri)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("weak", "revalidated"),
        ("missing", "revalidated"),
        ("missing, and no date", "downloaded"),
        ("overlong", "revalidated"),
        ("repeated", "revalidated"),
        ("empty", "revalidated"),
    ],
)
def test_what_validates_without_a_strong_etag(
    kind: str, status: str, server: Server, publish: Publish, get: Get
) -> None:
    """By a weak ETag, else by date and size, else not at all."""
    uri = publish(b"12345", **UNPINNED[kind]).replace("s3:/", server.url)
    first = get(uri)
    again = get(uri)
    assert (again.status, again.path) == (status, first.path)
    publish(b"54321", **UNPINNED[kind])
    if kind != "weak":  # whose server says, with the same tag, that nothing changed
        assert get(uri).path.read_bytes() == b"54321"


def test_a_date_with_another_size_is_another_version(server: Server, get: Get) -> None:
    """A server that answers 200 with the old date and a new length has a new object."""
    date = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    server.say(200, b"123", headers=date).say(200, b"12345", headers=date)
    get(f"{server.url}/a")
    assert get(f"{server.url}/a").path.read_bytes() == b"12345"


@SIZES
def test_s3_without_an_etag_is_not_s3(
    size: int, server: Server, publish: Publish, fetch: Get, cache: Path
) -> None:
    with pytest.raises(s3c.TransferError, match="Not an S3 answer"):
        fetch(publish(random(size), etag=None))
    assert_unpublished(cache)


def test_a_captive_portal_is_no_object(server: Server, fetch: Get, cache: Path) -> None:
    server.always(200, b"<html>Log in</html>", headers={"Content-Type": "text/html"})
    with pytest.raises(s3c.TransferError, match="captive portal"):
        fetch(f"s3://{BUCKET}/a")
    assert_unpublished(cache)


def test_an_object_that_looks_like_an_error_is_an_object(publish: Publish, unsigned: Get) -> None:
    data = b'<?xml version="1.0"?><Error><Code>SlowDown</Code></Error>'
    assert unsigned(publish(data)).path.read_bytes() == data


# ==== Answers without a body ==================================================================


@pytest.mark.parametrize("bare", [False, True], ids=["*/0", "no Content-Range"])
def test_an_empty_object_is_an_empty_file(
    bare: bool, server: Server, publish: Publish, fetch: Get
) -> None:
    server.bare_416 = bare
    uri = publish(b"")
    assert fetch(uri).path.read_bytes() == b""
    assert fetch(uri).status == "revalidated"
    assert len(server.seen) <= 3


@pytest.mark.parametrize("bare", [False, True], ids=["*/0", "no Content-Range"])
def test_an_empty_file_behind_a_url(bare: bool, server: Server, publish: Publish, get: Get) -> None:
    server.bare_416 = bare
    uri = publish(b"", etag=None).replace("s3:/", server.url)
    assert get(uri).size == 0
    assert get(uri).status == "revalidated"


@pytest.mark.parametrize("status", [412, 416])
def test_a_server_that_always_refuses_the_question_is_an_error(
    server: Server, fetch: Get, cache: Path, status: int
) -> None:
    server.always(status, code="InvalidRange")
    with pytest.raises(s3c.S3CacheError) as caught:
        fetch(f"s3://{BUCKET}/a")
    assert caught.value.status == status
    assert (entries(cache), len(server.seen)) == ([], 2)


def test_304_to_no_condition_is_an_error(server: Server, fetch: Get, cache: Path) -> None:
    server.always(304, etag='"e"')
    with pytest.raises(s3c.TransferError):
        fetch(f"s3://{BUCKET}/a")
    assert_unpublished(cache)


def test_304_to_a_later_range_is_an_error(
    server: Server, publish: Publish, fetch: Get, cache: Path
) -> None:
    server.before = lambda _: (304,) if len(server.seen) > 1 else None
    with pytest.raises(s3c.S3CacheError):
        fetch(publish(random(LARGE)))
    assert_unpublished(cache)


@SIZES
def test_304_for_an_entry_that_just_vanished_brings_it_anew(
    size: int, server: Server, publish: Publish, fetch: Get
) -> None:
    """Broken variant: a hit that is not looked at again after the 304 returns a missing path."""
    data = random(size)
    uri = publish(data)
    path = fetch(uri).path
    server.reset()

    def before(request: Request) -> None:
        if request.number == 1:
            path.unlink()

    server.before = before
    again = fetch(uri)
    assert (again.status, again.path.read_bytes()) == ("downloaded", data)
    assert "if-none-match" not in server.seen[1].headers


@SIZES
def test_200_with_the_etag_we_hold_is_left_at_once(
    size: int, server: Server, publish: Publish, fetch: Get
) -> None:
    uri = publish(random(size))
    first = fetch(uri)
    server.reset()
    server.ignore_if_none_match = True
    server.rate = 500_000  # else the system's buffers take what nobody reads
    again = fetch(uri)
    assert (again.status, again.path) == ("revalidated", first.path)
    assert server.bytes_sent < 128 << 10


# ==== Framing and coding ======================================================================


@SIZES
def test_a_stored_gzip_is_kept_as_it_is(
    size: int, server: Server, publish: Publish, fetch: Get
) -> None:
    data = gzip.compress(random(size))
    result = fetch(publish(data, headers={"Content-Encoding": "gzip"}))
    assert result.path.read_bytes() == data
    assert {request.headers.get("accept-encoding") for request in server.seen} == {"identity"}


@SIZES
def test_a_chunked_answer_is_one_stream(
    size: int, server: Server, publish: Publish, fetch: Get
) -> None:
    data = random(size)
    server.ignore_range = True
    uri = publish(data, headers={"Transfer-Encoding": "chunked"})
    assert fetch(uri).path.read_bytes() == data


@SIZES
def test_chunked_ranges_are_ranges(size: int, publish: Publish, fetch: Get) -> None:
    data = random(size)
    uri = publish(data, headers={"Transfer-Encoding": "chunked"})
    assert fetch(uri).path.read_bytes() == data


@SIZES
def test_a_chunked_answer_cut_off_is_never_published(
    size: int, server: Server, fetch: Get, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 2)
    whole = chunked(random(size))
    head = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nTransfer-Encoding: chunked\r\n\r\n'
    server.always(raw=[head + whole[:-5], CLOSE])  # all of it but the last chunk
    with pytest.raises(s3c.TransferError):
        fetch(f"s3://{BUCKET}/a")
    assert_unpublished(cache)


# ==== Integrity ===============================================================================


def corrupt(server: Server, times: int) -> None:
    """That many answers come with one byte flipped."""
    left = [times]

    def before(request: Request) -> Any:
        answer = server._answer(request)
        if not left[0] or answer.status not in (200, 206):
            return None
        left[0] -= 1
        body = bytearray(answer.body)
        body[len(body) // 2] ^= 1
        return answer._replace(body=bytes(body))

    server.before = before


@SIZES
def test_bytes_that_are_not_their_md5_are_never_published(
    size: int, server: Server, publish: Publish, fetch: Get, cache: Path
) -> None:
    uri = publish(random(size))
    corrupt(server, 10**6)
    with pytest.raises(s3c.IntegrityError, match="MD5"):
        fetch(uri)
    assert_unpublished(cache)
    assert sum(start == 0 for start, _ in ranges(server)) == 2


@SIZES
def test_a_second_try_makes_up_for_damage_on_the_way(
    size: int, server: Server, publish: Publish, fetch: Get
) -> None:
    data = random(size)
    uri = publish(data)
    corrupt(server, 1)
    assert fetch(uri).path.read_bytes() == data


def promised(name: str, data: bytes) -> str:
    if name == "crc32":
        return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
    return base64.b64encode(hashlib.new(name, data).digest()).decode()


SUMS = ["crc32", "sha1", "sha256", "sha512"]


@pytest.mark.parametrize("size", [SMALL, MEDIUM], ids=["small", "medium"])
@pytest.mark.parametrize("name", SUMS)
def test_a_checksum_of_the_whole_object_is_checked(
    name: str, size: int, server: Server, publish: Publish, fetch: Get, cache: Path
) -> None:
    data = random(size)
    told = {f"x-amz-checksum-{name}": promised(name, data), "x-amz-checksum-type": "FULL_OBJECT"}
    uri = publish(data, etag='"of-parts-2"', headers=told)
    corrupt(server, 10**6)
    with pytest.raises(s3c.IntegrityError):
        fetch(uri)
    assert_unpublished(cache)
    assert len(server.seen) == 2
    server.before = None
    assert fetch(uri).path.read_bytes() == data


@pytest.mark.parametrize("name", SUMS)
def test_a_checksum_on_a_stream_is_checked(
    name: str, server: Server, publish: Publish, fetch: Get
) -> None:
    """The one body of a large object whose server ignores ranges."""
    data = random(LARGE)
    told = {f"x-amz-checksum-{name}": promised(name, data), "Transfer-Encoding": "chunked"}
    server.ignore_range = True
    uri = publish(data, etag='"of-parts-2"', headers=told)
    corrupt(server, 10**6)
    with pytest.raises(s3c.IntegrityError):
        fetch(uri)
    server.before = None
    assert fetch(uri).path.read_bytes() == data


NO_PROMISE: dict[str, dict[str, Any]] = {
    "composite": {"x-amz-checksum-sha256": "{wrong}", "x-amz-checksum-type": "COMPOSITE"},
    "of parts": {"x-amz-checksum-sha256": "{wrong}-2"},
    "unknown": {"x-amz-checksum-xxhash3": "{wrong}"},
    "no base64": {"x-amz-checksum-crc64nvme": "!"},
}


@SIZES
@pytest.mark.parametrize("kind", NO_PROMISE)
def test_a_checksum_that_is_none_of_the_object_is_skipped(
    kind: str, size: int, publish: Publish, unsigned: Get
) -> None:
    data = random(size)
    wrong = promised("sha256", b"other")
    told = {name: value.format(wrong=wrong) for name, value in NO_PROMISE[kind].items()}
    uri = publish(data, etag='"of-parts-2"', headers=told)
    assert unsigned(uri).path.read_bytes() == data


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


NO_MD5: dict[str, dict[str, Any]] = {
    "KMS": {"headers": {"x-amz-server-side-encryption": "aws:kms"}},
    "KMS twice": {"headers": {"x-amz-server-side-encryption": "aws:kms:dsse"}},
    "FSx": {"headers": {"x-amz-server-side-encryption": "aws:fsx"}},
    "customer key": {"headers": {"x-amz-server-side-encryption-customer-algorithm": "AES256"}},
    "parts": {"etag": f'"{md5(b"other")}-3"'},
    "upper case": {"etag": f'"{md5(b"other").upper()}"'},
    "not hexadecimal": {"etag": '"' + "z" * 32 + '"'},
}


@SIZES
@pytest.mark.parametrize("kind", NO_MD5)
def test_an_etag_that_is_no_md5_is_not_checked(
    kind: str, size: int, server: Server, publish: Publish, unsigned: Get
) -> None:
    data = random(size)
    uri = publish(data, **{"etag": f'"{md5(b"other")}"', **NO_MD5[kind]})
    assert unsigned(uri).path.read_bytes() == data
    assert sum(start == 0 for start, _ in ranges(server)) == 1


@pytest.mark.boto3
@SIZES
@pytest.mark.parametrize("end", ["x", "xa"])
def test_an_etag_of_a_directory_bucket_is_no_md5(
    end: str, size: int, server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_S3_DISABLE_EXPRESS_SESSION_AUTH", "true")  # one request, one answer
    data = random(size)
    uri = publish(data, bucket=f"name--usw2-az1--{end}-s3", etag=f'"{md5(b"other")}"')
    client = new_client(server.url)
    assert get(uri, s3_client=client).path.read_bytes() == data
    assert sum(start == 0 for start, _ in ranges(server)) == 1
    client.close()


def test_an_etag_of_a_url_is_no_checksum(server: Server, publish: Publish, get: Get) -> None:
    uri = publish(b"data", etag=f'"{md5(b"other")}"').replace("s3:/", server.url)
    assert get(uri).path.read_bytes() == b"data"


@pytest.mark.parametrize("sealed", ["AES256", "AES256 "], ids=["plain", "space"])
def test_a_key_of_s3_itself_leaves_the_md5_checked(
    sealed: str, publish: Publish, fetch: Get
) -> None:
    told = {"x-amz-server-side-encryption": sealed}
    uri = publish(b"data", etag=f'"{md5(b"other")}"', headers=told)
    with pytest.raises(s3c.IntegrityError):
        fetch(uri)


# ==== Progress ================================================================================


@SIZES
@pytest.mark.parametrize("fault", ["none", "cut", "no ranges", "corrupt", "changed"])
def test_progress_adds_up_to_the_size(
    fault: str, size: int, server: Server, publish: Publish, fetch: Get, cut: Any
) -> None:
    """What comes again is taken back first, as boto3 does: a bar ends at 100 %."""
    uri, counts = publish(random(size)), list[int]()
    if fault == "cut":
        cut(5000, RESET, times=2)
    elif fault == "corrupt":
        corrupt(server, 1)
    elif fault == "changed":
        change(server, publish, 2, random(size))
    server.ignore_range = fault == "no ranges"
    assert fetch(uri, progress=counts.append).size == size
    assert sum(counts) == size


def test_a_hit_is_no_progress(publish: Publish, unsigned: Get) -> None:
    uri, counts = publish(random(SMALL)), list[int]()
    unsigned(uri)
    unsigned(uri, progress=counts.append)
    assert sum(counts) == 0


def test_progress_is_called_by_one_thread_at_a_time(
    server: Server, publish: Publish, unsigned: Get
) -> None:
    lock, sizes = threading.Lock(), list[int]()

    def progress(size: int) -> None:
        assert lock.acquire(blocking=False)
        time.sleep(0.002)
        sizes.append(size)
        lock.release()

    unsigned(publish(random(LARGE)), progress=progress)
    assert sum(sizes) == LARGE


def test_an_error_of_the_callers_progress_ends_the_download(
    publish: Publish, unsigned: Get, cache: Path
) -> None:
    def progress(_: int) -> None:
        raise ZeroDivisionError

    for size in (SMALL, MEDIUM, LARGE):
        with pytest.raises(ZeroDivisionError):
            unsigned(publish(random(size), f"{size}"), progress=progress)
    assert_unpublished(cache)


# ==== Ranges in parallel ======================================================================


@pytest.mark.parametrize("most", [1, 3, 16])
def test_no_more_connections_than_max_concurrency(
    most: int, server: Server, publish: Publish, unsigned: Get
) -> None:
    server.latency = 0.02
    server.rate = 2_000_000
    uri = publish(random(LARGE))
    unsigned(uri, max_concurrency=most)
    assert server.connections <= most
    assert server.connections > 1 or most == 1


def test_a_slow_server_is_asked_on_more_connections(
    server: Server, publish: Publish, unsigned: Get
) -> None:
    server.rate = 400_000
    uri = publish(random(2 * LARGE))
    unsigned(uri, max_concurrency=8)
    assert 5 <= server.connections <= 8


def test_many_slow_downloads_open_no_more_files_than_a_mac_allows(
    server: Server, publish: Publish, cache: Path, peak: Peak
) -> None:
    """256: a batch took 16 connections for each object, and so failed."""
    server.rate = 400_000
    uris = [publish(random(LARGE), key=str(n)) for n in range(24)]
    options: dict[str, Any] = {"cache_dir": cache, "multipart_threshold_bytes": 256 << 10}
    s3c.get_local_paths_for_resources(uris, progress=peak, **options)
    assert 64 <= peak.most <= 110


def test_below_the_threshold_there_is_one_connection(
    server: Server, publish: Publish, get: Get
) -> None:
    server.latency = 0.02
    get(publish(random(LARGE)), multipart_threshold_bytes=LARGE)
    assert server.connections == 1


@pytest.mark.parametrize("threshold", [32 << 10, 33e3], ids=["int", "float"])
def test_a_small_threshold_makes_small_first_ranges(
    server: Server, publish: Publish, get: Get, threshold: float
) -> None:
    get(publish(random(LARGE)), multipart_threshold_bytes=threshold)
    assert ranges(server)[0] == (0, 32 << 10)
    assert len(server.seen) > 2


@pytest.mark.parametrize("options", [{"max_concurrency": 0}, {"multipart_threshold_bytes": 0}])
def test_limits_below_one_are_refused(options: dict[str, int], get: Get, server: Server) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        get(f"s3://{BUCKET}/a", **options)
    assert server.seen == []


def test_threads_that_want_the_same_object_fetch_it_once(
    server: Server, publish: Publish, unsigned: Get
) -> None:
    data = random(LARGE)
    uri = publish(data)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(unsigned, [uri] * 6))
    assert {result.path.read_bytes() for result in results} == {data}
    assert server.bytes_sent < 2 * LARGE


# ==== Ctrl-C ==================================================================================

INTERRUPTED = """
import sys, SUBJECT as s3c
s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2], anonymous=not sys.argv[3:])
"""


TELL_WHEN = """
import time
sys.excepthook = lambda *error: (sys.__excepthook__(*error), print(time.monotonic()))
"""


def interrupt(
    prelude: str, ready: Callable[[], bool], *args: object, code: str = INTERRUPTED
) -> tuple[float, str]:
    """Start, send a real SIGINT once it hangs; return the seconds to the error, and stderr.

    It is to come within one; the tests allow a loaded machine four, and a broken variant takes 30.
    The process is to end, too, but under load or coverage an interpreter may take seconds for that.
    """
    source = prelude + TELL_WHEN + code.replace("SUBJECT", subject_name)
    command = [sys.executable, "-c", source, *map(str, args)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        give_up = time.monotonic() + 10
        while not ready() and time.monotonic() < give_up and child.poll() is None:
            time.sleep(0.01)
        time.sleep(0.15)
        child.send_signal(signal.SIGINT)
        began = time.monotonic()
        try:
            told, errors = child.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            child.kill()
            raise
        return float(told) - began, errors


STUCK = ["silent", "throttled", "stalled", "stalled parts"]


@posix
@pytest.mark.parametrize("fault", STUCK)
@pytest.mark.parametrize("way", ["unsigned", pytest.param("signed", marks=pytest.mark.boto3)])
def test_ctrl_c_ends_within_a_second_whatever_the_server_does(
    way: str,
    fault: str,
    server: Server,
    publish: Publish,
    prelude: str,
    cache: Path,
    cut: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Broken variant: one that joins its workers instead of cutting their sockets waits 30 s."""
    uri = publish(random((12 << 20) if fault == "stalled parts" else 100_000))
    if fault == "silent":
        server.always(raw=[STALL])
    elif fault == "throttled":
        server.always(503, headers={"Retry-After": "50"})
    else:
        cut(1000, STALL, times=99)
    signed = ["signed"] if way == "signed" else []
    if signed:
        pytest.importorskip("boto3")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    wanted = 2 if fault == "stalled parts" else 1
    took, errors = interrupt(prelude, lambda: len(server.seen) >= wanted, uri, cache, *signed)
    assert took < 4
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert_unpublished(cache)


LATE = """
import SUBJECT as s3c, signal, sys
def late(*_): raise TimeoutError("the caller's") from KeyError("why")
signal.signal(signal.SIGALRM, late)
get = lambda: s3c.get_local_path_for_resource(sys.argv[2], cache_dir=sys.argv[1])
if len(sys.argv) > 3: get()
signal.setitimer(signal.ITIMER_REAL, 0.7)
try: get()
except BaseException as error: print(type(error).__name__, error, repr(error.__cause__))
"""
KEPT = "TimeoutError the caller's KeyError('why')\n"


@posix
@pytest.mark.parametrize("fault", ["silent", "silent later", "stalled", "stalled parts"])
def test_a_limit_of_time_that_a_signal_sets_is_none_of_the_networks(
    fault: str, server: Server, publish: Publish, run_python: Run, cache: Path, cut: Any
) -> None:
    """Its error is what the standard library raises where a socket timed out, and yet another."""
    uri = publish(random((12 << 20) if fault == "stalled parts" else 100_000))
    if fault == "silent":
        server.always(raw=[STALL])
    elif fault == "silent later":  # on a kept connection
        server.before = lambda _: Answer(200, raw=(STALL,)) if len(server.seen) > 1 else None
    else:
        cut(1000, STALL, times=99)
    done = run_python(LATE, cache, uri, *["later"] * fault.endswith("later"))
    assert done.stdout == KEPT


@posix
def test_a_limit_of_time_is_kept_amid_a_slow_answer_over_tls(
    tls_server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    """Broken variant: what TLS gives within 20 ms is gathered, whatever ends that."""
    uri, tls_server.rate = publish(random(100_000)), 50_000
    assert run_python(LATE, cache, uri).stdout == KEPT


LATE_BY = """
import SUBJECT as s3c, functools, signal, sys
def late(*_): raise TimeoutError("the caller's")
class Late: __call__ = late
def once(*_):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    late()
for handler in (functools.partial(late, "more"), Late(), once):
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try: s3c.get_json(sys.argv[1])
    except BaseException as error: print(type(error).__name__, error)
"""


@posix
def test_what_sets_a_limit_of_time_may_be_anything_that_can_be_called(
    server: Server, publish: Publish, run_python: Run
) -> None:
    server.always(raw=[STALL])
    assert run_python(LATE_BY, publish("{}")).stdout == "TimeoutError the caller's\n" * 3


@posix
def test_ctrl_c_ends_a_handshake_that_hangs(
    tls_server: Server, publish: Publish, prelude: str, cache: Path
) -> None:
    tls_server.accept_delay = 60
    uri = publish(b"x")
    took, errors = interrupt(prelude, lambda: tls_server.connections > 0, uri, cache)
    assert took < 4
    assert errors.rstrip().endswith("KeyboardInterrupt")


@posix
def test_ctrl_c_ends_a_batch(
    server: Server, publish: Publish, prelude: str, cache: Path, cut: Any
) -> None:
    uris = [publish(random(100_000), f"{n}") for n in range(8)]
    cut(1000, STALL, times=99)
    code = """
import sys, SUBJECT as s3c
s3c.get_local_paths_for_resources(sys.argv[2:], cache_dir=sys.argv[1], max_workers=4)
"""
    took, errors = interrupt(prelude, lambda: len(server.seen) >= 4, cache, *uris, code=code)
    assert took < 4
    assert errors.rstrip().endswith("KeyboardInterrupt")


@posix
@pytest.mark.leftovers
def test_what_came_before_ctrl_c_is_not_fetched_again(
    server: Server,
    publish: Publish,
    prelude: str,
    cache: Path,
    cut: Any,
    monkeypatch: pytest.MonkeyPatch,
    get: Get,
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr(s3c, "_PEER_PATIENCE", 0.1)
    data = random(20 << 20)
    uri = publish(data)
    cut(3 << 20, STALL, times=1)
    took, _ = interrupt(prelude, lambda: server.bytes_sent > 6 << 20, uri, cache)
    assert took < 4
    assert entries(cache) == ["partial"]
    server.reset()
    assert get(uri).path.read_bytes() == data
    assert entries(cache) == ["object"]
    assert server.bytes_sent < 15 << 20  # of which 8 MiB brought the answer that told the version


# ==== Nothing is left behind ==================================================================

ROUNDS = """
import gc, json, os, sys, threading, time, SUBJECT as s3c
s3c._CHUNK, s3c._BLOCK, s3c._WHOLE = 16 << 10, 32 << 10, 16 << 10
s3c._SPAN, s3c._SMALL = 64 << 10, 256 << 10
s3c._RETRIES, s3c._RETRY_BASE, s3c._STALL_TIMEOUT = 1, 0.001, 0.1
url, cache, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
def go_once():
    for name in ("small", "large", "missing", "cut", "corrupt", "stall", "junk", "loop"):
        try:
            s3c.get_local_path_for_resource(f"{url}/{name}", cache_dir=cache, anonymous=True,
                max_concurrency=4, multipart_threshold_bytes=1 << 18)
            print(name, "came")
        except s3c.S3CacheError as error:
            print(name, type(error).__name__)
for _ in range(rounds):
    go_once()
    s3c.CacheManager(cache).clear()
gc.collect()
time.sleep(0.3)
sockets = 0
for fd in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
    try: sockets += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError: pass
print(json.dumps([threading.active_count(), sockets]))
"""


@pytest.fixture
def troubled(server: Server) -> Server:
    """A server with an object for each way in which a download can go wrong."""
    for name, size in (("small", SMALL), ("large", LARGE), ("cut", LARGE), ("stall", LARGE)):
        server.put(BUCKET, name, random(size))
    server.put(BUCKET, "corrupt", random(LARGE), etag=f'"{md5(b"other")}"')
    server.on_path("/junk", raw=[b"junk\r\n\r\n", CLOSE])
    server.redirect(f"/{BUCKET}/loop", f"/{BUCKET}/loop")
    ends = {"cut": RESET, "stall": STALL}

    def before(request: Request) -> Any:
        end = ends.get(request.path.rpartition("/")[2])
        start = (pick_range(request.headers.get("range"), LARGE) or (0, 0))[0]
        if end is None or start < 500_000:
            return None
        return 206, b"", {}, (b"HTTP/1.1 206 Partial Content\r\n", end)

    server.before = before
    return server


@pytest.mark.parametrize("scheme", ["s3", pytest.param("http", marks=pytest.mark.slow)])
def test_neither_threads_nor_sockets_nor_files_are_left_behind(
    scheme: str, troubled: Server, run_python: Run, cache: Path
) -> None:
    url = f"s3://{BUCKET}" if scheme == "s3" else f"{troubled.url}/{BUCKET}"
    flags = ("-X", "dev", "-W", "error")
    done = run_python(ROUNDS, url, cache, 2, flags=flags, env={"PYTHONASYNCIODEBUG": None})
    *lines, last = done.stdout.splitlines()
    threads, sockets = map(int, last.strip("[]").split(","))
    assert threads == 1
    assert sockets <= 4  # kept connections: as many as the widest download used
    assert {"small came", "large came", "missing NotFoundError", "cut TransferError"} <= set(lines)
    assert done.stderr == ""
    assert not list(cache.rglob("*")) or not (cache / "aind-s3-cache").exists()


def test_a_failed_download_leaves_no_thread_that_still_writes(
    server: Server, publish: Publish, unsigned: Get, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 0)
    server.rate = 500_000
    before = threading.active_count() - len(server._threads)
    server.before = lambda request: (505,) if request.number == 4 else None
    with pytest.raises(s3c.TransferError):
        unsigned(publish(random(LARGE)))
    give_up = time.monotonic() + 2
    while threading.active_count() - len(server._threads) > before and time.monotonic() < give_up:
        time.sleep(0.01)
    assert threading.active_count() - len(server._threads) <= before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("way", ["http", pytest.param("https", marks=pytest.mark.slow)])
def test_memory_stays_below_40_mib_at_any_size(
    way: str, request: pytest.FixtureRequest, run_python: Run, cache: Path, tmp_path: Path
) -> None:
    """Peak of the process, over an interpreter that imported nothing; none compiles the module."""
    server = request.getfixturevalue("tls_server" if way == "https" else "server")
    server.put(BUCKET, "big", bytes(96 << 20))
    server.rate = 16 << 20  # so that all workers are at work
    code = """
import sys
def peak(): return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
idle = peak()
import SUBJECT as s3c
print(s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2]).size, peak() - idle)
"""
    env = {"PYTHONPYCACHEPREFIX": str(tmp_path / "compiled"), "PYTHONDONTWRITEBYTECODE": None}
    run_python("import SUBJECT", env=env)
    size, extra = map(int, run_python(code, f"s3://{BUCKET}/big", cache, env=env).stdout.split())
    assert size == 96 << 20
    assert extra < 40 << 10
