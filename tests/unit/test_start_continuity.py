"""Whether a history can be gone on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_sectors import bad_sector, unreadable
from tests.history_tools import MadeHistory
from vmrewind.journal import format as fmt
from vmrewind.journal.closed_gaps import note_gap_closed
from vmrewind.journal.runs import Discontinuity, Position
from vmrewind.ship.noted import forget_shipped_elsewhere
from vmrewind.start.continuity import gap_closed, goes_on


def history(tmp_path: Path) -> tuple[MadeHistory, Position]:
    made = MadeHistory(tmp_path, {"vda": 65536})
    run = made.start()
    for number in range(40):
        made.write("vda", 0, bytes([number]) * 65536)
    first_end = made.stop()
    made.start(parent=first_end)
    made.write("vda", 0, b"second run")
    made.ship(run, 1, first_end.seq)
    return made, made.stop()


def goes(made: MadeHistory, end: Position) -> bool:
    return goes_on(made.journal, made.repository, made.infos.values(), end, "vda", 65536)


def test_a_run_of_which_no_segment_is_left_here_is_had_from_the_repository(tmp_path: Path) -> None:
    made, end = history(tmp_path)
    assert goes(made, end)
    parent = made.infos[made.run].parent
    assert parent is not None
    for path in made.segment_paths():
        if path.name.startswith(f"{parent.run:016x}"):
            path.unlink()
    assert goes(made, end)


def test_a_run_of_which_nothing_is_left_anywhere_ends_it(tmp_path: Path) -> None:
    made, end = history(tmp_path)
    for path in made.segment_paths():
        path.unlink()
    assert not goes(made, end)


def test_a_hole_between_segments_ends_it(tmp_path: Path) -> None:
    made = MadeHistory(tmp_path, {"vda": 65536})
    made.start()
    for number in range(60):
        made.write("vda", 0, bytes([number]) * 60000)
    end = made.stop()
    assert goes(made, end)
    made.segment_paths()[1].unlink()
    assert not goes(made, end)


@pytest.mark.parametrize(
    ("closed_by", "goes_on_then"), [("nobody", False), ("record", True), ("note", True), ("note of a lost record", False)]
)
def test_a_gap_that_was_closed_is_none_though_the_record_that_says_so_is_recycled(
    tmp_path: Path, closed_by: str, goes_on_then: bool
) -> None:
    made = MadeHistory(tmp_path, {"vda": 65536})
    made.start()
    made.write("vda", 0, b"first run")
    first_end = made.stop()
    run = made.start(parent=first_end, gaps={"vda": Discontinuity("somebody wrote to it", first_end.time_ns)})
    assert made.writer is not None
    if closed_by == "record":
        made.writer.event(fmt.Event.GAP_END, {"resynced": "vda"}, 0)
    end = made.stop()
    if closed_by.startswith("note"):
        note_gap_closed(made.journal, run, 0, end.seq + (1 if "lost" in closed_by else 0))
    assert goes(made, end) is goes_on_then


@pytest.mark.parametrize(
    ("word", "stays"),
    [('{"repository": "a", "runs": {}}', True), ('{"repository": "b", "runs": {}}', False), ('{"runs": {}}', False), ("", False)],
)
def test_what_was_shipped_to_another_repository_is_not_shipped(tmp_path: Path, word: str, stays: bool) -> None:
    forget_shipped_elsewhere(tmp_path, "a")
    path = tmp_path / "shipped.json"
    path.write_text(word)
    forget_shipped_elsewhere(tmp_path, "a")
    assert path.exists() is stays


def test_a_segment_that_cannot_be_read_is_had_from_the_repository_or_ends_it(tmp_path: Path) -> None:
    made, end = history(tmp_path)
    unreadable(made.segment_paths()[0])
    assert goes(made, end)
    unreadable(made.segment_paths()[-1])
    assert not goes(made, end)


def test_where_a_gap_that_was_closed_cannot_be_read_it_is_open(tmp_path: Path) -> None:
    made, end = history(tmp_path)
    path = made.segment_paths()[-1]
    assert path.name.startswith(f"{end.run:016x}")
    with bad_sector(path, fmt.SEGMENT_HEADER_SIZE):
        assert not gap_closed(made.journal, end.run, 0, end.seq)


def test_a_word_of_ships_that_cannot_be_read_is_taken_back(tmp_path: Path) -> None:
    unreadable(tmp_path / "shipped.json")
    forget_shipped_elsewhere(tmp_path, "here")
    assert not (tmp_path / "shipped.json").is_symlink()
