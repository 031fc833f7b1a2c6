"""What cannot be: a clear error of the right class, before anything is sent or written."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import AsNobody, Run
from server import Server
from subject import s3c

localize = s3c.get_local_path_for_resource
localize_many = s3c.get_local_paths_for_resources


@pytest.fixture
def untouched(
    server: Server, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    """Fails the test if it sends a request or leaves a file, in its home or working directory."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    server.put("bucket", "key", b"{}")
    yield server
    assert server.seen == []
    assert list(home.iterdir()) == []
    assert list(here.iterdir()) == []


# ==== URIs, keys, URLs ========================================================================

LOST_SLASH = r"Local path not found: …\. Pass URIs as str: a Path keeps only one slash of two$"
NOT_S3 = "Not a valid S3 URI"
BAD_URIS: list[tuple[Any, type[Exception], str]] = [
    ("", FileNotFoundError, "Local path not found. It is empty"),
    ("no/such/file", s3c.NotFoundError, "Local path not found: .*no/such/file"),
    (" https://host/key?sig", s3c.NotFoundError, "not found:  https://host/key. It begins with"),
    ("https:host/key?sig", s3c.NotFoundError, "Local path not found: https:host/key$"),
    ("s3:/user:se/cret@bucket/key", s3c.NotFoundError, LOST_SLASH),
    ("a@b/c:/d?e", s3c.NotFoundError, r"Local path not found: .*a@b/c:/d\?e$"),
    (r"C:\no\file", s3c.NotFoundError, r"Local path not found: C:\\no\\file$"),
    ("\ufeffa\nb", s3c.NotFoundError, r"Local path not found: \\ufeffa\\nb$"),
    ("s3://", ValueError, NOT_S3),
    ("s3://bucket", ValueError, NOT_S3),
    ("s3://bucket/", ValueError, NOT_S3),
    ("s3:///key", ValueError, NOT_S3),
    ("s3://no bucket/key", ValueError, "no bucket can be called 'no bucket'"),
    (f"s3://{'b' * 256}/key", ValueError, "no bucket can be called"),
    ("s3://bücket/key", ValueError, "no bucket can be called 'bücket'"),
    ("s3://bucket/a\0b", ValueError, "NUL in 'a.x00b'"),
    ("s3://bucket/a\ud800b", ValueError, "lone surrogate in 'a.ud800b'"),
    ("s3://bucket/" + "k" * 1025, ValueError, "1025 bytes, S3 allows 1,024"),
    ("s3://bucket/" + "é" * 513, ValueError, "1026 bytes, S3 allows 1,024"),
    ("ftp://host/key", ValueError, "Unsupported URL or file path: 'ftp://host/key'"),
    ("gs://bucket/key", ValueError, "Unsupported URL or file path"),
    ("http://", ValueError, "Not a valid URL"),
    ("https:///path", ValueError, "Not a valid URL"),
    ("http://host:99999/", ValueError, "Not a valid URL"),
    ("http://a..b/x", ValueError, "Not a valid URL: 'http://a..b/x'"),
    (f"http://{'a' * 64}.test/x", ValueError, "Not a valid URL"),
    ("http://ho st/", ValueError, "Not a valid URL"),
    ("http://::1/", ValueError, "Not a valid URL: 'http://::1/'"),
    ("http://[::1/", ValueError, "Not a valid URL"),
    ("http://host:80:90/", ValueError, "Not a valid URL"),
    ("http://[::1]x:80/", ValueError, "Not a valid URL"),
    ("http://[]:80/", ValueError, "Not a valid URL"),
    ("http://host:port/", ValueError, "Not a valid URL"),
    ("http://host: 80/", ValueError, "Not a valid URL"),
    ("http://host:8_0/", ValueError, "Not a valid URL"),
    ("http://host:٨٠/", ValueError, "Not a valid URL"),
    ("http://user:secret@ho st/?token", ValueError, "Not a valid URL"),
    ("http://host/\ud800", ValueError, r"Not a valid URL: 'http://host/.*ud800'"),
    ("http://us\ud800er:secret@host/", ValueError, "Not a valid URL: '…'$"),
    (b"s3://bucket/key", TypeError, "not bytes"),
    (None, TypeError, "NoneType"),
    (5, TypeError, "int"),
    (["s3://bucket/key"], TypeError, "list"),
]


