"""A moment that runs as a protected VM of its own: no write is lost, whoever dies while its images are not complete."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from guests.protected import VMREWIND, vmrewind
from tests.capture_tools import Client, first_difference, until
from tests.e2e.test_start_after import MIB, SIZE, Alone
from tests.fault_tools import kill
from tests.faults.test_capture_torn import ANOTHER_BOOT
from tests.vm_tools import journal_records
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.nbd import protocol as nbd
from vmrewind.paths import VmPaths
from vmrewind.recover.export_server import ExportServer
from vmrewind.recover.exporting import Exported
from vmrewind.start.control import instruct
from vmrewind.start.listening import listen
from vmrewind.start.resolve import open_vm

T = TypeVar("T")

_SLOW = """
import os, sys, time
if "boot" in sys.argv[1:2] or any(word.endswith("vmrewind") for word in sys.argv[:1]):
    from vmrewind.recover.filling import Filling
    fill = Filling.fill
    def slow(self, stop, progress):
        def told(done, total):
            progress(done, total)
            time.sleep(0.01)
            while done >= {half} and os.path.exists({hold!r}):
                time.sleep(0.01)
        fill(self, stop, told)
    Filling.fill = slow
"""


@dataclass
class Source:
    """A stopped VM without a guest: its TOML file, the moment to boot, and the disk then."""

    alone: Alone
    content: bytes

    @property
    def segments(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.alone.journal.glob("*.seg")}


@contextlib.contextmanager
def apart(directory: Path) -> Iterator[Path]:
    """Local state of its own, which is there for several tests; each copies it to where its own is."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="vmr-") as runtime:
        patch.setenv("VMREWIND_STATE_DIR", str(directory / "state"))
        patch.setenv("VMREWIND_RUNTIME_DIR", runtime)
        yield directory / "state"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Source, Path]]:
    """A VM that has stopped, and its local state."""
    directory = tmp_path_factory.mktemp("source")
    with apart(directory) as state:
        yield make_source(Alone(directory)), state


@pytest.fixture
def source(made: tuple[Source, Path]) -> Source:
    return copied(*made)


def copied(made: T, state: Path) -> T:
    """What was made apart, with its local state where this test's is."""
    shutil.copytree(state, os.environ["VMREWIND_STATE_DIR"], dirs_exist_ok=True)
    return made


def bootable(alone: Alone) -> Alone:
    """It has a machine that finds nothing to boot: who writes is the test."""
    qemu = '[qemu]\ncommand = ["qemu-system-x86_64", "-machine", "pc,accel=tcg", "-nodefaults"]\n[protection]'
    alone.config.write_text(alone.config.read_text().replace("[protection]", qemu))
    return alone


def make_source(alone: Alone) -> Source:
    """Its disk written to, before and after the moment ``@here``."""
    bootable(alone)
    with open(alone.image, "r+b") as file:
        for at in range(0, SIZE, 8 * MIB):
            file.seek(at)
            file.write(os.urandom(3 * MIB))
    with alone.serving() as ready:
        alone.write(ready, 1, 5 * MIB)
        alone.write(ready, 2, 40 * MIB + 512, 4096)
        vmrewind("mark", alone.config, "here")
        alone.write(ready, 3, 30 * MIB)
    return Source(alone, alone.restored("@here"))


@dataclass
class Copy:
    """The booted copy: its command's process, and what the disk must hold."""

    name: str
    directory: Path
    process: subprocess.Popen[str]
    console: Path
    content: bytearray
    states: dict[str, bytes] = field(default_factory=dict)

    @property
    def paths(self) -> VmPaths:
        return VmPaths(self.name)

    @property
    def config(self) -> Path:
        return self.directory / f"{self.name}.toml"

    @property
    def image(self) -> Path:
        return self.directory / "vda.raw"

    @property
    def socket(self) -> Path:
        return self.paths.nbd_socket

    @property
    def base_is_made(self) -> bool:
        return not list(self.paths.default_journal.glob("origin-*.json"))

    def kept(self) -> bool:
        return "kept: " in self.console.read_text()

    def filling(self) -> bool:
        return (self.paths.default_journal / "filling.json").exists()

    def mark(self, name: str) -> None:
        until(lambda: self._marked(name), f"bookmark {name}")
        self.states[f"@{name}"] = bytes(self.content)

    def _marked(self, name: str) -> bool:
        with contextlib.suppress(Exception):
            instruct(self.paths, command="mark", name=name)
            return True
        return False

    def check(self) -> None:
        """The image holds what was written, and so do all moments."""
        assert first_difference(self.image.read_bytes(), bytes(self.content)) is None
        with open_vm(self.name).history() as history:
            for moment, state in {**self.states, "latest": bytes(self.content)}.items():
                position = resolve(history, history.branch(), moment, ["vda"])
                assert first_difference(View.open(history, "vda", position).read(0, SIZE), state) is None, moment

    def end(self) -> None:
        """There is no guest that would hear the power button."""
        self.process.send_signal(signal.SIGINT)
        until(lambda: "asked the guest" in self.console.read_text(), "the power button")
        self.process.send_signal(signal.SIGINT)


