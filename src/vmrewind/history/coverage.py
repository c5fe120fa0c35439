"""Coverage: in which intervals of time every moment of a disk can be restored, and why not in the others.

Walked along a branch from its root: a run's records are of use from its base on, or from its parent's end if that was reached
without a hole. A hole ends coverage until the next base; a discontinuity, a rewind or a gap in the journal interrupts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vmrewind.history.branch import Branch, Leg
from vmrewind.history.records import RunRecords
from vmrewind.journal import format as fmt
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position, RunInfo


@dataclass(frozen=True, slots=True)
class Interval:
    """Every moment from ``first`` until ``until_ns`` (inclusive; None: now) can be restored. ``last`` is its last record."""

    first: Position
    last: Position
    until_ns: int | None

    def holds(self, time_ns: int) -> bool:
        """Whether the disk's state at a time is known by this interval."""
        return self.first.time_ns <= time_ns and (self.until_ns is None or time_ns <= self.until_ns)


@dataclass(frozen=True, slots=True)
class Gap:
    """No moment from ``since_ns`` until before ``until_ns`` (None: to the end) can be restored."""

    since_ns: int
    until_ns: int | None
    cause: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """A disk's coverage along a branch. ``stretches`` are the intervals cut at the borders of runs: (leg, first, last seq)."""

    target: str
    intervals: Sequence[Interval]
    gaps: Sequence[Gap]
    stretches: Sequence[tuple[int, int, int]]

    def holds_seq(self, leg: int, seq: int) -> bool:
        """Whether the state after record ``seq`` of a leg can be restored."""
        return any(leg == at and first <= seq <= last for at, first, last in self.stretches)

    def gap_at(self, time_ns: int) -> Gap | None:
        """The gap that a time falls into."""
        inside = (g for g in self.gaps if g.since_ns <= time_ns and (g.until_ns is None or time_ns < g.until_ns))
        return next(inside, None)


class Known(Protocol):
    """What coverage must know besides the branch."""

    def records(self, run: int) -> RunRecords:
        """The records of a run."""

    def base_problem(self, info: RunInfo, target: str) -> str | None:
        """Why the base that a run names for a disk cannot be had, None if it can."""

    @property
    def ends(self) -> Mapping[int, int]:
        """Seq up to which a run is known to have gone, whether or not its records are there."""

    def goes_on(self, run: int) -> bool:
        """Whether nothing can have happened behind the last known record of a run: it ended, or its journal is here."""

    def undeclared_gap(self, run: int, seq: int, target: str) -> tuple[int, str] | None:
        """Since when (ns), and why, what happened to a disk behind record ``seq``, where a run ends, is not in the journal."""

    def nothing_lost(self, info: RunInfo) -> str | None:
        """Why a run of which no record is known may have had some nonetheless, None if it cannot."""


def cover(known: Known, branch: Branch, target: str) -> Coverage:
    """The coverage of one disk along a branch."""
    walk = _Walk(known, branch, target)
    for i in range(len(branch.legs)):
        walk.visit(i)
    return walk.result()


