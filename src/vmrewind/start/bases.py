"""Bases at a VM's start: is there one that the image still equals, and if not, begin one, which is made while the VM runs.

``python -m vmrewind.start.bases`` makes those that were begun: a process of its own, started by the keeper.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.capture.image import Image
from vmrewind.errors import CorruptionError, ImageError, StartError, VmrewindError, VmStateError
from vmrewind.journal.copy_before_write import BegunBase, CopyBeforeWrite, begun_base
from vmrewind.journal.events import EventLog
from vmrewind.journal.origin import Origin
from vmrewind.journal.runs import DiskInfo, ImageIdentity, write_durably
from vmrewind.paths import VmPaths
from vmrewind.repository.base import make_base, make_begun_base
from vmrewind.repository.manifest import Manifest, new_base_id
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.start import interrupted
from vmrewind.start.errand import parser, yield_to_the_guest
from vmrewind.start.origins import Moment, complete_from
from vmrewind.vmconfig.model import VmConfig

_LITTLE: Final = 256 << 20
"""Bytes that a base's last seconds bring."""
_RETRY_SECONDS: Final = 2.0
_RETRY_SECONDS_MAX: Final = 60.0
_PR_SET_PDEATHSIG: Final = 1

Progress = Callable[[str, int, int, int], None]
"""Called with (disk, bytes done, bytes in total, bytes sent)."""


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A base made on this host: enough of its manifest to recognise the image that it was made of."""

    id: str
    disk: str
    uuid: str
    size: int
    identity: ImageIdentity


def local_bases(paths: VmPaths, disk: str) -> list[BaseCopy]:
    """The bases of a disk that were made on this host, newest first."""
    found = []
    for path in sorted((paths.bases / disk).glob("*.json"), reverse=True):
        try:
            manifest = Manifest.from_json(path.read_bytes(), str(path))
        except (OSError, CorruptionError):
            # A copy only: the repository has the manifest. At worst a base is made that was not needed.
            continue
        found.append(BaseCopy(manifest.id, manifest.disk, manifest.uuid, manifest.size, manifest.identity))
    return found


def matching_base(paths: VmPaths, repository: VmRepository | None, disk: str, uuid: str, identity: ImageIdentity) -> str | None:
    """The newest base that the image still equals, by its identity; None if there is none.

    A base that the repository no longer has is none. Without a repository (it cannot be reached) the local copy's word is taken.
    """
    if not identity.tells:
        return None
    present = None if repository is None else set(repository.bases(disk))
    for base in local_bases(paths, disk):
        if base.uuid == uuid and base.identity == identity and (present is None or base.id in present):
            return base.id
    return None


def back_up(paths: VmPaths, repository: VmRepository, image: Image, uuid: str, progress: Progress | None) -> Manifest:
    """Make a base of an open, locked image, and keep a copy of its manifest here."""

    def report(done: int, total: int, sent: int) -> None:
        if progress is not None:
            progress(image.target, done, total, sent)

    manifest = make_base(
        repository,
        image.target,
        image.fd,
        uuid=uuid,
        path=Path(image.path),
        size=image.size,
        format=image.format,
        backing=image.backing,
        partial=paths.state / f"backup-{image.target}.partial",
        progress=report,
    )
    write_durably(paths.bases / image.target / f"{manifest.id}.json", manifest.to_json())
    return manifest


def begin(journal: Path, repository_id: str, image: Image, run: int, uuid: str) -> str:
    """Begin the base of an open, locked image as it is now, which a run is about to write to; its id. Raises SpaceError."""
    time_ns = time.time_ns()
    base = BegunBase(
        new_base_id(time_ns), run, repository_id, uuid, image.target, image.size, image.format, image.backing, time_ns,
        image.identity(),
    )  # fmt: skip
    CopyBeforeWrite.begin(journal, base)
    return base.id


def is_of(base: BegunBase, image: int) -> bool:
    """Whether the open image is the file, or the device, that the base was begun of."""
    status = os.fstat(image)
    return (base.identity.inode, base.identity.device) in ((status.st_ino, 0), (0, status.st_rdev))


def complete(paths: VmPaths, repository: VmRepository, image: Path, begun: CopyBeforeWrite, progress: Progress | None) -> Manifest:
    """Make a base that was begun, of an image that may be in use, and keep a copy of its manifest here.

    Raises VmStateError if another process makes it, ImageError if the image cannot be read or the base has failed, and what the
    store raises.
    """
    base = begun.base
    if not begun.claim():
        raise VmStateError(f"base {base.id} of disk {base.disk} is being made by another process", "wait for it")
    partial = paths.state / f"begun-{base.disk}.partial"

    def report(done: int, total: int, sent: int) -> None:
        if progress is not None:
            progress(base.disk, done, total, sent)

    try:
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"{image}: cannot be opened: {error.strerror}", "check the path and its mode") from error
    try:
        if not is_of(base, fd):
            raise ImageError(f"{image}: another file than the one that the base of {base.disk} was begun of", "put that one back")
        if base.id in repository.bases(base.disk):
            # An earlier try put it, and was ended before it could say so.
            manifest = repository.base(base.disk, base.id)
        else:
            manifest = make_begun_base(repository, fd, image, begun, partial=partial, progress=report)
    finally:
        os.close(fd)
    write_durably(paths.bases / base.disk / f"{manifest.id}.json", manifest.to_json())
    begun.finish()
    partial.unlink(missing_ok=True)
    return manifest


def complete_begun(
    paths: VmPaths, repository: VmRepository, journal: Path, image: Path, target: str, progress: Progress | None
) -> Manifest | None:
    """Make the base that was begun of a disk, of its image or of another VM's moment; None if none was. Raises as those two do."""

    def report(done: int, total: int, sent: int) -> None:
        if progress is not None:
            progress(target, done, total, sent)

    if (origin := Origin.read(journal, target)) is not None:
        return complete_from(paths, journal, target, origin, repository, report)
    begun = CopyBeforeWrite.open(journal, target)
    if begun is None:
        return None
    with begun:
        return complete(paths, repository, image, begun, progress)


