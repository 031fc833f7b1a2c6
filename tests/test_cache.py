"""One resource in the cache: requests, statuses, names, ages, offline, versions, directories."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import shutil
import stat
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable
from urllib.parse import quote

import pytest
from conftest import BUCKET, NOBODY, Publish, Run, files_below, posix
from server import Server
from subject import s3c

TICK = 0.02  # seconds: the clock of a file system tells two versions apart after some milliseconds


class Getter:
    """`get(uri, **options)` from the test's cache directory."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def __call__(self, uri: Any, **options: Any) -> Any:
        return s3c.get_local_path_for_resource(uri, **{"cache_dir": self.cache, **options})


@pytest.fixture
def get(cache: Path) -> Getter:
    return Getter(cache)


def shift_clocks(path: Path, seconds: float) -> None:
    """Move the times of all that the cache holds."""
    for found in path.rglob("*"):
        at = found.stat().st_mtime + seconds
        os.utime(found, (at, at))


# ==== Requests, as the server counts them =====================================================


def test_a_miss_is_one_ranged_get_on_one_connection(
    server: Server, publish: Publish, get: Getter
) -> None:
    get(publish({"a": 1}))
    assert [(r.method, r.headers["range"][:8]) for r in server.seen] == [("GET", "bytes=0-")]
    assert server.connections == 1


def test_up_to_a_mib_is_one_request_whatever_the_threshold(
    server: Server, publish: Publish, get: Getter
) -> None:
    get(publish(bytes(900_000)), multipart_threshold_bytes=256 << 10)
    assert len(server.seen) == 1


def test_a_server_that_is_far_is_not_asked_for_little(
    server: Server, publish: Publish, get: Getter
) -> None:
    """A variant whose last ranges are of one chunk each asks 80 times, and takes twice as long."""
    uri = publish(bytes(32 << 20))
    server.latency = 0.05
    get(uri)
    assert len(server.seen) <= 30


def test_a_hit_is_one_conditional_get_on_the_kept_connection(
    server: Server, publish: Publish, get: Getter
) -> None:
    uri = publish(b"12345", etag='"v1"')
    get(uri)
    get(uri)
    assert [r.headers.get("if-none-match") for r in server.seen] == [None, '"v1"']
    assert (server.connections, server.bytes_sent) == (1, 5)


@pytest.mark.parametrize("options", [{"max_age": 60}, {"offline": True}], ids=str)
def test_what_need_not_be_asked_sends_nothing(
    server: Server, publish: Publish, get: Getter, options: dict[str, Any]
) -> None:
    uri = publish({"a": 1})
    get(uri)
    server.reset()
    result = get(uri, **options)
    assert (result.status, result.from_cache, server.seen) == ("fresh", True, [])
    assert server.connections == 0


def test_an_object_of_a_few_megabytes_is_one_request_too(
    server: Server, publish: Publish, get: Getter
) -> None:
    uri = publish(os.urandom(3 << 20))
    get(uri)
    assert len(server.seen) == 1
    get(uri)
    assert len(server.seen) == 2


def test_an_empty_object_is_cached(server: Server, publish: Publish, get: Getter) -> None:
    uri = publish(b"", "empty.txt")
    first, second = get(uri), get(uri)
    assert first.path.read_bytes() == b""
    assert (first.status, second.status, second.size) == ("downloaded", "revalidated", 0)
    assert len(server.seen) <= 3  # 416, then once without a range; a hit is one


def test_threads_that_miss_together_download_once(
    server: Server, publish: Publish, get: Getter
) -> None:
    uri, results = publish(b"x" * 1000), []
    server.latency = 0.05
    threads = [threading.Thread(target=lambda: results.append(get(uri))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.path for result in results}) == 1
    assert server.bytes_sent == 1000


# ==== What the result says ====================================================================


def test_the_first_call_downloads_and_later_ones_revalidate(publish: Publish, get: Getter) -> None:
    uri = publish(b"data", "a/b.bin", etag='"v1"')
    first, second = get(uri), get(uri)
    assert (first.from_cache, first.status) == (False, "downloaded")
    assert (second.from_cache, second.status) == (True, "revalidated")
    assert (first.source, first.uri, first.etag, first.size) == ("s3", uri, '"v1"', 4)
    assert first.path == second.path


