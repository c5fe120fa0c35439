"""When a journal's closed segments are merged: what a moment's opening then saves is in docs/performance.md.

A VM that writes nothing costs the listing of a directory once a minute.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from vmrewind.history.stretches import next_stretch
from vmrewind.journal.reader import SegmentFile, segment_files
from vmrewind.paths import VmPaths
from vmrewind.start.errands import merge_tables

_LOOK_SECONDS: Final = 60.0


async def keep_merged(paths: VmPaths, journal: Path, look_seconds: float = _LOOK_SECONDS) -> None:
    """Have what is complete merged, for as long as the VM runs. What fails is tried again when there is more."""
    seen: SegmentFile | None = None
    while True:
        await asyncio.sleep(look_seconds)
        # In a thread: a journal whose storage hangs must not hold up whoever keeps capture alive.
        newest = await asyncio.to_thread(_newest, journal)
        if newest is None or newest == seen:
            continue
        if await asyncio.to_thread(next_stretch, journal) is not None:
            await merge_tables(paths, journal)
        seen = newest


def _newest(journal: Path) -> SegmentFile | None:
    files = segment_files(journal)
    return files[-1] if files else None
