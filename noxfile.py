# /// script
# requires-python = ">=3.9"
# dependencies = ["nox>=2025.2"]
# ///
"""How this project is tested, measured and released; `nox --list` prints it.

`nox` runs what every change must pass, `nox -s NAME` one session, and what follows `--` goes to the
tool inside: `nox -s tests-3.12 -- -k redirect`. Interpreters that are missing are named as skipped.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

import nox

PYTHONS = ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15"]
THIS = f"{sys.version_info[0]}.{sys.version_info[1]}"
HERE = Path(__file__).resolve().parent
MODULE = HERE / "aind_s3_cache.py"
PROJECT = nox.project.load_toml(HERE / "pyproject.toml")

# Two processes per core: tests wait more than they work. Some send signals and watch clocks, and
# a loaded machine may fail one: it gets a second chance, and the summary names it.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PYTEST = f"python -m pytest -n {2 * CPUS} --dist worksteal --reruns 1 -rR".split()

nox.needs_version = ">=2025.2"
nox.options.sessions = ["demo", "lint", "types", "tests", "tests_boto3"]
nox.options.error_on_missing_interpreters = False  # in CI too: nobody has all six
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_venv = "yes"


def _find_siblings() -> None:
    """Let nox find the Pythons that a version manager keeps beside the one that runs us.

    pyenv, for one, has a command for each of them on the PATH that starts only the chosen ones.
    """
    own = Path(sys.base_prefix)
    others = (path for path in own.parent.glob("*/bin") if list(path.glob("python3.?*")))
    paths = [str(own / "bin"), *sorted(map(str, others), reverse=True)]
    if len(paths) > 2:
        os.environ["PATH"] = os.pathsep.join([*paths, os.environ["PATH"]])


_find_siblings()


def _install(session: nox.Session, group: str) -> None:
    session.install(*nox.project.dependency_groups(PROJECT, group))


def _first(pattern: str, path: Path) -> str:
    return str(re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)[0])


def _python_of(venv: Path) -> str:
    return str(venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def _build(session: nox.Session, folder: Path) -> list[str]:
    """Build sdist and wheel, and hold the wheel from the sdist against one from the tree."""
    shutil.rmtree(folder, ignore_errors=True)
    direct = folder.with_name("direct")
    session.run("python", "-m", "build", "--outdir", str(folder), silent=True)
    session.run("python", "-m", "build", "--wheel", "--outdir", str(direct), silent=True)
    (wheel,) = folder.glob("*.whl")
    hashes = {hashlib.sha256((d / wheel.name).read_bytes()).digest() for d in (folder, direct)}
    shutil.rmtree(direct)
    if len(hashes) > 1:
        session.error("the sdist and the tree give different wheels")
    built = sorted(map(str, folder.iterdir()))
    session.run("twine", "check", "--strict", *built)
    return built


# ==== What every change must pass =================================================================


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Test without boto3 on every Python found; the slow tests on the one that runs nox."""
    _install(session, "test")
    slow = [] if session.python == THIS else ["-m", "not slow"]
    session.run(*PYTEST, *slow, *session.posargs)


