"""What is known of a VM when it is to start again. What a crash left is finished first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmrewind.capture.recovery import recover
from vmrewind.errors import CorruptionError, MomentError
from vmrewind.history.history import History
from vmrewind.history.resolve import resolve
from vmrewind.journal import format as fmt
from vmrewind.journal.events import EventLog
from vmrewind.journal.runs import Head, Position, RunInfo, local_runs, read_head
from vmrewind.repository.repository import VmRepository
from vmrewind.start.images import known_end


@dataclass(slots=True)
class Past:
    """What is known of a VM before this run."""

    runs: list[RunInfo]
    position: Position | None
    head: Head | None
    gap_cause: str = "the image is not as the last run left it: it was changed while the VM was off"
    used: frozenset[str] = frozenset()
    """Disks whose images somebody used after the last run died, so that its journal was not replayed onto them."""
    recovered: bool = False
    """The last run died, and the host did not: all that it did to its images is known, but for those that are ``used``."""


def look_back(name: str, journal: Path, repository: VmRepository | None, events: EventLog, say: Callable[[str], None]) -> Past:
    """Finish what a crash left, and tell what is known of the VM ``name``. Raises what ``recover`` raises."""

    def report(error: CorruptionError) -> None:
        say(f"{error}; going on without it")
        events.write("state.damaged", message=str(error))

    recovered = recover(journal, say)
    runs = local_runs(journal, report)
    head = read_head(journal, report)
    if head is not None:
        return Past(runs, head.position, head)
    if recovered is not None:
        events.write(
            "journal.recovered",
            run=fmt.run_name(recovered.position.run),
            seq=recovered.position.seq,
            records_applied=recovered.records_applied,
            host_died=recovered.host_died,
        )
        cause = "the host died: the images may hold writes that the journal lost" if recovered.host_died else (
            "vmrewind itself was killed, and what touched the images since is not known"
        )  # fmt: skip
        return Past(runs, recovered.position, None, cause, recovered.changed, recovered=not recovered.host_died)
    cause = "the last run did not end cleanly"
    if (position := known_end(journal, runs)) is not None:
        return Past(runs, position, None, cause)
    if repository is not None and (shipped := repository.runs()):
        return Past(shipped, _last_shipped(name, repository), None, "the local journal is gone")
    return Past([], None, None)


def _last_shipped(name: str, repository: VmRepository) -> Position:
    """The last moment that the repository knows, for a host whose journal is gone."""
    with History.open(name, None, repository) as history:
        branch = history.branch()
        info = history.runs[branch.run]
        try:
            return resolve(history, branch, "latest", [disk.target for disk in info.disks])
        except MomentError:
            return Position(info.run, history.records(info.run).last_known or info.first_seq, info.start_time_ns)
