"""Section 3, URIs: text in, text out. Tables with "0.1" in their name hold what 0.1 returned."""

from __future__ import annotations

import os
import string
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subject import s3c

exhaustively = settings(deadline=None, database=None, max_examples=60)

# What S3 takes as a key: any text that UTF-8 can hold, without NUL.
KEYS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
BUCKETS = st.from_regex(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", fullmatch=True)
SEGMENTS = st.text(string.ascii_letters + string.digits + " ?#%+&=_-~éÅ", min_size=1, max_size=8)
NAMES = SEGMENTS.filter(lambda name: name.strip() == name)

WINDOWS = ["C:\\a\\b", "C:/a/b", "c:a", "Z:", "C:\\", "\\\\server\\share", "\\\\server\\share\\a b"]
POSIX = ["", ".", "a", "a/b", "/a/b", "../a", "~/a", "a?b#c", "a%20b", "1:2", "a b"]
ODD_KEYS = ["a?b=c", "a#b", "a%20b", "a+b", "a//b", "/a", "//a", "a/", "a//", "..", "./a", "a\\b"]

# ==== parse_s3_uri ============================================================================


@exhaustively
@given(BUCKETS, KEYS)
def test_bucket_and_key_come_back_exactly(bucket: str, key: str) -> None:
    assert s3c.parse_s3_uri(f"s3://{bucket}/{key}") == (bucket, key)


@pytest.mark.parametrize("key", ODD_KEYS)
@pytest.mark.parametrize("scheme", ["s3", "S3"])
def test_a_key_keeps_every_character(scheme: str, key: str) -> None:
    assert s3c.parse_s3_uri(f"{scheme}://bucket/{key}") == ("bucket", key)


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/"])
def test_the_key_may_be_empty(uri: str) -> None:
    assert s3c.parse_s3_uri(uri) == ("bucket", "")


NOT_S3 = ["", "bucket/key", "s3:/b/k", "s3:b", "http://h/p", "ftp://b/k", "/a/b", "C:\\a", "//b/k"]
NO_BUCKET = ["s3://", "s3:///key", "s3://b k/x", "s3://b\n/x", "s3://bücket/x", "s3://?/x"]
NO_BUCKET += ["s3://.hidden/x", f"s3://{'b' * 256}/x", "s3://user:secret@bucket/x"]


@pytest.mark.parametrize("uri", NOT_S3 + NO_BUCKET)
def test_what_is_no_s3_uri_is_refused_in_the_words_of_0_1(uri: str) -> None:
    with pytest.raises(ValueError, match=r"^Not a valid S3 URI") as caught:
        s3c.parse_s3_uri(uri)
    assert "secret" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_buckets_of_other_servers_are_accepted() -> None:
    for bucket in ("ab", "My_Bucket", "a.b.c", "x" * 255):
        assert s3c.parse_s3_uri(f"s3://{bucket}/k") == (bucket, "k")


# ==== is_url, is_file_path ====================================================================

URLS = ["s3://b/k", "S3://b", "http://h", "https://h/p?q#f", "HTTP://h/p"]


@pytest.mark.parametrize("url", URLS)
def test_urls_are_urls_and_no_file_paths(url: str) -> None:
    assert s3c.is_url(url) is True
    assert s3c.is_file_path(url) is False


@pytest.mark.parametrize("path", [*WINDOWS, *POSIX, "file:///a", "file:/a", "FILE://h/a"])
def test_paths_and_file_uris_are_file_paths_on_every_system(path: str) -> None:
    assert s3c.is_url(path) is False
    assert s3c.is_file_path(path) is True


@pytest.mark.parametrize("text", ["s3://", "http://", "https:///p", "ftp://h/p", "gs://b/k"])
def test_a_url_without_a_host_or_of_another_scheme_is_neither(text: str) -> None:
    assert s3c.is_url(text) is False
    assert s3c.is_file_path(text) is False


def test_path_objects_are_file_paths() -> None:
    assert s3c.is_file_path(Path("a/b")) is True
    assert s3c.is_url(PurePosixPath("a/b")) is False


@pytest.mark.parametrize(
    "function", ["parse_s3_uri", "is_url", "is_file_path", "as_pathlike", "join_any"]
)
@pytest.mark.parametrize("value", [b"s3://b/k", b"/a", None, 1])
def test_bytes_and_other_things_are_a_type_error(function: str, value: object) -> None:
    with pytest.raises(TypeError):
        getattr(s3c, function)(value)


# ==== as_pathlike, as_string ==================================================================


@exhaustively
@given(BUCKETS, st.lists(NAMES, min_size=1))
def test_s3_uris_survive_the_way_through_pathlib(bucket: str, names: list[str]) -> None:
    uri = f"s3://{bucket}/{'/'.join(names)}"
    kind, same, path = s3c.as_pathlike(uri)
    assert (kind, same, type(path)) == ("s3", bucket, PurePosixPath)
    assert s3c.as_string(kind, same, path) == uri


@exhaustively
@given(st.sampled_from(["http", "https"]), st.lists(NAMES, min_size=1))
def test_urls_survive_the_way_through_pathlib(scheme: str, names: list[str]) -> None:
    url = f"{scheme}://host:8080/{'/'.join(names)}"
    assert s3c.as_pathlike(url)[:2] == (scheme, "host:8080")
    assert s3c.as_string(*s3c.as_pathlike(url)) == url


@exhaustively
@given(st.lists(NAMES, min_size=1))
def test_local_paths_survive_the_way_through_pathlib(names: list[str]) -> None:
    path = str(Path("/", *names))
    assert s3c.as_string(*s3c.as_pathlike(path)) == path


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
@pytest.mark.parametrize("name", [b"\xff.json", b"%FF", b"\xc3\xa9", b"\xc3\xa9\xff%e9"])
def test_a_file_uri_names_each_file_that_a_system_of_bytes_can_hold(name: bytes) -> None:
    path = Path(os.fsdecode(b"/tmp/" + name))
    assert s3c.as_pathlike(path.as_uri()) == ("file", None, path)


@exhaustively
@given(st.sampled_from(["C:\\", "d:\\", "\\\\server\\share\\"]), st.lists(NAMES, min_size=1))
def test_windows_paths_survive_the_way_through_pathlib(drive: str, names: list[str]) -> None:
    path = drive + "\\".join(names)
    assert s3c.as_pathlike(path) == ("file", None, PureWindowsPath(path))
    assert s3c.as_string(*s3c.as_pathlike(path)) == path


PATHLIKE: list[tuple[str, tuple[str, str | None, PurePath]]] = [
    ("s3://b/a/b", ("s3", "b", PurePosixPath("a/b"))),
    ("S3://b/k", ("s3", "b", PurePosixPath("k"))),
    ("s3://b", ("s3", "b", PurePosixPath("."))),
    ("s3://b//a//b/", ("s3", "b", PurePosixPath("a/b"))),
    *((path, ("file", None, PureWindowsPath(path))) for path in WINDOWS),
    *((path, ("file", None, Path(path))) for path in POSIX),
]


@pytest.mark.parametrize(("text", "expected"), PATHLIKE)
def test_as_pathlike_gives_the_objects_of_0_1(
    text: str, expected: tuple[str, str | None, PurePath]
) -> None:
    found = s3c.as_pathlike(text)
    assert found == expected
    assert type(found[2]) is type(expected[2])


@pytest.mark.skipif("os.name == 'nt'", reason="POSIX paths")
@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///a/b", "/a/b"),
        ("FILE:///a%20b%3F", "/a b?"),
        ("file:/a/b", "/a/b"),
        ("file://localhost/a", "/a"),
        ("file://server/share/a", "//server/share/a"),
    ],
)
def test_file_uris_become_local_paths(uri: str, path: str) -> None:
    assert s3c.as_pathlike(uri) == ("file", None, Path(path))
    assert s3c.join_any(uri, "x") == path + "/x"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("s3", "b", PurePosixPath(".")), "s3://b/"),
        (("s3", "b", PurePosixPath("/")), "s3://b/"),
        (("s3", "b", PurePosixPath("/a")), "s3://b/a"),
        (("s3", "b", PureWindowsPath("a\\b")), "s3://b/a/b"),
        (("s3", "", PurePosixPath("a")), "s3://a"),
        (("s3", None, PurePosixPath("a/b")), "s3://a/b"),
        (("https", "h", PurePosixPath("a")), "https://h/a"),
        (("file", "ignored", PurePosixPath("/a")), "/a"),
        (("file", None, PureWindowsPath("C:/a")), "C:\\a"),
    ],
)
def test_as_string_writes_as_0_1_did(
    parts: tuple[str, str | None, PurePath], expected: str
) -> None:
    assert s3c.as_string(*parts) == expected


