"""In the reader process: what the Sleuth Kit gets wrong of inodes of ext2 to ext4: times before 1970 and from 2106 on, and which
inodes it looks for in the wrong place; and what the check of a directory needs of its inode.

It takes the seconds for unsigned and leaves out the two bits above them; and it knows no ``meta_bg``, which puts group descriptors
elsewhere. Format: the kernel's fs/ext4/ext4.h (ext4_decode_extra_time) and fs/ext4/super.c (descriptor_loc).
"""

from __future__ import annotations

import struct
from typing import Final

from vmrewind.errors import FileError
from vmrewind.recover.files.blocks import Blocks
from vmrewind.recover.files.crc32c import crc32c

_SUPERBLOCK: Final = 1024
_META_BG: Final = 0x10
_64BIT: Final = 0x80
_CHECKSUM_SEED: Final = 0x2000
_METADATA_CHECKSUMS: Final = 0x400
_INLINE_DATA: Final = 0x10000000
_INODE_BYTES: Final = 128
"""Without what i_extra_isize tells."""
_CTIME, _CTIME_EXTRA = 12, 132
_MTIME, _MTIME_EXTRA = 16, 136
_EPOCH_BITS: Final = 2
"""Of the seconds, above their 32; what is above these two are nanoseconds."""


class ExtInodes:
    """The inodes of a file system."""

    def __init__(self, blocks: Blocks) -> None:
        head = blocks.read(_SUPERBLOCK, 1024)
        if len(head) != 1024:
            raise FileError("its superblock cannot be read")
        self._blocks = blocks
        (exponent,) = struct.unpack_from("<I", head, 24)
        (self._group_inodes,) = struct.unpack_from("<I", head, 40)
        (revision,) = struct.unpack_from("<I", head, 76)
        self._inode_bytes = struct.unpack_from("<H", head, 88)[0] if revision else _INODE_BYTES
        (incompatible,) = struct.unpack_from("<I", head, 96)
        self._descriptor_bytes = struct.unpack_from("<H", head, 254)[0] if incompatible & _64BIT else 32
        if exponent > 6 or not self._group_inodes or self._inode_bytes < _INODE_BYTES or not 32 <= self._descriptor_bytes <= 1024:
            raise FileError("its superblock makes no sense")
        self.block = 1024 << exponent
        self._seed: int | None = None
        if struct.unpack_from("<I", head, 100)[0] & _METADATA_CHECKSUMS:
            stored = incompatible & _CHECKSUM_SEED
            self._seed = struct.unpack_from("<I", head, 624)[0] if stored else crc32c(0xFFFFFFFF, head[104:120])
        # The first row of descriptors is always where it is without meta_bg.
        self._rows = max(struct.unpack_from("<I", head, 260)[0], 1) if incompatible & _META_BG else None

    def times(self, inode: int) -> tuple[int, int]:
        """mtime_ns and ctime_ns. Raises FileError."""
        data = self._read(inode)
        return _time(data, _MTIME, _MTIME_EXTRA), _time(data, _CTIME, _CTIME_EXTRA)

    def directory(self, inode: int) -> tuple[int | None, bool]:
        """The seed of its blocks' checksums, None if they have none; whether it has blocks at all. Raises FileError."""
        data = self._read(inode)
        blocks = not struct.unpack_from("<I", data, 32)[0] & _INLINE_DATA
        return None if self._seed is None else crc32c(crc32c(self._seed, struct.pack("<I", inode)), data[100:104]), blocks

    def _read(self, inode: int) -> bytes:
        group, index = divmod(inode - 1, self._group_inodes)
        row, within = divmod(group, self.block // self._descriptor_bytes)
        if self._rows is not None and row >= self._rows:
            raise FileError(f"inode {inode} cannot be read: its group is described where no library looks for it (meta_bg)")
        place = (_SUPERBLOCK // self.block + 1 + row) * self.block + within * self._descriptor_bytes
        descriptor = self._blocks.read(place, self._descriptor_bytes)
        if inode < 1 or len(descriptor) != self._descriptor_bytes:
            raise FileError(f"inode {inode} cannot be read: it is in no group")
        (table,) = struct.unpack_from("<I", descriptor, 8)
        if self._descriptor_bytes >= 64:
            table |= struct.unpack_from("<I", descriptor, 40)[0] << 32
        data = self._blocks.read(table * self.block + index * self._inode_bytes, self._inode_bytes)
        if len(data) != self._inode_bytes:
            raise FileError(f"inode {inode} cannot be read")
        return data


def _time(data: bytes, at: int, extra_at: int) -> int:
    seconds: int = struct.unpack_from("<i", data, at)[0]
    covered = _INODE_BYTES + (struct.unpack_from("<H", data, _INODE_BYTES)[0] if len(data) > _INODE_BYTES else 0)
    if extra_at + 4 > min(covered, len(data)):
        return seconds * 10**9
    extra: int = struct.unpack_from("<I", data, extra_at)[0]
    return (seconds + ((extra & (1 << _EPOCH_BITS) - 1) << 32)) * 10**9 + (extra >> _EPOCH_BITS)
