"""The command line: verbs, streams, exit codes, pipes, interrupts, ways to start it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import BUCKET, SUBJECT_FILE, Publish, Run, Spawn, files_below, posix
from server import Server
from subject import s3c


class Said:
    """What a run said: exit code, lines of stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.lines = out.splitlines()

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.lines]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`run(*args)`: `main` in this process; a process of its own is `cli`."""

    def run(*args: object) -> Said:
        code = s3c.main([str(arg) for arg in args])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture
def three(publish: Publish) -> list[str]:
    return [publish(b"%d" % number, f"dir/{number}.txt") for number in range(3)]


# ==== get =====================================================================================


def test_get_prints_the_local_path(publish: Publish, run: Callable[..., Said]) -> None:
    said = run("get", publish(b"data"))
    assert (said.code, len(said.lines), said.err) == (0, 1, "")
    assert said.paths[0].is_absolute()
    assert said.paths[0].read_bytes() == b"data"


def test_get_prints_one_path_a_line_in_order(three: list[str], run: Callable[..., Said]) -> None:
    said = run("get", *three, three[0])
    assert [path.read_bytes() for path in said.paths] == [b"0", b"1", b"2", b"0"]


def test_get_takes_local_paths_and_urls(
    server: Server, publish: Publish, run: Callable[..., Said], tmp_path: Path
) -> None:
    publish(b"data")
    (tmp_path / "x.txt").write_bytes(b"local")
    said = run("get", tmp_path / "x.txt", f"{server.url}/{BUCKET}/data.json")
    assert [path.read_bytes() for path in said.paths] == [b"local", b"data"]


def test_get_brings_a_tree(three: list[str], run: Callable[..., Said]) -> None:
    for uri in (f"s3://{BUCKET}/dir/", f"s3://{BUCKET}/dir"):
        (root,) = run("get", uri).paths
        assert sorted(os.listdir(root)) == ["0.txt", "1.txt", "2.txt"]


def test_get_json_prints_a_record_a_line(three: list[str], run: Callable[..., Said]) -> None:
    run("get", three[1])
    records = run("get", "--json", *three).records
    assert [r["status"] for r in records] == ["downloaded", "revalidated", "downloaded"]
    assert [r["from_cache"] for r in records] == [False, True, False]
    assert [(r["uri"], r["size"], r["source"]) for r in records] == [(u, 1, "s3") for u in three]
    assert all(Path(r["path"]).is_file() and r["etag"] for r in records)


@pytest.mark.parametrize("jobs", [[], ["-j", "1"], ["--jobs", "7"]], ids=repr)
def test_get_takes_a_list_on_standard_input(three: list[str], cli: Run, jobs: list[str]) -> None:
    done = cli("get", *jobs, "-", input="\n".join([*three, "", f"  {three[0]}  ", ""]))
    assert (done.returncode, done.stderr) == (0, "")
    contents = [Path(line).read_bytes() for line in done.stdout.splitlines()]
    assert contents == [b"0", b"1", b"2", b"0"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_list_is_utf_8_with_or_without_a_mark_whatever_this_python_writes(
    publish: Publish, cli: Run, encoding: str
) -> None:
    uri = publish(b"data", "kéy.txt")
    done = cli("get", "-", input=f"\ufeff{uri}\r\n", env={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).read_bytes() == b"data"


def test_get_takes_an_empty_list(cli: Run) -> None:
    done = cli("get", "-", input="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@posix
def test_get_says_that_there_is_no_standard_input() -> None:
    command = f"'{sys.executable}' '{SUBJECT_FILE}' get - <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "aind-s3-cache: Standard input is closed\n"


def test_get_uses_as_many_connections_as_it_is_told(
    server: Server, publish: Publish, run: Callable[..., Said]
) -> None:
    server.latency = 0.005
    run("get", "-j", "4", *(publish(b"x", f"{n}.txt") for n in range(30)))
    assert 2 <= server.connections <= 4


def test_get_goes_on_after_an_error(three: list[str], run: Callable[..., Said]) -> None:
    said = run("get", three[0], f"s3://{BUCKET}/missing.json", three[1])
    assert said.code == 1
    assert [path.read_bytes() for path in said.paths] == [b"0", b"1"]
    assert len(said.err.splitlines()) == 1
    assert "missing.json" in said.err


def test_get_has_the_options_of_the_function(
    server: Server, publish: Publish, run: Callable[..., Said], cache: Path
) -> None:
    publish(b"old", version="v1")
    uri = publish(b"new", version="v2")
    (path,) = run("get", "--cache-dir", cache, "--version-id", "v1", uri).paths
    assert (path.read_bytes(), cache in path.parents) == (b"old", True)
    assert run("get", "--offline", "--cache-dir", cache, uri).code == 1
    run("get", "--cache-dir", cache, uri)
    server.reset()
    for option in (["--max-age", "12h"], ["--offline"], ["--max-age=1d"], ["--max-age=600"]):
        (record,) = run("get", "--json", *option, "--cache-dir", cache, uri).records
        assert record["status"] == "fresh"
    assert server.seen == []


def test_an_age_without_a_unit_is_in_seconds_where_the_function_counts_them(
    publish: Publish, run: Callable[..., Said]
) -> None:
    uri = publish(b"x")
    (path,) = run("get", uri).paths
    os.utime(path, (time.time() - 3600,) * 2)
    for age, status in ("7200", "fresh"), ("60", "revalidated"):
        (record,) = run("get", "--json", "--max-age", age, uri).records
        assert record["status"] == status


def test_get_serves_a_stale_copy_if_told_to(
    server: Server,
    publish: Publish,
    run: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3c, "_RETRY_BASE_THROTTLED", 0.0005)
    uri = publish(b"data")
    run("get", uri)
    server.always(503)
    assert run("get", uri).code == 1
    (record,) = run("get", "--json", "--stale-if-error", uri).records
    assert record["status"] == "stale"


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_get_prints_a_path_of_any_bytes(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    open(path, "wb").close()
    command: list[str | bytes] = [sys.executable, str(SUBJECT_FILE), "get", path]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    assert subprocess.run(command, capture_output=True, env=env).stdout == path + b"\n"


def test_get_never_shows_a_secret(server: Server, run: Callable[..., Said]) -> None:
    url = server.url.replace("//", "//user:s3cr3t@") + "/missing?token=s3cr3t"
    server.always(404)
    for said in (run("get", url), run("get", "--json", url), run("json", url)):
        assert said.code == 1
        assert "s3cr3t" not in said.out + said.err


# ==== json ====================================================================================

DOCUMENT = {"subject": {"id": 7, "name": "Ünï", "tags": ["a", {"b": None}]}, "0": [1, 2], "": {}}


@pytest.fixture
def document(publish: Publish) -> str:
    return publish(DOCUMENT)


def test_json_prints_the_document(document: str, run: Callable[..., Said]) -> None:
    said = run("json", document)
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out) == DOCUMENT


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("subject.id", "7"),
        ("subject.name", "Ünï"),
        ("subject.tags.0", "a"),
        ("subject.tags.1", '{\n  "b": null\n}'),
        ("subject.tags.1.b", "null"),
        ("subject.tags.-1.b", "null"),
        ("0.1", "2"),
    ],
)
def test_json_prints_a_part(document: str, run: Callable[..., Said], path: str, part: str) -> None:
    assert run("json", document, path).out == part + "\n"


@pytest.mark.parametrize("path", ["subject.nothing", "subject.tags.9", "subject.tags.x", "0.1.2"])
def test_json_says_which_step_of_a_path_is_not_there(
    document: str, run: Callable[..., Said], path: str
) -> None:
    said = run("json", document, path)
    assert (said.code, said.out, len(said.err.splitlines())) == (1, "", 1)
    assert f"{path!r}: {document}" in said.err


@pytest.mark.parametrize("content", [b"[1]", b"<html>", b"", b"{"], ids=repr)
def test_json_explains_what_is_no_mapping(
    publish: Publish, run: Callable[..., Said], content: bytes
) -> None:
    said = run("json", publish(content))
    assert (said.code, said.out, len(said.err.splitlines())) == (1, "", 1)
    assert "Traceback" not in said.err


def test_json_says_that_a_document_is_nested_too_deeply(
    publish: Publish, run: Callable[..., Said]
) -> None:
    uri = publish('{"a":' * 975 + "1" + "}" * 975)  # Python 3.12 reads it, but cannot print it
    said = run("json", uri)
    assert (said.code, bool(said.out), len(said.err.splitlines())) in ((0, True, 0), (1, False, 1))


def test_json_json_is_one_line(document: str, run: Callable[..., Said]) -> None:
    assert run("json", "--json", document).records == [DOCUMENT]
    assert json.loads(run("json", "--json", document, "subject.name").out) == "Ünï"


def test_json_prints_a_lone_surrogate_as_the_document_has_it(publish: Publish, cli: Run) -> None:
    done = cli("json", publish({"name": "Ünï \ud800"}), "name")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Ünï \\ud800\n", "")


def test_json_prints_unicode_to_a_terminal_that_cannot(document: str, cli: Run) -> None:
    for path in ([], ["subject.name"]):
        done = cli("json", document, *path, env={"PYTHONIOENCODING": "ascii"})
        assert (done.returncode, "Traceback" in done.stderr) == (0, False)


# ==== ls ======================================================================================


def test_ls_lists_keys(server: Server, three: list[str], run: Callable[..., Said]) -> None:
    server.page_size = 2
    said = run("ls", f"s3://{BUCKET}/dir/")
    assert (said.code, said.lines) == (0, three)
    assert run("ls", f"s3://{BUCKET}/dir/1").lines == [three[1]]
    assert run("ls", f"s3://{BUCKET}/").lines == three
    assert run("ls", f"s3://{BUCKET}").lines == three


def test_ls_json_has_size_and_etag(server: Server, publish: Publish, run: Any) -> None:
    uri = publish(b"1234", "odd name\n#?.txt", etag='"e"')
    said = run("ls", "--json", f"s3://{BUCKET}/")
    assert said.records == [{"uri": uri, "size": 4, "etag": '"e"'}]
    assert len(run("ls", f"s3://{BUCKET}/").lines) == 1, "a newline in a key makes no second line"


def test_ls_of_nothing_says_nothing(publish: Publish, run: Callable[..., Said]) -> None:
    publish(b"x")
    said = run("ls", f"s3://{BUCKET}/none/")
    assert (said.code, said.out) == (0, "")


@pytest.mark.parametrize("uri", ["http://host/x", "/tmp", "s3://"])
def test_ls_lists_s3_only(run: Callable[..., Said], uri: str) -> None:
    said = run("ls", uri)
    assert (said.code, len(said.err.splitlines())) == (1, 1)


def test_a_prefix_that_no_key_can_have_is_said_so(run: Callable[..., Said]) -> None:
    said = run("ls", f"s3://{BUCKET}/a\udcff")
    assert (said.code, said.out) == (1, "")
    assert said.err == "aind-s3-cache: Not a valid S3 key: lone surrogate in 'a\\udcff'\n"


def test_ls_offline_lists_the_cache_alone(
    server: Server, three: list[str], run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("get", *three)
    server.reset()
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")
    said = run("ls", f"s3://{BUCKET}/dir/")
    assert (said.code, said.out, len(said.err.splitlines())) == (1, "", 1)
    assert "offline" in said.err
    assert len(run("ls").lines) == 3
    assert server.seen == []


def test_ls_lists_the_cache(three: list[str], run: Callable[..., Said]) -> None:
    paths = run("get", *three).lines
    said = run("ls")
    assert sorted(line.split()[-1] for line in said.lines) == sorted(paths)
    assert all("1 B" in line and "object" in line for line in said.lines)


def test_ls_json_describes_the_cache(three: list[str], run: Callable[..., Said]) -> None:
    run("get", f"s3://{BUCKET}/dir/")
    records = run("ls", "--json").records
    assert sorted(r["kind"] for r in records) == ["object"] * 3 + ["tree"]
    assert {"path", "name", "size", "last_used", "etag"} <= records[0].keys()


def test_ls_of_an_empty_cache_makes_nothing(run: Callable[..., Said], home: Path) -> None:
    said = run("ls")
    assert (said.code, said.out) == (0, "")
    assert not (home / ".cache" / "aind-s3-cache").exists()


# ==== prune, verify, clear, dir ===============================================================


@pytest.fixture
def aged(publish: Publish, cache: Path, run: Callable[..., Said]) -> list[str]:
    """Paths of three entries of 1,000 bytes, last used 40, 20 and 2 days ago."""
    paths = run("get", "--cache-dir", cache, *(publish(bytes(1000), f"{n}.x") for n in "abc")).lines
    for path, days in zip(paths, (40, 20, 2)):
        stamp = time.time() - days * 86400
        os.utime(path, (stamp, stamp))
    return paths


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["--max-age", "30d"], 1),
        (["--max-age", "2w"], 2),
        (["--max-age", "1h"], 3),
        (["--max-age", "30"], 1),
        (["--max-size", "10GB"], 0),
        (["--max-size", "2kB"], 1),
        (["--max-size", "1.5K"], 2),
        (["--max-size", "1KiB"], 2),
        (["--max-size", "999"], 3),
        (["--max-age", "30d", "--max-size", "1000B"], 2),
    ],
    ids=str,
)
def test_prune_goes_by_age_and_size(
    aged: list[str], cache: Path, run: Callable[..., Said], options: list[str], gone: int
) -> None:
    said = run("prune", "--cache-dir", cache, *options)
    assert (said.code, said.lines) == (0, aged[:gone])
    assert [os.path.exists(path) for path in aged] == [False] * gone + [True] * (3 - gone)
    assert f"{gone} entr" in said.err


def test_the_links_of_a_tree_are_not_counted_as_freed(
    aged: list[str], publish: Publish, cache: Path, run: Callable[..., Said]
) -> None:
    publish(bytes(1000), "tree/d")
    (tree,) = run("get", "--cache-dir", cache, "s3://aind-open-data/tree/").lines
    for path in [*files_below(cache), Path(tree)]:
        os.utime(path, (1, 1))
    said = run("prune", "--cache-dir", cache, "--max-age", "30d")
    assert (len(said.lines), os.path.exists(tree)) == (5, False)
    assert "removed 5 entries, 4.0 kB" in said.err


def test_prune_can_be_tried(aged: list[str], cache: Path, run: Callable[..., Said]) -> None:
    said = run("prune", "--cache-dir", cache, "--max-age", "30d", "--dry-run", "--json")
    assert [record["path"] for record in said.records] == aged[:1]
    assert all(os.path.exists(path) for path in aged)


def test_prune_spares_what_was_just_used(three: list[str], run: Callable[..., Said]) -> None:
    run("get", *three)
    assert run("prune", "--max-size", "0", "--max-age", "0").lines == []


@pytest.mark.parametrize(
    "options",
    [
        ["--max-age", "soon"],
        ["--max-age", "-1d"],
        ["--max-age", "3x"],
        ["--max-age", "nan"],
        ["--max-age", ""],
        ["--max-size", "big"],
        ["--max-size", "-5"],
        ["--max-size", "10 bananas"],
        ["--max-size", "inf"],
        ["--max-size", "1e308TB"],
        ["--max-age", "1e308y"],
    ],
    ids=str,
)
def test_a_quantity_that_is_none_is_wrong_usage(
    run: Callable[..., Said], options: list[str]
) -> None:
    said = run("prune", *options)
    assert (said.code, said.out) == (2, "")
    assert "Traceback" not in said.err


def test_verify_finds_and_removes_what_is_damaged(
    three: list[str], run: Callable[..., Said]
) -> None:
    paths = run("get", *three).paths
    assert (run("verify").code, run("verify").out) == (0, "")
    paths[1].chmod(0o644)
    paths[1].write_bytes(b"X")
    said = run("verify")
    assert (said.code, said.paths) == (1, [paths[1]])
    assert [path.exists() for path in paths] == [True, False, True]
    assert run("verify").code == 0


def test_clear_removes_ours_and_nothing_else(
    three: list[str], run: Callable[..., Said], cache: Path
) -> None:
    run("get", "--cache-dir", cache, *three)
    (cache / "other.txt").write_bytes(b"mine")
    assert run("clear", "--cache-dir", cache).code == 0
    assert files_below(cache) == [cache / "other.txt"]


def test_dir_prints_where_the_cache_is(
    run: Callable[..., Said], home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AIND_S3_CACHE_DIR", str(tmp_path / "own"))
    assert run("dir").out == f"{tmp_path / 'own' / 'aind-s3-cache'}\n"
    (record,) = run("dir", "--json", "--cache-dir", "~/here").records
    assert record == {"dir": str(home / "here" / "aind-s3-cache")}


# ==== Help and usage ==========================================================================


def test_help_teaches_by_example(run: Callable[..., Said]) -> None:
    said = run("--help")
    assert (said.code, said.err) == (0, "")
    assert "examples:" in said.out
    for verb in ("get", "json", "ls", "prune", "verify", "clear", "dir"):
        assert re.search(rf"^ +{verb} ", said.out, re.MULTILINE), f"{verb} is not explained"


def test_every_example_of_the_help_is_right_usage(
    run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 - closed with the test
    with Server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        examples = re.findall(r"^  aind-s3-cache (.+?)(?:  .*)?$", run("--help").out, re.MULTILINE)
        assert len(examples) >= 6
        for example in examples:
            assert run(*example.partition(" <")[0].split()).code in (0, 1), example
    sys.stdin.close()


@pytest.mark.parametrize("verb", ["get", "json", "ls", "prune", "verify", "clear", "dir"])
def test_every_verb_has_help(run: Callable[..., Said], verb: str) -> None:
    said = run(verb, "--help")
    assert (said.code, said.err) == (0, "")
    assert "--json" in said.out


def test_version_is_the_modules(run: Callable[..., Said]) -> None:
    assert run("--version").out == f"aind-s3-cache {s3c.__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["get"],
        ["json"],
        ["fetch", "x"],
        ["get", "--wrong", "x"],
        ["get", "-j", "many", "x"],
        ["get", "-j", "0", "x"],
        ["get", "-j", "-2", "x"],
        ["get", "--anonymous", "--signed", "x"],
        ["dir", "extra"],
    ],
    ids=str,
)
def test_wrong_usage_is_two(run: Callable[..., Said], args: list[str]) -> None:
    said = run(*args)
    assert (said.code, said.out) == (2, "")
    assert "usage:" in said.err


# ==== Errors ==================================================================================


@pytest.mark.parametrize(
    "uri",
    ["s3://", "s3://no bucket/x", "ftp://x/y", "/missing", f"s3://{BUCKET}/missing", "s3://no-b/x"],
)
@pytest.mark.parametrize("verb", ["get", "json"])
def test_a_known_error_is_one_line_and_one(
    publish: Publish, run: Callable[..., Said], verb: str, uri: str
) -> None:
    publish(b"x")
    said = run(verb, uri)
    assert (said.code, said.out, len(said.err.splitlines())) == (1, "", 1)
    assert said.err.startswith("aind-s3-cache: ")


@pytest.mark.parametrize("verb", ["get", "json"])
def test_a_hint_names_the_option_not_the_argument(
    publish: Publish, run: Callable[..., Said], verb: str
) -> None:
    said = run(verb, "--anonymous", publish(b"x", private=True))
    assert (said.code, "--anonymous" in said.err, "anonymous=" in said.err) == (1, True, False)


def test_an_unusable_cache_is_one_line(
    publish: Publish, run: Callable[..., Said], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.touch()
    for args in (["get", publish(b"x")], ["ls"], ["prune"], ["verify"], ["clear"], ["dir"]):
        said = run(*args, "--cache-dir", path)
        assert (said.code, said.out, len(said.err.splitlines())) == (1, "", 1), args
        assert str(path) in said.err


@pytest.mark.boto3
def test_no_credentials_are_a_known_error(publish: Publish, run: Callable[..., Said]) -> None:
    pytest.importorskip("boto3")
    said = run("get", "--signed", publish(b"x"))
    assert (said.code, len(said.err.splitlines())) == (1, 1)
    assert "credentials" in said.err.lower()


def test_signed_without_boto3_says_what_to_install(publish: Publish, cli: Run) -> None:
    uri = publish(b"x")
    command = [sys.executable, "-I", "-S", str(SUBJECT_FILE), "get", "--signed", uri]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "pip install" in done.stderr


# ==== Ways to start it ========================================================================


def test_the_file_is_a_program(publish: Publish, cli: Run) -> None:
    done = cli("get", publish(b"data"))
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).read_bytes() == b"data"


@posix
def test_the_file_can_be_executed(publish: Publish, tmp_path: Path) -> None:
    """Under any name, from any place."""
    program = tmp_path / "s3get"
    shutil.copy(SUBJECT_FILE, program)
    command = [str(program), "get", publish(b"data")]
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    out = subprocess.run(
        command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    ).stdout
    assert Path(out.strip()).read_bytes() == b"data"


def test_it_runs_from_standard_input(publish: Publish, tmp_path: Path) -> None:
    command = [sys.executable, "-", "get", publish(b"data")]
    done = subprocess.run(
        command, input=SUBJECT_FILE.read_bytes(), capture_output=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert Path(os.fsdecode(done.stdout.strip())).read_bytes() == b"data"


@pytest.mark.parametrize("verb", ["get", "json"])
def test_it_runs_isolated_without_site_packages(
    publish: Publish, tmp_path: Path, verb: str
) -> None:
    command = [sys.executable, "-I", "-S", str(SUBJECT_FILE), verb, publish({"a": 1})]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout


def test_main_takes_the_arguments_of_the_process(
    publish: Publish, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["anything", "get", publish(b"data")])
    assert s3c.main() == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes() == b"data"


# ==== Pipes and interrupts ====================================================================


@posix
@pytest.mark.parametrize("verb", ["ls", "get"])
def test_a_broken_pipe_is_silent(server: Server, verb: str) -> None:
    for number in range(1500):
        server.put(BUCKET, f"a-rather-long-prefix-of-keys/{number:060}", b"")
    uri = f"s3://{BUCKET}/a-rather-long-prefix-of-keys/"
    uris = [uri] if verb == "ls" else [str(SUBJECT_FILE)] * 2000
    command = [sys.executable, str(SUBJECT_FILE), verb, *uris]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        errors = child.stderr.read()
    assert (errors, child.returncode in (0, 141, -signal.SIGPIPE)) == (b"", True)


@posix
@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">/dev/full"])
def test_a_closed_or_full_stream_is_no_traceback(publish: Publish, redirect: str) -> None:
    if "full" in redirect and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = f"'{sys.executable}' '{SUBJECT_FILE}' get {publish(b'data')} {redirect}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode in ((1,) if "full" in redirect else (0, 1))


@posix
def test_an_error_with_stdout_closed_is_one_line(tmp_path: Path) -> None:
    command = f"'{sys.executable}' '{SUBJECT_FILE}' json '{tmp_path}/not-there' >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)


@posix
@pytest.mark.parametrize("args", ["--help >", "--version >", "wrong 2>"])
def test_a_full_stream_is_no_traceback_where_argparse_writes_either(args: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = f"'{sys.executable}' '{SUBJECT_FILE}' {args}/dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True)
    assert (done.returncode < 3, done.stdout, done.stderr) == (True, b"", b"")


@posix
@pytest.mark.parametrize("verb", ["json /not-there", "verify", "wrong-usage"])
def test_nothing_but_data_comes_on_stdout_where_stderr_is_closed(verb: str) -> None:
    command = f"'{sys.executable}' '{SUBJECT_FILE}' {verb} 2>&-"
    assert subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE).stdout == b""


@posix
def test_an_error_that_nobody_reads_is_one_all_the_same_and_ends_no_list(publish: Publish) -> None:
    command = [sys.executable, str(SUBJECT_FILE), "get", f"s3://{BUCKET}/no", publish(b"data")]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert Path(done.stdout.strip()).read_bytes() == b"data"


def interrupt(server: Server, args: list[object], after: int = 1) -> tuple[int, str, str, float]:
    """Send Ctrl-C to a run once the server has sent so many bytes: code, out, err, seconds."""
    command = [sys.executable, str(SUBJECT_FILE), *map(str, args)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        while server.bytes_sent < after and child.poll() is None:
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = child.communicate(timeout=10)
    return child.returncode, out, err, time.monotonic() - began


@posix
@pytest.mark.parametrize("size", [3 << 20, 20 << 20], ids=["medium", "large"])
def test_ctrl_c_is_130_at_once_and_leaves_nothing_that_is_served(
    server: Server, publish: Publish, cache: Path, size: int, run: Callable[..., Said]
) -> None:
    server.rate = 1e6
    data = os.urandom(size)
    uri = publish(data)
    code, out, err, seconds = interrupt(server, ["get", "--cache-dir", cache, uri], 500_000)
    assert (code, out, err) == (130, "", "")
    assert seconds < 4
    assert not list(cache.rglob(".t*"))
    server.rate = None
    (path,) = run("get", "--cache-dir", cache, uri).paths
    assert path.read_bytes() == data


@posix
def test_ctrl_c_ends_a_list_of_many(server: Server, publish: Publish, cache: Path) -> None:
    server.latency = 0.01
    uris = [publish(b"x", f"{number}.txt") for number in range(300)]
    code, out, err, seconds = interrupt(server, ["get", "--cache-dir", cache, *uris], 20)
    assert (code, out, err, seconds < 4) == (130, "", "", True)
    assert not list(cache.rglob(".t*"))


@posix
@pytest.mark.parametrize("verb", ["json", "ls"])
def test_ctrl_c_ends_a_read_that_stalls(server: Server, publish: Publish, verb: str) -> None:
    server.rate = 1000
    for number in range(300):
        publish({"a": "x" * 100_000}, f"{number}")
    uri = f"s3://{BUCKET}/" + ("0" if verb == "json" else "")
    code, out, err, seconds = interrupt(server, [verb, uri], 100)
    assert (code, out, err, seconds < 4) == (130, "", "", True)


@posix
def test_a_list_that_is_still_being_typed_can_be_interrupted(spawn: Spawn) -> None:
    child = spawn("""
import SUBJECT as s3c, argparse
print("ready", flush=True)
sys.exit(s3c.main(["get", "-"]))
""")
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    assert (child.wait(5), child.communicate()) == (130, ("", ""))
