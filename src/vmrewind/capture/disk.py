"""A protected disk as its clients see it: image, export, connections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmrewind.capture.image import Image
from vmrewind.nbd import protocol as nbd
from vmrewind.nbd.negotiation import ExportInfo

if TYPE_CHECKING:
    from vmrewind.capture.connection import Connection


@dataclass(slots=True)
class Disk:
    """A protected disk and who is connected to it."""

    image: Image
    export: ExportInfo
    connections: set[Connection] = field(default_factory=set)
    length: int = -1
    """Of the image's file, bytes, as it was last seen: less than ``size`` after somebody has cut it short."""
    replaced: bool = False
    """The image's path leads to another file."""
    doubtful: bool = False
    """Somebody else may have written to the image: it is not left as the next start's starting point."""

    def __post_init__(self) -> None:
        self.length = self.image.length()

    @property
    def index(self) -> int:
        """The disk's number in records."""
        return self.image.index

    @property
    def size(self) -> int:
        """The export's size, bytes."""
        return self.image.size

    @property
    def target(self) -> str:
        """The disk's name, which is also the export's."""
        return self.image.target


def export_of(image: Image) -> ExportInfo:
    """What clients are told of a disk."""
    flags = (
        nbd.FLAG_HAS_FLAGS
        | nbd.FLAG_SEND_FLUSH
        | nbd.FLAG_SEND_FUA
        | nbd.FLAG_SEND_TRIM
        | nbd.FLAG_SEND_WRITE_ZEROES
        | nbd.FLAG_SEND_DF
        | nbd.FLAG_SEND_CACHE
        # A flush on any connection covers all: one thread, one journal, one page cache.
        | nbd.FLAG_CAN_MULTI_CONN
        | (nbd.FLAG_SEND_FAST_ZERO if image.fast_zero else 0)
    )
    return ExportInfo(image.target, image.size, flags, 1, 4096, nbd.REQUEST_LENGTH_MAX)
