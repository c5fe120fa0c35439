"""Progress with rate and time left of what takes longer than a second: bars on a terminal, events for machines with ``--json``.

Both on stderr: stdout is for the result. docs/operations.md describes the events.
"""

from __future__ import annotations

import json as json_module
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Update = Callable[[str, int, int], None]
"""Called with (what, bytes done, bytes in total), from any thread."""

_EVENT_SECONDS: Final = 0.5
"""Least time between two events about one thing; its end is always told."""


@contextmanager
def byte_progress(*, json: bool = False) -> Iterator[Update]:
    """Yields ``update(what, done_bytes, total_bytes)``: one bar, or one series of events, for each ``what``."""
    if json:
        yield JsonProgress(sys.stderr).update
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # Where stdout is the same terminal, what is printed must go above the bars; where it is a file, it must go there.
    above = sys.stdout.isatty()
    with Progress(*columns, console=console, disable=not console.is_terminal, redirect_stdout=above) as bars:
        tasks: dict[str, TaskID] = {}

        def update(what: str, done_bytes: int, total_bytes: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total_bytes)
            bars.update(tasks[what], completed=done_bytes, total=total_bytes)

        yield update


class JsonProgress:
    """Writes events as lines of JSON."""

    def __init__(self, output: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._lock = threading.Lock()
        self._begun: dict[str, tuple[float, int]] = {}
        self._told: dict[str, float] = {}
        self._ended: dict[str, tuple[int, int]] = {}

    def update(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Tell of progress, unless that was done just now."""
        with self._lock:
            now = self._clock()
            begun, first = self._begun.setdefault(what, (now, done_bytes))
            if now - self._told.get(what, begun) < _EVENT_SECONDS and done_bytes < total_bytes:
                return
            if self._ended.get(what) == (done_bytes, total_bytes):
                return
            self._told[what] = now
            if done_bytes >= total_bytes:
                self._ended[what] = (done_bytes, total_bytes)
            rate = (done_bytes - first) / (now - begun) if now > begun else 0.0
            event = {
                "event": "progress",
                "what": what,
                "done_bytes": done_bytes,
                "total_bytes": total_bytes,
                "bytes_per_second": round(rate),
                "seconds_left": round((total_bytes - done_bytes) / rate, 1) if rate > 0 else None,
            }
            print(json_module.dumps(event), file=self._output, flush=True)
