"""In the reader process: ext2 to ext4, NTFS, FAT and exFAT, by the Sleuth Kit."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from typing import Any, Final

import pyfsext
import pytsk3

from vmrewind.errors import FileError
from vmrewind.recover.files.blocks import Blocks, Stream
from vmrewind.recover.files.ext_directories import damage
from vmrewind.recover.files.ext_inodes import ExtInodes
from vmrewind.recover.files.tree import TARGET_BYTES_MAX, whole_target
from vmrewind.recover.files.wire import PIECE_BYTES, Entry, Piece

_KINDS: Final = {
    pytsk3.TSK_FS_META_TYPE_REG: "file",
    pytsk3.TSK_FS_META_TYPE_DIR: "directory",
    pytsk3.TSK_FS_META_TYPE_LNK: "symlink",
    pytsk3.TSK_FS_META_TYPE_CHR: "character-device",
    pytsk3.TSK_FS_META_TYPE_BLK: "block-device",
    pytsk3.TSK_FS_META_TYPE_FIFO: "fifo",
    pytsk3.TSK_FS_META_TYPE_SOCK: "socket",
}
_VIRTUAL: Final = (pytsk3.TSK_FS_NAME_TYPE_VIRT, pytsk3.TSK_FS_NAME_TYPE_VIRT_DIR)
_NTFS_OWN_MAX: Final = 23
"""Inodes up to here are NTFS's own files; its drivers hide them, but for the root directory."""
_NTFS_VOLUME: Final = 3
_VOLUME_NAME, _VOLUME_INFORMATION = 0x60, 0x70
_COMPRESSED_ENCRYPTED: Final = 0x20 | 0x40
"""TSK_FS_ATTR_COMP, TSK_FS_ATTR_ENC"""
_FAT_ITSELF: Final = b".          "
_NONRESIDENT: Final = 0x02
_HOLE: Final = 0x01 | 0x02
"""TSK_FS_ATTR_RUN_FLAG_FILLER, _SPARSE: reads as zeroes"""


class _Image(pytsk3.Img_Info):  # type: ignore[misc]
    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        super().__init__(url="", type=pytsk3.TSK_IMG_TYPE_EXTERNAL)

    def read(self, offset: int, size: int) -> bytes:
        return self._blocks.read(offset, size)

    def get_size(self) -> int:
        return self._blocks.size

    def close(self) -> None:
        pass


