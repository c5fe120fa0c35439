"""What the writer writes the reader finds, and nothing else: across segments, recycling, torn tails and refusals."""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.capture_tools import MIB, RUN, UUID, Entry, journal_entries
from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.pool import JournalFull, Recycling, SegmentPool
from vmrewind.journal.reader import Segment, SegmentFile, segment_files
from vmrewind.journal.writer import LAST_WORD_ROOM, JournalWriter

Rec = tuple[int, int, int, int, bytes]
"""op, disk, offset, length, payload."""


def writer_of(journal: Path, *, size: int = 8 * MIB, recycle: Callable[[SegmentFile], Recycling] | None = None) -> JournalWriter:
    pool = SegmentPool(journal, size)
    pool.allot()
    return JournalWriter(pool, UUID.bytes, RUN, Clock(), recycle or (lambda _: Recycling.NO), 1)


def commit(writer: JournalWriter, batch: list[Rec]) -> int:
    payloads, total = [], 0
    for i, (op, disk, offset, length, payload) in enumerate(batch):
        xxh3 = xxhash.xxh3_64_intdigest(payload) if payload else 0
        fmt.RECORD.pack_into(writer.table, writer.table_at + i * fmt.RECORD.size, offset, length, disk, op, 0, xxh3)
        padded = payload.ljust(fmt.padded(len(payload)), b"\0")
        payloads.append(padded)
        total += len(padded)
    return writer.commit(len(batch), [b"".join(payloads)], total)


def write(offset: int, data: bytes, disk: int = 0) -> Rec:
    return (fmt.Op.WRITE, disk, offset, len(data), data)


def found(entries: list[Entry]) -> list[Rec]:
    return [(e.record.op, e.record.disk, e.record.offset, e.record.length, e.payload) for e in entries]


def close(writer: JournalWriter) -> None:
    finished, current, _ = writer.take_unsynced()
    for fd in (*finished, current):
        if fd >= 0:
            os.close(fd)


def fill_byte(length: int, byte: int) -> bytes:
    return bytes([byte]) * length


writes = st.builds(
    lambda offset, length, byte, disk: write(offset, fill_byte(length, byte), disk),
    st.integers(0, 1 << 40),
    st.one_of(st.integers(1, 100), st.sampled_from([4096, 4097, 65536, 300_000])),
    st.integers(0, 255),
    st.integers(0, 3),
)
others = st.builds(
    lambda op, offset, length: (int(op), 1, offset, length, b""),
    st.sampled_from([fmt.Op.ZERO, fmt.Op.DISCARD, fmt.Op.FLUSH]),
    st.integers(0, 1 << 50),
    st.integers(0, (1 << 32) - 1),
)


@settings(max_examples=60)
@given(st.lists(st.lists(st.one_of(writes, others), min_size=1, max_size=6), min_size=1, max_size=25))
def test_everything_written_is_read_in_order(batches: list[list[Rec]]) -> None:
    batches = [batch for batch in batches if sum(len(rec[4]) for rec in batch) < 700_000]
    with tempfile.TemporaryDirectory() as directory:
        journal = Path(directory)
        writer = writer_of(journal, size=64 * MIB)
        writer_pool_size = 8 * MIB
        expected: list[Rec] = []
        for batch in batches:
            assert commit(writer, batch) == len(expected) + 1
            expected += batch
        assert writer.next_seq == len(expected) + 1
        close(writer)
        entries = list(journal_entries(journal))
        assert found(entries) == expected
        assert [e.record.seq for e in entries] == list(range(1, len(expected) + 1))
        assert all(file.path.stat().st_size == writer_pool_size for file in segment_files(journal))


