"""A damaged journal: restored up to the damage, which is named; the repository's copy is used where there is one."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.history_tools import T0, MadeHistory
from vmrewind.errors import CorruptionError, MomentError
from vmrewind.history.activity import events, writes
from vmrewind.history.reading import read_whole
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment
from vmrewind.journal.verify import verify

K = 1024


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    """A run of about 62 records in three segments."""
    made = MadeHistory(tmp_path, {"vda": 64 * K})
    made.start()
    for i in range(60):
        made.write("vda", 4 * K, bytes([i + 1]) * (40 * K + 8 * i))
    assert len(made.segment_paths()) >= 3
    return made


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def test_a_damaged_table_ends_coverage_there_and_says_where(made: MadeHistory) -> None:
    path = made.segment_paths()[1]
    with Segment(path) as segment:
        batch = list(segment.batches())[3]
    flip(path, batch.position + fmt.BATCH.size + 3)
    with made.open() as history:
        branch = history.branch()
        with pytest.raises(MomentError) as caught:
            resolve(history, branch, "latest", ["vda"], made.now_ns)
        assert str(path) in str(caught.value)
        assert f"damaged at offset {batch.position}" in str(caught.value)
        assert f"(seq:{batch.first_seq - 1})" in caught.value.hint
        position = resolve(history, branch, f"seq:{batch.first_seq - 1}", ["vda"], made.now_ns)
        view = View.open(history, "vda", position)
        assert view.read(0, view.size) == made.disk("vda").states[position.seq]
        with pytest.raises(MomentError):
            resolve(history, branch, f"seq:{batch.first_seq}", ["vda"], made.now_ns)
        with pytest.raises(MomentError):
            View.open(history, "vda", made.position(batch.first_seq))


def test_damage_in_the_last_segment_is_not_taken_for_its_end(made: MadeHistory) -> None:
    path = made.segment_paths()[-1]
    with Segment(path) as segment:
        batches = list(segment.batches())
    assert len(batches) > 2
    flip(path, batches[1].position + 20)
    made.tick(60)
    with made.open() as history:
        for text in ("latest", "-1s"):
            with pytest.raises(MomentError, match=f"damaged at offset {batches[1].position}") as caught:
                resolve(history, history.branch(), text, ["vda"], made.now_ns)
            assert f"(seq:{batches[0].last_seq})" in caught.value.hint


def test_damage_just_before_the_last_batch_is_not_taken_for_a_torn_tail(made: MadeHistory) -> None:
    path = made.segment_paths()[-1]
    with Segment(path) as segment:
        batches = list(segment.batches())
    flip(path, batches[-2].position + 20)
    (report,) = [r for r in verify([path]) if r.path == path]
    assert [problem.offset for problem in report.problems] == [batches[-2].position]
    assert report.torn is None


def test_a_damaged_header_is_a_hole(made: MadeHistory) -> None:
    path = made.segment_paths()[1]
    with Segment(path) as segment:
        first = segment.header.first_seq
    flip(path, 40)
    with made.open() as history:
        with pytest.raises(MomentError) as caught:
            resolve(history, history.branch(), "latest", ["vda"], made.now_ns)
        assert str(path) in str(caught.value)
        assert f"(seq:{first - 1})" in caught.value.hint


def test_a_damaged_header_of_the_last_segment_ends_coverage(made: MadeHistory) -> None:
    path = made.segment_paths()[-1]
    flip(path, 40)
    with made.open() as history, pytest.raises(MomentError, match="checksum"):
        resolve(history, history.branch(), "latest", ["vda"], made.now_ns)


def test_a_damaged_payload_is_named_and_had_from_the_repository_if_it_is_there(made: MadeHistory) -> None:
    last = made.position(max(made.times))
    path = made.segment_paths()[-1]
    with Segment(path) as segment:
        batch = list(segment.batches())[-2]
    # An earlier record than the last: a damaged last one would be taken for a torn tail.
    flip(path, batch.payload_position + 100)
    seq = batch.first_seq
    with made.open() as history:
        view = View.open(history, "vda", made.position(seq))
        with pytest.raises(CorruptionError) as caught:
            view.read(0, view.size)
        assert str(path) in str(caught.value)
        assert f"record {seq}" in str(caught.value)
        assert "another copy" in caught.value.hint
        with pytest.raises(CorruptionError):
            list(read_whole([view]))
        after = View.open(history, "vda", last)
        assert after.read(0, after.size) == made.disk("vda").states[last.seq], "what was overwritten since is not missed"
    # (The helper reads the journal, so the byte is put right while it ships.)
    flip(path, batch.payload_position + 100)
    made.ship(made.run, seq - 1, seq + 1)
    flip(path, batch.payload_position + 100)
    with made.open() as history:
        view = View.open(history, "vda", made.position(seq))
        assert view.read(0, view.size) == made.disk("vda").states[seq]


def test_a_damaged_object_is_a_hole_unless_another_source_has_its_records(made: MadeHistory) -> None:
    made.ship_runs()
    last = max(made.times)
    made.ship(made.run, 1, 20)
    damaged = made.ship(made.run, 21, 40)
    made.ship(made.run, 41, last)
    path = made.repository_path / damaged.key
    path.chmod(0o600)
    flip(path, 150)
    with made.open() as history:
        assert resolve(history, history.branch(), "latest", ["vda"], made.now_ns).seq == last, "the journal has all of it"
    with made.open(local=False) as history:
        branch = history.branch()
        with pytest.raises(MomentError, match=damaged.key) as caught:
            resolve(history, branch, "seq:30", ["vda"], made.now_ns)
        assert "(seq:20)" in caught.value.hint
        view = View.open(history, "vda", resolve(history, branch, "seq:20", ["vda"], made.now_ns))
        assert view.read(0, view.size) == made.disk("vda").states[20]
        assert [event.position.seq for event in events(history, branch)] == [1]
        assert int(writes(history, branch, T0, made.now_ns, 4).operations.sum()) == last - 1 - 20
    # The payload of an object: found when it is read, with the record that it belongs to.
    flip(path, 150)
    flip(path, path.stat().st_size - 5)
    with made.open(local=False) as history:
        position = resolve(history, history.branch(), "seq:40", ["vda"], made.now_ns)
        with pytest.raises(CorruptionError, match=rf"{damaged.key}.*\(record 40\)"):
            View.open(history, "vda", position).read(0, 64 * K)
    with made.open() as history:
        view = View.open(history, "vda", made.position(40))
        assert view.read(0, view.size) == made.disk("vda").states[40]


def test_a_torn_tail_is_the_end_and_no_damage(made: MadeHistory) -> None:
    path = made.segment_paths()[-1]
    last = max(made.times)
    with Segment(path) as segment:
        batch = list(segment.batches())[-1]
    with open(path, "r+b") as file:
        file.seek(batch.payload_position + batch.payload_length // 2)
        file.write(bytes(batch.payload_length // 2))
    with made.open() as history:
        position = resolve(history, history.branch(), "latest", ["vda"], made.now_ns)
        assert position.seq == last - 1
    (report,) = [r for r in verify([made.journal]) if r.path == path]
    assert report.problems == []
    assert report.torn is not None
    assert report.last_seq == last - 1
    # If a head knows better, it was no tear.
    made.stop()
    (report,) = [r for r in verify([path, made.journal]) if r.path == path][:1]


def test_verify_finds_and_locates_every_flipped_byte(made: MadeHistory) -> None:
    made.stop()
    assert not any(report.problems or report.torn for report in verify([made.journal]))
    generator = random.Random(5)
    for path in made.segment_paths():
        with Segment(path) as segment:
            batches = list(segment.batches())
        end = batches[-1].end
        # One byte of each kind, and some anywhere: the parts of a batch, the header, its padding, the payloads' padding.
        places = {0, 9, 100, 200, fmt.SEGMENT_HEADER_SIZE - 1, end - 1}
        for batch in (batches[0], batches[len(batches) // 2], batches[-2], batches[-1]):
            places |= {
                batch.position,
                batch.position + 9,
                batch.position + 50,
                batch.position + fmt.BATCH.size,
                batch.payload_position,
            }
        places |= {generator.randrange(end) for _ in range(30)}
        for offset in sorted(places):
            flip(path, offset)
            (report,) = [r for r in verify([made.journal]) if r.path == path]
            assert report.problems, f"a flipped byte at {offset} of {path.name} was not seen"
            found = report.problems[0].offset
            holder = next((b for b in batches if b.position <= offset < b.end), None)
            low = 0 if holder is None else holder.position
            assert low <= found <= offset, f"a flipped byte at {offset} was located at {found}"
            flip(path, offset)
    assert not any(report.problems or report.torn for report in verify([made.journal]))


def test_verify_sees_a_segment_whose_successor_does_not_follow(made: MadeHistory) -> None:
    path = made.segment_paths()[1]
    with Segment(path) as segment:
        last = list(segment.batches())[-1]
    with open(path, "r+b") as file:
        file.seek(last.position)
        file.write(bytes(fmt.BATCH.size))
    reports = {report.path: report for report in verify([made.journal])}
    (problem,) = reports[path].problems
    assert problem.offset == last.position
    assert "begins with record" in problem.message


@pytest.mark.parametrize("size", [None, 10])
def test_a_damaged_last_object_is_not_taken_for_the_end(made: MadeHistory, size: int | None) -> None:
    made.stop()
    made.ship_runs()
    made.ship(made.run, 1, 40)
    damaged = made.ship(made.run, 41, max(made.times))
    path = made.repository_path / damaged.key
    path.chmod(0o600)
    if size is None:
        flip(path, 150)
    else:
        os.truncate(path, size)
    with made.open(local=False) as history:
        for text in ("latest", "-1s", f"seq:{max(made.times)}"):
            with pytest.raises(MomentError, match=damaged.key) as caught:
                resolve(history, history.branch(), text, ["vda"], made.now_ns)
            assert "(seq:40)" in caught.value.hint
    with made.open() as history:
        assert resolve(history, history.branch(), "latest", ["vda"], made.now_ns).seq == max(made.times), "the journal has it"