@nox.session
def tests_boto3(session: nox.Session) -> None:
    """Test with boto3, against moto and rclone as well."""
    _install(session, "boto3")
    session.run(*PYTEST, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and spelling; `nox -s lint -- --fix` mends what it can."""
    _install(session, "lint")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--diff"]), ".")
    session.run("codespell", *(["--write-changes"] if fix else []))


@nox.session
def types(session: nox.Session) -> None:
    """Check types with mypy --strict and pyright."""
    _install(session, "types")
    session.run("mypy", *(session.posargs or ["aind_s3_cache.py", "noxfile.py", "tests"]))
    session.run("pyright")


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """Show the main job, with nothing installed and no network."""
    session.run(sys.executable, "tests/demo.py", *session.posargs)


# ==== What CI runs besides ========================================================================


@nox.session
def coverage(session: nox.Session) -> None:
    """Measure which lines and branches the tests reach, subprocesses included."""
    _install(session, "coverage")
    session.run("coverage", "erase")
    session.run("coverage", "run", *PYTEST[1:], *session.posargs)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def vendored(session: nox.Session) -> None:
    """Test a copy of the one file under another name inside a package."""
    _install(session, "test")
    root = Path(session.create_tmp()).resolve()
    package = root / "some_package" / "_vendor"
    package.mkdir(parents=True, exist_ok=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    shutil.copy(MODULE, package / "s3c.py")
    env = {"PYTHONPATH": str(root), "S3C_SUBJECT": "some_package._vendor.s3c"}
    session.run(*PYTEST, *session.posargs, env=env)


@nox.session
def ways(session: nox.Session) -> None:
    """Run the file by uv and pipx, and in a container with only a Python (that needs root)."""
    _install(session, "test")
    session.install("pipx>=1.7", "uv>=0.5")
    files = ["tests/test_ways.py", "tests/test_readme.py"]
    session.run("python", "-m", "pytest", *(session.posargs or files))


@nox.session
def package(session: nox.Session) -> None:
    """Build, install the wheel, run its command, and check a client's types against it."""
    _install(session, "package")
    tmp = Path(session.create_tmp()).resolve()
    built = _build(session, tmp / "dist")
    (wheel,) = (path for path in built if path.endswith(".whl"))
    python = _python_of(tmp / "fresh")
    session.run("python", "-m", "venv", "--clear", str(tmp / "fresh"))
    session.run(python, "-m", "pip", "install", "-q", "--no-index", wheel, external=True)
    with session.chdir(tmp):  # away from the source
        console = str(Path(python).with_name("aind-s3-cache"))
        session.run(console, "dir", external=True)
        session.run(python, "-m", "aind_s3_cache", "dir", external=True)
    session.run("python", "tests/typing/check.py", python)
    session.run("python", "tests/typing/check.py", python, "--vendored")


@nox.session
def cluster(session: nox.Session) -> None:
    """Share a cache between the worker processes of a Dask cluster."""
    _install(session, "cluster")
    session.run("python", "-m", "pytest", *(session.posargs or ["tests/cluster"]))


@nox.session
def stress(session: nox.Session) -> None:
    """Kill, race and fill up for STRESS_SECONDS (60), and re-hash everything that was read."""
    _install(session, "test")
    env = {"STRESS_SECONDS": os.environ.get("STRESS_SECONDS", "60")}
    session.run("python", "tests/stress.py", *session.posargs, env=env)


@nox.session
def client(session: nox.Session) -> None:
    """Run aind-zarr-utils' own tests with this file; `-- --baseline` with PyPI's aind-s3-cache."""
    requirements = nox.project.dependency_groups(PROJECT, "client")
    posargs = [arg for arg in session.posargs if arg != "--baseline"]
    tmp = Path(session.create_tmp()).resolve()
    # vtk is half of what would be installed, and no test imports it. pip cannot leave it out, and
    # needs minutes where uv needs seconds to settle on a boto3.
    (tmp / "overrides.txt").write_text("vtk; python_version < '3'\n", encoding="utf-8")
    session.install("uv")
    install = [
        "uv",
        "pip",
        "install",
        "--quiet",
        "--python",
        _python_of(Path(session.virtualenv.location)),
    ]
    session.run(*install, "--overrides", str(tmp / "overrides.txt"), *requirements)
    ours = [] if "--baseline" in session.posargs else [str(HERE)]
    session.run(*install, "--reinstall", "--no-deps", *(ours or ["aind-s3-cache==0.1.0"]))
    # The tests come with the sdist only, of the release that was installed.
    code = "from importlib.metadata import version; print(version('aind-zarr-utils'))"
    release = str(session.run("python", "-c", code, silent=True)).strip()
    sdist = ["--no-deps", "--no-binary=aind-zarr-utils", f"aind-zarr-utils=={release}"]
    session.install("pip")
    session.run("python", "-m", "pip", "download", "-q", "-d", str(tmp), *sdist)
    shutil.unpack_archive(tmp / f"aind_zarr_utils-{release}.tar.gz", tmp)
    with session.chdir(tmp / f"aind_zarr_utils-{release}"):
        code = "import aind_s3_cache as a; print(a.__file__, a.__version__)"
        session.run("python", "-c", code)
        session.run("python", "-m", "pytest", "-q", "--no-cov", *posargs)


# ==== On request ==================================================================================


@nox.session
def bench(session: nox.Session) -> None:
    """Measure us and our peers side by side; write the table and the chart of the README."""
    _install(session, "bench")
    session.run("python", "tests/bench/run.py", *session.posargs)


@nox.session
def release(session: nox.Session) -> None:
    """Check, build and tag the version that the module names; `-- --upload` also publishes it."""
    version = _first(r'^__version__ = "(.+)"$', MODULE)
    newest = _first(r"^## (.+)$", HERE / "CHANGELOG.md")
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", newest):
        session.error(f"CHANGELOG.md must open with `## [{version}] - DATE`, not `## {newest}`")
    if session.run("git", "status", "--porcelain", silent=True, external=True):
        session.error("commit or remove what `git status` shows")
    if session.run("git", "tag", "--list", f"v{version}", silent=True, external=True):
        session.error(f"v{version} is tagged already")
    _install(session, "package")
    built = _build(session, HERE / "dist")
    session.run("git", "tag", "-a", f"v{version}", "-m", f"Release {version}", external=True)
    if "--upload" in session.posargs:
        session.run("twine", "upload", *built)
        session.run("git", "push", "origin", f"v{version}", external=True)


if __name__ == "__main__":
    nox.main()
