"""``vmrewind restart-capture``: capture is replaced under a running VM, and nobody notices but the event log."""

from __future__ import annotations

import json
import os
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from guests.protected import ProtectedVm, vmrewind
from guests.writer import acknowledged, errors
from tests.capture_tools import Client, until
from tests.e2e.test_start_after import Alone
from tests.vm_tools import check_files, files_in, restore, writer_vm
from tests.warm import CHILDREN

PAUSE_SECONDS_MAX = 2.0
"""Far more than it takes, on a machine that does much else."""


def break_capture(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From the next keeper on, every new capture fails as the content of the file that is returned says: an upgrade gone wrong.

    ``import``: it does not even come up. ``allot``: it comes up and cannot take its journal.
    """
    broken = directory / "broken"
    (directory / CHILDREN).mkdir()
    (directory / CHILDREN / "sitecustomize.py").write_text(f"""
import os, pathlib, sys
broken = pathlib.Path({str(broken)!r})
if "vmrewind.capture" in sys.orig_argv and broken.exists():
    if broken.read_text() == "import":
        os._exit(3)
    from vmrewind.errors import SpaceError
    from vmrewind.journal.pool import SegmentPool
    def allot(self):
        raise SpaceError("the upgrade is broken", "take it back")
    SegmentPool.allot = allot
""")
    monkeypatch.setenv("PYTHONPATH", str(directory / CHILDREN), prepend=os.pathsep)
    return broken


def restarted(config: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(vmrewind("restart-capture", config, "--json").stdout)
    return answer


def told(vm: ProtectedVm) -> list[str]:
    return [event["event"] for event in vm.events()]


def goes_on(vm: ProtectedVm) -> None:
    """The guest writes on."""
    last = max(acknowledged(vm.console.text()))
    vm.wait_for(f"^ACK {last + 3}$", 30)


def test_capture_is_upgraded_again_and_again_under_a_writing_guest(tmp_path: Path) -> None:
    noted: list[tuple[str, list[int]]] = []
    pids: set[int] = set()
    with writer_vm(tmp_path, "upgraded", pause_ms=20) as vm:
        vm.start()
        vm.wait_for("^ACK 3$")
        for _ in range(3):
            answer = restarted(vm.config)
            assert answer["pause_seconds"] < PAUSE_SECONDS_MAX
            assert answer["pid"] == vm.status()["processes"]["capture"]["pid"]
            pids.add(answer["pid"])
            goes_on(vm)
            known = acknowledged(vm.console.text())
            noted.append((datetime.now(UTC).isoformat(), known))
        assert vm.status()["problems"] == []
        vm.quit()
    assert errors(vm.console.text()) == []
    assert len(pids) == 3
    events = told(vm)
    assert events.count("capture.handed-over") == events.count("capture.restarted") == 3
    assert "capture.died" not in events and "capture.stopped" in events
    restore(vm, "latest", tmp_path / "latest")
    assert (tmp_path / "latest" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
    moment, known = noted[1]
    restore(vm, moment, tmp_path / "then")
    check_files(files_in(tmp_path / "then" / "vda.raw", tmp_path / "files"), known)
    timeline = json.loads(vmrewind("timeline", vm.config, "--json").stdout)
    assert len(timeline["runs"]) == 1 and timeline["disks"]["vda"]["gaps"] == []


def test_an_upgrade_that_does_not_come_up_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path)
    broken = break_capture(tmp_path, monkeypatch)
    with alone.serving() as ready:
        alone.write(ready, 1)
        before = alone.status()["processes"]["capture"]
        broken.write_text("import")
        refused = vmrewind("restart-capture", alone.config, check=False)
        assert refused.returncode == 10 and "standby" in refused.stderr
        assert alone.status()["processes"]["capture"] == before
        assert alone.status()["problems"] == []
        alone.write(ready, 2)


def test_an_upgrade_that_cannot_serve_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path)
    broken = break_capture(tmp_path, monkeypatch)
    with alone.serving() as ready:
        alone.write(ready, 1)
        broken.write_text("allot")
        refused = vmrewind("restart-capture", alone.config, check=False)
        assert refused.returncode == 9 and "the upgrade is broken" in refused.stderr and "take it back" in refused.stderr
        assert any("the upgrade is broken" in problem for problem in alone.status()["problems"])
        broken.unlink()
        alone.write(ready, 2)
        assert alone.status()["problems"] == []
        assert restarted(alone.config)["pause_seconds"] < PAUSE_SECONDS_MAX
        alone.write(ready, 3)
    assert alone.restored("latest") == alone.image.read_bytes()
    assert alone.image.read_bytes()[0] == 3
    assert "history.gap" not in alone.events()


def test_a_capture_that_hangs_is_replaced_all_the_same(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
        hung = alone.status()["processes"]["capture"]["pid"]
        os.kill(hung, signal.SIGSTOP)
        assert restarted(alone.config)["pid"] != hung
        assert not Path(f"/proc/{hung}").exists()
        alone.write(ready, 2)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_restarts_and_deaths_at_once_leave_one_capture_that_serves(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        for pattern in range(1, 4):
            capture = alone.status()["processes"]["capture"]["pid"]
            os.kill(capture, signal.SIGKILL)
            answer = restarted(alone.config)
            until(lambda: alone.status()["problems"] == [], "a capture that serves")
            assert alone.status()["processes"]["capture"]["pid"] == answer["pid"] != capture
            alone.write(ready, pattern)
        captures = [pid for pid in Path("/proc").glob("[0-9]*/cmdline") if str(alone.journal).encode() in _bytes(pid)]
        assert len(captures) == 2, "capture and ship"
    assert alone.restored("latest") == alone.image.read_bytes()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_vm_that_does_not_run_and_one_without_its_keeper_are_refused(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        keeper = ready["keeper"]
        os.kill(keeper, signal.SIGKILL)
        until(lambda: not alone.status()["processes"]["keeper"]["alive"], "the keeper's end")
        orphaned = vmrewind("restart-capture", alone.config, check=False)
        assert orphaned.returncode == 8 and "its keeper has died" in orphaned.stderr
        Client(Path(ready["disks"]["vda"]["uri"].partition("?socket=")[2]), "vda").sock.close()
    with alone.serving():
        pass
    stopped = vmrewind("restart-capture", alone.config, check=False)
    assert stopped.returncode == 8 and "not running" in stopped.stderr
