"""Which descriptors have something to read."""

from __future__ import annotations

import math
import select
from collections.abc import Iterable


def readable(descriptors: Iterable[int], seconds: float | None) -> set[int]:
    """Those with data, or an end, to read; waits up to ``seconds`` (None: for ever) for the first one."""
    # select() knows no descriptor beyond 1023, and a history alone may hold more open.
    waiting = select.poll()
    for descriptor in descriptors:
        waiting.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in waiting.poll(None if seconds is None else math.ceil(max(seconds, 0) * 1000))}
