"""What ``vmrewind status`` shows of a VM, gathered from its processes, its journal and its ship."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from vmrewind.errors import CorruptionError, VmrewindError
from vmrewind.history.unrecorded import unrecorded
from vmrewind.journal.copy_before_write import CopyBeforeWrite, State
from vmrewind.journal.format import run_name
from vmrewind.journal.origin import FILLING, Origin
from vmrewind.journal.reader import segment_files
from vmrewind.journal.runs import RESTORE_PENDING, local_runs, read_head
from vmrewind.paths import state_root
from vmrewind.ship.meter import unsent
from vmrewind.ship.status import baseless_words
from vmrewind.ship.status import status as ship_status
from vmrewind.start import interrupted
from vmrewind.start.control import instruct
from vmrewind.start.images import incomplete
from vmrewind.start.processes import ROLES, Process, running
from vmrewind.start.resolve import VmHandle
from vmrewind.start.saved_state import words as saved_state_words
from vmrewind.start.wanted import carried_disks, read_wanted


def known_vms() -> list[str]:
    """Names of the VMs that were protected on this host at least once."""
    try:
        return sorted(entry.name for entry in os.scandir(state_root() / "vms") if (Path(entry.path) / "config.json").exists())
    except FileNotFoundError:
        return []


def overview(handle: VmHandle) -> dict[str, Any]:
    """Everything about a VM's protection now, as plain data. Times in ns since the epoch, sizes in bytes."""
    keeping = running(handle.paths)
    config = handle.config
    result: dict[str, Any] = {
        "vm": handle.name,
        "state": "running" if keeping else "stopped",
        "repository": handle.repository_url,
        "journal": _journal(handle),
        "problems": [],
    }
    problems: list[str] = result["problems"]
    if config is not None:
        result["disks"] = {
            d.target: {"image": d.image, "format": d.format, "bases": _bases(handle, d.target)} for d in config.protection.disk
        }
        result["ship"] = {"wanted": read_wanted(handle.paths)}
        _ask_bases(handle, result)
    damaged: list[CorruptionError] = []
    runs = local_runs(handle.journal, damaged.append)
    head = read_head(handle.journal, damaged.append)
    problems += map(str, damaged)
    if head is not None:
        result["last_record"] = {"run": run_name(head.position.run), "seq": head.position.seq, "time_ns": head.position.time_ns}
    if keeping is not None:
        result["run"], result["mode"] = keeping.run, keeping.mode
        roles = (role for role in ROLES if role != "server" or keeping.server is not None)
        result["processes"] = {role: _process(getattr(keeping, role), role, problems) for role in roles}
        problems += saved_state_words(handle.paths)
        if not keeping.protected:
            # Only a keeper that brought capture up, and lives, takes the instruction to bring another one up.
            mendable = keeping.keeper.alive and handle.paths.keeper_socket.exists()
            way_out = f"`vmrewind restart-capture {handle.name}`" if mendable else "stop the VM and start it again"
            problems.append(
                f'the VM runs WITHOUT PROTECTION (on_failure = "start-unprotected"): {keeping.trouble}; '
                f"see `vmrewind events {handle.name}`, mend it, then {way_out}"
            )
            return result
        if keeping.trouble:
            problems.append(f"capture died and cannot be started again, the guest's I/O waits: {keeping.trouble}")
        else:
            _ask_capture(handle, result)
        shipping = ship_status(handle.paths.runtime)
        if shipping is not None and keeping.ship is not None and shipping.pid == keeping.ship.pid:
            result.setdefault("ship", {}).update(asdict(shipping))
            if shipping.error:
                problems.append(f"ship cannot reach the repository: {shipping.error}")
            if shipping.silent_seconds:
                problems.append(
                    f"ship (pid {shipping.pid}) has not responded for {shipping.silent_seconds:.0f} s: nothing is being carried; "
                    "if it is not stopped on purpose, kill it: another one is started"
                )
            if shipping.baseless:
                problems.append(baseless_words(shipping.baseless))
            if shipping.superseded:
                problems.append(f"superseded: {shipping.superseded}")
        if (bypass := result.get("capture", {}).get("bypass")) is not None:
            since = datetime.fromtimestamp(bypass["since_ns"] / 1e9).astimezone().isoformat(timespec="seconds")
            now = "its writes are journaled again, and what it wrote is being resynced" if bypass["resyncing"] else (
                "the VM is NOT PROTECTED now"
            )  # fmt: skip
            dirty = bypass["dirty_bytes"] >> 10
            problems.append(f"history has a gap since {since}: {now}; {dirty} KiB to resync ({bypass['cause']})")
        if result.get("capture", {}).get("journal_deleted"):
            problems.append(
                f"the journal {handle.journal} was deleted: stop the VM and start it again, its history needs a new base"
            )
        if result.get("capture", {}).get("journal_full"):
            lacking = ", or its images are complete: until then nothing is dropped" if (handle.journal / FILLING).exists() else ""
            problems.append(f"the journal is full and the guest's writes are held until it has room{lacking}")
    elif head is not None:
        since = datetime.fromtimestamp(head.position.time_ns / 1e9).astimezone().isoformat(timespec="seconds")
        causes = {target: one.why_apart for target, one in head.apart.items()}
        causes |= unrecorded(head, [disk.target for disk in runs[-1].disks] if runs else (), handle.journal)
        for target, cause in causes.items():
            problems.append(f"{target}: history has a gap since {since}, until the next protected start resyncs it: {cause}")
    elif runs:
        problems.append(
            "the last run did not end cleanly: the next start finishes its journal, and history has a gap until a resync, "
            "while the VM runs, has compared the images with it"
        )
    if keeping is None and config is not None:
        _ask_journal(handle, carried_disks(handle.paths, config.protection), result)
    if (handle.journal / RESTORE_PENDING).exists():
        problems.append("a restore in place was interrupted: run it again to complete it")
    if (handle.journal / FILLING).exists():
        problems.append(
            "its images are being completed by `vmrewind boot`"
            if keeping is not None and keeping.keeper.alive
            else _incomplete(handle)
        )
    return result


