"""Copy-before-write: what lets a base be made of a disk while its VM writes to it.

The base is to hold the disk as it was at its run's beginning. It is read piece by piece while the guest writes; before a block that
is not in the base yet is first written to, its old content is kept in a file beside the journal. Two processes share this: whoever
writes to the image *keeps* (capture, and a recovery that replays), whoever makes the base *reads* and *takes*.

``base-<target>.map`` is mapped by both, so it outlives either: a header (what base it is, and how it stands), a byte for each chunk
that the base has, a bit for each block whose old content is kept. ``base-<target>.old`` holds it, at the same place.
The order makes it right without a lock: old content, its bit, the image; and the reader reads the image first, then the bits. Each
part of the map has one writer. None of it is synced while the VM runs: after the host's death nobody knows what the image held, and
the base is given up.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from vmrewind.errors import CorruptionError, SpaceError
from vmrewind.journal.holes import punch_hole
from vmrewind.journal.origin import Origin
from vmrewind.journal.runs import ImageIdentity, private_directory, sync_directory

BLOCK: Final = 4096
"""What is kept is kept in whole blocks of this size: the smallest that file systems and guests write."""
CHUNK: Final = 4 << 20
"""A base's piece: taken as a whole."""

_MAGIC: Final = b"VMRWCBW1"
_STATE_AT: Final = 8
_LENGTH_AT: Final = 12
_TEXT_AT: Final = 16
_HEADER: Final = 32 << 10
_REASON_AT: Final = 28 << 10
_REASON_MAX: Final = 2048
_BLOCKS: Final = CHUNK // BLOCK
_BITS_BYTES: Final = _BLOCKS // 8
_ALL: Final = (1 << _BLOCKS) - 1
_PIECE: Final = 1 << 20
_HOLE_MIN: Final = 64 << 10
"""Whether so much is a hole is worth asking: nothing has to be kept of it then but that it was."""


class State(enum.IntEnum):
    """How a base stands."""

    MAKING = 0
    DONE = 1
    """The repository has it."""
    FAILED = 2
    """What the disk held then is not known any more."""


@dataclass(frozen=True, slots=True)
class BegunBase:
    """A base that is being made: of which disk, as it was at the beginning of run ``run``. ``identity``: the image's then.
    ``repository``: the id of the one that it is made for."""

    id: str
    run: int
    repository: str
    uuid: str
    disk: str
    size: int
    format: str
    backing: str | None
    time_ns: int
    identity: ImageIdentity

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """What a map's header holds; raises ValueError, KeyError or TypeError if it makes no sense."""
        plain: dict[str, Any] = json.loads(text)
        return cls(**plain | {"identity": ImageIdentity(**plain["identity"])})


def map_path(journal: Path, target: str) -> Path:
    """Where the map of a disk's base lies."""
    return journal / f"base-{target}.map"


def _old_path(journal: Path, target: str) -> Path:
    return journal / f"base-{target}.old"


