"""In the reader process: what a disk consists of: partitions, logical volumes, file systems, by their own marks."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyvslvm

from vmrewind.errors import FileError
from vmrewind.recover.files.blocks import Blocks, Over, Part, Stream
from vmrewind.recover.files.ext_journal import pending, replayed
from vmrewind.recover.files.tables import partitions
from vmrewind.recover.files.tree import FileSystem
from vmrewind.recover.files.tsk import SleuthKit
from vmrewind.recover.files.xfs import Xfs

_EXT_MAGIC_AT: Final = 0x438
_LVM_SECTORS: Final = 4


@dataclass(slots=True)
class Found:
    """A volume. ``system`` is None if no file system is known in it; ``problem``: why one that is there cannot be opened."""

    name: str
    blocks: Blocks
    description: str
    kind: str
    label: str = ""
    notes: list[str] = field(default_factory=list)
    system: FileSystem | None = None
    place: tuple[str, int] | None = None
    """The disk that it lies on in one piece, and where."""


def volumes(disks: dict[str, Blocks], *, replay: bool) -> list[Found]:
    """Everything that is on the disks, in order: partitions by their numbers in the table, then logical volumes."""
    found: list[Found] = []
    physical: list[Found] = []
    for name, disk in disks.items():
        for volume in _of_disk(name, disk):
            found.append(volume)
            if volume.kind == "lvm":
                physical.append(volume)
    found += _logical(physical)
    for volume in found:
        _open(volume, replay=replay)
    return found


def _of_disk(name: str, disk: Blocks) -> Iterator[Found]:
    # A file system without partitions may look like a table: FAT's and NTFS's first sectors end as an MBR does.
    kind = kind_of(disk)
    table, notes = ([], []) if kind else partitions(disk)
    if not table:
        yield Found(name, disk, "whole disk", kind, notes=notes, place=(name, 0))
    for found in table:
        part = Part(disk, found.offset, found.size)
        yield Found(f"{name}{found.number}", part, found.description, kind_of(part), notes=[*notes], place=(name, found.offset))


def kind_of(blocks: Blocks) -> str:
    """What the first sectors say that this is; empty for what is not known here."""
    head = blocks.read(0, 2048)
    if len(head) < 2048:
        return ""
    if head[:4] == b"XFSB":
        return "xfs"
    if struct.unpack_from("<H", head, _EXT_MAGIC_AT)[0] == 0xEF53:
        compatible, incompatible = struct.unpack_from("<II", head, 0x45C)
        if incompatible & 0x40 or incompatible & 0x80 or incompatible & 0x200:
            return "ext4"
        return "ext3" if compatible & 4 else "ext2"
    if any(head[at : at + 8] == b"LABELONE" and head[at + 24 : at + 32] == b"LVM2 001" for at in range(0, 2048, 512)):
        return "lvm"
    if head[3:11] == b"NTFS    ":
        return "ntfs"
    if head[3:11] == b"EXFAT   ":
        return "exfat"
    if head[:6] == b"LUKS\xba\xbe":
        return "luks"
    return _kind_of_fat(head)


def _kind_of_fat(head: bytes) -> str:
    """By the count of clusters, as Microsoft's specification has it; empty for what is no FAT."""
    if head[510:512] != b"\x55\xaa" or head[0] not in (0xEB, 0xE9):
        return ""
    sector, per_cluster, reserved, fats, roots, small = struct.unpack_from("<HBHBHH", head, 11)
    fat16, large, fat32 = (
        struct.unpack_from("<H", head, 22)[0],
        *struct.unpack_from("<I", head, 32),
        *struct.unpack_from("<I", head, 36),
    )
    if (
        sector not in (512, 1024, 2048, 4096)
        or per_cluster not in (1, 2, 4, 8, 16, 32, 64, 128)
        or not reserved
        or fats not in (1, 2)
    ):
        return ""
    total, fat = small or large, fat16 or fat32
    clusters = (total - reserved - fats * fat - -(-roots * 32 // sector)) // per_cluster
    if not fat or clusters <= 0:
        return ""
    return "fat12" if clusters < 4085 else "fat16" if clusters < 65525 else "fat32"


class _Logical:
    """A logical volume as blocks."""

    def __init__(self, volume: Any, *needed: object) -> None:
        self._volume = volume
        self._needed = needed  # The library does not keep what it reads from.
        self.size = int(volume.size)

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        if not length:
            return b""
        try:
            data: bytes = self._volume.read_buffer_at_offset(length, offset)
        except OSError as error:
            raise FileError(f"logical volume {self._volume.name}: bytes {offset}+{length}: {error}") from error
        return data


def _logical(physical: Sequence[Found]) -> Iterator[Found]:
    """The logical volumes of every volume group; a group with a part that is not there gives a note at those that are."""
    groups: dict[str, list[Found]] = {}
    for volume in physical:
        try:
            handle = pyvslvm.handle()
            handle.open_file_object(Stream(volume.blocks))
            groups.setdefault(handle.get_volume_group().identifier, []).append(volume)
        except OSError as error:
            volume.notes.append(f"LVM: cannot be read: {' '.join(str(error).split())}")
    for members in groups.values():
        try:
            yield from _of_group(members)
        except OSError as error:
            for volume in members:
                volume.notes.append(f"LVM: cannot be read: {' '.join(str(error).split())}")


def _of_group(members: Sequence[Found]) -> Iterator[Found]:
    handle = pyvslvm.handle()
    handle.open_file_object(Stream(members[0].blocks))
    group = handle.get_volume_group()
    if group.number_of_physical_volumes != len(members):
        for volume in members:
            volume.notes.append(
                f"LVM: group {group.name} has {group.number_of_physical_volumes} physical volumes, {len(members)} of them here"
            )
        return
    streams = [Stream(volume.blocks) for volume in members]
    handle.open_physical_volume_files_as_file_objects(streams)
    group = handle.get_volume_group()  # The one from before does not know of them.
    for number in range(group.number_of_logical_volumes):
        logical = _Logical(group.get_logical_volume(number), handle, group, streams)
        yield Found(f"{group.name}/{group.get_logical_volume(number).name}", logical, "logical volume", kind_of(logical))


def _open(volume: Found, *, replay: bool) -> None:
    try:
        if volume.kind == "xfs":
            volume.system = Xfs(volume.blocks)
        elif volume.kind.startswith(("ext2", "ext3", "ext4")):
            volume.system = _ext(volume, replay=replay)
        elif volume.kind == "ntfs" or "fat" in volume.kind:
            volume.system = SleuthKit(volume.blocks, volume.kind, _fat_notes(volume))
    except FileError as error:
        volume.notes.append(str(error))
    if volume.system is not None:
        volume.label = volume.system.label or volume.label
        volume.notes += volume.system.notes


def _ext(volume: Found, *, replay: bool) -> SleuthKit:
    head = volume.blocks.read(1024, 1024)
    volume.label = head[0x78:0x88].rstrip(b"\0").decode(errors="replace")
    notes: list[str] = []
    blocks: Blocks = volume.blocks
    try:
        if replay:
            block, held = replayed(blocks)
            blocks = Over(blocks, block, held)
            if held:
                notes.append(f"{volume.kind}'s journal is replayed here: {len(held)} blocks are as it has them")
        elif count := pending(blocks):
            notes.append(
                f"{volume.kind}'s journal holds {count} transactions that may not be in place yet: --replay counts them in"
            )
    except FileError as error:
        if replay:
            raise FileError(f"{volume.kind}: {error}", "without --replay what is in place can be looked at") from error
        notes.append(str(error))
    return SleuthKit(blocks, volume.kind, notes)


def _fat_notes(volume: Found) -> list[str]:
    """Whether the file system says that it was in use: the second entry of its table."""
    head = volume.blocks.read(0, 512)
    sector, reserved = struct.unpack_from("<H", head, 11)[0], struct.unpack_from("<H", head, 14)[0]
    at = sector * reserved
    clean = True
    if volume.kind == "fat32":
        clean = bool(struct.unpack("<I", volume.blocks.read(at + 4, 4))[0] & 1 << 27)
    elif volume.kind == "fat16":
        clean = bool(struct.unpack("<H", volume.blocks.read(at + 2, 2))[0] & 1 << 15)
    elif volume.kind == "exfat":
        clean = not struct.unpack_from("<H", head, 106)[0] & 2
    return (
        []
        if clean
        else [f"{volume.kind.upper()} was in use (it is marked dirty): it has no journal, so what was under way is lost"]
    )
