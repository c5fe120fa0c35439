"""Whether another host has taken a VM over since this one last ran it: told by the tree of its runs alone.

A takeover is a run that says so, with an id above every run that its host saw in the repository. So a host is superseded if the
repository has a takeover with a greater id than the last one that this host made, descends from, or was told to overrule. Clocks
don't matter, nor do host names, which two hosts may share. Without any takeover, a run of another host that goes on from ours tells
the same: somebody has moved the images.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import SupersededError
from vmrewind.history.branch import last_takeover, lineage
from vmrewind.history.moments import format_time
from vmrewind.journal.content import content
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position, RunInfo, described_runs, local_runs, write_durably
from vmrewind.repository.repository import VmRepository

OVERRULED: Final = "overruled.json"
"""In a VM's state directory: up to which run of other hosts somebody decided to go on with what is here."""


@dataclass(frozen=True, slots=True)
class Successor:
    """The run that stands for another host's having the VM now.

    ``left`` is where its line leaves what this host knows, None if it has nothing to do with it; ``records_behind`` how many
    records of this host lie behind that moment, None if that is not known.
    """

    run: int
    host: str
    time_ns: int
    left: Position | None
    records_behind: int | None

    def words(self) -> str:
        """In one sentence."""
        text = f"host {self.host} took it over at {format_time(self.time_ns)} (run {run_name(self.run)})"
        if self.left is not None:
            text += f", going on from {format_time(self.left.time_ns)} (seq {self.left.seq} of run {run_name(self.left.run)})"
        if self.records_behind:
            text += f"; {self.records_behind} records of this host lie behind that moment, on a branch of their own"
        return text


def successor(
    ours: Mapping[int, RunInfo], others: Iterable[RunInfo], host: str, *, end: Position | None = None, overruled: int = 0
) -> Successor | None:
    """Who has taken the VM over from this host, None if nobody has.

    ``ours`` are the runs that this host's journal describes, by id; ``others`` those of the repository that it does not; ``host``
    is this host's name; ``end`` the moment that its images hold; ``overruled`` the newest run that it was told not to mind.
    """
    known = {**{info.run: info for info in others}, **ours}
    theirs = [info for run, info in sorted(known.items()) if run not in ours and run > overruled]
    claim = max((last_takeover(known, run) for run in ours), default=0)
    claims = [info for info in theirs if info.takeover and info.run > claim]
    moved = [
        info
        for info in theirs
        if info.host != host and last_takeover(known, info.run) == claim and _leaves(known, ours, info) is not None
    ]
    if not claims and not moved:
        return None
    who = (claims or moved)[-1]
    left = _leaves(known, ours, who)
    behind = None
    if left is not None and end is not None:
        behind = max(0, end.seq - left.seq) if left.run in lineage(known, end.run) else None
    return Successor(who.run, who.host, who.start_time_ns, left, behind)


def _leaves(known: Mapping[int, RunInfo], ours: Mapping[int, RunInfo], info: RunInfo) -> Position | None:
    """Where a run's line leaves our runs."""
    for run in lineage(known, info.run):
        parent = known[run].parent
        if parent is not None and parent.run in ours:
            return parent
    return None


def unknown_here(repository: VmRepository, journal: Path) -> list[RunInfo]:
    """The repository's runs that the journal does not describe, or not readably. Raises RepositoryError, CorruptionError."""
    return repository.runs(but={run_name(info.run) for info in local_runs(journal, lambda _: None)})


def judge(journal: Path, state: Path, others: Iterable[RunInfo], end: Position | None = None) -> Successor | None:
    """Who has taken the VM over from this host, given the runs that are ``unknown_here``. ``state``: the VM's state directory."""
    here = {info.run: info for info in local_runs(journal, lambda _: None)}
    ids = set(described_runs(journal))
    # One that is damaged here is ours all the same.
    ours = {info.run: info for info in others if info.run in ids} | here
    return successor(ours, others, socket.gethostname(), end=end, overruled=read_overruled(state))


def look(repository: VmRepository, journal: Path, state: Path, end: Position | None = None) -> Successor | None:
    """Ask the repository who has taken the VM over from this host. Raises RepositoryError, CorruptionError."""
    return judge(journal, state, unknown_here(repository, journal), end)


def read_overruled(state: Path) -> int:
    """Up to which run takeovers by others were overruled on this host, 0 if none was."""
    try:
        return int(json.loads(content(state / OVERRULED))["run"], 16)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        # Damaged: the next start asks once more.
        return 0


def overrule(state: Path, who: Successor) -> None:
    """Note durably that this host goes on with what it has, on a branch of its own, though ``who`` has taken the VM over."""
    write_durably(state / OVERRULED, json.dumps({"run": run_name(who.run)}).encode() + b"\n")


def refusal(name: str, url: str, who: Successor) -> SupersededError:
    """The error that a start meets on a host that is superseded."""
    return SupersededError(
        f"{name}: {who.words()}",
        f"to go on from there on this host: `vmrewind takeover {url.rstrip('/')}/{name}`; to go on with what is here, as a branch "
        f"of its own beside the other host's: `vmrewind start-anyway {name}`, then start it again (or `vmrewind run --force`)",
    )