class CopyBeforeWrite:
    """A disk's base that is being made. ``begin`` makes its files, ``open`` finds them."""

    def __init__(self, journal: Path, target: str, content: mmap.mmap, old: int, base: BegunBase, inodes: tuple[int, int]) -> None:
        self.base = base
        self._inodes = inodes
        self._journal = journal
        self._target = target
        self._map = content
        self._old = old
        self._chunks = -(-base.size // CHUNK)
        self._bits_at = _bits_at(self._chunks)

    @classmethod
    def begin(cls, journal: Path, base: BegunBase) -> None:
        """Make the files, in place of what an earlier base has left. Raises SpaceError, OSError."""
        chunks = -(-base.size // CHUNK)
        length = _bits_at(chunks) + chunks * _BITS_BYTES
        text = json.dumps(asdict(base)).encode()
        if _TEXT_AT + len(text) > _REASON_AT:
            raise ValueError(f"{len(text)} bytes of description")
        remove(journal, base.disk)
        private_directory(journal)
        old = os.open(_old_path(journal, base.disk), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.close(old)
        path = map_path(journal, base.disk)
        temporary = path.with_suffix(".new")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                # Every page is had now: one that could not be had later would be a signal, and no error.
                os.posix_fallocate(fd, 0, length)
            except OSError as error:
                temporary.unlink()
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise SpaceError(
                    f"{path}: no room for {length} bytes, which making the base of {base.disk} needs ({error.strerror})",
                    "free space there, or make the base while the VM is off: vmrewind backup",
                ) from error
            os.pwrite(fd, _MAGIC + bytes([State.MAKING, 0, 0, 0]) + len(text).to_bytes(4, "little") + text, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        sync_directory(journal)

    @classmethod
    def open(cls, journal: Path, target: str) -> Self | None:
        """The base of a disk that was begun in this journal directory, whatever came of it; None if there is none."""
        try:
            fd = os.open(map_path(journal, target), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            try:
                head = os.pread(fd, _REASON_AT, 0)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(map_path(journal, target))) from error
            try:
                base = BegunBase.from_json(head[_TEXT_AT : _TEXT_AT + int.from_bytes(head[_LENGTH_AT:_TEXT_AT], "little")])
            except (ValueError, KeyError, TypeError):
                return None
            chunks = -(-base.size // CHUNK)
            length = _bits_at(chunks) + chunks * _BITS_BYTES
            if head[: len(_MAGIC)] != _MAGIC or base.disk != target or os.fstat(fd).st_size != length:
                return None
            content = mmap.mmap(fd, length)
            inode = os.fstat(fd).st_ino
        finally:
            os.close(fd)
        try:
            old = os.open(_old_path(journal, target), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            content.close()
            return None
        return cls(journal, target, content, old, base, (inode, os.fstat(old).st_ino))

    def close(self) -> None:
        """Let go of the files."""
        self._map.close()
        os.close(self._old)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- how it stands

    @property
    def state(self) -> State:
        """How it stands."""
        return State(self._map[_STATE_AT])

    @property
    def reason(self) -> str:
        """Why it failed, empty if it did not."""
        length = int.from_bytes(self._map[_REASON_AT : _REASON_AT + 2], "little")
        return self._map[_REASON_AT + 2 : _REASON_AT + 2 + length].decode(errors="replace")

    @property
    def taken_share(self) -> float:
        """How much of the disk the base has, 0 to 1."""
        return 1.0 if not self._chunks else self._map[_HEADER : _HEADER + self._chunks].count(1) / self._chunks

    @property
    def kept_bytes(self) -> int:
        """Space that what is kept takes."""
        return os.fstat(self._old).st_blocks * 512

    def fail(self, reason: str) -> None:
        """What the disk held is not known any more, or cannot be had: the base is given up. The first reason stays."""
        if self.state is not State.MAKING:
            return
        text = reason.encode()[:_REASON_MAX]
        self._map[_REASON_AT + 2 : _REASON_AT + 2 + len(text)] = text
        self._map[_REASON_AT : _REASON_AT + 2] = len(text).to_bytes(2, "little")
        self._map[_STATE_AT] = State.FAILED
        with contextlib.suppress(OSError):
            # Before what it was made of goes: no cut of the power must leave the one without the other.
            self._map.flush(0, _HEADER)
            os.ftruncate(self._old, 0)

    def settle(self) -> bool:
        """Bring what is kept to stable storage: the VM has stopped, and the host may stop too. False if the base has failed."""
        try:
            if self.state is State.MAKING:
                os.fsync(self._old)
                self._map.flush()
        except OSError as error:
            self.fail(f"what was kept of {self._target} could not be synced: {error}")
        return self.state is State.MAKING

    # -- whoever writes to the image

    def keep(self, image: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Ranges (offset, length) of the image, open as ``image``, are about to be written to.

        Never raises: a write of the guest's is worth more than the base. What cannot be kept fails the base.
        """
        if self._map[_STATE_AT] != State.MAKING:
            return
        wanted = [run for offset, length in ranges for run in self._unkept(offset, length)]
        if not wanted:
            return
        offset = 0
        try:
            if len(wanted) > 1:
                for offset, length in wanted:
                    os.posix_fadvise(image, offset, length, os.POSIX_FADV_WILLNEED)
            for offset, length in wanted:
                self._copy(image, offset, length)
                self._note(offset, length)
        except OSError as error:
            self.fail(f"the old content of {self._target} at offset {offset} could not be kept: {os.strerror(error.errno or 0)}")

    def _unkept(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The runs of whole blocks in a range that are neither in the base nor kept."""
        end = min(offset + length, self.base.size)
        while offset < end:
            chunk = offset // CHUNK
            stop = min((chunk + 1) * CHUNK, end)
            if not self._map[_HEADER + chunk]:
                first, last = offset % CHUNK // BLOCK, (stop - 1 - chunk * CHUNK) // BLOCK
                missing = ~self._bits(chunk) & ((1 << (last + 1)) - (1 << first))
                for start, stretch in _runs(missing):
                    at = chunk * CHUNK + start * BLOCK
                    yield at, min(stretch * BLOCK, self.base.size - at)
            offset = stop

    def _copy(self, image: int, offset: int, length: int) -> None:
        if length >= _HOLE_MIN and _is_hole(image, offset, length):
            return
        while length:
            data = os.pread(image, min(length, _PIECE), offset)
            if not data:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if os.pwrite(self._old, data, offset) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offset, length = offset + len(data), length - len(data)

    def _note(self, offset: int, length: int) -> None:
        chunk, first = offset // CHUNK, offset % CHUNK // BLOCK
        count = -(-length // BLOCK)
        at = self._bits_at + chunk * _BITS_BYTES
        low, high = first // 8, (first + count + 7) // 8
        here = int.from_bytes(self._map[at + low : at + high], "little") | ((1 << count) - 1) << (first - low * 8)
        self._map[at + low : at + high] = here.to_bytes(high - low, "little")

    # -- whoever makes the base

    def claim(self) -> bool:
        """Make the base alone, until this is closed; False if another process makes it."""
        try:
            fcntl.flock(self._old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_taken(self, chunk: int) -> bool:
        """Whether the base has a chunk, so that nothing of it is kept any more."""
        return bool(self._map[_HEADER + chunk])

    def take(self, chunk: int) -> None:
        """The base has the chunk, durably: what was kept of it goes, which is only a matter of space."""
        self._map[_HEADER + chunk] = 1
        if self.touched(chunk):
            with contextlib.suppress(OSError):
                punch_hole(self._old, chunk * CHUNK, CHUNK)

    def touched(self, chunk: int) -> bool:
        """Whether anything of a chunk is kept; what was asked of the image before is true of its old content if not."""
        return self._bits(chunk) != 0

    def read(self, image: int, chunk: int) -> bytes:
        """A chunk as it was when the base began. Raises OSError; EIO where the image was cut short."""
        offset = chunk * CHUNK
        length = min(CHUNK, self.base.size - offset)
        content = bytearray()
        while len(content) < length:
            part = os.pread(image, length - len(content), offset + len(content))
            if not part:
                raise OSError(errno.EIO, "the image was cut short")
            content += part
        for start, stretch in _runs(self._bits(chunk)):
            begin, end = start * BLOCK, min((start + stretch) * BLOCK, length)
            old = os.pread(self._old, end - begin, offset + begin)
            content[begin:end] = old.ljust(end - begin, b"\0")
        return bytes(content)

    @property
    def in_place(self) -> bool:
        """Whether its files are where whoever writes to the image finds them: without them nothing is kept any more."""
        try:
            paths = (map_path(self._journal, self._target), _old_path(self._journal, self._target))
            return tuple(path.stat().st_ino for path in paths) == self._inodes
        except OSError:
            return False

    def finish(self) -> None:
        """The repository has the base: nothing is kept from now on, and the files go, durably. Raises OSError."""
        self._map[_STATE_AT] = State.DONE
        remove(self._journal, self._target)
        sync_directory(self._journal)

    def _bits(self, chunk: int) -> int:
        at = self._bits_at + chunk * _BITS_BYTES
        return int.from_bytes(self._map[at : at + _BITS_BYTES], "little")


def begun_base(journal: Path, target: str) -> tuple[str, float | None] | None:
    """(id, how much of the disk it has, 0 to 1) of the base that is being made of a disk; None if none is.

    Of one that is made of another VM's moment it is not known how much there is: None.
    """
    try:
        if (origin := Origin.read(journal, target)) is not None:
            return None if origin.lost else (origin.base, None)
    except (OSError, CorruptionError):
        return None
    try:
        found = CopyBeforeWrite.open(journal, target)
    except OSError:
        return None
    if found is None:
        return None
    with found:
        return (found.base.id, found.taken_share) if found.state is State.MAKING else None


def made_words(share: float | None) -> str:
    """How much there is of a base, in brackets; nothing where that is not known."""
    return "" if share is None else f" ({share:.0%} by now)"


def remove(journal: Path, target: str) -> None:
    """Have no base begun of a disk: the map first, as without it the rest means nothing."""
    map_path(journal, target).unlink(missing_ok=True)
    _old_path(journal, target).unlink(missing_ok=True)


def _bits_at(chunks: int) -> int:
    return _HEADER + -(-chunks // BLOCK) * BLOCK


def _is_hole(fd: int, offset: int, length: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        # Behind the last data; any other says that nobody knows.
        return error.errno == errno.ENXIO and os.lseek(fd, 0, os.SEEK_END) >= offset + length


def _runs(bits: int) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of ones."""
    if bits == _ALL:
        yield 0, _BLOCKS
        return
    first = 0
    while bits:
        zeroes = (bits & -bits).bit_length() - 1
        bits >>= zeroes
        ones = (~bits & (bits + 1)).bit_length() - 1
        yield first + zeroes, ones
        bits >>= ones
        first += zeroes + ones
