"""The README: its code and commands run, its names and links are right, its tables are whole.

What needs a package index is not run: of `pip install` the requirement is held against
pyproject.toml, and the line that sets up a clone runs with stand-ins for the programs it installs.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import SUBJECT_FILE, Run
from server import Server
from subject import name as subject_name
from subject import s3c

Block = Callable[..., "list[str]"]
ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
SHELL_BLOCKS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = [line.partition("  #")[0].rstrip() for b in SHELL_BLOCKS for line in b.splitlines()]
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.M | re.S)
QUOTED = set(re.findall(r"`([^`\n]+)`", PROSE))
WORDS = {word for code in QUOTED for word in re.findall(r"\w+", code)}
DEMO, SET_UP = "python3 tests/demo.py", COMMANDS[1]
SESSION = "exaspim_708373_2024-02-02_11-26-44"


def commands(*starts: str) -> list[str]:
    """The README's commands that start so."""
    return [command for command in COMMANDS if command.startswith(starts)]


OURS = [
    *commands("aind-s3-cache", "uv ", "pipx "),
    *(one for one in commands("python3 ") if "aind_s3_cache.py" in one),
]


# ==== The world that it speaks of =============================================================


@pytest.fixture
def world(server: Server) -> Server:
    """The objects that the README names."""
    document = {"session_id": SESSION, "subject": {"id": "708373"}}
    for key in (f"{SESSION}/metadata.json", "dataset/metadata.json"):
        server.put("aind-open-data", key, json.dumps(document).encode())
    for key in ("image.zarr/.zattrs", "image.zarr/0/0", "volume.nii.gz"):
        server.put("aind-open-data", f"dataset/{key}", b"{}")
    return server


@pytest.fixture
def shell(world: Server, tmp_path: Path) -> Run:
    """`shell(command)`: a line for `sh`, where `aind-s3-cache` and `python3` are ours."""
    if os.name == "nt":
        pytest.skip("the README's commands are for a POSIX shell")
    place, programs = tmp_path / "clone", tmp_path / "programs"
    (place / "your_package").mkdir(parents=True)
    programs.mkdir()
    shutil.copy(SUBJECT_FILE, place / "aind_s3_cache.py")
    (place / "list.txt").write_text("s3://aind-open-data/dataset/metadata.json\n")
    python = shlex.quote(sys.executable)
    for name, command in {"aind-s3-cache": f"{python} aind_s3_cache.py", "python3": python}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    beside = os.path.dirname(sys.executable)
    env = {
        **os.environ,
        "UV_OFFLINE": "1",
        "UV_PYTHON": os.path.realpath(sys.executable),
        "PIP_NO_INDEX": "1",
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PATH": os.pathsep.join([str(programs), beside, os.environ["PATH"]]),
    }

    def shell(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        program = command.split()[0]
        if shutil.which(program, path=env["PATH"]) is None:
            pytest.skip(f"{program} is not on the PATH")
        return subprocess.run(
            ["sh", "-c", command],
            **{"cwd": place, "env": env, "encoding": "utf-8", "timeout": 60, **options},
            capture_output=True,
        )

    return shell


# ==== Code ====================================================================================


@pytest.fixture
def run_block(run_python: Run, world: Server) -> Block:
    """Run one of the README's blocks in a fresh process; its lines of output."""

    def run_block(block: str, *args: str) -> list[str]:
        code = re.sub(r"\b(from|import) aind_s3_cache\b", rf"\1 {subject_name}", block)
        done = run_python(code, *args)
        assert done.stderr == ""
        return list(done.stdout.splitlines())

    return run_block


def test_there_are_blocks_and_nothing_else_is_fenced() -> None:
    assert len(PYTHON_BLOCKS) == 2
    assert len(PYTHON_BLOCKS) + len(SHELL_BLOCKS) == len(re.findall(r"^```\w", TEXT, re.M))
    assert TEXT.count("```") % 2 == 0


def test_the_first_block_does_what_its_comments_say(run_block: Block, world: Server) -> None:
    located, session = run_block(PYTHON_BLOCKS[0])
    assert located.endswith("_metadata.json False downloaded")
    assert session == SESSION
    assert len(world.seen) == 2, "one to localize, one to read, none for the local copy"
    assert run_block(PYTHON_BLOCKS[0])[0].endswith("_metadata.json True revalidated")


def test_the_second_block_does_what_its_comments_say(run_block: Block, world: Server) -> None:
    names, error = run_block(PYTHON_BLOCKS[1])
    assert re.fullmatch(r"\['\S+_metadata.json', '\S+_volume.nii.gz'\]", names)
    assert error == "NoSuchKey s3://aind-open-data/dataset/missing.json"
    asked = [request.path.rpartition("/")[2] for request in world.seen]
    assert asked.count("metadata.json") == 2, "`max_age` asks nothing, `stale_if_error` does"


# ==== Commands ================================================================================


def test_the_first_two_commands_are_there_alone_on_their_lines() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith("python3 ")]
    chain = "python3 -m venv .venv && .venv/bin/pip install -q nox && .venv/bin/nox"
    assert lines[:2] == ["python3 tests/demo.py", chain]
    assert [f"{line}\n" for line in lines[:2]] == SHELL_BLOCKS[:2]


def test_every_command_is_run_or_checked_here() -> None:
    checked = [DEMO, SET_UP, *OURS, *commands("pip install", "cp ")]
    assert sorted(checked) == sorted(COMMANDS)


