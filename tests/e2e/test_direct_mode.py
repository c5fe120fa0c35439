"""``vmrewind run``: how a VM starts, ends, and is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from guests.protected import VMREWIND, Disk, ProtectedVm, vmrewind
from guests.writer import acknowledged
from tests.vm_tools import check_files, files_in, restore, writer_vm


def processes_of(vm: ProtectedVm) -> list[int]:
    """Pids of every process whose command line names the VM's files or sockets."""
    found = []
    marks = (str(vm.journal), str(vm.config), str(vm.console.path))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if any(mark in words for mark in marks):
                found.append(int(entry.name))
    return found


def refused(vm: ProtectedVm) -> dict[str, str]:
    """Run the VM, which must be refused before its CPU starts; returns kind, message, hint. Leaves no process."""
    done = subprocess.run([VMREWIND, "run", vm.config], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode not in (0, 1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert processes_of(vm) == []
    assert not vm.console.path.exists(), "QEMU was started"
    return {"code": str(done.returncode), "text": done.stderr}


def test_ctrl_c_shuts_the_guest_down_properly(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "ctrlc", pause_ms=20) as vm:
        vm.start()
        vm.wait_for("^ACK 3$")
        vm.interrupt()
        assert vm.wait() == 0
    assert "POWERING OFF" in vm.console.text()
    assert processes_of(vm) == []
    assert vm.status()["state"] == "stopped" and vm.status()["problems"] == []


def test_a_guest_that_ignores_the_power_button_is_ended_after_the_timeout(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "deaf", shutdown_timeout_seconds=1) as vm:
        vm.start()
        vm.wait_for("^ACK 3$")
        with vm.monitor() as monitor:
            monitor.execute("stop")
        vm.interrupt()
        assert vm.wait() == 0
    assert "has not shut down" in vm.output.read_text()
    assert vm.status()["problems"] == []


def test_the_vms_exit_is_passed_on(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "exit", pause_ms=20) as vm:
        vm.start()
        vm.wait_for("^ACK 3$")
        os.kill(vm.status()["processes"]["qemu"]["pid"], signal.SIGKILL)
        assert vm.wait() == 128 + signal.SIGKILL
    assert vm.status()["problems"] == []
    restore(vm, "latest", tmp_path / "latest")
    check_files(files_in(tmp_path / "latest" / "vda.raw", tmp_path / "files"), acknowledged(vm.console.text()))


def test_a_qemu_that_does_not_start_leaves_nothing_behind(tmp_path: Path) -> None:
    vm = writer_vm(tmp_path, "broken")
    vm.config.write_text(vm.config.read_text().replace('"-display", "none"', '"-display", "nonsense"'))
    done = vmrewind("run", vm.config, check=False)
    assert done.returncode == 10 and "QEMU ended before its CPU was started" in done.stderr
    assert processes_of(vm) == []
    assert vm.status()["problems"] == []


def test_refusals_before_the_cpu(tmp_path: Path) -> None:
    vm = writer_vm(tmp_path, "refused")
    image = tmp_path / "vda.raw"
    good = vm.config.read_text()

    def with_config(old: str, new: str) -> dict[str, str]:
        assert old in good
        vm.config.write_text(good.replace(old, new))
        try:
            return refused(vm)
        finally:
            vm.config.write_text(good)

    answer = with_config("[protection]", "[protection")
    assert answer["code"] == "3" and str(vm.config) in answer["text"]
    answer = with_config("enabled = true", "enabled = true\nshop = 1")
    assert answer["code"] == "3" and "shop" in answer["text"] and "ship" in answer["text"]
    answer = with_config(str(image), str(tmp_path / "other.raw"))
    assert answer["code"] == "4" and "other.raw" in answer["text"]
    answer = with_config(str(vm.repository), str(tmp_path / "nowhere"))
    assert answer["code"] == "5" and "nowhere" in answer["text"] and "vmrewind init" in answer["text"]
    answer = with_config('journal_size = "256MiB"', 'journal_size = "900TiB"')
    assert answer["code"] == "9" and "journal_size" in answer["text"]

    user = subprocess.Popen(["qemu-io", "-f", "raw", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert user.stdin is not None and user.stdout is not None
    user.stdin.write("write 0 512\n")
    user.stdin.flush()
    user.stdout.readline()
    try:
        answer = refused(vm)
        assert answer["code"] == "4" and f"pid {user.pid}" in answer["text"]
    finally:
        user.communicate("quit\n")

    newer = json.loads((vm.repository / "repository.json").read_bytes()) | {"format": 99}
    kept = (vm.repository / "repository.json").read_bytes()
    (vm.repository / "repository.json").chmod(0o600)
    (vm.repository / "repository.json").write_text(json.dumps(newer))
    answer = refused(vm)
    assert answer["code"] == "5" and "newer" in answer["text"]
    (vm.repository / "repository.json").write_bytes(kept)

    # After all of that nothing is lost: the VM starts.
    with vm:
        vm.start()
        vm.wait_for("^ACK 1$")
        vm.quit()


def test_two_vms_with_one_image(tmp_path: Path) -> None:
    first = writer_vm(tmp_path / "a", "first")
    with first:
        first.start()
        second = writer_vm(tmp_path / "b", "second", disks=[Disk("vda", tmp_path / "a" / "vda.raw")])
        answer = refused(second)
        assert answer["code"] == "4" and "in use" in answer["text"]
        again = vmrewind("run", first.config, check=False)
        assert again.returncode == 8 and "already running" in again.stderr
        first.wait_for("^ACK 3$")
        first.quit()


def test_start_unprotected_says_so_and_starts(tmp_path: Path) -> None:
    vm = writer_vm(tmp_path, "anyway", count=3, on_failure="start-unprotected")
    (vm.repository / "repository.json").unlink()
    with vm:
        # Its start fails, so the event log never says cpu.started: wait for the guest itself.
        done = subprocess.run([VMREWIND, "run", vm.config], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "NOT PROTECTED" in done.stderr
    assert acknowledged(vm.console.text()) == [1, 2, 3]
    assert processes_of(vm) == []


def test_protection_switched_off(tmp_path: Path) -> None:
    vm = writer_vm(tmp_path, "off", count=2)
    vm.config.write_text(vm.config.read_text().replace("enabled = true", "enabled = false"))
    done = subprocess.run([VMREWIND, "run", vm.config], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "protection is off" in done.stderr
    assert acknowledged(vm.console.text()) == [1, 2]
    assert not vm.journal.exists()


@pytest.mark.parametrize("victim", ["ship", "keeper"])
def test_a_dead_helper_does_not_touch_the_guest(tmp_path: Path, victim: str) -> None:
    with writer_vm(tmp_path, "helper", pause_ms=20) as vm:
        vm.start()
        vm.wait_for("^ACK 3$")
        before = vm.status()["processes"]
        os.kill(before[victim]["pid"], signal.SIGKILL)
        last = max(acknowledged(vm.console.text()))
        vm.console.wait_for(f"^ACK {last + 20}$", 60)
        if victim == "ship":
            deadline = time.monotonic() + 20
            while not (after := vm.status()["processes"]["ship"])["alive"] or after["pid"] == before["ship"]["pid"]:
                assert time.monotonic() < deadline
            vm.quit()
            restore(vm, "latest", tmp_path / "latest")
            assert (tmp_path / "latest" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
            return
        assert vm.wait() == -signal.SIGKILL
        # Without its keeper the VM runs on; a second start is refused while it does, and takes over what it left after it.
        assert any("keeper" in problem for problem in vm.status()["problems"])
        again = vmrewind("run", vm.config, check=False)
        assert again.returncode == 8, again.stderr
        with vm.monitor() as monitor:
            monitor.execute("quit")
        deadline = time.monotonic() + 20
        while Path(f"/proc/{before['qemu']['pid']}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        vm.console.path.unlink()
        vm.start()
        vm.wait_for("^ACK")
        vm.quit()
        assert "history.gap" not in [event["event"] for event in vm.events()]
