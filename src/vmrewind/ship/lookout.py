"""Looks at the repository while ship lives: is it still the one that was opened, and is this host still the one that has the VM?"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vmrewind.errors import CorruptionError
from vmrewind.history.succession import look
from vmrewind.journal.format import run_name
from vmrewind.repository.repository import ReplacedError, VmRepository
from vmrewind.ship.events import declare_superseded

LOOK_SECONDS: Final = 60.0
"""How often the repository is looked at, come what may."""
CONFIRM_SECONDS: Final = 5.0
"""So old may be the knowledge that the repository is the right one when something is put there."""


class Lookout:
    """``lost`` is set when a look has found that the repository does not hold what was put there."""

    def __init__(self, journal: Path, state: Path, complain: Callable[[str], None]) -> None:
        self._journal = journal
        self._state = state
        self._complain = complain
        self._look_at = self._confirm_at = 0.0
        self.lost = False
        self.superseded: str | None = None
        """Who has taken the VM over, in words. Shipping goes on: what this host writes is a branch of its own."""

    def begin(self) -> None:
        """A new connection: nothing is known yet."""
        self._look_at = self._confirm_at = 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to look."""
        return time.monotonic() >= self._look_at

    def look(self, vm: VmRepository, run: int) -> None:
        """Look at everything. ``run`` is the newest run, which the repository describes. Raises RepositoryError."""
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._confirm(vm, run)
        try:
            found = look(vm, self._journal, self._state)
        except CorruptionError as error:
            # The records are worth more than the question.
            self._complain(f"whether another host has taken the VM over cannot be known: {error}")
            return
        self.superseded = None if found is None else found.words()
        if found is not None:
            declare_superseded(self._state, run, found)

    def confirm_before_put(self, vm: VmRepository, run: int) -> None:
        """What is put into another repository, with the old one's keys maybe, helps nobody. Raises RepositoryError."""
        if time.monotonic() >= self._confirm_at:
            self._confirm(vm, run)

    def _confirm(self, vm: VmRepository, run: int) -> None:
        try:
            vm.repository.confirm()
            if not vm.has_run(run):
                raise ReplacedError(
                    f"{vm.repository.url}: the description of run {run_name(run)} of {vm.name}, which was put there, is gone",
                    "find out who removed it; what the journal has is shipped anew",
                )
        except ReplacedError:
            self.lost = True
            raise
        self._confirm_at = time.monotonic() + CONFIRM_SECONDS
