"""A domain's saved state (libvirt's managed save), which fits its disks only as they were when it was saved.

libvirt resumes it at the next start whatever happened to the disks meanwhile, and that start's guest then writes an old memory onto
newer disks. Two things put them apart: libvirt or its host dies after it has resumed a state and before it has removed it, and an
image is taken back under it. The hook notes each state as the domain ends, and again as it is resumed, before the CPU goes on; what
takes the disks to another moment refuses to as long as the state is there, and notes it, should it come back. The hook refuses a
start that would resume what is noted as unfit.

A state is known by its size and its end, where QEMU puts the devices with their clocks: no two saves have the same, and
``virsh managedsave-define``, which writes the XML at its beginning anew, changes neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import StartError, VmStateError
from vmrewind.journal.runs import write_durably
from vmrewind.paths import VmPaths

SAVED_STATES: Final = Path("/var/lib/libvirt/qemu/save")
"""Where the system libvirt keeps saved states; compiled into it."""
_END_BYTES_MAX: Final = 1 << 20
"""At most half of it: of an idle guest it may be as small as that, and its XML must not count."""


@dataclass(frozen=True, slots=True)
class _Note:
    """The saved state that was seen last, and why it does not fit the disks any more; empty as long as it does."""

    bytes: int
    end: str
    unfit: str = ""


def note_started(paths: VmPaths) -> None:
    """The domain is started, or about to go on: a saved state that is there fits its disks no more. Raises StartError."""
    if (found := _found(paths.name)) is not None:
        _write(paths, _Note(*found, "it was resumed already, and the VM may have written on since then"))
        return
    with contextlib.suppress(OSError):
        paths.saved_state.unlink()


def note_ended(paths: VmPaths) -> None:
    """The domain has ended: a saved state that is new fits its disks. Raises StartError."""
    found = _found(paths.name)
    note = _read(paths) if found is not None else None
    if found is not None and (note is None or (note.bytes, note.end) != found):
        _write(paths, _Note(*found))


def note_changed(paths: VmPaths) -> None:
    """The disks are about to be taken to another moment than the one the domain was saved at. Raises StartError."""
    note = _read(paths)
    if note is not None and not note.unfit:
        _write(paths, _Note(note.bytes, note.end, "the disks were taken to another moment after it was saved"))


def refuse_unfit(paths: VmPaths) -> None:
    """Raise VmStateError if a start would resume a saved state that does not fit the disks."""
    if why := unfit(paths):
        raise VmStateError(
            f"{paths.name}: its saved state must not be resumed, it would destroy the disks: {why}",
            f"virsh managedsave-remove {paths.name}, then start it: protected, as after a power failure",
        )


def refuse_change(paths: VmPaths) -> None:
    """Raise VmStateError if the disks of a stopped domain must not be changed, as a saved memory of it is to go on with them."""
    if (paths.state / "domain.xml").exists() and (path := _path(paths.name)).exists():
        raise VmStateError(
            f"{paths.name}: its memory is saved ({path}), and the next start resumes it, with disks that must be as they are now",
            f"give it up: virsh managedsave-remove {paths.name}; or start {paths.name} and shut it down",
        )


def words(paths: VmPaths) -> list[str]:
    """What is to be said of the saved state, if anything."""
    try:
        why = unfit(paths)
    except StartError as error:
        return [str(error)]
    return [f"there is a saved state that must not be resumed: {why}; virsh managedsave-remove {paths.name}"] if why else []


def unfit(paths: VmPaths) -> str:
    """Why the saved state that is there does not fit the disks; empty if there is none, or nothing tells so. Raises StartError."""
    found = _found(paths.name)
    note = _read(paths) if found is not None else None
    return note.unfit if note is not None and (note.bytes, note.end) == found else ""


def _path(name: str) -> Path:
    return SAVED_STATES / f"{name}.save"


def _found(name: str) -> tuple[int, str] | None:
    path = _path(name)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(size - min(size // 2, _END_BYTES_MAX))
            return size, hashlib.sha256(file.read()).hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartError(
            f"{path}: {error.strerror}: whether it fits the disks cannot be told", f"virsh managedsave-remove {name} gives it up"
        ) from error


def _read(paths: VmPaths) -> _Note | None:
    try:
        return _Note(**json.loads(paths.saved_state.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StartError(
            f"{paths.saved_state}: cannot be read: {error}",
            f"virsh managedsave-remove {paths.name}, unless it was never resumed; then remove {paths.saved_state}",
        ) from error


def _write(paths: VmPaths, note: _Note) -> None:
    try:
        write_durably(paths.saved_state, json.dumps(asdict(note)).encode() + b"\n")
    except OSError as error:
        raise StartError(f"{paths.saved_state}: {error.strerror}", "make room there: its saved state must be noted") from error
