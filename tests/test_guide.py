"""The users' guide: every snippet runs as written, and does what its comments promise.

The guide is the document of the project that this file serves, and lies beside the repository. What
it asks for comes from a server that stands in for AWS and the web: child processes reach the hosts
that they mean, by TLS, through a proxy that takes them all here. Three absolute directories that
only the guide's author has are moved; nothing else is changed.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import AWS_HOSTS, Run
from server import Server
from subject import name as subject_name

GUIDE = Path(__file__).resolve().parents[2] / "shared" / "guide.md"
if not GUIDE.is_file():
    pytest.skip("the guide is not beside this repository", allow_module_level=True)

TEXT = GUIDE.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
OBJECTS = sorted(set(re.findall(r"s3://([\w-]+)/([\w./-]+\.\w+)", TEXT)))
PRIVATE = "private-bucket"

# A snippet goes on where the one above it ended: these names it may have from there.
GIVEN = f"import json, time\nfrom {subject_name} import *\n"
MOVED = ["/local/path", "/nvme/cache", "/fast/storage/cache"]
KEYS = {"AWS_ACCESS_KEY_ID": "from-the-chain", "AWS_SECRET_ACCESS_KEY": "secret"}

Snippet = Callable[..., str]


def find(*words: str) -> str:
    """The one snippet that has these words."""
    (found,) = (snippet for snippet in SNIPPETS if all(word in snippet for word in words))
    return str(found)


def title(snippet: str) -> str:
    """The heading that a snippet stands below, and its place there."""
    before = TEXT[: TEXT.index(snippet)]
    heading = re.findall(r"^#+ (.+)$", before, re.MULTILINE)[-1]
    return f"{heading} {before.rpartition(heading)[2].count('```python')}"


def adapted(snippet: str, root: Path) -> str:
    """A snippet for this machine: three directories moved, our name if we are a vendored copy."""
    for path in MOVED:
        snippet = snippet.replace(f'"{path}', f'"{root.as_posix()}{path}')
    return re.sub(r"\bfrom aind_s3_cache\b", f"from {subject_name}", snippet)


@pytest.fixture
def aws(ca: Any) -> Iterator[Server]:
    """All buckets and web pages of the guide, by TLS and under their own names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("example.com", *AWS_HOSTS).configure_cert(context)
    with Server(context) as server:
        for number, (bucket, key) in enumerate(OBJECTS):
            document = {"session_id": f"session {number}", "key": key}
            server.put(bucket, key, json.dumps(document).encode())
        server.put(PRIVATE, "data.json", b'{"private": true}', private=True)
        page = (200, b'{"web": true}', {"Content-Type": "application/json"})
        server.before = lambda asked: page if asked.headers["host"] == "example.com" else None
        yield server


