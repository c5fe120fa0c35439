"""What holds, or describes, the content of a VM's disks is its owner's alone, whatever the umask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.history_tools import MadeHistory
from vmrewind.journal.events import EventLog
from vmrewind.journal.runs import write_durably


@pytest.fixture(params=[0o022, 0o000, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def shared(top: Path) -> list[str]:
    """Whatever below ``top`` is not its owner's alone."""
    return [f"{path}: {path.stat().st_mode:o}" for path in [top, *top.rglob("*")] if path.lstat().st_mode & 0o077]


@pytest.mark.usefixtures("umask")
def test_state_journal_and_repository_are_private(tmp_path: Path) -> None:
    top = tmp_path / "top"
    write_durably(top / "vms" / "web01" / "vm.json", b"{}")
    EventLog(tmp_path / "state" / "events" / "1.jsonl").write("an.event")
    directory = tmp_path / "made"
    directory.mkdir(mode=0o700)
    made = MadeHistory(directory, {"vda": 1 << 20})
    made.start()
    made.write("vda", 0, b"secret" * 100)
    made.stop()
    made.ship_runs()
    made.ship(made.run, 1, 3)
    (directory / "vda.image").unlink()
    assert len(list(made.repository_path.rglob("*"))) > 5
    assert shared(top) + shared(tmp_path / "state") + shared(directory) == []


@pytest.mark.usefixtures("umask")
def test_directories_that_exist_are_left_as_they_are(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    top.chmod(0o755)
    write_durably(top / "a" / "b.json", b"{}")
    MadeHistory(top, {})
    assert top.stat().st_mode & 0o777 == 0o755
    assert shared(top / "a") + shared(top / "repo") + shared(top / "journal") == []
