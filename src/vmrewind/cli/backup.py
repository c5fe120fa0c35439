"""``vmrewind backup``."""

from __future__ import annotations

import asyncio
import json as json_module
import sys
from typing import Annotated

from cyclopts import Parameter

from vmrewind.cli.progress import byte_progress
from vmrewind.errors import UsageError, VmStateError
from vmrewind.start.backup import back_up_vm
from vmrewind.start.processes import running
from vmrewind.start.resolve import open_vm


def backup(
    vm: Annotated[str, Parameter(help="The VM: its TOML file, or its name.")],
    /,
    *,
    disk: Annotated[list[str] | None, Parameter(negative="", help="Only this disk (may be repeated).")] = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Make a full backup (base) of a stopped VM's protected disks. Interrupted, the next one goes on where it was."""
    handle = open_vm(vm)
    config = handle.require_config()
    if running(handle.paths):
        raise VmStateError(f"{handle.name} is running", "stop it first: a base is made of images that nobody writes to")
    known = [d.target for d in config.protection.disk]
    for target in disk or ():
        if target not in known:
            raise UsageError(f"{handle.name} has no protected disk {target!r}", f"its disks are {', '.join(known)}")
    with byte_progress(json=json) as update:
        made = asyncio.run(
            back_up_vm(
                handle,
                disk or known,
                lambda message: print(message, file=sys.stderr),
                lambda target, done, total, _: update(f"base of {target}", done, total),
            )
        )
    if json:
        print(json_module.dumps({"vm": handle.name, "bases": made}))
    else:
        for target, base in made.items():
            print(f"{target}: base {base} in {handle.repository_url}")
