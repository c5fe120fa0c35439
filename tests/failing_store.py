"""A store that fails as real ones do, at the will of a seed: it wraps any store, so that a failure replays from its seed.

What it does, besides working: errors before anything happened; answers lost after it happened; timeouts after which the object
arrives later, when nobody waits for it any more; its own put met again by a repetition; slow answers; listings in any order.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from vmrewind.errors import RepositoryError
from vmrewind.repository.store import AlreadyExists, Store

T = TypeVar("T")

_LATE_MAX = 6
"""Calls after which a put that timed out has arrived at the latest."""


class FailingStore:
    """Implements the store contract, with ``chance`` of a failure per call. ``happened`` counts what it did, by kind."""

    def __init__(self, store: Store, seed: int, chance: float = 0.2) -> None:
        self.url = store.url
        self.happened: Counter[str] = Counter()
        self._store = store
        self._random = random.Random(seed)
        self._chance = chance
        self._late: list[tuple[int, str, bytes]] = []
        self._calls = 0

    def put(self, key: str, data: bytes) -> None:
        failure = self._failure(["error", "lost", "late", "never", "echo"])
        if failure in ("error", "never"):
            self._fail(failure)
        if failure == "late":
            self._late.append((self._calls + self._random.randint(1, _LATE_MAX), key, bytes(data)))
            self._fail("late")
        self._store.put(key, data)
        if failure == "lost":
            self._fail("lost")
        if failure == "echo":
            self.happened["echo"] += 1
            raise AlreadyExists(key)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._read(lambda: self._store.get(key, offset, length))

    def size(self, key: str) -> int | None:
        return self._read(lambda: self._store.size(key))

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        found = self._read(lambda: list(self._store.list(prefix)))
        self._random.shuffle(found)
        cut = self._random.randrange(len(found) + 1) if self._failure(["error"]) else None
        yield from found[:cut]
        if cut is not None:
            self._fail("error in the middle of a list")

    def children(self, prefix: str) -> Sequence[str]:
        return self._read(lambda: self._store.children(prefix))

    def delete(self, key: str) -> None:
        if self._failure(["error"]):
            self._fail("error")
        self._store.delete(key)

    def settle(self) -> None:
        """Let everything arrive that is under way, and fail no more."""
        self._chance = 0.0
        self._arrive(everything=True)

    def _read(self, read: Callable[[], T]) -> T:
        if self._failure(["error"]):
            self._fail("error")
        return read()

    def _failure(self, kinds: list[str]) -> str | None:
        self._calls += 1
        self._arrive()
        if self._random.random() < self._chance / 20:
            self.happened["slow"] += 1
            time.sleep(0.001)
        return self._random.choice(kinds) if self._random.random() < self._chance else None

    def _arrive(self, *, everything: bool = False) -> None:
        for late in list(self._late):
            if everything or late[0] <= self._calls:
                self._late.remove(late)
                try:
                    self._store.put(late[1], late[2])
                except AlreadyExists:
                    self.happened["late, and there already"] += 1

    def _fail(self, kind: str) -> None:
        self.happened[kind] += 1
        raise RepositoryError(f"{self.url}: {kind} (call {self._calls})", "it is a test")
