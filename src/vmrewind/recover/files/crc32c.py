"""In the reader process: CRC-32C, with which ext4 and JBD2 check what they have written."""

from __future__ import annotations

from typing import Final

_TABLE: Final = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    _TABLE.append(_byte)


def crc32c(crc: int, data: bytes) -> int:
    """As the kernel's: continued from ``crc``, without inversion."""
    table = _TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc
