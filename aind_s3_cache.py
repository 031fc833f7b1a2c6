#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# ///
"""Find an object on S3, behind a URL or on disk, and keep it in a local cache that is never wrong.

>>> from aind_s3_cache import get_json, get_local_path_for_resource
>>> result = get_local_path_for_resource("s3://aind-open-data/dataset/metadata.json")
>>> result.path, result.from_cache
>>> metadata = get_json("s3://aind-open-data/dataset/metadata.json")

One file, standard library only: install it, copy it under any name, or run it. Public data needs
no credentials; ``boto3`` is used for signed requests only, and only if it is there.

Map, leaf first: a section may use only what stands above it
------------------------------------------------------------
 1 Defaults      every number, each with its reason
 2 Errors        one family
 3 URIs          text in, text out
 4 Wire          the protocol as pure functions
 5 Transport     kept connections, proxies, TLS, redirects, deadlines
 6 Sources       HTTP, unsigned S3, signed S3 behind one ``read``
 7 Store         the cache directory
 8 JSON          loaders on top of 6, and offline of 7
 9 Cache         joins 6 and 7: one, many, a tree; CacheManager
10 Command line  a thin skin over the public API

Guaranteed: one conditional GET answers hit and miss alike; an entry is named by the ETag of the
answer that brought its bytes; a returned path never changes its content; any number of threads,
processes and hosts may share a directory, and no lock carries correctness; what is killed or cut
off is never served. Not offered: writing to S3, listing beyond one tree, mounting, async.

Environment, read at call time: ``AIND_S3_CACHE_DIR``, ``AIND_S3_CACHE_OFFLINE``,
``XDG_CACHE_HOME``, ``LOCALAPPDATA``; ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``,
``AWS_IGNORE_CONFIGURED_ENDPOINT_URLS``, ``AWS_REGION``, ``AWS_DEFAULT_REGION``;
``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``; ``AWS_CA_BUNDLE``,
``REQUESTS_CA_BUNDLE``, ``CURL_CA_BUNDLE``, ``SSL_CERT_FILE``, ``SSL_CERT_DIR``; boto3's own for
signed requests.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import os
import stat
import sys
import threading
import time
from bisect import bisect_left
from functools import lru_cache, partial

__version__ = "1.0.0"

__all__ = [  # noqa: RUF022  in the order of the documentation
    # Localize
    "get_local_path_for_resource",
    "get_local_paths_for_resources",
    "LocalizedResource",
    "CacheManager",
    "CacheEntry",
    # JSON
    "get_json",
    "get_json_s3",
    "get_json_s3_uri",
    "get_json_url",
    # URIs
    "parse_s3_uri",
    "is_url",
    "is_file_path",
    "as_pathlike",
    "as_string",
    "join_any",
    # Errors
    "S3CacheError",
    "NotFoundError",
    "AccessDeniedError",
    "TransferError",
    "IntegrityError",
    "OfflineError",
    "CacheError",
    "InvalidJSONError",
    "MissingDependencyError",
    # Program
    "main",
]

# Heavy modules (socket, ssl, json, hashlib, pathlib, urllib.*) are imported in the functions that
# need them: a fresh process that reads one small file pays for little else than the interpreter.


# Threads that import the same modules first at the same time can meet one that is half made.
_IMPORTS = threading.RLock()  # re-entrant: a finalizer may come in the midst of it


@lru_cache(maxsize=1)
def _import_early() -> None:
    """Import what nearly every request needs."""
    with _IMPORTS:
        import encodings.idna  # noqa: F401  socket and ssl want it for every name
        import hashlib  # noqa: F401
        import select  # noqa: F401  up to 3.14 it comes with socket
        import socket  # noqa: F401
        import urllib.parse  # noqa: F401
        import zlib  # noqa: F401


@lru_cache(maxsize=1)
def _path_class() -> type[Path]:
    with _IMPORTS:
        from pathlib import Path

    return Path


TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Executor
    from pathlib import Path, PurePath
    from socket import socket as Socket
    from typing import Any, BinaryIO, NoReturn, Protocol, TypeVar, Union

    T = TypeVar("T")
    E = TypeVar("E", bound="S3CacheError")
    StrPath = Union[str, os.PathLike[str]]
    Progress = Union[bool, None, Callable[[int], object]]
    Origin = tuple[str, str, int]
    Fields = dict[str, str]  # of a request: range and conditions, by name
    Reply = tuple[int, dict[str, str], "_Body"]  # status, headers and body
    Page = tuple[list["_Key"], Union[str, None]]  # of a listing, and the token of the next
    WriteChunks = Callable[[memoryview, int, bytes], None]  # at an offset, with their CRC32s

    class Reader(Protocol):
        """What a transfer reads from."""

        def readinto(self, view: memoryview, /) -> int: ...
        def close(self) -> None: ...


# ==== 1 Defaults ==================================================================================
# The numbers that decide something, each with its reason; read at call time: tests shrink them.

_MiB = 1 << 20
_CHUNK = 256 << 10  # checked, logged and found again
_BLOCK = _CHUNK  # read, hashed and written at a time: small enough to stay in a core's own cache
_BLOCK_TLS = _MiB  # the same; TLS gives 16 KiB at a time, so that rounds cost more than the cache
_LOG_EVERY = 0.2  # seconds after which also less than that is written
_WHOLE = _MiB  # comes into memory, and is written at once when it is checked
_SPAN = 8 * _MiB  # the most that one range asks for: a round trip is little beside it
_SPAN_FAR = _MiB  # the least of a server that is far; of a near one it is a chunk
_SMALL = 8 * _MiB  # comes in one answer; above, in ranges and with a log to resume from

_CONNECT_TIMEOUT = 10.0  # seconds for one address; a live host answers a SYN in well under one
_CONNECT_TOTAL = 30.0  # seconds for all the addresses of a name, proxy and TLS handshake included
_HEAD_TIMEOUT = 30.0  # seconds for a whole answer head, however it drips
_STALL_TIMEOUT = 30.0  # seconds without one byte of a body, as in cargo and curl's examples
_SLOW_WINDOW = 30.0  # seconds over which a body must bring _SLOW_RATE bytes each second
_SLOW_RATE = 1024  # bytes per second; a modem does better
_HEAD_LIMIT = 64 << 10  # bytes of an answer head; S3 sends about 600
_ERROR_LIMIT = 64 << 10  # bytes read of an error body; S3 sends about 300
_LIST_LIMIT = 8 * _MiB  # bytes of one listing page: 1,000 keys of 1,024 escaped bytes fit
_EMPTY_PAGES = 10_000  # of a listing in a row; S3 may look at 1,000 deleted keys for each
_JSON_LIMIT = 256 * _MiB  # bytes of a JSON document, as sent and as decoded
_CODINGS = 5  # of a document, one in the other, as in curl: 100 kB can take a second for each
_REDIRECTS = 10  # as browsers, curl and requests allow about

_IDLE_CONNECTIONS = 32  # kept over all origins: as many as a batch uses at most
_CLIENTS_KEPT = 4  # of boto3, of as many environments: 12 MiB each, and 2 connections
_IDLE_SECONDS = 15.0  # S3 closes at 20 s; a little earlier saves the failed attempt

_RETRIES = 8  # attempts after the first without a byte of progress
_RETRY_BASE = 0.05  # seconds; botocore and S3 guidance: full jitter over base * 2**attempt
_RETRY_BASE_THROTTLED = 1.0  # seconds; a throttling server needs the pause, a dropped one does not
_RETRY_CAP = 20.0  # seconds at most for one pause
_RETRY_TOTAL = 60.0  # seconds since the last progress; a longer Retry-After fails at once
_RETRY_TOKENS = 500  # per process; each object that is had gives one back: ends storms
_RETRY_COST = 5  # tokens of one retry; a block that comes pays for it

_WORKERS_START = 2  # two saturate a fast server; more only fight for the interpreter lock
_WORKER_RATE = 64 * _MiB  # bytes per second; below this per worker, more workers are worth it
_WORKERS_ALL = 96  # of all calls; with more join none, for a Mac gives a process 256 open files
_GROW_EVERY = 0.01  # seconds between two looks at that: by then a fast server has sent a megabyte
_BATCH_EVERY = 0.05  # seconds between two looks at how busy they are
_BATCH_BUSY = 0.75  # share of that time on a CPU: above, more threads only fight
_GLANCE = 1.0  # seconds for which is remembered what was seen of a directory
_SHARD_LIMIT = 4096  # names of a shard that are remembered: all of a million objects, in 130 MiB
_SHARD_ADDED = 64  # names, looked through one by one, until a shard is listed anew
_BATCH_LIMIT = 32  # objects of a batch asked for at a time, where it waits for the network
_AHEAD = 16  # requests sent together, and answers read: code that is run again at once runs fast
_AHEAD_TOGETHER = 0.02  # seconds for sending those: connecting to a far server takes longer
_AHEAD_WITHIN = 0.5  # seconds that an object may take for that; a server does not wait for long
_TURN_WAIT = 0.02  # seconds: a hundred short turns; on a slow file system a turn takes longer
_TURN_KEEP = 0.005  # seconds for which a thread may keep the turn, as CPython's own interval
_TURN_GAP = 0.0002  # seconds between two calls of such a thread, at most
_TURN_DOUBT = 0.05  # seconds for which no turn is kept after a thread that did not come back
_TURN_NEAR = 0.0002  # seconds for an answer that is not worth waking another thread for
_CHANGES = 3  # times an object may change under a download before we say so
_DEAD = 30.0  # seconds without a byte after which whoever wrote a partial file is taken for dead
_PEER_PATIENCE = 5.0  # seconds a peer's download may stand still before we no longer wait for it

_USE_GRAIN = 300.0  # seconds between two stamps of last use
_GRACE = 3600.0 + _USE_GRAIN  # seconds after its last stamp in which nothing is pruned
_ORPHAN_AGE = 7 * 86400.0  # seconds after which a partial file that nobody finished is collected


# ==== 2 Errors ====================================================================================
# Everything that we raise on purpose, attributes first: the text is made from them.


def _printable(text: str) -> str:
    """Return text on one line, with control characters and lone surrogates escaped."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _redact(uri: str) -> str:
    """Return a URI fit for logs and messages: no user, password, query or fragment."""
    scheme, colon, rest = uri.partition("://")
    if not colon or scheme.lower() in ("s3", "file"):
        return _printable(uri)
    rest = rest.partition("#")[0].partition("?")[0]
    host, slash, path = rest.partition("/")
    return _printable(f"{scheme}://{host.rpartition('@')[2]}{slash}{path}")


def _redact_bad(text: str) -> str:
    """Return what is no usable URL, fit for messages."""
    # A raw "/" in a password moves the "@": then no part of it is safe to show.
    return "…" if "@" in text else _redact(text.partition("?")[0].partition("#")[0])


def _redact_path(text: str) -> str:
    """Return a local path fit for messages: it may be a URL that somebody mistyped."""
    is_typo = text.strip().lower().startswith(("http", "s3:", "file:"))
    return _redact_bad(text) if is_typo else _printable(text)


@lru_cache(maxsize=32)  # all of ours with both of theirs
def _mixed(ours: Any, foreign: type) -> Any:
    """Return a class that is both, made at run time since the foreign one may never be loaded."""
    names = {"_ours": ours, "__module__": ours.__module__}
    return type(ours.__name__, (ours, foreign), names)


class S3CacheError(Exception):
    """Base of every error that this module raises on purpose.

    ::

        S3CacheError
        ├── NotFoundError           also FileNotFoundError
        ├── AccessDeniedError       also PermissionError and FileNotFoundError
        ├── TransferError           also ConnectionError: the network, or a server that fails
        ├── IntegrityError          also OSError: the bytes are not what was promised
        ├── OfflineError            also ConnectionError: not in the cache, and told not to ask
        ├── CacheError              also OSError: the local side, with its errno
        ├── InvalidJSONError        also ValueError
        └── MissingDependencyError  also ImportError

    Errors that come from an S3 answer are ``botocore.exceptions.ClientError`` too when botocore is
    loaded. All pickle with everything they carry, and none holds a query, a password or a token.

    Attributes
    ----------
    message : str
        What went wrong.
    uri : str or None
        What was asked for, redacted.
    status : int or None
        HTTP status.
    code : str or None
        S3 error code such as ``"NoSuchKey"``.
    hint : str or None
        The likely cause, or what to do next.
    response : dict
        The same in the shape of botocore's ``ClientError.response``.
    """

    operation_name = "GetObject"
    errno: int | None = None
    _errno: int | None = None

    def __new__(  # noqa: D102
        cls: type[E],
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        **_: object,
    ) -> E:
        ours: Any = cls
        foreign: Any = cls._also(status, code)
        made: E = super().__new__(_mixed(ours, foreign) if foreign else ours, message)
        return made

    def __init__(
        self,
        message: str,
        *,
        uri: str | None = None,
        status: int | None = None,
        code: str | None = None,
        hint: str | None = None,
        errno: int | None = None,
        retry: str = "no",
        retry_after: float | None = None,
    ) -> None:
        # Not super(): a ClientError further up the mixed classes wants other arguments.
        Exception.__init__(self, message)
        self.message, self.uri, self.status = message, uri and _redact(uri), status
        self.code, self.hint, self.attempts = code, hint, 1
        self._retry, self._retry_after = retry, retry_after
        if isinstance(self, OSError):
            self.errno = errno or self._errno

    @classmethod
    def _also(cls, status: int | None, code: str | None) -> type[Exception] | None:
        """Return the foreign class that callers may catch this error by."""
        botocore = sys.modules.get("botocore.exceptions") if status and code else None
        # It has no such name yet while another thread imports it, nor have json and logging below.
        found: type[Exception] | None = getattr(botocore, "ClientError", None)
        return found

    def _name(self, uri: str) -> None:
        """Say what this is about, if nobody has yet."""
        self.uri = self.uri or _redact(uri)

    @property
    def response(self) -> dict[str, Any]:
        """The error in the shape of botocore's ``ClientError.response``."""
        return {
            "Error": {"Code": self.code or str(self.status or ""), "Message": self.message},
            "ResponseMetadata": {"HTTPStatusCode": self.status, "HTTPHeaders": {}},
        }

    def __str__(self) -> str:
        text = f"{self.message}: {self.uri}" if self.uri else self.message
        tags = list(dict.fromkeys(str(tag) for tag in (self.status, self.code) if tag))
        if self.attempts > 1:
            tags.append(f"after {self.attempts} attempts")
        if tags:
            text += f" ({', '.join(tags)})"
        return f"{text}. {self.hint}" if self.hint else text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # By the class of ours, since the mixed one exists at run time only.
        return _rebuild, (type(self).__dict__.get("_ours", type(self)), self.__dict__)


class NotFoundError(S3CacheError, FileNotFoundError):
    """There is no such object, version, bucket, URL or local file."""

    _errno = errno.ENOENT


class AccessDeniedError(S3CacheError, PermissionError, FileNotFoundError):
    """The server refuses; to an anonymous caller S3 says so of a missing key, too."""

    _errno = errno.EACCES


class TransferError(S3CacheError, ConnectionError):
    """The network failed, or the server did, and no retry helped."""


class IntegrityError(S3CacheError, OSError):
    """The bytes that came are not those that were promised."""

    _errno = errno.EIO


class OfflineError(S3CacheError, ConnectionError):
    """Nothing in the cache, and told not to touch the network."""

    _errno = errno.ENETUNREACH


class CacheError(S3CacheError, OSError):
    """The cache directory cannot be used: full, unwritable or unsafe. ``errno`` says which."""


class InvalidJSONError(S3CacheError, ValueError):
    """Not JSON, too large, or nested too deeply. Also a ``json.JSONDecodeError``, as in 0.1."""

    msg, doc, pos, lineno, colno = "invalid JSON", "", 0, 1, 1  # 0.1's users may look at these

    @classmethod
    def _also(cls, status: int | None, code: str | None) -> type[Exception] | None:
        found: type[Exception] | None = getattr(sys.modules.get("json"), "JSONDecodeError", None)
        return found


class MissingDependencyError(S3CacheError, ImportError):
    """A signed request was asked for and boto3 is not installed."""


def _rebuild(cls: type[S3CacheError], state: dict[str, Any]) -> S3CacheError:
    """Make an error anew from its pickle."""
    error = cls(state["message"], status=state["status"], code=state["code"])
    error.__dict__.update(state)
    return error


def _human(size: float) -> str:
    """Return a size for people, in decimal units as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":  # what would be shown as 1000 is one of the next
            break
        size /= 1000
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


_DEBUG, _INFO, _WARNING = 10, 20, 30
_LOGGER: list[Any] = []  # looked up once: `getLogger` takes a lock that all loggers share


def _log(level: int, text: str, *args: object) -> None:
    """Log, without importing ``logging`` into a process that does not use it."""
    if not _LOGGER:
        # A process that has not imported logging cannot have asked for our lines.
        if not hasattr(sys.modules.get("logging"), "NullHandler"):  # what we use stands before it
            return
        _LOGGER.append(sys.modules["logging"].getLogger(__name__))
    logger = _LOGGER[0]
    if not logger.handlers:  # `dictConfig` and `assertLogs` take ours away
        logger.addHandler(sys.modules["logging"].NullHandler())
    if logger.isEnabledFor(level):
        logger.log(level, _printable(text % args))  # a key may hold a line of its own


# ==== 3 URIs ======================================================================================
# Text in, text out: no disk, no network. S3 keys are exact: "?", "#", "%", "//" are part of them.

# What buckets, queries and file names of every system can hold.
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")
_S3_FORM = "expected s3://bucket/key"


def _text(value: StrPath) -> str:
    """Return a path or URI as str."""
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError(f"expected str or os.PathLike[str], not {type(text).__name__}")
    return text


def _require(name: str, value: object, ability: str, what: str) -> None:
    """Refuse an argument, by its name, that cannot do what it is for."""
    if not hasattr(value, ability):
        raise TypeError(f"{name} must be {what}, not {type(value).__name__}")


def _scheme(text: str) -> str:
    """Return the scheme of a URI in lower case, or "": drive letters and paths have none."""
    # One letter is a drive: `c://x` is a path that somebody joined carelessly.
    head, sep, _ = text.partition("://")
    if sep and len(head) > 1 and head.isascii() and head.replace("+", "").isalnum():
        return head.lower()
    # `file:/etc/hosts` is a URI (RFC 8089, 2); `C:` and `notes:2024` are not.
    return "file" if text[:6].lower() == "file:/" else ""


def _is_windows(path: str) -> bool:
    r"""Tell whether a path has a drive letter or is ``\\server\share``."""
    return path.startswith("\\\\") or (path[1:2] == ":" and path[0].isascii() and path[0].isalpha())


def _file_path(uri: str) -> str:
    """Return the local path that a ``file:`` URI names."""
    from urllib.parse import unquote

    path = uri[5:]
    if path.startswith("//"):
        host, slash, rest = path[2:].partition("/")
        path = slash + rest if host.lower() in ("", "localhost") else path
    path = unquote(path, sys.getfilesystemencoding(), "surrogateescape")  # as os.fsdecode
    return path[1:] if os.name == "nt" and path[2:3] == ":" else path


def _split_http(url: str) -> tuple[str, str, str, str]:
    """Return (scheme and ``://``, authority, path, the rest from ``?`` or ``#`` on)."""
    head, sep, rest = url.partition("://")
    cut = min((at for at in map(rest.find, "?#") if at >= 0), default=len(rest))
    authority, slash, path = rest[:cut].partition("/")
    return head + sep, authority, slash + path, rest[cut:]


def _split_s3(uri: str) -> tuple[str, str]:
    """Return bucket and key of a URI that begins with ``s3://``."""
    bucket, _, key = uri[5:].partition("/")
    if not 1 <= len(bucket) <= 255 or not _WORD.issuperset(bucket) or bucket[0] == ".":
        shown = "" if "@" in uri else f" '{_printable(bucket[:80])}'"
        raise ValueError(f"Not a valid S3 URI: no bucket can be called{shown} ({_S3_FORM})")
    return bucket, key


def parse_s3_uri(s3_uri: str) -> tuple[str, str]:
    """Split an S3 URI into bucket and exact key.

    Parameters
    ----------
    s3_uri : str
        ``s3://bucket/key``; the scheme in any case. The key may be empty.

    Returns
    -------
    tuple of (str, str)
        Bucket, and the key with every character as written: ``?``, ``#``, ``%``, ``//``, a leading
        and a trailing slash are part of it.

    Raises
    ------
    ValueError
        Not ``s3://``, or a bucket that cannot exist (1 to 255 of ``[A-Za-z0-9.-_]``, the rule of
        botocore). A user or password is never echoed.
    """
    text = _text(s3_uri)
    if _scheme(text) != "s3":
        raise ValueError(f"Not a valid S3 URI: '{_redact_bad(text)}' ({_S3_FORM})")
    return _split_s3(text)


def is_url(path_or_url: StrPath) -> bool:
    """Tell whether this is an ``http``, ``https`` or ``s3`` URL with a host or bucket.

    Parameters
    ----------
    path_or_url : str or os.PathLike

    Returns
    -------
    bool
    """
    text = _text(path_or_url)
    return _scheme(text) in ("http", "https", "s3") and bool(_split_http(text)[1])


def is_file_path(path_or_url: StrPath) -> bool:
    r"""Tell whether this is a local path or a ``file:`` URI.

    Windows drives and ``\\server\share`` are file paths on every system, and so is ``""``.

    Parameters
    ----------
    path_or_url : str or os.PathLike

    Returns
    -------
    bool
    """
    return _scheme(_text(path_or_url)) in ("", "file")


def as_pathlike(base: StrPath) -> tuple[str, str | None, PurePath]:
    r"""Parse a URI or path into ``(kind, bucket, path)``, to be edited with pathlib.

    Parameters
    ----------
    base : str or os.PathLike

    Returns
    -------
    kind : str
        ``"s3"``, ``"http"``, ``"https"`` or ``"file"``.
    bucket : str or None
        The bucket, or the host of a URL; None for local paths.
    path : pathlib.PurePath
        ``PurePosixPath`` of a key, ``PureWindowsPath`` of a drive or ``\\server\share`` on every
        system, else ``Path``. Like all of pathlib it drops ``//``, ``.`` and a trailing slash:
        for exact keys use `parse_s3_uri` and `join_any`.

    Raises
    ------
    ValueError
        An ``s3://`` URI that `parse_s3_uri` refuses.
    """
    with _IMPORTS:
        from pathlib import Path, PurePosixPath, PureWindowsPath

    text = _text(base)
    scheme = _scheme(text)
    if scheme == "s3":
        bucket, key = parse_s3_uri(text)
        return "s3", bucket, PurePosixPath(key.lstrip("/"))
    if scheme in ("http", "https"):
        _, host, path, rest = _split_http(text)
        return scheme, host, PurePosixPath(path.lstrip("/") + rest)
    if scheme == "file":
        text = _file_path(text)
    return "file", None, PureWindowsPath(text) if _is_windows(text) else Path(text)


def as_string(kind: str, bucket: str | None, path: PurePath) -> str:
    """Turn what `as_pathlike` returned into a string again.

    Parameters
    ----------
    kind : str
        ``"s3"``, ``"http"``, ``"https"`` or ``"file"``.
    bucket : str or None
        Bucket or host; ignored for ``"file"``.
    path : pathlib.PurePath

    Returns
    -------
    str
        ``s3://bucket/key`` (``s3://bucket/`` for the root), a URL, or a local path.

    Raises
    ------
    ValueError
        For any other `kind`.
    """
    if kind == "file":
        return str(path)
    if kind not in ("s3", "http", "https"):
        raise ValueError(f"Unsupported kind: {kind!r}")
    key = path.as_posix().lstrip("/")
    return f"{kind}://{bucket + '/' if bucket else ''}{'' if key == '.' else key}"


def join_any(base: StrPath, *parts: str) -> str:
    r"""Join parts to an S3 URI, a URL or a local path.

    Parameters
    ----------
    base : str or os.PathLike
        To an ``http(s)`` base the parts are joined before its query.
    *parts : str
        Empty ones are skipped. In S3 keys and URLs ``\`` becomes ``/``, all else is kept exactly;
        no slash is added after a base that ends in one. For local paths, pathlib's rules and the
        separators of the base.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        An ``s3://`` URI that `parse_s3_uri` refuses.
    """
    text = _text(base)
    scheme = _scheme(text)
    if scheme in ("s3", "http", "https"):
        if scheme == "s3":
            parse_s3_uri(text)
            head, rest = text, ""
        else:
            start, host, path, rest = _split_http(text)
            head = start + host + path
        if "/" not in head[len(scheme) + 3 :]:
            head += "/"
        for part in filter(None, parts):
            head += ("" if head.endswith("/") else "/") + part.replace("\\", "/")
        return head + rest
    joined = str(as_pathlike(text)[2].joinpath(*parts))
    if "\\" in text and "/" in joined:
        return joined.replace("/", "\\")
    return joined.replace("\\", "/") if "/" in text else joined


# ==== 4 Wire ======================================================================================
# The protocol as pure functions over small values: nothing here opens a socket or a file.

_UNRESERVED = _WORD | frozenset("/~")
_TARGET = frozenset(map(chr, range(0x21, 0x7F))) - frozenset('"<>\\^`{|}')
_IPV6 = frozenset("0123456789abcdefABCDEF.:")
_ETAG_BARE = frozenset("0123456789abcdefghijklmnopqrstuvwxyz-")
_HEX = frozenset("0123456789abcdef")

# Region prefix -> DNS suffix, from botocore's partitions.json; any other region is amazonaws.com.
_PARTITIONS = {
    "cn-": "amazonaws.com.cn",
    "eusc-": "amazonaws.eu",
    "us-iso-": "c2s.ic.gov",
    "us-isob-": "sc2s.sgov.gov",
    "eu-isoe-": "cloud.adc-e.uk",
    "us-isof-": "csp.hci.ic.gov",
}

# Status -> error class; 5xx and what can be retried are TransferError, the rest S3CacheError.
_REFUSALS: dict[int, type[S3CacheError]] = {
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: NotFoundError,
    405: NotFoundError,  # the version asked for is a delete marker
    410: NotFoundError,
}
# What a code says counts where a status says less: botocore's Stubber gives 400, a double none.
_CODE_STATUS = {"NoSuchKey": 404, "NoSuchVersion": 404, "NoSuchBucket": 404, "AccessDenied": 403}
_S3_CODES = {401: "AccessDenied", 403: "AccessDenied", 404: "NoSuchKey", 405: "MethodNotAllowed"}
_THROTTLED = {
    "SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled",
    "RequestThrottledException", "TooManyRequestsException", "RequestLimitExceeded",
    "BandwidthLimitExceeded", "PriorRequestNotComplete",
}  # fmt: skip
# How servers that are not AWS may refuse a request without a signature, under status 400.
_UNSIGNED_CODES = {
    "UnsupportedAlgorithm", "MissingSecurityHeader", "MissingAuthenticationToken",
    "AuthorizationQueryParametersError", "MissingFields",
}  # fmt: skip
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
_BAD_KEYS = _EXPIRED_CODES | {"InvalidAccessKeyId", "SignatureDoesNotMatch"}
_HINTS = {
    "AccessDenied": "Missing, or not public: without permission to list, S3 says 403 for a missing"
    " key, too",
    "InvalidAccessKeyId": "Check the credentials and the endpoint",
    "SignatureDoesNotMatch": "Check the secret key",
    "RequestTimeTooSkewed": "Set the clock of this machine",
    "NoSuchBucket": "Check the bucket's name and the endpoint",
    "InvalidObjectState": "The object is archived: restore it first",
    "PermanentRedirect": "Set AWS_REGION to the bucket's region",
    "IllegalLocationConstraintException": "Set AWS_REGION to the bucket's region",
}


def _quote(text: str, safe: frozenset[str] = _UNRESERVED) -> str:
    """Percent-encode as botocore does (``quote(text, safe="/-._~")``), without its imports."""
    if safe.issuperset(text):
        return text
    data = text.encode("utf-8", "surrogateescape")  # a Location may hold bytes that are no UTF-8
    return "".join(chr(b) if b < 128 and chr(b) in safe else f"%{b:02X}" for b in data)


def _check_key(key: str) -> None:
    """Refuse, before anything is sent or written, a key that cannot exist."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise ValueError(f"Not a valid S3 key: lone surrogate in {key[:80]!r}") from None
    if size > 1024:
        raise ValueError(f"Not a valid S3 key: {size} bytes, S3 allows 1,024: {key[:80]!r}…")
    if "\0" in key:
        raise ValueError(f"Not a valid S3 key: NUL in {key[:80]!r}")


def _digits(text: str) -> int | None:
    """Return a decimal number of plain ASCII digits, as RFC 9110 and URLs write them."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


_PORTS = {"http": 80, "https": 443}


@lru_cache(maxsize=64)
def _address(origin: Origin, full: bool = False) -> str:
    """Return ``host:port``, without the port where it goes without saying, unless in full."""
    scheme, host, port = origin
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{port}" if full or port != _PORTS[scheme] else host


class _Place:
    """Where a request goes: origin, request target, and what to log in as."""

    __slots__ = ("auth", "origin", "target")

    def __init__(self, origin: Origin, target: str, auth: str | None = None) -> None:
        self.origin, self.target, self.auth = origin, target, auth

    def login(self, header: str) -> str:
        """Return the header line that logs in here, "" where nobody has to."""
        return f"{header}: {self.auth}\r\n" if self.auth else ""

    def __str__(self) -> str:
        return f"{self.origin[0]}://{_address(self.origin)}{self.target.partition('?')[0]}"


def _basic(userinfo: str) -> str:
    """Return the Authorization header for ``user:password`` of a URL (RFC 7617)."""
    from base64 import b64encode
    from urllib.parse import unquote_to_bytes

    userinfo += "" if ":" in userinfo else ":"
    return "Basic " + b64encode(unquote_to_bytes(userinfo)).decode("ascii")


@lru_cache(maxsize=256)
def _place(url: str) -> _Place:
    """Parse an http(s) URL; user and password are split off before anything can resolve them."""
    scheme, authority, path, rest = _split_http(url)
    scheme = scheme[:-3].lower()
    userinfo, at, host = authority.rpartition("@")
    bad = ValueError(f"Not a valid URL: '{_redact_bad(url)}'")
    if scheme not in ("http", "https"):
        raise bad
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, port = host, ""
    allowed = _WORD
    if name[:1] == "[" and name[-1:] == "]":  # nothing else holds a colon (RFC 3986, 3.2.2)
        name, allowed = name[1:-1], _IPV6
    try:
        name = name if name.isascii() else name.encode("idna").decode("ascii")
        number = _digits(port) if port else _PORTS[scheme]
        target = _quote((path or "/") + rest.partition("#")[0], _TARGET)
        auth = _basic(userinfo) if at else None
    except ValueError:  # UnicodeError is one
        raise bad from None
    # Longer labels and empty ones are no DNS (RFC 1035, 2.3.4), and no text for a resolver.
    labels = name.removesuffix(".").split(".")
    whole = all(0 < len(label) < 64 for label in labels) and allowed.issuperset(name)
    if not whole or not number or number > 65535:
        raise bad
    return _Place((scheme, name.lower(), number), target, auth)


def _is_region(name: str) -> bool:
    """Tell whether a region may become part of a host name: one label (RFC 1123, 2.1)."""
    whole = 0 < len(name) < 64 and name.isascii() and name.replace("-", "a").isalnum()
    return whole and name[0] != "-" != name[-1]


def _dns_suffix(region: str) -> str:
    """Return the domain of a region's partition."""
    return next((s for p, s in _PARTITIONS.items() if region.startswith(p)), "amazonaws.com")


def _aws_place(bucket: str, key: str, region: str, query: str) -> _Place:
    """Return where AWS keeps an object: virtual-hosted, or path style where TLS cannot cover it."""
    # A wildcard certificate covers one label, so a dot or underscore forces path style.
    suffix = _dns_suffix(region)
    virtual = 3 <= len(bucket) <= 63 and bucket[0] != "-" != bucket[-1]
    virtual = virtual and bucket == bucket.lower() and not set("._").intersection(bucket)
    host = "s3" if region in ("", "us-east-1", "aws-global") else f"s3.{region}"
    host = f"{bucket}.{host}.{suffix}" if virtual else f"{host}.{suffix}"
    path = _quote(key) if virtual else f"{bucket}/{_quote(key)}"
    return _Place(("https", host, 443), f"/{path}{query}")


def _content_length(headers: dict[str, str]) -> int | None:
    """Return Content-Length; repeated it must agree with itself (RFC 9110, 8.6)."""
    raw = headers.get("content-length")
    if raw is None:
        return None
    size = _digits(raw)
    if size is None:
        sizes = {_digits(part.strip()) for part in raw.split(",")}
        size = sizes.pop()
        if sizes or size is None:
            raise TransferError(f"Malformed answer: Content-Length '{_printable(raw[:80])}'")
    return size


def _content_range(headers: dict[str, str]) -> tuple[int, int, int] | None:
    """Return (start, stop, total) of a Content-Range, stop exclusive; None if it is not exact."""
    unit, _, span = headers.get("content-range", "").partition(" ")
    part, _, total = span.strip().partition("/")
    first, dash, last = part.partition("-")
    start, end, size = _digits(first), _digits(last), _digits(total)
    if unit.lower() != "bytes" or not dash or start is None or end is None or size is None:
        return None
    return (start, end + 1, size) if start <= end < size else None


def _clean(value: str) -> bool:
    """Tell whether a header value is free of control characters."""
    return value.isprintable() or not any((c < " " and c != "\t") or c == "\x7f" for c in value)


def _field(line: str) -> tuple[str, str]:
    """Return a header's name in lower case, "" if it has none, and its value."""
    name, colon, value = line.partition(":")
    # No folded lines, no space before the colon (RFC 9112, 5.1 and 5.2); and a lone CR, LF or NUL
    # would end a line for some, and smuggle headers when we send an ETag back.
    whole = colon and name == name.strip() and _clean(line)
    return (name.lower(), value.strip(" \t")) if whole else ("", "")


_known_field = lru_cache(maxsize=512)(_field)  # most lines stand in the last answer, too


def _bad_field(line: str) -> TransferError:
    # Its value may be the URL that we asked for, with a token in the query.
    name, colon, _ = line.partition(":")
    name = name.strip()
    told = f" {name[:80]!r}" if colon and _WORD.issuperset(name) else ""
    return TransferError(f"Malformed answer: header{told}")


def _parse_head(head: bytes) -> tuple[int, dict[str, str], bool]:
    """Return status, headers by lower-case name, and whether the peer speaks HTTP/1.1."""
    first, *lines = head.decode("latin-1").split("\r\n")
    version, code, after, reason = first[:9], first[9:12], first[12:13], first[13:]
    whole = version in ("HTTP/1.1 ", "HTTP/1.0 ") and after in ("", " ") and _clean(reason)
    if not whole or not code.isascii() or not code.isdigit() or len(code) < 3 or code < "100":
        raise TransferError("Malformed answer: not HTTP/1.x", retry="soon")
    headers: dict[str, str] = {}
    for line in lines:
        name, value = _known_field(line) if len(line) < 256 else _field(line)
        if not name:
            raise _bad_field(line)
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return int(code), headers, version == "HTTP/1.1 "


def _just_changed(headers: dict[str, str]) -> bool:
    """Tell whether this is of the second of its answer, in which it may change once more."""
    # Then no date, nor a tag made of one, tells versions apart (RFC 9110, 8.8.2.2).
    return headers.get("date", "") == headers.get("last-modified")


def _etag(headers: dict[str, str]) -> str | None:
    """Return the ETag header if it is one usable tag (RFC 9110, 8.8.3), else None.

    Unquoted ones are met in the wild and are taken as they are; repeated or overlong ones are not,
    nor ``*``, which in a condition means any version.
    """
    tag = headers.get("etag", "")
    bare = tag.removeprefix("W/")
    bare = bare[1:-1] if len(bare) > 1 and bare[0] == bare[-1] == '"' else bare
    usable = bare and tag != "*" and '"' not in bare and ", " not in bare and tag.isprintable()
    if bare[8:9] == "-" and _just_changed(headers):  # nginx makes it of time, in seconds, and size
        usable = not _HEX.issuperset(bare[:8] + bare[9:])
    return tag if usable and len(tag.encode()) <= 80 else None


def _is_same_tag(one: str | None, other: str | None) -> bool:
    """Compare two ETags, of which servers quote the one in a listing or not, or neither."""
    return one is not None and other is not None and one.strip('"') == other.strip('"')


def _is_strong(etag: str | None) -> bool:
    """Tell whether ranges may be joined by this tag (RFC 9110, 8.8.3.2)."""
    return etag is not None and not etag.startswith("W/")


def _retry_after(headers: dict[str, str], now: float) -> float | None:
    """Return the seconds that the server asks us to wait (RFC 9110, 10.2.3)."""
    millis = _digits(headers.get("x-amz-retry-after", ""))
    if millis is not None:
        return millis / 1000
    raw = headers.get("retry-after", "")
    seconds = _digits(raw)
    if seconds is not None or not raw:
        return seconds
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(raw).timestamp() - now)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def _retry_delay(
    kind: str, attempt: int, elapsed: float, asked: float | None, chance: float
) -> float | None:
    """Decide on a retry: seconds to wait before it, or None to give up.

    ``kind`` is how the failure looks: "no", "once", "soon" or "slow" (throttled); ``attempt`` and
    ``elapsed`` count from the last progress; ``asked`` is Retry-After; ``chance`` is in [0, 1).
    """
    if kind == "no" or attempt >= (1 if kind == "once" else _RETRIES):
        return None
    base = _RETRY_BASE_THROTTLED if kind == "slow" else _RETRY_BASE
    delay = chance * min(_RETRY_CAP, base * 2**attempt) if asked is None else asked
    return delay if elapsed + delay <= _RETRY_TOTAL else None


