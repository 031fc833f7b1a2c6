"""Transport: connections, TLS, proxies, deadlines, framing, and when an attempt is made again.

The rows of "Transport" and "Odd framing" in the fault matrix, each on a real socket.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from conftest import BUCKET, Get, Publish, Run, basic, failing
from server import BYE, CLOSE, RESET, STALL, Server, chunked, render
from subject import s3c

OTHER = 'HTTP/1.1 200 OK\r\nETag: "e"\r\n'  # of an answer that the test frames itself


def head(*lines: str) -> bytes:
    return (OTHER + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode("latin-1")


def at_once(get: Get, uris: list[str]) -> list[Any]:
    with ThreadPoolExecutor(len(uris)) as pool:
        return list(pool.map(get, uris))


class Timer:
    """Seconds that a block took."""

    def __enter__(self) -> Timer:
        self.began, self.took = time.monotonic(), 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.took = time.monotonic() - self.began


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 0)


# ==== Connecting ==============================================================================


@pytest.fixture
def bound() -> Iterator[socket.socket]:
    """A port that refuses connections until the test lets it listen."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


def address(sock: socket.socket) -> str:
    return f"127.0.0.1:{sock.getsockname()[1]}"


def test_a_refused_connection_is_retried_until_the_server_is_up(
    bound: socket.socket, get: Get
) -> None:
    def serve() -> None:
        bound.listen()
        peer, _ = bound.accept()
        with peer:
            peer.recv(65536)
            peer.sendall(head("Content-Length: 2") + b"ok")

    timer = threading.Timer(0.3, serve)
    timer.start()
    assert get(f"http://{address(bound)}/a").path.read_bytes() == b"ok"
    timer.join()


@pytest.mark.usefixtures("quick")
def test_a_server_that_stays_down_is_named_with_its_port(bound: socket.socket, get: Get) -> None:
    error = failing(get, f"http://{address(bound)}/a")
    assert f"Connection to {address(bound)} failed" in str(error)
    assert "Check the endpoint" in error.hint
    assert (error.attempts, error.errno) == (s3c._RETRIES + 1, errno.ECONNREFUSED)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("key", ["a.json", "tree/"])
def test_a_lost_connection_is_an_error_of_what_was_asked_for(
    key: str, bound: socket.socket, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address(bound)}")
    error = failing(get, f"s3://bucket/{key}")
    assert (error.uri, address(bound) in str(error)) == (f"s3://bucket/{key}", True)


