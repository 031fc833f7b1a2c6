"""What the one file promises as a file: light, a drop-in for 0.1, the same under any name."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import SUBJECT_FILE, Run
from server import Server
from subject import name as subject_name
from subject import s3c

SOURCE = SUBJECT_FILE.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)

# ==== Light ===================================================================================

HEAVY = [
    *("urllib.request", "urllib.error", "http", "email", "socket", "ssl", "select", "selectors"),
    *(
        "xml",
        "pyexpat",
        "logging",
        "argparse",
        "dataclasses",
        "inspect",
        "typing",
        "json",
        "hashlib",
    ),
    *("concurrent", "multiprocessing", "subprocess", "tempfile", "shutil", "random", "asyncio"),
    *("boto3", "botocore", "datetime", "gzip", "zlib", "pathlib", "re", "enum", "contextlib"),
]


def test_importing_it_loads_nothing_heavy(run_python: Run) -> None:
    code = """
before = set(sys.modules)
import SUBJECT
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(*sorted(name for name in sys.modules if name.startswith(("urllib", "http", "xml"))))
"""
    tops, parts = run_python(code, flags=("-I", "-S")).stdout.splitlines()
    assert sorted(set(HEAVY) & set(tops.split())) == []
    assert parts == ""


def test_it_opens_with_a_few_small_imports() -> None:
    imports = [n for n in TREE.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {alias.name for n in imports if isinstance(n, ast.Import) for alias in n.names}
    names |= {str(n.module) for n in imports if isinstance(n, ast.ImportFrom)}
    loaded_anyway = {"__future__", "errno", "functools", "itertools", "os", "stat"}
    loaded_anyway |= {"sys", "time"}
    assert names - loaded_anyway <= {"atexit", "bisect", "threading"}


WATCHED = """
import threading
events = []
def watch(event, args):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "socket.__new__", "socket.connect",
                 "subprocess.Popen", "_thread.start_new_thread", "os.listdir", "os.scandir"):
        events.append((event, str(args[0])))
import errno, functools, os, stat, time
sys.addaudithook(watch)
import SUBJECT
watched = [e for e in events if not e[1].endswith((".py", ".pyc"))]
# The import system itself lists directories of the path and reads its source or bytecode.
print([e for e in watched if e[0] not in ("os.listdir", "os.scandir") or e[1] not in sys.path])
print(threading.active_count())
"""


def test_importing_it_touches_no_disk_and_starts_no_thread(
    run_python: Run, tmp_path: Path, home: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    found, threads = run_python(WATCHED, flags=("-I", "-S", "-B")).stdout.splitlines()
    assert ast.literal_eval(found) == [] or "." in subject_name  # packages of others have folders
    assert threads == "1"
    assert sorted(tmp_path.rglob("*")) == before


def test_reading_a_small_document_loads_no_more_than_it_needs(
    server: Server, run_python: Run
) -> None:
    server.put("bucket", "key", b'{"a": 1}')
    code = f"""
import os
os.environ["AWS_ENDPOINT_URL"] = {server.url!r}
import SUBJECT as s3c
print(s3c.get_json("s3://bucket/key"))
heavy = ["ssl", "logging", "argparse", "email", "http", "xml", "dataclasses", "boto3",
         "concurrent.futures", "urllib.request", "tempfile"]
print([name for name in heavy if name in sys.modules])
"""
    assert run_python(code, flags=("-I", "-S")).stdout.splitlines() == ["{'a': 1}", "[]"]


def test_boto3_is_imported_in_one_function() -> None:
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    importing = [
        function.name
        for function in functions
        for node in ast.walk(function)
        if re.match(r"(import|from) (boto3|botocore)\b", ast.unparse(node))
    ]
    assert len(set(importing)) == 1
    assert not [n for n in TREE.body if re.match(r"(import|from) boto", ast.unparse(n))]


def test_it_imports_the_standard_library_alone_and_never_itself() -> None:
    names: set[str] = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names.add(str(node.module).partition(".")[0])
    known = getattr(sys, "stdlib_module_names", names)  # since 3.10
    assert names - set(known) <= {"boto3", "botocore"}
    assert "aind_s3_cache" not in names


@pytest.mark.parametrize("flags", [("-X", "dev"), ("-W", "error"), ("-O",), ("-OO",)])
def test_nothing_is_said_at_exit(server: Server, run_python: Run, flags: tuple[str, ...]) -> None:
    server.put("bucket", "key", b"{}")
    code = """
import SUBJECT as s3c
s3c.get_json("s3://bucket/key")
s3c.get_local_path_for_resource("s3://bucket/key", cache_dir="cache")
with s3c.CacheManager(persistent=False) as manager:
    s3c.get_local_path_for_resource("s3://bucket/key", cache_dir=manager.dir)
