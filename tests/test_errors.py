"""Section 2, Errors: one family, caught by the names users know, without anybody's secrets."""

from __future__ import annotations

import copy
import errno
import json
import logging
import pickle
import socket
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import BUCKET, Publish, Run
from server import CLOSE, Server
from subject import s3c

FAMILY: dict[str, tuple[type, ...]] = {
    "S3CacheError": (Exception,),
    "NotFoundError": (FileNotFoundError,),
    "AccessDeniedError": (PermissionError, FileNotFoundError),
    "TransferError": (ConnectionError,),
    "IntegrityError": (OSError,),
    "OfflineError": (ConnectionError,),
    "CacheError": (OSError,),
    "InvalidJSONError": (ValueError,),
    "MissingDependencyError": (ImportError,),
}
EVERYTHING: dict[str, Any] = {
    "uri": "s3://bucket/key",
    "status": 404,
    "code": "NoSuchKey",
    "hint": "Look elsewhere",
}

# ==== The family ==============================================================================


@pytest.mark.parametrize("name", FAMILY)
def test_every_error_is_of_the_family_and_has_its_builtin_names(name: str) -> None:
    cls = getattr(s3c, name)
    assert issubclass(cls, s3c.S3CacheError)
    assert all(issubclass(cls, base) for base in FAMILY[name])
    assert cls.__module__ == s3c.__name__


def test_the_base_is_a_plain_exception() -> None:
    assert s3c.S3CacheError.__bases__ == (Exception,)


def test_the_family_is_complete() -> None:
    public = {name for name in s3c.__all__ if name.endswith("Error")}
    assert public == set(FAMILY)


def test_the_tree_in_the_docstring_names_everyone() -> None:
    assert [name for name in FAMILY if name not in s3c.S3CacheError.__doc__] == []


@pytest.mark.parametrize("name", FAMILY)
def test_the_text_is_made_from_the_attributes(name: str) -> None:
    error = getattr(s3c, name)("It went wrong", **EVERYTHING)
    assert str(error) == "It went wrong: s3://bucket/key (404, NoSuchKey). Look elsewhere"
    assert {key: getattr(error, key) for key in EVERYTHING} == EVERYTHING
    assert error.message == "It went wrong"


@pytest.mark.parametrize("name", FAMILY)
def test_lists_of_errors_show_what_each_is_about(name: str) -> None:
    error = getattr(s3c, name)("It went wrong", **EVERYTHING)
    assert repr([error]) == f"[{name}({str(error)!r})]"


def test_what_is_unknown_is_none() -> None:
    error = s3c.S3CacheError("It went wrong")
    assert str(error) == "It went wrong"
    assert (error.uri, error.status, error.code, error.hint) == (None, None, None, None)


@pytest.mark.parametrize(
    ("name", "number"),
    [("NotFoundError", errno.ENOENT), ("AccessDeniedError", errno.EACCES)],
)
def test_errors_with_a_builtin_name_have_its_errno(name: str, number: int) -> None:
    assert getattr(s3c, name)("It went wrong").errno == number
    assert s3c.CacheError("Full", errno=errno.ENOSPC).errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("size", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (999_499, "999.5 kB"), (999_999_999, "1.0 GB")],
)
def test_a_size_has_three_digits_before_its_point_at_most(size: int, text: str) -> None:
    assert s3c._human(size) == text


@pytest.mark.parametrize(
    ("fields", "code", "status"),
    [
        ({"status": 404, "code": "NoSuchKey"}, "NoSuchKey", 404),
        ({"status": 404}, "404", 404),
        ({}, "", None),
    ],
)
def test_the_response_has_botocores_shape(
    fields: dict[str, Any], code: str, status: int | None
) -> None:
    response = s3c.S3CacheError("It went wrong", **fields).response
    assert response["Error"] == {"Code": code, "Message": "It went wrong"}
    assert response["ResponseMetadata"]["HTTPStatusCode"] == status


# ==== What a server's answer becomes ==========================================================

