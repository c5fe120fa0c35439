"""A bad sector in the journal costs what lies there, and nothing of that where the repository has it too."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bad_sectors import bad_sector
from tests.history_tools import MadeHistory
from vmrewind.capture.recovery import find_end
from vmrewind.errors import CorruptionError, MomentError
from vmrewind.history import merging, stretches
from vmrewind.history.merging import merge
from vmrewind.history.resolve import resolve
from vmrewind.history.stretches import merged_directory
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal import pool
from vmrewind.journal.format import Op
from vmrewind.journal.reader import Record, Segment, records

K = 1024
SIZE = 256 * K
STEPS = 3
"""Batches of a segment: each is neighbours on the disk, records that are neighbours in the file alone, and a long record."""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeHistory]:
    """Three segments, two of them closed."""
    monkeypatch.setattr(pool, "SEGMENTS_MIN", 20)
    made = MadeHistory(tmp_path, {"vda": SIZE}, journal_size=20 << 20)
    made.start()
    content = random.Random(1).randbytes
    for number in range(3):
        for step in range(STEPS):
            at = (number * STEPS + step) * 28 * K
            made.tick()
            made.batch(
                [(Op.WRITE, "vda", at + n * 4 * K, content(4 * K)) for n in (0, 1)]
                + [(Op.WRITE, "vda", at + n * 2 * K, content(1 * K)) for n in (5, 7, 4)]
                + [(Op.WRITE, "vda", at + 16 * K, content(12 * K))]
            )
        if number < 2:
            made.close_segment()
    made.ship_runs()
    yield made


def of(path: Path) -> list[list[Record]]:
    with Segment(path) as segment:
        return [list(records(batch)) for batch in segment.batches()]


def inside(record: Record) -> int:
    """Where nothing but payloads is: the first ones share a page with the table before, the last with the one behind."""
    return record.position + (record.length - 1 if record.length == 4 * K else 0)


def right(view: View, made: MadeHistory, *ranges: tuple[int, int]) -> None:
    for begin, end in ranges:
        assert view.read(begin, end - begin) == made.disk("vda").states[view.position.seq][begin:end], (begin, end)


@pytest.mark.parametrize("which", range(6))
def test_in_a_payload_it_is_damage_of_that_record_alone(made: MadeHistory, which: int) -> None:
    path = made.segment_paths()[1]
    record = [record for record in of(path)[1] if record.has_payload][which]
    last = made.position(max(made.times))
    with bad_sector(path, inside(record)), made.open() as history:
        view = View.open(history, "vda", last)
        for begin, end in (
            (record.offset, record.offset + record.length),
            (record.offset + record.length - 1, SIZE),
            (0, SIZE),
        ):
            with pytest.raises(CorruptionError, match=rf"{path}: .* record \d+ (cannot be read|is damaged) \(offset \d+"):
                view.read(begin, end - begin)
        low = of(path)[0][-1].offset
        high = of(path)[2][0].offset + 28 * K
        right(view, made, (0, low), (high, SIZE))
        with pytest.raises(CorruptionError, match=f"record {record.seq} cannot be read .*: Input/output error"):
            history.records(made.run).payload(
                history.records(made.run).local[1], 0, (1, last.seq), record.position, record.length, record.xxh3
            )


def test_what_the_repository_has_of_a_payload_stands_in(made: MadeHistory) -> None:
    path = made.segment_paths()[1]
    last = made.position(max(made.times))
    made.ship(made.run, 1, last.seq)
    for record in of(path)[1]:
        with bad_sector(path, inside(record)), made.open() as history:
            view = View.open(history, "vda", last)
            right(view, made, (record.offset + 1, record.offset + 2), (record.offset, record.offset + 3 * K), (0, SIZE))
            for _, extents in view.written_extents():
                for offset, part in view.parts(extents):
                    assert bytes(part) == made.disk("vda").content[offset : offset + len(part)], offset


def bad_places(made: MadeHistory, number: int) -> dict[str, tuple[int, int]]:
    """Where a segment may be bad: (offset, the first record that is lost)."""
    with Segment(made.segment_paths()[number]) as segment:
        batches = list(segment.batches())
        return {
            "header": (0, segment.header.first_seq),
            "table": (batches[-1].position, batches[-1].first_seq),
        }


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("place", ["header", "table"])
@pytest.mark.parametrize("shipped", [False, True])
def test_in_a_header_or_a_table_it_is_a_hole_that_the_repository_fills(
    made: MadeHistory, number: int, place: str, shipped: bool
) -> None:
    path = made.segment_paths()[number]
    offset, lost = bad_places(made, number)[place]
    end = max(made.times)
    if shipped:
        made.ship(made.run, 1, end)
    with bad_sector(path, offset), made.open() as history:
        branch = history.branch()
        for seq in range(1, end + 1):
            if not shipped and seq >= lost:
                with pytest.raises(MomentError, match=r"cannot be read: Input/output error|the last record is"):
                    resolve(history, branch, f"seq:{seq}", ["vda"])
                    View.open(history, "vda", made.position(seq))
            elif shipped or place == "header" or seq < lost - 6:
                right(View.open(history, "vda", resolve(history, branch, f"seq:{seq}", ["vda"])), made, (0, SIZE))


def test_where_nothing_was_written_yet_it_costs_nothing(made: MadeHistory) -> None:
    path = made.segment_paths()[2]
    end = of(path)[-1][-1]
    for offset in (end.position + end.length + 4096, path.stat().st_size - 1):
        with bad_sector(path, offset), made.open() as history:
            right(View.open(history, "vda", resolve(history, history.branch(), "latest", ["vda"])), made, (0, SIZE))


@pytest.mark.parametrize("before", [200, 32])
@pytest.mark.parametrize("closed", [False, True])
def test_in_a_table_that_begins_before_it_it_is_no_end_of_the_journal(made: MadeHistory, before: int, closed: bool) -> None:
    """The call gives less then, and no error: as at the end of a file."""
    path = made.segment_paths()[2]
    with Segment(path) as segment:
        *_, last = segment.batches()
    made.write("vda", 0, bytes((-last.end - before - fmt.BATCH.size - fmt.RECORD.size) % 4096 + 4096))
    lost = made.batch([(Op.WRITE, "vda", n * 4 * K, b"x" * 100) for n in range(6)])
    made.write("vda", 0, b"y" * 4096)
    with Segment(path) as segment:
        *_, batch, _ = segment.batches()
    assert -batch.position % 4096 == before and batch.first_seq == lost
    if closed:
        made.close_segment()
        made.write("vda", 0, b"z" * 4096)
    with bad_sector(path, batch.position + before), made.open() as history:
        with Segment(path) as segment, pytest.raises(OSError, match="Input/output error"):
            segment.tables()
        with pytest.raises(MomentError, match="cannot be read: Input/output error"):
            resolve(history, history.branch(), f"seq:{lost}" if closed else "latest", ["vda"])
        right(View.open(history, "vda", made.position(lost - 2)), made, (0, SIZE))


def test_in_the_last_payload_it_is_no_torn_tail(made: MadeHistory) -> None:
    path = made.segment_paths()[2]
    first, *_, last = of(path)[-1]
    with bad_sector(path, last.position + 8 * K), made.open() as history:
        with pytest.raises(MomentError, match=r"batch \d+ cannot be read"):
            resolve(history, history.branch(), "latest", ["vda"])
        right(View.open(history, "vda", made.position(first.seq - 1)), made, (0, SIZE))
    made.ship(made.run, 1, last.seq)
    with bad_sector(path, last.position + 8 * K), made.open() as history:
        right(View.open(history, "vda", resolve(history, history.branch(), "latest", ["vda"])), made, (0, SIZE))


def test_a_recovery_does_not_take_it_for_the_end(made: MadeHistory) -> None:
    path = made.segment_paths()[2]
    first, *_, last = of(path)[-1]
    whole = find_end(made.journal, made.run, 0)
    for offset in (last.position, first.position):
        with bad_sector(path, offset), pytest.raises(CorruptionError, match="cannot be read"):
            find_end(made.journal, made.run, 0)
    assert whole is not None and find_end(made.journal, made.run, 0) == whole


def test_too_many_open_files_are_no_damage(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refused(path: Any, *rest: Any, **more: Any) -> int:
        if Path(path) == made.segment_paths()[1]:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(path, *rest, **more)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(OSError, match="Too many open files"):
        made.open()


def test_merged_tables_are_had_of_what_can_be_read(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEGMENTS_MIN", "SEGMENTS_MAX"):
        monkeypatch.setattr(stretches, name, 1)
    monkeypatch.setattr(stretches, "VOID_DISTANCE_MAX", 0)
    monkeypatch.setattr(merging, "VOID_DISTANCE_MAX", 2)
    paths = made.segment_paths()
    last = made.position(max(made.times))
    tables = [merged_directory(made.journal) / stretches.Stretch(made.run, number, number).name for number in (1, 2)]
    # Of the last segment no table is made, and what voids records of those before may be in it.
    for number, place, made_of in ((0, "table", [2]), (1, "header", []), (2, "table", [1])):
        for path in tables:
            path.unlink(missing_ok=True)
        with bad_sector(paths[number], bad_places(made, number)[place][0]):
            assert [stretch.first for stretch in merge(made.journal)] == made_of, (number, place)
    merge(made.journal)
    for path, offset in ((tables[0], 0), (tables[0], tables[0].stat().st_size - 1), (paths[0], bad_places(made, 0)["header"][0])):
        with bad_sector(path, offset), made.open() as history:
            if path in tables:
                right(View.open(history, "vda", last), made, (0, SIZE))
            merge(made.journal)
        merge(made.journal)
    torn, _ = bad_places(made, 0)["table"]
    made.ship(made.run, 1, last.seq)
    with bad_sector(paths[0], torn), made.open() as history:
        right(View.open(history, "vda", last), made, (0, SIZE))
