"""What the parent and the reader process say to each other: MessagePack of these types, each behind its length (u32)."""

from __future__ import annotations

import socket
import struct
from typing import Final

import msgspec

_LENGTH: Final = struct.Struct("<I")
FRAME_BYTES_MAX: Final = 8 << 20
READ_BYTES_MAX: Final = 4 << 20
PIECE_BYTES: Final = 1 << 20
"""A file's content comes in pieces of at most this size."""


class Layer(msgspec.Struct, frozen=True, tag=True):
    """One image of a disk's chain: its size, bytes, and what it is (``raw``, ``qcow2``)."""

    size: int
    format: str


class OpenDisks(msgspec.Struct, frozen=True, tag=True):
    """Parent: look at these disks; each is a chain of images, the top one first. ``replay``: as if journals were replayed."""

    disks: dict[str, list[Layer]]
    replay: bool


class GetVolumes(msgspec.Struct, frozen=True, tag=True):
    """Parent: which partitions, logical volumes and file systems are there?"""


class Lookup(msgspec.Struct, frozen=True, tag=True):
    """Parent: what is at this path?"""

    volume: str
    path: bytes


class ListDirectory(msgspec.Struct, frozen=True, tag=True):
    """Parent: what is in this directory?"""

    volume: str
    inode: int


class ReadFile(msgspec.Struct, frozen=True, tag=True):
    """Parent: this file's content, but for holes."""

    volume: str
    inode: int


class GetDetails(msgspec.Struct, frozen=True, tag=True):
    """Parent: what else is known of this inode?"""

    volume: str
    inode: int


class GetExtents(msgspec.Struct, frozen=True, tag=True):
    """Parent: where on which disk does this file's content lie?"""

    volume: str
    inode: int


class GetTrace(msgspec.Struct, frozen=True, tag=True):
    """Parent: which ranges of which disks have been read since the disks were opened?"""


class Data(msgspec.Struct, frozen=True, tag=True):
    """Parent: the bytes that were asked for. An empty answer: they cannot be read, and the parent knows why."""

    data: bytes


class WantData(msgspec.Struct, frozen=True, tag=True):
    """Reader: give me these bytes of an image."""

    disk: str
    layer: int
    offset: int
    length: int


class Volume(msgspec.Struct, frozen=True, tag=True):
    """Reader: a part of a disk. ``name``: ``vda1``, ``vda`` (a disk without partitions), ``vg/lv``; ``filesystem``: empty if none
    that is known. ``notes``: what is uncertain; ``readable``: whether its files can be looked at."""

    name: str
    size: int
    description: str
    filesystem: str
    label: str
    notes: list[str]
    readable: bool


class Entry(msgspec.Struct, frozen=True, tag=True):
    """Reader: what a name in a directory stands for. ``kind``: one of KINDS. ``problem``: why something of it is missing here."""

    name: bytes
    inode: int
    kind: str
    size: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    links: int = 1
    target: bytes = b""
    problem: str = ""


KINDS: Final = ("file", "directory", "symlink", "character-device", "block-device", "fifo", "socket", "unknown")


class Details(msgspec.Struct, frozen=True, tag=True):
    """Reader: what else there is to know of an inode: extended attributes, the number of a device."""

    xattrs: dict[str, bytes]
    device: tuple[int, int] | None


class Extents(msgspec.Struct, frozen=True, tag=True):
    """Reader: (offset, length) on a raw disk that hold a file's content; ``disk``: None if that cannot be told so."""

    disk: str | None
    ranges: list[tuple[int, int]]


class Piece(msgspec.Struct, frozen=True, tag=True):
    """Reader: a part of a file's content."""

    offset: int
    data: bytes


class Trace(msgspec.Struct, frozen=True, tag=True):
    """Reader: what was read of a disk's top image: offset, length."""

    disk: str
    ranges: list[tuple[int, int]]


class Done(msgspec.Struct, frozen=True, tag=True):
    """Reader: that was all."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Reader: it cannot be done."""

    message: str
    hint: str
    kind: str


Question = OpenDisks | GetVolumes | Lookup | ListDirectory | ReadFile | GetDetails | GetExtents | GetTrace
FromParent = Question | Data
Answer = Volume | Entry | Details | Extents | Piece | Trace
FromReader = Answer | Done | Failed | WantData

_encoder: Final = msgspec.msgpack.Encoder()


def send(sock: socket.socket, message: FromParent | FromReader) -> None:
    """One message."""
    content = _encoder.encode(message)
    sock.sendall(_LENGTH.pack(len(content)) + content)


def receive(sock: socket.socket) -> bytes | None:
    """The next message, encoded; None at the end. Raises ValueError for one that nobody may send, OSError."""
    head = _exactly(sock, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > FRAME_BYTES_MAX:
        raise ValueError(f"a message of {length} bytes")
    return _exactly(sock, length)


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    buffer = bytearray(size)
    view, taken = memoryview(buffer), 0
    while taken < size:
        got = sock.recv_into(view[taken:])
        if not got:
            return None
        taken += got
    return bytes(buffer)
