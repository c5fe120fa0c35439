"""``vmrewind restart-capture``."""

from __future__ import annotations

import json as json_module
from typing import Annotated

from cyclopts import Parameter

from vmrewind.errors import VmStateError
from vmrewind.start.control import instruct_keeper
from vmrewind.start.processes import running
from vmrewind.start.resolve import open_vm


def restart_capture(
    vm: Annotated[str, Parameter(help="The VM: its TOML file, or its name.")],
    /,
    *,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Put a new capture process in the place of a running VM's, after an upgrade say, or bring its protection back.

    The guest waits for a moment and notices nothing else; the run goes on without a gap. If the VM runs unprotected because capture
    could not stay up, protection begins again, and the gap is closed by a resync.
    """
    handle = open_vm(vm)
    keeping = running(handle.paths)
    if keeping is not None and not keeping.keeper.alive:
        raise VmStateError(
            f"{handle.name}: its keeper has died, and nobody else can restart its capture",
            "capture goes on as it is; stop the VM and start it again when that suits",
        )
    answer = instruct_keeper(handle.paths, command="restart-capture")
    if json:
        print(json_module.dumps({"vm": handle.name} | {key: answer[key] for key in ("run", "pid", "pause_seconds")}))
    else:
        print(f"{handle.name}: capture restarted (pid {answer['pid']}); its disks waited for {answer['pause_seconds']:.3f} s")
