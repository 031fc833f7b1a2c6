"""Directory trees: listings, snapshots of hard links, keys that are no paths, ages, zarr."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import BUCKET, Get, Publish, Run, posix
from server import Server
from subject import s3c

TREE = f"s3://{BUCKET}/data.zarr/"
FILES = {
    ".zattrs": b"{}",
    ".zarray": b'{"shape": [2]}',
    "0/0": b"chunk 0 0",
    "0/1": b"chunk 0 1",
    "deep/er/still/x.bin": b"\0" * 1000,
    "empty": b"",
}


@pytest.fixture
def get(cache: Path) -> Get:
    """`get(uri, **options)` from the test's cache directory."""

    def get(uri: str = TREE, **options: Any) -> Any:
        return s3c.get_local_path_for_resource(uri, **{"cache_dir": cache, **options})

    return get


@pytest.fixture
def put_tree(server: Server) -> Callable[..., None]:
    """`put_tree(files, prefix=..., **put_options)`."""

    def put_tree(
        files: dict[str, bytes] = FILES, prefix: str = "data.zarr/", **options: Any
    ) -> None:
        for name, content in files.items():
            server.put(BUCKET, prefix + name, content, **options)

    return put_tree


def contents(root: Path) -> dict[str, bytes]:
    found = (path for path in root.rglob("*") if not path.is_dir())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def listings(server: Server) -> int:
    return sum("list-type" in request.query for request in server.seen)


def age(path: Path, seconds: float) -> None:
    """Move the times of a directory, of its stamp and of all below it into the past."""
    stamps = path.parent.glob(f".v{path.name}")
    for found in (path, *stamps, *path.rglob("*")):
        at = found.stat().st_mtime - seconds
        os.utime(found, (at, at))


# ==== A tree as a directory ===================================================================


@pytest.mark.parametrize("uri", [TREE, TREE[:-1]], ids=["slash", "no slash"])
def test_a_prefix_becomes_a_directory(put_tree: Get, get: Get, uri: str) -> None:
    put_tree()
    result = get(uri)
    assert contents(result.path) == FILES
    assert result.path.is_absolute()
    assert result.path.name.endswith("data.zarr")
    assert (result.status, result.from_cache, result.source) == ("downloaded", False, "s3")
    assert (result.uri, result.size) == (uri, sum(map(len, FILES.values())))


def test_a_tree_costs_its_listing_and_a_request_per_file(
    server: Server, put_tree: Get, get: Get
) -> None:
    put_tree()
    get()
    asked = [request.path for request in server.seen if not request.path.endswith("empty")]
    assert listings(server) == 1
    assert sorted(asked) == sorted(set(asked))
    assert len(asked) == len(FILES)  # with the listing; an empty file has no first byte to ask for


def test_an_object_goes_before_a_tree_of_its_name(
    publish: Publish, put_tree: Get, get: Get
) -> None:
    put_tree()
    uri = publish(b"an object", "data.zarr")
    assert get(uri).path.read_bytes() == b"an object"
    assert contents(get(uri + "/").path) == FILES


def test_a_neighbour_with_the_same_beginning_is_no_part(
    publish: Publish, put_tree: Get, get: Get
) -> None:
    put_tree()
    publish(b"x", "data.zarr.bak/file")
    publish(b"x", "data.zarr-2")
    assert contents(get(TREE[:-1]).path) == FILES


def test_a_part_of_a_tree_is_a_tree(put_tree: Get, get: Get) -> None:
    put_tree()
    assert contents(get(TREE + "deep/er/").path) == {"still/x.bin": bytes(1000)}


@pytest.mark.parametrize("uri", [TREE, TREE[:-1], f"s3://{BUCKET}/none/"])
def test_an_empty_prefix_is_not_found(
    publish: Publish, get: Get, uri: str, cache: Path, server: Server
) -> None:
    publish(b"x", "other")
    with pytest.raises(s3c.NotFoundError, match="S3 object not found or inaccessible") as caught:
        get(uri)
    assert caught.value.uri == uri
    assert not cache.exists()


@pytest.mark.parametrize("uri", ["s3://no-such-bucket/x/", "s3://no-such-bucket/x"])
def test_a_missing_bucket_is_not_found(server: Server, get: Get, uri: str) -> None:
    with pytest.raises(s3c.NotFoundError) as caught:
        get(uri)
    assert caught.value.code == "NoSuchBucket"


def test_directory_markers_are_no_files(publish: Publish, put_tree: Get, get: Get) -> None:
    put_tree()
    for marker in ("data.zarr/", "data.zarr/0/", "data.zarr/lonely/"):
        publish(b"", marker)
    assert contents(get().path) == FILES


