"""Redirects: few, to http(s) only, never down to http, and never with somebody's secret."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import Get, Publish, basic, failing
from server import STALL, Request, Server, s3_error
from subject import s3c

# ==== Of URLs =================================================================================


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_each_redirect_is_followed_with_range_and_condition(
    status: int, server: Server, other: Server, get: Get
) -> None:
    server.redirect("/a", f"{other.url}/b", status)
    other.always(200, b"data", etag='"e"')
    assert get(f"{server.url}/a").path.read_bytes() == b"data"
    assert get(f"{server.url}/a").status == "revalidated"
    assert [request.target for request in other.seen] == ["/b", "/b"]
    assert other.seen[0].headers["range"].startswith("bytes=0-")
    assert other.seen[1].headers["if-none-match"] == '"e"'


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/c", "/c"),
        ("c?d=e", "/dir/c?d=e"),
        ("../c", "/c"),
        ("//127.0.0.1:{port}/c", "/c"),
        ("?q", "/dir/a?q"),
        ("/c#fragment", "/c"),
        ("/a b", "/a%20b"),
        ("/caf\xc3\xa9", "/caf%C3%A9"),
        ("/c?caf\xe9", "/c?caf%E9"),
        ("HTTP://127.0.0.1:{port}/c", "/c"),
    ],
)
def test_where_a_location_leads(location: str, target: str, server: Server, get: Get) -> None:
    server.redirect("/dir/a", location.format(port=server.port))
    server.before = lambda r: (200, b"data", {"ETag": '"e"'}) if r.target != "/dir/a" else None
    get(f"{server.url}/dir/a")
    assert server.seen[1].target == target


@pytest.mark.parametrize(
    ("start", "location", "target"),
    [
        ("/dir//a", "c", "/dir//c"),
        ("/dir/a", "c//d?e=//f:g", "/dir/c//d?e=//f:g"),
        ("//dir/a", "c", "//dir/c"),
        ("/dir//sub/a?b=c/d", "../e", "/dir//e"),
    ],
)
def test_two_slashes_stay_two_where_a_relative_location_leads(
    start: str, location: str, target: str, server: Server, get: Get
) -> None:
    server.redirect(start.partition("?")[0], location)
    server.before = lambda r: (200, b"data", {"ETag": '"e"'}) if r.target != start else None
    get(f"{server.url}{start}")
    assert server.seen[1].target == target


def chain(server: Server, hops: int) -> str:
    for hop in range(hops):
        server.redirect(f"/{hop}", f"/{hop + 1}")
    server.before = lambda r: (200, b"x", {"ETag": '"e"'}) if r.path == f"/{hops}" else None
    return f"{server.url}/0"


def test_ten_redirects_are_followed(server: Server, get: Get) -> None:
    assert get(chain(server, 10)).size == 1


def test_eleven_are_too_many(server: Server, get: Get) -> None:
    assert "10 redirects" in str(failing(get, chain(server, 11)))
    assert len(server.seen) == 11


@pytest.mark.parametrize("shape", ["self", "pair", "growing"])
def test_a_redirect_loop_ends(shape: str, server: Server, get: Get) -> None:
    def before(request: Request) -> Any:
        leads = {"self": "/a", "pair": "/b" if request.path == "/a" else "/a"}
        return 302, b"", {"Location": leads.get(shape, request.target + "/a")}

    server.before = before
    failing(get, f"{server.url}/a")
    assert len(server.seen) == 11


def test_https_is_never_left_for_http(
    tls_server: Server, other: Server, get: Get, cache: Path
) -> None:
    tls_server.redirect("/a", f"{other.url}/b")
    assert "https to http" in str(failing(get, f"{tls_server.url}/a"))
    assert (other.connections, len(tls_server.seen)) == (0, 1)
    assert s3c.CacheManager(cache).entries() == []


def test_http_may_be_left_for_https(server: Server, tls_server: Server, get: Get) -> None:
    server.redirect("/a", f"{tls_server.url}/b")
    tls_server.say(200, b"data", etag='"e"')
    assert get(f"{server.url}/a").size == 4


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "file:/etc/passwd",
        "ftp://127.0.0.1/a",
        "data:text/plain,hello",
        "s3://bucket/key",
        "javascript:alert(1)",
        "http://user@/a",
        "http://127.0.0.1:99999/a",
        "http://127.0.0.1:x/a",
        "http://bad host/a",
        "http://[::1/a",
        "//user@/a",
    ],
)
def test_only_http_and_https_are_followed(
    location: str, server: Server, get: Get, cache: Path
) -> None:
    server.redirect("/a", location)
    failing(get, f"{server.url}/a")
    assert len(server.seen) == 1
    assert s3c.CacheManager(cache).entries() == []


@pytest.mark.parametrize("location", [None, ""])
def test_a_redirect_to_nowhere_is_an_error(
    location: str | None, server: Server, get: Get, cache: Path
) -> None:
    server.always(302, b"moved", headers={"Location": location})
    failing(get, f"{server.url}/a", s3c.S3CacheError)
    assert len(server.seen) <= 11
    assert s3c.CacheManager(cache).entries() == []


def test_a_login_stays_with_its_origin(server: Server, other: Server, get: Get) -> None:
    server.redirect("/a", "/b")
    server.redirect("/b", f"{other.url}/c")
    other.redirect("/c", f"{server.url}/d")
    server.before = lambda r: (200, b"x", {"ETag": '"e"'}) if r.path == "/d" else None
    get(server.url.replace("//", "//user:secret@") + "/a")
    sent = [request.headers.get("authorization") for request in server.seen]
    assert sent == [basic("user:secret"), basic("user:secret"), None]
    assert "authorization" not in other.seen[0].headers


def test_another_scheme_is_another_origin(server: Server, tls_server: Server, get: Get) -> None:
    server.redirect("/a", f"{tls_server.url}/b")
    tls_server.say(200, b"x", etag='"e"')
    get(server.url.replace("//", "//user:secret@") + "/a")
    assert "authorization" not in tls_server.seen[0].headers


def test_a_login_in_a_location_is_neither_resolved_nor_shown(
    server: Server, other: Server, get: Get
) -> None:
    server.redirect("/a", other.url.replace("//", "//user:sesame@") + "/b?token=sesame")
    other.always(404)
    error = failing(get, f"{server.url}/a", s3c.NotFoundError)
    assert "sesame" not in str(error) + repr(vars(error))


def test_a_refused_location_is_shown_without_its_secrets(server: Server, get: Get) -> None:
    server.redirect("/a", "ftp://user:sesame@127.0.0.1/b?token=sesame")
    error = failing(get, f"{server.url}/a")
    assert "sesame" not in str(error) + repr(vars(error))


def test_the_body_of_a_redirect_is_never_read(server: Server, other: Server, get: Get) -> None:
    """urllib drained such a flood for as long as it lasted."""
    sent = 0

    def flood(sock: socket.socket) -> None:
        nonlocal sent
        while True:
            sent += sock.send(bytes(65536))
            time.sleep(0.005)

    head = f"HTTP/1.1 302 Found\r\nLocation: {other.url}/b\r\nContent-Length: 9999999999\r\n\r\n"
    server.say(raw=[head.encode(), flood])
    other.say(200, b"data", etag='"e"')
    began = time.monotonic()
    assert get(f"{server.url}/a").size == 4
    assert time.monotonic() - began < 4
    assert sent < 4 << 20  # what the system's buffers took


def test_the_body_of_an_error_is_read_to_a_limit(server: Server, get: Get) -> None:
    server.say(raw=[b"HTTP/1.1 404 Not Found\r\n\r\n" + bytes(1 << 20), STALL])
    began = time.monotonic()
    failing(get, f"{server.url}/a", s3c.NotFoundError)
    assert time.monotonic() - began < 4


# ==== Of S3: the region =======================================================================


@pytest.fixture
def aws(
    tls_server: Server, other: Server, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Server]:
    """`aws(bucket)`: AWS, reached through a tunnel; the bucket lives in us-west-2."""
    other.proxy, other.tunnel_port = True, tls_server.port
    monkeypatch.setenv("HTTPS_PROXY", other.url)
    monkeypatch.delenv("AWS_ENDPOINT_URL")

    def aws(bucket: str) -> Server:
        tls_server.put(bucket, "a", b"data")
        tls_server.put(bucket, "b", b"more")
        return tls_server

    return aws


@pytest.mark.boto3
def test_an_endpoint_in_boto3s_files_is_asked_where_aws_has_no_such_bucket(
    server: Server, aws: Callable[..., Server], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws("bucket")
    keys = "aws_access_key_id = key\naws_secret_access_key = secret\nregion = here\n"
    (home / "config").write_text(f"[default]\n{keys}endpoint_url = {server.url}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "config"))
    server.put("lab", "a.json", b"{}", private=True)
    assert s3c.get_json("s3://lab/a.json") == {}


def hosts(server: Server) -> list[str]:
    return [f"{request.method} {request.headers['host']}" for request in server.seen]


def elsewhere(server: Server, *answer: Any, head: Any = None) -> None:
    """Requests that reach no region's host get this answer."""

    def before(request: Request) -> Any:
        if ".us-west-2." in request.headers["host"]:
            return None
        return head if request.method == "HEAD" and head else answer

    server.before = before


