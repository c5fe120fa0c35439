"""What the timeline tells beside coverage: flushes, and bookmarks that name an earlier moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.history_tools import MadeHistory, exit_code_of_main
from vmrewind.history.activity import flushes_before, writes
from vmrewind.history.bookmarks import bookmarks, kind_of
from vmrewind.history.resolve import resolve
from vmrewind.journal import format as fmt

K = 1 << 10


def flush(made: MadeHistory, target: str) -> int:
    made.tick()
    return made.batch([(fmt.Op.FLUSH, target, 0, 0)])


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    """Flushes at 3 (vda), 4 (vdb), 6 (vda) and, in a second run, 9 (vdb)."""
    made = MadeHistory(tmp_path, {"vda": 64 * K, "vdb": 64 * K})
    made.start()
    made.write("vda", 0, b"one")
    assert [flush(made, "vda"), flush(made, "vdb")] == [3, 4]
    made.write("vda", 512, b"two")
    assert flush(made, "vda") == 6
    made.start(parent=made.stop())
    assert flush(made, "vdb") == 9
    return made


def test_the_last_flushes_before_a_moment(made: MadeHistory) -> None:
    with made.open() as history:
        branch = history.branch()

        def found(moment: str, count: int = 3) -> list[tuple[int, str]]:
            until = resolve(history, branch, moment, ["vda", "vdb"], made.now_ns)
            return [(flush.position.seq, flush.target) for flush in flushes_before(history, branch, until, count)]

        assert found("latest", 9) == [(3, "vda"), (4, "vdb"), (6, "vda"), (9, "vdb")]
        assert found("latest") == [(4, "vdb"), (6, "vda"), (9, "vdb")]
        assert found("latest", 1) == [(9, "vdb")]
        assert found("seq:8", 1) == found("seq:6", 1) == [(6, "vda")]
        assert found("seq:5") == [(3, "vda"), (4, "vdb")]
        assert found("seq:2") == []
        (flush_4,) = [f for f in flushes_before(history, branch, made.position(9), 9) if f.position.seq == 4]
        assert flush_4.position.time_ns == made.times[4]
        counted = writes(history, branch, made.times[1], made.times[9], 5)
        assert counted.flushes.sum() == 4 and counted.operations.sum() == 2


def test_the_timeline_lists_them(made: MadeHistory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made.ship(100, 1, 7)
    made.ship(made.run, 8, 9)
    made.ship_runs()
    where = f"{made.repository_path}/web01"
    made.repository.register(made.infos[100].uuid)
    for words in (["--json"], []):
        monkeypatch.setattr("sys.argv", ["vmrewind", "timeline", where, "--flushes-before", "seq:5", *words])
        assert exit_code_of_main() == 0
        said = capsys.readouterr().out
        if words:
            told = json.loads(said)
            assert [(flush["seq"], flush["disk"]) for flush in told["flushes"]] == [(3, "vda"), (4, "vdb")]
            assert sum(told["writes"]["flushes"]) == 4
        else:
            assert "last flushes up to seq:5" in said and "seq 4  vdb" in said and "seq 6  vda" not in said


def test_a_quiesced_bookmark_is_the_moment_that_it_names_on_every_branch_that_has_it(made: MadeHistory) -> None:
    named = {"seq": 9, "time_ns": made.times[9], "not_frozen": []}
    made.write("vda", 0, b"after the thaw")
    assert made.event(fmt.Event.BOOKMARK, {"name": "good", "kind": "quiesced", **named}) == 11
    # None of these is a point at which anything was frozen, as far as can be known.
    for number, odd in enumerate(({"seq": 99}, {"seq": "9"}, {"time_ns": None}, {"not_frozen": "no"}, {"kind": "other"})):
        made.event(fmt.Event.BOOKMARK, {"name": f"odd-{number}", "kind": "quiesced", **named} | odd)
    made.mark("plain")
    with made.open() as history:
        branch = history.branch()
        kinds = {mark.name: (mark.kind, mark.position.seq) for mark in bookmarks(history, branch)}
        assert kinds.pop("good") == ("quiesced", 9)
        assert {kind for kind, _ in kinds.values()} == {"crash-consistent"} and len(kinds) == 6
        position = resolve(history, branch, "@good", ["vda"], made.now_ns)
        assert (position.seq, position.time_ns) == (9, made.times[9])
        assert kind_of(history, branch, "@good", position) == "quiesced"
        assert kind_of(history, branch, "seq:9", position) == "crash-consistent"
    made.stop()
    for parent, names in ((made.position(9), {"good"}), (made.position(8), set())):
        made.start(parent=parent)
        with made.open() as history:
            assert {mark.name for mark in bookmarks(history, history.branch())} & {"good", "plain"} == names
