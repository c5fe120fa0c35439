"""``vmrewind journal dump`` and ``journal verify``, as a user calls them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import xxhash

from tests.history_tools import UUID, MadeHistory, exit_code_of_main
from vmrewind.errors import CorruptionError, UsageError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    made = MadeHistory(tmp_path, {"vda": 65536, "vdb": 65536})
    made.start()
    made.write("vda", 512, b"x" * 700)
    made.tick()
    made.batch([(fmt.Op.ZERO, "vda", 0, 4096), (fmt.Op.WRITE, "vdb", 8, b"yz"), (fmt.Op.DISCARD, "vdb", 4096, 512)])
    made.mark("näher")
    made.void(2, "vda")
    made.tick()
    made.batch([(fmt.Op.FLUSH, "vda", 0, 0)])
    made.stop()
    return made


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vmrewind", *arguments])
    return exit_code_of_main()


def test_dump_as_json(made: MadeHistory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "journal", "dump", str(made.journal), "--json") == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["seq"] for entry in entries] == list(range(1, 10))
    assert [entry["op"] for entry in entries] == (["event", "write", "zero", "write", "discard", "event", "void", "flush", "event"])
    assert [entry["batch"] for entry in entries] == [1, 2, 3, 3, 3, 4, 5, 6, 7]
    assert [entry["time_ns"] for entry in entries] == [made.times[seq] for seq in range(1, 10)]
    write = entries[1]
    assert (write["disk"], write["target"], write["offset"], write["length"]) == (0, "vda", 512, 700)
    assert write["xxh3"] == f"{xxhash.xxh3_64_intdigest(b'x' * 700):016x}"
    assert write["run"] == f"{made.run:016x}"
    assert entries[2]["xxh3"] is None
    assert entries[0]["disk"] is None
    assert entries[5]["event"] == "bookmark"
    assert entries[5]["content"] == {"name": "näher"}
    assert entries[6]["offset"] == 2


def test_dump_for_people_names_disks_and_events(
    made: MadeHistory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "journal", "dump", *map(str, made.segment_paths())) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "vda   write   512+700" in lines[1]
    assert "vdb   discard 4096+512" in lines[4]
    assert 'bookmark {"name"' in lines[5]
    assert "record 2 never happened" in lines[6]


def test_verify_says_intact_or_where_it_is_not(
    made: MadeHistory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "journal", "verify", str(made.journal)) == 0
    assert "9 records (1 to 9) in 7 batches, intact" in capsys.readouterr().out
    (path,) = made.segment_paths()
    with Segment(path) as segment:
        batch = list(segment.batches())[1]
    with open(path, "r+b") as file:
        file.seek(batch.payload_position + 5)
        file.write(b"!")
    assert run(monkeypatch, "journal", "verify", str(path), "--json") == CorruptionError.exit_code
    report = json.loads(capsys.readouterr().out.splitlines()[0])
    assert report["intact"] is False
    (problem,) = report["problems"]
    assert problem["offset"] == batch.payload_position
    assert "record 2" in problem["message"]


def test_what_is_no_segment(made: MadeHistory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no segment")
    (tmp_path / "empty").mkdir()
    assert run(monkeypatch, "journal", "dump", str(tmp_path / "text")) == CorruptionError.exit_code
    assert run(monkeypatch, "journal", "dump", str(tmp_path / "none")) == UsageError.exit_code
    assert run(monkeypatch, "journal", "dump", str(tmp_path / "empty")) == UsageError.exit_code
    assert run(monkeypatch, "journal", "verify", str(tmp_path / "empty")) == UsageError.exit_code


def test_the_format_page_has_the_sizes_of_the_code() -> None:
    assert (fmt.SEGMENT.size, fmt.BATCH.size, fmt.RECORD.size) == (88, 64, 24)
    assert len(UUID.bytes) == 16
