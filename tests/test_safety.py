"""What other users plant is refused and left alone, and no secret reaches the disk."""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import NOBODY, AsNobody, Get, MiB, Publish, Run
from server import Server
from subject import s3c

pytestmark = pytest.mark.skipif(os.name != "posix", reason="users and modes are of POSIX")


@pytest.fixture
def shared(public: Path) -> Path:
    """A directory where everybody may make files, like the temp directory."""
    path = public / "shared"
    path.mkdir()
    path.chmod(0o1777)
    return path


@pytest.fixture
def get(shared: Path) -> Callable[..., Any]:
    return partial(s3c.get_local_path_for_resource, cache_dir=shared)


def state(path: Path) -> list[tuple[str, int, int, int, int]]:
    """Names, owners, modes, times and sizes of all below a directory."""
    found = [(str(p), p.lstat()) for p in sorted(path.rglob("*"))]
    return [(name, s.st_uid, s.st_mode, s.st_mtime_ns, s.st_size) for name, s in found]


# ==== In a directory of everybody =============================================================


def test_our_folder_is_private_where_others_could_write(
    shared: Path, publish: Publish, get: Any
) -> None:
    get(publish(b"data"))
    (root,) = shared.iterdir()
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


@pytest.mark.root
def test_another_user_cannot_reach_into_it(
    shared: Path, publish: Publish, get: Any, as_nobody: AsNobody
) -> None:
    path = get(publish(b"data")).path
    with pytest.raises(PermissionError):
        as_nobody(path.read_bytes)
    with pytest.raises(s3c.CacheError):
        as_nobody(lambda: get("s3://aind-open-data/data.json").path)


@pytest.mark.root
def test_what_another_user_has_published_meanwhile_is_as_good(
    server: Server, public: Path, get: Any, as_nobody: AsNobody
) -> None:
    """In a sticky directory nobody may replace it; and without a validator each call downloads."""
    server.put("b", "k", b"data", etag=None, headers={"Last-Modified": None})
    get = partial(s3c.get_local_path_for_resource, f"{server.url}/b/k", cache_dir=public)
    path = get().path
    for directory in list(path.parents)[:3]:
        directory.chmod(0o1777)
    assert as_nobody(get).path == path
    assert len(list(path.parent.iterdir())) == 1


def _plant_directory(root: Path) -> None:
    root.mkdir(mode=0o777)
    for name in ("objects", "partial", "locks", "trees"):
        (root / name).mkdir()


