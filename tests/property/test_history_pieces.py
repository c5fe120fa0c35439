"""Whatever the journal and the repository have, in whatever overlap: each record is taken once, the journal's first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vmrewind.history.records import RunRecords

ranges = st.tuples(st.integers(1, 60), st.integers(0, 25)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def source(first: int, last: int, **more: Any) -> Any:
    return SimpleNamespace(first=first, last=last, name=f"{first}-{last}", number=first, end=0, damage=None, **more)


@given(st.lists(ranges, max_size=4), st.lists(st.tuples(ranges, st.integers(1, 3)), max_size=12), st.integers(0, 1))
def test_pieces_are_disjoint_and_hold_all_that_is_known(
    local: list[tuple[int, int]], shipped: list[tuple[tuple[int, int], int]], disk: int
) -> None:
    apart: list[tuple[int, int]] = []
    for first, last in sorted(local):
        if not apart or first > apart[-1][1]:
            apart.append((first, last))
    journal = [source(first, last) for first, last in apart]
    objects = [source(first, last, mask=mask) for (first, last), mask in shipped]
    records = RunRecords(1, journal, objects, [])
    pieces = records.pieces(disk)
    taken: set[int] = set()
    for piece in pieces:
        own = set(range(piece.first, piece.last + 1))
        assert own
        assert not own & taken
        assert piece.source.first <= piece.first <= piece.last <= piece.source.last
        taken |= own
    assert [piece.first for piece in pieces] == sorted(piece.first for piece in pieces)
    here = {seq for first, last in apart for seq in range(first, last + 1)}
    there = {seq for (first, last), mask in shipped if mask >> disk & 1 for seq in range(first, last + 1)}
    assert taken == here | there
    assert {seq for piece in pieces if piece.source in journal for seq in range(piece.first, piece.last + 1)} == here
    missing = {seq for hole in records.holes(disk, 1, 90) for seq in range(hole.first, hole.last + 1)}
    assert missing == set(range(1, 91)) - taken
