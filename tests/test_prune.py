"""Sections 7 and 9: what the cache holds, what goes first, what never goes."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from conftest import NOBODY, Get, MiB, Publish, Run, posix
from hypothesis import given, settings
from hypothesis import strategies as st
from server import Server
from subject import s3c

HOUR, DAY = 3600.0, 86400.0
GRACE = HOUR + 300  # since the last stamp: it may be that much older than the last use
NOW = 1_700_000_000.0


# ==== Builders ================================================================================


def unit(
    name: str = "x",
    *,
    used: float = 10 * DAY,
    size: int = 10,
    kind: str = "object",
    superseded: bool = False,
    inodes: dict[tuple[int, int], int] | None = None,
) -> Any:
    """What may be pruned: used so many seconds before NOW."""
    stamp = NOW - used
    entry = s3c.CacheEntry(name, name, kind, size, stamp, stamp, None, False, superseded)
    return s3c._Unit(entry, {(1, hash(name)): size} if inodes is None else inodes)


def plan(*units: Any, age: float | None = None, size: int | None = None) -> list[str]:
    return [unit.entry.path for unit in s3c._plan_prune(list(units), age, size, NOW)]


def stamps(path: Path) -> list[Path]:
    """An entry and whatever the cache keeps beside it under the same name."""
    return [p for p in path.parent.iterdir() if p.name.endswith(path.name)]


def age(path: Path, seconds: float) -> None:
    for stamp in stamps(path):
        os.utime(stamp, (time.time() - seconds,) * 2)


@pytest.fixture
def manager(cache: Path) -> Iterator[Any]:
    with s3c.CacheManager(cache) as manager:
        yield manager


@pytest.fixture
def hold(publish: Publish, get: Get) -> Callable[..., Path]:
    """`hold(key, size, used)`: the path of an object that was used so many seconds ago."""

    def hold(key: str, size: int = 100, used: float = 10 * DAY) -> Path:
        path: Path = get(publish(key[0].encode() * size, key=key)).path
        age(path, used)
        return path

    return hold


def names(entries: Any) -> list[str]:
    return [entry.name for entry in entries]


# ==== The plan, as a table ====================================================================

PLANS: list[tuple[str, list[str], list[Any], dict[str, Any]]] = [
    ("nothing held", [], [], {"age": 0, "size": 0}),
    ("no limit", [], [unit(used=400 * DAY)], {}),
    ("young enough", [], [unit(used=DAY)], {"age": 2 * DAY}),
    ("too old", ["x"], [unit(used=3 * DAY)], {"age": 2 * DAY}),
    ("small enough", [], [unit(size=10)], {"size": 10}),
    ("too large", ["x"], [unit(size=11)], {"size": 10}),
    ("within the grace", [], [unit(used=GRACE - 1)], {"age": 0, "size": 0}),
    ("past the grace", ["x"], [unit(used=GRACE + 1)], {"size": 0}),
    ("a stamp of the future", [], [unit(used=-DAY)], {"age": 0, "size": 0}),
    ("used longest ago first", ["b"], [unit("a", used=DAY), unit("b", used=2 * DAY)], {"size": 10}),
    (
        "what is too old anyway makes room first",
        ["old"],
        [unit("spare", superseded=True), unit("old", used=40 * DAY)],
        {"age": 30 * DAY, "size": 10},
    ),
    (
        "superseded before current",
        ["new"],
        [unit("old", used=9 * DAY), unit("new", used=DAY, superseded=True)],
        {"size": 10},
    ),
    (
        "superseded, longest ago first",
        ["b"],
        [unit("a", used=DAY, superseded=True), unit("b", superseded=True), unit("c")],
        {"size": 20},
    ),
    ("an orphan of a week", ["x"], [unit(kind="partial", used=8 * DAY)], {}),
    (
        "an orphan of a week, in a small cache",
        ["x"],
        [unit(kind="partial", used=8 * DAY)],
        {"size": 99},
    ),
    (
        "an orphan of a week, asked for a month",
        ["x"],
        [unit(kind="partial", used=8 * DAY)],
        {"age": 30 * DAY},
    ),
    ("a younger orphan", [], [unit(kind="partial", used=6 * DAY)], {}),
    ("a younger orphan, too large", ["x"], [unit(kind="partial", used=6 * DAY)], {"size": 0}),
    ("a growing partial file", [], [unit(kind="partial", used=60)], {"age": 0, "size": 0}),
    (
        "links of a tree count once",
        [],
        [unit("t", kind="tree", inodes={(1, 1): 10}), unit("o", inodes={(1, 1): 10})],
        {"size": 10},
    ),
    (
        "an object and its tree free their space together",
        ["t", "o"],
        [
            unit("o", inodes={(1, 1): 10}),
            unit("t", kind="tree", inodes={(1, 1): 10}),
            unit("n", used=DAY),
        ],
        {"size": 10},
    ),
    (
        "what a recent tree holds is recent",
        [],
        [unit("o", inodes={(1, 1): 10}), unit("t", kind="tree", used=60, inodes={(1, 1): 10})],
        {"age": DAY, "size": 0},
    ),
]


@pytest.mark.parametrize(
    ("gone", "units", "limits"), [p[1:] for p in PLANS], ids=[p[0] for p in PLANS]
)
def test_what_goes(gone: list[str], units: list[Any], limits: dict[str, Any]) -> None:
    assert plan(*units, **limits) == gone


# ==== The plan, for any cache =================================================================

_units = st.lists(
    st.builds(
        unit,
        name=st.integers(0, 10**9).map(str),
        used=st.one_of(st.floats(-DAY, 2 * HOUR), st.floats(0, 100 * DAY)),
        size=st.integers(0, 1000),
        kind=st.sampled_from(["object", "object", "partial"]),
        superseded=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda unit: unit.entry.path,
)
_age = st.none() | st.floats(0, 100 * DAY)
_size = st.none() | st.integers(0, 5000)
quickly = settings(deadline=None, max_examples=100, database=None)


def idle(unit: Any) -> float:
    return NOW - float(unit.entry.last_used)


def bytes_of(units: Any) -> int:
    inodes: dict[Any, int] = {}
    for unit in units:
        inodes.update(unit.inodes)
    return sum(inodes.values())


@quickly
@given(_units, _age, _size)
def test_what_was_just_used_never_goes(units: list[Any], age: Any, size: Any) -> None:
    gone = s3c._plan_prune(units, age, size, NOW)
    assert all(idle(unit) > GRACE for unit in gone)
    assert len({id(unit) for unit in gone}) == len(gone)


@quickly
@given(_units, _age, _size)
def test_what_stays_is_within_the_limits(units: list[Any], age: Any, size: Any) -> None:
    gone = s3c._plan_prune(units, age, size, NOW)
    kept = [unit for unit in units if unit not in gone]
    free = [unit for unit in kept if idle(unit) > GRACE]
    assert age is None or all(idle(unit) <= age for unit in free)
    assert size is None or bytes_of(kept) <= size or not free


@quickly
@given(_units, st.integers(0, 5000))
def test_nothing_goes_in_vain(units: list[Any], size: int) -> None:
    """The last that went for the size was one too many, or the rest would have been too large."""
    gone = s3c._plan_prune(units, None, size, NOW)
    for_size = [u for u in gone if u.entry.kind != "partial" or idle(u) <= 7 * DAY]
    last = for_size[-1:]
    kept = [unit for unit in units if unit not in gone or unit in last]
    assert not last or bytes_of(kept) > size


@quickly
@given(_units, st.integers(0, 5000))
def test_superseded_then_longest_unused(units: list[Any], size: int) -> None:
    gone = [u for u in s3c._plan_prune(units, None, size, NOW) if u.entry.kind != "partial"]
    order = [(not unit.entry.superseded, unit.entry.last_used) for unit in gone]
    kept = [u for u in units if u not in gone and idle(u) > GRACE and u.entry.kind != "partial"]
    left = [(not unit.entry.superseded, unit.entry.last_used) for unit in kept]
    assert order == sorted(order)
    assert not order or not left or order[-1] <= min(left)


@quickly
@given(_units, _age, st.integers(0, 5000), st.integers(0, 5000))
def test_a_smaller_limit_never_keeps_more(units: list[Any], age: Any, a: int, b: int) -> None:
    gone = [{id(u) for u in s3c._plan_prune(units, age, s, NOW)} for s in (min(a, b), max(a, b))]
    assert gone[1] <= gone[0]


# ==== CacheManager on real files ==============================================================


def test_entries_tell_what_is_held_used_last_first(hold: Any, manager: Any) -> None:
    paths = [hold("old.json", 7, 2 * DAY), hold("new.json", 8, DAY)]
    new, old = manager.entries()
    assert [new.path, old.path] == [str(path) for path in reversed(paths)]
    assert [new.name, old.name, new.kind] == ["new.json", "old.json", "object"]
    assert (new.size, new.private, new.superseded) == (8, False, False)
    assert new.etag.strip('"').isalnum()
    assert new.last_used == pytest.approx(time.time() - DAY, abs=60)
    assert manager.size() == 15


def test_prune_by_age(hold: Any, manager: Any) -> None:
    old, new = hold("old", used=3 * DAY), hold("new", used=DAY)
    assert names(manager.prune(max_age_days=2)) == ["old"]
    assert (old.exists(), new.exists()) == (False, True)
    assert stamps(new)
    assert not stamps(old)


def test_prune_by_size(hold: Any, manager: Any) -> None:
    for number in range(5):
        hold(f"{number}", 100, (10 - number) * DAY)
    assert names(manager.prune(max_size_bytes=299)) == ["0", "1", "2"]
    assert manager.size() == 200
    assert manager.prune(max_size_bytes=299) == []


def test_prune_takes_superseded_versions_first(publish: Publish, get: Get, manager: Any) -> None:
    other, old, new = (
        get(publish(c, key=k)).path for c, k in ((b"a", "a"), (b"b", "b"), (b"c", "b"))
    )
    for path, used in ((other, 9 * DAY), (old, DAY + 2), (new, DAY)):
        age(path, used)
    assert [entry.superseded for entry in manager.entries()] == [False, True, False]
    assert [entry.path for entry in manager.prune(max_size_bytes=2)] == [str(old)]


def test_a_version_that_came_back_is_current(publish: Publish, get: Get, manager: Any) -> None:
    first = get(publish(b"one"))
    age(first.path, DAY)
    age(get(publish(b"two")).path, HOUR)
    assert get(publish(b"one")).path == first.path
    assert {e.path: e.superseded for e in manager.entries()}[str(first.path)] is False
    assert sum(entry.superseded for entry in manager.entries()) == 1


def test_a_partial_file_takes_space_where_blocks_are_not_counted(
    cache: Path, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows, where no file has holes in it either."""
    data = cache / "aind-s3-cache" / "partial" / "0.0.0.data"
    data.parent.mkdir(parents=True)
    data.write_bytes(b"x" * 10)
    lstat, told = os.lstat, ("st_mode", "st_dev", "st_ino", "st_size", "st_mtime")

    def without_blocks(path: str) -> Any:
        return SimpleNamespace(**{name: getattr(lstat(path), name) for name in told})

    monkeypatch.setattr(os, "lstat", without_blocks)
    assert manager.size() == 10


