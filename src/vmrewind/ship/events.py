"""What ship adds to a run's event log: a hole in what could be shipped, and that another host has taken the VM over."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from vmrewind.history.succession import Successor
from vmrewind.journal.events import EventLog
from vmrewind.journal.format import run_name
from vmrewind.ship.cursor import Hole
from vmrewind.ship.status import baseless_words


def declare_hole(state: Path, run: int, targets: Iterable[str], hole: Hole) -> None:
    """Write it to stderr and to the run's event log, unless it is there already from an earlier life of this process."""
    disks = sorted(targets)
    content = {"disks": disks, "first_seq": hole.first, "last_seq": hole.last, "cause": hole.cause}
    path = state / "events" / f"{run_name(run)}.jsonl"
    if _declared(path, "ship.hole", {key: content[key] for key in ("disks", "first_seq", "last_seq")}):
        return  # The cause may be worded by another place in the same damage.
    print(  # noqa: T201
        f"ship: run {run_name(run)}, disks {' '.join(disks)}: records {hole.first} to {hole.last} cannot be shipped:"
        f" {hole.cause}; moments from there on can't be restored from the repository until the next base",
        file=sys.stderr,
        flush=True,
    )
    EventLog(path).write("ship.hole", **content)


def declare_baseless(state: Path, run: int, repository_id: str, disks: Iterable[str]) -> None:
    """Write to stderr and to the run's event log that the repository lacks what these disks' history stands on, once for each."""
    content: dict[str, object] = {"repository": repository_id, "disks": sorted(disks)}
    path = state / "events" / f"{run_name(run)}.jsonl"
    if not _declared(path, "ship.baseless", content):
        print(f"ship: {baseless_words(disks)}", file=sys.stderr, flush=True)  # noqa: T201
        EventLog(path).write("ship.baseless", **content)


def declare_superseded(state: Path, run: int, who: Successor) -> None:
    """Write to stderr and to the run's event log that ``who`` has the VM now, unless it is there already."""
    content: dict[str, object] = {"by_run": run_name(who.run), "by_host": who.host}
    path = state / "events" / f"{run_name(run)}.jsonl"
    if not _declared(path, "ship.superseded", content):
        print(f"ship: {who.words()}; what runs here is shipped on, as a branch of its own", file=sys.stderr, flush=True)  # noqa: T201
        EventLog(path).write("ship.superseded", **content)


def _declared(path: Path, event: str, content: dict[str, object]) -> bool:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return False  # Said twice is better than not at all.
    for line in lines:
        if event.encode() not in line:
            continue
        try:
            found = json.loads(line)
            if all(found.get(key) == value for key, value in content.items()):
                return True
        except (ValueError, AttributeError):
            continue  # a line that a crash cut off
    return False
