"""In the reader process: images and parts of them as bytes, had from the parent, remembered for a while, and noted when read."""

from __future__ import annotations

import io
import socket
from collections import OrderedDict
from typing import Final, Protocol

import msgspec

from vmrewind.errors import FileError
from vmrewind.recover.files import wire

_BLOCK: Final = 1 << 16
_BLOCKS_MAX: Final = 512


class Blocks(Protocol):
    """Bytes at offsets. ``read`` gives fewer only at the end."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """The bytes."""


class Image:
    """An image that the parent has."""

    def __init__(self, sock: socket.socket, disk: str, layer: int, size: int) -> None:
        self._sock = sock
        self._name = (disk, layer)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._decoder = msgspec.msgpack.Decoder(wire.Data)
        self.size = size
        self.touched: set[tuple[int, int]] = set()

    def read(self, offset: int, length: int) -> bytes:
        """See Blocks; what is read is noted in ``touched``."""
        length = max(0, min(length, self.size - offset))
        if offset < 0 or not length:
            return b""
        self.touched.add((offset, length))
        if length > 4 * _BLOCK:
            return b"".join(self._fetch(at, min(1 << 20, offset + length - at)) for at in range(offset, offset + length, 1 << 20))
        parts = []
        at = offset
        while at < offset + length:
            number, within = divmod(at, _BLOCK)
            part = self._block(number)[within : within + offset + length - at]
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            block = self._fetch(number * _BLOCK, min(_BLOCK, self.size - number * _BLOCK))
            self._blocks[number] = block
            if len(self._blocks) > _BLOCKS_MAX:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(number)
        return block

    def _fetch(self, offset: int, length: int) -> bytes:
        wire.send(self._sock, wire.WantData(*self._name, offset, length))
        answer = wire.receive(self._sock)
        if answer is None:
            raise SystemExit(0)  # The parent has gone.
        data = self._decoder.decode(answer).data
        if len(data) != length:
            raise FileError(f"disk {self._name[0]}: bytes {offset}+{length} cannot be read")
        return data


class Part:
    """A range of something."""

    def __init__(self, whole: Blocks, offset: int, size: int) -> None:
        self._whole = whole
        self._offset = offset
        self.size = max(0, min(size, whole.size - offset))

    def read(self, offset: int, length: int) -> bytes:
        """See Blocks."""
        length = max(0, min(length, self.size - offset))
        return self._whole.read(self._offset + offset, length) if length and offset >= 0 else b""


class Over:
    """Blocks above something: what a journal says that blocks hold."""

    def __init__(self, below: Blocks, block: int, held: dict[int, bytes]) -> None:
        self._below = below
        self._block = block
        self._held = held
        self.size = below.size

    def read(self, offset: int, length: int) -> bytes:
        """See Blocks."""
        data = bytearray(self._below.read(offset, length))
        for number in range(offset // self._block, -(-(offset + len(data)) // self._block)):
            if (held := self._held.get(number)) is not None:
                start, end = max(offset, number * self._block), min(offset + len(data), (number + 1) * self._block)
                data[start - offset : end - offset] = held[start - number * self._block : end - number * self._block]
        return bytes(data)


class Stream(io.RawIOBase):
    """Blocks as a file object, as libyal's libraries take one."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._at = 0

    def read(self, size: int | None = -1) -> bytes:
        """As files do."""
        data = self._blocks.read(self._at, self._blocks.size - self._at if size is None or size < 0 else size)
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """As files do."""
        self._at = max(0, offset + (0, self._at, self._blocks.size)[whence])
        return self._at

    def tell(self) -> int:
        """As files do."""
        return self._at

    def get_size(self) -> int:
        """Bytes; what libyal asks for."""
        return self._blocks.size
