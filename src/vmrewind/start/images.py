"""Before anybody uses a VM's images without protection: they must hold a moment, and all that the guest was promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmrewind.capture.recovery import recover
from vmrewind.errors import ImageError, VmrewindError, VmStateError
from vmrewind.journal.runs import RESTORE_PENDING
from vmrewind.vmconfig.model import VmConfig


def refuse_half_restored(name: str, journal: Path) -> None:
    """Raise VmStateError if a restore in place was interrupted: the images are between two moments."""
    if (journal / RESTORE_PENDING).exists():
        raise VmStateError(
            f"{name}: a restore in place was interrupted, so its images are half old and half restored",
            f"run `vmrewind restore {name} --in-place` again: it completes it",
        )


def may_start_unprotected(config: VmConfig, error: VmrewindError) -> bool:
    """Whether a start that failed with ``error`` may go on without protection, as the configuration says.

    Never if the VM runs already, its images are half restored, or an image is missing, in use or wrong: what stands in the way
    then is not protection.
    """
    return config.protection.on_failure == "start-unprotected" and not isinstance(error, VmStateError | ImageError)


def make_whole(name: str, journal: Path, say: Callable[[str], None]) -> None:
    """Bring the images to the end of a journal that a crash left, so that they are whole without vmrewind.

    Raises VmStateError for half-restored images, and what recovery raises: images that lack what the guest was promised must not
    be started, protected or not.
    """
    refuse_half_restored(name, journal)
    recover(journal, say)
