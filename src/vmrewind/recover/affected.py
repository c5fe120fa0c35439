"""From damage in a repository to the moments that it costs, by the tree of runs and the names of segments.

What is lost at a record of a disk is missing in every later moment of that run and of the runs that go on from there, until one
that has a base of the disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vmrewind.errors import VmrewindError
from vmrewind.history.rows import between, of_disk
from vmrewind.journal.runs import RunInfo
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.repository import VmRepository
from vmrewind.repository.segment import ShippedSegment


@dataclass(frozen=True, slots=True)
class Affected:
    """Moments of a disk that can't be restored: after the records from ``first`` to ``last`` of a run.

    ``disk`` None: of each of its disks, where nothing is left that names them.

    The times (ns) are those of the nearest records that can be read, None where there is none. ``partly``: only as long as the data
    that is lost was not written anew.
    """

    disk: str | None
    run: int
    first: int
    last: int
    from_ns: int | None
    until_ns: int | None
    partly: bool


@dataclass(frozen=True, slots=True)
class Loss:
    """What is lost of a disk: records of a run from ``first`` on, or the base that it begins with."""

    disk: str
    run: int
    first: int
    partly: bool = False


@dataclass(frozen=True, slots=True)
class KnownEnd:
    """``child`` goes on from record ``seq``. ``carried``: it needs that, and has segments; its parent's are carried before them."""

    child: RunInfo
    seq: int
    carried: bool


class Tree:
    """The runs of a VM and what their segments' names say.

    ``bases``: (run, disk) of the bases that are there; ``gone``: segments that were there once.
    """

    def __init__(
        self,
        repository: VmRepository,
        runs: Mapping[int, RunInfo],
        segments: Sequence[SegmentName],
        bases: Collection[tuple[int, str]],
        gone: Iterable[SegmentName],
    ) -> None:
        self._repository = repository
        self.runs = runs
        self._bases = bases
        self._segments: dict[int, list[SegmentName]] = {}
        for name in sorted(segments):
            self._segments.setdefault(name.run, []).append(name)
        self._ends: dict[int, int] = {}
        for name in (*segments, *gone):
            self._ends[name.run] = max(self._ends.get(name.run, 0), name.last)
        self._children: dict[int, list[RunInfo]] = {}
        for info in runs.values():
            if info.parent is not None:
                self._children.setdefault(info.parent.run, []).append(info)

    def segments(self, run: int, disk: int) -> list[SegmentName]:
        """The segments of a run that carry a disk (its index), in order of their first seq."""
        return [name for name in self._segments.get(run, ()) if name.carries(disk)]

    def segments_of(self, run: int) -> Sequence[SegmentName]:
        """Every segment of a run."""
        return self._segments.get(run, ())

    def known_end(self, run: int, target: str) -> KnownEnd | None:
        """Up to where runs that go on from a run say that it went, as far as they have the disk; None if there is none."""
        known: KnownEnd | None = None
        for child in self._children.get(run, ()):
            disk = child.disk(target)
            if child.parent is None or disk is None:
                continue
            carried = target not in child.bases and bool(self.segments(child.run, disk.index))
            if known is None or (carried, child.parent.seq) > (known.carried, known.seq):
                known = KnownEnd(child, child.parent.seq, carried)
        return known

    def first_follower_ns(self, run: int) -> int | None:
        """When the first run began that goes on from a run: it has ended by then; None if there is none."""
        return min((child.start_time_ns for child in self._children.get(run, ())), default=None)

    def _end(self, run: int) -> int:
        """Seq of the last record that a run is known to have had: by its segments, and by the runs that go on from it; 0: none."""
        cuts = [child.parent.seq for child in self._children.get(run, ()) if child.parent is not None]
        return max(self._ends.get(run, 0), *cuts, 0)

    def undescribed(self, run: int) -> Iterator[Affected]:
        """What is lost with a run's description."""
        if names := self.segments_of(run):
            yield Affected(None, run, names[0].first, self._end(run), None, None, partly=False)

    def affected(self, losses: Sequence[Loss]) -> tuple[Affected, ...]:
        """The moments that losses cost, each run of a disk once."""
        found: dict[tuple[str | None, int], Affected] = {}
        for loss in losses:
            if loss.run in self.runs:
                for one in self._spread(loss, set()):
                    before = found.get((one.disk, one.run))
                    if before is None or (one.partly, one.first) < (before.partly, before.first):
                        found[one.disk, one.run] = one
        return tuple(sorted(found.values(), key=lambda one: (one.disk or "", one.run)))

    def _spread(self, loss: Loss, seen: set[int]) -> Iterator[Affected]:
        info = self.runs[loss.run]
        disk = info.disk(loss.disk)
        if disk is None or loss.run in seen:
            return
        seen.add(loss.run)
        last = max(self._end(loss.run), loss.first)
        from_ns = self.time(info, disk.index, loss.first)
        until_ns = self.time(info, disk.index, last, before=True)
        if until_ns is not None and from_ns is not None and until_ns < from_ns:
            until_ns = None  # what is behind the damage cannot be read either
        yield Affected(loss.disk, loss.run, loss.first, last, from_ns, until_ns, loss.partly)
        for child in self._children.get(loss.run, ()):
            if child.parent is not None and child.parent.seq >= loss.first and (child.run, loss.disk) not in self._bases:
                yield from self._spread(Loss(loss.disk, child.run, child.first_seq, loss.partly), seen)

    def time(self, info: RunInfo, disk: int, seq: int, *, before: bool = False) -> int | None:
        """Time (ns) of the first readable record from ``seq`` on, or of the last one up to it; else of what borders on them."""
        names = self.segments(info.run, disk)
        wanted = [name for name in names if name.first <= seq] if before else [name for name in names if name.last >= seq]
        for name in (wanted[::-1] if before else wanted)[:3]:
            segment = ShippedSegment(partial(self._repository.get_segment, name), name)
            try:
                rows = of_disk(segment.rows, disk)
            except VmrewindError:
                continue
            rows = between(rows, 0, seq) if before else between(rows, seq, name.last)
            if len(rows):
                return int(rows["time_ns"][-1 if before else 0])
        return info.start_time_ns if not before and seq <= info.first_seq else None
