"""The note that a restore in place has begun: it stands until the restore has ended, and the same restore completes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmrewind.errors import CorruptionError
from vmrewind.journal.content import content
from vmrewind.journal.runs import RESTORE_PENDING, Head, Position, sync_directory, write_durably


@dataclass(frozen=True, slots=True)
class Intent:
    """The disks ``targets`` are on their way to a position. ``others`` is the head of it as far as it tells of the other disks."""

    position: Position
    targets: Sequence[str]
    others: Head


def pending(journal: Path) -> Intent | None:
    """The restore in place that was begun and not completed, None if there is none."""
    path = journal / RESTORE_PENDING
    try:
        plain: dict[str, Any] = json.loads(content(path))
        position = Position.of_plain(plain)
        others = Head.from_json(json.dumps(plain["others"]).encode()) if "others" in plain else Head(position, {})
        return Intent(position, list(plain["disks"]), others)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(
            f"{path}: not a restore's intent: {error!r}", "restore all disks in place, after removing it"
        ) from error


def declare(journal: Path, intent: Intent) -> None:
    """Note durably that a restore begins; from here on the images hold no moment that the journal's head could tell."""
    plain = intent.position.as_plain() | {"disks": list(intent.targets), "others": json.loads(intent.others.to_json())}
    write_durably(journal / RESTORE_PENDING, json.dumps(plain).encode() + b"\n")
    (journal / "head.json").unlink(missing_ok=True)
    sync_directory(journal)
