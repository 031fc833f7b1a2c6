"""Section 4, Wire: the protocol's decisions as tables, AWS's addresses as botocore writes them."""

from __future__ import annotations

import re
import time
import tracemalloc
from email.utils import formatdate
from typing import Any, Callable
from urllib.parse import quote
from xml.sax.saxutils import escape

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from server import Server, Stored, list_page
from subject import s3c

exhaustively = settings(deadline=None, database=None, max_examples=100)


def answer(status: int, **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return s3c._Answer(status, named, None)


# ==== Where AWS keeps an object ===============================================================

REGIONS = [
    *("", "us-east-1", "us-west-2", "eu-central-1", "af-south-1", "cn-north-1", "us-gov-west-1"),
    *("us-iso-east-1", "us-isob-east-1", "eu-isoe-west-1", "us-isof-south-1", "eusc-de-east-1"),
    *("aws-global", "mx-north-9"),
]
BUCKETS = [
    *("aind-open-data", "a-b", "abc", "ab", "a", "x" * 63, "x" * 64, "x" * 255, "1st", "192-168"),
    *("my.bucket", "1.2.3.4", "My-Bucket", "under_score", "-abc", "abc-", "a--b", "xn--abc", "a."),
]
KEYS = [
    *("key", "a/b/c.json", "/key", "//a//b", "a/", "..", "a/../b", "./a", "a b", "a+b", "a%20b"),
    *("a?b=c&d", "a#b", "a&b", "a=b", "a@b:c;d,e", "a!b$c'd(e)f*g", "a~b", "a_b-c.d", "é/𝄞"),
    *("a\\b", 'a"b<c>', "a|b^c`d{e}[f]", "a\nb\tc\x01\x7f", "e\u0301", "%", "%2F", "x" * 1024),
]


def address(bucket: str, key: str, region: str) -> str:
    place = s3c._aws_place(bucket, key, region, "")
    return f"{place.origin[0]}://{s3c._address(place.origin)}{place.target}"


@pytest.fixture(scope="module")
def botocore_address() -> Callable[[str, str, str], str]:
    """`botocore_address(bucket, key, region)`: what botocore would ask for, unsigned."""
    session = pytest.importorskip("botocore.session").Session()
    from botocore import UNSIGNED
    from botocore.awsrequest import AWSResponse
    from botocore.compat import HTTPHeaders
    from botocore.config import Config
    from botocore.exceptions import ClientError

    clients: dict[str, Any] = {}
    asked: list[str] = []

    def note(request: Any, **_: object) -> AWSResponse:
        asked.append(request.url)
        return AWSResponse(request.url, 418, HTTPHeaders(), None)

    def botocore_address(bucket: str, key: str, region: str) -> str:
        if region not in clients:
            config = Config(signature_version=UNSIGNED, retries={"total_max_attempts": 1})
            client = session.create_client("s3", region_name=region or None, config=config)
            client.meta.events.register("before-send.s3", note)
            clients[region] = client
        with pytest.raises((ClientError, AttributeError)):  # of the answer without a body
            clients[region].get_object(Bucket=bucket, Key=key)
        return asked.pop()

    return botocore_address


@pytest.mark.boto3
@pytest.mark.parametrize("region", REGIONS)
def test_every_bucket_of_a_region_is_where_botocore_looks(
    botocore_address: Callable[[str, str, str], str], region: str
) -> None:
    for bucket in BUCKETS:
        assert address(bucket, "a b/key", region) == botocore_address(bucket, "a b/key", region)


@pytest.mark.boto3
@pytest.mark.parametrize("key", KEYS, ids=lambda key: ascii(key)[:20])
def test_every_key_is_sent_as_botocore_sends_it(
    botocore_address: Callable[[str, str, str], str], key: str
) -> None:
    for bucket in ("bucket", "my.bucket"):
        assert address(bucket, key, "eu-west-1") == botocore_address(bucket, key, "eu-west-1")


@exhaustively
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")))
def test_keys_are_quoted_as_botocore_quotes_them(key: str) -> None:
    assert s3c._aws_place("bucket", key, "", "").target == "/" + quote(key, safe="/-._~")


def test_the_query_goes_behind_the_key() -> None:
    assert s3c._aws_place("bucket", "a?b", "", "?versionId=1").target == "/a%3Fb?versionId=1"


@pytest.mark.parametrize(
    ("bucket", "region", "host"),
    [
        ("bucket", "", "bucket.s3.amazonaws.com"),
        ("bucket", "us-east-1", "bucket.s3.amazonaws.com"),
        ("bucket", "us-west-2", "bucket.s3.us-west-2.amazonaws.com"),
        ("bucket", "cn-north-1", "bucket.s3.cn-north-1.amazonaws.com.cn"),
        ("my.bucket", "us-west-2", "s3.us-west-2.amazonaws.com"),
        ("My_Bucket", "", "s3.amazonaws.com"),
    ],
)
def test_the_host_is_one_that_tls_covers(bucket: str, region: str, host: str) -> None:
    assert s3c._aws_place(bucket, "key", region, "").origin == ("https", host, 443)


# ==== Heads ===================================================================================

HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"HTTP/1.1 200 OK", (200, {}, True)),
        (b"HTTP/1.0 404 Not Found", (404, {}, False)),
        (b"HTTP/1.1 206", (206, {}, True)),
        (b"HTTP/1.1 200 ", (200, {}, True)),
        (HEAD + b'ETag: "a"\r\nX-A:b', (200, {"etag": '"a"', "x-a": "b"}, True)),
        (HEAD + b"a: \t b c \t", (200, {"a": "b c"}, True)),
        (HEAD + b"a: 1\r\nA: 2", (200, {"a": "1, 2"}, True)),
        (HEAD + b"a:", (200, {"a": ""}, True)),
        (HEAD + b"a: b: c", (200, {"a": "b: c"}, True)),
        (HEAD + "a: é".encode("latin-1"), (200, {"a": "é"}, True)),
    ],
)
def test_a_head_is_read(head: bytes, expected: tuple[int, dict[str, str], bool]) -> None:
    assert s3c._parse_head(head) == expected