def _retry_kind(status: int, code: str | None) -> str:
    """Return how to retry an answer: S3's retryable codes, 408, 429 and the 5xx that pass."""
    if status in (429, 503) or code in _THROTTLED:
        return "slow"
    passes = status in (408, 500, 502, 504, 522, 524)  # the last two are Cloudflare's; as curl
    return "soon" if passes or code == "RequestTimeout" else "no"


def _parse_xml(data: bytes, wanted: frozenset[str]) -> list[tuple[str, str]]:
    """Return (name, text) of the wanted elements in document order, the root first.

    Raises ValueError for anything but well-formed XML without a DTD: entities are how XML bombs
    and file inclusion work, and S3 sends none.
    """
    with _IMPORTS:
        from xml.parsers import expat

    found: list[tuple[str, str]] = []
    text: list[str] = []

    def start(name: str, _: object) -> None:
        text.clear()
        if not found:
            found.append((name.rpartition(":")[2], ""))

    def end(name: str) -> None:
        name = name.rpartition(":")[2]
        if name in wanted:
            found.append((name, "".join(text)))
        text.clear()

    def doctype(*_: object) -> None:
        raise ValueError("XML with a DTD")

    parser = expat.ParserCreate()
    # Elements are told by name alone: servers differ in namespace and nesting.
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = text.append, doctype
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an unknown encoding
        raise ValueError(f"invalid XML: {error}") from None
    return found


def _parse_error(body: bytes) -> dict[str, str]:
    """Return Code, Message and Region of an S3 error body; empty if it is not one."""
    try:
        found = _parse_xml(body, frozenset(("Code", "Message", "Region")))
    except ValueError:
        return {}
    return dict(found[1:]) if found and found[0][0] == "Error" else {}


class _Key:
    """One object of a listing."""

    __slots__ = ("etag", "key", "modified", "size")

    def __init__(self, key: str, etag: str, size: int, modified: str) -> None:
        # Some servers list the tag without the quotes that they send with the object, or none.
        self.key, self.size, self.modified = key, size, modified
        self.etag = _etag({"etag": etag if etag[-1:] == '"' else f'"{etag}"'})


def _parse_listing(body: bytes) -> Page:
    """Return the objects of one ListObjectsV2 page and the token of the next.

    Keys are decoded with unquote_plus, as botocore does, and only if the page says that it is
    encoded. Raises ValueError for anything else: S3 may say 200 and send an error.
    """
    from urllib.parse import unquote_plus

    wanted = "Key ETag Size LastModified Contents EncodingType IsTruncated NextContinuationToken"
    found = _parse_xml(body, frozenset(wanted.split()))
    if not found or found[0][0] != "ListBucketResult":
        raise ValueError("not a listing")
    once = dict(found)
    # A server that ignores encoding-type=url says so by leaving the element out.
    decode = unquote_plus if once.get("EncodingType") == "url" else str
    keys: list[_Key] = []
    item: dict[str, str] = {}
    for name, text in found:
        item[name] = text
        if name == "Contents":
            size = _digits(item.get("Size", ""))
            if "Key" not in item or size is None:
                raise ValueError("a listing with an entry that has no key or size")
            etag, modified = item.get("ETag", ""), item.get("LastModified", "")
            keys.append(_Key(decode(item["Key"]), etag, size, modified))
            item = {}
    more = once.get("IsTruncated") == "true"
    token = once.get("NextContinuationToken")
    if more and not token:
        raise ValueError("a truncated listing without a token")
    return keys, token if more else None


class _Answer:
    """What a source gives back: status, ETag, sizes, headers, and a body to read.

    ``start`` and ``stop`` say which bytes of the object the body holds, ``total`` how many the
    object has, ``whole`` that these are all; stop and total are None while nobody knows.
    """

    __slots__ = ("body", "etag", "headers", "start", "status", "stop", "total", "whole")

    def __init__(self, status: int, headers: dict[str, str], body: Reader) -> None:
        if status == 200 and "content-range" in headers:  # gofakes3 calls a part 200
            status = 206
        self.status, self.headers, self.body = status, headers, body
        self.etag = _etag(headers)
        self.start = 0
        self.stop: int | None = None
        self.total: int | None = None
        if status == 206:
            span = _content_range(headers)
            if span is None:
                raise TransferError("Malformed answer: 206 without an exact Content-Range")
            self.start, self.stop, self.total = span
        elif status == 200:
            self.stop = self.total = _content_length(headers)
        self.whole = self.start == 0 and self.total is not None and self.stop == self.total


def _judge(answer: _Answer, sent: bool, same: bool, asked: int) -> str:
    """Decide what the first answer means, before a byte of its body is read.

    ``sent`` says that the request carried a validator, ``same`` that the answer's validator is the
    one we hold, ``asked`` how many bytes the range spanned. Returns

    - "unchanged": 304 to a condition of ours, or the very ETag that we hold;
    - "small": the body is the object, and comes into memory;
    - "stream": one body to disk: of medium size, or the only way to have it;
    - "parts": a strong ETag pins further ranges;
    - "again": ask without range and conditions (416 of an empty object, a part nothing can pin,
      a server that mistakes a condition).
    """
    if answer.status == 304:
        if not sent:
            raise TransferError("Malformed answer: 304 to an unconditional request", status=304)
        return "unchanged"
    # An empty object has no byte 0; whatever else this means shows itself when asked again.
    if answer.status in (412, 416):
        return "again"
    if same:
        return "unchanged"
    if answer.status == 206 and (answer.start, answer.stop) != (0, min(asked, answer.total or 0)):
        raise TransferError("Malformed answer: not the range that was asked for")
    if answer.whole and answer.total is not None and answer.total <= _SMALL:
        return "small" if answer.total <= _WHOLE else "stream"
    if _is_strong(answer.etag) and answer.total is not None:
        return "parts"
    return "again" if answer.status == 206 else "stream"


# ==== 5 Transport =================================================================================
# The only section that opens sockets; only errors of ours leave it. A small HTTP/1.1 client of our
# own over ``socket``: ``http.client`` hands out short bodies in silence, mistakes chunk framing for
# data, takes the first of two lengths and has no deadline for dripping headers, and ``urllib`` adds
# redirects that leak credentials: guarding all that takes more than what we need of HTTP does.


class _Stop:
    """A switch that ends the transfers of a call at once, whatever their servers do."""

    def __init__(self, parent: _Stop | None = None) -> None:
        # An event and not a flag: pauses between retries end with it, too.
        self.event = threading.Event()
        self._held: set[Any] = set()  # whatever has a stop() of its own
        self.grace: float = parent.grace / 2 if parent else 0.8  # who is inside must end before us
        if parent:
            parent.hold(self)

    def hold(self, what: Any) -> None:
        self._held.add(what)
        self.check()

    def drop(self, what: Any) -> None:
        self._held.discard(what)

    def check(self) -> None:
        if self.event.is_set():
            raise TransferError("Stopped")

    def stop(self) -> None:
        self.event.set()
        for what in self._held.copy():  # in one step, also without an interpreter lock
            what.stop()


def _take_out(items: list[T], item: T) -> bool:
    """Remove an item from a list; False if a signal handler or another thread was faster."""
    try:
        items.remove(item)  # in one step, also without an interpreter lock
    except ValueError:
        return False
    return True


class _Here(threading.local):
    """What a thread knows of its turn: is it within one, has it, and came it back at once."""

    inside = held = quick = False
    since = asked = left = 0.0  # it got the turn, asked a server, ended its last call


class _Turn:
    """Lets threads do their short work one at a time, and wait for the network together.

    Between two waits a small object takes a dozen short system calls, and each of them lets go of
    the interpreter lock: many threads spend more time handing it around than working. And to wake
    a thread takes half as long as a call: whoever comes back at once, as in a caller's `map`, goes
    on for a while, and waits for a server that answers as fast without handing the turn on. Who
    does not get it because it stands still, as on a slow file system, takes it over.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()  # re-entrant: a signal handler may call us
        self.here = _Here()
        self._waiters: list[threading.Lock] = []  # each is let go of when its thread's turn comes
        self._taken, self._moves = False, 0
        self._kept = 0  # by which thread, that is expected back
        self._kept_since = self._doubt = 0.0  # one that was so did not come: none is until then
        self._near = False  # the server that was asked last

    def _take(self) -> None:
        me, here, now = threading.get_ident(), self.here, time.monotonic()
        with self._mutex:
            if not self._taken or self._kept:
                if self._kept != me:
                    here.since = now
                self._taken, self._kept, here.held = True, 0, True
                return
            gate, moves = threading.Lock(), self._moves
            gate.acquire()
            self._waiters.append(gate)
        try:
            while not gate.acquire(timeout=_TURN_WAIT):
                with self._mutex:
                    now = time.monotonic()
                    gone = self._kept and now - self._kept_since > _TURN_GAP
                    if gone or self._moves == moves:
                        if _take_out(self._waiters, gate):  # else it was given this very moment
                            self._taken, self._kept, self._moves = True, 0, self._moves + 1
                            if gone:
                                self._doubt = now + _TURN_DOUBT
                        break
                    moves = self._moves
        except BaseException:  # Ctrl-C: nobody may hand the turn to a thread that is gone
            with self._mutex:
                waits = _take_out(self._waiters, gate)
            if not waits:
                self._give()
            raise
        here.since, here.held = time.monotonic(), True

    def _give(self) -> None:
        """Pass the turn on."""
        self.here.held = False
        with self._mutex:
            self._taken, self._kept, self._moves = bool(self._waiters), 0, self._moves + 1
            if self._waiters:
                self._waiters.pop(0).release()

    def enter(self) -> bool:
        """Wait for the turn. False within one: a caller's progress function may call us."""
        here = self.here
        if here.inside:
            return False
        try:
            here.inside = True
            here.quick = time.monotonic() - here.left < _TURN_GAP
            self._take()
        except BaseException:
            self.exit(True)
            raise
        return True

    def exit(self, entered: bool) -> None:
        if not entered:
            return
        here, now = self.here, time.monotonic()
        keep = self._waiters and here.quick and now - here.since < _TURN_KEEP and now > self._doubt
        if here.held and keep:
            here.held = False
            self._kept_since, self._kept = now, threading.get_ident()
        elif here.held:
            self._give()
        here.left, here.inside = now, False

    def leave(self) -> None:
        """Let another thread work: this one is about to wait."""
        if self.here.held:
            self._give()

    def pause(self) -> None:
        """Let others work, unless a server is asked that answers before one of them is awake."""
        here = self.here
        if here.held:
            here.asked = time.monotonic()
            if not (self._near and self._waiters):
                self._give()

    def resume(self) -> None:
        """Go on after a wait, if within a turn."""
        here = self.here
        if here.inside:
            self._near = time.monotonic() - here.asked < _TURN_NEAR
            if not here.held:
                self._take()


_TURN = _Turn()


def _shut_down(sock: Socket) -> None:
    import socket

    try:  # not SSLSocket's own: it lets the reader go on with the bytes below TLS
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError:
        pass


def _is_of_handler(error: Exception) -> bool:
    """Tell whether a caller's signal handler raised this: a limit of time, no fault of a socket.

    A handler is known by what it alone is given: the frame that it interrupts, which called it. One
    that forgets it, as by ``del frame``, is not.
    """
    trace = error.__traceback__
    while trace and trace.tb_next:
        interrupted, trace = trace.tb_frame, trace.tb_next
        for value in trace.tb_frame.f_locals.values():
            given = value if isinstance(value, tuple) else (value,)  # *args is a tuple
            if any(item is interrupted for item in given):
                return True
    return False


def _readiness(sock: Socket) -> Callable[[int], object]:
    """Return a function that waits some milliseconds until a socket has something to read."""
    import select

    if hasattr(select, "poll"):  # select refuses descriptors above 1023
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return poll.poll
    return lambda timeout: select.select([sock], [], [], timeout / 1000)[0]


class _Connection:
    """One socket, what was read of it too far, and the pool's notes about it."""

    __slots__ = (
        "data", "idle_since", "key", "ready", "slow_bytes", "slow_since", "sock", "switch", "tls",
    )  # fmt: skip

    def __init__(self, sock: Socket, key: tuple[Any, ...]) -> None:
        self.ready = _readiness(sock)
        self.sock, self.key, self.data = sock, key, b""
        self.idle_since = self.slow_since = time.monotonic()
        self.slow_bytes = 0
        self.switch: _Stop | None = None
        self.tls = key[0][0] == "https"

    def stop(self) -> None:
        """Wake whoever waits on the socket, from another thread."""
        _shut_down(self.sock)

    def close(self) -> None:
        if self.switch:
            self.switch.drop(self)
        _POOL.open.discard(self)
        self.data = b""  # the rest of what could not be read answers nothing
        self.sock.close()

    def is_spoilt(self) -> bool:
        """Tell whether a kept connection has brought what nobody asked for, or its end."""
        sock: Any = self.sock
        try:
            if not (self.tls and sock.pending()) and not self.ready(0):
                return False
            if self.tls:
                sock.settimeout(0)
                sock.recv(1)
        except OSError as error:
            if type(error).__name__ == "SSLWantReadError":  # a session ticket, and nothing else
                sock.settimeout(_STALL_TIMEOUT)
                return False
            if _is_of_handler(error):
                raise
        return True

    def has_head(self) -> bool:
        """Tell, without waiting, whether the whole head of an answer has come."""
        if not self.tls and os.name == "posix":  # elsewhere a socket is no file to read from
            try:
                self.data += os.read(self.sock.fileno(), 16384)  # `recv` would poll first, and wait
            except BlockingIOError:
                pass
        return b"\r\n\r\n" in self.data and self.data[9:10] != b"1"  # the next head may be far

    def receive(self, deadline: float) -> bytes:
        """Return what comes next before the deadline; b"" at the end of the connection."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if left > 0.9 * _STALL_TIMEOUT:  # close enough: setting a timeout is a system call
            return self.sock.recv(16384)
        self.sock.settimeout(left)
        try:
            return self.sock.recv(16384)
        finally:
            self.sock.settimeout(_STALL_TIMEOUT)

    def until(self, mark: bytes, deadline: float) -> bytes:
        """Return what stands before the next mark, which is consumed."""
        data, self.data = self.data, b""
        at = data.find(mark)
        while at < 0:
            if len(data) > _HEAD_LIMIT:
                raise TransferError("Malformed answer: endless headers")
            if mark == b"\r\n\r\n" and b"\n\n" in data:  # no CRLF is going to come
                raise TransferError("Malformed answer: header lines that end in LF alone")
            more = self.receive(deadline)
            if not more:
                if data:
                    raise TransferError("Connection lost in the headers", retry="soon")
                raise ConnectionResetError(errno.ECONNRESET, "closed before the answer")
            at = (data + more).find(mark, max(0, len(data) - 3))
            data += more
        self.data = data[at + len(mark) :]
        return data[:at]

    def take(self, view: memoryview) -> int:
        """Fill a part of view; 0 at the end of the connection."""
        if self.data:
            size = min(len(view), len(self.data))
            view[:size] = self.data[:size]
            self.data = self.data[size:]
            now = time.monotonic()
        else:
            _TURN.leave()
            size = self.sock.recv_into(view)
            now = time.monotonic()
            if self.tls and 0 < size < len(view):
                size, now = self._gather(view, size, now)
        if not self.slow_bytes:  # what kept us from reading until now is not the server's doing
            self.slow_since = now
        self.slow_bytes += size
        if now - self.slow_since > _SLOW_WINDOW:
            if self.slow_bytes < _SLOW_RATE * _SLOW_WINDOW:
                raise TimeoutError
            self.slow_since, self.slow_bytes = now, 0
        return size

    def _gather(self, view: memoryview, size: int, now: float) -> tuple[int, float]:
        """Read on for 20 ms: TLS gives 16 KiB at a time, and each would cost a round of its own."""
        enough = now + 0.02
        self.sock.settimeout(0.02)
        try:
            while size < len(view) and now < enough:
                more = self.sock.recv_into(view[size:])
                if not more:
                    break
                size, now = size + more, time.monotonic()
        except OSError as error:  # what came is good; the next call meets the error again
            if _is_of_handler(error):
                raise
        finally:
            self.sock.settimeout(_STALL_TIMEOUT)
        return size, now


class _Pool:
    """Connections that wait for their next request, last in first out, for all threads.

    No lock: a signal handler may call us at any step, and would wait for ever or, let in, change
    the list under our hands.
    """

    def __init__(self) -> None:
        self._idle: list[_Connection] = []
        self.open: set[_Connection] = set()

    def take(self, key: tuple[Any, ...]) -> _Connection | None:
        """Return the connection used last for this key, if it is young enough."""
        now = time.monotonic()
        for found in self._idle[::-1]:
            if not (found.key == key and _take_out(self._idle, found)):
                continue
            # Servers close idle connections unannounced; asking on a dead one costs a round trip.
            # And what came unasked is the end, or an answer to nothing: never that to what is next.
            try:
                if now - found.idle_since <= _IDLE_SECONDS and not found.is_spoilt():
                    return found
            except BaseException:  # Ctrl-C: nobody else knows of it any more
                found.close()
                raise
            found.close()
        return None

    def give(self, connection: _Connection) -> None:
        """Keep a connection after a complete answer."""
        if connection.switch:
            connection.switch.drop(connection)
            connection.switch = None
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        for first in self._idle[:1]:
            old = first.idle_since < connection.idle_since - _IDLE_SECONDS
            if (old or len(self._idle) > _IDLE_CONNECTIONS) and _take_out(self._idle, first):
                first.close()

    def clear(self) -> None:
        """Close what is idle."""
        for connection in self._idle[:]:
            if _take_out(self._idle, connection):
                connection.close()

    def after_fork(self) -> None:
        """Close, in the child, every socket of the parent; not shut down: the parent uses them."""
        for connection in self.open:
            connection.sock.close()
        self._idle, self.open = [], set()


_POOL = _Pool()
atexit.register(_POOL.clear)  # else `python -X dev` complains of every socket that we kept


_ENVIRON, _HELD = os.environ, getattr(os.environ, "_data", None)


@lru_cache(maxsize=64)
def _env_key(name: str) -> Any:
    return _ENVIRON.encodekey(name)


def _first_env(*names: str) -> str:
    """Return the first of these variables that is set and not empty."""
    # os.environ raises and catches two errors for a name that is not set, and most are not: that
    # was a seventh of a hit.
    held = _HELD if os.environ is _ENVIRON else None  # tests put another in its place
    for name in names:
        if held is None:
            value = os.environ.get(name)
        else:
            raw = held.get(_env_key(name))
            value = raw and _ENVIRON.decodevalue(raw)
        if value:
            return str(value)
    return ""


class _Env:
    """What one call, or one batch, finds in the environment; looked up when first needed."""

    __slots__ = ("_ca", "_proxied", "_region", "endpoint")

    def __init__(self) -> None:
        self._ca: tuple[str, str, str] | None = None
        self._region: str | None = None
        self._proxied: dict[str, bool] = {}
        url = _first_env("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        ignored = url and _first_env("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
        self.endpoint = "" if ignored.lower() == "true" else url.rstrip("/")

    @property
    def region(self) -> str:
        if self._region is None:
            region = _first_env("AWS_REGION", "AWS_DEFAULT_REGION")
            self._region = region if _is_region(region) else ""
        return self._region

    @property
    def ca(self) -> tuple[str, str, str]:
        """What decides whom TLS trusts."""
        if self._ca is None:
            files = _first_env("SSL_CERT_FILE"), _first_env("SSL_CERT_DIR")
            bundles = "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"
            self._ca = _first_env(*bundles), *files
        return self._ca

    def proxied(self, scheme: str) -> bool:
        """Tell whether it is worth asking urllib for a proxy."""
        if scheme not in self._proxied:
            names = f"{scheme}_proxy", f"{scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY"
            elsewhere = sys.platform in ("darwin", "win32")  # settings of the system
            self._proxied[scheme] = elsewhere or bool(_first_env(*names))
        return self._proxied[scheme]


def _certifi() -> str:
    """Return certifi's bundle, if it is installed, where Python knows no authority at all.

    So it is with python.org's Python on macOS until somebody runs "Install Certificates".
    """
    import ssl
    from importlib.util import find_spec

    paths = ssl.get_default_verify_paths()
    known = paths.cafile or (paths.capath and os.listdir(paths.capath)) or os.name == "nt"
    found = None if known else find_spec("certifi")
    bundle = os.path.join(os.path.dirname(found.origin or ""), "cacert.pem") if found else ""
    return bundle if os.path.isfile(bundle) else ""


@lru_cache(maxsize=8)
def _tls_context(settings: tuple[str, str, str]) -> ssl.SSLContext:
    """Make a TLS context once per setting: loading a bundle takes 10 to 30 ms."""
    import ssl

    bundle = settings[0] or settings[1] or ("" if settings[2] else _certifi())
    where: Any = {"capath" if os.path.isdir(bundle) else "cafile": bundle} if bundle else {}
    try:
        context = ssl.create_default_context(**where)  # SSL_CERT_DIR is OpenSSL's own business
    except OSError as error:
        hint = "Check AWS_CA_BUNDLE, REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE and SSL_CERT_FILE"
        message = f"Cannot load the CA bundle {bundle}: {error.strerror or 'no certificate in it'}"
        raise TransferError(message, hint=hint) from None
    context.options &= ~0x80  # OP_IGNORE_UNEXPECTED_EOF, which 3.9 sets: a cut would be an end
    return context


_CHECK_PROXIES = "Check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"


def _proxy(origin: Origin) -> _Place | None:
    """Return the proxy for this origin, by the rules of ``urllib.request``."""
    scheme, host, port = origin
    with _IMPORTS:
        from urllib.request import getproxies, proxy_bypass

    # Asked each time: proxies change within a session, as notebooks move between networks.
    proxies = getproxies()
    url = proxies.get(scheme) or proxies.get("all")
    if not url or proxy_bypass(f"{host}:{port}"):
        return None
    try:
        place = _place(url if "://" in url else f"http://{url}")
    except ValueError:
        text = f"Unusable proxy setting: {_redact_bad(url)}"
        raise TransferError(text, hint=_CHECK_PROXIES) from None
    if place.origin[0] != "http":
        hint = f"Use an http:// proxy. {_CHECK_PROXIES}"
        raise TransferError(f"Unsupported proxy: {place}", hint=hint)
    return place


def _dial(origin: Origin, deadline: float) -> Socket:
    """Connect to the first address of a host that answers."""
    import socket

    # All addresses are tried in the resolver's order. Racing IPv4 against IPv6 was left out:
    # two sockets for each connection, to save 10 s where one of the two is broken.
    last: OSError = OSError(errno.EHOSTUNREACH, "no address")
    for family, kind, proto, _, address in socket.getaddrinfo(*origin[1:], 0, socket.SOCK_STREAM):
        left = min(_CONNECT_TIMEOUT, deadline - time.monotonic())
        if left <= 0:
            raise TimeoutError
        sock: Socket | None = None
        try:
            sock = socket.socket(family, kind, proto)  # a kernel without IPv6 refuses its own
            sock.settimeout(left)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        except BaseException as error:
            if sock:
                sock.close()
            if not isinstance(error, OSError) or _is_of_handler(error):
                raise
            last = error
    raise last


def _timed_out(error: Exception) -> bool:
    return isinstance(error, TimeoutError) or type(error).__name__ == "timeout"  # 3.9's


def _raise_wire(error: Exception, place: _Place, proxy: _Place | None = None) -> NoReturn:
    """Raise the error of ours for what went wrong on a socket: likely cause and next step.

    It names the proxy whose socket it is, if any. What is ours or a handler's is raised as it is.
    """
    import socket

    if isinstance(error, S3CacheError) or _is_of_handler(error):
        raise error
    kind, place = ("proxy ", proxy) if proxy else ("", place)
    where = kind + _address(place.origin, True)
    number = getattr(error, "errno", None)
    if any(cls.__name__ == "SSLError" for cls in type(error).__mro__):
        number = None  # it is OpenSSL's, whose 1 and 8 are no EPERM and ENOEXEC
    # Ours to solve, not the network's: retrying would only keep the files busy.
    if number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
        message = f"Cannot open a connection: {os.strerror(number)}"
        raise CacheError(message, errno=number, hint="Raise `ulimit -n`") from None
    hint, retry = _CHECK_PROXIES if proxy else None, "soon"
    if isinstance(error, socket.gaierror):
        message = f"Cannot resolve {kind}{place.origin[1]}"
        hint = hint or "Check the name, the endpoint and the network"
        retry = "soon" if number == socket.EAI_AGAIN else "once"
    elif _timed_out(error):
        message, number = f"Timed out waiting for {where}", errno.ETIMEDOUT
    elif type(error).__name__ == "SSLCertVerificationError":
        reason = getattr(error, "verify_message", "")
        message, retry = f"Cannot trust the certificate of {where}: {reason}", "no"
        hint = "Behind a company proxy, set AWS_CA_BUNDLE or SSL_CERT_FILE to its CA bundle"
    else:
        reason = str(error)
        if number and number > 0 and os.name == "posix":
            reason = os.strerror(number)
        message = f"Connection to {where} failed: {_printable(reason)}"
        if number == errno.ECONNREFUSED:
            hint = hint or "Check the endpoint, and that its server runs"
    raise TransferError(message, errno=number, hint=hint, retry=retry) from None


def _tunnel(sock: Socket, place: _Place, proxy: _Place, deadline: float) -> None:
    """Ask the proxy for a tunnel (RFC 9110, 9.3.6)."""
    target, login = _address(place.origin, True), proxy.login("Proxy-Authorization")
    text = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{login}\r\n"
    wire = _Connection(sock, (proxy.origin,))
    try:
        sock.sendall(text.encode("latin-1"))
        sock.settimeout(_STALL_TIMEOUT)  # as `receive` expects
        head = wire.until(b"\r\n\r\n", deadline)
    except OSError as error:
        _raise_wire(error, place, proxy)
    status, _, _ = _parse_head(head)
    if status != 200 or wire.data:
        kind = _retry_kind(status, None)
        raise TransferError(f"Proxy {proxy} refuses a tunnel", status=status, retry=kind)


class _Body:
    """The body of one answer. Exact: a body cut short is an error, and one too long is dropped."""

    __slots__ = ("chunked", "connection", "keep", "left", "place")

    def __init__(
        self, connection: _Connection, place: _Place, bare: bool, headers: dict[str, str], new: bool
    ) -> None:
        # How long it is (RFC 9112, 6.3); not chunked and None: the connection's end is its own.
        self.left, self.chunked = _content_length(headers), False
        coding = headers.get("transfer-encoding")
        if bare:
            self.left = 0
        elif coding is not None:
            if coding.lower() != "chunked":
                text = _printable(coding[:80])
                raise TransferError(f"Malformed answer: Transfer-Encoding {text!r}")
            self.left, self.chunked = None, True
        says = headers.get("connection", "").lower()
        # Chunks are not of HTTP/1.0: somebody between us may have framed them anew (RFC 9112, 6.1).
        keep = "close" not in says if new else "keep-alive" in says and coding is None
        # Both lengths at once are how requests are smuggled: chunks win, the connection goes
        # (RFC 9112, 6.1).
        both = coding is not None and headers.pop("content-length", None) is not None
        self.keep = keep and not both and (self.chunked or self.left is not None)
        self.connection: _Connection | None = connection
        self.place = place
        connection.slow_bytes = 0
        if self.left == 0:
            self._end()

    def _end(self) -> None:
        connection, self.connection = self.connection, None
        if connection:
            # More than was announced, whatever it is, answers no request of ours.
            _POOL.give(connection) if self.keep and not connection.data else connection.close()

    def stop(self) -> None:
        """Wake whoever reads."""
        connection = self.connection
        if connection:
            connection.stop()

    def close(self) -> None:
        """Leave the body; what was not read takes its connection with it."""
        connection, self.connection = self.connection, None
        if connection:
            connection.close()

    def _next_chunk(self, connection: _Connection) -> int:
        """Read a chunk's size line, and after the last chunk the trailers (RFC 9112, 7.1)."""
        deadline = time.monotonic() + _HEAD_TIMEOUT
        # The line end after a chunk; anything else means that we lost our place.
        if self.left == 0 and connection.until(b"\r\n", deadline):
            raise TransferError("Malformed answer: chunk framing")
        line = connection.until(b"\r\n", deadline).partition(b";")[0].strip()
        if not line or not _HEX.issuperset(line.decode("latin-1").lower()) or len(line) > 15:
            raise TransferError("Malformed answer: chunk framing")
        size = int(line, 16)
        if size == 0:
            for _ in range(100):
                if not connection.until(b"\r\n", deadline):
                    self._end()
                    return 0
            raise TransferError("Malformed answer: endless trailers")
        return size

    def readinto(self, view: memoryview) -> int:
        """Fill a part of view; 0 at the end of the body.

        Raises TransferError if the connection ends, stalls or crawls before the body is whole.
        """
        connection = self.connection
        if connection is None:
            return 0
        try:
            if self.chunked and not self.left:
                self.left = self._next_chunk(connection)
                if not self.left:
                    return 0
            size = connection.take(view if self.left is None else view[: self.left])
            if size == 0:
                if self.left is None:
                    self._end()
                    return 0
                host = _address(self.place.origin)
                raise TransferError(f"Connection to {host} lost: body cut short", retry="soon")
        except (OSError, ValueError) as error:
            self.close()
            _raise_wire(error, self.place)
        except BaseException:
            self.close()
            raise
        if self.left is not None:
            self.left -= size
            if self.left == 0 and not self.chunked:
                self._end()
        return size


