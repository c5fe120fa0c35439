"""Runs that began in another repository: after a change of repository ship carries what the journal still has of them.

Their bases, and what was carried before, are not here and never were. That is believed only of what was made before this
repository was, and only if the newest moments do not need it: else what is not here is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vmrewind.journal.runs import RunInfo
from vmrewind.repository import layout


class Elsewhere:
    """``created_ns``: when the repository was made, None if it does not say; ``here``: keys that are, or once were, in it."""

    def __init__(self, vm: str, runs: Mapping[int, RunInfo], here: Collection[str], created_ns: int | None) -> None:
        self._vm = vm
        self._runs = runs
        self._here = here
        self._created_ns = created_ns

    def base(self, target: str, base_id: str) -> bool:
        """Whether a base was never here, and is not needed for the newest run."""
        try:
            made_ns = layout.parse_time(base_id.partition("-")[0])
        except ValueError:
            return False
        return self._before(made_ns) and not self._is_here(target, base_id) and self._newest_stands_here(target)

    def history(self, info: RunInfo, target: str) -> bool:
        """Whether a disk's history, as of a run's beginning, is in another repository."""
        seen: set[int] = set()
        while info.run not in seen:
            seen.add(info.run)
            if target in info.bases:
                return self.base(target, info.bases[target])
            if info.parent is None:
                return False
            if info.parent.run not in self._runs:
                return self._before(info.start_time_ns) and self._newest_stands_here(target)
            info = self._runs[info.parent.run]
        return False

    def _before(self, time_ns: int) -> bool:
        return self._created_ns is not None and time_ns < self._created_ns

    def _is_here(self, target: str, base_id: str) -> bool:
        return layout.base_key(self._vm, target, base_id) in self._here

    def _newest_stands_here(self, target: str) -> bool:
        """Whether the newest run that has a disk goes back to a base of it that is here."""
        info = max((one for one in self._runs.values() if one.disk(target) is not None), key=lambda one: one.run, default=None)
        seen: set[int] = set()
        while info is not None and info.run not in seen:
            seen.add(info.run)
            if target in info.bases:
                return self._is_here(target, info.bases[target])
            info = self._runs.get(info.parent.run) if info.parent is not None else None
        return False
