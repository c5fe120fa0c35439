"""In the reader process: what every kind of file system offers, and how a path leads through it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from vmrewind.errors import FileError, NoSuchFileError
from vmrewind.recover.files.names import shown
from vmrewind.recover.files.wire import Entry, Piece

_LINKS_MAX: Final = 40
TARGET_BYTES_MAX: Final = 4095
"""The longest target of a symbolic link that Linux follows (PATH_MAX with its NUL)."""


class FileSystem(Protocol):
    """A file system, read-only. ``notes``: what is uncertain about this state of it. Files are known by their inode's number."""

    kind: str
    label: str
    notes: list[str]
    caseless: bool

    def root(self) -> Entry:
        """The root directory."""

    def entries(self, inode: int) -> Iterator[Entry]:
        """What is in a directory, without ``.`` and ``..``. Raises FileError at the end if it is damaged, and may hold more."""

    def content(self, inode: int) -> Iterator[Piece]:
        """A file's content in order of offset, but for holes."""

    def extents(self, inode: int) -> list[tuple[int, int]] | None:
        """(offset, length) in the file system of a file's content as it is read; None if it is not there as it is."""

    def details(self, inode: int) -> tuple[dict[str, bytes], tuple[int, int] | None]:
        """Extended attributes, and a device's number. Raises FileError if they cannot be read."""


def whole_target(target: bytes, size: int) -> bytes:
    """The target of a symbolic link of this size, if that is what it is. Raises FileError."""
    if len(target) != size or not size or b"\0" in target:
        raise FileError(f"its target cannot be read: {size} bytes are said to be there, and they are not, or are no target")
    return target


def lookup(system: FileSystem, path: bytes) -> Entry:
    """What is at a path; symbolic links on the way are followed within the file system, the last name is not. Raises FileError."""
    trail = [system.root()]
    left = [name for name in path.split(b"/") if name not in (b"", b".")][::-1]
    if trail[0].problem:
        raise FileError(f"the root directory cannot be followed: {trail[0].problem}")
    links = 0
    while left:
        name = left.pop()
        here = trail[-1]
        if here.kind != "directory":
            raise NoSuchFileError(f"{shown(path)}: {shown(here.name)} is not a directory")
        if name == b"..":
            trail = trail[:-1] or trail
            continue
        found = _child(system, here, name)
        if found is None:
            raise NoSuchFileError(f"{shown(path)}: is not there", "ls of a directory above it shows what is")
        if found.problem and left:
            raise FileError(f"{shown(path)}: {shown(name)} cannot be followed: {found.problem}")
        if found.kind == "symlink" and left:
            links += 1
            if links > _LINKS_MAX:
                raise FileError(f"{shown(path)}: too many symbolic links")
            if found.target.startswith(b"/"):
                trail = trail[:1]
            left += [name for name in found.target.split(b"/") if name not in (b"", b".")][::-1]
            continue
        trail.append(found)
    return trail[-1]


def _child(system: FileSystem, directory: Entry, name: bytes) -> Entry | None:
    alike = None
    for entry in system.entries(directory.inode):
        if entry.name == name:
            return entry
        if system.caseless and alike is None and entry.name.lower() == name.lower():
            alike = entry
    return alike
