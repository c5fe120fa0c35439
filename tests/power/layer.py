"""What the disk has after a power cut: every change of a file or directory below a root is noted, and only what was synced is sure.

The code under test runs on real files; ``Layer`` stands in front of the calls that change them. A power cut then leaves

- of every file what was synced, and each page (or, torn, each 512-byte sector) of the rest as it was at any time since: kept,
  dropped, or an earlier version, as the kernel writes pages back whenever it likes, in any order;
- of a file's size and modification time any value since the last sync that covers it (``fdatasync`` does not cover the latter);
- of every directory what was synced, and of the operations since either those up to some instant (a file system with a
  journal) or any of them (what POSIX allows): each is there or not, never half of it.

A file's content and its name are apart: syncing the one says nothing of the other. What a mapped page held is looked at before
every noted operation, so versions between two operations are not told apart.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.power import SECTOR

PAGE = 4096
_ROOT_SERIAL = 0

real = SimpleNamespace(**{name: getattr(os, name) for name in dir(os) if not name.startswith("__")})


class PowerCut(BaseException):
    """The host lost its power."""


class Killed(BaseException):
    """The process was killed: all that the kernel has is kept."""


@dataclass
class Change:
    """A change of a file: ``data`` at ``offset``, or a new size (``data`` None)."""

    serial: int
    offset: int
    data: bytes | None

    @property
    def end(self) -> int:
        return self.offset + len(self.data or b"")


@dataclass
class Entry:
    """A change of a directory: ``name`` now means ``inode`` (None: nothing); ``moved`` tells a rename from a creation."""

    serial: int
    name: str
    inode: int | None
    moved: bool = False


@dataclass
class File:
    """A regular file: what is on the disk for sure, and what has changed since."""

    durable: bytearray = field(default_factory=bytearray)
    changes: list[Change] = field(default_factory=list)
    mtimes: list[tuple[int, int]] = field(default_factory=list)
    """(serial, ns); the first is on the disk."""

    def size(self) -> int:
        size = len(self.durable)
        for change in self.changes:
            size = change.offset if change.data is None else max(size, change.end)
        return size


@dataclass
class Directory:
    """A directory: the entries that are on the disk for sure, and what has changed since."""

    durable: dict[str, int] = field(default_factory=dict)
    changes: list[Entry] = field(default_factory=list)


def apply(content: bytearray, change: Change) -> None:
    if change.data is None:
        del content[change.offset :]
        content.extend(bytes(change.offset - len(content)))
    else:
        content.extend(bytes(max(0, change.end - len(content))))
        content[change.offset : change.end] = change.data


class Layer:
    """Stands in front of ``os`` for everything below ``root``; ``ignored(path)`` names what is not looked at.

    ``before`` is called before every noted operation, in whatever thread: it may raise PowerCut or Killed.
    """

    def __init__(self, root: Path, ignored: Callable[[Path], bool] = lambda _: False) -> None:
        self.root = root
        self.keep = root.parent / "inodes"
        self.keep.mkdir()
        self.ignored = ignored
        self.before: Callable[[str], None] = lambda _: None
        self.now_ns: Callable[[], int] = lambda: 0
        self.files: dict[int, File] = {}
        self.directories: dict[int, Directory] = {root.stat().st_ino: Directory()}
        self.serial = _ROOT_SERIAL
        self._maps: list[tuple[int, mmap.mmap, list[bytes]]] = []
        self._lock = threading.RLock()

    # -- what is noted

    def _concerns(self, path: Any) -> bool:
        path = Path(os.fspath(path))
        return path.is_relative_to(self.root) and not self.ignored(path)

    def _noted(self, what: str) -> None:
        self.before(what)
        with self._lock:
            self._look_at_maps()
            self.serial += 1

    def _look_at_maps(self) -> None:
        for inode, mapped, seen in self._maps:
            content = mapped[:]
            if content != seen[0]:
                seen[0] = content
                self.serial += 1
                self.files[inode].changes.append(Change(self.serial, 0, content))
                self._touch(inode)

    def _touch(self, inode: int) -> None:
        now = self.now_ns()
        real.utime(self.keep / str(inode), ns=(now, now))
        self.files[inode].mtimes.append((self.serial, now))

    def _file(self, fd: int) -> int | None:
        inode = real.fstat(fd).st_ino
        return inode if inode in self.files else None

    def _add(self, path: Path, *, moved: bool = False) -> None:
        inode = real.stat(path).st_ino
        if path.is_dir():
            self.directories.setdefault(inode, Directory())
        elif inode not in self.files:
            # A second name keeps the inode, whatever becomes of the first.
            os.link(path, self.keep / str(inode))
            self.files[inode] = File(mtimes=[(self.serial, self.now_ns())])
        self.directories[real.stat(path.parent).st_ino].changes.append(Entry(self.serial, path.name, inode, moved))

    # -- stand-ins

    def open(self, path: Any, flags: int, mode: int = 0o777, **rest: Any) -> int:
        creating = flags & os.O_CREAT and flags & os.O_TMPFILE != os.O_TMPFILE
        if not (creating or flags & os.O_TRUNC) or not self._concerns(path):
            return int(real.open(path, flags, mode, **rest))
        exists = os.path.lexists(path)
        if exists and not flags & (os.O_TRUNC | os.O_EXCL):
            return int(real.open(path, flags, mode, **rest))
        self._noted("create" if not exists else "truncate")
        fd = int(real.open(path, flags, mode, **rest))
        if exists:
            inode = self._file(fd)
            assert inode is not None, f"{path}: made behind the layer's back"
            self.files[inode].changes.append(Change(self.serial, 0, None))
        else:
            self._add(Path(path))
        return fd

    def mkdir(self, path: Any, mode: int = 0o777, **rest: Any) -> None:
        if not self._concerns(path):
            real.mkdir(path, mode, **rest)
            return
        self._noted("mkdir")
        real.mkdir(path, mode, **rest)
        self._add(Path(path))

    def unlink(self, path: Any, **rest: Any) -> None:
        if not self._concerns(path):
            real.unlink(path, **rest)
            return
        path = Path(path)
        self._noted("unlink")
        real.unlink(path, **rest)
        self.directories[real.stat(path.parent).st_ino].changes.append(Entry(self.serial, path.name, None))

    def rename(self, source: Any, target: Any, **rest: Any) -> None:
        if not self._concerns(source):
            real.rename(source, target, **rest)
            return
        source, target = Path(source), Path(target)
        assert source.parent == target.parent, "renames into another directory are not modelled"
        self._noted("rename")
        real.rename(source, target, **rest)
        self._add(target, moved=True)

    def pwritev(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        inode = self._file(fd)
        if inode is None:
            return int(real.pwritev(fd, buffers, offset, flags))
        self._noted("write")
        data = b"".join(bytes(buffer) for buffer in buffers)
        # Before it is noted, as it sets the time of the host that this runs on.
        written = int(real.pwritev(fd, [data], offset, flags))
        self._changed(inode, Change(self.serial, offset, data))
        return written

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return self.pwritev(fd, [data], offset)

    def ftruncate(self, fd: int, length: int) -> None:
        inode = self._file(fd)
        if inode is not None:
            self._noted("truncate")
        real.ftruncate(fd, length)
        if inode is not None:
            self._changed(inode, Change(self.serial, length, None))

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        inode = self._file(fd)
        if inode is not None:
            self._noted("allocate")
            assert self.files[inode].size() <= offset + length
        real.posix_fallocate(fd, offset, length)
        if inode is not None:
            self._changed(inode, Change(self.serial, offset + length, None))

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """Stands in for punching a hole and for zeroing; a file system may know only the former."""
        if not mode & 2:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        inode = self._file(fd)
        if inode is not None:
            self._noted("punch")
            real.pwrite(fd, bytes(length), offset)
            self._changed(inode, Change(self.serial, offset, bytes(length)))

    def utime(self, path: Any, *args: Any, **rest: Any) -> None:
        inode = (real.fstat(path) if isinstance(path, int) else real.stat(path)).st_ino
        if inode not in self.files:
            real.utime(path, *args, **rest)
            return
        self._noted("utime")
        assert not args and not rest, "only the present time is modelled"
        self._touch(inode)

    def fsync(self, fd: int) -> None:
        self._sync(real.fstat(fd).st_ino, times=True)

    def fdatasync(self, fd: int) -> None:
        self._sync(real.fstat(fd).st_ino, times=False)

    def _sync(self, inode: int, *, times: bool) -> None:
        if inode not in self.files and inode not in self.directories:
            return
        self._noted("sync")
        if inode in self.files:
            self._notice_buffered(inode)
        # What is written while the sync runs is not covered by it.
        serial = self.serial
        self.before("synced")
        if inode in self.directories:
            directory = self.directories[inode]
            directory.durable = _entries(directory, lambda entry: entry.serial <= serial)
            directory.changes = [entry for entry in directory.changes if entry.serial > serial]
            return
        file = self.files[inode]
        for change in file.changes:
            if change.serial <= serial:
                apply(file.durable, change)
        file.changes = [change for change in file.changes if change.serial > serial]
        if times:
            last = max(i for i, (at, _) in enumerate(file.mtimes) if at <= serial)
            del file.mtimes[:last]

    def _changed(self, inode: int, change: Change) -> None:
        self.files[inode].changes.append(change)
        self._touch(inode)

    def _notice_buffered(self, inode: int) -> None:
        """Small files are written through Python's own buffers, which do not call ``os``."""
        file = self.files[inode]
        path = self.keep / str(inode)
        if path.stat().st_size > 65536 or any(inode == number for number, *_ in self._maps):
            return
        found = path.read_bytes()
        content = bytearray(file.durable)
        for change in file.changes:
            apply(content, change)
        if found != content:
            file.changes.append(Change(self.serial, 0, found))

    def map(self, fd: int, length: int) -> mmap.mmap:
        layer, inode = self, real.fstat(fd).st_ino
        assert inode in self.files

        class Mapped(mmap.mmap):
            def flush(self, *_: Any) -> None:
                layer._sync(inode, times=True)

            def close(self) -> None:
                layer._unmap(self)
                super().close()

        mapped = Mapped(fd, length)
        self._maps.append((inode, mapped, [mapped[:]]))
        return mapped

    def _unmap(self, mapped: mmap.mmap) -> None:
        self._look_at_maps()
        self._maps = [entry for entry in self._maps if entry[1] is not mapped]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Stand in front of ``os``, ``mmap`` and ``fallocate`` for as long as this lasts."""
        with ExitStack() as stack:
            names = "open mkdir unlink rename pwrite pwritev ftruncate posix_fallocate utime fsync fdatasync"
            for name in names.split():
                stack.enter_context(patch.object(os, name, getattr(self, name)))
            stack.enter_context(patch.object(os, "replace", self.rename))
            stack.enter_context(patch.object(os, "remove", self.unlink))
            stack.enter_context(patch("vmrewind.journal.state.mmap", SimpleNamespace(mmap=self.map)))
            stack.enter_context(patch("vmrewind.journal.copy_before_write.mmap", SimpleNamespace(mmap=self.map)))
            stack.enter_context(patch("vmrewind.capture.image.fallocate", self.fallocate))
            stack.enter_context(patch("vmrewind.journal.holes.fallocate", self.fallocate))
            yield

    # -- the end of a process, or of the power

    def abandon(self) -> None:
        """A process that had files below the root open, or mapped, is gone."""
        for _, mapped, _ in list(self._maps):
            mapped.close()
        for name in real.listdir("/proc/self/fd"):
            try:
                link = real.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue
            if link.startswith((str(self.root), str(self.keep))):
                real.close(int(name))

    def cut(self, rng: random.Random) -> None:
        """Make the files what the disk has after a power cut; all of that is on the disk for sure then."""
        self.abandon()
        self._check()
        how = rng.choice(("nothing", "all", "pages", "pages", "sectors", "sectors", "few lost", "few kept"))
        for inode, file in self.files.items():
            self._settle(inode, file, rng, how)
        until = rng.randrange(self.serial + 1) if rng.random() < 0.5 else self.serial
        share = rng.choice((0.1, 0.5, 0.9))
        ordered = rng.random() < 0.5
        for directory in self.directories.values():
            directory.durable = _entries(directory, lambda entry: entry.serial <= until if ordered else rng.random() < share)
            directory.changes = []
        self._materialise(self.root)
        self._purge()

    def _check(self) -> None:
        for inode, file in self.files.items():
            content = bytearray(file.durable)
            for change in file.changes:
                apply(content, change)
            found = (self.keep / str(inode)).read_bytes()
            if found != content and len(found) <= 65536:
                file.changes.append(Change(self.serial, 0, found))
            else:
                assert found == content, f"inode {inode} was written behind the layer's back"

    def _settle(self, inode: int, file: File, rng: random.Random, how: str) -> None:
        path = self.keep / str(inode)
        if file.changes:
            touched: dict[int, list[Change]] = {}
            sizes = [len(file.durable)]
            for change in file.changes:
                if change.data is None:
                    sizes.append(change.offset)
                else:
                    sizes.append(max(sizes[-1], change.end))
                    for page in range(change.offset // PAGE, (change.end - 1) // PAGE + 1):
                        touched.setdefault(page, []).append(change)
            content = bytearray(file.durable)
            content.extend(bytes(max(0, max(sizes) - len(content))))
            for page, changes in touched.items():
                _settle_page(content, page, changes, rng, how)
            del content[rng.choice(sizes) if how != "all" else sizes[-1] :]
            file.durable = content
            file.changes = []
            path.write_bytes(content)
        chosen = rng.choice((file.mtimes[0], file.mtimes[-1], rng.choice(file.mtimes)))
        file.mtimes = [chosen]
        real.utime(path, ns=(chosen[1], chosen[1]))

    def _materialise(self, path: Path) -> None:
        wanted = self.directories[path.stat().st_ino].durable
        found = {name: real.stat(path / name).st_ino for name in real.listdir(path) if not self.ignored(path / name)}
        for name, inode in found.items():
            if wanted.get(name) != inode:
                if inode in self.directories:
                    shutil.rmtree(path / name)
                else:
                    real.unlink(path / name)
        for name, inode in wanted.items():
            if inode in self.directories:
                self._materialise(path / name)
            elif found.get(name) != inode:
                os.link(self.keep / str(inode), path / name)

    def _purge(self) -> None:
        alive = {inode for directory in self.directories.values() for inode in directory.durable.values()}
        for inode in [inode for inode in self.files if inode not in alive]:
            real.unlink(self.keep / str(inode))
            del self.files[inode]

    def settled(self, path: Path) -> bool:
        """Whether everything of a file is on the disk."""
        return not self.files[real.stat(path).st_ino].changes

    def adopt(self) -> None:
        """Take everything below the root as it is for what is on the disk."""
        for directory, names, files in os.walk(self.root):
            here = Directory()
            self.directories[real.stat(directory).st_ino] = here
            for name in names + files:
                status = real.stat(Path(directory, name))
                here.durable[name] = status.st_ino
                if stat.S_ISREG(status.st_mode) and status.st_ino not in self.files:
                    os.link(Path(directory, name), self.keep / str(status.st_ino))
                    content = bytearray(Path(directory, name).read_bytes())
                    self.files[status.st_ino] = File(content, mtimes=[(self.serial, status.st_mtime_ns)])


def _entries(directory: Directory, kept: Callable[[Entry], bool]) -> dict[str, int]:
    entries = dict(directory.durable)
    for change in directory.changes:
        if not kept(change):
            continue
        if change.inode is None:
            entries.pop(change.name, None)
            continue
        if change.moved:
            entries = {name: inode for name, inode in entries.items() if inode != change.inode}
        entries[change.name] = change.inode
    return entries


def _settle_page(content: bytearray, page: int, changes: list[Change], rng: random.Random, how: str) -> None:
    """Bring one page to one of its versions, or in "sectors" each of its sectors to one of its own."""
    every = len(changes)
    match how:
        case "nothing":
            return
        case "all":
            kept = every
        case "few lost":
            kept = every if rng.random() < 0.9 else rng.randrange(every + 1)
        case "few kept":
            kept = 0 if rng.random() < 0.9 else rng.randrange(every + 1)
        case _:
            kept = rng.choice((0, every, rng.randrange(every + 1)))
    step = SECTOR if how == "sectors" and rng.random() < 0.5 else PAGE
    for at in range(page * PAGE, (page + 1) * PAGE, step):
        if step == SECTOR:
            kept = rng.randrange(every + 1)
        for change in changes[:kept]:
            start, end = max(at, change.offset), min(at + step, change.end)
            if start < end:
                assert change.data is not None
                content[start:end] = change.data[start - change.offset : end - change.offset]
