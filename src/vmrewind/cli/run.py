"""``vmrewind run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmrewind.start.direct import run_direct
from vmrewind.start.resolve import open_vm
from vmrewind.start.supersession import go_on_anyway


def run(
    config: Annotated[Path, Parameter(help="The VM's TOML file.")],
    /,
    *,
    force: Annotated[bool, Parameter(negative="", help="Start it although another host has taken it over: as a branch.")] = False,
) -> int:
    """Start a VM with every write of its protected disks journaled from the first instruction on; ends when the VM does.

    Ctrl-C asks the guest to shut down; a second one ends it at once. The exit code is QEMU's.
    """

    def say(message: str) -> None:
        print(f"vmrewind: {message}", file=sys.stderr, flush=True)

    if force:
        who = go_on_anyway(open_vm(str(config)))
        say("nobody has taken it over: --force changes nothing" if who is None else f"{who.words()}: starting it all the same")
    return run_direct(config, say)
