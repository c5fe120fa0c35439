"""Reading a journal that grows, rolls over, tears, is damaged and is recycled while it is read."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.ship_support import MIB, WrittenJournal
from vmrewind.errors import CorruptionError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment, segment_files
from vmrewind.ship.cursor import Cursor, Hole, Piece


@pytest.fixture
def written(tmp_path: Path) -> WrittenJournal:
    return WrittenJournal(tmp_path / "journal")


def cursor_of(written: WrittenJournal, seq: int = 1, *, growing: bool = True) -> Cursor:
    return Cursor(written.journal, written.run, seq, growing=growing)


def read_all(cursor: Cursor) -> tuple[list[int], list[Hole]]:
    """(seqs, holes) up to where the cursor has no more."""
    seqs: list[int] = []
    holes: list[Hole] = []
    while (found := cursor.read()) is not None:
        if isinstance(found, Hole):
            holes.append(found)
        else:
            seqs.extend(range(found.batch.first_seq, found.batch.last_seq + 1))
    return seqs, holes


def fill(written: WrittenJournal, segments: int) -> None:
    """Write batches of 1 MiB until so many segments exist."""
    while written.writer.segment_number < segments:
        written.batch([(fmt.Op.WRITE, 0, os.urandom(MIB))])


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def batches_of(path: Path) -> list[tuple[int, int, int]]:
    """(position, payload position, first seq) of each batch in a segment."""
    with Segment(path) as segment:
        return [(batch.position, batch.payload_position, batch.first_seq) for batch in segment.batches()]


def test_everything_is_read_while_it_is_written_and_over_segments(written: WrittenJournal) -> None:
    chance = random.Random(1)
    cursor = cursor_of(written)
    assert cursor.read() is None
    seqs: list[int] = []
    while written.writer.segment_number < 4:
        for _ in range(chance.randint(1, 4)):
            written.random_batch(chance, 100_000)
        more, holes = read_all(cursor)
        assert not holes
        seqs += more
        if chance.random() < 0.3:
            cursor.release()
    assert seqs == [record.seq for record in written.truth]


@pytest.mark.parametrize("seq", [1, 2, 7, 15, 20])
def test_it_begins_anywhere(written: WrittenJournal, seq: int) -> None:
    fill(written, 3)
    seqs, holes = read_all(cursor_of(written, seq))
    assert not holes
    assert seqs == [record.seq for record in written.truth if record.seq >= seq]


def test_a_batch_appended_between_seeing_the_end_and_seeing_the_successor_is_not_missed(
    written: WrittenJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    written.batch([(fmt.Op.WRITE, 0, b"first")])
    cursor = cursor_of(written)
    read_all(cursor)
    successors = Cursor._successors

    def late(self: Cursor) -> object:
        written.batch([(fmt.Op.WRITE, 0, b"second")])
        fill(written, 2)
        monkeypatch.setattr(Cursor, "_successors", successors)
        return successors(self)

    monkeypatch.setattr(Cursor, "_successors", late)
    found = cursor.read()
    assert isinstance(found, Piece)
    assert found.batch.first_seq == 2
    seqs, holes = read_all(cursor)
    assert (seqs[-1], holes) == (written.truth[-1].seq, [])


def test_a_torn_tail_is_not_read_and_what_replaces_it_is(written: WrittenJournal) -> None:
    written.batch([(fmt.Op.WRITE, 0, b"kept")])
    written.batch([(fmt.Op.WRITE, 0, b"torn" * 1000), (fmt.Op.WRITE, 1, b"torn too")])
    (file,) = segment_files(written.journal)
    (_, _, _), (position, payload, seq) = batches_of(file.path)
    flip(file.path, payload + 4001)
    cursor = cursor_of(written)
    assert read_all(cursor) == ([1], [])
    assert read_all(cursor_of(written, growing=False)) == ([1], [])

    again = WrittenJournal(written.journal, first_seq=seq)
    again.writer.resume(file.path, 1, position)
    again.writer.next_batch = 2
    again.batch([(fmt.Op.WRITE, 0, b"successor's")])
    found = cursor.read()
    assert isinstance(found, Piece)
    assert found.payload.startswith(b"successor's")


def test_a_torn_tail_whose_successor_went_to_the_next_segment_is_no_hole(written: WrittenJournal) -> None:
    fill(written, 1)
    written.batch([(fmt.Op.WRITE, 0, b"torn" * 1000)])
    (file,) = segment_files(written.journal)
    flip(file.path, batches_of(file.path)[-1][1])
    seq = written.writer.next_seq - 1
    again = WrittenJournal(written.journal, first_seq=seq)
    again.writer.segment_number = 1
    again.writer.next_batch = written.writer.next_batch - 1
    again.batch([(fmt.Op.WRITE, 0, b"successor's")])
    assert len(segment_files(written.journal)) == 2
    assert read_all(cursor_of(written)) == (list(range(1, seq + 1)), [])


def test_a_damaged_payload_in_the_middle_is_a_hole_of_that_batch(written: WrittenJournal) -> None:
    fill(written, 3)
    file = segment_files(written.journal)[1]
    _, payload, seq = batches_of(file.path)[2]
    flip(file.path, payload + 9)
    seqs, holes = read_all(cursor_of(written))
    assert [(hole.first, hole.last) for hole in holes] == [(seq, seq)]
    assert file.path.name in holes[0].cause
    assert str(payload) in holes[0].cause
    assert seqs == [record.seq for record in written.truth if record.seq != seq]


def test_a_damaged_table_is_a_hole_up_to_the_next_segment(written: WrittenJournal) -> None:
    fill(written, 3)
    file, following = segment_files(written.journal)[1:]
    position, _, seq = batches_of(file.path)[3]
    flip(file.path, position + 70)
    seqs, holes = read_all(cursor_of(written))
    last = batches_of(following.path)[0][2] - 1
    assert [(hole.first, hole.last) for hole in holes] == [(seq, last)]
    assert f"{file.path.name} is damaged at offset {position}" in holes[0].cause
    assert seqs == [record.seq for record in written.truth if not seq <= record.seq <= last]


def test_a_damaged_header_is_a_hole_of_its_segment_and_an_error_in_the_newest(written: WrittenJournal) -> None:
    fill(written, 3)
    _, middle, newest = segment_files(written.journal)
    expected = (batches_of(middle.path)[0][2], batches_of(newest.path)[0][2] - 1)
    flip(middle.path, 20)
    for start in (1, expected[0]):
        seqs, holes = read_all(cursor_of(written, start))
        assert [(hole.first, hole.last) for hole in holes] == [expected]
        assert seqs == [r.seq for r in written.truth if r.seq >= start and not expected[0] <= r.seq <= expected[1]]
    flip(newest.path, 20)
    with pytest.raises(CorruptionError, match=newest.path.name):
        read_all(cursor_of(written))


def test_what_was_recycled_before_the_start_is_a_hole(tmp_path: Path) -> None:
    written = WrittenJournal(tmp_path / "journal", size=16 * MIB)
    fill(written, 12)
    oldest = segment_files(written.journal)[0]
    first = batches_of(oldest.path)[0][2]
    assert first > 1
    seqs, holes = read_all(cursor_of(written))
    assert [(hole.first, hole.last) for hole in holes] == [(1, first - 1)]
    assert "recycled before" in holes[0].cause
    assert seqs == [record.seq for record in written.truth if record.seq >= first]


def test_what_is_recycled_under_a_released_cursor_is_a_hole_and_a_reading_one_keeps_its_segment(tmp_path: Path) -> None:
    written = WrittenJournal(tmp_path / "journal", size=16 * MIB)
    for _ in range(3):
        written.batch([(fmt.Op.WRITE, 0, b"small")])
    fill(written, 2)
    kept = batches_of(segment_files(written.journal)[1].path)[0][2] - 1
    reading, released = cursor_of(written), cursor_of(written)
    for cursor in (reading, released):
        assert isinstance(cursor.read(), Piece)
    released.release()
    fill(written, 12)
    first = batches_of(segment_files(written.journal)[0].path)[0][2]
    seqs, holes = read_all(reading)
    assert kept >= 3
    assert seqs == [*range(2, kept + 1), *range(first, written.writer.next_seq)]
    assert [(hole.first, hole.last) for hole in holes] == [(kept + 1, first - 1)]
    reading.release()
    fill(written, 30)
    first = batches_of(segment_files(written.journal)[0].path)[0][2]
    seqs, holes = read_all(released)
    assert [(hole.first, hole.last) for hole in holes] == [(2, first - 1)]
    assert seqs == list(range(first, written.writer.next_seq))


def test_a_deleted_segment_in_the_middle_is_a_hole(written: WrittenJournal) -> None:
    fill(written, 4)
    gone, after = segment_files(written.journal)[1:3]
    expected = (batches_of(gone.path)[0][2], batches_of(after.path)[0][2] - 1)
    gone.path.unlink()
    seqs, holes = read_all(cursor_of(written))
    assert [(hole.first, hole.last) for hole in holes] == [expected]
    assert len(seqs) + expected[1] - expected[0] + 1 == len(written.truth)


def test_another_runs_segments_are_not_looked_at(tmp_path: Path) -> None:
    for run in (5, 6):
        WrittenJournal(tmp_path, run).batch([(fmt.Op.WRITE, 0, bytes([run]))])
    found = Cursor(tmp_path, 5, 1, growing=False).read()
    assert isinstance(found, Piece)
    assert found.payload[0] == 5
