"""Section 8, JSON: loaders that read and do not cache. What is no document is in test_bad_input."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import math
import os
import threading
import time
import tracemalloc
import warnings
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from conftest import BUCKET, Publish, Run, posix
from server import CLOSE, Server
from subject import s3c

DOCUMENT = {"name": "Å𝄞", "n": 1, "list": [1.5, None, True]}
TEXT = json.dumps(DOCUMENT, ensure_ascii=False)
ENCODINGS = [
    *("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"),
    *("utf-32", "utf-32-le", "utf-32-be"),
]


def over_http(server: Server, uri: str) -> str:
    return uri.replace("s3:/", server.url)


def deflate(window: int, data: bytes) -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, window)
    return squeeze.compress(data) + squeeze.flush()


@pytest.fixture
def low_ceiling(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(s3c, "_JSON_LIMIT", 100_000)
    return 100_000


# ==== Four ways to say where ==================================================================


def test_every_loader_reads_the_same_object(server: Server, publish: Publish) -> None:
    uri = publish(DOCUMENT, key="a/b.json")
    assert s3c.get_json(uri) == DOCUMENT
    assert s3c.get_json(BUCKET, "a/b.json") == DOCUMENT
    assert s3c.get_json_s3(bucket=BUCKET, key="a/b.json", anonymous=True) == DOCUMENT
    assert s3c.get_json_s3_uri(uri=uri, anonymous=True) == DOCUMENT
    assert s3c.get_json_url(over_http(server, uri)) == DOCUMENT
    assert s3c.get_json(over_http(server, uri)) == DOCUMENT


def test_a_document_may_come_as_a_part_that_is_all(server: Server) -> None:
    span = {"Content-Range": "bytes 0-1/2"}
    server.say(206, b"{}", headers=span).say(200, b"{}", headers=span)
    assert s3c.get_json(f"{server.url}/a.json") == s3c.get_json(f"{server.url}/b.json") == {}


def test_a_part_of_a_document_is_none(server: Server) -> None:
    server.say(206, b"{}", headers={"Content-Range": "bytes 0-1/3"})
    with pytest.raises(s3c.TransferError, match=r"Unexpected answer.*206"):
        s3c.get_json(f"{server.url}/a.json")


@pytest.mark.parametrize("key", ["a?b=c", "a#b", "a%20b c+d", "/a//b", "a/../b", "é.json"])
def test_a_document_is_read_from_its_exact_key(publish: Publish, key: str) -> None:
    assert s3c.get_json(publish(DOCUMENT, key=key)) == DOCUMENT


def test_a_bucket_may_be_path_like_as_a_key_may(publish: Publish) -> None:
    publish(DOCUMENT)
    bucket: Any = Path(BUCKET)
    key: Any = Path("data.json")
    assert s3c.get_json_s3(bucket, key) == s3c.get_json(bucket, "data.json") == DOCUMENT


def test_one_request_on_one_connection_and_nothing_on_disk(
    server: Server, publish: Publish, home: Path
) -> None:
    uri = publish(DOCUMENT)
    for _ in range(3):
        s3c.get_json(uri)
    assert [request.method for request in server.seen] == ["GET"] * 3
    assert server.connections == 1
    assert list(home.iterdir()) == []


def test_a_query_belongs_to_a_url(server: Server, publish: Publish) -> None:
    s3c.get_json(over_http(server, publish(DOCUMENT)) + "?token=1#part")
    assert server.seen[0].target == f"/{BUCKET}/data.json?token=1"


def test_local_files_come_as_text_path_or_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a b%20c.json"
    path.write_text(TEXT, encoding="utf-8")
    for where in (str(path), path, os.fsencode(path).decode(), path.as_uri()):
        assert s3c.get_json(where) == DOCUMENT
    monkeypatch.chdir(tmp_path)
    assert s3c.get_json("a b%20c.json") == DOCUMENT


def test_a_tilde_is_the_home_directory(home: Path) -> None:
    (home / "data.json").write_text(TEXT, encoding="utf-8")
    assert s3c.get_json("~/data.json") == DOCUMENT


@pytest.mark.skipif(os.name == "nt", reason="there a path loses its dots before any link is met")
def test_dots_behind_a_symbolic_link_lead_where_open_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    (tmp_path / "a.json").write_text('{"here": 1}', encoding="utf-8")
    (tmp_path / "far" / "a.json").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for path in ("link/../a.json", (tmp_path / "link/../a.json").as_uri()):
        assert s3c.get_json(path) == DOCUMENT
        found = s3c.get_local_path_for_resource(path).path
        assert found == (tmp_path / "far" / "a.json").resolve()


def test_a_link_behind_dots_comes_back_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of git-annex, DVC or a Hub's cache, where the name of what it leads to has no ending."""
    (tmp_path / "blob").write_text(TEXT, encoding="utf-8")
    (tmp_path / "a..json").symlink_to(tmp_path / "blob")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    for path in ("../a..json", "..//a..json", tmp_path / "a..json", "../notebooks/../a..json"):
        found = s3c.get_local_path_for_resource(path).path
        assert found == tmp_path.resolve() / "a..json"
        assert s3c.get_json(found) == DOCUMENT