def test_a_batch_that_does_not_fit_begins_the_next_segment(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    for i in range(40):
        commit(writer, [write(i, fill_byte(100_000, i))])
    close(writer)
    files = segment_files(tmp_path, RUN)
    assert [file.number for file in files] == [1, 2, 3, 4]
    expected_seq = expected_batch = 1
    for file in files:
        with Segment(file.path) as segment:
            assert (segment.header.first_seq, segment.header.first_batch) == (expected_seq, expected_batch)
            batches = list(segment.batches())
            expected_seq, expected_batch = batches[-1].last_seq + 1, batches[-1].number + 1
    assert len(list(journal_entries(tmp_path))) == 40


def test_times_increase_from_record_to_record_across_segments(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    for i in range(30):
        commit(writer, [write(i, fill_byte(50_000, i)), (fmt.Op.FLUSH, 0, 0, 0, b"")])
    close(writer)
    times = [entry.record.time_ns for entry in journal_entries(tmp_path)]
    assert times == sorted(set(times))
    assert times[-1] == writer.last_time_ns


def test_the_largest_batch_fits_and_can_be_voided_whole(tmp_path: Path) -> None:
    """Room for voiding what was just written never depends on the pool."""
    writer = writer_of(tmp_path, size=2 * MIB)
    per_record = (writer.payload_max // fmt.RECORDS_MAX) & -8
    commit(writer, [write(i, fill_byte(per_record, i & 255)) for i in range(fmt.RECORDS_MAX)])
    writer.void(range(1, fmt.RECORDS_MAX + 1), 0)
    assert writer.segment_number == 1
    commit(writer, [write(0, fill_byte(writer.payload_max & -8, 7))])
    assert writer.segment_number == 2
    with pytest.raises(JournalFull):
        commit(writer, [write(0, fill_byte(writer.payload_max & -8, 8))])
    writer.void([2 * fmt.RECORDS_MAX + 1], 0)
    close(writer)
    voids = [entry.record.offset for entry in journal_entries(tmp_path) if entry.record.op == fmt.Op.VOID]
    assert voids == [*range(1, fmt.RECORDS_MAX + 1), 2 * fmt.RECORDS_MAX + 1]


def test_what_could_be_written_can_be_voided(tmp_path: Path) -> None:
    """Whatever room is left in the last segment, down to the byte."""
    refused = 0
    for room in range(0, 400, 8):
        journal = tmp_path / str(room)
        writer = writer_of(journal, size=2 * MIB)
        largest = fill_byte(writer.payload_max & -8, 1)
        commit(writer, [write(0, largest)])
        commit(writer, [write(0, largest)])
        left = MIB - fmt.SEGMENT_HEADER_SIZE - 88 - len(largest)
        commit(writer, [write(0, fill_byte(left - 88 - 88 - room - LAST_WORD_ROOM, 2))])
        try:
            seq = commit(writer, [write(0, b"8 bytes.")])
        except JournalFull:
            refused += 1
        else:
            writer.void([seq], 0)
        # And a gap can be declared, however full the journal is and whatever its cause.
        assert writer.last_word(fmt.Event.GAP_BEGIN, {"cause": "\N{DROPLET}" * 120, "since_ns": 1 << 62}) == writer.next_seq - 1
        with pytest.raises(JournalFull):
            commit(writer, [write(0, b"8 bytes.")])
        close(writer)
    assert 0 < refused < 50


def test_a_full_journal_leaves_the_writer_as_it_was(tmp_path: Path) -> None:
    recycling = Recycling.NO
    writer = writer_of(tmp_path, size=2 * MIB, recycle=lambda _: recycling)
    while True:
        seq = writer.next_seq
        try:
            commit(writer, [write(0, fill_byte(300_000, 1))])
        except JournalFull:
            break
    assert writer.next_seq == seq
    for _ in range(3):
        with pytest.raises(JournalFull):
            commit(writer, [write(0, fill_byte(300_000, 2))])
    recycling = Recycling.DROPS
    assert commit(writer, [write(0, fill_byte(300_000, 3))]) == seq
    assert [dropped.number for dropped in writer.dropped] == [1]
    close(writer)
    entries = list(journal_entries(tmp_path))
    assert entries[-1].record.seq == seq
    assert entries[-1].payload[0] == 3


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Writes beyond ``limit`` bytes of a file fail with EFBIG, after a part of them was done: a full disk's behaviour."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_storage_that_refuses_leaves_no_batch_behind(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    commit(writer, [write(0, b"first")])
    with file_size_limit(500_000), pytest.raises(JournalFull, match="File too large"):
        commit(writer, [write(0, fill_byte(600_000, 1))])
    assert len(list(journal_entries(tmp_path))) == 1
    assert commit(writer, [write(0, b"second")]) == 2
    close(writer)
    assert [entry.payload for entry in journal_entries(tmp_path)] == [b"first", b"second"]


WHOLE_PAGES = 25 * 4096 - fmt.BATCH.size - fmt.RECORD.size
"""Payload of a batch of one record that fills whole pages, bytes."""


def test_recycled_segments_never_show_their_earlier_life(tmp_path: Path) -> None:
    """Every batch has the same length, so that the stale ones lie exactly where the next one is looked for.

    They end where a page does: zeroes are written up to there.
    """
    writer = writer_of(tmp_path, recycle=lambda _: Recycling.DROPS)
    for i in range(205):
        commit(writer, [write(i, fill_byte(WHOLE_PAGES, i & 255))])
        last = [entry.record.seq for entry in journal_entries(tmp_path)][-1]
        assert last == i + 1
    close(writer)
    with Segment(segment_files(tmp_path)[-1].path) as segment:
        end = list(segment.batches())[-1].end
        assert os.pread(segment.fd, 8, end) == fmt.BATCH_MAGIC, "there is a stale batch, or this test tests nothing"


def test_stale_batches_of_another_run_never_count(tmp_path: Path) -> None:
    """The same batch numbers at the same offsets, but of another run, that end where a page does."""
    old = writer_of(tmp_path)
    for i in range(80):
        try:
            commit(old, [write(i, fill_byte(WHOLE_PAGES, 1))])
        except JournalFull:
            break
    close(old)
    pool = SegmentPool(tmp_path, 8 * MIB)
    pool.allot()
    new = JournalWriter(pool, UUID.bytes, RUN + 1, Clock(), lambda _: Recycling.DROPS, 1)
    commit(new, [write(0, fill_byte(WHOLE_PAGES, 2))])
    close(new)
    entries = list(journal_entries(tmp_path, RUN + 1))
    assert [entry.record.seq for entry in entries] == [1]
    (file,) = segment_files(tmp_path, RUN + 1)
    with Segment(file.path) as segment:
        (batch,) = segment.batches()
        stale = os.pread(segment.fd, fmt.BATCH.size, batch.end)
    assert stale[:8] == fmt.BATCH_MAGIC
    assert fmt.BATCH.unpack(stale)[3] == 2, "batch 2 is expected next and batch 2 of another run lies there"


def test_resuming_goes_on_behind_the_last_batch(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    for i in range(15):
        commit(writer, [write(i, fill_byte(100_000, i))])
    close(writer)
    files = segment_files(tmp_path)
    with Segment(files[-1].path) as segment:
        end = list(segment.batches())[-1].end
    pool = SegmentPool(tmp_path, 8 * MIB)
    pool.allot()
    again = JournalWriter(pool, UUID.bytes, RUN, Clock(), lambda _: Recycling.NO, 16, 16)
    again.resume(files[-1].path, files[-1].number, end, [file.path for file in files[:-1]])
    for i in range(15, 30):
        assert commit(again, [write(i, fill_byte(100_000, i))]) == i + 1
    finished, current, rolled = again.take_unsynced()
    assert rolled, "the names of earlier segments may not be durable either"
    synced = {os.fstat(fd).st_ino for fd in (*finished, current)}
    assert synced == {file.path.stat().st_ino for file in segment_files(tmp_path)}, "a flush covers what the last process wrote"
    for fd in (*finished, current):
        os.close(fd)
    assert [entry.payload[0] for entry in journal_entries(tmp_path)] == list(range(30))


def test_a_page_is_always_written_to_its_end(tmp_path: Path) -> None:
    """Of a segment that is not in the page cache a page that is written in part would have to be read first."""
    writer = writer_of(tmp_path, recycle=lambda _: Recycling.DROPS)
    for i in range(205):
        commit(writer, [write(i, fill_byte(100_000, 255))])
        with Segment(segment_files(tmp_path)[-1].path) as segment:
            end = list(segment.batches())[-1].end
            rest = -end % 4096
            assert os.pread(segment.fd, rest, end) == bytes(rest)
    close(writer)


def test_what_is_unsynced_is_handed_out_once(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    assert not writer.dirty
    for i in range(15):
        commit(writer, [write(i, fill_byte(100_000, i))])
    assert writer.dirty
    finished, _, rolled = writer.take_unsynced()
    assert (len(finished), rolled, writer.dirty) == (1, True, False)
    for fd in finished:
        os.close(fd)
    assert writer.take_unsynced()[::2] == ([], False)
    close(writer)


def test_events_are_records_of_the_whole_vm(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    assert writer.event(fmt.Event.BOOKMARK, {"name": "before the upgrade ☂"}) == 1
    close(writer)
    (entry,) = journal_entries(tmp_path)
    assert (entry.record.op, entry.record.flags, entry.record.disk) == (fmt.Op.EVENT, fmt.Event.BOOKMARK, fmt.ALL_DISKS)
    assert json.loads(entry.payload) == {"name": "before the upgrade ☂"}


@pytest.mark.parametrize("length", [1, 7, 8, 9, 511, 4096])
def test_payloads_are_padded_and_nothing_more(tmp_path: Path, length: int) -> None:
    writer = writer_of(tmp_path)
    writer.write(0, 512, fill_byte(length, 9), length)
    writer.write(0, 8192, None, 4096)
    close(writer)
    first, second = journal_entries(tmp_path)
    assert first.payload == fill_byte(length, 9)
    assert (second.record.op, second.record.length) == (fmt.Op.ZERO, 4096)
    (file,) = segment_files(tmp_path)
    with Segment(file.path) as segment:
        one, two = segment.batches()
        assert one.payload_length == fmt.padded(length)
        assert two.position == one.end
        assert os.pread(segment.fd, fmt.padded(length) - length, one.payload_position + length).strip(b"\0") == b""


def test_a_damaged_table_ends_the_prefix_and_a_damaged_payload_is_named(tmp_path: Path) -> None:
    writer = writer_of(tmp_path)
    for i in range(3):
        commit(writer, [write(i, fill_byte(4096, i))])
    close(writer)
    (file,) = segment_files(tmp_path)
    with Segment(file.path) as segment:
        batches = list(segment.batches())
        with open(file.path, "r+b") as raw:
            raw.seek(batches[1].payload_position + 100)
            raw.write(b"\xff")
        assert [segment.intact(batch) for batch in batches] == [True, False, True]
        with open(file.path, "r+b") as raw:
            raw.seek(batches[1].position + fmt.BATCH.size)
            raw.write(b"\xff")
        assert len(list(segment.batches())) == 1