def test_a_prefix_of_markers_alone_is_not_found(publish: Publish, get: Get) -> None:
    publish(b"", "data.zarr/")
    with pytest.raises(s3c.NotFoundError):
        get()


def test_a_tree_arrives_in_pages(server: Server, put_tree: Get, get: Get) -> None:
    server.page_size = 7
    files = {f"{number:03}": b"%d" % number for number in range(50)}
    put_tree(files)
    assert contents(get().path) == files
    assert listings(server) == 8


def test_a_listing_that_repeats_itself_ends(
    server: Server, put_tree: Get, get: Get, quick: None
) -> None:
    page = (
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>true'
        "</IsTruncated><NextContinuationToken>same</NextContinuationToken><Contents><Key>data.zarr/"
        'x</Key><Size>1</Size><ETag>"e"</ETag></Contents></ListBucketResult>'
    )
    server.always(200, page.encode())
    with pytest.raises(s3c.TransferError, match="repeats"):
        get()
    assert len(server.seen) < 5


def test_a_listing_of_empty_pages_ends(
    server: Server, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3c, "_EMPTY_PAGES", 7)
    page = "<ListBucketResult><IsTruncated>true</IsTruncated>{}</ListBucketResult>"
    token = "<NextContinuationToken>{}</NextContinuationToken>"
    for number in range(20):
        server.say(200, page.format(token.format(number)).encode())
    with pytest.raises(s3c.TransferError, match="does not end"):
        get()
    assert len(server.seen) == 8


NASTY_NAMES = [
    "plain",
    "space and+plus",
    "100%",
    "%41",
    "hash#",
    "question?x=1&y",
    "semi;colon,=@!$'()*[]~",
    "back\\slash",
    'quote"<tag>&amp;',
    "new\nline",
    "bell\x07",
    "unit\x1f",
    "ünïcödé",
    "cafe\u0301",
    "日本語/😀",
    "-rf",
    " leading",
    "trailing ",
    "dots...",
    "...",
    "..x",
    ".hidden/.x0",
    "con",
    "x" * 255,
]


@pytest.mark.skipif(os.name == "nt", reason="some of these are no names there")
def test_names_are_kept_exactly(server: Server, put_tree: Get, get: Get) -> None:
    server.page_size = 5  # continuation tokens with them
    files = {name: name.encode() for name in NASTY_NAMES}
    put_tree(files, "a +%#/")
    assert contents(get(f"s3://{BUCKET}/a +%#/").path) == files
    assert {r.query["prefix"] for r in server.seen if "prefix" in r.query} == {"a +%#/"}
    assert {r.query.get("encoding-type") for r in server.seen if "prefix" in r.query} == {"url"}


# ==== A second call ===========================================================================


@pytest.mark.parametrize("uri", [TREE, TREE[:-1]], ids=["slash", "no slash"])
def test_an_unchanged_tree_costs_its_listing(
    server: Server, put_tree: Get, get: Get, uri: str
) -> None:
    put_tree()
    first = get(uri)
    server.reset()
    second = get(uri)
    assert (second.path, second.status, second.from_cache) == (first.path, "revalidated", True)
    assert listings(server) == 1
    assert len(server.seen) == (1 if uri == TREE else 2)  # the object that is not there


def test_only_a_changed_file_is_fetched_and_the_old_snapshot_stays(
    server: Server, publish: Publish, put_tree: Get, get: Get
) -> None:
    put_tree()
    old = get()
    publish(b"new chunk", "data.zarr/0/1")
    server.reset()
    new = get()
    assert (new.status, len(server.seen), new.path != old.path) == ("downloaded", 2, True)
    assert contents(new.path) == {**FILES, "0/1": b"new chunk"}
    assert contents(old.path) == FILES


def test_a_removed_file_is_gone_from_the_new_snapshot_only(
    server: Server, put_tree: Get, get: Get
) -> None:
    put_tree()
    old = get()
    server.delete(BUCKET, "data.zarr/0/0")
    server.reset()
    new = get()
    assert (new.status, new.from_cache, len(server.seen)) == ("revalidated", True, 1)
    assert contents(new.path) == {k: v for k, v in FILES.items() if k != "0/0"}
    assert contents(old.path) == FILES


def test_an_added_file_is_the_only_one_fetched(
    server: Server, publish: Publish, put_tree: Get, get: Get
) -> None:
    put_tree()
    get()
    publish(b"more", "data.zarr/1/0")
    server.reset()
    assert contents(get().path) == {**FILES, "1/0": b"more"}
    assert len(server.seen) == 2


def test_a_tree_that_changes_back_is_held_already(
    server: Server, publish: Publish, put_tree: Get, get: Get
) -> None:
    put_tree()
    first = get()
    publish(b"new chunk", "data.zarr/0/1")
    age(get().path, 10)
    put_tree({"0/1": FILES["0/1"]})
    again = get()
    assert (again.path, again.status) == (first.path, "revalidated")
    server.close()
    assert get(offline=True).path == first.path


