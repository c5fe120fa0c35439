"""What history still lacks of what the images hold: writes that an image refused, places that it lost or that cannot be read.

Nothing else is journaled before that is made up for. Where nobody knows what is lacking, the disk is in doubt, and word of it is
left for whoever takes this process's place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vmrewind.journal.copy_before_write import State
from vmrewind.journal.pool import JournalFull

if TYPE_CHECKING:
    from vmrewind.capture.disk import Disk
    from vmrewind.capture.server import Server

_ZERO_PIECE: Final = 1 << 30
"""Longest range of one ZERO record, bytes."""


@dataclass(slots=True)
class Refused:
    """What an image refused: records still to be voided, ranges (offset, length) still to be journaled as they are now."""

    disk: Disk
    seqs: list[int]
    ranges: list[tuple[int, int]]


class Arrears:
    """The arrears of all disks of a run."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.refused: list[Refused] = []
        """What ``settle`` is to do before anything else is journaled."""
        self._unread: list[tuple[Disk, int, int]] = []
        """Ranges that a failed write may have changed and that cannot be read; tried again until they can."""

    def tick(self) -> None:
        """Once a second: see whether there are new ones, and try again what could not be read."""
        for disk in self._server.disks.values():
            self._watch(disk)
        unread, self._unread = self._unread, []
        self.refused += [Refused(disk, [], [(offset, length)]) for disk, offset, length in unread]
        if self.refused:
            self.settle()

    def unread(self, disk: Disk) -> bool:
        """Whether a part of the image that may have changed cannot be read."""
        return any(unread is disk for unread, _, _ in self._unread)

    def image_refused(self, disk: Disk, seqs: list[int], ranges: list[tuple[int, int]], errors: list[int]) -> None:
        """The image refused records of the last batch: void them, and journal what it holds where they went."""
        self.image_failed(disk, errors)
        self.refused.append(Refused(disk, seqs, ranges))
        self.note_doubts()
        self.settle()

    def image_failed(self, disk: Disk, errors: Iterable[int]) -> None:
        """The image refused writes: say so."""
        self._server.events.write("image.write-failed", disk=disk.target, errors=[os.strerror(e) for e in sorted(set(errors))])

    def _watch(self, disk: Disk) -> None:
        """See whether somebody does to the image's file what nobody should, and how the base stands that is being made of it."""
        if (base := disk.image.base) is not None and base.state is not State.MAKING:
            if base.state is State.FAILED:
                self._server.events.write("base.given-up", disk=disk.target, base=base.base.id, reason=base.reason)
            disk.image.base = None
            base.close()
        if (length := disk.image.length()) != disk.length:
            self.length_changed(disk, length)
        if (replaced := disk.image.replaced()) != disk.replaced:
            disk.replaced = replaced
            self._server.events.write("image.replaced" if replaced else "image.back", disk=disk.target, image=disk.image.path)

    def length_changed(self, disk: Disk, length: int) -> None:
        """Somebody cut the image's file short, or made it longer. What it lost reads as zeroes from now on, in history as well."""
        before, disk.length = disk.length, length
        if length < before:
            self._server.events.write("image.cut-short", disk=disk.target, bytes=length, expected_bytes=disk.size)
            if disk.image.base is not None:
                disk.image.base.fail("the image was cut short")
            end = min(before, disk.size)
            ranges = [(at, min(_ZERO_PIECE, end - at)) for at in range(length, end, _ZERO_PIECE)]
            self.refused.append(Refused(disk, [], ranges))
            self.note_doubts()
            return
        if any(is_data for _, is_data in disk.image.allocation(before, min(length, disk.size) - before)):
            self.doubt(disk)
        self._server.events.write("image.longer", disk=disk.target, bytes=length, expected_bytes=disk.size, changed=disk.doubtful)

    def settle(self) -> bool:
        """Write what history still lacks of what the images hold; False if the journal has no room for it.

        Nothing else is journaled before that is done.
        """
        if self._server.bypass.on:
            self._server.bypass.absorb()
            return True
        try:
            for refused in list(self.refused):
                if refused.seqs:
                    self._server.writer.void(refused.seqs, refused.disk.index)
                    refused.seqs = []
                while refused.ranges:
                    # A write that failed may have done a part of its work.
                    if not self.journal_as_is(refused.disk, *refused.ranges[-1]):
                        self._unread.append((refused.disk, *refused.ranges[-1]))
                    refused.ranges.pop()
                self.refused.remove(refused)
        except JournalFull:
            return False
        self._server.state.set_applied(self._server.writer.next_batch - 1)
        self.note_doubts()
        return True

    def doubt(self, disk: Disk) -> None:
        """The image may hold what history does not, and nobody knows where: the next start is to compare the whole of it."""
        disk.doubtful = True
        self.note_doubts()

    def note_doubts(self) -> None:
        """Leave word of what history still lacks: whoever takes this process's place in the run knows nothing else of it."""
        lacking = {disk.index for disk in self._server.disks.values() if disk.doubtful}
        lacking |= self._server.durability.lost
        lacking |= {refused.disk.index for refused in self.refused} | {disk.index for disk, _, _ in self._unread}
        self._server.state.set_doubtful(lacking)

    def journal_as_is(self, disk: Disk, offset: int, length: int) -> bool:
        """Journal a range as the image holds it; False if the image cannot be read there. Raises JournalFull."""
        try:
            for extent, is_data in disk.image.allocation(offset, length):
                end = offset + extent
                while offset < end:
                    data = disk.image.read(min(end - offset, self._server.record_length_max), offset) if is_data else None
                    self._server.writer.write(disk.index, offset, data, end - offset)
                    offset += len(data) if data is not None else end - offset
        except OSError as error:
            self._server.events.write("image.read-failed", disk=disk.target, offset=offset, error=str(error))
            return False
        return True
