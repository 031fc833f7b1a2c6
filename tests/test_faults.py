"""Calls of the system that fail where they seldom do: each refused by a library put before libc.

What matters becomes a CacheError with its number; what does not, a stamp or a lock, is no harm.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import BUCKET, MiB
from server import Server
from subject import s3c

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="puts a library before libc")

localize = s3c.get_local_path_for_resource
LARGE = bytes(range(251)) * 45_000  # comes in ranges, with an MD5 that is hashed beside them
FAILS = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
static int fails(const char *call, const char *path) { /* FAIL: "call part errno;call part errno" */
    char list[256], name[32], part[64], *rest, *item;
    const char *given = getenv("FAIL");
    int number;
    if (!given || !path) return 0;
    strncpy(list, given, sizeof list - 1);
    list[sizeof list - 1] = 0;
    for (item = strtok_r(list, ";", &rest); item; item = strtok_r(0, ";", &rest))
        if (sscanf(item, "%31s %63s %d", name, part, &number) == 3 && !strcmp(name, call)
            && strstr(path, part)) {
            if (number == EINTR) raise(SIGALRM);
            errno = number;
            return 1;
        }
    return 0;
}
static int was_read; /* lstat fails only after something was read back */
static int fd_fails(const char *call, int fd) {
    char link[64], path[4096];
    ssize_t size;
    sprintf(link, "/proc/self/fd/%d", fd);
    size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    was_read |= !strcmp(call, "read") && strstr(path, "/objects/");
    return fails(call, path);
}
#define NEXT(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))
DIR *opendir(const char *path) {
    return fails("opendir", path) ? 0 : NEXT(DIR *, opendir, const char *)(path);
}
int rename(const char *from, const char *to) {
    return fails("rename", to) ? -1 : NEXT(int, rename, const char *, const char *)(from, to);
}
int utimensat(int dir, const char *path, const struct timespec *times, int flags) {
    if (fails("utime", path)) return -1;
    return NEXT(int, utimensat, int, const char *, const struct timespec *, int)
        (dir, path, times, flags);
}
int futimens(int fd, const struct timespec *times) {
    if (fd_fails("utime", fd)) return -1;
    return NEXT(int, futimens, int, const struct timespec *)(fd, times);
}
int fsync(int fd) { return fd_fails("fsync", fd) ? -1 : NEXT(int, fsync, int)(fd); }
int close(int fd) {
    int bad = fd_fails("close", fd), number = errno, done = NEXT(int, close, int)(fd);
    if (bad) errno = number;
    return bad ? -1 : done;
}
int fstat(int fd, struct stat *found) {
    return fd_fails("fstat", fd) ? -1 : NEXT(int, fstat, int, struct stat *)(fd, found);
}
int fstat64(int fd, struct stat64 *found) {
    return fd_fails("fstat", fd) ? -1 : NEXT(int, fstat64, int, struct stat64 *)(fd, found);
}
int lstat(const char *path, struct stat *found) {
    if (was_read && fails("lstat", path)) return -1;
    return NEXT(int, lstat, const char *, struct stat *)(path, found);
}
int lstat64(const char *path, struct stat64 *found) {
    if (was_read && fails("lstat", path)) return -1;
    return NEXT(int, lstat64, const char *, struct stat64 *)(path, found);
}
ssize_t read(int fd, void *data, size_t size) {
    return fd_fails("read", fd) ? -1 : NEXT(ssize_t, read, int, void *, size_t)(fd, data, size);
}
ssize_t write(int fd, const void *data, size_t size) {
    if (fd_fails("write", fd)) return -1;
    return NEXT(ssize_t, write, int, const void *, size_t)(fd, data, size);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    if (fd_fails("write", fd)) return -1;
    return NEXT(ssize_t, pwrite64, int, const void *, size_t, off_t)(fd, data, size, at);
}
ssize_t pread64(int fd, void *data, size_t size, off_t at) {
    if (fd_fails("short", fd) && size > 1) size /= 2;
    return NEXT(ssize_t, pread64, int, void *, size_t, off_t)(fd, data, size, at);
}
int link(const char *from, const char *to) {
    return fails("link", to) ? -1 : NEXT(int, link, const char *, const char *)(from, to);
}
int chmod(const char *path, mode_t mode) {
    return fails("chmod", path) ? -1 : NEXT(int, chmod, const char *, mode_t)(path, mode);
}
int mkdir(const char *path, mode_t mode) { /* "modes" is no call: what is made has none */
    int done = NEXT(int, mkdir, const char *, mode_t)(path, mode);
    if (!done && fails("modes", path)) chmod(path, 0777);
    return done;
}
int poll(struct pollfd *all, nfds_t count, int wait) {
    if (!wait && fails("poll", "0")) return -1; /* a look, and no wait */
    return NEXT(int, poll, struct pollfd *, nfds_t, int)(all, count, wait);
}
int ppoll(struct pollfd *all, nfds_t count, const struct timespec *wait, const sigset_t *mask) {
    if (wait && !wait->tv_sec && !wait->tv_nsec && fails("poll", "0")) return -1; /* since 3.15 */
    return NEXT(int, ppoll, struct pollfd *, nfds_t, const struct timespec *, const sigset_t *)
        (all, count, wait, mask);
}
"""
CHILD = """
import os, sys, SUBJECT as s3c
cache, fail, uri, act = sys.argv[1:]
def get(**options):
    return s3c.get_local_path_for_resource(uri, cache_dir=cache, **options)
manager, before = s3c.CacheManager(cache), len(os.listdir("/proc/self/fd"))
exec(act.partition("!")[0])
os.environ["FAIL"] = fail
try:
    print(eval(act.partition("!")[2]))
except s3c.S3CacheError as error:
    print(type(error).__name__, error.errno)
del os.environ["FAIL"]
s3c._POOL.clear()
assert len(os.listdir("/proc/self/fd")) == before, "leaves a file open"
"""


@pytest.fixture
def under(
    server: Server, preload: Any, run_python: Any, cache: Path
) -> Callable[[str, str, str], str]:
    """`under(fail, uri, act)`: what a child says that does ``before!act``, the latter under faults.

    ``fail`` is the call, a part of the path, and the error; more of them after a semicolon.
    """
    for key in ("tree/a", "tree/b/c", "small"):
        server.put(BUCKET, key, b"{}")
    server.put(BUCKET, "medium", bytes(3 * MiB))
    server.put(BUCKET, "large", LARGE)
    env = preload(FAILS)

    def under(fail: str, key: str, act: str) -> str:
        done = run_python(CHILD, cache, fail, f"s3://{BUCKET}/{key}", act, env=env)
        said: str = done.stdout.strip()
        return said

    return under


NO_HARM = {
    "the stamp of a tree": ("utime /trees/ 38", "tree/"),
    "the stamp of a large object": ("utime /objects/ 1", "large"),
    "a file system that cannot synchronize": ("fsync /partial/ 22", "large"),
    "the end of a lock": ("close /locks/ 5", "large"),
    "the log of what is done": ("write .log 5", "large"),
    "the end of a log": ("close .log 5", "large"),
    "the tag": ("close CACHEDIR.TAG 5", "small"),
    "a file system without links and modes": ("link /trees/ 1;chmod /trees/ 1", "tree/"),
}


@pytest.mark.parametrize("what", NO_HARM)
def test_what_only_saves_work_may_fail(what: str, under: Any) -> None:
    fail, key = NO_HARM[what]
    assert under(fail, key, "!get().status") == "downloaded"


def test_a_mount_that_shows_one_mode_for_all_is_used(under: Any) -> None:
    """As exFAT, NTFS, CIFS and WSL do: whoever made the mount let everybody write."""
    assert under("modes / 0", "small", "os.chmod(cache, 0o777)!get().status") == "downloaded"


def test_a_kept_connection_that_cannot_be_looked_at_is_left(under: Any, server: Server) -> None:
    assert under("poll 0 12", "small", "get()!get().status") == "revalidated"
    assert server.connections == 2


def test_a_local_file_that_does_not_tell_its_size_is_read(under: Any) -> None:
    assert under("fstat /objects/ 5", "small", "at = get()!s3c.get_json(at)") == "{}"


def test_a_short_read_is_read_on(under: Any, server: Server) -> None:
    assert under("short .data 0", "large", "!get().status") == "downloaded"
    assert sum(r.headers["range"].startswith("bytes=0-") for r in server.seen) == 1


@pytest.mark.parametrize("key", ["tree/", "small"])
@pytest.mark.parametrize("options", ["", "max_age=9"])
def test_snapshots_that_cannot_be_listed_are_none(key: str, options: str, under: Any) -> None:
    before = "(manager.dir / 'aind-s3-cache').mkdir()"
    assert under("opendir /trees 13", key, f"{before}!get({options}).status") == "downloaded"


