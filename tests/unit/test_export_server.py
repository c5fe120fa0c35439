"""An export's requests are carried out side by side where they wait for something."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from tests.capture_tools import Client
from vmrewind.history.view import Extent
from vmrewind.nbd import protocol as nbd
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


def test_reads_that_wait_are_carried_out_side_by_side() -> None:
    path = Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "export.sock"
    path.parent.mkdir(exist_ok=True, parents=True)
    told: list[str] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = ExportServer({"vda": cast(Any, Slow())}, listener, told.append)
        server.start()
        with Client(path) as client:
            client.sock.sendall(b"".join(client.request(nbd.CMD_READ, n * 4096, 4096, cookie=n) for n in range(9)))
            answers = {cookie: (error, data) for cookie, error, data in (client.reply(4096) for _ in range(9))}
        server.stop()
    assert told == [] and answers == {n: (0, bytes([n]) * 4096) for n in range(9)}