def test_the_demo_runs() -> None:
    done = subprocess.run([sys.executable, *DEMO.split()[1:]], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_the_set_up_is_a_chain_of_venv_pip_and_nox(shell: Run, tmp_path: Path) -> None:
    """Run with stand-ins that note how they are called: it needs a package index."""
    note = 'echo "$0 $*" >> log\n'
    make = f"#!/bin/sh\n{note}mkdir -p .venv/bin; for name in pip nox; do\n"
    make += f"echo '{note}' > .venv/bin/$name; chmod +x .venv/bin/$name; done\n"
    (tmp_path / "programs" / "python3").write_text(make)
    assert shell(SET_UP, cwd=tmp_path).returncode == 0
    called = [line.rpartition("/")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert called == ["python3 -m venv .venv", "pip install -q nox", "nox "]


@pytest.mark.parametrize("command", commands("pip install"))
def test_what_pip_installs_is_this_project(command: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (requirement,) = shlex.split(command)[2:]
    name, _, extra = requirement.rstrip("]").partition("[")
    assert f'name = "{name}"' in project
    assert not extra or re.search(rf"^{extra} = \[", project, re.M)


@pytest.mark.parametrize("command", commands("cp "))
def test_a_copy_can_be_imported(command: str, shell: Run) -> None:
    module = command.split()[-1][:-3].replace("/", ".")
    done = shell(f"{command} && python3 -c 'import {module} as s; print(s.get_json.__module__)'")
    assert (done.stdout.strip(), done.stderr) == (module, "")


@pytest.mark.parametrize("command", OURS)
def test_a_command_of_ours_runs(command: str, shell: Run) -> None:
    done = shell(command)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    silent = {"ls", "prune", "verify", "clear"}  # nothing to say of an empty cache
    assert done.stdout or command.split()[1] in silent


def test_commands_print_what_their_comments_say(shell: Run) -> None:
    get, tree, many, part, keys, held, *_, place = map(shell, commands("aind-s3-cache"))
    assert get.stdout.endswith("_metadata.json\n")
    assert tree.stdout.endswith("_image.zarr\n")
    assert json.loads(many.stdout)["status"] == "revalidated"
    assert part.stdout == "708373\n"
    assert keys.stdout.splitlines()[0] == "s3://aind-open-data/dataset/image.zarr/.zattrs"
    assert len(held.stdout.splitlines()) == 4, "three objects and a tree"
    assert place.stdout.strip().endswith(os.path.join(".cache", "aind-s3-cache"))


# ==== Names, numbers and links ================================================================


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 200


@pytest.mark.parametrize("name", s3c.__all__)
def test_every_public_name_has_its_place(name: str) -> None:
    assert name in QUOTED


@pytest.mark.parametrize(
    "function", [s3c.get_local_path_for_resource, s3c.get_local_paths_for_resources]
)
def test_every_option_is_named(function: Any) -> None:
    kinds = (inspect.Parameter.KEYWORD_ONLY,)
    options = {p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds}
    assert options <= WORDS


@pytest.mark.parametrize(
    "public", [s3c.LocalizedResource, s3c.CacheEntry, s3c.CacheManager], ids=lambda c: c.__name__
)
def test_every_attribute_and_method_is_named(public: Any) -> None:
    names = {name for name in vars(public) if not name.startswith("_")}
    assert names | set(getattr(public, "__annotations__", ())) - {"_path"} <= WORDS


def test_every_environment_variable_is_named() -> None:
    assert s3c.__doc__
    variables = set(re.findall(r"``([A-Z_0-9]+)``", s3c.__doc__))
    assert len(variables) > 10
    assert variables <= WORDS


@pytest.mark.parametrize("option", sorted(q.split()[0] for q in QUOTED if q.startswith("--")))
def test_options_in_the_text_are_those_of_the_command(option: str, cli: Run) -> None:
    assert option in cli("get", "--help").stdout + "--help"


def test_sessions_in_the_text_are_those_of_nox() -> None:
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^def (\w+)\(session", noxfile, re.M))
    named = set(re.findall(r"nox -s (\w+)", TEXT))
    default = re.findall(r"`(\w+)`", TEXT.partition("sets up and runs ")[2].partition(". ")[0])
    assert named <= sessions
    assert f"nox.options.sessions = {default}".replace("'", '"') in noxfile


def test_the_pythons_are_those_tested() -> None:
    first, last = re.findall(r"Python (3\.\d+) to (3\.\d+)", TEXT)[0]
    pythons = re.findall(r'"(3\.\d+)"', (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    assert (first, last) == (pythons[0], pythons[-1])


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https)([^)]+)\)", TEXT))))
def test_every_file_that_it_links_to_exists(link: str) -> None:
    """The chart and the table are written by `nox -s bench`."""
    assert (ROOT / link).is_file()


def test_the_chart_and_the_table_of_figures_are_linked() -> None:
    assert "](tests/bench/results.svg)" in TEXT
    assert "](tests/bench/RESULTS.md)" in TEXT


def test_the_tables_are_rectangles() -> None:
    for table in re.findall(r"(?:^\|.*\|\n)+", TEXT, re.M):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1, table


def test_the_comparison_says_which_releases_it_speaks_of() -> None:
    head = re.findall(r"^\| \| this \|.*$", TEXT, re.M)[0]
    text = TEXT.partition("## Beside the others")[2].partition("\n| |")[0]
    for peer in re.findall(r"\w+", head)[1:-2]:  # the last two words are 0 and 1
        assert re.search(rf"{peer.replace('hf_', 'huggingface_')}\s\d+\.\d+", text), peer
