"""What the project's own files promise each other. Building the wheel is `nox -s package`."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    *("CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"),
    *("aind_s3_cache.py", "noxfile.py", "tests"),
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements_of(project: dict[str, Any]) -> list[str]:
    lists = [
        project["build-system"]["requires"],
        *project["project"]["optional-dependencies"].values(),
        *project["dependency-groups"].values(),
    ]
    return [one for some in lists for one in some if isinstance(one, str)]


def sessions_of(noxfile: str) -> list[ast.FunctionDef]:
    functions = [node for node in ast.parse(noxfile).body if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if "nox.session" in map(_name_of, node.decorator_list)]


def _name_of(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads(read("pyproject.toml"))
    return loaded


@pytest.fixture(scope="module")
def version() -> str:
    found = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', read("aind_s3_cache.py"), re.MULTILINE)
    assert len(found) == 1
    return str(found[0])


def test_the_top_level_holds_the_file_and_little_else() -> None:
    made = {"PKG-INFO", "__pycache__", "build", "dist"}  # by an sdist, Python and builds; ignored
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert shown - made == TOP_LEVEL


def test_the_version_stands_in_the_module_alone(project: dict[str, Any]) -> None:
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "aind_s3_cache.py"


def test_the_changelog_opens_with_this_version(version: str) -> None:
    newest = re.search(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", newest[1])


def test_nothing_is_required_to_use_the_file(project: dict[str, Any]) -> None:
    assert "dependencies" not in project["project"]
    assert set(project["project"]["optional-dependencies"]) == {"boto3"}


def test_requirements_have_a_lower_bound_and_no_other(project: dict[str, Any]) -> None:
    form = re.compile(r"[a-z0-9-]+(\[[a-z0-9,]+\])?>=[0-9.]+(; python_version (<|>=) '[0-9.]+')?")
    assert [one for one in requirements_of(project) if not form.fullmatch(one)] == []


def test_every_supported_python_is_named_and_tested(project: dict[str, Any]) -> None:
    label = "Programming Language :: Python :: "
    names = [one[len(label) :] for one in project["project"]["classifiers"] if label in one]
    pythons = [name for name in names if re.fullmatch(r"3\.\d+", name)]
    assert f"PYTHONS = {pythons}".replace("'", '"') in read("noxfile.py")
    assert project["project"]["requires-python"] == f">={pythons[0]}"


def test_the_command_calls_main(project: dict[str, Any]) -> None:
    assert project["project"]["scripts"] == {"aind-s3-cache": "aind_s3_cache:main"}


def test_every_session_says_in_one_line_what_it_does() -> None:
    sessions = sessions_of(read("noxfile.py"))
    assert {"tests", "tests_boto3", "lint", "types", "demo"} <= {node.name for node in sessions}
    for node in sessions:
        assert re.fullmatch(r"[A-Z].+\.", ast.get_docstring(node) or ""), node.name


def test_ci_runs_every_session_but_those_on_request() -> None:
    named = re.findall(r"\w+", read(".ci/run"))
    default = re.findall(
        r'"(\w+)"', read("noxfile.py").split("nox.options.sessions = ")[1].split("\n")[0]
    )
    sessions = {node.name for node in sessions_of(read("noxfile.py"))}
    assert sessions - set(named) - set(default) == {"bench", "release"}


def test_ci_runs_the_first_two_commands_of_the_readme() -> None:
    lines = re.findall(r"^(?:first|second)='(.+)'$", read(".ci/run"), re.MULTILINE)
    commands = re.findall(r"^python3 .+$", read("README.md"), re.MULTILINE)
    assert lines == commands[:2]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no executable bit")
def test_ci_can_be_executed() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
