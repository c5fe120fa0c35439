"""Restoring a stopped VM's own images, so that an interruption at any point is noticed and can be completed.

``only_changed`` makes it a rewind: it looks only where records tell that something was written between the moment that the images
hold and the one they are to hold, which costs what was written since, not what the disk holds.

Of disks that are left as they are the new head keeps what the old one told: another moment, or a gap.

Order: what a crash left is recovered, as the new head would hide it from the next start; everything is read and verified once,
without changing anything; an intent is written durably; ``head.json``, by which a start recognises the images, is removed; blocks
that differ are written; the images are synced; a new head is written; the intent is removed. A start refuses while the intent is
there, and doing the same restore again completes it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from vmrewind.capture.image import Image
from vmrewind.capture.recovery import Recovered, recover
from vmrewind.errors import ImageError, SpaceError, UsageError, VmrewindError, VmStateError
from vmrewind.history.history import History
from vmrewind.history.reading import read_whole
from vmrewind.history.unrecorded import unrecorded
from vmrewind.history.view import View
from vmrewind.journal.copy_before_write import begun_base, made_words
from vmrewind.journal.origin import Origin, filled, filling
from vmrewind.journal.runs import (
    RESTORE_PENDING,
    Head,
    ImageIdentity,
    Position,
    described_runs,
    read_head,
    read_run,
    sync_directory,
    write_durably,
)
from vmrewind.paths import VmPaths
from vmrewind.recover.blocks import differing_runs
from vmrewind.recover.intent import Intent, declare, pending
from vmrewind.recover.restore import NO_SPACE, Progress, Restored, RestoredDisk
from vmrewind.recover.rewind_plan import known_head, planned
from vmrewind.start.saved_state import note_changed, refuse_change

_STEP: Final = 4 << 20
_GROUP: Final = 64
"""Pieces that a thread compares in one go: of a disk that was written to here and there each is small."""
_READERS: Final = 4
_KEPT_MAX: Final = 256 << 20
_HOLE_MIN: Final = 64 << 10
"""Fewer zeroes are written as they are: their space is allocated, and a hole costs a hundred times as much (measured, ext4)."""


def restore_in_place(
    history: History,
    images: Mapping[str, Path],
    position: Position,
    journal: Path,
    progress: Progress,
    *,
    discard_unprotected: bool = False,
    only_changed: bool = False,
) -> Restored:
    """Make the images (by target) what they were at a position; only blocks that differ are written.

    ``only_changed``: look nowhere else than where ``planned`` tells; whole disks where it does not.

    The VM must be stopped. Raises VmStateError if a capture lives, if a saved memory is to go on with the images, or if an
    interrupted restore concerned other disks as well; ImageError if an image is in use, of another size, or holds what no
    history has, unless ``discard_unprotected`` is given; SpaceError; and what the views raise, before anything is changed.
    """
    with stopped(journal), ExitStack() as opened:
        begun = _refuse_interrupted(history.name, journal, images)
        if begun is None:
            _recover(journal, list(images))
            _refuse_loss(history.name, journal, images, discard_unprotected=discard_unprotected)
        jobs = []
        for view, image in _opened(history, images, position, opened):
            plan = planned(history, image.target, Path(image.path), position, journal) if only_changed else None
            jobs.append(_Job(view, image, progress, plan.ranges if plan is not None else None))
        for job in jobs:
            job.compare()
        note_changed(VmPaths(history.name))
        others = _others(history, images, position, journal, begun)
        declare(journal, Intent(position, list(images), others))
        for job in jobs:
            with _naming(job.image):
                job.write()
        head = _joined(others, {job.view.disk.target: job.image.identity() for job in jobs})
        write_durably(journal / "head.json", head.to_json())
        filled(journal)
        (journal / RESTORE_PENDING).unlink()
        sync_directory(journal)
        return Restored(history.name, position, [job.restored for job in jobs])


def refuse_in_place(
    history: History, images: Mapping[str, Path], position: Position, journal: Path, *, discard_unprotected: bool = False
) -> None:
    """Raise what ``restore_in_place`` would before it reads anything, as far as that can be told without changing anything: what
    a crash left is not recovered, so that nobody knows yet whether an image was used since."""
    with stopped(journal), ExitStack() as opened:
        if _refuse_interrupted(history.name, journal, images) is None:
            _refuse_loss(history.name, journal, images, discard_unprotected=discard_unprotected)
        for _ in _opened(history, images, position, opened):
            pass


def _refuse_interrupted(name: str, journal: Path, images: Mapping[str, Path]) -> Intent | None:
    """The restore that was begun and that this one completes, if any; raises VmStateError for one that it would not."""
    refuse_change(VmPaths(name))
    begun = pending(journal)
    if begun is not None and (others := set(begun.targets) - set(images)):
        names = " ".join(f"--disk {target}" for target in sorted({*others, *images}))
        raise VmStateError(
            f"{name}: an interrupted restore in place left {', '.join(sorted(others))} half restored", f"add {names}"
        )
    if others := set(filling(journal)) - set(images):
        names = " ".join(f"--disk {target}" for target in sorted({*others, *images}))
        raise VmStateError(f"{name}: the images of {', '.join(sorted(others))} are not complete either", f"add {names}")
    return begun


def _refuse_loss(name: str, journal: Path, images: Mapping[str, Path], *, discard_unprotected: bool) -> None:
    _refuse_without_base(name, journal, images)
    # Images that were never complete hold nothing that history has not.
    if not discard_unprotected and not filling(journal):
        _refuse_unrecorded(name, journal, images)


def _opened(history: History, images: Mapping[str, Path], position: Position, opened: ExitStack) -> Iterator[tuple[View, Image]]:
    """Each disk's view at the position, and its image; raises ImageError if the two are not of one size."""
    for target, path in images.items():
        view = View.open(history, target, position)
        image = Image(view.disk.index, target, str(path), "raw")
        opened.callback(image.close)
        if view.disk.format == "qcow2" and image.size < view.size:
            # It is to be as long as its export again, which costs no space.
            image.size = view.size
        if image.size != view.size:
            raise ImageError(
                f"{path}: {image.size} bytes, but disk {target} had {view.size} bytes then", "restore it to a file with --output"
            )
        yield view, image


