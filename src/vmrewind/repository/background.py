"""Calls that must end: at a deadline, and when a signal handler says so.

A blocking call of a compiled library is neither, and no Python signal handler runs before it returns. So it blocks a thread of
its own, which is left behind if need be; starting one costs a twentieth of a millisecond.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def begin(call: Callable[[], T]) -> Future[T]:
    """Have ``call`` done; what it returns or raises."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            future.set_exception(error)

    # One that is left behind must not hold up the end of the process.
    threading.Thread(target=work, name="background", daemon=True).start()
    return future


def run(call: Callable[[], T], deadline_seconds: float) -> T:
    """What ``call`` returns or raises. Raises TimeoutError at the deadline; the call may then still have its effect."""
    return begin(call).result(deadline_seconds)