def test_the_path_is_absolute_and_holds_the_bytes(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = s3c.get_local_path_for_resource(publish(b"data"), cache_dir="relative")
    assert result.path.is_absolute()
    assert isinstance(result.path, Path)
    assert result.path.read_bytes() == b"data"
    assert (tmp_path / "relative") in result.path.parents


@posix
def test_a_published_file_is_read_only(publish: Publish, get: Getter) -> None:
    for size in (10, 3 << 20, 9 << 20):
        mode = get(publish(bytes(size), f"{size}.bin")).path.stat().st_mode
        assert not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)


def test_a_changed_object_gets_a_new_path_and_the_old_one_stays(
    publish: Publish, get: Getter
) -> None:
    old = get(publish(b"first"))
    new = get(publish(b"second"))
    assert (new.status, new.from_cache) == ("downloaded", False)
    assert old.path != new.path
    assert (old.path.read_bytes(), new.path.read_bytes()) == (b"first", b"second")


@pytest.mark.parametrize("size", [5, 2 << 20, 9 << 20])
def test_an_object_that_changes_back_is_served_from_what_is_held(
    server: Server, publish: Publish, get: Getter, size: int
) -> None:
    first = get(publish(b"A" * size))
    get(publish(b"B" * size))
    server.rate = 4e6  # a client that stops early is then seen to
    server.reset()
    again = get(publish(b"A" * size))
    assert (again.path, again.status, again.from_cache) == (first.path, "revalidated", True)
    assert again.path.read_bytes() == b"A" * size
    assert len(server.seen) == 1
    assert server.bytes_sent <= 1 << 20


def test_the_version_that_came_back_is_the_newest(
    server: Server, publish: Publish, get: Getter
) -> None:
    for name in ("k", "a", "z", "k"):  # not in the order of their names, either way
        uri = publish(name, etag=f'"{name}"')
        get(uri)
        time.sleep(TICK)
    assert get(uri, offline=True).path.read_bytes() == b"k"
    get(uri)
    assert server.seen[-1].headers["if-none-match"] == '"k"'


def test_two_objects_with_one_etag_are_two_entries(publish: Publish, get: Getter) -> None:
    one = get(publish(b"one", "one.txt", etag='"same"'))
    two = get(publish(b"two", "two.txt", etag='"same"'))
    other = get(publish(b"six", "one.txt", "other-bucket", etag='"same"'))
    assert [r.path.read_bytes() for r in (one, two, other)] == [b"one", b"two", b"six"]


def test_the_same_name_on_another_endpoint_is_another_object(
    publish: Publish, get: Getter, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = publish(b"here", etag='"same"')
    get(uri)
    with Server() as elsewhere:
        elsewhere.put(BUCKET, "data.json", b"there", etag='"same"')
        monkeypatch.setenv("AWS_ENDPOINT_URL", elsewhere.url)
        assert get(uri).path.read_bytes() == b"there"


def test_an_entry_that_was_deleted_is_downloaded_again(publish: Publish, get: Getter) -> None:
    uri = publish(b"data")
    get(uri).path.unlink()
    again = get(uri)
    assert (again.status, again.path.read_bytes()) == ("downloaded", b"data")


def test_an_entry_that_was_cut_short_is_downloaded_again(publish: Publish, get: Getter) -> None:
    uri = publish(b"data")
    path = get(uri).path
    path.unlink()
    path.write_bytes(b"da")
    again = get(uri)
    assert (again.status, again.path.read_bytes()) == ("downloaded", b"data")


def test_an_entry_that_goes_while_the_server_says_unchanged_is_fetched(
    server: Server, publish: Publish, get: Getter
) -> None:
    uri = publish(b"data")
    path = get(uri).path
    server.before = lambda _: path.unlink() if path.exists() else None
    again = get(uri)
    assert (again.status, again.path.read_bytes()) == ("downloaded", b"data")
    assert [r.headers.get("if-none-match") for r in server.seen[2:]] == [None]


# ==== A result as a value =====================================================================


def test_a_result_is_a_path_like(publish: Publish, get: Getter) -> None:
    result = get(publish({"a": [1]}))
    with open(result) as file:
        assert json.load(file) == {"a": [1]}
    assert os.fspath(result) == str(result.path)
    assert s3c.get_json(result) == {"a": [1]}


def test_a_result_survives_pickling_and_copying(publish: Publish, get: Getter) -> None:
    result = get(publish(b"data"))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(result, protocol)) == result
    assert copy.copy(result) == copy.deepcopy(result) == result


