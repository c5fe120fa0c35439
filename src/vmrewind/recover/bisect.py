"""Bisecting history: which record turned a good state of the disks into a bad one, in as few tests as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vmrewind.errors import UsageError
from vmrewind.history.branch import Branch
from vmrewind.history.history import History
from vmrewind.history.layers import effective
from vmrewind.history.records import RunRecords
from vmrewind.history.rows import ROW
from vmrewind.history.stretches import VOID_DISTANCE_MAX
from vmrewind.journal import format as fmt
from vmrewind.journal.runs import Position
from vmrewind.repository.segment import Rows

_CANDIDATE: Final = np.dtype(
    [("seq", "u8"), ("time_ns", "u8"), ("leg", "u4"), ("disk", "u2"), ("op", "u1"), ("offset", "u8"), ("length", "u8")]
)
_RESUMED: Final = 255
"""In place of an op: no record, but the first moment behind a gap."""


class Verdict(Enum):
    """What a test says of a state."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Change:
    """A record that changed a disk, or the first moment behind a gap (``op`` None): and the state right after it."""

    position: Position
    target: str
    op: fmt.Op | None
    offset: int
    length: int


class Changes:
    """The changes of disks between two moments of a branch, in order, of which the states can be had."""

    def __init__(self, history: History, branch: Branch, targets: Sequence[str], one: Position, other: Position) -> None:
        if one.seq >= other.seq:
            raise UsageError(f"seq {one.seq} is not before seq {other.seq}", "--from is the earlier moment, --to the later one")
        self._branch = branch
        self._targets = targets
        found = [np.empty(0, _CANDIDATE)]
        for number, target in enumerate(targets):
            found += _records(history, branch, number, target, one, other)
            resumed = [
                (interval.first.seq, interval.first.time_ns, branch.leg(interval.first.run), number, _RESUMED, 0, 0)
                for interval in history.coverage(target, branch).intervals
                if one.seq < interval.first.seq <= other.seq
            ]
            found.append(np.array(resumed, _CANDIDATE))
        every = np.concatenate(found)
        # Of a record and a gap's end at one seq the gap counts: what changed meanwhile is in no record.
        every = every[np.lexsort((every["op"], every["seq"]))]
        every = every[np.append(every["seq"][1:] != every["seq"][:-1], True)] if len(every) else every
        self._rows = every[_covered(history, branch, targets, every)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: int) -> Change:
        row = self._rows[at]
        position = Position(self._branch.legs[int(row["leg"])].info.run, int(row["seq"]), int(row["time_ns"]))
        op = None if row["op"] == _RESUMED else fmt.Op(int(row["op"]))
        return Change(position, self._targets[int(row["disk"])], op, int(row["offset"]), int(row["length"]))


def _records(history: History, branch: Branch, number: int, target: str, one: Position, other: Position) -> list[NDArray[np.void]]:
    found = []
    for at, leg in enumerate(branch.legs):
        disk = leg.info.disk(target)
        last = min(other.seq, leg.cut if leg.cut is not None else other.seq)
        first = max(one.seq + 1, leg.info.first_seq)
        if disk is None or first > last:
            continue
        # What is lost of them, their coverage tells.
        rows = history.retrying(partial(_rows, history.records(leg.info.run), disk.index, first, last + VOID_DISTANCE_MAX))
        rows = rows[effective(rows, disk.index, last)]
        candidates = np.empty(len(rows), _CANDIDATE)
        candidates["leg"], candidates["disk"] = at, number
        for name in ("seq", "time_ns", "op", "offset", "length"):
            candidates[name] = rows[name]
        found.append(candidates)
    return found


def _rows(records: RunRecords, disk: int, first: int, last: int) -> Rows:
    return np.concatenate([np.empty(0, ROW), *(rows for _, rows in records.select(disk, first, last))])


def _covered(history: History, branch: Branch, targets: Sequence[str], rows: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which rows' states can be restored, of every disk."""
    covered = np.ones(len(rows), np.bool_)
    for target in targets:
        held = np.zeros(len(rows), np.bool_)
        for leg, first, last in history.coverage(target, branch).stretches:
            held |= (rows["leg"] == leg) & (rows["seq"] >= np.uint64(first)) & (rows["seq"] <= np.uint64(last))
        covered &= held
    return covered


def narrow(count: int, judge: Callable[[int], Verdict]) -> tuple[int, int]:
    """(last good, first bad) of ``count`` states in order: before state 0 all is good, state ``count`` - 1 is known to be bad.

    The two are neighbours, unless everything between them was tried and skipped. About log2(count) tests, besides what is skipped.
    """
    good, bad = -1, count - 1
    skipped: set[int] = set()
    while (at := _untried(good, bad, skipped)) is not None:
        match judge(at):
            case Verdict.GOOD:
                good = at
            case Verdict.BAD:
                bad = at
            case Verdict.SKIP:
                skipped.add(at)
    return good, bad


def _untried(good: int, bad: int, skipped: set[int]) -> int | None:
    """What to try next: the middle, or else what is near it, at growing distances: what cannot be tested tends to be a stretch."""
    middle = (good + bad) // 2
    distance = 0
    while distance < bad - good:
        for at in (middle - distance, middle + distance):
            if good < at < bad and at not in skipped:
                return at
        distance = distance * 2 or 1
    return next((at for at in range(good + 1, bad) if at not in skipped), None)
