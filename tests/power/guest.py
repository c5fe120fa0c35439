"""The guest's side: a client that never waits, and what a disk with a volatile write cache may show after a power cut.

The model, sector by sector (512 bytes, what a disk writes whole): the content is that after one of the operations on the sector,
in the order in which they were sent, not earlier than the last one that was *covered*. Covered is an operation that was answered
before a flush was sent that was answered, and one with FUA that was answered. So unflushed writes may be there, be lost, or be
there in part, each sector on its own; nothing older than what is covered and nothing that was never written may ever be seen.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from tests.power import SECTOR
from vmrewind.nbd import protocol as nbd


@dataclass
class Operation:
    """What the guest asked for. ``data`` is None for a zero or a discard; flushes are kept elsewhere."""

    cookie: int
    command: int
    flags: int
    offset: int
    length: int
    data: bytes | None
    answered: bool = False
    covered: bool = False

    def content(self, sector: int) -> bytes:
        at = sector * SECTOR - self.offset
        return self.data[at : at + SECTOR] if self.data is not None else bytes(SECTOR)

    def packed(self) -> bytes:
        head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, self.flags, self.command, self.cookie, self.offset, self.length)
        return head + (self.data or b"")


@dataclass
class Flush:
    """A flush, and the operations that it covers once it is answered."""

    cookie: int
    covers: list[Operation]
    answered: bool = False

    def packed(self) -> bytes:
        return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_FLUSH, self.cookie, 0, 0)


class GuestDisk:
    """A disk as its guest knows it, and the connection that the guest has now."""

    def __init__(self, target: str, content: bytes, cookies: Iterable[int], *, heavy: bool) -> None:
        self.target = target
        self._heavy = heavy
        self._cookies = iter(cookies)
        self.sock: socket.socket | None = None
        self._out = bytearray()
        self._in = bytearray()
        self.greeted = False
        self.unanswered: dict[int, Operation | Flush] = {}
        self.begin(content)

    def begin(self, content: bytes) -> None:
        """The guest starts anew, with what the disk holds."""
        self.content = content
        self.operations: list[Operation] = []
        self.unanswered = {}

    @property
    def size(self) -> int:
        return len(self.content)

    # -- asking

    def make(self, rng: random.Random) -> Operation | Flush:
        """A request of some kind, noted as sent."""
        cookie = next(self._cookies)
        kind = rng.random()
        if kind < 0.15:
            flush = Flush(cookie, [operation for operation in self.operations if operation.answered])
            self.unanswered[cookie] = flush
            return flush
        offset, length = self._place(rng)
        flags = nbd.CMD_FLAG_FUA if rng.random() < 0.1 else 0
        data = None
        if kind < 0.8:
            command = nbd.CMD_WRITE
            data = b"".join(struct.pack("<QII", cookie, n, 0xA5A5A5A5) * (SECTOR // 16) for n in range(length // SECTOR))
        elif kind < 0.9:
            command = nbd.CMD_TRIM
        else:
            command = nbd.CMD_WRITE_ZEROES
            flags |= rng.choice((0, nbd.CMD_FLAG_NO_HOLE))
        operation = Operation(cookie, command, flags, offset, length, data)
        self.operations.append(operation)
        self.unanswered[cookie] = operation
        return operation

    def _place(self, rng: random.Random) -> tuple[int, int]:
        sectors = self.size // SECTOR
        length = rng.choice((8, 64, 64)) if self._heavy else rng.choice((1, 1, 8, 8, 8, 16, rng.randrange(1, 64)))
        # Half of it goes to the disk's beginning, so that sectors are written again and again.
        first = rng.randrange(min(sectors, 64) if rng.random() < 0.5 else sectors)
        return first * SECTOR, min(length, sectors - first) * SECTOR

    def connect(self, path: str) -> None:
        """A new connection; what was not answered on an old one is sent again, as QEMU does."""
        self.hang_up()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.sock.connect(path)
        self.sock.setblocking(False)
        self.greeted = False
        self._in.clear()
        name = self.target.encode()
        self._out = bytearray(struct.pack(">I", nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES))
        self._out += nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, len(name)) + name
        for request in self.unanswered.values():
            self._out += request.packed()
        # They may be carried out a second time, after others that were answered.
        self.operations += [request for request in self.unanswered.values() if isinstance(request, Operation)]

    def hang_up(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def send(self, requests: Iterable[Operation | Flush] = ()) -> None:
        for request in requests:
            self._out += request.packed()
        assert self.sock is not None
        try:
            while self._out:
                del self._out[: self.sock.send(self._out)]
        except BlockingIOError:
            pass

    def receive(self) -> None:
        """Note what was answered."""
        assert self.sock is not None
        try:
            while data := self.sock.recv(1 << 16):
                self._in += data
        except BlockingIOError:
            pass
        if not self.greeted and len(self._in) >= 28:
            del self._in[:28]
            self.greeted = True
        while self.greeted and len(self._in) >= 16:
            magic, error, cookie = struct.unpack_from(">IIQ", self._in)
            assert (magic, error) == (nbd.SIMPLE_REPLY_MAGIC, 0), f"{self.target}: {magic:#x}, error {error}"
            del self._in[:16]
            self.note_answer(self.unanswered.pop(cookie))

    def note_answer(self, request: Operation | Flush) -> None:
        """Note that a request was answered, and what is covered by that."""
        request.answered = True
        if isinstance(request, Flush):
            for operation in request.covers:
                operation.covered = True
        elif request.flags & nbd.CMD_FLAG_FUA:
            request.covered = True

    # -- what may be there

    def versions(self) -> dict[int, list[bytes]]:
        """Of every sector that was written: what it may hold, oldest first."""
        found: dict[int, list[bytes]] = {}
        for operation in self.operations:
            for sector in range(operation.offset // SECTOR, (operation.offset + operation.length) // SECTOR):
                known = found.setdefault(sector, [self.content[sector * SECTOR : (sector + 1) * SECTOR]])
                if operation.covered:
                    known.clear()
                known.append(operation.content(sector))
        return found

    def check(self, image: bytes, view: bytes | None) -> None:
        """``image`` is what the guest finds; ``view`` what history says of the last moment before the power cut.

        The image may be ahead of history, sector by sector, and never behind it.
        """
        assert len(image) == self.size
        versions = self.versions()
        for sector in range(self.size // SECTOR):
            at = slice(sector * SECTOR, (sector + 1) * SECTOR)
            allowed = versions.get(sector, [self.content[at]])
            if view is not None:
                assert view[at] in allowed, self._wrong("history", sector, view[at], allowed)
                allowed = allowed[allowed.index(view[at]) :]
            assert image[at] in allowed, self._wrong("the image", sector, image[at], allowed)

    def _wrong(self, what: str, sector: int, found: bytes, allowed: list[bytes]) -> str:
        def tag(content: bytes) -> str:
            return "zeroes" if not any(content) else f"operation {int.from_bytes(content[:8], 'little')}"

        may = ", ".join(tag(content) for content in allowed)
        return f"{self.target}, sector {sector}: {what} holds {tag(found)}, which may be: {may}"
