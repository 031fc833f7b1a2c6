"""Ways to use the one file that need tools or root: uv, pipx, a container with only a Python.

Others are tested where they belong: a vendored copy in test_module, a program, standard input and
`python -I -S` in test_cli, a zipapp and odd users in test_lifecycle. `nox -s ways` installs the
tools and runs this file; `nox -s vendored` runs the whole suite on a copy.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import SUBJECT_FILE, Publish
from server import Server

Box = Callable[..., "list[str]"]
PYTHON = os.path.realpath(sys.executable)
NAME = "aind_s3_cache.py"


def run(command: list[str], env: dict[str, str], **options: Any) -> str:
    """Standard output of a command that must succeed."""
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        command, env=env, capture_output=True, timeout=60, **options
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode()


# ==== Its PEP 723 header ======================================================================


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A directory with a copy of the file: the tools look for projects around it."""
    place = tmp_path / "script"
    place.mkdir()
    shutil.copy(SUBJECT_FILE, place / NAME)
    return place


def tool(name: str) -> str:
    """The program beside this Python or on the PATH."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not on the PATH: `nox -s ways` installs it")
    return found


def test_the_header_asks_for_no_package_and_a_python() -> None:
    (block,) = re.findall(
        r"^# /// script\n((?:#.*\n)+?)# ///$", SUBJECT_FILE.read_text(encoding="utf-8"), re.M
    )
    assert re.findall(r"^# (.+)$", block, re.M) == ['requires-python = ">=3.9"']


def test_uv_runs_the_file(publish: Publish, script: Path, tmp_path: Path) -> None:
    """Offline: what the header asks for is there already."""
    own = {"UV_OFFLINE": "1", "UV_PYTHON": PYTHON, "UV_CACHE_DIR": str(tmp_path / "uv")}
    out = run([tool("uv"), "run", NAME, "get", publish(b"data")], {**os.environ, **own}, cwd=script)
    assert Path(out.strip()).read_bytes() == b"data"


def test_pipx_runs_the_file(publish: Publish, script: Path, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_DEFAULT_PYTHON": PYTHON,
    }
    out = run([tool("pipx"), "run", f"./{NAME}", "get", publish(b"data")], env, cwd=script)
    assert Path(out.strip()).read_bytes() == b"data"


# ==== A light container =======================================================================
# A root directory with an interpreter, its standard library and the shared libraries of both. No
# shell, no /etc, no /proc, no /dev; mounted read-only; a user without a name and without a home.

USER = 4711
IN_BOX = """
root=$1; shift
mount --bind "$root" "$root" && mount -t tmpfs -o mode=1777 tmpfs "$root/tmp" &&
mount -o remount,bind,ro "$root" || exit 99
for step in "$@"; do
    eval "$step" || exit
done
"""


def libraries(*files: Path) -> set[str]:
    """The shared libraries that these need, as absolute paths."""
    needed: set[str] = set()
    for file in files:
        said = subprocess.run(["ldd", str(file)], capture_output=True, text=True).stdout
        needed.update(re.findall(r"(/\S+) \(0x", said))
    return needed


def copy_into(root: Path, path: str) -> None:
    """Copy a file to the same path below root."""
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, place)


@pytest.fixture(scope="module")
def image() -> Iterator[Path]:
    """A root file system with only a Python in it, and our file."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("to make a container needs root on Linux")
    if not all(map(shutil.which, ("unshare", "chroot", "ldd", "mount"))):
        pytest.skip("unshare, chroot, ldd or mount is missing")
    with tempfile.TemporaryDirectory(prefix="s3c-image-") as name:
        root, stdlib = Path(name), sysconfig.get_path("stdlib")
        root.chmod(0o755)
        without = ["test", "tests", "idlelib", "ensurepip", "*-packages", "lib2to3", "config-*"]
        ignore = shutil.ignore_patterns(*without, "tkinter", "turtledemo")
        shutil.copytree(stdlib, root / stdlib.lstrip("/"), ignore=ignore)
        copy_into(root, PYTHON)
        for library in libraries(Path(PYTHON), *Path(stdlib).glob("lib-dynload/*.so")):
            copy_into(root, library)
        (root / "app").mkdir()
        (root / "tmp").mkdir()
        shutil.copy(SUBJECT_FILE, root / "app" / NAME)
        yield root


