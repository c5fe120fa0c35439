"""Files out of a disk into a directory of this host: below it and nowhere else, whatever names and links a guest made.

Every name is taken as one component of an open directory; no link is followed, so there is no path that could lead elsewhere.
What is not whole has another name until it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from vmrewind.errors import FileError, SpaceError
from vmrewind.recover.files.client import Reader
from vmrewind.recover.files.names import shown
from vmrewind.recover.files.wire import Entry

_DEPTH_MAX: Final = 200
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PRIVILEGE_BITS: Final = stat.S_ISUID | stat.S_ISGID
_SIZE_MAX: Final = (1 << 63) - 1


@dataclass(slots=True)
class Fetched:
    """What came of it. ``problems``: path and why it is not there, or not as it was; ``left_out``: what was not asked for."""

    files: int = 0
    directories: int = 0
    links: int = 0
    others: int = 0
    size: int = 0
    problems: list[tuple[bytes, str]] = field(default_factory=list)
    left_out: list[tuple[bytes, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Options:
    """``overwrite``: files that exist already; ``special``: devices, pipes, set-uid bits, and attributes that give privileges, too;
    ``owners``: give files to whom they belonged."""

    recursive: bool
    overwrite: bool
    special: bool
    owners: bool


class Fetcher:
    """Fetches from one file system into one directory (``fd``)."""

    def __init__(self, reader: Reader, volume: str, fd: int, options: Options) -> None:
        self._reader = reader
        self._volume = volume
        self._top = fd
        self._options = options
        self._seen: set[int] = set()
        self._first_names: dict[int, tuple[bytes, ...]] = {}
        self.fetched = Fetched()

    def fetch(self, entry: Entry, name: bytes) -> None:
        """Bring ``entry`` to the directory as ``name``. Raises FileError for it, SpaceError; what is below it may have problems."""
        if entry.kind == "directory" and not self._options.recursive:
            raise FileError(f"{shown(entry.name)}: is a directory", "add -r to fetch it with what is in it")
        self._bring(entry, self._top, (name,))

    def _bring(self, entry: Entry, parent: int, path: tuple[bytes, ...]) -> None:
        name = path[-1]
        if name in (b"", b".", b"..") or b"/" in name or b"\0" in name or entry.problem:
            raise FileError(entry.problem or "its name cannot be one here")
        try:
            match entry.kind:
                case "directory":
                    self._directory(entry, parent, path)
                case "file":
                    self._file(entry, parent, path)
                case "symlink":
                    self._place(parent, name, lambda new: os.symlink(entry.target, new, dir_fd=parent))
                    self._finish_link(entry, parent, name)
                    self.fetched.links += 1
                case "unknown":
                    raise FileError("what it is cannot be told")
                case _:
                    self._special(entry, parent, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SpaceError(
                    f"{shown(b'/'.join(path))}: {error.strerror}", "make room, or choose another destination"
                ) from error
            if error.errno == errno.EEXIST:
                raise FileError(f"{shown(b'/'.join(path))}: exists already", "--overwrite replaces it") from error
            raise FileError(f"{shown(b'/'.join(path))}: {error.strerror or error}") from error

    def _directory(self, entry: Entry, parent: int, path: tuple[bytes, ...]) -> None:
        if entry.inode in self._seen:
            raise FileError("this directory is in itself, or in several others")
        if len(path) > _DEPTH_MAX:
            raise FileError(f"directories more than {_DEPTH_MAX} deep are not fetched")
        self._seen.add(entry.inode)
        try:
            os.mkdir(path[-1], 0o700, dir_fd=parent)
        except FileExistsError:
            if not self._options.overwrite:
                raise
        fd = os.open(path[-1], _DIRECTORY, dir_fd=parent)
        try:
            for child in self._children(entry, path):
                below = (*path, child.name)
                try:
                    self._bring(child, fd, below)
                except FileError as error:
                    self.fetched.problems.append((b"/".join(below), str(error)))
            self._finish(entry, fd, path)
        finally:
            os.close(fd)
        self.fetched.directories += 1

    def _children(self, entry: Entry, path: tuple[bytes, ...]) -> list[Entry]:
        listing = self._reader.entries(self._volume, entry.inode)
        if listing.problem:
            self.fetched.problems.append((b"/".join(path), listing.problem))
        return listing.entries

    def _file(self, entry: Entry, parent: int, path: tuple[bytes, ...]) -> None:
        if entry.links > 1 and (first := self._first_names.get(entry.inode)) is not None:
            with self._directory_of(first) as source:
                self._place(
                    parent,
                    path[-1],
                    lambda new: os.link(first[-1], new, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False),
                )
            self.fetched.files += 1
            return
        if not 0 <= entry.size <= _SIZE_MAX:
            raise FileError(f"a size of {entry.size} bytes is not possible")
        self._place(parent, path[-1], lambda new: self._write(entry, parent, new, path))
        self._first_names[entry.inode] = path
        self.fetched.files += 1

    def _write(self, entry: Entry, parent: int, name: bytes, path: tuple[bytes, ...]) -> None:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            os.ftruncate(fd, entry.size)
            for piece in self._reader.content(self._volume, entry.inode):
                if piece.offset < 0 or piece.offset + len(piece.data) > entry.size:
                    raise FileError("it has content behind its end")
                left, at = memoryview(piece.data), piece.offset
                while left:
                    written = os.pwrite(fd, left, at)
                    left, at = left[written:], at + written
                self.fetched.size += len(piece.data)
            self._finish(entry, fd, path)
            os.fsync(fd)
        except BaseException:
            os.unlink(name, dir_fd=parent)
            raise
        finally:
            os.close(fd)

    def _place(self, parent: int, name: bytes, make: Callable[[bytes], None]) -> None:
        """Make something under a name of its own and give it ``name`` when it is whole: never over what is there, unless asked."""
        temporary = b".vmrewind-" + secrets.token_hex(8).encode()
        if not self._options.overwrite:
            with contextlib.suppress(FileNotFoundError):
                os.stat(name, dir_fd=parent, follow_symlinks=False)
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        mask = os.umask(0)
        try:
            make(temporary)
        finally:
            os.umask(mask)
        try:
            if self._options.overwrite:
                os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
                # A rename onto another link of the same file does nothing, and leaves the name.
            else:
                os.link(temporary, name, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=parent)

    @contextlib.contextmanager
    def _directory_of(self, path: tuple[bytes, ...]) -> Iterator[int]:
        fd = os.dup(self._top)
        try:
            for name in path[:-1]:
                below = os.open(name, _DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    def _special(self, entry: Entry, parent: int, path: tuple[bytes, ...]) -> None:
        if not self._options.special or entry.kind == "socket":
            self.fetched.left_out.append((b"/".join(path), entry.kind))
            return
        mode = entry.mode & ~_PRIVILEGE_BITS
        if entry.kind == "fifo":
            self._place(parent, path[-1], lambda new: os.mkfifo(new, mode, dir_fd=parent))
        else:
            device = self._reader.details(self._volume, entry.inode).device
            if device is None:
                raise FileError("its device number is not known")
            kind = stat.S_IFCHR if entry.kind == "character-device" else stat.S_IFBLK
            self._place(parent, path[-1], lambda new: os.mknod(new, kind | mode, os.makedev(*device), dir_fd=parent))
        self._finish_link(entry, parent, path[-1])
        self.fetched.others += 1

    def _finish(self, entry: Entry, fd: int, path: tuple[bytes, ...]) -> None:
        """Owner, attributes, mode, times, in this order: each would undo what comes behind it."""
        if self._options.owners:
            os.fchown(fd, entry.uid, entry.gid)
        self._attributes(entry, fd, path)
        mode = entry.mode
        if mode & _PRIVILEGE_BITS and not (self._options.special and self._options.owners):
            mode &= ~_PRIVILEGE_BITS
            if entry.kind == "file":
                self.fetched.left_out.append((b"/".join(path), "set-uid and set-gid bits"))
        os.fchmod(fd, mode)
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _finish_link(self, entry: Entry, parent: int, name: bytes) -> None:
        if self._options.owners:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _attributes(self, entry: Entry, fd: int, path: tuple[bytes, ...]) -> None:
        try:
            attributes = self._reader.details(self._volume, entry.inode).xattrs
        except FileError as error:
            self.fetched.left_out.append((b"/".join(path), str(error)))
            return
        for name, value in attributes.items():
            if not name.startswith("user.") and not self._options.special:
                self.fetched.left_out.append((b"/".join(path), f"the extended attribute {shown(os.fsencode(name))}"))
                continue
            try:
                os.setxattr(fd, name, value)
            except (OSError, ValueError) as error:
                self.fetched.left_out.append((b"/".join(path), f"the extended attribute {shown(os.fsencode(name))}: {error}"))
