"""Zstandard, from the standard library where that has it and from its backport elsewhere. Every frame carries its checksum."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_LEVEL: Final = 3
_OPTIONS: Final[Mapping[int, int]] = {
    zstd.CompressionParameter.compression_level: _LEVEL,
    zstd.CompressionParameter.checksum_flag: 1,
}


def compress(data: bytes | bytearray | memoryview) -> bytes:
    """One frame that knows its plain size and its checksum."""
    return zstd.compress(data, options=_OPTIONS)


def decompress(data: bytes | memoryview, size_max: int) -> bytes:
    """The plain bytes of one frame; raises ValueError if it is damaged or says that it holds more than ``size_max`` bytes."""
    try:
        size: int | None = zstd.get_frame_info(data).decompressed_size
        # Looked at before decompressing: a damaged frame must not claim all memory.
        if size is None or size > size_max:
            raise ValueError(f"a frame of {size} bytes where at most {size_max} are possible")
        return zstd.decompress(data)
    except zstd.ZstdError as error:
        raise ValueError(str(error)) from error