@pytest.mark.parametrize(("number", "said"), [(116, "CacheError 116"), (2, "[]")])
def test_verify_removes_nothing_that_it_cannot_judge(
    number: int, said: str, under: Any, cache: Path
) -> None:
    assert under(f"lstat /objects/ {number}", "small", "get()!manager.verify()") == said
    assert [entry.size for entry in s3c.CacheManager(cache).entries()] == [2]


TOLD = {
    "a large object that is not durable": ("fsync /partial/ 5", "large", "!get()", 5),
    "a tree that gets no name": ("rename _tree 122", "tree/", "!get()", 122),
    "two errors, of which the first counts": (
        "write /objects/ 28;close /objects/ 5", "medium", "!get()", 28),
    "offline, an unreadable shard": ("opendir /objects/ 13", "small", "!get(offline=True)", 13),
    "offline, unreadable trees": ("opendir /trees 24", "tree/", "get()!get(offline=True)", 24),
    "a local file that breaks": ("read /objects/ 5", "small", "at = get()!s3c.get_json(at)", 5),
}  # fmt: skip


@pytest.mark.parametrize("what", TOLD)
def test_what_matters_is_an_error_with_its_number(what: str, under: Any, cache: Path) -> None:
    fail, key, act, number = TOLD[what]
    assert under(fail, key, act) == f"CacheError {number}"
    assert [path for path in cache.rglob(".t*") if path.name[:2] == ".t"] == []


LATE = """
import signal
def late(*_): raise TimeoutError("the caller's")
signal.signal(signal.SIGALRM, late)
def limited():
    try: get()
    except TimeoutError as error: return error
!limited()"""


def test_a_limit_of_time_amid_a_finished_download_keeps_it(under: Any, cache: Path) -> None:
    """As the disk syncs it; and as the next call, which is as short of time, reads it again."""
    for fail in ("fsync /partial/ 4", "read .data 4"):
        assert under(fail, "large", LATE) == "the caller's"
        assert [path.stat().st_size for path in cache.rglob("*.data")] == [len(LARGE)]


def test_pruning_goes_by_another_clock_and_past_what_it_cannot_list(under: Any) -> None:
    for fail in ("fstat /.t 5", "close /.t 5"):
        assert under(fail, "small", "get()!manager.prune()") == "[]"


@pytest.fixture
def nobodys(server: Server, public: Path, cache: Path, as_nobody: Any) -> tuple[Path, Any]:
    """A tree of another user, and the manager of the cache that it is in."""
    server.put(BUCKET, "tree/b/c", b"{}")
    uri = f"s3://{BUCKET}/tree/"
    localize(uri, cache_dir=cache)  # nobody may not be able to import what this does
    public.chmod(0o777)
    tree: Path = as_nobody(lambda: localize(uri, cache_dir=public / "c")).path
    return tree, s3c.CacheManager(public / "c")


@pytest.mark.root
def test_clear_says_what_it_could_not_remove(nobodys: Any, as_nobody: Any) -> None:
    """A directory of a tree that its owner made read-only."""
    tree, manager = nobodys
    (tree / "b").chmod(0o555)
    with pytest.raises(s3c.CacheError, match="Permission denied"):
        as_nobody(manager.clear)
    assert as_nobody(manager.entries) == []


@pytest.mark.root
def test_verify_goes_on_past_what_it_may_not_remove(
    server: Server, nobodys: Any, as_nobody: Any
) -> None:
    """Of many, whatever their order: those of one directory stay."""
    manager, paths = nobodys[1], []
    for key in "abcdefgh":
        server.put(BUCKET, key, b"{}")
        uri = f"s3://{BUCKET}/{key}"
        paths.append(as_nobody(partial(localize, uri, cache_dir=manager.dir)).path)
    for path in paths:
        path.chmod(0o644)
        path.write_bytes(b"[]")
    kept = paths[3].parent
    kept.chmod(0o555)
    with pytest.raises(s3c.CacheError, match="Permission denied"):
        as_nobody(manager.verify)
    assert [path.exists() for path in paths] == [path.parent == kept for path in paths]


@pytest.mark.root
def test_verify_says_what_it_could_not_remove(nobodys: Any, as_nobody: Any) -> None:
    tree, manager = nobodys
    (tree / "b" / "c").chmod(0o644)
    (tree / "b" / "c").write_bytes(b"[]")
    tree.parent.chmod(0o555)
    with pytest.raises(s3c.CacheError, match="Permission denied"):
        as_nobody(manager.verify)
    assert {entry.kind for entry in manager.entries()} == {"object", "tree"}
