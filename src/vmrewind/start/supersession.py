"""Before a VM starts: has another host taken it over? Whoever answers too late must not keep a VM down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import CorruptionError, RepositoryError, VmrewindError
from vmrewind.history.succession import Successor, judge, look, overrule, refusal, unknown_here
from vmrewind.journal.events import EventLog
from vmrewind.journal.runs import Position, RunInfo
from vmrewind.paths import VmPaths
from vmrewind.repository import background
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.start.resolve import VmHandle

LOOK_SECONDS: Final = 10.0
"""How long a start waits for the repository to be opened and to tell what runs there are."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a repository said at a start. Without ``repository`` it can't be used, because of ``unreachable``; ``others`` are the
    runs that this host does not know, None if it could not tell (``problem``)."""

    repository: VmRepository | None
    unreachable: VmrewindError | None = None
    others: Sequence[RunInfo] | None = None
    problem: VmrewindError | None = None


def ask(url: str, name: str, journal: Path) -> Answer:
    """Open a VM's repository, and have it tell the runs that are not known here, all within ``LOOK_SECONDS``."""

    def asked() -> Answer:
        repository = Repository.open(url).vm(name)
        try:
            return Answer(repository, others=unknown_here(repository, journal))
        except VmrewindError as error:
            return Answer(repository, problem=error)

    try:
        return background.run(asked, LOOK_SECONDS)
    except (RepositoryError, CorruptionError) as error:
        return Answer(None, error, problem=error)
    except TimeoutError:
        late = RepositoryError(f"{url}: did not answer within {LOOK_SECONDS:.0f} s", "is it up, and is the network?")
        return Answer(None, late, problem=late)


def refuse_superseded(
    name: str, answer: Answer, journal: Path, paths: VmPaths, end: Position | None, say: Callable[[str], None], events: EventLog
) -> None:
    """Raise SupersededError if another host has the VM now; where that cannot be known, say so and let it start.

    ``end``: the moment that the images hold.
    """
    if answer.others is None or answer.repository is None:
        if answer.problem is not None:
            say(f"{name}: whether another host has taken it over could not be asked: {answer.problem}; starting it all the same")
            events.write("takeover.unknown", error=str(answer.problem))
        return
    who = judge(journal, paths.state, answer.others, end)
    if who is not None:
        events.write("start.superseded", run=f"{who.run:016x}", host=who.host, time_ns=who.time_ns)
        raise refusal(name, answer.repository.repository.url, who)


def go_on_anyway(handle: VmHandle) -> Successor | None:
    """Overrule whoever has taken the VM over; returns who that was. Raises what keeps the repository from telling."""
    url = handle.require_config().protection.repository
    who = None if url is None else look(Repository.open(url).vm(handle.name), handle.journal, handle.paths.state)
    if who is not None:
        overrule(handle.paths.state, who)
    return who
