"""What a user may write for a moment, parsed: times in all forms, ``latest``, ``@bookmark``, ``seq:N``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Final

from vmrewind.errors import MomentError

QUIESCED: Final = "quiesced"
CRASH_CONSISTENT: Final = "crash-consistent"
"""Kinds of points: whether the guest had written out what it held."""

FORMS: Final = (
    "2026-11-22T10:31:05.25+00:00 (without a zone: local time), 10:31 or 10:31:05.25 (today), "
    "-90s, -5m, -2h, -3d (before now), latest, @bookmark, seq:N"
)

_NS: Final = 1_000_000_000
_UNITS_NS: Final = {"s": _NS, "m": 60 * _NS, "h": 3600 * _NS, "d": 86400 * _NS}
_END_NS: Final = 253_370_764_800 * _NS
"""The beginning of year 9999."""
_FRACTION: Final = r"(?:[.,](?P<fraction>\d{1,9}))?"
_CLOCK: Final = r"(?P<hour>\d{2}):(?P<minute>\d{2})(?::(?P<second>\d{2})" + _FRACTION + ")?"
_ZONE: Final = r"(?P<zone>Z|[+-]\d{2}(?::?\d{2})?)?"
_ISO: Final = re.compile(r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})[T ]" + _CLOCK + " ?" + _ZONE, re.ASCII)
_TODAY: Final = re.compile(_CLOCK, re.ASCII)
_RELATIVE: Final = re.compile(r"-(?P<amount>\d+(?:\.\d{1,9})?)(?P<unit>[smhd])", re.ASCII)
_SEQ: Final = re.compile(r"seq:(?P<seq>\d{1,20})", re.ASCII)


@dataclass(frozen=True, slots=True)
class AtTime:
    """The state at a time, ns since the epoch."""

    time_ns: int


@dataclass(frozen=True, slots=True)
class AtSeq:
    """The state right after a record."""

    seq: int


@dataclass(frozen=True, slots=True)
class AtBookmark:
    """The state at a bookmark."""

    name: str


@dataclass(frozen=True, slots=True)
class Latest:
    """The state after the last record."""


Moment = AtTime | AtSeq | AtBookmark | Latest


def parse_moment(text: str, now_ns: int, ago: Callable[[int], int] | None = None) -> Moment:
    """A moment as the user wrote it; ``now_ns`` is the time now, ns since the epoch. Raises MomentError naming the forms.

    ``ago`` gives the time so many ns before now; without it clocks are taken for never stepped.
    """
    text = text.strip()
    if text == "latest":
        return Latest()
    if text.startswith("@") and len(text) > 1:
        return AtBookmark(text[1:])
    if (match := _SEQ.fullmatch(text)) is not None:
        return AtSeq(int(match["seq"]))
    if (match := _RELATIVE.fullmatch(text)) is not None:
        whole, _, fraction = match["amount"].partition(".")
        amount = int(whole) * _NS + int(fraction.ljust(9, "0") or 0)
        age_ns = amount * _UNITS_NS[match["unit"]] // _NS
        return _at(ago(age_ns) if ago is not None else now_ns - age_ns, text)
    if (match := _ISO.fullmatch(text)) is not None:
        return _at(_time_of(match, int(match["year"]), int(match["month"]), int(match["day"]), match["zone"], text), text)
    if (match := _TODAY.fullmatch(text)) is not None:
        today = datetime.fromtimestamp(now_ns // _NS)
        return AtTime(_time_of(match, today.year, today.month, today.day, None, text))
    raise MomentError(f"{text!r} is not a moment", f"write one of: {FORMS}")


def _at(time_ns: int, text: str) -> AtTime:
    """Raises MomentError for a time that no record can have and that calendars of some zones cannot say."""
    if not 0 <= time_ns < _END_NS:
        raise MomentError(f"{text!r} is not a moment of any VM's life: those lie between 1970 and 9999", f"write one of: {FORMS}")
    return AtTime(time_ns)


def _time_of(match: re.Match[str], year: int, month: int, day: int, zone: str | None, text: str) -> int:
    try:
        naive = datetime(year, month, day, int(match["hour"]), int(match["minute"]), int(match["second"] or 0))
        moment = naive.replace(tzinfo=_parse_zone(zone)) if zone else _local(naive, text)
        whole = (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(seconds=1)
    except (ValueError, OverflowError) as error:
        raise MomentError(f"{text!r} is not a moment: {error}", f"write one of: {FORMS}") from error
    return whole * _NS + int((match["fraction"] or "").ljust(9, "0"))


def _parse_zone(zone: str) -> timezone:
    if zone == "Z":
        return UTC
    digits = zone[1:].replace(":", "").ljust(4, "0")
    offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return timezone(-offset if zone[0] == "-" else offset)


def _local(naive: datetime, text: str) -> datetime:
    """A local time with its zone; raises MomentError when clocks were changed then, so that it came twice or never."""
    first, second = naive.astimezone(), naive.replace(fold=1).astimezone()
    if first.utcoffset() == second.utcoffset():
        return first
    if datetime.fromtimestamp(first.timestamp()) != naive:
        raise MomentError(
            f"{text!r} never was: clocks were set forward over it", f"write it with its zone, e.g. {format_time(_ns(first))}"
        )
    raise MomentError(
        f"{text!r} came twice: clocks were set back", f"write {format_time(_ns(first))} or {format_time(_ns(second))}"
    )


def _ns(moment: datetime) -> int:
    return int(moment.timestamp()) * _NS


def format_time(time_ns: int) -> str:
    """A time as it is echoed to users: local, ISO 8601, with its zone and to the nanosecond, as ``parse_moment`` reads it."""
    whole, fraction = divmod(time_ns, _NS)
    moment = datetime.fromtimestamp(whole).astimezone()
    text = moment.isoformat(timespec="seconds")
    return f"{text[:19]}.{fraction:09d}{text[19:]}" if fraction else text


def kind_in_words(kind: str, not_frozen: Sequence[str]) -> str:
    """``quiesced`` is said only of all that was frozen."""
    return f"{kind} except {', '.join(not_frozen)}" if not_frozen else kind
