"""Who has a VM now, told by the tree of its runs: takeovers, failbacks, forced branches, images that were moved by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.history_tools import UUID, VM
from vmrewind.history.branch import choose_run
from vmrewind.history.succession import Successor, look, overrule, read_overruled, successor
from vmrewind.journal.runs import Position, RunInfo, run_path, write_durably
from vmrewind.repository.repository import Repository


def run(number: int, host: str, parent: tuple[int, int] | None = None, *, takeover: bool = False) -> RunInfo:
    place = Position(*parent, parent[1]) if parent is not None else None
    return RunInfo(number, place, VM, str(UUID), host, number, parent[1] + 1 if parent else 1, (), takeover=takeover)


def asked(host: str, ours: list[RunInfo], others: list[RunInfo], end: int | None = None, overruled: int = 0) -> Successor | None:
    place = Position(ours[-1].run, end, end) if end is not None else None
    return successor({info.run: info for info in ours}, others, host, end=place, overruled=overruled)


A1, A2 = run(1, "a"), run(2, "a", (1, 10))
TB, B1 = run(5, "b", (2, 20), takeover=True), run(6, "b", (5, 22))
TA, A3 = run(8, "a", (6, 40), takeover=True), run(9, "a", (8, 42))


def test_nobody_else_has_it() -> None:
    assert asked("a", [A1, A2], []) is None
    assert asked("b", [A1, A2, TB, B1], []) is None
    assert asked("c", [], [A1, A2]) is None


def test_the_host_that_was_taken_over_from_is_told_who_when_whence_and_how_much_lies_behind() -> None:
    who = asked("a", [A1, A2], [TB, B1], end=25)
    assert who == Successor(5, "b", 5, Position(2, 20, 20), 5)
    assert "host b took it over" in who.words() and "seq 20 of run 0000000000000002" in who.words() and "5 records" in who.words()
    assert asked("a", [A1, A2], [TB], end=20) == Successor(5, "b", 5, Position(2, 20, 20), 0)


def test_two_hosts_of_one_name_and_a_host_that_started_without_knowing() -> None:
    assert asked("b", [A1, A2], [TB]) is not None
    later = run(7, "a", (2, 25))
    assert asked("a", [A1, A2, later], [TB], end=30) == Successor(5, "b", 5, Position(2, 20, 20), 10)


def test_the_new_host_does_not_mind_what_the_old_one_does() -> None:
    assert asked("b", [A1, A2, TB, B1], [run(7, "a", (2, 25))]) is None


def test_failback() -> None:
    assert asked("a", [A1, A2, TB, B1, TA], []) is None
    assert asked("b", [A1, A2, TB, B1], [TA, A3]) == Successor(8, "a", 8, Position(6, 40, 40), None)
    older = run(8, "a", (1, 5), takeover=True)
    assert asked("a", [A1, A2, older], [TB, B1]) is None
    assert asked("b", [A1, A2, TB, B1], [older]) == Successor(8, "a", 8, Position(1, 5, 5), None)


def test_overruled_once_only_a_later_takeover_counts() -> None:
    assert asked("a", [A1, A2], [TB], overruled=5) is None
    assert asked("a", [A1, A2], [TB, run(12, "c", (5, 22), takeover=True)], overruled=5) is not None


def test_images_that_were_moved_without_a_takeover() -> None:
    moved = run(4, "b", (2, 20))
    assert asked("a", [A1, A2], [moved], end=20) == Successor(4, "b", 4, Position(2, 20, 20), 0)
    assert asked("b", [A1, A2, moved], []) is None
    assert asked("a", [A1, A2], [run(4, "a", (2, 20))]) is None
    assert asked("a", [A1, A2], [run(4, "b")]) is None


def test_the_default_branch_is_that_of_the_last_takeover_unless_this_host_ran_later() -> None:
    stray = run(7, "a", (2, 25))
    runs = {info.run: info for info in (A1, A2, TB, B1, stray)}
    assert choose_run(runs, None) == 6
    assert choose_run(runs, None, {1, 2, 7}) == 7
    assert choose_run({1: A1, 2: A2}, None) == 2


def test_asked_of_a_repository(tmp_path: Path) -> None:
    journal, state = tmp_path / "journal", tmp_path / "state"
    repository = Repository.init(str(tmp_path / "repo")).vm(VM)
    for info in (A1, A2):
        write_durably(run_path(journal, info.run), info.to_json())
        repository.put_run(info)
    assert look(repository, journal, state) is None
    repository.put_run(TB)
    who = look(repository, journal, state, Position(2, 21, 21))
    assert who is not None and (who.host, who.records_behind) == ("b", 1)
    overrule(state, who)
    assert read_overruled(state) == 5 and look(repository, journal, state) is None
    repository.put_run(run(11, "c", (5, 22), takeover=True))
    assert look(repository, journal, state) is not None
    (state / "overruled.json").write_text("damaged")
    who = look(repository, journal, state)
    assert who is not None and who.run == 11


def test_a_damaged_description_of_an_own_takeover_is_had_from_the_repository(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    repository = Repository.init(str(tmp_path / "repo")).vm(VM)
    for info in (A1, A2, TB):
        write_durably(run_path(journal, info.run), info.to_json())
        repository.put_run(info)
    run_path(journal, TB.run).write_text("damaged")
    assert look(repository, journal, tmp_path) is None


def test_a_rewind_behind_the_takeover_gives_nothing_up() -> None:
    rewound = replace(run(7, "b", (1, 5)), claim=5)
    known = {info.run: info for info in (A1, A2, TB, B1, rewound)}
    assert choose_run(known, None) == 7, "from the repository alone the owner's newest run is meant, wherever it hangs"
    assert asked("b", [A1, A2, TB, B1, rewound], []) is None
    who = asked("a", [A1, A2], [TB, B1, rewound], end=20)
    assert who is not None and who.run == 5
    unknowing = run(9, "a", (2, 25))
    assert choose_run(known | {9: unknowing}, None) == 7


def test_a_host_with_a_journal_means_its_own_runs() -> None:
    known = {info.run: info for info in (A1, A2, TB, B1)}
    assert choose_run(known, None, {1, 2}) == 2
    assert choose_run(known, None, {1, 2, 5, 6}) == 6
    assert choose_run(known, None) == 6


def test_claim_and_configuration_are_kept_in_the_description_and_only_there_where_they_are(tmp_path: Path) -> None:
    told = replace(B1, claim=5, config="abc")
    assert RunInfo.from_json(told.to_json(), "x") == told
    assert b"claim" not in A1.to_json() and b"config" not in A1.to_json()
