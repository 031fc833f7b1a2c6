"""The loopback server itself, asked with `http.client` and plain sockets."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote_plus

import pytest
from server import BYE, CLOSE, RESET, STALL, Request, Server, s3_error

NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


class Got(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        return ElementTree.fromstring(self.body).findtext("Code")


class Client:
    """One kept connection."""

    def __init__(self, server: Server) -> None:
        self.http = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)

    def ask(self, target: str, method: str = "GET", **headers: str) -> Got:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.http.request(method, target, headers=named)
        answer = self.http.getresponse()
        return Got(answer.status, {n.lower(): v for n, v in answer.getheaders()}, answer.read())


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.http.close()


def say_raw(server: Server, request: bytes) -> bytes:
    """Everything the server sends until it ends the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(request)
        return b"".join(iter(lambda: sock.recv(65536), b""))


# ==== Objects =================================================================================


def test_an_object_is_served_whole_with_its_headers(server: Server, client: Client) -> None:
    etag = server.put("b", "k", b"data", headers={"content-type": "text/plain"})
    got = client.ask("/b/k")
    assert (got.status, got.body, got.headers["etag"]) == (200, b"data", etag)
    assert got.headers["content-type"] == "text/plain"
    assert got.headers["x-amz-bucket-region"] == "us-west-2"
    assert got.headers["x-amz-request-id"]
    assert got.headers["last-modified"]


def test_head_sends_the_headers_only(server: Server, client: Client) -> None:
    server.put("b", "k", b"data")
    got = client.ask("/b/k", "HEAD")
    assert (got.status, got.body, got.headers["content-length"]) == (200, b"", "4")
    assert client.ask("/b/no", "HEAD").body == b""
    assert client.ask("/b", "HEAD").headers["x-amz-bucket-region"] == "us-west-2"


@pytest.mark.parametrize(
    ("asked", "body", "content_range"),
    [
        ("bytes=0-2", b"012", "bytes 0-2/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=-99", b"0123456789", "bytes 0-9/10"),
    ],
)
def test_a_range_is_served_as_206(
    server: Server, client: Client, asked: str, body: bytes, content_range: str
) -> None:
    server.put("b", "k", b"0123456789")
    got = client.ask("/b/k", range=asked)
    assert (got.status, got.body, got.headers["content-range"]) == (206, body, content_range)


@pytest.mark.parametrize("asked", ["bytes=5-2", "bytes=0-1,3-4", "lines=1-2", "bytes=-"])
def test_a_range_that_is_not_understood_is_ignored(
    server: Server, client: Client, asked: str
) -> None:
    server.put("b", "k", b"0123456789")
    assert client.ask("/b/k", range=asked).status == 200


@pytest.mark.parametrize(("data", "asked"), [(b"", "bytes=0-0"), (b"ab", "bytes=2-")])
def test_a_range_past_the_end_is_416(
    server: Server, client: Client, data: bytes, asked: str
) -> None:
    server.put("b", "k", data)
    got = client.ask("/b/k", range=asked)
    assert (got.status, got.code) == (416, "InvalidRange")
    assert got.headers["content-range"] == f"bytes */{len(data)}"
    server.bare_416 = True
    assert "content-range" not in client.ask("/b/k", range=asked).headers


def test_304_wins_even_with_a_range(server: Server, client: Client) -> None:
    etag = server.put("b", "k", b"data")
    got = client.ask("/b/k", range="bytes=0-0", if_none_match=f'"x", W/{etag}')
    assert (got.status, got.body, got.headers["etag"]) == (304, b"", etag)
    assert client.ask("/b/k", if_none_match='"x"').status == 200
    server.ignore_if_none_match = True
    assert client.ask("/b/k", if_none_match=etag).status == 200


def test_if_match_is_compared_strongly(server: Server, client: Client) -> None:
    etag = server.put("b", "k", b"data")
    assert client.ask("/b/k", if_match=etag, range="bytes=0-0").status == 206
    got = client.ask("/b/k", if_match=f"W/{etag}")
    assert (got.status, got.code) == (412, "PreconditionFailed")
    server.ignore_if_match = True
    assert client.ask("/b/k", if_match='"x"').status == 200


def test_dates_count_when_no_etag_is_named(server: Server, client: Client) -> None:
    etag = server.put("b", "k", b"old")
    old = client.ask("/b/k").headers["last-modified"]
    assert client.ask("/b/k", if_modified_since=old).status == 304
    assert client.ask("/b/k", if_modified_since="nonsense").status == 200
    server.put("b", "k", b"new")
    assert client.ask("/b/k", if_modified_since=old).body == b"new"
    assert client.ask("/b/k", if_unmodified_since=old).status == 412
    assert client.ask("/b/k", if_modified_since=old, if_none_match=etag).status == 200