EVIL = {"Location": "https://evil.example/a", "Content-Type": "application/xml"}
REGION = {"x-amz-bucket-region": "us-west-2"}
MOVED: dict[str, tuple[Any, ...]] = {
    "301 in the header": (301, s3_error("PermanentRedirect", 301)[1], {**EVIL, **REGION}),
    "301 in the body": (
        301,
        s3_error("PermanentRedirect", 301, Endpoint="evil.example", Region="us-west-2")[1],
        EVIL,
    ),
    "301 without Location": (301, b"", {**REGION, "Transfer-Encoding": "chunked"}),
    "307": (307, s3_error("TemporaryRedirect", 307)[1], {**EVIL, **REGION}),
    "400": (400, s3_error("AuthorizationHeaderMalformed", 400)[1], REGION),
}


@pytest.mark.parametrize("how", MOVED)
def test_the_region_is_learnt_and_location_ignored(
    how: str, aws: Callable[..., Server], other: Server, get: Get
) -> None:
    bucket = "moved-" + str(list(MOVED).index(how))
    server = aws(bucket)
    elsewhere(server, *MOVED[how])
    assert get(f"s3://{bucket}/a").path.read_bytes() == b"data"
    first, second = f"GET {bucket}.s3.amazonaws.com", f"GET {bucket}.s3.us-west-2.amazonaws.com"
    assert hosts(server) == [first, second]
    assert all("amazonaws.com" in request.target for request in other.seen)


