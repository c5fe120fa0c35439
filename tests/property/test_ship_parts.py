"""The parts of ship against the plainest model of each: ranges against sets, gathering against lists."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ship_support import VM, Truth, WrittenJournal
from vmrewind.repository.segment import ShippedSegment
from vmrewind.ship.coverage import Ranges
from vmrewind.ship.cursor import Cursor, Piece
from vmrewind.ship.gather import Gathered
from vmrewind.ship.plan import Entry

END = 60


@given(st.lists(st.tuples(st.integers(1, END - 1), st.integers(0, 12))), st.integers(1, END - 1))
@settings(max_examples=300)
def test_ranges_are_sets(added: list[tuple[int, int]], first: int) -> None:
    ranges, model = Ranges(), set()
    for start, more in added:
        ranges.add(start, start + more)
        model |= set(range(start, start + more + 1))
    missing: set[int] = set()
    found = ranges.missing(first)
    for start, last in found:
        missing |= set(range(start, (END + 20 if last is None else last) + 1))
    assert missing == set(range(first, END + 21)) - model
    assert all(last is not None for _, last in found[:-1])
    assert all(a[1] is not None and a[1] + 1 < b[0] for a, b in itertools.pairwise(found))


@given(st.integers(0, 1 << 32), st.integers(1, 3), st.booleans())
@settings(max_examples=25)
def test_what_is_gathered_is_what_was_written(seed: int, mask: int, bounded: bool) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        written = WrittenJournal(Path(place), size=16 << 20, first_seq=chance.randint(0, 100))
        for _ in range(chance.randint(1, 30)):
            written.random_batch(chance, payload_max=3000)
        seqs = [record.seq for record in written.truth]
        first = chance.choice(seqs)
        last = chance.randint(first, seqs[-1]) if bounded else None
        entry = Entry(written.run, first, last, mask, frozenset())
        gathered, cursor = Gathered(entry, first), Cursor(Path(place), written.run, first, growing=False)
        while isinstance(found := cursor.read(), Piece):
            gathered.add(found.batch, found.payload)
            if chance.random() < 0.3:
                gathered.select()
            if last is not None and cursor.next_seq > last:
                break
        assert bounded or found is None
        gathered.select()
        name, data = gathered.encode(VM, bytes(16))
        assert (name.first, name.last, name.mask) == (first, seqs[-1] if last is None else last, mask)
        segment = ShippedSegment(lambda offset, length: data[offset : offset + length], name)
        got = [
            Truth(*(int(row[f]) for f in ("seq", "time_ns", "offset", "length", "disk", "op", "flags")), segment.payload(row))
            for row in segment.rows
        ]
        disks = [disk for disk in (0, 1) if mask >> disk & 1]
        assert got == [record for record in written.of(*disks) if first <= record.seq <= name.last]
        assert gathered.last_time_ns == next(record.time_ns for record in written.truth if record.seq == name.last)
