"""``vmrewind restore`` and ``vmrewind timeline``, as a user calls them, on a VM of this host."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.history_tools import VM, MadeHistory, exit_code_of_main
from vmrewind.cli.mark import mark
from vmrewind.cli.timeline import chart
from vmrewind.errors import MomentError, UsageError, VmStateError
from vmrewind.history.moments import format_time
from vmrewind.journal.runs import RESTORE_PENDING
from vmrewind.paths import VmPaths


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    made = MadeHistory(tmp_path, {"vda": 65536, "vdb": 65536})
    made.start()
    made.write("vda", 0, b"first" * 100)
    made.mark("upgrade")
    made.write("vda", 0, b"second" * 100)
    made.write("vdb", 0, b"third" * 100)
    made.stop()
    for disk in made.disks:
        (tmp_path / f"{disk.target}.raw").write_bytes(disk.content)
    (tmp_path / "web01.toml").write_text(
        f'name = "{VM}"\n[protection]\nenabled = true\nrepository = "repo"\njournal = "journal"\n'
        + "".join(f'[[protection.disk]]\ntarget = "{d.target}"\nimage = "{d.target}.raw"\n' for d in made.disks)
    )
    shutil.copytree(tmp_path / "bases", VmPaths(VM).bases)
    return made


@pytest.fixture
def vmrewind(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(made, monkeypatch)


class Command:
    def __init__(self, made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
        self._vm = str(made.directory / "web01.toml")
        self._monkeypatch = monkeypatch

    def __call__(self, command: str, *arguments: str) -> int:
        self._monkeypatch.setattr(sys, "argv", ["vmrewind", command, self._vm, *arguments])
        return exit_code_of_main()


def test_restore_to_files_names_what_it_restored(
    made: MadeHistory, vmrewind: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert vmrewind("restore", "--at", "@upgrade", "--output", str(out), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["seq"], told["time_ns"], told["run"]) == (3, made.times[3], f"{made.run:016x}")
    for target in ("vda", "vdb"):
        assert (out / f"{target}.raw").read_bytes() == made.disk(target).states[3]
        assert told["disks"][target]["path"] == str(out / f"{target}.raw")
    assert vmrewind("restore", "--at", "seq:2", "--output", str(out / "two"), "--disk", "vda") == 0
    text = capsys.readouterr().out
    assert format_time(made.times[2]) in text
    assert f"seq 2 of run {made.run:016x}" in text
    assert [path.name for path in (out / "two").iterdir()] == ["vda.raw"]


def test_restore_by_relative_time(made: MadeHistory, vmrewind: Command, tmp_path: Path) -> None:
    assert vmrewind("restore", "--at", "-99999d", "--output", str(tmp_path / "out")) == MomentError.exit_code
    assert vmrewind("restore", "--at", format_time(made.times[4]), "--output", str(tmp_path / "at4")) == 0
    assert (tmp_path / "at4" / "vda.raw").read_bytes() == made.disk("vda").states[4]


def test_restore_in_place_and_completing_it(
    made: MadeHistory, vmrewind: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vmrewind("restore", "--at", "seq:2", "--in-place") == 0
    for target in ("vda", "vdb"):
        assert (tmp_path / f"{target}.raw").read_bytes() == made.disk(target).states[2]
    assert vmrewind("restore", "--in-place") == UsageError.exit_code
    position = made.position(4)
    (made.journal / "head.json").unlink()  # as the interrupted restore has done
    (made.journal / RESTORE_PENDING).write_text(
        json.dumps({"run": f"{made.run:016x}", "seq": 4, "time_ns": position.time_ns, "disks": ["vda", "vdb"]})
    )
    capsys.readouterr()
    assert vmrewind("restore", "--in-place", "--disk", "vda", "--at", "seq:4") == VmStateError.exit_code
    assert "--disk vda --disk vdb" in capsys.readouterr().err
    assert vmrewind("restore", "--in-place") == 0, "the moment of the interrupted restore need not be given again"
    assert (tmp_path / "vda.raw").read_bytes() == made.disk("vda").states[4]
    assert not (made.journal / RESTORE_PENDING).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--at", "latest"], UsageError.exit_code, "--in-place"),
        (["--at", "latest", "--output", "x", "--in-place"], UsageError.exit_code, "either"),
        (["--at", "latest", "--output", "x", "--disk", "vdz"], UsageError.exit_code, "vda, vdb"),
        (["--at", "soon", "--output", "x"], MomentError.exit_code, "-5m"),
        (["--at", "seq:99", "--output", "x"], MomentError.exit_code, "seq:6"),
        (["--at", "2020-01-01T00:00", "--output", "x"], MomentError.exit_code, "seq:1"),
        (["--at", "latest", "--output", "x", "--branch", "fff"], MomentError.exit_code, "runs:"),
    ],
)
def test_bad_input(vmrewind: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str) -> None:
    assert vmrewind("restore", *arguments) == code
    assert said in capsys.readouterr().err


def test_timeline_as_data(made: MadeHistory, vmrewind: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert vmrewind("timeline", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    (interval,) = told["disks"]["vda"]["coverage"]
    assert (interval["first"]["seq"], interval["last"]["seq"], interval["until_ns"]) == (1, 6, None)
    assert told["disks"]["vdb"]["gaps"] == []
    assert [(event["event"], event["seq"]) for event in told["events"]] == [("start", 1), ("bookmark", 3), ("stop", 6)]
    assert told["events"][1]["name"] == "upgrade"
    assert sum(told["writes"]["bytes"]) == 500 + 600 + 500
    assert sum(told["writes"]["operations"]) == 3
    assert [run["run"] for run in told["runs"]] == [f"{made.run:016x}"]


def test_timeline_for_people(made: MadeHistory, vmrewind: Command, capsys: pytest.CaptureFixture[str]) -> None:
    (made.journal / "head.json").unlink()
    assert vmrewind("timeline") == 0
    text = capsys.readouterr().out
    assert re.search(r"vda: every moment\n  from 20\S+ to now  \(seq 1 to 6\)", text)
    assert "@upgrade" in text
    assert "█" in text


def test_timeline_and_restore_without_the_journal(
    made: MadeHistory, vmrewind: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.ship_runs()
    made.ship(made.run, 1, 4)
    shutil.rmtree(made.journal)
    assert vmrewind("timeline", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["disks"]["vda"]["coverage"][0]["until_ns"] == made.times[4]
    assert vmrewind("restore", "--at", "latest", "--output", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "vda.raw").read_bytes() == made.disk("vda").states[4]
    assert vmrewind("restore", "--at", "latest", "--in-place") == UsageError.exit_code


def test_timeline_with_the_repository_away(
    made: MadeHistory, vmrewind: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.repository_path.rename(tmp_path / "elsewhere")
    assert vmrewind("timeline", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["disks"]["vda"]["coverage"][0]["last"]["seq"] == 6
    assert "the repository is left out" in told.err


def test_chart() -> None:
    assert chart([0, 1, 50, 100]) == " ▁▄█"
    assert chart([0, 0]) == "  "


def test_a_mark_that_no_moment_could_name_is_refused() -> None:
    with pytest.raises(UsageError, match="white space") as caught:
        mark(VM, " upgrade ")
    assert "'upgrade'" in caught.value.hint
