"""Many short pieces of files, copied together with one system call.

A read for each costs several times what its bytes do. So the files are mapped, and the kernel copies from the mappings into a file
in memory. This process itself never looks at a mapping: what cannot be read, or is not there any more as the file was cut short,
ends a process that does by a signal, and is an error of the call here.

What was copied from a mapping counts as this process's memory from then on, though it is the page cache's. So it is let go of now
and then.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

PAD_SIZE: Final = 1 << 18
"""Bytes that are gathered at once at most; it stays in a processor's cache."""
PARTS_MAX: Final = 1024
"""The kernel's IOV_MAX."""
_FILE_BYTES_MAX: Final = 512 << 20
"""When more of files than that counts as this process's memory, mappings are let go of."""
_FAULTS: Final = 64
"""After so many page faults that is looked at. One makes 64 KiB count, or 2 MiB where the page cache has it in one."""
_LET_GO_SECONDS: Final = 5.0
"""Not more often: who reads more than that at random faults it all in again, which always took twice a processor's time."""


class _Pad:
    def __init__(self) -> None:
        self.fd = os.memfd_create("vmrewind-pad")
        try:
            os.truncate(self.fd, PAD_SIZE)
            self.bytes = memoryview(mmap.mmap(self.fd, PAD_SIZE))
        except BaseException:
            os.close(self.fd)
            raise
        weakref.finalize(self, os.close, self.fd)
        self.storage_read = 0
        self.faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


class _Pads(threading.local):
    pad: _Pad | None = None


_pads = _Pads()


class _Maps:
    """Those that there are, and page faults since they were let go of."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._faults = 0
        self._let_go_at = 0.0

    def add(self, content: mmap.mmap) -> None:
        with self._lock:
            self._all.add(content)

    def count(self, faults: int) -> None:
        # Threads that do so at once may lose some: it is no exact bound.
        self._faults += faults
        if self._faults < _FAULTS:
            return
        self._faults = 0
        now = time.monotonic()
        if now < self._let_go_at + _LET_GO_SECONDS:
            return
        with suppress(OSError):
            if _file_bytes() <= _FILE_BYTES_MAX:
                return
        self._let_go_at = now
        with self._lock:
            contents = list(self._all)
        for content in contents:
            content.madvise(mmap.MADV_DONTNEED)


def _file_bytes() -> int:
    """How much of files counts as this process's memory."""
    fd = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(fd, 256).split()[2]) * mmap.PAGESIZE
    finally:
        os.close(fd)


_maps = _Maps()


def mapped(fd: int) -> memoryview:
    """A file's bytes, only to be sliced and given to ``gather``; none if it cannot be mapped."""
    try:
        content = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return memoryview(b"")
    _maps.add(content)
    return memoryview(content)


def gather(parts: Sequence[memoryview]) -> tuple[memoryview, bool]:
    """(the parts one behind the other, whether this thread has read from storage since it gathered last).

    The bytes are good until this thread gathers again. They end in front of what cannot be read; there are none if nothing can be
    gathered, as descriptors or memory are used up. At most PARTS_MAX parts and PAD_SIZE bytes.
    """
    pad = _pads.pad
    if pad is None:
        try:
            pad = _pads.pad = _Pad()
        except OSError:
            return memoryview(b""), False
    try:
        gathered = pad.bytes[: os.pwritev(pad.fd, parts, 0)]
    except OSError:
        gathered = pad.bytes[:0]
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    if usage.ru_minflt != pad.faults:
        _maps.count(usage.ru_minflt - pad.faults)
        pad.faults = usage.ru_minflt
    before, pad.storage_read = pad.storage_read, usage.ru_inblock + usage.ru_majflt
    return gathered, pad.storage_read != before
