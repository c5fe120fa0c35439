"""``ship.json``: which disks ship is instructed to carry, and how fast. A file, so that a ship that was restarted remembers."""

from __future__ import annotations

import json
from typing import Final

from vmrewind.errors import UsageError
from vmrewind.journal.content import content
from vmrewind.journal.runs import write_durably
from vmrewind.paths import VmPaths
from vmrewind.vmconfig.model import Protection

UNCHANGED: Final = -1
"""A limit: what it is now."""


def read_wanted(paths: VmPaths) -> list[str]:
    """The disks that ship carries, by target; empty when it is idle."""
    try:
        return [str(target) for target in json.loads(content(paths.ship))["disks"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        # Damaged: ship takes it for nothing as well, and the next start writes it anew.
        return []


def carried_disks(paths: VmPaths, protection: Protection) -> list[str]:
    """The disks whose history belongs in the repository, by target, whether or not anybody carries it now."""
    if protection.repository is None:
        return []
    return read_wanted(paths) or ([disk.target for disk in protection.disk] if protection.ship == "auto" else [])


def _read_limit(paths: VmPaths) -> int | None:
    try:
        limit = json.loads(content(paths.ship)).get("bandwidth_limit")
        return limit if type(limit) is int else None
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        return None


def write_wanted(paths: VmPaths, disks: list[str], bandwidth_limit: int | None) -> None:
    """Instruct ship; it looks once a second. ``bandwidth_limit``: bytes a second, None for none."""
    write_durably(paths.ship, json.dumps({"disks": disks, "bandwidth_limit": bandwidth_limit}).encode() + b"\n")


def switch(paths: VmPaths, known: list[str], named: list[str], *, on: bool, limit: int | None = UNCHANGED) -> list[str]:
    """Switch shipping on or off for the named disks (none named: all); returns what is carried from now on.

    ``limit``: bytes a second, None for none.
    """
    for target in named:
        if target not in known:
            raise UsageError(f"{paths.name} has no protected disk {target!r}", f"its disks are {', '.join(known)}")
    chosen, before = set(named or known), set(read_wanted(paths))
    after = before | chosen if on else before - chosen
    wanted = [target for target in known if target in after]
    write_wanted(paths, wanted, _read_limit(paths) if limit == UNCHANGED else limit)
    return wanted
