"""The guests do what other tests rely on, on plain images without vmrewind."""

from __future__ import annotations

from pathlib import Path

import pytest

from guests import grub, images, writer
from guests.initramfs import initramfs
from guests.kernel import GuestError, linux
from guests.machine import Machine, disk_arguments, qemu_command

MIB = 1 << 20


def start(tmp_path: Path, initrd: Path, append: str = "", disks: tuple[Path, ...] = (), name: str = "serial") -> Machine:
    """A machine with these images as vda, vdb, …; their format is their suffix."""
    serial = tmp_path / name
    command = qemu_command(serial, linux().kernel, initrd, append)
    for index, image in enumerate(disks):
        command += disk_arguments(image, image.suffix[1:], index)
    return Machine(command, serial)


def files(image: Path, target: Path) -> dict[str, bytes]:
    """The numbered files in a file system that must be sound."""
    assert images.replay_and_check_ext4(image) == ""
    return {path.name: path.read_bytes() for path in images.ext4_files(image, target).glob("file-*")}


def expected(numbers: range, disk: str, kib: int) -> dict[str, bytes]:
    return {writer.file_name(n): writer.content(n, disk, kib) for n in numbers}


def test_writer_writes_each_number_to_each_disk_and_goes_on_where_it_was(tmp_path: Path) -> None:
    vda = images.ext4_image(tmp_path / "a.raw", 32 * MIB)
    vdb = images.ext4_image(tmp_path / "b.raw", 32 * MIB)
    for run in (1, 2):
        append = writer.append(count=10, kib=5, disks=("vda", "vdb"))
        with start(tmp_path, writer.writer_initramfs(), append, (vda, vdb), f"serial{run}") as machine:
            machine.wait_for("^POWERING OFF")
            assert machine.wait() == 0
            text = machine.console.text()
        assert writer.acknowledged(text) == list(range(run * 10 - 9, run * 10 + 1))
        assert writer.errors(text) == []
        assert "SCRIPT ENDED 0" in text
    assert files(vda, tmp_path / "vda") == expected(range(1, 21), "vda", 5)
    assert files(vdb, tmp_path / "vdb") == expected(range(1, 21), "vdb", 5)


def test_endless_writer_ends_in_order_when_the_power_button_is_pressed(tmp_path: Path) -> None:
    vda = images.ext4_image(tmp_path / "a.raw", 32 * MIB)
    append = writer.append(count=0, kib=1, pause_ms=20)
    with start(tmp_path, writer.writer_initramfs(), append, (vda,)) as machine:
        machine.wait_for(r"^ACK 5$")
        machine.power_button()
        assert machine.wait() == 0
        text = machine.console.text()
    done = int(machine.console.wait_for(r"^DONE (\d+)$")[1])
    assert writer.acknowledged(text) == list(range(1, done + 1))
    assert writer.errors(text) == []
    assert files(vda, tmp_path / "files") == expected(range(1, done + 1), "vda", 1)


def test_what_was_acknowledged_survives_a_power_failure(tmp_path: Path) -> None:
    vda = images.ext4_image(tmp_path / "a.raw", 32 * MIB)
    with start(tmp_path, writer.writer_initramfs(), writer.append(count=0), (vda,)) as machine:
        machine.wait_for(r"^ACK 20$")
        machine.kill()
        acknowledged = writer.acknowledged(machine.console.text())
    found = files(vda, tmp_path / "files")
    complete = expected(range(1, acknowledged[-1] + 1), "vda", 16)
    assert acknowledged[-1] >= 20
    assert {name: found.get(name) for name in complete} == complete


def test_writer_on_a_qcow2_overlay_leaves_the_backing_file_alone(tmp_path: Path) -> None:
    backing = images.ext4_image(tmp_path / "a.raw", 32 * MIB)
    before = backing.read_bytes()
    overlay = images.qcow2_overlay(tmp_path / "b.qcow2", backing)
    with start(tmp_path, writer.writer_initramfs(), writer.append(count=3), (overlay,)) as machine:
        assert machine.wait() == 0
        assert writer.acknowledged(machine.console.text()) == [1, 2, 3]
    assert backing.read_bytes() == before
    raw = images.qcow2_to_raw(overlay, tmp_path / "c.raw")
    assert files(raw, tmp_path / "files") == expected(range(1, 4), "vda", 16)


def test_a_disk_error_shows(tmp_path: Path) -> None:
    vda = images.ext4_image(tmp_path / "a.raw", 32 * MIB)
    failing = tmp_path / "blkdebug"
    # The image reads well; every write to it fails.
    failing.write_text('[inject-error]\nevent = "none"\niotype = "write"\nerrno = "5"\n')
    serial = tmp_path / "serial"
    command = qemu_command(serial, linux().kernel, writer.writer_initramfs(), writer.append(count=3))
    command += ["-drive", f"if=none,id=disk0,file=blkdebug:{failing}:{vda},format=raw,werror=report"]
    command += ["-device", "virtio-blk-pci,drive=disk0"]
    with Machine(command, serial) as machine:
        assert machine.wait() == 0
        text = machine.console.text()
    assert writer.acknowledged(text) == []
    assert any("ERR " in line for line in writer.errors(text))


def test_boot_loader_writes_before_any_kernel_runs(tmp_path: Path) -> None:
    disk = grub.grub_disk(tmp_path / "grub.raw")
    with disk.path.open("rb") as image:
        image.seek(disk.grubenv_offset)
        assert grub.ENV_LINE not in image.read(1024)
    serial = tmp_path / "serial"
    with Machine(qemu_command(serial) + disk_arguments(disk.path), serial) as machine:
        assert machine.wait() == 0
        text = machine.console.text()
    assert 0 < text.find("GRUB SAVED") < text.find("GUEST WROTE")
    assert writer.errors(text) == []
    with disk.path.open("rb") as image:
        image.seek(disk.grubenv_offset)
        assert grub.ENV_LINE in image.read(1024)
        image.seek(disk.data_offset)
        assert image.read(grub.GUEST_BLOCKS * 4096) == grub.GUEST_PATTERN * grub.GUEST_BLOCKS


def test_waiting_for_what_never_comes_fails_as_soon_as_the_machine_ends(tmp_path: Path) -> None:
    with (
        start(tmp_path, initramfs("echo HELLO from $(uname -s)\n")) as machine,
        pytest.raises(GuestError, match=r"(?s)the machine ended without 'NEVER'.*HELLO from Linux"),
    ):
        machine.wait_for("NEVER")


def test_an_unknown_kernel_module_is_named() -> None:
    with pytest.raises(GuestError, match="no module flux_capacitor"):
        initramfs("", ("flux_capacitor",))