class _Content:
    """See Blocks."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.size = int(file.info.meta.size)

    def read(self, offset: int, length: int) -> bytes:
        try:
            data: bytes = self._file.read_random(offset, length)
        except OSError as error:
            raise FileError(f"bytes {offset}+{length} cannot be read: {_told(error)}") from error
        return data


class SleuthKit:
    """See FileSystem."""

    def __init__(self, blocks: Blocks, kind: str, notes: list[str]) -> None:
        self._blocks = blocks
        self.kind = kind
        self.notes = notes
        self.caseless = not kind.startswith("ext")
        self.label = ""
        try:
            self._image = _Image(blocks)
            self._system = pytsk3.FS_Info(self._image, type=_type_of(kind))
        except OSError as error:
            raise FileError(f"{kind}: cannot be opened: {_told(error)}") from error
        self._pyfsext: Any = None
        self._inodes = ExtInodes(blocks) if kind.startswith("ext") else None
        if kind == "ntfs":
            self._look_at_ntfs()

    def root(self) -> Entry:
        """See FileSystem."""
        inode = int(self._system.info.root_inum)
        return self._entry(b"/", self._system.open_meta(inode).info.meta, inode)

    def entries(self, inode: int) -> Iterator[Entry]:
        """See FileSystem."""
        try:
            directory = self._system.open_dir(inode=inode)
        except OSError as error:
            raise FileError(f"the directory with inode {inode} cannot be read: {_told(error)}") from error
        for found in directory:
            name, meta = found.info.name, found.info.meta
            if name is None or name.name in (b".", b"..") or not int(name.flags) & pytsk3.TSK_FS_NAME_FLAG_ALLOC:
                continue
            if name.type in _VIRTUAL or self._is_ntfs_own(int(name.meta_addr)):
                continue
            yield self._entry(bytes(name.name), meta, int(name.meta_addr))
        if self._inodes is not None:
            self._check_ext_directory(self._inodes, inode)
        elif self.kind.startswith("fat") and inode != int(self._system.info.root_inum):
            begin = self.blocks_of(inode).read(0, len(_FAT_ITSELF))
            if begin != _FAT_ITSELF:
                raise FileError(f"the directory with inode {inode} is damaged: it does not begin with itself")

    def _check_ext_directory(self, inodes: ExtInodes, inode: int) -> None:
        seed, has_blocks = inodes.directory(inode)
        if not has_blocks:
            return
        content, block = self.blocks_of(inode), inodes.block
        for at in range(0, max(content.size, block), block):
            data = content.read(at, block)
            what = damage(data, inode, seed, first=not at) if len(data) == block else "it is not there"
            if what:
                raise FileError(f"the directory with inode {inode} is damaged: block {at // block}: {what}")

    def _is_ntfs_own(self, inode: int) -> bool:
        return self.kind == "ntfs" and inode <= _NTFS_OWN_MAX

    def _entry(self, name: bytes, meta: Any, inode: int) -> Entry:
        if meta is None:
            return Entry(name, inode, "unknown", problem="its inode cannot be read")
        kind, size = _KINDS.get(meta.type, "unknown"), int(meta.size)
        times = int(meta.mtime) * 10**9 + int(meta.mtime_nano), int(meta.ctime) * 10**9 + int(meta.ctime_nano)
        target, problem = b"", ""
        if self._inodes is not None:
            try:
                times = self._inodes.times(inode)
            except FileError as error:
                return Entry(name, inode, "unknown", problem=str(error))
        if kind == "unknown":
            problem = "what it is cannot be told: its inode is damaged"
        if kind == "symlink":
            try:
                target = self._target(inode, bytes(meta.link or b""), size)
            except FileError as error:
                problem = str(error)
        return Entry(
            name=name,
            inode=inode,
            kind=kind,
            size=size,
            mode=stat.S_IMODE(int(meta.mode)),
            uid=int(meta.uid) & 0xFFFFFFFF,
            gid=int(meta.gid) & 0xFFFFFFFF,
            mtime_ns=times[0],
            ctime_ns=times[1],
            links=int(meta.nlink),
            target=target,
            problem=problem,
        )

    def _target(self, inode: int, short: bytes, size: int) -> bytes:
        """A link's target; ``short``: what of it the library gives, which is none of one that lies outside of the inode."""
        if len(short) == size:
            return short
        try:
            return whole_target(self._system.open_meta(inode).read_random(0, min(size, TARGET_BYTES_MAX)), size)
        except OSError as error:
            raise FileError(f"its target cannot be read: {_told(error)}") from error

    def content(self, inode: int) -> Iterator[Piece]:
        """See FileSystem."""
        try:
            file = self._system.open_meta(inode)
            attribute = self._data_of(file)
            if attribute is None:
                return
            for start, end in self._stretches(attribute):
                for at in range(start, end, PIECE_BYTES):
                    wanted = min(PIECE_BYTES, end - at)
                    data = file.read_random(at, wanted, attribute.info.type, attribute.info.id)
                    if len(data) != wanted:
                        raise FileError(f"inode {inode}: bytes {at}+{wanted} cannot be read")
                    yield Piece(at, data)
        except OSError as error:
            raise FileError(f"inode {inode} cannot be read: {_told(error)}") from error

    def extents(self, inode: int) -> list[tuple[int, int]] | None:
        """See FileSystem."""
        try:
            attribute = self._data_of(self._system.open_meta(inode))
            if attribute is None or not self._lies_plainly(attribute):
                return None
            block = int(self._system.info.block_size)
            return [(int(run.addr) * block, int(run.len) * block) for run in attribute if not int(run.flags) & _HOLE]
        except OSError:
            return None

    @staticmethod
    def _lies_plainly(attribute: Any) -> bool:
        flags = int(attribute.info.flags)
        return bool(flags & _NONRESIDENT) and not flags & _COMPRESSED_ENCRYPTED

    def _data_of(self, file: Any) -> Any:
        """The attribute with the content: NTFS's unnamed stream; elsewhere the only one."""
        wanted = pytsk3.TSK_FS_ATTR_TYPE_NTFS_DATA if self.kind == "ntfs" else pytsk3.TSK_FS_ATTR_TYPE_DEFAULT
        for attribute in file:
            if attribute.info.type in (wanted, pytsk3.TSK_FS_ATTR_TYPE_DEFAULT) and not attribute.info.name:
                return attribute
        return next((a for a in file if a.info.type == wanted and a.info.name == b"DATA"), None)

    def _stretches(self, attribute: Any) -> Iterator[tuple[int, int]]:
        """The parts of the content, bytes, that are no holes."""
        size = int(attribute.info.size)
        if not self._lies_plainly(attribute):
            yield 0, size
            return
        block = int(self._system.info.block_size)
        for run in attribute:
            start, end = int(run.offset) * block, min((int(run.offset) + int(run.len)) * block, size)
            if not int(run.flags) & _HOLE and end > start:
                yield start, end

    def blocks_of(self, inode: int) -> _Content:
        """A file's content as blocks."""
        try:
            return _Content(self._system.open_meta(inode))
        except OSError as error:
            raise FileError(f"inode {inode} cannot be read: {_told(error)}") from error

    def details(self, inode: int) -> tuple[dict[str, bytes], tuple[int, int] | None]:
        """See FileSystem."""
        if not self.kind.startswith("ext"):
            return {}, None
        try:
            if self._pyfsext is None:
                self._pyfsext = pyfsext.volume()
                self._pyfsext.open_file_object(Stream(self._blocks))
            entry = self._pyfsext.get_file_entry_by_inode(inode)
            attributes = {a.name: a.read() for a in entry.extended_attributes if not a.name.startswith("system.")}
        except OSError as error:
            raise FileError(f"its extended attributes cannot be read: {_told(error)}") from error
        return attributes, entry.device_number

    def _look_at_ntfs(self) -> None:
        try:
            file = self._system.open_meta(_NTFS_VOLUME)
            for attribute in file:
                kind, size = int(attribute.info.type), int(attribute.info.size)
                if kind == _VOLUME_NAME and size:
                    self.label = file.read_random(0, size, attribute.info.type, attribute.info.id).decode("utf-16-le", "replace")
                if kind == _VOLUME_INFORMATION and size >= 12:
                    (flags,) = struct.unpack_from("<H", file.read_random(0, 12, attribute.info.type, attribute.info.id), 10)
                    if flags & 1:
                        self.notes.append("NTFS was in use (it is marked dirty): its own log is not replayed")
        except OSError as error:
            self.notes.append(f"NTFS's description of the volume cannot be read: {_told(error)}")


def _type_of(kind: str) -> Any:
    return getattr(pytsk3, f"TSK_FS_TYPE_{kind.upper()}")


def _told(error: OSError) -> str:
    return " ".join(str(error).split()) or "no reason given"
