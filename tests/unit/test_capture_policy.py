"""Which old segments may be used again: ship's word on each run counts, and nothing else is taken for shipped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bad_sectors import unreadable
from tests.ship_support import MIB, WrittenJournal
from vmrewind.capture.policy import POLICIES, RUN_DONE, FullPolicy
from vmrewind.journal import format as fmt
from vmrewind.journal.pool import Recycling
from vmrewind.journal.reader import Segment, SegmentFile, segment_files
from vmrewind.journal.state import StatePage


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Run 7 with three segments, run 8 with one."""
    for run, segments in ((7, 3), (8, 1)):
        written = WrittenJournal(tmp_path, run, size=16 * MIB)
        while written.writer.segment_number < segments:
            written.batch([(fmt.Op.WRITE, 0, bytes(MIB))])
        written.batch([(fmt.Op.WRITE, 0, b"last")])
    return tmp_path


@pytest.fixture
def state(journal: Path) -> Iterator[StatePage]:
    page = StatePage(journal)
    page.begin(9)
    yield page
    page.close()


def verdicts(journal: Path, state: StatePage, name: str = "block") -> list[Recycling]:
    policy = FullPolicy(name, journal, state)
    return [policy.may_recycle(file) for file in segment_files(journal)]


def say(journal: Path, runs: dict[int, int]) -> None:
    (journal / "shipped.json").write_text(json.dumps({"runs": {fmt.run_name(run): seq for run, seq in runs.items()}}))


def first_seq(file: SegmentFile) -> int:
    with Segment(file.path) as segment:
        return segment.header.first_seq


def test_an_older_run_is_not_shipped_because_a_newer_one_is(journal: Path, state: StatePage) -> None:
    say(journal, {8: RUN_DONE})
    assert verdicts(journal, state) == [Recycling.NO] * 3 + [Recycling.FREE]
    assert verdicts(journal, state, "drop-history") == [Recycling.DROPS] * 3 + [Recycling.FREE]


def test_a_segment_is_shipped_when_its_runs_word_covers_its_last_record(journal: Path, state: StatePage) -> None:
    second = first_seq(segment_files(journal)[1])
    say(journal, {7: second - 1})
    assert verdicts(journal, state) == [Recycling.FREE] + [Recycling.NO] * 3
    say(journal, {7: second - 2})
    assert verdicts(journal, state) == [Recycling.NO] * 4
    say(journal, {7: RUN_DONE})
    assert verdicts(journal, state) == [Recycling.FREE] * 3 + [Recycling.NO]


@pytest.mark.parametrize("name", POLICIES)
def test_history_of_a_disk_that_is_not_carried_is_lost_with_its_segment_and_that_is_declared(
    journal: Path, state: StatePage, name: str
) -> None:
    word = {"runs": {fmt.run_name(8): RUN_DONE}, "carried": {fmt.run_name(7): RUN_DONE, fmt.run_name(8): RUN_DONE}}
    (journal / "shipped.json").write_text(json.dumps(word))
    assert verdicts(journal, state, name) == [Recycling.DROPS] * 3 + [Recycling.FREE]


@pytest.mark.parametrize("word", ["", "{", "[]", "null", '{"runs": 7}', '{"runs": {"x": 1}}', '{"runs": {"7": null}}',
                                  '{"run": "0000000000000009", "seq": 99}', '{"runs": {"7": 1e999}}'])  # fmt: skip
def test_a_word_that_makes_no_sense_lets_nothing_go(journal: Path, state: StatePage, word: str) -> None:
    (journal / "shipped.json").write_text(word)
    assert verdicts(journal, state) == [Recycling.NO] * 4


@pytest.mark.parametrize("broken", [lambda path: path.write_bytes(b"garbage"), unreadable], ids=["damaged", "bad sector"])
def test_a_header_that_cannot_be_read_keeps_nothing_that_ship_has(
    journal: Path, state: StatePage, broken: Callable[[Path], object]
) -> None:
    third = first_seq(segment_files(journal)[2])
    broken(segment_files(journal)[1].path)
    say(journal, {7: third - 1})
    assert verdicts(journal, state) == [Recycling.FREE, Recycling.FREE, Recycling.NO, Recycling.NO]
