"""The host's clock is stepped, frozen, slewed, wrong at boot: history stays ordered, and moments are found as far as defined."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from guests.protected import VMREWIND, vmrewind
from tests.capture_tools import until
from tests.e2e.test_start_after import MIB, Alone
from tests.history_tools import NS, T0, MadeHistory
from vmrewind.history.resolve import resolve
from vmrewind.history.steps import Step, ago
from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock

HOUR = 3600 * NS

# The clock of a process and its children, in ns from the true one, read from a file whenever it is asked.
_CLOCK = """
import os, time
_now, _ns = time.time, time.time_ns
def _offset():
    with open(os.environ["VMREWIND_TEST_CLOCK"]) as file:
        return int(file.read() or 0)
time.time = lambda: _now() + _offset() / 1e9
time.time_ns = lambda: _ns() + _offset()
"""


class Host:
    """A machine whose wall clock the test sets; monotonic time goes on."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock"
        module = directory / "clockwork"
        module.mkdir()
        (module / "sitecustomize.py").write_text(_CLOCK)
        self.environment = {"PYTHONPATH": str(module), "VMREWIND_TEST_CLOCK": str(self._file)}
        self.set(0)

    def set(self, offset_ns: int) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(str(offset_ns))
        new.replace(self._file)
        self.offset_ns = offset_ns

    def now_ns(self) -> int:
        return time.time_ns() + self.offset_ns