BAD_HEADS = [
    *(b"", b"SSH-2.0-x", b"HTTP/2 200 OK", b"HTTP/1.2 200 OK", b"ICY 200 OK", b"http/1.1 200 OK"),
    *(b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 2000 OK", b"HTTP/1.1 abc", b"HTTP/1.1 20", b"\r\n"),
    *(b"HTTP/1.1 200 OK\na: b\n\n<p>", b"HTTP/1.1 200 O\0K"),
    *(b"HTTP/1.1  200 OK", b"HTTP/1.1 200OK", b"HTTP/1.1 -20 OK", b"HTTP/1.1 +20 OK"),
    *(b"HTTP/1.1 099 OK", b"HTTP/1.1 000 OK", HEAD + b"a\0: b", HEAD + b"a\nb: c"),
    *(HEAD + b"no colon", HEAD + b": empty name", HEAD + b"a : b", HEAD + b" folded: b"),
    *(HEAD + b"a: b\r\n folded", HEAD + b"a: b\r\n\tfolded", HEAD + b"a: b\rc", HEAD + b"a: b\nc"),
    *(HEAD + b"a: b\0c", HEAD + b"a: b\x1b", HEAD + b"a: b\x7f"),
]


@pytest.mark.parametrize("head", BAD_HEADS, ids=ascii)
def test_a_head_that_is_none_is_refused(head: bytes) -> None:
    with pytest.raises(s3c.TransferError, match=r"^Malformed answer") as caught:
        s3c._parse_head(head)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "line", [b"Location : /a?sesame", b" /a?sesame", b" sesame", b"Location: sesame\0"]
)
def test_a_header_that_is_refused_is_not_shown(line: bytes) -> None:
    with pytest.raises(s3c.TransferError) as caught:
        s3c._parse_head(HEAD + line)
    assert "sesame" not in str(caught.value)
    assert ("'Location'" in str(caught.value)) == line.startswith(b"Location")


@exhaustively
@given(st.binary())
@example(b"HTTP/1.1 \xb2\xb2\xb2 OK")
def test_any_head_is_read_or_refused(junk: bytes) -> None:
    for head in (junk, HEAD + junk, HEAD + b"a: " + junk):
        try:
            status, headers, _ = s3c._parse_head(head)
        except s3c.TransferError:
            continue
        assert 0 <= status <= 999
        assert not re.search(r"[\r\n\0]", "".join(headers.values()))


