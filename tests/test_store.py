"""Section 7: where entries lie, what counts as one, and what happens when the disk says no."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import NOBODY, AsNobody, Get, MiB, Publish, Run, blob, posix
from server import Server
from subject import name as subject_name
from subject import s3c

Mount = Callable[..., Path]


def below(path: Path) -> list[Path]:
    return sorted(path.rglob("*"))


def files(path: Path) -> list[Path]:
    """All regular files but locks, which stay."""
    return [p for p in below(path) if p.is_file() and p.parent.name != "locks"]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """`umask(mask)`, put back at the end."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


# ==== Layout and names ========================================================================


def test_all_of_ours_is_in_one_folder(publish: Publish, get: Get, cache: Path) -> None:
    path = get(publish({"a": 1})).path
    assert [p.name for p in cache.iterdir()] == ["aind-s3-cache"]
    assert path.is_relative_to(cache / "aind-s3-cache" / "objects")


def test_the_folder_is_tagged_as_a_cache(publish: Publish, get: Get, cache: Path) -> None:
    get(publish({"a": 1}))
    tag = (cache / "aind-s3-cache" / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_looking_into_a_cache_makes_nothing(cache: Path) -> None:
    cache.mkdir()
    manager = s3c.CacheManager(cache)
    assert (manager.entries(), manager.size(), manager.verify(), manager.prune()) == ([], 0, [], [])
    manager.clear()
    with pytest.raises(s3c.OfflineError):
        s3c.get_local_path_for_resource("s3://b/k", cache_dir=cache, offline=True)
    assert below(cache) == []


@pytest.mark.parametrize("name", ["a.nii.gz", "A.JSON", "x", "Makefile", "zarr.v3", "a-b_c.1"])
def test_a_path_ends_in_the_objects_own_name(name: str, publish: Publish, get: Get) -> None:
    assert get(publish(b"x", key=f"some/where/{name}")).path.name.endswith(f"_{name}")


HOSTILE = [
    *("../../etc/passwd", "..", "a/../b", "/etc/passwd", "//host/share", "C:\\x", "a\\..\\..\\b"),
    *("CON", "nul.txt", "name.", "name ", ".hidden", "-rf", "a:b", "a\nb", "a|b?c*", "tab\there"),
    *("aux.json", "\u202egpj.exe", "caf\u00e9", "cafe\u0301", "A", "a", "a/", "%2e%2e", "~root"),
]


def test_hostile_keys_become_plain_names_of_their_own(publish: Publish, get: Get) -> None:
    keys = [key for key in HOSTILE if not key.endswith("/")]
    paths = [get(publish(key.encode(), key=key)).path for key in keys]
    assert [path.read_bytes() for path in paths] == [key.encode() for key in keys]
    assert len({str(path).lower() for path in paths}) == len(keys)
    assert all(path.resolve() == path and path.parent.parent.name == "objects" for path in paths)
    assert all(path.name.isascii() and path.name.isprintable() for path in paths)
    assert not [
        path.name for path in paths if path.name[-1] in ". " or set('\\:*?"|<>') & {*path.name}
    ]


@pytest.mark.parametrize("letter", ["a", "\u00e9"])
def test_a_key_of_1024_bytes_keeps_its_ending(letter: str, publish: Publish, get: Get) -> None:
    key = letter * (1016 // len(letter.encode())) + ".json.gz"
    path = get(publish(b"x", key=key)).path
    assert path.name.endswith(".json.gz")
    assert len(os.fsencode(path.name)) < 256


def test_versions_side_by_side_never_change_a_path(publish: Publish, get: Get) -> None:
    first = get(publish(b"one"))
    second = get(publish(b"two"))
    assert first.path != second.path
    assert (first.path.read_bytes(), second.path.read_bytes()) == (b"one", b"two")


@posix
@pytest.mark.parametrize(("mask", "folder", "file"), [(0o022, 0o755, 0o444), (0o077, 0o700, 0o400)])
@pytest.mark.parametrize("size", [10, 3 * MiB, 9 * MiB])
def test_modes_follow_the_umask(
    mask: int, folder: int, file: int, size: int, umask: Any, publish: Publish, get: Get
) -> None:
    umask(mask)
    path = get(publish(blob(size))).path
    assert mode(path) == file
    assert {mode(parent) for parent in list(path.parents)[:3]} == {folder}


@posix
@pytest.mark.parametrize("folder", [".cache", ".cache/aind-s3-cache"])
def test_a_umask_of_zero_makes_no_second_cache(
    folder: str, umask: Any, publish: Publish, home: Path
) -> None:
    (home / ".cache").mkdir()
    umask(0)
    get = partial(s3c.get_local_path_for_resource, publish(b"x"))
    path = get(cache_dir=home / folder).path
    assert get().path == get(cache_dir=s3c.CacheManager().dir).path == path


@posix
@pytest.mark.boto3
@pytest.mark.parametrize("size", [10, 3 * MiB, 9 * MiB])
def test_what_came_with_credentials_is_its_owners_alone(
    size: int, server: Server, publish: Publish, get: Get
) -> None:
    boto3 = pytest.importorskip("boto3")
    keys = {"aws_access_key_id": "AKIATEST", "aws_secret_access_key": "secret"}
    client = boto3.client("s3", endpoint_url=server.url, region_name="us-west-2", **keys)
    found = get(publish(blob(size), private=True), s3_client=client)
    assert mode(found.path) == 0o600
    assert found.path.read_bytes() == blob(size)


@posix
@pytest.mark.root
def test_a_group_can_share_a_cache(
    umask: Any, public: Path, publish: Publish, as_nobody: AsNobody
) -> None:
    shared = public / "lab"
    shared.mkdir()
    os.chown(shared, 0, NOBODY)
    shared.chmod(0o2775)
    umask(0o002)
    old, new = publish(b"old", key="old"), publish(b"new", key="new")
    get = partial(s3c.get_local_path_for_resource, cache_dir=shared)
    get(old)
    assert as_nobody(lambda: get(old)).status == "revalidated"
    assert as_nobody(lambda: get(new)).status == "downloaded"
    assert get(new).status == "revalidated"


@posix
@pytest.mark.root
@pytest.mark.parametrize(("key", "size"), [("tree/k", 10), ("tree/k", 9 * MiB), ("tree/", 10)])
def test_each_user_of_a_shared_cache_has_private_entries_of_their_own(
    key: str, size: int, umask: Any, public: Path, server: Server, as_nobody: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:password@127.0.0.1:{server.port}")
    os.chown(public, 0, NOBODY)
    public.chmod(0o2775)
    umask(0o002)
    server.put("b", "tree/k", blob(size))
    get = partial(s3c.get_local_path_for_resource, f"s3://b/{key}", cache_dir=public)
    ours, theirs, again = get(), as_nobody(get), as_nobody(get)
    assert (theirs.status, again.status, again.path) == ("downloaded", "revalidated", theirs.path)
    assert (ours.path.stat().st_uid, theirs.path.stat().st_uid) == (0, NOBODY)
    assert not [entry for entry in s3c.CacheManager(public).entries() if entry.superseded]


@posix
@pytest.mark.root
def test_a_colleagues_validation_counts_for_max_age(
    umask: Any, public: Path, publish: Publish, as_nobody: AsNobody
) -> None:
    public.chmod(0o2775)
    os.chown(public, 0, NOBODY)
    umask(0o002)
    uri = publish(b"x")
    get = partial(s3c.get_local_path_for_resource, uri, cache_dir=public)
    os.utime(get().path, (1, 1))
    assert as_nobody(lambda: get(max_age=60)).status == "revalidated"
    assert get(max_age=60).status == "fresh"


# ==== What counts as an entry =================================================================


def _to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").touch()


def _to_link(path: Path, target: str) -> None:
    kept = path.with_name("kept")
    path.rename(kept)
    path.symlink_to(target)


def _rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def _to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: _rewrite(path, b"da"),
    "emptied": lambda path: _rewrite(path, b""),
    "grown": lambda path: _rewrite(path, b"data and more"),
    "deleted": Path.unlink,
    "a directory": _to_directory,
    "a FIFO": _to_fifo,
    "a symlink": lambda path: _to_link(path, "kept"),
    "a dangling symlink": lambda path: _to_link(path, "nowhere"),
    "without its shard": lambda path: shutil.rmtree(path.parent),
}


@posix
@pytest.mark.leftovers  # a directory is moved aside, for `prune` to sweep
@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("damage", "size"),
    [
        *((damage, 4) for damage in DAMAGE),
        *itertools.product(("a directory", "without its shard"), (3 * MiB, 9 * MiB)),
    ],
)
def test_a_damaged_entry_is_a_miss(damage: str, size: int, publish: Publish, get: Get) -> None:
    uri = publish(blob(size))
    DAMAGE[damage](get(uri).path)
    with pytest.raises(s3c.OfflineError):
        get(uri, offline=True)
    assert (again := get(uri)).status == "downloaded"
    assert not again.path.is_symlink()
    assert again.path.read_bytes() == blob(size)
    assert get(uri).status == "revalidated"


@posix
def test_what_a_symlink_points_at_is_never_written(publish: Publish, get: Get, home: Path) -> None:
    victim = home / "victim"
    victim.write_bytes(b"mine")
    uri = publish(b"data")
    path = get(uri).path
    path.unlink()
    path.symlink_to(victim)
    get(uri)
    assert (victim.read_bytes(), victim.is_symlink()) == (b"mine", False)


def test_strange_names_in_a_shard_are_left_alone(publish: Publish, get: Get) -> None:
    uri = publish(b"data")
    path = get(uri).path
    endings = ["o_zz_x_y", *(f"o{tag}_1_00000000_y" for tag in ("", "xzz", "mz", "x0d0a"))]
    strange = [
        path.name[:20],
        path.name[:21],
        path.name[:-12],
        "README",
        *(path.name[:21] + rest for rest in endings),
    ]
    for name in strange:
        path.with_name(name).write_bytes(b"?")
    path.unlink()
    assert get(uri).path.read_bytes() == b"data"
    assert all(path.with_name(name).read_bytes() == b"?" for name in strange)


# ==== The disk says no ========================================================================

SIZES = [200 * 1024, 3 * MiB, 12 * MiB]  # written at once, in order, in parallel


def fails(get: Callable[[], Any], number: int, place: Path) -> Any:
    """The local error that a call raises: soon, and naming the place."""
    began = time.monotonic()
    with pytest.raises(s3c.CacheError) as caught:
        get()
    assert time.monotonic() - began < 4
    assert caught.value.errno == number
    assert str(place) in str(caught.value)
    return caught.value


@pytest.mark.root
@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk(size: int, server: Server, publish: Publish, mount: Mount) -> None:
    disk, uri = mount("size=128k"), publish(blob(size))
    get = partial(s3c.get_local_path_for_resource, uri, cache_dir=disk)
    error = fails(get, errno.ENOSPC, disk)
    assert f"Needed: {size / 1000:.1f} kB" in str(error) or f"Needed: {size / 1e6:.1f} MB" in str(
        error
    )
    assert "free: " in str(error)
    assert len(server.seen) == 1
    assert [path.name for path in files(disk)] in ([], ["CACHEDIR.TAG"])


def test_a_size_that_no_disk_has_is_refused_before_memory_is_taken_for_it(
    server: Server, cache: Path
) -> None:
    head = {"Content-Range": f"bytes 0-8388607/{10**19 - 1}"}
    server.always(206, bytes(8 * MiB), etag='"e"', headers=head)
    get = partial(s3c.get_local_path_for_resource, f"{server.url}/b/k", cache_dir=cache)
    assert "Needed: 10000000.0 TB" in str(fails(get, errno.ENOSPC, cache))


@pytest.mark.root
def test_a_disk_that_fills_under_a_download(server: Server, publish: Publish, mount: Mount) -> None:
    disk, uri = mount("size=20m"), publish(blob(16 * MiB))

    def fill(request: Any) -> None:
        if request.number == 3:
            (disk / "filler").write_bytes(bytes(12 * MiB))

    server.before = fill
    get = partial(s3c.get_local_path_for_resource, uri, cache_dir=disk)
    error = fails(get, errno.ENOSPC, disk)
    assert "Needed: 16.8 MB, free: " in str(error)
    assert [path.name for path in files(disk)] == ["CACHEDIR.TAG", "filler"]


@pytest.mark.root
@pytest.mark.parametrize("inodes", [2, 3, 4, 5])
@pytest.mark.parametrize("size", SIZES)
def test_a_disk_without_inodes(
    inodes: int, size: int, server: Server, publish: Publish, mount: Mount
) -> None:
    disk, uri = mount(f"size=64m,nr_inodes={inodes}"), publish(blob(size))
    get = partial(s3c.get_local_path_for_resource, uri, cache_dir=disk)
    error = fails(get, errno.ENOSPC, disk)
    assert "free: 6" in str(error)
    assert len(server.seen) == 1
    assert {path.name for path in files(disk)} <= {"CACHEDIR.TAG"}


QUOTA = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>
static int over(int fd, size_t n, off_t at) {
    struct stat s;
    return !fstat(fd, &s) && S_ISREG(s.st_mode) && (at > 100000 || n > 100000);
}
ssize_t write(int fd, const void *p, size_t n) {
    if (over(fd, n, 0)) { errno = EDQUOT; return -1; }
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    return real(fd, p, n);
}
ssize_t pwrite64(int fd, const void *p, size_t n, off_t at) {
    if (over(fd, n, at)) { errno = EDQUOT; return -1; }
    ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite64");
    return real(fd, p, n, at);
}
ssize_t pwrite(int fd, const void *p, size_t n, off_t at) { return pwrite64(fd, p, n, at); }
"""

REPORT = """
import SUBJECT as s3c, resource, sys, time
s3c.get_local_path_for_resource(sys.argv[2], cache_dir=sys.argv[1])
LIMIT
began = time.monotonic()
try:
    s3c.get_local_path_for_resource(sys.argv[3], cache_dir=sys.argv[1])
except s3c.CacheError as error:
    print(error.errno, time.monotonic() - began < 4, error, sep="|")
"""


@pytest.fixture
def report(run_python: Run, publish: Publish, cache: Path) -> Callable[..., tuple[int, str]]:
    """`report(limit_code, size, env=)`: errno and message of a second download in a new process."""

    def report(limit: str, size: int, **options: Any) -> tuple[int, str]:
        first, second = publish(b"x", key="first"), publish(blob(size), key="second")
        code = REPORT.replace("LIMIT", limit)
        number, soon, message = run_python(code, cache, first, second, **options).stdout.split("|")
        assert soon == "True"
        return int(number), message

    return report


@pytest.mark.parametrize("size", SIZES)
def test_an_exceeded_quota(
    size: int, report: Any, preload: Any, cache: Path, server: Server
) -> None:
    number, message = report("", size, env=preload(QUOTA))
    assert number == errno.EDQUOT
    assert "Needed: " in message and "free: " in message and str(cache) in message  # noqa: PT018
    assert len(files(cache)) == 2
    assert len([request for request in server.seen if request.path.endswith("second")]) < 8


@posix
@pytest.mark.parametrize("size", SIZES)
def test_a_limit_on_the_size_of_files(size: int, report: Any, cache: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (99_999, resource.RLIM_INFINITY))"
    number, message = report(limit, size)
    assert number == errno.EFBIG
    assert "Needed: " in message and "free: " in message and str(cache) in message  # noqa: PT018
    assert len(files(cache)) == 2


FULL_AT_FIRST = """
import SUBJECT as s3c, os, resource, sys
cache, *uris = sys.argv[1:]
get = lambda uri, name="": s3c.get_local_path_for_resource(uri, cache_dir=cache + name)
get(uris[0], "first")
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
before = os.dup(0)
os.close(before)
for _ in range(3):
    try: get(uris[0])
    except s3c.CacheError as error: print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print(os.dup(0) == before, *{get(uri).status for uri in uris})
"""


@posix
def test_a_disk_that_is_full_when_the_cache_is_made(
    publish: Any, run_python: Any, cache: Path
) -> None:
    uris = [publish(b"x", key=str(n)) for n in range(4)]
    said = run_python(FULL_AT_FIRST, cache, *uris).stdout.split()
    assert said == [str(errno.EFBIG)] * 3 + ["True", "downloaded"]
    assert (cache / "aind-s3-cache" / "CACHEDIR.TAG").read_text().startswith("Signature: ")


DESCRIPTORS = """
import SUBJECT as s3c, os, resource, sys, time
cache, first, *uris = sys.argv[1:]
for uri in (first, first + "x"):  # everything is imported by now, and the connection is kept
    try: s3c.get_local_path_for_resource(uri, cache_dir=cache)
    except s3c.NotFoundError: pass
used = os.dup(0)  # the lowest that is free
os.close(used)
for more, uri in enumerate(uris):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, 4096))
    began = time.monotonic()
    try: print(s3c.get_local_path_for_resource(uri, cache_dir=cache).status)
    except s3c.CacheError as error: print(error.errno, time.monotonic() - began < 4)
