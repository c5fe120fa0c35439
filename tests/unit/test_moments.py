"""Every way to write a moment, and what is said about those that are none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from vmrewind.errors import MomentError
from vmrewind.history.moments import AtBookmark, AtSeq, AtTime, Latest, format_time, parse_moment

NS = 1_000_000_000


def utc_ns(*fields: int) -> int:
    return int(datetime(*fields, tzinfo=UTC).timestamp()) * NS  # type: ignore[misc,arg-type]


NOW = utc_ns(2026, 11, 22, 12, 0, 0)


@pytest.fixture(autouse=True)
def _berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-11-22T10:31:05.25+00:00", utc_ns(2026, 11, 22, 10, 31, 5) + NS // 4),
        ("2026-11-22T10:31:05Z", utc_ns(2026, 11, 22, 10, 31, 5)),
        ("2026-11-22T12:31:05+02:00", utc_ns(2026, 11, 22, 10, 31, 5)),
        ("2026-11-22T06:01:05-0430", utc_ns(2026, 11, 22, 10, 31, 5)),
        ("2026-11-22T10:31:05.123456789Z", utc_ns(2026, 11, 22, 10, 31, 5) + 123456789),
        ("2026-11-22T11:31:05", utc_ns(2026, 11, 22, 10, 31, 5)),
        ("2026-11-22 11:31", utc_ns(2026, 11, 22, 10, 31, 0)),
        ("2026-07-01T11:31:05", utc_ns(2026, 7, 1, 9, 31, 5)),
        ("11:31", utc_ns(2026, 11, 22, 10, 31, 0)),
        ("11:31:05", utc_ns(2026, 11, 22, 10, 31, 5)),
        ("11:31:05.5", utc_ns(2026, 11, 22, 10, 31, 5) + NS // 2),
        ("-90s", NOW - 90 * NS),
        ("-0.5s", NOW - NS // 2),
        ("-5m", NOW - 300 * NS),
        ("-1.5h", NOW - 5400 * NS),
        ("-3d", NOW - 3 * 86400 * NS),
        ("2026-10-25T02:30:00+01:00", utc_ns(2026, 10, 25, 1, 30, 0)),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert parse_moment(text, NOW) == AtTime(expected)


def test_other_forms() -> None:
    assert parse_moment("latest", NOW) == Latest()
    assert parse_moment("@before upgrade", NOW) == AtBookmark("before upgrade")
    assert parse_moment("seq:0", NOW) == AtSeq(0)
    assert parse_moment(" seq:18446744073709551615 ", NOW) == AtSeq((1 << 64) - 1)


@pytest.mark.parametrize(
    "text",
    ["", "now", "@", "seq:", "seq:-1",
      "seq:1x", "5m", "-5", "-5w", "--5m", "10", "25:00", "10:60", "2026-13-01T00:00:00", "2026-11-22",
     "2026-11-22T10:31:05+25:00", "2026-11-22T10:31:05.1234567890", "٢٠٢٦-11-22T10:31:05", "Latest", "0000-01-01T00:00:00"],
)  # fmt: skip
def test_what_is_no_moment_is_refused_with_all_forms(text: str) -> None:
    with pytest.raises(MomentError) as caught:
        parse_moment(text, NOW)
    for form in ("2026-11-22T10:31:05.25+00:00", "10:31", "-5m", "latest", "@bookmark", "seq:N"):
        assert form in caught.value.hint


def test_a_local_time_that_came_twice_is_refused_with_both() -> None:
    with pytest.raises(MomentError, match="twice") as caught:
        parse_moment("2026-10-25T02:30:00", NOW)
    assert "2026-10-25T02:30:00+02:00" in caught.value.hint
    assert "2026-10-25T02:30:00+01:00" in caught.value.hint


def test_a_local_time_that_never_was_is_refused() -> None:
    with pytest.raises(MomentError, match="never was"):
        parse_moment("2026-03-29T02:30:00", NOW)


@pytest.mark.parametrize(
    "time_ns", [NOW, NOW + 1, NOW + 250_000_000, utc_ns(2026, 10, 25, 0, 30, 0), utc_ns(2026, 7, 1, 0, 0, 0) + 7]
)
def test_an_echoed_time_can_be_given_again(time_ns: int) -> None:
    assert parse_moment(format_time(time_ns), NOW) == AtTime(time_ns)


@pytest.mark.parametrize(
    "text",
    ["-99999999999d", "-99999999999999999999999999s", "0001-01-01T00:00:00Z", "0001-01-01T00:00:00", "0001-01-01T00:00+14:00",
     "1969-12-31T23:59:59Z", "9999-12-31T23:59:59Z", "9999-12-31T23:59:59-12:00"],
)  # fmt: skip
def test_times_that_no_calendar_says_are_refused(text: str) -> None:
    with pytest.raises(MomentError, match="not a moment") as caught:
        parse_moment(text, NOW)
    assert "write one of" in caught.value.hint


def test_the_last_time_that_is_taken_can_be_said() -> None:
    moment = parse_moment("9998-12-31T23:59:59Z", NOW)
    assert isinstance(moment, AtTime)
    assert format_time(moment.time_ns).startswith("9999-01-01T00:59:59")