"""
    done = run_python(code, flags=flags, env={"AWS_ENDPOINT_URL": server.url})
    assert (done.stdout, done.stderr) == ("", "")


# ==== Public names ============================================================================

CONTRACT = [
    *(
        "get_local_path_for_resource",
        "get_local_paths_for_resources",
        "LocalizedResource",
        "CacheManager",
    ),
    *("get_json", "get_json_s3", "get_json_s3_uri", "get_json_url"),
    *("parse_s3_uri", "is_url", "is_file_path", "as_pathlike", "as_string", "join_any"),
    *(
        "S3CacheError",
        "NotFoundError",
        "AccessDeniedError",
        "TransferError",
        "IntegrityError",
        "OfflineError",
        "CacheError",
    ),
    *("InvalidJSONError", "MissingDependencyError"),
    *("main",),
]


def test_all_is_in_the_order_of_the_contract() -> None:
    assert [name for name in s3c.__all__ if name in CONTRACT] == CONTRACT
    assert set(s3c.__all__) - set(CONTRACT) <= {"CacheEntry"}  # what `entries()` returns
    assert len(set(s3c.__all__)) == len(s3c.__all__)


def test_every_name_in_all_is_there_and_is_ours() -> None:
    for name in s3c.__all__:
        assert getattr(s3c, name).__module__ == s3c.__name__


def test_nothing_else_looks_public() -> None:
    defined = [n.name for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert {name for name in defined if not name.startswith("_")} == set(s3c.__all__)


def test_a_star_import_brings_all_and_no_more() -> None:
    space: dict[str, Any] = {}
    exec(f"from {subject_name} import *", space)
    assert set(space) - {"__builtins__"} == set(s3c.__all__)


SIGNATURES = {
    "get_local_path_for_resource": "(uri_or_path, *, cache_dir=None, s3_client=None, "
    "anonymous=None, max_concurrency=16, multipart_threshold_bytes=8388608, max_age=0, "
    "offline=False, stale_if_error=False, version_id=None, progress=None)",
    "get_local_paths_for_resources": "(uris, *, max_workers=None, executor=None, "
    "return_exceptions=False, progress=None, **options)",
    "CacheManager": "(cache_dir=None, *, persistent=True)",
    "CacheManager.prune": "(self, max_age_days=None, max_size_bytes=None, dry_run=False)",
    "get_json": "(file_url_or_bucket, key=None, s3_client=None, anonymous=None, anon=None)",
    "get_json_s3": "(bucket, key, s3_client=None, anonymous=None, anon=None)",
    "get_json_s3_uri": "(uri, s3_client=None, anonymous=None)",
    "get_json_url": "(url)",
    "parse_s3_uri": "(s3_uri)",
    "is_url": "(path_or_url)",
    "is_file_path": "(path_or_url)",
    "as_pathlike": "(base)",
    "as_string": "(kind, bucket, path)",
    "join_any": "(base, *parts)",
    "main": "(argv=None)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_the_contract(name: str) -> None:
    target: Any = s3c
    for part in name.split("."):
        target = getattr(target, part)
    signature = inspect.signature(target)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == SIGNATURES[name]


# ==== Docstrings ==============================================================================


def functions_and_methods() -> list[str]:
    names = []
    for name in s3c.__all__:
        value = getattr(s3c, name)
        if not inspect.isclass(value):
            names.append(name)
            continue
        methods = [key for key, held in vars(value).items() if inspect.isfunction(held)]
        names += [f"{name}.{key}" for key in methods if not key.startswith("_")]
    return names


def look_up(name: str) -> Any:
    owner, _, method = name.partition(".")
    return getattr(getattr(s3c, owner), method) if method else getattr(s3c, owner)


def section(text: str, title: str) -> str:
    """The text of one numpydoc section, "" without it."""
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n-+$|\Z)", text, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


@pytest.mark.parametrize("name", functions_and_methods())
def test_every_public_function_documents_what_it_takes_and_gives(name: str) -> None:
    text, signature = inspect.getdoc(look_up(name)) or "", inspect.signature(look_up(name))
    assert re.match(r"[A-Z].*[.:]$", text.splitlines()[0])
    taken = section(text, "Parameters")
    asked = [parameter for parameter in signature.parameters if parameter != "self"]
    assert [one for one in asked if not re.search(rf"\b{one}\b", taken)] == []
    short_method = "." in name and re.fullmatch(r"Return .*\.", text)
    if signature.return_annotation != "None" and not short_method:
        assert section(text, "Returns")


@pytest.mark.parametrize("name", ["get_local_path_for_resource", "get_local_paths_for_resources"])
def test_what_is_raised_is_documented(name: str) -> None:
    raised = section(inspect.getdoc(look_up(name)) or "", "Raises")
    assert "S3CacheError" in raised or "TransferError" in raised


@pytest.mark.parametrize(
    "name", ["parse_s3_uri", "as_pathlike", "as_string", "join_any", *CONTRACT[4:8]]
)
def test_errors_of_the_small_functions_are_documented(name: str) -> None:
    assert section(inspect.getdoc(look_up(name)) or "", "Raises")


def test_every_public_class_and_error_has_a_docstring() -> None:
    for name in s3c.__all__:
        assert (vars(look_up(name)).get("__doc__") or look_up(name).__doc__ or "").strip(), name


ATTRIBUTES = {
    "LocalizedResource": ["path", "from_cache", "source", "status", "uri", "etag", "size"],
    "CacheManager": ["dir"],
    "S3CacheError": ["message", "uri", "status", "code", "hint", "response"],
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_are_documented(name: str) -> None:
    text = section(inspect.getdoc(look_up(name)) or "", "Attributes")
    assert [a for a in ATTRIBUTES[name] if not re.search(rf"^{a} : ", text, re.MULTILINE)] == []


# ==== The map =================================================================================

BANNERS = re.findall(r"^# ==== (\d+) (.+?) =+\n# (.+)$", SOURCE, re.MULTILINE)
ROOMS = [
    *("Defaults", "Errors", "URIs", "Wire", "Transport"),
    *("Sources", "Store", "JSON", "Cache", "Command line"),
]


def test_there_are_ten_rooms_leaf_first() -> None:
    assert [(int(number), title) for number, title, _ in BANNERS] == list(enumerate(ROOMS, 1))


def test_the_map_in_the_docstring_is_that_of_the_banners() -> None:
    text = ast.get_docstring(TREE) or ""
    mapped = re.findall(r"^ ?(\d+) (\S+(?: \S+)*) {2,}(\S.*)$", text, re.MULTILINE)
    assert [(number, title) for number, title, _ in mapped] == [row[:2] for row in BANNERS]


def test_grep_prints_the_table_of_contents() -> None:
    grep = shutil.which("grep")
    if grep is None:
        pytest.skip("there is no grep")
    command = [grep, "-A1", "^# ====", str(SUBJECT_FILE)]
    printed = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    blocks = [block.splitlines() for block in printed.strip().split("\n--\n")]
    assert len(blocks) == 10
    for _, rule in blocks:  # a banner states a rule
        assert re.match(r"# [A-Z].{30,}", rule), rule


def test_banners_fill_the_line() -> None:
    lines = [line for line in SOURCE.splitlines() if line.startswith("# ====")]
    assert {len(line) for line in lines} == {100}


def test_every_environment_variable_is_in_the_docstring() -> None:
    text = ast.get_docstring(TREE) or ""
    read = set(re.findall(r'"((?:AWS|AIND|XDG|SSL|REQUESTS)_[A-Z0-9_]+)"', SOURCE))
    assert read
    assert {name for name in read if name not in text} == set()


# ==== A drop-in for 0.1 =======================================================================

SUBMODULES = {
    "json_utils": ["get_json", "get_json_s3", "get_json_s3_uri", "get_json_url"],
    "s3_cache": ["CacheManager", "LocalizedResource", "get_local_path_for_resource"],
    "uri_utils": ["as_pathlike", "as_string", "is_file_path", "is_url", "join_any", "parse_s3_uri"],
}
MODULES = [(module, name) for module, names in SUBMODULES.items() for name in names]


@pytest.mark.parametrize(("module", "name"), MODULES)
def test_names_of_0_1_are_where_they_were(module: str, name: str) -> None:
    space: dict[str, Any] = {}
    exec(f"from {subject_name}.{module} import {name}", space)
    assert space[name] is getattr(s3c, name)


STYLES = """
from SUBJECT.json_utils import get_json
import SUBJECT.uri_utils
import SUBJECT.uri_utils as uris
from SUBJECT import s3_cache, json_utils as jsons
from SUBJECT.s3_cache import *
import SUBJECT as s3c
import importlib.util
assert SUBJECT.uri_utils.join_any is uris.join_any is s3c.join_any is join_any
assert s3c.s3_cache is s3_cache is importlib.import_module("SUBJECT.s3_cache")
assert jsons.get_json is get_json is s3c.get_json
assert s3c.uri_utils.as_string and s3c.json_utils.get_json_url
"""


@pytest.mark.parametrize(
    "first", [n for n, line in enumerate(STYLES.strip().splitlines()) if n < 6]
)
def test_every_style_of_import_works_also_as_the_first(run_python: Run, first: int) -> None:
    lines = STYLES.strip().splitlines()
    code = "\n".join([lines[first], *lines, "print('fine')"])
    assert run_python(code, flags=("-I", "-S", "-W", "error")).stdout == "fine\n"


def test_a_module_that_never_was_is_not_there(run_python: Run) -> None:
    code = "try:\n    import SUBJECT.no_such\nexcept ImportError as error:\n    print('refused')"
    assert run_python(code).stdout == "refused\n"


@pytest.mark.parametrize(("module", "name"), MODULES)
def test_mock_can_patch_a_name_by_its_old_path(module: str, name: str) -> None:
    true = getattr(s3c, name)
    with mock.patch(f"{subject_name}.{module}.{name}", return_value="patched") as patched:
        submodule = importlib.import_module(f"{subject_name}.{module}")
        assert getattr(submodule, name) is patched
    assert getattr(s3c, name) is true


def test_what_is_patched_by_its_old_path_is_patched_for_everybody() -> None:
    with mock.patch(f"{subject_name}.json_utils.get_json", return_value={"a": "patched"}):
        assert s3c.get_json("s3://bucket/key") == {"a": "patched"}
        assert importlib.import_module(subject_name).json_utils.get_json("x") == {"a": "patched"}


# ==== Vendored, and as a program ==============================================================


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    """A copy of the file in somebody's package; the directory to import it from."""
    package = tmp_path / "theirs" / "_vendor"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    shutil.copyfile(SUBJECT_FILE, package / "s3.py")
    return tmp_path


