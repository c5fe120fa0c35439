"""How long ship waits for what the journal's storage does not give back, before it takes it for damage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

UNREADABLE_SECONDS: Final = 600.0
"""What storage fails to give back for so long is damage: a path to it that went away has come back by then."""
_FORGOTTEN_SECONDS: Final = 90.0
"""A file that nobody tried to read for so long may have been readable meanwhile. Ship tries again every half minute."""


class UnreadableNow(OSError):
    """Storage does not give back a place of the journal, and patience has not ended yet."""


class Patience:
    """Since when each file of the journal has failed to be read. One for all cursors that take up one another's work.

    It is had with a file once: bad sectors lie side by side, and to wait for each would take days.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = UNREADABLE_SECONDS if seconds is None else seconds
        self._failing: dict[Path, tuple[int, float, float]] = {}
        """(offset of the place that failed last, since when the file fails, when it did last)."""

    def ends(self, path: Path, offset: int) -> bool:
        """Whether what lies there, which cannot be read now, is damage."""
        now = time.monotonic()
        _, since, last = self._failing.get(path, (offset, now, now))
        if now - last > _FORGOTTEN_SECONDS:
            since = now
        self._failing[path] = offset, since, now
        return now - since >= self._seconds

    def works(self, path: Path, offset: int, length: int = 1) -> None:
        """What lies there can be read."""
        if self._failing and (found := self._failing.get(path)) is not None and offset <= found[0] < offset + length:
            del self._failing[path]
