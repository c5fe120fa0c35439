"""What an earlier run of the VM left behind: refused while its guest lives, ended otherwise."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

from vmrewind.errors import StartError, VmStateError
from vmrewind.paths import VmPaths
from vmrewind.start.control import instruct
from vmrewind.start.processes import Keeping, Process, running

_LEFTOVER_SECONDS: Final = 60.0
_LETTING_GO_SECONDS: Final = 5.0
"""A QEMU that was killed counts as dead when its first thread is; its connections last as long as its last one."""
_CONNECTED: Final = "03"


async def clear_leftovers(paths: VmPaths) -> None:
    """Refuse a VM that is running; end what its keeper and its QEMU have left behind."""
    keeping = running(paths)
    if keeping is None:
        left = Keeping.read(paths)
        if left is not None and left.ship is not None and left.ship.alive:
            # It would go on with the next run, under the repository that it was given in its time.
            await _end(left.ship)
        return
    if keeping.keeper.alive:
        raise VmStateError(f"{paths.name} is already running (pid {keeping.keeper.pid})", f"see `vmrewind status {paths.name}`")
    if keeping.qemu is not None and keeping.qemu.alive:
        # It would come back to the next capture's socket, beside the next QEMU: two guests writing one disk.
        raise VmStateError(
            f"{paths.name}: its keeper has died, but its QEMU (pid {keeping.qemu.pid}) is still there",
            f"end that QEMU first: kill {keeping.qemu.pid}",
        )
    serving = keeping.server or keeping.capture
    assert serving is not None, "if keeper and QEMU are dead, what runs serves the disks"
    deadline = time.monotonic() + _LETTING_GO_SECONDS
    while await asyncio.to_thread(_in_use, paths, keeping):
        if time.monotonic() > deadline:
            raise VmStateError(
                f"{paths.name}: its keeper has died, but a QEMU is still connected to its disks",
                f"stop that QEMU first; its disks are served by pid {serving.pid} until then",
            )
        await asyncio.sleep(0.1)
    for process in (keeping.server, keeping.capture, keeping.ship):
        if process is not None:
            await _end(process)


def _in_use(paths: VmPaths, keeping: Keeping) -> bool:
    """Whether anybody is connected to what still serves the disks."""
    if keeping.server is not None:
        return connected(paths.nbd_socket)
    return any(disk["clients"] for disk in instruct(paths, command="status")["disks"].values())


def connected(sock: Path) -> bool:
    """Whether whoever serves a listening unix socket has accepted a client that is still there."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    # Num RefCount Protocol Flags Type State Inode Path
    return any(fields[5] == _CONNECTED and fields[7] == str(sock) for line in lines if len(fields := line.split(maxsplit=7)) == 8)


async def _end(process: Process) -> None:
    """Have a process that an earlier run left behind end, and wait for it; raises StartError if it does not."""
    process.terminate()
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    while process.alive:
        if time.monotonic() > deadline:
            raise StartError(f"pid {process.pid}, left over from an earlier run of the VM, does not end", "see what it waits for")
        await asyncio.sleep(0.05)