def test_an_object_may_come_without_validators(server: Server, client: Client) -> None:
    assert server.put("b", "k", b"data", etag=None, headers={"Last-Modified": None}) == ""
    headers = client.ask("/b/k").headers
    assert "etag" not in headers
    assert "last-modified" not in headers


@pytest.mark.parametrize("key", ["a b", "?#%+&=", "/lead", "a//b/", "../up", "é\u0301\n", "a\\b"])
def test_keys_are_exact(server: Server, client: Client, key: str) -> None:
    server.put("b", key, key.encode())
    assert client.ask("/b/" + quote(key)).body == key.encode()


def test_missing_things_are_named(server: Server, client: Client) -> None:
    assert (client.ask("/b/k").status, client.ask("/b/k").code) == (404, "NoSuchBucket")
    server.buckets.add("b")
    assert (client.ask("/b/k").status, client.ask("/b/k").code) == (404, "NoSuchKey")
    server.put("b", "k", b"")
    server.delete("b", "k")
    assert client.ask("/b/k").code == "NoSuchKey"
    server.hide_missing = True
    assert client.ask("/b/k").code == "AccessDenied"


def test_a_version_is_picked(server: Server, client: Client) -> None:
    server.put("b", "k", b"one", version="1")
    server.put("b", "k", b"two", version="2")
    assert client.ask("/b/k?versionId=1").body == b"one"
    assert client.ask("/b/k").headers["x-amz-version-id"] == "2"
    assert client.ask("/b/k?versionId=3").code == "NoSuchVersion"


def test_private_things_want_a_signature(server: Server, client: Client) -> None:
    server.put("b", "secret", b"x", private=True)
    server.put("b", "open", b"x")
    assert (client.ask("/b/secret").status, client.ask("/b/secret").code) == (403, "AccessDenied")
    assert client.ask("/b/secret", authorization="AWS4").status == 200
    assert client.ask("/b/open").status == 200
    server.require_auth = True
    assert client.ask("/b/open").status == 403


def test_a_virtual_host_names_the_bucket(server: Server, client: Client) -> None:
    server.put("my.bucket", "k", b"data")
    assert client.ask("/k", host="my.bucket.s3.us-west-2.amazonaws.com").body == b"data"
    assert client.ask("/my.bucket/k", host="s3.us-west-2.amazonaws.com").body == b"data"


def test_checksums_are_sent_when_asked_for(server: Server, client: Client) -> None:
    server.put("b", "k", b"data", headers={"x-amz-checksum-crc32": "AAAA"})
    name, mode = "x-amz-checksum-crc32", {"x_amz_checksum_mode": "ENABLED"}
    assert name not in client.ask("/b/k").headers
    assert client.ask("/b/k", **mode).headers[name] == "AAAA"
    assert name in client.ask("/b/k", range="bytes=0-99", **mode).headers
    assert name not in client.ask("/b/k", range="bytes=0-1", **mode).headers


# ==== Listing =================================================================================


def list_all(client: Client, query: str) -> tuple[list[str], list[str], int]:
    """Keys, common prefixes and the number of pages."""
    keys, prefixes, pages, token = [], [], 0, ""
    while pages == 0 or token:
        page = ElementTree.fromstring(client.ask(f"/b?list-type=2{query}{token}").body)
        pages += 1
        keys += [e.text or "" for e in page.iterfind(f"{NAMESPACE}Contents/{NAMESPACE}Key")]
        path = f"{NAMESPACE}CommonPrefixes/{NAMESPACE}Prefix"
        prefixes += [e.text or "" for e in page.iterfind(path)]
        more = page.findtext(f"{NAMESPACE}NextContinuationToken")
        assert (page.findtext(f"{NAMESPACE}IsTruncated") == "true") == (more is not None)
        token = f"&continuation-token={quote(more, safe='')}" if more else ""
    return keys, prefixes, pages


def test_a_listing_goes_on_page_by_page(server: Server, client: Client) -> None:
    for number in range(7):
        server.put("b", f"t/{number}", b"x")
    server.put("b", "u", b"x")
    server.page_size = 3
    assert list_all(client, "&prefix=t/") == ([f"t/{n}" for n in range(7)], [], 3)
    assert list_all(client, "&prefix=t/&start-after=t/5")[0] == ["t/6"]
    assert list_all(client, "&max-keys=100")[2] == 3


