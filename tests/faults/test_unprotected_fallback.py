"""A capture that cannot stay up: with ``on_failure = "start-unprotected"`` the VM goes on without it, and history says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from guests.protected import vmrewind
from guests.writer import acknowledged, errors
from tests.capture_tools import MIB, until
from tests.e2e.test_start_after import Alone
from tests.faults.test_restart_capture import break_capture, goes_on, restarted, told
from tests.vm_tools import check_files, files_in, restore, writer_vm
from vmrewind.paths import VmPaths
from vmrewind.start.processes import Keeping


def keeping(name: str) -> Keeping:
    found = Keeping.read(VmPaths(name))
    assert found is not None
    return found


def kill_captures(name: str, times: int) -> None:
    killed: set[int] = set()

    def another() -> int | None:
        capture = keeping(name).capture
        return capture.pid if capture is not None and capture.alive and capture.pid not in killed else None

    for _ in range(times):
        pid = until(another, "another capture")
        os.kill(pid, signal.SIGKILL)
        killed.add(pid)


def unprotected(name: str) -> bool:
    return not keeping(name).protected


def lose_protection(alone: Alone, broken: Path) -> None:
    """Capture is killed, and no other one can start."""
    broken.write_text("allot")
    kill_captures("alone", 1)
    until(lambda: unprotected("alone"), "unprotected service")


def log(name: str) -> list[str]:
    """The newest run's events."""
    return [json.loads(line)["event"] for line in max((VmPaths(name).state / "events").iterdir()).read_text().splitlines()]


def test_a_guest_whose_capture_dies_five_times_runs_on_and_is_protected_again(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "fallback", pause_ms=20, on_failure="start-unprotected") as vm:
        vm.start()
        vm.wait_for("^ACK 3$")
        known = acknowledged(vm.console.text())
        before = json.loads(vmrewind("mark", vm.config, "before", "--json").stdout)
        then = acknowledged(vm.console.text())
        kill_captures("fallback", 5)
        until(lambda: "protection.lost" in told(vm), "unprotected service")
        goes_on(vm)
        status = vm.status()
        assert any("WITHOUT PROTECTION" in problem and "died 5 times" in problem for problem in status["problems"])
        assert status["processes"]["capture"] is None and status["processes"]["server"]["alive"]
        assert "NOT PROTECTED" in vm.output.read_text()
        # What is written now is not known, so the time is a gap already; what was before is there.
        refused = vmrewind("restore", vm.config, "--at", "latest", "--output", tmp_path / "no", check=False)
        assert refused.returncode == 6 and "served unprotected" in refused.stderr
        assert vmrewind("mark", vm.config, "now", check=False).returncode == 8
        restarted(vm.config)
        goes_on(vm)
        until(lambda: "resync.done" in told(vm), "the resync")
        goes_on(vm)
        assert vm.status()["problems"] == []
        vm.quit()
    assert errors(vm.console.text()) == []
    restore(vm, "latest", tmp_path / "latest")
    assert (tmp_path / "latest" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
    check_files(files_in(tmp_path / "latest" / "vda.raw", tmp_path / "files"), acknowledged(vm.console.text()))
    restore(vm, f"seq:{before['seq']}", tmp_path / "before")
    found = files_in(tmp_path / "before" / "vda.raw", tmp_path / "files-before")
    assert set(known) <= set(found) and max(found) <= max(then) + 1
    (gap,) = json.loads(vmrewind("timeline", vm.config, "--json").stdout)["disks"]["vda"]["gaps"]
    assert gap["since_ns"] < gap["until_ns"] and "served unprotected" in gap["cause"]
    inside = datetime.fromtimestamp(gap["since_ns"] / 1e9 + 0.1, UTC).isoformat()
    refused = vmrewind("restore", vm.config, "--at", inside, "--output", tmp_path / "no", check=False)
    assert refused.returncode == 6 and "served unprotected" in refused.stderr


def test_a_vm_that_ends_unprotected_is_resynced_at_its_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path, on_failure="start-unprotected")
    broken = break_capture(tmp_path, monkeypatch)
    with alone.serving() as ready:
        alone.write(ready, 1)
        lose_protection(alone, broken)
        alone.write(ready, 2)
        # The upgrade is still broken: the VM stays unprotected, and the command says why.
        refused = vmrewind("restart-capture", alone.config, check=False)
        assert refused.returncode == 9 and "the upgrade is broken" in refused.stderr
        until(lambda: unprotected("alone"), "unprotected service")
        alone.write(ready, 3, MIB)
    refused = vmrewind("restore", alone.config, "--at", "latest", "--output", tmp_path / "no", check=False)
    assert refused.returncode == 6, refused.stderr
    broken.unlink()
    with alone.serving() as ready:
        until(lambda: "resync.done" in log("alone"), "the resync")
        assert "base.begun" not in log("alone")
        alone.write(ready, 4, 2 * MIB)
    image = alone.image.read_bytes()
    assert alone.restored("latest") == image
    assert [image[at * MIB] for at in range(3)] == [2, 3, 4]


