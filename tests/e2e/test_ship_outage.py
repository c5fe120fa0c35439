"""A guest that writes on, a real object store that goes away, a ship that is killed again and again: nothing is lost or double.

The store is away for ``VMREWIND_OUTAGE_SECONDS`` (8; once by hand with 60).
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guests.protected import ProtectedVm, vmrewind
from guests.writer import acknowledged, errors
from tests.e2e.conftest import Servers
from tests.e2e.test_any_time import Noted, note
from tests.object_servers import Ceph, ObjectServer, SeaweedFS
from tests.vm_tools import check_files, files_in, journal_records, writer_vm
from vmrewind.journal import format as fmt
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import Repository
from vmrewind.repository.segment import ShippedSegment
from vmrewind.ship import status as status_module
from vmrewind.ship.status import ShipStatus
from vmrewind.ship.status import status as ship_status
from vmrewind.start.overview import overview
from vmrewind.start.resolve import open_vm

OUTAGE_SECONDS = float(os.environ.get("VMREWIND_OUTAGE_SECONDS", "8"))
KILLS = 10
WAIT_SECONDS = 120


def until(condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


def of_ship(vm: ProtectedVm) -> ShipStatus:
    """What ``vmrewind status`` shows of ship, without starting a command for it."""
    return ship_status(VmPaths(vm.name).runtime) or ShipStatus(0, "dead", lag_seconds=None, unsent_bytes=None)


class Killer:
    """Kills ship at random moments, an instant after it was started as well as in the middle of a put."""

    def __init__(self, vm: ProtectedVm, seed: int) -> None:
        self._vm = vm
        self._chance = random.Random(seed)
        self.killed: set[int] = set()

    def kill(self, times: int) -> None:
        for _ in range(times):
            until(lambda: of_ship(self._vm).pid not in {0, *self.killed}, "a new ship")
            time.sleep(self._chance.uniform(0, 1.2))
            pid = of_ship(self._vm).pid
            os.kill(pid, signal.SIGKILL)
            self.killed.add(pid)


def records_in(url: str, name: str) -> dict[tuple[str, int], tuple[Any, ...]]:
    """By (run, seq): what the repository has of each record; none may be there twice."""
    vm = Repository.open(url).vm(name)
    found: dict[tuple[str, int], tuple[Any, ...]] = {}
    for segment_name in vm.segments():
        segment = ShippedSegment(lambda offset, length, name=segment_name: vm.get_segment(name, offset, length), segment_name)
        for row in segment.rows:
            payload = segment.payload(row)
            key = (fmt.run_name(segment_name.run), int(row["seq"]))
            assert key not in found, f"{key} was shipped twice"
            found[key] = (
                int(row["time_ns"]),
                int(row["op"]),
                int(row["offset"]),
                int(row["length"]),
                bool(payload),
                int(row["xxh3"]),
            )
    return found


def records_of(journal: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """The same, of ``vmrewind journal dump``."""
    ops = {op.name.lower(): int(op) for op in fmt.Op}
    return {
        (entry["run"], entry["seq"]): (
            entry["time_ns"], ops[entry["op"]], entry["offset"], entry["length"], bool(entry["xxh3"]),
            int(entry["xxh3"] or "0", 16),
        )
        for entry in journal_records(journal)
    }  # fmt: skip


def go_away(server: ObjectServer) -> Callable[[], None]:
    """Take the store away; returns what brings it back. Ceph's objects are in memory: it hangs instead, answering nothing."""
    if isinstance(server, Ceph):
        server.pause()
        return server.resume
    server.stop(signal.SIGKILL)
    return server.start


class Outage:
    KIND: type[ObjectServer]

    def test_a_store_that_goes_away_and_a_ship_that_is_killed_cost_nothing(
        self, servers: Servers, at: Callable[[ObjectServer], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = servers(self.KIND)
        at(server)
        url = server.url("kvm")
        vmrewind("init", url)
        noted: list[Noted] = []
        with writer_vm(tmp_path, "outage", repository=url, pause_ms=80, size_bytes=64 << 20) as vm:
            vm.start()
            vm.wait_for("^ACK 5$")
            killer = Killer(vm, 10)
            killer.kill(KILLS // 2)
            bring_back = go_away(server)
            began = time.monotonic()
            killing = threading.Thread(target=killer.kill, args=(2,))
            killing.start()
            killing.join()
            noted.append(note(vm))
            until(lambda: (of_ship(vm).lag_seconds or 0) > min(5, OUTAGE_SECONDS / 2), "a lag that grows")
            assert of_ship(vm).unsent_bytes
            until(lambda: time.monotonic() - began > OUTAGE_SECONDS, "the end of the outage", OUTAGE_SECONDS + 1)
            written = max(acknowledged(vm.console.text()))
            vm.wait_for(f"^ACK {written + 2}$")
            noted.append(note(vm))
            bring_back()
            killer.kill(KILLS - KILLS // 2 - 2)
            until(lambda: (lag := of_ship(vm).lag_seconds) is not None and lag < 5, "catching up")
            assert len(killer.killed) == KILLS
            vm.quit()
        assert errors(vm.console.text()) == []
        assert vm.status()["state"] == "stopped"
        noted.append(("latest", acknowledged(vm.console.text())))

        in_journal = records_of(vm.journal)
        assert records_in(url, "outage") == in_journal
        assert len(in_journal) > 100
        vmrewind("verify", f"{url}/outage", "--data")

        # From the repository alone: another state directory, which has never seen the VM.
        monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "elsewhere"))
        for number, (moment, known) in enumerate(noted):
            output = tmp_path / f"at-{number}"
            done = vmrewind("restore", f"{url}/outage", "--at", moment, "--output", output, "--json")
            assert json.loads(done.stdout.strip().splitlines()[-1])["seq"] > 0
            if moment == "latest":
                assert (output / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
            check_files(files_in(output / "vda.raw", tmp_path / f"files-{number}"), known)
            (output / "vda.raw").unlink()


class TestSeaweedFS(Outage):
    KIND = SeaweedFS


class TestCeph(Outage):
    KIND = Ceph


def test_a_vm_that_stops_while_its_repository_is_away_says_what_is_left_to_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = writer_vm(tmp_path, "web", pause_ms=50, kib=64, ship="auto", journal_size="64MiB", size_bytes=64 << 20)
    away = vm.repository.with_name("away")
    try:
        vm.start()
        vm.wait_for("ACK 5\n")
        os.kill(of_ship(vm).pid, signal.SIGSTOP)
        monkeypatch.setattr(status_module, "SILENCE_SECONDS", 1.0)
        until(lambda: "has not responded" in str(overview(open_vm(str(vm.config)))["problems"]), "the silence's notice")
        os.kill(of_ship(vm).pid, signal.SIGCONT)
        vm.repository.rename(away)
        vm.wait_for("ACK 20\n")
        assert vm.quit() == 0
    finally:
        vm.kill()
    ended = next(event for event in vm.events() if event["event"] == "ship.ended")
    found = vm.status()
    assert found["state"] == "stopped"
    assert found["ship"]["unsent_bytes"] == ended["unsent_bytes"] >= 10 << 16
    assert found["ship"]["lag_seconds"] > 0
    assert any("bytes are not in the repository: `vmrewind ship on web`" in problem for problem in found["problems"])
    away.rename(vm.repository)
    vmrewind("ship", "on", "web")
    found = vm.status()
    assert (found["ship"]["unsent_bytes"], found["ship"]["lag_seconds"], found["problems"]) == (0, 0.0, [])
