"""From run to run: what continues, what is a gap, what survives a crash, and what is restored from where."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

from guests.protected import vmrewind
from guests.writer import acknowledged
from tests.capture_tools import until
from tests.e2e.test_start_after import MIB, SIZE, Alone
from tests.fault_tools import kill
from tests.vm_tools import IdleVm, check_files, files_in, restore, writer_vm


def now() -> str:
    """This instant, with nothing else that happens in it."""
    time.sleep(0.002)
    moment = datetime.now(UTC).isoformat()
    time.sleep(0.002)
    return moment


def test_a_second_run_continues_the_first(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        assert "base.begun" in alone.events()
        alone.write(ready, 1)
    between, image = now(), alone.image.read_bytes()
    with alone.serving() as ready:
        events = alone.events()
        assert "base.begun" not in events and "history.gap" not in events
        alone.write(ready, 2)
    assert alone.restored(between) == image
    assert alone.restored("latest") == alone.image.read_bytes() != image


def test_an_image_changed_while_off_is_a_gap_and_not_guessed(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    between = now()
    with alone.image.open("r+b") as file:
        file.seek(50 * MIB)
        file.write(b"behind our back")
    with alone.serving() as ready:
        alone.write(ready, 2, 4 * MIB)
        until(lambda: {"resync.done", "resync.failed"} & set(alone.events()), "the resync")
        log = [json.loads(line) for line in vmrewind("events", alone.config, "--json").stdout.splitlines()]
        events = {event["event"]: event for event in log}
        assert "history.gap" in events and "base.begun" not in events
        # Only what differs is journaled anew: the block that was changed, and what was written before it was compared.
        assert 0 < events["resync.done"]["bytes_journaled"] < 4 * MIB
        alone.write(ready, 3, 8 * MIB)
        healed, image = now(), alone.image.read_bytes()
        alone.write(ready, 4, 8 * MIB)
    refused = vmrewind("restore", alone.config, "--at", between, "--output", tmp_path / "no", check=False)
    assert refused.returncode == 6 and "changed while the VM was off" in refused.stderr + refused.stdout
    assert not (tmp_path / "no" / "vda.raw").exists()
    timeline = json.loads(vmrewind("timeline", alone.config, "--json").stdout)
    assert "changed while the VM was off" in json.dumps(timeline)
    assert alone.restored("latest") == alone.image.read_bytes() != image
    assert alone.restored(healed) == image
    # The repository alone tells the same, and refuses the same.
    shutil.rmtree(alone.journal)
    assert alone.restored(healed) == image
    assert vmrewind("restore", alone.config, "--at", between, "--output", tmp_path / "no", check=False).returncode == 6


def test_everything_killed_at_once(tmp_path: Path) -> None:
    with writer_vm(tmp_path, "crash") as vm:
        vm.start()
        vm.wait_for("^ACK 10$")
        kill(*(process["pid"] for process in vm.status()["processes"].values()))
        vm.wait()
        known = acknowledged(vm.console.text())
        crashed = datetime.now(UTC).isoformat()
        assert any("did not end cleanly" in problem for problem in vm.status()["problems"])
        restore(vm, "latest", tmp_path / "crashed")
        check_files(files_in(tmp_path / "crashed" / "vda.raw", tmp_path / "files"), known)
        vm.console.path.unlink()
        vm.start()
        assert {"journal.recovered", "history.gap"} <= {event["event"] for event in vm.events()}
        until(lambda: "resync.done" in [event["event"] for event in vm.events()], "the resync")
        vm.wait_for("^ACK")
        vm.quit()
    assert list(vm.journal.glob("runs/*-0.closed")), "the next start would make a base once the record of the gap's end is recycled"
    refused = vmrewind("restore", vm.config, "--at", crashed, "--output", tmp_path / "no", check=False)
    assert refused.returncode == 6
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()


def test_a_stop_that_leaves_records_behind_says_so(tmp_path: Path) -> None:
    with IdleVm(tmp_path, "behind") as vm:
        vm.start()
        vm.repository.rename(tmp_path / "away")
        vm.write(1)
        vm.quit()
        assert "in the repository: `vmrewind ship on behind` carries it" in vm.output.read_text()
        (tmp_path / "away").rename(vm.repository)
        vmrewind("ship", "on", vm.config)
        assert vm.status()["problems"] == []


def test_another_size_than_the_bases_is_refused_until_a_backup_is_made(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    with alone.image.open("r+b") as file:
        file.truncate(SIZE + 16 * MIB)
    done = vmrewind("capture", alone.config, check=False)
    assert done.returncode == 4 and "vmrewind backup" in done.stderr and str(SIZE + 16 * MIB) in done.stderr
    vmrewind("backup", alone.config)
    assert "history.gap" in alone.events(), "the backup is a run of its own, and the gap lies before it"
    with alone.serving() as ready:
        events = alone.events()
        assert "history.gap" not in events and "base.begun" not in events
        alone.write(ready, 2, SIZE)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_in_place_restore_goes_back_and_history_goes_on_from_there(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
        marked = json.loads(vmrewind("mark", alone.config, "good", "--json").stdout)
        good = alone.image.read_bytes()
        running = vmrewind("restore", alone.config, "--at", "@good", "--in-place", check=False)
        assert running.returncode == 8
        alone.write(ready, 2)
        alone.write(ready, 3, 8 * MIB)
    bad = alone.image.read_bytes()
    abandoned = alone.status()["last_record"]["seq"]
    vmrewind("restore", alone.config, "--at", "@good", "--in-place")
    assert alone.image.read_bytes() == good
    report = vmrewind("restore", alone.config, "--at", "latest", "--output", tmp_path / "rewound", "--json").stdout
    assert json.loads(report.splitlines()[-1])["seq"] == marked["seq"]
    assert "taken back" in vmrewind("timeline", alone.config).stdout
    with alone.serving() as ready:
        events = alone.events()
        assert "history.gap" not in events and "base.begun" not in events
        alone.write(ready, 4, 4 * MIB)
    assert alone.restored("latest") == alone.image.read_bytes()
    assert alone.restored(f"seq:{marked['seq']}") == good
    # What was given up is still there, on its own branch.
    first = min((alone.journal / "runs").glob("*.json")).stem
    assert alone.restored(f"seq:{abandoned}", "--branch", first) == bad


def test_what_was_shipped_restores_without_the_journal(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
        marked = json.loads(vmrewind("mark", alone.config, "shipped", "--json").stdout)
        image = alone.image.read_bytes()
        # Within about a second everything is there.
        until(lambda: (alone.status()["ship"].get("shipped_seq") or 0) >= marked["seq"], "the shipping")
        os.kill(alone.status()["processes"]["ship"]["pid"], signal.SIGKILL)
        alone.write(ready, 2)
        alone.write(ready, 3, 8 * MIB)
    shutil.rmtree(alone.journal)
    assert alone.restored("latest") == alone.image.read_bytes()
    assert alone.restored(f"seq:{marked['seq']}") == image


def test_ship_on_demand_carries_from_the_vms_start_on(tmp_path: Path) -> None:
    alone = Alone(tmp_path, ship="on-demand")
    with alone.serving() as ready:
        alone.write(ready, 1)
        marked = json.loads(vmrewind("mark", alone.config, "early", "--json").stdout)
        early = alone.image.read_bytes()
        assert alone.status()["ship"]["wanted"] == []
        assert list((alone.repository / "vms" / "alone").glob("segments/**/*-*")) == []
        wrong = vmrewind("ship", "on", alone.config, "--disk", "vdz", check=False)
        assert wrong.returncode == 2 and "vda" in wrong.stderr
        vmrewind("ship", "on", alone.config, "--disk", "vda")
        alone.write(ready, 2)
    shutil.rmtree(alone.journal)
    assert alone.restored("latest") == alone.image.read_bytes()
    assert alone.restored(f"seq:{marked['seq']}") == early


def test_a_lost_host_directory_is_not_mistaken_for_a_new_vm(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    shutil.rmtree(alone.journal.parent)
    done = vmrewind("capture", alone.config, check=False)
    assert done.returncode == 5 and 'uuid = "' in done.stderr
    uuid = done.stderr.split('uuid = "')[1].split('"')[0]
    alone.config.write_text(f'uuid = "{uuid}"\n' + alone.config.read_text())
    with alone.serving() as ready:
        assert "history.gap" in alone.events()
        alone.write(ready, 2, MIB)
    assert alone.restored("latest") == alone.image.read_bytes()
