"""What a rewind of a stopped VM looks at, and what is known of the moments that its images hold now."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmrewind.errors import CorruptionError, ImageError, MomentError
from vmrewind.history.changes import changed_ranges
from vmrewind.history.history import History
from vmrewind.journal.identity import image_identity
from vmrewind.journal.origin import filling
from vmrewind.journal.runs import Head, Position, described_runs, local_runs, read_head
from vmrewind.recover.blocks import BLOCK
from vmrewind.recover.intent import pending
from vmrewind.start.images import known_end


@dataclass(frozen=True, slots=True)
class RewindPlan:
    """What a rewind of a disk looks at: ``ranges`` [start, end) in order, or None for the whole disk, and then why (``reason``).

    ``since`` is the moment that the image holds, as far as that is known.
    """

    target: str
    since: Position | None
    ranges: Sequence[tuple[int, int]] | None
    reason: str | None = None


def planned(history: History, target: str, image: Path, position: Position, journal: Path) -> RewindPlan:
    """What of a stopped VM's disk a rewind to a position has to look at."""
    begun = pending(journal)
    if begun is not None and target in begun.targets:
        return RewindPlan(target, None, None, "an interrupted restore left it half-way")
    if target in filling(journal):
        return RewindPlan(target, None, None, "its image was never complete")
    head = begun.others if begun is not None else known_head(journal)
    if head is None:
        return RewindPlan(
            target, None, None, "what its image holds now is not known: head.json is damaged, or nothing was recorded"
        )
    known = head.of(target)
    if known.identity is None:
        reason = known.gap or "what its image holds now is not noted: the last run did not end cleanly"
        return RewindPlan(target, known.position, None, reason)
    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"{image}: {error.strerror}", "put the image back, or restore the disk with --output") from error
    try:
        if image_identity(fd, image) != known.identity:
            return RewindPlan(target, known.position, None, "its image was changed since the VM stopped")
    finally:
        os.close(fd)
    try:
        return RewindPlan(target, known.position, changed_ranges(history, target, known.position, position, BLOCK))
    except MomentError as error:
        return RewindPlan(target, known.position, None, str(error))


def known_head(journal: Path) -> Head | None:
    """What a stopped VM's images hold; after a death its last record, without identities. None if not even that is known."""
    damaged: list[CorruptionError] = []
    head = read_head(journal, damaged.append)
    if head is not None or damaged:
        return head
    try:
        end = known_end(journal, local_runs(journal, damaged.append))
    except CorruptionError:
        return None
    # Without a record of its own the newest run may have begun anywhere.
    return Head(end, {}) if end is not None and end.run == described_runs(journal)[-1] else None