def test_a_localized_resource_is_a_file_too(server: Server, publish: Publish, cache: Path) -> None:
    result = s3c.get_local_path_for_resource(publish(DOCUMENT), cache_dir=cache)
    server.reset()
    assert s3c.get_json(result) == DOCUMENT
    assert server.seen == []


@posix
def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=[TEXT.encode()])
    writer.start()
    assert s3c.get_json(fifo) == DOCUMENT
    writer.join()


LATE = """
import SUBJECT as s3c, signal, sys
def late(*_): raise TimeoutError("the caller's")
signal.signal(signal.SIGALRM, late)
signal.setitimer(signal.ITIMER_REAL, 0.3)
try: s3c.get_json(sys.argv[1])
except TimeoutError as error: print(error)
"""


@posix
@pytest.mark.parametrize("has_writer", [False, True])
def test_a_limit_of_time_ends_the_wait_for_a_pipe(
    has_writer: bool, tmp_path: Path, run_python: Run
) -> None:
    """As it is opened, and as it is read."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with open(fifo if has_writer else os.devnull, "r+b", buffering=0):
        assert run_python(LATE, fifo).stdout == "the caller's\n"


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="no /dev/stdin here")
def test_standard_input_is_a_file_too(cli: Run) -> None:
    assert json.loads(cli("json", "/dev/stdin", input=TEXT).stdout) == DOCUMENT


def test_a_number_that_looks_like_a_header_of_zlib_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "80").write_text("80 1")
    with pytest.raises(s3c.InvalidJSONError, match="Extra data"):
        s3c.get_json(tmp_path / "80")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc here")
def test_a_file_that_does_not_say_its_size_is_read(tmp_path: Path) -> None:
    with pytest.raises(s3c.InvalidJSONError, match="Extra data"):  # behind the first number
        s3c.get_json("/proc/self/stat")
    (tmp_path / "empty").touch()
    with pytest.raises(s3c.InvalidJSONError, match="Expecting value"):
        s3c.get_json(tmp_path / "empty")


def test_a_missing_file_is_said_in_the_words_of_0_1(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^Local path not found: "):
        s3c.get_json(tmp_path / "no.json")


# ==== Encodings ===============================================================================


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("source", ["s3", "http", "file"])
def test_every_unicode_encoding_is_understood(
    server: Server, publish: Publish, tmp_path: Path, source: str, encoding: str
) -> None:
    data = TEXT.encode(encoding)
    (tmp_path / "file").write_bytes(data)
    uri = publish(data)
    where = {"s3": uri, "http": over_http(server, uri), "file": str(tmp_path / "file")}[source]
    assert s3c.get_json(where) == DOCUMENT


def test_a_charset_in_the_header_changes_nothing(publish: Publish) -> None:
    odd = {"Content-Type": "text/plain; charset=iso-8859-1"}
    assert s3c.get_json(publish(DOCUMENT, headers=odd)) == DOCUMENT


CODINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("GZIP", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", lambda data: zlib.compress(data, 0)),
    *(("deflate", partial(deflate, window)) for window in (9, 14, -15)),
    ("deflate, gzip", lambda data: gzip.compress(zlib.compress(data))),
    ("identity", bytes),
    ("", bytes),
    ("aws-chunked", bytes),
    ("gzip,aws-chunked", gzip.compress),
    ("utf-8", bytes),  # as people write who mean a charset
    ("UTF-8, gzip", gzip.compress),
]


@pytest.mark.parametrize(("coding", "squeeze"), CODINGS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_content_encodings_are_undone(
    publish: Publish, coding: str, squeeze: Callable[[bytes], bytes], encoding: str
) -> None:
    data = squeeze(TEXT.encode(encoding))
    assert s3c.get_json(publish(data, headers={"Content-Encoding": coding})) == DOCUMENT


@pytest.mark.parametrize(("coding", "squeeze"), CODINGS[:7])
def test_they_are_undone_of_what_is_cached_too(
    publish: Publish, get: Callable[..., Any], coding: str, squeeze: Callable[[bytes], bytes]
) -> None:
    uri = publish(squeeze(TEXT.encode()), headers={"Content-Encoding": coding})
    assert s3c.get_json(get(uri)) == DOCUMENT


@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "aws-chunked"}], ids=str)
@pytest.mark.parametrize("squeeze", [gzip.compress, zlib.compress])
def test_a_document_that_was_squeezed_before_it_was_stored_is_read_from_anywhere(
    server: Server, publish: Publish, get: Callable[..., Any], squeeze: Any, headers: Any
) -> None:
    uri = publish(squeeze(TEXT.encode()), key="data.json.gz", headers=headers)
    for where in (uri, over_http(server, uri), get(uri)):
        assert s3c.get_json(where) == DOCUMENT


def test_gzip_may_come_in_several_members(publish: Publish) -> None:
    half = len(TEXT) // 2  # RFC 1952, 2.2; bgzip and pigz write such files
    data = gzip.compress(TEXT[:half].encode()) + gzip.compress(TEXT[half:].encode())
    assert s3c.get_json(publish(data, headers={"Content-Encoding": "gzip"})) == DOCUMENT


def test_a_swarm_of_gzip_members_takes_no_more_than_its_time(publish: Publish) -> None:
    data = gzip.compress(b" ") * 150_000 + gzip.compress(b"{}")
    uri = publish(data, headers={"Content-Encoding": "gzip"})
    before = time.process_time()
    assert s3c.get_json(uri) == {}
    assert time.process_time() - before < 4  # over 7 s if each copies the rest


def test_zeros_behind_gzip_are_padding(publish: Publish) -> None:
    data = gzip.compress(TEXT.encode()) + bytes(512)
    assert s3c.get_json(publish(data, headers={"Content-Encoding": "gzip"})) == DOCUMENT


def test_a_sea_of_zeros_behind_gzip_takes_no_more_than_its_time(tmp_path: Path) -> None:
    path = tmp_path / "sea.json.gz"
    path.write_bytes(gzip.compress(TEXT.encode()) + bytes(80 << 20))
    before = time.process_time()
    assert s3c.get_json(path) == DOCUMENT
    assert time.process_time() - before < 4  # over 6 s if each is looked at by itself


@pytest.mark.parametrize("coding", ["gzip", "x-gzip, utf-8"])
def test_a_document_that_is_only_said_to_be_gzip_is_read_as_in_0_1(
    coding: str, publish: Publish
) -> None:
    assert s3c.get_json(publish(TEXT, headers={"Content-Encoding": coding})) == DOCUMENT


@pytest.mark.parametrize(
    ("coding", "data", "says"),
    [
        ("gzip", gzip.compress(TEXT.encode(), mtime=0)[:-9], "(?i)truncated gzip"),
        ("gzip", b"\x1f{}", "(?i)invalid gzip"),
        ("deflate", b"\x78\x9c\xff\xff", "(?i)invalid deflate"),
        ("gzip", b"", "(?i)gzip|Not valid JSON"),
        ("br", b"\x0b\x02\x80{}\x03", "Content-Encoding is 'br'"),
        ("bzip2", bz2.compress(b"{}"), "Content-Encoding is 'bzip2'"),
    ],
)
def test_a_broken_or_unknown_encoding_is_one_clear_error(
    publish: Publish, coding: str, data: bytes, says: str
) -> None:
    uri = publish(data, headers={"Content-Encoding": coding})
    with pytest.raises(s3c.InvalidJSONError, match=says) as caught:
        s3c.get_json(uri)
    assert uri in str(caught.value)


# ==== Ceilings ================================================================================


def test_a_bomb_is_not_inflated_beyond_the_ceiling(publish: Publish, low_ceiling: int) -> None:
    bomb = gzip.compress(b" " * 50_000_000)
    uri = publish(bomb, headers={"Content-Encoding": "gzip"})
    tracemalloc.start()
    try:
        with pytest.raises(s3c.InvalidJSONError, match=r"more than 100.0 kB"):
            s3c.get_json(uri)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000  # unbounded it takes over 50 MB
    finally:
        tracemalloc.stop()


def test_a_bomb_in_a_bomb_is_not_inflated_either(publish: Publish, low_ceiling: int) -> None:
    bomb = gzip.compress(gzip.compress(b" " * 50_000_000))
    with pytest.raises(s3c.InvalidJSONError, match=r"more than 100\.0 kB"):
        s3c.get_json(publish(bomb, headers={"Content-Encoding": "gzip, gzip"}))


@pytest.mark.parametrize("times", [5, 6])
def test_no_more_than_five_encodings_are_undone(publish: Publish, times: int) -> None:
    data = TEXT.encode()
    for _ in range(times):
        data = gzip.compress(data)
    uri = publish(data, headers={"Content-Encoding": ",".join(["gzip"] * times)})
    if times == 5:
        assert s3c.get_json(uri) == DOCUMENT
    else:
        with pytest.raises(s3c.InvalidJSONError, match="More than 5 Content-Encodings"):
            s3c.get_json(uri)


def test_too_large_a_body_is_not_even_read(
    server: Server, publish: Publish, low_ceiling: int
) -> None:
    with pytest.raises(s3c.InvalidJSONError, match=r"more than 100.0 kB"):
        s3c.get_json(publish(b" " * 50_000_000))
    assert len(server.seen) == 1
    assert server.bytes_sent < 20_000_000  # what buffers held when we left


def test_a_body_of_unknown_length_is_read_up_to_the_ceiling(
    server: Server, publish: Publish, low_ceiling: int
) -> None:
    uri = publish(b" " * 10_000_000, headers={"Transfer-Encoding": "chunked"})
    with pytest.raises(s3c.InvalidJSONError, match=r"more than 100.0 kB"):
        s3c.get_json(over_http(server, uri))


def test_a_large_file_is_refused_like_a_large_object(tmp_path: Path, low_ceiling: int) -> None:
    file = tmp_path / "large.json"
    file.write_bytes(b" " * (low_ceiling + 1))
    with pytest.raises(s3c.InvalidJSONError, match="more than"):
        s3c.get_json(file)


def test_what_just_fits_is_read(publish: Publish, low_ceiling: int) -> None:
    data = b"{}".ljust(low_ceiling)
    assert s3c.get_json(publish(data)) == {}
    assert s3c.get_json(publish(gzip.compress(data), headers={"Content-Encoding": "gzip"})) == {}


# ==== What counts as a document ===============================================================


def test_numbers_are_what_0_1_made_of_them(publish: Publish) -> None:
    document = s3c.get_json(
        publish('{"a": NaN, "b": -Infinity, "c": 1e400, "d": 9007199254740993}')
    )
    assert math.isnan(document["a"])
    assert (document["b"], document["c"], document["d"]) == (-math.inf, math.inf, 2**53 + 1)


def test_invalid_json_is_caught_by_every_name_it_had(publish: Publish) -> None:
    uri = publish(b'{"a": nope}')
    for name in (s3c.InvalidJSONError, s3c.S3CacheError, json.JSONDecodeError, ValueError):
        with pytest.raises(name) as caught:
            s3c.get_json(uri)
        assert caught.value.uri == uri
    assert (caught.value.pos, caught.value.lineno, caught.value.colno) == (6, 1, 7)


def test_no_mapping_is_a_type_error_without_secrets(server: Server, publish: Publish) -> None:
    url = over_http(server, publish(b"[]")).replace("//", "//user:secret@")
    with pytest.raises(TypeError, match=r"^Expected top-level JSON object") as caught:
        s3c.get_json(url + "?X-Amz-Signature=secret")
    assert "secret" not in str(caught.value)
    assert "data.json" in str(caught.value)


# ==== Servers that fail =======================================================================


def test_a_missing_object_is_said_in_the_words_of_0_1(server: Server, publish: Publish) -> None:
    uri = publish({}).replace("data.json", "missing.json")
    with pytest.raises(FileNotFoundError, match=r"^S3 object not found or inaccessible") as caught:
        s3c.get_json(uri)
    assert caught.value.code == "NoSuchKey"  # type: ignore[attr-defined]
    with pytest.raises(s3c.NotFoundError) as other:
        s3c.get_json(over_http(server, uri))
    assert (other.value.status, other.value.code) == (404, None)


def test_a_failing_server_is_asked_again(
    server: Server, publish: Publish, no_sleep: list[float]
) -> None:
    uri = publish(DOCUMENT)
    server.say(503, code="SlowDown").say(500).say(raw=[CLOSE])
    assert s3c.get_json(uri) == DOCUMENT
    assert len(server.seen) == 4


@pytest.mark.usefixtures("no_sleep")
def test_a_document_cut_short_is_fetched_to_its_end(server: Server, publish: Publish) -> None:
    uri = publish({"a": "x" * 100_000})
    head = b'HTTP/1.1 200 OK\r\nETag: "other"\r\nContent-Length: 100009\r\n\r\n'
    server.say(raw=[head + b'{"a": "', CLOSE])
    assert s3c.get_json(uri) == {"a": "x" * 100_000}


@pytest.mark.parametrize("framing", ["chunked", "end of connection"])
def test_a_document_may_come_without_its_length(server: Server, framing: str) -> None:
    headers: dict[str, Any] = {"ETag": '"e-1"', "Transfer-Encoding": "chunked"}
    if framing != "chunked":
        headers = {"ETag": '"e-1"', "Content-Length": None, "Connection": "close"}
    server.say(200, b'{"a": 1}', headers=headers)
    assert s3c.get_json(f"{server.url}/some.json") == {"a": 1}


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_document_that_is_not_what_was_promised_is_read_anew_once(
    server: Server, publish: Publish, wrong: int
) -> None:
    uri = publish({"a": 1})
    for _ in range(wrong):
        server.say(200, b'{"a": 2}', etag=f'"{hashlib.md5(b"else").hexdigest()}"')
    if wrong == 1:
        assert s3c.get_json(uri) == {"a": 1}
    else:
        with pytest.raises(s3c.IntegrityError, match="MD5"):
            s3c.get_json(uri)
    assert len(server.seen) == 2


def test_a_portal_in_the_way_is_no_document(server: Server) -> None:
    server.always(200, b"<html>Log in</html>", headers={"Content-Type": "text/html"})
    with pytest.raises(s3c.TransferError, match="captive portal"):
        s3c.get_json("s3://bucket/key")
    with pytest.raises(s3c.InvalidJSONError, match="HTML"):
        s3c.get_json(f"{server.url}/key")


# ==== Offline =================================================================================


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_offline_nothing_is_sent(server: Server, publish: Publish, scheme: str) -> None:
    uri = publish(DOCUMENT)
    with pytest.raises(s3c.OfflineError, match="offline"):
        s3c.get_json(uri if scheme == "s3" else over_http(server, uri))
    assert server.connections == 0


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_offline_a_document_comes_from_the_default_cache(
    server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    uri = publish(DOCUMENT)
    uri = uri if scheme == "s3" else over_http(server, uri)
    s3c.get_local_path_for_resource(uri)
    server.reset()
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")
    assert s3c.get_json(uri) == DOCUMENT
    assert server.seen == []


@pytest.mark.usefixtures("offline")
def test_offline_local_files_are_read_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(TEXT, encoding="utf-8")
    assert s3c.get_json(tmp_path / "a.json") == DOCUMENT


def test_offline_what_is_stored_squeezed_is_read_all_the_same(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = publish(gzip.compress(TEXT.encode()), headers={"Content-Encoding": "gzip"})
    s3c.get_local_path_for_resource(uri)
    assert s3c.get_json(uri) == DOCUMENT
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")
    assert s3c.get_json(uri) == DOCUMENT


def test_offline_a_document_that_is_read_counts_as_used(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, month = publish(DOCUMENT), time.time() - 30 * 86400
    os.utime(s3c.get_local_path_for_resource(uri).path, (month, month))
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")
    s3c.get_json(uri)
    assert s3c.CacheManager().prune(max_age_days=7) == []


def test_offline_an_error_names_the_document_as_online(
    publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, errors = publish(b"nonsense", key="me@lab?.json"), []
    s3c.get_local_path_for_resource(uri)
    for offline in ("", "1"):
        monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", offline)
        with pytest.raises(s3c.InvalidJSONError) as caught:
            s3c.get_json(uri)
        errors.append((str(caught.value), caught.value.uri))
    assert errors[0] == errors[1] == (errors[0][0], uri)


# ==== Who asks ================================================================================


@pytest.mark.parametrize("call", [s3c.get_json_s3, s3c.get_json])
def test_anon_warns_at_the_callers_line(publish: Publish, call: Callable[..., Any]) -> None:
    publish(DOCUMENT)
    with pytest.warns(DeprecationWarning, match="'anon' is deprecated") as caught:
        assert call(BUCKET, "data.json", anon=True) == DOCUMENT
    assert [warning.filename for warning in caught] == [__file__]


def test_anon_by_uri_warns_at_the_callers_line_too(publish: Publish) -> None:
    with pytest.warns(DeprecationWarning, match="use 'anonymous'") as caught:
        s3c.get_json(publish(DOCUMENT), anon=True)
    assert [warning.filename for warning in caught] == [__file__]


def test_anonymous_does_not_warn(publish: Publish) -> None:
    uri = publish(DOCUMENT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert s3c.get_json(uri, anonymous=True) == DOCUMENT


def test_without_boto3_signed_access_names_the_command_to_run(run_python: Run) -> None:
    done = run_python(
        """
        import SUBJECT as s3c
        try:
            s3c.get_json("s3://bucket/key", anonymous=False)
        except ImportError as error:
            print(type(error).__name__, error)
        """.replace("\n        ", "\n"),
        flags=("-I", "-S"),  # -S: no site-packages
    )
    assert done.stdout.startswith("MissingDependencyError")
    assert 'pip install "aind-s3-cache[boto3]"' in done.stdout


@pytest.mark.boto3
def test_a_client_of_the_callers_is_used(
    server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3 = pytest.importorskip("boto3")
    client = boto3.client(
        "s3", aws_access_key_id="id", aws_secret_access_key="no", region_name="us-west-2"
    )
    uri = publish(DOCUMENT, private=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # only the client knows the server
    assert s3c.get_json(BUCKET, "data.json", client) == DOCUMENT
    assert s3c.get_json_s3_uri(uri, client) == DOCUMENT
    assert s3c.get_json(uri, s3_client=client) == DOCUMENT
    assert {"authorization" in request.headers for request in server.seen} == {True}


class Reader:
    """A body that can be read, and nothing else."""

    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read


class Double:
    """A client as downstream tests make them: no headers, no ETag, no length."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def get_object(self, Bucket: str, Key: str) -> Any:
        if isinstance(self.body, Exception):
            raise self.body
        return {"Body": self.body}


