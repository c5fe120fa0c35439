"""An image's identity: what tells, at the next start, whether anybody touched it while no capture was there.

A file has its modification time. A block device has none; instead the kernel's own count of what was written to it and discarded is
kept, with the boot and the attachment (``diskseq``) that it was counted in. The same count in the same boot and attachment: nobody
wrote through this device. Anything else, another boot above all, is not known, and not known is never taken for unchanged.

What the count cannot see: writes past this device, to what lies beneath it (a loop device's file, the disk of a partition), or by
another host to storage that is shared.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from vmrewind.journal.runs import ImageIdentity
from vmrewind.journal.state import boot_id

_SECTORS_WRITTEN: Final = 6
_SECTORS_DISCARDED: Final = 13
"""Fields of a block device's ``stat`` (the kernel's Documentation/block/stat.rst), counted from 0."""
_DEVICES: Final = Path("/sys/dev/block")


def image_identity(fd: int, path: str | Path) -> ImageIdentity:
    """The identity of the open image ``fd``; raises OSError. What is still in a device's page cache is written back first."""
    status = os.fstat(fd)
    real = os.path.realpath(path)
    if stat.S_ISBLK(status.st_mode):
        size = os.lseek(fd, 0, os.SEEK_END)
        # Only what has reached the device is counted.
        os.fsync(fd)
        return ImageIdentity(real, size, 0, 0, status.st_rdev, _writes(status.st_rdev))
    return ImageIdentity(real, status.st_size, status.st_mtime_ns, status.st_ino, 0)


def changed_since(left: ImageIdentity) -> bool:
    """Whether the image is known to have been touched since it was ``left`` so. What cannot be told, or is not there, is not."""
    try:
        fd = os.open(left.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return known_other(left, image_identity(fd, left.path))
    except OSError:
        return False
    finally:
        os.close(fd)


def known_other(left: ImageIdentity, now: ImageIdentity) -> bool:
    """Whether two identities tell of different content: not by a path alone, nor by a device that was attached anew since."""
    if left.device or now.device:
        attached = [identity.writes.rpartition(":")[0].rpartition(":")[0] for identity in (left, now)]
        same = left.device == now.device and attached[0] == attached[1] != ""
        return same and left.writes != now.writes
    return (left.size, left.mtime_ns, left.inode) != (now.size, now.mtime_ns, now.inode)


def _writes(device: int) -> str:
    """Boot, attachment and count of a block device's writes; empty if the kernel does not tell."""
    place = _DEVICES / f"{os.major(device)}:{os.minor(device)}"
    # A partition is counted itself; whether it is, and which disk it lies on, is written at its disk.
    disk = place.resolve().parent if (place / "partition").exists() else place
    try:
        if (disk / "queue/iostats").read_text().strip() != "1":
            return ""
        attachment = (disk / "diskseq").read_text().strip()
        counted = (place / "stat").read_text().split()
        return f"{boot_id().hex()}:{attachment}:{counted[_SECTORS_WRITTEN]}:{counted[_SECTORS_DISCARDED]}"
    except (OSError, IndexError):
        return ""