ANSWERS: list[tuple[int, str | None, str, str]] = [
    (404, "NoSuchKey", "NotFoundError", "^S3 object not found or inaccessible"),
    (404, "NoSuchBucket", "NotFoundError", "Check the bucket's name"),
    (404, "NoSuchVersion", "NotFoundError", "NoSuchVersion"),
    (403, "AccessDenied", "AccessDeniedError", "not public"),
    (403, "InvalidObjectState", "AccessDeniedError", "archived"),
    (401, None, "AccessDeniedError", "401"),
    (405, "MethodNotAllowed", "NotFoundError", "405"),
    (400, "InvalidArgument", "S3CacheError", "400, InvalidArgument"),
    (503, "SlowDown", "TransferError", "SlowDown"),
    (500, "InternalError", "TransferError", "after 9 attempts"),
    (501, "NotImplemented", "TransferError", "501"),
    (511, None, "TransferError", r"key \(511\)\. "),
    (511, None, "TransferError", "captive portal"),
]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("status", "code", "name", "says"), ANSWERS)
def test_an_answer_becomes_the_same_error_in_every_call(
    server: Server, get: Callable[..., Any], status: int, code: str | None, name: str, says: str
) -> None:
    server.always(status, code=code)
    for call in (get, s3c.get_json):
        with pytest.raises(getattr(s3c, name), match=says) as caught:
            call("s3://bucket/key")
        assert isinstance(caught.value, getattr(s3c, name))
        assert caught.value.status == status
        assert caught.value.code == (code or {401: "AccessDenied"}.get(status, str(status)))
        assert caught.value.uri == "s3://bucket/key"


CUT_SHORT = {
    "length": "Content-Length: 500\r\n\r\n<Error>",
    "chunks": "Transfer-Encoding: chunked\r\n\r\n7\r\n<Err",
}
MOVED = "400 Bad Request\r\nx-amz-bucket-region: eu-west-1"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("frame", CUT_SHORT)
@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", MOVED], ids=lambda s: s[:3])
@pytest.mark.parametrize("uri", ["{url}/a", "s3://bucket/a", "s3://bucket/dir/"])
def test_an_error_whose_body_is_cut_short_is_that_error(
    uri: str, status: str, frame: str, server: Server, get: Callable[..., Any]
) -> None:
    server.always(raw=[f"HTTP/1.1 {status}\r\n{CUT_SHORT[frame]}".encode(), CLOSE])
    with pytest.raises(s3c.S3CacheError) as caught:
        get(uri.format(url=server.url), anonymous=True)
    assert (caught.value.status, caught.value.attempts) == (int(status[:3]), 1)
    assert len(server.seen) <= 2  # the second: whether what is missing is a directory


def test_a_missing_url_is_no_s3_error(server: Server, get: Callable[..., Any]) -> None:
    for call in (get, s3c.get_json):
        with pytest.raises(s3c.NotFoundError, match=r"^URL not found .*\(404\)") as caught:
            call(f"{server.url}/bucket/key")
        assert caught.value.code is None


@pytest.mark.parametrize("uri", ["s3://bucket/key", "http://127.0.0.1:{port}/key"])
@pytest.mark.usefixtures("quick")
def test_a_server_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, get: Callable[..., Any], uri: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(s3c.TransferError, match=f"127.0.0.1:{port}") as caught:
        get(uri.format(port=port))
    assert caught.value.attempts == 9
    assert caught.value.errno == errno.ECONNREFUSED


# ==== botocore's name =========================================================================

CATCH = """
import sys
sys.path[:0] = sys.argv[2:]
try:
    from botocore.exceptions import ClientError
except ImportError:
    ClientError = None
import SUBJECT as s3c
try:
    s3c.get_json(sys.argv[1])
except s3c.S3CacheError as error:
    bases = [cls.__module__ for cls in type(error).__mro__]
    print(type(error).__name__, type(error).__module__ == s3c.__name__)
    print(any(base.startswith("botocore") for base in bases))
    print(ClientError is not None and isinstance(error, ClientError))
"""


def test_without_botocore_nothing_is_said_of_it(server: Server, run_python: Run) -> None:
    env = {"AWS_ENDPOINT_URL": server.url}
    done = run_python(CATCH, "s3://bucket/key", flags=("-S",), env=env)
    assert done.stdout.split() == ["NotFoundError", "True", "False", "False"]


@pytest.fixture
def client_error() -> Any:
    return pytest.importorskip("botocore.exceptions").ClientError


