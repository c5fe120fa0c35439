"""Why a base that was begun could not be made at the last try: a small file, for ``vmrewind status``."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from vmrewind.journal.runs import write_durably
from vmrewind.paths import VmPaths


def note(paths: VmPaths, disk: str, base_id: str, error: str) -> None:
    """The base was interrupted by this."""
    # The event log has it too: what cannot be written here must not end what tries again.
    with contextlib.suppress(OSError):
        write_durably(_path(paths, disk), json.dumps({"base": base_id, "error": error}).encode() + b"\n")


def clear(paths: VmPaths, disk: str) -> None:
    """It goes on, or is made."""
    with contextlib.suppress(OSError):
        _path(paths, disk).unlink(missing_ok=True)


def read(paths: VmPaths, disk: str, base_id: str) -> str | None:
    """What interrupted the base last, None if nothing did since it last went on."""
    try:
        word = json.loads(_path(paths, disk).read_bytes())
        return str(word["error"]) if word["base"] == base_id else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _path(paths: VmPaths, disk: str) -> Path:
    return paths.state / f"begun-{disk}.interrupted"