def test_a_result_compares_by_value(publish: Publish, get: Getter) -> None:
    uri = publish(b"data")
    get(uri)
    one, two = get(uri), get(uri)
    assert one == two
    assert len({one, two}) == 1
    assert one != get(uri, max_age=60)
    assert one != one.path


def test_a_result_cannot_be_changed(publish: Publish, get: Getter) -> None:
    result = get(publish(b"data"))
    for name in ("path", "status", "from_cache", "another"):
        with pytest.raises(AttributeError):
            setattr(result, name, "x")
    with pytest.raises(AttributeError):
        del result.status


def test_a_result_shows_path_size_and_status(publish: Publish, get: Getter) -> None:
    result = get(publish(b"data"))
    for part in ("LocalizedResource(", str(result.path), "'downloaded'", "size=4", "'s3'"):
        assert part in repr(result)


def test_a_result_can_be_made_as_in_0_1() -> None:
    result = s3c.LocalizedResource(path=Path("/x"), from_cache=True, source="s3")
    assert (result.path, result.from_cache, result.source) == (Path("/x"), True, "s3")
    assert result == s3c.LocalizedResource(Path("/x"), True, "s3")
    assert result.__match_args__[:3] == ("path", "from_cache", "source")


# ==== Names ===================================================================================

NASTY_KEYS = [
    "..",
    "../../../../escape.txt",
    "a/../b.txt",
    "/leading.txt",
    "//two/leading.txt",
    "a//b///c.txt",
    "hash#fragment.json",
    "question?versionId=1&x=2",
    "percent%2Fcoded%.json",
    "plus+and space.txt",
    "semi;colon,comma=@!$'()*[]~.txt",
    "C:\\Windows\\system32.txt",
    "\\\\server\\share\\x.txt",
    "CON",
    "aux.json",
    "trailing.dots...",
    "trailing space ",
    "-rf",
    ".hidden",
    ".t0123456789abcdef",
    "new\nline\ttab.txt",
    "bell\x07.txt",
    'quote"<tag>|pipe.txt',
    "$HOME/`id`.txt",
    "ünïcödé/日本語/😀.json",
    "a" * 1024,
    "é" * 512,
    "d/" * 500 + "x.nii.gz",
    "x" * 300 + ".nii.gz",
    "_".join("abcdefgh"),
    "s3://bucket/key",
    "http://example.com/x?y#z",
]


@pytest.mark.parametrize("key", NASTY_KEYS, ids=lambda key: ascii(key)[1:30])
def test_any_key_is_asked_for_exactly_and_kept_inside_the_cache(
    server: Server, publish: Publish, get: Getter, key: str
) -> None:
    content = key.encode()
    uri = publish(content, key)
    first, second = get(uri), get(uri)
    assert {r.path for r in server.seen} == {f"/{BUCKET}/{key}"}
    assert first.path.read_bytes() == content
    assert (second.path, second.status) == (first.path, "revalidated")
    assert (get.cache / "aind-s3-cache").resolve() in first.path.resolve().parents


@pytest.mark.parametrize("key", NASTY_KEYS, ids=lambda key: ascii(key)[1:30])
def test_a_file_name_is_one_that_every_file_system_can_hold(
    publish: Publish, get: Getter, key: str
) -> None:
    name = get(publish(b"x", key)).path.name
    assert name.isascii()
    assert not set(name) & set('<>:"/\\|?*#%\n\t\x07 ')
    assert name[0] not in ".-"
    assert not name.endswith(".")
    assert len(name) <= 250
    assert len(name.partition(".")[0]) > 4  # so that it is no device of Windows


@pytest.mark.parametrize(
    ("key", "end"),
    [
        ("a/b/brain.nii.gz", "brain.nii.gz"),
        ("data.ome.zarr/.zattrs", ".zattrs"),
        ("x" * 500 + ".nii.gz", "xxxxx.nii.gz"),
        ("hash#1.json", "hash_1.json"),
        ("white space.json", "white_space.json"),
        ("back\\slash.tiff", "slash.tiff"),
        ("naïve.csv", "na_ve.csv"),
        ("UPPER_lower-1.JSON", "UPPER_lower-1.JSON"),
    ],
)
def test_a_path_ends_in_the_objects_own_name(
    publish: Publish, get: Getter, key: str, end: str
) -> None:
    assert get(publish(b"x", key)).path.name.endswith(end)