def _others(history: History, images: Mapping[str, Path], position: Position, journal: Path, begun: Intent | None) -> Head:
    """A head of the position that tells of the disks that stay as they are."""
    head = begun.others if begun is not None else known_head(journal)
    if head is None:
        return Head(position, {})
    info = history.runs.get(head.position.run)
    targets = {*head.apart, *(disk.target for disk in (info.disks if info is not None else ()) if begun is None)} - {*images}
    kept = {target: one for target, one in head.kept.items() if target not in images}
    return Head(position, {}, kept=kept, apart={target: head.of(target) for target in sorted(targets)})


def _joined(others: Head, restored: Mapping[str, ImageIdentity]) -> Head:
    """The head of the disks that were taken to a position and of the others, of which some may hold that one as well."""
    same = {
        target: one.identity
        for target, one in others.apart.items()
        if one.position == others.position and one.identity is not None and one.gap is None
    }
    apart = {target: one for target, one in others.apart.items() if target not in same}
    return replace(others, images={**restored, **same}, apart=apart)


def _refuse_without_base(name: str, journal: Path, images: Mapping[str, Path]) -> None:
    """An image that its base is still made of holds what is nowhere else."""
    for target in images:
        # One that is made of another VM's moment needs nothing of the image.
        if Origin.read(journal, target) is None and (found := begun_base(journal, target)) is not None:
            raise VmStateError(
                f"{name}: base {found[0]} of disk {target} is still being made{made_words(found[1])}, of the image as it is",
                f"`vmrewind backup {name}` completes it; then do this again",
            )


def _recover(journal: Path, targets: Sequence[str]) -> None:
    """Finish a run that a crash cut short: disks that are not restored keep every write that was promised to their guest."""
    try:
        recovered = recover(journal)
        # Nobody but who completes them uses images that are not complete.
        if recovered is not None and not filling(journal) and (cause := _unprotected_since(journal, recovered)) is not None:
            # Noted where it lasts: recovering again would find the images as it left them itself.
            write_durably(journal / "head.json", Head(recovered.position, {}, cause).to_json())
    except VmrewindError:
        runs = described_runs(journal)
        if not runs or any(disk.target not in targets for disk in read_run(journal, runs[-1]).disks):
            raise
        # Every disk is about to be made another one: what cannot be recovered is not needed.


def _unprotected_since(journal: Path, recovered: Recovered) -> str | None:
    """Why the images hold what the journal never had, None if nothing tells so."""
    for run in described_runs(journal):
        # It was declared when protection was lost, and no capture has begun it since.
        if run > recovered.position.run and (gaps := read_run(journal, run).gaps):
            return next(iter(gaps.values())).cause
    return "the image was used without vmrewind after the last run died" if recovered.changed else None


def _refuse_unrecorded(name: str, journal: Path, images: Mapping[str, Path]) -> None:
    """Raise ImageError if an image holds writes that no history has: restoring would destroy the only copy."""
    head = read_head(journal, lambda _: None)
    if head is None:
        return
    found = unrecorded(head, images, journal)
    for target, path in images.items():
        if target in found:
            raise ImageError(
                f"{path}: holds writes that no history has: {found[target]}",
                f"start {name} protected once, which puts them into its history; restore to files with --output DIR; "
                "or give them up with --discard-unprotected",
            )


