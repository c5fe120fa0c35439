"""Restoring disks to files: every disk of one position, sparse, under their names only when all are whole and durable."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import ImageError, SpaceError, UsageError
from vmrewind.history.history import History
from vmrewind.history.reading import read_whole
from vmrewind.history.view import View
from vmrewind.journal.runs import Position, sync_directory
from vmrewind.recover.blocks import nonzero_runs

Progress = Callable[[str, int, int], None]
"""Called with (target, bytes done, bytes in total)."""

NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class RestoredDisk:
    """One restored disk. ``size_bytes`` is the disk's, ``written_bytes`` what had to be written; ``backing`` names a qcow2
    file's backing file, which the restored file goes on referring to."""

    target: str
    path: Path
    format: str
    size_bytes: int
    written_bytes: int
    base: str
    backing: str | None


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore made, named exactly."""

    vm: str
    position: Position
    disks: Sequence[RestoredDisk]


def restore(history: History, targets: Sequence[str], position: Position, output: Path, progress: Progress) -> Restored:
    """Write the disks as ``<target>.raw`` or ``<target>.qcow2`` (the bytes of the export) into the directory ``output``.

    Raises UsageError if a file of that name exists, SpaceError, ImageError, and what the views raise; nothing is left then.
    """
    views = [View.open(history, target, position) for target in targets]
    output = output.absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output}: cannot be made a directory: {error.strerror}", "name another --output") from error
    paths = [output / f"{view.disk.target}.{'qcow2' if view.disk.format == 'qcow2' else 'raw'}" for view in views]
    _refuse_existing(paths)
    with ExitStack() as temporaries:
        jobs = [
            _Job(view, path, *temporaries.enter_context(_temporary(path)), progress)
            for view, path in zip(views, paths, strict=True)
        ]
        for number, offset, data in read_whole(views):
            jobs[number].write(offset, data)
        for job in jobs:
            job.finish()
        _refuse_existing(paths)
        for job in jobs:
            job.temporary.rename(job.path)
        sync_directory(output)
    return Restored(history.name, position, [job.restored for job in jobs])


def _refuse_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists() or path.is_symlink():
            raise UsageError(f"{path} exists; nothing is overwritten", "move it away, or name another --output")


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, int]]:
    """A file beside ``path`` to write to, removed unless it was renamed. What a killed restore left is taken over."""
    temporary = path.with_name(f".{path.name}.restoring")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ImageError(f"{path}: cannot be written: {error.strerror}", "name another --output") from error
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() or found.st_nlink != 1 or not stat.S_ISREG(found.st_mode):
            # In a directory that others may write to, somebody has put it there to get at the disk, or at another file of ours.
            raise ImageError(f"{temporary}: was put there by somebody else", "name another --output, a directory of your own")
        os.fchmod(fd, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{path}: another restore is writing it", "wait for it, or name another --output") from error
        os.ftruncate(fd, 0)
        try:
            yield temporary, fd
        finally:
            temporary.unlink(missing_ok=True)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn the errors of writing into errors that name the file."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise SpaceError(f"{path}: no space left to restore to", "free space there, or name another --output") from error
        raise ImageError(f"{path}: cannot be written: {error.strerror}", "name another --output") from error


class _Job:
    """One disk that is being written, as holes where it has zeroes."""

    def __init__(self, view: View, path: Path, temporary: Path, fd: int, progress: Progress) -> None:
        self.path = path
        self.temporary = temporary
        self._view = view
        self._fd = fd
        self._progress = progress
        self._total, self._done, self._written = view.data_bytes, 0, 0
        with _naming(path):
            os.ftruncate(fd, view.size)
        progress(view.disk.target, 0, self._total)

    @property
    def restored(self) -> RestoredDisk:
        """The report."""
        disk = self._view.disk
        return RestoredDisk(disk.target, self.path, disk.format, self._view.size, self._written, self._view.base_id, disk.backing)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write a part of the disk, leaving holes for zeroes."""
        block = memoryview(data)
        with _naming(self.path):
            for start, end in nonzero_runs(offset, block):
                self._written += write_all(self._fd, block[start:end], offset + start)
        self._done += len(data)
        self._progress(self._view.disk.target, self._done, self._total)

    def finish(self) -> None:
        """Make it durable."""
        with _naming(self.path):
            os.fsync(self._fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> int:
    """Write all of ``data``; returns its length."""
    view = memoryview(data)
    written = 0
    while written < len(view):
        written += os.pwrite(fd, view[written:], offset + written)
    return written