# ==== Content-Range, Content-Length, ETag =====================================================


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bytes 0-9/10", (0, 10, 10)),
        ("bytes 5-5/10", (5, 6, 10)),
        ("BYTES 0-0/1", (0, 1, 1)),
        ("bytes  0-9/10", (0, 10, 10)),
        ("bytes 0-9/*", None),
        ("bytes */10", None),
        ("bytes 0-10/10", None),
        ("bytes 9-0/10", None),
        ("bytes -9/10", None),
        ("bytes 0-/10", None),
        ("bytes 0-9", None),
        ("bytes 0-9/", None),
        ("bytes=0-9/10", None),
        ("items 0-9/10", None),
        ("0-9/10", None),
        ("bytes 0-+9/10", None),
        ("bytes 0-9/1_0", None),
        ("bytes 0-9/١٠", None),
        ("bytes 0-9/10, bytes 0-9/10", None),
        (f"bytes 0-9/{'9' * 20}", None),
        ("", None),
    ],
)
def test_a_content_range_is_exact_or_nothing(
    value: str, expected: tuple[int, int, int] | None
) -> None:
    assert s3c._content_range({"content-range": value}) == expected


def test_no_content_range_is_nothing() -> None:
    assert s3c._content_range({}) is None
    with pytest.raises(s3c.TransferError, match="206 without an exact Content-Range"):
        answer(206, content_length="10")


@pytest.mark.parametrize("length", ["-1", "+1", "1_0", "0x10", "1.0", "", "5, 6", "5,", "9" * 20])
def test_a_length_that_is_none_is_refused(length: str) -> None:
    with pytest.raises(s3c.TransferError, match="Content-Length"):
        answer(200, content_length=length)


@pytest.mark.parametrize(("length", "total"), [("0", 0), ("10", 10), ("007", 7), ("5, 5", 5)])
def test_a_length_says_how_large_the_object_is(length: str, total: int) -> None:
    assert answer(200, content_length=length).total == total


def test_without_a_length_nobody_knows() -> None:
    assert (answer(200).total, answer(200).whole) == (None, False)


@pytest.mark.parametrize("tag", ['"a"', 'W/"a"', "bare", '"md5-12"', '"a b"', '"' + "x" * 64 + '"'])
def test_a_usable_etag_is_kept_as_it_is(tag: str) -> None:
    assert answer(200, etag=tag).etag == tag


@pytest.mark.parametrize(
    "tag", ["", "*", '""', 'W/""', '"a", "b"', '"a', 'a"b', '"a"b"', '"a\x01"', "x" * 300]
)
def test_an_etag_that_is_none_is_not_used(tag: str) -> None:
    assert answer(200, etag=tag).etag is None


# ==== Judging the first answer ================================================================

FULL = {"content_length": "100", "etag": '"a"'}
PART = {"content_range": "bytes 0-99/1000", "etag": '"a"'}
JUDGED: list[tuple[str, int, dict[str, str], dict[str, Any], str]] = [
    ("a hit", 304, {}, {"sent": True}, "unchanged"),
    ("the tag we hold", 200, FULL, {"sent": True, "same": True}, "unchanged"),
    ("the tag we hold, in a part", 206, PART, {"same": True}, "unchanged"),
    ("small", 200, FULL, {}, "small"),
    ("small, weak", 200, {**FULL, "etag": 'W/"a"'}, {}, "small"),
    ("small, no tag", 200, {"content_length": "100"}, {}, "small"),
    ("empty", 200, {"content_length": "0"}, {}, "small"),
    ("of medium size", 200, {**FULL, "content_length": "2000000"}, {}, "stream"),
    ("all in one part", 206, {**PART, "content_range": "bytes 0-99/100"}, {}, "small"),
    ("less than asked", 206, {**PART, "content_range": "bytes 0-9/10"}, {}, "small"),
    ("large", 206, PART, {}, "parts"),
    ("range ignored", 200, {**FULL, "content_length": "10000000"}, {}, "parts"),
    ("large, weak", 206, {**PART, "etag": 'W/"a"'}, {}, "again"),
    ("large, no tag", 206, {"content_range": "bytes 0-99/1000"}, {}, "again"),
    ("range ignored, weak", 200, {"content_length": "10000000", "etag": 'W/"a"'}, {}, "stream"),
    ("range ignored, no tag", 200, {"content_length": "10000000"}, {}, "stream"),
    ("length unknown", 200, {"etag": '"a"'}, {}, "stream"),
    ("nothing known", 200, {}, {}, "stream"),
    ("no such range", 416, {"content_range": "bytes */0"}, {}, "again"),
    ("no such range, bare", 416, {}, {}, "again"),
    ("condition not met", 412, {"content_length": "100"}, {"sent": True}, "again"),
]


