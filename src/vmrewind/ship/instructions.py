"""What ship is told to do: ``ship.json`` in the VM's state directory, watched by looking at the file, not into it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def _instructed(path: Path) -> tuple[str, ...]:
    """The disks that ship is told to carry, sorted; none if there is no such file. Raises ValueError if it makes no sense."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return ()
    if not text.strip():
        return ()
    content = json.loads(text)
    disks = content.get("disks", []) if isinstance(content, dict) else None
    if not isinstance(disks, list) or not all(isinstance(disk, str) for disk in disks):
        raise ValueError("it is not an object with a list of disks")
    return tuple(sorted(set(disks)))


class Instructions:
    """Reads the file again only when it was replaced or changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._disks: tuple[str, ...] = ()

    def disks(self) -> tuple[str, ...]:
        """The disks to carry now. A file that makes no sense changes nothing and is reported once."""
        try:
            status = os.stat(self._path)  # noqa: PTH116 - five times a second for the VM's life
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        except FileNotFoundError:
            self._seen, self._disks = None, ()
            return ()
        if seen != self._seen:
            self._seen = seen
            try:
                self._disks = _instructed(self._path)
            except (ValueError, RecursionError) as error:
                print(f"ship: {self._path}: {error}; going on as before", file=sys.stderr, flush=True)  # noqa: T201
        return self._disks