"""


@posix
@pytest.mark.parametrize("size", SIZES)
def test_too_few_file_descriptors(
    size: int, publish: Publish, run_python: Run, cache: Path
) -> None:
    uris = [publish(blob(size, n), key=f"key{n}") for n in range(9)]
    done = run_python(DESCRIPTORS, cache, publish(blob(9 * MiB), key="first"), *uris)
    told = done.stdout.split("\n")[:-1]
    wanted = f"{errno.EMFILE} True"
    assert set(told) == {wanted, "downloaded"}, done.stdout  # how many suffice: as threads meet
    assert (told[0], told[-1]) == (wanted, "downloaded")
    assert not [path for path in files(cache) if path.name[0] == "." or path.suffix == ".log"]


NO_LISTING = """
import SUBJECT as s3c, os, resource, sys
get = lambda: s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2], offline=True)
os.utime(get().path.parent)  # as if another process had added something: it is listed again
used = os.dup(0)
for limit in (used, used + 9):
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, 4096))
    try: print(get().status)
    except s3c.CacheError as error: print(error.errno)
"""


@posix
def test_what_could_not_be_listed_for_once_is_not_taken_for_empty(
    publish: Publish, get: Get, run_python: Run, cache: Path
) -> None:
    uri = publish(b"data")
    get(uri)
    assert run_python(NO_LISTING, uri, cache).stdout.split() == [str(errno.EMFILE), "fresh"]


@posix
@pytest.mark.root
@pytest.mark.parametrize("size", SIZES)
def test_a_directory_of_another_user(
    size: int, server: Server, publish: Publish, public: Path, as_nobody: AsNobody
) -> None:
    warm, uri = publish(blob(size), key="warm"), publish(blob(size))
    s3c.get_local_path_for_resource(warm, cache_dir=public)
    get = partial(s3c.get_local_path_for_resource, uri, cache_dir=public)
    before, server.seen = below(public), []
    error = as_nobody(lambda: fails(get, errno.EACCES, public))
    assert f"uid {NOBODY}" in str(error)
    assert len(server.seen) == 1
    assert below(public) == before


@posix
@pytest.mark.root
def test_a_cache_that_must_not_even_be_looked_into(
    publish: Publish, public: Path, as_nobody: AsNobody
) -> None:
    uri = publish(b"data")
    s3c.get_local_path_for_resource(uri, cache_dir=public)
    get = partial(s3c.get_local_path_for_resource, uri, cache_dir=public)
    public.chmod(0o700)
    as_nobody(lambda: fails(get, errno.EACCES, public))


@posix
@pytest.mark.root
def test_a_dry_run_in_a_directory_of_another_user(
    publish: Publish, public: Path, as_nobody: AsNobody
) -> None:
    path = s3c.get_local_path_for_resource(publish(b"data"), cache_dir=public).path
    os.utime(path, (1, 1))
    manager = s3c.CacheManager(public)
    assert [e.path for e in as_nobody(lambda: manager.prune(1, dry_run=True))] == [str(path)]


PLACES = ["", "aind-s3-cache", "aind-s3-cache/objects", "aind-s3-cache/partial"]


@pytest.mark.parametrize("place", PLACES)
def test_a_file_where_a_directory_should_be(place: str, publish: Publish, cache: Path) -> None:
    spot = cache / place
    spot.parent.mkdir(parents=True, exist_ok=True)
    spot.write_bytes(b"mine")
    uri = publish(blob(9 * MiB))
    with pytest.raises(s3c.CacheError) as caught:
        s3c.get_local_path_for_resource(uri, cache_dir=cache)
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
    assert str(cache) in str(caught.value)
    assert "file" in str(caught.value)
    assert spot.read_bytes() == b"mine"


def test_a_manager_of_a_file_is_refused(cache: Path) -> None:
    cache.write_bytes(b"mine")
    with pytest.raises(s3c.CacheError) as caught:
        s3c.CacheManager(cache)
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


@pytest.mark.usefixtures("gone")
def test_a_relative_cache_in_a_directory_that_is_gone_is_no_missing_object() -> None:
    for call in (s3c.CacheManager, partial(s3c.get_local_path_for_resource, "s3://b/k")):
        with pytest.raises(s3c.CacheError, match="the cache at mine: No such file") as caught:
            call(cache_dir="mine")
        assert caught.value.errno == errno.ENOENT
        assert not isinstance(caught.value, FileNotFoundError)


# ==== A hit writes nothing when it cannot =====================================================


def state(path: Path) -> list[tuple[str, int, int]]:
    return [(str(p), p.lstat().st_mtime_ns, p.lstat().st_size) for p in [path, *below(path)]]


@pytest.mark.root
@pytest.mark.parametrize("size", SIZES)
def test_a_hit_in_a_read_only_file_system(size: int, publish: Publish, mount: Mount) -> None:
    disk, uri = mount("size=64m"), publish(blob(size))
    get = partial(s3c.get_local_path_for_resource, uri, cache_dir=disk)
    get()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    before = state(disk)
    found = [get(), get(max_age=1e6), get(offline=True)]
    assert [one.status for one in found] == ["revalidated", "fresh", "fresh"]
    assert {one.path.read_bytes() for one in found} == {blob(size)}
    assert state(disk) == before


@pytest.mark.root
def test_a_miss_in_a_read_only_file_system(server: Server, publish: Publish, mount: Mount) -> None:
    disk = mount("size=64m,ro")
    for size in SIZES:
        uri = publish(blob(size))
        get = partial(s3c.get_local_path_for_resource, uri, cache_dir=disk)
        fails(get, errno.EROFS, disk)
    assert len(server.seen) == len(SIZES)


@pytest.mark.root
def test_old_entries_of_another_user_are_hits(
    get_public: Get, public: Path, as_nobody: AsNobody
) -> None:
    os.utime(get_public().path, (1, 1))
    before = state(public)
    assert as_nobody(lambda: get_public().status) == "revalidated"
    assert as_nobody(lambda: get_public(max_age=1e12).status) == "fresh"
    assert state(public) == before


# ==== What a hit costs ========================================================================

HITS = """
import SUBJECT as s3c, os, sys
cache, uri, max_age = sys.argv[1:]
options = dict(cache_dir=cache, max_age=float(max_age))
for _ in range(2): s3c.get_local_path_for_resource(uri, **options)
os.access("/begin", os.F_OK)
for _ in range(20): s3c.get_local_path_for_resource(uri, **options)
os.access("/end", os.F_OK)
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize(("max_age", "most"), [(0, 14), (1000, 10)])
def test_a_hit_costs_few_system_calls(
    max_age: int, most: int, publish: Publish, cache: Path, prelude: str, tmp_path: Path
) -> None:
    """Root, shard, entry, stamp; and to the server and back."""
    code = prelude + HITS.replace("SUBJECT", subject_name)
    trace = tmp_path / "trace"
    command: list[Any] = ["strace", "-f", "-o", trace, sys.executable, "-c", code]
    command += [cache, publish(b"x"), max_age]
    subprocess.run([str(part) for part in command], check=True, timeout=30)
    hits = trace.read_text().partition('"/begin"')[2].partition('"/end"')[0].splitlines()[1:-1]
    calls = [line.split()[1].partition("(")[0] for line in hits]
    assert len(calls) / 20 <= most, "\n".join(hits[-2 * most :])
