"""``vmrewind capture``: the capture process alone, in the foreground, without a VM."""

from __future__ import annotations

import asyncio
import json as json_module
import signal
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmrewind.start.alone import capture_alone


def capture(
    config: Annotated[Path, Parameter(help="The VM's TOML file; needs neither [qemu] nor a repository.")],
    /,
    *,
    socket: Annotated[Path | None, Parameter(help="Where to listen; default: the VM's runtime directory.")] = None,
) -> int:
    """Serve a VM's disks over NBD with every write journaled, until SIGTERM. Prints one JSON line when it is ready."""

    async def serve() -> int:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        return await capture_alone(
            config,
            socket.absolute() if socket else None,
            stop,
            lambda ready: print(json_module.dumps(ready), flush=True),
            lambda message: print(f"vmrewind: {message}", file=sys.stderr, flush=True),
        )

    return asyncio.run(serve())
