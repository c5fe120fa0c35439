"""``vmrewind protect --live``: what it says before and after the domain stands still."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from rich.console import Console

from vmrewind.history.moments import format_time
from vmrewind.journal.format import run_name
from vmrewind.start.libvirt import Libvirt
from vmrewind.start.live import Prepared, Protected, claimed, go, prepare
from vmrewind.start.saved_state import SAVED_STATES
from vmrewind.vmconfig.rewrite import Rewritten

BESIDES_SECONDS: Final = 1.5
"""Beside its memory: the end of one QEMU and the protected start of another; docs/libvirt.md has what was measured."""


def protect_live(name: str, targets: Sequence[str], changes: Mapping[str, object], uri: str, *, json: bool) -> None:
    """Protect the running domain; raises what stands in the way."""
    console = Console(stderr=json)
    with Libvirt(uri) as libvirt:
        # before anything is made for it
        libvirt.domain(name).require_savable()
        with claimed(name):
            prepared = prepare(libvirt, uri, name, targets, changes)
            _line(console, f"{name} can be protected as it runs. {_expectation(prepared)}")
            protected = go(prepared)
    if json:
        sys.stdout.write(jsonlib.dumps(_report(prepared, protected)) + "\n")
    else:
        _tell(console, prepared, protected)


def disks_of(after: Rewritten) -> dict[str, dict[str, str]]:
    """The disks that are protected, for ``--json``."""
    return {disk.target: {"image": disk.image, "format": disk.format} for disk in after.protection.disk}


def _estimate(prepared: Prepared) -> float | None:
    return None if prepared.rate is None else prepared.memory_bytes / prepared.rate + BESIDES_SECONDS


def _expectation(prepared: Prepared) -> str:
    what = f"It stands still while about {prepared.memory_bytes >> 20} MiB of its memory are saved and read back"
    seconds = _estimate(prepared)
    if seconds is None or prepared.rate is None:
        return f"{what}."
    return f"{what}: about {seconds:.0f} s, as {SAVED_STATES} takes {prepared.rate / (1 << 20):.0f} MiB a second now."


def _report(prepared: Prepared, protected: Protected) -> dict[str, object]:
    protection = prepared.after.protection
    estimate = _estimate(prepared)
    return {
        "domain": prepared.name,
        "disks": disks_of(prepared.after),
        "repository": protection.repository,
        "ship": protection.ship,
        "hook": {"path": str(prepared.hook.path), "installed": prepared.hook.changed},
        "reconnect": prepared.reconnect,
        "run": run_name(protected.run.run),
        "seq": protected.run.first_seq,
        "since_ns": protected.run.start_time_ns,
        "memory_bytes": prepared.memory_bytes,
        "expected_seconds": None if estimate is None else round(estimate, 3),
        "pause_seconds": round(protected.pause_seconds, 3),
    }


def _tell(console: Console, prepared: Prepared, protected: Protected) -> None:
    run = protected.run
    _line(console, f"{prepared.name} is protected from {format_time(run.start_time_ns)} on (seq:{run.first_seq}).")
    _line(console, f"It stood still for {protected.pause_seconds:.2f} s at most.")
    for disk in prepared.after.protection.disk:
        _line(console, f"  {disk.target}  {disk.image} ({disk.format})")
    _line(console, f"  repository {prepared.after.protection.repository}, shipping {prepared.after.protection.ship}")
    if prepared.hook.changed:
        _line(console, f"Installed libvirt's hook {prepared.hook.path}.")
    if not prepared.reconnect:
        _line(console, "This libvirt is older than 9.2: should the capture die, the VM pauses for a moment until it is back.")
    if prepared.snapshots:
        _line(
            console,
            f"The domain has {prepared.snapshots} snapshots from before: reverting to one brings the unprotected disks back.",
        )
    _line(console, "Its clock lags behind by that time until it is set (NTP in the guest, or virsh domtime --sync with its agent).")


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
