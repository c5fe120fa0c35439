"""A store in memory, for tests: the contract in its shortest form."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from vmrewind.repository.store import AlreadyExists, NotFound


class MemoryStore:
    """Implements :class:`vmrewind.repository.store.Store`. ``objects`` may be looked at and damaged by tests."""

    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self.objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            if key in self.objects:
                raise AlreadyExists(key)
            self.objects[key] = bytes(data)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        try:
            data = self.objects[key]
        except KeyError:
            raise NotFound(key) from None
        return data[offset:] if length is None else data[offset : offset + length]

    def size(self, key: str) -> int | None:
        data = self.objects.get(key)
        return None if data is None else len(data)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        with self._lock:
            found = sorted((key, len(data)) for key, data in self.objects.items() if key.startswith(prefix))
        return iter(found)

    def children(self, prefix: str) -> Sequence[str]:
        with self._lock:
            rests = [key[len(prefix) :] for key in self.objects if key.startswith(prefix)]
        return sorted({rest.partition("/")[0] for rest in rests if "/" in rest})

    def delete(self, key: str) -> None:
        with self._lock:
            self.objects.pop(key, None)