def _read_up_to(body: Reader, limit: int, cut: bool = False) -> bytearray:
    """Return at most limit bytes of a body, which may be cut short if so told, and leave it."""
    data, view = bytearray(), memoryview(bytearray(65536))
    try:
        while len(data) < limit:
            size = body.readinto(view)
            if not size:
                break
            data += view[:size]
    except TransferError:
        if not cut:
            raise
    finally:
        body.close()
    del data[limit:]
    return data


def _read_error(body: Reader) -> bytes:
    """Return what comes of an error's body: its status counts, however it ends."""
    return bytes(_read_up_to(body, _ERROR_LIMIT, cut=True))


class _Exchange:
    """One GET or HEAD and its answer, on a kept connection if there is one.

    A kept connection may be dead and not know it: that costs one attempt on a new one, no retry.
    """

    __slots__ = ("env", "fields", "key", "method", "place", "proxy", "read", "sent", "switch")

    def __init__(
        self, place: _Place, env: _Env, switch: _Stop | None, fields: Fields, method: str = "GET"
    ) -> None:
        self.place, self.env, self.switch = place, env, switch
        self.fields, self.method = fields, method
        self.proxy: _Place | None = None
        self.sent: _Connection | None = None  # where the request is on its way
        self.read: Reply | None = None  # of its answer, ahead

    def _route(self) -> None:
        """Find the proxy, and the key of the connections that go this way."""
        origin = self.place.origin
        self.proxy = proxy = _proxy(origin) if self.env.proxied(origin[0]) else None
        login = proxy and (proxy.origin, proxy.auth)
        ca = self.env.ca if origin[0] == "https" else None
        self.key: tuple[Any, ...] = origin, login, ca

    def _connect(self) -> _Connection:
        """Open a connection, through a proxy and TLS where needed."""
        place, proxy = self.place, self.proxy
        _TURN.leave()
        context: ssl.SSLContext | None = None
        if place.origin[0] == "https":
            with _IMPORTS:  # and one thread loads the certificates for all
                context = _tls_context(self.env.ca)
        deadline = time.monotonic() + _CONNECT_TOTAL
        try:
            sock = _dial((proxy or place).origin, deadline)
        except OSError as error:
            _raise_wire(error, place, proxy)
        try:
            if context:
                if proxy:
                    _tunnel(sock, place, proxy, deadline)
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                name = place.origin[1].removesuffix(".")  # no certificate has the root's dot
                # Without close_notify a cut connection looks like an end: ragged ends are errors.
                sock = context.wrap_socket(sock, server_hostname=name, suppress_ragged_eofs=False)
            sock.settimeout(_STALL_TIMEOUT)
        except BaseException:
            sock.close()
            raise
        connection = _Connection(sock, self.key)
        _POOL.open.add(connection)
        return connection

    def _send(self, connection: _Connection) -> None:
        place, proxy = self.place, self.proxy
        host, target, login = _address(place.origin), place.target, place.login("Authorization")
        if proxy and place.origin[0] == "http":
            target = f"http://{host}{target}"
            login += proxy.login("Proxy-Authorization")
        fields = "".join([f"{name}: {value}\r\n" for name, value in self.fields.items()])
        text = (
            f"{self.method} {target} HTTP/1.1\r\nHost: {host}\r\n"
            f"User-Agent: aind-s3-cache/{__version__}\r\nAccept: */*\r\n"
            f"Accept-Encoding: identity\r\n{login}{fields}\r\n"
        )
        connection.switch = self.switch
        try:
            if self.switch:
                self.switch.hold(connection)
            connection.sock.sendall(text.encode("latin-1"))
        except BaseException:
            connection.close()
            raise

    def _receive(self, connection: _Connection) -> Reply:
        """Read the head of the answer to the request that was sent last."""
        try:
            _TURN.pause()
            deadline = time.monotonic() + _HEAD_TIMEOUT
            for _ in range(10):  # informational ones (RFC 9110, 15.2); nobody sends more than two
                status, headers, new = _parse_head(connection.until(b"\r\n\r\n", deadline))
                if status >= 200:
                    break
            else:
                raise TransferError("Malformed answer: endless 1xx")
            _TURN.resume()
            bare = self.method == "HEAD" or status in (204, 304)
            body = _Body(connection, self.place, bare, headers, new)
        except BaseException:
            connection.close()
            raise
        _log(_DEBUG, "%s %s: %d", self.method, self.place, status)
        return status, headers, body

    def send_ahead(self) -> None:
        """Send the request, to read the answer later."""
        self._route()
        connection = _POOL.take(self.key) or self._connect()
        self._send(connection)
        self.sent = connection

    def read_ahead(self) -> None:
        """Read the head of the answer to a request that was sent ahead, if it has come."""
        sent = self.sent
        try:
            if sent and sent.has_head():
                self.sent = None  # if it cannot be read, the connection goes, and we ask again
                self.read = self._receive(sent)
        except OSError as error:
            if _is_of_handler(error):
                raise

    def close(self) -> None:
        """Leave a request that was sent ahead, if nobody wants its answer."""
        sent, self.sent = self.sent, None
        read, self.read = self.read, None
        if read:
            read[2].close()
        elif sent:
            sent.close()

    def answer(self) -> Reply:
        """Return status, headers and body; of what sockets and TLS raise, only errors of ours."""
        read, self.read = self.read, None
        if read:
            return read
        sent, self.sent = self.sent, None
        try:
            if not sent:
                self._route()
            kept = sent or _POOL.take(self.key)
            if kept:
                try:
                    if not sent:
                        self._send(kept)
                    return self._receive(kept)
                except OSError as error:
                    ours = isinstance(error, S3CacheError)  # it is told already what went wrong
                    if ours or _timed_out(error) or _is_of_handler(error):
                        raise
            if self.switch:
                self.switch.check()
            new = self._connect()
            self._send(new)
            return self._receive(new)
        except (OSError, ValueError) as error:
            if self.switch and not _is_of_handler(error):
                self.switch.check()
            proxy = self.proxy if self.place.origin[0] == "http" else None  # else it is behind TLS
            _raise_wire(error, self.place, proxy)


def _redirected(place: _Place, location: str) -> _Place:
    """Return where a redirect leads, or refuse it: http(s) only, and never from https to http."""
    from urllib.parse import urljoin, urlsplit

    scheme = place.origin[0]
    base = f"{scheme}://{_address(place.origin)}{place.target}"
    location = location.encode("latin-1").decode("utf-8", "surrogateescape")
    try:
        parts = urlsplit(location)
        where = location
        if not parts.scheme and parts.path and parts.path[0] != "/":
            # From a relative path `urljoin` makes one "/" of two; "/." keeps a first "//" a path.
            where = f"/.{place.target.partition('?')[0].rpartition('/')[0]}/{location}"
        new = _place(urljoin(base, where))
    except ValueError:
        raise TransferError(f"Refused a redirect to {_redact_bad(location)}") from None
    if (scheme, new.origin[0]) == ("https", "http"):
        raise TransferError(f"Refused a redirect from https to http: {new}")
    auth = place.auth if new.origin == place.origin else None
    return _Place(new.origin, new.target, auth)


def _follow(exchange: _Exchange) -> Reply:
    """Follow the redirects of a GET; their bodies are never read."""
    for _ in range(_REDIRECTS + 1):
        status, headers, body = exchange.answer()
        if status not in (301, 302, 303, 307, 308) or "location" not in headers:
            return status, headers, body
        # Unread: a redirect may carry an endless body, as curl's test 477 shows.
        body.close()
        place = _redirected(exchange.place, headers["location"])
        exchange = _Exchange(place, exchange.env, exchange.switch, exchange.fields)
    raise TransferError(f"More than {_REDIRECTS} redirects, the last one to {exchange.place}")


class _Quota:
    """Retries of the whole process: when everything fails, stop hammering."""

    def __init__(self) -> None:
        self.tokens = _RETRY_TOKENS

    def take(self) -> bool:
        if self.tokens < _RETRY_COST:
            return False
        self.tokens -= _RETRY_COST  # by two threads at once it may be too much: no harm
        return True

    def give(self, count: int = 1) -> None:
        self.tokens = min(_RETRY_TOKENS, self.tokens + count)


_QUOTA = _Quota()


class _Patience:
    """A retry budget, refilled by progress; ``sleep`` and ``clock`` are arguments for tests."""

    def __init__(
        self,
        switch: _Stop | None = None,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        gauge: Callable[[], int] = int,
    ) -> None:
        self.switch, self.clock = switch, clock
        self.gauge, self.reached = gauge, 0  # what others bring is progress, too
        self.sleep = sleep or (switch.event.wait if switch else time.sleep)
        self.attempt, self.since = 0, clock()

    def heard(self) -> None:
        """Count the time from now on, for bytes came; not the attempts, for they may be in vain."""
        self.since = self.clock()

    def progress(self) -> None:
        self.heard()
        self.attempt = 0

    def after(self, error: S3CacheError) -> None:
        """Wait before the next attempt, or raise the error."""
        # `random` would do, and imports hashlib and more; this is one system call.
        chance = int.from_bytes(os.urandom(4), "big") / 2**32
        reached = self.gauge()
        if reached > self.reached:
            self.reached = reached
            self.progress()
        elapsed = self.clock() - self.since
        delay = _retry_delay(error._retry, self.attempt, elapsed, error._retry_after, chance)
        if delay is None or not _QUOTA.take():
            error.attempts = max(error.attempts, self.attempt + 1)
            error._retry = "no"  # whoever called us has no patience of its own to add
            raise error
        self.attempt += 1
        _TURN.leave()
        _log(_DEBUG, "retry %d in %.2f s: %s", self.attempt, delay, error)
        self.sleep(delay)
        if self.switch:
            self.switch.check()

    def insist(self, act: Callable[[], T]) -> T:
        """Act until it succeeds, or patience ends."""
        while True:
            try:
                return act()
            except TransferError as error:
                self.after(error)


# ==== 6 Sources ===================================================================================
# Three senders behind one ``read(fields) -> _Answer``. 200, 206, 304, 412 and 416 are answers;
# everything else is raised. The only section that names boto3.

_REGIONS: dict[tuple[str, str], str] = {}  # (world, bucket) -> region, learnt from redirects
_SIGNED_BUCKETS: set[tuple[str, str]] = set()  # (endpoint, bucket) that refused us unsigned
_CLIENTS: dict[tuple[tuple[str, Any], ...], Any] = {}  # our own, by the environment of each
_DIRECTORY_BUCKET = "--x-s3", "--xa-s3"  # how the names of such and of their access points end


class _Source:
    """What all sources have in common."""

    kind = "http"
    private = False  # what it brings is for the owner only
    signed = False  # with keys: whoever has none may be told to come with them
    uri = ""
    name = ""  # the object's own name, to be cleaned before it names a file
    version: str | None = None
    place_id: tuple[str, ...] = ()  # everything that makes it this object and no other

    def read(self, fields: Fields, switch: _Stop | None, begun: _Exchange | None = None) -> _Answer:
        """Ask for a range, or for all, under conditions; or read what was begun by asking so."""
        raise NotImplementedError

    def exchange(self, fields: Fields, switch: _Stop | None) -> _Exchange | None:
        """Return the exchange that asks so, None where it is not ours to send."""
        return None

    def _answer(self, status: int, headers: dict[str, str], body: Reader) -> _Answer:
        """Turn an answer into a value, or into the error that it is."""
        if status not in (200, 206, 304, 412, 416):
            raise self._error(status, headers, _read_error(body))
        try:
            return _Answer(status, headers, body)
        except S3CacheError:
            body.close()
            raise

    def _error(
        self, status: int, headers: dict[str, str], body: bytes, code: str | None = None
    ) -> S3CacheError:
        """Return the error that an answer means, with the likely cause and the next step."""
        told: dict[str, str] = {}
        if self.kind == "s3" and not code:  # botocore, too, takes the status for one not told
            told = _parse_error(body)
            code = told.get("Code") or _S3_CODES.get(status, str(status))
        cls = _REFUSALS.get(_CODE_STATUS.get(code or "", status), S3CacheError)
        retry = _retry_kind(status, code)
        refused = code in (_EXPIRED_CODES if self.signed else _UNSIGNED_CODES)
        # Of any request without a signature Cloudflare's R2 says: InvalidArgument, Authorization;
        # and versitygw: InvalidArgument, Authorization header is invalid.
        if status == 400 and (refused or told.get("Message", "").startswith("Authorization")):
            cls = AccessDeniedError
        if status >= 500 or retry != "no":
            cls = TransferError
        hint = _HINTS.get(code or "")
        if code in _EXPIRED_CODES:
            hint = "The credentials have expired: log in again, or use anonymous=True"
        elif self.signed and code == "AccessDenied":
            hint = "Missing, or these credentials may not read it"
        elif code == "NoSuchKey" and self.uri != self.uri.rstrip():
            hint = "The key ends in white space: strip the line that it was read from"
        elif status == 511:
            hint = "The network wants a login first (captive portal)"
        what = "S3 object" if self.kind == "s3" else "URL"
        missing = issubclass(cls, FileNotFoundError)
        text = "not found or inaccessible" if missing else "failed: the server cannot or will not"
        return cls(
            f"{what} {text}",
            uri=self.uri,
            status=status,
            code=code and _printable(code[:80]),
            hint=hint,
            retry=retry,
            retry_after=_retry_after(headers, time.time()),
        )


class _HTTP(_Source):
    """A file behind an http(s) URL."""

    def __init__(self, url: str, env: _Env) -> None:
        from urllib.parse import unquote

        self.place, self.env = _place(url), env
        self.uri = _redact(url)
        self.name = unquote(self.place.target.partition("?")[0].rpartition("/")[2])
        self.place_id = ("http", url.partition("#")[0])
        # A password or a presigned query is a credential: what it brings is nobody else's.
        self.private = self.place.auth is not None or "?" in self.place.target

    def read(self, fields: Fields, switch: _Stop | None, begun: _Exchange | None = None) -> _Answer:
        return self._answer(*_follow(begun or self.exchange(fields, switch)))

    def exchange(self, fields: Fields, switch: _Stop | None) -> _Exchange:
        return _Exchange(self.place, self.env, switch, fields)


@lru_cache(maxsize=16)
def _endpoint_place(endpoint: str) -> _Place:
    try:
        place = _place(endpoint)
        if "?" in place.target:  # the key would become a part of it
            raise ValueError(f"Not a valid endpoint: '{_redact_bad(endpoint)}' has a query")
    except ValueError as error:
        raise ValueError(f"AWS_ENDPOINT_URL: {error} (expected http://host:port)") from None
    return place


@lru_cache(maxsize=64)
def _endpoint_id(endpoint: str) -> str:
    """Return what tells one world of buckets from another: AWS's partitions, or the endpoint."""
    host = endpoint.partition("://")[2].partition("/")[0].rpartition("@")[2].lower()
    # Load balancers, EC2 and gateways have names of AWS's, too, and buckets of their own.
    is_s3 = not {"s3", "s3-fips"}.isdisjoint(host.split("."))
    for suffix in ("amazonaws.com", *_PARTITIONS.values()):
        if is_s3 and host.endswith("." + suffix):
            return suffix
    return endpoint.rstrip("/")


class _S3(_Source):
    """What unsigned and signed S3 share."""

    kind = "s3"

    def __init__(self, bucket: str, key: str, version: str | None, endpoint: str) -> None:
        self.bucket, self.key, self.version, self.endpoint = bucket, key, version, endpoint
        self.uri = f"s3://{bucket}/{key}"
        self.name = key.rstrip("/").rpartition("/")[2]
        self.private = "@" in endpoint  # a login, without which nobody finds the entry again
        self.place_id = ("s3", _endpoint_id(endpoint), bucket, key, version or "")

    def _answer(self, status: int, headers: dict[str, str], body: Reader) -> _Answer:
        if status in (200, 206):
            framed = "content-length" in headers or "transfer-encoding" in headers
            if "etag" not in headers or not framed:
                body.close()
                hint = "A captive portal, a proxy or a wrong endpoint may have answered"
                raise TransferError("Not an S3 answer: no ETag or length", uri=self.uri, hint=hint)
        return super()._answer(status, headers, body)

    def list_page(self, prefix: str, token: str | None, switch: _Stop | None) -> Page:
        """Return a page of the objects below a prefix, and the token of the next."""
        raise NotImplementedError

    def child(self, key: str) -> _S3:
        """Return the source of another object of the bucket, asked for in the same way."""
        raise NotImplementedError


class _Unsigned(_S3):
    """S3 without credentials: path style on a configured endpoint, else AWS's own addressing."""

    def __init__(self, bucket: str, key: str, version: str | None, env: _Env) -> None:
        super().__init__(bucket, key, version, env.endpoint)
        self.env = env
        self._query = f"?versionId={_quote(version, _WORD)}" if version else ""
        if not self.endpoint:
            self.place_id = ("s3", _dns_suffix(env.region), bucket, key, version or "")

    def _at(self, key: str, query: str) -> _Place:
        """Return where an object, or with an empty key the bucket, is asked for."""
        if not self.endpoint:
            # What a bucket told us is surer than what the environment guesses.
            region = _REGIONS.get((self.place_id[1], self.bucket)) or self.env.region
            return _aws_place(self.bucket, key, region, query)
        base = _endpoint_place(self.endpoint)
        path = f"{base.target.rstrip('/')}/{self.bucket}/{_quote(key)}{query}"
        return _Place(base.origin, path, base.auth)

    def _region(self, headers: dict[str, str], body: bytes, switch: _Stop | None) -> str:
        """Return the bucket's region that an answer tells; ask the bucket if it does not.

        ``Location`` and ``<Endpoint>`` are never used: who controls them would choose the host.
        """
        told = headers.get("x-amz-bucket-region") or _parse_error(body).get("Region", "")
        if not told:
            exchange = _Exchange(self._at("", ""), self.env, switch, {}, "HEAD")
            _, headers, reply = exchange.answer()
            reply.close()
            told = headers.get("x-amz-bucket-region", "")
        return told if _is_region(told) else ""

    def _settled(self, exchange: _Exchange, key: str, query: str) -> Reply:
        """Return the answer; ask once more where the bucket's region is another than we thought."""
        status, headers, body = reply = exchange.answer()
        moved = status in (301, 302, 307, 308)
        if not moved and status != 400:
            return reply
        text = _read_error(body)
        # What is said of a bucket in a region that accounts have to opt in to; it is not named.
        opt_in = _parse_error(text).get("Code") == "IllegalLocationConstraintException"
        if not (moved or opt_in or "x-amz-bucket-region" in headers):
            raise self._error(status, headers, text)
        region = self._region(headers, text, exchange.switch)
        if region:
            _log(_DEBUG, "%s is in %s", self.bucket, region)
            _REGIONS[self.place_id[1], self.bucket] = region
            again = _Exchange(self._at(key, query), self.env, exchange.switch, exchange.fields)
            there, here = again.place, exchange.place
            if moved or (there.origin, there.target) != (here.origin, here.target):
                return again.answer()
        raise self._error(status, headers, text, None if text else "PermanentRedirect")

    def exchange(self, fields: Fields, switch: _Stop | None) -> _Exchange:
        fields = {**fields, "x-amz-checksum-mode": "ENABLED"}
        return _Exchange(self._at(self.key, self._query), self.env, switch, fields)

    def read(self, fields: Fields, switch: _Stop | None, begun: _Exchange | None = None) -> _Answer:
        exchange = begun or self.exchange(fields, switch)
        return self._answer(*self._settled(exchange, self.key, self._query))

    def list_page(self, prefix: str, token: str | None, switch: _Stop | None) -> Page:
        query = f"?list-type=2&encoding-type=url&prefix={_quote(prefix, _WORD)}"
        if token:
            query += f"&continuation-token={_quote(token, _WORD)}"
        exchange = _Exchange(self._at("", query), self.env, switch, {})
        status, headers, body = self._settled(exchange, "", query)
        if status != 200:
            raise self._error(status, headers, _read_error(body))
        page = bytes(_read_up_to(body, _LIST_LIMIT))  # cut there it is no XML
        try:
            return _parse_listing(page)
        except ValueError as error:  # S3 may send an error under 200: as good as a 500
            message = f"Unusable listing: {_printable(str(error))}"
            raise TransferError(message, uri=self.uri, retry="soon") from None

    def child(self, key: str) -> _S3:
        return _Unsigned(self.bucket, key, None, self.env)


class _Stream:
    """The body of a boto3 answer as a reader that raises errors of ours."""

    def __init__(self, body: Any, source: _Signed, switch: _Stop | None) -> None:
        self._body, self._source, self._switch = body, source, switch
        self._reading = self._closed = False
        try:
            if switch:
                switch.hold(self)
        except BaseException:
            self.close()
            raise

    def readinto(self, view: memoryview) -> int:
        self._reading, handled = True, sys.exc_info()[1]
        try:
            data = self._body.read(min(len(view), _CHUNK))  # if that breaks, all of it is lost
        except Exception as error:
            if self._switch:
                self._switch.check()
            raise self._source.translated(error, handled) from None
        finally:
            self._reading = False
            if self._closed:
                self._body.close()
        view[: len(data)] = data
        return len(data)

    def stop(self) -> None:
        """Wake whoever reads."""
        raw = getattr(self._body, "_raw_stream", None)
        sock = getattr(getattr(raw, "_connection", None), "sock", None)
        if sock is not None:
            _shut_down(sock)

    def close(self) -> None:
        """Close, or let the thread that reads do so: it would have to be waited for."""
        if self._switch:
            self._switch.drop(self)
        self._closed = True
        if not self._reading and hasattr(self._body, "close"):  # a double may have none
            self._body.close()


class _Signed(_S3):
    """S3 through a boto3 client: it signs and sends, everything else stays ours."""

    def __init__(
        self, client: Any, bucket: str, key: str, version: str | None, own: bool = False
    ) -> None:
        meta = getattr(client, "meta", None)
        super().__init__(bucket, key, version, str(getattr(meta, "endpoint_url", "")))
        self.client, self.own = client, own  # and not a caller's, which decides for itself
        unsigned = getattr(sys.modules.get("botocore"), "UNSIGNED", None)
        version_of = getattr(getattr(meta, "config", None), "signature_version", None)
        # A caller's unsigned client brings public bytes: no reason to hide them.
        self.signed = unsigned is None or version_of is not unsigned
        self.private = self.private or self.signed

    def _refused(self, said: dict[str, Any], operation: str) -> S3CacheError:
        """Return the error of ours for what S3, or for an operation of theirs STS or SSO, said."""
        meta = said.get("ResponseMetadata", {})
        headers = {k.lower(): str(v) for k, v in meta.get("HTTPHeaders", {}).items()}
        code = str(said.get("Error", {}).get("Code") or "")
        status = meta.get("HTTPStatusCode") or _digits(code) or _CODE_STATUS.get(code, 0)
        code = "" if code.isdigit() else code  # botocore's stand-in for an empty body
        made = self._error(status, headers, b"", code or None)
        if operation in ("GetObject", "ListObjectsV2"):
            return made
        # It says nothing of the object.
        return (TransferError if isinstance(made, TransferError) else AccessDeniedError)(
            f"boto3 got no credentials from {operation}",
            uri=self.uri,
            status=status,
            code=made.code,
            hint=made.hint if code in _EXPIRED_CODES else None,
            retry=made._retry,
            retry_after=made._retry_after,
        )

    def translated(self, error: Exception, handled: BaseException | None) -> Exception:
        """Return the error of ours for one of botocore's; NoCredentialsError stays what it is.

        A signal handler's error is its caller's, though botocore and urllib3 wrap it; ``handled``
        is what the caller was handling before, and so none of this call's.
        """
        cause: BaseException | None = error
        while isinstance(cause, Exception) and cause is not handled:
            if _is_of_handler(cause):
                return cause
            cause = cause.__context__
        said = getattr(error, "response", None)
        if isinstance(said, dict):
            return self._refused(said, str(getattr(error, "operation_name", "GetObject")))
        name = type(error).__name__
        bases = {cls.__name__ for cls in type(error).__mro__}
        if "NoCredentialsError" in bases:
            return error
        if "FlexibleChecksumError" in bases:
            return IntegrityError("The bytes do not match their checksum", uri=self.uri)
        lost = {"HTTPClientError", "IncompleteReadError", "ConnectionError", "TimeoutError"}
        if bases & lost or "SSLError" in bases:  # amid a body it is urllib3's, no ConnectionError
            hint, retry = None, "soon"
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                hint, retry = "Behind a company proxy, set AWS_CA_BUNDLE to its CA bundle", "no"
            message = f"boto3 could not reach S3 ({name})"
            return TransferError(message, uri=self.uri, hint=hint, retry=retry)
        if "BotoCoreError" in bases:
            # Ours is well set up: it finds no keys any more. What is public needs none.
            cls = AccessDeniedError if self.own else S3CacheError
            return cls(f"boto3 refuses ({name}): {error}", uri=self.uri)
        return error

    def _call(self, operation: str, **kwargs: object) -> Any:
        handled = sys.exc_info()[1]
        try:
            _TURN.leave()
            _log(_DEBUG, "boto3 %s %s", operation, self.uri)
            return getattr(self.client, operation)(
                **{name: value for name, value in kwargs.items() if value is not None}
            )
        except Exception as error:
            translated = self.translated(error, handled)
            bad_keys = getattr(translated, "code", None) in _BAD_KEYS
            if bad_keys and self.client in list(_CLIENTS.values()):
                _CLIENTS.clear()  # who logs in again must not meet them again
            if translated is error:
                raise
            raise translated from None

    def read(self, fields: Fields, switch: _Stop | None, begun: _Exchange | None = None) -> _Answer:
        from io import BytesIO

        if switch:
            switch.check()
        span = fields.get("Range")
        try:
            got = self._call(
                "get_object",
                Bucket=self.bucket,
                Key=self.key,
                VersionId=self.version,
                Range=span,
                IfMatch=fields.get("If-Match"),
                IfNoneMatch=fields.get("If-None-Match"),
                ChecksumMode="ENABLED" if self.own and span is None else None,
            )
        except S3CacheError as error:
            if error.status in (304, 412, 416):
                return _Answer(error.status, {}, BytesIO())
            raise
        meta = got.get("ResponseMetadata", {})
        headers = {k.lower(): str(v) for k, v in meta.get("HTTPHeaders", {}).items()}
        if "etag" not in headers and got.get("ETag"):
            headers["etag"] = got["ETag"]
        if got.get("ContentLength") is not None and "transfer-encoding" not in headers:
            headers.setdefault("content-length", str(got["ContentLength"]))
        if got.get("ContentRange"):
            headers["content-range"] = got["ContentRange"]
        status = meta.get("HTTPStatusCode") or (206 if "content-range" in headers else 200)
        body = got["Body"]
        if span is not None:
            return self._answer(status, headers, _Stream(body, self, switch))
        # Nothing is joined to it: what a test's double of a client leaves out is not missed.
        if "content-length" not in headers and not type(body).__module__.startswith("botocore"):
            body = BytesIO(body.read())  # such a body may give all of itself each time
        return _Source._answer(self, status, headers, _Stream(body, self, switch))

    def list_page(self, prefix: str, token: str | None, switch: _Stop | None) -> Page:
        page = self._call(
            "list_objects_v2", Bucket=self.bucket, Prefix=prefix, ContinuationToken=token
        )
        found, more = page.get("Contents", ()), page.get("IsTruncated")
        following = page.get("NextContinuationToken") if more else None
        # botocore takes any XML, and an empty page, for a listing in which everything is left out.
        is_whole = following if more else found or more is False
        if not is_whole or not all("Key" in k and "Size" in k for k in found):
            raise TransferError("Unusable listing", uri=self.uri, retry="soon")
        keys = [
            _Key(k["Key"], k.get("ETag", ""), k["Size"], str(k.get("LastModified"))) for k in found
        ]
        return keys, following

    def child(self, key: str) -> _S3:
        return _Signed(self.client, self.bucket, key, None, self.own)