@pytest.mark.parametrize("kind", ["ftp", "", "S3", "gs"])
def test_another_kind_is_refused_in_the_words_of_0_1(kind: str) -> None:
    with pytest.raises(ValueError, match=f"^Unsupported kind: '{kind}'"):
        s3c.as_string(kind, "b", PurePosixPath("k"))


def test_the_docstring_says_what_pathlib_drops() -> None:
    text = s3c.as_pathlike.__doc__
    assert "//" in text
    assert "trailing slash" in text


# ==== join_any ================================================================================


@exhaustively
@given(BUCKETS, KEYS.filter(bool), SEGMENTS)
def test_joined_keys_are_exact(bucket: str, key: str, part: str) -> None:
    slash = "" if key.endswith("/") else "/"
    joined = s3c.join_any(f"s3://{bucket}/{key}", part)
    assert s3c.parse_s3_uri(joined) == (bucket, f"{key}{slash}{part}")


@exhaustively
@given(KEYS, st.lists(SEGMENTS))
def test_joining_at_once_or_one_by_one_is_the_same(key: str, parts: list[str]) -> None:
    step = base = f"s3://bucket/{key}"
    for part in parts:
        step = s3c.join_any(step, part)
    assert s3c.parse_s3_uri(s3c.join_any(base, *parts)) == s3c.parse_s3_uri(step)