@pytest.mark.parametrize(
    "body",
    [
        *(io.BytesIO, Reader),
        lambda data: SimpleNamespace(read=lambda: data),
        lambda data: SimpleNamespace(read=lambda *_: data),  # as `Mock(return_value=data)`
    ],
)
@pytest.mark.usefixtures("low_ceiling")
def test_a_double_of_a_client_will_do(body: Callable[[bytes], Any]) -> None:
    double = Double(body(b'{"subject": 1}'))
    assert s3c.get_json("s3://bucket/x.json", s3_client=double) == {"subject": 1}


@pytest.mark.parametrize("meta", [{}, {"HTTPStatusCode": 400}], ids=str)
@pytest.mark.parametrize("code", ["NoSuchKey", "NoSuchBucket", "NoSuchVersion", "AccessDenied"])
def test_the_code_of_a_doubles_error_is_enough(code: str, meta: dict[str, int]) -> None:
    error: Any = ArithmeticError("as of a server")
    error.response = {"Error": {"Code": code}, "ResponseMetadata": meta}
    with pytest.raises(FileNotFoundError):
        s3c.get_json_s3("bucket", "x.json", s3_client=Double(error))


@pytest.mark.parametrize("name", ["get_json_s3", "get_json_s3_uri"])
def test_get_json_calls_what_tests_of_0_1_replace(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, name, lambda *_, **__: {"replaced": True})
    assert s3c.get_json("s3://bucket/x.json") == {"replaced": True}


@pytest.mark.boto3
def test_without_credentials_signed_access_is_botocores_own_error(publish: Publish) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    with pytest.raises(exceptions.NoCredentialsError):
        s3c.get_json(publish(DOCUMENT), anonymous=False)


@pytest.mark.boto3
def test_a_refused_document_is_asked_for_again_with_credentials(
    server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    uri = publish(DOCUMENT, bucket="json-private", private=True)
    for _ in range(2):
        assert s3c.get_json(uri) == DOCUMENT
    assert ["authorization" in request.headers for request in server.seen] == [False, True, True]
    with pytest.raises(s3c.AccessDeniedError):
        s3c.get_json(uri, anonymous=True)