def iso(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns // NS, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{time_ns % NS:09d}+00:00"


def mark(alone: Alone, name: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(vmrewind("mark", alone.config, name, "--json").stdout)
    return answer


def dump(alone: Alone) -> list[dict[str, Any]]:
    return [json.loads(line) for line in vmrewind("journal", "dump", alone.journal, "--json").stdout.splitlines()]


def stepped(alone: Alone, count: int) -> None:
    until(lambda: alone.events().count("clock.step") >= count, "the step to be seen")


def test_a_living_capture_across_steps_of_an_hour(tmp_path: Path) -> None:
    """Forward, then back, then the next run on a host that booted with its clock an hour slow."""
    alone, host = Alone(tmp_path), Host(tmp_path)
    with alone.serving(**host.environment) as ready:
        alone.write(ready, 1)
        true_ns = host.now_ns()
        host.set(HOUR)
        stepped(alone, 1)
        alone.write(ready, 2)
        ahead = mark(alone, "ahead")
        assert abs(ahead["time_ns"] - host.now_ns()) < 5 * NS, "a step forward is followed at once"
        host.set(0)
        stepped(alone, 2)
        alone.write(ready, 3)
        back = mark(alone, "back")
        assert ahead["time_ns"] < back["time_ns"] < ahead["time_ns"] + 60 * NS
        alone.write(ready, 4)
    host.set(-HOUR)
    with alone.serving(**host.environment) as ready:
        assert "base.begun" not in alone.events() and "history.gap" not in alone.events()
        alone.write(ready, 5)
        stepped(alone, 1)
    records = dump(alone)
    times = [record["time_ns"] for record in records]
    assert all(earlier < later for earlier, later in itertools.pairwise(times)), "history is ordered"
    assert len({record["run"] for record in records}) == 2
    clock = [record["content"]["step_ns"] for record in records if str(record.get("event")).upper() == "CLOCK"]
    assert [round(step / HOUR) for step in clock[:2]] == [1, -1]
    assert round(clock[-1] / HOUR) <= -1, "the second run's host was behind"
    wanted = {iso(true_ns): 1, iso(ahead["time_ns"]): 2, iso(back["time_ns"]): 3, "latest": 5}
    assert {moment: alone.restored(moment)[0] for moment in wanted} == wanted


def test_so_long_ago_means_time_that_passed(tmp_path: Path) -> None:
    """Within minutes after a step "-30s" must not lead to a state of an hour ago."""
    made = MadeHistory(tmp_path, {"vda": 4096})
    wall, passed = [T0], [0]
    made.start()
    assert made.writer is not None
    clock = Clock(made.now_ns + NS, lambda: wall[0], lambda: passed[0])
    made.writer._clock = clock
    sequence: dict[int, int] = {}

    def second(value: int) -> None:
        passed[0] += NS
        wall[0] += NS
        step = clock.check()
        made.now_ns = wall[0] - NS
        if step is not None:
            made.event(fmt.Event.CLOCK, {"step_ns": step})
        sequence[passed[0] // NS] = made.batch([(fmt.Op.WRITE, "vda", 0, bytes([value]))])

    for _ in range(60):
        second(1)
    wall[0] -= HOUR
    for _ in range(60):
        second(2)
    wall[0] += 2 * HOUR
    for _ in range(60):
        second(3)
    with made.open() as history:
        for seconds in (0, 10, 59, 61, 90, 119, 122, 150, 170):
            position = resolve(history, history.branch(), f"-{seconds}s", ["vda"], wall[0])
            assert abs(position.seq - sequence[180 - seconds]) <= 2, f"{seconds} seconds ago"


def test_ago_without_steps_and_across_them() -> None:
    now = T0
    assert ago([], now, 5) == now - 5
    back = Step(T0, -10 * NS)
    assert ago([back], T0 - 10 * NS, 0) == T0
    assert ago([back], T0, 0) == T0 + 5 * NS
    assert ago([back], T0, 4 * NS) == T0 + 3 * NS
    assert ago([back], T0, 10 * NS) == T0
    assert ago([back], T0, 11 * NS) == T0 - NS
    assert ago([back], T0 + 60 * NS, 0) == T0 + 60 * NS
    forward = Step(T0, 10 * NS)
    assert ago([forward], T0 + NS, NS) == T0
    assert ago([forward], T0 + NS, 2 * NS) == T0 - 11 * NS
    assert ago([back, Step(T0 + 60 * NS, 20 * NS)], T0 + 61 * NS, 2 * NS) == T0 + 39 * NS


def _walk(wall_of: Callable[[int], int], seconds: int, floor_ns: int = 0) -> tuple[list[tuple[int, int]], list[int]]:
    """Records ten times a second on a host whose wall clock is ``wall_of(ns passed)``: ([(wall, journal)], steps)."""
    passed = 0
    clock = Clock(floor_ns, lambda: wall_of(passed), lambda: passed)
    found, seen = [], []
    for tick in range(seconds * 10):
        passed = tick * NS // 10
        if tick % 10 == 0 and (step := clock.check()) is not None:
            seen.append(step)
        found.append((wall_of(passed), clock.take(3)))
    assert all(earlier[1] + 2 < later[1] for earlier, later in itertools.pairwise(found))
    return found, seen


@pytest.mark.parametrize(
    "end_of_june",
    [
        lambda passed: T0 + (passed if passed < 30 * NS else passed - NS),
        # Smeared instead: a second over a minute. NTP slews the monotonic clock alike, so nothing is to be seen.
        lambda passed: T0 + passed,
    ],
    ids=["leap second", "slewed"],
)
def test_a_second_that_comes_twice(end_of_june: Callable[[int], int]) -> None:
    found, seen = _walk(end_of_june, 60)
    assert len(seen) <= 1
    assert max(abs(wall - journal) for wall, journal in found) <= 1.2 * NS
    assert abs(found[-1][0] - found[-1][1]) < 0.2 * NS, "and soon it is wall time again"


def test_a_frozen_clock_that_goes_again() -> None:
    found, seen = _walk(lambda passed: T0 + (min(passed, 10 * NS) if passed < 100 * NS else passed), 120)
    assert seen[0] < 0 < seen[-1]
    assert abs(found[-1][0] - found[-1][1]) < 0.2 * NS


def test_a_host_that_boots_in_1970_until_ntp_sets_it(tmp_path: Path) -> None:
    floor = T0
    found, seen = _walk(lambda passed: passed + (0 if passed < 20 * NS else T0 + HOUR), 40, floor)
    assert found[0][1] > floor, "it goes on behind its parent, whatever the clock says"
    assert seen[0] < 0 < seen[-1]
    assert abs(found[-1][0] - found[-1][1]) < 0.2 * NS
    # A first run has no parent: its records are of 1970 until then.
    found, seen = _walk(lambda passed: passed + (0 if passed < 20 * NS else T0), 40)
    assert found[0][1] < HOUR and found[-1][1] > T0 and len(seen) == 1


def test_the_year_2038_and_beyond(tmp_path: Path) -> None:
    made = MadeHistory(tmp_path, {"vda": 4096})
    made.now_ns = ((1 << 31) - 5) * NS
    made.start()
    times = {value: (made.write("vda", 0, bytes([value])), made.now_ns)[1] for value in range(1, 11)}
    made.now_ns = 4_200_000_000 * NS
    last = made.write("vda", 0, b"\xff")
    made.stop()
    assert made.times[last] > 1 << 61
    made.ship_runs()
    made.ship(made.run, 1, last + 1)
    for local in (True, False):
        with made.open(local=local) as history:
            for value, time_ns in times.items():
                position = resolve(history, history.branch(), iso(time_ns), ["vda"], made.now_ns)
                assert made.disk("vda").states[position.seq][0] == value
            assert resolve(history, history.branch(), iso(made.times[last]), ["vda"], made.now_ns).seq == last


def test_runs_of_a_capture_in_2040_restore_by_time(tmp_path: Path) -> None:
    alone, host = Alone(tmp_path), Host(tmp_path)
    host.set(14 * 365 * 24 * HOUR)
    with alone.serving(**host.environment) as ready:
        alone.write(ready, 1)
        at = mark(alone, "one")["time_ns"]
        alone.write(ready, 2, MIB)
        alone.write(ready, 3)
    assert datetime.fromtimestamp(at // NS, UTC).year >= 2040
    done = subprocess.run(
        [VMREWIND, "restore", alone.config, "--at", iso(at), "--output", tmp_path / "out"],
        env=os.environ | host.environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "vda.raw").read_bytes()[:1] == b"\1"
