"""In the reader process: XFS, by libfsxfs; and whether its log is clean."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from typing import Any, Final

import pyfsxfs

from vmrewind.errors import FileError
from vmrewind.recover.files.blocks import Blocks, Stream
from vmrewind.recover.files.tree import TARGET_BYTES_MAX, whole_target
from vmrewind.recover.files.wire import PIECE_BYTES, Entry, Piece

_KINDS: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character-device",
    stat.S_IFBLK: "block-device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
_HOLE: Final = 1
_BASIC_BLOCK: Final = 512
_LOG_MAGIC: Final = 0xFEEDBABE
_UNMOUNT: Final = 0x20
_LINK_HEADER: Final = struct.Struct(">4sII4x16xQ16x")
"""Of a target outside of the inode (xfs_dsymlink_hdr): magic, which part of the target this is (offset, bytes), its inode."""
_LINK_EXTENTS_MAX, _LINK_BYTES_MAX = 3, 1 << 16
"""As many there are at most, and so long (XFS_SYMLINK_MAPS, XFS_MAX_BLOCKSIZE)."""
_LINK_MAGIC: Final = b"XSLM"
_RECORD_BLOCKS_MAX: Final = 1024
"""How far behind a record's header the log's head can lie: a record is at most 256 KiB, and its headers."""


class Xfs:
    """See FileSystem."""

    kind = "xfs"
    caseless = False

    def __init__(self, blocks: Blocks) -> None:
        self.notes = []
        self._blocks = blocks
        try:
            if not log_is_clean(blocks):
                self.notes.append("XFS's log holds changes that are not in place yet, and nothing but a kernel can replay it")
            self._system = pyfsxfs.volume()
            self._system.open_file_object(Stream(blocks))
            self.label = self._system.label or ""
            self._root = int(self._system.root_directory.inode_number)
        except OSError as error:
            raise FileError(f"XFS: cannot be opened: {_told(error)}") from error

    def root(self) -> Entry:
        """See FileSystem."""
        return self._entry(b"/", self._file(self._root))

    def entries(self, inode: int) -> Iterator[Entry]:
        """See FileSystem."""
        directory = self._file(inode)
        try:
            count = directory.number_of_sub_file_entries
        except OSError as error:
            raise FileError(f"the directory with inode {inode} cannot be read: {_told(error)}") from error
        problems = []
        for number in range(count):
            try:
                file = directory.get_sub_file_entry(number)
                yield self._entry(file.name.encode("utf-8", "surrogateescape"), file)
            except OSError as error:
                # libfsxfs gives names as text, and cannot give one that is not UTF-8.
                problems.append(f"entry {number}: {_told(error)}")
        if problems:
            raise FileError(f"the directory with inode {inode}: {len(problems)} entries cannot be read, the first: {problems[0]}")

    def _file(self, inode: int) -> Any:
        try:
            return self._system.get_file_entry_by_inode(inode)
        except OSError as error:
            raise FileError(f"inode {inode} cannot be read: {_told(error)}") from error

    def _entry(self, name: bytes, file: Any) -> Entry:
        kind = _KINDS.get(stat.S_IFMT(file.file_mode), "unknown")
        target, problem = b"", "" if kind != "unknown" else "what it is cannot be told: its inode is damaged"
        if kind == "symlink":
            try:
                target = self._target(file)
            except FileError as error:
                problem = str(error)
        return Entry(
            name=name,
            inode=int(file.inode_number),
            kind=kind,
            size=int(file.size),
            mode=stat.S_IMODE(file.file_mode),
            uid=int(file.owner_identifier),
            gid=int(file.group_identifier),
            mtime_ns=int(file.get_modification_time_as_integer()),
            ctime_ns=int(file.get_inode_change_time_as_integer()),
            links=int(file.number_of_links),
            target=target,
            problem=problem,
        )

    def _target(self, file: Any) -> bytes:
        """A link's target. libfsxfs takes what lies outside of the inode for text, and does not know version 5's headers in it."""
        size = int(file.size)
        try:
            target = (file.symbolic_link_target or "").encode("utf-8", "surrogateescape")
        except OSError:
            target = b""  # It is not UTF-8.
        if len(target) == size:
            return whole_target(target, size)
        try:
            extents = [file.get_extent(number) for number in range(min(file.number_of_extents, _LINK_EXTENTS_MAX))]
        except OSError as error:  # It is in the inode.
            raise FileError("its target cannot be read: it is not UTF-8, or damaged") from error
        stored = b"".join(self._blocks.read(offset, min(length, _LINK_BYTES_MAX)) for offset, length, _ in extents)
        superblock = self._blocks.read(0, _BASIC_BLOCK)
        if struct.unpack_from(">H", superblock, 100)[0] & 15 < 5:
            return whole_target(stored[: min(size, TARGET_BYTES_MAX)], size)
        return whole_target(
            _without_headers(stored, struct.unpack_from(">I", superblock, 4)[0], int(file.inode_number), size), size
        )

    def content(self, inode: int) -> Iterator[Piece]:
        """See FileSystem."""
        file = self._file(inode)
        try:
            size, at = int(file.size), 0
            for number in range(file.number_of_extents):
                _, length, flags = file.get_extent(number)
                start, at = at, at + length
                if flags & _HOLE:
                    continue
                for offset in range(start, min(at, size), PIECE_BYTES):
                    wanted = min(PIECE_BYTES, at - offset, size - offset)
                    data = file.read_buffer_at_offset(wanted, offset)
                    if len(data) != wanted:
                        raise FileError(f"inode {inode}: bytes {offset}+{wanted} cannot be read")
                    yield Piece(offset, data)
        except OSError as error:
            raise FileError(f"inode {inode} cannot be read: {_told(error)}") from error

    def extents(self, inode: int) -> list[tuple[int, int]] | None:
        """See FileSystem."""
        file = self._file(inode)
        try:
            found = [file.get_extent(number) for number in range(file.number_of_extents)]
        except OSError:
            return None
        return [(offset, length) for offset, length, flags in found if not flags & _HOLE]

    def details(self, inode: int) -> tuple[dict[str, bytes], tuple[int, int] | None]:
        """See FileSystem."""
        file = self._file(inode)
        try:
            return {a.name: a.read() for a in file.extended_attributes if not a.name.startswith("trusted.SGI_")}, file.device_number
        except OSError as error:
            raise FileError(f"its extended attributes cannot be read: {_told(error)}") from error


def log_is_clean(blocks: Blocks) -> bool:
    """Whether the log ends with the record of an unmount (xfs_log_recover.c, xlog_find_tail); a log elsewhere counts as unclean."""
    superblock = blocks.read(0, _BASIC_BLOCK)
    block_size, start = struct.unpack_from(">I", superblock, 4)[0], struct.unpack_from(">Q", superblock, 48)[0]
    group_blocks, log_blocks = struct.unpack_from(">I", superblock, 84)[0], struct.unpack_from(">I", superblock, 96)[0]
    group_bits = superblock[124]
    if not start or group_bits > 32 or not 512 <= block_size <= 65536:
        return False
    first = ((start >> group_bits) * group_blocks + (start & (1 << group_bits) - 1)) * block_size
    count = log_blocks * block_size // _BASIC_BLOCK

    def block(number: int) -> bytes:
        data = blocks.read(first + number % count * _BASIC_BLOCK, _BASIC_BLOCK)
        if len(data) != _BASIC_BLOCK:
            raise FileError("XFS: its log lies outside of it")
        return data

    def cycle(number: int) -> int:
        data = block(number)
        at = 4 if struct.unpack_from(">I", data)[0] == _LOG_MAGIC else 0
        return int(struct.unpack_from(">I", data, at)[0])

    if not count:
        return False
    # The head is where the cycle number falls: what lies behind was written one time around earlier, or never.
    low, high, newest = 0, count, cycle(0)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if cycle(middle) == newest else (low, middle)
    head = low
    for back in range(1, min(_RECORD_BLOCKS_MAX, count) + 1):
        data = block(head - back)
        if struct.unpack_from(">I", data)[0] != _LOG_MAGIC:
            continue
        (operations,) = struct.unpack_from(">I", data, 40)
        headers = -(-max(struct.unpack_from(">I", data, 320)[0], 1) // 32768)
        (flags,) = struct.unpack_from(">B", block(head - back + headers), 9)
        return bool(operations == 1 and flags & _UNMOUNT)
    return False


def _without_headers(stored: bytes, block_size: int, inode: int, size: int) -> bytes:
    """A link's target of version 5: every extent begins with a header (xfs_symlink_remote_read)."""
    target = b""
    at = 0
    while len(target) < size and at + _LINK_HEADER.size < len(stored):
        magic, offset, length, owner = _LINK_HEADER.unpack_from(stored, at)
        if (magic, offset, owner) != (_LINK_MAGIC, len(target), inode) or not length:
            break
        at += _LINK_HEADER.size
        target += stored[at : at + length]
        at = -(-(at + length) // block_size) * block_size
    return target


def _told(error: OSError) -> str:
    return " ".join(str(error).split()) or "no reason given"
