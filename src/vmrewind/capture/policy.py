"""What happens when the journal cannot take more: which old segments may be used again."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from vmrewind.errors import CorruptionError
from vmrewind.journal.format import segment_name
from vmrewind.journal.origin import FILLING
from vmrewind.journal.pool import Recycling
from vmrewind.journal.reader import Segment, SegmentFile, SegmentHeader, UnreadableHeader
from vmrewind.journal.state import StatePage

POLICIES: Final = ("drop-history", "bypass", "block")
_SHIPPED_READ_SECONDS: Final = 0.05
RUN_DONE: Final = (1 << 64) - 1
"""In ``shipped.json``: nothing more of this run is to be carried, whatever its last record is."""


class FullPolicy:
    """``drop-history``: the oldest history goes, first what is shipped. ``block`` and ``bypass``: only what ship has carried away;
    else the guest waits, or writes on without history. ``local_history_seconds``: what is shipped goes when it is that old.

    While images are completed of which the journal is a part (``filling.json``), each of them is a ``block`` that drops nothing.

    Either way a segment whose writes are not yet on the images' stable storage stays: it is their write-ahead log.
    """

    def __init__(self, name: str, journal: Path, state: StatePage, local_history_seconds: int | None = None) -> None:
        self.name = name
        self.local_history_seconds = local_history_seconds
        self._journal = journal
        self._state = state
        self._shipped: dict[int, int] = {}
        self._carried: dict[int, int] = {}
        self._read_at = 0.0
        self._waits_for_checkpoint = False
        self._completing = (journal / FILLING).exists()

    def completes_images(self) -> bool:
        """Whether images lack what only their history has, so that it must stay whole. Asked where the journal is full only."""
        if self._completing:
            # A journal that cannot be read tells nothing: it goes on.
            with contextlib.suppress(OSError):
                self._completing = _is_there(self._journal / FILLING)
        return self._completing

    def waits_for_checkpoint(self) -> bool:
        """Whether a segment would have been recycled but for a checkpoint, since this was last asked."""
        waits, self._waits_for_checkpoint = self._waits_for_checkpoint, False
        return waits

    def is_old(self, segment: SegmentFile) -> bool:
        """Whether nothing was added to the segment within the time that shipped history is to stay here."""
        assert self.local_history_seconds is not None, "not asked otherwise"
        try:
            return segment.path.stat().st_mtime <= time.time() - self.local_history_seconds
        except FileNotFoundError:
            return True

    def may_recycle(self, segment: SegmentFile) -> Recycling:
        """The verdict on one live segment."""
        successor = self._successor(segment)
        if segment.run == self._state.run and (successor is None or successor.first_batch - 1 > self._state.checkpoint):
            self._waits_for_checkpoint = successor is not None and self._is_carried(segment, successor)
            return Recycling.NO
        carried = self._is_carried(segment, successor)
        if carried and self._reaches(self._shipped, segment, successor):
            return Recycling.FREE
        if self.completes_images():
            return Recycling.NO
        # Of a disk that ship is not told to carry, the journal alone has the history; but nobody waits for what will not come.
        return Recycling.DROPS if carried or self.name == "drop-history" else Recycling.NO

    def _successor(self, segment: SegmentFile) -> SegmentHeader | None:
        """The header of the run's next segment; where that can't be read, of the first behind it that can."""
        try:
            with Segment(self._journal / segment_name(segment.run, segment.number + 1)) as following:
                return following.header
        except FileNotFoundError:
            return None
        except (CorruptionError, UnreadableHeader):
            return self._successor(replace(segment, number=segment.number + 1))

    def _is_carried(self, segment: SegmentFile, successor: SegmentHeader | None) -> bool:
        """Whether ship has carried away all that it is told to of the segment: ``shipped.json``, written after the objects.

        A run that it says nothing of was not shipped, however old it is.
        """
        if time.monotonic() - self._read_at > _SHIPPED_READ_SECONDS:
            self._read_at = time.monotonic()
            try:
                word = json.loads((self._journal / "shipped.json").read_bytes())
                shipped = {int(run, 16): int(seq) for run, seq in word["runs"].items()}
                carried = {int(run, 16): int(seq) for run, seq in word.get("carried", word["runs"]).items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
                shipped = carried = {}
            self._shipped, self._carried = shipped, carried
        return self._reaches(self._carried, segment, successor)

    @staticmethod
    def _reaches(word: dict[int, int], segment: SegmentFile, successor: SegmentHeader | None) -> bool:
        last_seq = successor.first_seq - 1 if successor is not None else RUN_DONE
        return word.get(segment.run, -1) >= last_seq


def _is_there(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True
