"""In the reader process: tables of partitions, numbered as Linux numbers them; what is damaged or does not fit is told.

Formats: UEFI's specification, 5.2 and 5.3; the kernel's block/partitions/msdos.c and efi.c.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from vmrewind.recover.files.blocks import Blocks

_SECTORS: Final = (512, 4096)
_HEADER: Final = struct.Struct("<8s4sII4xQQQQ16sQIII")
"""Signature, revision, bytes of the header, its sum, where it is and the other one, first and last block, identity; of the entries:
where, how many, bytes of each, sum."""
_ENTRY_BYTES_MAX, _ENTRIES_BYTES_MAX = 4096, 1 << 20
_MBR_ENTRY: Final = struct.Struct("<B3xB3xII")
_PROTECTIVE: Final = 0xEE
_EXTENDED: Final = (0x05, 0x0F, 0x85)
_LOGICAL_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition as its table has it: bytes; the disk may be shorter."""

    number: int
    offset: int
    size: int
    description: str


def partitions(disk: Blocks) -> tuple[list[Partition], list[str]]:
    """The partitions of a disk in order of their numbers, and what is wrong with their table; nothing without one."""
    primary = _mbr_entries(disk.read(0, 512))
    protective = any(kind == _PROTECTIVE for _, kind, _, _ in primary)
    for sector in _SECTORS:
        if (table := _gpt(disk, sector, sector)) is not None:
            return table, _behind_the_end(disk, table)
    if primary and not protective:
        return _of_mbr(disk, primary)
    for sector in _SECTORS:
        if (table := _gpt(disk, disk.size // sector * sector - sector, sector)) is not None:
            told = "its partition table (GPT) is damaged or missing: the copy at the disk's end is used"
            return table, [told, *_behind_the_end(disk, table)]
    return [], ["its partition table (GPT) is damaged, and there is no good copy of it at the disk's end"] if protective else []


def _behind_the_end(disk: Blocks, table: list[Partition]) -> list[str]:
    ends = [(part.number, part.offset + part.size - disk.size) for part in table]
    return [f"partition {number} ends {behind} bytes behind the disk's end: it was larger" for number, behind in ends if behind > 0]


def _gpt(disk: Blocks, at: int, sector: int) -> list[Partition] | None:
    """What the GPT header there says; None if there is none that is whole."""
    head = disk.read(at, sector)
    if len(head) != sector or head[:8] != b"EFI PART":
        return None
    _, _, header_bytes, check, own, _, _, _, _, place, count, entry_bytes, entries_check = _HEADER.unpack_from(head)
    if not _HEADER.size <= header_bytes <= sector or own != at // sector:
        return None
    if zlib.crc32(head[:16] + bytes(4) + head[20:header_bytes]) != check:
        return None
    if not 128 <= entry_bytes <= _ENTRY_BYTES_MAX or count * entry_bytes > _ENTRIES_BYTES_MAX:
        return None
    entries = disk.read(place * sector, count * entry_bytes)
    if zlib.crc32(entries) != entries_check:
        return None
    found = []
    for number in range(count):
        entry = entries[number * entry_bytes : (number + 1) * entry_bytes]
        low, high = struct.unpack_from("<QQ", entry, 32)
        if any(entry[:16]) and low <= high:
            name = entry[56:128].decode("utf-16-le", "replace").partition("\0")[0]
            found.append(Partition(number + 1, low * sector, (high - low + 1) * sector, name or "GPT"))
    return found


def _mbr_entries(sector: bytes) -> list[tuple[int, int, int, int]]:
    """(slot, type, start, sectors) of what is in use; none if it is no such sector."""
    if len(sector) < 512 or sector[510:512] != b"\x55\xaa":
        return []
    entries = [_MBR_ENTRY.unpack_from(sector, 446 + slot * _MBR_ENTRY.size) for slot in range(4)]
    if any(status not in (0, 0x80) for status, *_ in entries):
        return []
    return [(slot, kind, start, count) for slot, (_, kind, start, count) in enumerate(entries) if kind and count]


def _of_mbr(disk: Blocks, primary: list[tuple[int, int, int, int]]) -> tuple[list[Partition], list[str]]:
    found, notes = [], []
    for slot, kind, start, count in primary:
        if kind not in _EXTENDED:
            found.append(_partition(slot + 1, kind, start, count))
    number = 5
    for _, kind, extended, _ in primary:
        at, seen = extended, set[int]()
        while kind in _EXTENDED:
            entries = _mbr_entries(disk.read(at * 512, 512))
            if at in seen or len(seen) >= _LOGICAL_MAX or (not entries and disk.read(at * 512 + 510, 2) != b"\x55\xaa"):
                notes.append(f"its chain of logical partitions is damaged in sector {at}: there may be more than are known")
                break
            seen.add(at)
            for _, each, start, count in entries:
                if each not in _EXTENDED:
                    found.append(_partition(number, each, at + start, count))
                    number += 1
            following = [start for _, each, start, _ in entries if each in _EXTENDED]
            if not following:
                break
            at = extended + following[0]
    return found, notes + _behind_the_end(disk, found)


def _partition(number: int, kind: int, start: int, count: int) -> Partition:
    return Partition(number, start * 512, count * 512, f"MBR type {kind:#04x}")
