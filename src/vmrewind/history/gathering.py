"""Many short pieces of files, copied together with one system call.

A read for each costs several times what its bytes do. So the files are mapped, and the kernel copies from the mappings into a file
in memory. This process itself never looks at a mapping: what cannot be read, or is not there any more as the file was cut short,
ends a process that does by a signal, and is an error of the call here.
"""

from __future__ import annotations

import mmap
import os
import resource
import threading
import weakref
from collections.abc import Sequence
from typing import Final

PAD_SIZE: Final = 1 << 18
"""Bytes that are gathered at once at most; it stays in a processor's cache."""
PARTS_MAX: Final = 1024
"""The kernel's IOV_MAX."""


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


class _Pads(threading.local):
    pad: _Pad | None = None


_pads = _Pads()


def mapped(fd: int) -> memoryview:
    """A file's bytes, only to be sliced and given to ``gather``; none if it cannot be mapped."""
    try:
        return memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
    except (OSError, ValueError):
        return memoryview(b"")


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
    before, pad.storage_read = pad.storage_read, usage.ru_inblock + usage.ru_majflt
    return gathered, pad.storage_read != before
