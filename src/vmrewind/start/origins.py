"""A VM that was begun from another one's moment: its first start, and its first bases, which are that moment.

They are made of the other VM's history, as long as that has the moment.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Self

from vmrewind.errors import ImageError, MomentError, VmrewindError, VmStateError
from vmrewind.history.history import History
from vmrewind.history.view import View
from vmrewind.journal import origin as origins
from vmrewind.journal.origin import Origin
from vmrewind.journal.runs import local_runs, write_durably
from vmrewind.paths import VmPaths
from vmrewind.repository.base import make_base_of
from vmrewind.repository.chunks import CHUNK_SIZE
from vmrewind.repository.manifest import Manifest
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.start.processes import Process
from vmrewind.start.resolve import StoredVm, VmHandle, open_any

Progress = Callable[[int, int, int], None]
"""Called with (bytes done, bytes in total, bytes sent)."""


def first_bases(journal: Path) -> dict[str, str]:
    """The first bases, by disk, of a VM that is started for the first time, in front of the process that completes its images.

    Empty for any other start, also if that process has died. Raises CorruptionError.
    """
    by = Process.noted(origins.filling_by(journal))
    if by is None or not by.alive or local_runs(journal, lambda _: None):
        return {}
    found = {target: Origin.read(journal, target) for target in origins.filling(journal)}
    return {target: origin.base for target, origin in found.items() if origin is not None}


class Moment:
    """The moment that a disk's base is to be made of. What was there when it was opened is not lost to it, whatever the other VM
    drops from its journal meanwhile."""

    def __init__(self, of: StoredVm | VmHandle, journal: Path, target: str, origin: Origin, history: History, view: View) -> None:
        self._of = of
        self._journal = journal
        self._target = target
        self._origin = origin
        self._history = history
        self._view = view
        self._stored: dict[str, MutableMapping[int, str | None]] = {}

    @classmethod
    def open(cls, vm: str, journal: Path, target: str, origin: Origin, repository: Callable[[], VmRepository]) -> Self:
        """That of a disk of ``vm``, which has the ``repository``.

        Raises MomentError if the other VM's history does not have it any more, which is noted durably: the base is given up. Raises
        what keeps that from being known; then it can be tried again.
        """
        of = f"{vm}: base {origin.base} of disk {target} is to be made of a moment of {origin.vm}"
        if origin.lost:
            raise MomentError(f"{of}, and that is lost: {origin.lost}")
        with ExitStack() as opened:
            other = open_any(origin.vm)
            history = opened.enter_context(other.history())
            try:
                view = View.open(history, target, origin.position)
            except MomentError as error:
                if (doubt := _doubt(history, target, origin)) is not None:
                    raise doubt from error
                if origin.base in repository().bases(target):
                    raise VmStateError(f"{vm}: base {origin.base} of disk {target} is made, and not noted here yet") from error
                replace(origin, lost=str(error)).write(journal, target)
                raise MomentError(f"{of}, and that is lost: {error}") from error
            opened.pop_all()
        return cls(other, journal, target, origin, history, view)

    def close(self) -> None:
        """Let the other VM have its segments back."""
        self._history.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def complete(self, paths: VmPaths, repository: VmRepository, progress: Progress | None) -> Manifest:
        """Make the base, and keep a copy of its manifest here; one that failed goes on where it was. Raises what the view and the
        store raise."""
        target, origin = self._target, self._origin
        if (manifest := made_before(paths, self._journal, target, origin, repository)) is not None:
            return manifest
        self._reach()
        known = self._stored.setdefault(repository.repository.id, {})
        known.update(self._shared(repository))
        disk = self._view.disk
        manifest = make_base_of(
            repository,
            _Source(self._view),
            known,
            base_id=origin.base,
            disk=target,
            uuid=origin.uuid,
            size=self._view.size,
            format=disk.format,
            backing=disk.backing,
            time_ns=origin.position.time_ns,
            progress=progress,
        )
        _keep(paths, self._journal, target, manifest)
        return manifest

    def _reach(self) -> None:
        """The other VM's repository may have been away when this was opened."""
        if self._history.problem is not None and isinstance(self._of, VmHandle) and self._of.repository_url is not None:
            self._history.reached(Repository.open(self._of.repository_url).vm(self._of.name))

    def _shared(self, repository: VmRepository) -> dict[int, str | None]:
        """The chunks that nothing was written to since, if both VMs have the same repository, which has them then."""
        theirs = self._history.repository
        if theirs is None or theirs.repository.id != repository.repository.id:
            return {}
        numbers = range(-(-self._view.size // CHUNK_SIZE))
        return {number: found[0] for number in numbers if (found := self._view.untouched_chunk(number)) is not None}


def made_before(paths: VmPaths, journal: Path, target: str, origin: Origin, repository: VmRepository) -> Manifest | None:
    """The base, if an earlier try put it, and was ended before it could say so."""
    if origin.base not in repository.bases(target):
        return None
    manifest = repository.base(target, origin.base)
    _keep(paths, journal, target, manifest)
    return manifest


def _keep(paths: VmPaths, journal: Path, target: str, manifest: Manifest) -> None:
    """The repository has a disk's first base: have a copy of its manifest here, and nothing left to be made."""
    write_durably(paths.bases / target / f"{manifest.id}.json", manifest.to_json())
    origins.settled(journal, target)


def complete_from(
    paths: VmPaths, journal: Path, target: str, origin: Origin, repository: VmRepository, progress: Progress | None = None
) -> Manifest:
    """Make a disk's base of the moment that it was begun from. Raises as ``Moment`` does."""
    if (manifest := made_before(paths, journal, target, origin, repository)) is not None:
        return manifest
    with Moment.open(paths.name, journal, target, origin, lambda: repository) as moment:
        return moment.complete(paths, repository, progress)


def _doubt(history: History, target: str, origin: Origin) -> VmrewindError | None:
    """Why a moment that a history does not have may still be had from it later, None if it is gone for good."""
    if history.problem is not None:
        return history.problem
    if history.damaged:
        return history.damaged[0]
    if target in history.begun:
        return VmStateError(f"base {history.begun[target][0]} of disk {target} of {origin.vm} is still being made", "wait for it")
    run = origin.position.run
    legs = history.branch_of_run(run).legs if run in history.runs else ()
    if run in history.lost or any(history.records(leg.info.run).damaged for leg in legs):
        return VmStateError(f"part of the history of {origin.vm} cannot be read", f"`vmrewind timeline {origin.vm}` tells which")
    return None


class _Source:
    """A disk as it was at the moment: a source of chunks."""

    def __init__(self, view: View) -> None:
        self._view = view

    def has_data(self, index: int) -> bool:
        """See ``Source``."""
        return any(not extent.zero for extent in self._view.extents(index * CHUNK_SIZE, CHUNK_SIZE))

    def read(self, index: int) -> bytes:
        """See ``Source``."""
        offset = index * CHUNK_SIZE
        try:
            return self._view.read(offset, min(CHUNK_SIZE, self._view.size - offset))
        except OSError as error:
            raise ImageError(
                f"cannot be read at offset {offset}: {error.strerror}", "check the disk that holds the journal"
            ) from error

    def read_again(self, index: int) -> bytes:
        """See ``Source``."""
        return self.read(index)
