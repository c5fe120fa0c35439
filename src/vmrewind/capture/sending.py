"""The sending side of a connection: replies that its client has no room for yet, and reads too large to be held whole.

Nothing is read from a client that does not take its replies, so what waits here is bounded: one batch's replies or one piece of a
large read, and the answers of flushes that were asked for before.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final

from vmrewind.capture.reading import Reader
from vmrewind.capture.replies import pack_read_error
from vmrewind.nbd import protocol as nbd

PIECE: Final = 1 << 20
"""A large read is sent in pieces of at most this, bytes."""
_OUTPUT: Final = 64 << 10


@dataclass(slots=True)
class _LargeRead:
    """What is left to be sent of one."""

    cookie: int
    flags: int
    offset: int
    left: int
    begun: bool = False


class Sender:
    """Sends one connection's replies, in order. It knows nobody who knows it: capture collects no cycles."""

    def __init__(self, sock: socket.socket, reader: Reader, *, structured: bool) -> None:
        self._sock = sock
        self._reader = reader
        self._structured = structured
        self.lost = False
        """Nothing can be sent any more: what remains is to hang up."""
        self._output = bytearray(_OUTPUT)
        self._unsent: memoryview | None = None
        self._later = bytearray()
        self._large: _LargeRead | None = None

    @property
    def waiting(self) -> bool:
        """Whether replies wait for room in the client's socket."""
        return self._unsent is not None or self._large is not None

    def buffer(self, size: int) -> bytearray:
        """A buffer of at least ``size`` bytes to put replies into, for one use: the next gets the same one."""
        if size > len(self._output):
            self._output = bytearray(size)
        return self._output

    def send(self, data: memoryview) -> None:
        """Send now, or behind what waits."""
        if self.waiting:
            self._later += data
        else:
            self._push(data)

    def read_large(self, cookie: int, flags: int, offset: int, length: int) -> None:
        """Read and send so much, as the client takes it; nothing may be waiting."""
        self._large = _LargeRead(cookie, flags, offset, length)
        self._send_piece(self._large)

    def go_on(self) -> None:
        """The client's socket has room again."""
        unsent, self._unsent = self._unsent, None
        if unsent is not None:
            self._push(unsent)
        elif self._large is not None:
            self._send_piece(self._large)
        if self._later and not self.waiting:
            later, self._later = self._later, bytearray()
            self._push(memoryview(later))

    def _push(self, data: memoryview) -> None:
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._give_up()
            return
        if sent != len(data):
            self._unsent = data[sent:]

    def _give_up(self) -> None:
        self.lost = True
        self._large, self._later = None, bytearray()

    def _send_piece(self, large: _LargeRead) -> None:
        """Structured replies have a chunk for each piece, so an error can follow data. Otherwise, and where the client forbade
        fragments, all is promised with the first byte: an error after it leaves nothing but to hang up."""
        length = min(large.left, PIECE)
        fragments = self._structured and not large.flags & nbd.CMD_FLAG_DF
        head = 0 if large.begun and not fragments else nbd.DATA_CHUNK.size if self._structured else nbd.SIMPLE_REPLY.size
        output = self.buffer(head + length)
        if error := self._reader.fill(memoryview(output)[head : head + length], large.offset):
            self._large = None
            if large.begun and not fragments:
                self._give_up()
            else:
                end = pack_read_error(output, 0, large.cookie, error, structured=self._structured)
                self._push(memoryview(output)[:end])
            return
        if head and self._structured:
            done = nbd.REPLY_FLAG_DONE if length == large.left or not fragments else 0
            promised = (length if fragments else large.left) + 8
            nbd.DATA_CHUNK.pack_into(
                output, 0, nbd.STRUCTURED_REPLY_MAGIC, done, nbd.REPLY_OFFSET_DATA, large.cookie, promised, large.offset
            )  # fmt: skip
        elif head:
            nbd.SIMPLE_REPLY.pack_into(output, 0, nbd.SIMPLE_REPLY_MAGIC, 0, large.cookie)
        large.begun = True
        large.offset += length
        large.left -= length
        if not large.left:
            self._large = None
        self._push(memoryview(output)[: head + length])