def test_an_endpoint_that_is_no_url_is_named(get: Get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(ValueError, match=r"AWS_ENDPOINT_URL.*'localhost:9000'.*http://host:port"):
        get("s3://bucket/a.json")


@pytest.mark.parametrize("path", ["?token=hidden", "/base?token=hidden"])
def test_an_endpoint_with_a_query_is_refused_before_anything_is_sent(
    path: str, server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url + path)
    with pytest.raises(ValueError, match=r"AWS_ENDPOINT_URL.*has a query") as caught:
        get("s3://bucket/a.json")
    assert not server.seen
    assert "hidden" not in str(caught.value)


def resolving(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> list[Any]:
    """Resolve every name to these addresses; the list holds the names that were looked up."""
    look_up, asked = socket.getaddrinfo, []

    def answer(host: str, *args: Any) -> Any:
        asked.append(host)
        return [found for address in hosts for found in look_up(address, *args)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


@pytest.mark.usefixtures("no_retries")
def test_every_address_of_a_name_is_tried(
    server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, "::1", "127.0.0.1")  # nobody listens on the first
    server.say(200, b"x", etag='"e"')
    assert get(f"http://somewhere.example:{server.port}/a").size == 1


@pytest.mark.parametrize("host", ["under_score.example", "a" * 63 + ".example", "rooted.example."])
def test_any_name_that_can_be_looked_up_is_asked(
    host: str, server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolving(monkeypatch, "127.0.0.1")
    server.say(200, b"x", etag='"e"')
    assert get(f"http://{host}:{server.port}/a").size == 1
    assert asked == [host]


def test_an_address_of_ipv6_stands_in_brackets(get: Get) -> None:
    try:
        server = Server(host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        server.say(200, b"x", etag='"e"')
        assert get(f"http://[::1]:{server.port}/a").size == 1
        assert server.seen[0].headers["host"] == f"[::1]:{server.port}"


@pytest.mark.usefixtures("no_retries")
def test_an_address_of_a_family_that_the_system_lacks_is_skipped(
    server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = socket.getaddrinfo("127.0.0.1", server.port, 0, socket.SOCK_STREAM)
    found.insert(0, (99, socket.SOCK_STREAM, 0, "", ("::1", server.port)))  # type: ignore[arg-type]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    server.say(200, b"x", etag='"e"')
    assert get(f"http://somewhere.example:{server.port}/a").size == 1


def test_a_limit_of_time_that_ends_while_a_socket_is_made_is_the_callers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Broken variant: it was taken for an address that cannot be used, and the next was tried."""

    def late(_: int, frame: object) -> None:  # as a signal handler is called
        raise TimeoutError("the caller's")

    def make(*_: object) -> None:
        made.append(1)
        late(0, sys._getframe())

    found = socket.getaddrinfo("127.0.0.1", 80, 0, socket.SOCK_STREAM)
    made: list[int] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found * 2)
    monkeypatch.setattr(socket, "socket", make)
    with pytest.raises(TimeoutError, match="the caller's"):
        s3c._dial(("http", "127.0.0.1", 80), time.monotonic() + 5)
    assert made == [1]


@pytest.mark.parametrize(
    ("number", "attempts"), [(socket.EAI_AGAIN, 9), (socket.EAI_NONAME, 2)], ids=["again", "noname"]
)
@pytest.mark.usefixtures("quick")
def test_a_name_that_does_not_resolve(
    number: int, attempts: int, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(number, "no")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    error = failing(get, "http://nowhere.example/a")
    assert error.attempts == attempts
    assert "nowhere.example" in str(error)
    assert error.hint


@pytest.mark.root
@pytest.mark.skipif(sys.platform != "linux", reason="no network namespaces here")
def test_without_a_network_the_name_is_what_cannot_be_resolved(run_python: Run) -> None:
    code = """
import ctypes, sys, SUBJECT as s3c
if ctypes.CDLL(None).unshare(0x40000000): sys.exit("skip")  # CLONE_NEWNET
s3c._RETRY_BASE = 0.001
try: s3c.get_json("s3://a-bucket/a.json")
except s3c.TransferError as error: print(error)
"""
    done = run_python(code, check=False)
    if "skip" in done.stderr:
        pytest.skip("no network namespaces here")
    assert "Cannot resolve a-bucket.s3.amazonaws.com" in done.stdout


@pytest.mark.usefixtures("no_retries")
def test_a_connection_that_nobody_answers_times_out(
    deaf: str, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_CONNECT_TIMEOUT", 0.3)
    with Timer() as timer:
        error = failing(get, deaf)
    assert 0.2 < timer.took < 5
    assert error.errno == errno.ETIMEDOUT


@pytest.mark.usefixtures("no_retries")
def test_many_dead_addresses_do_not_add_up(
    deaf: str, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, *["127.0.0.1"] * 20)
    monkeypatch.setattr(s3c, "_CONNECT_TIMEOUT", 0.2)
    monkeypatch.setattr(s3c, "_CONNECT_TOTAL", 0.5)
    with Timer() as timer:
        failing(get, deaf)
    assert timer.took < 5


# ==== Kept connections ========================================================================


def assert_shared(server: Server, publish: Publish, get: Get) -> None:
    uris = [publish(b"%d" % number, f"{number}") for number in range(5)]
    for uri in uris * 2:
        get(uri)
    assert (len(server.seen), server.connections) == (10, 1)


def test_requests_one_after_the_other_share_a_connection(
    server: Server, publish: Publish, get: Get
) -> None:
    assert_shared(server, publish, get)


def test_ssl_is_told_the_name_as_text(
    tls_server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else truststore fails, which replaces ssl where a company's proxy makes certificates."""
    names, wrap = [], ssl.SSLContext.wrap_socket

    def recording(self: ssl.SSLContext, sock: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(kwargs.get("server_hostname"))
        return wrap(self, sock, *args, **kwargs)

    monkeypatch.setattr(ssl.SSLContext, "wrap_socket", recording)
    get(publish(b"x"))
    assert [name for name in names if name] == ["127.0.0.1"]  # the server's own has none


def test_a_name_with_the_roots_dot_is_the_certificates_name(
    tls_server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a cluster it spares a resolver its search list."""
    resolving(monkeypatch, "127.0.0.1")
    tls_server.say(200, b"x", etag='"e"')
    assert get(f"https://localhost.:{tls_server.port}/a").size == 1


def test_over_tls_they_share_it_too(tls_server: Server, publish: Publish, get: Get) -> None:
    assert_shared(tls_server, publish, get)


def test_errors_and_304_keep_the_connection_too(server: Server, publish: Publish, get: Get) -> None:
    uri = publish({})
    for _ in range(3):
        get(uri)
        failing(get, uri + ".missing", s3c.NotFoundError)
    assert server.connections == 1


def test_threads_at_once_get_a_connection_each_and_keep_it(
    server: Server, publish: Publish, get: Get
) -> None:
    uris = [publish(b"%d" % n, f"{n}") for n in range(6)]
    server.latency = 0.1
    for _ in range(3):
        at_once(get, uris)
    assert server.connections == 6


def test_no_more_connections_are_kept_than_the_bound(
    server: Server, publish: Publish, run_python: Run
) -> None:
    server.latency = 0.4  # all six are under way at once
    uris = [publish({"n": n}, f"{n}") for n in range(6)]
    code = """
import sys, SUBJECT as s3c
from concurrent.futures import ThreadPoolExecutor
s3c._IDLE_CONNECTIONS = 2
with ThreadPoolExecutor(6) as pool:
    for _ in range(2): list(pool.map(s3c.get_json, sys.argv[1:]))
"""
    run_python(code, *uris)
    assert server.connections == 6 + 4


UNASKED = {
    "an answer": b'HTTP/1.1 200 OK\r\nETag: "a"\r\nContent-Length: 3\r\n\r\nAAA',
    "an error": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
}


def after_what_is_unasked(server: Server, unasked: str, get: Get) -> bytes:
    """What is read of an object after another one was answered twice on the same connection."""
    server.put(BUCKET, "b", b"right")
    server.on_path("/a1", raw=[UNASKED["an answer"], 0.05, UNASKED[unasked]])
    get(f"{server.url}/{BUCKET}/a1")
    time.sleep(0.2)
    content: bytes = get(f"{server.url}/{BUCKET}/b").path.read_bytes()
    return content


@pytest.mark.parametrize("unasked", UNASKED)
def test_what_comes_unasked_is_no_answer_to_what_is_asked_next(
    unasked: str, server: Server, tls_server: Server, get: Get
) -> None:
    """Broken variant: the next caller got another object's bytes, and they were cached as his."""
    assert after_what_is_unasked(server, unasked, get) == b"right"
    assert after_what_is_unasked(tls_server, unasked, get) == b"right"


def test_what_comes_unasked_is_seen_among_a_thousand_open_files(server: Server, get: Get) -> None:
    """Broken variant: `select` knows no descriptor above 1023."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1400), hard))
    with contextlib.ExitStack() as held:
        for _ in range(1100):
            held.enter_context(open(os.devnull))
        assert after_what_is_unasked(server, "an answer", get) == b"right"
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_came_over_tls_is_reported_before_a_stall_is(
    tls_server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_STALL_TIMEOUT", 2.0)
    monkeypatch.setattr(s3c, "_RETRIES", 0)
    tls_server.always(raw=[head('ETag: "a"', "Content-Length: 500000"), 0.1, b"x" * 100, STALL])
    began, told = time.monotonic(), []
    failing(get, f"{tls_server.url}/a", progress=lambda _: told.append(time.monotonic() - began))
    assert told[0] < 1.0


def test_whoever_interrupts_the_search_for_a_connection_changes_nothing_of_it() -> None:
    """Broken variant: a signal handler's call moved it, and one to another server was taken."""
    pool = s3c._Pool()
    interrupted: list[bool] = []

    class Asked(tuple):  # type: ignore[type-arg]
        def __eq__(self, other: object) -> bool:
            if not interrupted:
                interrupted.append(True)
                pool.give(pool.take(right))
            return True

        __hash__ = tuple.__hash__

    right, wrong = (("http", "right", 80),), (("http", "wrong", 80),)
    with contextlib.ExitStack() as held:
        for key in (right, wrong):
            near, _ = map(held.enter_context, socket.socketpair())
            pool.give(s3c._Connection(near, key))
        pool._idle[0].key = Asked(right)
        assert pool.take(right).key == right


def test_a_connection_that_idled_too_long_is_not_used_again(
    publish: Publish, server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_IDLE_SECONDS", 0.1)
    uri = publish({})
    get(uri)
    time.sleep(0.2)
    get(uri)
    assert server.connections == 2


@pytest.mark.parametrize("end", [BYE, RESET], ids=["fin", "reset"])
@pytest.mark.usefixtures("no_retries")
def test_a_kept_connection_that_died_costs_no_retry(
    end: Any, server: Server, publish: Publish, get: Get
) -> None:
    uri = publish({})
    server.say(raw=[head("Content-Length: 2") + b"{}", 0.05, end])
    get(uri)
    time.sleep(0.15)
    assert get(uri).size == 2
    assert (len(server.seen), server.connections) == (2, 2)


@pytest.mark.usefixtures("no_retries")
def test_a_kept_connection_that_dies_under_the_request_costs_no_retry(
    server: Server, publish: Publish, get: Get
) -> None:
    uri = publish({})
    get(uri)
    server.say(raw=[CLOSE])  # the request has arrived, and there is no answer
    assert get(uri).status == "revalidated"
    assert server.connections == 2


@pytest.mark.usefixtures("quick")
def test_a_fresh_connection_that_dies_is_retried_within_the_budget(
    server: Server, publish: Publish, get: Get
) -> None:
    uri = publish({})
    server.always(raw=[CLOSE])
    assert failing(get, uri).attempts == s3c._RETRIES + 1
    assert server.connections == s3c._RETRIES + 1


def test_connection_close_is_obeyed(server: Server, publish: Publish, get: Get) -> None:
    for _ in range(2):
        server.say(200, b"x", etag='"e"', headers={"Connection": "close"})
        get(publish({}))
    assert server.connections == 2


def test_bytes_beyond_the_announced_end_are_no_answer_to_the_next_request(
    server: Server, publish: Publish, get: Get
) -> None:
    """Response smuggling: what follows a body must not be taken for the next object."""
    forged = head("Content-Length: 6") + b"forged"
    server.say(raw=[head("Content-Length: 2") + b"{}" + forged])
    assert get(publish({}, "first")).size == 2
    assert get(publish(b"honest", "second")).path.read_bytes() == b"honest"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_opens_its_own_connections(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    """Broken variant: without the fork handler the child asks on the parent's connection."""
    uri = publish({"a": 1})
    code = """
import os, sys, SUBJECT as s3c
def ask(): assert s3c.get_json(sys.argv[1]) == {"a": 1}
ask()
child = os.fork()
if not child:
    ask()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
ask()
"""
    run_python(code, uri)
    assert [request.connection for request in server.seen] == [1, 2, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_parent_and_child_never_get_each_others_answers(
    server: Server, publish: Publish, run_python: Run
) -> None:
    """Broken variant: sharing the socket mixes up or hangs the two within a few requests."""
    for name in ("parent", "child"):
        publish({"for": name}, name)
    code = """
import os, sys, SUBJECT as s3c
def ask(name): assert s3c.get_json(f"s3://aind-open-data/{name}") == {"for": name}
ask("parent")
child = os.fork()
for _ in range(100): ask("parent" if child else "child")
if not child: os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    run_python(code, timeout=20)
    assert server.connections == 2


def test_work_at_interpreter_exit_still_goes_on(
    server: Server, publish: Publish, run_python: Run, cache: Path
) -> None:
    uri = publish(os.urandom(9 << 20), "big.bin")
    code = """
import atexit, sys, SUBJECT as s3c
def late(): print(s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2]).size)
atexit.register(late)
"""
    assert run_python(code, uri, cache).stdout == f"{9 << 20}\n"


# ==== Attempts ================================================================================


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.usefixtures("quick")
def test_a_status_that_passes_is_retried(
    status: int, server: Server, publish: Publish, get: Get
) -> None:
    server.say(status).say(status)
    assert get(publish({})).size == 2
    assert len(server.seen) == 3


@pytest.mark.parametrize(
    "code", ["SlowDown", "RequestTimeout", "RequestLimitExceeded", "BandwidthLimitExceeded"]
)
@pytest.mark.usefixtures("quick")
def test_a_code_of_s3_that_passes_is_retried(
    code: str, server: Server, publish: Publish, get: Get
) -> None:
    server.say(400, code=code)
    assert get(publish({})).size == 2
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    "status", [400, 402, 403, 404, 405, 406, 409, 410, 411, 414, 418, 422, 451, 501, 505, 511]
)
def test_a_status_that_stays_is_not_retried(
    status: int, server: Server, publish: Publish, get: Get
) -> None:
    server.always(status)
    uri = publish({})
    assert failing(get, uri, s3c.S3CacheError, anonymous=True).status == status
    asked = [request for request in server.seen if "prefix" not in request.query]
    assert len(asked) == 1  # besides: whether a key that is missing is a directory


def test_511_is_said_to_be_a_captive_portal(server: Server, publish: Publish, get: Get) -> None:
    server.say(511)
    assert "captive portal" in str(failing(get, publish({})))


@pytest.mark.parametrize(("status", "base"), [(500, 0.05), (503, 1.0), (429, 1.0)])
def test_pauses_double_with_full_jitter_and_are_longer_when_throttled(
    status: int, base: float, server: Server, publish: Publish, get: Get, no_sleep: list[float]
) -> None:
    server.always(status)
    assert failing(get, publish({})).attempts == s3c._RETRIES + 1
    ceilings = [min(s3c._RETRY_CAP, base * 2**attempt) for attempt in range(s3c._RETRIES)]
    assert len(no_sleep) == len(ceilings)
    assert all(0 <= slept <= ceiling for slept, ceiling in zip(no_sleep, ceilings))
    assert sum(no_sleep) > sum(ceilings) / 50


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": formatdate(time.time() + 3600, usegmt=True)}, None, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0, 0),
        ({"Retry-After": "0"}, 0, 0),
        ({"x-amz-retry-after": "1500"}, 1.5, 1.5),
        ({"Retry-After": "soon"}, 0, 1.0),
        ({"Retry-After": "-3"}, 0, 1.0),
    ],
    ids=["seconds", "far date", "past date", "zero", "amz millis", "words", "negative"],
)
def test_retry_after_is_obeyed_within_the_budget(
    headers: dict[str, str],
    low: float | None,
    high: float,
    server: Server,
    publish: Publish,
    get: Get,
    no_sleep: list[float],
) -> None:
    server.say(503, headers=headers)
    if low is None:  # beyond what we would ever wait: fail now
        assert failing(get, publish({})).attempts == 1
        assert not no_sleep
        return
    get(publish({}))
    assert low <= sum(no_sleep) <= high


@pytest.mark.usefixtures("quick")
def test_progress_refills_the_budget(
    server: Server, publish: Publish, get: Get, cut: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 1)
    data = os.urandom(20_000)
    cut(1000, RESET, times=99)
    assert get(publish(data)).path.read_bytes() == data
    assert len(server.seen) == 20


@pytest.mark.usefixtures("quick")
def test_without_progress_the_budget_ends(
    server: Server, publish: Publish, get: Get, cut: Any
) -> None:
    cut(0, RESET, times=99)
    assert failing(get, publish(b"x" * 100)).attempts == s3c._RETRIES + 1
    assert len(server.seen) == s3c._RETRIES + 1


@pytest.mark.usefixtures("quick")
def test_bytes_that_come_again_are_no_progress(
    server: Server, publish: Publish, get: Get, cut: Any
) -> None:
    server.ignore_range = True
    cut(1000, CLOSE, times=999)
    failing(get, publish(b"x" * 5000))
    assert len(server.seen) == s3c._RETRIES + 1


def test_the_time_without_progress_is_bounded_too(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 10**6)
    monkeypatch.setattr(s3c, "_RETRY_TOKENS", 10**6)
    monkeypatch.setattr(s3c, "_RETRY_TOTAL", 0.4)
    server.always(500)
    with Timer() as timer:
        failing(get, publish({}))
    assert timer.took < 6


def test_a_process_whose_every_request_fails_stops_retrying(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRY_BASE", 0.0)
    uri = publish({})
    server.always(500)
    for _ in range(50):
        failing(get, uri)
    assert len(server.seen) == 50 + s3c._RETRY_TOKENS // 5


@pytest.mark.parametrize("key", ["d/a", "d/"], ids=["object", "tree"])
def test_what_is_unchanged_gives_a_retry_back(
    key: str, server: Server, publish: Publish, get: Get, quick: None
) -> None:
    uri = publish({}, "d/a")[:-3] + key
    get(uri)
    s3c._QUOTA.tokens = 0  # as an outage leaves it
    for _ in range(s3c._RETRY_COST):
        assert get(uri).from_cache
    server.say(503)
    assert get(uri).status == "revalidated"


@pytest.mark.parametrize("again", [(503,), (500,)], ids=str)
@pytest.mark.usefixtures("quick")
def test_a_resume_that_cannot_be_opened_has_the_same_budget(
    again: tuple[int], server: Server, publish: Publish, get: Get, cut: Any
) -> None:
    data = os.urandom(5000)
    uri = publish(data)
    cut(1000, RESET)
    hook = server.before

    def before(request: Any) -> Any:
        return again if len(server.seen) in (2, 3) else hook and hook(request)

    server.before = before
    assert get(uri).path.read_bytes() == data
    assert server.seen[3].headers["range"] == "bytes=1000-4999"


# ==== TLS =====================================================================================


@pytest.fixture
def ca_only(ca_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(ca_file))
    return ca_file


def tls_for(ca: Any, *names: str, **options: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*names, **options).configure_cert(context)
    return context


def assert_distrusted(context: ssl.SSLContext, get: Get) -> None:
    with Server(context) as server:
        error = failing(get, f"{server.url}/a")
        assert (server.connections, error.attempts, server.seen) == (1, 1, [])
    assert "AWS_CA_BUNDLE" in str(error)
    assert f"127.0.0.1:{server.port}" in str(error)


def test_an_unknown_authority_is_refused_and_not_retried(
    tls_context: ssl.SSLContext, get: Get
) -> None:
    assert_distrusted(tls_context, get)


@pytest.mark.usefixtures("ca_only")
def test_a_certificate_of_another_host_is_refused_and_not_retried(ca: Any, get: Get) -> None:
    assert_distrusted(tls_for(ca, "other.example"), get)


@pytest.mark.usefixtures("ca_only")
def test_a_certificate_that_expired_is_refused_and_not_retried(ca: Any, get: Get) -> None:
    import datetime

    past = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    assert_distrusted(tls_for(ca, "127.0.0.1", not_after=past), get)


@pytest.mark.parametrize(
    "name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"]
)
def test_each_variable_names_a_ca_bundle(
    name: str,
    tls_context: ssl.SSLContext,
    ca_file: Path,
    get: Get,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, str(ca_file))
    with Server(tls_context) as server:
        server.say(200, b"x", etag='"e"')
        assert get(f"{server.url}/a").size == 1


NOBODY_TRUSTED = """
import ssl, sys, SUBJECT as s3c
paths = ssl.DefaultVerifyPaths(None, sys.argv[1], *ssl.get_default_verify_paths()[2:])
ssl.get_default_verify_paths = lambda: paths
print(s3c.get_local_path_for_resource(sys.argv[2], cache_dir=sys.argv[3]).size)
"""


def test_certifi_is_asked_where_python_trusts_nobody(
    tls_context: ssl.SSLContext, ca_file: Path, cache: Path, tmp_path: Path, run_python: Run
) -> None:
    """As requests does: a Python without certificates, as python.org's on macOS."""
    for name in ("certifi", "none"):
        (tmp_path / name).mkdir()
    (tmp_path / "certifi" / "__init__.py").touch()
    (tmp_path / "certifi" / "cacert.pem").write_bytes(ca_file.read_bytes())
    with Server(tls_context) as server:
        server.say(200, b"x", etag='"e"')
        done = run_python(NOBODY_TRUSTED, tmp_path / "none", f"{server.url}/a", cache)
    assert done.stdout == "1\n"


def rehashed(ca_file: Path, tmp_path: Path) -> Path:
    """A directory of certificates as OpenSSL looks them up."""
    command = ["openssl", "x509", "-noout", "-hash", "-in", str(ca_file)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        pytest.skip("no openssl program here")
    directory = tmp_path / "certificates"
    directory.mkdir()
    (directory / f"{done.stdout.strip()}.0").write_bytes(ca_file.read_bytes())
    return directory


@pytest.mark.parametrize("name", ["SSL_CERT_DIR", "AWS_CA_BUNDLE"])
def test_certificates_may_stand_in_a_directory(
    name: str,
    tls_context: ssl.SSLContext,
    ca_file: Path,
    tmp_path: Path,
    get: Get,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, str(rehashed(ca_file, tmp_path)))
    with Server(tls_context) as server:
        server.say(200, b"x", etag='"e"')
        assert get(f"{server.url}/a").size == 1


@pytest.mark.parametrize("content", [None, "", "no certificate"], ids=["missing", "empty", "junk"])
def test_a_bundle_that_cannot_be_loaded_is_named(
    content: str | None, tmp_path: Path, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle.pem"
    if content is not None:
        bundle.write_text(content)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    with Server() as server:
        error = failing(get, f"https://127.0.0.1:{server.port}/a")
        assert server.seen == []
    assert str(bundle) in str(error)
    assert error.attempts == 1


def test_a_kept_connection_is_not_used_under_other_trust(
    tls_server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = publish({})
    get(uri)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    assert "certificate" in str(failing(get, uri))


def test_the_ca_bundle_is_loaded_once(
    tls_server: Server, publish: Publish, get: Get, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = publish({})
    get(uri)
    ca_file.unlink()  # a second look at it would fail
    monkeypatch.setattr(s3c, "_IDLE_SECONDS", 0)
    time.sleep(0.01)
    get(uri)
    assert tls_server.connections == 2


@pytest.mark.usefixtures("no_retries")
def test_a_handshake_that_stalls_ends(
    tls_server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_CONNECT_TOTAL", 0.3)
    tls_server.accept_delay = 60
    with Timer() as timer:
        failing(get, f"{tls_server.url}/a")
    assert timer.took < 6


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["HTTP", "end"])
@pytest.mark.usefixtures("quick")
def test_a_server_that_does_not_speak_tls_is_an_error_in_the_words_of_tls(
    said: bytes, bound: socket.socket, get: Get
) -> None:
    def serve() -> None:
        bound.listen()
        while True:
            peer, _ = bound.accept()
            with peer:
                if not peer.recv(65536):
                    return
                peer.sendall(said)

    thread = threading.Thread(target=serve)
    thread.start()
    error = failing(get, f"https://{address(bound)}/a")
    socket.create_connection(bound.getsockname()).close()
    thread.join()
    assert f"Connection to {address(bound)} failed: " in str(error)
    assert "(_ssl.c:" in str(error)
    assert error.errno is None


@pytest.mark.parametrize("end", [CLOSE, BYE], ids=["ragged", "close_notify"])
@pytest.mark.usefixtures("quick")
def test_over_tls_only_close_notify_ends_a_body(
    end: Any, tls_server: Server, get: Get, cache: Path
) -> None:
    tls_server.always(raw=[head("Connection: close") + b"half of it", end])
    url = f"{tls_server.url}/a"
    if end is BYE:
        assert get(url).path.read_bytes() == b"half of it"
    else:
        failing(get, url)
        assert s3c.CacheManager(cache).entries() == []


@pytest.mark.parametrize("end", [None, CLOSE, RESET])
def test_a_body_over_tls_is_whole_though_its_connection_breaks(
    end: Any, tls_server: Server, publish: Publish, get: Get
) -> None:
    data = bytes(range(256)) * 12_000
    uri = publish(data)

    def before(request: Any) -> tuple[Any, ...] | None:
        if end is None or len(tls_server.seen) > 1:
            return None
        first, body = render(tls_server._answer(request), "GET")
        return 206, b"", {}, (first + bytes(body[:1_000_000]), 0.02, end)

    tls_server.before = before
    assert get(uri).path.read_bytes() == data
    assert len(tls_server.seen) == 1 + (end is not None)


# ==== Proxies =================================================================================


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_http_goes_through_the_proxy_in_absolute_form(
    name: str, other: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, other.url.replace("//", "//us%65r:p%40ss@"))
    other.say(200, b"x", etag='"e"')
    get("http://far.example:8080/a%20b?c=d")
    seen = other.seen[0]
    assert seen.target == "http://far.example:8080/a%20b?c=d"
    assert seen.headers["host"] == "far.example:8080"
    assert seen.headers["proxy-authorization"] == basic("user:p@ss")
    assert "authorization" not in seen.headers


def test_https_goes_through_a_tunnel(
    tls_server: Server, publish: Publish, other: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.proxy, other.tunnel_port = True, tls_server.port
    monkeypatch.setenv("HTTPS_PROXY", other.url.replace("//", "//user:secret@"))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    publish(b"data", "a", bucket="tunnelled")
    for _ in range(2):
        get("s3://tunnelled/a")
    assert [request.target for request in other.seen] == ["tunnelled.s3.amazonaws.com:443"]
    assert other.seen[0].headers["proxy-authorization"] == basic("user:secret")
    assert "proxy-authorization" not in tls_server.seen[0].headers
    assert tls_server.connections == 1


@pytest.mark.usefixtures("no_retries")
def test_a_proxy_may_take_longer_for_a_tunnel_than_for_a_connection(
    tls_server: Server, other: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_CONNECT_TIMEOUT", 0.2)
    monkeypatch.setenv("HTTPS_PROXY", other.url)
    other.proxy, other.latency = True, 0.6
    tls_server.say(200, b"x", etag='"e"')
    assert get(f"{tls_server.url}/a").size == 1


def test_a_login_for_the_server_is_not_shown_to_the_proxy(
    tls_server: Server, other: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.proxy = True
    monkeypatch.setenv("HTTPS_PROXY", other.url)
    tls_server.say(200, b"x", etag='"e"')
    get(tls_server.url.replace("//", "//user:secret@") + "/a")
    assert "authorization" not in other.seen[0].headers
    assert tls_server.seen[0].headers["authorization"] == basic("user:secret")


def test_behind_a_tunnel_the_certificate_is_still_checked(
    tls_server: Server, other: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.proxy, other.tunnel_port = True, tls_server.port
    monkeypatch.setenv("HTTPS_PROXY", other.url)
    error = failing(get, "https://not-in-the-certificate.example/a")
    assert "certificate" in str(error)
    assert tls_server.seen == []


@pytest.mark.parametrize(("status", "attempts"), [(407, 1), (403, 1), (503, 9)])
@pytest.mark.usefixtures("quick")
def test_a_proxy_that_refuses_a_tunnel_is_named_without_its_password(
    status: int, attempts: int, other: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", other.url.replace("//", "//user:secret@"))
    other.always(status)
    error = failing(get, "https://far.example/a")
    assert (error.status, error.attempts) == (status, attempts)
    assert f"127.0.0.1:{other.port}" in str(error)
    assert "secret" not in repr(vars(error)) + str(error)


@pytest.mark.parametrize("url", ["https://far.example/a", "http://far.example/a"])
@pytest.mark.usefixtures("quick")
def test_a_dead_proxy_is_what_the_error_names(
    url: str, bound: socket.socket, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads "far.example refused" looks in the wrong place."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://user:secret@{address(bound)}")
    error = failing(get, url)
    assert address(bound) in str(error)
    assert "secret" not in repr(vars(error)) + str(error)


@pytest.mark.parametrize(
    "listed", ["127.0.0.1", "*", "far.example, 127.0.0.1", "127.0.0.1:{port}"], ids=str
)
def test_no_proxy_is_obeyed(
    listed: str, server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", listed.format(port=server.port))
    get(publish({}))
    assert len(server.seen) == 1


UNUSABLE_PROXIES = ["socks5://127.0.0.1:1080", "https://127.0.0.1:1", "http://"]
UNUSABLE_PROXIES += ["http://user:sesame/x@127.0.0.1:3128", "user:sesame@127.0.0.1:port"]


@pytest.mark.parametrize("proxy", UNUSABLE_PROXIES)
def test_a_proxy_we_cannot_use_is_said_so(
    proxy: str, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    error = failing(get, "http://far.example/a")
    assert "proxy" in str(error).lower()
    assert "sesame" not in str(error)
    assert (error.attempts, "HTTPS_PROXY" in error.hint) == (1, True)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("url", ["http://far.example/a", "https://far.example/a"])
def test_a_proxy_that_is_down_is_named(
    url: str, bound: socket.socket, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", f"http://{address(bound)}")
    error = failing(get, url)
    assert f"Connection to proxy {address(bound)} failed" in str(error)
    assert (error.uri, "HTTPS_PROXY" in error.hint) == (url, True)


@pytest.mark.usefixtures("no_retries")
@pytest.mark.parametrize("url", ["http://far.example/a", "https://far.example/a"])
@pytest.mark.parametrize(
    ("end", "says"), [(CLOSE, "Connection to proxy {} failed"), (STALL, "waiting for proxy {}")]
)
def test_a_proxy_that_does_not_answer_is_named(
    end: Any, says: str, url: str, other: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_CONNECT_TOTAL", "_HEAD_TIMEOUT"):
        monkeypatch.setattr(s3c, name, 0.5)
    monkeypatch.setenv("ALL_PROXY", other.url)
    other.always(raw=[end])
    error = failing(get, url)
    assert says.format(f"127.0.0.1:{other.port}") in str(error)
    assert (error.uri, "HTTPS_PROXY" in error.hint) == (url, True)


def test_a_proxy_that_floods_instead_of_a_tunnel_ends(
    other: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", other.url)
    monkeypatch.setattr(s3c, "_HEAD_TIMEOUT", 0.5)
    other.always(raw=[b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000, STALL])
    with Timer() as timer:
        failing(get, "https://far.example/a")
    assert timer.took < 10


# ==== User and password in a URL ==============================================================


def test_userinfo_is_sent_as_basic_and_never_resolved(
    server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolving(monkeypatch, "127.0.0.1")
    server.say(200, b"x", etag='"e"')
    result = get(f"http://us%40er:p%3Ass@far.example:{server.port}/a")
    assert server.seen[0].headers["authorization"] == basic("us@er:p:ss")
    assert server.seen[0].headers["host"] == f"far.example:{server.port}"
    assert asked == ["far.example"]
    assert result.uri == f"http://far.example:{server.port}/a"


def test_a_user_without_a_password_has_an_empty_one(server: Server, get: Get) -> None:
    server.say(200, b"x", etag='"e"')
    get(server.url.replace("//", "//token@") + "/a")
    assert server.seen[0].headers["authorization"] == basic("token:")


def test_userinfo_of_an_endpoint_is_sent_as_basic(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("//", "//user:secret@"))
    get(publish({}))
    assert server.seen[0].headers["authorization"] == basic("user:secret")


def test_logins_do_not_share_what_they_bring(server: Server, get: Get) -> None:
    """Same origin and path, another user: another entry, and no condition with the first's ETag."""
    for user in ("ann", "bob"):
        server.say(200, user.encode(), etag='"e"')
        url = server.url.replace("//", f"//{user}:x@")
        assert get(f"{url}/a").path.read_bytes() == user.encode()
    assert "if-none-match" not in server.seen[1].headers


@pytest.mark.parametrize("script", [{"status": 404}, {"raw": [CLOSE]}, {"raw": [b"junk\r\n\r\n"]}])
@pytest.mark.usefixtures("no_retries")
def test_no_error_holds_a_password_or_a_query(
    script: dict[str, Any], server: Server, get: Get
) -> None:
    server.always(**script)
    url = server.url.replace("//", "//user:sesame@") + "/a?X-Amz-Signature=sesame#sesame"
    error = failing(get, url, s3c.S3CacheError)
    while error is not None:
        assert "sesame" not in repr(error) + str(error) + repr(vars(error))
        error = error.__cause__ or error.__context__


# ==== Deadlines ===============================================================================


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_HEAD_TIMEOUT", "_STALL_TIMEOUT"):
        monkeypatch.setattr(s3c, name, 0.4)


DRIP: list[Any] = [step for _ in range(60) for step in (b"x", 0.05)]
NEVER_DONE: dict[str, list[Any]] = {
    "silence": [STALL],
    "dripping status line": [b"HTTP/1.1 200 O", *DRIP],
    "dripping headers": [OTHER.encode() + b"X: ", *DRIP],
    "flood of 100 Continue": [b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000],
    "dripping 100 Continue": [
        step for _ in range(60) for step in (b"HTTP/1.1 100 Continue\r\n\r\n", 0.05)
    ],
    "dripping chunk size": [head("Transfer-Encoding: chunked") + b"5;", *DRIP],
    "dripping trailers": [head("Transfer-Encoding: chunked") + b"1\r\nx\r\n0\r\n", *DRIP],
    "flood of trailers": [head("Transfer-Encoding: chunked") + b"0\r\n" + b"A: b\r\n" * 300_000],
    "flood of headers": [OTHER.encode() + b"A: b\r\n" * 300_000],
    "one endless header": [OTHER.encode() + b"A: " + b"b" * 3_000_000],
    "an endless chunk extension": [
        head("Transfer-Encoding: chunked") + b"5;" + b"x" * 3_000_000,
    ],
    "a stalled body": [head("Content-Length: 10") + b"12345", STALL],
    "a stalled body without length": [head("Connection: close") + b"12345", STALL],
}


@pytest.mark.parametrize("fault", NEVER_DONE)
@pytest.mark.usefixtures("impatient", "no_retries")
def test_an_answer_that_never_comes_to_an_end_is_left(
    fault: str, server: Server, get: Get, cache: Path
) -> None:
    server.always(raw=NEVER_DONE[fault])
    with Timer() as timer:
        failing(get, f"{server.url}/a")
    assert timer.took < 4
    assert s3c.CacheManager(cache).entries() == []


@pytest.mark.usefixtures("no_retries")
def test_a_body_that_crawls_is_left(
    server: Server, publish: Publish, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_SLOW_WINDOW", 0.3)
    monkeypatch.setattr(s3c, "_SLOW_RATE", 10_000)
    server.rate = 2000
    uri = publish(b"x" * 100_000)
    with Timer() as timer:
        failing(get, uri.replace("s3:/", server.url), max_concurrency=1)
    assert timer.took < 6


def test_a_pause_of_ours_is_not_the_servers_crawl() -> None:
    """Between an answer and its body we may copy gigabytes that a dead process left."""
    near, far = socket.socketpair()
    with near, far:
        connection = s3c._Connection(near, (("http", "host", 80),))
        connection.data = b"x"
        connection.slow_since -= 2 * s3c._SLOW_WINDOW
        assert connection.take(memoryview(bytearray(9))) == 1


@pytest.mark.usefixtures("no_retries")
def test_a_body_that_crawls_in_chunks_is_left(
    server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_SLOW_WINDOW", 0.3)
    chunks: list[Any] = [step for _ in range(100) for step in (b"1\r\nx\r\n", 0.05)]
    server.always(raw=[head("Transfer-Encoding: chunked"), *chunks])
    with Timer() as timer:
        failing(get, f"{server.url}/a")
    assert timer.took < 3


@pytest.mark.usefixtures("quick", "impatient")
def test_a_stalled_body_is_resumed_where_it_stopped(
    server: Server, publish: Publish, get: Get, cut: Any
) -> None:
    data = os.urandom(5000)
    cut(1000, STALL)
    assert get(publish(data)).path.read_bytes() == data
    assert server.seen[1].headers["range"] == "bytes=1000-4999"


def test_some_informational_answers_are_fine(server: Server, get: Get) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    server.say(raw=[early + head("Content-Length: 2") + b"ok"])
    assert get(f"{server.url}/a").path.read_bytes() == b"ok"


# ==== Framing, where http.client has its traps ================================================

FRAMED: dict[str, bytes] = {
    "length": head("Content-Length: 5") + b"12345",
    "the same length twice": head("Content-Length: 5", "Content-Length: 5") + b"12345",
    "chunks": head("Transfer-Encoding: chunked") + chunked(b"12345", 2),
    "chunks in capitals": head("Transfer-Encoding: Chunked")
    + b"00A;x=y\r\n1234512345\r\n0\r\n\r\n",
    "trailers": head("Transfer-Encoding: chunked") + b"5\r\n12345\r\n0\r\nA: b\r\nC: d\r\n\r\n",
    "chunks and a length": head("Transfer-Encoding: chunked", "Content-Length: 2")
    + chunked(b"12345"),
    "no reason phrase": head("Content-Length: 5").replace(b"200 OK", b"200") + b"12345",
    "HTTP/1.0": head("Content-Length: 5").replace(b"HTTP/1.1", b"HTTP/1.0") + b"12345",
    "tabs and spaces": head("Content-Length:\t 5 ") + b"12345",
    "nothing at all": head("Content-Length: 0"),
}


@pytest.mark.parametrize("frame", FRAMED)
@pytest.mark.usefixtures("no_retries")
def test_each_right_framing_brings_its_bytes(frame: str, server: Server, get: Get) -> None:
    server.say(raw=[FRAMED[frame]]).say(200, b"next", etag='"n"')
    body = get(f"{server.url}/a").path.read_bytes()
    assert body in (b"", b"12345", b"1234512345")
    assert (body == b"") == (frame == "nothing at all")
    assert get(f"{server.url}/b").path.read_bytes() == b"next"


@pytest.mark.usefixtures("no_retries")
def test_a_length_beside_chunks_ends_the_connection(server: Server, get: Get) -> None:
    server.say(raw=[FRAMED["chunks and a length"]]).say(200, b"next", etag='"n"')
    get(f"{server.url}/a")
    get(f"{server.url}/b")
    assert server.connections == 2


def test_chunks_under_http_1_0_end_the_connection(server: Server, get: Get) -> None:
    old = head("Connection: keep-alive", "Transfer-Encoding: chunked").replace(b"/1.1", b"/1.0")
    server.say(raw=[old + chunked(b"12345")]).say(200, b"next", etag='"n"')
    assert get(f"{server.url}/a").path.read_bytes() == b"12345"
    get(f"{server.url}/b")
    assert server.connections == 2


REFUSED: dict[str, bytes] = {
    "two lengths": head("Content-Length: 5", "Content-Length: 3") + b"12345",
    "two lengths in one": head("Content-Length: 5, 3") + b"12345",
    "negative length": head("Content-Length: -5") + b"12345",
    "signed length": head("Content-Length: +5") + b"12345",
    "hexadecimal length": head("Content-Length: 0x5") + b"12345",
    "empty length": head("Content-Length: ") + b"12345",
    "length in Arabic digits": head("Content-Length: \xb25") + b"12345",
    "gzip within chunks": head("Transfer-Encoding: gzip, chunked") + chunked(b"12345"),
    "chunked twice": head("Transfer-Encoding: chunked, chunked") + chunked(b"12345"),
    "unknown coding": head("Transfer-Encoding: identity") + b"12345",
    "empty coding": head("Transfer-Encoding:") + b"12345",
    "negative chunk": head("Transfer-Encoding: chunked") + b"-5\r\n12345\r\n0\r\n\r\n",
    "chunk in underscores": head("Transfer-Encoding: chunked") + b"0_5\r\n12345\r\n0\r\n\r\n",
    "chunk with 0x": head("Transfer-Encoding: chunked") + b"0x5\r\n12345\r\n0\r\n\r\n",
    "empty chunk size": head("Transfer-Encoding: chunked") + b"\r\n12345\r\n0\r\n\r\n",
    "huge chunk": head("Transfer-Encoding: chunked") + b"f" * 30 + b"\r\n12345",
    "chunk without its end": head("Transfer-Encoding: chunked") + b"5\r\n12345xx0\r\n\r\n",
    "folded header": head("X: a", " b", "Content-Length: 5") + b"12345",
    "space before the colon": head("Content-Length : 5") + b"12345",
    "header without colon": head("nonsense", "Content-Length: 5") + b"12345",
    "header without name": head(": x", "Content-Length: 5") + b"12345",
    "lone CR in a value": head("X: a\rEvil: b", "Content-Length: 5") + b"12345",
    "lone LF in a value": head("X: a\nEvil: b", "Content-Length: 5") + b"12345",
    "NUL in a value": head("X: a\0b", "Content-Length: 5") + b"12345",
    "not HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "HTTP/0.9": b"<html>hello</html>\r\n\r\n",
    "HTTP/2": head("Content-Length: 5").replace(b"HTTP/1.1", b"HTTP/2") + b"12345",
    "no status": head("Content-Length: 5").replace(b"200", b"abc") + b"12345",
    "four digits": head("Content-Length: 5").replace(b"200", b"2000") + b"12345",
}


@pytest.mark.parametrize("frame", REFUSED)
@pytest.mark.usefixtures("no_retries")
def test_each_odd_framing_is_refused(frame: str, server: Server, get: Get, cache: Path) -> None:
    server.always(raw=[REFUSED[frame], CLOSE])
    error = failing(get, f"{server.url}/a")
    assert "Malformed answer" in str(error)
    assert s3c.CacheManager(cache).entries() == []


@pytest.mark.parametrize("length", [1, 4])
def test_a_head_whose_lines_end_in_lf_alone_is_refused_at_once(
    length: int, server: Server, get: Get
) -> None:
    """Also where its end comes in two pieces; to wait for a CRLF would take 30 s each time."""
    lines = head("Content-Length: 2").replace(b"\r\n", b"\n")
    server.always(raw=[lines[:-length], 0.05, lines[-length:] + b"{}", STALL])
    with Timer() as timer:
        error = failing(get, f"{server.url}/a")
    assert "Malformed answer" in str(error)
    assert (error.attempts, len(server.seen)) == (1, 1)
    assert timer.took < 4


CUT: dict[str, bytes] = {
    "in the status line": b"HTTP/1.1 20",
    "in the headers": OTHER.encode(),
    "before the body": head("Content-Length: 100"),
    "in the body": head("Content-Length: 100") + b"x" * 50,
    "in a chunk": head("Transfer-Encoding: chunked") + b"a\r\n12345",
    "in a chunk size": head("Transfer-Encoding: chunked") + b"5\r\n12345\r\n1",
    "before the last chunk": head("Transfer-Encoding: chunked") + b"5\r\n12345\r\n",
    "in the trailers": head("Transfer-Encoding: chunked") + b"5\r\n12345\r\n0\r\n",
}


@pytest.mark.parametrize("end", [CLOSE, RESET], ids=["fin", "reset"])
@pytest.mark.parametrize("place", CUT)
@pytest.mark.usefixtures("quick")
def test_an_answer_cut_off_is_retried_and_never_published(
    place: str, end: Any, server: Server, get: Get, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 2)
    server.always(raw=[CUT[place], 0.01, end])
    failing(get, f"{server.url}/a")
    assert s3c.CacheManager(cache).entries() == []
    server.always(None).say(200, b"whole", etag='"e"')
    assert get(f"{server.url}/a").path.read_bytes() == b"whole"


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.usefixtures("quick")
def test_a_body_that_ends_with_the_connection_is_for_http_only(
    scheme: str, server: Server, publish: Publish, get: Get, cache: Path
) -> None:
    uri = publish({})
    server.always(raw=[head() + b"to the end", CLOSE])
    if scheme == "http":
        assert get(uri.replace("s3:/", server.url)).path.read_bytes() == b"to the end"
    else:
        assert "Not an S3 answer" in str(failing(get, uri))
        assert s3c.CacheManager(cache).entries() == []
