"""What is shipped in which order, worked out from runs and from what is there."""

from __future__ import annotations

from dataclasses import replace

from vmrewind.journal.runs import Discontinuity, DiskInfo, Position, RunInfo
from vmrewind.repository.layout import SegmentName
from vmrewind.ship.coverage import SEQ_MAX, Coverage
from vmrewind.ship.plan import make_plan


def run_info(
    run: int, first_seq: int = 1, parent: tuple[int, int] | None = None, bases: str = "", gaps: str = "", disks: str = "ab"
) -> RunInfo:
    position = None if parent is None else Position(*parent, 0)
    infos = tuple(DiskInfo(i, target, 1, "raw", "/") for i, target in enumerate(disks))
    return RunInfo(
        run, position, "vm", "u", "h", 0, first_seq, infos, dict.fromkeys(bases, "id"), {t: Discontinuity("", 0) for t in gaps}
    )


def plan(
    runs: list[RunInfo], disks: str, *shipped: tuple[int, int, int, int], held: set[int] | None = None
) -> tuple[list[tuple[object, ...]], bool]:
    """(entries as (run, first, last, mask, cut), whether live ones go out beside the backlog); the last entry is the live one."""
    coverage = Coverage(SegmentName(*s, "vm") for s in shipped)
    every = {info.run: info for info in runs}
    made = make_plan(every, sorted(disks), coverage, every.keys() if held is None else held)
    entries = [*made.backlog, *([made.live] if made.live else [])]
    return [(e.run, e.first, e.last, e.mask, e.cut) for e in entries], made.live_now


FIRST = run_info(1, bases="ab")


def test_without_runs_there_is_nothing_to_do() -> None:
    assert plan([], "ab") == ([], False)
    assert plan([FIRST], "z") == ([], False)
    assert plan([FIRST], "") == ([], False)


def test_a_run_is_shipped_from_its_start() -> None:
    assert plan([FIRST], "ab") == ([(1, 1, None, 0b11, None)], True)
    assert plan([FIRST], "b") == ([(1, 1, None, 0b10, None)], True)


def test_it_goes_on_behind_what_is_there() -> None:
    assert plan([FIRST], "ab", (1, 1, 9, 3), (1, 10, 12, 3)) == ([(1, 13, None, 0b11, None)], True)


def test_what_is_missing_in_between_is_filled_first() -> None:
    entries = [(1, 10, 19, 0b11, None), (1, 30, None, 0b11, None)]
    assert plan([FIRST], "ab", (1, 1, 9, 3), (1, 20, 29, 3)) == (entries, False)


def test_a_disk_switched_on_later_catches_up_beside_the_others() -> None:
    assert plan([FIRST], "ab", (1, 1, 99, 1)) == ([(1, 1, 99, 0b10, None), (1, 100, None, 0b11, None)], True)


def test_a_disk_switched_off_and_on_again_misses_nothing() -> None:
    shipped = [(1, 1, 50, 3), (1, 51, 99, 1)]
    assert plan([FIRST], "ab", *shipped) == ([(1, 51, 99, 0b10, None), (1, 100, None, 0b11, None)], True)


def test_parents_are_completed_first_back_to_each_disks_base() -> None:
    runs = [
        FIRST,
        run_info(2, 101, (1, 100), bases="a"),
        run_info(3, 201, (2, 200)),
    ]
    assert plan(runs, "ab") == (
        [(1, 1, None, 0b10, 100), (2, 101, None, 0b11, 200), (1, 1, None, 0b01, None), (3, 201, None, 0b11, None)],
        False,
    )
    branch = [(2, 101, None, 0b01, 200), (3, 201, None, 0b01, None)]
    assert plan(runs, "a", held={2, 3}) == (branch, False)
    assert plan(runs, "a") == ([branch[0], (1, 1, None, 0b01, None), branch[1]], False)


def test_a_gap_ends_the_branch_of_its_disk() -> None:
    runs = [FIRST, run_info(2, 101, (1, 100), bases="a", gaps="a")]
    assert plan(runs, "ab", held={2}) == ([(1, 1, None, 0b10, 100), (2, 101, None, 0b11, None)], True)
    entries = [(1, 1, None, 0b10, 100), (1, 1, None, 0b01, None), (2, 101, None, 0b11, None)]
    assert plan(runs, "ab") == (entries, True)


def test_a_run_off_the_branch_is_carried_last_while_it_is_here_and_holds_nothing_up() -> None:
    runs = [FIRST, run_info(2, 101, (1, 100)), run_info(3, 51, (1, 50))]
    entries = [(1, 1, None, 1, 50), (2, 101, None, 1, None), (3, 51, None, 1, None)]
    assert plan(runs, "a") == (entries, False)
    assert plan(runs, "a", (1, 1, SEQ_MAX, 1)) == (entries[1:], True)
    assert plan(runs, "a", (2, 101, 110, 1))[0] == [entries[0], (2, 111, None, 1, None), entries[2]]
    assert plan(runs, "a", held={1, 3})[0] == [entries[0], entries[2]]


def test_what_is_known_to_be_complete_is_not_looked_for() -> None:
    runs = [FIRST, run_info(2, 101, (1, 100))]
    assert plan(runs, "a", (1, 1, SEQ_MAX, 1)) == ([(2, 101, None, 1, None)], True)


def test_a_disks_number_is_its_runs_own() -> None:
    runs = [run_info(1, bases="ab", disks="ba"), run_info(2, 101, (1, 100), disks="acb")]
    assert plan(runs, "a")[0] == [(1, 1, None, 0b10, 100), (2, 101, None, 0b001, None)]
    assert plan(runs, "c")[0] == [(2, 101, None, 0b010, None)]


def test_a_parent_that_is_not_described_here_is_not_waited_for() -> None:
    assert plan([replace(FIRST, run=5, bases={}, parent=Position(4, 7, 0))], "a")[0] == [(5, 1, None, 1, None)]