_CLIENT_LOCK = threading.RLock()  # a signal handler may call us
_NO_CREDENTIALS: dict[tuple[tuple[str, Any], ...], float] = {}


def _default_session() -> Any:
    """Return boto3's default session if the caller has set it up, as 0.1 used it; else None."""
    session = getattr(sys.modules.get("boto3"), "DEFAULT_SESSION", None)
    inner = getattr(session, "_session", None)
    keys = getattr(inner, "_credentials", None)
    # One that boto3 made by itself says no more than the environment, and that of a former time.
    by_hand = inner and (inner.instance_variables() or getattr(keys, "method", "") == "explicit")
    return session if by_hand else None


def _new_client(required: bool, offline: bool, session: Any) -> tuple[Any, bool]:
    """Return a boto3 client, and whether it has credentials; without, only one that is required."""
    with _IMPORTS:
        import boto3.session  # pyright: ignore[reportMissingImports]
        from botocore import exceptions  # pyright: ignore[reportMissingImports]
        from botocore.config import Config  # pyright: ignore[reportMissingImports]

    # Offline EC2 must not be asked for keys nor, by the mode "auto", for the region.
    key = "offline" if offline else None
    mode: Any = {"defaults_mode": "legacy"} if offline else {}
    session = session or boto3.session.Session(key, key)
    credentials = session.get_credentials()
    if credentials is None and not required:
        return None, False
    try:
        if credentials is not None:
            credentials.get_frozen_credentials()  # those that have expired say so here
    except (exceptions.ConnectionError, exceptions.HTTPClientError, exceptions.ClientError):
        pass  # the request meets it again, and may be retried
    config = Config(
        retries={"total_max_attempts": 1},  # we retry, with what we know of the transfer
        max_pool_connections=_IDLE_CONNECTIONS,
        connect_timeout=_CONNECT_TIMEOUT,
        read_timeout=_STALL_TIMEOUT,
        **mode,
    )
    region = _first_env("AWS_REGION", "AWS_DEFAULT_REGION") or None
    return session.client("s3", region_name=region, config=config), credentials is not None


def _own_client(required: bool, endpoint: str, offline: bool = False) -> Any:
    """Return a boto3 client of our own for the present environment, made once.

    Where signing is only a second try (not `required`), None without boto3 or credentials that
    work; that is remembered for a minute, since asking EC2 for them takes seconds elsewhere.
    Offline it only tells where S3 is, as boto3's files say: it looks for no credentials.
    """
    if endpoint:
        _endpoint_place(endpoint)  # botocore would show a password in the URL that it refuses
    ends = "_proxy", "_PROXY", "_CA_BUNDLE"
    names = (name for name in os.environ if name.startswith("AWS_") or name.endswith(ends))
    env: tuple[tuple[str, Any], ...]
    env = tuple(sorted((name, os.environ.get(name, "")) for name in names))
    session = None if offline else _default_session()
    env += (("", "offline" if offline else session),)
    client = _CLIENTS.get(env)
    if client is not None:
        return client
    # boto3 clients may be shared by threads, but not be made by two at once (boto3#2750).
    with _CLIENT_LOCK:
        if not required and time.monotonic() - _NO_CREDENTIALS.get(env, -60.0) < 60.0:
            return None
        client, lasts = _CLIENTS.get(env), False
        if client is not None:
            return client
        try:
            client, lasts = _new_client(required, offline, session)
        except ImportError:
            if not required:
                return None
            raise MissingDependencyError(
                "Signed access needs boto3",
                hint='Run: pip install "aind-s3-cache[boto3]", or use anonymous=True',
            ) from None
        except Exception as error:  # botocore's own, and those of what its files name
            if _is_of_handler(error):
                raise
            text = f"boto3 cannot be set up ({type(error).__name__})"
            if not isinstance(error, ValueError):  # which may show a URL with its password
                text += f": {_printable(str(error))}"
            if required:
                raise S3CacheError(text, hint="Check the AWS configuration") from None
            _log(_WARNING, "%s", text)
        if lasts:  # who logs in meanwhile must not meet a client without credentials
            if len(_CLIENTS) >= _CLIENTS_KEPT:  # of tokens that were renewed since, hour by hour
                _CLIENTS.clear()
            _CLIENTS[env] = client
        elif client is None:
            _NO_CREDENTIALS[env] = time.monotonic()
        return client


class _Target:
    """What a URI or path names, taken apart once."""

    __slots__ = ("bucket", "key", "kind", "text", "version")

    def __init__(
        self, kind: str, text: str, bucket: str = "", key: str = "", version: str | None = None
    ) -> None:
        self.kind, self.text, self.bucket, self.key, self.version = kind, text, bucket, key, version


@lru_cache(maxsize=256)
def _target(text: str, version: str | None = None) -> _Target:
    """Take a URI or path apart; refuse at once what cannot be asked for."""
    scheme = _scheme(text)
    if scheme in ("http", "https"):
        return _Target("http", text)
    if scheme != "s3":
        return _Target("local", text)
    bucket, key = _split_s3(text)
    _check_key(key)
    if not key:
        raise ValueError(f"Not a valid S3 URI of an object: {text!r} ({_S3_FORM})")
    return _Target("s3", text, bucket, key, version)


class _Access:
    """Who asks: the caller's ``anonymous`` and ``s3_client``, and the environment of the call."""

    def __init__(
        self, anonymous: bool | None = None, s3_client: Any = None, offline: bool = False
    ) -> None:
        if s3_client is not None:
            _require("s3_client", s3_client, "get_object", "a boto3 S3 client")
        # What NumPy or a file of settings has for them is compared by identity below.
        self.anonymous = None if anonymous is None else bool(anonymous)
        self.client, self.env = s3_client, _Env()
        self.offline = offline  # sources are not read, they only name what may be in the cache

    def signs(self, bucket: str) -> bool:
        """Tell whether a bucket is asked with a signature from the first."""
        if self.client is not None or self.anonymous is False:
            return True
        return self.anonymous is None and (self.env.endpoint, bucket) in _SIGNED_BUCKETS

    def unsigned(self, target: _Target) -> _Source:
        """Return the source that asks without a signature."""
        if target.kind == "http":
            return _HTTP(target.text, self.env)
        if target.bucket.endswith(_DIRECTORY_BUCKET) and not self.offline:
            raise ValueError("Directory buckets need signed requests: use anonymous=False")
        return _Unsigned(target.bucket, target.key, target.version, self.env)

    def sources(self, target: _Target, made: _Source | None = None) -> Iterator[_Source]:
        """Yield the sources to try: the next one is for a caller that was refused.

        ``made`` is the unsigned source that was made before: it serves again.
        """
        if target.kind == "http":
            yield made or self.unsigned(target)
            return
        bucket, key, version, client = target.bucket, target.key, target.version, self.client
        if client is None and self.signs(bucket):
            required = self.anonymous is False and not self.offline
            client = _own_client(required, self.env.endpoint, self.offline)
        if client is not None:
            yield _Signed(client, bucket, key, version, own=self.client is None)
            if self.client is not None or self.anonymous is False:
                return
            # Of another object, or of keys that were good then: ask from the beginning.
            _SIGNED_BUCKETS.discard((self.env.endpoint, bucket))
        yield made or self.unsigned(target)
        if self.anonymous or self.offline:
            return
        client = _own_client(False, self.env.endpoint)
        if client is not None:
            yield _Signed(client, bucket, key, version, own=True)

    def _why_unsigned(self) -> str:
        if self.client is not None:
            return "It was asked for without a signature, as s3_client is set up"
        if self.anonymous:
            return "It was asked for without a signature, as anonymous=True says"
        if "boto3" in sys.modules:
            return "It was asked for without a signature: boto3 finds no credentials that work"
        return "For private data install boto3 and set up credentials"

    def attempt(
        self, target: _Target, act: Callable[[_Source], T], made: _Source | None = None
    ) -> T:
        """Act on the first source; where it is refused, on the next. Remember who was let in."""
        sources = self.sources(target, made)
        source, hint = next(sources), ""
        while True:
            try:
                result = act(source)
            except S3CacheError as error:
                error._name(source.uri)
                refused = isinstance(error, AccessDeniedError)
                # On Ceph a bucket may be of the tenant of who asks, and of no other; and boto3's
                # files may name another endpoint.
                hidden = error.code == "NoSuchBucket"
                following = next(sources, None) if refused or hidden else None
                if following is None:
                    unsigned = refused and not source.signed
                    if unsigned and (error.code == "AccessDenied" or error.status == 400):
                        hint = self._why_unsigned()
                    if refused and hint:
                        error.hint = ". ".join(filter(None, (error.hint, hint)))
                    raise
                # Who misspelt the bucket is else told of keys that have expired, and no more.
                hint = "Asked for without a signature, there is no such bucket" if hidden else ""
                source = following
            else:
                if source.signed and self.anonymous is None and self.client is None:
                    _SIGNED_BUCKETS.add((self.env.endpoint, target.bucket))
                return result


class _Changed(Exception):
    """The object is another than the one whose bytes we already hold."""


class _AskPlainly(Exception):
    """Ask again without range and conditions: the server ignores or mistakes them."""


class _Sink:
    """Where a body goes, here into memory: ``at`` is where a resumed transfer goes on from."""

    def __init__(
        self, view: memoryview, progress: Callable[[int], object] = int, at: int = 0
    ) -> None:
        self.view, self.progress, self.at = view, progress, at

    def room(self, stop: int | None) -> memoryview:
        """Return where the next bytes may be read into, not beyond stop."""
        return self.view[self.at : stop]

    def took(self, size: int) -> None:
        """Take note of bytes read into the room."""
        self.at += size
        self.progress(size)

    def rewind(self) -> None:
        """Forget everything: the object comes again from its first byte."""
        self.progress(-self.at)
        self.at = 0


def _crcs(data: bytes | memoryview) -> bytes:
    """Return the CRC32s of the chunks of data, one after the other."""
    from zlib import crc32

    if 0 < len(data) <= _CHUNK:
        return crc32(data).to_bytes(4, "big")
    starts = range(0, len(data), _CHUNK)
    return b"".join([crc32(data[at : at + _CHUNK]).to_bytes(4, "big") for at in starts])


def _buffer(body: Reader) -> memoryview:
    """Return room for what is best read of a body at a time."""
    tls = isinstance(body, _Body) and body.place.origin[0] == "https"
    return memoryview(bytearray(_BLOCK_TLS if tls else _BLOCK))


class _Chunks(_Sink):
    """The way to a file, some chunks at a time through one reused buffer."""

    def __init__(
        self, write: WriteChunks, view: memoryview, progress: Callable[[int], object], at: int
    ) -> None:
        super().__init__(view, progress, at)
        self._write = write
        self._base = self._end = at  # of what the buffer holds, and of what it may hold
        self._due = time.monotonic() + _LOG_EVERY

    def room(self, stop: int | None) -> memoryview:
        self._end = self._base + len(self.view)
        if stop is not None and stop < self._end:
            self._end = stop
        return self.view[self.at - self._base : self._end - self._base]

    def took(self, size: int) -> None:
        super().took(size)
        if self.at == self._end:
            self._flush(self.at - self._base)
        elif time.monotonic() > self._due:  # a slow network: what is killed should not lose much
            self._flush((self.at - self._base) // _CHUNK * _CHUNK)

    def _flush(self, size: int) -> None:
        whole, left = self.view[:size], self.at - self._base - size
        self._write(whole, self._base, _crcs(whole))
        self.view[:left] = self.view[size : size + left]
        self._base += size
        if size:
            _QUOTA.give(_RETRY_COST)  # a connection that brings a block may be cut
        self._due = time.monotonic() + _LOG_EVERY

    def end(self) -> None:
        """Write what is left of a body whose length nobody knew."""
        self._flush(self.at - self._base)

    def rewind(self) -> None:
        super().rewind()
        self._base = 0


def _resume(
    source: _Source, sink: _Sink, stop: int, etag: str, total: int | None, patience: _Patience
) -> _Answer:
    """Ask for the bytes from sink.at to stop of one version of an object.

    Status, ETag and Content-Range are checked before a byte is used: servers ignore If-Match and
    Range, and boto3 itself then writes a wrong file (faults seen in the wild).
    """
    fields = {"Range": f"bytes={sink.at}-{stop - 1}", "If-Match": etag}
    ask = partial(source.read, fields, patience.switch)
    try:
        answer = patience.insist(ask)
    except TransferError as error:
        if error.status != 501:
            raise
        del fields["If-Match"]  # VAST refuses it; the ETag of the answer is compared in any case
        answer = patience.insist(ask)
    if answer.status == 206 and answer.etag == etag:
        if (answer.start, answer.stop, answer.total) == (sink.at, stop, total):
            return answer
        answer.body.close()
        raise TransferError("Malformed answer: not the range that was asked for", uri=source.uri)
    if answer.status == 200 and answer.etag == etag and answer.total in (total, None):
        return answer
    answer.body.close()
    if answer.status == 304:
        raise TransferError("Malformed answer: 304 to a range", uri=source.uri)
    raise _Changed


def _pull(source: _Source, answer: _Answer, sink: _Sink, stop: int, patience: _Patience) -> None:
    """Read an answer into the sink up to stop; where it breaks, go on from there.

    Only a strong ETag tells that the rest is of the same object: without one the error is raised.
    """
    etag, total, best = answer.etag, answer.total, sink.at
    while True:
        try:
            while sink.at < stop:
                size = answer.body.readinto(sink.room(stop))
                if not size:
                    raise TransferError("Body cut short", uri=source.uri, retry="soon")
                sink.took(size)
                if sink.at == stop:
                    return
                if sink.at > best and _is_strong(etag):  # what comes again is no progress
                    best = sink.at
                    patience.progress()
                else:
                    patience.heard()
            return
        except TransferError as error:
            error._name(source.uri)
            if etag is None or not _is_strong(etag):
                raise
            patience.after(error)
        finally:
            answer.body.close()
        answer = _resume(source, sink, stop, etag, total, patience)
        if answer.status == 200 and sink.at:
            sink.rewind()


def _pull_to_end(answer: _Answer, sink: _Chunks, patience: _Patience) -> None:
    """Read a body of unknown length: what breaks it is raised, since nothing can be resumed."""
    while True:
        size = answer.body.readinto(sink.room(None))
        if not size:
            return sink.end()
        sink.took(size)
        patience.heard()


_CHECKSUMS = {f"x-amz-checksum-{name}": name for name in ("sha512", "sha256", "sha1", "crc32")}


def _is_sealed(source: _S3, headers: dict[str, str]) -> bool:
    """Tell whether an ETag that looks like an MD5 is none."""
    return (
        headers.get("x-amz-server-side-encryption", "").startswith("aws:")  # KMS, FSx
        or "x-amz-server-side-encryption-customer-algorithm" in headers
        or source.bucket.endswith(_DIRECTORY_BUCKET)
    )


def _digests(source: _Source, answer: _Answer) -> list[tuple[str, bytes]]:
    """Return (algorithm, digest) that S3 promises of the whole object.

    An ETag is an MD5 only of an object sent in one part and not encrypted with KMS or by the
    customer (S3 API, "Object ETag"), and never in a directory bucket, where it is random. A
    checksum header counts on an answer that brings the whole object, if it is FULL_OBJECT: with "-"
    or COMPOSITE it is a checksum of checksums.
    """
    if not isinstance(source, _S3):
        return []
    headers, found = answer.headers, []
    md5 = (answer.etag or "").strip('"')
    if len(md5) == 32 and _HEX.issuperset(md5) and not _is_sealed(source, headers):
        found.append(("md5", bytes.fromhex(md5)))
    in_part = answer.status == 206 and not answer.whole
    if in_part or headers.get("x-amz-checksum-type") == "COMPOSITE":
        return found
    for field, name in _CHECKSUMS.items():
        value = headers.get(field)
        if value and "-" not in value:
            with _IMPORTS:
                from base64 import b64decode
            try:
                found.append((name, b64decode(value, validate=True)))
            except ValueError:
                continue
    return found


class _Crc32:
    """CRC32 with the face of a hashlib object."""

    def __init__(self) -> None:
        from zlib import crc32

        self._crc32, self._value = crc32, 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._value = self._crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def _hasher(name: str) -> Any:
    if name == "crc32":
        return _Crc32()
    import hashlib

    # FIPS builds refuse MD5 for security, which this is not.
    return hashlib.new(name, usedforsecurity=False)


def _mismatch(source: _Source, name: str) -> IntegrityError:
    hint = "A proxy, a disk or the network changed them; nothing was kept"
    return IntegrityError(f"The bytes do not match their {name.upper()}", uri=source.uri, hint=hint)


def _check_bytes(source: _Source, answer: _Answer, data: bytearray) -> None:
    """Compare a whole object with what S3 promises of it."""
    for name, promised in _digests(source, answer):
        digest = _hasher(name)
        digest.update(data)
        if digest.digest() != promised:
            raise _mismatch(source, name)


# ==== 7 Store =====================================================================================
# The only section that writes objects; trees are links to them. Content first, then the name that
# makes it visible; one writer per file; what is in a name needs no second file, and a lock only
# ever saves a download.
#
#   <cache_dir>/aind-s3-cache/
#       CACHEDIR.TAG
#       objects/<xx>/<id>_<owner><validator>_<size>_<crc>_<the object's own name>
#       objects/<xx>/.t… .u… .v…   a file being written, stamps of last use and last validation
#       partial/<id>.<version>.<random>.data and .log     large objects on their way
#       trees/<id>_<owner><signature>_<files>_<size>_<name>/   directories of hard links to objects
#       locks/<xxx>                                        4,096 files, never removed by a download

_FOLDER = "aind-s3-cache"
_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This directory is a cache of aind-s3-cache: backups may leave it out, and so may you.\n"
)
_NAME_LIMIT = 240  # bytes of a file name: 255 less what our stamps put before it
_NEW = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_NEW |= getattr(os, "O_BINARY", 0)
_FINAL = 0o444 if os.name == "posix" else 0o600  # Windows neither removes nor replaces read-only
_FULL = errno.ENOSPC, getattr(errno, "EDQUOT", -1)


def _free(path: str) -> int | None:
    """Return the bytes free for us where path is, or None if that cannot be told."""
    # The directory may not be there yet: its parent is on the same file system.
    while path and not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    try:
        found = os.statvfs(path)
    except (OSError, AttributeError):
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


def _disk_error(error: OSError, path: str, need: int = 0) -> CacheError:
    """Return the error for a failed write: which path, how much is needed, how much is free."""
    named = isinstance(error.filename, str) and os.path.isabs(error.filename)  # rmtree's are not
    where = error.filename if named else path
    number = error.errno or errno.EIO
    hint = ""
    if number in (*_FULL, errno.EFBIG):
        free = _free(path)
        hint = f"Needed: {_human(need)}" if need else "The disk or quota is full"
        hint += f", free: {_human(free)}" if free is not None else ""
        hint += ". Prune the cache, or give another cache_dir"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        uid = f" to uid {os.geteuid()}" if hasattr(os, "geteuid") else ""
        hint = f"Not permitted{uid}: give another cache_dir or set AIND_S3_CACHE_DIR"
    elif number in (errno.ENOTDIR, errno.EEXIST):
        hint = "A file stands where a directory is needed"
    message = f"Cannot use the cache at {_printable(where)}: {os.strerror(number)}"
    return CacheError(message, errno=number, hint=hint or None)


def _raise_ours(error: BaseException, path: str, need: int) -> None:
    """Raise the CacheError for an error of the file system; let any other be."""
    ours = isinstance(error, S3CacheError)
    if isinstance(error, OSError) and not ours and not _is_of_handler(error):
        raise _disk_error(error, path, need) from None


class _Disk:
    """Turns the errors of the file system within a block into a CacheError that says enough."""

    def __init__(self, path: str, need: int = 0) -> None:
        self._path, self._need = path, need

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error:
            _raise_ours(error, self._path, self._need)


_SERIAL = itertools.count()


@lru_cache(maxsize=1)
def _process_id() -> str:
    """Return what, with a serial number, no other process, thread or host makes a name of."""
    return os.urandom(8).hex()


def _aside(directory: str) -> str:
    """Return a path for what is being made or removed there; the sweep collects it if we die."""
    return f"{directory}{os.sep}.t{_process_id()}{next(_SERIAL):x}"


def _is_aside(path: str) -> bool:
    name = os.path.basename(path)
    return name[:2] == ".t" and len(name) > 17 and _HEX.issuperset(name[2:])  # and not .tox


def _full_name(head: str, name: str) -> str:
    """Return a head and what a file system can surely hold of an object's own name behind it."""
    # Cut from the left: what tools look at is the ending, .nii.gz or .ome.zarr.
    if not _WORD.issuperset(name):
        name = "".join(c if c in _WORD else "_" for c in name)
    return head + (name[len(head) - _NAME_LIMIT :].rstrip(".") or "object")


def _digest(*parts: str) -> str:
    import hashlib

    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _validator(answer: _Answer) -> str:
    """Return an answer's validator as it stands in a name; "" if it has none.

    ``s`` and a plain strong ETag, ``x`` and any other ETag in hex, ``m`` and Last-Modified in hex.
    """
    etag = answer.etag
    if etag:
        bare = etag[1:-1]
        plain = etag[0] == etag[-1] == '"' and bare and _ETAG_BARE.issuperset(bare)
        return "s" + bare if plain else "x" + etag.encode("latin-1").hex()
    modified = answer.headers.get("last-modified", "")
    usable = 0 < len(modified) <= 40 and _clean(modified) and not _just_changed(answer.headers)
    return "m" + modified.encode("latin-1").hex() if usable else ""


_EFFECTIVE_IDS = os.access in os.supports_effective_ids


def _may(path: str, mode: int) -> bool:
    """Tell whether a path may be used so, by the user who counts when it is opened (seteuid)."""
    # Only where it is another: old filters of containers refuse the system call for that.
    effective = _EFFECTIVE_IDS and os.geteuid() != os.getuid()
    return os.access(path, mode, effective_ids=effective)


def _owner(private: bool) -> str:
    """Return whose an entry is as it stands in a name: ``o``, of all, or ``p`` and a uid."""
    # Users who share a cache would else replace each other's private entries.
    if not private:
        return "o"
    return f"p{os.geteuid():x}" if hasattr(os, "geteuid") else "p0"


class _Entry:
    """One published object, as its name and lstat tell."""

    __slots__ = (
        "crc", "etag", "held", "modified", "name", "owner", "path", "private", "size",
        "stamp", "tail", "validator",
    )  # fmt: skip

    def __init__(self, path: str) -> None:
        self.path, self.name = path, path.rpartition(os.sep)[2]
        _, tag, size, crc, self.tail = self.name.split("_", 4)
        self.validator = tag.lstrip("op0123456789abcdef")  # its first letter is none of these
        self.owner = tag[: -len(self.validator)]
        self.private = self.owner[0] == "p"
        self.size, self.crc = int(size, 16), crc
        self.stamp, self.held = 0.0, -1
        self.etag: str | None = None
        self.modified: str | None = None
        kind, text = self.validator[0], self.validator[1:]
        if kind == "s":
            self.etag = f'"{text}"'
        elif kind == "x":
            self.etag = bytes.fromhex(text).decode("latin-1")
        elif kind == "m":
            self.modified = bytes.fromhex(text).decode("latin-1")
        if not _clean(self.etag or self.modified or ""):  # it goes into the head of a request
            raise ValueError("not the name of an entry")

    def check(self) -> bool:
        """Tell whether this is a whole entry: the one place that decides it."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        self.stamp = found.st_mtime
        self.held = found.st_size if stat.S_ISREG(found.st_mode) else -1
        # The size in the name decides: no stamp can lie about it, and no second file is needed.
        # Another user's may be private, or made under a umask that lets nobody else read it.
        is_open = found.st_mode & stat.S_IROTH != 0
        return self.held == self.size and (is_open or _may(self.path, os.R_OK))


def _parse_entry(path: str) -> _Entry | None:
    """Return the entry at a path, None if its name is none of ours."""
    name = path.rpartition(os.sep)[2]
    if len(name) < 32 or name[20:21] != "_" or name[0] == ".":
        return None
    try:
        return _Entry(path)
    except (ValueError, IndexError):
        return None


def _write_all(fd: int, view: memoryview, offset: int = 0) -> None:
    """Write all of view; a write may be short (write(2))."""
    while len(view):
        if hasattr(os, "pwrite"):
            size = os.pwrite(fd, view, offset)
        else:
            with _SEEK_LOCK:  # Windows has no positional write
                os.lseek(fd, offset, os.SEEK_SET)
                size = os.write(fd, view)
        view, offset = view[size:], offset + size


_SEEK_LOCK = threading.Lock()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _close(file: int | BinaryIO) -> None:
    """Close what was only read, is given up or synchronized: an error then has nothing to say."""
    try:
        os.close(file) if isinstance(file, int) else file.close()
    except OSError:
        pass


def _sync(fd: int) -> None:
    """Make a file durable; some file systems cannot and say so."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def _remember(memory: dict[str, T], name: str, what: T) -> None:
    """Note something that may be forgotten, as all is when it becomes too much."""
    if len(memory) > 1024:  # four caches' shards
        memory.clear()
    memory[name] = what


class _Shard:
    """What is known of a shard: how it was listed, and what threads of ours add to it."""

    # When, when it had last changed (ns), its names, in order, and how many were added before.
    listed: tuple[float, int | None, list[str], int] = (0.0, None, [], 0)

    def __init__(self, directory: str) -> None:
        self.added: list[str] = []  # only grows: `append` and `len` lose nothing without a lock
        _remember(_SHARDS, directory, self)


_SHARDS: dict[str, _Shard] = {}


def _known(directory: str) -> _Shard:
    return _SHARDS.get(directory) or _Shard(directory)


def _changed(directory: str) -> int | None:
    """Return when something was last added to a directory or removed; None if it is not there."""
    try:
        return os.stat(directory).st_mtime_ns
    except OSError:
        return None


def _list_shard(directory: str, anew: bool = False) -> tuple[list[str], list[str]]:
    """Return the names in a shard, in order, and those that threads of ours may have added since.

    It is listed once a second, a large one less often, and when it has changed. What others add
    within one tick of the file system's clock after that, or while we add, is not seen until then,
    unless it is listed anew.
    """
    now, changed = time.monotonic(), _changed(directory)
    shard = _known(directory)
    if len(shard.added) > _SHARD_ADDED:  # who adds to the old one has published before
        shard = _Shard(directory)
    when, then, names, count = shard.listed
    lasts = _GLANCE * (1 + len(names) / 500)  # as many take some 0.6 ms to list
    if changed != then or now - when >= lasts or anew:
        count = len(shard.added)
        try:
            # One listing finds all versions; an index file would be one more thing to tear.
            names = [] if changed is None else sorted(os.listdir(directory))
        except OSError:  # such as too many open files: the next call may list it
            return [], []
        if len(names) <= _SHARD_LIMIT:  # of a very large cache, it is more than it is worth
            shard.listed = now, changed, names, count
    return names, shard.added[count:]


def _publish(temporary: str, directory: str, name: str) -> str:
    """Make a whole file visible. If a peer took it away: use what it published, or start anew."""
    final = directory + os.sep + name
    for pause in (0.02, 0.1, 0.3, 0.6):  # Windows: a scanner may hold a file for a moment
        try:
            os.replace(temporary, final)
            break
        except FileNotFoundError:
            if not _Entry(final).check():
                raise _Changed from None
            break
        except IsADirectoryError:  # none of ours: aside with it, where the sweep finds it
            os.rename(final, _aside(directory))
        except PermissionError:  # a peer reads it on Windows, or owns it in a sticky directory
            if _Entry(final).check():
                _unlink(temporary)
                break
            if os.name != "nt":
                raise
            time.sleep(pause)
    else:
        os.replace(temporary, final)
    _known(directory).added.append(name)
    return final


def _checksum(crcs: bytes | bytearray) -> str:
    """Return the checksum in a name: a lone chunk's CRC32, of more the CRC32 of their CRC32s."""
    from zlib import crc32

    return crcs.hex() if len(crcs) == 4 else f"{crc32(crcs):08x}"


_SAFE_ROOTS: dict[str, float] = {}  # root -> when nobody else could plant it
_KNOWN_ROOTS: dict[str, tuple[int, ...]] = {}  # root -> what it was when found safe
_PARTIAL_LOOKS: dict[str, tuple[float, bool]] = {}  # root -> when, and what, `recently_partial` saw


def _looks_made(path: str, found: os.stat_result) -> bool:
    """Tell whether a directory looks as one that we make beside it does, to the owner and writers.

    Some mounts show one owner and mode for all (exFAT, NTFS, CIFS, WSL): who made them decided.
    """
    probe = _aside(os.path.dirname(path))
    try:
        os.mkdir(probe, 0o700)
        made = os.lstat(probe)
        os.rmdir(probe)
    except OSError:
        return False
    return made.st_uid == found.st_uid and not found.st_mode & 0o022 & ~made.st_mode