def _plant_link(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    root.symlink_to(root.parent / "elsewhere")


def _plant_dangling_link(root: Path) -> None:
    root.symlink_to(root.parent / "nowhere")


def _plant_file(root: Path) -> None:
    root.write_bytes(b"planted")


def _plant_fifo(root: Path) -> None:
    os.mkfifo(root)


PLANTS = [_plant_directory, _plant_link, _plant_dangling_link, _plant_file, _plant_fifo]


@pytest.mark.root
@pytest.mark.timeout(20)
@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("size", [4, 9 * MiB])
def test_what_another_user_planted_is_refused(
    plant: Callable[[Path], None],
    size: int,
    shared: Path,
    publish: Publish,
    get: Any,
    as_nobody: AsNobody,
) -> None:
    as_nobody(lambda: plant(shared / "aind-s3-cache"))
    before = state(shared)
    with pytest.raises(s3c.CacheError) as caught:
        get(publish(b"x" * size))
    assert str(shared) in str(caught.value)
    assert state(shared) == before


@pytest.mark.root
def test_a_place_that_becomes_everybodys_is_looked_at_again(
    tmp_path: Path,
    shared: Path,
    publish: Publish,
    as_nobody: AsNobody,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Broken variant: what was safe once is safe for ever."""
    monkeypatch.setattr(s3c, "_GLANCE", 0.0)
    (tmp_path / "mine").mkdir()
    link, uri = tmp_path / "link", publish(b"data")
    link.symlink_to("mine")
    s3c.get_local_path_for_resource(uri, cache_dir=link)
    link.unlink()
    link.symlink_to(shared)
    as_nobody(lambda: _plant_directory(shared / "aind-s3-cache"))
    with pytest.raises(s3c.CacheError, match="Unsafe"):
        s3c.get_local_path_for_resource(uri, cache_dir=link)


@pytest.mark.root
@pytest.mark.parametrize("plant", [_plant_directory, _plant_link])
@pytest.mark.parametrize("act", ["entries", "size", "prune", "verify", "clear"])
def test_a_manager_refuses_it_too(
    act: str, plant: Callable[[Path], None], shared: Path, as_nobody: AsNobody
) -> None:
    as_nobody(lambda: plant(shared / "aind-s3-cache"))
    before = state(shared)
    with pytest.raises(s3c.CacheError) as caught:
        getattr(s3c.CacheManager(shared), act)()
    assert caught.value.errno == errno.EPERM
    assert state(shared) == before


@pytest.mark.root
@pytest.mark.parametrize("plant", [_plant_directory, _plant_link])
def test_nothing_planted_is_served_offline(
    plant: Callable[[Path], None], shared: Path, get: Any, as_nobody: AsNobody
) -> None:
    as_nobody(lambda: plant(shared / "aind-s3-cache"))
    with pytest.raises(s3c.CacheError):
        get("s3://aind-open-data/data.json", offline=True)


@pytest.mark.parametrize("loose", [0o777, 0o770, 0o707, 0o722])
def test_our_folder_opened_to_others_is_refused(
    loose: int, shared: Path, publish: Publish, get: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shared / "aind-s3-cache"
    root.mkdir()
    root.chmod(loose)
    with pytest.raises(s3c.CacheError):
        get(publish(b"data"))
    assert list(root.iterdir()) == []


@pytest.mark.root
@pytest.mark.usefixtures("as_nobody")  # which skips, as chown would fail
@pytest.mark.parametrize("offline", [False, True])
def test_a_folder_that_became_another_users_is_refused(
    offline: bool, shared: Path, publish: Publish, get: Any
) -> None:
    """Removed and made anew it may have the same inode number, as this one surely does."""
    uri, root = publish(b"data"), shared / "aind-s3-cache"
    get(uri)
    os.chown(root, NOBODY, NOBODY)
    with pytest.raises(s3c.CacheError) as caught:
        get(uri, offline=offline)
    assert caught.value.errno == errno.EPERM


@pytest.mark.root
def test_a_colleagues_cache_may_be_read(get_public: Get, as_nobody: AsNobody) -> None:
    """Its parent is not open to everybody: whom to trust is the user's decision."""
    get_public()
    assert as_nobody(lambda: get_public().path.read_bytes()) == b"data"


@pytest.mark.root
def test_what_a_colleague_lets_nobody_read_is_fetched_for_oneself(
    get_public: Get, as_nobody: AsNobody
) -> None:
    """As under umask 077, in shards that whoever had umask 002 made."""
    path = get_public().path
    path.chmod(0o400)
    with pytest.raises(s3c.OfflineError):
        as_nobody(lambda: get_public(offline=True))
    path.parent.chmod(0o777)
    assert as_nobody(lambda: get_public().path.read_bytes()) == b"data"
    assert get_public().status == "revalidated"


@pytest.mark.root
def test_who_acts_for_another_user_is_served_what_that_one_may_read(get_public: Get) -> None:
    """As a service does with seteuid."""
    get_public().path.chmod(0o400)
    os.seteuid(NOBODY)
    try:
        with pytest.raises(s3c.OfflineError):
            get_public(offline=True)
    finally:
        os.seteuid(0)


NO_EACCESS = """
#include <errno.h>
#include <unistd.h>
int faccessat(int at, const char *path, int mode, int flags) {
    if (flags) { errno = EPERM; return -1; }
    return access(path, mode);
}
"""
ASK = """
import sys, SUBJECT as s3c
print(s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2]).status)
"""


def test_a_private_copy_is_found_where_a_container_refuses_the_call_for_effective_ids(
    publish: Publish, server: Server, cache: Path, preload: Any, run_python: Run
) -> None:
    """As seccomp filters do that were made before faccessat2 was."""
    publish(b"data")
    url, env = f"{server.url}/aind-open-data/data.json?token=1", preload(NO_EACCESS)
    told = [run_python(ASK, url, cache, env=env).stdout.strip() for _ in range(2)]
    assert told == ["downloaded", "revalidated"]


@pytest.mark.root
@pytest.mark.boto3
def test_offline_a_private_copy_of_another_user_does_not_hide_a_public_one(
    public: Path, publish: Publish, as_nobody: AsNobody, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AIND_S3_CACHE_DIR", str(public))
    for version, anonymous in ((1, True), (2, False)):
        uri = publish({"version": version})
        s3c.get_local_path_for_resource(uri, anonymous=anonymous)
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", "1")
    assert s3c.get_json(uri) == {"version": 2}
    assert as_nobody(lambda: s3c.get_json(uri)) == {"version": 1}


# ==== Without a home ==========================================================================


@pytest.fixture
def homeless(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing says where to cache, and the home cannot be written to."""
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv("TMPDIR", str(shared))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return shared


@pytest.mark.root
def test_a_manager_of_a_place_that_cannot_be_written_to_holds_nothing(
    public: Path, as_nobody: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(public))
    assert as_nobody(lambda: s3c.CacheManager().entries()) == []


def test_a_folder_of_our_name_that_anybody_writes_to_is_a_place_like_others(
    shared: Path, publish: Publish
) -> None:
    folder = shared / "aind-s3-cache"
    folder.mkdir()
    folder.chmod(0o777)
    path = s3c.get_local_path_for_resource(publish(b"data"), cache_dir=folder).path
    assert path.is_relative_to(folder / "aind-s3-cache")
    assert stat.S_IMODE((folder / "aind-s3-cache").stat().st_mode) == 0o700


def test_without_a_home_a_private_folder_in_the_temp_directory(
    homeless: Path, publish: Publish
) -> None:
    uri = publish(b"data")
    path = s3c.get_local_path_for_resource(uri).path
    (ours,) = homeless.iterdir()
    assert path.is_relative_to(ours)
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    assert s3c.get_local_path_for_resource(uri).status == "revalidated"
    assert s3c.CacheManager().dir == ours / "aind-s3-cache"


@pytest.mark.root
@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_folder_there_is_refused(
    plant: Callable[[Path], None], homeless: Path, publish: Publish, as_nobody: AsNobody
) -> None:
    folder = homeless / f"aind-s3-cache-{os.geteuid()}"
    as_nobody(lambda: plant(folder))
    before = state(homeless)
    with pytest.raises(s3c.CacheError):
        s3c.get_local_path_for_resource(publish(b"data"))
    assert state(homeless) == before


# ==== Secrets =================================================================================

SECRET = "hunter2"


def on_disk(path: Path) -> bytes:
    """All names and contents below a directory."""
    files = [p for p in path.rglob("*") if p.is_file()]
    return b"\n".join([os.fsencode(p) for p in path.rglob("*")] + [p.read_bytes() for p in files])


def secret_url(server: Server, key: str) -> str:
    """A presigned URL with a password in it, too."""
    return f"http://user:{SECRET}@127.0.0.1:{server.port}/b/{key}?X-Amz-Signature={SECRET}#{SECRET}"


@pytest.mark.parametrize("size", [10, 3 * MiB, 9 * MiB])
def test_no_secret_of_a_url_is_kept_or_told(
    size: int, server: Server, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.put("b", "k", b"x" * size)
    with caplog.at_level(logging.DEBUG):
        found = s3c.get_local_path_for_resource(secret_url(server, "k"), cache_dir=cache)
    told = f"{found!r} {caplog.text} {s3c.CacheManager(cache).entries()}"
    assert "downloaded" in caplog.text
    assert SECRET not in told
    assert SECRET.encode() not in on_disk(cache)


@pytest.mark.leftovers
def test_no_secret_is_in_what_a_failure_leaves(
    server: Server, cache: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_RETRIES", 1)
    server.put("b", "k", b"x" * 32 * MiB)
    server.before = lambda _: (500, b"", {}) if len(server.seen) > 4 else None
    with pytest.raises(s3c.TransferError) as caught:
        s3c.get_local_path_for_resource(secret_url(server, "k"), cache_dir=cache)
    error = caught.value
    told = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert SECRET not in told.replace(repr(SECRET), "")
    assert SECRET.encode() not in on_disk(cache)


def test_a_url_with_another_password_is_another_entry(server: Server, cache: Path) -> None:
    """Two users of one machine account: what one may see says nothing about the other."""
    server.put("b", "k", b"data")
    get = partial(s3c.get_local_path_for_resource, cache_dir=cache)
    get(secret_url(server, "k"))
    with pytest.raises(s3c.OfflineError):
        get(f"http://127.0.0.1:{server.port}/b/k", offline=True)


@pytest.mark.boto3
@pytest.mark.parametrize("size", [10, 9 * MiB])
def test_private_objects_are_not_for_anonymous_callers(
    size: int, server: Server, publish: Publish, cache: Path
) -> None:
    boto3 = pytest.importorskip("boto3")
    keys = {"aws_access_key_id": "AKIATEST", "aws_secret_access_key": SECRET}
    client = boto3.client("s3", endpoint_url=server.url, region_name="us-west-2", **keys)
    uri = publish(b"x" * size, private=True)
    get = partial(s3c.get_local_path_for_resource, uri, cache_dir=cache)
    assert get(s3_client=client).status == "downloaded"
    assert get(max_age=60).status == get(offline=True).status == "fresh"
    for options in ({"max_age": 60}, {"stale_if_error": True}):
        with pytest.raises(s3c.AccessDeniedError):
            get(anonymous=True, **options)
    with pytest.raises(s3c.OfflineError):
        get(anonymous=True, offline=True)
    assert SECRET.encode() not in on_disk(cache)


def test_the_command_line_keeps_secrets_too(server: Server, cache: Path, cli: Run) -> None:
    for key in ("there", "missing"):
        server.put("b", "there", b"data")
        done = cli("get", "--cache-dir", cache, secret_url(server, key))
        assert SECRET not in done.stdout + done.stderr
    assert SECRET.encode() not in on_disk(cache)
