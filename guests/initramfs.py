"""The guests' initramfs: busybox, the modules for virtio disks and the power button, and a script to run.

The script runs as a child of ``/init`` with its output on the serial console. When it ends, or the power button is
pressed (QMP ``system_powerdown``, ``virsh shutdown``), everything is unmounted and the machine powers off. The console
then shows ``SCRIPT ENDED <exit status>`` and ``POWERING OFF``.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from guests.kernel import GuestError, cache_directory, linux

MODULES = ("virtio_pci", "virtio_blk", "button", "evdev")

_INIT = """\
#!/bin/busybox sh
export PATH=/bin
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
for module in /modules/*; do insmod $module || echo "ERR insmod $module"; done
/bin/sh /script &
script=$!
for input in /sys/class/input/event*; do
    [ "$(cat $input/device/name)" = "Power Button" ] || continue
    (
        # A press is one 24-byte event; until then this read blocks.
        dd if=/dev/input/${input##*/} of=/dev/null bs=24 count=1 2>/dev/null
        echo POWER BUTTON
        kill -TERM $script
    ) &
done
wait $script
status=$?
kill -KILL -1 2>/dev/null
for _ in $(seq 100); do
    umount /mnt/* 2>/dev/null
    grep -q ' /mnt/' /proc/mounts || break
    usleep 50000
done
sync
echo
echo "SCRIPT ENDED $status"
echo "POWERING OFF"
poweroff -f
"""


def initramfs(script: str, extra_modules: Iterable[str] = (), cache: Path | None = None, programs: Iterable[str] = ()) -> Path:
    """An initramfs (gzipped cpio) that runs ``script`` with busybox's sh; kept in the cache under its content's hash.

    ``programs`` of this machine go along in ``/bin``, with the libraries that they need.

    File systems that the script mounts belong under ``/mnt``, which the end unmounts. Raises GuestError.
    """
    cache = cache or cache_directory()
    busybox = shutil.which("busybox")
    if busybox is None:
        raise GuestError("busybox is missing: install busybox-static")
    archive = _Cpio()
    found = [shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin") for name in programs]
    if None in found:
        raise GuestError(f"one of {', '.join(programs)} is missing: run script/bootstrap")
    paths = [Path(path) for path in found if path is not None]
    libraries = shared_libraries(paths)
    for place in sorted({parent for library in libraries for parent in library.parents} - {Path("/")}):
        archive.directory(str(place.relative_to("/")))
    for directory in ("bin", "dev", "mnt", "modules", "proc", "sys", "tmp"):
        archive.directory(directory)
    # The kernel opens it for /init before anything is mounted.
    archive.device("dev/console", 5, 1)
    archive.file("bin/busybox", Path(busybox).read_bytes(), 0o755)
    for path in paths:
        archive.file(f"bin/{path.name}", path.read_bytes(), 0o755)
    for library in libraries:
        archive.file(str(library.relative_to("/")), library.read_bytes(), 0o755)
    for i, module in enumerate(linux(cache).module_files((*MODULES, *extra_modules))):
        archive.file(f"modules/{i:02}-{module.name}", module.read_bytes(), 0o644)
    archive.file("init", _INIT.encode(), 0o755)
    archive.file("script", script.encode(), 0o755)
    content = archive.end()
    path = cache / f"initramfs-{hashlib.sha256(content).hexdigest()[:16]}.cpio.gz"
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=cache, prefix="initramfs-", delete=False) as new:
            new.write(gzip.compress(content, compresslevel=6, mtime=0))
        Path(new.name).chmod(0o644)
        Path(new.name).rename(path)
    return path


def shared_libraries(programs: Iterable[Path]) -> list[Path]:
    """The libraries that programs need, the loader among them, where the programs look for them."""
    if not (names := list(programs)):
        return []
    needed = subprocess.run(["ldd", *names], capture_output=True, text=True, check=True).stdout
    return sorted({Path(path) for path in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", needed, re.MULTILINE)})


class _Cpio:
    """An archive in the kernel's format (cpio "newc": Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str) -> None:
        self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, content: bytes, mode: int) -> None:
        self._entry(name, stat.S_IFREG | mode, content)

    def device(self, name: str, major: int, minor: int) -> None:
        self._entry(name, stat.S_IFCHR | 0o600, device=os.makedev(major, minor))

    def end(self) -> bytes:
        self._entry("TRAILER!!!", 0)
        return b"".join(self._parts)

    def _entry(self, name: str, mode: int, content: bytes = b"", device: int = 0) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (
            self._inode,
            mode,
            0,
            0,
            1,
            0,
            len(content),
            0,
            0,
            os.major(device),
            os.minor(device),
            len(encoded),
            0,
        )
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        for part in (head, content):
            self._parts += (part, bytes(-len(part) % 4))
