"""What is done for a run beside it, each in a process of its own: its bases made, its gaps closed, its tables merged.

Such a process can be ended at any time: the next one goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from vmrewind.errors import SpaceError
from vmrewind.journal.copy_before_write import begun_base
from vmrewind.journal.runs import DiskInfo
from vmrewind.paths import VmPaths
from vmrewind.start.bases import little_left
from vmrewind.start.children import CLEAN, ending_words, spawn
from vmrewind.start.errand import command

_RETRY_SECONDS: Final = 2.0
_RETRY_SECONDS_MAX: Final = 300.0
_BASES_STOP_SECONDS: Final = 5.0
"""How long a VM's stop waits for a base that is nearly made."""


Work = Callable[[], Awaitable[None]]


async def merge_tables(paths: VmPaths, journal: Path) -> None:
    """Merge what is complete of a journal; returns when that has ended."""
    await _send(paths, [sys.executable, "-m", "vmrewind.history.merging", str(journal)])


async def _send(paths: VmPaths, words: list[str]) -> str:
    """Start a process and wait for its end; how it ended, in words. Cancelled, it ends it."""
    process = await spawn(paths, words, stdin=DEVNULL, stdout=DEVNULL)
    try:
        return ending_words(await process.wait())
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise


class Errands:
    """A run's bases and resync. What fails is tried again, as the repository may be away for a while, until the VM stops.

    ``begin``: begins work, under a name for the event log, that is done again should it fail unexpectedly.
    """

    def __init__(self, paths: VmPaths, journal: Path, repository: str, begin: Callable[[str, Work], asyncio.Task[None]]) -> None:
        self._paths = paths
        self._journal = journal
        self._repository = repository
        self._begin = begin
        self._bases: asyncio.Task[None] | None = None
        self._resync: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def begin_bases(self, run: str, disks: Sequence[str]) -> None:
        """Make those bases of the disks that were begun."""
        begun = [target for target in disks if begun_base(self._journal, target) is not None]
        if begun:
            words = command("vmrewind.start.bases", self._paths, self._journal, self._repository, run)
            words += ["--keeper", str(os.getpid()), *begun]
            self._bases = self._begin("bases", lambda: self._until(words, [CLEAN]))

    def begin_resync(self, run: str, disks: Sequence[str], bytes_max: int) -> None:
        """Close the gaps that the disks began the run with, unless more than ``bytes_max`` bytes differ."""
        if disks:
            words = command("vmrewind.recover.resync", self._paths, self._journal, self._repository, run)
            words += ["--bytes-max", str(bytes_max), *disks]
            self._resync = self._begin("resync", lambda: self._resync_after_bases(words))

    def give_up(self) -> None:
        """The disks have left the run's history: there is nothing to be made of them any more."""
        for task in (self._bases, self._resync):
            if task is not None:
                task.cancel()

    async def stop_resync(self) -> None:
        """The VM stops: what is not closed stays a gap, and no process is sent any more."""
        self._stopping.set()
        await _end(self._resync)

    async def stop_bases(self, disks: Sequence[DiskInfo]) -> dict[str, float | None]:
        """The images are at rest: by disk, how much there is (0 to 1), if known, of a base that is not complete."""
        if self._bases is None:
            return {}
        if little_left(self._journal, disks):
            await asyncio.wait([self._bases], timeout=_BASES_STOP_SECONDS)
        await _end(self._bases)
        found = {disk.target: begun_base(self._journal, disk.target) for disk in disks}
        return {target: base[1] for target, base in found.items() if base is not None}

    async def _resync_after_bases(self, words: list[str]) -> None:
        if self._bases is not None:
            # It compares with a history that may need them.
            await asyncio.wait([self._bases])
        await self._until(words, [CLEAN, f"exit code {SpaceError.exit_code}"])

    async def _until(self, words: list[str], enough: Sequence[str]) -> None:
        """Send a process, again and again, until one ends with what is ``enough``; no further one once the VM stops."""
        pause_seconds = _RETRY_SECONDS
        while await _send(self._paths, words) not in enough:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause_seconds)
                return
            pause_seconds = min(2 * pause_seconds, _RETRY_SECONDS_MAX)


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
