"""A merged table is a cache: damaged, stale or of segments that are damaged since, it never makes a moment wrong."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.history_tools import MadeHistory
from vmrewind.errors import CorruptionError, MomentError
from vmrewind.history import merging, stretches
from vmrewind.history.activity import events, flushes_before, writes
from vmrewind.history.changes import changed_ranges
from vmrewind.history.history import History
from vmrewind.history.merged import _BEGINNING, MergedTable
from vmrewind.history.merging import merge
from vmrewind.history.moments import format_time
from vmrewind.history.resolve import resolve
from vmrewind.history.sources import DamagedObject, LocalSource
from vmrewind.history.stretches import merged_directory
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal import pool
from vmrewind.journal.format import Op
from vmrewind.journal.reader import Batch, Segment, segment_files
from vmrewind.recover.bisect import Changes
from vmrewind.recover.files.search import _stretches, touches
from vmrewind.repository.segment import Rows

K = 1024
SIZE = 64 * K


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeHistory]:
    """Segments of four batches each: four that are merged two by two, a closed one, and one that goes on."""
    monkeypatch.setattr(pool, "SEGMENTS_MIN", 20)
    monkeypatch.setattr(stretches, "SEGMENTS_MIN", 1)
    monkeypatch.setattr(stretches, "SEGMENTS_MAX", 2)
    for module in (stretches, merging):
        monkeypatch.setattr(module, "VOID_DISTANCE_MAX", 2)
    made = MadeHistory(tmp_path, {"vda": SIZE}, journal_size=20 << 20)
    made.start()
    for number in range(6):
        for step in range(4):
            made.batch([(Op.WRITE, "vda", (number * 7 + step * 5) % 60 * K, bytes([8 * number + step + 1]) * 4 * K)])
        if number < 5:
            made.close_segment()
    made.ship_runs()
    assert [(stretch.first, stretch.last) for stretch in merge(made.journal)] == [(1, 2), (3, 4)]
    yield made


def tables(made: MadeHistory) -> list[Path]:
    return sorted(merged_directory(made.journal).iterdir())


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The tables whose layers are read meanwhile."""
    used: list[Path] = []
    read = MergedTable.layer
    with monkeypatch.context() as patch:
        patch.setattr(MergedTable, "layer", lambda table, disk: (used.append(table.path), read(table, disk))[1])
        yield used


def check(made: MadeHistory) -> None:
    """Every moment is what it was."""
    with made.open() as history:
        for seq in range(1, max(made.times) + 1):
            assert View.open(history, "vda", made.position(seq)).read(0, SIZE) == made.disk("vda").states[seq], seq


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))