@pytest.mark.parametrize(
    "keys",
    [
        ("Data.json", "data.json"),
        ("caf\u00e9.json", "cafe\u0301.json"),
        ("a/b.json", "a//b.json", "/a/b.json", "a/b.json/"[:-1] + "?"),
        ("a%2Fb", "a/b", "a%2fb"),
        ("a b", "a+b", "a%20b"),
        ("x" * 1024, "x" * 1023 + "y"),
    ],
    ids=lambda keys: ascii(keys[0])[:20],
)
def test_keys_that_look_alike_are_different_entries(
    publish: Publish, get: Getter, keys: tuple[str, ...]
) -> None:
    results = [get(publish(key.encode(), key, etag='"same"')) for key in keys]
    assert [r.path.read_bytes() for r in results] == [key.encode() for key in keys]
    folded = {str(r.path).casefold() for r in results}
    assert len(folded) == len(keys), "they would meet on a file system that folds case"


def test_etags_of_any_form_name_an_entry(publish: Publish, get: Getter) -> None:
    for etag in ('"../../x"', '"a/b\\c"', 'W/"weak"', "bare", '"%s"' % ("e" * 200), '""'):
        uri = publish(etag.encode(), etag=etag)
        path = get(uri).path
        assert path.read_bytes() == etag.encode()
        assert get.cache in path.parents
        assert get(uri).path == path


# ==== Ages ====================================================================================


def test_after_max_age_the_server_is_asked(server: Server, publish: Publish, get: Getter) -> None:
    uri = publish(b"data")
    get(uri)
    shift_clocks(get.cache, -61)
    assert get(uri, max_age=60).status == "revalidated"
    assert len(server.seen) == 2


def test_each_confirmation_renews_max_age(server: Server, publish: Publish, get: Getter) -> None:
    uri = publish(b"data")
    get(uri)
    shift_clocks(get.cache, -3600)
    get(uri)
    server.reset()
    assert get(uri, max_age=60).status == "fresh"
    assert server.seen == []


def test_a_use_without_asking_does_not_renew_max_age(publish: Publish, get: Getter) -> None:
    uri = publish(b"data")
    get(uri)
    shift_clocks(get.cache, -7200)
    assert get(uri, max_age=10_000).status == "fresh"
    assert get(uri, offline=True).status == "fresh"
    assert get(uri, max_age=60).status == "revalidated"


def test_a_stamp_from_the_future_is_not_trusted(publish: Publish, get: Getter) -> None:
    uri = publish(b"data")
    get(uri)
    shift_clocks(get.cache, 86400)
    assert get(uri, max_age=60).status == "revalidated"


def test_max_age_counts_in_real_time(publish: Publish, get: Getter) -> None:
    uri = publish(b"data")
    get(uri)
    assert get(uri, max_age=30).status == "fresh"
    time.sleep(0.3)
    assert get(uri, max_age=0.2).status == "revalidated"


def test_within_max_age_the_newest_version_is_served(publish: Publish, get: Getter) -> None:
    for name in ("a", "z", "k"):
        uri = publish(name, etag=f'"{name}"')
        get(uri)
        time.sleep(TICK)
    assert get(uri, max_age=60).path.read_bytes() == b"k"


# ==== Offline =================================================================================


