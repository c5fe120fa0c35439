"""Before anybody uses a VM's images without protection: they must hold a moment, and all that the guest was promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmrewind.capture.recovery import recover
from vmrewind.errors import VmStateError
from vmrewind.journal.runs import RESTORE_PENDING


def refuse_half_restored(name: str, journal: Path) -> None:
    """Raise VmStateError if a restore in place was interrupted: the images are between two moments."""
    if (journal / RESTORE_PENDING).exists():
        raise VmStateError(
            f"{name}: a restore in place was interrupted, so its images are half old and half restored",
            f"run `vmrewind restore {name} --in-place` again: it completes it",
        )


def make_whole(name: str, journal: Path, say: Callable[[str], None]) -> None:
    """Bring the images to the end of a journal that a crash left, so that they are whole without vmrewind.

    Raises VmStateError for half-restored images, and what recovery raises: images that lack what the guest was promised must not
    be started, protected or not.
    """
    refuse_half_restored(name, journal)
    recover(journal, say)
