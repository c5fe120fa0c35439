"""Which of a run's gaps a resync has closed, remembered beside the run's description.

The record that says so may have been recycled by the time the next start asks, and without it that start would have to make a base.
"""

from __future__ import annotations

from pathlib import Path

from vmrewind.journal import format as fmt
from vmrewind.journal.content import content
from vmrewind.journal.runs import run_path, write_durably


def note_gap_closed(journal: Path, run: int, disk: int, seq: int) -> None:
    """Remember that the run's gap of the disk (number in records) ends no later than ``seq``; durable when it returns."""
    write_durably(_path(journal, run, disk), b"%d\n" % seq)


def gap_noted_closed(journal: Path, run: int, disk: int, last: int) -> bool:
    """Whether the gap was closed before ``last``, up to where the run's records are known to be.

    One that was closed later has lost its record, to a power loss: it is open.
    """
    try:
        return int(content(_path(journal, run, disk))) <= last
    except (FileNotFoundError, ValueError):
        return False


def _path(journal: Path, run: int, disk: int) -> Path:
    return run_path(journal, run).with_name(f"{fmt.run_name(run)}-{disk}.closed")