def test_offline_serves_what_is_held_however_old(
    server: Server, publish: Publish, get: Getter
) -> None:
    uri = publish(b"data")
    get(uri)
    server.close()
    shift_clocks(get.cache, -1e8)
    result = get(uri, offline=True)
    assert (result.status, result.path.read_bytes()) == ("fresh", b"data")


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_offline_can_be_said_by_the_environment(
    server: Server, publish: Publish, get: Getter, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    uri = publish(b"data")
    get(uri)
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", value)
    assert get(uri).status == "fresh"
    with pytest.raises(s3c.OfflineError):
        get(publish(b"other", "other.txt"))
    assert len(server.seen) == 1


def test_an_environment_that_somebody_replaced_by_a_dict_is_read(
    get: Getter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "AIND_S3_CACHE_OFFLINE": "1"})
    with pytest.raises(s3c.OfflineError):
        get(f"s3://{BUCKET}/key")


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_the_environment_can_leave_it_online(
    publish: Publish, get: Getter, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("AIND_S3_CACHE_OFFLINE", value)
    assert get(publish(b"data")).status == "downloaded"


@pytest.mark.parametrize("uri", [f"s3://{BUCKET}/x", "http://127.0.0.1:9/x", f"s3://{BUCKET}/t/"])
def test_offline_without_a_copy_is_an_error_that_writes_nothing(get: Getter, uri: str) -> None:
    with pytest.raises(s3c.OfflineError, match="offline") as caught:
        get(uri, offline=True)
    assert caught.value.uri == uri
    assert issubclass(s3c.OfflineError, ConnectionError)
    assert not get.cache.exists()


# ==== Stale, if there is an error =============================================================


def test_an_unreachable_server_leaves_the_stale_copy_and_a_warning(
    server: Server,
    publish: Publish,
    get: Getter,
    quick: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    uri = publish(b"data")
    get(uri)
    server.close()
    result = get(uri, stale_if_error=True)
    assert (result.status, result.from_cache, result.path.read_bytes()) == ("stale", True, b"data")
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.name == s3c.__name__
    assert uri in record.getMessage()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_failing_server_leaves_the_stale_copy(
    server: Server, publish: Publish, get: Getter, quick: None, status: int
) -> None:
    uri = publish(b"data")
    get(uri)
    server.always(status)
    assert get(uri, stale_if_error=True).status == "stale"
    assert len(server.seen) > 2, "it was retried first"
    with pytest.raises(s3c.TransferError):
        get(uri)


@pytest.mark.parametrize("code", ["NoSuchKey", "NoSuchBucket", "AccessDenied"])
def test_a_server_that_says_no_is_believed(
    server: Server, publish: Publish, get: Getter, code: str
) -> None:
    uri = publish(b"data")
    get(uri)
    server.always(403 if code == "AccessDenied" else 404, code=code)
    with pytest.raises(FileNotFoundError) as caught:
        get(uri, stale_if_error=True)
    assert caught.value.code == code  # type: ignore[attr-defined]


def test_stale_if_error_without_a_copy_is_the_error(
    server: Server, publish: Publish, get: Getter, quick: None
) -> None:
    server.always(503)
    with pytest.raises(s3c.TransferError) as caught:
        get(publish(b"data"), stale_if_error=True)
    assert caught.value.status == 503


def test_a_copy_that_a_peer_prunes_while_the_server_fails_is_no_stale_copy(
    server: Server, publish: Publish, get: Getter, quick: None
) -> None:
    uri = publish(b"data")
    path = get(uri).path
    server.before = lambda _: path.unlink(missing_ok=True) or (503,)
    with pytest.raises(s3c.TransferError):
        get(uri, stale_if_error=True)


def test_a_copy_that_a_peer_prunes_as_it_is_chosen_is_no_stale_copy(
    server: Server,
    publish: Publish,
    get: Getter,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = publish(b"data")
    get(uri)
    server.always(503)
    monkeypatch.setattr(s3c._Store, "used", lambda self, path, stamp: os.unlink(path))
    with pytest.raises(s3c.TransferError):
        get(uri, stale_if_error=True)


def test_a_server_that_recovers_within_the_retries_is_not_stale(
    server: Server, publish: Publish, get: Getter, quick: None
) -> None:
    uri = publish(b"data")
    get(uri)
    server.say(503).say(429)
    assert get(uri, stale_if_error=True).status == "revalidated"


# ==== Versions ================================================================================


@pytest.fixture
def versions(publish: Publish) -> str:
    publish(b"one", version="v1+/=")
    return publish(b"two", version="v2")


def test_a_version_is_asked_for_by_its_id(server: Server, versions: str, get: Getter) -> None:
    assert get(versions, version_id="v1+/=").path.read_bytes() == b"one"
    assert get(versions, version_id="v2").path.read_bytes() == b"two"
    assert [r.query for r in server.seen] == [{"versionId": "v1+/="}, {"versionId": "v2"}]


def test_a_version_never_stands_in_for_the_current_object(versions: str, get: Getter) -> None:
    get(versions, version_id="v1+/=")
    with pytest.raises(s3c.OfflineError):
        get(versions, offline=True)
    assert get(versions).path.read_bytes() == b"two"
    assert get(versions, version_id="v1+/=", offline=True).path.read_bytes() == b"one"


def test_a_missing_version_is_not_found(versions: str, get: Getter) -> None:
    with pytest.raises(s3c.NotFoundError) as caught:
        get(versions, version_id="v9")
    assert caught.value.code == "NoSuchVersion"


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9/x", "/tmp", f"s3://{BUCKET}/tree/"])
def test_a_version_is_for_single_objects_only(get: Getter, uri: str) -> None:
    with pytest.raises(ValueError, match="version_id"):
        get(uri, version_id="v1")


# ==== URLs ====================================================================================


def test_a_url_is_cached_by_its_etag(server: Server, publish: Publish, get: Getter) -> None:
    publish(b"data", "file.nii.gz")
    url = f"{server.url}/{BUCKET}/file.nii.gz"
    first, second = get(url), get(url)
    assert (first.source, first.status, second.status) == ("http", "downloaded", "revalidated")
    assert first.path.name.endswith("file.nii.gz")
    assert len(server.seen) == 2


def test_a_url_without_etag_is_validated_by_its_date(
    server: Server, publish: Publish, get: Getter
) -> None:
    publish(b"data", etag=None)
    url = f"{server.url}/{BUCKET}/data.json"
    get(url)
    assert get(url).status == "revalidated"
    assert "if-modified-since" in server.seen[-1].headers
    publish(b"DATA", etag=None)
    assert get(url).path.read_bytes() == b"DATA"


def test_a_url_without_any_validator_is_downloaded_anew(
    server: Server, publish: Publish, get: Getter
) -> None:
    url = f"{server.url}/{BUCKET}/data.json"
    for content in (b"one", b"one", b"two"):
        publish(content, etag=None, headers={"Last-Modified": None})
        result = get(url)
        assert (result.status, result.path.read_bytes()) == ("downloaded", content)
        time.sleep(0.02)  # the file system's clock tells which came last
    assert get(url, offline=True).path.read_bytes() == b"two"


def test_queries_of_a_url_tell_entries_apart_and_are_never_shown(
    server: Server, get: Getter
) -> None:
    server.always(200, b"data", etag='"e"')
    one, two = (get(f"{server.url}/x.json?X-Amz-Signature={sig}") for sig in ("s3cr3t1", "s3cr3t2"))
    assert one.path != two.path
    assert "s3cr3t" not in f"{one} {two} {one.path} {two.path} {files_below(get.cache)}"


# ==== Local paths =============================================================================


@pytest.mark.parametrize("form", [str, Path, lambda p: p.as_uri(), lambda p: f"file:{p}"])
def test_a_local_path_is_returned_as_it_is(
    tmp_path: Path, get: Getter, form: Callable[[Path], Any]
) -> None:
    path = tmp_path / "has space.json"
    path.write_bytes(b"{}")
    result = get(form(path))
    assert (result.path, result.source, result.status) == (path, "local", "local")
    assert result.size == 2
    assert not get.cache.exists()


def test_a_file_uri_is_unquoted(tmp_path: Path, get: Getter) -> None:
    path = tmp_path / "50% #1?.json"
    path.write_bytes(b"{}")
    assert get("file://" + quote(str(path))).path == path


def test_a_local_path_may_begin_with_a_tilde(home: Path, get: Getter) -> None:
    (home / "x.json").write_bytes(b"{}")
    assert get("~/x.json").path == home / "x.json"


def test_a_local_directory_is_returned(tmp_path: Path, get: Getter) -> None:
    assert get(tmp_path).path == tmp_path


def test_a_relative_path_becomes_absolute(
    tmp_path: Path, get: Getter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_bytes(b"{}")
    assert get("x.json").path == tmp_path / "x.json"


@pytest.mark.parametrize("path", ["missing.json", "file:///missing.json", "", "x\0y", "x" * 5000])
def test_a_missing_local_path_is_not_found(get: Getter, path: str) -> None:
    with pytest.raises(FileNotFoundError, match="Local path not found"):
        get(path)


# ==== Bad input ===============================================================================


def test_a_cache_directory_that_is_a_file_is_named(publish: Publish, tmp_path: Path) -> None:
    path = tmp_path / "a-file"
    path.write_bytes(b"")
    with pytest.raises(s3c.CacheError, match="a-file") as caught:
        s3c.get_local_path_for_resource(publish(b"x"), cache_dir=path)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno is not None
    with pytest.raises(s3c.CacheError, match="a-file"):
        s3c.CacheManager(path)


def test_a_missing_object_is_not_found_and_leaves_nothing(publish: Publish, get: Getter) -> None:
    publish(b"x")
    with pytest.raises(s3c.NotFoundError, match="S3 object not found or inaccessible") as caught:
        get(f"s3://{BUCKET}/missing.json")
    assert (caught.value.code, caught.value.status) == ("NoSuchKey", 404)
    assert files_below(get.cache) == []


def test_an_object_that_was_removed_is_not_served(
    server: Server, publish: Publish, get: Getter
) -> None:
    uri = publish(b"x")
    path = get(uri).path
    server.delete(BUCKET, "data.json")
    with pytest.raises(s3c.NotFoundError):
        get(uri)
    assert path.read_bytes() == b"x"


# ==== Where caches live =======================================================================


def default_root(publish: Publish) -> Path:
    path: Path = s3c.get_local_path_for_resource(publish(b"x")).path
    return path.parents[[p.name for p in path.parents].index("aind-s3-cache")].parent


@pytest.mark.parametrize(
    ("env", "where"),
    [
        ({}, "home/.cache"),
        ({"XDG_CACHE_HOME": "{tmp}/xdg"}, "xdg"),
        ({"XDG_CACHE_HOME": "{tmp}/xdg", "AIND_S3_CACHE_DIR": "{tmp}/own"}, "own"),
        ({"AIND_S3_CACHE_DIR": "~/own"}, "home/own"),
        ({"AIND_S3_CACHE_DIR": "", "XDG_CACHE_HOME": ""}, "home/.cache"),
        ({"XDG_CACHE_HOME": "relative"}, "home/.cache"),  # the XDG specification: ignore it
    ],
    ids=str,
)
@pytest.mark.skipif(sys.platform == "win32", reason="LOCALAPPDATA stands in for .cache there")
def test_the_environment_says_where_the_cache_is(
    publish: Publish,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    where: str,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    assert default_root(publish) == tmp_path / where
    folder = "" if env.get("AIND_S3_CACHE_DIR") else "aind-s3-cache"
    assert s3c.CacheManager().dir == tmp_path / where / folder


def test_what_others_keep_in_the_default_place_is_not_in_the_managers_directory(
    publish: Publish, home: Path
) -> None:
    (home / ".cache" / "pip").mkdir(parents=True)
    path = s3c.get_local_path_for_resource(publish(b"x")).path
    manager = s3c.CacheManager()
    assert manager.dir in path.parents
    shutil.rmtree(manager.dir)  # as 0.1's users clear their caches
    assert os.listdir(home / ".cache") == ["pip"]


def test_our_own_folder_as_cache_dir_is_the_cache(publish: Publish, get: Getter) -> None:
    uri = publish(b"x")
    folder = get.cache / "aind-s3-cache"
    assert s3c.CacheManager(folder).dir == folder
    path = get(uri, cache_dir=folder).path
    assert path == get(uri).path
    s3c.CacheManager(folder).clear()
    assert os.listdir(get.cache) == ["aind-s3-cache"]
    assert os.listdir(folder) == []


@pytest.mark.parametrize("named", ["s3://bucket/key", "file:///cache"])
def test_a_variable_that_names_no_directory_makes_none(
    named: str, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for `cache_dir`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIND_S3_CACHE_DIR", named)
    before = os.listdir()
    with pytest.raises(ValueError, match=f"AIND_S3_CACHE_DIR must be a directory, not {named!r}"):
        s3c.get_local_path_for_resource(publish(b"x"))
    assert os.listdir() == before


def test_a_relative_cache_dir_of_the_environment_counts_from_here(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AIND_S3_CACHE_DIR", "near")
    assert default_root(publish) == tmp_path / "near" == s3c.CacheManager().dir


@posix
def test_without_a_usable_home_the_cache_is_a_private_temporary_one(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    root = default_root(publish)
    assert root.parent == tmp_path
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert s3c.CacheManager().dir == root / "aind-s3-cache"


def test_all_of_ours_is_in_one_tagged_folder(publish: Publish, get: Getter) -> None:
    get(publish(b"x"))
    assert os.listdir(get.cache) == ["aind-s3-cache"]
    tag = (get.cache / "aind-s3-cache" / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_a_hit_makes_no_new_file(publish: Publish, get: Getter) -> None:
    uri = publish(b"x")
    get(uri)
    before = files_below(get.cache)
    get(uri)
    get(uri, max_age=60)
    assert files_below(get.cache) == before


# ==== CacheManager ============================================================================


def test_a_temporary_cache_is_gone_at_the_end(publish: Publish) -> None:
    with s3c.CacheManager(persistent=False) as manager:
        result = s3c.get_local_path_for_resource(publish(b"x"), cache_dir=manager.dir)
        assert manager.dir in result.path.parents
    assert not manager.dir.exists()


def test_a_temporary_cache_may_lie_in_a_directory_that_stays(
    publish: Publish, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    with s3c.CacheManager(base, persistent=False) as manager:
        assert manager.dir.parent == base
        s3c.get_local_path_for_resource(publish(b"x"), cache_dir=manager.dir)
    assert os.listdir(base) == []


def test_a_temporary_cache_goes_with_the_interpreter(run_python: Run) -> None:
    code = "import SUBJECT as s3c; m = s3c.CacheManager(persistent=False); print(m.dir)"
    assert not Path(run_python(code).stdout.strip()).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_leaves_its_parents_temporary_cache(run_python: Run) -> None:
    code = """
import os, sys, warnings, SUBJECT as s3c
warnings.simplefilter("ignore", DeprecationWarning)
manager = s3c.CacheManager(persistent=False)
pid = os.fork()
if not pid:
    sys.exit(0)
os.waitpid(pid, 0)
print(manager.dir.exists())
"""
    assert run_python(code).stdout == "True\n"


def test_a_temporary_cache_goes_in_the_midst_of_an_import(run_python: Run) -> None:
    """As when a finalizer or a signal handler comes while a first request imports."""
    code = """
import SUBJECT as s3c
with s3c._IMPORTS:
    s3c.CacheManager(persistent=False).close()
"""
    run_python(code, timeout=10)


def test_what_is_read_only_in_a_temporary_cache_goes_too(as_nobody: Any, public: Path) -> None:
    def leaves_something() -> bool:
        with s3c.CacheManager(public, persistent=False) as manager:
            for name, mode in (("closed", 0o000), ("read-only", 0o555)):
                (manager.dir / name / "below").mkdir(parents=True)
                (manager.dir / name).chmod(mode)
        return bool(manager.dir.exists())

    os.chown(public, NOBODY, NOBODY)
    assert as_nobody(leaves_something) is False
    assert public.stat().st_mode & 0o777 == 0o755


def test_a_temporary_cache_goes_when_the_block_fails(publish: Publish) -> None:
    manager = s3c.CacheManager(persistent=False)
    with pytest.raises(s3c.NotFoundError), manager:
        s3c.get_local_path_for_resource(publish(b"x") + "-missing", cache_dir=manager.dir)
    assert not manager.dir.exists()


def test_a_persistent_cache_stays(publish: Publish, home: Path) -> None:
    for expected in ("downloaded", "revalidated"):
        with s3c.CacheManager(cache_dir="~/.aind_zarr_cache") as manager:
            assert manager.dir == home / ".aind_zarr_cache"
            result = s3c.get_local_path_for_resource(publish(b"x"), cache_dir=manager.dir)
        assert result.status == expected
        assert result.path.exists()


def test_close_may_be_called_again() -> None:
    manager = s3c.CacheManager(persistent=False)
    manager.close()
    manager.close()
    assert not manager.dir.exists()


def test_a_cache_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b" / "c"
    assert s3c.CacheManager(deep).dir == deep
    assert deep.is_dir()


@pytest.mark.skipif(os.name == "nt", reason="there a path loses its dots before any link is met")
def test_dots_behind_a_symbolic_link_name_the_directory_that_they_lead_to(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    monkeypatch.chdir(tmp_path)
    for cache_dir in ("link/../cache", tmp_path / "link" / ".." / "cache"):
        result = s3c.get_local_path_for_resource(publish(b"x"), cache_dir=cache_dir)
        assert (tmp_path / "far" / "cache").resolve() in result.path.parents
        assert s3c.CacheManager(cache_dir).dir == (tmp_path / "far" / "cache").resolve()


def test_a_tilde_and_a_path_like_are_taken_as_cache_dir(publish: Publish, home: Path) -> None:
    uri = publish(b"x")
    one = s3c.get_local_path_for_resource(uri, cache_dir="~/.cache")
    two = s3c.get_local_path_for_resource(uri, cache_dir=home / ".cache")
    assert one.path == two.path
    assert home / ".cache" / "aind-s3-cache" in one.path.parents


def test_a_manager_tells_what_its_cache_holds(publish: Publish, get: Getter) -> None:
    paths = [str(get(publish(b"x" * size, f"{size}.bin")).path) for size in (3, 5)]
    manager = s3c.CacheManager(get.cache)
    assert sorted(e.path for e in manager.entries()) == sorted(paths)
    assert manager.size() == 8
    manager.clear()
    assert manager.entries() == []
    assert get.cache.is_dir()