def _guard(path: str) -> None:
    """Refuse a directory that another user may have planted or can write to."""
    if not hasattr(os, "geteuid"):
        return
    found = os.lstat(path)
    is_mine = found.st_uid == os.geteuid() and not found.st_mode & 0o022
    if not stat.S_ISDIR(found.st_mode) or not (is_mine or _looks_made(path, found)):
        raise CacheError(
            f"Unsafe cache directory {_printable(path)}: it belongs to, or can be changed by,"
            " another user",
            errno=errno.EPERM,
            hint="Give a cache_dir of your own",
        )


def _others_write(path: str) -> bool:
    """Tell whether anybody may make files in a directory."""
    try:
        return bool(os.stat(path).st_mode & stat.S_IWOTH) and os.name == "posix"
    except OSError:
        return False


def _newest(*paths: str) -> float:
    """Return the latest modification time of the paths that exist, else 0."""
    found = 0.0
    for path in paths:
        try:
            found = max(found, os.lstat(path).st_mtime)
        except OSError:
            pass
    return found


def _sidecar(path: str, kind: str) -> str:
    """Return the file beside an entry whose time is that of its last use (u), or validation (v)."""
    directory, name = os.path.split(path)
    return f"{directory}{os.sep}.{kind}{name}"


def _tree_stamp(path: str) -> float:
    """Return when a tree was validated: as its sidecar says, for its own time is a reader's, too.

    Whoever adds a file, such as consolidated metadata, changes that.
    """
    return _newest(_sidecar(path, "v")) or _newest(path)


_UTIME_OF_LINKS = os.utime in os.supports_follow_symlinks


def _touch(path: str) -> None:
    """Set a stamp to now; where that cannot be, it is no harm."""
    try:
        try:
            os.utime(path, follow_symlinks=not _UTIME_OF_LINKS)
        except FileNotFoundError:
            os.close(os.open(path, os.O_WRONLY | _NEW, 0o666))
    except OSError:
        pass


def _list(path: str, errors: list[OSError]) -> list[str]:
    """Return the paths in a directory: none if it is not there, or only a link to one.

    Nor are there any if it cannot be read; that is put among the errors.
    """
    try:
        if not os.path.islink(path):
            return sorted(os.path.join(path, name) for name in os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        if _is_of_handler(error):
            raise
        errors.append(error)
    return []


def _drop_partial(path: str) -> None:
    # By whole name, and not as a prefix: a process numbers its files, and 10 begins like 1.
    _unlink(path + ".data")
    _unlink(path + ".log")


class _Store:
    """One cache directory. Reading never writes; directories are made by the first write."""

    def __init__(self, cache_dir: str) -> None:
        self.cache_dir = cache_dir
        # Whoever gives our own folder means it, and not another one in it; unless anybody writes
        # there, as in a directory for temporary files.
        inner = f"{os.sep}{_FOLDER}"
        is_ours = cache_dir.endswith(inner) and not _others_write(cache_dir)
        self.root = cache_dir if is_ours else cache_dir.rstrip(os.sep) + inner
        below = self.root + os.sep
        self.objects, self.partial = below + "objects", below + "partial"
        self.trees, self.locks = below + "trees", below + "locks"

    def exists(self) -> bool:
        """Tell whether the root is there; refuse it where others could have planted it."""
        try:
            found = os.stat(self.root)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _disk_error(error, self.root) from None
        # A directory put in its place is looked at again; it may have got the same inode.
        known = found.st_dev, found.st_ino, found.st_uid, found.st_mode
        if _KNOWN_ROOTS.get(self.root) != known:
            if _others_write(self.cache_dir):
                _guard(self.root)
                _remember(_KNOWN_ROOTS, self.root, known)
            else:
                _remember(_SAFE_ROOTS, self.root, time.monotonic())
        return stat.S_ISDIR(found.st_mode)

    def _tag(self) -> None:
        """Tell backups that this is a cache, if that can be said."""
        path = os.path.join(self.root, "CACHEDIR.TAG")
        try:
            fd = os.open(path, os.O_WRONLY | _NEW, 0o644)
        except OSError:
            return
        try:
            _write_all(fd, memoryview(_TAG.encode()))
        except OSError:  # full, as the next write will say; empty it would tell nothing, for ever
            _unlink(path)
        finally:
            _close(fd)

    def make(self, directory: str) -> None:
        """Make a directory of ours and what it needs above it."""
        if not self.exists():
            os.makedirs(os.path.dirname(self.root), exist_ok=True)
            try:  # open to everybody, as with umask 0, it would not be taken for ours
                os.mkdir(self.root, 0o700 if _others_write(self.cache_dir) else 0o775)
            except FileExistsError:
                if not self.exists():
                    raise
        self._tag()
        for _ in range(9):
            try:
                return os.makedirs(directory, exist_ok=True)
            except (FileExistsError, FileNotFoundError):
                # Unless a file stands there, a peer clears the cache at this very moment.
                if os.path.lexists(directory) and not os.path.isdir(directory):
                    raise
        os.makedirs(directory, exist_ok=True)

    def create(self, path: str, flags: int, mode: int) -> int:
        """Open a new file, making its directory as often as peers clear it away."""
        for _ in range(9):
            try:
                return os.open(path, flags | _NEW, mode)
            except FileNotFoundError:
                self.make(os.path.dirname(path))
        return os.open(path, flags | _NEW, mode)

    def shard(self, ident: str) -> str:
        return self.objects + os.sep + ident[:2]

    def find(self, ident: str, private: bool, anew: bool = False) -> list[_Entry]:
        """Return the whole entries of an object, validated last first.

        To be looked for anew where no server makes up for one that is missed.
        """
        # The root is looked at where others could plant it; else the listing tells if it is there.
        seen = _SAFE_ROOTS.get(self.root, -_GLANCE)
        if time.monotonic() - seen >= _GLANCE and not self.exists():
            return []
        directory = self.shard(ident)
        names, added = _list_shard(directory, anew)
        # Ordered, and each begins with its object and "_", which "`" comes after.
        found = names[bisect_left(names, ident + "_") : bisect_left(names, ident + "`")]
        if added:
            found += [n for n in added if n.startswith(ident + "_") and n not in found]
        good = []
        for name in found:
            entry = _parse_entry(directory + os.sep + name)
            if entry and (private or not entry.private) and entry.check():
                good.append(entry)
        return sorted(good, key=self.validated, reverse=True) if good[1:] else good

    def missing(self, ident: str, uri: str) -> S3CacheError:
        """Return the error for an object that nobody can ask for: not there, or not to be seen."""
        errors: list[OSError] = []
        _list(self.shard(ident), errors)
        if errors:
            return _disk_error(errors[0], self.shard(ident))
        return OfflineError("Not in the cache, and offline", uri=uri)

    def validated(self, entry: _Entry) -> float:
        """Return when the server last confirmed an entry (seconds since the epoch, UTC)."""
        return max(entry.stamp, _newest(_sidecar(entry.path, "v")))

    def confirm(self, path: str) -> bool:
        """Stamp a path as validated just now; False if it is gone. A read-only cache will do."""
        try:
            os.utime(path, follow_symlinks=not _UTIME_OF_LINKS)
        except FileNotFoundError:
            return False
        # Only the owner may set times, and an overlay only with room for a copy of an image's file:
        # a stamp beside the entry stands in.
        except OSError:
            _touch(_sidecar(path, "v"))
        return True

    def used(self, path: str, stamp: float) -> None:
        """Stamp a path as used just now, at most every five minutes."""
        # Not atime: relatime and noatime mounts make it useless.
        sidecar = _sidecar(path, "u")
        # Either way: this machine's clock may be behind that of the file system.
        if abs(time.time() - max(stamp, _newest(sidecar))) > _USE_GRAIN:
            _touch(sidecar)

    def name(self, ident: str, source: _Source, validator: str, size: int, crc: str) -> str:
        head = f"{ident}_{_owner(source.private)}{validator}_{size:x}_{crc}_"
        return _full_name(head, source.name)

    def add(self, ident: str, name: str, data: memoryview, private: bool) -> str:
        """Publish a small object: one private file, one write, one rename."""
        directory = self.shard(ident)
        temporary = _aside(directory)
        shard = _known(directory)
        when, then, names, count = shard.listed
        current = then is not None and then == _changed(directory)
        try:
            fd = self.create(temporary, os.O_WRONLY, 0o600 if private else _FINAL)
            try:
                _write_all(fd, data)
            finally:
                os.close(fd)
            # No fsync: in order, a power cut leaves a short file, and that is a miss.
            final = _publish(temporary, directory, name)
        except BaseException as error:
            _unlink(temporary)
            _raise_ours(error, directory, len(data))
            raise
        if current:  # but for this, nothing has changed: no need to list it again
            shard.listed = when, _changed(directory), names, count
        return final

    def partials(self, prefix: str) -> list[str]:
        """Return the paths, without ending, of the partial files whose name begins so."""
        start, endings = os.path.join(self.partial, prefix), (".data", ".log")
        ours = [p for p in _list(self.partial, []) if p.startswith(start)]
        # Either may be alone: whoever made it was killed between the two.
        return sorted({path.rpartition(".")[0] for path in ours if path.endswith(endings)})

    def drop_partials(self, prefix: str) -> None:
        for path in self.partials(prefix):
            _drop_partial(path)

    def pulse(self, ident: str) -> int:
        """Return a number that changes while somebody downloads this object; 0 if nobody does."""
        total = 0
        for path in self.partials(ident):
            try:
                total += 1 + os.lstat(path + ".log").st_size
            except OSError:
                pass
        return total

    def recently_partial(self) -> bool:
        """Tell, for a system call a second, whether anybody may be downloading something large.

        Who begins within that second, or began long ago, is met at its lock, where an answer is
        given up for it.
        """
        now = time.monotonic()
        looked, recent = _PARTIAL_LOOKS.get(self.root, (-_GLANCE, False))
        if now - looked >= _GLANCE:
            recent = time.time() - _newest(self.partial) < 600
            _remember(_PARTIAL_LOOKS, self.root, (now, recent))
        return recent


def _unmask(error: BaseException) -> None:
    """Raise what a signal handler raised, such as Ctrl-C, amid a wait that had let go of its lock.

    CPython then tries to let go once more, and says only that.
    """
    if isinstance(error, RuntimeError) and error.__context__ and str(error).endswith("lock"):
        raise error.__context__ from None


def _start_thread(work: Callable[[], None]) -> threading.Thread | None:
    """Start a daemon thread; None where none starts: at exit, out of them, in a subinterpreter."""
    if sys.is_finalizing():  # before 3.12 it would be waited for, for ever
        return None
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
    except RuntimeError as error:
        _unmask(error)  # it waits until the thread has started
        return None
    except KeyError as error:
        # After a handler's error CPython forgets a thread, which may have done that by itself.
        if error.__context__ and any(isinstance(arg, threading.Thread) for arg in error.args):
            raise error.__context__ from None
        raise
    return thread


class _Lock:
    """A best-effort lock between processes. A broken, hanging or missing one keeps nobody out."""

    def __init__(self, store: _Store, ident: str) -> None:
        self._path = os.path.join(store.locks, ident[:3])
        self._store, self._ident, self._fd, self._gone = store, ident, -1, False
        self._guard = threading.Lock()

    def __enter__(self) -> _Lock:
        return self

    def acquire(self) -> bool:
        """Try once. False only if a peer surely holds it."""
        self._busy = False
        # On NFS even LOCK_NB may hang (cargo#2615); whoever hangs there hangs alone.
        worker = _start_thread(self._try)
        if worker:
            worker.join(2.0)
        return not self._busy

    @property
    def held(self) -> bool:
        """Tell whether this is sure to keep out whoever can lock."""
        return self._fd >= 0

    def _try(self) -> None:
        try:
            with _IMPORTS:
                import fcntl

            self._store.make(self._store.locks)
            # A planted link or FIFO must neither be followed nor block us.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(self._path, flags, 0o666)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise OSError(errno.EINVAL, "not a lock file")
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                os.close(fd)
                raise
            with self._guard:
                if self._gone:
                    os.close(fd)
                else:
                    self._fd = fd
        except BlockingIOError:
            self._busy = True
        except (OSError, ImportError, S3CacheError):
            pass

    def await_peer(self, found: Callable[[], T | None], switch: _Stop | None) -> T | None:
        """Wait while a peer's download grows; return what it published, or None: our turn."""
        _TURN.leave()
        pulse, since = -1, time.monotonic()
        while True:
            result = found()
            if result:
                return result
            if self.acquire():
                return found()  # its last holder may just have published
            beat = self._store.pulse(self._ident)
            if beat != pulse:
                pulse, since = beat, time.monotonic()
            # Without a beat it may be another object, whose lock is the same file.
            if time.monotonic() - since > (_PEER_PATIENCE if beat else _PEER_PATIENCE / 10):
                return None
            if switch:
                switch.check()
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._gone = True
            if self._fd >= 0:
                import fcntl

                try:
                    fcntl.flock(self._fd, fcntl.LOCK_UN)  # a forked child may hold a copy
                except OSError:
                    pass
                _close(self._fd)  # never unlinked: a peer may lock the old inode, a third the new
                self._fd = -1


class _Spool:
    """A private file that one body is written to in order, published when it is whole."""

    def __init__(
        self, store: _Store, ident: str, private: bool, need: int, hashes: list[str]
    ) -> None:
        self.directory, self.need, self._names = store.shard(ident), need, hashes
        self._path = _aside(self.directory)
        with _Disk(self.directory, need):
            self._fd = store.create(self._path, os.O_WRONLY, 0o600 if private else _FINAL)

    def write(self, view: memoryview, offset: int, crcs: bytes) -> None:
        if offset == 0:  # or again from there: as many bytes, in place of the others
            self.crcs = bytearray()
            self._hashes = {name: _hasher(name) for name in self._names}
        with _Disk(self.directory, self.need):
            _write_all(self._fd, view, offset)
        for digest in self._hashes.values():
            digest.update(view)
        self.crcs += crcs

    def digest(self, name: str) -> bytes:
        return bytes(self._hashes[name].digest())

    def publish(self, name: str) -> str:
        with _Disk(self.directory, self.need):
            fd, self._fd = self._fd, -1
            os.close(fd)
            return _publish(self._path, self.directory, name)

    def close(self) -> None:
        """Remove what was not published."""
        if self._fd >= 0:
            _close(self._fd)
        _unlink(self._path)


def _parse_log(lines: Iterable[bytes], count: int) -> Iterator[tuple[int, bytes]]:
    """Yield chunk and CRC32 of the lines of a log; torn and foreign ones are skipped."""
    for line in lines:
        index, _, crc = line.partition(b" ")
        try:
            at = int(index, 16)
            if len(crc) == 9 and 0 <= at < count:  # with its line feed
                yield at, bytes.fromhex(crc.decode())
        except ValueError:
            pass


class _Partial:
    """A large object on its way: a file of our own, and a log of the chunks that are done.

    Nobody else ever writes to it. Whoever needs the same object may copy the chunks whose checksum
    matches, now or after we were killed: no shared inode, no lock. Who has the lock, and so is
    ``alone``, clears away what has long stood still, or all that was ever broken off would stay; a
    peer that lives after all loses its file, and begins anew.
    """

    def __init__(
        self, store: _Store, ident: str, version: str, total: int, private: bool, alone: bool
    ) -> None:
        self.store, self.key, self.total = store, f"{ident}.{version}.", total
        self._alone = alone
        self.path = os.path.join(store.partial, f"{self.key}{_process_id()}{next(_SERIAL):x}")
        with _Disk(store.partial, total):
            if alone and not self._fits():
                store.drop_partials(self.key)  # rather from the first byte than not at all
            if not self._fits():
                raise OSError(errno.ENOSPC, "No space left on device", self.path + ".data")
        self.count = -(-total // _CHUNK)
        self.state, self.free = bytearray(self.count), self.count  # 0 free, 1 taken, 2 done
        self.crcs = bytearray(4 * self.count)
        self.lock = threading.Lock()
        self.shared = False  # peers work on the same object: take chunks at random
        self._users, self._closed = 1, threading.Event()
        with _Disk(store.partial, total):
            mode = 0o600 if private else _FINAL
            self.fd = store.create(self.path + ".data", os.O_RDWR, mode)
            try:
                self.log = store.create(self.path + ".log", os.O_WRONLY | os.O_APPEND, 0o600)
            except BaseException:
                os.close(self.fd)
                _unlink(self.path + ".data")
                raise

    def _fits(self) -> bool:
        free = _free(self.store.partial)
        return free is None or free >= self.total

    def claim(self, at: int, end: int) -> None:
        """Take these chunks; the lock is held, or nobody else has the file yet."""
        self.state[at:end] = b"\1" * (end - at)
        self.free -= end - at

    def take(self, most: int) -> tuple[int, int] | None:
        """Take a run of free chunks, at most so many bytes long; None if none is left."""
        with self.lock:
            begin = int.from_bytes(os.urandom(4), "big") % self.count if self.shared else 0
            at = self.state.find(0, begin)
            at = self.state.find(0) if at < 0 else at
            if at < 0:
                return None
            end = at
            while end < self.count and end - at < most // _CHUNK and not self.state[end]:
                end += 1
            self.claim(at, end)
        return at * _CHUNK, min(end * _CHUNK, self.total)

    def write(self, view: memoryview, offset: int, crcs: bytes) -> None:
        """Write whole chunks, and note that they are done."""
        with _Disk(self.path + ".data", self.total):
            _write_all(self.fd, view, offset)
        index, count = offset // _CHUNK, len(crcs) // 4
        with self.lock:
            for n in range(count):
                # A server that ignores the range of a resume sends again what is hashed already.
                old = self.crcs[4 * (index + n) : 4 * (index + n + 1)]
                if self.state[index + n] == 2 and old != crcs[4 * n : 4 * n + 4]:
                    raise IntegrityError("One version came twice, with other bytes")
            self.crcs[4 * index : 4 * (index + count)] = crcs
            self.state[index : index + count] = b"\2" * count
        lines = [f"{index + n:x} {crcs[4 * n : 4 * n + 4].hex()}\n" for n in range(count)]
        self._note("".join(lines))

    def chunk(self, index: int) -> tuple[int, int]:
        return index * _CHUNK, min((index + 1) * _CHUNK, self.total)

    def adopt(self) -> int:
        """Copy what peers and the dead have finished of this object; return the bytes copied."""
        # Peers that live and orphans alike: the checksum decides, not whose it was.
        copied, others = 0, [p for p in self.store.partials(self.key) if p != self.path]
        self.shared = bool(others)
        for path in others:
            copied += self._adopt_from(path)
            self._bury(path)
        return copied

    def _bury(self, path: str) -> bool:
        """Remove a partial file that has long stood still, if we have the lock; tell whether."""
        if not self._alone or self._closed.is_set():
            return False
        # On the file system's own clock: hosts may differ by more.
        with _Disk(self.path + ".log"):
            idle = os.fstat(self.log).st_mtime - _newest(path + ".log", path + ".data")
        if idle > _DEAD:
            _drop_partial(path)
        return idle > _DEAD

    def should_begin_anew(self, error: CacheError) -> bool:
        """Tell whether another try may succeed where a write has failed."""
        if error.errno == errno.ESTALE:  # NFS: a faster peer on another host removed our file
            return True
        # Rather from the first byte than not at all: what the dead left takes the room for our copy
        # of it, which of a quota nobody could tell before.
        others = self.store.partials(self.key) if error.errno in _FULL else []
        buried = [path for path in others if self._bury(path)]
        return bool(buried)

    def _copy(self, file: BinaryIO, index: int, crc: bytes) -> int:
        """Copy a free chunk if its checksum is right; whatever goes wrong, it is free again."""
        # Taken first, read then: a worker may want the same chunk at this moment.
        with self.lock:
            if self.state[index]:
                return 0
            self.claim(index, index + 1)
        start, stop = self.chunk(index)
        try:
            file.seek(start)
            data = file.read(stop - start)
            if len(data) == stop - start and _crcs(data) == crc:
                self.write(memoryview(data), start, crc)
                return len(data)
        finally:
            with self.lock:
                if self.state[index] == 1:
                    self.state[index] = 0
                    self.free += 1
        return 0

    def _adopt_from(self, path: str) -> int:
        """Copy the good chunks of one partial file: same user, regular, checksum as logged."""
        flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)

        def opener(name: str, usual: int) -> int:
            return os.open(name, usual | flags)

        copied, files = 0, []
        try:
            for ending in (".data", ".log"):
                file = open(path + ending, "rb", opener=opener)  # noqa: SIM115  closed below
                files.append(file)
                found = os.fstat(file.fileno())
                mine = found.st_uid == os.fstat(self.fd).st_uid  # as shown: mounts may map users
                if not mine or not stat.S_ISREG(found.st_mode):
                    return 0
            for index, crc in _parse_log(files[1], self.count):
                copied += self._copy(files[0], index, crc)
        except OSError as error:
            if isinstance(error, S3CacheError) or _is_of_handler(error):
                raise
        finally:
            for file in files:
                _close(file)
        return copied

    def publish(self, directory: str, name: str) -> str:
        """Make the whole file durable, then visible; and drop what this version left behind."""
        with _Disk(directory, self.total):
            _sync(self.fd)  # written out of order: without it a power cut leaves zeros
            self.store.make(directory)
            self.close()
            final = _publish(self.path + ".data", directory, name)
        self.store.confirm(final)  # validated now, not when the last byte was written
        self.store.drop_partials(self.key)
        return final

    def linger(self) -> None:
        """From now on until we close, show who waits for us that we live: a disk may be slow."""
        _start_thread(self._beat)

    def _beat(self) -> None:
        while not self._closed.wait(0.5):
            with self.lock:
                if self._users:  # else it has another's number
                    self._note("\n")

    def _note(self, lines: str) -> None:
        try:
            os.write(self.log, lines.encode())
        except OSError:  # after a crash more comes again, and nothing else
            pass

    def hold(self) -> bool:
        """Keep it open for a thread, which does so itself; False if it is closed already."""
        with self.lock:
            open_ = self._users > 0
            self._users += open_
        return open_

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self.release()

    def release(self) -> None:
        """Close when the last thread lets go: it may write, and the number be another file's."""
        with self.lock:
            self._users -= 1
            if self._users == 0:
                try:  # others run meanwhile, and a Ctrl-C may come
                    _close(self.log)
                finally:
                    _close(self.fd)


class _Record:
    """An immutable value, compared, hashed, pickled and shown by its fields.

    By hand, since importing ``dataclasses`` takes longer than importing this whole module.
    """

    __slots__: tuple[str, ...] = ()

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    __delattr__ = __setattr__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Record) or type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()

    def __repr__(self) -> str:
        shown = (f"{n.strip('_')}={v!r}" for n, v in zip(self.__slots__, self._values()))
        return f"{type(self).__name__}({', '.join(shown)})"


class CacheEntry(_Record):
    """What the cache holds: one object, tree or partial file.

    Attributes
    ----------
    path : str
        Where it is.
    name : str
        The object's own name, cleaned.
    kind : str
        ``"object"``, ``"tree"`` or ``"partial"``.
    size : int
        Bytes. Those of a tree are hard links to objects and take no space of their own.
    last_used, last_validated : float
        Seconds since the epoch, UTC.
    etag : str or None
        As the server sent it, quotes included.
    private : bool
        Fetched with credentials.
    superseded : bool
        A newer version of the same object is there.
    """

    __slots__ = (  # noqa: RUF023  in the order of the constructor
        "path", "name", "kind", "size", "last_used", "last_validated", "etag", "private",
        "superseded",
    )  # fmt: skip
    path: str
    name: str
    kind: str
    size: int
    last_used: float
    last_validated: float
    etag: str | None
    private: bool
    superseded: bool

    def __init__(
        self,
        path: str,
        name: str,
        kind: str,
        size: int,
        last_used: float,
        last_validated: float,
        etag: str | None = None,
        private: bool = False,
        superseded: bool = False,
    ) -> None:
        values = path, name, kind, size, last_used, last_validated, etag, private, superseded
        for slot, value in zip(self.__slots__, values):
            object.__setattr__(self, slot, value)


class _Unit:
    """Something that is pruned as a whole: an entry, and the inodes that it keeps alive."""

    __slots__ = ("entry", "inodes")

    def __init__(self, entry: CacheEntry, inodes: dict[tuple[int, int], int]) -> None:
        self.entry, self.inodes = entry, inodes


def _plan_prune(
    units: list[_Unit], max_age: float | None, max_size: int | None, now: float
) -> list[_Unit]:
    """Decide what goes: what is old, then superseded versions, then what was used longest ago.

    Space is counted by inode: a tree and its objects share theirs. What was used within the grace
    stays, and what a recent tree holds is as recent as the tree.
    """
    # Removing one of two names frees nothing: count the names of each inode.
    links: dict[tuple[int, int], int] = {}
    recent: dict[tuple[int, int], float] = {}
    sizes: dict[tuple[int, int], int] = {}
    for unit in units:
        sizes.update(unit.inodes)
        for inode in unit.inodes:
            links[inode] = links.get(inode, 0) + 1
            recent[inode] = max(recent.get(inode, 0.0), unit.entry.last_used)
    total = sum(sizes.values())

    def last_use(unit: _Unit) -> float:
        if unit.entry.kind != "object":
            return unit.entry.last_used
        return max((recent[inode] for inode in unit.inodes), default=0.0)

    def is_old(unit: _Unit) -> bool:
        idle = now - last_use(unit)
        orphan = unit.entry.kind == "partial" and idle > _ORPHAN_AGE
        return orphan or (max_age is not None and idle > max_age)

    def order(unit: _Unit) -> tuple[bool, bool, float, bool]:
        entry = unit.entry
        return not is_old(unit), not entry.superseded, last_use(unit), entry.kind != "tree"

    plan = []
    for unit in sorted(units, key=order):
        too_large = max_size is not None and total > max_size
        if now - last_use(unit) <= _GRACE or not (is_old(unit) or too_large):
            continue
        plan.append(unit)
        for inode in unit.inodes:
            links[inode] -= 1
            total -= 0 if links[inode] else sizes[inode]
    return plan


def _is_tree(path: str) -> bool:
    """Tell whether a path in ``trees`` is a snapshot of ours."""
    name = os.path.basename(path)
    hexes = name[:20] + name[22:38]
    ours = name[20:22] in ("_o", "_p") and name[38:39] == "_" and _HEX.issuperset(hexes)
    return ours and not os.path.islink(path)


def _is_ours(path: str) -> bool:
    """Tell whether a path in a shard or in ``trees`` has a name that we give."""
    folder, name = os.path.split(path)
    entry = os.path.join(folder, name[2:] if name[:2] in (".u", ".v") else name)
    return _is_aside(entry) or _parse_entry(entry) is not None or _is_tree(entry)


def _put_aside(path: str) -> str:
    """Rename what is to go, so that nobody finds it; return where it is now.

    That may be in place: an overlay cannot rename a directory of a container's image, nor without
    room for a copy a file of it.
    """
    aside = _aside(os.path.dirname(path))
    try:
        os.rename(path, aside)
    except OSError as error:
        if error.errno not in (errno.EXDEV, *_FULL):
            raise
        return path
    return aside


def _remove_tree(path: str) -> OSError | None:
    """Remove a directory; return what kept some of it where it is, or where nobody looks for it."""
    with _IMPORTS:
        import shutil

    errors: list[OSError] = []

    def note(_: object, __: str, told: Any) -> None:
        errors.append(told[1] if isinstance(told, tuple) else told)

    noted: Any = {"onexc" if sys.version_info >= (3, 12) else "onerror": note}
    # Aside at once: whoever still fills it finds it gone, instead of less in it than was put there.
    try:
        aside = _put_aside(path)
    except OSError:
        aside = path
    try:
        shutil.rmtree(aside, **noted)
    except OSError as error:  # before 3.13 of its own calls
        errors.append(error)
    return errors[0] if errors and os.path.lexists(aside) else None


def _remove_any(path: str) -> OSError | None:
    """Remove a file or a directory; return what kept some of it where it is."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # which one means a directory, depends on the system
        return _remove_tree(path) if os.path.isdir(path) else error
    return None


def _inodes(paths: Iterable[str]) -> dict[tuple[int, int], int]:
    """Return inode -> bytes on disk of the regular files among paths, each once."""
    found = {}
    for path in paths:
        try:
            s = os.lstat(path)
        except OSError:
            continue
        if stat.S_ISREG(s.st_mode):
            held = getattr(s, "st_blocks", s.st_size) * 512 if path.endswith(".data") else s.st_size
            found[s.st_dev, s.st_ino] = min(held, s.st_size)
    return found


def _is_left(path: str, now: float) -> bool:
    """Tell whether a temporary file, or a tree being made, has stood still for the grace."""
    # Links into its subdirectories do not stamp a tree itself.
    return now - _newest(path, *(top for top, _, _ in os.walk(path))) > _GRACE


def _is_damaged(entry: _Entry) -> bool:
    """Tell whether an entry's bytes are not what they were; what may not be read is not judged."""
    try:
        with open(entry.path, "rb", buffering=_CHUNK) as file:
            crcs = b"".join(map(_crcs, iter(partial(file.read, _CHUNK), b"")))
        return _checksum(crcs) != entry.crc or os.lstat(entry.path).st_size != entry.size
    except (FileNotFoundError, PermissionError):
        return False
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return True


