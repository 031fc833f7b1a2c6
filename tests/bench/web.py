"""The server side of the benchmark: files, nginx in front of them, and a slow wire.

nginx serves a directory tree as path-style buckets, which is as fast as a server gets here, so
what is measured is the client. It cannot answer ListObjectsV2; those few requests go to `Listing`,
in this process. `Wire` is a TCP relay that adds what loopback lacks: distance and a narrow pipe.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import queue
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

BUCKET = "bucket"
MISSING = (
    "nginx is missing: `apt-get install nginx`. Going on with the tests' server, which is slow."
)
_SO_MAX_PACING_RATE = 47  # Linux; not among the names of the socket module
_MIB = 1024 * 1024

_CONF = """\
{user}
daemon off;
worker_processes auto;
pid {run}/nginx.pid;
error_log {run}/error.log warn;
events {{ worker_connections 4096; }}
http {{
    client_body_temp_path {run}/t1;
    proxy_temp_path {run}/t2;
    fastcgi_temp_path {run}/t3;
    uwsgi_temp_path {run}/t4;
    scgi_temp_path {run}/t5;
    log_format bench '$connection $request_method $request_uri $status';
    access_log off;
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    etag on;
    keepalive_requests 100000000;
    keepalive_timeout 300s;
    open_file_cache max=20000 inactive=900s;
    open_file_cache_valid 900s;
    ssl_certificate {run}/server.pem;
    ssl_certificate_key {run}/server.pem;
    ssl_protocols TLSv1.3;
    root {data};
    server {{
        listen 127.0.0.1:{http};
        include {run}/locations;
    }}
    server {{
        listen 127.0.0.1:{https} ssl;
        include {run}/locations;
    }}
    server {{
        listen 127.0.0.1:{counted};
        access_log {run}/access.log bench;
        include {run}/locations;
    }}
}}
"""

# A directory is no key, and a listing is no file; both answer as S3 would.
_LOCATIONS = """\
error_page 418 = @listing;
error_page 404 = @missing;
if ($args ~ (^|&)list-type=2(&|$)) {{ return 418; }}
location / {{
    if (-d $request_filename) {{ return 404; }}
}}
location /mark/ {{ return 204; }}
location @listing {{ proxy_pass http://127.0.0.1:{listing}; }}
location @missing {{
    default_type application/xml;
    return 404 '<?xml version="1.0"?><Error><Code>NoSuchKey</Code><Message>none</Message></Error>';
}}
"""


def make_data(data: Path, *, small: int, tree: int, sizes: dict[str, int]) -> None:
    """Write the bucket: `small/`, `tree/` (100 files a directory), `big/`, and a JSON document."""
    root = data / BUCKET
    for name in ("small", "big", "tree"):
        (root / name).mkdir(parents=True)
    block = os.urandom(_MIB)
    for i in range(small):
        (root / f"small/{i:05d}.bin").write_bytes(_small_body(block, i))
    for i in range(tree):
        folder = root / f"tree/{i // 100:03d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{i % 100:02d}.bin").write_bytes(_small_body(block, i))
    for name, size in sizes.items():
        with open(root / "big" / name, "wb") as file:
            for i in range(size // _MIB):
                # Each MiB differs, or a part written to the wrong place would go unnoticed.
                file.write(i.to_bytes(8, "big") + block[8:])
    (root / "meta.json").write_text('{"subject": {"id": "1234"}, "created": "2024-01-01"}')


def _small_body(block: bytes, i: int) -> bytes:
    return i.to_bytes(8, "big") + block[8:4096]


def nginx_etag(path: Path) -> str:
    """nginx's own ETag of a file, so that listing and answer agree."""
    stat = path.stat()
    return f'"{int(stat.st_mtime):x}-{stat.st_size:x}"'


class Listing:
    """ListObjectsV2 over a directory: prefix, delimiter, pages. Each page is rendered once."""

    def __init__(self, data: Path) -> None:
        """Take the directory that holds the buckets."""
        self._data = data
        self._keys: list[str] = []
        self._pages: dict[tuple[str, ...], bytes] = {}

    def page(self, query: dict[str, str]) -> bytes:
        """Return one page as XML; the continuation token is the last name of the page before."""
        names = ("prefix", "delimiter", "continuation-token", "start-after", "max-keys")
        asked = tuple(query.get(name, "") for name in names)
        if asked not in self._pages:
            self._pages[asked] = self._render(*asked)
        return self._pages[asked]

    def _all_keys(self) -> list[str]:
        if not self._keys:
            root = self._data / BUCKET
            found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
            self._keys = sorted(found)
        return self._keys

    def _render(self, prefix: str, delimiter: str, token: str, after: str, limit: str) -> bytes:
        start, most = max(token, after), min(int(limit or 1000), 1000)
        rows = []
        for name in self._names(prefix, delimiter):
            if name > start:
                rows.append(name)
            if len(rows) > most:
                break
        more, rows = len(rows) > most, rows[:most]
        body = "".join(self._row(name, delimiter) for name in rows)
        tail = f"<NextContinuationToken>{escape(rows[-1])}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><MaxKeys>{most}</MaxKeys>"
            f"<KeyCount>{len(rows)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{body}{tail}</ListBucketResult>"
        ).encode()

    def _names(self, prefix: str, delimiter: str) -> list[str]:
        keys = [key for key in self._all_keys() if key.startswith(prefix)]
        if not delimiter:
            return keys
        cut = (key[len(prefix) :].partition(delimiter) for key in keys)
        return sorted({prefix + head + mid for head, mid, _ in cut})

    def _row(self, name: str, delimiter: str) -> str:
        if delimiter and name.endswith(delimiter):
            return f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
        path = self._data / BUCKET / name
        etag = escape(nginx_etag(path), {'"': "&quot;"})
        when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(path.stat().st_mtime))
        return (
            f"<Contents><Key>{escape(name)}</Key><LastModified>{when}</LastModified>"
            f"<ETag>{etag}</ETag><Size>{path.stat().st_size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )


def _listing_server(listing: Listing) -> http.server.ThreadingHTTPServer:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = urllib.parse.urlsplit(self.path).query
            body = listing.page(dict(urllib.parse.parse_qsl(query, keep_blank_values=True)))
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Wire:
    """A TCP relay in front of a port: a round trip takes `delay` s, a connection has `rate` B/s."""

    def __init__(self, target: int, *, delay: float = 0.0, rate: int = 0) -> None:
        """Listen on a free port and relay every connection to `target`."""
        if rate and sys.platform != "linux":
            raise OSError("pacing a connection needs Linux")
        self._target, self._delay, self._rate = target, delay, rate
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections; those that run end with their clients."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._relay(self._listener.accept()[0])

    def _relay(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._target))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._rate:
            # The kernel paces exactly; nginx's limit_rate lets a range of 8 MiB pass unhindered.
            client.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, self._rate)
        # Loopback's handshake is instant, so its round trip is charged to the first bytes.
        self._pump(client, server, first=self._delay)
        self._pump(server, client, first=0.0)

    def _pump(self, source: socket.socket, sink: socket.socket, *, first: float) -> None:
        if not self._delay:
            threading.Thread(target=_copy, args=(source, sink), daemon=True).start()
            return
        line: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
        one_way = self._delay / 2
        args = (source, line, one_way, time.monotonic() + one_way + first)
        threading.Thread(target=_take, args=args, daemon=True).start()
        threading.Thread(target=_give, args=(line, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    buffer = memoryview(bytearray(256 * 1024))
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            sink.sendall(buffer[:count])
    _hang_up(sink)


def _take(source: socket.socket, line: Any, one_way: float, not_before: float) -> None:
    data = b"-"
    while data:
        try:
            data = source.recv(256 * 1024)
        except OSError:
            data = b""
        line.put((max(time.monotonic() + one_way, not_before), data))


def _give(line: Any, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            due, data = line.get()
            time.sleep(max(0.0, due - time.monotonic()))
            if not data:
                break
            sink.sendall(data)
    _hang_up(sink)


def _hang_up(sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class Web:
    """A server over a data directory: `urls`, one base URL per way in, and the `ca` to trust."""

    version = ""

    def __init__(self, run: Path) -> None:
        """Make what every server needs; subclasses add the ways in."""
        self.ca = _certificates(run)
        self.urls: dict[str, str] = {}
        self._wires: list[Wire] = []

    def _add_wires(self, http: int, https: int, round_trip: float, rate: int) -> None:
        self._add_wire("far http", "http", http, delay=round_trip)
        self._add_wire("far https", "https", https, delay=round_trip)
        with contextlib.suppress(OSError):
            self._add_wire("narrow", "http", http, rate=rate)

    def _add_wire(self, name: str, scheme: str, port: int, **options: Any) -> None:
        wire = Wire(port, **options)
        self._wires.append(wire)
        self.urls[name] = f"{scheme}://127.0.0.1:{wire.port}"

    def log(self) -> list[tuple[str, str, str]]:
        """Return the requests at the counted port so far: connection, method, target."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the relays; subclasses stop the server."""
        for wire in self._wires:
            wire.close()


class Nginx(Web):
    """The server of choice."""

    def __init__(self, data: Path, run: Path, *, round_trip: float, rate: int) -> None:
        """Start everything; `close` ends it."""
        path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
        program = shutil.which("nginx", path=path)
        if program is None:
            raise FileNotFoundError(MISSING)
        super().__init__(run)
        self._log = run / "access.log"
        listing = _listing_server(Listing(data))
        ports = dict(zip(("http", "https", "counted"), _free_ports(3)))
        user = "user root;" if os.geteuid() == 0 else ""
        conf, errors = run / "nginx.conf", str(run / "error.log")
        conf.write_text(_CONF.format(user=user, run=run, data=data, **ports))
        (run / "locations").write_text(_LOCATIONS.format(listing=listing.server_port))
        self._process = subprocess.Popen([program, "-p", str(run), "-e", errors, "-c", str(conf)])
        _wait_for(ports["http"])
        self.urls["http"] = f"http://127.0.0.1:{ports['http']}"
        self.urls["https"] = f"https://127.0.0.1:{ports['https']}"
        self.urls["counted"] = f"http://127.0.0.1:{ports['counted']}"
        self._add_wires(ports["http"], ports["https"], round_trip, rate)
        probe = subprocess.run([program, "-v"], capture_output=True, text=True, check=False)
        self.version = probe.stderr.strip().rpartition(": ")[2]

    def log(self) -> list[tuple[str, str, str]]:
        """Read nginx's own log."""
        lines = (line.split() for line in self._log.read_text().splitlines())
        return [(connection, method, target) for connection, method, target, _ in lines]

    def close(self) -> None:
        """Stop nginx and the relays."""
        super().close()
        self._process.terminate()
        self._process.wait(10)


class Bundled(Web):
    """The tests' own server, where nginx is missing: right answers at a Python server's pace."""

    version = "the tests' server in Python (nginx is missing)"

    def __init__(self, data: Path, run: Path, *, round_trip: float, rate: int) -> None:
        """Start two servers, plain and TLS, with all of the data in memory."""
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from server import Server

        super().__init__(run)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(run / "server.pem")
        self._servers = [Server(), Server(tls)]
        for file in (file for file in data.rglob("*") if file.is_file()):
            bucket, _, key = file.relative_to(data).as_posix().partition("/")
            body, etag = file.read_bytes(), nginx_etag(file)
            for server in self._servers:
                server.put(bucket, key, body, etag=etag)
        plain, secure = self._servers
        self.urls.update(http=plain.url, counted=plain.url, https=secure.url)
        self._add_wires(plain.port, secure.port, round_trip, rate)

    def log(self) -> list[tuple[str, str, str]]:
        """Return what the plain server has seen."""
        seen = self._servers[0].seen
        return [(str(each.connection), each.method, each.target) for each in seen]

    def close(self) -> None:
        """Stop the servers and the relays."""
        super().close()
        for server in self._servers:
            server.close()


def start(data: Path, run: Path, *, round_trip: float, rate: int) -> Web:
    """Start nginx, or say what is missing and make do."""
    try:
        return Nginx(data, run, round_trip=round_trip, rate=rate)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return Bundled(data, run, round_trip=round_trip, rate=rate)


def _certificates(run: Path) -> Path:
    import trustme

    ca = trustme.CA()
    ca.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(
        str(run / "server.pem")
    )
    ca.cert_pem.write_to_path(str(run / "ca.pem"))
    return run / "ca.pem"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)
        ]
        return [sock.getsockname()[1] for sock in sockets]


def _wait_for(port: int) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    raise TimeoutError("nginx did not start")
