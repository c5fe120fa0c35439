"""One call to the repository at a time, in a thread of its own: what comes next is read and compressed meanwhile.

A segment is put only when the one before it is durable, so what is in the repository never has a hole.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final, TypeVar

from vmrewind.repository import background

T = TypeVar("T")

LOOK_SECONDS: Final = 1.0


class Sender:
    """``meanwhile`` is called once a second while somebody waits for a call that takes long: a store that is away, say."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile
        self._flight: Future[object] | None = None
        self._landed: Callable[[], None] = lambda: None
        self.waits = False
        """Whether a call is waited for that has taken long already."""

    def start(self, call: Callable[[], object], landed: Callable[[], None]) -> None:
        """Begin the call when the one before has succeeded, and raise what that one raised; ``landed`` is called by ``settle``."""
        self.settle()
        self._flight, self._landed = background.begin(call), landed

    def settle(self) -> None:
        """Wait for the call under way, and see to what follows from it; raises what it raised."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._wait(flight)
            self._landed()

    def abandon(self) -> None:
        """Forget the call under way: it may still have its effect."""
        self._flight = None

    def run(self, call: Callable[[], T]) -> T:
        """What ``call`` returns or raises, behind the call under way."""
        self.settle()
        return self._wait(background.begin(call))

    def _wait(self, flight: Future[T]) -> T:
        try:
            while not wait([flight], LOOK_SECONDS).done:
                self.waits = True
                self._meanwhile()
            return flight.result()
        finally:
            self.waits = False
