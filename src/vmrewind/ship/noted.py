"""``shipped.json`` in the journal: up to where each run was carried away. Capture's journal-full policy goes by it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from vmrewind.journal.format import run_name
from vmrewind.journal.runs import sync_directory


def note(
    journal: Path, repository_id: str | None, disks: Collection[str], runs: Mapping[int, int], carried: Mapping[int, int]
) -> None:
    """Say by run the seq up to which ``disks``, which are carried, and all disks (``runs``) are in the repository."""
    path = journal / "shipped.json"
    temporary = path.with_name(".shipped.json.tmp")
    word = {key: {run_name(run): seq for run, seq in seqs.items()} for key, seqs in (("runs", runs), ("carried", carried))}
    content = json.dumps({"repository": repository_id, "disks": sorted(disks), **word}).encode()
    # Without a sync: an old word, or none, makes capture keep more than it must, never less.
    with contextlib.suppress(OSError):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)
        temporary.replace(path)


def last_noted(journal: Path, disks: Collection[str]) -> dict[int, int]:
    """The seq up to which these disks of each run are carried, or a smaller one."""
    try:
        word = json.loads((journal / "shipped.json").read_bytes())
        known = word["carried" if set(disks) <= set(word["disks"]) else "runs"]
        return {int(run, 16): int(seq) for run, seq in known.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return {}


def forget_shipped_elsewhere(journal: Path, repository_id: str | None) -> None:
    """Take back what was noted unless it is about this repository (None: whichever): what only another one has is not shipped.

    Capture would let go of it. Ship notes anew what the repository has once it has seen that.
    """
    path = journal / "shipped.json"
    try:
        told = json.loads(path.read_bytes())["repository"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        told = None
    if told is None or told != repository_id:
        path.unlink()
        sync_directory(journal)