@pytest.mark.parametrize(
    ("status", "headers", "known", "verdict"),
    [row[1:] for row in JUDGED],
    ids=[row[0] for row in JUDGED],
)
def test_the_first_answer_is_judged(
    status: int, headers: dict[str, str], known: dict[str, Any], verdict: str
) -> None:
    known = {"sent": False, "same": False, "asked": 100, **known}
    assert s3c._judge(answer(status, **headers), **known) == verdict


@pytest.mark.parametrize(
    ("status", "span"),
    [
        (304, ""),
        (206, "1-100/1000"),
        (206, "0-98/1000"),
        (206, "0-199/1000"),
        (206, "900-999/1000"),
    ],
)
def test_an_answer_to_another_question_is_refused(status: int, span: str) -> None:
    headers = {"etag": '"a"', **({"content_range": f"bytes {span}"} if span else {})}
    with pytest.raises(s3c.TransferError, match=r"^Malformed answer"):
        s3c._judge(answer(status, **headers), sent=False, same=False, asked=100)


# ==== Retry or not ============================================================================


@pytest.mark.parametrize(
    ("kind", "attempt", "elapsed", "asked", "expected"),
    [
        ("no", 0, 0, None, None),
        ("no", 0, 0, 1.0, None),
        ("once", 0, 0, None, 0.025),
        ("once", 1, 0, None, None),
        ("soon", 0, 0, None, 0.025),
        ("soon", 3, 0, None, 0.2),
        ("soon", 7, 0, None, 3.2),
        ("soon", 8, 0, None, None),
        ("slow", 0, 0, None, 0.5),
        ("slow", 3, 0, None, 4.0),
        ("slow", 7, 0, None, 10.0),  # the cap
        ("slow", 7, 55, None, None),  # it would end too late
        ("soon", 0, 60.1, None, None),
        ("slow", 0, 0, 7.0, 7.0),
        ("soon", 0, 0, 0.0, 0.0),
        ("slow", 0, 0, 60.0, 60.0),
        ("slow", 0, 0, 60.1, None),  # fail now, not in a minute
        ("slow", 0, 50, 11.0, None),
    ],
)
def test_a_retry_is_bounded_by_count_and_time(
    kind: str, attempt: int, elapsed: float, asked: float | None, expected: float | None
) -> None:
    assert s3c._retry_delay(kind, attempt, elapsed, asked, 0.5) == pytest.approx(expected)


@given(
    st.sampled_from(["once", "soon", "slow"]),
    st.integers(0, 20),
    st.floats(0, 100),
    st.floats(0, 1, exclude_max=True),
)
@exhaustively
def test_a_pause_is_never_longer_than_its_cap(
    kind: str, attempt: int, elapsed: float, chance: float
) -> None:
    delay = s3c._retry_delay(kind, attempt, elapsed, None, chance)
    assert delay is None or 0 <= delay <= min(s3c._RETRY_CAP, s3c._RETRY_TOTAL - elapsed)


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def patience(clock: Clock) -> Any:
    return s3c._Patience(None, clock.sleep, clock)


def failing(kind: str, **more: Any) -> Any:
    return s3c.TransferError("It failed", retry=kind, **more)


def test_patience_ends_and_says_after_how_many_attempts(patience: Any, clock: Clock) -> None:
    for _ in range(8):
        patience.after(failing("soon"))
    with pytest.raises(s3c.TransferError, match="after 9 attempts"):
        patience.after(failing("soon"))
    assert len(clock.slept) == 8


