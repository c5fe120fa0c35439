"""From a moment as the user wrote it to a position on a branch, or a refusal that names the nearest possible moments."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from vmrewind.errors import MomentError
from vmrewind.history.bookmarks import bookmarks
from vmrewind.history.branch import Branch
from vmrewind.history.coverage import Coverage, common
from vmrewind.history.history import History
from vmrewind.history.moments import AtBookmark, AtSeq, AtTime, Latest, Moment, format_time, parse_moment
from vmrewind.history.steps import ago, steps
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position


def resolve(history: History, branch: Branch, text: str, targets: Sequence[str], at_ns: int | None = None) -> Position:
    """The position that a moment means for the disks ``targets``: one at which every one of them can be restored.

    ``at_ns`` is the time now, by default when the history was opened. Raises MomentError: malformed, unknown, in the future, or
    outside coverage; the hint says what is possible instead.
    """
    current_ns = history.opened_ns if at_ns is None else at_ns

    def resolved() -> Position:
        resolver = _Resolver(history, branch, targets, current_ns)
        return resolver.resolve(parse_moment(text, current_ns, resolver.ago), text)

    return history.retrying(resolved)


class _Resolver:
    def __init__(self, history: History, branch: Branch, targets: Sequence[str], current_ns: int) -> None:
        self._history = history
        self._branch = branch
        self._targets = targets
        self._coverages = [history.coverage(target, branch) for target in targets]
        for coverage in self._coverages:
            if not coverage.intervals:
                cause = coverage.gaps[-1].cause if coverage.gaps else "nothing was recorded yet"
                way_out = history.completed_by if coverage.target in history.begun else self._way_out()
                raise MomentError(f"no moment of disk {coverage.target} can be restored: {cause}", way_out)
        # After a step back of the wall clock the journal's time is ahead of it for a while.
        self._current_ns = current_ns
        self._now_ns = max(current_ns, *(coverage.intervals[-1].last.time_ns for coverage in self._coverages))

    def ago(self, age_ns: int) -> int:
        """The journal's time so long ago; where it is ahead of all that is known, nothing was recorded since."""
        return min(ago(steps(self._history, self._branch), self._current_ns, age_ns), self._now_ns)

    def resolve(self, moment: Moment, text: str) -> Position:
        match moment:
            case AtTime(time_ns):
                return self._at_time(time_ns)
            case AtSeq(seq):
                return self._at_seq(seq, text)
            case AtBookmark(name):
                return self._at_bookmark(name)
            case Latest():
                return self._latest()

    def _at_time(self, time_ns: int) -> Position:
        if time_ns > self._now_ns:
            raise MomentError(f"{format_time(time_ns)} is in the future", self._nearest(self._now_ns))
        for coverage in self._coverages:
            if not any(interval.holds(time_ns) for interval in coverage.intervals):
                raise self._outside(coverage, time_ns, format_time(time_ns))
        position = max((self._last_at(coverage, time_ns) for coverage in self._coverages), key=lambda p: p.seq)
        return self._checked(position, format_time(time_ns))

    def _last_at(self, coverage: Coverage, time_ns: int) -> Position:
        """The last known record of a disk with a time of at most ``time_ns``, which its coverage holds."""
        found: Position | None = None
        for at, first, last in coverage.stretches:
            info = self._branch.legs[at].info
            disk = info.disk(coverage.target)
            assert disk is not None, "a stretch is of a run that has the disk"
            records = self._history.records(info.run)
            row = records.last_row_at(disk.index, time_ns)
            if row is not None and int(row["seq"]) > last:
                row = records.row_at(disk.index, last)
            if row is not None and int(row["seq"]) >= first:
                found = Position(info.run, int(row["seq"]), int(row["time_ns"]))
        assert found is not None, "the interval that holds the time begins with a record"
        return found

    def _at_seq(self, seq: int, text: str) -> Position:
        at = self._branch.leg_of_seq(seq)
        if at is None:
            first = self._branch.legs[0].info
            time_ns = self._coverages[0].intervals[0].first.time_ns
            raise MomentError(f"{text}: the history begins with record {first.first_seq}", self._nearest(time_ns))
        info = self._branch.legs[at].info
        time_ns = 0
        known_end = 0
        for target in self._targets:
            disk = info.disk(target)
            records = self._history.records(info.run)
            if disk is not None:
                known_end = max(known_end, records.reaches(disk.index), self._history.ends.get(info.run, 0))
                row = records.row_at(disk.index, seq)
                time_ns = max(time_ns, int(row["time_ns"]) if row is not None else info.start_time_ns)
        if seq > known_end:
            raise MomentError(f"{text}: the last record is {known_end}", self._nearest(self._now_ns))
        return self._checked(Position(info.run, seq, time_ns), text)

    def _at_bookmark(self, name: str) -> Position:
        marks = bookmarks(self._history, self._branch)
        every = [mark for mark in marks if mark.problem is None]
        found = [mark.position for mark in every if mark.name == name]
        if not found:
            similar = difflib.get_close_matches(name, [mark.name for mark in every], n=3, cutoff=0.4)
            names = ", ".join(f"@{known}" for known in similar or sorted({mark.name for mark in every})[:10])
            hints = [f"there are: {names}" if names else self._branches()]
            hints += [f"a bookmark at seq {mark.position.seq} cannot be read: {mark.problem}" for mark in marks if mark.problem]
            raise MomentError(f"there is no bookmark {name!r} on this branch", "; ".join(hints))
        if len(found) > 1:
            choices = " and ".join(f"{format_time(p.time_ns)} (seq:{p.seq})" for p in found)
            raise MomentError(f"bookmark {name!r} was set more than once: {choices}", "choose one by its seq:N")
        return self._checked(found[0], f"@{name}")

    def _latest(self) -> Position:
        for coverage in self._coverages:
            if coverage.gaps and coverage.gaps[-1].until_ns is None:
                raise self._outside(coverage, coverage.gaps[-1].since_ns, "latest")
        # Where disks were shipped apart, one may be known further than another.
        ends = [coverage.intervals[-1].last for coverage in self._coverages]
        return self._checked(min(ends, key=lambda position: position.seq), "latest")

    def _checked(self, position: Position, text: str) -> Position:
        at = self._branch.leg(position.run)
        for coverage in self._coverages:
            if not coverage.holds_seq(at, position.seq):
                raise self._outside(coverage, position.time_ns, text)
        return position

    def _outside(self, coverage: Coverage, time_ns: int, text: str) -> MomentError:
        # A record inside a gap may be known by the time of the last one before the gap only.
        gap = coverage.gap_at(time_ns) or coverage.gap_at(time_ns + 1)
        if gap is not None:
            why = gap.cause
        elif time_ns < coverage.intervals[0].first.time_ns:
            why = f"its history begins at {format_time(coverage.intervals[0].first.time_ns)}"
        else:
            why = f"nothing is known of it after {format_time(coverage.intervals[-1].last.time_ns)}"
        return MomentError(f"{text}: disk {coverage.target} cannot be restored to that moment: {why}", self._nearest(time_ns))

    def _nearest(self, time_ns: int) -> str:
        """The nearest possible moments before and after a time."""
        times = common(self._coverages)
        before = [min(time_ns, until if until is not None else self._now_ns) for since, until in times if since <= time_ns]
        after = [since for since, _ in times if since > time_ns]
        parts = []
        if before:
            position = self._at_common(max(before))
            parts.append(f"before: {format_time(position.time_ns)} (seq:{position.seq})")
        if after:
            position = self._at_common(min(after))
            parts.append(f"after: {format_time(position.time_ns)} (seq:{position.seq})")
        return f"nearest possible moment {', '.join(parts)}" if parts else self._branches()

    def _at_common(self, time_ns: int) -> Position:
        return max((self._last_at(coverage, time_ns) for coverage in self._coverages), key=lambda p: p.seq)

    def _way_out(self) -> str:
        """What to do where there is no moment at all."""
        begin = f"stop the VM and run `vmrewind backup {self._history.name}`: with its next protected start a history begins"
        return f"{begin}; {self._branches()}" if len(self._history.runs) > 1 else begin

    def _branches(self) -> str:
        return "branches: " + ", ".join(run_name(run) for run in self._history.runs)
