"""Ranges against a set of bytes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vmrewind.recover.ranges import Ranges

spans = st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(spans, max_size=30), spans)
def test_a_range_is_split_as_a_set_of_bytes_tells(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    ranges = Ranges()
    truth: set[int] = set()
    for start, end in added:
        ranges.add(start, end)
        truth.update(range(start, end))
    parts = list(ranges.split(*asked))
    assert [at for start, end, _ in parts for at in range(start, end)] == list(range(*asked))
    assert {at for start, end, held in parts if held for at in range(start, end)} == truth & set(range(*asked))
    assert all(start < end for start, end, _ in parts)
    assert all(one[2] != other[2] for one, other in pairwise(parts)), "neighbours of one kind are joined"
    assert ranges.total == len(truth)
