"""Imports as users of 0.1 wrote them: submodules, which only the installed wheel has stubs for."""

from __future__ import annotations

from typing import Any

from typing_extensions import assert_type

from aind_s3_cache.json_utils import get_json, get_json_s3, get_json_s3_uri, get_json_url
from aind_s3_cache.s3_cache import CacheManager, LocalizedResource, get_local_path_for_resource
from aind_s3_cache.uri_utils import as_pathlike, as_string, is_url, join_any, parse_s3_uri

assert_type(get_json("a.json"), dict[str, Any])
assert_type(get_json_s3("bucket", "key"), dict[str, Any])
assert_type(get_json_s3_uri("s3://bucket/key"), dict[str, Any])
assert_type(get_json_url("https://example.com/a.json"), dict[str, Any])
with CacheManager() as cache:
    assert_type(
        get_local_path_for_resource("s3://bucket/key", cache_dir=cache.dir), LocalizedResource
    )
kind, bucket, path = as_pathlike("s3://bucket/key")
assert_type(as_string(kind, bucket, path), str)
assert_type(join_any("s3://bucket", "key"), str)
assert_type(parse_s3_uri("s3://bucket/key"), tuple[str, str])
assert_type(is_url("a"), bool)
