"""How much lies unsent in the journal while the repository cannot be asked, or nobody carries it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Batch, segment_files
from vmrewind.journal.runs import local_runs
from vmrewind.ship.cursor import Cursor, Hole
from vmrewind.ship.noted import last_noted

_BATCHES_MAX: Final = 20_000
"""Batches looked at in one go."""
_COUNT_SECONDS: Final = 2.0
"""A VM's stop, and whoever asks for its status, wait for the count that long; then it is a lower bound."""
RUN_DONE: Final = (1 << 64) - 1
"""As in ``shipped.json``: nothing more of a run is to be carried."""


@dataclass(frozen=True, slots=True)
class Start:
    """From where on a run's records are unsent: the first seq of each disk carried, by its index."""

    run: int
    firsts: Mapping[int, int]

    @property
    def first(self) -> int:
        """The first seq that any of the disks lacks; that of the whole VM's records."""
        return min(self.firsts.values())


def noted_starts(journal: Path, disks: Collection[str]) -> list[Start]:
    """Where each run in the journal goes on, the newest last, as far as is known without the repository."""
    noted = last_noted(journal, disks)
    runs = {info.run: info for info in local_runs(journal, lambda _: None)}
    newest = max(runs, default=0)
    starts = []
    for run in sorted(runs.keys() & ({file.run for file in segment_files(journal)} | {newest})):
        reached = noted.get(run, runs[run].first_seq - 1)
        firsts = {disk.index: reached + 1 for disk in runs[run].disks if disk.target in disks}
        if reached != RUN_DONE and firsts:
            starts.append(Start(run, firsts))
    return starts


class Meter:
    """Reads headers and tables only, each once, from ``starts`` on; the newest run's is the last."""

    def __init__(self, journal: Path, starts: Iterable[Start]) -> None:
        self.starts = list(starts)
        self.sent_bytes = 0
        """Of what was counted or will be: sent since."""
        self._counted_bytes = 0
        self.counted = False
        """Whether the journal's end was reached."""
        self._oldest_ns: int | None = None
        self._ahead = [
            (start, Cursor(journal, start.run, start.first, growing=start is self.starts[-1], payloads=False))
            for start in self.starts
        ]

    def read(self) -> None:
        """Read on, to the journal's end if that is not far. Raises CorruptionError and OSError."""
        left = _BATCHES_MAX
        for start, cursor in list(self._ahead):
            while left and (found := cursor.read()) is not None:
                left -= 1
                if not isinstance(found, Hole):
                    self._count(start, found.batch)
            cursor.release()
            if not left:
                return
            if start is not self.starts[-1]:
                self._ahead.pop(0)  # an ended run's
        self.counted = True

    def _count(self, start: Start, batch: Batch) -> None:
        for i, (_, length, disk, op, _, _) in enumerate(fmt.RECORD.iter_unpack(batch.table)):
            first = start.first if disk == fmt.ALL_DISKS else start.firsts.get(disk)
            if first is not None and batch.first_seq + i >= first:
                if op in fmt.PAYLOAD_OPS:
                    self._counted_bytes += fmt.padded(length)
                if self._oldest_ns is None:
                    self._oldest_ns = batch.time_ns + i

    @property
    def unsent_bytes(self) -> int:
        """Payload counted that is not sent."""
        return max(0, self._counted_bytes - self.sent_bytes)

    @property
    def empty(self) -> bool:
        """Whether no unsent record was found."""
        return self._oldest_ns is None

    @property
    def lag_seconds(self) -> float:
        """Age of the oldest record that is not sent, 0 without one."""
        return 0.0 if self._oldest_ns is None else max(0.0, (time.time_ns() - self._oldest_ns) / 1e9)


@dataclass(frozen=True, slots=True)
class Unsent:
    """What a stopped VM's journal holds and its repository does not."""

    vm: str
    unsent_bytes: int
    lag_seconds: float
    counted: bool
    """Whether that is all; else there is more."""

    def words(self) -> str:
        """For people, and what to do."""
        least = "" if self.counted else "at least "
        return f"{least}{self.unsent_bytes} bytes are not in the repository: `vmrewind ship on {self.vm}` carries them"


def unsent(vm: str, journal: Path, disks: Collection[str]) -> Unsent | None:
    """What is left of a VM that nobody ships now; None if nothing is. Raises CorruptionError and OSError."""
    starts = noted_starts(journal, disks)
    if not starts:
        return None
    meter = Meter(journal, starts)
    until = time.monotonic() + _COUNT_SECONDS
    while not meter.counted and time.monotonic() < until:
        meter.read()
    return None if meter.empty else Unsent(vm, meter.unsent_bytes, round(meter.lag_seconds, 1), meter.counted)