@pytest.mark.parametrize(
    ("uri", "error", "says"), BAD_URIS, ids=[ascii(row[0])[:30] for row in BAD_URIS]
)
@pytest.mark.usefixtures("untouched")
def test_what_is_no_uri_is_refused_before_anything_is_sent(
    uri: Any, error: type[Exception], says: str
) -> None:
    for call in (localize, s3c.get_json, lambda uri: localize_many([uri])):
        with pytest.raises(error, match=says) as caught:
            call(uri)
        assert str(caught.value).isprintable()


def test_the_longest_key_is_asked_for(server: Server, publish: Callable[..., str]) -> None:
    uri = publish({"a": 1}, key="é" * 512)
    assert s3c.get_json(uri) == {"a": 1}
    assert localize(uri).size == 8


BAD_PARTS: list[tuple[Any, Any, type[Exception]]] = [
    ("", "key", ValueError),
    ("bucket/key", "key", ValueError),
    ("s3://bucket", "key", ValueError),
    ("bucket", "", ValueError),
    ("bucket", "a\0", ValueError),
    ("bucket", "\udfff", ValueError),
    ("bucket", "k" * 1025, ValueError),
    (None, "key", TypeError),
    (b"bucket", "key", TypeError),
    ("bucket", b"key", TypeError),
    ("bucket", 5, TypeError),
]


@pytest.mark.parametrize("function", [s3c.get_json_s3, s3c.get_json])
@pytest.mark.parametrize(("bucket", "key", "error"), BAD_PARTS)
@pytest.mark.usefixtures("untouched")
def test_a_bucket_or_key_that_cannot_be_is_refused_before_anything_is_sent(
    function: Callable[..., Any], bucket: Any, key: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        function(bucket, key)


@pytest.mark.usefixtures("untouched")
def test_a_loader_refuses_what_belongs_to_another() -> None:
    for url in ("s3://bucket/key", "/a/file", "", "file:///a"):
        with pytest.raises(ValueError, match=r"Not an http\(s\) URL"):
            s3c.get_json_url(url)
    for uri in ("http://127.0.0.1:1/a", "/a/file", ""):
        with pytest.raises(ValueError, match=NOT_S3):
            s3c.get_json_s3_uri(uri)


# ==== Options =================================================================================

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"max_concurrency": 0}, ValueError),
    ({"max_concurrency": "four"}, TypeError),
    ({"max_concurrency": 4.0}, TypeError),
    ({"multipart_threshold_bytes": 0}, ValueError),
    ({"multipart_threshold_bytes": -1}, ValueError),
    ({"multipart_threshold_bytes": float("nan")}, ValueError),
    ({"multipart_threshold_bytes": "8 MiB"}, TypeError),
    ({"max_age": "1h"}, TypeError),
    ({"max_age": None}, TypeError),
    ({"max_age": timedelta(hours=1)}, TypeError),
    ({"s3_client": "default"}, TypeError),
    ({"version_id": 5}, TypeError),
    ({"version_id": ""}, ValueError),
    ({"version_id": "\ud800"}, ValueError),
    ({"progress": 5}, TypeError),
    ({"progress": "yes"}, TypeError),
    ({"cache_dir": b"cache"}, TypeError),
    ({"cache_dir": 5}, TypeError),
    ({"cache_dir": "a\0b"}, ValueError),
    ({"cache_dir": "s3://bucket/key"}, ValueError),
    ({"no_such_option": 1}, TypeError),
]