class _Walk:
    def __init__(self, known: Known, branch: Branch, target: str) -> None:
        self._known = known
        self._branch = branch
        self._target = target
        self._intervals: list[Interval] = []
        self._gaps: list[Gap] = []
        self._stretches: list[tuple[int, int, int]] = []
        self._reached = False
        self._composable = False
        """Whether all records are there up to here: what a resync compares with, though a gap may be open."""
        self._open: tuple[int, str] | None = None

    def result(self) -> Coverage:
        if self._open is not None:
            self._gaps.append(Gap(self._open[0], None, self._open[1]))
        return Coverage(self._target, _joined(self._intervals), self._gaps, self._stretches)

    def visit(self, i: int) -> None:
        leg = self._branch.legs[i]
        info = leg.info
        disk = info.disk(self._target)
        if disk is None:
            self._interrupt(info.start_time_ns, f"disk {self._target} was not protected in run {run_name(info.run)}")
            return
        if (problem := self._no_start(i, info)) is not None:
            self._interrupt(info.start_time_ns, problem)
            return
        records = self._known.records(info.run)
        end = leg.cut if leg.cut is not None else max(records.reaches(disk.index), self._known.ends.get(info.run, 0))
        if end < info.first_seq:
            # A run without records leaves the disk as its base or its parent did. But is it one?
            problem = None if leg.cut is not None else self._known.nothing_lost(info)
            if not self._reached and self._target not in info.bases:
                problem = problem or f"{info.gaps[self._target].cause}, and nothing was resynced"
            self._reached = self._composable = problem is None
            if problem is not None:
                self._interrupt(info.start_time_ns, problem)
            return
        hole = next(records.holes(disk.index, info.first_seq, end), None)
        last = end if hole is None else hole.first - 1
        first_seq = info.first_seq
        if self._target in info.gaps and self._target not in info.bases:
            closed = records.gap_closed(disk.index, first_seq, last)
            if closed is None:
                self._interrupt(info.start_time_ns, f"{info.gaps[self._target].cause}, and the resync has not come to its end")
                return
            first_seq = closed
        self._reached = self._composable = hole is None
        cause_after = hole.cause if hole is not None else None
        ranges = list(_outside_gaps(records, disk.index, first_seq, last))
        for at, (first, final, gap_cause) in enumerate(ranges):
            is_last = at == len(ranges) - 1
            self._add(i, leg, disk.index, first, final, gap_cause or (cause_after if is_last else None))
        if not ranges:
            self._interrupt(info.start_time_ns, cause_after or "a gap in the journal")
        if ranges and ranges[-1][2] is not None:
            self._reached = False

    def _no_start(self, i: int, info: RunInfo) -> str | None:
        """Why the disk's state at the run's beginning is unknown, None if it is known."""
        if self._target in info.bases:
            problem = self._known.base_problem(info, self._target)
            if problem is None:
                return None
            if self._target in info.gaps or not self._reached:
                return problem
            return None
        if self._reached or (self._composable and self._target in info.gaps):
            return None
        if i == 0 and self._branch.missing_parent is not None:
            return f"run {run_name(self._branch.missing_parent)}, which it continues, is not known here"
        return self._open[1] if self._open is not None else f"disk {self._target} has no base"

    def _interrupt(self, since_ns: int, cause: str) -> None:
        self._reached = self._composable = False
        if self._open is None:
            self._open = (since_ns, cause)

    def _add(self, i: int, leg: Leg, index: int, first: int, last: int, cause_after: str | None) -> None:
        """Note that [first, last] of a leg can be restored; ``cause_after`` says why the records behind it cannot."""
        records = self._known.records(leg.info.run)
        run = leg.info.run
        start_ns = records.first_time(index, first)
        row = records.row_at(index, last)
        if start_ns is None or row is None:
            return
        last_ns = max(int(row["time_ns"]), start_ns)
        if self._open is not None:
            self._gaps.append(Gap(self._open[0], start_ns, self._open[1]))
            self._open = None
        until_ns: int | None = last_ns
        if cause_after is not None:
            self._open = (last_ns + 1, cause_after)
        elif leg.cut is None:
            if records.tail_damage is not None:
                self._open = (last_ns + 1, records.tail_damage)
            elif (gap := self._known.undeclared_gap(run, records.last_known or last, self._target)) is not None:
                until_ns = max(last_ns, gap[0] - 1)
                self._open = (until_ns + 1, gap[1])
            elif self._known.goes_on(run):
                until_ns = None
        else:
            until_ns = self._until_next(i, leg, index, last_ns)
        self._stretches.append((i, first, last))
        self._intervals.append(Interval(Position(run, first, start_ns), Position(run, last, last_ns), until_ns))

    def _until_next(self, i: int, leg: Leg, index: int, last_ns: int) -> int | None:
        """How long the state after a leg's last record lasts: until the next leg, a rewind, or an unknown change."""
        records = self._known.records(leg.info.run)
        is_last = i + 1 == len(self._branch.legs)
        gap = self._known.undeclared_gap(leg.info.run, leg.cut or 0, self._target) if is_last else None
        if (abandoned_ns := records.first_time(index, (leg.cut or 0) + 1)) is not None:
            cause = f"the VM was taken back to record {leg.cut}; what it did before that: --branch {run_name(leg.info.run)}"
            if not is_last:
                # A disk that was left as it was when others were taken back was not taken back itself.
                apart = self._branch.legs[i + 1].info.gaps.get(self._target)
                self._open = (abandoned_ns, apart.cause if apart is not None else cause)
            elif gap is not None:
                self._open = (abandoned_ns, gap[1])
            else:
                # The VM has not run since: its latest moment is the one that it was taken back to.
                row = records.row_at(index, records.last(index) or 0)
                until_ns = int(row["time_ns"]) + 1 if row is not None else abandoned_ns + 1
                self._gaps.append(Gap(abandoned_ns, until_ns, cause))
            return abandoned_ns - 1
        if gap is not None:
            until_ns = max(last_ns, gap[0] - 1)
            self._open = (until_ns + 1, gap[1])
            return until_ns
        if is_last:
            return None
        following = self._branch.legs[i + 1].info
        if (discontinuity := following.gaps.get(self._target)) is not None:
            until_ns = max(last_ns, discontinuity.since_ns - 1)
            self._open = (until_ns + 1, discontinuity.cause)
            return until_ns
        disk = following.disk(self._target)
        if disk is None:
            return following.start_time_ns
        next_ns = self._known.records(following.run).first_time(disk.index, following.first_seq)
        return next_ns - 1 if next_ns is not None else None


def _outside_gaps(records: RunRecords, index: int, first: int, last: int) -> Iterator[tuple[int, int, str | None]]:
    """The parts of [first, last] outside GAP_BEGIN .. GAP_END, each with the cause of the gap behind it."""
    start: int | None = first
    for rows in records.notes(index, first, last):
        marks = rows[(rows["op"] == fmt.Op.EVENT) & (rows["flags"] >= fmt.Event.GAP_BEGIN)]
        for row in marks:
            seq = int(row["seq"])
            if row["flags"] == fmt.Event.GAP_BEGIN and start is not None:
                if seq > start:
                    yield start, seq - 1, f"the journal has a gap from record {seq} on"
                start = None
            elif row["flags"] == fmt.Event.GAP_END and start is None:
                start = seq
    if start is not None and start <= last:
        yield start, last, None


def _joined(intervals: Sequence[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for interval in intervals:
        if joined and (joined[-1].until_ns is None or joined[-1].until_ns + 1 >= interval.first.time_ns):
            joined[-1] = Interval(joined[-1].first, interval.last, interval.until_ns)
        else:
            joined.append(interval)
    return joined


def common(coverages: Sequence[Coverage]) -> list[tuple[int, int | None]]:
    """(since, until) in ns, inclusive, of the times that all coverages hold; until None: until now."""
    times: list[tuple[int, int | None]] = [(0, None)]
    for coverage in coverages:
        narrowed = []
        for since, until in times:
            for interval in coverage.intervals:
                low = max(since, interval.first.time_ns)
                high = min((t for t in (until, interval.until_ns) if t is not None), default=None)
                if high is None or low <= high:
                    narrowed.append((low, high))
        times = narrowed
    return times
