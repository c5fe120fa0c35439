"""In the reader process: what the journal of ext3 and ext4 (JBD2) holds that may not be in place yet.

Format: the kernel's Documentation/filesystems/ext4/journal.rst; the order of things: fs/jbd2/recovery.c. Nothing is written:
the result is a table of blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from vmrewind.errors import FileError
from vmrewind.recover.files.blocks import Blocks
from vmrewind.recover.files.crc32c import crc32c
from vmrewind.recover.files.tsk import SleuthKit

_MAGIC: Final = 0xC03B3998
_DESCRIPTOR, _COMMIT, _SUPERBLOCK_V2, _REVOKE = 1, 2, 4, 5
_64BIT, _ASYNC, _CSUM_V2, _CSUM_V3, _FAST = 2, 4, 8, 16, 32
_KNOWN: Final = 1 | _64BIT | _ASYNC | _CSUM_V2 | _CSUM_V3 | _FAST
_ESCAPED, _SAME_UUID, _LAST_TAG = 1, 2, 8
_HAS_JOURNAL: Final = 4
_FAST_BLOCKS_DEFAULT: Final = 256
_FAST_HEAD: Final = 9


@dataclass(slots=True)
class _Transaction:
    sequence: int
    blocks: list[tuple[int, int, bool, int]] = field(default_factory=list)
    """(number in the file system, in the journal, whether its first word is escaped, checksum)"""
    revoked: list[int] = field(default_factory=list)
    control: list[tuple[int, int]] = field(default_factory=list)
    """(number in the journal, offset of its checksum) of its own blocks"""


class _Journal:
    def __init__(self, content: Blocks, block: int) -> None:
        head = content.read(0, 1024)
        if len(head) < 1024 or struct.unpack_from(">II", head) != (_MAGIC, _SUPERBLOCK_V2):
            raise FileError("its journal's superblock cannot be read, so what it holds is not known")
        size, self.end, self.first, self.sequence, self.start = struct.unpack_from(">5I", head, 12)
        (self.features,) = struct.unpack_from(">I", head, 40)
        if size != block or self.end * block > content.size or not 0 < self.first < self.end or self.features & ~_KNOWN:
            raise FileError(f"its journal is of a kind that is not known here (features {self.features:#x}), and not replayed")
        self.content = content
        self.block = block
        self.fast_at = self.end
        if self.features & _FAST:
            fast = struct.unpack_from(">I", head, 84)[0] or _FAST_BLOCKS_DEFAULT
            self.fast_at = self.end = max(self.first + 1, self.end - fast)
        self.checks = bool(self.features & (_CSUM_V2 | _CSUM_V3))
        self.seed = crc32c(0xFFFFFFFF, head[48:64])

    def read(self, number: int) -> bytes:
        data = self.content.read(number * self.block, self.block)
        if len(data) != self.block:
            raise FileError(f"block {number} of its journal cannot be read")
        return data

    def transactions(self) -> Iterator[_Transaction]:
        """Those that were committed, in order."""
        if not self.start:
            return
        at, sequence, walked = self.start, self.sequence, 0
        current = _Transaction(sequence)
        while walked <= self.end:
            data = self.read(at)
            magic, kind, number = struct.unpack_from(">III", data)
            if magic != _MAGIC or number != sequence:
                return
            step = 1
            if kind == _DESCRIPTOR:
                current.control.append((at, self.block - 4))
                for target, flags, check in self._tags(data):
                    current.blocks.append((target, self._after(at, step), bool(flags & _ESCAPED), check))
                    step += 1
            elif kind == _REVOKE:
                current.control.append((at, self.block - 4))
                current.revoked += self._revoked(data)
            elif kind == _COMMIT:
                current.control.append((at, 16))
                yield current
                sequence = sequence + 1 & 0xFFFFFFFF
                current = _Transaction(sequence)
            else:
                return
            at, walked = self._after(at, step), walked + step

    def _after(self, at: int, step: int) -> int:
        at += step
        return at if at < self.end else self.first + (at - self.end) % (self.end - self.first)

    def _tags(self, data: bytes) -> Iterator[tuple[int, int, int]]:
        wide, v3 = bool(self.features & _64BIT), bool(self.features & _CSUM_V3)
        size = 16 if v3 else 8 + 2 * bool(self.features & _CSUM_V2) + 4 * wide
        at, end = 12, self.block - 4 * self.checks
        while at + size <= end:
            if v3:
                low, flags, high, check = struct.unpack_from(">4I", data, at)
            else:
                low, check, flags = struct.unpack_from(">IHH", data, at)
                high = struct.unpack_from(">I", data, at + 8)[0] if wide else 0
            yield low | (high << 32 if wide else 0), flags, check
            at += size + (0 if flags & _SAME_UUID else 16)
            if flags & _LAST_TAG:
                return

    def _revoked(self, data: bytes) -> Iterator[int]:
        (used,) = struct.unpack_from(">I", data, 12)
        form = ">Q" if self.features & _64BIT else ">I"
        size = struct.calcsize(form)
        for at in range(16, min(used, self.block) - size + 1, size):
            yield struct.unpack_from(form, data, at)[0]

    def check(self, transaction: _Transaction) -> None:
        """Raises FileError if a checksum does not match."""
        if not self.checks:
            return
        for number, at in transaction.control:
            data = self.read(number)
            if crc32c(self.seed, data[:at] + bytes(4) + data[at + 4 :]) != struct.unpack_from(">I", data, at)[0]:
                raise FileError(f"transaction {transaction.sequence} of its journal is damaged, so nothing of it is replayed")
        mask = 0xFFFFFFFF if self.features & _CSUM_V3 else 0xFFFF
        for target, number, _, check in transaction.blocks:
            seed = crc32c(self.seed, struct.pack(">I", transaction.sequence))
            if crc32c(seed, self.read(number)) & mask != check:
                raise FileError(f"block {target} in transaction {transaction.sequence} of its journal is damaged")

    def has_fast_commits(self, sequence: int) -> bool:
        """Whether there are fast commits upon the last transaction, which are told of, not replayed."""
        if not self.features & _FAST:
            return False
        tag, length, _, tid = struct.unpack_from("<HHII", self.read(self.fast_at))
        return bool(tag == _FAST_HEAD and length == 8 and tid == sequence)


def pending(blocks: Blocks) -> int:
    """How many committed transactions the journal holds that were not marked as done."""
    journal = _open(blocks)
    if journal is None:
        return 0
    last = journal.sequence
    count = 0
    for transaction in journal.transactions():
        count, last = count + 1, transaction.sequence + 1
    return count + journal.has_fast_commits(last)


def replayed(blocks: Blocks) -> tuple[int, dict[int, bytes]]:
    """(block size, what blocks hold after a replay). Raises FileError if the journal is damaged, or of a kind that is not known."""
    journal = _open(blocks)
    if journal is None:
        return 4096, {}
    transactions = list(journal.transactions())
    revoked: dict[int, int] = {}
    for order, transaction in enumerate(transactions):
        journal.check(transaction)
        revoked.update(dict.fromkeys(transaction.revoked, order))
    if journal.has_fast_commits(transactions[-1].sequence + 1 if transactions else journal.sequence):
        raise FileError("its journal holds fast commits, which only a kernel replays")
    held: dict[int, bytes] = {}
    for order, transaction in enumerate(transactions):
        for target, number, escaped, _ in transaction.blocks:
            if order > revoked.get(target, -1):
                data = journal.read(number)
                held[target] = struct.pack(">I", _MAGIC) + data[4:] if escaped else data
    return journal.block, held


def _open(blocks: Blocks) -> _Journal | None:
    """The journal, None for a file system without one."""
    head = blocks.read(1024, 1024)
    (compatible,) = struct.unpack_from("<I", head, 0x5C)
    if not compatible & _HAS_JOURNAL:
        return None
    (inode,) = struct.unpack_from("<I", head, 0xE0)
    if not inode:
        raise FileError("its journal is on another device, and is not counted in")
    (exponent,) = struct.unpack_from("<I", head, 24)
    if exponent > 6:
        raise FileError(f"a block size of 2^{10 + exponent} bytes is not known here")
    return _Journal(SleuthKit(blocks, "ext4", []).blocks_of(inode), 1024 << exponent)
