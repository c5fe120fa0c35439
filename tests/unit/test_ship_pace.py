"""What ship sends when: within the limit, one put at a time, the next segment made meanwhile; and what is said of the lag."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ship_support import MIB, VM, WrittenJournal, covered, shipped
from vmrewind.errors import RepositoryError
from vmrewind.journal import format as fmt
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.ship import carrier, gather, pace, sender
from vmrewind.ship.shipper import Progress, Shipper

BOTH = ("vda", "vdb")
DEADLINE_SECONDS = 30


class Place:
    def __init__(self, root: Path) -> None:
        self.journal, self.state, self.url = root / "journal", root / "vm", str(root / "repo")
        self.vm: VmRepository = Repository.init(self.url).vm(VM)
        self.written = WrittenJournal(self.journal, size=256 * MIB)
        self.written.describe()
        self.seen: list[Progress] = []
        self.shipper = Shipper(VM, self.journal, self.url, self.state, lambda: self.seen.append(self.shipper.progress()))

    def write(self, mib: int, disk: int = 0) -> None:
        for _ in range(4 * mib):
            self.written.batch([(fmt.Op.WRITE, disk, os.urandom(MIB // 4))])

    def unsent_after(self, seq: int) -> int:
        return sum(fmt.padded(len(record.payload)) for record in self.written.truth if record.seq > seq)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class Clock:
    """Time that passes only when ship says that there is nothing to do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        fake = SimpleNamespace(monotonic=lambda: self.now, time_ns=time.time_ns)
        for module in (pace, carrier):
            monkeypatch.setattr(module, "time", fake)
        self.puts: list[tuple[float, int, str]] = []
        put = DirectoryStore.put

        def noting(store: DirectoryStore, key: str, data: bytes) -> None:
            if "/segments/" in key:
                self.puts.append((self.now, len(data), key))
            put(store, key, data)

        monkeypatch.setattr(DirectoryStore, "put", noting)

    def most_within(self, seconds: float) -> int:
        """Bytes put in the busiest window of so many seconds."""
        return max(sum(size for at, size, _ in self.puts if start <= at < start + seconds) for start, _, _ in self.puts)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_limit_holds_over_a_second_and_over_a_minute_and_is_used_up(place: Place, clock: Clock) -> None:
    limit = place.shipper.pace.limit = MIB
    place.write(70)
    began = clock.now
    while (seconds := place.shipper.step(("vda",), hurry=True)) == 0.0 or place.shipper.held_back:
        clock.now += seconds
    elapsed = clock.now - began
    assert clock.most_within(1) <= limit * 1.3
    assert clock.most_within(60) <= limit * 60.5
    assert sum(size for _, size, _ in clock.puts) >= 0.97 * limit * elapsed
    assert elapsed > 65
    assert max(size for _, size, _ in clock.puts) <= 0.3 * limit


def test_new_records_do_not_wait_for_older_ones_of_another_disk(place: Place, clock: Clock) -> None:
    place.write(24, disk=1)
    while place.shipper.step(("vda",), hurry=True) == 0.0:
        pass
    place.shipper.pace.limit = MIB
    clock.puts.clear()
    for _ in range(8):
        place.written.batch([(fmt.Op.WRITE, 0, b"new")])
        last, begin = place.written.truth[-1].seq, clock.now
        while covered(place.vm, 7, 0)[-1][1] < last:
            clock.now += place.shipper.step(BOTH)
            place.shipper.settle()
            assert clock.now < begin + 3, "starved"
        assert clock.now - begin <= 1.6
    behind = covered(place.vm, 7, 1)[0][1]
    assert 10 < behind < place.written.truth[-1].seq - 20, "the backlog goes on, slowly"


