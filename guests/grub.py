"""A disk that boots itself, and whose boot loader writes to it before any kernel runs. Made without root or loops.

Sector 0 is GRUB's boot.img with the partition table, core.img follows; partition 1 is FAT with kernel, initramfs and
``grubenv``, partition 2 is raw space for the guest. GRUB's ``save_env`` writes :data:`ENV_LINE` into ``grubenv``; then
the kernel boots, and its init writes :data:`GUEST_PATTERN` to partition 2 and powers off.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from guests.images import raw_image, tool
from guests.initramfs import initramfs
from guests.kernel import GuestError, linux
from guests.machine import APPEND

MIB = 1 << 20
GRUB = Path("/usr/lib/grub/i386-pc")
GRUB_MODULES = ("biosdisk", "part_msdos", "fat", "loadenv", "serial", "terminal", "linux", "boot", "echo", "reboot")
SECTOR = 512
FAT_START = 1 * MIB
FAT_SIZE = 48 * MIB
DATA_START = FAT_START + FAT_SIZE
SIZE_MIN = DATA_START + 8 * MIB

ENV_LINE = b"written_by=the-boot-loader\n"
"""What GRUB adds to its environment block on the disk."""

GUEST_PATTERN = (b"written by the guest's kernel\n" * 200)[:4096]
"""One 4 KiB block; the guest writes :data:`GUEST_BLOCKS` of them from the start of partition 2."""
GUEST_BLOCKS = 64

_GRUB_CONFIG = """\
serial --unit=0 --speed=115200
terminal_output serial
echo GRUB STARTED
set written_by=the-boot-loader
save_env -f (hd0,msdos1)/grubenv written_by
echo GRUB SAVED
linux (hd0,msdos1)/vmlinuz {append}
initrd (hd0,msdos1)/initrd
boot
"""

INIT_SCRIPT = f"""\
yes "written by the guest's kernel" 2>/dev/null | head -c 4096 | head -c 4096 >/tmp/block || exit 1
for i in $(seq {GUEST_BLOCKS}); do cat /tmp/block; done >/tmp/blocks
dd if=/tmp/blocks of=/dev/vda2 bs=4096 conv=fsync 2>/tmp/dd || {{ echo "ERR $(cat /tmp/dd)"; exit 1; }}
echo GUEST WROTE
"""
"""What the guest does once its kernel runs."""


@dataclass(frozen=True, slots=True)
class GrubDisk:
    """A disk that boots itself. ``grubenv_offset`` is where its environment block lies, ``data_offset`` partition 2."""

    path: Path
    grubenv_offset: int
    data_offset: int


def grub_disk(path: Path, size_bytes: int = 64 * MIB, append: str = "", cache: Path | None = None) -> GrubDisk:
    """Make the disk. Raises GuestError."""
    if size_bytes < SIZE_MIN:
        raise GuestError(f"{path}: {size_bytes} bytes are too few for a disk that boots itself, {SIZE_MIN} needed")
    raw_image(path, size_bytes)
    table = f"label: dos\nstart={FAT_START // SECTOR}, size={FAT_SIZE // SECTOR}, type=c, bootable\n"
    table += f"start={DATA_START // SECTOR}, type=da\n"
    _run([tool("sfdisk"), "--quiet", "--no-tell-kernel", str(path)], stdin=table.encode())
    with tempfile.TemporaryDirectory(prefix="grub-") as work_name:
        work = Path(work_name)
        _boot_loader(path, work, append)
        environment = (b"# GRUB Environment Block\n" + b"#" * 1024)[:1024]
        (work / "grubenv").write_bytes(environment)
        _fat(path, work / "grubenv", linux(cache).kernel, initramfs(INIT_SCRIPT, cache=cache))
    return GrubDisk(path, _find(path, environment), DATA_START)


def _boot_loader(path: Path, work: Path, append: str) -> None:
    config, core = work / "grub.cfg", work / "core.img"
    config.write_text(_GRUB_CONFIG.format(append=f"{APPEND} {append}".strip()))
    mkimage = ["grub-mkimage", "-O", "i386-pc", "-d", str(GRUB), "-p", "/", "-c", str(config), "-o", str(core)]
    _run([*mkimage, *GRUB_MODULES])
    boot, loader = (GRUB / "boot.img").read_bytes(), core.read_bytes()
    if SECTOR + len(loader) > FAT_START:
        raise GuestError(f"{core}: {len(loader)} bytes don't fit between the partition table and partition 1")
    with path.open("r+b") as disk:
        disk.write(boot[:440])  # up to the disk signature; the rest of the sector is the partition table's
        disk.seek(SECTOR)
        disk.write(loader)


def _fat(path: Path, grubenv: Path, kernel: Path, initrd: Path) -> None:
    partition = f"{path}@@{FAT_START}"
    start, sectors = str(FAT_START // SECTOR), str(FAT_SIZE // SECTOR)
    _run(["mformat", "-i", partition, "-F", "-H", start, "-T", sectors, "-h", "16", "-s", "63", "::"])
    for source, name in ((grubenv, "grubenv"), (kernel, "vmlinuz"), (initrd, "initrd")):
        _run(["mcopy", "-i", partition, str(source), f"::{name}"])


def _find(path: Path, content: bytes) -> int:
    with path.open("rb") as disk:
        disk.seek(FAT_START)
        offset = disk.read(FAT_SIZE).find(content)
    if offset < 0 or offset % SECTOR:
        raise GuestError(f"{path}: no environment block on a sector boundary")
    return FAT_START + offset


def _run(command: list[str], stdin: bytes = b"") -> None:
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if done.returncode:
        raise GuestError(f"{' '.join(command)}: {done.stderr.decode().strip()}")
