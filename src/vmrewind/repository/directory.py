"""A directory as a store: whole, durable, write-once files.

An object is written to a temporary file beside its place, synced, and linked to its name, which fails if the name exists;
then the directory is synced. Whoever dies in between leaves a temporary file that no listing shows and that hurts nobody. Files
and directories that are made are their owner's alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from vmrewind.errors import RepositoryError, SpaceError, VmrewindError
from vmrewind.journal.runs import sync_directory
from vmrewind.repository.store import AlreadyExists, NotFound

_COMPONENT: Final = re.compile(r"[A-Za-z0-9_%-][A-Za-z0-9._%-]*", re.ASCII)
_TEMPORARY: Final = ".tmp-"
"""Begins with a dot, as no key's component may: a temporary file can never be taken for an object."""

_HINTS: Final = {
    errno.EACCES: "run as a user who may write there, or correct the directory's owner and mode",
    errno.EPERM: "the file system must have hard links and permit writing (FAT and exFAT have none)",
    errno.EOPNOTSUPP: "the file system must have hard links (FAT and exFAT have none)",
    errno.EROFS: "mount it writable",
    errno.ENOENT: "is the file system still mounted?",
    errno.ENODEV: "is the file system still mounted?",
    errno.ESTALE: "the network file system's server forgot the directory: mount it again",
    errno.EIO: "look at the kernel's log and the disk's or the server's health",
}


class DirectoryStore:
    """Implements :class:`vmrewind.repository.store.Store` on a directory that must exist, or is made with ``create``."""

    def __init__(self, root: Path, url: str | None = None, *, create: bool = False) -> None:
        self.url = url or str(root)
        self._root = root
        self._durable: set[Path] = set()
        """Directories whose entry in their parent was made durable by this process."""
        try:
            if create:
                _make_directories(root)
            self._identity = _identity(root)
        except FileNotFoundError as error:
            raise RepositoryError(
                f"{root}: there is no such directory",
                "mount the file system that holds it, or make a repository with `vmrewind init`",
            ) from error
        except OSError as error:
            raise _translated(error, root) from error

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            try:
                self._put(path, data)
            except FileNotFoundError:
                # Someone removed the emptied directory since we saw it.
                self._durable.clear()
                self._put(path, data)
        except FileExistsError:
            raise AlreadyExists(key) from None
        except OSError as error:
            raise _translated(error, path) from error

    def _put(self, path: Path, data: bytes) -> None:
        self._ensure_directory(path.parent)
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)

    def _ensure_directory(self, directory: Path) -> None:
        # After an unmount the mount point is still there, empty: writing into it would split the repository in two.
        if _identity(self._root) != self._identity:
            raise RepositoryError(
                f"{self._root}: not the directory any more that it was when it was opened (unmounted, or mounted over?)",
                "mount the repository's file system again",
            )
        missing = []
        while directory != self._root and directory not in self._durable:
            missing.append(directory)
            directory = directory.parent
        for made in reversed(missing):
            made.mkdir(exist_ok=True, mode=0o700)
            # Even if it existed: who made it may not have come to sync it.
            sync_directory(made.parent)
            self._durable.add(made)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                if length is None:
                    length = max(0, os.fstat(file.fileno()).st_size - offset)
                parts = []
                while length > 0 and (part := os.pread(file.fileno(), length, offset)):
                    parts.append(part)
                    offset += len(part)
                    length -= len(part)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._check_root()
            raise NotFound(key) from None
        except OSError as error:
            raise _translated(error, path) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self, key: str) -> int | None:
        path = self._path(key)
        try:
            return path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return None
        except OSError as error:
            raise _translated(error, path) from error

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        parent, separator, rest = prefix.rpartition("/")
        top = self._path(parent) if separator else self._root
        return self._walk(top, parent + separator, rest)

    def _walk(self, directory: Path, key: str, rest: str) -> Iterator[tuple[str, int]]:
        for name, size in self._entries(directory):
            if not name.startswith(rest):
                continue
            if size is None:
                yield from self._walk(directory / name[:-1], key + name, "")
            else:
                yield key + name, size

    def _entries(self, directory: Path) -> Sequence[tuple[str, int | None]]:
        """(name, bytes) of files and (name + "/", None) of directories: thus sorted, whole keys come in order."""
        found: list[tuple[str, int | None]] = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        found.append((entry.name + "/", None))
                        continue
                    with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                        found.append((entry.name, entry.stat().st_size))
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
        except OSError as error:
            raise _translated(error, directory) from error
        found.sort(key=lambda item: item[0])
        return found

    def children(self, prefix: str) -> Sequence[str]:
        directory = self._path(prefix[:-1]) if prefix else self._root
        return [
            name[:-1]
            for name, size in self._entries(directory)
            if size is None and next(self._walk(directory / name[:-1], prefix + name, ""), None) is not None
        ]

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink()
            sync_directory(path.parent)
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
        except OSError as error:
            raise _translated(error, path) from error

    def leftovers(self) -> Iterator[Path]:
        """The temporary files that killed writers left, and those of whoever writes right now."""
        for directory, _, names in os.walk(self._root):
            yield from (Path(directory, name) for name in names if name.startswith(_TEMPORARY))

    def _path(self, key: str) -> Path:
        for component in key.split("/"):
            if not _COMPONENT.fullmatch(component):
                raise ValueError(f"not an object's key: {key!r}")
        return self._root / key

    def _check_root(self) -> None:
        """What is missing in a directory that is itself missing was not deleted: nothing may be concluded from it."""
        try:
            same = _identity(self._root) == self._identity
        except OSError as error:
            raise _translated(error, self._root) from error
        if not same:
            raise RepositoryError(
                f"{self._root}: not the directory any more that it was when it was opened (unmounted, or mounted over?)",
                "mount the repository's file system again",
            )


def _identity(root: Path) -> tuple[int, int]:
    status = root.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(root))
    return status.st_dev, status.st_ino


def _make_directories(directory: Path) -> None:
    if directory.is_dir():
        return
    _make_directories(directory.parent)
    directory.mkdir(exist_ok=True, mode=0o700)
    sync_directory(directory.parent)


def _translated(error: OSError, path: Path) -> VmrewindError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(f"{path}: no space left in the repository ({error.strerror})", "free space there or extend it")
    return RepositoryError(f"{path}: {error.strerror or error}", _HINTS.get(error.errno or 0, ""))