def test_progress_refills_patience(patience: Any, clock: Clock) -> None:
    for _ in range(50):
        patience.after(failing("slow"))
        patience.progress()
    assert max(clock.slept) <= 1.0  # always the first pause again
    assert clock.now < 60


def test_what_others_bring_refills_patience(clock: Clock) -> None:
    brought = [0]
    patience = s3c._Patience(None, clock.sleep, clock, lambda: brought[0])
    for _ in range(50):
        brought[0] += 1
        patience.after(failing("soon"))
    for _ in range(7):
        patience.after(failing("soon"))
    with pytest.raises(s3c.TransferError, match="after 9 attempts"):
        patience.after(failing("soon"))


def test_patience_ends_by_time_too(patience: Any, clock: Clock) -> None:
    clock.now = 61
    with pytest.raises(s3c.TransferError):
        patience.after(failing("soon"))


def test_what_came_in_vain_gives_time_but_no_attempts(patience: Any, clock: Clock) -> None:
    for _ in range(8):
        clock.now += 61
        patience.heard()
        patience.after(failing("soon"))
    patience.heard()
    with pytest.raises(s3c.TransferError, match="after 9 attempts"):
        patience.after(failing("soon"))


def test_what_cannot_pass_is_not_waited_for(patience: Any, clock: Clock) -> None:
    for error in (failing("no"), failing("slow", retry_after=3600.0)):
        with pytest.raises(s3c.TransferError) as caught:
            patience.after(error)
        assert "attempts" not in str(caught.value)
    assert clock.slept == []


def test_all_transfers_share_a_budget_of_retries(clock: Clock) -> None:
    retried = 0
    with pytest.raises(s3c.TransferError):  # noqa: PT012
        while retried < 1000:
            s3c._Patience(None, clock.sleep, clock).after(failing("soon"))
            retried += 1
    assert retried == s3c._RETRY_TOKENS / 5


def test_a_retry_that_is_refused_costs_nothing(patience: Any) -> None:
    """Broken variant: a server that fails one request in four is never asked again."""
    s3c._QUOTA.tokens = s3c._RETRY_COST - 1
    with pytest.raises(s3c.TransferError):
        patience.after(failing("soon"))
    assert s3c._QUOTA.tokens == s3c._RETRY_COST - 1


RETRIED: list[tuple[int, str | None]] = [
    (status, None) for status in (408, 429, 500, 502, 503, 504, 522, 524)
]
RETRIED += [(503, "SlowDown"), (400, "RequestTimeout"), (400, "Throttling"), (500, "InternalError")]
FINAL: list[tuple[int, str | None]] = [
    (status, None) for status in (400, 401, 403, 404, 409, 410, 418, 501, 505, 511)
]
FINAL += [(403, "AccessDenied"), (403, "InvalidObjectState"), (400, "InvalidArgument")]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("status", "code", "times"),
    [*((*one, 9) for one in RETRIED), *((*one, 1) for one in FINAL)],
)
def test_only_what_may_pass_is_asked_for_again(
    server: Server, status: int, code: str | None, times: int
) -> None:
    server.always(status, code=code)
    with pytest.raises(s3c.S3CacheError):
        s3c.get_json("s3://bucket/key", anonymous=True)
    assert len(server.seen) == times


# ==== Retry-After =============================================================================


def in_seconds(seconds: float) -> str:
    """An HTTP date so far from now."""
    return formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "low", "high"),
    [
        ({"Retry-After": "3"}, 3, 3),
        ({"Retry-After": "0"}, 0, 0),
        ({"Retry-After": 30}, 25, 31),  # a number stands for the date so far from now
        ({"Retry-After": -3600}, 0, 0),
        ({"Retry-After": "-5"}, 0, 1),
        ({"Retry-After": "soon"}, 0, 1),
        ({"Retry-After": ""}, 0, 1),
        ({"Retry-After": "1.5"}, 0, 1),
        ({"Retry-After": "9" * 30}, 0, 1),
        ({"x-amz-retry-after": "250"}, 0.25, 0.25),
        ({"x-amz-retry-after": "250", "Retry-After": "3"}, 0.25, 0.25),
        ({}, 0, 1),
    ],
    ids=str,
)
def test_a_server_says_how_long_to_wait(
    server: Server, no_sleep: list[float], headers: dict[str, Any], low: float, high: float
) -> None:
    server.put("bucket", "key", b"{}")
    dated = {n: v if isinstance(v, str) else in_seconds(v) for n, v in headers.items()}
    server.say(503, headers=dated)
    assert s3c.get_json("s3://bucket/key") == {}
    assert len(no_sleep) == 1
    assert low <= no_sleep[0] <= high


