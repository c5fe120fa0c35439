"""An export's requests are carried out side by side where they wait for something."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.capture_tools import Client
from tests.fault_tools import no_descriptors_left
from vmrewind.history.view import Extent
from vmrewind.nbd import protocol as nbd
from vmrewind.recover import export_server
from vmrewind.recover.answers import Answers
from vmrewind.recover.export_server import ExportServer

MIB = 1 << 20


class Slow:
    """A disk whose reads go on only when four of them wait, all but the first one."""

    size = MIB

    def __init__(self) -> None:
        self.first = threading.Lock()
        self.together = threading.Barrier(4)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if self.first.acquire(blocking=False):
            threading.Event().wait(0.05)
        else:
            self.together.wait(30)
        buffer[:] = bytes([offset // 4096]) * len(buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, zero=False)


class Quick:
    """A disk whose bytes tell their number of 4 KiB."""

    size = MIB

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes([offset // 4096]) * len(buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, zero=False)


class Waiting(Quick):
    """A disk whose reads behind the first 64 KiB wait until they are let go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert offset < 65536 or self.go_on.wait(60)
        super().read_into(offset, buffer)


class Counting(socket.socket):
    """A listener that counts how often somebody is let in, or would have been."""

    accepts = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.accepts += 1
        return super().accept()


@contextmanager
def served(disk: Any, listener: socket.socket | None = None) -> Iterator[Path]:
    """The disk at a socket; nobody is told of an error."""
    path = Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "export.sock"
    path.parent.mkdir(exist_ok=True, parents=True)
    told: list[str] = []
    with listener or socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = ExportServer({"vda": disk}, listener, told.append)
        server.start()
        try:
            yield path
        finally:
            server.stop()
            path.unlink()
    assert told == []


def test_reads_that_wait_are_carried_out_side_by_side() -> None:
    with served(Slow()) as path, Client(path) as client:
        client.sock.sendall(b"".join(client.request(nbd.CMD_READ, n * 4096, 4096, cookie=n) for n in range(9)))
        answers = {cookie: (error, data) for cookie, error, data in (client.reply(4096) for _ in range(9))}
    assert answers == {n: (0, bytes([n]) * 4096) for n in range(9)}


@pytest.mark.parametrize("structured", [False, True])
def test_reads_that_come_together_are_answered_whatever_comes_behind(structured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_server, "_SLOW_SECONDS", 60)  # else a busy machine has two threads carry them out, in any order
    behind = {
        "nothing": b"",
        "a part of a request": nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 0, 0, 0)[:20],
        "a write's head": nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 0, 0, 4096),
        "a goodbye": nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_DISC, 0, 0, 0),
        "something else": bytes(nbd.REQUEST.size),
    }
    lengths = [4096 * chance for chance in (1, 1, 2, 16, 1, 5, 4, *[1] * 40, 4, 4, 4, 4, 4, 4, 8, 1)]
    with served(Quick()) as path:
        for what, more in behind.items():
            with Client(path, structured=structured) as client:
                requests = [client.request(nbd.CMD_READ, n * 4096, length, cookie=n) for n, length in enumerate(lengths)]
                client.sock.sendall(b"".join(requests) + more)
                for n, length in enumerate(lengths):
                    assert client.reply(length) == (n, 0, bytes([n]) * length), f"{n} before {what}"


@pytest.mark.parametrize("quick", [1, 5])
def test_an_answer_does_not_wait_for_the_slow_read_behind_it(quick: int) -> None:
    disk = Waiting()
    offsets = [n * 4096 for n in range(quick)]
    with served(disk) as path, Client(path) as client:
        try:
            client.sock.sendall(b"".join(client.request(nbd.CMD_READ, at, 4096, cookie=at) for at in (*offsets, 65536)))
            client.sock.settimeout(30)
            for at in offsets:
                assert client.reply(4096) == (at, 0, bytes([at // 4096]) * 4096)
        finally:
            disk.go_on.set()
        assert client.reply(4096) == (65536, 0, b"\x10" * 4096)


def test_only_reads_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bytes] = []
    hold = Answers.hold

    def noting(answers: Answers, answer: bytes) -> None:
        held.append(answer)
        hold(answers, answer)

    monkeypatch.setattr(Answers, "hold", noting)
    commands = (nbd.CMD_READ, nbd.CMD_FLUSH, nbd.CMD_READ)
    with served(Quick()) as path, Client(path, structured=False) as client:
        lengths = [4096 if command == nbd.CMD_READ else 0 for command in commands]
        requests = zip(commands, lengths, strict=True)
        client.sock.sendall(b"".join(client.request(command, 0, length, cookie=7) for command, length in requests))
        assert [client.reply(length)[1] for length in lengths] == [0, 0, 0]
    assert held == []


def test_clients_that_come_while_descriptors_are_used_up_wait_and_cost_nothing() -> None:
    listener = Counting(socket.AF_UNIX)
    with served(Quick(), listener) as path, socket.socket(socket.AF_UNIX) as waiting:
        with no_descriptors_left():
            before = listener.accepts
            waiting.connect(str(path))
            began = time.monotonic()
            while listener.accepts < before + 4:
                assert time.monotonic() < began + 30
                threading.Event().wait(0.01)
            assert time.monotonic() - began > 0.15
        with Client(path) as client:
            client.sock.sendall(client.request(nbd.CMD_READ, 4096, 4096, cookie=1))
            assert client.reply(4096) == (1, 0, b"\1" * 4096)