@contextmanager
def stopped(journal: Path) -> Iterator[None]:
    """Keep captures off the journal meanwhile, by the lock that a capture holds as long as it lives."""
    try:
        fd = os.open(journal, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UsageError(
            f"{journal}: this host has no journal of the VM, so its images cannot be restored in place", "use --output DIR"
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise VmStateError(f"{journal}: the VM is running", "stop it first, or restore to a file with --output") from error
        yield
    finally:
        os.close(fd)


@contextmanager
def _naming(image: Image) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "put that right, then run the same restore again: the image is half restored"
        if error.errno in NO_SPACE:
            raise SpaceError(f"{image.path}: no space left while it was restored", hint) from error
        raise ImageError(f"{image.path}: cannot be written: {error.strerror}", hint) from error


class _Job:
    """One disk: first compared with its view, from end to end or where ``ranges`` tell, then written where it differs."""

    def __init__(self, view: View, image: Image, progress: Progress, ranges: Sequence[tuple[int, int]] | None) -> None:
        self.view = view
        self.image = image
        self._progress = progress
        self._ranges = ranges
        self._differing: list[tuple[int, int]] = []
        self._kept: dict[int, bytes | None] = {}
        """By offset: what is to be written (None: zeroes), as far as it is not too much to be kept; the rest is read once more."""
        self._kept_bytes = 0
        self._written = 0

    @property
    def restored(self) -> RestoredDisk:
        """The report."""
        disk = self.view.disk
        return RestoredDisk(
            disk.target, Path(self.image.path), disk.format, self.view.size, self._written, self.view.base_id, disk.backing
        )

    def compare(self) -> None:
        """Read and verify what is looked at, and note where the image differs. Changes nothing."""
        if self._ranges is not None:
            self._compare_ranges(self._ranges)
        else:
            self._compare_all()

    def _compare_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        target, size = f"{self.view.disk.target} (compare)", self.view.size
        pieces = [(at, min(at + _STEP, end, size)) for start, end in ranges for at in range(start, min(end, size), _STEP)]
        groups = [pieces[at : at + _GROUP] for at in range(0, len(pieces), _GROUP)]
        total = sum(end - start for start, end in pieces)
        done = 0
        self._progress(target, 0, total)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="compare") as pool:
            try:
                for group, differing in zip(groups, pool.map(self._differing_of, groups), strict=True):
                    self._differing += differing
                    done += sum(end - start for start, end in group)
                    self._progress(target, done, total)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _differing_of(self, pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        differing = []
        for start, end in pieces:
            wanted = self.view.read(start, end - start)
            if wanted != os.pread(self.image.fd, end - start, start):
                differing.append((start, end))
                if wanted == bytes(end - start):
                    self._kept[start] = None
                # Several threads may overdo it by a piece each.
                elif self._kept_bytes < _KEPT_MAX:
                    self._kept[start] = wanted
                    self._kept_bytes += len(wanted)
        return differing

    def _compare_all(self) -> None:
        target, size = f"{self.view.disk.target} (compare)", self.view.size
        done = 0
        differing: set[int] = set()
        self._progress(target, 0, size)
        for _, offset, data in read_whole([self.view]):
            if os.pread(self.image.fd, len(data), offset) != bytes(data):
                differing.update(range(offset // _STEP, (offset + len(data) - 1) // _STEP + 1))
            done += len(data)
            self._progress(target, done, size)
        for extent in self.view.extents():
            if extent.zero:
                differing.update(self._nonzero_steps(extent.offset, extent.length))
                done += extent.length
                self._progress(target, done, size)
        self._differing = [(n * _STEP, min((n + 1) * _STEP, size)) for n in sorted(differing)]

    def _nonzero_steps(self, offset: int, length: int) -> Iterator[int]:
        """The steps in which the image has something other than zeroes within a range."""
        at = offset
        for part, is_data in self.image.allocation(offset, length):
            end = at + part
            while at < end:
                stop = min((at // _STEP + 1) * _STEP, end)
                if is_data and os.pread(self.image.fd, stop - at, at) != bytes(stop - at):
                    yield at // _STEP
                at = stop

    def _wanted(self, start: int, end: int) -> bytes:
        if start not in self._kept:
            return self.view.read(start, end - start)
        kept = self._kept.pop(start)
        return bytes(end - start) if kept is None else kept

    def write(self) -> None:
        """Write what differs, and sync; raises OSError."""
        self.image.extend()
        total = sum(end - start for start, end in self._differing)
        done = 0
        for start, end in self._differing:
            wanted = self._wanted(start, end)
            found = os.pread(self.image.fd, end - start, start)
            for low, high, zero in differing_runs(start, wanted, found):
                if zero and high - low >= _HOLE_MIN:
                    self.image.zero(start + low, high - low, keep_allocated=False)
                else:
                    self.image.write(wanted[low:high], start + low)
                self._written += high - low
            done += end - start
            self._progress(self.view.disk.target, done, total)
        os.fsync(self.image.fd)
