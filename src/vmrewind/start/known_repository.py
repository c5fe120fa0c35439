"""Which repository a VM's history is in, as this host saw it last.

What one repository holds, bases and shipped records, another one does not. While a repository cannot be reached, the word of local
copies is taken for what is in it, but only if it is the one that they are about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from vmrewind.journal.content import Unreadable, content
from vmrewind.journal.runs import write_durably
from vmrewind.paths import VmPaths
from vmrewind.repository.url import place_of

_FILE: Final = "repository.json"


def note_repository(paths: VmPaths, url: str) -> None:
    """Remember durably that the VM's history goes into this repository."""
    content = json.dumps({"place": place_of(url)}).encode() + b"\n"
    path = paths.state / _FILE
    if _read(path) != content:
        write_durably(path, content)


def is_where_it_was(paths: VmPaths, url: str) -> bool:
    """Whether the URL leads to where the VM's history was last seen to be; False, too, if it never was."""
    try:
        return bool(json.loads(_read(paths.state / _FILE))["place"] == place_of(url))
    except (ValueError, KeyError, TypeError):
        return False


def _read(path: Path) -> bytes:
    try:
        return content(path)
    except (FileNotFoundError, Unreadable):
        return b""