@pytest.mark.boto3
@pytest.mark.usefixtures("client_error")
def test_botocore_that_is_installed_but_not_loaded_stays_so(
    server: Server, run_python: Run
) -> None:
    code = CATCH.replace("from botocore", "raise ImportError; from botocore")
    done = run_python(code, "s3://bucket/key", env={"AWS_ENDPOINT_URL": server.url})
    assert done.stdout.split() == ["NotFoundError", "True", "False", "False"]


@pytest.mark.boto3
@pytest.mark.parametrize(
    ("status", "code"), [(404, "NoSuchKey"), (404, "NoSuchBucket"), (403, "AccessDenied")]
)
def test_an_s3_answer_is_botocores_client_error_too(
    server: Server, client_error: Any, status: int, code: str
) -> None:
    server.always(status, code=code)
    with pytest.raises(client_error) as caught:
        s3c.get_json("s3://bucket/key")
    error = caught.value
    assert isinstance(error, s3c.S3CacheError)
    assert error.response["Error"]["Code"] == code
    assert error.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert error.operation_name == "GetObject"


@pytest.mark.boto3
@pytest.mark.usefixtures("quick")
def test_a_throttling_server_is_a_client_error_once_patience_ends(
    server: Server, client_error: Any
) -> None:
    server.always(503, code="SlowDown")
    with pytest.raises(client_error, match="SlowDown"):
        s3c.get_json("s3://bucket/key")