@contextlib.contextmanager
def booted(source: Source, tmp_path: Path, name: str) -> Iterator[Copy]:
    """A copy whose images are completed up to the middle, and no further while the file ``hold`` is there."""
    hold = tmp_path / "hold"
    hold.touch()
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(_SLOW.format(half=SIZE // 2, hold=str(hold)))
    console = tmp_path / "console"
    words = [VMREWIND, "boot", source.alone.config, "--json"]
    with console.open("wb") as log:
        process = subprocess.Popen(
            [*words, "--at", "@here", "--keep", tmp_path / "kept", "--protect", "--name", name, "--scratch", tmp_path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"PYTHONPATH": str(hooks)},
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line and json.loads(line).get("event") == "ready", line + console.read_text()
        yield Copy(name, tmp_path / "kept", process, console, bytearray(source.content))
    finally:
        process.kill()
        process.communicate()
        _end_what_is_left(name)


def killed_all(copy: Copy) -> None:
    """SIGKILL, for the command and for what it has started."""
    copy.process.kill()
    copy.process.wait()
    _end_what_is_left(copy.name)


def _end_what_is_left(name: str) -> None:
    """What a keeper that was killed has left behind, as the next start would."""
    with contextlib.suppress(FileNotFoundError):
        known: dict[str, Any] = json.loads(VmPaths(name).keeper.read_text())
        for role in ("capture", "ship"):
            if (process := known.get(role)) is not None:
                kill(process["pid"])


class Writer:
    """A client that writes at random places, and does again on a new connection what was not answered, as QEMU does."""

    def __init__(self, copy: Copy, seed: int) -> None:
        self._copy = copy
        self._random = random.Random(seed)
        self._client: Client | None = None
        self.flushes = 0

    def close(self) -> None:
        if self._client is not None:
            self._client.sock.close()

    def step(self) -> None:
        chance, content = self._random, self._copy.content
        length = chance.choice((512, 4096, 4096, 65536, 3 * MIB // 2))
        offset = chance.randrange(0, SIZE - length, 512)
        what = chance.random()
        if what < 0.5:
            data = chance.randbytes(length)
            self._do(nbd.CMD_WRITE, offset, data=data)
            content[offset : offset + length] = data
        elif what < 0.65:
            self._do(chance.choice((nbd.CMD_WRITE_ZEROES, nbd.CMD_TRIM)), offset, length)
            content[offset : offset + length] = bytes(length)
        elif what < 0.8:
            self._do(nbd.CMD_FLUSH)
            self.flushes += 1
        else:
            assert first_difference(self._do(nbd.CMD_READ, offset, length), bytes(content[offset : offset + length])) is None

    def _do(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"") -> bytes:
        deadline = time.monotonic() + 60
        while True:
            try:
                if self._client is None:
                    self._client = Client(self._copy.socket)
                return self._client.do(command, offset, length, data)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                if self._client is not None:
                    self._client.sock.close()
                    self._client = None
                time.sleep(0.01)


def test_every_moment_from_the_first_write_on(source: Source, tmp_path: Path) -> None:
    before = source.segments
    with contextlib.ExitStack() as opened:
        copy = opened.enter_context(booted(source, tmp_path, "lives"))
        writer = opened.enter_context(contextlib.closing(Writer(copy, 7)))
        for turn in range(120):
            writer.step()
            if turn % 40 == 20:
                copy.mark(f"m{turn}")
            if turn in (30, 60):
                # A capture that dies is replaced; who writes to it waits.
                os.kill(json.loads(copy.paths.keeper.read_text())["capture"]["pid"], signal.SIGKILL)
        assert copy.filling(), "this is about images that are not complete"
        (tmp_path / "hold").unlink()
        until(copy.kept, "images that are complete")
        assert not copy.filling()
        for turn in range(120, 160):
            writer.step()
            if turn % 40 == 20:
                copy.mark(f"m{turn}")
        copy.end()
        assert copy.process.wait(60) == 0, copy.console.read_text()
        found = [record["op"] for record in journal_records(copy.paths.default_journal)]
        assert found.count("flush") >= writer.flushes > 10, "a flush is capture's to answer, before the images are complete too"
        copy.states["seq:1"] = source.content
        copy.check()
        assert source.segments == before
        # It is a VM like any other from here on.
        vmrewind("backup", copy.config)
        copy.check()


@pytest.mark.parametrize("host_died", [False, True])
def test_killed_before_the_images_are_complete(source: Source, tmp_path: Path, *, host_died: bool) -> None:
    with contextlib.ExitStack() as opened:
        copy = opened.enter_context(booted(source, tmp_path, f"dies-{host_died}"))
        writer = opened.enter_context(contextlib.closing(Writer(copy, 11)))
        for turn in range(40):
            writer.step()
            if turn == 20:
                copy.mark("m")
        copy.mark("last")
        assert copy.filling()
        copy.process.kill()
        copy.process.wait()
        if host_died:
            _end_what_is_left(copy.name)
            with open(copy.paths.default_journal / "capture.state", "r+b") as state:
                state.seek(ANOTHER_BOOT)
                state.write(os.urandom(16))
            refused = vmrewind("backup", copy.config, check=False)
            assert refused.returncode == 8 and f"vmrewind restore {copy.name} --in-place" in " ".join(refused.stderr.split())
        status = json.loads(vmrewind("status", copy.name, "--json", check=False).stdout)
        assert any("not complete" in problem for problem in status["problems"])
        # The images were completed on after the last write.
        later = time.time_ns() + 60 * 10**9
        os.utime(copy.image, ns=(later, later))
        # Capture may be alive still.
        vmrewind("restore", copy.name, "--in-place")
        copy.check()
        vmrewind("backup", copy.config)
        copy.check()


def test_stopped_before_the_images_are_complete(source: Source, tmp_path: Path) -> None:
    with contextlib.ExitStack() as opened:
        copy = opened.enter_context(booted(source, tmp_path, "stops"))
        writer = opened.enter_context(contextlib.closing(Writer(copy, 13)))
        for _ in range(20):
            writer.step()
        copy.mark("last")
        until(lambda: copy.base_is_made, "the base")
        copy.end()
        until(lambda: "its images are completed; Ctrl-C" in copy.console.read_text(), "the end of QEMU")
        assert copy.filling()
        copy.process.send_signal(signal.SIGINT)
        time.sleep(1)  # It has seen that before it may go on; else it completes them, and the test fails below.
        (tmp_path / "hold").unlink()
        assert copy.process.wait(60) == 0
        assert f"`vmrewind restore {copy.name} --in-place` completes them" in copy.console.read_text()
        assert vmrewind("backup", copy.config, check=False).returncode == 8
        assert first_difference(copy.image.read_bytes(), bytes(copy.content)) is not None
        # Where a base is there, a rewind does it as well; it must not trust what the image is noted to hold.
        vmrewind("rewind", copy.name, "--to", "@last")
        copy.check()


def test_nothing_asked_before_a_handing_over_is_done_after_it(tmp_path: Path) -> None:
    """A client that is hung up on sends again what was not answered: done twice, it must not be done late."""

    class Slow:
        size = MIB
        done = threading.Event()
        go_on = threading.Event()

        def write(self, _offset: int, _data: memoryview) -> None:
            self.go_on.wait(30)
            self.done.set()

    slow = Slow()
    listener = listen(tmp_path / "first.sock", None)
    successor = listen(tmp_path / "second.sock", None)
    successor.settimeout(30)
    # An overlay as far as the server looks.
    from vmrewind.recover.scratch import Overlay

    Overlay.register(Slow)
    server = ExportServer({"vda": slow}, listener, lambda _: None)  # type: ignore[dict-item]
    serving = Exported(tmp_path / "first.sock", {"vda": slow}, listener, server)  # type: ignore[dict-item]
    server.start()
    with Client(serving.socket) as client:
        client.sock.sendall(client.request(nbd.CMD_WRITE, 0, data=bytes(512)))
        until(lambda: server._clients, "the client")
        handing = threading.Thread(target=serving.hand_over, args=(tmp_path / "second.sock",))
        handing.start()
        assert client.hung_up()
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(str(serving.socket))
        successor.settimeout(0.2)
        with pytest.raises(TimeoutError):
            successor.accept()
        slow.go_on.set()
        handing.join()
        assert slow.done.is_set()
        with socket.socket(socket.AF_UNIX) as again:
            again.connect(str(serving.socket))
            successor.settimeout(30)
            successor.accept()[0].close()
        waiting.close()
    serving.close()
    assert serving.socket.exists(), "whoever was led elsewhere finds it by this path"
    successor.close()