def test_a_delimiter_rolls_keys_up(server: Server, client: Client) -> None:
    for key in ("a", "d/1", "d/2", "e/f/3", "z/"):
        server.put("b", key, b"x")
    server.page_size = 1
    assert list_all(client, "&delimiter=/") == (["a"], ["d/", "e/", "z/"], 4)
    assert list_all(client, "&delimiter=/&prefix=z/")[0] == ["z/"]


def test_listed_keys_are_quoted_on_request(server: Server, client: Client) -> None:
    names = sorted(["a b+c", "a&<b>", "é%", "x\x01y"])
    for name in names:
        server.put("b", name, b"x")
    keys = list_all(client, "&encoding-type=url")[0]
    assert "a+b%2Bc" in keys
    assert [unquote_plus(key) for key in keys] == names
    with pytest.raises(ElementTree.ParseError):
        list_all(client, "")


def test_a_listing_tells_etag_and_size(server: Server, client: Client) -> None:
    etag = server.put("b", "k", b"data")
    body = client.ask("/b?list-type=2").body
    assert b"<ETag>&quot;" in body
    assert b"<KeyCount>1</KeyCount>" in body
    entry = ElementTree.fromstring(body).find(f"{NAMESPACE}Contents")
    assert entry is not None
    assert entry.findtext(f"{NAMESPACE}ETag") == etag
    assert entry.findtext(f"{NAMESPACE}Size") == "4"


def test_a_bad_continuation_token_is_refused(server: Server, client: Client) -> None:
    server.buckets.add("b")
    assert client.ask("/b?list-type=2&continuation-token=x").code == "InvalidArgument"


# ==== Scripts =================================================================================


def test_scripted_answers_come_first_and_in_order(server: Server, client: Client) -> None:
    server.put("b", "k", b"real")
    server.say(503, code="SlowDown").say(200, b"x", etag='"a"')
    first, second, third = (client.ask("/b/k") for _ in range(3))
    assert (first.status, first.code) == (503, "SlowDown")
    assert (second.body, second.headers["etag"], third.body) == (b"x", '"a"', b"real")
    assert len(server.seen) == 3
    assert server.connections == 1


def test_always_lasts_until_it_is_lifted(server: Server, client: Client) -> None:
    server.always(500)
    assert [client.ask("/b/k").status for _ in range(3)] == [500] * 3
    server.always(None)
    assert client.ask("/b/k").status == 404


def test_a_path_can_have_its_own_script(server: Server, client: Client) -> None:
    server.on_path("/odd", 418, times=1).say(204)
    asked = ["/b/odd", "/b/even", "/b/odd"]
    assert [client.ask(path).status for path in asked] == [418, 204, 404]


def test_a_hook_may_change_the_world_or_answer(server: Server, client: Client) -> None:
    def swap(request: Request) -> tuple[int, bytes] | None:
        server.put("b", "k", b"new")
        return (202, b"hook") if "hook" in request.query else None

    server.before = swap
    assert client.ask("/b/k").body == b"new"
    assert client.ask("/b/k?hook").body == b"hook"


def test_a_redirect_is_sent(server: Server, client: Client) -> None:
    server.redirect("/x", "/b/k", 307)
    got = client.ask("/x")
    assert (got.status, got.headers["location"]) == (307, "/b/k")


def test_framing_can_be_scripted(server: Server, client: Client) -> None:
    server.say(200, b"x" * 20_000, headers={"Transfer-Encoding": "chunked"})
    server.say(200, b"half", headers={"Content-Length": "8", "Connection": "close"})
    assert len(client.ask("/b/k").body) == 20_000
    with pytest.raises(http.client.IncompleteRead):
        client.ask("/b/k")


def test_raw_steps_are_sent_as_they_are(server: Server) -> None:
    ports: list[int] = []
    server.say(raw=[b"HTTP/1.0 2", 0.01, b"00\r\n\r\n", lambda s: ports.append(s.fileno()), CLOSE])
    assert say_raw(server, b"GET / HTTP/1.1\r\n\r\n") == b"HTTP/1.0 200\r\n\r\n"
    assert ports


