"""A scripted S3 server on loopback, standard library only: for the tests and for `demo.py`.

    with Server() as server:
        server.put("bucket", "key.json", b"{}")
        server.say(503).say(200, b"x", etag='"a"')   # the next two answers, then real S3 again
        ...                                          # requests to server.url + "/bucket/key.json"
        server.seen[0].headers["range"], server.connections, server.bytes_sent

Who answers a request, first match wins: `on_path`, `say`, `always`, `before`, `redirect`, real S3.

Sections, leaf first: values · protocol (pure) · listing (pure) · ends of a connection · server.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import itertools
import re
import select
import socket
import ssl
import struct
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from types import TracebackType
from typing import Any, Callable, NamedTuple, Union
from urllib.parse import parse_qsl, quote_plus, unquote

# ==== Values ==================================================================================

MD5 = "md5"  # `put(etag=MD5)`, the default: the ETag is the quoted MD5 of the data, as S3 does
SLICE = 256 * 1024  # sent at once, so that `bytes_sent` follows what a client really took
MAX_HEAD = 256 * 1024  # of a request; more is a broken test
EPOCH = 1_700_000_000  # first Last-Modified; each `put` is a second later, HTTP dates count seconds

REASONS = {status.value: status.phrase for status in HTTPStatus}
NO_BODY = frozenset({204, 304})

# One thing a raw answer does: send bytes, wait seconds, or be called with the socket.
Step = Union[bytes, float, Callable[[socket.socket], Any]]


class Request(NamedTuple):
    """What was asked: `target` as sent, `path` and `query` decoded, header names in lower case."""

    method: str
    target: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    connection: int
    time: float
    scheme: str
    number: int  # of `server.seen`, from 1


class Answer(NamedTuple):
    """What the server says; a header whose value is None is left out. `raw` replaces all else."""

    status: int
    body: bytes | memoryview = b""
    headers: dict[str, Any] = {}  # noqa: RUF012 - never changed: `render` copies
    raw: tuple[Step, ...] | None = None


@dataclass
class PathRule:
    """A script for the targets that contain `substring`."""

    substring: str
    left: float
    answer: Answer


class Stored(NamedTuple):
    """One version of an object; `headers` are complete but for Content-Length and Content-Range."""

    data: bytes
    etag: str
    modified: int
    headers: dict[str, Any]
    private: bool


# ==== Protocol: text in, text out =============================================================


def split_target(target: str) -> tuple[str, dict[str, str]]:
    """Decode a request target, origin form or absolute (a proxy is asked in that form)."""
    if not target.startswith("/"):
        target = "/" + target.partition("://")[2].partition("/")[2]
    path, _, query = target.partition("?")
    values = dict(parse_qsl(query, keep_blank_values=True)) if query else {}
    return unquote(path, errors="strict"), values


def parse_head(head: bytes) -> tuple[str, str, str, dict[str, str]]:
    """Method, target, HTTP version and headers of a request."""
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return method, target, version, headers


_VIRTUAL_HOST = re.compile(r"(.+)\.s3[.-][a-z0-9.-]*amazonaws\.")


def split_path(path: str, host: str) -> tuple[str, str]:
    """Bucket and key: from the host if it is one of AWS's virtual hosts, else path style."""
    hosted = _VIRTUAL_HOST.match(host)
    if hosted:
        return hosted[1], path[1:]
    bucket, _, key = path[1:].partition("/")
    return bucket, key


_RANGE = re.compile(r"bytes=(\d*)-(\d*)$")


def pick_range(value: str | None, size: int) -> tuple[int, int] | None:
    """Start and stop; None for the whole object; start >= stop cannot be satisfied (416)."""
    match = _RANGE.match(value or "")
    if match is None or match[0] == "bytes=-":
        return None  # RFC 9110 14.2: a Range that is not understood is ignored
    first, last = match[1], match[2]
    if not first:
        return max(0, size - int(last)), size
    if last and int(last) < int(first):
        return None
    return int(first), min(size, int(last) + 1) if last else size


