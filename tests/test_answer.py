"""What a server says of an answer decides whether its body is taken; whatever it says, nothing else happens."""

import email.utils
import http.client
import io
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmq.answer import BUSY, GONE, REFUSED, RetryError, check_answer, retry_after
from llmq.errors import NetworkError

START, END, TOTAL = 100, 300, 1000
RIGHT = {"Content-Length": "200", "Content-Range": "bytes 100-299/1000", "ETag": '"tag"'}


def answer(status: int, headers: bytes, reason: str = "said so") -> Any:
    """As the standard library would have read it."""
    parsed = http.client.parse_headers(io.BytesIO(headers + b"\r\n\r\n"))
    return SimpleNamespace(status=status, reason=reason, headers=parsed)


def lines(headers: dict[str, str]) -> bytes:
    return "\r\n".join(f"{name}: {text}" for name, text in headers.items()).encode()


def check(status: int, changes: dict[str, str] | None = None, etag: str = "") -> None:
    check_answer(answer(status, lines(RIGHT | (changes or {}))), "hub", START, END, TOTAL, etag)


def test_what_is_taken() -> None:
    check(206)
    check(206, {"Content-Type": "application/octet-stream", "Content-Encoding": "identity"}, etag='"tag"')
    check(200, {"Content-Length": "1000", "Content-Range": "nonsense"})
    check_answer(answer(206, lines(RIGHT).replace(b'ETag: "tag"', b"")), "hub", START, END, TOTAL, '"tag"')


@pytest.mark.parametrize(
    "changes",
    [{"Content-Length": text} for text in ("199", "201", "+200", " 2e2", "200, 200", "-200", "0x c8", "", "9" * 5000)]
    + [
        {"Content-Range": text}
        for text in ("bytes 100-299/*", "bytes 101-300/1000", "bytes 100-299/1001", "bytes=100-299/1000", "", "items 1")
    ]
    + [{"Content-Encoding": text} for text in ("gzip", "br", "identity, gzip", "\x00")],
)
def test_what_is_asked_for_again(changes: dict[str, str]) -> None:
    with pytest.raises(RetryError):
        check(206, changes)


def test_what_is_not_asked_for_again() -> None:
    with pytest.raises(NetworkError, match="web page"):
        check(200, {"Content-Type": "text/html", "Content-Length": "1000"})
    with pytest.raises(NetworkError, match="another version"):
        check(206, etag='"other"')
    for status in REFUSED:
        with pytest.raises(NetworkError, match="token"):
            check(status)
    for status in GONE:
        with pytest.raises(NetworkError, match="no such file"):
            check(status)


def test_only_busy_servers_are_waited_for() -> None:
    for status in (*range(100, 200), *range(201, 206), *range(207, 600)):
        if status in REFUSED | GONE:
            continue
        if 400 <= status < 500 and status not in BUSY | {416}:
            with pytest.raises(NetworkError, match=f"answers {status}"):
                check(status, {"Retry-After": "7"})
            continue
        with pytest.raises(RetryError) as caught:
            check(status, {"Retry-After": "7"})
        assert caught.value.wait == (7 if status in BUSY else 0)


NAMES = ["Content-Length", "Content-Range", "Content-Type", "Content-Encoding", "ETag", "Retry-After", "X"]
NUMBERS = st.integers(-(10**30), 10**30).map(str)
RANGES = st.builds("bytes {}-{}/{}".format, NUMBERS, NUMBERS, NUMBERS | st.just("*"))
# Headers come as bytes that are read as Latin-1; line breaks would be other headers.
TEXTS = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"))
HEADERS = st.lists(st.tuples(st.sampled_from(NAMES), TEXTS | NUMBERS | RANGES | st.sampled_from([*RIGHT.values()])))


@given(status=st.sampled_from([200, 206]) | st.integers(100, 999), headers=HEADERS, reason=TEXTS)
def test_hostile_headers(status: int, headers: list[tuple[str, str]], reason: str) -> None:
    raw = b"\r\n".join(f"{name}: {text}".encode("latin-1") for name, text in headers)
    given_answer = answer(status, raw, reason)
    try:
        check_answer(given_answer, "hub", START, END, TOTAL, '"tag"')
    except (RetryError, NetworkError) as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.isprintable()
        assert len(said) < 300
        return
    length, part = (given_answer.headers.get(name) for name in ("Content-Length", "Content-Range"))
    assert (status, length, part) == (206, "200", "bytes 100-299/1000") or (status, length) == (200, "1000")


DAYS, MONTHS = st.sampled_from(["Mon", "Sun", "X", ""]), st.sampled_from(["Jan", "Feb", "Dec", "Q"])
WHOLE = st.integers(-5, 70) | st.integers(-(10**20), 10**20)
DATES = st.builds(
    "{}, {} {} {} {}:{}:{} {}".format, DAYS, WHOLE, MONTHS, WHOLE, WHOLE, WHOLE, WHOLE, st.just("GMT") | WHOLE
)


@given(TEXTS | NUMBERS | DATES)
def test_hostile_pauses(text: str) -> None:
    assert 0 <= retry_after(text) < math.inf


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("120", 120), ("", 0), ("-5", 0), ("soon", 0), ("1.5", 0)])
def test_pauses(text: str, seconds: float) -> None:
    assert retry_after(text) == seconds


def test_pauses_until_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time() // 1
    monkeypatch.setattr(time, "time", lambda: now)
    assert retry_after(email.utils.formatdate(now + 90, usegmt=True)) == 90
    assert retry_after(email.utils.formatdate(now - 90, usegmt=True)) == 0
    assert retry_after("Fri, 01 Jan 99999 00:00:00 GMT") == 0
