"""The ship process as the keeper runs it: told what to do by a file, stopped by SIGTERM, killed by anything."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ship_support import VM, WrittenJournal, covered, put_bases, shipped
from vmrewind.journal import format as fmt
from vmrewind.repository.repository import Repository
from vmrewind.ship import status as status_module
from vmrewind.ship.status import ShipStatus, status, status_path

DEADLINE_SECONDS = 60


def until(condition: Callable[[], object], seconds: float = DEADLINE_SECONDS) -> None:
    """Wait for an event, not for a time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Ship:
    """A VM's places, and its ship process."""

    def __init__(self, root: Path) -> None:
        self.journal, self.state, self.runtime = root / "journal", root / "vm", root / "run"
        self.url = str(root / "repo")
        self.vm = Repository.init(self.url).vm(VM)
        put_bases(self.vm, "vda", "vdb")
        self.log = root / "log"
        for path in (self.journal, self.state, self.runtime):
            path.mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "vmrewind.ship", "--vm", VM, "--journal", str(self.journal)]
        command += ["--repository", self.url, "--state", str(self.state), "--runtime", str(self.runtime)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self.process

    def carry(self, *disks: str) -> None:
        self.tell(json.dumps({"disks": disks}))

    def tell(self, text: str) -> None:
        temporary = self.state / "ship.json.tmp"
        temporary.write_text(text)
        temporary.replace(self.state / "ship.json")

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(DEADLINE_SECONDS)

    def status(self) -> ShipStatus | None:
        return status(self.runtime)

    def state_is(self, state: str) -> bool:
        found = self.status()
        return found is not None and found.state == state

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def ship(tmp_path: Path) -> Iterator[Ship]:
    made = Ship(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def last_covered(ship: Ship, run: int = 7, disk: int = 0) -> int:
    ranges = covered(ship.vm, run, disk)
    return ranges[-1][1] if ranges else 0


def test_records_arrive_within_about_a_second(ship: Ship) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    ship.carry("vda", "vdb")
    ship.start()
    until(lambda: ship.state_is("shipping"))
    for _ in range(3):
        written.batch([(fmt.Op.WRITE, 0, b"x" * 4096)])
        begin = time.monotonic()
        until(lambda: last_covered(ship) == written.truth[-1].seq)
        assert time.monotonic() - begin < 5
    assert shipped(ship.vm, 7, 0) == written.truth
    until(lambda: (found := ship.status()) is not None and found.shipped_seq == written.truth[-1].seq)
    found = ship.status()
    assert found is not None and ship.process is not None
    assert (found.pid, found.disks, found.run) == (ship.process.pid, ("vda", "vdb"), f"{7:016x}")
    assert (found.shipped_time_ns, found.unsent_bytes, found.error) == (written.truth[-1].time_ns, 0, None)
    assert ship.stop() == 0
    assert ship.status() is None


def test_it_is_idle_until_told_and_again_when_told_to_stop(ship: Ship) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    written.random_batch(random.Random(1))
    process = ship.start()
    until(lambda: ship.state_is("idle"))
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "numpy" not in maps and "blake3" not in maps
    assert ship.vm.segments() == []
    ship.carry("vda")
    until(lambda: last_covered(ship) == written.truth[-1].seq)
    ship.carry()
    until(lambda: ship.state_is("idle"))
    until_then = ship.vm.segments()
    written.random_batch(random.Random(2))
    (ship.state / "ship.json").unlink()
    assert ship.stop() == 0
    assert ship.vm.segments() == until_then
    assert ship.said() == ""


def test_a_ship_that_does_not_respond_is_told_from_one_that_has_nothing_to_say(ship: Ship, monkeypatch: pytest.MonkeyPatch) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    ship.carry("vda")
    process = ship.start()
    until(lambda: ship.state_is("shipping"))
    first = ship.status()
    inode = status_path(ship.runtime).stat().st_ino
    until(lambda: status_path(ship.runtime).stat().st_ino != inode and ship.status() == first, 3 * status_module.BEAT_SECONDS)
    process.send_signal(signal.SIGSTOP)
    try:
        monkeypatch.setattr(status_module, "SILENCE_SECONDS", 0.5)
        until(lambda: (found := ship.status()) is not None and found.silent_seconds > 0.5)
        found = ship.status()
        assert found is not None and found.lag_seconds is not None and found.lag_seconds >= found.silent_seconds
    finally:
        process.send_signal(signal.SIGCONT)


def test_idle_costs_next_to_nothing(ship: Ship) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    process = ship.start()

    def cpu_seconds() -> float:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    for disks, state in [((), "idle"), (("vda", "vdb"), "shipping")]:
        ship.carry(*disks)
        until(lambda state=state: ship.state_is(state))
        before, begin = cpu_seconds(), time.monotonic()
        until(lambda begin=begin: time.monotonic() - begin > 3)
        # A tick of 10 ms in 3 s would be 0.3 %: one is allowed, for what the state before left to do.
        # Two processes of a busy machine may share a clock tick; a loop that spins would use all of the time.
        assert cpu_seconds() - before <= 0.05, state


def test_sigterm_sends_what_is_there(ship: Ship) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    ship.carry("vda", "vdb")
    ship.start()
    until(lambda: ship.state_is("shipping"))
    chance = random.Random(3)
    for _ in range(20):
        written.random_batch(chance)
    assert ship.stop() == 0
    for disk in (0, 1):
        assert shipped(ship.vm, 7, disk) == written.of(disk)


def test_sigterm_ends_it_without_a_repository_too(ship: Ship) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    written.random_batch(random.Random(1))
    Path(ship.url).rename(ship.url + ".away")
    ship.carry("vda")
    ship.start()
    until(lambda: ship.state_is("waiting") and (found := ship.status()) is not None and found.error)
    begin = time.monotonic()
    assert ship.stop() == 0
    assert time.monotonic() - begin < 8
    assert "told to stop with records unsent" in ship.said()


def test_an_outage_costs_a_line_and_no_record(ship: Ship) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    ship.carry("vda", "vdb")
    process = ship.start()
    chance = random.Random(4)
    written.random_batch(chance)
    until(lambda: last_covered(ship) == written.truth[-1].seq)
    Path(ship.url).rename(ship.url + ".away")
    for _ in range(10):
        written.random_batch(chance)
    until(lambda: (found := ship.status()) is not None and found.error and found.unsent_bytes and found.lag_seconds)
    found = ship.status()
    assert found is not None
    assert found.state == "waiting"
    Path(ship.url + ".away").rename(ship.url)
    until(lambda: last_covered(ship) == written.truth[-1].seq)
    until(lambda: (found := ship.status()) is not None and found.error is None and found.lag_seconds == 0)
    assert process.poll() is None
    for disk in (0, 1):
        assert shipped(ship.vm, 7, disk) == written.of(disk)
    lines = ship.said().splitlines()
    assert len(lines) <= 3, lines
    assert "shipping again" in lines[-1]


def test_a_bandwidth_limit_is_heeded_and_shown_without_a_restart(ship: Ship) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    ship.tell('{"disks": ["vda"], "bandwidth_limit": 2097152}')
    ship.start()
    until(lambda: (found := ship.status()) is not None and found.bandwidth_limit == 2 << 20)
    for _ in range(24):
        written.batch([(fmt.Op.WRITE, 0, random.Random(0).randbytes(1 << 20))])
    until(lambda: last_covered(ship) >= 2)
    begin, from_seq = time.monotonic(), last_covered(ship)
    until(lambda: last_covered(ship) >= from_seq + 5)
    assert time.monotonic() - begin > 1.5, "five seqs of 1 MiB at 2 MiB a second"
    assert (found := ship.status()) is not None and found.lag_seconds and found.unsent_bytes
    ship.carry("vda")
    begin = time.monotonic()
    until(lambda: last_covered(ship) == written.truth[-1].seq)
    assert time.monotonic() - begin < 7, "what is left would take eight seconds"
    until(lambda: (found := ship.status()) is not None and found.bandwidth_limit is None and found.lag_seconds == 0)


def test_nonsense_in_the_instructions_changes_nothing(ship: Ship) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    ship.carry("vda")
    ship.start()
    until(lambda: ship.state_is("shipping"))
    for count, text in enumerate(('{"disks": "vda"}', "[1]", "{", '{"disks": [], "bandwidth_limit": "much"}'), 1):
        ship.tell(text)
        until(lambda count=count: ship.said().count("going on as before") == count)
    written.random_batch(random.Random(1))
    until(lambda: last_covered(ship) == written.truth[-1].seq)


def test_killed_at_random_instants_under_a_writing_guest_nothing_is_missing_or_double(ship: Ship) -> None:
    written = WrittenJournal(ship.journal, size=256 << 20)
    written.describe()
    ship.carry("vda")
    chance = random.Random(5)
    stop = threading.Event()

    def guest() -> None:
        own = random.Random(6)
        while not stop.is_set() and written.writer.segment_number < 5:
            written.random_batch(own, 100_000)
            stop.wait(0.002)

    writing = threading.Thread(target=guest)
    writing.start()
    kills = 0
    try:
        while kills < 10:
            process = ship.start()
            before = len(ship.vm.segments())
            wanted = before + chance.randint(0, 2)
            until(lambda wanted=wanted: len(ship.vm.segments()) >= wanted and ship.status() is not None)
            begin, delay = time.monotonic(), chance.uniform(0, 0.3)
            until(lambda begin=begin, delay=delay: time.monotonic() - begin >= delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            if kills == 5:
                ship.carry("vda", "vdb")
            if not writing.is_alive():
                for _ in range(10):
                    written.random_batch(chance, 100_000)
    finally:
        stop.set()
        writing.join()
    ship.start()
    until(lambda: covered(ship.vm, 7, 1) == covered(ship.vm, 7, 0) == [(1, written.truth[-1].seq)])
    assert ship.stop() == 0
    for disk in (0, 1):
        assert shipped(ship.vm, 7, disk) == written.of(disk)
    assert len(written.truth) > 1000
    assert ship.said() == ""


def test_of_two_ships_of_one_vm_one_waits(ship: Ship) -> None:
    written = WrittenJournal(ship.journal)
    written.describe()
    ship.carry("vda")
    first = ship.start()
    until(lambda: ship.state_is("shipping"))
    second = ship.start()
    chance = random.Random(7)
    for _ in range(5):
        written.random_batch(chance)
    until(lambda: last_covered(ship) == written.truth[-1].seq)
    found = ship.status()
    assert found is not None and found.pid == first.pid
    first.kill()
    first.wait()
    until(lambda: (found := ship.status()) is not None and found.pid == second.pid)
    written.random_batch(chance)
    until(lambda: last_covered(ship) == written.truth[-1].seq)
    assert shipped(ship.vm, 7, 0) == written.of(0)
