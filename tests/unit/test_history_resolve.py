"""Which record a moment means, what is covered, and what is said about the rest: on journals made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.history_tools import NS, T0, MadeHistory
from vmrewind.errors import MomentError, RepositoryError, VmStateError
from vmrewind.history.activity import events, writes
from vmrewind.history.bookmarks import bookmarks
from vmrewind.history.history import History
from vmrewind.history.moments import format_time
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal.pool import Recycling
from vmrewind.journal.reader import Segment
from vmrewind.journal.runs import Discontinuity

K = 1024


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    """One run: START 1, writes 2 and 3, bookmark 4, write 5; one second apart, from T0 + 1 s on."""
    made = MadeHistory(tmp_path, {"vda": 64 * K, "vdb": 32 * K})
    made.start()
    made.write("vda", 0, b"a" * 512)
    made.write("vdb", 512, b"b" * 512)
    made.mark("before upgrade")
    made.write("vda", 512, b"c" * 512)
    return made


def where(made: MadeHistory, history: History, text: str, *targets: str, branch: str | None = None) -> int:
    found = resolve(history, history.branch(branch), text, targets or ("vda", "vdb"), made.now_ns)
    assert found.time_ns == made.times[found.seq]
    return found.seq


def refused(made: MadeHistory, history: History, text: str, *targets: str, branch: str | None = None) -> MomentError:
    with pytest.raises(MomentError) as caught:
        resolve(history, history.branch(branch), text, targets or ("vda", "vdb"), made.now_ns)
    return caught.value


def test_each_form_means_the_last_record_until_then(made: MadeHistory) -> None:
    made.tick(10)
    with made.open() as history:
        assert where(made, history, "latest") == 5
        assert where(made, history, "seq:3") == 3
        assert where(made, history, "@before upgrade") == 4
        assert where(made, history, format_time(made.times[3])) == 3
        assert where(made, history, format_time(made.times[3] - 1)) == 2
        assert where(made, history, format_time(made.times[4] - 1)) == 3
        assert where(made, history, "-10s") == 5
        assert where(made, history, "-10.5s") == 4
        assert where(made, history, "-0s") == 5, "the journal is here, so nothing happened since"


def test_the_future_and_the_time_before_are_refused_with_the_nearest(made: MadeHistory) -> None:
    made.tick(10)
    with made.open() as history:
        error = refused(made, history, format_time(made.now_ns + NS))
        assert "future" in str(error)
        assert "seq:5" in error.hint
        error = refused(made, history, format_time(T0))
        assert format_time(made.times[1]) in error.hint
        assert "(seq:1)" in error.hint
        assert "last record is 5" in str(refused(made, history, "seq:6"))
        assert "begins with record 1" in str(refused(made, history, "seq:0"))


def test_bookmarks_that_are_unknown_or_ambiguous(made: MadeHistory) -> None:
    with made.open() as history:
        assert "@before upgrade" in refused(made, history, "@before upgrad").hint
    made.mark("before upgrade")
    with made.open() as history:
        error = refused(made, history, "@before upgrade")
        assert "seq:4" in str(error)
        assert "seq:6" in str(error)
        assert format_time(made.times[4]) in str(error)
        assert format_time(made.times[6]) in str(error)
        assert [mark.name for mark in bookmarks(history, history.branch())] == ["before upgrade"] * 2


def damaged_bookmark(made: MadeHistory) -> None:
    with Segment(made.segment_paths()[0]) as segment:
        batch = next(batch for batch in segment.batches() if batch.first_seq == 4)
    with open(segment.path, "r+b") as file:
        file.seek(batch.payload_position + 3)
        file.write(bytes(2))


def test_a_bookmark_that_is_damaged_here_is_had_from_the_repository(made: MadeHistory) -> None:
    made.ship(made.run, 1, 5)
    made.ship_runs()
    damaged_bookmark(made)
    with made.open() as history:
        assert where(made, history, "@before upgrade") == 4


def test_a_bookmark_that_cannot_be_read_is_told(made: MadeHistory) -> None:
    made.mark("after upgrade")
    damaged_bookmark(made)
    with made.open() as history:
        error = refused(made, history, "@before upgrade")
        assert "there are: @after upgrade; a bookmark at seq 4 cannot be read: " in error.hint
        assert "there are: @after upgrade; " in refused(made, history, "@0").hint
        assert where(made, history, "@after upgrade") == 6


def test_after_a_clean_stop_time_goes_on_and_the_next_run_continues(made: MadeHistory) -> None:
    end = made.stop()
    made.tick(3600)
    with made.open() as history:
        assert where(made, history, "-1m") == end.seq
    made.start(parent=end)
    last = made.write("vda", 4096, b"second run")
    with made.open() as history:
        branch = history.branch()
        coverage = history.coverage("vda", branch)
        assert len(coverage.intervals) == 1
        assert coverage.gaps == []
        assert where(made, history, "latest") == last
        assert where(made, history, "-1h") == end.seq
        assert where(made, history, "seq:2") == 2
        assert (
            View.open(history, "vda", resolve(history, branch, "latest", ["vda"], made.now_ns)).read(0, 64 * K)
            == (made.disk("vda").states[last])
        )


def test_a_rewind_makes_a_branch_and_both_can_be_restored(made: MadeHistory) -> None:
    back = made.position(3)
    abandoned = {seq: made.disk("vda").states[seq] for seq in (4, 5)}
    made_time_4 = made.times[4]
    end = made.stop()
    old = made.run
    made.go_back(back)
    made.tick(60)
    made.start(parent=back)
    newer = made.write("vda", 512, b"NEW")
    with made.open() as history:
        assert where(made, history, "latest") == newer
        assert where(made, history, "seq:3") == 3
        position = resolve(history, history.branch(), "seq:5", ["vda"], made.now_ns)
        assert position.run == made.run
        assert View.open(history, "vda", position).read(0, 64 * K) == made.disk("vda").states[5]
        assert where(made, history, format_time(made_time_4 - 1)) == 3
        refused(made, history, format_time(made_time_4))
        # The time that was given up does not belong to the new branch, and is refused with where it is found.
        error = refused(made, history, format_time(end.time_ns))
        assert "taken back to record 3" in str(error)
        assert f"{old:016x}" in str(error)
        on_old = resolve(history, history.branch(f"{old:016x}"), "seq:5", ["vda"], made.now_ns)
        assert on_old.run == old
        assert View.open(history, "vda", on_old).read(0, 64 * K) == abandoned[5]
        assert len(history.coverage("vda", history.branch()).intervals) == 2


def test_a_branch_is_chosen_by_a_unique_prefix(made: MadeHistory) -> None:
    made.start(parent=made.stop(), run=0x100)
    made.start(parent=made.stop(), run=0x101)
    with made.open() as history:
        assert history.branch().run == 0x101
        assert history.branch("101").run == 0x101
        assert history.branch(f"{0x100:016x}").run == 0x100
        with pytest.raises(MomentError, match="several"):
            history.branch("10")
        with pytest.raises(MomentError, match="no run"):
            history.branch("abc")


def test_a_changed_image_is_a_gap_for_that_disk_alone(made: MadeHistory) -> None:
    end = made.stop()
    made.tick(60)
    made.disk("vdb").content[:3] = b"???"
    gaps = {"vdb": Discontinuity("the image was changed while the VM was off", end.time_ns)}
    made.start(parent=end, bases=["vdb"], gaps=gaps)
    last = made.write("vdb", 0, b"!!!")
    with made.open() as history:
        assert where(made, history, "-30s", "vda") == end.seq
        error = refused(made, history, "-30s")
        assert "vdb" in str(error)
        assert "changed while the VM was off" in str(error)
        assert f"(seq:{end.seq})" in error.hint
        assert f"(seq:{end.seq + 1})" in error.hint
        for seq in (3, end.seq, end.seq + 1, last):
            position = resolve(history, history.branch(), f"seq:{seq}", ["vdb"], made.now_ns)
            assert View.open(history, "vdb", position).read(0, 32 * K) == made.disk("vdb").states[seq]


def test_a_void_record_never_happened_even_at_its_own_moment(made: MadeHistory) -> None:
    before = made.disk("vda").states[5]
    seq = made.write("vda", 0, b"refused by the image")
    made.void(seq, "vda")
    with made.open() as history:
        for at in (seq, seq + 1):
            view = View.open(history, "vda", made.position(at))
            assert view.read(0, view.size) == before


def test_what_was_recycled_comes_from_the_repository(made: MadeHistory) -> None:
    made.ship(made.run, 1, 5)
    made.ship_runs()
    made.recycling = Recycling.FREE
    run = made.run
    while made.segment_paths()[0].name.endswith("00000001.seg"):
        last = made.write("vda", 8 * K, bytes([len(made.times) % 255 + 1]) * 32 * K)
    with made.open() as history:
        first_local = history.records(run).local[0].first
        # The journal begins later than what was shipped ends: between them is a hole.
        error = refused(made, history, "latest")
        assert f"records 6 to {first_local - 1} of run {run:016x} were recycled before they were shipped" in str(error)
        assert "(seq:5)" in error.hint
        assert where(made, history, "seq:4") == 4
        with pytest.raises(MomentError, match="recycled before they were shipped"):
            View.open(history, "vda", made.position(last))
    made.recycling = Recycling.NO


def test_a_hole_in_the_journal_is_filled_by_the_repository(made: MadeHistory) -> None:
    for i in range(60):
        last = made.write("vda", 4 * K, bytes([i + 1]) * 40 * K)
    paths = made.segment_paths()
    assert len(paths) >= 3
    with made.open() as history:
        middle = history.records(made.run).local[1]
        hole = (middle.first, middle.last)
    made.ship(made.run, hole[0] - 1, hole[1] + 1)
    paths[1].unlink()
    with made.open() as history:
        assert where(made, history, "latest") == last
        for seq in (hole[0], hole[1], last):
            view = View.open(history, "vda", made.position(seq))
            assert view.read(0, view.size) == made.disk("vda").states[seq]
    with made.open(repository=False) as history:
        assert f"{hole[0]} to {hole[1]}" in str(refused(made, history, "latest"))


def test_with_the_journal_gone_coverage_ends_with_what_was_shipped(made: MadeHistory) -> None:
    made.ship_runs()
    made.ship(made.run, 1, 2)
    made.ship(made.run, 3, 4)
    made.tick(60)
    with made.open(local=False) as history:
        assert where(made, history, "latest") == 4
        assert where(made, history, "seq:4") == 4
        error = refused(made, history, "-1s")
        assert "nothing is known of it after" in str(error)
        assert "(seq:4)" in error.hint
    # Once the end of the run was shipped, nothing can have happened since.
    end = made.stop()
    made.ship(made.run, 5, end.seq)
    made.tick(60)
    with made.open(local=False) as history:
        assert where(made, history, "-1s") == end.seq


def test_disks_shipped_apart_are_covered_apart(made: MadeHistory) -> None:
    made.ship_runs()
    made.ship(made.run, 1, 4, ["vda"])
    made.ship(made.run, 1, 3, ["vdb"])
    made.ship(made.run, 5, 5, ["vda", "vdb"])
    with made.open(local=False) as history:
        assert where(made, history, "latest", "vda") == 5
        error = refused(made, history, "latest", "vdb")
        assert "record 4 of run" in str(error)
        assert resolve(history, history.branch(), "seq:3", ["vda", "vdb"], made.now_ns).seq == 3
        assert "vdb" in str(refused(made, history, "seq:4"))
        for seq in (2, 3):
            view = View.open(history, "vdb", made.position(seq))
            assert view.read(0, view.size) == made.disk("vdb").states[seq]


def test_a_gap_in_the_journal_ends_with_it(made: MadeHistory) -> None:
    begin = made.event(fmt.Event.GAP_BEGIN, {})
    inside = made.write("vda", 0, b"resync")
    end = made.event(fmt.Event.GAP_END, {})
    last = made.write("vda", 0, b"after")
    with made.open() as history:
        for seq in (begin, inside):
            error = refused(made, history, f"seq:{seq}")
            assert f"gap from record {begin}" in str(error)
            assert f"(seq:{begin - 1})" in error.hint
            assert f"(seq:{end})" in error.hint
            assert "gap" in str(refused(made, history, format_time(made.times[seq])))
        assert where(made, history, f"seq:{end}") == end
        assert where(made, history, "latest") == last


def test_a_gap_that_never_ended(made: MadeHistory) -> None:
    begin = made.event(fmt.Event.GAP_BEGIN, {})
    made.write("vda", 0, b"x")
    with made.open() as history:
        assert f"(seq:{begin - 1})" in refused(made, history, "latest").hint
    end = made.stop()
    made.start(parent=end)
    with made.open() as history:
        assert "gap" in str(refused(made, history, "latest"))


def test_overlapping_objects_are_used_once(made: MadeHistory) -> None:
    made.ship_runs()
    made.ship(made.run, 1, 3)
    made.ship(made.run, 2, 5)
    made.ship(made.run, 1, 5, ["vda"])
    with made.open(local=False) as history:
        assert where(made, history, "latest") == 5
        assert [e.kind for e in events(history, history.branch())] == [fmt.Event.START, fmt.Event.BOOKMARK]
        view = View.open(history, "vda", made.position(5))
        assert view.read(0, view.size) == made.disk("vda").states[5]
        written = writes(history, history.branch(), T0, made.now_ns, 6)
        assert int(written.bytes.sum()) == 3 * 512
        assert written.operations.tolist() == [0, 0, 1, 1, 0, 1]


def test_an_object_without_rows_covers_its_range(made: MadeHistory) -> None:
    made.ship_runs()
    made.ship(made.run, 1, 1)
    made.ship(made.run, 2, 2, ["vdb"])
    made.ship(made.run, 3, 5)
    with made.open(local=False) as history:
        assert where(made, history, "seq:5", "vdb") == 5
        assert resolve(history, history.branch(), format_time(made.times[2]), ["vdb"], made.now_ns).seq == 1
        assert resolve(history, history.branch(), "seq:2", ["vdb"], made.now_ns).seq == 2


def test_without_the_repository_the_timeline_works_and_reading_says_what_is_missing(made: MadeHistory) -> None:
    problem = RepositoryError("repo: not mounted", "mount it")
    with History.open("web01", made.journal, None, bases=made.directory / "bases", problem=problem) as history:
        assert where(made, history, "latest") == 5
        # The bases are all zeroes here, so that nothing of them must be read.
        assert View.open(history, "vda", made.position(5)).read(0, 1024) == made.disk("vda").states[5][:1024]
        with pytest.raises(RepositoryError, match="not mounted"):
            history.reachable_repository("chunk")
    with History.open("web01", made.journal, None) as history:
        error = refused(made, history, "latest")
        assert "no moment of disk vda can be restored" in str(error)
        assert "vmrewind backup web01" in error.hint and "protected start" in error.hint


def test_a_vm_without_history(tmp_path: Path) -> None:
    with History.open("web01", tmp_path / "none", None) as history, pytest.raises(VmStateError, match="no history"):
        history.branch()


def test_a_lost_parent_leaves_what_stands_on_its_own_base(made: MadeHistory) -> None:
    end = made.stop()
    first = made.run
    made.start(parent=end, bases=["vdb"])
    last = made.write("vdb", 0, b"x")
    (made.journal / "runs" / f"{first:016x}.json").unlink()
    with made.open() as history:
        assert where(made, history, "latest", "vdb") == last
        assert f"run {first:016x}" in str(refused(made, history, "latest", "vda"))


def undone_run(made: MadeHistory) -> tuple[int, int]:
    """A run that was taken back to its beginning, and the run after that; the repository knows of both."""
    end = made.stop()
    made.ship(made.run, 1, end.seq)
    undone = made.start(parent=end)
    made.write("vda", 0, b"B" * 512)
    made.stop()
    made.go_back(end)
    after = made.start(parent=end)
    made.write("vda", 0, b"C" * 512)
    made.ship_runs()
    return undone, after


def test_an_undone_run_that_was_recycled_is_not_taken_for_its_parent(made: MadeHistory) -> None:
    undone, _ = undone_run(made)
    with made.open() as history:
        assert resolve(history, history.branch(f"{undone:x}"), "latest", ["vda"], made.now_ns).run == undone
    for path in made.segment_paths():
        if path.name.startswith(f"{undone:016x}"):
            path.unlink()
    for local in (True, False):
        with made.open(local=local) as history:
            with pytest.raises(MomentError, match=r"recycled before they were shipped|are not in the repository") as caught:
                resolve(history, history.branch(f"{undone:x}"), "latest", ["vda"], made.now_ns)
            assert f"{undone:016x}" in str(caught.value)


def test_a_run_without_records_is_as_its_parent_only_if_its_journal_is_here(made: MadeHistory) -> None:
    end = made.stop()
    made.ship_runs()
    made.ship(made.run, 1, end.seq)
    newest = made.start(parent=end)
    made.ship_runs()
    path = made.segment_paths()[-1]
    with Segment(path) as segment:
        (start,) = segment.batches()
    with open(path, "r+b") as file:
        file.seek(start.position)
        file.write(bytes(start.end - start.position))
    with made.open() as history:
        assert where(made, history, "latest") == end.seq
    with made.open(local=False) as history:
        error = refused(made, history, "latest")
        assert f"run {newest:016x} are not in the repository" in str(error)
        assert f"(seq:{end.seq})" in error.hint


@pytest.mark.parametrize("text", ["seq:99999999999999999999", "9998-12-31T23:59:59Z", "1970-01-01T00:00:00Z"])
def test_moments_far_off_are_refused_in_words(made: MadeHistory, text: str) -> None:
    with made.open() as history:
        assert "nearest possible moment" in refused(made, history, text).hint