@pytest.mark.boto3
def test_what_is_no_s3_answer_is_no_client_error(
    server: Server, client_error: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")
    for where in (f"{server.url}/bucket/key", "s3://bucket/key", tmp_path / "no-such-file"):
        with pytest.raises(s3c.S3CacheError) as caught:
            s3c.get_json(where)
        assert not isinstance(caught.value, client_error)


@pytest.mark.boto3
def test_the_mixed_class_is_made_once_and_looks_like_ours(client_error: Any) -> None:
    one, two = (s3c.NotFoundError("Gone", **EVERYTHING) for _ in range(2))
    assert type(one) is type(two)
    assert type(one).__name__ == "NotFoundError"
    assert type(one).__mro__.index(s3c.NotFoundError) < type(one).__mro__.index(client_error)
    assert isinstance(one, FileNotFoundError)


@pytest.mark.boto3
def test_the_clients_own_refusals_are_of_the_family(
    server: Server, publish: Publish, client_error: Any
) -> None:
    boto3 = pytest.importorskip("boto3")
    client = boto3.client(
        "s3", aws_access_key_id="id", aws_secret_access_key="no", region_name="us-west-2"
    )
    publish({})
    with pytest.raises(s3c.NotFoundError) as caught:
        s3c.get_json(BUCKET, "missing", client)
    assert isinstance(caught.value, client_error)
    assert (caught.value.status, caught.value.code) == (404, "NoSuchKey")


@pytest.mark.parametrize("name", ["botocore", "botocore.exceptions", "json", "logging"])
def test_a_module_that_another_thread_is_importing_is_left_alone(
    name: str, get: Callable[..., Any], publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = publish({})
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # what a thread meets meanwhile
    assert get(uri).status == "downloaded"
    assert s3c._Signed(None, "bucket", "key", None).signed
    assert isinstance(s3c.InvalidJSONError("Not valid JSON"), ValueError)
    with pytest.raises(s3c.NotFoundError):
        get("s3://bucket/no-such-key")


# ==== Pickling ================================================================================


def carried(error: Any) -> dict[str, Any]:
    """Everything that an error carries, for a comparison."""
    names = ("message", "uri", "status", "code", "hint", "attempts", "errno", "response", "args")
    return {"class": type(error), "str": str(error), **{n: getattr(error, n) for n in names}}


def copies(error: Any) -> Iterator[Any]:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.loads(pickle.dumps(error, protocol))
    yield copy.copy(error)
    yield copy.deepcopy(error)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("fields", [{}, {"errno": 28, "uri": "s3://b/k"}, EVERYTHING], ids=str)
def test_errors_pickle_with_everything_they_carry(name: str, fields: dict[str, Any]) -> None:
    error = getattr(s3c, name)("It went wrong", **fields)
    error.attempts = 3
    for same in copies(error):
        assert carried(same) == carried(error)


@pytest.mark.boto3
@pytest.mark.parametrize("name", FAMILY)
def test_errors_that_are_client_errors_pickle_too(client_error: Any, name: str) -> None:
    error = getattr(s3c, name)("It went wrong", **EVERYTHING)
    for same in copies(error):
        assert carried(same) == carried(error)
        assert isinstance(same, client_error) == isinstance(error, client_error)
    assert isinstance(error, client_error) or name == "InvalidJSONError"


def test_invalid_json_pickles_and_stays_a_json_decode_error() -> None:
    for same in copies(s3c.InvalidJSONError("Not JSON", uri="s3://b/k")):
        assert isinstance(same, json.JSONDecodeError)
        assert isinstance(same, s3c.InvalidJSONError)
        assert (same.lineno, same.colno, same.pos) == (1, 1, 0)


@pytest.mark.boto3
@pytest.mark.usefixtures("client_error")
def test_an_error_travels_to_a_process_without_botocore(run_python: Run, tmp_path: Path) -> None:
    (tmp_path / "error").write_bytes(pickle.dumps(s3c.NotFoundError("Gone", **EVERYTHING)))
    code = """
import pickle, sys
error = pickle.load(open("error", "rb"))
print(type(error).__name__, error.code, any("botocore" in name for name in sys.modules))
"""
    assert run_python(code, flags=("-S",)).stdout.split() == ["NotFoundError", "NoSuchKey", "False"]


# ==== No secrets ==============================================================================

SECRET = "hunter2"


def told(error: BaseException) -> str:
    """All that an error shows to whoever looks at it, its causes and a traceback included."""
    shown = ["".join(traceback.format_exception(type(error), error, error.__traceback__))]
    link: BaseException | None = error
    while link is not None:
        shown += [str(link), repr(link), repr(vars(link)), repr(link.args)]
        shown.append(pickle.dumps(link).decode("latin-1"))
        link = link.__cause__
    return "\n".join(shown)


@pytest.fixture
def no_leak(
    caplog: pytest.LogCaptureFixture, cache: Path, home: Path, capfd: pytest.CaptureFixture[str]
) -> Iterator[None]:
    """Fails the test if the secret stands in a log line, on a stream, in a file or its name."""
    caplog.set_level(logging.DEBUG)
    yield
    assert SECRET not in caplog.text
    assert SECRET not in "".join(capfd.readouterr())
    for root in (cache, home):
        for path in root.rglob("*"):
            assert SECRET not in str(path)
            assert path.is_dir() or SECRET.encode() not in path.read_bytes()


def with_secrets(server: Server, path: str = "/bucket/key.json") -> str:
    host = server.url.partition("://")[2]
    return f"http://user:{SECRET}@{host}{path}?X-Amz-Signature={SECRET}#{SECRET}"


@pytest.mark.usefixtures("no_leak")
def test_a_url_with_secrets_is_kept_and_shown_without_them(
    server: Server, publish: Publish, get: Callable[..., Any]
) -> None:
    publish({"a": 1}, key="key.json", bucket="bucket")
    for options in ({}, {}, {"max_age": 60}, {"offline": True}):
        result = get(with_secrets(server), progress=True, **options)
        assert SECRET not in repr(result) + str(result.path)
        assert SECRET.encode() not in pickle.dumps(result)
    assert SECRET in server.seen[0].target  # it was sent, after all
    assert "authorization" in server.seen[0].headers


FAILURES: dict[str, Callable[[Server], object]] = {
    "missing": lambda server: None,
    "forbidden": lambda server: server.always(403, f"<p>{SECRET}</p>".encode()),
    "failing": lambda server: server.always(500),
    "throttled": lambda server: server.always(429, headers={"Retry-After": "999"}),
    "teapot": lambda server: server.always(418),
    "portal": lambda server: server.always(511),
    "not modified": lambda server: server.always(304),
    "loop": lambda server: server.always(302, headers={"Location": f"/a?{SECRET}"}),
    "to ftp": lambda server: server.always(302, headers={"Location": f"ftp://u:{SECRET}@h/"}),
    "to nowhere": lambda server: server.always(302, headers={"Location": f"http://u:{SECRET}@/"}),
    "to a bad port": lambda server: server.always(302, headers={"Location": f"//h:bad/?{SECRET}"}),
    "to a bad host": lambda server: server.always(
        302, headers={"Location": f"http://u:{SECRET}@a b/?{SECRET}"}
    ),
    "no range": lambda server: server.always(206, b"x", etag='"x"'),
    "not HTTP": lambda server: server.always(raw=[b"SSH-2.0-server\r\n\r\n"]),
    "refused": lambda server: server.close(),
}


@pytest.mark.usefixtures("no_leak", "quick")
@pytest.mark.parametrize("failure", FAILURES)
def test_no_error_holds_a_secret(server: Server, get: Callable[..., Any], failure: str) -> None:
    url = with_secrets(server)
    FAILURES[failure](server)
    for call in (get, s3c.get_json, s3c.get_json_url):
        with pytest.raises(s3c.S3CacheError) as caught:
            call(url)
        assert SECRET not in told(caught.value)


@pytest.mark.usefixtures("no_leak")
def test_offline_errors_hold_no_secret(server: Server, get: Callable[..., Any]) -> None:
    with pytest.raises(s3c.OfflineError) as caught:
        get(with_secrets(server), offline=True)
    assert SECRET not in told(caught.value)


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize("body", [b"[]", b"<html>", b'{"a": 1'])
def test_document_errors_hold_no_secret(server: Server, publish: Publish, body: bytes) -> None:
    publish(body, key="key.json", bucket="bucket")
    with pytest.raises((s3c.InvalidJSONError, TypeError)) as caught:
        s3c.get_json(with_secrets(server))
    assert SECRET not in told(caught.value)
    assert "key.json" in str(caught.value)


REFUSED_URLS = [
    f"http://user:{SECRET}@ho st/",
    f"http://user:{SECRET}@host:99999/?{SECRET}",
    f"http://user:a/{SECRET}@127.0.0.1:1/x",
    f"http://user:a?{SECRET}@127.0.0.1:1/x",
    f"http://user:{SECRET}#b@127.0.0.1:1/x",
    f"ftp://user:{SECRET}@host/x?{SECRET}",
    f"s3://user:{SECRET}@bucket/key",
    f"s3://user:{SECRET}/b@bucket/key",
    f"ftp://user:a/{SECRET}@host/x",
]


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize("url", REFUSED_URLS)
def test_a_refused_url_shows_no_password_either(get: Callable[..., Any], url: str) -> None:
    for call in (get, s3c.get_json, s3c.get_json_url):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  what it says is tested below
            call(url)
        assert SECRET not in told(caught.value)


MISTYPED_URLS = [
    f" https://user:{SECRET}@127.0.0.1:1/x.json",
    f" https://127.0.0.1:1/x.json?X-Amz-Signature={SECRET}",
    f"http:/127.0.0.1:1/x?sig={SECRET}",
    f"http:/127.0.0.1:1/x?sig={SECRET * 60}",
]


@pytest.mark.usefixtures("no_leak")
@pytest.mark.parametrize("url", MISTYPED_URLS, ids=range(4))
def test_a_url_that_is_taken_for_a_path_shows_no_secret_either(
    get: Callable[..., Any], url: str
) -> None:
    for call in (get, s3c.get_json, s3c.get_json_url):
        with pytest.raises((s3c.S3CacheError, ValueError)) as caught:
            call(url)
        assert SECRET not in told(caught.value)


@pytest.mark.usefixtures("no_leak", "quick")
def test_a_stale_copy_is_warned_of_without_secrets(
    server: Server, publish: Publish, get: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    publish({}, key="key.json", bucket="bucket")
    get(with_secrets(server))
    server.always(503)
    assert get(with_secrets(server), stale_if_error=True).status == "stale"
    assert "stale" in caplog.text


@pytest.mark.usefixtures("no_leak", "quick")
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "HTTP_PROXY", "http_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "ho st"])
def test_settings_with_a_password_stay_secret(
    get: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, variable: str, host: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.test")
    monkeypatch.setenv(variable, f"http://user:{SECRET}@{host.format(port=port)}")
    for call in (get, s3c.get_json):
        with pytest.raises((s3c.S3CacheError, ValueError)) as caught:
            call("s3://bucket/key")
        assert SECRET not in told(caught.value)


@pytest.mark.boto3
@pytest.mark.usefixtures("no_leak", "quick", "client_error")
@pytest.mark.parametrize("host", ["127.0.0.1:9", "ho st"])
def test_boto3s_own_errors_hold_no_secret(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@{host}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    with pytest.raises((s3c.S3CacheError, ValueError)) as caught:
        s3c.get_json("s3://bucket/key", anonymous=False)
    assert SECRET not in told(caught.value)


@pytest.mark.boto3
@pytest.mark.usefixtures("client_error")
def test_boto3s_errors_of_its_files_hold_no_secret(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "no-config").write_text(f"[default]\nendpoint_url = user:{SECRET}@host\n")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    with pytest.raises(s3c.S3CacheError, match="cannot be set up") as caught:
        s3c.get_json("s3://bucket/key", anonymous=False)
    assert SECRET not in told(caught.value)


def test_the_command_line_shows_no_secret(server: Server, cli: Run) -> None:
    server.put("bucket", "key.json", b"[]")
    for verb in (["get", "--json"], ["get"], ["json"]):
        for path in ("/bucket/key.json", "/bucket/missing"):
            done = cli(*verb, with_secrets(server, path))
            assert SECRET not in done.stdout + done.stderr
            assert done.stderr.count("\n") <= 1


# ==== Names that come from outside ============================================================


def test_a_key_cannot_forge_a_line_of_a_log(
    server: Server, get: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for call in (get, s3c.get_json):
        with pytest.raises(s3c.NotFoundError) as caught:
            call("s3://bucket/a\nERROR forged \x1b[31m\u2028")
        assert str(caught.value).isprintable()
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_nor_can_the_key_of_an_object_that_is_there(
    server: Server, get: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger=s3c.__name__)
    key, size = "a\nERROR forged \x1b[31m", s3c._SMALL + 1  # large: begun and ended by a line each
    server.put("bucket", key, bytes(size))
    get(f"s3://bucket/{key}")
    told = [record.getMessage() for record in caplog.records]
    lines = [line for line in told if "ERROR forged" in line]
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_white_space_of_a_line_is_what_the_hint_is_about(
    server: Server, get: Callable[..., Any]
) -> None:
    server.put("bucket", "key", b"{}")
    for line in ("s3://bucket/key\n", "s3://bucket/key ", " s3://bucket/key"):
        with pytest.raises(s3c.NotFoundError, match="white space: strip the line"):
            get(line)


def test_an_answer_cannot_forge_one_either(server: Server) -> None:
    server.always(403, b"<Error><Code>a\nb\x1b[31m</Code></Error>".replace(b"\x1b", b"&#133;"))
    with pytest.raises(s3c.AccessDeniedError) as caught:
        s3c.get_json("s3://bucket/key", anonymous=True)
    assert str(caught.value).isprintable()


# ==== Logs ====================================================================================


def test_the_log_has_a_line_per_download_and_one_per_request(
    server: Server, publish: Publish, get: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger=s3c.__name__)
    uri = publish({})
    for _ in range(3):
        get(uri)
    levels = [record.levelno for record in caplog.records if record.name == s3c.__name__]
    assert levels.count(logging.INFO) == 1
    assert levels.count(logging.DEBUG) == len(server.seen) == 3


def test_the_logger_is_silent_by_default(server: Server, run_python: Run) -> None:
    server.put("bucket", "key", b"{}")
    code = """
import logging, SUBJECT as s3c
s3c.get_local_path_for_resource("s3://bucket/key", cache_dir="cache")
print(logging.getLogger(s3c.__name__).handlers)
"""
    done = run_python(code, env={"AWS_ENDPOINT_URL": server.url})
    assert "NullHandler" in done.stdout
    assert done.stderr == ""


def test_the_logger_stays_silent_when_a_configuration_takes_its_handlers(
    server: Server, run_python: Run
) -> None:
    server.put("bucket", "key", b"{}")
    server.before = lambda request: (500, b"") if len(server.seen) > 1 else None
    code = """
import logging.config, SUBJECT as s3c
s3c._RETRIES, uri = 0, "s3://bucket/key"
s3c.get_local_path_for_resource(uri, cache_dir="cache")
logging.config.dictConfig({"version": 1, "loggers": {s3c.__name__: {"level": "INFO"}}})
print(s3c.get_local_path_for_resource(uri, cache_dir="cache", stale_if_error=True).status)
"""
    done = run_python(code, env={"AWS_ENDPOINT_URL": server.url})
    assert (done.stdout.strip(), done.stderr) == ("stale", "")
