"""What every test runs in: a clean environment, a home of its own, and no way off this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from server import Request, Server, render
from subject import name as subject_name
from subject import s3c

SUBJECT_FILE = Path(str(s3c.__file__)).resolve()
BUCKET = "aind-open-data"  # the guide's
OWN_HOSTS = ["127.0.0.1", "::1", "localhost"]
AWS_HOSTS = [
    *(f"{star}s3.{region}amazonaws.com" for star in ("*.", "") for region in ("", "us-west-2.")),
    "*.s3.cn-north-1.amazonaws.com.cn",
]

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test"}
MiB = 1 << 20
posix = pytest.mark.skipif(os.name != "posix", reason="modes, signals, forks, pipes with a name")

Publish = Callable[..., str]
Get = Callable[..., Any]
AsNobody = Callable[[Callable[[], Any]], Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Spawn = Callable[..., "subprocess.Popen[str]"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leftovers: may leave temporary files (it kills a process)")
    # A shell starts a background job with Ctrl-C ignored, and each of its children inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("boto3"):
        return
    for item in items:
        if item.get_closest_marker("boto3"):
            item.add_marker(pytest.mark.skip(reason="boto3 is not installed"))


def blob(size: int, seed: int = 0) -> bytes:
    """Bytes that repeat only after a while, so that a chunk in the wrong place shows."""
    block = b"".join(hashlib.sha256(b"%d %d" % (seed, i)).digest() for i in range(8191))
    return (block * (size // len(block) + 1))[:size]


def files_below(path: Path) -> list[Path]:
    return sorted(found for found in path.rglob("*") if not found.is_dir())


def basic(userinfo: str) -> str:
    return "Basic " + base64.b64encode(userinfo.encode()).decode()


def failing(get: Get, uri: str, error: Any = None, **options: Any) -> Any:
    """The error that a call ends with."""
    with pytest.raises(error or s3c.TransferError) as caught:
        get(uri, **options)
    return caught.value


# ==== Around every test =======================================================================

_CLEARED = re.compile(
    r"AWS_.*|AIND_S3_CACHE_.*|XDG_CACHE_HOME|.*_proxy|"
    r"REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|SSL_CERT_FILE|SSL_CERT_DIR|"
    r"PYTHONUNBUFFERED",  # hides what stays in a stream that cannot be written
    re.IGNORECASE,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, in an environment that says nothing about AWS, caches or proxies."""
    for variable in list(os.environ):
        if _CLEARED.fullmatch(variable):
            monkeypatch.delenv(variable)
    home = tmp_path / "home"
    home.mkdir()
    for variable in ("HOME", "USERPROFILE", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "no-credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "no-config"))
    return home


def _is_here(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode("latin-1")
    return host in (None, "", "localhost", "::1") or str(host).startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def _stay_here() -> Iterator[None]:
    """Fail a test that looks up or connects to another host; a child process is not watched."""
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_here(host):
            pytest.fail(f"a test looked up {host!r}")
        return look_up(host, *args, **kwargs)

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and not _is_here(address[0]):
            pytest.fail(f"a test connected to {address!r}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        patch.setattr(socket.socket, "connect", guarded_connect)
        yield


@pytest.fixture(autouse=True, scope="session")
def _models_parsed_once() -> Iterator[None]:
    """botocore's sessions share what they parsed: S3's model takes each of them half a second."""
    if not importlib.util.find_spec("boto3"):
        yield
        return
    import botocore.session

    create_loader, parsed = botocore.session.create_loader, dict[Any, Any]()

    def create_sharing_loader(data_path: str | None = None) -> Any:
        loader = create_loader(data_path)
        loader._cache = parsed.setdefault(data_path, {})
        return loader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", create_sharing_loader)
        yield


def _lasting_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.daemon}


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """No test leaves a thread that would keep the interpreter, or a temporary file in a cache."""
    before = _lasting_threads()
    yield
    give_up = time.monotonic() + 1
    while _lasting_threads() - before and time.monotonic() < give_up:
        threading.Event().wait(0.01)
    assert not _lasting_threads() - before, "threads left running"
    if request.node.get_closest_marker("leftovers") is None:
        places = (tmp_path / "home", tmp_path / "cache")
        left = [path for place in places if place.is_dir() for path in place.rglob(".t*")]
        assert not left, "temporary files left behind"


@pytest.fixture(autouse=True)
def _full_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """The retries that one test spends are not missing in the next."""
    monkeypatch.setattr(s3c._QUOTA, "tokens", s3c._RETRY_TOKENS)


# ==== Servers and what they hold ==============================================================


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A loopback S3 server, set as the endpoint."""
    with Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


class Peak:
    """A progress function that notes how many connections a server has at a time, at most."""

    def __init__(self, server: Server) -> None:
        self._server, self.most = server, 0

    def __call__(self, _: int) -> None:
        self.most = max(self.most, len(self._server._sockets))


@pytest.fixture
def peak(server: Server) -> Peak:
    return Peak(server)


@pytest.fixture
def other() -> Iterator[Server]:
    """A second server: a proxy, or another origin."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def ca() -> Any:
    """A certificate authority (trustme) that no machine trusts."""
    return pytest.importorskip("trustme").CA()


@pytest.fixture
def ca_file(ca: Any, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture(scope="session")
def tls_context(ca: Any) -> ssl.SSLContext:
    """A server's context, with a certificate for this machine and for AWS's hosts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*OWN_HOSTS, *AWS_HOSTS).configure_cert(context)
    return context


@pytest.fixture
def tls_server(
    tls_context: ssl.SSLContext,
    ca_file: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Server]:
    """The same over TLS, its CA trusted; the endpoint, unless the test also asks for `server`."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(ca_file))
    with Server(tls_context) as server:
        if "server" not in request.fixturenames:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture
def publish(request: pytest.FixtureRequest) -> Callable[..., str]:
    """`publish(data, key=..., bucket=..., **put_options) -> uri`; data is JSON unless bytes or str.

    On `server`, or on `tls_server` in a test that asks for that one alone.
    """
    names = request.fixturenames
    alone = "tls_server" in names and "server" not in names
    held = request.getfixturevalue("tls_server" if alone else "server")

    def publish(data: Any, key: str = "data.json", bucket: str = BUCKET, **options: Any) -> str:
        if not isinstance(data, (bytes, bytearray)):
            data = (data if isinstance(data, str) else json.dumps(data)).encode()
        held.put(bucket, key, bytes(data), **options)
        return f"s3://{bucket}/{key}"

    return publish


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache directory that does not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`time.sleep` returns at once; the list holds what was asked for."""
    slept: list[float] = []
    sleep = time.sleep

    def sleep_not(seconds: float) -> None:
        slept.append(seconds)
        sleep(0)  # a loop that waits for another thread must still let it run

    monkeypatch.setattr(time, "sleep", sleep_not)
    return slept


@pytest.fixture
def get(cache: Path) -> Callable[..., Any]:
    """`get(uri, **options)`: localize into `cache`."""

    def get(uri: Any, **options: Any) -> Any:
        return s3c.get_local_path_for_resource(uri, cache_dir=cache, **options)

    return get


@pytest.fixture
def cut(server: Server) -> Callable[..., None]:
    """`cut(size, end, times=1)`: that many answers end so after `size` bytes of their true body."""

    def cut(size: int, end: Any, times: float = 1) -> None:
        left = [times]

        def before(request: Request) -> tuple[Any, ...] | None:
            answer = server._answer(request)
            if left[0] < 1 or answer.status >= 300 or len(answer.body) <= size:
                return None
            left[0] -= 1
            head, body = render(answer, request.method)
            # The pause lets the client read what came before a reset throws it away.
            return answer._replace(raw=(head + bytes(body[:size]), 0.02, end))

        server.before = before

    return cut


@pytest.fixture
def deaf() -> Iterator[str]:
    """A URL on a listener whose queue is full: a connection to it is never answered."""
    with socket.socket() as listener, contextlib.ExitStack() as held:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            sock = held.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        time.sleep(0.05)
        yield "http://{}:{}/a".format(*listener.getsockname())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once, also after an answer that throttles."""
    monkeypatch.setattr(s3c, "_RETRY_BASE", 0.001)
    monkeypatch.setattr(s3c, "_RETRY_BASE_THROTTLED", 0.001)


@pytest.fixture
def gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is no more."""
    if os.name == "nt":
        pytest.skip("there a directory in use stays")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes: an object of 256 KiB is large, and a MiB comes in several ranges.

    To be used with `multipart_threshold_bytes=256 << 10`.
    """
    monkeypatch.setattr(s3c, "_CHUNK", 16 << 10)
    monkeypatch.setattr(s3c, "_BLOCK", 32 << 10)
    monkeypatch.setattr(s3c, "_WHOLE", 16 << 10)
    monkeypatch.setattr(s3c, "_SPAN", 64 << 10)
    monkeypatch.setattr(s3c, "_SPAN_FAR", 16 << 10)
    monkeypatch.setattr(s3c, "_SMALL", 256 << 10)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, and the library that finds them."""
    pytest.importorskip("boto3")
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def new_client(url: str, **config: Any) -> Any:
    """A boto3 client with a key of its own; the test is skipped without boto3."""
    boto3 = pytest.importorskip("boto3")
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        config=Config(retries={"total_max_attempts": 1}, **config),
    )


# ==== Real processes ==========================================================================


def _run(
    command: list[str], env: dict[str, str | None] | None, timeout: float, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run to the end in this environment, changed by `env` (None removes a variable)."""
    merged = {"PYTHONIOENCODING": "utf-8", **os.environ, **(env or {})}
    return subprocess.run(
        command,
        env={name: value for name, value in merged.items() if value is not None},
        timeout=timeout,
        capture_output=True,
        encoding="utf-8",
        **options,
    )


@pytest.fixture(scope="session")
def prelude() -> str:
    """Code that makes the subject importable, under `python -I -S` too."""
    root = SUBJECT_FILE.parents[subject_name.count(".")]
    return f"import sys; sys.path.insert(0, {str(root)!r})\n"


@pytest.fixture
def run_python(prelude: str, tmp_path: Path) -> Run:
    """`run_python(code, *args, env=, timeout=, flags=(), check=True)` in a fresh interpreter.

    `SUBJECT` in the code stands for the module's name: `import SUBJECT as s3c`.
    """

    def run_python(
        code: str,
        *args: object,
        env: dict[str, str | None] | None = None,
        timeout: float = 30,
        flags: tuple[str, ...] = (),
        check: bool = True,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        source = prelude + code.replace("SUBJECT", subject_name)
        command = [sys.executable, *flags, "-c", source, *map(str, args)]
        done = _run(command, env, timeout, **{"cwd": tmp_path, **options})
        assert not check or done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
        return done

    return run_python


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    """`cli(*args, env=, timeout=, **subprocess_options)`: the file run as a program."""

    def cli(
        *args: object,
        env: dict[str, str | None] | None = None,
        timeout: float = 30,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SUBJECT_FILE), *map(str, args)]
        return _run(command, env, timeout, **{"cwd": tmp_path, **options})

    return cli


@pytest.fixture
def spawn(prelude: str, tmp_path: Path) -> Iterator[Spawn]:
    """`spawn(code, *args, env=)`: as `run_python`, but running; killed when the test ends."""
    running: list[subprocess.Popen[str]] = []

    def spawn(code: str, *args: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        source = prelude + code.replace("SUBJECT", subject_name)
        command = [sys.executable, "-c", source, *map(str, args)]
        pipe, both = subprocess.PIPE, {**os.environ, **(env or {})}
        running.append(
            subprocess.Popen(
                command, env=both, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True
            )
        )
        return running[-1]

    yield spawn
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def preload(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """`preload(c_source) -> env` for a child whose libc calls are replaced (LD_PRELOAD)."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("replacing calls of libc needs Linux and a C compiler")

    def preload(source: str) -> dict[str, str]:
        library = tmp_path / "preload.so"
        command = [compiler, "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(library), "-ldl"]
        subprocess.run(command, input=source, text=True, check=True)
        return {"LD_PRELOAD": str(library)}

    return preload


# ==== Other users and small disks =============================================================

NOBODY = 65534


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user of the machine can reach (`tmp_path` is the owner's alone)."""
    path = Path(tempfile.mkdtemp(prefix="s3c-", dir=os.path.realpath(tempfile.gettempdir())))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def get_public(publish: Publish, public: Path) -> Get:
    """`get_public(**options)`: one small object, from a cache that every user can reach."""
    return partial(s3c.get_local_path_for_resource, publish(b"data"), cache_dir=public)


def _report(function: Callable[[], object]) -> tuple[bool, object]:
    try:
        return True, function()
    except Exception as error:
        return False, error


@pytest.fixture
def as_nobody() -> Callable[[Callable[[], Any]], Any]:
    """`as_nobody(function)`: call it in a forked child of another user; returns, raises the same.

    What it imports must be imported before: the other user may not be able to read this Python.
    """
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("to become another user needs root")

    def as_nobody(function: Callable[[], Any]) -> Any:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the server's threads stay here
            child = os.fork()
        if not child:
            with contextlib.suppress(BaseException), open(writer, "wb") as pipe:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                pickle.dump(_report(function), pipe)
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as pipe:
            data = pipe.read()
        os.waitpid(child, 0)
        went_well, value = pickle.loads(data)
        if not went_well:
            raise value
        return value

    return as_nobody


@pytest.fixture
def mount(public: Path) -> Iterator[Callable[..., Path]]:
    """`mount(options, kind="tmpfs", source="tmpfs") -> directory`, unmounted at the end."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("to mount a file system needs root on Linux")
    mounted: list[Path] = []

    def mount(options: str, kind: str = "tmpfs", source: object = "tmpfs") -> Path:
        place = public / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", kind, "-o", options, str(source), str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this machine does not mount {kind}: {done.stderr.strip()[:80]}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