def test_files_already_cached_are_not_fetched_again(
    server: Server, put_tree: Get, get: Get
) -> None:
    put_tree()
    get(TREE + "0/0")
    server.reset()
    get()
    assert not [request for request in server.seen if request.path.endswith("0/0")]
    server.reset()
    assert get(TREE + ".zarray", max_age=60).status == "fresh"


def test_an_object_that_changes_after_the_listing_is_listed_again(
    server: Server, publish: Publish, put_tree: Get, get: Get
) -> None:
    put_tree()

    def change(request: Any) -> None:
        if request.path.endswith("0/1") and listings(server) == 1:
            publish(b"changed meanwhile", "data.zarr/0/1")

    server.before = change
    assert contents(get().path) == {**FILES, "0/1": b"changed meanwhile"}
    assert listings(server) == 2


def test_a_tree_that_never_stays_the_same_is_an_error(
    server: Server, put_tree: Get, get: Get, cache: Path
) -> None:
    put_tree()
    count = iter(range(1000))

    def change(_: object) -> None:
        server.put(BUCKET, "data.zarr/0/1", b"%d" % next(count))

    server.before = change
    with pytest.raises(s3c.IntegrityError, match="chang"):
        get()
    assert listings(server) < 6
    assert [e.kind for e in s3c.CacheManager(cache).entries() if e.kind == "tree"] == []


def test_a_damaged_snapshot_is_mended(server: Server, put_tree: Get, get: Get) -> None:
    put_tree()
    root = get().path
    (root / "0/0").unlink()
    server.reset()
    again = get()
    assert contents(again.path) == FILES
    assert len(server.seen) == 1, "the file itself was still in the cache"


def test_a_file_that_fails_fails_the_tree_and_leaves_no_snapshot(
    server: Server, put_tree: Get, get: Get, cache: Path
) -> None:
    put_tree()
    server.on_path("/0/1", 404, code="NoSuchKey")
    with pytest.raises(s3c.NotFoundError, match="0/1"):
        get()
    trees = cache / "aind-s3-cache" / "trees"
    assert not trees.exists() or os.listdir(trees) == []
    server.on_path("/0/1", None)
    assert contents(get().path) == FILES


def test_threads_that_ask_for_one_tree_share_its_files(
    server: Server, put_tree: Get, get: Get
) -> None:
    files = {str(n): b"%d" % n for n in range(30)}
    put_tree(files)
    server.latency = 0.002
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(get())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {r.path for r in results} == {results[0].path}
    assert contents(results[0].path) == files
    asked = Counter(request.path for request in server.seen if "list-type" not in request.query)
    assert (len(asked), set(asked.values())) == (30, {1})