class Gate:
    """Puts of segments begin when told to; ``failing``: then they fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Semaphore(0)
        self.began: list[str] = []
        self.failing = False
        put = DirectoryStore.put

        def gated(store: DirectoryStore, key: str, data: bytes) -> None:
            if "/segments/" in key:
                self.began.append(key)
                assert self.open.acquire(timeout=DEADLINE_SECONDS)
                if self.failing:
                    raise RepositoryError("away")
            put(store, key, data)

        monkeypatch.setattr(DirectoryStore, "put", gated)
        self.encoded = 0
        encode = gather.encode_segment

        def counting(*arguments: object) -> bytes:
            self.encoded += 1
            return encode(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(gather, "encode_segment", counting)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.setattr(sender, "LOOK_SECONDS", 0.01)
    made = Gate(monkeypatch)
    yield made
    made.open.release(100)


def until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_the_next_segment_is_made_while_one_is_put_and_put_when_that_is_durable(place: Place, gate: Gate) -> None:
    place.write(25)
    assert place.shipper.step(("vda",)) == 0.0
    stepping = threading.Thread(target=place.shipper.step, args=(("vda",),))
    stepping.start()
    until(lambda: gate.encoded == 2)
    until(lambda: place.seen)
    assert len(gate.began) == 1, "the second must wait for the first"
    assert place.vm.segments() == []
    gate.open.release()
    stepping.join(DEADLINE_SECONDS)
    until(lambda: len(gate.began) == 2)
    gate.open.release(10)
    while place.shipper.step(("vda",), hurry=True) == 0.0:
        pass
    assert shipped(place.vm, 7, 0) == place.written.truth


def test_behind_a_put_that_failed_nothing_is_put(place: Place, gate: Gate) -> None:
    place.write(25)
    gate.failing = True
    assert place.shipper.step(("vda",)) == 0.0
    gate.open.release()
    with pytest.raises(RepositoryError, match="away"):
        place.shipper.step(("vda",))
    assert len(gate.began) == 1
    place.shipper.reset()
    gate.failing = False
    gate.open.release(10)
    while place.shipper.step(("vda",), hurry=True) == 0.0:
        pass
    assert shipped(place.vm, 7, 0) == place.written.truth


def test_while_the_store_hangs_the_lag_is_told_to_the_byte(place: Place, gate: Gate) -> None:
    place.write(3)
    stepping = threading.Thread(target=place.shipper.step, args=(("vda",),), kwargs={"hurry": True})
    stepping.start()
    until(lambda: place.seen)
    assert place.seen[-1].unsent_bytes == place.unsent_after(0)
    place.write(2)
    until(lambda: place.seen[-1].unsent_bytes == place.unsent_after(0))
    lag = place.seen[-1].lag_seconds
    assert lag is not None
    until(lambda: (now := place.seen[-1].lag_seconds) is not None and now > lag)
    assert place.seen[-1].shipped_seq == 0
    gate.open.release(10)
    stepping.join(DEADLINE_SECONDS)


def test_lag_is_known_where_the_store_was_never_reached_and_nothing_ever_shipped(place: Place) -> None:
    place.write(2)
    Path(place.url).rename(place.url + ".away")
    with pytest.raises(RepositoryError):
        place.shipper.step(BOTH)
    place.shipper.reset()
    progress = place.shipper.progress()
    assert (progress.run, progress.shipped_seq, progress.unsent_bytes) == (7, 0, place.unsent_after(0))
    assert progress.lag_seconds is not None


def test_lag_is_known_after_a_restart_while_the_store_is_away(place: Place) -> None:
    place.write(2)
    while place.shipper.step(BOTH, hurry=True) == 0.0:
        pass
    sent = place.written.truth[-1].seq
    place.write(1)
    Path(place.url).rename(place.url + ".away")
    again = Shipper(VM, place.journal, place.url, place.state)
    with pytest.raises(RepositoryError):
        again.step(BOTH)
    again.reset()
    progress = again.progress()
    assert (progress.run, progress.shipped_seq, progress.unsent_bytes) == (7, sent, place.unsent_after(sent))


def test_while_it_catches_up_ship_does_not_claim_to_be_level(place: Place) -> None:
    place.write(60)
    while place.shipper.step(("vda",), hurry=True) == 0.0:
        progress = place.shipper.progress()
        assert progress.lag_seconds is not None
        assert progress.unsent_bytes
        assert progress.lag_seconds > 0
    assert (place.shipper.progress().unsent_bytes, place.shipper.progress().lag_seconds) == (0, 0)
