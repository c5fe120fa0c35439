"""A guest with a file system, taken back to random times: whatever it was told is safe is there, whole."""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from guests.images import qcow2_overlay, qcow2_to_raw
from guests.protected import Disk, ProtectedVm, vmrewind
from guests.writer import acknowledged, errors
from tests.vm_tools import check_files, files_in, restore, writer_vm
from vmrewind.paths import VmPaths
from vmrewind.start.processes import Keeping

Noted = tuple[str, list[int]]
"""A time as a user would write it, and the numbers that the guest had been told are safe before it."""


def note(vm: ProtectedVm) -> Noted:
    """This instant: what the console shows is read before the clock is."""
    known = acknowledged(vm.console.text())
    return datetime.now(UTC).isoformat(), known


def test_an_ext4_guest_at_twenty_random_times(tmp_path: Path) -> None:
    seed = 20
    chance = random.Random(seed)
    noted: list[Noted] = []
    with writer_vm(tmp_path, "ext4", pause_ms=20) as vm:
        vm.start()
        vm.wait_for("^ACK 5$")
        while len(noted) < 20:
            time.sleep(chance.uniform(0.05, 0.6))
            noted.append(note(vm))
        vm.quit()
    assert len({len(known) for _, known in noted}) > 10, "the guest wrote too little between the moments"
    for number, (moment, known) in enumerate(noted):
        report = restore(vm, moment, tmp_path / f"at-{number}")
        found = files_in(tmp_path / f"at-{number}" / "vda.raw", tmp_path / f"files-{number}")
        check_files(found, known)
        assert report["seq"] > 0
        (tmp_path / f"at-{number}" / "vda.raw").unlink()


def test_capture_killed_twenty_times_under_a_writing_guest(tmp_path: Path) -> None:
    noted: list[Noted] = []
    killed: set[int] = set()
    with writer_vm(tmp_path, "killed", pause_ms=20) as vm:
        vm.start()
        vm.wait_for("^ACK 5$")
        deadline = time.monotonic() + 120
        while len(killed) < 20:
            assert time.monotonic() < deadline, f"{len(killed)} kills in time"
            assert vm.running()
            keeping = Keeping.read(VmPaths(vm.name))
            capture = keeping and keeping.capture
            if capture is not None and capture.alive and capture.pid not in killed:
                killed.add(capture.pid)
                os.kill(capture.pid, signal.SIGKILL)
                if len(killed) % 4 == 0:
                    noted.append(note(vm))
            else:
                time.sleep(0.02)
        last = max(acknowledged(vm.console.text()))
        vm.wait_for(f"^ACK {last + 5}$")
        vm.quit()
    assert errors(vm.console.text()) == []
    names = [event["event"] for event in vm.events()]
    assert names.count("capture.died") == names.count("capture.restarted") == 20

    restore(vm, "latest", tmp_path / "latest")
    assert (tmp_path / "latest" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
    noted.append((f"seq:{vm.status()['last_record']['seq']}", acknowledged(vm.console.text())))
    for number, (moment, known) in enumerate(noted):
        restore(vm, moment, tmp_path / f"at-{number}")
        check_files(files_in(tmp_path / f"at-{number}" / "vda.raw", tmp_path / f"files-{number}"), known)
    vmrewind("journal", "verify", vm.journal)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_two_disks_restored_at_one_moment(tmp_path: Path, image_format: str) -> None:
    from guests.images import ext4_image

    disks = []
    for target in ("vda", "vdb"):
        raw = ext4_image(tmp_path / f"{target}.raw", 64 << 20)
        if image_format == "raw":
            disks.append(Disk(target, raw))
        else:
            disks.append(Disk(target, qcow2_overlay(tmp_path / f"{target}.qcow2", raw), "qcow2"))
    noted: list[Noted] = []
    with writer_vm(tmp_path, "pair", disks=disks, pause_ms=20) as vm:
        vm.start()
        for number in (5, 12, 25):
            vm.wait_for(f"^ACK {number}$")
            noted.append(note(vm))
        vm.quit()
    for number, (moment, known) in enumerate(noted):
        output = tmp_path / f"at-{number}"
        restore(vm, moment, output)
        states = {}
        for disk in disks:
            image = output / f"{disk.target}.{image_format}"
            if image_format == "qcow2":
                image = qcow2_to_raw(image, output / f"{disk.target}.raw")
            states[disk.target] = files_in(image, output / f"files-{disk.target}")
            check_files(states[disk.target], known, disk.target)
        # The guest writes each number to vda first: a cut in write order never has it on vdb alone.
        assert set(states["vdb"]) <= set(states["vda"])