def test_dry_run_only_tells(hold: Any, manager: Any) -> None:
    path = hold("old")
    assert names(manager.prune(max_age_days=1, dry_run=True)) == ["old"]
    assert path.exists()
    assert names(manager.prune(max_age_days=1)) == ["old"]


def test_what_was_used_within_the_hour_stays(hold: Any, manager: Any) -> None:
    path = hold("young", used=HOUR - 60)
    assert manager.prune(max_age_days=0, max_size_bytes=0) == []
    assert path.exists()


def test_what_was_used_within_the_hour_stays_though_its_stamp_is_older(
    hold: Any, get: Get, manager: Any
) -> None:
    path = hold("k", used=280)
    assert get("s3://aind-open-data/k", max_age=DAY).status == "fresh"
    age(path, 280 + HOUR - 60)
    assert manager.prune(max_size_bytes=0) == []
    assert path.exists()


@pytest.mark.parametrize("name", ["max_age_days", "max_size_bytes"])
@pytest.mark.parametrize("limit", [-1, float("nan")])
def test_limits_below_zero_are_refused(name: str, limit: float, manager: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 0"):
        manager.prune(**{name: limit})


@pytest.mark.parametrize("name", ["max_age_days", "max_size_bytes"])
@pytest.mark.parametrize("limit", ["30", "", []], ids=repr)
def test_limits_that_are_no_numbers_are_refused_by_name(
    name: str, limit: Any, manager: Any
) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number, not {type(limit).__name__}"):
        manager.prune(**{name: limit})


def test_limits_may_be_any_kind_of_number(hold: Any, manager: Any) -> None:
    hold("k")
    gone = manager.prune(max_age_days=Decimal("0.5"), max_size_bytes=Fraction(1), dry_run=True)
    assert names(gone) == ["k"]


def test_a_hit_keeps_an_entry(hold: Any, get: Get, manager: Any) -> None:
    path = hold("k")
    assert get("s3://aind-open-data/k").status == "revalidated"
    assert manager.prune(max_age_days=1) == []
    assert path.exists()


# ==== Two stamps: last use and last validation ================================================


def test_a_fresh_hit_is_a_use_but_no_validation(hold: Any, get: Get, manager: Any) -> None:
    hold("k", used=2 * DAY)
    assert get("s3://aind-open-data/k", max_age=3 * DAY).status == "fresh"
    (entry,) = manager.entries()
    assert entry.last_used == pytest.approx(time.time(), abs=60)
    assert entry.last_validated == pytest.approx(time.time() - 2 * DAY, abs=60)
    assert get("s3://aind-open-data/k", max_age=DAY).status == "revalidated"


def test_an_offline_hit_is_a_use(hold: Any, get: Get, manager: Any) -> None:
    hold("k")
    get("s3://aind-open-data/k", offline=True)
    assert manager.prune(max_age_days=1) == []


def test_every_validation_renews_max_age(hold: Any, get: Get, server: Server) -> None:
    hold("k", used=2 * DAY)
    assert get("s3://aind-open-data/k", max_age=DAY).status == "revalidated"
    server.reset()
    assert get("s3://aind-open-data/k", max_age=DAY).status == "fresh"
    assert server.seen == []


def test_last_use_is_written_at_most_every_five_minutes(hold: Any, get: Get) -> None:
    path = hold("k", used=2 * DAY)
    get("s3://aind-open-data/k", max_age=3 * DAY)
    for seconds, renewed in ((240, False), (360, True)):
        use = next(p for p in stamps(path) if p != path)
        os.utime(use, (time.time() - seconds,) * 2)
        before = use.stat().st_mtime_ns
        get("s3://aind-open-data/k", max_age=3 * DAY)
        assert (use.stat().st_mtime_ns != before) is renewed


def test_a_stamp_of_the_future_is_not_fresh(hold: Any, get: Get) -> None:
    hold("k", used=-DAY)
    assert get("s3://aind-open-data/k", max_age=3 * DAY).status == "revalidated"


def test_the_clock_of_the_file_system_counts(
    hold: Any, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine's clock is a day ahead; the disk, which gave the stamps, knows better."""
    path = hold("k", used=60)
    ahead = time.time() + DAY
    monkeypatch.setattr(time, "time", lambda: ahead)
    assert manager.prune(max_age_days=0.5, max_size_bytes=0) == []
    assert path.exists()


def test_atime_means_nothing(hold: Any, manager: Any) -> None:
    path = hold("k", used=10 * DAY)
    os.utime(path, (time.time(), path.stat().st_mtime))
    assert names(manager.prune(max_age_days=5)) == ["k"]


def test_a_use_counts_though_this_machines_clock_is_behind(
    hold: Any, get: Get, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hold("k", used=1.5 * DAY)
    behind = time.time() - 2 * DAY
    monkeypatch.setattr(time, "time", lambda: behind)
    get("s3://aind-open-data/k", offline=True)
    assert manager.prune(max_age_days=1) == []
    assert path.exists()


# ==== Races ===================================================================================


def test_what_is_used_after_the_plan_stays(
    hold: Any, get: Get, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [hold(key) for key in "abc"]
    decide = s3c._plan_prune

    def used_meanwhile(*args: Any) -> Any:
        decided = decide(*args)
        get("s3://aind-open-data/b", max_age=1e9)
        get("s3://aind-open-data/c")
        return decided

    monkeypatch.setattr(s3c, "_plan_prune", used_meanwhile)
    assert names(manager.prune(max_age_days=1)) == ["a"]
    assert [path.exists() for path in paths] == [False, True, True]
    assert len(manager.entries()) == 2


def test_a_reader_keeps_what_it_has_open(hold: Any, manager: Any) -> None:
    path = hold("k", 5)
    with open(path, "rb") as file:
        manager.prune(max_age_days=1)
        assert file.read() == b"kkkkk"


def test_what_vanishes_meanwhile_is_no_error(
    hold: Any, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [hold(key) for key in "ab"]
    decide = s3c._plan_prune

    def vanish(*args: Any) -> Any:
        decided = decide(*args)
        paths[0].unlink()
        return decided

    monkeypatch.setattr(s3c, "_plan_prune", vanish)
    assert names(manager.prune(max_age_days=1)) == ["b"]


# ==== Trees ===================================================================================


@pytest.fixture
def tree(publish: Publish, get: Get) -> Path:
    for name, size in (("a", 100), ("sub/b", 200)):
        publish(name[0].encode() * size, key=f"tree/{name}")
    path: Path = get("s3://aind-open-data/tree/").path
    return path


def test_a_tree_counts_once(tree: Path, manager: Any) -> None:
    assert sorted((e.kind, e.name, e.size) for e in manager.entries()) == [
        ("object", "a", 100),
        ("object", "b", 200),
        ("tree", "tree", 300),
    ]
    assert manager.size() == 300


def test_a_recent_tree_keeps_its_files(tree: Path, manager: Any, cache: Path) -> None:
    for entry in manager.entries():
        if entry.kind == "object":
            age(Path(entry.path), 30 * DAY)
    age(tree, 60)
    assert manager.prune(max_age_days=1, max_size_bytes=0) == []
    assert (tree / "sub" / "b").read_bytes() == b"s" * 200


def test_an_old_tree_goes_with_its_files(tree: Path, manager: Any) -> None:
    for entry in manager.entries():
        age(Path(entry.path), 30 * DAY)
    assert len(manager.prune(max_age_days=1)) == 3
    assert not tree.exists()
    assert (manager.entries(), manager.size()) == ([], 0)


# ==== Verify and clear ========================================================================


@pytest.mark.parametrize("size", [1, 100, MiB, MiB + 1, 3 * MiB, 9 * MiB + 7])
def test_verify_finds_one_flipped_bit(size: int, publish: Publish, get: Get, manager: Any) -> None:
    good, bad = get(publish(b"good" * 99, key="good")), get(publish(b"a" * size, key="bad"))
    assert manager.verify() == []
    bad.path.chmod(0o644)
    with open(bad.path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"b")
    assert names(manager.verify()) == ["bad"]
    assert (good.path.exists(), bad.path.exists()) == (True, False)
    assert get("s3://aind-open-data/bad").path.read_bytes() == b"a" * size


def test_verify_finds_a_truncated_entry(hold: Any, manager: Any) -> None:
    path = hold("k", 100)
    path.chmod(0o644)
    os.truncate(path, 50)
    assert names(manager.verify()) == ["k"]
    assert not path.exists()


def test_verify_removes_a_tree_that_is_made_of_damaged_bytes_meanwhile(
    publish: Publish, get: Get, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, check = get(publish(b"data", key="t/k")).path, s3c._is_damaged
    path.chmod(0o644)
    path.write_bytes(b"dead")

    def read_slowly(entry: Any) -> Any:
        get("s3://aind-open-data/t/")
        return check(entry)

    monkeypatch.setattr(s3c, "_is_damaged", read_slowly)
    assert names(manager.verify()) == ["t", "k"]
    assert (get("s3://aind-open-data/t/").path / "k").read_bytes() == b"data"


def test_verify_takes_no_step_on_an_empty_object(publish: Publish, get: Get, manager: Any) -> None:
    assert get(publish(b"")).size == 0
    assert manager.verify() == []


@pytest.mark.root
def test_verify_leaves_what_it_may_not_read(server: Server, public: Path, as_nobody: Any) -> None:
    """Of a group's cache: a colleague's private entry."""
    server.put("b", "k", b"data")
    path = s3c.get_local_path_for_resource(f"{server.url}/b/k?private", cache_dir=public).path
    path.parent.chmod(0o777)
    assert as_nobody(s3c.CacheManager(public).verify) == []
    assert path.read_bytes() == b"data"


@pytest.mark.root
def test_verify_leaves_what_trees_that_it_may_not_look_at_may_hold(
    publish: Publish, public: Path, as_nobody: Any
) -> None:
    localize = partial(s3c.get_local_path_for_resource, cache_dir=public)
    path, tree = localize(publish(b"data", key="t/k")).path, localize("s3://aind-open-data/t/").path
    path.chmod(0o644)
    path.write_bytes(b"dead")
    path.parent.chmod(0o777)
    tree.parent.chmod(0o700)
    with pytest.raises(s3c.CacheError, match="trees: Permission denied"):
        as_nobody(s3c.CacheManager(public).verify)
    assert names(s3c.CacheManager(public).verify()) == ["t", "k"]


REFUSES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#define open declared
#define open64 declared64
#include <fcntl.h>
#undef open
#undef open64
static int refused(const char *path, int flags) {
    return strstr(path, "/objects/") && !(flags & O_DIRECTORY);
}
int open(const char *path, int flags, int mode) {
    static int (*next)(const char *, int, int);
    if (refused(path, flags)) { errno = %(errno)s; return -1; }
    if (!next) next = dlsym(RTLD_NEXT, "open");
    return next(path, flags, mode);
}
int open64(const char *path, int flags, int mode) { return open(path, flags, mode); }
"""


@pytest.mark.parametrize(("number", "gone"), [("EIO", True), ("EMFILE", False)])
def test_verify_takes_no_other_error_for_damage(
    number: str, gone: bool, hold: Any, cache: Path, cli: Run, preload: Any
) -> None:
    path = hold("k", 100)
    done = cli("verify", "--cache-dir", cache, env=preload(REFUSES % {"errno": number}))
    assert done.returncode == 1
    assert (str(path) in done.stdout, path.exists()) == (gone, not gone)
    assert ("Too many open files" in done.stderr) != gone


def test_damaged_files_do_not_stay_for_ever(hold: Any, manager: Any) -> None:
    path = hold("k", 100)
    path.chmod(0o644)
    os.truncate(path, 50)
    age(path, 10 * DAY)
    manager.prune(max_age_days=1)
    assert not path.exists()


def test_clear_removes_all_of_ours(
    hold: Any, tree: Path, get: Get, publish: Publish, manager: Any, cache: Path
) -> None:
    hold("k")
    get("s3://aind-open-data/k", max_age=1e9)
    get(publish(b"x" * 9 * MiB, key="large"))
    (cache / "mine").write_bytes(b"mine")
    manager.clear()
    assert [path.name for path in cache.rglob("*")] == ["mine"]
    assert get("s3://aind-open-data/k").status == "downloaded"


TIDIES = [lambda cache: s3c.CacheManager(cache).prune(1), lambda c: s3c.CacheManager(c).clear()]


@pytest.mark.root
@pytest.mark.parametrize("tidy", TIDIES, ids=["prune", "clear"])
def test_what_may_not_be_removed_keeps_nothing_else(
    tidy: Any, publish: Publish, public: Path, as_nobody: Any
) -> None:
    """Of a group's cache, sticky as NFS exports often are: a colleague's entry."""
    get = partial(s3c.get_local_path_for_resource, cache_dir=public)
    theirs, mine = sorted(get(publish(b"x", key=key)).path for key in "ab")
    os.chown(mine, NOBODY, NOBODY)
    for path in (theirs, mine):
        os.utime(path, (1, 1))
        path.parent.chmod(0o1777)
    with pytest.raises(s3c.CacheError, match=theirs.name):
        as_nobody(partial(tidy, public))
    assert (theirs.exists(), mine.exists()) == (True, False)


@pytest.mark.root
@pytest.mark.parametrize(("tidy", "limits"), [("prune", [1]), ("clear", []), ("verify", [])])
def test_what_may_not_be_listed_keeps_nothing_else(
    tidy: str, limits: list[int], publish: Publish, public: Path, as_nobody: Any
) -> None:
    """Of a group's cache: the shard of a colleague whose umask is strict."""
    get = partial(s3c.get_local_path_for_resource, cache_dir=public)
    theirs, mine = sorted(get(publish(b"x", key=key)).path for key in "ab")
    for path in (mine, mine.parent):
        os.chown(path, NOBODY, NOBODY)
    mine.chmod(0o644)
    mine.write_bytes(b"y")
    os.utime(mine, (1, 1))
    theirs.parent.chmod(0o700)
    with pytest.raises(s3c.CacheError, match=f"{theirs.parent}: Permission denied"):
        as_nobody(lambda: getattr(s3c.CacheManager(public), tidy)(*limits))
    assert (theirs.exists(), mine.exists()) == (True, False)


def test_a_limit_of_time_that_ends_as_a_cache_is_listed_ends_the_call_at_once(
    publish: Publish, get: Get, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken variant: it was taken for a directory of a colleague, and all else went first."""

    def late(_: int, frame: object) -> None:  # as a signal handler is called
        raise TimeoutError("the caller's")

    get(publish(b"x"))
    monkeypatch.setattr(os, "listdir", lambda _: late(0, sys._getframe()))
    with pytest.raises(TimeoutError, match="the caller's"):
        s3c.CacheManager(cache).clear()
    assert (cache / "aind-s3-cache" / "CACHEDIR.TAG").exists()


@pytest.mark.root
def test_prune_does_not_tell_of_a_partial_file_that_stayed(public: Path, as_nobody: Any) -> None:
    data = public / "aind-s3-cache" / "partial" / "0.0.0.data"
    data.parent.mkdir(parents=True)
    data.touch()
    os.utime(data, (1, 1))
    assert as_nobody(s3c.CacheManager(public).prune) == []
    assert data.exists()


@pytest.mark.root
def test_prune_does_not_tell_of_a_tree_that_stayed(
    publish: Publish, public: Path, as_nobody: Any
) -> None:
    """Its owner made it read-only."""
    uri = publish(b"x", key="tree/a").removesuffix("a")
    tree = s3c.get_local_path_for_resource(uri, cache_dir=public).path
    for path in public.rglob("*"):
        os.chown(path, NOBODY, NOBODY)
        os.utime(path, (1, 1))
    tree.chmod(0o555)
    with pytest.raises(s3c.CacheError, match="Not permitted"):
        as_nobody(lambda: s3c.CacheManager(public).prune(1))


@pytest.mark.root
def test_prune_leaves_a_tree_that_it_may_not_look_into(
    server: Server, publish: Publish, public: Path, as_nobody: Any, monkeypatch: Any
) -> None:
    """Of a group's cache: a colleague's private one, which nobody else could remove."""
    publish(b"data", key="t/k")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("://", "://user:password@"))
    tree = s3c.get_local_path_for_resource("s3://aind-open-data/t/", cache_dir=public).path
    for path in (*public.rglob("*"), tree):
        os.utime(path, (1, 1))
        path.chmod(0o777 if path.is_dir() and tree not in (path, *path.parents) else 0o700)
    gone = as_nobody(partial(s3c.CacheManager(public).prune, max_age_days=1))
    assert (names(gone), (tree / "k").read_bytes()) == (["k"], b"data")


def test_clear_leaves_what_is_not_ours(hold: Any, manager: Any, cache: Path) -> None:
    shard = hold("k").parent
    root = cache / "aind-s3-cache"
    there = ("notes.txt", "objects/notes.txt", "more/x", "trees/notes/x", "partial/notes.txt")
    mine = [shard / "notes.txt", *(root / name for name in there)]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    manager.clear()
    assert sorted(path for path in cache.rglob("*") if path.is_file()) == sorted(mine)
    assert (manager.entries(), manager.size()) == ([], 0)


@pytest.mark.parametrize("tidy", ["prune", "clear"])
def test_what_is_not_ours_stays_in_a_folder_that_is_called_as_ours(
    tidy: str, publish: Publish, tmp_path: Path
) -> None:
    """A clone of this project, given as cache_dir."""
    clone = tmp_path / "aind-s3-cache"
    names = ".travis.yml", ".tox/py39", ".tea", ".vimrc", ".updates", "trees/.vimrc"
    mine = [clone / name for name in names]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in clone.rglob("*"):
        os.utime(path, (1, 1))
    s3c.get_local_path_for_resource(publish(b"x"), cache_dir=clone)
    getattr(s3c.CacheManager(clone), tidy)()
    assert [path for path in mine if not path.exists()] == []


@posix
def test_clear_follows_no_link(hold: Any, manager: Any, home: Path) -> None:
    shard = hold("k").parent
    kept = home / "folder" / "kept"
    kept.parent.mkdir()
    kept.write_bytes(b"mine")
    link = shard.parent / "zz"
    link.symlink_to(home)
    (shard.parent.parent / "trees").symlink_to(home)
    manager.clear()
    assert kept.read_bytes() == b"mine"


def test_prune_sweeps_what_crashes_left(hold: Any, manager: Any) -> None:
    """Names as in the layout: a temporary file, and a stamp of an entry that is gone."""
    path = hold("k", used=60)
    young, old = path.with_name(".t0123456789abcdef"), path.with_name(".tfedcba9876543210")
    lone = path.with_name(".u" + path.name.replace("_k", "_gone"))
    for left in (young, old, lone):
        left.touch()
    tree, grows = (path.parents[2] / "trees" / f".t{number:020x}" for number in range(2))
    for folder in (tree / "folder", grows / "folder"):
        folder.mkdir(parents=True)
    for left in (old, lone, tree / "folder", tree, grows):
        os.utime(left, (1, 1))
    manager.prune(max_age_days=30)
    left = [path, young, grows, old, lone, tree]
    assert [p.exists() for p in left] == [True, True, True, False, False, False]
    shutil.rmtree(grows)
    young.unlink()


def test_a_tree_stays_that_is_made_of_a_file_for_longer_than_the_grace(
    publish: Publish, get: Get, manager: Any, cache: Path
) -> None:
    publish(b"k" * 9 * MiB, key="t/k")
    left: list[bool] = []

    def hours_later(_: int) -> None:
        if not left:
            (made,) = (cache / "aind-s3-cache" / "trees").glob(".t*")
            os.utime(made, (1, 1))
            time.sleep(1)
            manager.prune()
            left.append(made.exists())

    tree = get("s3://aind-open-data/t/", progress=hours_later)
    assert ((tree.path / "k").stat().st_size, left) == (9 * MiB, [True])


def test_an_entry_that_is_pruned_as_it_is_served_is_fetched_again(
    hold: Any, get: Get, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold("k", used=60)

    def prune(_: Any, path: str, __: float) -> None:
        os.unlink(path)

    monkeypatch.setattr(s3c._Store, "used", prune)
    result = get("s3://aind-open-data/k", max_age=3600)
    assert (result.status, result.path.exists()) == ("downloaded", True)


def test_prune_sweeps_a_cache_without_entries(manager: Any, cache: Path) -> None:
    shard = cache / "aind-s3-cache" / "objects" / "00"
    shard.mkdir(parents=True)
    left = shard / ".t0123456789abcdef"
    left.touch()
    os.utime(left, (1, 1))
    assert manager.prune() == []
    assert not left.exists()


def test_clear_removes_what_was_put_aside(hold: Any, manager: Any, cache: Path) -> None:
    """A directory in the place of an entry was renamed to make room."""
    aside = hold("k").with_name(".t0123456789abcdef")
    aside.mkdir()
    (aside / "x").touch()
    manager.clear()
    assert list(cache.iterdir()) == []


# ==== Temporary caches ========================================================================


def test_a_temporary_cache_goes_with_its_manager(cache: Path, publish: Publish) -> None:
    cache.mkdir()
    with s3c.CacheManager(cache, persistent=False) as manager:
        s3c.get_local_path_for_resource(publish(b"x"), cache_dir=manager.dir)
        assert manager.dir.parent == cache
        assert len(manager.entries()) == 1
    assert list(cache.iterdir()) == []


def test_a_persistent_cache_stays(hold: Any, manager: Any, cache: Path) -> None:
    path = hold("k")
    manager.close()
    manager.close()
    assert path.exists()