JOINED_S3 = [
    ("s3://b", (), "s3://b/"),
    ("s3://b", ("a",), "s3://b/a"),
    ("s3://b/", ("a", "b.txt"), "s3://b/a/b.txt"),
    ("s3://b/k/", ("a",), "s3://b/k/a"),
    ("s3://b//k", ("a",), "s3://b//k/a"),
    ("s3://b/k", ("a//b", "c/"), "s3://b/k/a//b/c/"),
    ("s3://b/k", ("a?b", "c#d", "e%20f"), "s3://b/k/a?b/c#d/e%20f"),
    ("s3://b/k?x", ("..", "."), "s3://b/k?x/../."),
    ("s3://b/k", ("a\\b", "c"), "s3://b/k/a/b/c"),
    ("s3://b/k", ("", "a", ""), "s3://b/k/a"),
    ("s3://b/a\\b", ("c",), "s3://b/a\\b/c"),
]


@pytest.mark.parametrize(("base", "parts", "expected"), JOINED_S3)
def test_parts_join_to_a_key(base: str, parts: tuple[str, ...], expected: str) -> None:
    assert s3c.join_any(base, *parts) == expected


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("https://h", "https://h/a/b.json"),
        ("https://h/", "https://h/a/b.json"),
        ("http://h:80/p", "http://h:80/p/a/b.json"),
        ("https://h/p/", "https://h/p/a/b.json"),
        ("https://h/p?token=1", "https://h/p/a/b.json?token=1"),
        ("https://h?v=a/b#c", "https://h/a/b.json?v=a/b#c"),
    ],
)
def test_parts_join_to_a_url_before_its_query(base: str, expected: str) -> None:
    assert s3c.join_any(base, "a", "b.json") == expected


@pytest.mark.parametrize(
    ("base", "parts", "expected"),
    [
        ("C:\\a", ("b", "c.txt"), "C:\\a\\b\\c.txt"),
        ("C:\\a", ("b/c",), "C:\\a\\b\\c"),
        ("C:/a", ("b", "c.txt"), "C:/a/b/c.txt"),
        ("C:/a", ("b\\c",), "C:/a/b/c"),
        ("C:", ("b",), "C:b"),
        ("C:a", ("b",), "C:a\\b"),
        ("C:\\a/b", ("c",), "C:/a/b/c"),
        ("\\\\server\\share", ("b", "c"), "\\\\server\\share\\b\\c"),
        ("/a/b", ("c", "d.txt"), "/a/b/c/d.txt"),
        ("/a/b", ("c\\d",), "/a/b/c/d"),
        ("\\a\\b", ("c",), "\\a\\b\\c"),
        ("a", ("b",), str(Path("a/b"))),
        ("", ("a",), "a"),
        ("/a", ("/b",), "/b"),
    ],
)
def test_joining_keeps_the_separators_of_the_base_as_in_0_1(
    base: str, parts: tuple[str, ...], expected: str
) -> None:
    assert s3c.join_any(base, *parts) == expected


def test_a_path_object_can_be_a_base() -> None:
    assert s3c.join_any(Path("a"), "b") == str(Path("a/b"))


@pytest.mark.parametrize("base", ["s3://", "s3:///k"])
def test_joining_to_no_bucket_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match=r"^Not a valid S3 URI"):
        s3c.join_any(base, "a")
