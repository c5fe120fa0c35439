"""Whether a disk's history can be gone on from: a base below it, and no hole between that base and the moment.

Answered from names and headers alone (local segment headers, the names of shipped objects), so that a VM's start costs the same
however long its history is; only whether a resync came to its end is read from records. Damage
inside a segment is found by whoever reads it, not here.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.history.records import RunRecords
from vmrewind.history.sources import ObjectCache, ShippedSource
from vmrewind.journal import format as fmt
from vmrewind.journal.closed_gaps import gap_noted_closed
from vmrewind.journal.reader import Segment, records, segment_files
from vmrewind.journal.runs import Position, RunInfo
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.repository import VmRepository

Range = tuple[int, int]
"""(first seq, last seq)."""


def goes_on(
    journal: Path,
    repository: VmRepository | None,
    runs: Iterable[RunInfo],
    position: Position,
    target: str,
    size: int,
    begun: str | None = None,
) -> bool:
    """Whether the disk's state at ``position`` can be composed, its size unchanged; ``repository`` None counts as having all.

    ``begun``: the id of a base that the repository is about to have.
    """
    known = {info.run: info for info in runs}
    shipped = list(repository.segments()) if repository is not None else []
    run, last = position.run, position.seq
    while (info := known.get(run)) is not None:
        disk = info.disk(target)
        if disk is None or disk.size != size:
            return False
        if repository is not None and not _covers(_ranges(journal, info, shipped, disk.index, last), info.first_seq, last):
            return False
        base = info.bases.get(target)
        if base is not None:
            return repository is None or base == begun or base in repository.bases(target)
        if target in info.gaps and not (
            gap_closed(journal, run, disk.index, last) or _gap_closed_there(repository, shipped, run, disk.index, last)
        ):
            return False
        if info.parent is None:
            return False
        run, last = info.parent.run, info.parent.seq
    return False


def _ranges(journal: Path, info: RunInfo, shipped: list[SegmentName], disk: int, last: int) -> list[Range]:
    """What is there of a run's records of a disk: in local segments, and in the repository."""
    found: list[Range] = [(name.first, name.last) for name in shipped if name.run == info.run and name.carries(disk)]
    firsts: list[tuple[int, int]] = []
    for file in segment_files(journal, info.run):
        try:
            with Segment(file.path) as segment:
                firsts.append((file.number, segment.header.first_seq))
        except (CorruptionError, OSError):
            continue
    for (number, first), (following, then) in pairwise(firsts):
        if following == number + 1:
            found.append((first, then - 1))
    if firsts:
        found.append((firsts[-1][1], last))
    return found


def _covers(ranges: list[Range], first: int, last: int) -> bool:
    """Whether the ranges together hold every seq in [first, last]."""
    for begin, end in sorted(ranges):
        if begin > first:
            break
        first = max(first, end + 1)
    return first > last


def gap_closed(journal: Path, run: int, disk: int, last: int) -> bool:
    """Whether a resync came to its end in a run whose records are known up to ``last``, as far as is known here."""
    if gap_noted_closed(journal, run, disk, last):
        return True
    for file in segment_files(journal, run):
        try:
            with Segment(file.path) as segment:
                for batch in segment.batches():
                    for record in records(batch) if batch.count == 1 else ():
                        if record.op == fmt.Op.EVENT and record.flags == fmt.Event.GAP_END and record.disk == disk:
                            return True
        except (CorruptionError, OSError):
            continue
    return False


def _gap_closed_there(repository: VmRepository | None, shipped: list[SegmentName], run: int, disk: int, last: int) -> bool:
    """The same of a run whose segments are not here: it ran on another host, or was recycled."""
    if repository is None:
        return False
    cache = ObjectCache()
    sources = [ShippedSource(repository, name, cache) for name in shipped if name.run == run and name.carries(disk)]
    try:
        return RunRecords(run, [], sources, []).gap_closed(disk, 0, last) is not None
    except (CorruptionError, RepositoryError):
        return False


def newest_run(runs: Iterable[RunInfo]) -> int:
    """The greatest run id, 0 without any: every later run must have a greater one, because runs are ordered by their ids."""
    return max((info.run for info in runs), default=0)
