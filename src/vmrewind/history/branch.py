"""The tree of a VM's runs, and one branch of it: a run and its parents, each cut where the child begins."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vmrewind.errors import MomentError, VmStateError
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import RunInfo


@dataclass(frozen=True, slots=True)
class Leg:
    """A run's part of a branch: the run, and the seq after which the next run takes over (None: the branch's own run)."""

    info: RunInfo
    cut: int | None


@dataclass(frozen=True, slots=True)
class Branch:
    """Legs from the root to the branch's own run. ``missing_parent``: the run that the first leg continues and nobody knows."""

    legs: Sequence[Leg]
    missing_parent: int | None = None

    @property
    def run(self) -> int:
        """The branch's own run, by which it is named."""
        return self.legs[-1].info.run

    def leg(self, run: int) -> int:
        """Index of a run's leg; raises MomentError if the run is not on the branch."""
        for i, leg in enumerate(self.legs):
            if leg.info.run == run:
                return i
        raise MomentError(f"run {run_name(run)} is not on the branch of run {run_name(self.run)}")

    def leg_of_seq(self, seq: int) -> int | None:
        """Index of the leg that has record ``seq``, None before the branch's first record."""
        for i in range(len(self.legs) - 1, -1, -1):
            if self.legs[i].info.first_seq <= seq:
                return i
        return None

    @property
    def targets(self) -> list[str]:
        """Every disk of the branch's own run, in order of index."""
        return [disk.target for disk in sorted(self.legs[-1].info.disks, key=lambda disk: disk.index)]


def merge_runs(*sources: Iterable[RunInfo]) -> dict[int, RunInfo]:
    """Runs by id, in order; what an earlier source says of a run counts."""
    merged: dict[int, RunInfo] = {}
    for source in sources:
        for info in source:
            merged.setdefault(info.run, info)
    return dict(sorted(merged.items()))


def choose_run(runs: Mapping[int, RunInfo], wanted: str | None, described_here: Container[int] = ()) -> int:
    """The run that a branch is chosen by: a unique prefix of its id, or the newest run; raises VmStateError, MomentError.

    On a host that has a journal of the VM it is the newest of those ``described_here``: what another host made of the VM since is
    that one's. Elsewhere the newest of the host that took the VM over last: one that was taken over from may have started once more
    without knowing.
    """
    if not runs:
        raise VmStateError("the VM has no history yet", "start it protected once")
    if wanted is None:
        ours = [run for run in runs if run in described_here]
        return max(ours) if ours else owners_run(runs)
    # Ids begin with zeroes; nobody wants to type those.
    found = [run for run in runs if run_name(run).startswith(wanted) or run_name(run).lstrip("0").startswith(wanted)]
    if len(found) != 1:
        known = ", ".join(run_name(run) for run in found or runs)
        problem = "fits several runs" if found else "fits no run"
        raise MomentError(f"branch {wanted!r} {problem}", f"runs: {known}")
    return found[0]


def owners_run(runs: Mapping[int, RunInfo]) -> int:
    """The newest run of the host that took the VM over last; the newest of all if nobody ever did."""
    return max(runs, key=lambda run: (last_takeover(runs, run), run))


def lineage(runs: Mapping[int, RunInfo], run: int) -> list[int]:
    """A run and its parents, from it to the root, as far as they are known."""
    line: list[int] = []
    info = runs.get(run)
    while info is not None and len(line) < len(runs):
        line.append(info.run)
        info = runs.get(info.parent.run) if info.parent is not None else None
    return line


def last_takeover(runs: Mapping[int, RunInfo], run: int) -> int:
    """The newest takeover that a run is, descends from, or was begun by a host that went on from it; 0 without one."""
    return max((max(at if runs[at].takeover else 0, runs[at].claim) for at in lineage(runs, run)), default=0)


def branch_of(runs: Mapping[int, RunInfo], run: int, cut: int | None = None) -> Branch:
    """The branch that ends with ``run``, or with its record ``cut``: what came after it was taken back."""
    legs: list[Leg] = []
    at: int | None = run
    while at is not None and at in runs and len(legs) <= len(runs):
        legs.append(Leg(runs[at], cut))
        parent = runs[at].parent
        at, cut = (parent.run, parent.seq) if parent is not None else (None, None)
    legs.reverse()
    return Branch(tuple(legs), missing_parent=at)
