"""Signals that come at the wrong time, and signals that end what runs until one comes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from vmrewind.start.readiness import readable

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a service manager, a closed terminal."""


def ending() -> list[signal.Signals]:
    """Those of ``ENDING`` that are to end us: nohup has a closed terminal ignored, and that stays so."""
    return [number for number in ENDING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, a closed terminal and SIGTERM come too late for what happens in here. For the main thread."""
    # Ignored, and not masked: a mask would be this thread's alone.
    with handled(signal.SIG_IGN, ENDING):
        yield


class Asked:
    """The signals that have come since, each to be waited for once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def wait(self, seconds: float | None = None) -> bool:
        """Whether one came within ``seconds`` (None: for ever), or before."""
        return bool(readable([self._descriptor], seconds)) and os.read(self._descriptor, 1) != b""


@contextmanager
def asked_to_end() -> Iterator[Asked]:
    """Let the signals that are to end us interrupt nothing in here, but be waited for. For the main thread."""
    # Not masked and fetched by sigwait: a thread that was there before, OpenBLAS's of numpy for one, has no such mask, gets what
    # comes while nobody waits, and sigwait then waits for ever. Python's handler writes to this pipe in whichever thread it runs.
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        with handled(_noted, ending()):
            before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            try:
                yield Asked(reader)
            finally:
                signal.set_wakeup_fd(before)
    finally:
        os.close(reader)
        os.close(writer)


def _noted(number: int, frame: FrameType | None) -> None:
    """Has the signal caught; the wakeup descriptor tells of it."""
    del number, frame


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers, numbers: Iterable[signal.Signals]
) -> Iterator[None]:
    """Have signals handled so in here, and afterwards as before. For the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