def _incomplete(handle: VmHandle) -> str:
    try:
        return "its images are not complete: " + "; ".join(incomplete(handle.name, handle.journal))
    except (OSError, CorruptionError) as error:
        return f"its images are not complete: {error}"


def _ask_bases(handle: VmHandle, result: dict[str, Any]) -> None:
    """How the bases stand that were begun."""
    for target, disk in result["disks"].items():
        try:
            if (origin := Origin.read(handle.journal, target)) is not None:
                _tell_of(handle, target, origin, result)
                continue
            begun = CopyBeforeWrite.open(handle.journal, target)
        except (OSError, CorruptionError) as error:
            result["problems"].append(f"{target}: how its base stands cannot be known: {error}")
            continue
        if begun is None:
            continue
        with begun:
            if begun.state is State.MAKING:
                disk["base_being_made"] = {"id": begun.base.id, "since_ns": begun.base.time_ns, "share": begun.taken_share}
                _tell_of_interruption(handle, target, begun.base.id, result)
            elif begun.state is State.FAILED:
                result["problems"].append(
                    f"{target}: base {begun.base.id} was given up, nothing that needs it can be restored: {begun.reason}; "
                    "the VM's next start begins another one"
                )


def _tell_of(handle: VmHandle, target: str, origin: Origin, result: dict[str, Any]) -> None:
    """How a first base stands that is made of another VM's moment."""
    if not origin.lost:
        result["disks"][target]["base_being_made"] = {"id": origin.base, "since_ns": None, "share": None}
        _tell_of_interruption(handle, target, origin.base, result)
        return
    result["problems"].append(
        f"{target}: base {origin.base} was given up, nothing that needs it can be restored: it is a moment of {origin.vm}, "
        f"which does not have it any more: {origin.lost}; once the images are complete, the VM's next start begins another one"
    )


def _tell_of_interruption(handle: VmHandle, target: str, base: str, result: dict[str, Any]) -> None:
    if (why := interrupted.read(handle.paths, target, base)) is not None:
        result["problems"].append(
            f"{target}: base {base} could not be made yet, nothing that needs it can be restored; the last try: {why}"
        )


def _ask_capture(handle: VmHandle, result: dict[str, Any]) -> None:
    try:
        result["capture"] = instruct(handle.paths, command="status")
    except VmrewindError as error:
        result["problems"].append(str(error))
        return
    result["capture"].pop("ok")
    result["last_record"] = {key: result["capture"][key] for key in ("run", "seq", "time_ns")}


def _ask_journal(handle: VmHandle, disks: list[str], result: dict[str, Any]) -> None:
    """What a stopped VM's ship has left behind."""
    try:
        left = unsent(handle.name, handle.journal, disks)
    except (CorruptionError, OSError) as error:
        result["problems"].append(f"whether the repository has everything cannot be known: {error}")
        return
    if disks:
        result["ship"] |= {"unsent_bytes": left.unsent_bytes if left else 0, "lag_seconds": left.lag_seconds if left else 0.0}
    if left is not None:
        result["problems"].append(left.words())


def _process(process: Process | None, role: str, problems: list[str]) -> dict[str, Any] | None:
    if process is None:
        return None
    if not process.alive:
        problems.append(f"the {role} process (pid {process.pid}) is dead")
    return {"pid": process.pid, "alive": process.alive}


def _journal(handle: VmHandle) -> dict[str, Any]:
    live = segment_files(handle.journal)
    size = 0
    for segment in live:
        with contextlib.suppress(FileNotFoundError):
            size += segment.path.stat().st_size
    return {
        "directory": str(handle.journal),
        "used_bytes": size,
        "quota_bytes": handle.config.protection.journal_size if handle.config else None,
    }


def _bases(handle: VmHandle, target: str) -> list[str]:
    return sorted(path.stem for path in (handle.paths.bases / target).glob("*.json"))
