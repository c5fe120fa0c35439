"""In the reader process: a qcow2 image as the disk that its guest sees. Format: QEMU's docs/interop/qcow2.txt."""

from __future__ import annotations

import struct
import sys
import zlib
from collections import OrderedDict
from typing import Final

from vmrewind.errors import FileError
from vmrewind.recover.files.blocks import Blocks

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_DIRTY, _CORRUPT, _COMPRESSION = 1, 2, 8
_OFFSET: Final = 0x00FFFFFFFFFFFE00
_COMPRESSED: Final = 1 << 62
_TABLES_MAX: Final = 64
_L1_BYTES_MAX: Final = 32 << 20


class Qcow2:
    """See Blocks. ``backing`` is what it stands on: None if it stands alone."""

    def __init__(self, image: Blocks, backing: Blocks | None) -> None:
        self._image = image
        self._backing = backing
        head = image.read(0, 112)
        if len(head) < 104 or head[:4] != b"QFI\xfb":
            raise FileError("it is not a qcow2 image")
        version, _, backing_length, bits = struct.unpack_from(">IQII", head, 4)
        self.size, crypt, l1_size, l1_at = struct.unpack_from(">QIIQ", head, 24)
        incompatible = struct.unpack_from(">Q", head, 72)[0] if version >= 3 else 0
        header = struct.unpack_from(">I", head, 100)[0] if version >= 3 else 72
        self._zstd = bool(incompatible & _COMPRESSION and header >= 105 and head[104] == 1)
        if version not in (2, 3) or not 9 <= bits <= 21 or incompatible & ~(_DIRTY | _CORRUPT | _COMPRESSION):
            raise FileError(f"a qcow2 image of version {version} with features {incompatible:#x} cannot be read here")
        if crypt:
            raise FileError("it is an encrypted qcow2 image, which cannot be read here")
        if backing_length and backing is None:
            raise FileError("it is a qcow2 image with a backing file, which is not here")
        self._bits = bits
        self._cluster = 1 << bits
        if l1_size * 8 > _L1_BYTES_MAX or self.size > l1_size << (2 * bits - 3):
            raise FileError("its qcow2 tables do not fit its size")
        table = image.read(l1_at, l1_size * 8)
        if len(table) != l1_size * 8:
            raise FileError("its qcow2 tables lie outside of it")
        self._l1 = struct.unpack(f">{l1_size}Q", table)
        self._tables: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    def read(self, offset: int, length: int) -> bytes:
        """See Blocks."""
        length = max(0, min(length, self.size - offset))
        parts, end = [], offset + length
        while offset < end:
            taken = min(end - offset, self._cluster - offset % self._cluster)
            parts.append(self._within_cluster(offset, taken))
            offset += taken
        return b"".join(parts)

    def _within_cluster(self, offset: int, length: int) -> bytes:
        number, within = divmod(offset, self._cluster)
        entry = self._entry(number)
        if entry & _COMPRESSED:
            return self._decompressed(entry)[within : within + length]
        host = entry & _OFFSET
        if entry & 1 or not host:
            if not entry & 1 and self._backing is not None:
                return self._backing.read(offset, length).ljust(length, b"\0")
            return bytes(length)
        data = self._image.read(host + within, length)
        if len(data) != length:
            raise FileError(f"a qcow2 cluster lies at {host}, outside of the image")
        return data

    def _entry(self, number: int) -> int:
        low: int
        high, low = divmod(number, self._cluster // 8)
        table = self._l1[high] & _OFFSET
        if not table:
            return 0
        if table not in self._tables:
            data = self._image.read(table, self._cluster)
            if len(data) != self._cluster:
                raise FileError(f"a qcow2 table lies at {table}, outside of the image")
            self._tables[table] = struct.unpack(f">{self._cluster // 8}Q", data)
            if len(self._tables) > _TABLES_MAX:
                self._tables.popitem(last=False)
        return self._tables[table][low]

    def _decompressed(self, entry: int) -> bytes:
        offset_bits = 62 - (self._bits - 8)
        host = entry & (1 << offset_bits) - 1
        sectors = (entry >> offset_bits & (1 << 62 - offset_bits) - 1) + 1
        data = self._image.read(host, sectors * 512 - host % 512)
        try:
            if self._zstd:
                return zstd.ZstdDecompressor().decompress(data, self._cluster).ljust(self._cluster, b"\0")
            return zlib.decompressobj(-12).decompress(data, self._cluster).ljust(self._cluster, b"\0")
        except (zlib.error, zstd.ZstdError) as error:
            raise FileError(f"a compressed qcow2 cluster at {host} is damaged: {error}") from error