@pytest.mark.parametrize(
    ("options", "error"), BAD_OPTIONS, ids=[str(row[0]) for row in BAD_OPTIONS]
)
@pytest.mark.usefixtures("untouched")
def test_an_option_that_cannot_be_is_refused_before_anything_is_sent(
    options: dict[str, Any], error: type[Exception]
) -> None:
    (name,) = options
    with pytest.raises(error, match=name):
        localize("s3://bucket/key", **options)
    with pytest.raises(error, match=name):
        localize_many(["s3://bucket/key"], **options)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:1/a", "file.json"])
@pytest.mark.usefixtures("untouched")
def test_a_version_is_for_s3_objects(uri: str) -> None:
    with pytest.raises(ValueError, match=r"version_id is for .*s3://"):
        localize(uri, version_id="v1")


@pytest.mark.parametrize("uris", ["s3://bucket/key", b"x", Path("a"), None, 5])
@pytest.mark.usefixtures("untouched")
def test_a_batch_is_an_iterable_of_uris(uris: Any) -> None:
    with pytest.raises(TypeError):
        localize_many(uris)


@pytest.mark.usefixtures("untouched")
def test_a_batch_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="max_workers"):
        localize_many(["s3://bucket/key"], max_workers=0)
    with pytest.raises(TypeError, match="max_workers"):
        localize_many(["s3://bucket/key"], max_workers=2.5)
    with pytest.raises(TypeError, match="executor"):
        localize_many(["s3://bucket/key"], executor=4)


def test_an_empty_batch_is_no_error(untouched: Server) -> None:
    assert localize_many([]) == []


# ==== Directories and files ===================================================================


def test_a_directory_is_returned_as_it_is(untouched: Server, tmp_path: Path) -> None:
    result = localize(tmp_path)
    assert (result.path, result.source, result.from_cache) == (tmp_path, "local", False)


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_directory_that_is_a_file_stays_one(
    publish: Callable[..., str], tmp_path: Path, below: str
) -> None:
    uri, file = publish({}), tmp_path / "file"
    file.write_bytes(b"mine")
    uses: list[Callable[[], Any]] = [
        lambda: localize(uri, cache_dir=file / below),
        lambda: s3c.CacheManager(file / below),
    ]
    for use in uses:
        with pytest.raises(s3c.CacheError, match="file stands where a directory") as caught:
            use()
        assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
        assert str(file) in str(caught.value)
    assert file.read_bytes() == b"mine"


def test_a_directory_is_no_json_document(untouched: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"(?i)is a directory|permission") as caught:
        s3c.get_json(tmp_path)
    assert isinstance(caught.value, s3c.S3CacheError)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "../a\0b", "a\ud800b/../c"])
def test_a_local_path_that_cannot_be_is_not_found(untouched: Server, path: str) -> None:
    for call in (localize, s3c.get_json):
        with pytest.raises(s3c.NotFoundError, match="Local path not found"):
            call(path)


@pytest.mark.parametrize("call", [s3c.get_local_path_for_resource, s3c.get_json])
def test_a_local_path_below_a_file_is_not_found(call: Callable[[Any], Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(s3c.NotFoundError, match=r"Local path not found: .*a$"):
        call(tmp_path / "file" / "a")


@pytest.mark.parametrize("call", [s3c.get_local_path_for_resource, s3c.get_json])
def test_a_local_path_that_may_not_be_looked_at_is_denied(
    call: Callable[[Any], Any], public: Path, as_nobody: AsNobody, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIND_S3_CACHE_DIR", str(public))
    (public / "mine").mkdir(mode=0o700)
    (public / "mine" / "a.json").write_bytes(b"{}")
    call(public / "mine" / "a.json")  # what it imports
    with pytest.raises(s3c.AccessDeniedError, match=r"Cannot be read \(Permission denied\)"):
        as_nobody(lambda: call(public / "mine" / "a.json"))


@pytest.mark.usefixtures("gone")
def test_a_relative_path_in_a_directory_that_is_gone_is_not_found() -> None:
    for call in (s3c.get_local_path_for_resource, s3c.get_json):
        with pytest.raises(s3c.NotFoundError, match=r"Local path not found: a\.json$"):
            call("a.json")


# ==== Documents ===============================================================================


@pytest.mark.parametrize("name", ["a", "line"])
def test_an_error_names_a_document_that_is_called_like_a_word_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"nonsense")
    with pytest.raises(s3c.InvalidJSONError, match=rf": {name}$"):
        s3c.get_json(name)


HAS_DIGIT_LIMIT = hasattr(sys, "set_int_max_str_digits")
BAD_DOCUMENTS: list[tuple[str, bytes, type[Exception], str]] = [
    ("empty", b"", s3c.InvalidJSONError, "Not valid JSON"),
    ("array", b"[1, 2]", TypeError, "^Expected top-level JSON object, not list"),
    ("text", b'"text"', TypeError, "^Expected top-level JSON object, not str"),
    ("null", b"null", TypeError, "^Expected top-level JSON object, not NoneType"),
    ("html", b"<!DOCTYPE html><html></html>", s3c.InvalidJSONError, "looks like an HTML page"),
    ("cut", b'{"a": 1', s3c.InvalidJSONError, "Not valid JSON"),
    ("not utf-8", b'{"a": "\xff"}', s3c.InvalidJSONError, "Not valid JSON"),
    ("deep", b'{"a":' * 100_000, s3c.InvalidJSONError, "nested too deeply"),
]
if HAS_DIGIT_LIMIT:
    number = b'{"a": ' + b"9" * 5000 + b"}"
    BAD_DOCUMENTS.append(("5,000 digits", number, s3c.InvalidJSONError, "4300"))


@pytest.mark.parametrize("source", ["s3", "http", "file"])
@pytest.mark.parametrize(
    ("body", "error", "says"),
    [row[1:] for row in BAD_DOCUMENTS],
    ids=[row[0] for row in BAD_DOCUMENTS],
)
def test_a_document_that_is_no_json_mapping_is_one_clear_error(
    documents: Callable[[bytes, str], str],
    source: str,
    body: bytes,
    error: type[Exception],
    says: str,
) -> None:
    where = documents(body, source)
    with pytest.raises(error, match=says) as caught:
        s3c.get_json(where)
    assert where in str(caught.value)
    assert str(caught.value).isprintable()
    assert caught.value.__cause__ is None


@pytest.fixture
def documents(
    server: Server, publish: Callable[..., str], tmp_path: Path
) -> Callable[[bytes, str], str]:
    """`documents(body, "s3" | "http" | "file") -> where it is`."""

    def make(body: bytes, source: str) -> str:
        uri = publish(body, key="data.json")
        file = tmp_path / "data.json"
        file.write_bytes(body)
        return {"s3": uri, "http": uri.replace("s3:/", server.url), "file": str(file)}[source]

    return make


# ==== The same from the command line ==========================================================


@pytest.mark.parametrize(
    ("arguments", "exit"),
    [
        (("get", ""), 1),
        (("get", "s3://"), 1),
        (("get", "s3://bucket"), 1),
        (("get", "ftp://h/k"), 1),
        (("get", "no-such-file"), 1),
        (("json", "."), 1),
        (("json", "s3://"), 1),
        (("json", "s3://bucket/"), 1),
        (("get", "--cache-dir", "file", "s3://bucket/key"), 1),
        (("dir", "--no-such-option"), 2),
        (("get",), 2),
        ((), 2),
    ],
)
def test_bad_input_is_one_line_from_the_command(
    server: Server, cli: Run, tmp_path: Path, arguments: tuple[str, ...], exit: int
) -> None:
    server.put("bucket", "key", b"{}")
    (tmp_path / "file").touch()
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (exit, "")
    assert "Traceback" not in done.stderr
    assert exit == 2 or (done.stderr.count("\n") == 1 and done.stderr.startswith("aind-s3-cache: "))
