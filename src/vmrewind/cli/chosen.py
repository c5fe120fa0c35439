"""Which branch, disks and moment of a VM a command means: the options, what they lead to, and what the user is told on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

from cyclopts import Parameter

from vmrewind.errors import UsageError
from vmrewind.history.branch import Branch
from vmrewind.history.history import History
from vmrewind.history.resolve import resolve
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position

BranchOption = Annotated[
    str | None,
    Parameter(
        help="The branch, by the beginning of its run's id; default: this host's newest run's; of a VM in a repository, that of "
        "the host that took it over last."
    ),
]


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A VM's history, and which branch and disks of it are meant."""

    name: str
    history: History
    branch: Branch
    targets: list[str]

    @classmethod
    def of(
        cls,
        name: str,
        history: History,
        branch: str | None,
        disks: Sequence[str] | None = None,
        say: Callable[[str], None] = _to_stderr,
    ) -> Self:
        """The branch of the run whose id begins so, and these disks, default all of them.

        Says what is left out: a repository that cannot be read; and, if no branch was named, what another host has made of the VM.
        Raises UsageError for a disk that there is not, and what ``History.branch`` does.
        """
        if history.problem is not None:
            say(f"the repository is left out: {history.problem}")
        if branch is None and (other := history.elsewhere) is not None:
            theirs = run_name(other.run).lstrip("0")
            say(f"this is what this host knows; host {other.host} has the VM now: --branch {theirs} means what it has")
        line = history.branch(branch)
        for target in disks or ():
            if target not in line.targets:
                raise UsageError(f"{name} has no protected disk {target!r}", f"its disks are {', '.join(line.targets)}")
        return cls(name, history, line, [target for target in line.targets if disks is None or target in disks])

    def at(self, moment: str) -> Position:
        """The position that a moment means for these disks."""
        return resolve(self.history, self.branch, moment, self.targets)


def position_data(position: Position) -> dict[str, Any]:
    """A position for machines."""
    return {"run": run_name(position.run), "seq": position.seq, "time_ns": position.time_ns}