def test_a_tree_that_is_stopped_half_way_is_not_published(
    server: Server, put_tree: Get, get: Get, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another error of the batch, on a file system on which links take their time."""
    put_tree({str(n): b"x" for n in range(200)})
    shutil.rmtree(get().path)  # the entries stay
    server.put(BUCKET, "refused", b"", private=True)
    link = os.link

    def slow_link(*args: Any) -> None:
        threading.Event().wait(0.02)
        link(*args)

    monkeypatch.setattr(os, "link", slow_link)
    with pytest.raises(s3c.AccessDeniedError):
        s3c.get_local_paths_for_resources(
            [TREE, f"s3://{BUCKET}/refused"], cache_dir=cache, anonymous=True
        )
    assert list((cache / "aind-s3-cache" / "trees").glob("[!.]*")) == []


def test_an_entry_that_is_pruned_before_it_is_linked_is_fetched_again(
    put_tree: Get, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {str(n): b"%d" % n for n in range(9)}
    put_tree(files)
    shutil.rmtree(get().path)  # the entries stay
    link, seen = os.link, set()

    def late_link(source: str, target: str) -> None:
        if source not in seen:
            seen.add(source)
            os.unlink(source)
        link(source, target)

    monkeypatch.setattr(os, "link", late_link)
    assert contents(get().path) == files
    assert len(seen) == 9


def test_threads_that_ask_for_a_tree_and_a_part_of_it_at_once(
    server: Server, put_tree: Get, get: Get
) -> None:
    put_tree({f"part/{n}": b"%d" % n for n in range(40)})
    server.latency = 0.002
    found: dict[str, Any] = {}

    def ask(below: str) -> None:
        found[below] = get(TREE + below)

    threads = [threading.Thread(target=ask, args=(below,)) for below in ("", "part/")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(found[""].path / "part") == contents(found["part/"].path)


# ==== On disk =================================================================================


def inodes(root: Path) -> dict[str, int]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.stat().st_ino for path in found}


@posix
def test_snapshots_are_hard_links_to_ordinary_entries(
    put_tree: Get, get: Get, publish: Publish, cache: Path
) -> None:
    put_tree()
    old = get()
    assert inodes(old.path)["0/0"] == get(TREE + "0/0").path.stat().st_ino
    publish(b"new chunk", "data.zarr/0/1")
    new = get()
    assert len(inodes(old.path).items() - inodes(new.path).items()) == 1
    assert s3c.CacheManager(cache).size() == sum(map(len, FILES.values())) + len(b"new chunk")


@posix
def test_the_files_of_a_snapshot_are_read_only(put_tree: Get, get: Get) -> None:
    put_tree()
    modes = [p.stat().st_mode for p in get().path.rglob("*") if p.is_file()]
    assert not any(mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH) for mode in modes)


LINKLESS = """
#define _GNU_SOURCE
#include <errno.h>
int link(const char *a, const char *b) { errno = EPERM; return -1; }
int linkat(int c, const char *a, int d, const char *b, int e) { errno = EPERM; return -1; }
"""


@pytest.fixture(scope="module")
def linkless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that, preloaded, makes every file system one without hard links."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, and Linux")
    library = tmp_path_factory.mktemp("linkless") / "linkless.so"
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=LINKLESS.encode(), check=True)
    return str(library)


COPIES = """
import os, sys, SUBJECT as s3c
try:
    os.link(__import__("sys").executable, sys.argv[1] + ".link")
except PermissionError:
    print("no links here", file=sys.stderr)
print(s3c.get_local_path_for_resource(sys.argv[2], cache_dir=sys.argv[1]).path)
"""


def test_where_links_fail_copies_are_made(
    put_tree: Get, get: Get, cache: Path, linkless: str, run_python: Run
) -> None:
    put_tree()
    done = run_python(COPIES, cache, TREE, env={"LD_PRELOAD": linkless})
    assert "no links here" in done.stderr
    root = Path(done.stdout.strip())
    assert contents(root) == FILES
    assert {path.stat().st_nlink for path in root.rglob("*") if path.is_file()} == {1}
    again = get()
    assert (again.path, again.status) == (root, "revalidated")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    options = b"size=256k"
    if libc is None or libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, options) != 0:
        pytest.skip("cannot mount a tmpfs")
    yield place
    libc.umount2(os.fsencode(place), 2)


@pytest.mark.root
def test_a_tree_that_does_not_fit_leaves_no_snapshot(
    put_tree: Get, get: Get, full_disk: Path
) -> None:
    put_tree({f"{n}": bytes(64 << 10) for n in range(8)})
    with pytest.raises(s3c.CacheError, match="free") as caught:
        get(cache_dir=full_disk)
    assert caught.value.errno is not None
    assert [e.kind for e in s3c.CacheManager(full_disk).entries() if e.kind == "tree"] == []
    assert not list(full_disk.rglob(".t*"))


def test_the_stamps_of_a_tree_go_with_it(put_tree: Get, get: Get, cache: Path) -> None:
    put_tree()
    age(get().path, 2 * 3600)
    get(offline=True)
    s3c.CacheManager(cache).clear()
    assert list(cache.iterdir()) == []


def test_a_stamp_beside_a_tree_is_as_good_as_its_own(
    server: Server, put_tree: Get, get: Get, cache: Path
) -> None:
    """Who may write to a group's cache may not set the times of another's directory."""
    put_tree()
    path = get().path
    age(path, 30 * 86400)
    path.with_name(f".v{path.name}").touch()
    server.reset()
    assert get(max_age=3600).status == "fresh"
    assert server.seen == []
    assert s3c.CacheManager(cache).prune(max_age_days=7) == []


def test_a_file_more_makes_a_tree_neither_younger_nor_newer(
    server: Server, put_tree: Get, get: Get, cache: Path
) -> None:
    """It changes the time of the directory, which was taken for that of its validation."""
    put_tree()
    old = get().path
    put_tree({"0/0": b"new"})
    new = get().path
    age(old, 7200)
    age(new, 7000)
    (old / ".zmetadata").write_bytes(b"{}")
    assert get(offline=True).path == new
    assert get(max_age=3600).status == "revalidated"
    age(old, 30 * 86400)
    s3c.CacheManager(cache).prune(max_age_days=7)
    assert (old.exists(), new.exists()) == (False, True)


def cut_short(path: Path) -> None:
    """As a power cut does with what was not written yet; the entry is the same file."""
    path.chmod(0o600)
    path.write_bytes(b"")


harmed = pytest.mark.parametrize("harm", [Path.unlink, cut_short])


@harmed
@pytest.mark.parametrize("options", [{"max_age": 3600}, {"offline": True}])
def test_a_tree_that_lost_files_or_bytes_is_not_served_unasked(
    put_tree: Get, get: Get, options: dict[str, Any], harm: Callable[[Path], None]
) -> None:
    put_tree()
    harm(get().path / "0" / "1")
    if "offline" in options:
        with pytest.raises(s3c.OfflineError):
            get(**options)
    else:
        assert contents(get(**options).path) == FILES


@harmed
def test_a_tree_that_lost_files_or_bytes_stands_in_for_no_answer(
    server: Server, put_tree: Get, get: Get, quick: None, harm: Callable[[Path], None]
) -> None:
    put_tree()
    harm(get().path / "0" / "1")
    server.always(500)
    with pytest.raises(s3c.TransferError):
        get(stale_if_error=True)


def test_a_file_more_makes_a_tree_no_less(put_tree: Get, get: Get) -> None:
    """Such as consolidated metadata that a reader writes beside the chunks."""
    put_tree()
    (get().path / ".zmetadata").write_bytes(b"{}")
    assert get(offline=True).status == "fresh"


def test_verify_removes_the_trees_that_hold_damaged_bytes(
    put_tree: Get, get: Get, cache: Path
) -> None:
    put_tree()
    path = get().path
    chunk, other = path / "0" / "0", get(TREE + "deep/").path
    chunk.chmod(0o600)
    chunk.write_bytes(b"Chunk 0 0")
    gone = s3c.CacheManager(cache).verify()
    assert [(entry.kind, entry.name) for entry in gone] == [("tree", "data.zarr"), ("object", "0")]
    assert (path.exists(), other.exists()) == (False, True)
    assert contents(get().path) == FILES


@pytest.mark.parametrize("at", ["0/0", "deep/er/still/x.bin"])
def test_a_cache_cleared_while_a_tree_is_made_leaves_no_torn_tree(
    server: Server, put_tree: Get, get: Get, cache: Path, at: str
) -> None:
    put_tree()
    cleared: list[bool] = []

    def clear(request: Any) -> None:
        if request.path.endswith(at) and not cleared:
            cleared.append(True)
            s3c.CacheManager(cache).clear()

    server.before = clear
    assert contents(get().path) == FILES
    assert cleared


def test_a_link_that_is_there_already_is_not_written_through(tmp_path: Path) -> None:
    """Two keys may be one name to a file system; and NFS may make a link and then say it was."""
    source, link, other = (tmp_path / name for name in ("source", "link", "other"))
    source.write_bytes(b"source")
    other.write_bytes(b"other")
    link.hardlink_to(source) if sys.version_info >= (3, 10) else os.link(source, link)
    s3c._link(str(source), str(link))
    with pytest.raises(FileExistsError):
        s3c._link(str(source), str(other))
    assert other.read_bytes() == b"other"


def test_a_listing_without_etags_tells_versions_by_date(server: Server, get: Get) -> None:
    for content in (b"old", b"new"):
        etag = f'"{content.decode()}"'
        server.put(BUCKET, "data.zarr/x", content, etag=None, headers={"ETag": etag})
        result = get()
        assert (result.status, contents(result.path)) == ("downloaded", {"x": content})


@pytest.mark.parametrize("uri", [TREE, TREE[:-1]], ids=["slash", "no slash"])
def test_the_error_of_a_file_names_the_file(
    server: Server, put_tree: Get, get: Get, uri: str
) -> None:
    put_tree()
    server.on_path("/0/1", 403, code="AccessDenied")
    with pytest.raises(s3c.AccessDeniedError) as caught:
        get(uri)
    assert caught.value.uri == TREE + "0/1"


def test_etags_without_quotes_tell_versions_too(server: Server, put_tree: Get, get: Get) -> None:
    put_tree({"a": b"1", "b": b"2"}, etag="bare")
    for status in ("downloaded", "revalidated"):
        assert get().status == status
    put_tree({"c": b"3"})
    assert contents(get().path) == {"a": b"1", "b": b"2", "c": b"3"}
    assert [request.path[-1] for request in server.seen].count("a") == 1


def test_a_file_deleted_after_the_listing_is_no_part(
    server: Server, put_tree: Get, get: Get
) -> None:
    put_tree()

    def delete(request: Any) -> None:
        if request.path.endswith("/0/1"):
            server.delete(BUCKET, "data.zarr/0/1")

    server.before = delete
    assert contents(get().path) == {name: FILES[name] for name in FILES if name != "0/1"}


def test_a_tree_that_lost_a_file_and_then_keeps_changing_says_the_latter(
    server: Server, put_tree: Get, get: Get
) -> None:
    put_tree({"lost": b"x", "new": b"0"})

    def change(request: Any) -> None:
        if request.path.endswith("/lost"):
            server.delete(BUCKET, "data.zarr/lost")
        else:
            put_tree({"new": b"%d" % len(server.seen)})

    server.before = change
    with pytest.raises(s3c.IntegrityError, match="The tree keeps changing"):
        get()


@pytest.mark.parametrize("options", [{}, {"max_age": 60}, {"offline": True}])
def test_a_tree_tells_its_size_however_it_is_served(
    put_tree: Get, get: Get, options: dict[str, Any]
) -> None:
    put_tree()
    get()
    assert get(**options).size == sum(map(len, FILES.values()))


def test_a_manager_sees_trees(put_tree: Get, get: Get, cache: Path) -> None:
    put_tree()
    root = get().path
    (tree,) = [e for e in s3c.CacheManager(cache).entries() if e.kind == "tree"]
    assert (tree.path, tree.name) == (str(root), "data.zarr")
    s3c.CacheManager(cache).clear()
    assert not root.exists()


@pytest.mark.parametrize("at", ["list-type", "0/0"])
def test_a_cache_that_goes_while_a_tree_is_begun_is_made_anew(
    server: Server, put_tree: Get, get: Get, cache: Path, at: str
) -> None:
    """What is given to others is private also in a directory that was made twice."""
    put_tree()
    shutil.rmtree(cache, ignore_errors=True)

    def clear(request: Any) -> None:
        if at in request.target:
            server.before = None
            if cache.exists():
                cache.rename(cache.with_name("gone"))  # at once: rmtree would go on meanwhile

    server.before = clear
    assert contents(get().path) == FILES


# ==== Keys that are no paths ==================================================================

UNSAFE = {
    "a part ..": ["ok", "../escape"],
    "only ..": ["ok", ".."],
    "deep ..": ["a/b/../../../c"],
    "a part .": ["a/./b"],
    "an empty part": ["a//b"],
    "absolute": ["/etc/passwd"],
    "a file that ends in a slash": ["dir/with-content/"],
    "file and directory": ["x", "x/y"],
    "file and directory, deeper": ["a/x", "a/x/y/z", "a/y"],
    "NUL": ["nul\0name"],
    "longer than a name may be": ["y" * 256],
    "longer than a key may be": ["d/" * 2000 + "x"],  # and deeper than Python before 3.13 removes
}


@pytest.mark.parametrize("why", UNSAFE)
def test_a_key_that_is_no_path_is_refused_by_name_before_anything_is_written(
    server: Server, put_tree: Get, get: Get, cache: Path, why: str
) -> None:
    put_tree(dict.fromkeys(["fine", *UNSAFE[why]], b"x"))
    with pytest.raises(s3c.CacheError) as caught:
        get()
    bad = UNSAFE[why][-1] if "file and" not in why else UNSAFE[why][0]
    assert ascii(bad)[1:-1][:1000] in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert len(server.seen) == listings(server)
    assert not cache.exists() or contents(cache) == {}


WITH_ASCII = """
import SUBJECT as s3c, sys
print(sys.getfilesystemencoding())
try: s3c.get_local_path_for_resource(sys.argv[1], cache_dir=sys.argv[2])
except s3c.CacheError as error: print(ascii(error))
"""


def test_a_key_that_the_locale_cannot_encode_is_refused_by_name(
    put_tree: Get, run_python: Run, cache: Path
) -> None:
    put_tree({"日本": b"x"})
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    encoding, *said = run_python(WITH_ASCII, TREE, cache, env=env).stdout.splitlines()
    if encoding == "utf-8":
        pytest.skip("file names are UTF-8 here in any locale")
    assert f"Cannot be a file name: 'data.zarr/{ascii('日本')[1:-1]}'" in said[0]


@pytest.fixture
def folding(cache: Path) -> Path:
    """A cache that finds its tag under either spelling, as where `A` is taken for `a`."""
    (cache / "aind-s3-cache").mkdir(parents=True)
    for name in ("CACHEDIR.TAG", "cachedir.tag"):  # one file on macOS and Windows
        (cache / "aind-s3-cache" / name).touch()
    return cache


TWINS = [["Data", "data"], ["Dir/a", "dir/b"], ["a/X", "a/x"], ["Both", "both/x"]]


@pytest.mark.parametrize("names", TWINS, ids=repr)
def test_case_twins_are_refused_where_they_would_meet(
    put_tree: Get, get: Get, folding: Path, names: list[str]
) -> None:
    put_tree({name: name.encode() for name in names})
    with pytest.raises(s3c.CacheError, match=r"(?i)case|both"):
        get(cache_dir=folding)
    assert sorted(os.listdir(folding / "aind-s3-cache" / "trees")) == []


@pytest.mark.parametrize("names", TWINS, ids=repr)
def test_case_twins_are_fine_where_they_do_not_meet(
    put_tree: Get, get: Get, tmp_path: Path, names: list[str]
) -> None:
    (tmp_path / "probe").touch()
    if (tmp_path / "PROBE").exists():
        pytest.skip("this file system takes one for the other")
    put_tree({name: name.encode() for name in names})
    assert contents(get().path) == {name: name.encode() for name in names}


def test_a_listing_with_keys_of_elsewhere_is_not_believed(
    server: Server, get: Get, quick: None, cache: Path
) -> None:
    page = (
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false'
        "</IsTruncated><Contents><Key>elsewhere/x</Key><Size>1</Size><ETag>&quot;e&quot;</ETag>"
        "</Contents></ListBucketResult>"
    )
    server.on_path("list-type", 200, page.encode())
    server.put(BUCKET, "elsewhere/x", b"x", etag='"e"')
    with pytest.raises(s3c.S3CacheError):
        get()
    assert not list(cache.rglob("*x"))


# ==== Ages, offline, stale ====================================================================

BOTH = pytest.mark.parametrize("uri", [TREE, TREE[:-1]], ids=["slash", "no slash"])


@BOTH
@pytest.mark.parametrize("options", [{"max_age": 60}, {"offline": True}], ids=str)
def test_a_held_tree_needs_no_request(
    server: Server, put_tree: Get, get: Get, uri: str, options: dict[str, Any]
) -> None:
    put_tree()
    path = get(uri).path
    server.reset()
    result = get(uri, **options)
    assert (result.path, result.status, result.from_cache) == (path, "fresh", True)
    assert server.seen == []


def test_after_max_age_a_tree_is_listed_and_its_age_renewed(
    server: Server, put_tree: Get, get: Get, cache: Path
) -> None:
    put_tree()
    get()
    age(cache, 3600)
    assert get(max_age=60).status == "revalidated"
    server.reset()
    assert get(max_age=60).status == "fresh"
    assert server.seen == []


def test_offline_gives_the_newest_snapshot(publish: Publish, put_tree: Get, get: Get) -> None:
    put_tree()
    age(get().path, 10)
    publish(b"new chunk", "data.zarr/0/1")
    new = get()
    assert get(offline=True).path == new.path


@BOTH
def test_offline_without_a_snapshot_is_an_error(
    server: Server, get: Get, uri: str, cache: Path
) -> None:
    with pytest.raises(s3c.OfflineError):
        get(uri, offline=True)
    assert server.seen == []
    assert not cache.exists()


@BOTH
@pytest.mark.parametrize("failure", ["refused", "503", "429"])
def test_a_failing_server_leaves_the_stale_snapshot(
    server: Server, put_tree: Get, get: Get, quick: None, uri: str, failure: str
) -> None:
    put_tree()
    path = get(uri).path
    if failure == "refused":
        server.close()
    else:
        server.always(int(failure))
    result = get(uri, stale_if_error=True)
    assert (result.path, result.status, result.from_cache) == (path, "stale", True)
    with pytest.raises(s3c.TransferError):
        get(uri)


@pytest.mark.parametrize("options", [{"stale_if_error": True}, {"max_age": 60}], ids=repr)
def test_a_snapshot_that_a_peer_prunes_as_it_is_chosen_is_none(
    server: Server,
    put_tree: Get,
    get: Get,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    put_tree()
    get(TREE)
    server.always(503)
    monkeypatch.setattr(s3c._Store, "used", lambda self, path, stamp: s3c._remove_tree(path))
    with pytest.raises(s3c.TransferError):
        get(TREE, **options)


def test_a_failing_file_of_a_changed_tree_leaves_the_stale_snapshot(
    server: Server, publish: Publish, put_tree: Get, get: Get, quick: None
) -> None:
    put_tree()
    old = get()
    publish(b"new chunk", "data.zarr/0/1")
    server.on_path("/0/1", 503)
    result = get(stale_if_error=True)
    assert (result.path, result.status) == (old.path, "stale")


def test_a_listing_is_retried(server: Server, put_tree: Get, get: Get, quick: None) -> None:
    put_tree()
    server.on_path("list-type", 503, times=1)
    server.on_path("list-type", 200, b"<Error><Code>InternalError</Code></Error>", times=1)
    server.on_path("list-type", 200, b"<ListBucketResult><Contents>", times=1)
    assert contents(get().path) == FILES
    assert listings(server) == 4


# ==== Progress, permissions, interrupts =======================================================


def test_progress_of_a_tree_sums_to_its_size(put_tree: Get, get: Get) -> None:
    put_tree()
    got: list[int] = []
    result = get(progress=got.append)
    assert sum(got) == result.size
    got.clear()
    get(progress=got.append)
    assert got == []


def test_a_refused_listing_is_access_denied(server: Server, put_tree: Get, get: Get) -> None:
    put_tree()
    server.on_path("list-type", 403, code="AccessDenied")
    with pytest.raises(s3c.AccessDeniedError) as caught:
        get(anonymous=True)
    assert caught.value.code == "AccessDenied"


INTERRUPTED = """
import os, signal, sys, threading, SUBJECT as s3c
got = []
def progress(size):
    got.append(size)
    if len(got) == 20:
        os.kill(os.getpid(), signal.SIGINT)
try:
    s3c.get_local_path_for_resource(sys.argv[2], cache_dir=sys.argv[1], progress=progress)
except KeyboardInterrupt:
    sys.exit(130)
"""


@posix
def test_an_interrupted_tree_leaves_no_snapshot_and_resumes(
    server: Server, put_tree: Get, get: Get, cache: Path, run_python: Run
) -> None:
    files = {str(number): b"%d" % number for number in range(300)}
    put_tree(files)
    server.latency = 0.005
    done = run_python(INTERRUPTED, cache, TREE, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert list((cache / "aind-s3-cache" / "trees").glob("[!.]*")) == []
    server.reset()
    server.latency = 0
    assert contents(get().path) == files
    assert len(server.seen) < 300


# ==== Signed ==================================================================================


@pytest.mark.boto3
@pytest.mark.parametrize("anonymous", [None, False], ids=["unsigned first", "signed"])
def test_a_private_tree_is_listed_and_fetched_signed(
    server: Server, put_tree: Get, get: Get, keys: None, anonymous: Any
) -> None:
    server.require_auth, server.page_size = True, 4
    files = {**FILES, **({} if os.name == "nt" else dict.fromkeys(NASTY_NAMES, b"x"))}
    put_tree(files)
    result = get(anonymous=anonymous)
    assert contents(result.path) == files
    if os.name == "posix":
        assert stat.S_IMODE((result.path / "0/0").stat().st_mode) & 0o077 == 0
        assert stat.S_IMODE(result.path.stat().st_mode) & 0o077 == 0


PAGE = "<ListBucketResult><IsTruncated>{}</IsTruncated><Contents>{}</Contents></ListBucketResult>"
NO_LISTINGS = {
    "no token": PAGE.format("true", "<Key>data.zarr/0/0</Key><Size>9</Size>"),
    "no size": PAGE.format("false", "<Key>data.zarr/0/0</Key>"),
    "no key": PAGE.format("false", "<Size>9</Size>"),
    "no XML": "",
    "a portal": "<html><body>Log in</body></html>",
}


@pytest.mark.boto3
@pytest.mark.usefixtures("keys", "quick")
@pytest.mark.parametrize("page", NO_LISTINGS.values(), ids=NO_LISTINGS)
def test_a_signed_listing_that_is_none_is_asked_for_again(
    server: Server, put_tree: Get, get: Get, page: str
) -> None:
    put_tree()
    server.on_path("list-type", 200, page.encode(), times=1)
    assert contents(get(anonymous=False).path) == FILES
    assert listings(server) == 2


@pytest.mark.boto3
def test_a_private_tree_is_served_offline_to_all_but_the_anonymous(
    server: Server, put_tree: Get, get: Get, keys: None
) -> None:
    server.require_auth = True
    put_tree()
    path = get(anonymous=False).path
    assert get(offline=True).path == path
    assert get(max_age=60).path == path
    with pytest.raises(s3c.OfflineError):
        get(offline=True, anonymous=True)
    with pytest.raises(s3c.AccessDeniedError):
        get(max_age=60, anonymous=True)


@pytest.mark.boto3
def test_an_unchanged_private_tree_costs_its_listing(
    server: Server, put_tree: Get, get: Get, keys: None
) -> None:
    server.require_auth = True
    put_tree()
    get(anonymous=False)
    server.reset()
    assert get(anonymous=False).status == "revalidated"
    assert len(server.seen) == 1


# ==== zarr ====================================================================================


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_real_zarr_array_opens_and_equals_the_original(
    put_tree: Get, get: Get, tmp_path: Path, zarr_format: int
) -> None:
    zarr = pytest.importorskip("zarr", minversion="3")
    store = tmp_path / "original.zarr"
    array = zarr.create_array(
        store, shape=(64, 48), chunks=(16, 16), dtype="uint16", zarr_format=zarr_format
    )
    array[:] = [[row * 48 + column for column in range(48)] for row in range(64)]
    array.attrs["spacing"] = [0.5, 2]
    put_tree(contents(store))
    opened = zarr.open_array(get(TREE[:-1]).path, mode="r")
    assert (opened[:] == array[:]).all()
    assert (opened.attrs["spacing"], opened.shape) == ([0.5, 2], (64, 48))
