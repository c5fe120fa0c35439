"""``vmrewind run``: how a VM starts, ends, and is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

from guests.protected import VMREWIND, Disk, ProtectedVm, vmrewind
from guests.writer import acknowledged
from tests.capture_tools import until
from tests.vm_tools import IdleVm, restore, writer_vm


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
    done = vmrewind("run", vm.config, check=False)
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
    with IdleVm(tmp_path, "deaf", shutdown_timeout_seconds=1) as vm:
        vm.start()
        vm.interrupt()
        assert vm.wait() == 0
    assert "has not shut down" in vm.output.read_text()
    assert vm.status()["problems"] == []


def test_the_vms_exit_is_passed_on(tmp_path: Path) -> None:
    with IdleVm(tmp_path, "exit") as vm:
        vm.start()
        vm.write(1)
        os.kill(vm.status()["processes"]["qemu"]["pid"], signal.SIGKILL)
        assert vm.wait() == 128 + signal.SIGKILL
    assert vm.status()["problems"] == []
    restore(vm, "latest", tmp_path / "latest")
    assert (tmp_path / "latest" / "vda.raw").read_bytes() == vm.image.read_bytes()
    assert vm.image.read_bytes()[0] == 1


def test_a_qemu_that_does_not_start_leaves_nothing_behind(tmp_path: Path) -> None:
    vm = IdleVm(tmp_path, "broken")
    vm.config.write_text(vm.config.read_text().replace('"-display", "none"', '"-display", "nonsense"'))
    done = vmrewind("run", vm.config, check=False)
    assert done.returncode == 10 and "QEMU ended before its CPU was started" in done.stderr
    assert processes_of(vm) == []
    assert vm.status()["problems"] == []


def test_refusals_before_the_cpu(tmp_path: Path) -> None:
    vm = IdleVm(tmp_path, "refused")
    image = vm.image
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
    answer = with_config('journal_size = "64MiB"', 'journal_size = "900TiB"')
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
        vm.write(1)
        vm.quit()


def test_two_vms_with_one_image(tmp_path: Path) -> None:
    first = IdleVm(tmp_path / "a", "first")
    with first:
        first.start()
        second = writer_vm(tmp_path / "b", "second", disks=[Disk("vda", first.image)])
        answer = refused(second)
        assert answer["code"] == "4" and "in use" in answer["text"]
        again = vmrewind("run", first.config, check=False)
        assert again.returncode == 8 and "already running" in again.stderr
        first.write(1)
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


def test_a_dead_ship_is_replaced(tmp_path: Path) -> None:
    with IdleVm(tmp_path, "helper") as vm:
        vm.start()
        vm.write(1)
        before = vm.status()["processes"]["ship"]["pid"]
        os.kill(before, signal.SIGKILL)
        vm.write(2)
        until(lambda: (ship := vm.status()["processes"]["ship"])["alive"] and ship["pid"] != before, "another ship")
        vm.write(3, 8 << 20)
        vm.quit()
    shutil.rmtree(vm.journal)
    restore(vm, "latest", tmp_path / "latest")
    assert (tmp_path / "latest" / "vda.raw").read_bytes() == vm.image.read_bytes()


def test_without_its_keeper_a_vm_runs_on_and_the_next_start_takes_over_what_is_left(tmp_path: Path) -> None:
    with IdleVm(tmp_path, "helper") as vm:
        vm.start()
        before = vm.status()["processes"]
        os.kill(before["keeper"]["pid"], signal.SIGKILL)
        assert vm.wait() == -signal.SIGKILL
        vm.write(1)
        assert any("keeper" in problem for problem in vm.status()["problems"])
        again = vmrewind("run", vm.config, check=False)
        assert again.returncode == 8, again.stderr
        vm.write(2, 8 << 20)
        with vm.monitor() as monitor:
            monitor.execute("quit")
        until(lambda: not Path(f"/proc/{before['qemu']['pid']}").exists(), "QEMU's end")
        vm.start()
        assert "history.gap" not in [event["event"] for event in vm.events()]
        vm.write(3, 16 << 20)
        vm.quit()
    restore(vm, "latest", tmp_path / "latest")
    assert (tmp_path / "latest" / "vda.raw").read_bytes() == vm.image.read_bytes()
