"""From run to run: what continues, what is a gap, what survives a crash, and what is restored from where."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

from guests.protected import ProtectedVm, vmrewind
from guests.writer import acknowledged
from tests.vm_tools import check_files, files_in, restore, writer_vm


def run_once(vm: ProtectedVm, files: int = 5) -> None:
    """Start, wait for some more files, end."""
    vm.console.path.unlink(missing_ok=True)
    vm.start()
    vm.wait_for(f"(?s)(^ACK .*){{{files}}}")
    vm.quit()


def wait_for_resync(vm: ProtectedVm) -> dict[str, object]:
    """Wait until the gap that the run began with is closed; the event."""
    deadline = time.monotonic() + 60
    while "resync.done" not in names(vm):
        assert "resync.failed" not in names(vm), vm.events()
        assert time.monotonic() < deadline, vm.events()
        time.sleep(0.05)
    return next(event for event in vm.events() if event["event"] == "resync.done")


def names(vm: ProtectedVm) -> list[str]:
    return [event["event"] for event in vm.events()]


def test_a_second_run_continues_the_first(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "twice", pause_ms=20) as vm:
        run_once(vm)
        assert "base.begun" in names(vm)
        between = datetime.now(UTC).isoformat()
        shutil.copyfile(tmp_path / "vda.raw", tmp_path / "between.raw")
        run_once(vm)
        assert "base.begun" not in names(vm) and "history.gap" not in names(vm)
    restore(vm, between, tmp_path / "at")
    assert (tmp_path / "at" / "vda.raw").read_bytes() == (tmp_path / "between.raw").read_bytes()
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()


def test_an_image_changed_while_off_is_a_gap_and_not_guessed(tmp_path: Path) -> None:
    image = tmp_path / "vda.raw"
    with writer_vm(tmp_path, "changed", pause_ms=20) as vm:
        run_once(vm)
        between = datetime.now(UTC).isoformat()
        with image.open("r+b") as file:
            file.seek(150 << 20)
            file.write(b"behind our back")
        vm.console.path.unlink()
        vm.start()
        assert "history.gap" in names(vm) and "base.begun" not in names(vm)
        vm.wait_for("^ACK")
        done = wait_for_resync(vm)
        # Only what differs is journaled anew: the block that was changed, and what the guest wrote before it was compared.
        assert isinstance(done["bytes_journaled"], int) and 0 < done["bytes_journaled"] < 16 << 20
        first = min(acknowledged(vm.console.text()))
        vm.wait_for(f"^ACK {first + 10}$")
        with vm.paused():
            healed = datetime.now(UTC).isoformat()
            shutil.copyfile(image, tmp_path / "healed.raw")
            time.sleep(0.002)
        vm.quit()
    refused = vmrewind("restore", vm.config, "--at", between, "--output", tmp_path / "no", check=False)
    assert refused.returncode == 6 and "changed while the VM was off" in refused.stderr + refused.stdout
    assert not (tmp_path / "no" / "vda.raw").exists()
    timeline = json.loads(vmrewind("timeline", vm.config, "--json").stdout)
    assert "changed while the VM was off" in json.dumps(timeline)
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == image.read_bytes()
    restore(vm, healed, tmp_path / "healed")
    assert (tmp_path / "healed" / "vda.raw").read_bytes() == (tmp_path / "healed.raw").read_bytes()
    # The repository alone tells the same, and refuses the same.
    shutil.rmtree(vm.journal)
    restore(vm, healed, tmp_path / "shipped")
    assert (tmp_path / "shipped" / "vda.raw").read_bytes() == (tmp_path / "healed.raw").read_bytes()
    assert vmrewind("restore", vm.config, "--at", between, "--output", tmp_path / "no", check=False).returncode == 6


def test_everything_killed_at_once(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "crash") as vm:
        vm.start()
        vm.wait_for("^ACK 10$")
        processes = [p["pid"] for p in vm.status()["processes"].values()]
        for pid in processes:
            os.kill(pid, signal.SIGKILL)
        vm.wait()
        known = acknowledged(vm.console.text())
        crashed = datetime.now(UTC).isoformat()
        assert any("did not end cleanly" in problem for problem in vm.status()["problems"])
        restore(vm, "latest", tmp_path / "crashed")
        check_files(files_in(tmp_path / "crashed" / "vda.raw", tmp_path / "files"), known)
        vm.console.path.unlink()
        vm.start()
        assert "journal.recovered" in names(vm) and "history.gap" in names(vm)
        wait_for_resync(vm)
        vm.wait_for("^ACK")
        vm.quit()
    assert list(vm.journal.glob("runs/*-0.closed")), "the next start would make a base once the record of the gap's end is recycled"
    refused = vmrewind("restore", vm.config, "--at", crashed, "--output", tmp_path / "no", check=False)
    assert refused.returncode == 6
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()


def test_a_stop_that_leaves_records_behind_says_so(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    with writer_vm(tmp_path, "behind") as vm:
        vm.start()
        vm.wait_for("^ACK 3$")
        repository.rename(tmp_path / "away")
        last = max(acknowledged(vm.console.text()))
        vm.wait_for(f"^ACK {last + 3}$")
        vm.quit()
        said = vm.output.read_text()
        assert "in the repository: `vmrewind ship on behind` carries it" in said
        (tmp_path / "away").rename(repository)
        vmrewind("ship", "on", vm.config)
        assert vm.status()["problems"] == []


def test_another_size_than_the_bases_is_refused_until_a_backup_is_made(tmp_path: Path) -> None:
    image = tmp_path / "vda.raw"
    with writer_vm(tmp_path, "grown", pause_ms=20) as vm:
        run_once(vm)
        with image.open("r+b") as file:
            file.truncate(256 << 20)
        done = vmrewind("run", vm.config, check=False)
        assert done.returncode == 4 and "vmrewind backup" in done.stderr and str(256 << 20) in done.stderr
        vmrewind("backup", vm.config)
        assert "history.gap" in names(vm), "the backup is a run of its own, and the gap lies before it"
        run_once(vm)
        assert "history.gap" not in names(vm) and "base.begun" not in names(vm)
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == image.read_bytes()


def test_in_place_restore_goes_back_and_history_goes_on_from_there(tmp_path: Path) -> None:
    image = tmp_path / "vda.raw"
    with writer_vm(tmp_path, "back", pause_ms=20) as vm:
        vm.start()
        vm.wait_for("^ACK 4$")
        with vm.paused():
            marked = json.loads(vmrewind("mark", vm.config, "good", "--json").stdout)
            shutil.copyfile(image, tmp_path / "good.raw")
        running = vmrewind("restore", vm.config, "--at", "@good", "--in-place", check=False)
        assert running.returncode == 8
        vm.wait_for("^ACK 12$")
        vm.quit()
        shutil.copyfile(image, tmp_path / "bad.raw")
        abandoned = vm.status()["last_record"]["seq"]
        vmrewind("restore", vm.config, "--at", "@good", "--in-place")
        assert image.read_bytes() == (tmp_path / "good.raw").read_bytes()
        assert restore(vm, "latest", tmp_path / "rewound")["seq"] == marked["seq"]
        assert "taken back" in vmrewind("timeline", vm.config).stdout
        run_once(vm)
        assert "history.gap" not in names(vm) and "base.begun" not in names(vm)
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == image.read_bytes()
    restore(vm, f"seq:{marked['seq']}", tmp_path / "good")
    assert (tmp_path / "good" / "vda.raw").read_bytes() == (tmp_path / "good.raw").read_bytes()
    # What was given up is still there, on its own branch.
    first = min((vm.journal / "runs").glob("*.json")).stem
    restore(vm, f"seq:{abandoned}", tmp_path / "bad", "--branch", first)
    assert (tmp_path / "bad" / "vda.raw").read_bytes() == (tmp_path / "bad.raw").read_bytes()


def test_what_was_shipped_restores_without_the_journal(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "shipped", pause_ms=20) as vm:
        vm.start()
        vm.wait_for("^ACK 10$")
        deadline = time.monotonic() + 20
        # Within about a second everything is there: wait for a moment at which nothing is unsent.
        while not (ship := vm.status()["ship"]).get("shipped_seq") or ship["shipped_seq"] < 50:
            assert time.monotonic() < deadline, ship
            time.sleep(0.05)
        os.kill(vm.status()["processes"]["ship"]["pid"], signal.SIGKILL)
        vm.wait_for("^ACK 25$")
        vm.quit()
    shutil.rmtree(vm.journal)
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
    restore(vm, f"seq:{ship['shipped_seq']}", tmp_path / "at")


def test_ship_on_demand_carries_from_the_vms_start_on(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "demand", pause_ms=20, ship="on-demand") as vm:
        vm.start()
        vm.wait_for("^ACK 5$")
        assert vm.status()["ship"]["wanted"] == []
        assert list((vm.repository / "vms" / "demand").glob("segments/**/*-*")) == []
        wrong = vmrewind("ship", "on", vm.config, "--disk", "vdz", check=False)
        assert wrong.returncode == 2 and "vda" in wrong.stderr
        vmrewind("ship", "on", vm.config, "--disk", "vda")
        vm.wait_for("^ACK 20$")
        vm.quit()
    shutil.rmtree(vm.journal)
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
    restore(vm, "seq:20", tmp_path / "early")


def test_a_lost_host_directory_is_not_mistaken_for_a_new_vm(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "lost", pause_ms=20) as vm:
        run_once(vm)
        shutil.rmtree(vm.journal.parent)
        done = vmrewind("run", vm.config, check=False)
        assert done.returncode == 5 and 'uuid = "' in done.stderr
        uuid = done.stderr.split('uuid = "')[1].split('"')[0]
        vm.config.write_text(f'uuid = "{uuid}"\n' + vm.config.read_text())
        run_once(vm)
        assert "history.gap" in names(vm)
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