def lists_etag(header: str, etag: str, *, weak: bool) -> bool:
    """Whether If-Match (strong comparison) or If-None-Match (weak) names this ETag."""
    wanted = [item.strip() for item in header.split(",")]
    if "*" in wanted:
        return True
    if weak:
        return bool(etag) and etag.replace("W/", "", 1) in (w.replace("W/", "", 1) for w in wanted)
    return bool(etag) and not etag.startswith("W/") and etag in wanted


def is_newer(stored: Stored, date: str) -> bool | None:
    """Whether the object changed after an HTTP date; None when the date is unreadable."""
    try:
        return stored.modified > parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return None


def must_match(headers: dict[str, str], stored: Stored) -> bool:
    """If-Match, else If-Unmodified-Since: whether the request may go on."""
    if "if-match" in headers:
        return lists_etag(headers["if-match"], stored.etag, weak=False)
    return is_newer(stored, headers.get("if-unmodified-since", "")) is not True


def is_unchanged(headers: dict[str, str], stored: Stored) -> bool:
    """If-None-Match, else If-Modified-Since: whether the answer is 304."""
    if "if-none-match" in headers:
        return lists_etag(headers["if-none-match"], stored.etag, weak=True)
    return is_newer(stored, headers.get("if-modified-since", "")) is False


MESSAGES = {
    "AccessDenied": "Access Denied",
    "InvalidRange": "The requested range is not satisfiable",
    "MethodNotAllowed": "The specified method is not allowed against this resource.",
    "NoSuchBucket": "The specified bucket does not exist",
    "NoSuchKey": "The specified key does not exist.",
    "NoSuchVersion": "The specified version does not exist.",
    "PreconditionFailed": "At least one of the pre-conditions you specified did not hold",
    "SlowDown": "Please reduce your request rate.",
}


def s3_error(code: str, status: int, **elements: object) -> tuple[int, bytes]:
    """Status and XML body of an S3 error; `elements` are added, `Region="us-west-2"` for one."""
    fields = {"Code": code, "Message": MESSAGES.get(code, code), **elements}
    inner = "".join(f"<{name}>{xml_text(str(value))}</{name}>" for name, value in fields.items())
    return status, f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{inner}</Error>'.encode()