VENDORED = """
import sys
sys.path.insert(0, "VENDORED")
from theirs._vendor import s3
from theirs._vendor.s3.json_utils import get_json
import pickle, logging
assert "aind_s3_cache" not in sys.modules
result = s3.get_local_path_for_resource("s3://bucket/key", cache_dir="cache")
assert pickle.loads(pickle.dumps(result)) == result
assert type(result).__module__ == "theirs._vendor.s3"
try:
    get_json("s3://bucket/missing")
except s3.NotFoundError as error:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy).__module__ == "theirs._vendor.s3", type(copy)
assert logging.getLogger("theirs._vendor.s3").handlers
print(get_json("s3://bucket/key"), result.path.name[-3:])
"""


def test_a_vendored_copy_goes_by_its_own_name(
    server: Server, run_python: Run, vendored: Path
) -> None:
    server.put("bucket", "key", b"{}")
    code = VENDORED.replace("VENDORED", vendored.as_posix())
    done = run_python(code, flags=("-S",), env={"AWS_ENDPOINT_URL": server.url})
    assert done.stdout == "{} key\n"


def test_a_file_loaded_by_its_path_need_not_be_registered(server: Server) -> None:
    server.put("bucket", "key", b"{}")
    spec = importlib.util.spec_from_file_location("loaded_by_path", SUBJECT_FILE)
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert loaded.get_json("s3://bucket/key") == {}
    with pytest.raises(loaded.NotFoundError):
        loaded.get_json("s3://bucket/missing")
    assert not [name for name in sys.modules if name.startswith("loaded_by_path")]


