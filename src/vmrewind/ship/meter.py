"""How much lies unsent in the journal while the repository cannot be asked or does not answer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from vmrewind.journal.reader import segment_files
from vmrewind.journal.runs import local_runs
from vmrewind.ship.cursor import Cursor, Hole

_BATCHES_MAX: Final = 20_000
"""Batches looked at in one go."""
RUN_DONE: Final = (1 << 64) - 1
"""As in ``shipped.json``: nothing more of a run is to be carried."""


def last_noted(journal: Path) -> dict[int, int]:
    """What ship has noted of each run in ``shipped.json``: the seq up to which the disks that it was told of are carried."""
    try:
        word = json.loads((journal / "shipped.json").read_bytes())
        return {int(run, 16): int(seq) for run, seq in word["carried"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}


def noted_starts(journal: Path) -> list[tuple[int, int]]:
    """(run, first unsent seq) of each run in the journal, as far as is known without the repository."""
    noted = last_noted(journal)
    runs = {info.run: info.first_seq for info in local_runs(journal, lambda _: None)}
    newest = max(runs, default=0)
    held = {file.run for file in segment_files(journal)} | {newest}
    reached: Mapping[int, int] = {run: noted.get(run, first - 1) for run, first in runs.items() if run in held}
    return [(run, seq + 1) for run, seq in sorted(reached.items()) if seq != RUN_DONE]


class Meter:
    """Reads headers only, each once, from ``starts`` on: (run, seq), the newest run's last."""

    def __init__(self, journal: Path, starts: Iterable[tuple[int, int]]) -> None:
        self.starts = list(starts)
        newest = self.starts[-1][0]
        self.unsent_bytes = 0
        self._oldest_ns: int | None = None
        self._cursors = [Cursor(journal, run, seq, growing=run == newest, payloads=False) for run, seq in self.starts]

    def read(self) -> None:
        """Read on to the journal's end. Raises CorruptionError and OSError."""
        left = _BATCHES_MAX
        for cursor in list(self._cursors):
            while left and (found := cursor.read()) is not None:
                left -= 1
                if not isinstance(found, Hole):
                    self.unsent_bytes += found.batch.payload_length
                    self._oldest_ns = self._oldest_ns or found.batch.time_ns
            cursor.release()
            if not left:
                return
            if cursor is not self._cursors[-1]:
                self._cursors.remove(cursor)  # an ended run's

    @property
    def lag_seconds(self) -> float:
        """Age of the oldest record that is not sent, 0 without one."""
        return 0.0 if self._oldest_ns is None else max(0.0, (time.time_ns() - self._oldest_ns) / 1e9)