def little_left(journal: Path, disks: Sequence[DiskInfo]) -> bool:
    """Whether the bases that are being made of these disks lack so little that a VM's stop should wait for them."""
    begun = [(disk.size, begun_base(journal, disk.target)) for disk in disks]
    return sum(size * (1 - (base[1] or 0)) for size, base in begun if base is not None) <= _LITTLE


class _Maker:
    """Makes the bases that were begun of the disks of a run.

    What is to be made of other VMs' moments is taken hold of first, and kept until the end: a later look may come too late for it.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self._given = given
        self._journal: Path = given.journal
        self._paths = VmPaths(given.vm)
        self._events = EventLog(self._paths.events(given.run))
        self._images = {disk.target: Path(disk.image) for disk in VmConfig.load_saved(self._paths.config).protection.disk}
        self._moments: dict[str, Moment] = {}
        self._sent_bytes = 0

    def make_all(self) -> int:
        """Make them, or give them up; returns the exit code. What is made of a moment is tried again here."""
        pause_seconds = _RETRY_SECONDS
        left: list[str] = self._given.disks
        while True:
            held = {target: self._tried(target, self._hold) for target in left}
            goes_on = False
            codes = {}
            for target in left:
                self._sent_bytes = 0
                codes[target] = held[target] or self._tried(target, self._make)
                goes_on = goes_on or self._sent_bytes > 0
            left = [target for target in left if codes[target]]
            if not any(Origin.path(self._journal, target).exists() for target in left):
                return next((codes[target] for target in left), 0)
            pause_seconds = _RETRY_SECONDS if goes_on else pause_seconds
            time.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _RETRY_SECONDS_MAX)

    def _tried(self, target: str, work: Callable[[str], None]) -> int:
        """Do it; the exit code, 0 also if there is nothing left to be made."""
        try:
            work(target)
        except (VmrewindError, OSError) as error:
            sys.stderr.write(f"base: {self._given.vm}: {error}\n")
            if (unmade := begun_base(self._journal, target)) is not None:
                code, hint, words = ImageError.exit_code, "", str(error)
                if isinstance(error, VmrewindError):
                    code, hint, words = error.exit_code, error.hint, error.in_full
                self._events.write("base.interrupted", disk=target, error=str(error), hint=hint)
                interrupted.note(self._paths, target, unmade[0], words)
                return code
            if (origin := Origin.read(self._journal, target)) is not None and origin.lost:
                self._events.write("base.given-up", disk=target, base=origin.base, reason=origin.lost)
        return 0

    def _repository(self) -> VmRepository:
        return Repository.open(self._given.repository).vm(self._given.vm)

    def _hold(self, target: str) -> None:
        origin = Origin.read(self._journal, target)
        if origin is not None and not origin.lost and target not in self._moments:
            self._moments[target] = Moment.open(self._given.vm, self._journal, target, origin, self._repository)

    def _make(self, target: str) -> None:
        began = time.monotonic()

        def note(disk: str, _done: int, _total: int, sent: int) -> None:
            if sent and not self._sent_bytes:
                interrupted.clear(self._paths, disk)
            self._sent_bytes = sent

        if (moment := self._moments.get(target)) is not None:
            made: Manifest | None = moment.complete(
                self._paths, self._repository(), lambda done, total, sent: note(target, done, total, sent)
            )
            self._moments.pop(target).close()
        else:
            made = complete_begun(self._paths, self._repository(), self._journal, self._images[target], target, note)
        interrupted.clear(self._paths, target)
        if made is not None:
            seconds = round(time.monotonic() - began, 3)
            self._events.write(
                "base.made", disk=target, base=made.id, bytes=made.size, sent_bytes=self._sent_bytes, seconds=seconds
            )


def main() -> int:
    """Make the bases that were begun of the disks named; returns the exit code."""
    arguments = parser("vmrewind.start.bases")
    arguments.add_argument("--keeper", type=int, required=True, help="the process to end with")
    given = arguments.parse_args()
    # Without a keeper nobody sees to it that all who write to the images keep what the base needs.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != given.keeper:
        return StartError.exit_code
    yield_to_the_guest()
    return _Maker(given).make_all()


if __name__ == "__main__":
    sys.exit(main())
