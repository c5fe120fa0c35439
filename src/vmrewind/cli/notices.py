"""What a user should know of a history before anything is made of it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vmrewind.history.history import History
from vmrewind.journal.format import run_name


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def tell_notices(history: History, branch: str | None, say: Callable[[str], None] = _to_stderr) -> None:
    """Say what is left out: a repository that cannot be read; and, if no branch was named, what another host has made of the VM."""
    if history.problem is not None:
        say(f"the repository is left out: {history.problem}")
    if branch is None and (other := history.elsewhere) is not None:
        name = run_name(other.run).lstrip("0")
        say(f"this is what this host knows; host {other.host} has the VM now: --branch {name} means what it has")
