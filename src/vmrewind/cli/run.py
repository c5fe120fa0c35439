"""``vmrewind run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmrewind.cli.progress import byte_progress
from vmrewind.start.direct import run_direct


def run(config: Annotated[Path, Parameter(help="The VM's TOML file.")], /) -> int:
    """Start a VM with every write of its protected disks journaled from the first instruction on; ends when the VM does.

    Ctrl-C asks the guest to shut down; a second one ends it at once. The exit code is QEMU's.
    """

    def say(message: str) -> None:
        print(f"vmrewind: {message}", file=sys.stderr, flush=True)

    with byte_progress() as update:
        return run_direct(config, say, lambda disk, done, total, _: update(f"base of {disk}", done, total))
