"""A user's script that names everything public. Only type checkers read it: see check.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from typing_extensions import assert_type

from aind_s3_cache import (
    AccessDeniedError,
    CacheEntry,
    CacheError,
    CacheManager,
    IntegrityError,
    InvalidJSONError,
    LocalizedResource,
    MissingDependencyError,
    NotFoundError,
    OfflineError,
    S3CacheError,
    TransferError,
    as_pathlike,
    as_string,
    get_json,
    get_json_s3,
    get_json_s3_uri,
    get_json_url,
    get_local_path_for_resource,
    get_local_paths_for_resources,
    is_file_path,
    is_url,
    join_any,
    main,
    parse_s3_uri,
)

URI = "s3://aind-open-data/a/metadata.json"


def entries(cache_dir: Path) -> None:
    assert_type(CacheManager(cache_dir).entries(), list[CacheEntry])


def localize(cache_dir: Path, count: Callable[[int], object], s3_client: Any) -> None:
    result = get_local_path_for_resource(
        URI,
        cache_dir=cache_dir,
        s3_client=s3_client,
        anonymous=True,
        max_concurrency=4,
        multipart_threshold_bytes=1 << 20,
        max_age=60,
        offline=False,
        stale_if_error=True,
        version_id="v1",
        progress=count,
    )
    assert_type(result, LocalizedResource)
    assert_type(result.path, Path)
    assert_type(result.from_cache, bool)
    etag: str | None = result.etag
    size: int | None = result.size
    words: tuple[str, ...] = (result.source, result.status)
    with open(result) as file:
        assert_type(file.read(), str)
    print(etag, size, words, result.uri, os.fspath(result))
    get_local_path_for_resource(Path("here"), progress=True)
    get_local_path_for_resource(result)


def localize_many(uris: list[str]) -> None:
    for result in get_local_paths_for_resources(uris, max_workers=2, anonymous=True):
        assert_type(result, LocalizedResource)
    with ThreadPoolExecutor() as pool:
        get_local_paths_for_resources(iter(uris), executor=pool, progress=True, max_age=5)


def manage() -> None:
    with CacheManager("~/.cache", persistent=True) as cache:
        assert_type(cache, CacheManager)
        assert_type(cache.dir, Path)
    cache.close()


def read_json() -> None:
    assert_type(get_json(URI), dict[str, Any])
    assert_type(get_json("bucket", "key", anonymous=False), dict[str, Any])
    assert_type(get_json_s3("bucket", "key", anonymous=True), dict[str, Any])
    assert_type(get_json_s3_uri(URI, None, True), dict[str, Any])
    assert_type(get_json_url("https://example.com/a.json"), dict[str, Any])


def name_things() -> None:
    assert_type(parse_s3_uri(URI), tuple[str, str])
    assert_type(is_url(URI), bool)
    assert_type(is_file_path("/a"), bool)
    kind, bucket, path = as_pathlike(URI)
    assert_type(as_string(kind, bucket, path / "more.json"), str)
    assert_type(join_any(URI, "a", "b"), str)


def fail() -> int | None:
    try:
        return main(["dir"])
    except (AccessDeniedError, NotFoundError) as error:
        missing: FileNotFoundError = error
        print(missing.filename, error.uri, error.code)
    except (TransferError, OfflineError) as error:
        offline: ConnectionError = error
        print(offline)
    except (CacheError, IntegrityError) as error:
        local: OSError = error
        print(local.errno)
    except InvalidJSONError as error:
        value: ValueError = error
        print(value)
    except MissingDependencyError as error:
        print(error.name)
    except S3CacheError as error:
        status: int | None = error.status
        return status
    return None
