"""What a restore from the repository alone costs: each chunk once, a segment's bytes at most once, several requests at a time."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.history_tools import VM, MadeHistory
from vmrewind.history import sources
from vmrewind.history.history import History
from vmrewind.history.resolve import resolve
from vmrewind.journal.format import Op
from vmrewind.recover.restore import restore
from vmrewind.repository.opening import open_store
from vmrewind.repository.repository import Repository
from vmrewind.repository.store import Store

M = 1 << 20


class CountingStore:
    """Notes every range that is read, takes its time for each, and knows how many chunks were under way at once."""

    def __init__(self, store: Store, seconds: float) -> None:
        self.url = store.url
        self.ranges: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.at_once = 0
        self._store = store
        self._seconds = seconds
        self._lock = threading.Lock()
        self._under_way = 0

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        payload = key.startswith("chunks/")
        with self._lock:
            self._under_way += payload
            self.at_once = max(self.at_once, self._under_way)
        time.sleep(self._seconds)
        data = self._store.get(key, offset, length)
        with self._lock:
            self._under_way -= payload
            self.ranges[key].append((offset, offset + len(data)))
        return data

    def put(self, key: str, data: bytes) -> None:
        self._store.put(key, data)

    def size(self, key: str) -> int | None:
        return self._store.size(key)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        return self._store.list(prefix)

    def children(self, prefix: str) -> Sequence[str]:
        return self._store.children(prefix)

    def delete(self, key: str) -> None:
        self._store.delete(key)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeHistory:
    """Two disks that share half of their chunks, and twelve segments of both disks' records: long ones, and tiny ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda _: None)
        return make(tmp_path_factory)


def make(tmp_path_factory: pytest.TempPathFactory) -> MadeHistory:
    made = MadeHistory(tmp_path_factory.mktemp("made"), {"vda": 24 * M, "vdb": 24 * M}, journal_size=64 * M, states=False)
    same = os.urandom(12 * M)
    for disk in made.disks:
        disk.content[: 12 * M] = same
        disk.content[12 * M : 20 * M] = os.urandom(8 * M)
    made.start()
    first = 1
    for number in range(12):
        made.tick()
        for step in range(12 if number % 3 else 2):
            size = 65536 if number % 3 else 512
            last = made.batch([(Op.WRITE, target, (step * 7 + number) * 65536, os.urandom(size)) for target in ("vda", "vdb")]) + 1
        made.ship(made.run, first, last)
        first = last + 1
    made.ship_runs()
    return made


@pytest.mark.parametrize("forgetful", [False, True])
def test_nothing_is_fetched_twice_and_several_requests_are_under_way(
    made: MadeHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: bool
) -> None:
    store = CountingStore(open_store(str(made.repository_path)), 0.02)
    if forgetful:
        # A history whose tables are more than is kept: they are not needed for the payloads any more.
        monkeypatch.setattr(sources, "ROWS_BYTES_MAX", 1)
    with History.open(VM, None, Repository.open_in(store).vm(VM)) as history:
        position = resolve(history, history.branch(), "latest", ["vda", "vdb"])
        if forgetful:
            store.ranges.clear()
        restored = restore(history, ["vda"] if forgetful else ["vda", "vdb"], position, tmp_path / "out", lambda *_: None)
    for disk in restored.disks:
        assert disk.path.read_bytes() == bytes(made.disk(disk.target).content)
    chunks = Counter(key for key, ranges in store.ranges.items() for _ in ranges if key.startswith("chunks/"))
    assert set(chunks.values()) == {1} and len(chunks) == (5 if forgetful else 7)
    segments = {key: sorted(ranges) for key, ranges in store.ranges.items() if "/segments/" in key}
    assert len(segments) == 12
    for key, ranges in segments.items():
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(ranges)), (key, ranges)
        assert len(ranges) <= 2, "the table with what comes beside it, and the payloads"
    assert store.at_once >= 4