@pytest.fixture
def box(image: Path, server: Server) -> Callable[..., list[str]]:
    """`box(*steps, input=None, **env) -> lines` that they print, one after the other in one place.

    A step is what stands after `python3` on a shell's command line. The network is the machine's.
    """

    def box(*steps: str, input: bytes | None = None, **env: str) -> list[str]:
        env = {"PYTHONDONTWRITEBYTECODE": "1", "AWS_ENDPOINT_URL": server.url, **env}
        inside = ["env", "-i", *(f"{name}={value}" for name, value in env.items())]
        inside += [str(shutil.which("chroot")), f"--userspec={USER}:{USER}", str(image), PYTHON]
        commands = [f"{shlex.join(inside)} {step}" for step in steps]
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", IN_BOX, "sh", str(image), *commands],
            input=input,
            capture_output=True,
            timeout=60,
        )
        if done.returncode == 99 or b"unshare failed" in done.stderr:
            pytest.skip(f"this machine does not mount: {done.stderr.decode()[:80]}")
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().splitlines()

    return box


WHERE_AM_I = """
import errno, os, pwd
for place in ("/", "/app", "/app/x", os.path.dirname(os.__file__)):
    try: os.mkdir(os.path.join(place, "new"))
    except OSError as error: print(errno.errorcode[error.errno])
try: print(pwd.getpwuid(os.getuid()))
except KeyError: print("nobody known as", os.getuid(), os.environ.get("HOME"))
"""


@pytest.mark.root
def test_the_container_is_as_poor_as_it_should_be(box: Box, image: Path) -> None:
    said = box(f"-c {shlex.quote(WHERE_AM_I)}")
    assert said == ["EROFS", "EROFS", "ENOENT", "EROFS", f"nobody known as {USER} None"]
    assert not any((image / name).exists() for name in ("etc", "dev", "proc", "home", "bin/sh"))


@pytest.mark.root
def test_a_light_container_does_the_main_job(box: Box, publish: Publish) -> None:
    """Without a home the cache is a private directory below the temp directory."""
    get = f"/app/{NAME} get --json {publish(b'data')}"
    read = "-c \"import glob; print(open(glob.glob('/tmp/*/*/objects/*/*_data.json')[0]).read())\""
    first, second, content = box(get, get, read)
    assert [json.loads(line)["status"] for line in (first, second)] == ["downloaded", "revalidated"]
    assert json.loads(first)["path"].startswith(f"/tmp/aind-s3-cache-{USER}")
    assert content == "data"


@pytest.mark.root
def test_a_light_container_with_a_volume_for_the_cache(box: Box, publish: Publish) -> None:
    get = f"/app/{NAME} get {publish(b'data')}"
    said = box(
        get, f"/app/{NAME} get --offline {publish(b'data')}", AIND_S3_CACHE_DIR="/tmp/volume"
    )
    assert said[0] == said[1]
    assert said[0].startswith("/tmp/volume/aind-s3-cache/objects/")


@pytest.mark.root
def test_a_light_container_reads_json_without_any_disk(box: Box, publish: Publish) -> None:
    assert box(f"-I -S /app/{NAME} json {publish({'a': [1, 2]})} a.1") == ["2"]


@pytest.mark.root
def test_a_light_container_runs_the_file_from_standard_input(box: Box, publish: Publish) -> None:
    """As `kubectl exec -i … python3 - get URI < aind_s3_cache.py` does: nothing is installed."""
    (path,) = box(f"- get {publish(b'data')}", input=SUBJECT_FILE.read_bytes())
    assert path.startswith("/tmp/aind-s3-cache-")


@pytest.mark.root
def test_the_start_up_in_a_light_container(
    box: Box, publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing keeps bytecode there: each start compiles the file anew. The figures are printed."""
    uri, import_it = publish({}), f"sys.path.insert(0, '/app'); import {NAME[:-3]} as s"
    steps = {
        "interpreter": "pass",
        "import": import_it,
        "read a JSON": f"{import_it}; s.get_json('{uri}')",
        "cache an object": f"{import_it}; s.get_local_path_for_resource('{uri}')",
    }
    took = {}
    for name, code in steps.items():
        code = f"import sys, time; {code}; print(time.time() - float(sys.argv[1]))"
        took[name] = min(map(float, box(*[f'-c {shlex.quote(code)} "$(date +%s.%N)"'] * 3)))
    with capsys.disabled():
        said = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in took.items())
        print(f"\nstart-up in a light container: {said}")
    assert took["cache an object"] < 5
