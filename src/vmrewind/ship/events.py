"""The one event that ship adds to a run's event log: a hole in what could be shipped."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from vmrewind.journal.events import EventLog
from vmrewind.journal.format import run_name
from vmrewind.ship.cursor import Hole


def declare_hole(state: Path, run: int, targets: Iterable[str], hole: Hole) -> None:
    """Write it to stderr and to the run's event log, unless it is there already from an earlier life of this process."""
    disks = sorted(targets)
    content = {"disks": disks, "first_seq": hole.first, "last_seq": hole.last, "cause": hole.cause}
    path = state / "events" / f"{run_name(run)}.jsonl"
    if _declared(path, content):
        return
    print(  # noqa: T201
        f"ship: run {run_name(run)}, disks {' '.join(disks)}: records {hole.first} to {hole.last} cannot be shipped:"
        f" {hole.cause}; moments from there on can't be restored from the repository until the next base",
        file=sys.stderr,
        flush=True,
    )
    EventLog(path).write("ship.hole", **content)


def _declared(path: Path, content: dict[str, object]) -> bool:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return False
    for line in lines:
        if b"ship.hole" not in line:
            continue
        try:
            found = json.loads(line)
            # The cause may be worded by another place in the same damage.
            if all(found.get(key) == content[key] for key in ("disks", "first_seq", "last_seq")):
                return True
        except (ValueError, AttributeError):
            continue  # a line that a crash cut off
    return False
