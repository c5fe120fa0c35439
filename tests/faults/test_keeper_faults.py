"""The keeper: no room for its notes, new code that hangs or talks nonsense, requests and stops at the wrong moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.capture_tools import until
from tests.e2e.test_start_after import Alone
from tests.faults.test_restart_capture import PAUSE_SECONDS_MAX, restarted
from tests.warm import CHILDREN
from vmrewind.paths import VmPaths

_DEADLINE_SECONDS = 5.0
_SLOW_SECONDS = 1.0


def new_code(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From the next keeper on, every new capture does what the file that is returned says; the keeper's deadlines are short.

    ``hang-import``: it never stands by. ``hang-allot``: it stands by and never takes its journal. ``garbage``: it prints something
    else first; ``garbage-alone``: unless it stands by. ``slow``: it takes a while to take its journal, unless it stands by.
    ``deaf``: it begins its run and cannot serve.
    """
    mode = directory / "mode"
    (directory / CHILDREN).mkdir()
    (directory / CHILDREN / "sitecustomize.py").write_text(f"""
import pathlib, sys, time
mode = pathlib.Path({str(mode)!r})
if "vmrewind.capture" not in sys.orig_argv:
    if "capture" in sys.orig_argv:
        import vmrewind.start.children as children
        children._STANDBY_SECONDS = children._ALLOT_SECONDS = {_DEADLINE_SECONDS}
        children._STOP_HEED_SECONDS = {_DEADLINE_SECONDS}
        children._ALLOT_BYTES_PER_SECOND_MIN = 1 << 40
elif mode.exists():
    what = mode.read_text()
    if what == "garbage" or (what == "garbage-alone" and "--standby" not in sys.orig_argv):
        print("DeprecationWarning: hello", flush=True)
    if what == "hang-import":
        time.sleep(10000)
    from vmrewind.journal.pool import SegmentPool
    allot = SegmentPool.allot
    def slowly(self):
        if what == "hang-allot":
            time.sleep(10000)
        if what == "slow" and "--standby" not in sys.orig_argv:
            time.sleep({_SLOW_SECONDS})
        return allot(self)
    SegmentPool.allot = slowly
    if what == "deaf":
        from vmrewind.capture.server import Server
        from vmrewind.errors import ConfigError
        def listen(*_):
            raise ConfigError("it cannot listen")
        Server.listen = listen
""")
    monkeypatch.setenv("PYTHONPATH", str(directory / CHILDREN), prepend=os.pathsep)
    return mode


def captures(alone: Alone) -> set[int]:
    """The living captures of the VM, whatever anybody says about them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes()
            if b"vmrewind.capture" in line and str(alone.journal).encode() in line:
                found.add(int(path.parent.name))
    return found


def told(alone: Alone) -> list[str]:
    """The newest run's events."""
    log = max((VmPaths("alone").state / "events").iterdir())
    return [json.loads(line)["event"] for line in log.read_text().splitlines()]


def capture_of(alone: Alone) -> int:
    pid: int = alone.status()["processes"]["capture"]["pid"]
    return pid


def whole(alone: Alone) -> None:
    assert alone.restored("latest") == alone.image.read_bytes()
    assert json.loads(vmrewind("timeline", alone.config, "--json").stdout)["disks"]["vda"]["gaps"] == []