def test_the_region_is_remembered_for_the_bucket(aws: Callable[..., Server], get: Get) -> None:
    server = aws("remembered")
    elsewhere(server, *MOVED["301 in the header"])
    get("s3://remembered/a")
    server.reset()
    get("s3://remembered/b")
    get("s3://remembered/a")
    assert hosts(server) == ["GET remembered.s3.us-west-2.amazonaws.com"] * 2


OPT_IN = "IllegalLocationConstraintException"


@pytest.mark.parametrize(("status", "code"), [(301, ""), (400, OPT_IN)])
def test_a_silent_redirect_asks_the_bucket(
    status: int, code: str, aws: Callable[..., Server], get: Get
) -> None:
    server = aws(f"silent-{status}")
    body = s3_error(code, status)[1] if code else b""
    elsewhere(server, status, body, {}, head=(status, b"", REGION))
    assert get(f"s3://silent-{status}/a").size == 4
    assert [host.split(" ")[0] for host in hosts(server)] == ["GET", "HEAD", "GET"]


def test_a_bucket_of_an_opt_in_region_that_stays_silent_is_an_error(
    aws: Callable[..., Server], get: Get
) -> None:
    server = aws("opt-in")
    elsewhere(server, *s3_error(OPT_IN, 400), {}, head=(400, b"", {}))
    error = failing(get, "s3://opt-in/a", s3c.S3CacheError)
    assert (error.status, error.code) == (400, OPT_IN)
    assert "AWS_REGION" in str(error)


EVIL_REGIONS = ["evil.example/#", "evil.example", "a.b", "us west", "@evil", "a:1", "-", "-x"]
EVIL_REGIONS += ["x" * 64, "u\u00e9"]


@pytest.mark.parametrize("region", EVIL_REGIONS)
@pytest.mark.parametrize("where", ["header", "body", "HEAD"])
def test_an_evil_region_never_becomes_a_host(
    where: str, region: str, aws: Callable[..., Server], other: Server, get: Get
) -> None:
    bucket = f"evil-{where.lower()}-{EVIL_REGIONS.index(region)}"
    told = {"x-amz-bucket-region": region.encode().decode("latin-1")}
    body = s3_error("PermanentRedirect", 301, Region=region)[1] if where == "body" else b""
    answer = (301, body, told if where == "header" else {})
    head = (301, b"", told if where == "HEAD" else {})
    aws(bucket).before = lambda request: head if request.method == "HEAD" else answer
    error = failing(get, f"s3://{bucket}/a", s3c.S3CacheError)
    assert (error.status, error.code) == (301, "PermanentRedirect")
    assert "AWS_REGION" in str(error)
    assert {request.target for request in other.seen} == {f"{bucket}.s3.amazonaws.com:443"}