class _Keeper(_Store):
    """A store with all of it in view: what it holds, what goes, what is damaged.

    What another user keeps from us is passed over, and said at the end. For one call.
    """

    def __init__(self, cache_dir: str) -> None:
        super().__init__(cache_dir)
        self._errors: list[OSError] = []

    def _from_each(
        self, units: list[_Unit], act: Callable[[_Unit], list[CacheEntry]]
    ) -> list[CacheEntry]:
        """Act on each, and past one that is another user's; return what went."""
        gone: list[CacheEntry] = []
        for unit in units:
            try:
                gone += act(unit)
            except CacheError as error:
                self._errors.append(error)
        return gone

    def _settle(self) -> None:
        with _Disk(self.root):
            if self._errors:
                raise self._errors[0]

    def units(self) -> list[_Unit]:
        """Return all that the store holds."""
        units = self._units()
        self._settle()
        return units

    def _units(self) -> list[_Unit]:
        if not self.exists():
            return []
        objects = [
            unit for shard in _list(self.objects, self._errors) for unit in self._shard(shard)
        ]
        # Another user's private tree can only be put aside, and stays there.
        tops = [p for p in _list(self.trees, self._errors) if _is_tree(p) and _may(p, os.R_OK)]
        trees = [self._tree(path) for path in tops]
        return objects + trees + [self._part(path) for path in self.partials("")]

    def _shard(self, shard: str) -> list[_Unit]:
        """Return the objects of a shard; of each the one validated last supersedes the others."""
        # Public and each user's private copies of an object are versions of their own.
        found: dict[str, list[tuple[float, _Entry]]] = {}
        for path in _list(shard, self._errors):
            entry = _parse_entry(path)
            if entry and (entry.check() or entry.held >= 0):
                group = found.setdefault(entry.name[:21] + entry.owner, [])
                group.append((self.validated(entry), entry))
        units = []
        for group in found.values():
            newest = max(validated for validated, _ in group)
            for validated, entry in group:
                used = max(validated, _newest(_sidecar(entry.path, "u")))
                superseded = validated < newest or entry.held != entry.size  # nobody is served it
                record = CacheEntry(
                    entry.path, entry.tail, "object", entry.held, used, validated, entry.etag,
                    entry.private, superseded,
                )  # fmt: skip
                units.append(_Unit(record, _inodes([entry.path])))
        return units

    def _tree(self, path: str) -> _Unit:
        files = [os.path.join(top, name) for top, _, names in os.walk(path) for name in names]
        inodes = _inodes(files)
        name = os.path.basename(path).split("_", 4)[-1]
        stamp = _tree_stamp(path)
        used = max(stamp, _newest(path, _sidecar(path, "u")))
        private = os.path.basename(path)[21:22] == "p"
        size = sum(inodes.values())
        return _Unit(CacheEntry(path, name, "tree", size, used, stamp, None, private), inodes)

    def _part(self, path: str) -> _Unit:
        stamp = _newest(path + ".log", path + ".data")
        inodes = _inodes([path + ".data", path + ".log"])
        name = os.path.basename(path)
        entry = CacheEntry(path, name, "partial", sum(inodes.values()), stamp, stamp)
        return _Unit(entry, inodes)

    def now(self) -> float:
        """Return the time on the file system's clock, which the stamps are of."""
        path = _aside(self.root)
        _touch(path)
        now = _newest(path)
        _unlink(path)
        return now or time.time()  # where nothing can be written

    def prune(self, max_age: float | None, max_size: int | None, dry_run: bool) -> list[CacheEntry]:
        """Carry out a plan; what was touched since it was made stays."""
        if not self.exists():
            return []
        now = self.now()
        plan = _plan_prune(self._units(), max_age, max_size, now)
        gone = [unit.entry for unit in plan]
        if not dry_run:
            self._sweep(now)
            gone = self._from_each(plan, lambda unit: [unit.entry] * self._remove(unit.entry))
        self._settle()
        return gone

    def _remove(self, entry: CacheEntry) -> bool:
        """Remove an entry unless it was touched after the plan: aside first, and back if so."""
        path = entry.path
        if entry.kind == "partial":
            if _newest(path + ".log", path + ".data") > entry.last_used:
                return False
            _drop_partial(path)
            return not _inodes([path + ".data", path + ".log"])
        stamps = [_sidecar(path, kind) for kind in "uv"]
        with _Disk(path):
            try:
                if _newest(path, *stamps) > entry.last_used:
                    return False
                # Aside first: whoever touches it from here on finds it gone and fetches it again.
                aside = _put_aside(path)
                if _newest(aside, *stamps) > entry.last_used:
                    os.rename(aside, path)
                    return False
            except FileNotFoundError:
                return False
            error = _remove_any(aside)
            if error:
                raise error
            for sidecar in stamps:
                _unlink(sidecar)
        return True

    def _sweep(self, now: float) -> None:
        """Remove what crashes left behind: old temporary files, stamps without an entry."""
        for shard in [*_list(self.objects, []), self.trees, self.root]:
            for path in _list(shard, []):
                name = os.path.basename(path)
                entry = os.path.join(shard, name[2:])
                if _is_aside(path) and _is_left(path, now):
                    _remove_any(path)
                elif name[:2] in (".u", ".v") and _is_ours(path) and not os.path.lexists(entry):
                    _unlink(path)

    def verify(self) -> list[CacheEntry]:
        """Remove, and return, objects whose bytes are not what they were, and their trees."""
        units = self._units()
        trees = {unit.entry.path: unit for unit in units if unit.entry.kind == "tree"}

        def check(unit: _Unit) -> list[CacheEntry]:
            path, bad = unit.entry.path, []
            errors: list[OSError] = []
            with _Disk(path):
                if unit.entry.kind != "object" or not _is_damaged(_Entry(path)):
                    return []
                # Trees first: when it is gone nothing tells any more that their bytes are bad. Also
                # those made of it meanwhile, for it may take hours to read all.
                tops = _list(self.trees, errors)
                if errors:
                    raise errors[0]
                for top in filter(_is_tree, tops):
                    if top not in trees:
                        trees[top] = self._tree(top)
                    tree = trees[top]
                    if not tree.inodes.keys().isdisjoint(unit.inodes):
                        error = _remove_tree(top)
                        if error and os.path.lexists(top):
                            raise error
                        bad.append(tree.entry)
                try:
                    os.unlink(path)
                except FileNotFoundError:  # a peer was faster
                    pass
            return [*bad, unit.entry]

        bad = self._from_each(units, check)
        self._settle()
        return bad

    def clear(self) -> None:
        """Remove all that is ours and nothing else."""
        if not self.exists():
            return
        shards = [*_list(self.objects, self._errors), self.trees]
        paths = [p for shard in shards for p in _list(shard, self._errors) if _is_ours(p)]
        paths += [p for p in _list(self.partial, self._errors) if p.endswith((".data", ".log"))]
        paths += [p for p in _list(self.locks, self._errors) if len(os.path.basename(p)) == 3]
        paths += filter(_is_aside, _list(self.root, self._errors))
        paths.append(os.path.join(self.root, "CACHEDIR.TAG"))
        self._errors += filter(None, map(_remove_any, paths))
        directories = [*shards, self.objects, self.partial, self.locks]
        if self.root != self.cache_dir:  # what somebody named stays
            directories.append(self.root)
        for path in directories:
            try:
                os.rmdir(path)
            except OSError:  # something that is not ours: it stays, and so does its place
                pass
        self._settle()


def _no_local_path(text: str) -> NotFoundError:
    """Return the error for a path that is not there, or that is no path."""
    hint = None if text else "It is empty"
    if text.startswith(("s3:/", "http:/", "https:/")):  # `Path("s3://…")` drops a slash
        hint = "Pass URIs as str: a Path keeps only one slash of two"
    elif text.lstrip().startswith(("s3://", "http://", "https://")):
        hint = "It begins with white space: strip the line that it was read from"
    return NotFoundError("Local path not found", uri=_redact_path(text), hint=hint)


def _unreadable(error: OSError, uri: str) -> Exception:
    """Return the error for a local file that is there; a handler's own is what it is."""
    if _is_of_handler(error):
        return error
    cls = AccessDeniedError if error.errno == errno.EACCES else CacheError
    return cls(f"Cannot be read ({error.strerror})", uri=uri, errno=error.errno)


def _abspath(path: str) -> str:
    """Return an absolute path: behind a link, ".." leads elsewhere than os.path.abspath says."""
    above, dots, below = f"{path}/".rpartition("../")
    if dots:  # what stands behind the last of them may be a link, and stays one
        path = os.path.join(os.path.realpath(above + dots), below.lstrip("/"))
    return os.path.abspath(path)


def _local_path(text: str) -> str:
    """Return the absolute path that a path or ``file:`` URI means, ``~`` expanded."""
    scheme = _scheme(text)
    if scheme not in ("", "file"):
        raise ValueError(f"Unsupported URL or file path: '{_redact_bad(text)}'")
    path = _file_path(text) if scheme else os.path.expanduser(text)
    try:
        return _abspath(path) if path else ""
    except (FileNotFoundError, ValueError):  # no working directory; NUL or a surrogate
        raise _no_local_path(text) from None


def _fallback_dir() -> str:
    """Return a private directory below the temp directory: there is no usable home."""
    import tempfile

    uid = os.geteuid() if hasattr(os, "geteuid") else 0
    with _Disk("the temp directory"):
        path = os.path.join(tempfile.gettempdir(), f"aind-s3-cache-{uid}")
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
    _guard(path)
    return path


def _default_cache_dir() -> str:
    """Return where caches live if nobody says where; everything of ours is in one folder of it."""
    for name in ("XDG_CACHE_HOME", *(("LOCALAPPDATA",) * (os.name == "nt"))):
        path = os.path.expanduser(_first_env(name))
        if os.path.isabs(path):
            return _abspath(path)
    # A container's home may be /, missing or read-only; a hit needs no more than to read.
    home = os.path.expanduser("~")
    cache = os.path.join(home, ".cache")
    if os.path.isabs(home):
        if os.path.isdir(os.path.join(cache, _FOLDER)):
            return cache  # even if it is read-only: hits need no more
        if _may(cache if os.path.isdir(cache) else home, os.W_OK | os.X_OK):
            return cache
    return _fallback_dir()


@lru_cache(maxsize=64)
def _absolute(path: str) -> str:
    """Return os.path.abspath of what is absolute already, and so depends on nothing else."""
    return os.path.abspath(path)


def _cache_dir(cache_dir: StrPath | None) -> str:
    """Return the absolute path of the cache directory that a caller or the environment means."""
    try:
        text = _text(cache_dir or _first_env("AIND_S3_CACHE_DIR"))
    except TypeError as error:
        raise TypeError(f"cache_dir: {error}") from None
    if text[:1] == os.sep == "/" and "\0" not in text and ".." not in text:
        return _absolute(text)
    if _scheme(text) or "\0" in text:
        name = "cache_dir" if cache_dir else "AIND_S3_CACHE_DIR"
        raise ValueError(f"{name} must be a directory, not '{_redact(text)}'")
    if not text:
        return _default_cache_dir()
    with _Disk(text):  # a relative one in a working directory that is gone
        return _abspath(os.path.expanduser(text))


@lru_cache(maxsize=256)
def _ident(place_id: tuple[str, ...]) -> str:
    """Return the hash that names an object in the store; nothing of its URI can be read off it."""
    return _digest(*place_id)[:20]


# ==== 8 JSON ======================================================================================
# Loaders on top of the sources: they do not cache, and read what is cached only offline. A document
# is a mapping, or an error.


def _too_large(uri: str) -> InvalidJSONError:
    return InvalidJSONError(f"JSON document of more than {_human(_JSON_LIMIT)}", uri=uri)


def _collect(source: _Source, answer: _Answer, patience: _Patience) -> bytearray:
    """Return a whole body, if it is not too large for a document."""
    if answer.total is None:
        data = _read_up_to(answer.body, _JSON_LIMIT + 1)
        if len(data) > _JSON_LIMIT:
            raise _too_large(source.uri)
        return data
    if answer.total > _JSON_LIMIT:
        answer.body.close()
        raise _too_large(source.uri)
    data = bytearray(answer.total)
    _pull(source, answer, _Sink(memoryview(data)), answer.total, patience)
    return data


def _decompress(data: bytearray, wbits: int, limit: int) -> bytearray | None:
    """Undo one compression, in members as gzip may have (RFC 1952, 2.2); None if it is cut short.

    Returns more than limit bytes for what would be longer, and never much more.
    """
    import zlib

    out, at = bytearray(), 0
    while at < len(data) and len(out) <= limit:
        member = zlib.decompressobj(wbits)
        while not member.eof and at < len(data) and len(out) <= limit:
            piece = data[at : at + 8192]  # small, since what a member leaves over is copied
            at += len(piece)
            out += member.decompress(piece, limit + 1 - len(out))
        if not member.eof and len(out) <= limit:
            return None
        at -= len(member.unused_data)
        while data[at : at + 1] == b"\0":  # padding, of which somebody may send very much
            piece = data[at : at + 8192]
            at += len(piece) - len(piece.lstrip(b"\0"))
    return out


def _is_zlib(data: bytearray) -> bool:
    """Tell whether data begin with zlib's header, whatever its window (RFC 1950, 2.2)."""
    head = int.from_bytes(data[:2], "big")  # no preset dictionary: "80" would be the text of one
    return head >> 8 & 15 == 8 and head % 31 == 0 and not head & 0x20


def _inflate(data: bytearray, uri: str, coding: str) -> bytearray:
    """Undo Content-Encoding gzip or deflate, and no more of it than the ceiling (gzip bombs)."""
    import zlib

    known = "gzip", "x-gzip", "deflate"  # "utf-8" is met, and changes nothing
    codings = [name for name in map(str.strip, coding.lower().split(",")) if name in known]
    if not codings:  # nobody says how it was stored, as of a file: no JSON begins so
        codings = ["gzip"] if data[:1] == b"\x1f" else ["deflate"] if _is_zlib(data) else []
    if len(codings) > _CODINGS:
        raise InvalidJSONError(f"More than {_CODINGS} Content-Encodings", uri=uri)
    for coding in reversed(codings):
        if coding != "deflate" and data[:1] != b"\x1f":  # that is only said: 0.1 did not mind
            continue
        raw = coding == "deflate" and not _is_zlib(data)  # some send it without a header
        try:
            out = _decompress(data, -15 if raw else 47, _JSON_LIMIT)
        except zlib.error as error:
            raise InvalidJSONError(f"Invalid {coding} data: {error}", uri=uri) from None
        if out is None:
            raise InvalidJSONError(f"Truncated {coding} data", uri=uri)
        if len(out) > _JSON_LIMIT:
            raise _too_large(uri)
        data = out
    return data


def _parse_json(data: bytearray, uri: str, coding: str) -> dict[str, Any]:
    """Parse UTF-8, UTF-16 or UTF-32, with or without a byte-order mark, into a mapping."""
    with _IMPORTS:
        import json

    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        hint = f"Its Content-Encoding is '{_printable(coding)}'" if coding else None
        hint = "This looks like an HTML page" if data.lstrip()[:1] == b"<" else hint
        invalid = InvalidJSONError(f"Not valid JSON ({_printable(reason)})", uri=uri, hint=hint)
        told = {name: getattr(error, name, None) for name in ("msg", "pos", "lineno", "colno")}
        vars(invalid).update({name: value for name, value in told.items() if value is not None})
        raise invalid from None
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise TypeError(f"Expected top-level JSON object, not {kind}: {_redact(uri)}")
    return document


def _read_json(source: _Source) -> dict[str, Any]:
    """Read one document, with one fresh try where its bytes are not as promised."""
    patience, doubted = _Patience(), False
    while True:
        try:
            answer = source.read({}, None)
            if answer.status != 200 and not answer.whole:
                answer.body.close()
                raise TransferError("Unexpected answer", uri=source.uri, status=answer.status)
            data = _collect(source, answer, patience)
            _check_bytes(source, answer, data)
        except _Changed:
            patience.after(TransferError("The object keeps changing", uri=source.uri, retry="soon"))
        except IntegrityError:
            if doubted:
                raise
            doubted = True
        except TransferError as error:
            patience.after(error)
        else:
            _QUOTA.give()
            coding = answer.headers.get("content-encoding", "")
            return _parse_json(_inflate(data, source.uri, coding), source.uri, coding)


def _read_file(path: str, text: str, uri: str) -> dict[str, Any]:
    """Read the document in a local file; ``text`` is what the caller called it."""
    try:
        try:
            file = open(path, "rb")  # noqa: SIM115  who reads it closes it
        except (FileNotFoundError, NotADirectoryError, ValueError):  # NUL or a surrogate
            raise _no_local_path(text) from None
        data = _read_up_to(file, _JSON_LIMIT + 1)
    except S3CacheError:
        raise
    except OSError as error:
        raise _unreadable(error, uri) from None
    if len(data) > _JSON_LIMIT:
        raise _too_large(uri)
    return _parse_json(_inflate(data, uri, ""), uri, "")


def _is_offline(offline: bool = False) -> bool:
    """Tell whether the caller or AIND_S3_CACHE_OFFLINE forbids the network."""
    flag = _first_env("AIND_S3_CACHE_OFFLINE")
    return bool(offline) or flag.lower() in ("1", "true", "yes", "on")


def _cached_json(target: _Target, access: _Access) -> dict[str, Any]:
    """Return a document from the default cache: offline, that is all there is."""
    store = _Store(_cache_dir(None))
    source = next(access.sources(target))
    ident = _ident(source.place_id)
    for entry in store.find(ident, access.anonymous is not True, anew=True):
        try:
            document = _read_file(entry.path, target.text, source.uri)
        except (NotFoundError, AccessDeniedError):  # pruned since we looked, or another user's
            continue
        store.used(entry.path, entry.stamp)
        return document
    raise store.missing(ident, source.uri)


def _load_json(target: _Target, access: _Access) -> dict[str, Any]:
    _import_early()
    if access.offline:
        return _cached_json(target, access)
    return access.attempt(target, _read_json)


def _renamed(anon: bool | None, anonymous: bool | None) -> bool | None:
    """Return ``anonymous``, or what its old name says; the caller's caller is warned of that."""
    if anon is None:
        return anonymous
    import warnings

    warnings.warn("'anon' is deprecated, use 'anonymous'", DeprecationWarning, stacklevel=3)
    return anon


def get_json_s3(
    bucket: str,
    key: str,
    s3_client: Any = None,
    anonymous: bool | None = None,
    anon: bool | None = None,
) -> dict[str, Any]:
    """Read a JSON object from S3.

    Parameters
    ----------
    bucket, key : str
        Exact, as `parse_s3_uri` returns them.
    s3_client : boto3 S3 client, optional
        Used whatever it is configured for.
    anonymous : bool, optional
        None: unsigned first, signed if that is refused, or finds no such bucket, and boto3 has
        credentials. True: unsigned only. False: signed only.
    anon : bool, optional
        Deprecated name of `anonymous`.

    Returns
    -------
    dict

    Raises
    ------
    NotFoundError, AccessDeniedError, TransferError, IntegrityError
        As in `get_local_path_for_resource`.
    InvalidJSONError
        Not JSON, more than 256 MiB, nested too deeply, or a broken Content-Encoding.
    TypeError
        The document is not a mapping.
    MissingDependencyError, botocore.exceptions.NoCredentialsError
        Signed access without boto3, or without credentials.
    OfflineError
        ``AIND_S3_CACHE_OFFLINE`` is set and the default cache does not hold the object.
    """
    anonymous = _renamed(anon, anonymous)
    bucket = _text(bucket)
    target = _target(f"s3://{bucket}/{_text(key)}")
    if target.bucket != bucket:
        raise ValueError(f"Not a valid S3 URI: no bucket can be called '{_printable(bucket)}'")
    return _load_json(target, _Access(anonymous, s3_client, _is_offline()))


def get_json_s3_uri(
    uri: str, s3_client: Any = None, anonymous: bool | None = None
) -> dict[str, Any]:
    """Read a JSON object from an ``s3://`` URI.

    Parameters
    ----------
    uri : str
    s3_client, anonymous
        As in `get_json_s3`.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        Not an S3 URI. All else is as in `get_json_s3`.
    """
    return get_json_s3(*parse_s3_uri(uri), s3_client=s3_client, anonymous=anonymous)


def get_json_url(url: str) -> dict[str, Any]:
    """Read a JSON object from an http(s) URL.

    Parameters
    ----------
    url : str

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        Not an http(s) URL. All else is as in `get_json_s3`.
    """
    text = _text(url)
    if _scheme(text) not in ("http", "https"):
        raise ValueError(f"Not an http(s) URL: '{_redact_bad(text)}'")
    return _load_json(_target(text), _Access(offline=_is_offline()))


def get_json(
    file_url_or_bucket: StrPath,
    key: str | None = None,
    s3_client: Any = None,
    anonymous: bool | None = None,
    anon: bool | None = None,
) -> dict[str, Any]:
    """Read a JSON object from S3, a URL or a file. Reads, does not cache.

    To cache: ``get_json(get_local_path_for_resource(uri))``.

    Parameters
    ----------
    file_url_or_bucket : str or os.PathLike
        ``s3://bucket/key``, an http(s) URL, a ``file:`` URI or a path; or a bucket, with `key`.
    key : str, optional
        Key in the bucket.
    s3_client, anonymous, anon
        As in `get_json_s3`; of no effect on URLs and files.

    Returns
    -------
    dict
        UTF-8, UTF-16 and UTF-32 are understood, with or without a byte-order mark, and so are gzip
        and deflate, with or without a Content-Encoding. As in 0.1, NaN and Infinity are accepted.

    Raises
    ------
    ValueError
        A URL of another scheme.
    NotFoundError, AccessDeniedError, TransferError, IntegrityError, InvalidJSONError, TypeError
        As in `get_json_s3`.
    """
    # By the public functions: tests written for 0.1 put others in their place.
    text, anonymous = _text(file_url_or_bucket), _renamed(anon, anonymous)
    if key is not None:
        return get_json_s3(text, key, s3_client=s3_client, anonymous=anonymous)
    scheme = _scheme(text)
    if scheme == "s3":
        return get_json_s3_uri(text, s3_client=s3_client, anonymous=anonymous)
    if scheme in ("http", "https"):
        return get_json_url(text)
    return _read_file(_local_path(text), text, _redact_path(text))


# ==== 9 Cache =====================================================================================
# Policy: joins sources and store. Localize one, many, a tree; CacheManager.


class LocalizedResource(_Record):
    """Where a resource is on this machine. Immutable, comparable, picklable, `os.PathLike`.

    Attributes
    ----------
    path : pathlib.Path
        Absolute. Its content never changes: a new version of the object gets a new path. Its
        modification time is when the server last confirmed it, and no mark of a change.
    from_cache : bool
        True if nothing was downloaded; False for local paths.
    source : str
        ``"s3"``, ``"http"`` or ``"local"``.
    status : str
        ``"downloaded"``; ``"revalidated"`` (the server said unchanged); ``"fresh"`` (no request:
        within `max_age`, or offline); ``"stale"`` (the server could not be reached); ``"local"``.
    uri : str
        What was asked for, without user, password and query.
    etag : str or None
        As the server sent it, quotes included.
    size : int or None
        Bytes.
    """

    __slots__ = ("_path", "from_cache", "source", "status", "uri", "etag", "size")  # noqa: RUF023
    __match_args__ = ("path", *__slots__[1:])
    _path: str
    from_cache: bool
    source: str
    status: str
    uri: str
    etag: str | None
    size: int | None

    def __init__(
        self,
        path: StrPath,
        from_cache: bool,
        source: str,
        status: str | None = None,
        uri: str = "",
        etag: str | None = None,
        size: int | None = None,
    ) -> None:
        if status is None:
            status = "local" if source == "local" else "fresh" if from_cache else "downloaded"
        put = object.__setattr__  # one by one: a loop takes half as long again
        put(self, "_path", os.fspath(path))
        put(self, "from_cache", from_cache)
        put(self, "source", source)
        put(self, "status", status)
        put(self, "uri", uri)
        put(self, "etag", etag)
        put(self, "size", size)

    @property
    def path(self) -> Path:
        """Where it is, as an absolute `pathlib.Path`."""
        return _path_class()(self._path)

    def __fspath__(self) -> str:
        return self._path


class _Theirs(BaseException):
    """What the caller's progress raised, past all who judge and retry what a transfer raises."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class _Meter:
    """Counts the bytes of a call, here for nobody: without progress it is its own tally, too."""

    def __call__(self, size: int) -> None: ...
    def expect(self, size: int) -> None: ...
    def undo(self) -> None: ...
    def close(self) -> None: ...


_SILENT = _Meter()


class _Told(_Meter):
    """Passes byte counts to the caller's progress, from any thread."""

    def __init__(self, callback: Callable[[int], object]) -> None:
        self.callback, self._lock = callback, threading.Lock()

    def __call__(self, size: int) -> None:
        with self._lock:
            try:
                self.callback(size)
            except Exception as error:
                raise _Theirs(error) from None


class _Tally(_Meter):
    """Counts for a meter what one attempt brings, so that it can be taken back."""

    def __init__(self, meter: _Meter) -> None:
        self._meter, self._lock = meter, threading.Lock()
        self._done = self._expected = 0

    def __call__(self, size: int) -> None:
        with self._lock:
            self._done += size
        self._meter(size)

    def expect(self, size: int) -> None:
        self._expected += size
        self._meter.expect(size)

    def undo(self) -> None:
        """Start again from nothing."""
        if self._done:
            self._meter(-self._done)
        self._meter.expect(-self._expected)
        self._done = self._expected = 0