@pytest.fixture
def world(aws: Server, ca_file: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine whose every way out leads to `aws`."""
    local = tmp_path / "local" / "path"
    local.mkdir(parents=True)
    (local / "data.json").write_text('{"local": true}', encoding="utf-8")
    with Server() as proxy:
        proxy.proxy, proxy.tunnel_port = True, aws.port
        # boto3 says at each start that it will leave Python 3.9 behind.
        hush = {"PYTHONWARNINGS": "ignore:Boto3 will no longer support Python"}
        yield {"HTTPS_PROXY": proxy.url, "AWS_CA_BUNDLE": str(ca_file), **hush}


@pytest.fixture
def run(run_python: Run, world: dict[str, str], tmp_path: Path) -> Snippet:
    """`run(snippet, then="", env=, flags=) -> stdout` of a fresh process; `then` is appended."""

    def run(
        snippet: str, then: str = "", env: dict[str, str] | None = None, flags: tuple[str, ...] = ()
    ) -> str:
        code = f"{GIVEN}{adapted(snippet, tmp_path)}\n{then}"
        done = run_python(code, env={**world, **(env or {})}, flags=flags)
        assert done.stderr == ""
        return done.stdout

    return run


# ==== Every snippet ===========================================================================


def test_the_guide_was_read() -> None:
    assert len(SNIPPETS) == TEXT.count("```python") >= 20
    assert len(OBJECTS) >= 10


def needs_boto3(snippet: str) -> bool:
    return "import boto3" in snippet or "botocore" in snippet or "anonymous=False" in snippet


WITHOUT = [s for s in SNIPPETS if not needs_boto3(s)]


@pytest.mark.parametrize("snippet", WITHOUT, ids=title)
def test_a_snippet_runs_without_boto3(run: Snippet, snippet: str) -> None:
    run(snippet, flags=("-I", "-S"))  # -S: no site-packages


@pytest.mark.boto3
def test_the_snippets_run_with_boto3_one_after_another(run: Snippet) -> None:
    pytest.importorskip("boto3")
    run("\n".join(SNIPPETS), env=KEYS)


# ==== What their comments promise =============================================================


def test_quick_start_prints_the_session(run: Snippet) -> None:
    assert re.fullmatch(r"Session ID: session \d+\n", run(find("metadata['session_id']")))


def test_bucket_and_key_are_printed(run: Snippet) -> None:
    printed = run(find("parse_s3_uri", "dataset_name"))
    assert printed == "Bucket: aind-open-data, Key: dataset_name/file.json\n"


def test_one_function_reads_from_s3_the_web_and_disk(run: Snippet) -> None:
    assert run(find("example.com"), "print(data)") == "{'local': True}\n"


def test_automatic_caching_says_false_then_true(run: Snippet, aws: Server, home: Path) -> None:
    lines = run(find("# False on first call")).splitlines()
    assert lines[1:] == ["From cache: False", "From cache: True"]
    path = Path(lines[0].partition("Downloaded to: ")[2])
    assert json.loads(path.read_text(encoding="utf-8"))["key"] == "large-file.json"
    assert home / ".cache" / "aind-s3-cache" in path.parents
    assert [request.method for request in aws.seen] == ["GET", "GET"]
    assert aws.connections == 1


def test_an_object_that_changed_is_downloaded_again(run: Snippet, aws: Server) -> None:
    snippet = find('print(f"Source: {result.source}")')
    expected = ["Source: s3", "From cache: False", "From cache: True"]
    assert run(snippet).splitlines() == expected
    assert run(snippet).splitlines() == ["Source: s3", "From cache: True", "From cache: True"]
    aws.put("bucket", "file.json", b'{"changed": true}')
    then = "print(json.load(open(result))['changed'])"
    assert run(snippet, then).splitlines() == [*expected, "True"]


def test_a_temporary_cache_is_gone_at_the_end(run: Snippet) -> None:
    then = "print(result.from_cache, result.path.exists(), cm.dir.exists())"
    assert run(find("automatically cleaned up"), then) == "False False False\n"


def test_a_persistent_cache_stays(run: Snippet, home: Path) -> None:
    snippet = find("~/.aind_zarr_cache")
    assert run(snippet, "print(result.from_cache, result.path.exists())") == "False True\n"
    assert run(snippet, "print(result.from_cache)") == "True\n"
    assert [path.name for path in home.iterdir()] == [".aind_zarr_cache"]


def test_a_custom_directory_holds_the_cache_and_can_be_removed(run: Snippet) -> None:
    then = "import os; print(str(result.path).startswith(temp_dir), os.path.exists(temp_dir))"
    said, last = run(find("TemporaryDirectory()", "Cached in"), then).splitlines()
    assert said.startswith("Cached in: ")
    assert last in ("True False", "False False")  # a temporary directory may be a link


def test_a_batch_is_read_from_the_cache_the_second_time(run: Snippet, aws: Server) -> None:
    snippet = find("# Process local file (much faster")
    for cached in (False, True):
        lines = run(snippet).splitlines()
        assert [line.startswith("Processed s3://aind-open-data/dataset") for line in lines]
        assert [line.endswith(f"(cached: {cached})") for line in lines] == [True] * 3
    assert aws.connections == 2  # one for each run


def test_uris_are_built_and_taken_apart(run: Snippet) -> None:
    base = "s3://aind-open-data/experiment_123/processed"
    lines = run(find("join_any(base_uri"), "print(new_uri)").splitlines()
    assert lines == [
        f"Metadata: {base}/metadata.json",
        f"ZARR: {base}/data.ome.zarr/0",
        f"{base}/metadata.json/additional_file.json",
    ]


def test_the_three_strategies_keep_what_they_say(run: Snippet, home: Path, tmp_path: Path) -> None:
    run(find("# High-performance storage"))
    assert (home / ".aind_cache").is_dir()
    assert (tmp_path / "nvme" / "cache").is_dir()


def test_parallel_downloads_come_in_the_order_asked(run: Snippet, home: Path) -> None:
    (home / ".cache").mkdir()
    (home / ".cache" / "of-others").touch()
    lines = [line.split(" -> ") for line in run(find("ThreadPoolExecutor")).splitlines()]
    assert [uri for uri, _ in lines] == [f"s3://bucket/file{number}.json" for number in (1, 2, 3)]
    for number, (_, path) in enumerate(lines, 1):
        assert json.loads(Path(path).read_text("utf-8"))["key"] == f"file{number}.json"
    assert {path.name for path in (home / ".cache").iterdir()} == {"aind-s3-cache", "of-others"}


def test_validation_and_fallback(run: Snippet, aws: Server, tmp_path: Path) -> None:
    snippet = find("def safe_load_json")
    local = (tmp_path / "local" / "path" / "data.json").as_posix()
    then = f"print(data['key'], safe_load_json({local!r}), safe_load_json('no/file'))"
    lines = run(snippet, then).splitlines()
    assert lines[0].startswith("Failed to load no/file: ")
    assert lines[1:] == ["file.json {'local': True} None"]
    aws.delete("bucket", "file.json")
    assert run(snippet, "print(data)").splitlines() == [
        "Failed to load s3://bucket/file.json: S3 object not found or inaccessible: "
        "s3://bucket/file.json (404, NoSuchKey)",
        "None",
    ]


def test_a_hand_made_clean_up_leaves_a_working_cache(run: Snippet, home: Path) -> None:
    cache = home / ".aind_cache"
    fill = "get_local_path_for_resource('s3://bucket/file.json', cache_dir='~/.aind_cache')"
    run(fill)
    files = [path for path in cache.rglob("*") if path.is_file()]
    for path in files:
        os.utime(path, (time.time() - 40 * 86400,) * 2)
    snippet = find("def cleanup_cache")
    assert run(snippet) == ""  # as written: "~" is no directory to pathlib
    printed = run(snippet, f"cleanup_cache({str(cache)!r})\nresult = {fill}\nprint(result.status)")
    lines = printed.splitlines()
    assert {line.partition(": ")[2] for line in lines[:-1]} == set(map(str, files))
    assert lines[-1] == "downloaded"


# ==== Credentials =============================================================================


@pytest.fixture
def boto3() -> None:
    pytest.importorskip("boto3")


def signed_by(aws: Server) -> list[str]:
    """The access key of each request, "" for an unsigned one."""
    signatures = [request.headers.get("authorization", "") for request in aws.seen]
    return [(re.findall(r"Credential=([^/]+)", text) or [""])[0] for text in signatures]


@pytest.mark.boto3
@pytest.mark.usefixtures("boto3")
def test_a_client_of_the_users_signs(run: Snippet, aws: Server) -> None:
    assert run(find("your-access-key"), "print(data)") == "{'private': True}\n"
    assert signed_by(aws) == ["your-access-key"]


@pytest.mark.boto3
@pytest.mark.usefixtures("boto3")
def test_the_credential_chain_signs(run: Snippet, aws: Server) -> None:
    assert run(find("# Use credential chain"), "print(data)", env=KEYS) == "{'private': True}\n"
    assert signed_by(aws) == ["from-the-chain"]


@pytest.mark.boto3
@pytest.mark.usefixtures("boto3")
def test_a_client_with_a_configuration_downloads(run: Snippet, aws: Server, tmp_path: Path) -> None:
    printed = run(find("Custom configuration for large files"), "print(result.path)", env=KEYS)
    assert tmp_path / "fast" / "storage" / "cache" in Path(printed.strip()).parents
    assert set(signed_by(aws)) == {"from-the-chain"}


# ==== Errors ==================================================================================

HANDLED: list[tuple[int, str, str]] = [
    (404, "NoSuchBucket", "Bucket does not exist"),
    (404, "NoSuchKey", "File not found in bucket"),
    (403, "AccessDenied", "Access denied - check permissions"),
    (403, "InvalidObjectState", "S3 error: InvalidObjectState"),
    (400, "InvalidRequest", "S3 error: InvalidRequest"),
]
HANDLING = "from botocore.exceptions import ClientError, NoCredentialsError"


@pytest.mark.boto3
@pytest.mark.usefixtures("boto3")
@pytest.mark.parametrize(("status", "code", "printed"), HANDLED)
def test_every_branch_of_the_error_handling_is_reached(
    run: Snippet, aws: Server, status: int, code: str, printed: str
) -> None:
    aws.always(status, code=code)
    assert run(find(HANDLING)) == printed + "\n"
    if status == 403:
        assert run(find(HANDLING), env=KEYS) == printed + "\n"
        assert signed_by(aws)[-1] == "from-the-chain"


@pytest.mark.boto3
@pytest.mark.usefixtures("boto3")
def test_real_answers_reach_the_same_branches(run: Snippet, aws: Server) -> None:
    aws.delete(PRIVATE, "file.json")
    assert run(find(HANDLING)) == "File not found in bucket\n"
    aws.hide_missing = True
    assert run(find(HANDLING)) == "Access denied - check permissions\n"
    aws.buckets.clear()
    assert run(find(HANDLING)) == "Bucket does not exist\n"


@pytest.mark.boto3
@pytest.mark.usefixtures("boto3")
def test_missing_credentials_are_said_where_signing_is_demanded(run: Snippet, aws: Server) -> None:
    call = 'get_json("s3://private-bucket/file.json"'
    demanding = find(HANDLING).replace(call, f"{call}, anonymous=False")
    assert demanding != find(HANDLING)
    assert run(demanding) == "AWS credentials not found\n"
    assert aws.seen == []