def chunked(body: bytes | memoryview, size: int = 8192) -> bytes:
    """A body in HTTP/1.1 chunks, the last one included."""
    pieces = (bytes(body[start : start + size]) for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def render(answer: Answer, method: str) -> tuple[bytes, bytes | memoryview]:
    """Head and body as they go out; framed by Content-Length unless the headers say otherwise."""
    status, body = answer.status, answer.body
    names = {name.lower() for name in answer.headers}
    headers = dict(answer.headers)
    if "transfer-encoding" in names:
        body = chunked(body)
    elif "content-length" not in names and status not in NO_BODY:
        headers["Content-Length"] = len(body)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
    head = f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\n{lines}\r\n".encode("latin-1")
    return head, b"" if method == "HEAD" or status in NO_BODY else body


def wants_close(version: str, headers: dict[str, str], answer: Answer) -> bool:
    """Whether the connection ends after this answer."""
    asked = headers.get("connection", "").lower()
    told = next((v for n, v in answer.headers.items() if n.lower() == "connection"), None) or ""
    return "close" in (asked, told.lower()) or (version == "HTTP/1.0" and asked != "keep-alive")


def merge_headers(base: dict[str, Any], extra: dict[str, Any] | None) -> dict[str, Any]:
    """`base` with `extra` over it, names compared without case."""
    over = {name.lower() for name in extra or {}}
    return {**{n: v for n, v in base.items() if n.lower() not in over}, **(extra or {})}


# ==== Listing: ListObjectsV2 without the server ===============================================

_CONTROLS = re.compile(r"[\x00-\x1f]")
_TOKEN_MARK = "1+/="  # of our continuation tokens: a client that does not quote them loses the "+"


def xml_text(text: str) -> str:
    """Escape as S3 does: a control character becomes `&#1;`, which is not valid XML 1.0."""
    return _CONTROLS.sub(lambda match: f"&#{ord(match[0])};", html.escape(text))


def list_names(keys: list[str], prefix: str, delimiter: str) -> list[str]:
    """Keys below the prefix in order, those with a further delimiter rolled up to one name."""
    names = set()
    for key in keys:
        if key.startswith(prefix):
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            names.add(key if cut < 0 else key[: cut + len(delimiter)])
    return sorted(names)


def make_token(name: str) -> str:
    return _TOKEN_MARK + base64.b64encode(name.encode()).decode()


def read_token(token: str) -> str:
    """The name a page ended with; ValueError if the token is not one of ours."""
    if not token.startswith(_TOKEN_MARK):
        raise ValueError(token)
    return base64.b64decode(token[len(_TOKEN_MARK) :], validate=True).decode()


def list_entry(name: str, stored: Stored | None, encode: Callable[[str], str]) -> str:
    """One <Contents>, or one <CommonPrefixes> when the name is no object."""
    if stored is None:
        return f"<CommonPrefixes><Prefix>{encode(name)}</Prefix></CommonPrefixes>"
    date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stored.modified))
    etag = f"<ETag>{xml_text(stored.etag)}</ETag>" if stored.etag else ""
    return (
        f"<Contents><Key>{encode(name)}</Key><LastModified>{date}</LastModified>{etag}"
        f"<Size>{len(stored.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def list_page(
    bucket: str, objects: dict[str, Stored], query: dict[str, str], page_size: int
) -> bytes:
    """The XML of one page; ValueError for a bad continuation token or max-keys."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after, token = query.get("start-after", ""), query.get("continuation-token")
    limit = min(page_size, int(query.get("max-keys") or page_size))
    names = list_names([key for key in objects if key > after], prefix, delimiter)
    if token is not None:
        last = read_token(token)
        names = [name for name in names if name > last]
    page, truncated = names[:limit], bool(limit) and len(names) > limit

    in_url = query.get("encoding-type") == "url"
    encode = (lambda text: quote_plus(text, safe="/*")) if in_url else xml_text
    fields = {"Name": bucket, "Prefix": encode(prefix), "KeyCount": len(page), "MaxKeys": limit}
    if delimiter:
        fields["Delimiter"] = encode(delimiter)
    if after:
        fields["StartAfter"] = encode(after)
    if in_url:
        fields["EncodingType"] = "url"
    if token is not None:
        fields["ContinuationToken"] = xml_text(token)
    if truncated:
        fields["NextContinuationToken"] = xml_text(make_token(page[-1]))
    fields["IsTruncated"] = str(truncated).lower()
    head = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    rolled_up = {name for name in page if delimiter and delimiter in name[len(prefix) :]}
    body = "".join(
        list_entry(name, None if name in rolled_up else objects[name], encode) for name in page
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{head}{body}'
        "</ListBucketResult>"
    ).encode()


# ==== Ends of a connection: steps of a raw answer; each leaves the socket closed ==============


def RESET(sock: socket.socket) -> None:
    """Close with a TCP reset."""
    off_after = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, off_after)
    sock.close()


def CLOSE(sock: socket.socket) -> None:
    """Close with a FIN; over TLS without close_notify, so as a cut line would."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        sock.settimeout(0)
        # Unread input would turn the FIN into a reset. Not recv(): TLS would answer an alert.
        while sock.fileno() >= 0 and not isinstance(sock, ssl.SSLSocket) and sock.recv(65536):
            pass
    sock.close()


