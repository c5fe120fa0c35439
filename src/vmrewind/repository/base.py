"""Making a base: a full backup of a disk, of an image that nobody writes to meanwhile, or of the disk as it was when its run began.

One thread reads what the image's file system says is data; a few others hash, compress and store it. An interrupted backup goes
on where it was. The manifest is put last, when every chunk is durable, so a base that can be seen is complete.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from vmrewind.errors import ImageError
from vmrewind.journal.copy_before_write import CopyBeforeWrite, State
from vmrewind.journal.identity import image_identity
from vmrewind.journal.runs import ImageIdentity
from vmrewind.repository.chunks import CHUNK_SIZE, Chunks
from vmrewind.repository.manifest import Manifest, new_base_id
from vmrewind.repository.partial import Partial

if TYPE_CHECKING:
    from vmrewind.repository.repository import VmRepository

_WORKERS: Final = 2
_AHEAD_MAX: Final = 6
"""Most chunks that are read and not yet stored: bounds memory to about twice that many times 4 MiB."""
_ZEROES: Final = bytes(CHUNK_SIZE)
_TAKEN_TOGETHER: Final = 4

Progress = Callable[[int, int, int], None]
"""Called with (bytes done, bytes in total, bytes sent): of the image, of the image, to the repository."""


def make_base(
    repository: VmRepository,
    disk: str,
    image: int | Path,
    *,
    uuid: str,
    path: Path | None = None,
    size: int | None = None,
    format: str = "raw",  # noqa: A002 - the field's name everywhere
    backing: str | None = None,
    partial: Path,
    progress: Progress | None = None,
) -> Manifest:
    """Back the image up as a base of ``disk`` and put its manifest.

    ``image`` is a file descriptor open for reading (then ``path`` names it) or a path, of a file or a block device. ``size`` is the
    disk's, bytes, by default the image's; what it has beyond the image's end is zeroes. ``partial`` is the progress file, which
    is removed at the end. Raises ImageError if the image cannot be read or changed while it was read, and what the store raises.
    """
    if isinstance(image, Path):
        try:
            fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(f"{image}: cannot be opened: {error.strerror}", "check the path and its mode") from error
        try:
            return make_base(
                repository, disk, fd, uuid=uuid, path=path or image, size=size, format=format, backing=backing,
                partial=partial, progress=progress,
            )  # fmt: skip
        finally:
            os.close(fd)

    path = path or Path(f"/proc/self/fd/{image}").readlink()
    identity = image_identity(image, path)
    ctime_ns = os.fstat(image).st_ctime_ns
    disk_size = identity.size if size is None else size
    time_ns = time.time_ns()
    with Partial(partial, identity, ctime_ns, disk_size, repository.repository.id) as done:
        # A block device's identity does not tell whether it was written to since: read it again, though nothing is sent twice.
        known = {} if stat.S_ISBLK(os.fstat(image).st_mode) else done.known

        def note(index: int, chunk_id: str | None) -> None:
            if index not in known:
                done.add(index, chunk_id)

        job = _Job(repository.repository.chunks, _Still(image, path, disk_size), disk_size, known, note, progress)
        chunks = job.run()
        if image_identity(image, path) != identity:
            raise ImageError(
                f"{path}: the image changed while it was backed up",
                "stop whatever writes to it, then make the backup again",
            )
        manifest = Manifest(
            new_base_id(time_ns), disk, uuid, disk_size, CHUNK_SIZE, time_ns, format, backing, identity, tuple(chunks)
        )
        repository.put_base(manifest)
        done.remove()
    return manifest


def make_begun_base(
    repository: VmRepository, image: int, path: Path, begun: CopyBeforeWrite, *, partial: Path, progress: Progress | None = None
) -> Manifest:
    """Make the base that was begun with the run, of an image that the VM may write to meanwhile, and put its manifest.

    ``image`` is a file descriptor open for reading, ``path`` names it. Raises ImageError if the image cannot be read, or if the
    base has failed: what the disk held then is not known any more. Otherwise, and after what the store raises, the next try goes
    on where this one was.
    """
    base = begun.base
    with Partial(partial, base.identity, base.time_ns, base.size, repository.repository.id) as done:
        known = done.known
        if any(begun.is_taken(index) and index not in known for index in range(-(-base.size // CHUNK_SIZE))):
            begun.fail("what was stored of it is not known any more: the host died, or it is another repository")
        _refuse_failed(begun, path)

        untaken: list[int] = []

        def note(index: int, chunk_id: str | None) -> None:
            if index not in known:
                done.add(index, chunk_id)
            untaken.append(index)
            if len(untaken) >= _TAKEN_TOGETHER:
                # What is taken is kept no longer, so its id must not be lost with the host after the VM's stop.
                done.sync()
                for taken in untaken:
                    begun.take(taken)
                untaken.clear()

        job = _Job(repository.repository.chunks, _Begun(image, path, begun), base.size, known, note, progress)
        chunks = job.run()
        manifest = Manifest(
            base.id,
            base.disk,
            base.uuid,
            base.size,
            CHUNK_SIZE,
            base.time_ns,
            base.format,
            base.backing,
            base.identity,
            tuple(chunks),
        )
        if not begun.in_place:
            begun.fail("its files in the journal's directory were removed: what was written since was not kept")
        _refuse_failed(begun, path)
        repository.put_base(manifest)
    return manifest


def make_base_of(
    repository: VmRepository,
    source: Source,
    known: MutableMapping[int, str | None],
    *,
    base_id: str,
    disk: str,
    uuid: str,
    size: int,
    format: str,  # noqa: A002 - the field's name everywhere
    backing: str | None,
    time_ns: int,
    progress: Progress | None = None,
) -> Manifest:
    """Make a base of what ``source`` reads, which is no image here, and put its manifest.

    ``known``: the ids of chunks by number, as far as they are known; what is stored is added, for a further try. Raises what the
    source and the store raise.
    """
    chunks = _Job(repository.repository.chunks, source, size, known, known.__setitem__, progress).run()
    # No image has this identity, so none is ever taken for this base.
    identity = ImageIdentity("", size, 0, 0, 0)
    manifest = Manifest(base_id, disk, uuid, size, CHUNK_SIZE, time_ns, format, backing, identity, tuple(chunks))
    repository.put_base(manifest)
    return manifest


def _refuse_failed(begun: CopyBeforeWrite, path: Path) -> None:
    if begun.state is State.FAILED:
        raise ImageError(
            f"{path}: the base of {begun.base.disk} was given up: {begun.reason}",
            "the VM's next start begins another one; until then nothing can be restored that needs this one",
        )


class Source(Protocol):
    """Where a base's chunks are read."""

    def has_data(self, index: int) -> bool:
        """Whether a chunk may hold anything but zeroes; asked for in ascending order."""

    def read(self, index: int) -> bytes:
        """A chunk. Raises ImageError."""

    def read_again(self, index: int) -> bytes:
        """A chunk that was stored before, and that the repository has lost. Raises ImageError."""


