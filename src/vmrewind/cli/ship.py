"""``vmrewind ship on`` and ``off``."""

from __future__ import annotations

import json as json_module
import sys
from typing import Annotated

from cyclopts import Parameter

from vmrewind.cli.progress import byte_progress
from vmrewind.errors import UsageError
from vmrewind.start.finish import finish_shipping
from vmrewind.start.processes import running
from vmrewind.start.resolve import open_vm
from vmrewind.start.wanted import UNCHANGED, switch
from vmrewind.vmconfig.model import Invalid, check_bandwidth_limit, parse_size

Vm = Annotated[str, Parameter(help="The VM: its TOML file, or its name.")]
Disks = Annotated[list[str] | None, Parameter(negative="", help="Only this disk (may be repeated); default: all.")]
Limit = Annotated[
    str | None, Parameter(help="Send so much a second at most (20MiB), or none, until the VM's next start; default: as it is.")
]
Json = Annotated[bool, Parameter(negative="", help="Print one JSON object.")]


def on(vm: Vm, /, *, disk: Disks = None, bandwidth_limit: Limit = None, json: Json = False) -> None:
    """Carry the history of disks to the repository, from the VM's start on. For a stopped VM: carry what its journal holds."""
    _switch(vm, disk or [], on=True, limit=_limit(bandwidth_limit), json=json)


def off(vm: Vm, /, *, disk: Disks = None, json: Json = False) -> None:
    """Stop carrying the history of disks; the local journal keeps it. Switched on again, what is missing is carried then."""
    _switch(vm, disk or [], on=False, json=json)


def _limit(text: str | None) -> int | None:
    """Bytes a second, None for none."""
    if text in (None, "none"):
        return UNCHANGED if text is None else None
    try:
        limit = parse_size("--bandwidth-limit", text)
        check_bandwidth_limit("--bandwidth-limit", limit)
    except Invalid as error:
        raise UsageError(f"{error.key}: {error}", error.hint) from None
    return limit


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _switch(vm: str, disks: list[str], *, on: bool, limit: int | None = UNCHANGED, json: bool) -> None:
    handle = open_vm(vm)
    known = [disk.target for disk in handle.require_config().protection.disk]
    wanted = switch(handle.paths, known, disks, on=on, limit=limit)
    alive = running(handle.paths) is not None
    if json:
        if on and wanted and not alive:
            with byte_progress(json=True) as update:
                finish_shipping(handle, update, _say)
        print(json_module.dumps({"vm": handle.name, "shipping": wanted, "running": alive}))
        return
    print(f"{handle.name}: shipping {', '.join(wanted) if wanted else 'nothing'}")
    if on and wanted and not alive:
        print(f"{handle.name} is not running: carrying what its journal holds")
        with byte_progress() as update:
            finish_shipping(handle, update, _say)
        print("the repository has everything")
