"""A VM that is started unprotected: the time is a gap, said everywhere, and what was written then is not destroyed unasked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from guests.protected import VMREWIND, vmrewind
from tests.capture_tools import MIB, until
from tests.e2e.test_start_after import Alone
from tests.faults.test_restart_capture import break_capture
from tests.faults.test_unprotected_fallback import kill_captures, lose_protection, unprotected
from tests.vm_tools import IdleVm, restore
from vmrewind.journal.runs import read_head
from vmrewind.paths import VmPaths
from vmrewind.start.images import declare_unprotected
from vmrewind.start.processes import Keeping, Process


def refused(config: Path, moment: str, *more: str | Path) -> str:
    """The message with which a restore to a moment is refused, because the moment is in a gap."""
    output = () if "--in-place" in more else ("--output", config.parent / "no")
    done = vmrewind("restore", config, "--at", moment, *output, *more, check=False)
    assert done.returncode == 6, (done.returncode, done.stderr)
    return done.stderr


def start_anyway(vm: IdleVm) -> subprocess.Popen[bytes]:
    """``vmrewind run`` of a VM whose capture cannot start; its CPU runs when this returns."""
    with vm.output.open("ab") as output:
        process = subprocess.Popen([VMREWIND, "run", vm.config], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    vm._process = process
    until(lambda: runs(vm), "the VM's CPU to run")
    return process


def runs(vm: IdleVm) -> bool:
    with contextlib.suppress(OSError), vm.monitor() as monitor:
        return bool(monitor.execute("query-status")["running"])
    return False


def test_a_vm_started_unprotected_has_a_gap_until_its_next_protected_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = break_capture(tmp_path, monkeypatch)
    with IdleVm(tmp_path, "anyway", on_failure="start-unprotected") as vm:
        vm.start()
        vm.write(1)
        vm.quit()
        last = vm.status()["last_record"]
        broken.write_text("allot")
        start_anyway(vm)
        vm.write(2)
        (problem,) = vm.status()["problems"]
        assert "WITHOUT PROTECTION" in problem and "stop the VM and start it again" in problem
        assert "restart-capture" not in problem
        assert "started unprotected" in refused(vm.config, "latest")
        assert "started unprotected" in refused(vm.config, datetime.now(UTC).isoformat())
        vm.quit()
        image = vm.image.read_bytes()
        assert image[0] == 2
        for moment in ("latest", "-1s"):
            message = refused(vm.config, moment)
            assert "started unprotected" in message and f"seq:{last['seq']}" in message
        assert any("history has a gap since" in problem for problem in vm.status()["problems"])
        (gap,) = json.loads(vmrewind("timeline", vm.config, "--json").stdout)["disks"]["vda"]["gaps"]
        assert gap["until_ns"] is None and gap["since_ns"] == last["time_ns"] + 1
        # What the guest wrote is nowhere else.
        done = vmrewind("restore", vm.config, "--at", f"seq:{last['seq']}", "--in-place", check=False)
        assert done.returncode == 4 and "--discard-unprotected" in done.stderr, done.stderr
        assert vm.image.read_bytes() == image
        restore(vm, f"seq:{last['seq']}", tmp_path / "then")
        assert (tmp_path / "then" / "vda.raw").read_bytes()[: 2 * MIB] == b"\1" * MIB + bytes(MIB)
        broken.unlink()
        vm.start()
        until(lambda: "resync.done" in [event["event"] for event in vm.events()], "the resync")
        assert "base.begun" not in [event["event"] for event in vm.events()]
        vm.quit()
        assert vm.status()["problems"] == []
    restore(vm, "latest", tmp_path / "latest")
    assert (tmp_path / "latest" / "vda.raw").read_bytes() == vm.image.read_bytes()


def test_a_vm_started_unprotected_whose_run_is_killed_is_not_called_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = break_capture(tmp_path, monkeypatch)
    broken.write_text("allot")
    with IdleVm(tmp_path, "orphan", on_failure="start-unprotected") as vm:
        process = start_anyway(vm)
        keeping = Keeping.read(VmPaths("orphan"))
        assert keeping is not None and keeping.qemu is not None
        process.kill()
        process.wait()
        try:
            status = vm.status()
            assert status["state"] == "running" and status["processes"]["qemu"]["alive"]
            assert any("stop the VM and start it again" in problem for problem in status["problems"])
            assert vmrewind("run", vm.config, check=False).returncode == 8
        finally:
            os.kill(keeping.qemu.pid, signal.SIGKILL)
        until(lambda: Process.of(keeping.qemu.pid) is None, "the end of QEMU")


def test_a_vm_run_with_protection_off_has_a_gap(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    text = alone.config.read_text()
    machine = ["qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-nodefaults", "-no-reboot", "-device", "isa-debug-exit"]
    qemu = f"[qemu]\ncommand = {json.dumps(machine)}\n[protection]"
    alone.config.write_text(text.replace("[protection]", qemu, 1).replace("enabled = true", "enabled = false"))
    process = subprocess.Popen([VMREWIND, "run", alone.config], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: (head := read_head(alone.journal)) is not None and head.gap is not None, "the gap to be declared")
        assert "protection switched off" in refused(alone.config, "latest")
    finally:
        process.terminate()
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(90)


def test_an_image_that_was_used_without_vmrewind_is_seen_where_nothing_could_be_declared(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
        mark = json.loads(vmrewind("mark", alone.config, "good", "--json").stdout)
    assert alone.status()["problems"] == []
    before = alone.restored("latest")
    subprocess.run(["qemu-io", "-f", "raw", alone.image, "-c", "write -P 9 1M 1M"], check=True, stdout=subprocess.DEVNULL)
    assert "used without vmrewind" in refused(alone.config, "latest")
    assert any("used without vmrewind" in problem for problem in alone.status()["problems"])
    assert alone.restored("@good")[:MIB] == b"\1" * MIB
    for _ in range(2):
        done = vmrewind("restore", alone.config, "--at", "@good", "--in-place", check=False)
        assert done.returncode == 4 and "no history has" in done.stderr
    assert alone.image.read_bytes()[MIB : 2 * MIB] == b"\x09" * MIB
    vmrewind("restore", alone.config, "--at", "@good", "--in-place", "--discard-unprotected")
    assert alone.image.read_bytes() == before
    assert alone.status()["last_record"]["seq"] == mark["seq"]
    # Taken back, and used without vmrewind again.
    assert alone.restored("latest") == before
    subprocess.run(["qemu-io", "-f", "raw", alone.image, "-c", "write -P 8 1M 1M"], check=True, stdout=subprocess.DEVNULL)
    assert "used without vmrewind" in refused(alone.config, "latest")


def test_what_was_written_after_five_deaths_is_not_destroyed_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path, on_failure="start-unprotected")
    broken = break_capture(tmp_path, monkeypatch)
    with alone.serving() as ready:
        alone.write(ready, 1)
        vmrewind("mark", alone.config, "good")
        lose_protection(alone, broken)
        alone.write(ready, 2)
        assert any("restart-capture" in problem for problem in alone.status()["problems"])
    image = alone.image.read_bytes()
    for _ in range(2):
        done = vmrewind("restore", alone.config, "--at", "@good", "--in-place", "--branch", oldest_run(alone), check=False)
        assert done.returncode == 4 and "no history has" in done.stderr, (done.returncode, done.stderr)
    assert alone.image.read_bytes() == image
    broken.unlink()
    with alone.serving():
        until(lambda: "resync.done" in alone.events(), "the resync")
    assert alone.restored("latest") == image


def test_unprotected_with_a_dead_keeper_nobody_advises_restart_capture(tmp_path: Path) -> None:
    alone = Alone(tmp_path, on_failure="start-unprotected")
    with alone.serving() as ready:
        alone.write(ready, 1)
        kill_captures("alone", 5)
        until(lambda: unprotected("alone"), "unprotected service")
        os.kill(ready["keeper"], signal.SIGKILL)
        until(lambda: Process.of(ready["keeper"]) is None, "the keeper's end")
        problems = alone.status()["problems"]
        assert any("stop the VM and start it again" in problem for problem in problems)
        assert not any("restart-capture" in problem for problem in problems)
    with alone.serving():
        pass  # it ends what was left over


def test_a_journal_that_takes_no_words_does_not_keep_an_unprotected_vm_from_starting(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    said: list[str] = []
    # A directory in the place of the file to be written: even root is refused.
    (alone.journal / f".head.json.{os.getpid()}.tmp").mkdir()
    declare_unprotected("alone", alone.journal, None, "why", said.append)
    assert len(said) == 1 and "cannot note" in said[0]
    head = read_head(alone.journal)
    assert head is not None and head.gap is None


def oldest_run(alone: Alone) -> str:
    return str(min(path.stem for path in (alone.journal / "runs").iterdir()))