@pytest.mark.parametrize(
    "wait", ["3600", "9" * 19, in_seconds(7200)], ids=["an hour", "for ever", "a date"]
)
def test_a_server_that_wants_hours_fails_at_once(
    server: Server, no_sleep: list[float], wait: str
) -> None:
    server.always(503, headers={"Retry-After": wait})
    with pytest.raises(s3c.TransferError):
        s3c.get_json("s3://bucket/key")
    assert (no_sleep, len(server.seen)) == ([], 1)


# ==== Listings ================================================================================


def listing(*entries: str, **fields: str) -> bytes:
    inner = "".join(f"<{name}>{text}</{name}>" for name, text in fields.items())
    space = "http://s3.amazonaws.com/doc/2006-03-01/"
    return (
        f'<ListBucketResult xmlns="{space}">{inner}{"".join(entries)}</ListBucketResult>'.encode()
    )


def entry(key: str, size: str = "1", etag: str = "&quot;a&quot;") -> str:
    return f"<Contents><Key>{key}</Key><ETag>{etag}</ETag><Size>{size}</Size></Contents>"


def keys_of(page: bytes) -> list[str]:
    return [found.key for found in s3c._parse_listing(page)[0]]


def test_a_listing_gives_keys_tags_and_sizes() -> None:
    found, token = s3c._parse_listing(listing(entry("a", "12"), entry("b", "0", "")))
    assert [(one.key, one.etag, one.size) for one in found] == [("a", '"a"', 12), ("b", None, 0)]
    assert token is None


def test_an_empty_listing_is_one() -> None:
    assert s3c._parse_listing(listing(KeyCount="0", IsTruncated="false")) == ([], None)


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"EncodingType": "url"}, "a b c/d+é"), ({}, "a+b%20c/d%2B%C3%A9")],
)
def test_keys_are_decoded_only_where_the_page_says_so(fields: dict[str, str], key: str) -> None:
    assert keys_of(listing(entry("a+b%20c/d%2B%C3%A9"), **fields)) == [key]


def test_where_the_encoding_is_said_does_not_matter() -> None:
    page = listing(entry("a%20b")).replace(
        b"</ListBucketResult>", b"<EncodingType>url</EncodingType></ListBucketResult>"
    )
    assert keys_of(page) == ["a b"]


def test_a_token_is_opaque() -> None:
    token = "1+/=%2B&<>"
    fields = {"IsTruncated": "true", "NextContinuationToken": escape(token), "EncodingType": "url"}
    assert s3c._parse_listing(listing(**fields))[1] == token
    assert s3c._parse_listing(listing(**{**fields, "IsTruncated": "false"}))[1] is None


def test_common_prefixes_and_owners_are_no_keys() -> None:
    rolled = "<CommonPrefixes><Prefix>x/</Prefix></CommonPrefixes>"
    owned = entry("a").replace("</Contents>", "<Owner><ID>1</ID></Owner></Contents>")
    assert keys_of(listing(rolled, owned, rolled, Prefix="p", Name="bucket")) == ["a"]


def test_a_namespace_prefix_changes_nothing() -> None:
    page = listing(entry("a")).decode().replace("xmlns=", "xmlns:s3=")
    assert keys_of(re.sub(r"<(/?)(\w)", r"<\1s3:\2", page).encode()) == ["a"]


@exhaustively
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1), unique=True))
def test_what_a_server_lists_comes_back_exactly(keys: list[str]) -> None:
    objects = {key: Stored(b"", '"a"', 0, {}, False) for key in keys}
    page = list_page("bucket", objects, {"encoding-type": "url"}, 1000)
    assert sorted(keys_of(page)) == sorted(keys)