def asked() -> socket.socket:
    """A client that has asked for a new capture and has no answer yet."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(str(VmPaths("alone").keeper_socket))
    client.sendall(b'{"command": "restart-capture"}\n')
    return client


@contextlib.contextmanager
def small_runtime(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    runtime = directory / "runtime"
    runtime.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "small-runtime", runtime], check=True)
    monkeypatch.setenv("VMREWIND_RUNTIME_DIR", str(runtime))
    try:
        yield runtime
    finally:
        subprocess.run(["umount", "-l", runtime], check=True)


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_runtime_directory_costs_no_supervision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_runtime(tmp_path, monkeypatch) as runtime:
        alone = Alone(tmp_path)
        with alone.serving() as ready:
            alone.write(ready, 1)
            processes = alone.status()["processes"]
            first, ship = processes["capture"]["pid"], processes["ship"]["pid"]
            fill(runtime / "fill")
            os.kill(ship, signal.SIGKILL)
            os.kill(first, signal.SIGKILL)
            until(lambda: {"capture.restarted", "ship.restarted"} <= set(told(alone)), "others")
            alone.write(ready, 2)
            (second,) = captures(alone)
            os.kill(second, signal.SIGKILL)
            until(lambda: told(alone).count("capture.restarted") == 2, "a third one")
            assert told(alone).count("keeper.note-failed") == 1
            (runtime / "fill").unlink()
            until(lambda: [capture_of(alone)] == list(captures(alone)), "the file to be written after all")
            until(lambda: alone.status()["problems"] == [], "no problems")
            alone.write(ready, 3)
        assert captures(alone) == set()
        whole(alone)


def test_a_stop_ends_everybody_although_the_runtime_directory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_runtime(tmp_path, monkeypatch) as runtime:
        alone = Alone(tmp_path)
        with alone.serving() as ready:
            alone.write(ready, 1)
            fill(runtime / "fill")
            os.kill(capture_of(alone), signal.SIGKILL)
            until(lambda: "capture.restarted" in told(alone), "another capture")
        assert captures(alone) == set()
        assert "ship.ended" in told(alone)
        whole(alone)


@pytest.mark.parametrize("what", ["garbage", "hang-import", "hang-allot"])
def test_new_code_that_hangs_or_talks_nonsense_is_given_up(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path)
    mode = new_code(tmp_path, monkeypatch)
    with alone.serving() as ready:
        alone.write(ready, 1)
        before = capture_of(alone)
        mode.write_text(what)
        refused = vmrewind("restart-capture", alone.config, check=False)
        assert refused.returncode == 10, refused.stderr
        assert ("something else" if what == "garbage" else "within 5 s") in refused.stderr
        if what != "hang-allot":
            assert capture_of(alone) == before and captures(alone) == {before}
        mode.unlink()
        alone.write(ready, 2)
        assert restarted(alone.config)["pid"] != before
        assert len(captures(alone)) == 1
    whole(alone)


def test_a_client_that_hangs_up_before_the_hand_over_takes_its_request_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Alone(tmp_path)
    mode = new_code(tmp_path, monkeypatch)
    with alone.serving() as ready:
        before = capture_of(alone)
        mode.write_text("hang-import")
        client = asked()
        (standby,) = until(lambda: captures(alone) - {before}, "the one that stands by")
        began = time.monotonic()
        client.close()
        until(lambda: captures(alone) == {before}, f"the end of {standby}")
        assert time.monotonic() - began < _DEADLINE_SECONDS / 2
        mode.unlink()
        restarted(alone.config)
        alone.write(ready, 1)
    whole(alone)


def test_a_request_while_a_dead_capture_is_replaced_is_carried_out_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path)
    mode = new_code(tmp_path, monkeypatch)
    with alone.serving() as ready:
        first = capture_of(alone)
        mode.write_text("slow")
        os.kill(first, signal.SIGKILL)
        (second,) = until(lambda: captures(alone) - {first}, "its replacement")
        answer = restarted(alone.config)
        assert answer["pid"] not in (first, second)
        assert answer["pause_seconds"] < PAUSE_SECONDS_MAX
        assert told(alone).count("capture.restarted") == 2 and "capture.handed-over" in told(alone)
        assert captures(alone) == {answer["pid"]}
        restarted(alone.config)
        alone.write(ready, 1)
    whole(alone)


def test_the_pause_is_counted_from_when_nobody_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path)
    mode = new_code(tmp_path, monkeypatch)
    with alone.serving() as ready:
        mode.write_text("garbage-alone")
        began = time.monotonic()
        os.kill(capture_of(alone), signal.SIGKILL)
        until(lambda: "capture.restart-failed" in told(alone) and time.monotonic() - began > 1, "a while without anybody")
        assert 1 < restarted(alone.config)["pause_seconds"] <= time.monotonic() - began
        assert told(alone).count("capture.restarted") == 1
        alone.write(ready, 1)


@pytest.mark.parametrize("delay_seconds", [0.0, 0.05])
def test_a_stop_right_after_a_hand_over_ends_the_run_cleanly(delay_seconds: float, tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
        keeper = ready["keeper"]
        with asked():
            until(lambda: "capture.handed-over" in told(alone), "the hand-over")
            deadline = time.monotonic() + delay_seconds
            while time.monotonic() < deadline:
                pass
            os.kill(keeper, signal.SIGTERM)
            until(lambda: "ship.ended" in told(alone), "the end")
    assert "capture.stopped" in told(alone)
    assert captures(alone) == set()
    with alone.serving() as ready:
        assert "history.gap" not in told(alone)
    whole(alone)


def test_a_capture_that_heeds_nothing_does_not_hold_up_the_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path)
    new_code(tmp_path, monkeypatch)
    with alone.serving() as ready:
        alone.write(ready, 1)
        os.kill(capture_of(alone), signal.SIGSTOP)
        os.kill(ready["keeper"], signal.SIGTERM)
        until(lambda: "ship.ended" in told(alone), "the end")
    # Another one has ended the run.
    assert "capture.stopped" in told(alone) and captures(alone) == set()
    with alone.serving():
        assert "history.gap" not in told(alone)
    whole(alone)


def test_a_start_that_failed_after_its_run_began_keeps_the_run_s_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    mode = new_code(tmp_path, monkeypatch)
    mode.write_text("deaf")
    failed = vmrewind("capture", alone.config, check=False)
    assert failed.returncode != 0 and "it cannot listen" in failed.stderr
    runs = sorted((alone.journal / "runs").glob("*.json"))
    assert len(runs) == 2
    mode.unlink()
    with alone.serving() as ready:
        until(lambda: "resync.done" in told(alone), "the end of the gap")
        assert "base.begun" not in told(alone)
        alone.write(ready, 2)
    assert alone.restored("latest") == alone.image.read_bytes()
    assert len(json.loads(vmrewind("timeline", alone.config, "--json").stdout)["runs"]) == 3
