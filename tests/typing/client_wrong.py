"""Mistakes that a type checker must report, each on a line that says `wrong`: see check.py."""

from __future__ import annotations

from aind_s3_cache import (
    CacheManager,
    get_json,
    get_local_path_for_resource,
    get_local_paths_for_resources,
    parse_s3_uri,
)

get_local_path_for_resource("s3://b/k", cache_dir=3)  # wrong: a number for a path
get_local_path_for_resource("s3://b/k", cachedir="x")  # wrong: no such option
get_local_path_for_resource("s3://b/k", "x")  # wrong: options are keyword-only
print(get_local_path_for_resource("s3://b/k").local_path)  # wrong: no such attribute
get_local_path_for_resource("s3://b/k").path = None  # wrong: immutable, and not a path
get_local_paths_for_resources(3)  # wrong: not iterable
CacheManager(persistent="no").close()  # wrong: a word for a truth value
get_json()  # wrong: no source
number: int = parse_s3_uri("s3://b/k")  # wrong: a pair of words