BAD_LISTINGS = {
    "nothing": b"",
    "text": b"Slow down",
    "html": b"<html></html>",
    "an error": b"<Error><Code>InternalError</Code></Error>",
    "cut": listing(entry("a"))[:-5],
    "two roots": listing() + listing(),
    "no key": listing("<Contents><Size>1</Size></Contents>"),
    "no size": listing("<Contents><Key>a</Key></Contents>"),
    "negative size": listing(entry("a", "-1")),
    "odd size": listing(entry("a", "1e3")),
    "a control": listing(entry("a&#1;b")),
    "bad utf-8": listing(entry("a")).replace(b"<Key>a", b"<Key>\xff"),
    "an unknown encoding": b'<?xml version="1.0" encoding="nope"?>' + listing(),
    "no token": listing(IsTruncated="true"),
    "an empty token": listing(IsTruncated="true", NextContinuationToken=""),
    "a json page": b"{}",
}


@pytest.mark.parametrize("page", BAD_LISTINGS.values(), ids=BAD_LISTINGS)
def test_a_page_that_is_no_listing_is_refused(page: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the caller words it
        s3c._parse_listing(page)


# ==== Error bodies, and XML that attacks ======================================================


def error_body(**fields: str) -> bytes:
    inner = "".join(f"<{name}>{text}</{name}>" for name, text in fields.items())
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>{inner}</Error>'.encode()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            error_body(Code="NoSuchKey", Message="No key"),
            {"Code": "NoSuchKey", "Message": "No key"},
        ),
        (error_body(Code="A", Region="us-west-2", Else="x"), {"Code": "A", "Region": "us-west-2"}),
        (error_body(Code="a&lt;b&#233;"), {"Code": "a<bé"}),
        (error_body(), {}),
        (b"<Error><Code>A</Code>", {}),
        (b"<html><Code>A</Code></html>", {}),
        (b"<Other><Error><Code>A</Code></Error></Other>", {}),
        (b"", {}),
        (b"\0", {}),
        (b"<Error><Code>A</Code></Error>".decode().encode("utf-16"), {"Code": "A"}),
        (b'<?xml version="1.0" encoding="nope"?><Error><Code>A</Code></Error>', {}),
    ],
)
def test_an_error_body_gives_what_it_says(body: bytes, expected: dict[str, str]) -> None:
    assert s3c._parse_error(body) == expected


@exhaustively
@given(st.binary())
def test_any_error_body_is_read_or_ignored(junk: bytes) -> None:
    for body in (junk, b"<Error>" + junk, error_body(Code="A")[:-8] + junk):
        assert set(s3c._parse_error(body)) <= {"Code", "Message", "Region"}


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10 if n else "lol" * 10}">' for n in range(10))
DTDS = {
    "none of ours": '<!DOCTYPE Error SYSTEM "error.dtd">',
    "a file": '<!DOCTYPE Error [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
    "a url": '<!DOCTYPE Error [<!ENTITY % x SYSTEM "http://127.0.0.1:9/x"> %x;]>',
    "billion laughs": f"<!DOCTYPE Error [{LAUGHS}]>",
    "quadratic": f'<!DOCTYPE Error [<!ENTITY x "{"x" * 100_000}">]>',
}
USES = {"a file": "&x;", "billion laughs": "&l9;", "quadratic": "&x;" * 10_000}


@pytest.mark.parametrize("attack", DTDS)
def test_xml_with_a_dtd_is_refused_before_it_costs_anything(attack: str) -> None:
    use = f"<Code>{USES.get(attack, 'A')}</Code>"
    error = f"{DTDS[attack]}<Error>{use}</Error>".encode()
    page = f"{DTDS[attack]}<ListBucketResult>{use}</ListBucketResult>".encode()
    tracemalloc.start()
    try:
        assert s3c._parse_error(error) == {}
        with pytest.raises(ValueError, match="DTD"):
            s3c._parse_listing(page)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000  # "quadratic" would take 1 GB
    finally:
        tracemalloc.stop()


def test_xml_nested_deeply_is_read_without_recursion() -> None:
    depth = 100_000
    body = b"<Error>" + b"<a>" * depth + b"</a>" * depth + b"<Code>A</Code></Error>"
    assert s3c._parse_error(body) == {"Code": "A"}