def test_a_moment_reads_no_table_of_records_that_a_merged_one_stands_for(
    made: MadeHistory, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []
    read = Segment.readable_tables

    def noted(segment: Segment, *where: int) -> object:
        scanned.append(segment.path.name)
        return read(segment, *where)

    monkeypatch.setattr(Segment, "readable_tables", noted)
    last = max(made.times)
    with made.open() as history, counted(monkeypatch) as used:
        history.coverage("vda", history.branch())
        assert [event.kind for event in events(history, history.branch())] == [fmt.Event.START]
        assert View.open(history, "vda", made.position(last)).read(0, SIZE) == made.disk("vda").states[last]
    assert used == tables(made)
    # The first segment and the last one tell when coverage begins and ends; the last two are not merged.
    assert set(scanned) == {made.segment_paths()[number].name for number in (0, 4, 5)}


def test_a_damaged_table_is_done_without_and_made_anew(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tables(made)[0]
    whole = path.read_bytes()
    for at in sorted({0, 9, 20, 60, *range(90, len(whole), max(len(whole) // 12, 1)), len(whole) - 1}):
        flip(path, at)
        check(made)
        merge(made.journal)
        assert path.read_bytes() == whole, f"byte {at}"
    for cut in (whole[:-5], whole[:15], b""):
        path.write_bytes(cut)
        check(made)
        merge(made.journal)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("what", ["another format", "a damaged head", "of other segments"])
def test_the_keeper_is_told_of_a_table_that_cannot_be_used(made: MadeHistory, what: str) -> None:
    """It looks at names alone: whoever opens a history removes it."""
    assert stretches.next_stretch(made.journal) is None
    first, second = tables(made)
    whole = first.read_bytes()
    if what == "another format":
        first.write_bytes(b"VMRWMRG1" + whole[8:])
    elif what == "a damaged head":
        flip(first, 40)
    else:
        first.write_bytes(second.read_bytes())
    check(made)
    assert tables(made) == [second]
    assert (stretch := stretches.next_stretch(made.journal)) is not None and (stretch.first, stretch.last) == (1, 2)
    merge(made.journal)
    assert first.read_bytes() == whole
    with made.open() as history:
        assert all(source.table is not None for source in history.records(made.run).local[:4])


def test_a_table_that_cannot_be_opened_now_stays(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refused(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith(".table"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *rest, **more)

    before = tables(made)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        check(made)
    assert tables(made) == before


def test_a_table_of_a_segment_that_was_cut_and_written_on_is_not_used(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a recovery leaves it: the last batch of a segment never reached the disk, and another one took its place.
    path = made.segment_paths()[3]
    with Segment(path) as segment:
        *_, last = segment.batches()
        table, header = bytearray(last.table), segment.header
    other = b"other" * 820
    offset, length, disk, op, flags, _ = fmt.RECORD.unpack(table)
    data = other[:length]
    record = fmt.RECORD.pack(offset, length, disk, op, flags, xxhash.xxh3_64_intdigest(data))
    head = bytearray(
        fmt.BATCH.pack(fmt.BATCH_MAGIC, 0, header.run, last.number, last.time_ns + 1, last.first_seq, 1, 0, last.payload_length)
    )
    head[8:16] = xxhash.xxh3_64_intdigest(bytes(head[16:]) + record).to_bytes(8, "little")
    with open(path, "r+b") as file:
        file.seek(last.position)
        file.write(bytes(head) + record + data)
    states = made.disk("vda").states
    content = bytearray(states[last.first_seq - 1])
    content[offset : offset + length] = data
    states[last.first_seq] = bytes(content)
    for seq in range(last.first_seq + 1, max(made.times) + 1):
        del made.times[seq]
    first, second = tables(made)
    stale = second.read_bytes()
    with counted(monkeypatch) as used:
        check(made)
    assert second not in used and first in used
    assert len(merge(made.journal)) == 1
    assert second.read_bytes() != stale
    check(made)


def damaged_in_its_second_batch(made: MadeHistory) -> list[Batch]:
    """The third segment's batches, as they were before its second one was damaged."""
    path = made.segment_paths()[2]
    with Segment(path) as segment:
        batches = list(segment.batches())
    flip(path, batches[1].position + 20)
    return batches


def test_a_segment_that_is_damaged_since_its_table_was_made_costs_no_moment_that_the_table_knows(made: MadeHistory) -> None:
    batches = damaged_in_its_second_batch(made)
    states = made.disk("vda").states
    with made.open() as history:
        after = View.open(history, "vda", made.position(max(made.times)))
        assert after.read(0, SIZE) == states[max(made.times)], "its payloads are all there"
        with pytest.raises(MomentError, match="damaged at offset"):
            View.open(history, "vda", made.position(batches[2].first_seq))
        before = View.open(history, "vda", made.position(batches[0].last_seq))
        assert before.read(0, SIZE) == states[batches[0].last_seq]
    assert len(tables(made)) == 1, "it is not used any more"
    with made.open() as history, pytest.raises(MomentError, match="damaged at offset"):
        View.open(history, "vda", made.position(max(made.times)))
    assert merge(made.journal) == [], "a segment that does not reach up to the next is not merged"


def test_what_the_repository_has_stands_in_for_a_segment_damaged_since(made: MadeHistory) -> None:
    path = made.segment_paths()[2]
    with Segment(path) as segment:
        batches = list(segment.batches())
    made.ship(made.run, batches[0].first_seq, batches[-1].last_seq)
    flip(path, batches[1].position + 20)
    check(made)


def test_whoever_reads_single_records_is_told_of_a_segment_damaged_since(made: MadeHistory) -> None:
    damaged_in_its_second_batch(made)
    read: list[Rows] = []
    with made.open() as history, pytest.raises(DamagedObject, match="damaged at offset"):
        read += [rows for _, rows in history.records(made.run).select(0, 1, max(made.times))]


def damaged_between_records(made: MadeHistory) -> tuple[int, list[int]]:
    """A merged segment loses the end of a payload and the next batch's header: (where on the disk, the seqs that are lost)."""
    with Segment(made.segment_paths()[2]) as segment:
        batches = list(segment.batches())
    with open(made.segment_paths()[2], "r+b") as file:
        file.seek(batches[2].position - 100)
        file.write(bytes(200))
    return 19 * K, list(range(batches[2].first_seq, batches[3].last_seq + 1))


def check_without(made: MadeHistory, history: History, lost: list[int]) -> None:
    """From the first lost record on no moment is to be had, and until it all are."""
    for seq in range(1, max(made.times) + 1):
        if seq < lost[0]:
            found = View.open(history, "vda", made.position(seq)).read(0, 19 * K)
            assert found == made.disk("vda").states[seq][: 19 * K], seq
        else:
            with pytest.raises(MomentError, match="damaged at offset"):
                View.open(history, "vda", made.position(seq))


def test_no_record_is_missing_silently_after_a_read_that_failed(made: MadeHistory) -> None:
    offset, lost = damaged_between_records(made)
    last = made.position(max(made.times))
    with made.open() as history:
        branch = history.branch()
        assert history.coverage("vda", branch).holds_seq(0, last.seq), "the merged table knows"
        first = View.open(history, "vda", last)
        assert first.read(0, offset) == made.disk("vda").states[last.seq][:offset]
        with pytest.raises(CorruptionError, match="damaged at offset"):
            first.read(offset, K)
        assert first.read(0, offset) == made.disk("vda").states[last.seq][:offset], "what stands, stands"
        coverage = history.coverage("vda", branch)
        assert [coverage.holds_seq(0, seq) for seq in (lost[0] - 1, lost[0], last.seq)] == [True, False, False]
        with pytest.raises(MomentError):
            resolve(history, branch, f"seq:{lost[0]}", ["vda"])
        check_without(made, history, lost)


@pytest.mark.parametrize("shipped", [False, True])
def test_a_view_that_stands_goes_on_after_a_segment_was_noticed_to_be_cut(made: MadeHistory, shipped: bool) -> None:
    """What it holds of the segment is more than the segment has now."""
    last = made.position(max(made.times))
    content = made.disk("vda").states[last.seq]
    with Segment(made.segment_paths()[2]) as segment:
        batches = list(segment.batches())
    if shipped:
        made.ship(made.run, 1, last.seq)
    with made.open() as history:
        view = View.open(history, "vda", last)
        os.truncate(made.segment_paths()[2], batches[1].position + 60)
        with pytest.raises(DamagedObject) as damaged:
            history.records(made.run).local[2].rows(batches[0].first_seq, batches[3].last_seq)
        history.records(made.run).leave_out(damaged.value)
        assert history.records(made.run).local[2].last == batches[0].last_seq
        for offset in (19 * K, 25 * K, 19 * K):
            if shipped:
                assert view.read(offset, K) == content[offset : offset + K]
                continue
            between = f"a record between {batches[0].first_seq} and {batches[3].last_seq} is damaged"
            with pytest.raises(CorruptionError, match=between):
                view.read(offset, K)


@pytest.mark.parametrize("what", ["rows", "notes"])
def test_a_piece_never_gives_less_than_it_stands_for(made: MadeHistory, what: str) -> None:
    _, lost = damaged_between_records(made)
    with made.open() as history:
        records = history.records(made.run)
        piece = next(piece for piece in records.pieces(0) if piece.first <= lost[0] <= piece.last)
        assert isinstance(piece.source, LocalSource) and piece.source.table is not None
        # As somebody does who finds the table damaged, and tells nobody.
        piece.source.table.discard()
        for _ in range(2):
            with pytest.raises(DamagedObject, match="damaged at offset"):
                getattr(piece, what)
        check_without(made, history, lost)


def test_a_segment_that_is_damaged_after_its_tables_were_forgotten_gives_no_less(made: MadeHistory) -> None:
    for path in tables(made):
        path.unlink()
    with made.open() as history:
        assert View.open(history, "vda", made.position(max(made.times)))
        for source in history.records(made.run).local:
            source.forget()
        _, lost = damaged_between_records(made)
        check_without(made, history, lost)


def test_whoever_reads_single_records_goes_on_without_the_lost_ones(made: MadeHistory) -> None:
    _, lost = damaged_between_records(made)
    first, last = made.position(2), made.position(max(made.times))

    def ranges(history: History) -> None:
        with pytest.raises(MomentError, match="damaged at offset"):
            changed_ranges(history, "vda", last, first, K)
        assert changed_ranges(history, "vda", made.position(4), first, K)

    def bisected(history: History) -> None:
        changes = Changes(history, history.branch(), ["vda"], first, last)
        assert [change.position.seq for change in changes] == list(range(3, lost[0]))

    def touched(history: History) -> None:
        found = touches(history, history.branch(), "vda", (0, SIZE), (first, last))
        assert [touch.position.seq for touch in found] == list(range(3, lost[0]))

    def resolved(history: History) -> None:
        for moment in (f"seq:{lost[0]}", format_time(made.times[lost[0]])):
            with pytest.raises(MomentError, match="damaged at offset"):
                resolve(history, history.branch(), moment, ["vda"])
        assert resolve(history, history.branch(), f"seq:{lost[0] - 1}", ["vda"]).seq == lost[0] - 1

    def written(history: History) -> None:
        found = writes(history, history.branch(), made.times[1], last.time_ns, 3)
        assert int(found.operations.sum()) == len([seq for seq in made.times if seq > 1 and seq not in lost])

    def flushed(history: History) -> None:
        assert flushes_before(history, history.branch(), last, 3) == []

    tables_before = {path: path.read_bytes() for path in tables(made)}
    for look in (ranges, bisected, touched, resolved, written, flushed):
        for path, content in tables_before.items():
            path.write_bytes(content)
        with made.open() as history:
            look(history)


def test_changes_of_a_file_end_where_records_prove_lost(made: MadeHistory) -> None:
    """The damage is met while stretches are gone through: what came before stands."""
    _, lost = damaged_between_records(made)
    with made.open() as history:
        branch = history.branch()
        coverage = history.coverage("vda", branch)
        assert coverage.holds_seq(0, max(made.times)), "nobody has looked yet"
        found = list(_stretches(history, branch, "vda", (made.position(2), made.position(max(made.times)))))
        assert [int(stretch.rows["seq"][-1]) for stretch in found] == [lost[0] - 1]


def test_a_segment_that_proves_damaged_without_end_is_an_error(made: MadeHistory) -> None:
    with made.open() as history:
        source = history.records(made.run).local[0]
        tries: list[int] = []

        def never() -> None:
            tries.append(1)
            raise DamagedObject(source, CorruptionError("damaged"))

        with pytest.raises(DamagedObject):
            history.retrying(never)
        assert 2 * len(made.segment_paths()) < len(tries) <= 2 * len(made.segment_paths()) + 1


def reshaped(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another head for a table, with its right checksum."""
    whole = path.read_bytes()
    magic, length, _ = _BEGINNING.unpack(whole[: _BEGINNING.size])
    head = json.loads(whole[_BEGINNING.size : _BEGINNING.size + length])
    replaced = change(head)
    packed = json.dumps(head if replaced is None else replaced).encode()
    beginning = _BEGINNING.pack(magic, len(packed), xxhash.xxh3_64_intdigest(packed))
    path.write_bytes(beginning + packed + whole[_BEGINNING.size + length :])


SHAPES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda _: [1, 2],
    "no sections": lambda head: head.update(sections=[]),
    "no disks": lambda head: head.pop("disks") and None,
    "short members": lambda head: head.update(segments=[[1, 2]]),
    "members of another type": lambda head: [member.__setitem__(7, "there") for member in head["segments"]] and None,
    "counts of others": lambda head: head["disks"][0].update(counts=[1]),
    "no extents": lambda head: head["disks"][0].pop("extents") and None,
    "more extents than bytes": lambda head: head["disks"][0].update(extents=1 << 20),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_table_of_another_shape_is_done_without_and_made_anew(made: MadeHistory, shape: str) -> None:
    original = tables(made)[0].read_bytes()
    reshaped(tables(made)[0], SHAPES[shape])
    check(made)
    merge(made.journal)
    check(made)
    merge(made.journal)
    assert tables(made)[0].read_bytes() == original


def test_what_cannot_be_removed_keeps_no_table_from_being_made(made: MadeHistory) -> None:
    for path in tables(made):
        path.unlink()
    (merged_directory(made.journal) / "put here by hand").mkdir()
    table = merged_directory(made.journal) / stretches.Stretch(made.run, 1, 1).name
    table.mkdir()
    assert len(merge(made.journal)) >= 1
    check(made)


def test_a_recycled_segment_takes_its_table_along(made: MadeHistory) -> None:
    made.segment_paths()[0].unlink()
    old, kept = tables(made)
    with made.open() as history:
        assert [source.table is not None for source in history.records(made.run).local] == [False, True, True, False, False]
    (merged_directory(made.journal) / ".left.tmp").write_bytes(b"of a merger that was killed")
    merge(made.journal)
    assert tables(made) == [kept] and not old.exists()


def test_a_table_that_cannot_be_written_leaves_nothing_behind(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in tables(made):
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            merge(made.journal)
    assert tables(made) == []
    check(made)
    assert len(merge(made.journal)) == 2


def test_a_table_that_may_not_be_removed_is_done_without(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tables(made)[0]
    flip(path, path.stat().st_size - 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", full)
        check(made)
    assert path.exists()


def test_a_table_that_cannot_be_read_is_done_without(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    last = max(made.times)
    with made.open() as history:
        table = history.records(made.run).local[0].table
        assert table is not None
        read = os.pread

        def broken(fd: int, length: int, offset: int) -> bytes:
            if fd == table._fd:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(fd, length, offset)

        monkeypatch.setattr(os, "pread", broken)
        assert View.open(history, "vda", made.position(last)).read(0, SIZE) == made.disk("vda").states[last]


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_void_behind_a_stretch_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "SEGMENTS_MIN", 20)
    monkeypatch.setattr(stretches, "SEGMENTS_MIN", 1)
    monkeypatch.setattr(stretches, "SEGMENTS_MAX", 1)
    for module in (stretches, merging):
        monkeypatch.setattr(module, "VOID_DISTANCE_MAX", 4)
    made = MadeHistory(tmp_path, {"vda": SIZE}, journal_size=20 << 20)
    made.start()
    made.write("vda", 0, b"a" * 512)
    refused = made.write("vda", 0, b"b" * 512)
    made.close_segment()
    made.void(refused, "vda")
    assert merge(made.journal) == [], "its VOID may still come"
    made.close_segment()
    for _ in range(3):
        made.write("vda", 4096, b"c" * 512)
    made.close_segment()
    made.write("vda", 8192, b"d" * 512)
    assert [stretch.first for stretch in merge(made.journal)] == [1]
    with made.open() as history:
        for seq in range(refused, max(made.times) + 1):
            assert View.open(history, "vda", made.position(seq)).read(0, 512) == b"a" * 512
    assert len(segment_files(made.journal)) == 4