def test_protection_that_is_lost_again_before_its_gap_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path, on_failure="start-unprotected")
    broken = break_capture(tmp_path, monkeypatch)
    away = alone.repository.with_name("away")
    with alone.serving() as ready:
        alone.write(ready, 1)
        until(lambda: alone.status()["ship"].get("unsent_bytes") == 0, "ship to be level")
        lose_protection(alone, broken)
        alone.write(ready, 2)
        # Without its repository the resync cannot close the gap.
        alone.repository.rename(away)
        broken.unlink()
        restarted(alone.config)
        alone.write(ready, 3, MIB)
        until(lambda: "resync.failed" in log("alone"), "a resync that fails")
        lose_protection(alone, broken)
        alone.write(ready, 4, 2 * MIB)
        away.rename(alone.repository)
        broken.unlink()
        restarted(alone.config)
        until(lambda: "resync.done" in log("alone"), "the resync")
        alone.write(ready, 5, 3 * MIB)
    image = alone.image.read_bytes()
    assert alone.restored("latest") == image
    assert [image[at * MIB] for at in range(4)] == [2, 3, 4, 5]


def test_images_are_not_served_when_the_journal_does_not_tell_what_they_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Alone(tmp_path, on_failure="start-unprotected")
    broken = break_capture(tmp_path, monkeypatch)
    with alone.serving() as ready:
        alone.write(ready, 1)
        broken.write_text("allot")
        kill_captures("alone", 1)
        # Nothing of the run can be read any more.
        for segment in alone.journal.glob("????????????????-*.seg"):
            with segment.open("r+b") as file:
                file.write(bytes(MIB))
        until(lambda: "none of its records is readable" in (keeping("alone").trouble or ""), "the reason")
        assert any("none of its records is readable" in problem for problem in alone.status()["problems"])
        client = subprocess.Popen(["qemu-io", "-f", "raw", ready["disks"]["vda"]["uri"], "-c", "read 0 512"])
        with pytest.raises(subprocess.TimeoutExpired):
            client.wait(2)
        assert not unprotected("alone")
        client.kill()
        client.wait()


def test_abort_has_the_guest_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path)
    broken = break_capture(tmp_path, monkeypatch)
    with alone.serving() as ready:
        alone.write(ready, 1)
        broken.write_text("allot")
        kill_captures("alone", 1)
        until(lambda: "the upgrade is broken" in (keeping("alone").trouble or ""), "the reason")
        client = subprocess.Popen(["qemu-io", "-f", "raw", ready["disks"]["vda"]["uri"], "-c", "write -P 2 0 512"])
        with pytest.raises(subprocess.TimeoutExpired):
            client.wait(7)
        assert not unprotected("alone")
        broken.unlink()
        assert client.wait(20) == 0
    assert alone.image.read_bytes()[0] == 2
    assert alone.restored("latest") == alone.image.read_bytes()
