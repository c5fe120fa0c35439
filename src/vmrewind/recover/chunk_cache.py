"""The chunks of bases for as long as moments are served: each is read, decompressed and verified once.

A chunk is 4 MiB, however little of it is asked for, and memory has room for a few. So they lie in a file without a name, as far as
a share of its file system's free room goes. Nothing in there is ever replaced: what does not fit any more is not kept. Who reads
on and on has the next ones made meanwhile.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Final

from vmrewind.history.view import View

_SHARE: Final = 4
"""A quarter of the free room at most."""
_AHEAD: Final = 2
"""So many chunks beyond the one that is asked for."""


class ChunkCache:
    """Used from several threads. ``directory``: where the file is; without any room there nothing is kept."""

    def __init__(self, directory: Path) -> None:
        self._lock = threading.Lock()
        self._chunks: dict[str, Future[bytes | memoryview]] = {}
        self._used = 0
        self._map: mmap.mmap | None = None
        self._fd = -1
        try:
            self._room = shutil.disk_usage(directory).free // _SHARE
            with tempfile.TemporaryFile(dir=directory, prefix="vmrewind-chunks-") as file:
                os.truncate(file.fileno(), self._room)
                self._map = mmap.mmap(file.fileno(), self._room, prot=mmap.PROT_READ)
                self._fd = os.dup(file.fileno())
        except (OSError, ValueError):
            self._room = 0  # It serves all the same, and slower.
        self._readers = ThreadPoolExecutor(_AHEAD, thread_name_prefix="chunk")

    def close(self) -> None:
        """Give the file up, once nobody reads what is in it."""
        self._readers.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)

    def get(self, chunk_id: str, load: Callable[[str], bytes | memoryview]) -> bytes | memoryview:
        """The chunk, loaded if it is not here: by one thread, whoever else wants it waits. Raises what ``load`` does, and tries it
        anew the next time."""
        with self._lock:
            known = self._chunks.get(chunk_id)
            made = self._chunks[chunk_id] = known or Future()
        if known is not None:
            return known.result()
        try:
            data = load(chunk_id)
            kept = self._keep(data)
        except BaseException as error:
            self._forget(chunk_id)
            made.set_exception(error)
            raise
        if kept is None:
            self._forget(chunk_id)
        made.set_result(kept or data)
        return kept or data

    def prepare(self, chunk_id: str, load: Callable[[str], bytes | memoryview]) -> None:
        """Have a thread get the chunk. What goes wrong is told to whoever asks for it."""
        with self._lock:
            if chunk_id in self._chunks or self._used >= self._room:
                return
        self._readers.submit(self.get, chunk_id, load)

    def _forget(self, chunk_id: str) -> None:
        with self._lock:
            del self._chunks[chunk_id]

    def _keep(self, data: bytes | memoryview) -> memoryview | None:
        with self._lock:
            at = self._used
            if self._map is None or at + len(data) > self._room:
                return None
            self._used += len(data)
        try:
            # A page of the mapping that the file system has no room for would be a signal instead of an error.
            os.posix_fallocate(self._fd, at, len(data))
            if os.pwrite(self._fd, data, at) != len(data):
                return None
        except OSError:
            with self._lock:
                self._room = 0
            return None
        return memoryview(self._map)[at : at + len(data)]


class ServedView(View):
    """A view that has its chunks from ``cache``, which is to be set once it is open."""

    cache: ChunkCache

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {chunk_id: number for number, chunk_id in enumerate(self._manifest.chunks) if chunk_id is not None}

    @cached_property
    def _asked(self) -> set[int]:
        return set()

    def read_chunk(self, chunk_id: str) -> bytes | memoryview:
        """As a view does."""
        number = self._numbers[chunk_id]
        self._asked.add(number)
        if number - 1 in self._asked:
            for ahead in self._manifest.chunks[number + 1 : number + 1 + _AHEAD]:
                if ahead is not None:
                    self.cache.prepare(ahead, super().read_chunk)
        return self.cache.get(chunk_id, super().read_chunk)
