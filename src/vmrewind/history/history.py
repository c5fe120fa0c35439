"""A VM's history: its runs, records and bases from the local journal and the repository, read as one.

Everything that goes back in time starts here: restore, timeline, and whatever else needs a moment, its coverage or a view.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from vmrewind.errors import CorruptionError, MomentError, RepositoryError, VmrewindError
from vmrewind.history.branch import Branch, branch_of, choose_run, last_takeover, merge_runs, owners_run
from vmrewind.history.coverage import Coverage, cover
from vmrewind.history.records import RunRecords
from vmrewind.history.sources import BrokenFile, DamagedObject, LocalSource, ObjectCache, ShippedSource, open_journal
from vmrewind.history.unrecorded import unrecorded
from vmrewind.journal import format as fmt
from vmrewind.journal.copy_before_write import begun_base, made_words
from vmrewind.journal.format import run_name
from vmrewind.journal.origin import FILLING
from vmrewind.journal.runs import Head, RunInfo, described_runs, local_runs, read_head
from vmrewind.repository.manifest import Manifest
from vmrewind.repository.repository import VmRepository

_TABLES_BYTES_MAX: Final = 64 << 20

Made = TypeVar("Made")


class History:
    """What is known of a VM at the time of opening. Holds the local segments locked against recycling until ``close``.

    ``opened_ns`` is that time: what came before is known, as far as it is kept. ``problem`` is the error that kept the repository
    from being read, if one did: what the journal has can be used still.
    """

    def __init__(
        self,
        name: str,
        runs: Mapping[int, RunInfo],
        local: Sequence[LocalSource],
        broken: Sequence[BrokenFile],
        shipped: Sequence[ShippedSource],
        head: Head | None,
        repository: VmRepository | None,
        bases: Path | None,
        problem: VmrewindError | None,
        opened_ns: int,
        described_here: Set[int],
    ) -> None:
        self.name = name
        self.runs = runs
        self.head = head
        self.repository = repository
        self.problem = problem
        self.opened_ns = opened_ns
        self.damaged: Sequence[CorruptionError] = ()
        """Small files of the journal that cannot be read, and are done without or had from the repository."""
        self.lost: Sequence[int] = ()
        """Runs that began here, or were shipped, and whose description is nowhere to be had."""
        self.undeclared: tuple[int, int, str] | None = None
        """A gap that the journal does not tell of: (run, since when in ns, cause)."""
        self.unrecorded: Mapping[str, str] = {}
        """Disks whose images have gone on from what the head says, without a record, and why that is known."""
        self.begun: Mapping[str, tuple[str, float | None]] = {}
        """The bases that are being made here: by disk, the id and how much of it there is (0 to 1), if that is known."""
        self.filling = False
        """Whether the VM's images here were never complete."""
        self._bases = bases
        self._described_here = described_here
        self._local = local
        # Of a segment first its merged table may prove damaged, then the segment itself.
        self._attempts_max = 2 * (len(local) + len(shipped))
        grouped: dict[int, tuple[list[LocalSource], list[ShippedSource], list[BrokenFile]]] = defaultdict(lambda: ([], [], []))
        for source in local:
            grouped[source.run][0].append(source)
        for shipped_source in shipped:
            grouped[shipped_source.run][1].append(shipped_source)
        for file in broken:
            grouped[file.run][2].append(file)
        self._records = {run: RunRecords(run, *grouped[run]) for run in {*grouped, *runs}}
        self._repository_bases: dict[str, frozenset[str]] = {}
        self._local_manifests: dict[tuple[str, str], Manifest] = {}

    @classmethod
    def open(
        cls,
        name: str,
        journal: Path | None,
        repository: VmRepository | None,
        *,
        bases: Path | None = None,
        problem: VmrewindError | None = None,
    ) -> Self:
        """Open a VM's history from its journal directory and its part of a repository; either may be missing.

        ``bases`` is the directory with copies of manifests; ``problem`` the error that kept the caller from opening the
        repository. Raises CorruptionError, or RepositoryError for formats from a newer version.
        """
        # Everything acknowledged before now will be seen; what comes later may not.
        opened_ns = time.time_ns()
        # The journal first: whatever is recycled before it is locked has been shipped before the repository is listed.
        local, broken = open_journal(journal) if journal is not None else ([], [])
        try:
            damaged: list[CorruptionError] = []
            head = read_head(journal, damaged.append) if journal is not None else None
            described = described_runs(journal) if journal is not None else []
            here = local_runs(journal, damaged.append) if journal is not None else []
            there: list[RunInfo] = []
            shipped: list[ShippedSource] = []
            if repository is not None:
                try:
                    there = repository.runs()
                    cache = ObjectCache()
                    shipped = [ShippedSource(repository, key, cache) for key in repository.segments()]
                except RepositoryError as error:
                    repository, problem, there, shipped = None, error, [], []
            runs = merge_runs(here, there)
            here_runs = {info.run for info in here}
            made = cls(name, runs, local, broken, shipped, head, repository, bases, problem, opened_ns, here_runs)
            made.damaged = damaged
            if journal is not None:
                targets = {disk.target for info in here for disk in info.disks}
                made.begun = {target: found for target in targets if (found := begun_base(journal, target)) is not None}
                made.filling = (journal / FILLING).exists()
            if head is not None and journal is not None:
                made.unrecorded = unrecorded(head, [disk.target for info in here for disk in info.disks], journal)
                # A run that began meanwhile removed the head before it touched an image.
                if made.unrecorded and read_head(journal, lambda _: None) != head:
                    made.unrecorded = {}
            made.lost = sorted({*described, *(source.run for source in shipped)} - runs.keys())
            return made
        except BaseException:
            for source in local:
                source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the segment files, which lets them be recycled."""
        for source in self._local:
            source.close()

    def forget_tables(self) -> None:
        """Let go of the local tables that were read, if they take much: a view that stands does not need them."""
        if sum(source.kept_bytes for source in self._local) > _TABLES_BYTES_MAX:
            for source in self._local:
                source.forget()
            # They lie among what stays, so the C library would keep the space: 30 bytes for each record that was read.
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)

    # -- runs and branches

    def branch(self, wanted: str | None = None) -> Branch:
        """The branch that the VM is on, or that of the run whose id begins with ``wanted``.

        Raises VmStateError, MomentError, and CorruptionError if that of the newest run cannot be used.

        The VM is on the newest run's branch (``choose_run``), unless its images were taken back since: then on what they hold now.
        """
        head = self.head
        if wanted is None and self.lost and self.lost[-1] > max(self.runs, default=0):
            # To take an older run for the newest would give a state that nobody asked for.
            raise CorruptionError(
                f"the newest run, {run_name(self.lost[-1])}, cannot be used: "
                + (str(self.damaged[-1]) if self.damaged else "its description is missing in the repository"),
                "put the file back; or choose another branch with --branch: " + ", ".join(map(run_name, self.runs)),
            )
        if wanted is None and head is not None and head.position.run in self.runs:
            last = self.records(head.position.run).last_known
            if head.position.run != choose_run(self.runs, None, self._described_here) or (
                last is not None and head.position.seq < last
            ):
                return branch_of(self.runs, head.position.run, cut=head.position.seq)
        return branch_of(self.runs, choose_run(self.runs, wanted, self._described_here))

    @property
    def elsewhere(self) -> RunInfo | None:
        """The newest run of another host that has the VM now, as far as is known; None on a host without a journal of the VM."""
        if not self._described_here or not self.runs:
            return None
        run = owners_run(self.runs)
        ours = max((last_takeover(self.runs, at) for at in self._described_here & self.runs.keys()), default=0)
        return self.runs[run] if last_takeover(self.runs, run) > ours else None

    def branch_of_run(self, run: int) -> Branch:
        """The branch that ends with a run; raises MomentError for an unknown one."""
        if run not in self.runs:
            raise MomentError(f"run {run_name(run)} is not known", "vmrewind timeline lists the runs")
        return branch_of(self.runs, run)

    def records(self, run: int) -> RunRecords:
        """The records of a run."""
        return self._records[run]

    def coverage(self, target: str, branch: Branch) -> Coverage:
        """In which intervals every moment of a disk can be restored."""
        key = (target, branch.run)
        losses = self._losses(branch)
        known = self._coverages.get(key)
        if known is None or known[0] != losses:
            coverage = self.retrying(lambda: cover(self, branch, target))
            self._coverages[key] = known = self._losses(branch), coverage
        return known[1]

    @functools.cached_property
    def _coverages(self) -> dict[tuple[str, int], tuple[int, Coverage]]:
        return {}

    def _losses(self, branch: Branch) -> int:
        return sum(self.records(leg.info.run).losses for leg in branch.legs)

    def retrying(self, make: Callable[[], Made]) -> Made:
        """What ``make`` makes of records, begun anew without whatever proves damaged meanwhile. Raises DamagedObject if that
        does not end."""
        left = self._attempts_max
        while True:
            try:
                return make()
            except DamagedObject as error:
                if not left:
                    raise
                left -= 1
                self.records(error.source.run).leave_out(error)

    @functools.cached_property
    def ends(self) -> Mapping[int, int]:
        """Seq up to which a run is known to have gone: its children and ``head.json`` tell."""
        ends: dict[int, int] = {}
        known = [info.parent for info in self.runs.values() if info.parent is not None]
        if self.head is not None:
            known.append(self.head.position)
        for position in known:
            ends[position.run] = max(ends.get(position.run, 0), position.seq)
        return ends

    def goes_on(self, run: int) -> bool:
        """Whether nothing can have happened behind the last known record of a run: it ended there, or its journal is here."""
        records = self.records(run)
        if records.local and records.last_known == records.local[-1].last:
            return True
        return records.last_known is not None and self._is_stop(records, records.last_known)

    def undeclared_gap(self, run: int, seq: int, target: str) -> tuple[int, str] | None:
        """Since when, and why, what happened to a disk behind record ``seq``, where a run ends, is not in the journal."""
        if self.undeclared is not None and self.undeclared[0] == run:
            return self.undeclared[1], f"the journal takes no records: {self.undeclared[2]}"
        head = self.head
        if head is not None and target in self.unrecorded and head.position.run == run and head.position.seq >= seq:
            return head.position.time_ns + 1, self.unrecorded[target]
        if head is not None and target in head.apart and head.position.run == run and head.position.seq >= seq:
            return head.position.time_ns + 1, head.apart[target].why_apart
        return None

    def nothing_lost(self, info: RunInfo) -> str | None:
        """Why a run of which no record is known may have had some nonetheless, None if it cannot.

        It cannot if its journal is here from its beginning on: that of the newest run, as older ones may have been recycled.
        """
        which = f"the records of run {run_name(info.run)}"
        if info.run not in self._described_here:
            return f"{which} are not in the repository, and its journal is not here"
        records = self.records(info.run)
        if (damage := records.damage) is not None:
            return f"{which} cannot be read: {damage}"
        newest = max(*self.runs, *(run for run, known in self._records.items() if known.local or known.broken), 0)
        if info.run != newest or (records.local and records.local[0].number != 1):
            return f"{which} were recycled before they were shipped: they are neither in the journal nor in the repository"
        return None

    @staticmethod
    def _is_stop(records: RunRecords, seq: int) -> bool:
        for piece in reversed(records.event_pieces()):
            rows = piece.rows
            if len(rows):
                last = rows[-1]
                return bool(last["seq"] == seq and last["op"] == fmt.Op.EVENT and last["flags"] == fmt.Event.STOP)
        return False

    # -- bases

    def base_problem(self, info: RunInfo, target: str) -> str | None:
        """Why the base that a run names for a disk cannot be had, None if it can, as far as can be told without reading it."""
        base_id = info.bases[target]
        if self._local_manifest(target, base_id) is not None or base_id in self._known_bases(target):
            return None
        if (words := self._being_made(target, base_id)) is not None:
            return words
        if self.repository is None:
            return f"base {base_id} of disk {target} is not known here, and the repository cannot be read"
        return f"base {base_id} of disk {target} is not in {self.repository.repository.url}: it was never completed, or it is lost"

    def manifest(self, info: RunInfo, target: str) -> Manifest:
        """The manifest of the base that a run names for a disk. Raises MomentError while it is being made, RepositoryError,
        CorruptionError."""
        base_id = info.bases[target]
        if (manifest := self._local_manifest(target, base_id)) is not None:
            return manifest
        if (words := self._being_made(target, base_id)) is not None:
            raise MomentError(words, self.completed_by)
        return self.reachable_repository(f"base {base_id} of disk {target}").base(target, base_id)

    def _being_made(self, target: str, base_id: str) -> str | None:
        begun = self.begun.get(target)
        if begun is None or begun[0] != base_id:
            return None
        return f"base {base_id} of disk {target} is still being made{made_words(begun[1])}"

    @property
    def completed_by(self) -> str:
        """In words, what completes the bases that are being made here."""
        by = f"`vmrewind restore {self.name} --in-place`" if self.filling else f"its next start, or `vmrewind backup {self.name}`,"
        return f"while the VM runs it is being made, as `vmrewind status {self.name}` shows; if it is stopped, {by} completes it"

    def reached(self, repository: VmRepository) -> None:
        """The repository, which could not be reached when the history was opened, can be now: for views that stand."""
        self.repository, self.problem = repository, None
        self._repository_bases.clear()

    def reachable_repository(self, wanted: str) -> VmRepository:
        """The repository, which has ``wanted``; raises RepositoryError with what kept it from being read."""
        if self.repository is not None:
            return self.repository
        if self.problem is not None:
            raise RepositoryError(f"{wanted} is in the repository: {self.problem}", self.problem.hint)
        raise RepositoryError(f"{wanted} is in the repository, and none is configured", "name it in the VM's configuration")

    def _local_manifest(self, target: str, base_id: str) -> Manifest | None:
        """The copy that was kept here; a damaged one, or another's, is none, as the repository has the original."""
        if self._bases is None:
            return None
        if (known := self._local_manifests.get((target, base_id))) is not None:
            return known
        path = self._bases / target / f"{base_id}.json"
        try:
            manifest = Manifest.from_json(path.read_bytes(), str(path))
        except (OSError, CorruptionError):
            return None
        if (manifest.disk, manifest.id) != (target, base_id):
            return None
        # Of a large disk it takes 0.1 s to parse and check, and several ask for it.
        self._local_manifests[target, base_id] = manifest
        return manifest

    def _known_bases(self, target: str) -> frozenset[str]:
        if target not in self._repository_bases:
            known = self.repository.bases(target) if self.repository is not None else []
            self._repository_bases[target] = frozenset(known)
        return self._repository_bases[target]

    def holes(self, branch: Branch) -> Iterator[str]:
        """Why records are missing on a branch, one line a hole; for messages."""
        for leg in branch.legs:
            records = self.records(leg.info.run)
            end = leg.cut or max(records.last_known or 0, self.ends.get(leg.info.run, 0))
            for disk in leg.info.disks:
                for hole in records.holes(disk.index, leg.info.first_seq, end):
                    yield hole.cause
