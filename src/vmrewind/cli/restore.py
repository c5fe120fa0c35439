"""``vmrewind restore``."""

from __future__ import annotations

import asyncio
import json as json_module
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmrewind.cli.chosen import BranchOption, Chosen
from vmrewind.cli.progress import byte_progress
from vmrewind.errors import MomentError, UsageError, VmStateError
from vmrewind.history.bookmarks import kind_of
from vmrewind.history.history import History
from vmrewind.history.moments import FORMS, format_time
from vmrewind.journal.format import run_name
from vmrewind.journal.origin import Origin, filling
from vmrewind.journal.runs import Position
from vmrewind.recover.in_place import restore_in_place
from vmrewind.recover.intent import pending
from vmrewind.recover.restore import Restored
from vmrewind.recover.restore import restore as restore_to_files
from vmrewind.repository.repository import Repository
from vmrewind.start.bases import complete_begun
from vmrewind.start.images import no_guest_ran, refuse_half_restored
from vmrewind.start.leftovers import clear_leftovers
from vmrewind.start.processes import running
from vmrewind.start.resolve import VM_HELP, StoredVm, VmHandle, open_any


def restore(
    vm: Annotated[str, Parameter(help=VM_HELP)],
    /,
    *,
    at: Annotated[str | None, Parameter(allow_leading_hyphen=True, help=f"The moment: {FORMS}.")] = None,
    output: Annotated[Path | None, Parameter(help="Write the disks as files into this directory.")] = None,
    in_place: Annotated[bool, Parameter(negative="", help="Make the stopped VM's own images what they were.")] = False,
    discard_unprotected: Annotated[
        bool, Parameter(negative="", help="In place: give up writes of an image that no history has.")
    ] = False,
    disk: Annotated[list[str] | None, Parameter(negative="", help="Only this disk (may be repeated).")] = None,
    branch: BranchOption = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Restore a VM's disks, all at one moment, to files or in place."""
    if (output is None) == (not in_place):
        raise UsageError("say where to restore to", "give either --output DIR or --in-place")
    if discard_unprotected and not in_place:
        raise UsageError("--discard-unprotected is for --in-place", "leave it out: --output touches no image of the VM")
    found = open_any(vm)
    own = on_this_host(found, "restored in place") if in_place else None
    if own is not None and filling(own.journal):
        at = at or "latest"
        complete_bases(own, json=json)
    elif own is not None and at is None and pending(own.journal) is None:
        raise UsageError(
            f"{own.name}: --at is missing, and there is nothing that was begun in place and is left to be completed",
            f"give the moment to restore to: {FORMS}",
        )
    with found.history() as history:
        chosen = Chosen.of(found.name, history, branch, disk)
        targets = chosen.targets
        begun = pending(own.journal) if own is not None else None
        if at is not None:
            position = chosen.at(at)
            kind: str | None = kind_of(history, chosen.branch, at, position)
        elif begun is not None:
            position = begun.position
            kind = None  # which was said when it began
        else:
            raise UsageError("--at is missing", f"give the moment to restore to: {FORMS}")
        if not json:
            print(
                f"{found.name} at {format_time(position.time_ns)} (seq {position.seq} of run {run_name(position.run)}"
                f"{f', {kind}' if kind else ''}): restoring {', '.join(targets)}",
                flush=True,
            )
        with byte_progress(json=json) as update:
            if own is not None:
                images = images_of(own, history, position, targets)
                restored = restore_in_place(history, images, position, own.journal, update, discard_unprotected=discard_unprotected)
            else:
                assert output is not None, "one of the two is given"
                restored = restore_to_files(history, targets, position, output, update)
    report(restored, kind, json=json)


def complete_bases(own: VmHandle, *, json: bool) -> None:
    """Make the bases that were begun of another VM's moment, and that what is restored here stands on."""
    if no_guest_ran(own.journal):
        refuse_half_restored(own.name, own.journal)
    assert own.config is not None and own.config.protection.repository is not None, "it was begun with a repository"
    disks = [(disk.target, Path(disk.image)) for disk in own.config.protection.disk]
    with byte_progress(json=json) as update:

        def progress(target: str, done: int, total: int, _sent: int) -> None:
            update(f"base of {target}", done, total)

        for target, image in disks:
            repository = Repository.open(own.config.protection.repository).vm(own.name)
            if Origin.read(own.journal, target) is not None:
                try:
                    complete_begun(own.paths, repository, own.journal, image, target, progress)
                except MomentError:
                    # The moment is lost, and with it what the images lack.
                    refuse_half_restored(own.name, own.journal)
                    raise


def on_this_host(found: VmHandle | StoredVm, done: str) -> VmHandle:
    """The stopped VM whose own images are to be ``done``. Raises UsageError, VmStateError."""
    if isinstance(found, StoredVm):
        raise UsageError(
            f"{found.url}/{found.name}: the images of a VM in a repository are not here, so they cannot be {done}",
            "use --output DIR; `vmrewind takeover` brings the VM up on this host",
        )
    keeping = running(found.paths)
    if keeping is not None and not keeping.keeper.alive:
        # What it left behind has the images, for nobody; a QEMU that lives refuses that.
        asyncio.run(clear_leftovers(found.paths))
    elif keeping is not None:
        raise VmStateError(f"{found.name} is running", "stop it first, or restore to files with --output DIR")
    return found


def images_of(handle: VmHandle, history: History, position: Position, targets: list[str]) -> dict[str, Path]:
    """Where each disk's image is now: as configured, else as the run at that moment had it."""
    configured = {disk.target: disk.image for disk in handle.config.protection.disk} if handle.config is not None else {}
    recorded = {disk.target: disk.image for disk in history.runs[position.run].disks}
    return {target: Path(configured.get(target) or recorded[target]) for target in targets}


def report(restored: Restored, kind: str | None, *, json: bool) -> None:
    """Print what was restored. ``kind``: what kind of point it is, where that is known."""
    position = restored.position
    if json:
        described = {
            "vm": restored.vm,
            "run": run_name(position.run),
            "seq": position.seq,
            "time": datetime.fromtimestamp(position.time_ns / 1e9, UTC).isoformat(timespec="microseconds"),
            "time_ns": position.time_ns,
            "kind": kind,
            "disks": {
                disk.target: {
                    "path": str(disk.path),
                    "format": disk.format,
                    "size_bytes": disk.size_bytes,
                    "written_bytes": disk.written_bytes,
                    "base": disk.base,
                    "backing": disk.backing,
                }
                for disk in restored.disks
            },
        }
        print(json_module.dumps(described))
        return
    for disk in restored.disks:
        backing = f", on top of {disk.backing}" if disk.backing else ""
        print(f"{disk.target}: {disk.path} ({disk.size_bytes} bytes, {disk.written_bytes} written, base {disk.base}{backing})")
