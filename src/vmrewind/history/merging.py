"""``python -m vmrewind.history.merging JOURNAL``: merge what is complete, remove what is left of recycled segments, and end.

The keeper starts it, as a process of its own that yields to everybody, when a stretch is complete: capture has no part in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from pathlib import Path
from typing import Final

import numpy as np

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.history.layers import effective, layer_of, owners_of
from vmrewind.history.merged import Member, MergedTable, member_of, write_table
from vmrewind.history.rows import DATA_OPS, RecordTables
from vmrewind.history.stretches import VOID_DISTANCE_MAX, Stretch, live, merged_directory, merged_stretches, next_stretch
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment, UnreadableHeader, segment_files
from vmrewind.journal.runs import private_directory
from vmrewind.repository.segment import Rows

_EVERY: Final = (1 << 64) - 1


def main() -> int:
    """Merge a journal's complete stretches; the exit code."""
    os.nice(19)
    try:
        merge(Path(sys.argv[1]))
    except OSError as error:
        sys.stderr.write(f"vmrewind: tables are not merged: {error}\n")
        return 1
    return 0


def merge(journal: Path) -> list[Stretch]:
    """Make the tables of all complete stretches, unless somebody is at it; returns the stretches. Raises OSError."""
    directory = merged_directory(journal)
    private_directory(directory)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_leftovers(journal)
        made: list[Stretch] = []
        unusable: set[tuple[int, int]] = set()
        while (stretch := next_stretch(journal, unusable)) is not None:
            try:
                _merge(journal, stretch)
                made.append(stretch)
            except _Unusable as error:
                unusable.add((stretch.run, error.number))
        return made
    except BlockingIOError:
        return []
    except OSError:
        # Half a table on storage that is full would be in the way of who needs it more.
        _remove_leftovers(journal)
        raise
    finally:
        os.close(lock)


class _Unusable(Exception):
    """A segment has gone, or does not reach up to the next one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _remove_leftovers(journal: Path) -> None:
    # In this order: the table of a segment that is new since is not there yet.
    stretches = merged_stretches(journal)
    kept = {stretch.name for stretch in live(stretches, segment_files(journal)) if _fits(journal, stretch)}
    for path in merged_directory(journal).iterdir():
        if path.name not in kept:
            # What cannot be removed is no reason to make none.
            with contextlib.suppress(OSError):
                path.unlink()


def _fits(journal: Path, stretch: Stretch) -> bool:
    with contextlib.ExitStack() as opened:
        segments = {number: _opened(opened, journal, stretch.run, number) for number in stretch.numbers}
        try:
            table = opened.enter_context(contextlib.closing(MergedTable(merged_directory(journal) / stretch.name, stretch)))
        except (OSError, CorruptionError):
            return False
        return table.fits({number: segment for number, segment in segments.items() if segment is not None})


def _merge(journal: Path, stretch: Stretch) -> None:
    """Make the table of a stretch. Raises _Unusable, OSError."""
    members: list[Member] = []
    notes: list[Rows] = []
    read: list[Rows] = []
    voided: list[Rows] = []
    newest = max((file.number for file in segment_files(journal, stretch.run)), default=0)
    with contextlib.ExitStack() as opened:
        following = _opened(opened, journal, stretch.run, stretch.first)
        for number in range(stretch.first, newest + 1):
            # A segment behind the stretch that cannot be read may hold a VOID of the stretch's last records.
            blamed = min(number, stretch.last)
            if (segment := following) is None:
                raise _Unusable(blamed)
            if number > stretch.last and segment.header.first_seq > members[-1].last_seq + VOID_DISTANCE_MAX:
                break
            tables, unreadable = segment.readable_tables()
            if unreadable is not None:
                raise _Unusable(blamed)
            rows = RecordTables(tables)
            following = _opened(opened, journal, stretch.run, number + 1) if number < newest else None
            if following is not None and rows.last_seq != following.header.first_seq - 1:
                raise _Unusable(blamed)
            found = rows.notes
            voided.append(found[found["op"] == fmt.Op.VOID])
            if number <= stretch.last:
                if following is None:
                    raise _Unusable(number)
                try:
                    members.append(member_of(segment, tables.positions[-1], tables.number - 1))
                except (OSError, CorruptionError) as error:
                    raise _Unusable(number) from error
                notes.append(found)
                read.append(rows.rows)
        void = np.concatenate(voided)["offset"]
        disks = np.unique(np.concatenate([rows["disk"][np.isin(rows["op"], DATA_OPS)] for rows in read])).tolist()
        layers = {
            disk: layer_of([owners_of(rows, effective(rows, disk, _EVERY, void), stretch.name) for rows in read]) for disk in disks
        }
    write_table(merged_directory(journal) / stretch.name, members, np.concatenate(notes), layers)


def _opened(stack: contextlib.ExitStack, journal: Path, run: int, number: int) -> Segment | None:
    try:
        return stack.enter_context(Segment(journal / fmt.segment_name(run, number)))
    except (FileNotFoundError, UnreadableHeader, CorruptionError, RepositoryError):
        return None


if __name__ == "__main__":
    sys.exit(main())
