"""``on_journal_full = "bypass"``: the guest writes on while the journal cannot, and history catches up once it can.

While bypassing, a write marks its extents as dirty (dirty.py) and goes to the image; a flush syncs the images. History has a
gap then, for all disks of the VM. Once the journal takes records again the guest's writes are journaled as always, and between
two batches the dirty extents are journaled as the images hold them. When none is left, and the images are on stable storage
further than the last bypassed write, a GAP_END closes the gap. Should the journal fill up in the middle, the bypass goes on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from vmrewind.capture.dirty import DirtyMap, Phase
from vmrewind.journal import format as fmt
from vmrewind.journal.pool import JournalFull

if TYPE_CHECKING:
    from vmrewind.capture.server import Server

_CHECKPOINT_WAIT_SECONDS: Final = 1.0
"""How long a write waits for a checkpoint that will free a segment, before it is bypassed."""
_UNREADABLE_SECONDS: Final = 10.0
"""After an extent could not be read from its image: when it is tried again."""
_REST_SECONDS: Final = 0.1
_MAP_LOST: Final = "the journal was bypassed, and what was written meanwhile is not known any more"
_CAUSE_CHARACTERS_MAX: Final = 120
"""Whatever they are, they fit into the room that a full journal has kept for a last word."""


class Bypass:
    """The VM's bypass; without a map (another policy) it never begins."""

    def __init__(self, server: Server, dirty: DirtyMap | None) -> None:
        self._server = server
        self._map = dirty
        self._rest_until = 0.0
        resumed = server.state.run == server.writer.run
        if dirty is not None and resumed and server.state.bypassed and dirty.phase is Phase.NONE:
            # Nobody knows any more what was bypassed: all of it, then.
            dirty.begin(_MAP_LOST, server.writer.last_time_ns)
            for disk in server.disks.values():
                dirty.mark(disk.index, 0, disk.size)
            server.events.write("bypass.map-lost", dirty_bytes=dirty.dirty_bytes)
        self.on = dirty is not None and dirty.phase is Phase.BYPASSING
        """The guest's writes go to the images only."""
        if self.is_open:
            server.durability.bypass_began()
            if not self.on:
                server.durability.bypass_ended()

    @property
    def is_open(self) -> bool:
        """Whether history has a gap now."""
        return self._map is not None and self._map.phase is not Phase.NONE

    @property
    def cause(self) -> str | None:
        """Why there is a gap, None without one."""
        return self._map.cause if self._map is not None and self.is_open else None

    @property
    def resyncs_now(self) -> bool:
        """Whether ``resync`` has something to do."""
        return self._map is not None and self._map.phase is Phase.RESYNCING and not self.on and time.monotonic() >= self._rest_until

    def status(self) -> dict[str, Any] | None:
        """For ``vmrewind status``; None without a gap."""
        if self._map is None or not self.is_open:
            return None
        return {
            "cause": self._map.cause,
            "since_ns": self._map.since_ns,
            "dirty_bytes": self._map.dirty_bytes,
            "resyncing": not self.on,
        }

    def mark(self, index: int, offset: int, length: int) -> None:
        """A range of a disk is about to be written without a record."""
        assert self._map is not None, "only while bypassing"
        self._map.mark(index, offset, length)

    def absorb(self) -> None:
        """Take over what was still to be journaled of what the images refused, or lost."""
        for refused in self._server.arrears.refused:
            for offset, length in refused.ranges:
                self.mark(refused.disk.index, offset, length)
        self._server.arrears.refused.clear()

    def begin(self, reason: str) -> bool:
        """The journal takes no more: bypass it from now on. False if the guest's request is to be held instead."""
        server, dirty = self._server, self._map
        if dirty is None:
            return False
        if self.on:
            return True
        if server.policy.completes_images():
            return False
        if server.policy.waits_for_checkpoint() and server.held_seconds < _CHECKPOINT_WAIT_SECONDS:
            return False
        if any(refused.seqs for refused in server.arrears.refused):
            # History says yet that these writes happened; it must not go on before it has said otherwise.
            return False
        begins = not self.is_open
        if begins:
            # First, and elsewhere: should the map be lost, whoever resumes this run knows at least that there was one.
            server.state.bypassed = True
            dirty.begin(reason[:_CAUSE_CHARACTERS_MAX], time.time_ns())
        dirty.phase, self.on = Phase.BYPASSING, True
        self.absorb()
        # All that is journaled is in the images. A replay of it would put old data over what is written from now on.
        server.state.set_applied(server.writer.next_batch - 1)
        server.durability.bypass_began()
        if begins:
            server.events.write("bypass.begin", reason=reason, journal=str(server.journal))
            self.declare()
        return True

    def declare(self) -> bool:
        """Have the gap's begin in the journal; False if the journal does not even take that."""
        dirty = self._map
        if dirty is None or not self.is_open or dirty.declared:
            return True
        try:
            self._server.writer.last_word(fmt.Event.GAP_BEGIN, {"cause": dirty.cause, "since_ns": dirty.since_ns})
        except JournalFull:
            return False
        self._server.state.set_applied(self._server.writer.next_batch - 1)
        dirty.declared = True
        return True

    def tick(self) -> None:
        """Once a second: see whether the journal takes records again."""
        dirty = self._map
        if dirty is None or not self.on or not self.declare():
            return
        if self._journal_piece() is False:
            return
        dirty.phase, self.on = Phase.RESYNCING, False
        self._server.durability.bypass_ended()
        self._server.events.write("bypass.resync", dirty_bytes=dirty.dirty_bytes)

    def resync(self) -> None:
        """Journal one dirty piece; if none is left, close the gap."""
        dirty = self._map
        assert dirty is not None, "there is something to do"
        piece = self._journal_piece()
        if piece is False and self.begin("the journal is full again"):
            # Nobody is told that writes are journaled when the next one would not be.
            return
        if not piece and (piece is False or not self._close()):
            # A checkpoint will make room, or the images are still being synced.
            self._rest_until = time.monotonic() + _REST_SECONDS

    def _journal_piece(self) -> bool | None:
        """Journal the first dirty piece as its image holds it. False if the journal takes no more, None if no piece is left."""
        server, dirty = self._server, self._map
        assert dirty is not None, "only while there is a gap"
        try:
            if server.arrears.refused and not server.arrears.settle():
                return False
            for disk in server.disks.values():
                if (found := dirty.first(disk.index)) is not None:
                    if server.arrears.journal_as_is(disk, *found):
                        dirty.clear(disk.index, found[0])
                    else:
                        self._rest_until = time.monotonic() + _UNREADABLE_SECONDS
                    return True
        except JournalFull:
            return False
        finally:
            # Also when it stopped half way: what was journaled is what the image holds, and must not be replayed over what follows.
            server.state.set_applied(server.writer.next_batch - 1)
        return None

    def _close(self) -> bool:
        server, dirty = self._server, self._map
        assert dirty is not None, "only while there is a gap"
        if server.durability.images_too:
            server.durability.sync_if_dirty()
            return False
        try:
            seq = server.writer.event(fmt.Event.GAP_END, {"cause": dirty.cause, "since_ns": dirty.since_ns})
        except JournalFull:
            return False
        server.state.set_applied(server.writer.next_batch - 1)
        since_ns = dirty.since_ns
        dirty.phase = Phase.NONE
        server.state.bypassed = False
        server.events.write("bypass.end", seq=seq, seconds=round((time.time_ns() - since_ns) / 1e9, 3))
        return True
