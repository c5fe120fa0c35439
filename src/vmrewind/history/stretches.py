"""Which closed segments of a journal are merged into one table, and which are to be next. Segment headers alone are read for it.

A stretch is some consecutive segments of a run, all closed. Whatever voids one of its records is known: a VOID follows its record
closely, and what is closed behind the stretch reaches farther.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment, SegmentFile, UnreadableHeader, segment_files

VOID_DISTANCE_MAX: Final = 2 * fmt.RECORDS_MAX
"""How far behind a record its VOID can be: capture writes the VOIDs of a batch as the next batch."""

SEGMENTS_MAX: Final = 64
RECORDS: Final = 1 << 18
"""A stretch is complete with so many segments, or when it has at least so many records."""
SEGMENTS_MIN: Final = 8
"""So many that a run which has ended has at its end are a stretch too."""

_EXTENSION: Final = ".table"


@dataclass(frozen=True, slots=True, order=True)
class Stretch:
    """Segments ``first`` to ``last`` of a run, by their numbers."""

    run: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """The file name of its merged table."""
        return f"{self.run:016x}-{self.first:08d}-{self.last:08d}{_EXTENSION}"

    @property
    def numbers(self) -> range:
        """Its segments."""
        return range(self.first, self.last + 1)


def merged_directory(journal: Path) -> Path:
    """Where a journal's merged tables are."""
    return journal / "merged"


def merged_stretches(journal: Path) -> list[Stretch]:
    """The stretches that there are tables of, in order, as far as names tell."""
    try:
        names = [path.name for path in merged_directory(journal).iterdir()]
    except OSError:
        return []  # A cache: what was merged is in the segments too.
    return sorted(stretch for name in names if (stretch := _parse(name)) is not None)


def _parse(name: str) -> Stretch | None:
    parts = name.removesuffix(_EXTENSION).split("-")
    with contextlib.suppress(ValueError):
        if len(parts) == 3 and name == (stretch := Stretch(int(parts[0], 16), int(parts[1]), int(parts[2]))).name:
            return stretch
    return None


def live(stretches: Iterable[Stretch], files: Iterable[SegmentFile]) -> list[Stretch]:
    """The stretches of which every segment is still there."""
    known = {(file.run, file.number) for file in files}
    return [stretch for stretch in stretches if all((stretch.run, number) in known for number in stretch.numbers)]


def next_stretch(journal: Path, unusable: Container[tuple[int, int]] = ()) -> Stretch | None:
    """The oldest complete stretch without a table, None if there is none. ``unusable``: (run, number) of segments to do without."""
    files = segment_files(journal)
    merged = {(stretch.run, number) for stretch in live(merged_stretches(journal), files) for number in stretch.numbers}
    by_run: dict[int, list[SegmentFile]] = defaultdict(list)
    for file in files:
        by_run[file.run].append(file)
    for run, segments in by_run.items():
        ended = run != files[-1].run
        for row in _rows([file for file in segments if (run, file.number) not in unusable]):
            free = [(run, file.number) not in merged for file in row]
            begins = (at for at in range(len(row)) if free[at] and not (at and free[at - 1]))
            for begin in begins:
                end = next((at for at in range(begin, len(row)) if not free[at]), len(row))
                if (stretch := _complete(run, row, begin, end, ended)) is not None:
                    return stretch
    return None


def _rows(files: Sequence[SegmentFile]) -> Iterator[list[SegmentFile]]:
    """Files with consecutive numbers, as many together as are."""
    row: list[SegmentFile] = []
    for file in files:
        if row and file.number != row[-1].number + 1:
            yield row
            row = []
        row.append(file)
    if row:
        yield row


def _complete(run: int, row: Sequence[SegmentFile], begin: int, end: int, ended: bool) -> Stretch | None:
    """The stretch of a row's segments from ``begin`` on, before ``end``, if it is complete and all that voids its records is known.

    The row's last segment is never part of it: it may not be closed.
    """
    closed_max = min(end, len(row) - 1)
    try:
        known = _first_seq(row[-1].path)
        first = _first_seq(row[begin].path)
        for after in range(begin + 1, closed_max + 1):
            follows = _first_seq(row[after].path)
            is_full = after - begin == SEGMENTS_MAX or follows - first >= RECORDS
            if is_full or (ended and after == len(row) - 1 and after - begin >= SEGMENTS_MIN):
                reaches = ended or known >= follows + VOID_DISTANCE_MAX
                return Stretch(run, row[begin].number, row[after - 1].number) if reaches else None
    except (FileNotFoundError, UnreadableHeader, CorruptionError, RepositoryError):
        pass
    return None


def _first_seq(path: Path) -> int:
    with Segment(path) as segment:
        return segment.header.first_seq