def test_a_raw_answer_may_keep_the_connection(server: Server, client: Client) -> None:
    server.say(raw=[b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"]).say(201)
    assert [client.ask("/").body, client.ask("/").status] == [b"x", 201]
    assert server.connections == 1


def test_reset_resets(server: Server) -> None:
    server.say(raw=[b"HTTP/1.1 200 OK\r\n", 0.02, RESET])
    with pytest.raises(ConnectionResetError):
        say_raw(server, b"GET / HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("last", [STALL, 60])
def test_close_ends_what_stalls(last: object) -> None:
    server = Server().say(raw=[b"HTTP/1.1 200 OK\r\n", last])
    threading.Timer(0.05, server.close).start()
    started = time.monotonic()
    assert say_raw(server, b"GET / HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200")
    assert time.monotonic() - started < 2
    server.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "server"]


def test_a_failing_hook_fails_the_test() -> None:
    def fail(request: Request) -> None:
        raise LookupError(request.path)

    server = Server()
    server.before = fail
    assert say_raw(server, b"GET /b/k HTTP/1.1\r\n\r\n") == b""
    with pytest.raises(LookupError, match="/b/k"):
        server.__exit__(None, None, None)


def test_s3_errors_carry_further_elements() -> None:
    status, body = s3_error("PermanentRedirect", 301, Region="us-west-2")
    assert (status, b"<Region>us-west-2</Region>" in body) == (301, True)


# ==== Connections =============================================================================


def test_requests_are_recorded(server: Server, client: Client) -> None:
    client.ask("/b/k%20x?list-type=2&prefix=a%2Bb", range="bytes=0-1")
    seen = server.seen[0]
    assert (seen.method, seen.target) == ("GET", "/b/k%20x?list-type=2&prefix=a%2Bb")
    assert (seen.path, seen.query) == ("/b/k x", {"list-type": "2", "prefix": "a+b"})
    assert (seen.headers["range"], seen.connection, seen.scheme) == ("bytes=0-1", 1, "http")
    server.reset()
    assert (server.seen, server.connections) == ([], 0)


def test_connections_are_kept_unless_the_client_says_close(server: Server, client: Client) -> None:
    client.ask("/b/k")
    client.ask("/b/k", connection="close")
    client.ask("/b/k")
    assert [request.connection for request in server.seen] == [1, 1, 2]


def test_pipelined_requests_and_bodies_are_told_apart(server: Server) -> None:
    sent = b"PUT /b/k HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET /x HTTP/1.0\r\n\r\n"
    answers = say_raw(server, sent)
    assert answers.count(b"HTTP/1.1 405") == 1
    assert [request.method for request in server.seen] == ["PUT", "GET"]


def test_latency_and_rate_slow_it_down(server: Server, client: Client) -> None:
    server.put("b", "k", b"x" * 10_000)
    server.latency, server.rate = 0.05, 100_000
    started = time.monotonic()
    assert len(client.ask("/b/k").body) == server.bytes_sent == 10_000
    assert time.monotonic() - started >= 0.14


def test_a_proxy_is_asked_in_absolute_form(server: Server) -> None:
    server.put("b", "k", b"proxied")
    sent = b"GET http://far.example/b/k HTTP/1.1\r\nConnection: close\r\n\r\n"
    assert say_raw(server, sent).endswith(b"proxied")
    assert server.seen[0].target == "http://far.example/b/k"


def test_connect_is_tunnelled_to_this_machine(server: Server) -> None:
    server.put("b", "k", b"far")
    with Server() as proxy:
        proxy.proxy = True
        http_client = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)
        http_client.set_tunnel("far.example", server.port)
        http_client.request("GET", "/b/k")
        assert http_client.getresponse().read() == b"far"
        assert proxy.seen[0].target == f"far.example:{server.port}"
        http_client.close()


def test_tls_ends_in_order_or_is_cut(tls_server: Server, ca_file: Path) -> None:
    trust = ssl.create_default_context(cafile=str(ca_file))
    trust.options &= ~0x80  # OP_IGNORE_UNEXPECTED_EOF: Python 3.9 sets it, with OpenSSL 3
    for last, ends_well in ((BYE, True), (CLOSE, False)):
        tls_server.say(raw=[b"x", last])
        plain = socket.create_connection(("127.0.0.1", tls_server.port), timeout=5)
        sock = trust.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False)
        with plain, sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert sock.recv(1) == b"x"
            with contextlib.nullcontext() if ends_well else pytest.raises(ssl.SSLError):
                assert sock.recv(1) == b""


def test_no_answer_waits_for_a_delayed_ack(server: Server, client: Client) -> None:
    """40 ms each, if it did: 40 s."""
    etag = server.put("b", "k", b"data")
    started = time.monotonic()
    for _ in range(1000):
        client.ask("/b/k", if_none_match=etag)
    assert time.monotonic() - started < 10
