"""What a VM's images must be before they are used: of a kind that can be protected; or, without protection, whole."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from vmrewind.capture.recovery import find_end, recover
from vmrewind.errors import ImageError, SupersededError, VmrewindError, VmStateError
from vmrewind.journal.origin import FILLING, Origin, filling
from vmrewind.journal.reader import segment_files
from vmrewind.journal.runs import (
    RESTORE_PENDING,
    TAKEOVER_PENDING,
    Head,
    Position,
    RunInfo,
    described_runs,
    local_runs,
    read_head,
    write_durably,
)
from vmrewind.paths import VmPaths
from vmrewind.vmconfig.model import DiskConfig, VmConfig


def check_image(disk: DiskConfig) -> None:
    """The image is there and of a kind that can be protected. Raises ImageError."""
    try:
        mode = Path(disk.image).stat().st_mode
    except OSError as error:
        raise ImageError(f"disk {disk.target}: {disk.image}: {error.strerror}", "correct the disk's source: virsh edit") from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ImageError(f"disk {disk.target}: {disk.image} is neither a file nor a block device", "correct the disk's source")


def refuse_half_restored(name: str, journal: Path) -> None:
    """Raise VmStateError if the images hold no moment: a restore in place was interrupted, or they were never complete."""
    if (journal / RESTORE_PENDING).exists():
        raise VmStateError(
            f"{name}: a restore in place was interrupted, so its images are half old and half restored",
            f"run `vmrewind restore {name} --in-place` again: it completes it",
        )
    if (journal / FILLING).exists():
        raise VmStateError(*incomplete(name, journal))


def incomplete(name: str, journal: Path) -> tuple[str, str]:
    """What is wrong with images that `vmrewind boot` was to complete and did not, and what to do. Raises CorruptionError."""
    ended = f"{name}: `vmrewind boot` was ended before its images were complete"
    if no_guest_ran(journal):
        return f"{ended}, and no guest ever ran on them", f"there is nothing to lose: {_what_to_remove(name)}, and boot it again"
    go_on = f"to go on with them as they are, remove {journal / FILLING}: the next start makes a new base of them"
    for target in filling(journal):
        origin = Origin.read(journal, target)
        if origin is not None and origin.lost:
            return (
                f"{ended}, and what {target} lacks is lost, as {origin.vm} does not have the moment any more: {origin.lost}",
                f"what its guest wrote is in the images and the journal, and of the moment what was copied by then; {go_on}",
            )
    return ended, f"run `vmrewind restore {name} --in-place`: it completes them, with all that the VM wrote"


def no_guest_ran(journal: Path) -> bool:
    """Whether the VM that this journal is of never began a run."""
    return not described_runs(journal) and not segment_files(journal)


def _what_to_remove(name: str) -> str:
    paths = VmPaths(name)
    try:
        disks = VmConfig.load_saved(paths.config).protection.disk
    except VmrewindError:
        return f"remove the directory that --keep named and {paths.state}"
    return f"remove {', '.join(sorted({str(Path(disk.image).parent) for disk in disks}))} and {paths.state}"


def refuse_half_taken_over(name: str, journal: Path) -> None:
    """Raise VmStateError if a takeover was interrupted: whose the VM is, and which images are its own, is not settled."""
    if (journal / TAKEOVER_PENDING).exists():
        raise VmStateError(
            f"{name}: a takeover onto this host was begun and did not end",
            f"run it again, it goes on; to give it up, remove {journal / TAKEOVER_PENDING}",
        )


def may_start_unprotected(config: VmConfig, error: VmrewindError) -> bool:
    """Whether a start that failed with ``error`` may go on without protection, as the configuration says.

    Never if the VM runs already, another host has taken it over, its images are half restored, or an image is missing, in use or
    wrong: what stands in the way then is not protection.
    """
    return config.protection.on_failure == "start-unprotected" and not isinstance(
        error, VmStateError | ImageError | SupersededError
    )


def make_whole(name: str, journal: Path, say: Callable[[str], None]) -> Position | None:
    """Bring the images to the end of a journal that a crash left, so that they are whole without vmrewind; returns that end.

    Raises VmStateError for half-restored images, and what recovery raises: images that lack what the guest was promised must not
    be started, protected or not.
    """
    refuse_half_restored(name, journal)
    refuse_half_taken_over(name, journal)
    recovered = recover(journal, say)
    return recovered.position if recovered is not None else None


def known_end(journal: Path, runs: Sequence[RunInfo]) -> Position | None:
    """The end of the newest of ``runs`` that the journal has readable records of; what the images hold beyond is not known."""
    for info in reversed(runs):
        if (end := find_end(journal, info.run, verify_after=1 << 64)) is not None:
            return Position(info.run, end.next_seq - 1, end.last_time_ns)
    return None


def declare_unprotected(name: str, journal: Path, recovered: Position | None, cause: str, say: Callable[[str], None]) -> None:
    """Declare, durably, that from the last record on nothing is known of the images; before an unprotected guest's first write.

    ``recovered`` is what ``make_whole`` returned. A gap that is declared already stays. A journal that takes
    no words costs just the declaration: the VM shall start, and the images' own identities tell of what was written then.
    """
    try:
        head = read_head(journal, lambda _: None)
        position = head.position if head is not None else recovered or known_end(journal, local_runs(journal, lambda _: None))
        if position is not None and (head is None or head.gap is None):
            write_durably(journal / "head.json", Head(position, {}, cause).to_json())
    except (OSError, VmrewindError) as error:
        say(f"{name}: its journal cannot note that history has a gap from now on: {error}")
