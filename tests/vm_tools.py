"""What the end-to-end tests of whole VMs share: a protected writer guest, restores, and a look at the journal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guests.images import ext4_files, ext4_image, raw_image, replay_and_check_ext4
from guests.kernel import linux
from guests.machine import qemu_command
from guests.protected import Disk, ProtectedVm, vmrewind
from guests.writer import append, content, file_name, writer_initramfs

DISK_BYTES = 64 << 20


def writer_vm(
    directory: Path,
    name: str,
    *,
    disks: Sequence[Disk] | None = None,
    count: int = 0,
    pause_ms: int = 0,
    kib: int = 16,
    size_bytes: int = DISK_BYTES,
    **protection: str | int,
) -> ProtectedVm:
    """A VM whose guest writes numbered files; its repository is made. By default one raw disk with an empty ext4."""
    directory.mkdir(parents=True, exist_ok=True)
    if disks is None:
        disks = [Disk("vda", ext4_image(directory / "vda.raw", size_bytes))]
    guest = linux()
    words = append(count=count, kib=kib, pause_ms=pause_ms, disks=tuple(disk.target for disk in disks))
    command = qemu_command(directory / "serial", guest.kernel, writer_initramfs(), words)
    vm = ProtectedVm(directory, name, command, disks, **protection)
    if not vm.repository.exists():
        vmrewind("init", vm.repository)
    return vm


class IdleVm(ProtectedVm):
    """A VM that finds nothing to boot, with a raw disk of zeroes: who writes is the test."""

    def __init__(self, directory: Path, name: str, **protection: str | int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.image = raw_image(directory / "vda.raw", 64 << 20)
        command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "16", "-display", "none", "-nodefaults", "-no-reboot"]
        command += ["-serial", f"file:{directory / 'serial'}"]
        super().__init__(directory, name, command, [Disk("vda", self.image)], **{"journal_size": "64MiB", **protection})
        if not self.repository.exists():
            vmrewind("init", self.repository)

    _DEVICE = "/machine/peripheral/vmrewind-vda/virtio-backend"

    def write(self, pattern: int, offset: int = 0, length: int = 1 << 20) -> None:
        """Write and flush as a guest does, through the machine's own device; returns when both are answered."""
        with self.monitor() as monitor:
            for command in (f"write -P {pattern} {offset} {length}", "flush"):
                said = monitor.execute("human-monitor-command", **{"command-line": f'qemu-io -d {self._DEVICE} "{command}"'})
                assert not said, said


def restore(vm: ProtectedVm, moment: str, output: Path, *more: str) -> dict[str, Any]:
    """``vmrewind restore --output``; returns its report."""
    done = vmrewind("restore", vm.config, "--at", moment, "--output", output, "--json", *more)
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def files_in(image: Path, scratch: Path) -> dict[int, bytes]:
    """The numbered files of an ext4 image as a crash at its moment would leave them; fails if the file system is damaged."""
    assert replay_and_check_ext4(image) == ""
    directory = ext4_files(image, scratch)
    return {int(path.name.removeprefix("file-")): path.read_bytes() for path in directory.glob("file-*")}


def check_files(found: dict[int, bytes], acknowledged: Sequence[int], disk: str = "vda", kib: int = 16) -> None:
    """Every acknowledged file is there, complete; beyond them at most what the guest was about to be told of."""
    for number in acknowledged:
        assert found.get(number) == content(number, disk, kib), f"{file_name(number)} was acknowledged and is not whole"
    last = max(acknowledged, default=0)
    assert set(found) - set(acknowledged) <= {last + 1, last + 2}


def journal_records(journal: Path) -> list[dict[str, Any]]:
    """``vmrewind journal dump --json`` of a whole journal directory."""
    return [json.loads(line) for line in vmrewind("journal", "dump", journal, "--json").stdout.splitlines()]
