"""A VM that was begun from another one's moment: its first start, and its first bases, which are that moment.

They are made of the other VM's history, as long as that has the moment.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmrewind.errors import ImageError, MomentError
from vmrewind.history.view import View
from vmrewind.journal import origin as origins
from vmrewind.journal.origin import Origin
from vmrewind.journal.runs import local_runs, write_durably
from vmrewind.paths import VmPaths
from vmrewind.repository.base import make_base_of
from vmrewind.repository.chunks import CHUNK_SIZE
from vmrewind.repository.manifest import Manifest
from vmrewind.repository.repository import VmRepository
from vmrewind.start.processes import Process
from vmrewind.start.resolve import open_any

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


def complete_from(
    paths: VmPaths, journal: Path, target: str, origin: Origin, repository: VmRepository, progress: Progress | None = None
) -> Manifest:
    """Make a disk's base of the moment that it was begun from, and keep a copy of its manifest here.

    Raises MomentError if the other VM's history does not have the moment any more, and what reading it and the store raise.
    """
    if origin.base in repository.bases(target):
        manifest = repository.base(target, origin.base)
    else:
        try:
            manifest = _make(target, origin, repository, progress)
        except MomentError as error:
            of = f"{paths.name}: base {origin.base} of disk {target} is to be made of a moment of {origin.vm}"
            raise MomentError(f"{of}, and {error}", error.hint) from error
    write_durably(paths.bases / target / f"{manifest.id}.json", manifest.to_json())
    origins.made(journal, target)
    return manifest


def _make(target: str, origin: Origin, repository: VmRepository, progress: Progress | None) -> Manifest:
    with open_any(origin.vm).history() as history:
        view = View.open(history, target, origin.position)
        # A repository that both have holds the chunks that nothing was written to since.
        theirs = history.repository
        shared = theirs is not None and theirs.repository.id == repository.repository.id
        numbers = range(-(-view.size // CHUNK_SIZE)) if shared else range(0)
        known = {number: found[0] for number in numbers if (found := view.untouched_chunk(number)) is not None}
        disk = view.disk
        return make_base_of(
            repository,
            _Moment(view),
            known,
            base_id=origin.base,
            disk=target,
            uuid=origin.uuid,
            size=view.size,
            format=disk.format,
            backing=disk.backing,
            time_ns=origin.position.time_ns,
            progress=progress,
        )


class _Moment:
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