@pytest.mark.parametrize("how", ["307", "400"])
def test_a_region_learnt_under_way_serves_what_was_asked_ahead(
    how: str, aws: Callable[..., Server], cache: Path
) -> None:
    here, there = f"here.{how}", f"there.{how}"  # dotted names share a host, and connections
    server = aws(there)
    for number in range(10):
        server.put(here, str(number), b"x")
        server.put(there, str(number), b"y")

    def before(request: Request) -> Any:
        wrong = there in request.path and ".us-west-2." not in request.headers["host"]
        return MOVED[how] if wrong else None

    server.before = before
    uris = [f"s3://{bucket}/{n}" for bucket in (here, there) for n in range(10)]
    results = s3c.get_local_paths_for_resources(uris, cache_dir=cache, anonymous=True)
    assert [result.path.read_bytes() for result in results] == [b"x"] * 10 + [b"y"] * 10


@pytest.mark.parametrize("status", [301, 307, 400])
def test_a_region_that_sends_us_on_is_not_followed_again(
    status: int, aws: Callable[..., Server], get: Get
) -> None:
    server = aws(f"circle-{status}")
    server.before = lambda _: (status, s3_error("PermanentRedirect", status)[1], REGION)
    failing(get, f"s3://circle-{status}/a", s3c.S3CacheError)
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("variables", "host"),
    [
        ({}, "s3.amazonaws.com"),
        ({"AWS_REGION": "us-west-2"}, "s3.us-west-2.amazonaws.com"),
        ({"AWS_DEFAULT_REGION": "us-west-2"}, "s3.us-west-2.amazonaws.com"),
        ({"AWS_REGION": "us-west-2", "AWS_DEFAULT_REGION": "x"}, "s3.us-west-2.amazonaws.com"),
        ({"AWS_REGION": "us-east-1"}, "s3.amazonaws.com"),
        ({"AWS_REGION": "aws-global"}, "s3.amazonaws.com"),
        ({"AWS_REGION": "evil.example/#"}, "s3.amazonaws.com"),
    ],
)
def test_the_region_of_the_environment(
    variables: dict[str, str],
    host: str,
    aws: Callable[..., Server],
    get: Get,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = aws("of-the-environment")
    get("s3://of-the-environment/a")
    assert hosts(server) == [f"GET of-the-environment.{host}"]


def test_a_wrong_region_of_the_environment_is_corrected(
    aws: Callable[..., Server], get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    server = aws("corrected")
    elsewhere(server, *MOVED["301 in the header"])
    assert get("s3://corrected/a").size == 4


def test_a_region_learnt_is_not_that_of_a_bucket_of_the_same_name_in_china(
    aws: Callable[..., Server], get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = aws("twin")
    elsewhere(server, *MOVED["301 in the header"])
    get("s3://twin/a")
    server.before = None
    monkeypatch.setenv("AWS_REGION", "cn-north-1")
    assert get("s3://twin/a").status == "downloaded"
    assert hosts(server)[-1] == "GET twin.s3.cn-north-1.amazonaws.com.cn"


@pytest.mark.parametrize("bucket", ["with.dots", "Upper", "under_score"])
def test_a_bucket_that_no_certificate_covers_is_asked_in_path_style(
    bucket: str, aws: Callable[..., Server], get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    server = aws(bucket)
    get(f"s3://{bucket}/a")
    assert hosts(server) == ["GET s3.us-west-2.amazonaws.com"]
    assert server.seen[0].target == f"/{bucket}/a"


def test_an_entry_is_the_same_before_and_after_its_region_is_known(
    aws: Callable[..., Server], get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = aws("one-entry")
    first = get("s3://one-entry/a")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert get("s3://one-entry/a").status == "revalidated"
    assert get("s3://one-entry/a").path == first.path
    assert len(server.seen) == 3


def test_a_directory_is_listed_in_its_region(aws: Callable[..., Server], get: Get) -> None:
    server = aws("listed")
    server.put("listed", "dir/x", b"1")
    elsewhere(server, *MOVED["301 in the header"])
    assert (get("s3://listed/dir/").path / "x").read_bytes() == b"1"


@pytest.mark.parametrize("how", ["301 in the header", "307"])
def test_a_configured_endpoint_is_never_left(
    how: str, server: Server, publish: Publish, other: Server, get: Get
) -> None:
    uri = publish({})
    status, body, headers = MOVED[how]
    server.say(status, body, headers={**headers, "Location": f"{other.url}/a"})
    assert get(uri).size == 2
    assert (len(server.seen), other.connections) == (2, 0)
