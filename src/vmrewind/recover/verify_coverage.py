"""What the names of a VM's segments cover, and what to call a hole in it: a gap that is known of, overdue, or damage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from typing import Final

from vmrewind.errors import CorruptionError
from vmrewind.history.rows import between, of_disk
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import DiskInfo, RunInfo
from vmrewind.paths import VmPaths
from vmrewind.recover.affected import Loss, Tree
from vmrewind.recover.contents import same_rows
from vmrewind.recover.elsewhere import Elsewhere
from vmrewind.recover.findings import PUT_BACK, Finding, Kind
from vmrewind.repository import layout
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.repository import VmRepository
from vmrewind.repository.segment import Rows, ShippedSegment

_OVERDUE_NS: Final = 3600 * 10**9
"""So long after the next run began ship may still be carrying a run that ended, and nobody is to be told."""
_LATER: Final = "not carried yet, or deleted"

Tell = Callable[[int, int], None]
"""Tells of records (first, last) that no object has."""


class Coverage:
    """``late``: segments that came while the VM was listed: they may fill a hole, and what they follow may not have been seen.

    ``gone``: segments that an earlier verification saw.
    """

    def __init__(
        self,
        repository: VmRepository,
        tree: Tree,
        found: Callable[[Finding], None],
        elsewhere: Elsewhere,
        *,
        gone: Collection[SegmentName],
        late: Collection[SegmentName],
    ) -> None:
        self._repository = repository
        self._vm = repository.name
        self._tree = tree
        self._found = found
        self._elsewhere = elsewhere
        self._gone = gone
        self._late = late

    def check(self, info: RunInfo, disk: DiskInfo) -> None:
        """Check what is here of one disk of a run."""
        names = self._tree.segments(info.run, disk.index)
        if not names and self._tree.segments_of(info.run):
            message = f"no record of disk {disk.target} of run {run_name(info.run)} was carried here"
            self._gap(Kind.GAP, info, message, "vmrewind ship on carries it")
            return
        expected = info.first_seq
        last: SegmentName | None = None
        for name in names:
            if name.first > expected:
                self._hole(info, disk, expected, name.first - 1, _carried(info, name))
            elif last is not None and name.first <= last.last:
                self._overlap(last, name, disk)
            expected = max(expected, name.last + 1)
            last = name if last is None or name.last > last.last else last
        known = self._tree.known_end(info.run, disk.target)
        if known is None or known.seq < expected:
            return
        if known.carried:
            here = known.child.disk(disk.target)
            behind = self._tree.segments(known.child.run, here.index)[0] if here is not None else None
            self._hole(info, disk, expected, known.seq, _carried(known.child, behind) if behind is not None else set())
        else:
            self._unless_explained(info, disk, expected, known.seq, lambda first, last: self._tail(info, disk, first, last))

    # -- holes

    def _hole(self, info: RunInfo, disk: DiskInfo, first: int, last: int, behind: Collection[str]) -> None:
        """Records that no object has, in front of one that carries the disks ``behind``."""
        tell: Tell
        if first == info.first_seq and self._elsewhere.history(info, disk.target):
            tell = lambda first, last: self._before(info, disk, first, last)  # noqa: E731
        elif self._others_cover(info, disk, first, last, behind):
            kind = Kind.OVERDUE if self._ended_long_ago(info) else Kind.GAP
            tell = lambda first, last: self._later(kind, info, disk, first, last)  # noqa: E731
        else:
            tell = lambda first, last: self._unexplained(info, disk, first, last)  # noqa: E731
        self._unless_explained(info, disk, first, last, tell)

    def _unless_explained(self, info: RunInfo, disk: DiskInfo, first: int, last: int, tell: Tell) -> None:
        """Tell of records that no object has, but for those that are known to have vanished (told of by themselves) or to come."""
        explained: list[tuple[int, int, str]] = [
            (name.first, name.last, "") for name in (*self._gone, *self._late) if name.run == info.run and name.carries(disk.index)
        ]
        explained += _declared_holes(self._vm, info.run, disk.target)
        at = first
        for low, high, cause in sorted(explained):
            if high < at or low > last:
                continue
            if low > at:
                tell(at, low - 1)
            at, until = high + 1, min(high, last)
            if cause:
                message = f"{_records(max(low, first), until, disk, info)} never came here: {cause}"
                self._gap(Kind.GAP, info, message, "vmrewind backup makes a new base", Loss(disk.target, info.run, max(low, first)))
        if at <= last:
            tell(at, last)

    def _tail(self, info: RunInfo, disk: DiskInfo, first: int, last: int) -> None:
        """The end of a run, of which it is known only that there was more."""
        everybody = {other.target for other in info.disks}
        elsewhere = self._elsewhere.history(info, disk.target)
        # Carried of other disks alone: this one was switched off.
        chosen = self._others_cover(info, disk, first, last, everybody)
        kind = Kind.OVERDUE if self._ended_long_ago(info) and not elsewhere and not chosen else Kind.GAP
        self._later(kind, info, disk, first, last)

    def _others_cover(self, info: RunInfo, disk: DiskInfo, first: int, last: int, behind: Collection[str]) -> bool:
        """Whether another one of the disks ``behind`` has segments of its own of these records: this one was not carried with it.

        So it is when a disk is switched on later: ship catches up, and carries it beside the others from the switching on.
        """
        for other in info.disks:
            if other.index == disk.index or other.target not in behind:
                continue
            at = first
            late = (name for name in self._late if name.run == info.run and name.carries(other.index))
            for name in sorted([*self._tree.segments(info.run, other.index), *late]):
                if name.first <= at and not name.carries(disk.index):
                    at = max(at, name.last + 1)
            if at > last:
                return True
        return False

    def _ended_long_ago(self, info: RunInfo) -> bool:
        began_ns = self._tree.first_follower_ns(info.run)
        return began_ns is not None and began_ns + _OVERDUE_NS < time.time_ns()

    # -- what is told

    def _gap(self, kind: Kind, info: RunInfo, message: str, hint: str, *losses: Loss) -> None:
        self._found(Finding(kind, self._vm, layout.run_key(self._vm, info.run), message, hint, self._tree.affected(losses)))

    def _before(self, info: RunInfo, disk: DiskInfo, first: int, last: int) -> None:
        message = f"{_records(first, last, disk, info)} never came here: they are older than this repository"
        self._gap(
            Kind.GAP, info, message, "the repository that the VM had before has them", Loss(disk.target, info.run, info.first_seq)
        )

    def _later(self, kind: Kind, info: RunInfo, disk: DiskInfo, first: int, last: int) -> None:
        message = f"{_records(first, last, disk, info)} are not here: {_LATER}"
        hint = f"vmrewind status, on host {info.host}, tells whether ship has yet to carry them"
        if kind is Kind.OVERDUE:
            hint += f"; if it has nothing left to carry, they were deleted, or shipping was off when the run ended: {PUT_BACK}"
        self._gap(kind, info, message, hint, Loss(disk.target, info.run, first))

    def _unexplained(self, info: RunInfo, disk: DiskInfo, first: int, last: int) -> None:
        key = f"{layout.segment_prefix(self._vm)}{run_name(info.run)}-{first:016x}-…"
        message = f"missing: {_records(first, last, disk, info)} are in no object"
        hint = (
            f"they were deleted, or the journal recycled them before they were carried: then host {info.host} knows of it "
            f"(vmrewind events: ship.hole) and vmrewind backup makes a new base; else {PUT_BACK}"
        )
        affected = self._tree.affected([Loss(disk.target, info.run, first)])
        self._found(Finding(Kind.DAMAGE, self._vm, key, message, hint, affected))

    # -- overlaps

    def _overlap(self, one: SegmentName, other: SegmentName, disk: DiskInfo) -> None:
        """A put that was given up may have arrived late: then the records are the same."""
        low, high = other.first, min(one.last, other.last)
        try:
            rows = [self._rows(name, disk.index, low, high) for name in (one, other)]
        except CorruptionError:
            return  # what is wrong with the object itself is told where its content is read
        if not same_rows(*rows):
            message = f"has other records {low} to {high} of disk {disk.target} than {one.key}"
            affected = self._tree.affected([Loss(disk.target, other.run, low)])
            hint = "find out what else ships this VM to this repository"
            self._found(Finding(Kind.DAMAGE, self._vm, other.key, message, hint, affected))

    def _rows(self, name: SegmentName, disk: int, low: int, high: int) -> Rows:
        segment = ShippedSegment(lambda offset, length: self._repository.get_segment(name, offset, length), name)
        return of_disk(between(segment.rows, low, high), disk)


def _carried(info: RunInfo, name: SegmentName) -> set[str]:
    """The targets of a segment's disks."""
    return {disk.target for disk in info.disks if name.carries(disk.index)}


def _records(first: int, last: int, disk: DiskInfo, info: RunInfo) -> str:
    return f"records {first} to {last} of disk {disk.target} of run {run_name(info.run)}"


def _declared_holes(vm: str, run: int, target: str) -> Iterator[tuple[int, int, str]]:
    """(first, last, cause) of what ship, on this host, could not carry of a run."""
    try:
        lines = VmPaths(vm).events(run).read_bytes().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        if b"ship.hole" not in line:
            continue
        try:
            event = json.loads(line)
            if event["event"] == "ship.hole" and target in event["disks"]:
                yield int(event["first_seq"]), int(event["last_seq"]), str(event["cause"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut off
