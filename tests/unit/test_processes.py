"""``keeper.json`` may be stale, damaged, or of another boot: no signal ever goes to a process that is not the VM's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vmrewind.paths import VmPaths
from vmrewind.ship.status import status, status_path
from vmrewind.start import processes
from vmrewind.start.places import make_places
from vmrewind.start.processes import PID_MAX, Keeping, Process, running

PATHS = VmPaths("web01")


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def plain(victim: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What a keeper wrote whose capture is the victim."""
    make_places(PATHS)
    capture = Process.of(victim.pid)
    Keeping("00000000000000ff", "direct", Process(PID_MAX, 1), capture).write(PATHS)
    found: dict[str, Any] = json.loads(PATHS.keeper.read_bytes())
    return found


def test_the_process_that_is_meant_is_ended(victim: subprocess.Popen[bytes], plain: dict[str, Any]) -> None:
    keeping = running(PATHS)
    assert keeping is not None and keeping.capture is not None
    assert PATHS.keeper.stat().st_mode & 0o777 == 0o600
    keeping.capture.terminate()
    assert victim.wait(60) == -signal.SIGTERM
    keeping.capture.terminate()  # gone: nothing happens


def test_a_pid_that_was_used_again_is_not_signalled(victim: subprocess.Popen[bytes], plain: dict[str, Any]) -> None:
    plain["capture"]["started_ticks"] -= 1
    PATHS.keeper.write_text(json.dumps(plain))
    keeping = Keeping.read(PATHS)
    assert keeping is not None and keeping.capture is not None and not keeping.capture.alive
    keeping.capture.terminate()
    assert running(PATHS) is None
    with pytest.raises(subprocess.TimeoutExpired):
        victim.wait(0.2)


def test_a_pid_is_pinned_before_it_is_looked_at(victim: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process.of(victim.pid)
    assert process is not None
    order: list[str] = []
    opened, looked = os.pidfd_open, Process.of
    monkeypatch.setattr(os, "pidfd_open", lambda pid: order.append("pin") or opened(pid))
    monkeypatch.setattr(processes.Process, "of", lambda pid: order.append("look") or looked(pid))
    process.terminate()
    assert order == ["pin", "look"]


def test_what_another_boot_wrote_names_nobody(plain: dict[str, Any]) -> None:
    PATHS.keeper.write_text(json.dumps(plain | {"boot": "another"}))
    assert Keeping.read(PATHS) is None


@pytest.mark.parametrize(
    "change",
    [
        {"capture": {"pid": "self", "started_ticks": 1}},
        {"capture": {"pid": -1, "started_ticks": 1}},
        {"capture": {"pid": 0, "started_ticks": 1}},
        {"capture": {"pid": True, "started_ticks": 1}},
        {"capture": {"pid": 10**30, "started_ticks": "1"}},
        {"capture": [1, 2]},
        {"capture": "1"},
        {"keeper": None},
        {"run": "../../../etc/passwd"},
        {"run": 7},
        {"run": "0" * 1000},
        {"mode": 1},
        {"trouble": {}},
    ],
    ids=lambda change: f"{change}"[:40],
)
def test_nonsense_names_nobody(plain: dict[str, Any], change: dict[str, Any]) -> None:
    PATHS.keeper.write_text(json.dumps(plain | change))
    assert Keeping.read(PATHS) is None
    assert running(PATHS) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "1", "{", '"x"', "[" * 100_000, "\0", "{}"], ids=lambda text: text[:9])
def test_a_damaged_file_names_nobody(plain: dict[str, Any], text: str) -> None:
    PATHS.keeper.write_text(text)
    assert Keeping.read(PATHS) is None


@pytest.mark.parametrize("pid", ["self", -1, 0, 10**30, None, True])
def test_a_report_of_ships_with_a_senseless_pid_is_none(plain: dict[str, Any], pid: object) -> None:
    report = {"pid": pid, "state": "shipping", "disks": ["vda"], "baseless": [], "monotonic_seconds": time.monotonic()}
    status_path(PATHS.runtime).write_text(json.dumps(report))
    assert status(PATHS.runtime) is None
    status_path(PATHS.runtime).write_text(json.dumps(report | {"pid": os.getpid()}))
    assert status(PATHS.runtime) is not None
