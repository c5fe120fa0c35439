"""Whether somebody used an image after the capture that served it had died.

Then its journal must not be replayed onto it: what that somebody wrote is newer. A capture's every image write comes right after
the journal's, or is a replay, which leaves a mark of its own; so an image that was modified later than journal and mark were, was
modified by somebody else. Block devices have no modification time, so of them it can't be told.

An image that is being completed (``filling.json``) is modified at any time, with nothing but what history has, and nobody starts
on it. Who completes it leaves a mark behind its last write, before it counts as complete.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from vmrewind.capture.image import Image
from vmrewind.errors import CorruptionError
from vmrewind.journal.content import content
from vmrewind.journal.format import run_name
from vmrewind.journal.origin import filling
from vmrewind.journal.runs import sync_directory, write_durably

_RECOVERING: Final = "recovering.json"
"""In a journal directory: a recovery that found images used has begun and not ended; {"run", "used": [target, …]}."""

_SLACK_NS: Final = 2_000_000_000
"""By how much an image write may be later than its journal write."""
_LOST_NS: Final = 60_000_000_000
"""The same after the host's death: the last records, and the journal's own modification time, may not have reached the disk.

Two intervals of checkpoints: should the guest have been silent for as long, its image needs no record from before."""


def leave_mark(journal: Path) -> None:
    """Say, durably, that images are written now, by a replay or by who completes them.

    To be repeated at least once a second while a replay does.
    """
    fd = os.open(journal / "capture.state", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.utime(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def last_activity_ns(journal: Path, segment: Path, last_time_ns: int) -> int:
    """When capture, or a replay, last wrote, ns since the epoch; ``segment`` and ``last_time_ns``: where and when the run ends."""
    marks = (os.stat(path).st_mtime_ns for path in (journal / "capture.state", segment))
    return max(last_time_ns, *marks)


def used_since(images: Iterable[Image], journal: Path, segment: Path, last_time_ns: int, *, host_died: bool) -> list[Image]:
    """The images that somebody else has modified since capture's last activity; see ``last_activity_ns``."""
    # Looked at first: what completes an image leaves its mark before this goes.
    incomplete = filling(journal)
    active_ns = last_activity_ns(journal, segment, last_time_ns)
    return [image for image in images if image.target not in incomplete and was_used(image, active_ns, host_died=host_died)]


def was_used(image: Image, active_ns: int, *, host_died: bool) -> bool:
    """Whether the image was modified by somebody else since capture's last activity."""
    if image.block_device:
        return False
    since_ns = os.fstat(image.fd).st_mtime_ns - active_ns
    if not host_died:
        return since_ns > _SLACK_NS
    return since_ns > _LOST_NS or (since_ns > _SLACK_NS and active_ns + since_ns > _boot_time_ns())


def _boot_time_ns() -> int:
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time_ns() - int(uptime * 1e9)


def remembered(journal: Path, run: int) -> frozenset[str]:
    """The disks that an interrupted recovery of the run had found used: its own traces hide that from the next one."""
    path = journal / _RECOVERING
    try:
        plain: dict[str, Any] = json.loads(content(path))
        return frozenset(plain["used"]) if plain["run"] == run_name(run) else frozenset()
    except FileNotFoundError:
        return frozenset()
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptionError(f"{path}: not a recovery's notes: {error!r}", "remove it if the images were not used") from error


def remember(journal: Path, run: int, used: Iterable[str]) -> None:
    """Note, durably, the disks that a recovery found used."""
    write_durably(journal / _RECOVERING, json.dumps({"run": run_name(run), "used": sorted(used)}).encode() + b"\n")


def forget(journal: Path) -> None:
    """The recovery has come to its end."""
    (journal / _RECOVERING).unlink(missing_ok=True)
    sync_directory(journal)
