"""In the reader process: whether the blocks of a directory of ext2 to ext4 are whole. The Sleuth Kit takes what it cannot
read of one for empty.

Format: the kernel's fs/ext4/dir.c (__ext4_check_dir_entry) and fs/ext4/namei.c (ext4_dirblock_csum_verify, ext4_dx_csum_verify).
"""

from __future__ import annotations

import struct
from typing import Final

from vmrewind.recover.files.crc32c import crc32c

_TAIL_BYTES: Final = 12
_TAIL: Final = struct.pack("<IHBB", 0, _TAIL_BYTES, 0, 0xDE)
_ROOT_COUNTS_AT, _NODE_COUNTS_AT = 32, 8
"""Where a hash tree's root and its other nodes have their entries' limit and count."""


def damage(data: bytes, inode: int, seed: int | None, *, first: bool) -> str:
    """What is wrong with a block of the directory ``inode``; empty if nothing is. ``seed``: of its checksum, None without one."""
    names, at = [], 0
    while at < len(data):
        if at + 8 > len(data):
            return "its entries do not fill it"
        number, length, name_bytes = struct.unpack_from("<IHB", data, at)
        if length in (0, 0xFFFF) and len(data) == 1 << 16:
            length = len(data)
        if length < max(12, 8 + name_bytes) or length % 4 or at + length > len(data):
            return f"the entry at byte {at} is none"
        names.append((number, data[at + 8 : at + 8 + name_bytes]))
        at += length
    if first and (names[0] != (inode, b".") or len(names) < 2 or names[1][1] != b".."):
        return "it does not begin with itself and the directory above it"
    return "" if seed is None or _sum_is_right(data, seed) else "its checksum is wrong"


def _sum_is_right(data: bytes, seed: int) -> bool:
    if data[-_TAIL_BYTES:-4] == _TAIL:
        return bool(crc32c(seed, data[:-_TAIL_BYTES]) == struct.unpack_from("<I", data, len(data) - 4)[0])
    (length,) = struct.unpack_from("<H", data, 4)
    counts_at = _ROOT_COUNTS_AT if length == 12 else _NODE_COUNTS_AT
    limit, count = struct.unpack_from("<HH", data, counts_at)
    end = counts_at + limit * 8
    if count > limit or end + 8 > len(data):
        return False
    reserved, check = struct.unpack_from("<II", data, end)
    summed = crc32c(crc32c(seed, data[: counts_at + count * 8]), struct.pack("<II", reserved, 0))
    return bool(summed == check)