def BYE(sock: socket.socket) -> None:
    """Close in order: over TLS with close_notify, then a FIN."""
    if isinstance(sock, ssl.SSLSocket):
        with contextlib.suppress(OSError, ValueError):
            sock.settimeout(0)  # say close_notify, do not wait for the client's
            sock.unwrap()
    CLOSE(sock)


def STALL(sock: socket.socket) -> None:
    """Say nothing more until the client leaves or the server closes."""
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass
    sock.close()


# ==== Server ==================================================================================


class _Stop(Exception):
    """The server is closing: leave the thread."""


class Server:
    """Objects in memory behind real S3 answers, one thread per connection. Starts when made."""

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        # Knobs, to be set at any time.
        self.latency = 0.0  # seconds before each answer
        self.accept_delay = 0.0  # seconds before a new connection is served (and its TLS begins)
        self.rate: float | None = None  # body bytes per second and connection
        self.page_size = 1000
        self.region: str | None = "us-west-2"  # x-amz-bucket-region; None leaves it out
        self.require_auth = False
        self.hide_missing = False  # a missing key is 403, as for callers without s3:ListBucket
        self.ignore_range = False
        self.ignore_if_match = False
        self.ignore_if_none_match = False  # nor If-Modified-Since: never a 304
        self.bare_416 = False
        self.proxy = False  # tunnel CONNECT, to its port on the loopback interface
        self.tunnel_port: int | None = None  # or always to this port
        self.before: Callable[[Request], tuple[Any, ...] | None] | None = None

        # Records, cleared by `reset`.
        self.seen: list[Request] = []
        self.connections = 0
        self.bytes_sent = 0
        self.errors: list[BaseException] = []  # raised by hooks; `with` raises the first again

        self.buckets: set[str] = set()
        self._objects: dict[str, dict[str, Stored]] = {}
        self._versions: dict[tuple[str, str, str], Stored] = {}
        self._puts = itertools.count()
        self._ids = itertools.count(1)
        self._date = (0, "")

        self._said: deque[Answer] = deque()
        self._always: Answer | None = None
        self._on_path: list[PathRule] = []
        self._redirects: dict[str, Answer] = {}

        self._tls = tls
        self._host = host
        self._scheme = "https" if tls else "http"
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sockets: dict[int, socket.socket] = {}
        self._threads: dict[int, threading.Thread] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="server", daemon=True)
        self._acceptor.start()

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self._scheme}://{host}:{self.port}"

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if self.errors and error is None:
            raise self.errors[0]

    def close(self) -> None:
        """Cut every connection and wait for every thread; may be called again."""
        with self._lock:
            first = not self._closing.is_set()
            self._closing.set()
            sockets = list(self._sockets.values())
        if first:
            with contextlib.suppress(OSError):  # wakes accept(), which no shutdown does everywhere
                socket.create_connection((self._host, self.port), timeout=1).close()
        self._acceptor.join(5)
        self._listener.close()
        for sock in sockets:
            with contextlib.suppress(OSError):
                # The plain method: SSLSocket.shutdown would turn the rest into clear text.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in list(self._threads.values()):
            thread.join(5)

    def reset(self) -> None:
        """Forget what was seen and counted; objects and scripts stay."""
        with self._lock:
            self.seen, self.errors = [], []
            self.connections = self.bytes_sent = 0

    # -- objects --

    def put(
        self,
        bucket: str,
        key: str,
        data: bytes,
        *,
        etag: str | None = MD5,
        headers: dict[str, Any] | None = None,
        private: bool = False,
        version: str | None = None,
    ) -> str:
        """Publish an object; a header given as None is left out, `Last-Modified` for one."""
        key.encode()  # a lone surrogate is no S3 key
        if etag == MD5:
            etag = f'"{hashlib.new("md5", data, usedforsecurity=False).hexdigest()}"'
        modified = EPOCH + next(self._puts)
        own = {
            "Last-Modified": formatdate(modified, usegmt=True),
            "ETag": etag,
            "x-amz-version-id": version,
            "Accept-Ranges": "bytes",
            "Content-Type": "binary/octet-stream",
        }
        own = {name: value for name, value in own.items() if value is not None}
        stored = Stored(data, etag or "", modified, merge_headers(own, headers), private)
        with self._lock:
            self.buckets.add(bucket)
            self._objects.setdefault(bucket, {})[key] = stored
            if version is not None:
                self._versions[bucket, key, version] = stored
        return stored.etag

    def delete(self, bucket: str, key: str) -> None:
        """Remove the current object; its versions stay, as under a delete marker."""
        with self._lock:
            self._objects.get(bucket, {}).pop(key, None)

    # -- scripts --

    @staticmethod
    def _script(
        status: int = 200,
        body: bytes = b"",
        *,
        headers: dict[str, Any] | None = None,
        etag: str | None = None,
        code: str | None = None,
        raw: list[Step] | None = None,
    ) -> Answer:
        own: dict[str, Any] = {}
        if code is not None:
            own = {"Content-Type": "application/xml", "x-amz-request-id": "SCRIPTED"}
            body = body or s3_error(code, status)[1]
        if etag is not None:
            own["ETag"] = etag
        return Answer(status, body, merge_headers(own, headers), tuple(raw) if raw else None)

    def say(self, *args: Any, **kwargs: Any) -> Server:
        """Script the next answer: status, body, *, headers, etag, code (S3 error XML), raw."""
        self._said.append(self._script(*args, **kwargs))
        return self

    def always(self, status: int | None = 200, *args: Any, **kwargs: Any) -> Server:
        """Script every answer, until `always(None)`."""
        self._always = None if status is None else self._script(status, *args, **kwargs)
        return self

    def on_path(
        self,
        substring: str,
        status: int | None = 200,
        *args: Any,
        times: int | None = None,
        **kwargs: Any,
    ) -> Server:
        """Script answers for targets that contain `substring`, `times` of them; None removes."""
        if status is None:
            self._on_path = [rule for rule in self._on_path if rule.substring != substring]
        else:
            left = float("inf") if times is None else times
            answer = self._script(status, *args, **kwargs)
            self._on_path.append(PathRule(substring, left, answer))
        return self

    def redirect(self, path_from: str, location: str, status: int = 302) -> Server:
        """Answer requests for a path (exact, as sent or decoded) with a redirect."""
        self._redirects[path_from] = self._script(status, headers={"Location": location})
        return self

    # -- who answers --

    def _decide(self, request: Request) -> Answer:
        with self._lock:
            for rule in self._on_path:
                if rule.left > 0 and rule.substring in request.target:
                    rule.left -= 1
                    return rule.answer
            if self._said:
                return self._said.popleft()
        if self._always is not None:
            return self._always
        if self.before is not None:
            instead = self.before(request)
            if instead is not None:
                return Answer(*instead)
        raw_path = request.target.partition("?")[0]
        for path in (raw_path, request.path):
            if path in self._redirects:
                return self._redirects[path]
        return self._answer(request)

    def _answer(self, request: Request) -> Answer:
        """Real S3."""
        bucket, key = split_path(request.path, request.headers.get("host", ""))
        signed = "authorization" in request.headers or "X-Amz-Signature" in request.query
        if request.method not in ("GET", "HEAD"):
            return self._error("MethodNotAllowed", 405)
        if not bucket or (self.require_auth and not signed):
            return self._error("AccessDenied", 403)
        if bucket not in self.buckets:
            return self._error("NoSuchBucket", 404, BucketName=bucket)
        if not key:
            return self._answer_bucket(request, bucket)
        stored = self._find(bucket, key, request.query.get("versionId"))
        if isinstance(stored, Answer):
            return stored if signed or not self.hide_missing else self._error("AccessDenied", 403)
        if stored.private and not signed:
            return self._error("AccessDenied", 403)
        return self._answer_object(request, stored)

    def _find(self, bucket: str, key: str, version: str | None) -> Stored | Answer:
        with self._lock:
            if version is None:
                stored = self._objects.get(bucket, {}).get(key)
            else:
                stored = self._versions.get((bucket, key, version))
        if stored is not None:
            return stored
        if version is not None:
            return self._error("NoSuchVersion", 404, Key=key, VersionId=version)
        return self._error("NoSuchKey", 404, Key=key)

    def _answer_bucket(self, request: Request, bucket: str) -> Answer:
        headers = self._s3_headers({"Content-Type": "application/xml"})
        if request.method == "HEAD":
            return Answer(200, b"", headers)
        if request.query.get("list-type") != "2":
            return self._error("NotImplemented", 501)
        with self._lock:
            objects = dict(self._objects.get(bucket, {}))
        try:
            return Answer(200, list_page(bucket, objects, request.query, self.page_size), headers)
        except ValueError:
            return self._error("InvalidArgument", 400)

    def _answer_object(self, request: Request, stored: Stored) -> Answer:
        asked, data = request.headers, stored.data
        size = len(data)
        headers = self._s3_headers(stored.headers)
        if not self.ignore_if_match and not must_match(asked, stored):
            return self._error("PreconditionFailed", 412)
        if not self.ignore_if_none_match and is_unchanged(asked, stored):
            drop = ("content-type", "accept-ranges", "content-length")
            return Answer(304, b"", {n: v for n, v in headers.items() if n.lower() not in drop})
        picked = None if self.ignore_range else pick_range(asked.get("range"), size)
        start, stop = picked or (0, size)
        if asked.get("x-amz-checksum-mode") != "ENABLED" or stop - start < size:
            # S3 sends a checksum when asked, and with a range only if it covers what was summed.
            sums = [name for name in headers if name.lower().startswith("x-amz-checksum-")]
            headers = merge_headers(headers, dict.fromkeys(sums)) if sums else headers
        if picked is None:
            return Answer(200, data, headers)
        if start >= stop:
            told = {} if self.bare_416 else {"Content-Range": f"bytes */{size}"}
            return self._error("InvalidRange", 416, told, ActualObjectSize=size)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(206, memoryview(data)[start:stop], headers)

    def _error(
        self, code: str, status: int, headers: dict[str, str] | None = None, **elements: object
    ) -> Answer:
        status, body = s3_error(code, status, **elements)
        own = {"Content-Type": "application/xml", **(headers or {})}
        return Answer(status, body, self._s3_headers(own))

    def _s3_headers(self, more: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        headers = {
            "x-amz-id-2": f"{number:040X}",
            "x-amz-request-id": f"{number:016X}",
            "Date": self._now(),
        }
        if self.region is not None:
            headers["x-amz-bucket-region"] = self.region
        headers.update(more)
        headers["Server"] = "AmazonS3"
        return headers

    def _now(self) -> str:
        second = int(time.time())
        if self._date[0] != second:
            self._date = (second, formatdate(second, usegmt=True))
        return self._date[1]

    # -- threads and sockets --

    def _accept(self) -> None:
        for number in itertools.count(1):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._closing.is_set():
                sock.close()
                return
            thread = threading.Thread(target=self._run, args=(sock, number), daemon=True)
            with self._lock:
                self.connections += 1
                self._sockets[number] = sock
                self._threads[number] = thread
            thread.start()

    def _run(self, sock: socket.socket, number: int) -> None:
        """Serve one connection to its end; whatever happens, the socket is closed."""
        try:
            self._wait(self.accept_delay)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._start_tls(sock, number)
            self._serve(sock, number)
        except (OSError, ValueError, _Stop):
            pass  # the client left, spoke no HTTP, or we close
        except BaseException as error:
            self.errors.append(error)
            traceback.print_exception(type(error), error, error.__traceback__)
        finally:
            sock.close()
            with self._lock:
                self._sockets.pop(number, None)
                self._threads.pop(number, None)

    def _start_tls(self, sock: socket.socket, number: int) -> socket.socket:
        assert self._tls is not None
        wrapped = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        try:
            with self._lock:  # the plain socket is detached: from here `close` must cut this one
                self._sockets[number] = wrapped
            self._wait(0)
            wrapped.do_handshake()
        except BaseException:
            wrapped.close()
            raise
        return wrapped

    def _wait(self, seconds: float) -> None:
        if self._closing.is_set() or (seconds and self._closing.wait(seconds)):
            raise _Stop

    def _serve(self, sock: socket.socket, number: int) -> None:
        buffer = bytearray()
        while not self._closing.is_set():
            head = self._read_head(sock, buffer)
            if head is None:
                return
            method, target, version, headers = parse_head(head)
            self._skip_body(sock, buffer, int(headers.get("content-length", 0)))
            try:
                path, query = split_target(target)
            except UnicodeDecodeError:
                self._send(sock, method, self._error("InvalidURI", 400))
                continue
            told = method, target, path, query, headers, number, time.monotonic(), self._scheme
            with self._lock:
                request = Request(*told, len(self.seen) + 1)
                self.seen.append(request)
            self._wait(self.latency)
            answer = self._decide(request)
            if method == "CONNECT" and self.proxy and answer.status == 405:
                return self._tunnel(sock, target)
            last = wants_close(version, headers, answer)
            if last:
                answer = answer._replace(headers={**answer.headers, "Connection": "close"})
            self._send(sock, method, answer)
            if sock.fileno() < 0:
                return
            if last:
                return BYE(sock)

    def _read_head(self, sock: socket.socket, buffer: bytearray) -> bytes | None:
        """The next request's head without its blank line; None when the client has left."""
        end = buffer.find(b"\r\n\r\n")
        while end < 0:
            data = sock.recv(65536)
            if not data or len(buffer) > MAX_HEAD:
                return None
            buffer += data
            end = buffer.find(b"\r\n\r\n")
        head = bytes(buffer[:end])
        del buffer[: end + 4]
        return head

    def _skip_body(self, sock: socket.socket, buffer: bytearray, size: int) -> None:
        while len(buffer) < size:
            data = sock.recv(65536)
            if not data:
                raise _Stop
            buffer += data
        del buffer[:size]

    def _send(self, sock: socket.socket, method: str, answer: Answer) -> None:
        if answer.raw is not None:
            return self._play(sock, answer.raw)
        head, body = render(answer, method)
        if self.rate is None and len(body) <= SLICE:
            self._count(len(body))  # before sending: a client that has it all finds it counted
            sock.sendall(head + body if body else head)
            return
        sock.sendall(head)
        rate = self.rate
        step = SLICE if rate is None else max(1, min(SLICE, int(rate / 50)))
        began = time.monotonic()
        for start in range(0, len(body), step):
            piece = memoryview(body)[start : start + step]
            if rate is not None:
                self._wait(max(0.0, began + (start + len(piece)) / rate - time.monotonic()))
            self._count(len(piece))
            sock.sendall(piece)

    def _count(self, size: int) -> None:
        if size:
            with self._lock:
                self.bytes_sent += size

    def _play(self, sock: socket.socket, steps: tuple[Step, ...]) -> None:
        for step in steps:
            if callable(step):
                step(sock)
            elif isinstance(step, (int, float)):
                self._wait(step)
            else:
                sock.sendall(step)

    def _tunnel(self, sock: socket.socket, target: str) -> None:
        """Carry bytes both ways until either side ends."""
        port = self.tunnel_port or int(target.rpartition(":")[2])
        try:
            upstream = socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            return self._send(sock, "CONNECT", Answer(502))
        with upstream:
            upstream.settimeout(None)
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            other = {sock: upstream, upstream: sock}
            while True:
                for ready in select.select(list(other), [], [])[0]:
                    data = ready.recv(65536)
                    if not data:
                        return
                    other[ready].sendall(data)
