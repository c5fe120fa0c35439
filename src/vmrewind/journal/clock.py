"""The journal's clock: wall time that never runs backwards.

Time is read from the monotonic clock, anchored to wall time once, so that stepping the wall clock can't reorder history. A
step forward moves the anchor at once; a step back is worked off by letting the journal's time run at half speed until both
agree again: moments stay distinct, ordered, and come to mean wall time again. Each step is reported, to be recorded as an event.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

STEP_NS: Final = 200_000_000
"""Smallest difference between wall time and journal time that counts as a step, ns; NTP's slewing moves both clocks alike."""


class Clock:
    """Strictly increasing times in ns since the epoch. ``floor_ns``: the last time that the branch has used already."""

    def __init__(
        self,
        floor_ns: int = 0,
        wall: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall = wall
        self._monotonic = monotonic
        self._checked = monotonic()
        # A branch that is ahead of the wall clock is treated like a step back: its lead is worked off, not waited out.
        self._anchor = max(wall(), floor_ns) - self._checked
        self._last = floor_ns
        self._behind = False

    def take(self, count: int) -> int:
        """A time for the first of ``count`` records; the others follow at 1 ns each."""
        now = self._monotonic() + self._anchor
        if now <= self._last:
            now = self._last + 1
        self._last = now + count - 1
        return now

    def check(self) -> int | None:
        """Compare with wall time; call about once a second. Returns a newly seen step in ns (negative: back), else None."""
        now = self._monotonic()
        elapsed, self._checked = now - self._checked, now
        difference = self._wall() - (now + self._anchor)
        if difference > STEP_NS:
            self._anchor += difference
            self._behind = False
            return difference
        if difference < -STEP_NS:
            self._anchor -= min(-difference, elapsed // 2)
            reported, self._behind = self._behind, True
            return None if reported else difference
        self._behind = False
        return None
