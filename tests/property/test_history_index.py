"""Whatever is written where, in however many layers: the index tells the last writer of every byte."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from unittest.mock import patch

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vmrewind.history.index import Index
from vmrewind.history.layers import OWNER, Layers, Owners, layer_of

LENGTH_MAX = (1 << 32) - 1
END = 1 << 62
"""Behind the end of any disk."""
Range = tuple[int, int, int]
"""(start, end, number of the write)."""

UNITS = st.sampled_from([1, 8, 512, 4096, 1 << 20])


@st.composite
def _writes(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(offset, length) of writes that lie together, mostly in units, in front or where 4 bytes do not tell a unit any more."""
    unit = draw(UNITS)
    base = draw(st.sampled_from([0, 1 << 32, ((1 << 32) - 40) * unit, (1 << 41) - unit, 1 << 60]))
    offsets = st.integers(0, 60).map(lambda at: min(base + at * unit, END - (1 << 34)))
    odd = st.tuples(offsets, st.sampled_from([0, 0, 0, 1, 3])).map(sum)
    lengths = st.one_of(st.integers(1, 20).map(lambda units: units * unit), st.sampled_from([1, 1 << 31, LENGTH_MAX]))
    return draw(st.lists(st.tuples(st.one_of(odd, odd, odd, st.just(0)), lengths), min_size=1, max_size=40))


def _owners(writes: Iterable[tuple[int, tuple[int, int]]]) -> Owners:
    rows = [(offset, number, length, number) for number, (offset, length) in writes]
    return np.array(rows, OWNER)


def _model(writes: list[tuple[int, int]]) -> list[Range]:
    """Who has the last word, between any two places where a write begins or ends."""
    edges = sorted({edge for offset, length in writes for edge in (offset, offset + length)})
    found: list[Range] = []
    for start, end in pairwise(edges):
        for number in range(len(writes) - 1, -1, -1):
            offset, length = writes[number]
            if offset <= start and end <= offset + length:
                found.append((start, end, number))
                break
    return found


def _joined(ranges: Iterable[Range]) -> list[Range]:
    found: list[Range] = []
    for start, end, number in ranges:
        if found and found[-1][1:] == (start, number):
            found[-1] = (found[-1][0], end, number)
        else:
            found.append((start, end, number))
    return found


def _within(ranges: Iterable[Range], low: int, high: int) -> list[Range]:
    return _joined((max(start, low), min(end, high), number) for start, end, number in ranges if start < high and end > low)


@example(writes=[((1 << 32) * 512, 512), (0, 512), (512, 512)], parts=[1], sizes=(1, 1, 1), reads=[((1 << 41) + 512, 512)])
@given(
    writes=_writes(),
    parts=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    sizes=st.tuples(st.sampled_from([1, 3, 20, 1000]), st.sampled_from([1, 5, 40, 100_000]), st.sampled_from([1, 2, 4, 30, 5000])),
    reads=st.lists(st.tuples(st.integers(0, END - (1 << 41)), st.sampled_from([1, 512, 1 << 33, 1 << 40])), max_size=4),
)
@settings(max_examples=60)
def test_every_byte_is_its_last_writers(
    writes: list[tuple[int, int]], parts: list[int], sizes: tuple[int, int, int], reads: list[tuple[int, int]]
) -> None:
    records, extents, region = sizes
    numbered = list(enumerate(writes))
    with (
        patch("vmrewind.history.layers.LAYER_RECORDS", records),
        patch("vmrewind.history.layers.JOINED_EXTENTS", extents),
        patch("vmrewind.history.index.REGION_EXTENTS", region),
    ):
        layers = Layers()
        at = turn = 0
        while at < len(numbered):
            part = _owners(numbered[at : at + parts[turn % len(parts)]])
            layers.put(layer_of([part])) if turn % 3 == 2 else layers.add(part)
            at, turn = at + len(part), turn + 1
        index = Index(layers.finish())
    model = _model(writes)
    whole = index.whole().tolist()
    assert _joined((start, start + length, index.record(owner)[1]) for start, length, owner in whole) == _joined(model)
    edges = sorted({edge for offset, length in writes for edge in (offset, offset + length)})
    some = edges[:: max(len(edges) // 4, 1)]
    near = [(max(edge + beside, 0), length) for edge in some for beside in (-1, 0, 1) for length in (1, 9000)]
    for offset, length in [*reads, *near, (0, END)]:
        want = _within(model, offset, offset + length)
        pieces = index.pieces(offset, length)
        assert _joined((start, end, xxh3) for start, end, _, _, xxh3, _, _ in pieces) == want
        assert all((at, size, place) == (*writes[xxh3], xxh3) for _, _, _, at, xxh3, size, place in pieces)
        columns = [[column.tolist() for column in extents] for extents in index.within(offset, length)]
        found = [extent for three in columns for extent in zip(*three, strict=True)]
        assert _joined((start, start + size, index.record(owner)[1]) for start, size, owner in found) == want
