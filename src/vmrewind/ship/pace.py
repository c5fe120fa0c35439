"""``bandwidth_limit``: how much is put in a while. What is under way is not slowed down, the next put is held back."""

from __future__ import annotations

import time
from typing import Final

PIECES_PER_SECOND: Final = 4
"""Segments get so small that a second's worth is several of them: the limit holds over a second too, and new records wait behind a
quarter of a second of older ones at most."""
PIECE_MIN: Final = 64 << 10


class Pace:
    """``limit`` in bytes a second, None for none."""

    def __init__(self) -> None:
        self._limit: int | None = None
        self._debt_bytes = 0.0
        """What was put ahead of its time; the limit pays it off."""
        self._counted_at = 0.0

    @property
    def limit(self) -> int | None:
        """In bytes a second. What was put under another limit is paid off at the new one's rate."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._pay()
        self._limit = limit

    def piece_bytes(self, most: int) -> int:
        """Bytes of payload that make a segment full, ``most`` without a limit."""
        return most if self.limit is None else min(most, max(PIECE_MIN, self.limit // PIECES_PER_SECOND))

    def wait_seconds(self) -> float:
        """How long until something may be put."""
        self._pay()
        return 0.0 if self._limit is None else self._debt_bytes / self._limit

    def spent(self, sent_bytes: int) -> None:
        """Count what is being put: the next waits for as long as the limit gives this one."""
        self._pay()
        if self._limit is not None:
            self._debt_bytes += sent_bytes

    def _pay(self) -> None:
        now = time.monotonic()
        paid_bytes = self._debt_bytes if self._limit is None else self._limit * (now - self._counted_at)
        self._debt_bytes = max(0.0, self._debt_bytes - paid_bytes)
        self._counted_at = now
