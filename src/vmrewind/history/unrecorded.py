"""Images that have gone on without a record since the last run ended: declared so in the head, or seen by their identity."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vmrewind.journal.identity import changed_since
from vmrewind.journal.origin import FILLING
from vmrewind.journal.runs import Head

CHANGED = "the image is not as the last run left it: it was used without vmrewind since"


def unrecorded(head: Head, targets: Iterable[str], journal: Path) -> dict[str, str]:
    """The disks, of ``targets``, that hold what no history has, and why that is known. Best asked while no capture lives."""
    if head.gap is not None:
        return dict.fromkeys(targets, head.gap)
    if (journal / FILLING).exists():
        # Somebody may have gone on completing the images after the run's end, and with nothing but what history has.
        return {}
    found = {target: one.gap for target, one in head.apart.items() if one.gap is not None}
    identities = dict(head.images) | {target: one.identity for target, one in head.apart.items() if one.identity is not None}
    return found | {target: CHANGED for target, left in identities.items() if changed_since(left)}
