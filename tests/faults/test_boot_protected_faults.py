"""A booted moment's images while they are not complete: a journal that is full keeps all, and nobody counts as having used them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.capture_tools import Client, first_difference, until
from tests.e2e.test_start_after import MIB, SIZE, Alone
from tests.faults.test_boot_protected import Copy, Source, Writer, apart, booted, copied, killed_all, make_source
from vmrewind.errors import VmrewindError
from vmrewind.nbd import protocol as nbd
from vmrewind.start.control import instruct

_KILLED = """
import os, signal, sys
if sys.argv[1:2] in (["restore"], ["rewind"]):
    from vmrewind.recover import in_place
    name, behind = {name!r}, {behind!r}
    step = getattr(in_place, name)
    def killed(*args):
        if behind:
            step(*args)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(in_place, name, killed)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Source, Path]]:
    """As in test_boot_protected, of a VM whose history is shipped by ``backup`` only: nothing makes room in a copy's journal."""
    directory = tmp_path_factory.mktemp("source")
    with apart(directory) as state:
        yield make_source(Alone(directory, ship="on-demand")), state


@pytest.fixture
def source(made: tuple[Source, Path]) -> Source:
    return copied(*made)


def _events(copy: Copy) -> list[str]:
    return [json.loads(line)["event"] for line in vmrewind("events", copy.name, "--json").stdout.splitlines()]


def _fill_the_journal(copy: Copy) -> tuple[Client, int]:
    """Write until nothing is answered any more; the client that waits for it, and where the unanswered write went."""
    client = Client(copy.socket)
    for at in range(SIZE // MIB * 2):
        offset = at % 24 * MIB
        data = os.urandom(MIB)
        client.sock.settimeout(2 if at > 40 else 30)
        client.sock.sendall(client.request(nbd.CMD_WRITE, offset, data=data))
        try:
            assert client.reply()[1] == 0
        except TimeoutError:
            copy.content[offset : offset + MIB] = data
            return client, offset
        copy.content[offset : offset + MIB] = data
    pytest.fail("the journal never was full")


def _fill_to_the_last_byte(copy: Copy) -> None:
    """Not even a flush fits any more. What is written is there already."""
    for length in (64 << 10, 4 << 10, 512):
        with Client(copy.paths.filling_socket) as client, pytest.raises(TimeoutError):
            client.sock.settimeout(0.5)
            while True:
                client.write(0, bytes(copy.content[:length]))
    with pytest.raises(VmrewindError):
        while True:
            instruct(copy.paths, command="mark", name="x")


def test_a_full_journal_waits_for_the_images_and_they_for_nothing(source: Source, tmp_path: Path) -> None:
    with contextlib.ExitStack() as opened:
        copy = opened.enter_context(booted(source, tmp_path, "full"))
        client, _ = _fill_the_journal(copy)
        opened.enter_context(client)
        _fill_to_the_last_byte(copy)
        problems = json.loads(vmrewind("status", copy.name, "--json", check=False).stdout)["problems"]
        assert any("held until it has room, or its images are complete" in problem for problem in problems), problems
        # Where nothing was copied yet: neither may these keep the copy from going on.
        with Client(copy.socket) as other:
            other.sock.sendall(other.request(nbd.CMD_WRITE_ZEROES, 40 * MIB, 9 * MIB))
            other.sock.sendall(other.request(nbd.CMD_FLUSH))
            other.sock.settimeout(0.3)
            with pytest.raises(TimeoutError):
                other.reply()
            other.sock.settimeout(30)
            assert "history.dropped" not in _events(copy) and copy.filling()
            (tmp_path / "hold").unlink()
            until(copy.kept, "images that are complete")
            copy.content[40 * MIB : 49 * MIB] = bytes(9 * MIB)
            with contextlib.suppress(OSError):
                # QEMU would send again what was not answered before it was led to capture, and so must this.
                client.reply()
        with Client(copy.socket) as capture:
            for at in range(0, SIZE, 8 * MIB):
                capture.write(at, bytes(copy.content[at : at + 8 * MIB]))
            capture.flush()
        copy.end()
        assert copy.process.wait(60) == 0, copy.console.read_text()
        assert first_difference(copy.image.read_bytes(), bytes(copy.content)) is None
        assert "history.dropped" in _events(copy), "the policy counts again"


def test_a_full_journal_has_what_completes_the_images_however_often_that_is_interrupted(source: Source, tmp_path: Path) -> None:
    with booted(source, tmp_path, "interrupted") as copy:
        client, offset = _fill_the_journal(copy)
        client.sock.close()
        killed_all(copy)
        # The images were completed on after the last write.
        later = time.time_ns() + 60 * 10**9
        os.utime(copy.image, ns=(later, later))
        steps = [("note_changed", False), ("declare", True), ("filled", False), ("filled", True)]
        for step, (name, behind) in enumerate(steps):
            hooks = tmp_path / f"killed-{step}"
            hooks.mkdir()
            (hooks / "sitecustomize.py").write_text(_KILLED.format(name=name, behind=behind))
            command = ("rewind", copy.name, "--to", "latest") if step == 1 else ("restore", copy.name, "--in-place")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", str(hooks))
                killed = vmrewind(*command, check=False)
            assert killed.returncode == -signal.SIGKILL, killed.stderr
            os.utime(copy.image, ns=(later, later))
        vmrewind("restore", copy.name, "--in-place")
        found = copy.image.read_bytes()
        expected = bytes(copy.content)
        # What was not answered happened or did not.
        assert first_difference(found[:offset] + found[offset + MIB :], expected[:offset] + expected[offset + MIB :]) is None
        done = vmrewind("backup", copy.config)
        assert "the image was used" not in done.stdout + done.stderr


def test_capture_dies_under_a_quiet_guest_before_and_right_after_the_images_are_complete(source: Source, tmp_path: Path) -> None:
    with contextlib.ExitStack() as opened:
        copy = opened.enter_context(booted(source, tmp_path, "quiet"))
        writer = opened.enter_context(contextlib.closing(Writer(copy, 5)))
        for _ in range(30):
            writer.step()
        half = SIZE // 2
        until(lambda: copy.image.read_bytes()[:half] == copy.content[:half], "the copy to be held")
        # It went on for long after the guest's last write.
        later = time.time_ns() + 60 * 10**9
        os.utime(copy.image, ns=(later, later))
        first = json.loads(copy.paths.keeper.read_text())["capture"]["pid"]
        os.kill(first, signal.SIGKILL)
        until(lambda: "capture.restarted" in _events(copy), "the next capture")
        assert "image.used" not in _events(copy)
        for _ in range(10):
            writer.step()
        copy.mark("m")
        quiet = threading.Event()
        quiet.wait(2.5)  # More than an image's write may be behind the journal's.
        (tmp_path / "hold").unlink()
        until(lambda: not copy.filling(), "images that are complete")
        killed_all(copy)
        done = vmrewind("backup", copy.config)
        assert "the image was used" not in done.stdout + done.stderr
        copy.check()
