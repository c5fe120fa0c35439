"""``vmrewind backup``: full backups of a stopped VM's disks.

A backup is a run without a guest: capture holds the images, so nobody else writes to them, and its START record is the moment that
the base stands for. So a backup can be restored as soon as it is made, from the repository too.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Sequence

from vmrewind.errors import StartError
from vmrewind.start.bases import Progress
from vmrewind.start.keeping import Keeper
from vmrewind.start.resolve import VmHandle
from vmrewind.start.serving import Storage


async def back_up_vm(handle: VmHandle, targets: Sequence[str], say: Callable[[str], None], progress: Progress) -> dict[str, str]:
    """Make a base of each named disk; {target: base id}. A signal stops it; the next one goes on where it was."""
    config = handle.require_config()
    keeper = Keeper(Storage(handle.name, handle.journal, config.protection.journal_size, config.protection.local_history), "backup")
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def interruptible(disk: str, done: int, total: int, sent: int) -> None:
        if stop.is_set():
            raise StartError("the backup was stopped", "the next one goes on where this one stopped")
        progress(disk, done, total, sent)

    await keeper.bring_up(lambda: config, say, interruptible, targets)
    made = {target: base for target, base in keeper.bases.items() if target in targets}
    await keeper.stop()
    return made
