"""Looking at data in blocks of a file system: which of them are zeroes, which differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

BLOCK: Final = 4096
_ZEROES: Final = bytes(BLOCK)


def nonzero_runs(offset: int, data: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """(start, end) within ``data``, which begins at byte ``offset`` of the disk, of what must be written where zeroes are."""
    data = bytes(data)  # comparing bytes is memcmp; comparing memoryviews goes element by element
    start = -1
    at = 0
    while at < len(data):
        end = min(at + BLOCK - (offset + at) % BLOCK, len(data))
        if data[at:end] == _ZEROES[: end - at]:
            if start >= 0:
                yield start, at
                start = -1
        elif start < 0:
            start = at
        at = end
    if start >= 0:
        yield start, at


def differing_runs(offset: int, wanted: bytes, found: bytes) -> Iterator[tuple[int, int, bool]]:
    """(start, end, wanted is zero) within the data, for the blocks that differ; neighbours of one kind joined."""
    if wanted == found:
        return
    run: tuple[int, int, bool] | None = None
    at = 0
    while at < len(wanted):
        end = min(at + BLOCK - (offset + at) % BLOCK, len(wanted))
        block = wanted[at:end]
        if block != found[at:end]:
            zero = block == _ZEROES[: end - at]
            if run is not None and run[1:] == (at, zero):
                run = (run[0], end, zero)
            else:
                if run is not None:
                    yield run
                run = (at, end, zero)
        at = end
    if run is not None:
        yield run
