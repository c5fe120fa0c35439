"""What ship is told to do: ``ship.json`` in the VM's state directory, watched by looking at the file, not into it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from vmrewind.journal.content import content


@dataclass(frozen=True, slots=True)
class Instruction:
    """``disks``: the targets to carry, sorted; none: be idle. ``bandwidth_limit``: bytes a second, None for none."""

    disks: tuple[str, ...] = ()
    bandwidth_limit: int | None = None


def _instructed(path: Path) -> Instruction:
    """What the file says; an empty one is an absent one. Raises ValueError if it makes no sense."""
    text = content(path)
    if not text.strip():
        return Instruction()
    plain = json.loads(text)
    disks = plain.get("disks", []) if isinstance(plain, dict) else None
    if not isinstance(disks, list) or not all(isinstance(disk, str) for disk in disks):
        raise ValueError("it is not an object with a list of disks")
    limit = plain.get("bandwidth_limit")
    if limit is not None and (type(limit) is not int or limit <= 0):
        raise ValueError(f"{limit!r} is no bandwidth limit")
    return Instruction(tuple(sorted(set(disks))), limit)


class Instructions:
    """Reads the file again only when it was replaced or changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._now = Instruction()

    def read(self) -> Instruction:
        """What to do now. A file that makes no sense changes nothing and is reported once."""
        try:
            status = os.stat(self._path)  # noqa: PTH116 - every second for the VM's life
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen != self._seen:
                self._seen = seen
                self._now = _instructed(self._path)
        except FileNotFoundError:
            self._seen, self._now = None, Instruction()
        except (ValueError, RecursionError) as error:
            print(f"ship: {self._path}: {error}; going on as before", file=sys.stderr, flush=True)  # noqa: T201
        return self._now
