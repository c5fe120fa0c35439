"""The state page says how far the images have come, and outlives the process that wrote it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmrewind.errors import CorruptionError
from vmrewind.journal.state import LAYOUT, MAGIC, SIZE, VERSION, StatePage, boot_id


def test_a_new_page_knows_no_run_and_this_boot(tmp_path: Path) -> None:
    state = StatePage(tmp_path)
    assert (state.run, state.applied, state.checkpoint, state.boot) == (0, 0, 0, boot_id())
    state.close()
    assert (tmp_path / "capture.state").stat().st_size == SIZE


def test_numbers_are_there_when_it_is_opened_again(tmp_path: Path) -> None:
    state = StatePage(tmp_path)
    state.begin(7)
    state.set_applied(41)
    state.set_checkpoint(40)
    state.close()
    again = StatePage(tmp_path)
    assert (again.run, again.applied, again.checkpoint, again.boot) == (7, 41, 40, boot_id())
    again.close()


def test_a_new_run_starts_at_nothing(tmp_path: Path) -> None:
    state = StatePage(tmp_path)
    state.begin(7)
    state.set_applied(41)
    state.set_checkpoint(40)
    state.begin(8)
    assert (state.run, state.applied, state.checkpoint) == (8, 0, 0)
    state.close()


def test_what_a_killed_process_noted_is_there(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from vmrewind.journal.state import StatePage\n"
        "s = StatePage(Path(sys.argv[1])); s.begin(9)\n"
        "for i in range(1, 1001): s.set_applied(i)\n"
        "print('there', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    state = StatePage(tmp_path)
    assert (state.run, state.applied) == (9, 1000)
    state.close()


@pytest.mark.parametrize(("magic", "version"), [(b"VMRWSTAX", VERSION), (MAGIC, VERSION + 1)])
def test_a_page_of_something_else_is_refused(tmp_path: Path, magic: bytes, version: int) -> None:
    path = tmp_path / "capture.state"
    path.write_bytes(LAYOUT.pack(magic, version, 0, boot_id(), 1, 2, 3).ljust(SIZE, b"\0"))
    with pytest.raises(CorruptionError, match=r"capture\.state"):
        StatePage(tmp_path)


def test_a_page_cut_short_counts_as_new(tmp_path: Path) -> None:
    (tmp_path / "capture.state").write_bytes(b"")
    state = StatePage(tmp_path)
    assert state.run == 0
    state.close()