class _Bar(_Told):
    """One line on a terminal: bytes, rate, estimate; nothing at all anywhere else."""

    def __init__(self) -> None:
        super().__init__(self._count)
        self._done = self._total = 0
        self._began = time.monotonic()
        self._drawn = 0.0
        try:
            self._shown = sys.stderr.isatty()
        except (AttributeError, ValueError):  # there is none, or it is closed
            self._shown = False

    def expect(self, size: int) -> None:
        with self._lock:
            self._total += size

    def _count(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if self._shown and now - self._drawn > 0.1:
            self._drawn = now
            self._draw(now)

    def _write(self, text: str) -> None:
        try:
            sys.stderr.flush()
            # Not through its buffer: what stays there would fail the whole process at its exit.
            os.write(sys.stderr.fileno(), text.encode())
        except (OSError, ValueError):  # the terminal is gone, or closed: the download goes on
            self._shown = False

    def _draw(self, now: float) -> None:
        rate = self._done / max(now - self._began, 0.001)
        line = f"{_human(self._done)} at {_human(rate)}/s"
        if self._total > self._done:
            left = (self._total - self._done) / max(rate, 1.0)
            line += (
                f", {100 * self._done // self._total} % of {_human(self._total)}, {left:.0f} s left"
            )
        self._write(f"\r\x1b[K{line}")

    def close(self) -> None:
        if self._drawn:
            self._draw(time.monotonic())
            self._write("\n")


def _meter(progress: Progress) -> _Meter:
    if progress is True:
        return _Bar()
    if progress and not callable(progress):
        raise TypeError("progress must be True or callable")
    return _Told(progress) if progress else _SILENT


class _Options:
    """How to localize: one set for one, many and trees, and for other processes."""

    def __init__(
        self,
        *,
        cache_dir: StrPath | None = None,
        s3_client: Any = None,
        anonymous: bool | None = None,
        max_concurrency: int = 16,
        multipart_threshold_bytes: int = _SMALL,
        max_age: float = 0,
        offline: bool = False,
        stale_if_error: bool = False,
        version_id: str | None = None,
        progress: Progress = None,
    ) -> None:
        _require("max_concurrency", max_concurrency, "__index__", "a whole number")
        _require("multipart_threshold_bytes", multipart_threshold_bytes, "__float__", "a number")
        _require("max_age", max_age, "__float__", "a number of seconds")
        if max_concurrency < 1 or not multipart_threshold_bytes >= 1:  # nan, too
            raise ValueError("max_concurrency and multipart_threshold_bytes must be at least 1")
        if version_id is not None and not isinstance(version_id, str):
            raise TypeError("version_id must be str")
        if version_id == "" or (version_id and not version_id.isprintable()):
            raise ValueError(f"version_id cannot be {version_id!r}")
        self.store = _Store(_cache_dir(cache_dir))
        self.access = _Access(anonymous, s3_client, _is_offline(offline))
        self.max_concurrency, self.threshold = max_concurrency, multipart_threshold_bytes
        self.max_age, self.stale_if_error = max_age, stale_if_error
        self.unasked = self.access.offline or max_age > 0  # what the store holds may do
        self.version = version_id
        # How many bytes the first range asks for, in whole chunks.
        self.asked = max(_WHOLE, int(min(multipart_threshold_bytes, _SMALL)) // _CHUNK * _CHUNK)
        self.meter = _meter(progress)
        self.switch: _Stop | None = None

    def under(self, switch: _Stop) -> _Options:
        """Return the same options for work that this switch stops."""
        other = object.__new__(_Options)
        other.__dict__.update(self.__dict__, switch=switch)
        return other


class _Seat:
    """Who fetches an object, how deep it is in that, who waits for it, and how it failed."""

    owner = depth = waiting = 0
    changed: threading.Condition | None = None
    error: S3CacheError | None = None


_FLIGHTS: dict[tuple[str, str], _Seat] = {}
_FLIGHTS_LOCK = threading.RLock()  # a Ctrl-C amid a wait may come before a Lock is held again


def _pass_on(key: tuple[str, str], seat: _Seat) -> None:
    """Wake one of those that wait for a seat, or forget it; the lock is held."""
    if seat.owner or _FLIGHTS.get(key) is not seat:  # after a fork: the parent's
        return
    if seat.waiting and seat.changed:
        seat.changed.notify()
    else:
        _FLIGHTS.pop(key, None)  # a signal handler may just have called us for the same


class _Flight:
    """Lets one thread of this process at a time fetch an object; the thread may enter twice.

    Those who wait fail together with the one they wait for: asked anew for each, a server that
    stalls would keep the last of them for as many minutes as there are threads. Not where a client
    of boto3 asks: the next caller's may be set up otherwise.
    """

    def __init__(self, key: tuple[str, str], switch: _Stop | None, source: _Source) -> None:
        self._key, self._switch, self._shares = key, switch, not source.signed

    def is_free(self) -> bool:
        """Tell whether no other thread has it just now."""
        seat = _FLIGHTS.get(self._key)
        return seat is None or seat.owner in (0, threading.get_ident())

    def __enter__(self) -> None:
        me = threading.get_ident()
        with _FLIGHTS_LOCK:
            self._seat = seat = _FLIGHTS.get(self._key) or _Seat()
            if seat.owner not in (0, me):
                self._wait(seat, me)
            _FLIGHTS[self._key], seat.owner, seat.depth = seat, me, seat.depth + 1
            seat.error = None

    def _wait(self, seat: _Seat, me: int) -> None:
        _TURN.leave()
        seat.changed = seat.changed or threading.Condition(_FLIGHTS_LOCK)
        seat.waiting += 1
        try:
            while seat.owner not in (0, me):
                seat.changed.wait(0.5)  # not for ever: a batch may be stopped meanwhile
                if self._switch:
                    self._switch.check()
                if seat.error and self._shares:
                    raise _rebuild(*seat.error.__reduce__()[1])
        except BaseException:
            seat.waiting -= 1
            _pass_on(self._key, seat)
            raise
        seat.waiting -= 1

    def _release(self) -> None:
        seat = self._seat
        if seat.depth > 1:
            seat.depth -= 1
            return
        seat.depth, seat.owner = 0, 0  # without the lock: a Ctrl-C there must leave nobody waiting
        with _FLIGHTS_LOCK:
            _pass_on(self._key, seat)

    def _fail(self, error: TransferError) -> None:
        stopped = self._switch and self._switch.event.is_set()  # that is no failure
        if stopped or not self._shares:
            return
        seat = self._seat
        with _FLIGHTS_LOCK:
            if seat.depth == 1 and seat.changed and _FLIGHTS.get(self._key) is seat:
                seat.error = error
                del _FLIGHTS[self._key]  # whoever comes from here on asks anew
                seat.changed.notify_all()

    def __exit__(self, _: object, error: object, __: object) -> None:
        try:
            if isinstance(error, TransferError):
                self._fail(error)
        finally:
            self._release()


def _let_go() -> None:
    """Give up what this thread has of turns and flights: a Ctrl-C may have come amid their end."""
    _TURN.exit(True)
    me = threading.get_ident()
    with _FLIGHTS_LOCK:
        for key, seat in list(_FLIGHTS.items()):
            if seat.owner == me:
                seat.depth, seat.owner = 0, 0
            _pass_on(key, seat)


def _after_fork() -> None:
    """Forget, in the child, all sockets, and the locks that threads of the parent held."""
    global _FLIGHTS_LOCK, _CLIENT_LOCK, _IMPORTS, _TURN
    _POOL.after_fork()
    _TURN = _Turn()
    _FLIGHTS_LOCK, _CLIENT_LOCK, _IMPORTS = threading.RLock(), threading.RLock(), threading.RLock()
    _FLIGHTS.clear()
    _ASKED.clear()
    _CREWS.clear()
    _CLIENTS.clear()
    _process_id.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _Cpu(threading.local):
    """The CPU time that our own threads use: what else the process does is not our business."""

    total = 0.0  # seconds, of all threads
    _noted = 0.0

    def note(self) -> None:
        """Add what this thread has used since it was here last."""
        now = time.thread_time()
        _Cpu.total += now - self._noted  # a lost update is no harm
        self._noted = now


_CPU = _Cpu()


_CREWS: set[_Crew] = set()  # at work, in all calls


def _share() -> int:
    """Return how many threads a crew may add, so that all may; below 0 it has more already."""
    crews = _CREWS.copy()
    if len(crews) < 2:  # what the caller allows for one is the caller's business
        return sys.maxsize
    return (_WORKERS_ALL - sum(crew.active for crew in crews)) // len(crews)


class _Crew:
    """Threads for one job: as many as it turns out to need, gone when it ends however it ends."""

    def __init__(self, work: Callable[[], None], switch: _Stop) -> None:
        self._work, self._switch = work, switch
        self._changed = threading.Condition()
        self.active = 0
        self._errors: list[BaseException] = []

    def _body(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._errors.append(error)
            self._switch.stop()
        with self._changed:
            self.active -= 1
            self._changed.notify_all()

    def _start(self, count: int) -> None:
        for _ in range(count):
            with self._changed:
                self.active += 1
            if not _start_thread(self._body):
                if self.active > 1:
                    with self._changed:
                        self.active -= 1
                    return
                self._body()

    def run(self, start: int, grow: Callable[[int], int]) -> None:
        """Work with ``start`` threads; now and then ``grow(active)`` says how many more."""
        try:
            _CREWS.add(self)
            self._start(start)
            while True:
                with self._changed:
                    self._changed.wait_for(self._is_due, _GROW_EVERY)
                done = not self.active  # before the errors: the last worker notes its own first
                if self._errors:
                    raise self._errors[0]
                if done:
                    return
                self._start(grow(self.active))
        except BaseException as error:
            self._switch.stop()
            with self._changed:
                # Threads are daemons and their sockets shut; one that resolves a name or connects
                # may need half a minute. A second is all that an error or Ctrl-C may take.
                self._changed.wait_for(lambda: not self.active, self._switch.grace)
            self._errors.clear()  # whoever stays behind must not keep what the traceback holds
            _unmask(error)
            raise
        finally:
            _CREWS.discard(self)

    def _is_due(self) -> bool:
        return bool(self._errors) or not self.active


def _read_at(fd: int, start: int, size: int) -> bytes:
    """Read exactly so many bytes of our own file; a read may be short (read(2))."""
    data = b""
    while len(data) < size:
        if hasattr(os, "pread"):
            more = os.pread(fd, size - len(data), start + len(data))
        else:
            with _SEEK_LOCK:
                os.lseek(fd, start + len(data), os.SEEK_SET)
                more = os.read(fd, size - len(data))
        if not more:
            raise OSError(errno.EIO, "a file of ours is shorter than it was")
        data += more
    return data


class _Behind:
    """Hashes a growing partial file in order, beside its download, for one promise of it."""

    def __init__(self, file: _Partial, name: str, promised: bytes) -> None:
        self._file, self._name, self._promised = file, name, promised
        self._hash, self._stop = _hasher(name), False
        self._next = 0  # chunk
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin now; without a thread, after the download."""
        self._thread = _start_thread(self._run)

    def _run(self) -> None:
        if not self._file.hold():
            return
        try:
            self._follow()
        except OSError:  # whoever asks for the digest meets it again
            pass
        finally:
            self._file.release()

    def _follow(self) -> None:
        while self._next < self._file.count and not self._stop:
            if self._file.state[self._next] != 2:
                time.sleep(0.005)
                continue
            start, stop = self._file.chunk(self._next)
            self._hash.update(_read_at(self._file.fd, start, stop - start))
            self._next += 1

    def check(self, source: _Source) -> None:
        """Compare the whole file, which is complete by now, with what was promised of it."""
        if self._thread:
            self._thread.join()
        with _Disk(self._file.path):
            self._follow()  # what a thread has left to us, if there is one
        if self._hash.digest() != self._promised:
            raise _mismatch(source, self._name)

    def close(self) -> None:
        """End the thread, if its digest is no longer wanted."""
        self._stop = True


class _Download:
    """A large object on its way to disk: parallel ranges, each pinned to one version."""

    def __init__(
        self,
        source: _Source,
        answer: _Answer,
        file: _Partial,
        opt: _Options,
        first: bool,
        tally: _Meter,
    ) -> None:
        assert answer.etag is not None
        self.source, self.file, self.opt, self.tally = source, file, opt, tally
        self.etag = answer.etag
        self.first: _Answer | None = answer if first else None
        self.switch = _Stop(opt.switch)
        if first:
            self.switch.hold(answer.body)
        self.received, self.least = 0, _SPAN_FAR
        self.body = answer.body  # as all the others will be
        single = (first and answer.status == 200) or file.total <= opt.threshold
        self.limit = 1 if single else opt.max_concurrency

    def span(self) -> int:
        """Return how much the next range should ask for: less towards the end, which all reach."""
        return min(_SPAN, max(self.least, self.file.free * _CHUNK // (2 * self.limit)))

    def count(self, size: int) -> None:
        self.received += size
        self.tally(size)

    def work(self) -> None:
        """Fetch runs of chunks until none is free: what one worker does."""
        if not self.file.hold():
            return
        try:
            buffer = _buffer(self.body)
            patience = _Patience(self.switch, gauge=partial(self.file.state.count, 2))
            while True:
                with self.file.lock:
                    first, self.first = self.first, None
                run = (0, first.stop or self.file.total) if first else self.file.take(self.span())
                if run is None:
                    return
                self.switch.check()
                self._fetch(first, *run, buffer, patience)
        finally:
            self.file.release()

    def _fetch(
        self, answer: _Answer | None, start: int, stop: int, buffer: memoryview, patience: _Patience
    ) -> None:
        sink = _Chunks(self.file.write, buffer, self.count, start)
        asked = answered = time.monotonic()
        if answer is None:
            answer = _resume(self.source, sink, stop, self.etag, self.file.total, patience)
            if answer.status == 200:
                answer.body.close()
                raise _AskPlainly
            answered = time.monotonic()
        _pull(self.source, answer, sink, stop, patience)
        patience.progress()
        if answered > asked:  # let a range take twice as long as a round trip
            pace = (stop - start) / max(time.monotonic() - answered, 1e-6)
            self.least = min(_SPAN_FAR, max(_CHUNK, int(2 * (answered - asked) * pace)))
        _CPU.note()

    def run(self, found: Callable[[], _Entry | None]) -> _Entry | None:
        """Bring all chunks; return the entry instead if a peer publishes it first."""
        scanned, pause, entry = time.monotonic(), 1.0, None
        looks = [(scanned, 0)]  # the last of them: a machine may stand still for one

        def grow(active: int) -> int:
            nonlocal scanned, pause, entry
            if entry:
                return 0
            now = time.monotonic()
            if now - scanned > pause and self.file.shared:
                self.tally.expect(-self.file.adopt())
                scanned = time.monotonic()
                pause = max(1.0, 20 * (scanned - now))  # the logs of a TiB have millions of lines
                entry = found()
                if entry:
                    self.switch.stop()
                    return 0
            began, seen = looks.pop(0) if len(looks) > 9 else looks[0]
            rate = (self.received - seen) / (now - began)
            looks.append((now, self.received))
            free = self.file.free * _CHUNK // self.span() + 1
            # More connections help where each is slow; on a fast server they only cost.
            slow = rate < active * _WORKER_RATE
            return min(self.limit - active, free, _share()) if slow else 0

        runs = -(-self.file.free * _CHUNK // self.span()) + (self.first is not None)
        crew = _Crew(self.work, self.switch)
        try:
            crew.run(max(1, min(_WORKERS_START, self.limit, runs)), grow)
            if self.file.free and not entry:
                self.work()  # what could not be adopted after all, when the last worker had left
        except TransferError:
            if not entry:
                raise
        finally:
            if self.opt.switch:
                self.opt.switch.drop(self.switch)
        if not entry and self.file.state.count(2) < self.file.count:
            raise IntegrityError("A part of the object is missing", uri=self.source.uri)
        return entry


def _is_same(entry: _Entry, answer: _Answer) -> bool:
    """Tell whether an entry holds what an answer brings: same ETag, or same date and size."""
    validator = _validator(answer) if answer.status in (200, 206) else ""
    if not validator or entry.validator != validator:
        return False
    return answer.total == entry.size or (answer.total is None and validator[0] != "m")


_ASKED: dict[tuple[str, str], _Fetch] = {}  # (root, object) -> who sent a request for it ahead


def _result(
    source: _Source, path: str, status: str, etag: str | None, size: int
) -> LocalizedResource:
    from_cache = status != "downloaded"
    return LocalizedResource(path, from_cache, source.kind, status, source.uri, etag, size)


def _held(source: _Source, entry: _Entry, status: str) -> LocalizedResource:
    return _result(source, entry.path, status, entry.etag, entry.size)


class _Fetch:
    """One object: what the cache holds of it, what was asked, and what comes of that."""

    begun: _Exchange | None = None  # sent ahead: its answer is still to be read
    newest: _Entry | None = None  # on the condition that we do not hold this
    plain = False  # ask without range and conditions
    doubted = False  # bytes were not as promised: use nothing of that try
    waited = False  # in vain, for whoever was first: no answer is given up for another again

    def __init__(self, source: _Source, opt: _Options) -> None:
        self.source, self.opt, self.store = source, opt, opt.store
        self.ident = ident = _ident(source.place_id)
        self.key, self.shard = (opt.store.root, ident), opt.store.shard(ident)
        self.known = _known(self.shard)
        self.added = len(self.known.added)
        # Private entries are for whoever asks with credentials, or for callers who do not insist on
        # going without; as a condition they serve the former only.
        self.every = source.private or opt.access.anonymous is not True
        self.entries = self.held = opt.store.find(ident, self.every, anew=opt.access.offline)
        if self.entries and not source.private:
            self.held = [entry for entry in self.entries if not entry.private]
        self.tally = _SILENT if opt.meter is _SILENT else _Tally(opt.meter)

    def renew(self, awaited: bool = False) -> None:
        """Look again if others may have added the object since."""
        known = _known(self.shard)
        if awaited or known is not self.known or self.added != len(known.added):
            self.held = self.store.find(self.ident, self.source.private)

    def _first(self, newest: _Entry | None) -> Fields:
        """Return what to ask for first: a range, unless the object is still what we hold."""
        etag, modified = (newest.etag, newest.modified) if newest else (None, None)
        fields = {"Range": f"bytes=0-{self.opt.asked - 1}"}
        if etag:
            fields["If-None-Match"] = etag
        elif modified:
            fields["If-Modified-Since"] = modified
        return fields

    def ask_ahead(self) -> bool:
        """Send the first request now, to read its answer in the call's turn; False if not."""
        if self.key in _FLIGHTS or self.key in _ASKED:
            return False  # what another thread fetches is not asked for twice
        self.newest = self.held[0] if self.held else None
        self.begun = exchange = self.source.exchange(self._first(self.newest), self.opt.switch)
        if exchange is None:
            return False
        try:
            _ASKED[self.key] = self
            exchange.send_ahead()
        except BaseException:
            self.close()
            raise
        return True

    def close(self) -> None:
        """Leave what was asked for and not read."""
        begun, self.begun = self.begun, None
        if begun:
            begun.close()
        if _ASKED.get(self.key) is self:
            del _ASKED[self.key]

    def run(self) -> LocalizedResource:
        """Ask, with what we hold as the condition, until the answer is one to keep."""
        self.patience, changes = _Patience(self.opt.switch), 0
        while True:
            try:
                found = self._once()
                if found:
                    _QUOTA.give()
                    return found
                self.held = []  # gone since we looked: ask without a condition
            except _Changed:
                changes += 1
                if changes > _CHANGES:
                    text = f"The object changed {changes} times while it was downloaded"
                    raise IntegrityError(text, uri=self.source.uri) from None
                if changes == _CHANGES:  # or each node of a web server has an ETag of its own
                    self.plain = True  # one body is of one version
            except _AskPlainly:
                self.plain = True
            except IntegrityError:
                if self.doubted:
                    raise
                self.doubted = True
            except TransferError as error:
                error._name(self.source.uri)
                self.patience.after(error)
            self.tally.undo()

    def _once(self) -> LocalizedResource | None:
        """Ask once and do what the answer says; None if what we held is gone."""
        held, begun = self.held, None
        newest = held[0] if held and not self.plain else None
        fields: Fields = {}
        if self.begun and newest is self.newest and not self.plain:  # else it was asked otherwise
            begun, self.begun = self.begun, None
        elif not self.plain:
            fields = self._first(newest)
        answer = self.source.read(fields, self.opt.switch, begun)
        try:
            same = next((e for e in held if _is_same(e, answer)), None) if held else None
            sent = newest is not None and bool(newest.etag or newest.modified)
            verdict = _judge(answer, sent, same is not None, self.opt.asked)
            if verdict == "unchanged":
                entry = same or newest
                if entry and self.store.confirm(entry.path):
                    return _held(self.source, entry, "revalidated")
                return None
            if verdict != "again":
                return self._bring(verdict, answer)
            if not self.plain:
                raise _AskPlainly
            raise TransferError("The server refuses to send the object", status=answer.status)
        finally:
            answer.body.close()

    def _bring(self, verdict: str, answer: _Answer) -> LocalizedResource:
        """Bring an object in the way that fits it."""
        status = "downloaded"
        self.tally.expect(answer.total or 0)
        if verdict == "small":
            path = self._small(answer)
        else:
            _TURN.leave()
            if verdict == "stream":
                path = self._stream(answer)
            else:
                path, shared = self._large(answer)
                if shared:  # what came of it is thrown away
                    status = "revalidated"
                    self.tally.undo()
        size = _Entry(path).size if answer.total is None else answer.total
        _log(_INFO, "%s %s: %d bytes", status, self.source.uri, size)
        return _result(self.source, path, status, answer.etag, size)

    def _small(self, answer: _Answer) -> str:
        """Keep a small object in memory until it is whole and checked, then write it at once."""
        size = answer.total or 0
        data = bytearray(size)
        view = memoryview(data)
        _pull(self.source, answer, _Sink(view, self.tally), size, self.patience)
        _check_bytes(self.source, answer, data)
        validator = _validator(answer)
        if not validator:
            sha = _hasher("sha256")
            sha.update(data)
            validator = "n" + sha.hexdigest()[:20]
        name = self.store.name(self.ident, self.source, validator, size, _checksum(_crcs(view)))
        return self.store.add(self.ident, name, view, self.source.private)

    def _stream(self, answer: _Answer) -> str:
        """Write one body to disk in order: of medium size, or of a length nobody knows yet."""
        digests, validator = _digests(self.source, answer), _validator(answer)
        names = [name for name, _ in digests] + ([] if validator else ["sha256"])
        total = answer.total
        file = _Spool(self.store, self.ident, self.source.private, total or 0, names)
        try:
            sink = _Chunks(file.write, _buffer(answer.body), self.tally, 0)
            if total is None:
                _pull_to_end(answer, sink, self.patience)
            else:
                _pull(self.source, answer, sink, total, self.patience)
            for name, promised in digests:
                if file.digest(name) != promised:
                    raise _mismatch(self.source, name)
            validator = validator or "n" + file.digest("sha256").hex()[:20]
            return file.publish(
                self.store.name(self.ident, self.source, validator, sink.at, _checksum(file.crcs))
            )
        finally:
            file.close()

    def _large(self, answer: _Answer) -> tuple[str, bool]:
        """Bring a large object with a strong ETag; True if in the end a peer brought it.

        One thread of this process, then one process of all that share the directory: whoever has
        to wait lets go of the answer it already has, and looks again.
        """

        def found() -> _Entry | None:
            entries = self.store.find(self.ident, self.source.private)
            return next((entry for entry in entries if _is_same(entry, answer)), None)

        # Flight and lock may fail to exclude: then two download, and the store is none the worse.
        flight = _Flight(self.key, self.opt.switch, self.source)
        first = self.waited or flight.is_free()
        if not first:
            answer.body.close()
        with flight, _Lock(self.store, self.ident) as lock:
            if first and not lock.acquire() and not self.waited:
                answer.body.close()
                first = False
            entry = found() if first else lock.await_peer(found, self.opt.switch)
            self.waited = self.waited or not first
            if entry and self.store.confirm(entry.path):
                return entry.path, True
            return self._parts(answer, first, lock.held, found)

    def _parts(
        self, answer: _Answer, first: bool, alone: bool, found: Callable[[], _Entry | None]
    ) -> tuple[str, bool]:
        """Copy what peers and the dead left of this very version, fetch the rest, publish."""
        source, total, validator = self.source, answer.total or 0, _validator(answer)
        version = _digest(validator, str(total), str(_CHUNK), _owner(source.private))[:16]
        file = _Partial(self.store, self.ident, version, total, source.private, alone)
        hashes: list[_Behind] = []
        try:
            if first:
                file.claim(0, -(-(answer.stop or 0) // _CHUNK))
            copied = 0 if self.doubted else file.adopt()
            self.tally.expect(-copied)
            _log(_DEBUG, "downloading %s: %d bytes, %d found", source.uri, total, copied)
            for name, promised in _digests(source, answer):
                hashes.append(_Behind(file, name, promised))
                hashes[-1].start()  # known by now: a Ctrl-C amid this ends it below
            entry = _Download(source, answer, file, self.opt, first, self.tally).run(found)
            if entry:
                if not self.store.confirm(entry.path):
                    raise _Changed  # gone again, and our own file is unfinished
                _drop_partial(file.path)
                return entry.path, True
            file.linger()
            for behind in hashes:
                behind.check(source)
            name = self.store.name(self.ident, self.source, validator, total, _checksum(file.crcs))
            return file.publish(self.store.shard(self.ident), name), False
        except BaseException as error:
            # After all else, be it Ctrl-C or a login that expires, the bytes may be of use.
            vain = _Changed, _AskPlainly, NotFoundError, IntegrityError, CacheError
            if isinstance(error, vain) or 2 not in file.state:
                _drop_partial(file.path)
            if isinstance(error, CacheError) and file.should_begin_anew(error):
                raise _Changed from None
            raise
        finally:
            for behind in hashes:
                behind.close()
            file.close()


def _may_be_stale(opt: _Options, error: TransferError) -> bool:
    """Tell whether the last copy may stand in for an answer: no answer, 429 or 5xx."""
    stopped = opt.switch is not None and opt.switch.event.is_set()
    return opt.stale_if_error and (error.status or 500) >= 429 and not stopped


def _unasked(
    source: _Source, opt: _Options, held: Sequence[_Entry], error: TransferError | None = None
) -> LocalizedResource | None:
    """Return the newest that is held, if it may be served without an answer; else None.

    That is what is young enough, or offline all; after an error, for which the last copy may stand
    in, all as well.
    """
    for entry in held:
        if not error and not opt.access.offline:
            age = time.time() - opt.store.validated(entry)
            if not 0 <= age <= opt.max_age:
                return None
        opt.store.used(entry.path, entry.stamp)
        if entry.check():  # nobody prunes it from here on
            if error:
                import logging  # noqa: F401  the warning is for processes without it, too

                _log(_WARNING, "serving a stale copy of %s: %s", source.uri, error)
            return _held(source, entry, "stale" if error else "fresh")
    return None


# A tree: a listing, the objects it names, and a directory of hard links to them.


def _list_all(source: _S3, prefix: str, switch: _Stop | None) -> list[_Key]:
    """Return all objects below a prefix; directory markers left out."""
    found: list[_Key] = []
    token: str | None = None
    seen: set[str] = set()
    empty = 0  # pages in a row: S3 may send some where much was deleted
    while True:
        if switch:
            switch.check()
        page = partial(source.list_page, prefix, token, switch)
        keys, token = _Patience(switch).insist(page)
        _QUOTA.give()
        if not all(key.key.startswith(prefix) for key in keys):
            raise TransferError("The listing names keys of elsewhere", uri=source.uri)
        found += [key for key in keys if not (key.key.endswith("/") and key.size == 0)]
        if token is None:
            return found
        empty = 0 if keys else empty + 1
        if token in seen:
            raise TransferError("The listing repeats itself", uri=source.uri)
        if empty > _EMPTY_PAGES:
            raise TransferError("The listing does not end", uri=source.uri)
        seen.add(token)


_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{n}" for d in ("com", "lpt") for n in range(1, 10))}


def _unsafe(part: str) -> bool:
    """Tell whether a part of a key cannot be a file name here."""
    try:
        if part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > 255:
            return True
    except UnicodeEncodeError:  # where the locale is ASCII
        return True
    if os.name == "nt":
        stem = part.partition(".")[0].rstrip().lower()
        foreign = any(c in '<>:"\\|?*' or c < " " for c in part)
        return stem in _RESERVED or part[-1] in ". " or foreign
    return False


def _folders(names: Iterable[str]) -> list[str]:
    """Return the directories that relative paths lie in, each once."""
    found: dict[str, None] = {}
    for name in names:
        folder = name.rpartition("/")[0]
        while folder and folder not in found:
            found[folder] = None
            folder = folder.rpartition("/")[0]
    return list(found)


def _check_files(files: dict[str, _Key], folds: bool) -> None:
    """Refuse, by name, a key whose path in a tree cannot be a file's."""
    fold = str.casefold if folds else str
    taken: dict[str, str] = {}
    for name, key in files.items():
        # S3 has no longer ones; thousands of levels are more than Python can remove again.
        if len(key.key.encode()) > 1024 or any(map(_unsafe, name.split("/"))):
            raise CacheError(f"Cannot be a file name: {key.key[:1024]!r}", errno=errno.EINVAL)
        twin = taken.setdefault(fold(name), name)
        if twin != name:
            raise CacheError(f"Differ only in case: {twin!r}, {name!r}", errno=errno.EEXIST)
    folded: dict[str, str] = {}
    for folder in _folders(files):
        if fold(folder) in taken:
            raise CacheError(f"Both file and directory: {folder!r}", errno=errno.ENOTDIR)
        if folded.setdefault(fold(folder), folder) != folder:
            raise CacheError(f"Directories differ only in case: {folder!r}", errno=errno.EEXIST)


class _Batch:
    """Acts on every item in a crew of threads; the first error stops all and is raised.

    A worker asks for the next objects (``look``) before it reads the present one: a near server
    answers faster than threads take turns, so that one who asks ahead beats many who wait.
    """

    def __init__(
        self,
        act: Callable[[Any, _Options, _Fetch | None], None],
        items: Iterable[Any],
        opt: _Options,
        look: Callable[[Any, _Options], _Fetch | None],
        limit: int = 0,
        beat: Callable[[], object] = int,
    ) -> None:
        self._act, self._items, self._opt, self._look = act, iter(items), opt, look
        self._beat = beat  # called now and then as long as the work lasts
        self._switch, self._limit = _Stop(opt.switch), limit or _BATCH_LIMIT
        self._lock = threading.Lock()
        self._begun: list[tuple[Any, _Fetch | None]] = []
        # Threads, how many objects are begun ahead, and whether that is worth it.
        self._threads, self._ahead, self._quick = 1, 0, False
        self._grown, self._cpu = time.monotonic(), _CPU.total

    def run(self) -> None:
        try:
            _Crew(self._work, self._switch).run(self._threads, self._grow)
            self._switch.check()  # stopped from above: what was done is not all
        finally:
            self._close()
            if self._opt.switch:
                self._opt.switch.drop(self._switch)

    def _grow(self, active: int) -> int:
        """Return how many threads are to join: many as long as all wait for the network."""
        now = time.monotonic()
        if now - self._grown < _BATCH_EVERY:
            return 0
        self._beat()
        used = _CPU.total
        busy = (used - self._cpu) / (now - self._grown)
        self._grown, self._cpu = now, used
        more = 0 if busy > _BATCH_BUSY else active if busy > 0.4 * _BATCH_BUSY else 3 * active
        with self._lock:
            count = max(0, min(more, self._limit - self._threads - self._ahead, _share()))
            self._threads += count
            return count

    def _begin(self, opt: _Options) -> None:
        """Ask for some objects ahead, and read what has come of that when all are sent."""
        begun: list[tuple[Any, _Fetch | None]] = []
        until = time.monotonic() + _AHEAD_TOGETHER
        try:
            while len(begun) < _AHEAD and time.monotonic() < until:
                with self._lock:
                    full = self._threads + self._ahead >= self._limit
                    full = full or len(_POOL.open) >= _WORKERS_ALL
                    item = None if full else next(self._items, None)
                    if item is None:
                        break
                    self._ahead += 1
                begun.append((item, None))
                try:
                    begun[-1] = item, self._look(item, opt)
                except (S3CacheError, OSError, ValueError, TypeError) as error:
                    if _is_of_handler(error):  # all else is met again, and reported, in its turn
                        raise
            for _, look in begun:
                if look and look.begun:
                    look.begun.read_ahead()
        finally:
            with self._lock:
                self._begun += begun
            if self._switch.event.is_set():  # nobody may be left to do it
                self._close()

    def _close(self) -> None:
        """Leave what was begun and not read."""
        for _, look in self._begun[:]:
            if look:
                look.close()

    def _next(self) -> tuple[Any, _Fetch | None] | None:
        with self._lock:
            if self._begun:
                self._ahead -= 1
                return self._begun.pop(0)
            item = next(self._items, None)
        return None if item is None else (item, None)

    def _work(self) -> None:
        opt = self._opt.under(self._switch)
        while not self._switch.event.is_set():
            if self._quick and len(self._begun) < 2:
                self._begin(opt)
            begun = None if self._switch.event.is_set() else self._next()
            if begun is None:
                return
            since = time.monotonic()
            item, look = begun
            try:
                self._act(item, opt, look)
            finally:
                if look:
                    look.close()
            self._quick = time.monotonic() - since < _AHEAD_WITHIN
            _CPU.note()


def _link(source: str, target: str) -> None:
    """Make a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except FileExistsError:
        # NFS may do it twice. Never written through: the file may be another entry of the cache.
        if not os.path.samefile(source, target):
            raise
    except OSError:
        # Some file systems have no links, or few for one file.
        import shutil

        shutil.copyfile(source, target)
        try:
            os.chmod(target, stat.S_IMODE(os.stat(source).st_mode))
        except OSError:  # nor modes
            pass


def _is_whole_tree(path: str, files: dict[str, _Key]) -> bool:
    """Tell whether a snapshot still has every file at its size."""
    try:
        for name, key in files.items():
            found = os.lstat(f"{path}/{name}")
            if not stat.S_ISREG(found.st_mode) or found.st_size != key.size:
                return False
    except OSError:
        return False
    return True


class _Snapshot(_Entry):
    """A tree that is held, as its name and what lies in it tell."""

    __slots__ = ()

    def __init__(self, path: str) -> None:
        self.path, self.stamp, self.etag = path, _tree_stamp(path), None

    def check(self) -> bool:
        """Tell whether it still has the files and bytes that its name says, or more."""
        try:
            count, size, _ = os.path.basename(self.path).split("_", 4)[2:]
            self.size = int(size, 16)
            walk = os.walk(self.path)
            sizes = [os.lstat(f"{at}/{name}").st_size for at, _, names in walk for name in names]
            return len(sizes) >= int(count, 16) and sum(sizes) >= self.size
        except (OSError, ValueError):  # nor a name of ours
            return False


class _Tree:
    """An S3 prefix as a local directory: an immutable snapshot of what one listing said."""

    def __init__(self, source: _Source, opt: _Options) -> None:
        assert isinstance(source, _S3)
        self.source, self.opt, self.store = source, opt, opt.store
        self.prefix = source.key if source.key.endswith("/") else source.key + "/"
        self.id = _digest(*source.place_id[:3], self.prefix, "tree")[:20]
        self.fetched = self.changed = False
        self.lost: NotFoundError | None = None  # what was deleted after it was listed

    def snapshots(self) -> list[_Snapshot]:
        """Return the snapshots that are held, validated last first."""
        if not self.store.exists():
            return []
        private = self.source.private or self.opt.access.anonymous is not True
        starts = (f"{self.id}_o", f"{self.id}_p") if private else (f"{self.id}_o",)
        errors: list[OSError] = []
        paths = _list(self.store.trees, errors)
        if errors and self.opt.access.offline:  # else the server knows
            raise _disk_error(errors[0], self.store.trees)
        held = [p for p in paths if os.path.basename(p).startswith(starts)]
        # Another user's is not to be read.
        found = [_Snapshot(path) for path in held if _may(path, os.R_OK)]
        return sorted(found, key=self.store.validated, reverse=True)

    def localize(self) -> LocalizedResource:
        held = self.snapshots()  # in any case: that refuses a root that others may have planted
        found = _unasked(self.source, self.opt, held) if self.opt.unasked else None
        if found:
            return found
        if self.opt.access.offline:
            raise OfflineError("Not in the cache, and offline", uri=self.source.uri)
        try:
            for _ in range(_CHANGES):
                keys = _list_all(self.source, self.prefix, self.opt.switch)
                if not keys:
                    raise NotFoundError(
                        "S3 object not found or inaccessible",
                        uri=self.source.uri,
                        status=404,
                        code="NoSuchKey",
                        hint="There is no such object, and no key below it",
                    )
                found = self.snapshot(keys)
                if found:
                    return found
        except TransferError as error:
            last = self.snapshots() if _may_be_stale(self.opt, error) else []
            found = _unasked(self.source, self.opt, last, error)
            if not found:
                raise
            return found
        raise self.lost or IntegrityError("The tree keeps changing", uri=self.source.uri)

    def snapshot(self, keys: list[_Key]) -> LocalizedResource | None:
        """Return the directory that a listing describes; None if it changes meanwhile."""
        files = {key.key[len(self.prefix) :]: key for key in keys}  # by the path in the tree
        _check_files(files, False)
        size = sum(key.size for key in files.values())
        # The listing is the identity of the snapshot: an unchanged one finds its directory.
        lines = (f"{name}\0{k.etag or k.modified}\0{k.size}" for name, k in files.items())
        owner = _owner(self.source.private)
        head = f"{self.id}_{owner[0]}{_digest(owner, *lines)[:16]}_{len(files):x}_{size:x}_"
        path = os.path.join(self.store.trees, _full_name(head, self.source.name))
        # Who waits for another thread's finds it whole.
        with _Flight((self.store.root, self.id), self.opt.switch, self.source):
            if os.path.isdir(path):
                _touch(_sidecar(path, "v"))  # nobody prunes it from here on
            if not _is_whole_tree(path, files) and not self.assemble(path, files):
                return None
        status = "downloaded" if self.fetched else "revalidated"
        return _result(self.source, path, status, None, size)

    def assemble(self, path: str, files: dict[str, _Key]) -> bool:
        """Make the directory that a listing describes; False if that changes meanwhile."""
        aside = _aside(self.store.trees)
        try:
            with _Disk(self.store.trees):
                self.store.make(self.store.trees)
                # A file system that takes "A" for "a" shows it by the cache's tag.
                if os.path.exists(os.path.join(self.store.root, "cachedir.tag")):
                    _check_files(files, True)
                os.mkdir(aside, 0o700 if self.source.private else 0o777)
            self.fill(aside, files)
            if self.changed or not _is_whole_tree(aside, files):
                return False
            self.publish(aside, path, files)
            _touch(_sidecar(path, "v"))
        except _Changed:
            return False
        except CacheError as error:
            if error.errno != errno.ENOENT:
                raise
            return False  # a peer cleared the cache
        finally:
            _remove_tree(aside)
        return True

    def fill(self, aside: str, files: dict[str, _Key]) -> None:
        """Link every file into the directory, fetching what we do not hold."""
        self.changed, self.lost = False, None  # of this listing
        with _Disk(aside):
            for folder in sorted(_folders(files)):
                # Not makedirs: it would make the tree itself anew.
                os.mkdir(f"{aside}/{folder}")

        def bring(item: tuple[str, _Key], opt: _Options, look: _Fetch | None) -> None:
            name, key = item
            for _ in range(3):
                path = self.file(key, opt, look)
                try:
                    with _Disk(aside, key.size):
                        return _link(path, f"{aside}/{name}")
                except CacheError as error:
                    here = os.path.isdir(os.path.dirname(f"{aside}/{name}"))
                    if error.errno != errno.ENOENT or not here:
                        raise
                look = None  # pruned between the look and the link
            raise CacheError("An entry disappears while it is linked", uri=self.source.uri)

        # One file may take longer than the grace: a peer's prune is to see that we live.
        beat = partial(self.store.confirm, aside)
        _Batch(bring, files.items(), self.opt, self.look, beat=beat).run()

    def entry(self, key: _Key, look: _Fetch) -> _Entry | None:
        """Return the entry that a line of the listing describes."""
        for entry in look.held:
            if _is_same_tag(entry.etag, key.etag) and entry.size == key.size:
                return entry
        look.held = []  # of another version: no condition
        return None

    def look(self, item: tuple[str, _Key], opt: _Options) -> _Fetch | None:
        """Look for a file of the listing; ask ahead for it if we do not hold it."""
        look = _Fetch(self.source.child(item[1].key), opt)
        if self.entry(item[1], look) or look.ask_ahead():
            return look
        return None  # to be looked for again, when nobody else fetches it

    def file(self, key: _Key, opt: _Options, look: _Fetch | None) -> str:
        """Return the path of one file of the listing, downloaded if we do not hold it."""
        look = look or _Fetch(self.source.child(key.key), opt)
        entered = _TURN.enter()
        try:
            entry = self.entry(key, look)
            if entry:
                return entry.path
            with _Flight(look.key, opt.switch, look.source):
                look.renew()
                entry = self.entry(key, look)
                if entry:  # another tree has fetched it
                    return entry.path
                found = look.run()
        except NotFoundError as error:
            self.lost = error
            raise _Changed from None
        finally:
            _TURN.exit(entered)
        self.fetched = self.fetched or not found.from_cache
        told = key.etag and found.etag
        if found.size != key.size or (told and not _is_same_tag(found.etag, key.etag)):
            self.changed = True
        return os.fspath(found)

    def publish(self, aside: str, path: str, files: dict[str, _Key]) -> None:
        """Make the directory visible; a damaged one of the same name makes room."""
        with _Disk(path):
            try:
                return os.rename(aside, path)
            except OSError:
                if _is_whole_tree(path, files):  # a peer was faster
                    return
            error = _remove_tree(path)
            if error and os.path.lexists(path):
                raise error
            os.rename(aside, path)


def _held_trees(source: _Source, opt: _Options) -> Sequence[_Entry]:
    """Return the snapshots of the tree that a key without a slash may mean."""
    return _Tree(source, opt).snapshots() if source.kind == "s3" and not source.version else []


def _cached(opt: _Options, look: _Fetch | None, source: _Source) -> LocalizedResource:
    """Return one object from the cache, from the server, or from whichever of the two can."""
    store = opt.store
    # 1. What we hold.
    fetch = look if look and look.source is source else _Fetch(source, opt)
    # 2. Offline, or young enough: no request.
    if opt.unasked:
        found = _unasked(source, opt, fetch.entries or _held_trees(source, opt))
        if found:
            return found
        if opt.access.offline:
            raise store.missing(fetch.ident, source.uri)
    # 3. Ask; threads that miss together ask one after the other.
    try:
        if fetch.held:
            return fetch.run()
        with _Flight(fetch.key, opt.switch, source):
            awaited = store.recently_partial() and store.pulse(fetch.ident) > 0
            if awaited:
                with _Lock(store, fetch.ident) as lock:
                    lock.await_peer(lambda: None, opt.switch)
            fetch.renew(awaited)
            return fetch.run()
    except TransferError as error:
        if not _may_be_stale(opt, error):
            raise
        # Private ones, too, as without asking; a peer may have pruned some meanwhile.
        last = store.find(fetch.ident, fetch.every, anew=True)
        found = _unasked(source, opt, last or _held_trees(source, opt), error)
        if not found:
            raise
        return found


def _local(text: str) -> LocalizedResource:
    """Return a local path as it is."""
    path = _local_path(text)
    try:
        size = os.stat(path).st_size
    except PermissionError as error:
        raise _unreadable(error, _redact_path(text)) from None
    except (OSError, ValueError):
        raise _no_local_path(text) from None
    return LocalizedResource(path, False, "local", "local", text, None, size)


def _look_at(text: str, opt: _Options) -> _Fetch | None:
    """Look for a single object and ask ahead for it, if that is sure to be asked; else None."""
    target = _target(text, opt.version)
    ours = target.kind == "http" and opt.version is None
    if target.kind == "s3":
        ours = not target.key.endswith("/") and not opt.access.signs(target.bucket)
    if not ours or opt.unasked:
        return None
    look = _Fetch(opt.access.unsigned(target), opt)
    return look if look.ask_ahead() else None


def _localize_any(text: str, opt: _Options, look: _Fetch | None) -> LocalizedResource:
    """Localize one resource of any kind; ``look`` was taken before its turn, if there is one."""
    target = _target(text, opt.version)
    is_tree = target.key.endswith("/")
    if opt.version is not None and (target.kind != "s3" or is_tree):
        raise ValueError("version_id is for single s3:// objects")
    if target.kind == "local":
        return _local(text)
    _import_early()
    missing: NotFoundError | None = None
    if not is_tree:
        entered = _TURN.enter()
        try:
            made = look.source if look else None
            return opt.access.attempt(target, partial(_cached, opt, look), made)
        except NotFoundError as error:
            if error.code != "NoSuchKey" or opt.version is not None:
                raise
            missing = error
        finally:
            _TURN.exit(entered)
    try:
        return opt.access.attempt(target, lambda source: _Tree(source, opt).localize())
    except (NotFoundError, AccessDeniedError) as error:
        # Of the listing: that there is no such object says more. A file's own error stays.
        raise (missing if missing and error.uri == missing.uri else error) from None


def _localize(text: str, opt: _Options, look: _Fetch | None = None) -> LocalizedResource:
    """Localize one resource; the error of any that fails says which it is."""
    nested = _TURN.here.inside
    try:
        return _localize_any(text, opt, look)
    except BaseException as error:
        if not nested:  # else it is the call around this one that has them
            _let_go()
        if isinstance(error, S3CacheError):  # ours, too, may be of a handler that called us
            error._name(text)
        _unmask(error)
        raise


def get_local_path_for_resource(
    uri_or_path: StrPath,
    *,
    cache_dir: StrPath | None = None,
    s3_client: Any = None,
    anonymous: bool | None = None,
    max_concurrency: int = 16,
    multipart_threshold_bytes: int = 8 * 1024 * 1024,
    max_age: float = 0,
    offline: bool = False,
    stale_if_error: bool = False,
    version_id: str | None = None,
    progress: Progress = None,
) -> LocalizedResource:
    """Return a local path for an S3 object or tree, a URL or a local path.

    Parameters
    ----------
    uri_or_path : str or os.PathLike
        ``s3://bucket/key`` (exact key); ``s3://bucket/prefix/``, or without the slash where no
        such object exists, for a directory tree; an http(s) URL; ``file:`` or a local path, which
        is returned as it is.
    cache_dir : str or os.PathLike, optional
        Default: ``AIND_S3_CACHE_DIR``, else ``XDG_CACHE_HOME``, else ``~/.cache``
        (``%LOCALAPPDATA%`` on Windows), else a private directory below the temp directory.
        Everything of ours is in its ``aind-s3-cache`` folder.
    s3_client : boto3 S3 client, optional
        Used whatever it is configured for.
    anonymous : bool, optional
        None: unsigned first; where that is refused, or finds no such bucket, signed, if boto3 is
        there and finds credentials. True: unsigned only. False: signed only. What is fetched
        signed is kept private (mode 0600).
    max_concurrency : int
        Connections for one large object, at most; a fast server is given fewer, and so are many
        objects at a time.
    multipart_threshold_bytes : int
        Above it (bytes) an object comes in parallel ranges.
    max_age : float
        Seconds since the server last confirmed the entry within which it is not asked again.
    offline : bool
        Never touch the network: newest cached version, or `OfflineError`. Also
        ``AIND_S3_CACHE_OFFLINE=1``.
    stale_if_error : bool
        Serve the last copy, with a warning in the log, if the server cannot be reached or answers
        5xx or 429 after all retries.
    version_id : str, optional
        This version of an S3 object.
    progress : bool or callable, optional
        True: a bar on stderr, if that is a terminal. A callable gets the number of bytes just
        received, negative where they are thrown away again (boto3's ``Callback``); it must not ask
        for what is being brought, for that is what it would wait for.

    Returns
    -------
    LocalizedResource

    Raises
    ------
    ValueError, TypeError
        Not a URI, key, or option that can be. Nothing was sent or written.
    NotFoundError, AccessDeniedError
        Missing; refused (to an anonymous caller S3 says so of missing keys, too). Both are
        `FileNotFoundError`, as in 0.1.
    TransferError
        The network or the server failed through all retries (8, or 60 s without progress).
    IntegrityError
        The bytes are not what was promised, twice; or the object changed four times meanwhile.
    OfflineError
        Offline and not cached.
    CacheError
        The cache directory is full, not writable or not safe; ``errno`` says which.
    MissingDependencyError, botocore.exceptions.NoCredentialsError
        Signed access without boto3, or without credentials.

    Notes
    -----
    One conditional ranged GET answers hit and miss alike (RFC 9110, 13.1.2 and 14.2); later ranges
    are pinned by If-Match to the first answer's ETag. What `progress` or a signal handler raises
    (Ctrl-C, a limit of time) ends the call; the next one goes on with a large object where this one
    stopped.
    """
    opt = _Options(
        cache_dir=cache_dir,
        s3_client=s3_client,
        anonymous=anonymous,
        max_concurrency=max_concurrency,
        multipart_threshold_bytes=multipart_threshold_bytes,
        max_age=max_age,
        offline=offline,
        stale_if_error=stale_if_error,
        version_id=version_id,
        progress=progress,
    )
    try:
        return _localize(_text(uri_or_path), opt)
    except _Theirs as raised:
        theirs = raised.error
    finally:
        opt.meter.close()
    raise theirs  # from here: with the cause and context that it came with


def _task(uri: str, options: dict[str, Any], collect: bool) -> LocalizedResource | Exception:
    """Localize one resource in a worker of an executor, wherever that is."""
    try:
        return get_local_path_for_resource(uri, **options)
    except Exception as error:
        if not collect:
            raise
        return error


def _texts(uris: Iterable[StrPath], collect: bool) -> list[Any]:
    """Return the URIs as str; raise the error of what is none, or put it into the list."""
    found: list[Any] = []
    for uri in uris:
        try:
            found.append(_text(uri))
        except TypeError as error:  # in a column of a table, a missing value is not even text
            told = TypeError(f"item {len(found)} of uris: {error}")
            if not collect:
                raise told from None
            found.append(told)
    return found


def _sendable(options: dict[str, Any], executor: Executor) -> None:
    """Refuse early, and by name, what cannot travel to another process."""
    from concurrent.futures import ThreadPoolExecutor

    if isinstance(executor, ThreadPoolExecutor):
        return
    import pickle

    for name, value in options.items():
        try:
            pickle.dumps(value)
        except Exception:
            text = f"{name} cannot be sent to {type(executor).__name__}"
            if name == "s3_client":
                text += "; use anonymous=False and credentials in the environment"
            raise TypeError(text) from None


def get_local_paths_for_resources(
    uris: Iterable[StrPath],
    *,
    max_workers: int | None = None,
    executor: Executor | None = None,
    return_exceptions: bool = False,
    progress: Progress = None,
    **options: Any,
) -> list[LocalizedResource]:
    """Localize many resources at once.

    Parameters
    ----------
    uris : iterable of str or os.PathLike
        May be a generator, which is read to its end first, as by ``Executor.map``. Each URI is
        asked for once.
    max_workers : int, optional
        Objects asked for at a time, at most; default 32. On a fast server one thread does all the
        work; others join it while it waits for the network. A large object's ranges and a tree's
        files are not counted.
    executor : concurrent.futures.Executor, optional
        Where to work instead: threads or processes of the standard library,
        ``dask.distributed.Client.get_executor()``, ``mpi4py.futures``. Its ``map`` is used, but for
        local paths, which are the caller's.
    return_exceptions : bool
        Put errors into the list instead of raising the first one; what `progress` raises ends the
        batch all the same.
    progress : bool or callable, optional
        As in `get_local_path_for_resource`, one for the batch; with an `executor`, called as
        results arrive.
    **options
        As in `get_local_path_for_resource`, for each of them.

    Returns
    -------
    list of LocalizedResource
        In the order asked.

    Raises
    ------
    TypeError
        An unknown option, or one that cannot be sent to the executor's processes.
    S3CacheError
        As in `get_local_path_for_resource`: the first that occurs. What was downloaded until then
        is in the cache.
    """
    # Named by the function that was called; ours would name a private class.
    unknown = set(options) - set(_Options.__init__.__kwdefaults__ or ())
    if unknown:
        raise TypeError(f"get_local_paths_for_resources() has no option {min(unknown)!r}")
    opt = _Options(**options, progress=progress)
    if max_workers is not None:
        _require("max_workers", max_workers, "__index__", "a whole number")
        if max_workers < 1:
            raise ValueError("max_workers must be at least 1")
    if executor is not None:
        _require("executor", executor, "map", "a concurrent.futures.Executor")
    if isinstance(uris, (str, bytes, os.PathLike)):
        raise TypeError("expected an iterable of URIs, not one: use get_local_path_for_resource")
    try:
        order = _texts(uris, return_exceptions)
        texts = list(dict.fromkeys(text for text in order if isinstance(text, str)))
        results: dict[str, Any] = {}
        if executor is None:

            def act(text: str, inner: _Options, look: _Fetch | None) -> None:
                try:
                    results[text] = _localize(text, inner, look)
                except Exception as error:
                    if not return_exceptions or (inner.switch and inner.switch.event.is_set()):
                        raise
                    results[text] = error

            _Batch(act, texts, opt, _look_at, max_workers or 0).run()
        else:
            _sendable(options, executor)
            # A worker may stand elsewhere: what is relative is taken from here.
            if options.get("cache_dir") and not os.fspath(options["cache_dir"]).startswith("~"):
                options["cache_dir"] = opt.store.cache_dir
            task = partial(_task, options=options, collect=return_exceptions)
            results = {text: task(text) for text in texts if _scheme(text) in ("", "file")}
            asked = [text for text in texts if text not in results]
            for text, result in zip(asked, executor.map(task, asked)):
                results[text] = result
                if isinstance(result, LocalizedResource) and result.status == "downloaded":
                    opt.meter(result.size or 0)
        return [results[text] if isinstance(text, str) else text for text in order]
    except _Theirs as raised:
        theirs = raised.error
    finally:
        opt.meter.close()
    raise theirs


def _remove_own(path: str, pid: int) -> None:
    """Remove a temporary cache with all that is read-only in it, unless it is the parent's."""
    if os.getpid() != pid or os.path.islink(path):  # what somebody put there stays
        return
    import shutil

    for top, folders, files in os.walk(path):
        # Windows looks at a file's own mode; elsewhere that is none of our business.
        for name in ("", *folders, *(files if os.name == "nt" else ())):
            at = os.path.join(top, name)
            try:
                if not os.path.islink(at):
                    os.chmod(at, 0o700)
            except OSError:
                pass
    try:
        shutil.rmtree(path, ignore_errors=True)
    except OSError:  # before 3.13 of its own calls
        pass


class CacheManager:
    """A cache directory, and what can be done with all of it.

    Parameters
    ----------
    cache_dir : str or os.PathLike, optional
        Default: as in `get_local_path_for_resource`. ``~`` is expanded; it is made if missing.
    persistent : bool
        False: a temporary directory (inside `cache_dir`, if given), removed by `close`, at the end
        of the ``with`` block, with this object, or with the interpreter. `cache_dir` itself is
        never removed.

    Attributes
    ----------
    dir : pathlib.Path
        To be given as ``cache_dir`` to the other functions: what was named, by `cache_dir` or
        ``AIND_S3_CACHE_DIR``, else our own folder in the default place, with nothing of others.
    """

    def __init__(self, cache_dir: StrPath | None = None, *, persistent: bool = True) -> None:
        base = ""
        if cache_dir or persistent:
            base = _cache_dir(cache_dir)
            with _Disk(base):
                if cache_dir or _first_env("AIND_S3_CACHE_DIR"):
                    os.makedirs(base, exist_ok=True)
                else:  # not ~/.cache: scripts written for 0.1 tidy up in `dir`, or remove it
                    keeper = _Keeper(base)
                    if not os.path.isdir(base) or _may(base, os.W_OK):
                        keeper.make(keeper.root)
                    base = keeper.root
        self._remove: Callable[[], object] | None = None
        if not persistent:
            import tempfile
            import weakref

            with _Disk(base or "the temp directory"):
                base = tempfile.mkdtemp(prefix="aind-s3-cache-", dir=base or None)
            # Not TemporaryDirectory: a forked child that ends would remove its parent's.
            self._remove = weakref.finalize(self, _remove_own, base, os.getpid())
        self.dir: Path = _path_class()(base)

    @property
    def _keeper(self) -> _Keeper:
        return _Keeper(str(self.dir))

    def __enter__(self) -> CacheManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the directory if it is a temporary one."""
        if self._remove:
            self._remove()

    def entries(self) -> list[CacheEntry]:
        """Return all that the cache holds: objects, trees, partial files.

        Returns
        -------
        list of CacheEntry
            Used last first.

        Raises
        ------
        CacheError
            The directory cannot be read, or is not safe.
        """
        found = [unit.entry for unit in self._keeper.units()]
        return sorted(found, key=lambda entry: entry.last_used, reverse=True)

    def size(self) -> int:
        """Return the bytes that the cache takes on disk, hard links counted once."""
        inodes: dict[tuple[int, int], int] = {}
        for unit in self._keeper.units():
            inodes.update(unit.inodes)
        return sum(inodes.values())

    def prune(
        self,
        max_age_days: float | None = None,
        max_size_bytes: int | None = None,
        dry_run: bool = False,
    ) -> list[CacheEntry]:
        """Free space: by age of last use, then down to a size.

        Superseded versions go first, then what was used longest ago. Never what was used within the
        last hour, is being downloaded, or was touched since the plan was made. With neither limit,
        partial files that nobody finished in a week go.

        Parameters
        ----------
        max_age_days : float, optional
            Days since the last use.
        max_size_bytes : int, optional
            Bytes that the whole cache may keep.
        dry_run : bool
            Only say what would go.

        Returns
        -------
        list of CacheEntry
            What went.

        Raises
        ------
        ValueError, TypeError
            A limit that is negative, or no number.
        CacheError
            Something could not be read or removed, though all else was; or the directory is not
            safe.
        """
        for name, limit in (("max_age_days", max_age_days), ("max_size_bytes", max_size_bytes)):
            if limit is not None:
                _require(name, limit, "__float__", "a number")
                if not limit >= 0:  # nan, too
                    raise ValueError(f"{name} must be at least 0")
        age = None if max_age_days is None else float(max_age_days) * 86400.0
        return self._keeper.prune(age, max_size_bytes, dry_run)

    def verify(self) -> list[CacheEntry]:
        """Read every object back and compare it with the checksum in its name.

        Returns
        -------
        list of CacheEntry
            The damaged ones, and the trees that hold their bytes; all are removed, and the next
            call downloads them again. What this user may not read is left as it is.

        Raises
        ------
        CacheError
            Something could not be read or removed, though all else was looked at; or the directory
            is not safe.
        """
        return self._keeper.verify()

    def clear(self) -> None:
        """Remove everything of ours, and nothing else.

        Raises
        ------
        CacheError
            Something could not be read or removed, though all else was; or the directory is not
            safe.
        """
        self._keeper.clear()


# 0.1 was a package: its submodules are this module under three more names, so that
# `from aind_s3_cache.s3_cache import …` and `mock.patch("aind_s3_cache.s3_cache.…")` work.
# Who loads the file by its path need not register the module: then nobody can import from it.
if __name__ != "__main__" and __name__ in sys.modules:
    for _name in ("json_utils", "s3_cache", "uri_utils"):
        globals()[_name] = sys.modules[f"{__name__}.{_name}"] = sys.modules[__name__]
    del _name


# ==== 10 Command line =============================================================================
# A thin skin over the public API: data on stdout, all else on stderr; 0, 1, 2 or 130.

_EXAMPLES = """examples:
  aind-s3-cache get s3://aind-open-data/dataset/metadata.json    print its local path
  aind-s3-cache get s3://bucket/image.zarr/                      a whole directory
  aind-s3-cache get -j 16 --json - < list.txt                    many, as JSON records
  aind-s3-cache json s3://bucket/metadata.json subject.id        print a part of a document
  aind-s3-cache ls s3://bucket/dataset/                          list keys
  aind-s3-cache ls                                               list the cache
  aind-s3-cache prune --max-age 30d --max-size 50GB              free space
"""
_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS.update({f"{u}b": n for u, n in _UNITS.items() if u not in ("", "b")})
_UNITS.update({f"{u}ib": 1 << 10 * at for at, u in enumerate("kmgt", 1)})
_DAY = 86400
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": _DAY, "w": 7 * _DAY, "y": 365 * _DAY}


def _quantity(text: str, units: dict[str, Any]) -> float:
    """Parse a number with a unit, such as 10GB or 30d."""
    number = text.strip().lower().rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text.strip().lower()[len(number) :]
    value = float(number) * float(units.get(unit, "nan"))
    if not 0 <= value < float("inf"):  # nor nan, as of an unknown unit
        raise ValueError(text)
    return value


def _size_arg(text: str) -> int:
    return int(_quantity(text, _UNITS))


def _seconds_arg(text: str) -> float:
    return _quantity(text, _SECONDS)


def _days_arg(text: str) -> float:
    return _quantity(text, {**_SECONDS, "": _DAY}) / _DAY


def _jobs_arg(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


_jobs_arg.__name__ = "number of objects"
_size_arg.__name__ = "size, such as 10GB"
_seconds_arg.__name__ = _days_arg.__name__ = "age, such as 30d"


def _json_line(value: object) -> str:
    import json

    return json.dumps(value, default=str)


def _record(value: _Record) -> dict[str, Any]:
    return {name.strip("_"): getattr(value, name) for name in value.__slots__}


def _say(text: str) -> None:
    """Print a line on stderr."""
    try:
        print(text, file=sys.stderr)
    except OSError:  # nobody reads it: stdout and the exit code say what there is to say
        pass


def _complain(error: Exception) -> None:
    """Say an error on one line, in the words of this interface."""
    text = f"aind-s3-cache: {error}".replace("anonymous=True", "--anonymous")
    _say(text.replace("anonymous=False", "--signed"))


def _is_known(error: Exception) -> bool:
    """Tell whether an error is one line to the user rather than a bug of ours."""
    foreign = any(cls.__module__.startswith("botocore") for cls in type(error).__mro__)
    ours = S3CacheError, ValueError, TypeError, OSError, RecursionError  # of a document's depth
    return foreign or isinstance(error, ours)


def _do_get(args: Any) -> int:
    uris: Iterable[str] = args.uris
    if args.uris == ["-"]:
        if not sys.stdin:
            raise ValueError("Standard input is closed")
        # Bytes, decoded as arguments are: Windows and odd settings would read another text.
        lines = getattr(sys.stdin, "buffer", sys.stdin)
        uris = filter(None, (os.fsdecode(line).strip("\ufeff \t\r\n") for line in lines))
    results = get_local_paths_for_resources(
        uris,
        max_workers=args.jobs,
        return_exceptions=True,
        progress=not args.quiet,
        cache_dir=args.cache_dir,
        anonymous=args.anonymous,
        max_age=args.max_age,
        offline=args.offline,
        stale_if_error=args.stale_if_error,
        version_id=args.version_id,
    )
    failed = 0
    for result in results:
        if isinstance(result, Exception):
            if not _is_known(result):
                raise result
            failed = 1
            _complain(result)
        else:
            print(_json_line(_record(result)) if args.json else os.fspath(result))
    return failed


def _do_json(args: Any) -> int:
    import json

    part: Any = get_json(args.uri, anonymous=args.anonymous)
    for step in filter(None, (args.path or "").split(".")):
        try:
            part = part[int(step)] if isinstance(part, list) else part[step]
        except (KeyError, IndexError, ValueError, TypeError):
            way = f"No {step!r} on the way to {args.path!r}"
            raise ValueError(f"{way}: {_redact(args.uri)}") from None
    if isinstance(part, str) and args.path and not args.json:
        print(part.encode("utf-8", "backslashreplace").decode("utf-8"))  # a lone surrogate
    else:
        print(json.dumps(part, indent=None if args.json else 2))
    return 0


def _manager(args: Any) -> CacheManager:
    """Return a manager. The default place is named, too: who only looks makes no folder there."""
    return CacheManager(_cache_dir(args.cache_dir))


def _do_ls(args: Any) -> int:
    if args.uri:
        bucket, prefix = parse_s3_uri(args.uri)
        _check_key(prefix)
        access = _Access(args.anonymous)
        if _is_offline():
            raise OfflineError("Keys are not listed offline", uri=args.uri)

        def show(source: _Source) -> None:
            assert isinstance(source, _S3)
            for key in _list_all(source, prefix, None):
                uri = f"s3://{bucket}/{key.key}"
                record = {"uri": uri, "size": key.size, "etag": key.etag}
                print(_json_line(record) if args.json else _printable(uri))

        access.attempt(_Target("s3", args.uri, bucket, prefix), show)
        return 0
    for entry in _manager(args).entries():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
        line = f"{_human(entry.size):>10}  {used}  {entry.kind:7}  {entry.path}"
        print(_json_line(_record(entry)) if args.json else line)
    return 0


def _show_gone(entries: list[CacheEntry], args: Any, verb: str) -> None:
    for entry in entries:
        print(_json_line(_record(entry)) if args.json else entry.path)
    total = _human(sum(entry.size for entry in entries if entry.kind != "tree"))  # links
    _say(f"{verb} {len(entries)} entries, {total}")


def _do_prune(args: Any) -> int:
    gone = _manager(args).prune(args.max_age, args.max_size, args.dry_run)
    _show_gone(gone, args, "would remove" if args.dry_run else "removed")
    return 0


def _do_verify(args: Any) -> int:
    bad = _manager(args).verify()
    _show_gone(bad, args, "damaged and removed:")
    return 1 if bad else 0


def _do_clear(args: Any) -> int:
    _manager(args).clear()
    return 0


def _do_dir(args: Any) -> int:
    path = _manager(args)._keeper.root
    print(_json_line({"dir": path}) if args.json else path)
    return 0


def _parser() -> Any:
    """Build the parser; every verb has --json and --cache-dir."""
    import argparse

    top = argparse.ArgumentParser(
        prog="aind-s3-cache",
        description="Find objects on S3, behind URLs or on disk, and keep them in a local cache.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"aind-s3-cache {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, act: Callable[[Any], int], text: str) -> Any:
        parser = verbs.add_parser(name, help=text, description=text)
        parser.set_defaults(act=act, anonymous=None)
        parser.add_argument("--json", action="store_true", help="print JSON records, one a line")
        if name != "json":
            parser.add_argument("--cache-dir", metavar="DIR", help="instead of the default one")
        return parser

    def access(parser: Any) -> None:
        who = parser.add_mutually_exclusive_group()
        who.add_argument("--anonymous", action="store_true", default=None, help="unsigned only")
        who.add_argument(
            "--signed", dest="anonymous", action="store_false", default=None, help="signed only"
        )

    get = verb("get", _do_get, "Print the local path of each resource, downloaded if need be.")
    get.add_argument("uris", nargs="+", metavar="URI", help="s3://, http(s)://, a path, or -")
    get.add_argument(
        "-j", "--jobs", type=_jobs_arg, metavar="N", help="objects at a time (default: 32)"
    )
    get.add_argument(
        "--max-age", type=_seconds_arg, default=0.0, metavar="AGE", help="seconds, or such as 12h"
    )
    get.add_argument("--offline", action="store_true", help="never touch the network")
    get.add_argument("--stale-if-error", action="store_true", help="last copy if the server fails")
    get.add_argument("--version-id", metavar="ID", help="this version of an S3 object")
    get.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    access(get)
    json = verb("json", _do_json, "Print a JSON document, or a part of it.")
    json.add_argument("uri", metavar="URI")
    json.add_argument("path", nargs="?", metavar="PATH", help="such as subject.id or items.0")
    access(json)
    ls = verb("ls", _do_ls, "List the cache, or the keys below an s3:// prefix.")
    ls.add_argument("uri", nargs="?", metavar="s3://…")
    access(ls)
    text = "Remove what was not used for long, down to a size; never what was used this last hour."
    prune = verb("prune", _do_prune, text)
    prune.add_argument("--max-age", type=_days_arg, metavar="AGE", help="days, or such as 30d")
    prune.add_argument("--max-size", type=_size_arg, metavar="SIZE", help="such as 10GB")
    prune.add_argument("--dry-run", action="store_true", help="only print what would go")
    verb("verify", _do_verify, "Check every object against its checksum; remove damaged ones.")
    verb("clear", _do_clear, "Remove everything of ours from the cache directory.")
    verb("dir", _do_dir, "Print where the cache is.")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default ``sys.argv[1:]``.

    Returns
    -------
    int
        0; 1 for a known error, said in one line on stderr; 2 for wrong usage; 130 for Ctrl-C.
    """
    from io import StringIO

    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # closed from the start: print and argparse would take the other one
            stream = StringIO()
            setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):  # paths may hold any bytes, documents any text
            stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        args = _parser().parse_args(argv)
        code: int = args.act(args)
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read us has seen enough
        code = 0
    except Exception as error:
        if not _is_known(error):
            raise
        _complain(error)
        code = 1
    for fd, stream in enumerate((sys.stdout, sys.stderr), 1):
        try:
            stream.flush()
        except OSError:  # what cannot be written must not fail the interpreter at its exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    return code


if __name__ == "__main__":
    sys.exit(main())
