"""The command that boots a moment as a protected VM: two of them at once, nobody who listens, signals and starts that fail."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from pathlib import Path

from guests.protected import VMREWIND, vmrewind
from tests.capture_tools import Client, first_difference, until
from tests.e2e.test_start_after import MIB
from tests.faults.test_boot_protected import Source, Writer, booted, made, source  # noqa: F401 - fixtures
from vmrewind.paths import VmPaths

_SLOW_PLAN = """
import sys, time
from pathlib import Path
from vmrewind.start.plan import Planner
plan = Planner.plan
def slow(self, *arguments):
    Path({sign!r}).touch()
    time.sleep(3)
    return plan(self, *arguments)
Planner.plan = slow
"""


def words(source: Source, tmp_path: Path, name: str, keep: str) -> list[str | Path]:  # noqa: F811
    asked = ["--at", "@here", "--keep", tmp_path / keep, "--protect", "--name", name, "--scratch", tmp_path, "--json"]
    return [VMREWIND, "boot", source.alone.config, *asked]


def test_of_two_with_one_name_one_is_refused_and_takes_nothing(source: Source, tmp_path: Path) -> None:  # noqa: F811
    with contextlib.ExitStack() as opened:
        copy = opened.enter_context(booted(source, tmp_path, "twice"))
        writer = opened.enter_context(contextlib.closing(Writer(copy, 5)))
        for _ in range(10):
            writer.step()
        second = subprocess.run(words(source, tmp_path, "twice", "other"), capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 2 and "--name" in second.stdout
        assert not (tmp_path / "other").exists()
        for _ in range(10):
            writer.step()
        (tmp_path / "hold").unlink()
        until(copy.kept, "images that are complete")
        writer.step()
        copy.end()
        assert copy.process.wait(60) == 0
        copy.check()


def test_of_two_that_begin_together_one_boots(source: Source, tmp_path: Path) -> None:  # noqa: F811
    both = [
        subprocess.Popen(words(source, tmp_path, "pair", keep), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        for keep in "ab"
    ]
    try:
        said = []
        for process in both:
            assert process.stdout is not None
            said.append(json.loads(process.stdout.readline()))
        assert sorted(one.get("event", one.get("error")) for one in said) == ["ready", "usage"], said
        winner = both[0] if said[0].get("event") else both[1]
        assert [(tmp_path / keep).exists() for keep in "ab"] == [process is winner for process in both]
        assert winner.poll() is None and VmPaths("pair").default_journal.exists()
    finally:
        for process in both:
            process.send_signal(signal.SIGINT)
        for process in both:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.send_signal(signal.SIGINT)
        for process in both:
            process.wait(90)
            process.communicate()


def test_the_guest_waits_for_a_repository_that_is_away(source: Source, tmp_path: Path) -> None:  # noqa: F811
    with booted(source, tmp_path, "waits") as copy, Client(copy.socket) as reading, Client(copy.socket) as writing:
        repository = source.alone.repository
        away = repository.with_name("away")
        repository.rename(away)
        got: list[bytes | None] = []
        threads = [
            threading.Thread(target=lambda: got.append(reading.read(57 * MIB, 4096))),
            threading.Thread(target=lambda: got.append(writing.write(49 * MIB, b"w" * 512))),
        ]
        try:
            for thread in threads:
                thread.start()
            threads[0].join(1.5)
            assert not got, "nobody has the answer"
        finally:
            away.rename(repository)
        for thread in threads:
            thread.join(30)
        copy.content[49 * MIB : 49 * MIB + 512] = b"w" * 512
        assert bytes(copy.content[57 * MIB : 57 * MIB + 4096]) in got and None in got
        (tmp_path / "hold").unlink()
        until(copy.kept, "images that are complete")
        assert "is waited for" in copy.console.read_text()
        assert first_difference(copy.image.read_bytes(), bytes(copy.content)) is None


def test_nobody_needs_to_listen(source: Source, tmp_path: Path) -> None:  # noqa: F811
    process = subprocess.Popen(
        words(source, tmp_path, "deaf", "kept"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stderr.close()
    try:
        assert json.loads(process.stdout.readline())["event"] == "ready"
        process.stdout.close()
        until(lambda: not (VmPaths("deaf").default_journal / "filling.json").exists(), "images that are complete")
        process.send_signal(signal.SIGHUP)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.send_signal(signal.SIGHUP)
        process.wait(60)
        assert not VmPaths("deaf").keeper.exists(), "its capture and ship were ended"
        assert (tmp_path / "kept/vda.raw").read_bytes() == source.content
    finally:
        process.kill()
        process.wait()


def test_a_start_that_fails_leaves_the_name_free(source: Source, tmp_path: Path) -> None:  # noqa: F811
    good = source.alone.config.read_text()
    refusing = tmp_path / "bin/qemu-system-x86_64"
    refusing.parent.mkdir()
    refusing.write_text("#!/bin/sh\nsleep 2\nexit 1\n")
    refusing.chmod(0o755)
    environment = os.environ | {"PATH": f"{refusing.parent}:{os.environ['PATH']}"}
    command = words(source, tmp_path, "again", "kept")
    failed = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False, env=environment)
    assert failed.returncode == 10, failed.stdout + failed.stderr
    assert good == source.alone.config.read_text() and not (tmp_path / "kept").exists()
    assert not VmPaths("again").state.exists()
    listed = json.loads(vmrewind("list", source.alone.repository, "--json").stdout)
    assert "again" not in json.dumps(listed)
    with booted(source, tmp_path, "again") as copy:
        assert copy.filling()


def test_asked_to_end_while_it_is_brought_up(source: Source, tmp_path: Path) -> None:  # noqa: F811
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    sign = tmp_path / "planning"
    (hooks / "sitecustomize.py").write_text(_SLOW_PLAN.format(sign=str(sign)))
    process = subprocess.Popen(
        words(source, tmp_path, "early", "kept"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(hooks)},
    )
    until(sign.exists, "the planning of the run")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.communicate()[0] == ""
    assert not (tmp_path / "kept").exists() and not VmPaths("early").state.exists()
