"""The last resort for a VM that runs: its images are brought level with its journal and served unprotected, the gap declared.

For ``on_failure = "start-unprotected"`` and a capture that cannot stay up. The gap is declared as the beginning of another run, of
which no record is known yet: the next healthy capture begins with it, and a resync closes the gap.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from vmrewind.capture.dirty import is_bypassed
from vmrewind.capture.recovery import recover
from vmrewind.errors import ImageError, StartError, VmStateError
from vmrewind.journal.copy_before_write import CopyBeforeWrite
from vmrewind.journal.identity import image_identity
from vmrewind.journal.origin import FILLING
from vmrewind.journal.runs import Discontinuity, ImageIdentity, Position, RunInfo, new_run_id, run_path, write_durably
from vmrewind.journal.state import StatePage
from vmrewind.start.continuity import gap_closed
from vmrewind.start.images import refuse_half_restored

CAUSE: Final = 'capture could not stay up, and the disks were served unprotected (on_failure = "start-unprotected")'


def identities_now(info: RunInfo, known: Mapping[str, ImageIdentity]) -> dict[str, ImageIdentity]:
    """What each image is now, synced; raises ImageError for another file than the ``known`` one, which would be another disk."""
    found: dict[str, ImageIdentity] = {}
    for disk in info.disks:
        try:
            fd = os.open(disk.image, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                now = found[disk.target] = image_identity(fd, disk.image)
            finally:
                os.close(fd)
        except OSError as error:
            raise ImageError(f"{disk.image}: {error.strerror}", "the guest waits until the image can be used again") from error
        before = known.get(disk.target)
        if before is not None and (now.inode, now.device) != (before.inode, before.device):
            raise ImageError(
                f"{disk.image}: another image than the one that the VM runs with",
                "put that one back, and the VM goes on; or stop the VM: its next start takes what is there then",
            )
    return found


def leave_protection(
    journal: Path, dirty_map: Path, info: RunInfo, known: Mapping[str, ImageIdentity], say: Callable[[str], None]
) -> RunInfo:
    """Bring the images to the end of run ``info`` and declare a gap from there; returns the run that is to go on behind it.

    If capture has not begun run ``info`` yet, its gap is open already, and it is returned as it is. Raises what recovery raises:
    images that lack what the guest was promised must not be served.
    """
    identities_now(info, known)
    if not begun(journal, info.run):
        return info
    if (journal / FILLING).exists():
        raise VmStateError(
            f"{info.vm}: its images are not complete, so they cannot be served without protection",
            "the guest waits until capture stays up again: mend what ends it",
        )
    refuse_half_restored(info.vm, journal)
    recovered = recover(journal, say)
    if recovered is None or recovered.position.run != info.run:
        raise StartError(
            f"{info.vm}: its journal does not tell how far its images must be brought",
            "stop the VM; its next start makes a new base",
        )
    if recovered.changed and not is_bypassed(dirty_map, info.run):
        raise StartError(
            f"{info.vm}: somebody else has used the images of {', '.join(sorted(recovered.changed))} while capture was away",
            "find out who, then stop the VM and start it again",
        )
    for disk in info.disks:
        if (base := CopyBeforeWrite.open(journal, disk.target)) is not None:
            with base:
                base.fail("the disks were served unprotected before it was complete")
    following = _behind(journal, info, recovered.position)
    write_durably(run_path(journal, following.run), following.to_json())
    return following


def take_back(journal: Path, info: RunInfo, following: RunInfo) -> None:
    """Nobody could serve the images unprotected either: the run that was to follow never was."""
    if following.run != info.run:
        run_path(journal, following.run).unlink()


def begun(journal: Path, run: int) -> bool:
    """Whether capture has begun a run: there may be records of it."""
    state = StatePage(journal)
    try:
        return bool(state.run == run)
    finally:
        state.close()


def _behind(journal: Path, info: RunInfo, end: Position) -> RunInfo:
    """The run that follows ``info``, which ends with ``end``: a gap on every disk.

    If every disk's gap is still open from the run before, it hangs onto that run's parent: no moment since then is known, and a
    resync can compare the images only with one that is.
    """
    open_gaps = all(
        disk.target in info.gaps and disk.target not in info.bases and not gap_closed(journal, info.run, disk.index, end.seq)
        for disk in info.disks
    )
    parent = info.parent if open_gaps and info.parent is not None else end
    gap = Discontinuity(CAUSE, parent.time_ns)
    return replace(
        info,
        run=max(new_run_id(), info.run + 1),
        parent=parent,
        start_time_ns=max(time.time_ns(), end.time_ns + 1),
        first_seq=parent.seq + 1,
        bases={},
        gaps={disk.target: gap for disk in info.disks},
    )
