"""What is to be shipped, in which order: worked out anew from runs and coverage whenever one of them changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from vmrewind.journal.runs import RunInfo
from vmrewind.ship.coverage import Coverage


@dataclass(frozen=True, slots=True)
class Entry:
    """Records of a run from ``first`` to ``last`` (None: to its end) of the disks in ``mask``, called ``targets``.

    ``cut`` is the seq up to which a later run needs this one, None if none does. ``on_branch``: the newest run's history
    cannot be restored without it.
    """

    run: int
    first: int
    last: int | None
    mask: int
    targets: frozenset[str]
    cut: int | None = None
    on_branch: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """``live`` follows the newest run's end; ``backlog`` is what else there is: what its branch needs first, each oldest first.

    ``runs`` are those concerned.
    """

    live: Entry | None
    backlog: tuple[Entry, ...]
    runs: tuple[RunInfo, ...]

    @property
    def live_now(self) -> bool:
        """Whether the live records go out beside the backlog: so that a disk whose history is complete does not wait for others.

        If every disk has a backlog on the branch it goes first, in order of time: then whatever is shipped can be restored.
        """
        behind = {target for entry in self.backlog if entry.on_branch for target in entry.targets}
        return self.live is not None and not self.live.targets <= behind


def make_plan(runs: Mapping[int, RunInfo], disks: Sequence[str], coverage: Coverage, held: Set[int]) -> Plan:
    """The plan for carrying ``disks``. ``runs`` are those that are described, by id; of those in ``held`` there are segments here.

    Everything that is here is carried, what was taken back too: the journal will not have it for ever.
    """
    if not runs:
        return Plan(None, (), ())
    newest = max(runs)
    cuts, wanted = _wanted(runs, newest, disks)
    branch = [entry for run in sorted(wanted) for entry in _entries(runs[run], wanted[run], cuts.get(run), coverage)]
    others: list[Entry] = []
    for run in sorted(held & runs.keys() - {newest}):
        left = {disk.target for disk in runs[run].disks if disk.target in disks} - wanted.get(run, set())
        others += _entries(runs[run], left, None, coverage, on_branch=False)
        if left:
            wanted.setdefault(run, set()).update(left)
    live = branch.pop() if branch and branch[-1].run == newest else None
    return Plan(live, (*branch, *others), tuple(runs[run] for run in sorted(wanted)))


def bases_needed(runs: Mapping[int, RunInfo], disks: Sequence[str]) -> dict[str, str]:
    """The base that the newest run's history of each disk stands on; a disk of which that is not known is left out."""
    _, wanted = _wanted(runs, max(runs), disks) if runs else ({}, {})
    return {target: runs[run].bases[target] for run, targets in wanted.items() for target in targets if target in runs[run].bases}


def _wanted(runs: Mapping[int, RunInfo], newest: int, disks: Sequence[str]) -> tuple[dict[int, int], dict[int, set[str]]]:
    """For each run that the branch needs, from the newest back to where a disk has a base: up to which seq, and for which disks."""
    cuts: dict[int, int] = {}
    wanted: dict[int, set[str]] = {}
    for target in disks:
        info: RunInfo | None = runs[newest]
        while info is not None and info.disk(target) is not None:
            wanted.setdefault(info.run, set()).add(target)
            if target in info.bases or info.parent is None:
                break
            cuts[info.parent.run] = info.parent.seq
            info = runs.get(info.parent.run)
    return cuts, wanted


def _entries(info: RunInfo, targets: Set[str], cut: int | None, coverage: Coverage, *, on_branch: bool = True) -> list[Entry]:
    """A run's missing ranges, cut so that each has one set of disks."""
    missing = {disk: coverage.missing(info.run, disk.index, info.first_seq) for disk in info.disks if disk.target in targets}
    bounds = {first for ranges in missing.values() for first, _ in ranges}
    bounds |= {last + 1 for ranges in missing.values() for _, last in ranges if last is not None}
    ordered = sorted(bounds)
    entries = []
    for i, first in enumerate(ordered):
        following = ordered[i + 1] if i + 1 < len(ordered) else None
        disks = [disk for disk, ranges in missing.items() if any(a <= first and (b is None or first <= b) for a, b in ranges)]
        if disks:
            mask = sum(1 << disk.index for disk in disks)
            names = frozenset(disk.target for disk in disks)
            entries.append(Entry(info.run, first, None if following is None else following - 1, mask, names, cut, on_branch))
    return entries