def test_two_copies_in_one_process_share_a_cache(
    server: Server, run_python: Run, vendored: Path
) -> None:
    server.put("bucket", "key", b"{}")
    code = f"""
sys.path.insert(0, {str(vendored)!r})
import SUBJECT as one
from theirs._vendor import s3 as two
assert one.NotFoundError is not two.NotFoundError
first = one.get_local_path_for_resource("s3://bucket/key", cache_dir="cache")
second = two.get_local_path_for_resource("s3://bucket/key", cache_dir="cache")
print(first.path == second.path, second.from_cache)
"""
    done = run_python(code, env={"AWS_ENDPOINT_URL": server.url})
    assert done.stdout.split() == ["True", "True"]


def test_a_vendored_copy_runs_as_a_program(run_python: Run, vendored: Path) -> None:
    command = [sys.executable, str(vendored / "theirs" / "_vendor" / "s3.py"), "--version"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout == f"aind-s3-cache {s3c.__version__}\n"
    module = [sys.executable, "-m", "theirs._vendor.s3", "--version"]
    same = subprocess.run(module, capture_output=True, encoding="utf-8", cwd=vendored, check=True)
    assert (same.stdout, same.stderr) == (done.stdout, "")


def test_the_file_is_plain_text_of_this_century() -> None:
    assert "\t" not in SOURCE
    assert "\r" not in SUBJECT_FILE.read_bytes().decode("utf-8")
    assert SOURCE.startswith("#!/usr/bin/env python3\n")
    assert SOURCE.endswith("\n")


def test_the_oldest_python_can_read_it() -> None:
    ast.parse(SOURCE, feature_version=(3, 9))
