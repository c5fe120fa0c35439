"""From disks at a position to what the reader is to look at, and from a user's words to one file system in it."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Final

from vmrewind.errors import FileError, ImageError, NoSuchFileError, UsageError
from vmrewind.history.history import History
from vmrewind.history.view import View
from vmrewind.journal.runs import Position
from vmrewind.recover.files.client import Bytes, Disks, ImageOf, Reader
from vmrewind.recover.files.names import shown
from vmrewind.recover.files.wire import Entry, Volume
from vmrewind.vmconfig.chain import backing_chain

_NEVER_READ: Final = ("lvm", "luks")
_BACKING_FORMAT: Final = 0xE2792ACA


class ImageFile:
    """A backing file of this host, open as long as the command runs. It is read as it is: its history is nobody's."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise ImageError(
                f"{path}: a disk stands on this backing file, and it cannot be read: {error.strerror}",
                "put it there, or restore the moment where it is",
            ) from error

    def read(self, offset: int, length: int) -> bytes:
        """The bytes."""
        return os.pread(self._fd, length, offset)


def disks_at(history: History, targets: Sequence[str], position: Position) -> Disks:
    """The disks as they were."""
    return {target: chain_of(View.open(history, target, position)) for target in targets}


def chain_of(view: View, top: Bytes | None = None) -> list[ImageOf]:
    """A disk's chain of images: the view (or ``top``, which stands for it), and the backing files of this host that it stands on.

    Only what the VM's configuration calls qcow2 is taken for it: a guest with a raw disk could write a header that names any file.
    """
    disk = view.disk
    chain = [ImageOf(top or view, disk.format)]
    if disk.format == "qcow2" and disk.backing is not None:
        form = _backing_format(view)
        chain.append(ImageOf(ImageFile(disk.backing), form))
        if form == "qcow2":
            chain += [ImageOf(ImageFile(lower.path), lower.format) for lower in backing_chain(disk.backing)]
    return chain


def _backing_format(view: View) -> str:
    head = view.read(0, min(view.size, 65536))
    at = struct.unpack_from(">I", head, 100)[0] if head[4:8] == b"\0\0\0\3" else 72
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0:
            break
        if kind == _BACKING_FORMAT:
            return head[at + 8 : at + 8 + length].decode(errors="replace")
        at += 8 + -(-length // 8) * 8
    raise FileError(f"disk {view.disk.target}: its qcow2 image does not say which format its backing file has")


def choose(reader: Reader, volumes: Sequence[Volume], wanted: str | None, path: bytes) -> tuple[Volume, Entry]:
    """The file system that ``wanted`` names, or the only one that has the path, and what is at the path.

    Raises FileError, UsageError if several have it.
    """
    possible = readable(volumes, wanted)
    if wanted is not None and not possible:
        raise _unknown(volumes, wanted)
    if not possible:
        notes = "; ".join(f"{volume.name}: {note}" for volume in volumes for note in volume.notes)
        raise FileError("there is no file system that can be read", notes or "ls without a path shows what there is")
    found: list[tuple[Volume, Entry]] = []
    error: FileError | None = None
    for volume in possible:
        try:
            found.append((volume, reader.lookup(volume.name, path)))
        except FileError as failed:
            # That a path is not in one file system says less than that another cannot be looked into.
            error = failed if error is None or isinstance(error, NoSuchFileError) else error
    if not found:
        assert error is not None, "each was looked at"
        notes = "; ".join(f"{volume.name}: {note}" for volume in possible for note in volume.notes)
        raise FileError(str(error), notes or error.hint) from error
    if len(found) > 1:
        raise UsageError(
            f"{shown(path)} is in several file systems: {', '.join(volume.name for volume, _ in found)}",
            "say which with --partition (ls without a path shows them)",
        )
    return found[0]


def readable(volumes: Sequence[Volume], wanted: str | None) -> list[Volume]:
    """The volumes with a file system that can be read; only the one that ``wanted`` names if it is given (by number, by name)."""
    found = [volume for volume in volumes if volume.readable]
    if wanted is None:
        return found
    exact = [volume for volume in found if volume.name == wanted]
    return exact or [
        volume for volume in found if "/" not in volume.name and volume.name.rstrip("0123456789") + wanted == volume.name
    ]


def problem_of(volumes: Sequence[Volume], name: str) -> str:
    """Why a file system of a kind that is read here cannot be opened; empty if there is none of this name, or it can be."""
    broken = (v for v in volumes if v.name == name and not v.readable and v.filesystem not in ("", *_NEVER_READ))
    return "; ".join(note for volume in broken for note in volume.notes)


def _unknown(volumes: Sequence[Volume], wanted: str) -> FileError | UsageError:
    there = [volume for volume in volumes if volume.name == wanted]
    if there:
        return FileError(f"{wanted}: there is no file system that can be read", "; ".join(there[0].notes))
    names = ", ".join(volume.name for volume in volumes if volume.readable)
    return UsageError(f"there is no partition {wanted!r} with a file system that can be read", f"there are: {names}")
