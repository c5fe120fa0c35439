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
        self.limit: int | None = None
        self._free_at = 0.0

    def piece_bytes(self, most: int) -> int:
        """Bytes of payload that make a segment full, ``most`` without a limit."""
        return most if self.limit is None else min(most, max(PIECE_MIN, self.limit // PIECES_PER_SECOND))

    def wait_seconds(self) -> float:
        """How long until something may be put."""
        return 0.0 if self.limit is None else max(0.0, self._free_at - time.monotonic())

    def spent(self, sent_bytes: int) -> None:
        """Count what is being put: the next waits for as long as the limit gives this one."""
        if self.limit is not None:
            self._free_at = max(self._free_at, time.monotonic()) + sent_bytes / self.limit
