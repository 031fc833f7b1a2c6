"""Hold mypy --strict and pyright against the client scripts beside this file.

check.py PYTHON            the module is installed in PYTHON's environment
check.py PYTHON --vendored a copy of the module lies in the user's own package, under another name
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULE = HERE.parents[1] / "aind_s3_cache.py"
VENDORED = "some_package._vendor.s3c"


def make_project(folder: Path, vendored: bool) -> list[str]:
    """Lay out a user's project, and return the scripts in it that must be clean."""
    names = ["client.py"] if vendored else ["client.py", "client_submodules.py"]
    for name in [*names, "client_wrong.py"]:
        text = (HERE / name).read_text(encoding="utf-8")
        if vendored:
            text = text.replace("from aind_s3_cache import", f"from {VENDORED} import")
        (folder / name).write_text(text, encoding="utf-8")
    if vendored:
        copy = folder.joinpath(*VENDORED.split(".")).with_suffix(".py")
        copy.parent.mkdir(parents=True)
        (copy.parent / "__init__.py").touch()
        (copy.parent.parent / "__init__.py").touch()
        copy.write_bytes(MODULE.read_bytes())
    return names


def run(folder: Path, command: list[str]) -> str:
    """Run a checker in the project, and return what it prints; errors found are no failure."""
    command = [sys.executable, "-m", *command]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
    if done.returncode not in (0, 1):
        sys.exit(f"{command[2]} broke down:\n{done.stdout}{done.stderr}")
    return done.stdout


def mypy(folder: Path, python: str, names: list[str]) -> Iterable[tuple[str, int, str]]:
    command = ["mypy", "--strict", "--no-error-summary", f"--python-executable={python}"]
    out = run(folder, [*command, *names])
    for line in out.splitlines():
        if found := re.match(r"(.+?):(\d+): error: (.*)", line):
            yield found[1], int(found[2]), found[3]


def pyright(folder: Path, python: str, names: list[str]) -> Iterable[tuple[str, int, str]]:
    # Else it reads nothing below a folder whose name starts with a dot, such as nox's.
    (folder / "pyrightconfig.json").write_text('{"exclude": []}', encoding="utf-8")
    command = ["pyright", "--outputjson", f"--pythonpath={python}"]
    for one in json.loads(run(folder, [*command, *names]))["generalDiagnostics"]:
        if one["severity"] == "error":
            yield Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python")
    parser.add_argument("--vendored", action="store_true")
    options = parser.parse_args()
    wrong = (HERE / "client_wrong.py").read_text(encoding="utf-8").splitlines()
    marked = {number for number, line in enumerate(wrong, 1) if "# wrong" in line}
    failed = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        clean = make_project(folder, options.vendored)
        for checker in (mypy, pyright):
            for name, line, text in checker(folder, options.python, clean):
                print(f"{checker.__name__}: {name}:{line}: {text}")
                failed = 1
            seen = {line for _, line, _ in checker(folder, options.python, ["client_wrong.py"])}
            for line in sorted(seen ^ marked):
                what = "unexpected error" if line in seen else "mistake not reported"
                print(f"{checker.__name__}: client_wrong.py:{line}: {what}")
                failed = 1
            print(f"{checker.__name__}: {len(clean)} scripts, {len(seen & marked)} mistakes seen")
    return failed


if __name__ == "__main__":
    sys.exit(main())