class _Job:
    """One pass over a disk; ``run`` returns the chunk ids. ``note`` is told of every chunk that the repository has."""

    def __init__(
        self,
        chunks: Chunks,
        source: Source,
        size: int,
        known: Mapping[int, str | None],
        note: Callable[[int, str | None], None],
        progress: Progress | None,
    ) -> None:
        self._chunks = chunks
        self._source = source
        self._size = size
        self._known = known
        self._note = note
        self._progress = progress or (lambda *_: None)
        self._result: list[str | None] = [None] * -(-size // CHUNK_SIZE)
        self._done_bytes = 0
        self._sent_bytes = 0

    def run(self) -> list[str | None]:
        running: deque[tuple[int, Future[tuple[str | None, int]]]] = deque()
        self._progress(0, self._size, 0)
        with ThreadPoolExecutor(_WORKERS, "base") as pool:
            try:
                for index in range(len(self._result)):
                    known = self._known.get(index)
                    if known is not None:
                        running.append((index, pool.submit(self._check_known, index, known)))
                    elif index in self._known or not self._source.has_data(index):
                        running.append((index, _finished()))
                    else:
                        running.append((index, pool.submit(self._store, self._source.read(index))))
                    while len(running) > _AHEAD_MAX or (running and running[0][1].done()):
                        self._collect(*running.popleft())
                while running:
                    self._collect(*running.popleft())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return self._result

    def _collect(self, index: int, future: Future[tuple[str | None, int]]) -> None:
        chunk_id, sent_bytes = future.result()
        self._result[index] = chunk_id
        self._note(index, chunk_id)
        self._done_bytes += min(CHUNK_SIZE, self._size - index * CHUNK_SIZE)
        self._sent_bytes += sent_bytes
        self._progress(self._done_bytes, self._size, self._sent_bytes)

    def _check_known(self, index: int, chunk_id: str) -> tuple[str | None, int]:
        """What an earlier try stored may have been removed from the repository since."""
        return (chunk_id, 0) if self._chunks.exists(chunk_id) else self._store(self._source.read_again(index))

    def _store(self, data: bytes) -> tuple[str | None, int]:
        if data == _ZEROES[: len(data)]:
            return None, 0
        return self._chunks.put(data)


class _Still:
    """An image that nobody writes to."""

    def __init__(self, fd: int, path: Path, size: int) -> None:
        self._fd = fd
        self._path = path
        self._size = size
        self._data_from = 0
        self._data_to = 0
        """The extent of data found last: [from, to)."""

    def read(self, index: int) -> bytes:
        """See ``Source``."""
        offset = index * CHUNK_SIZE
        length = min(CHUNK_SIZE, self._size - offset)
        parts = []
        try:
            while length > 0 and (part := os.pread(self._fd, length, offset)):
                parts.append(part)
                offset += len(part)
                length -= len(part)
        except OSError as error:
            raise _unreadable(self._path, offset, error) from error
        return b"".join((*parts, bytes(length)))

    def read_again(self, index: int) -> bytes:
        """See ``Source``."""
        return self.read(index)

    def has_data(self, index: int) -> bool:
        """Whether the file system says that the chunk holds any data."""
        start, end = index * CHUNK_SIZE, min((index + 1) * CHUNK_SIZE, self._size)
        if self._data_to <= start:
            try:
                self._data_from = os.lseek(self._fd, start, os.SEEK_DATA)
                self._data_to = os.lseek(self._fd, self._data_from, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    self._data_from = self._data_to = self._size
                else:  # a block device, or a file system that does not know: all is data
                    self._data_from, self._data_to = start, self._size
        return self._data_from < end and self._data_to > start


class _Begun:
    """A disk as it was when its run began, whatever the guest has written since."""

    def __init__(self, fd: int, path: Path, begun: CopyBeforeWrite) -> None:
        self._fd = fd
        self._path = path
        self._begun = begun
        self._now = _Still(fd, path, begun.base.size)

    def has_data(self, index: int) -> bool:
        """See ``Source``."""
        # In this order: a hole that the guest has not written to since it was seen was one then.
        return self._now.has_data(index) or self._begun.touched(index)

    def read_again(self, index: int) -> bytes:
        """See ``Source``."""
        if self._begun.is_taken(index):
            self._begun.fail(f"the repository has lost chunk {index}, and its old content was not kept any longer")
            _refuse_failed(self._begun, self._path)
        return self.read(index)

    def read(self, index: int) -> bytes:
        """See ``Source``."""
        try:
            return self._begun.read(self._fd, index)
        except OSError as error:
            raise _unreadable(self._path, index * CHUNK_SIZE, error) from error


def _unreadable(path: Path, offset: int, error: OSError) -> ImageError:
    """What to say of an image that cannot be read."""
    return ImageError(f"{path}: cannot be read at offset {offset}: {error.strerror}", "check the disk that holds it")


def _finished() -> Future[tuple[str | None, int]]:
    future: Future[tuple[str | None, int]] = Future()
    future.set_result((None, 0))
    return future
