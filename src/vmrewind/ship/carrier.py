"""One entry of the plan on its way: read from the journal, gathered, handed over in segments."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Final

from vmrewind.errors import CorruptionError
from vmrewind.journal import format as fmt
from vmrewind.ship.cursor import Cursor, Hole
from vmrewind.ship.gather import PAYLOAD_MAX, Gathered
from vmrewind.ship.patience import Patience
from vmrewind.ship.plan import Entry

AGE_SECONDS: Final = 1.0
"""The oldest record that waits to be sent is sent at this age."""
QUIET_SECONDS: Final = 60.0
"""As long may the repository not know that the disks carried were not written to while others were."""
_READ_MAX: Final = 64 << 20
"""Bytes read at one go, however few of them are carried: instructions and signals are looked at in between."""


class Pulled(enum.Enum):
    """Why a pull ended."""

    FULL = enum.auto()
    """A segment is full, or what comes next cannot be read: what is there is to be sent."""
    MORE = enum.auto()
    """Enough was read at one go."""
    WAITING = enum.auto()
    """The journal has no more (yet)."""
    DONE = enum.auto()
    """The entry's last record was reached."""


class Carrier:
    """Gathers an entry's records. ``sent`` starts the next segment behind what was handed over."""

    def __init__(self, journal: Path, entry: Entry, patience: Patience, *, growing: bool) -> None:
        self.entry = entry
        carried = {index for index in range(64) if entry.mask >> index & 1} | {fmt.ALL_DISKS}
        self.cursor = Cursor(journal, entry.run, entry.first, growing=growing, patience=patience, disks=carried)
        self.gathered = Gathered(entry, entry.first)
        self._due_at: float | None = None
        self._since = time.monotonic()
        self._passed_time_ns: int | None = None
        self.behind = True
        """Whether the last pull left anything in the journal."""

    def pull(self, payload_max: int = PAYLOAD_MAX) -> Pulled | Hole:
        """Read on until one of the reasons to stop; ``payload_max`` bytes make a segment full.

        A hole is met after everything before it was gathered. Raises OSError and CorruptionError, with nothing gathered.
        """
        self.gathered.payload_max = payload_max
        pulled = self._read()
        self._select()
        self.behind = pulled not in (Pulled.WAITING, Pulled.DONE)
        return pulled

    @property
    def oldest_time_ns(self) -> int | None:
        """Time of the oldest record that is not handed over, as far as it is known; None without one."""
        if self.gathered.oldest_time_ns is not None:
            return self.gathered.oldest_time_ns
        return self._passed_time_ns if self.behind else None

    def _read(self) -> Pulled | Hole:
        read_bytes = 0
        while read_bytes < _READ_MAX:
            if self.gathered.full:
                return Pulled.FULL
            if self.entry.last is not None and self.cursor.next_seq > self.entry.last:
                return Pulled.DONE
            try:
                found = self.cursor.read()
            except (OSError, CorruptionError):
                self.gathered.select()
                if self.gathered:
                    return Pulled.FULL
                raise
            if found is None:
                return Pulled.WAITING
            if isinstance(found, Hole):
                return found
            self.gathered.add(found.batch, found.payload)
            read_bytes += len(found.payload) + len(found.batch.table)
        return Pulled.MORE

    def _select(self) -> None:
        self.gathered.select()
        if self._due_at is None and self.gathered.oldest_time_ns is not None:
            # By the monotonic clock, so that a step of the wall clock neither holds records back nor hurries them.
            age_seconds = (time.time_ns() - self.gathered.oldest_time_ns) / 1e9
            self._due_at = time.monotonic() + AGE_SECONDS - min(max(age_seconds, 0.0), AGE_SECONDS)

    def due_in(self) -> float:
        """Seconds until what is gathered is to be sent, 0 if it is due."""
        if self.gathered.last < self.gathered.first:
            return QUIET_SECONDS
        due_at = self._since + QUIET_SECONDS if self._due_at is None else self._due_at
        return max(0.0, due_at - time.monotonic())

    def carries_on(self, entry: Entry) -> bool:
        """Whether ``entry`` is what is left of this carrier's own, nothing being gathered now."""
        mine = self.entry
        return (mine.run, mine.mask, mine.last, self.gathered.first) == (entry.run, entry.mask, entry.last, entry.first)

    def next_from(self, first: int) -> None:
        """Begin the next segment at ``first``."""
        self._passed_time_ns = self.gathered.last_time_ns or self._passed_time_ns
        self.gathered = Gathered(self.entry, first)
        self._due_at = None
        self._since = time.monotonic()
