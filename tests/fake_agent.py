"""A guest agent that is told how to misbehave. It speaks the protocol as qemu-ga does, one client at a time."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

MOUNTED = [
    {"name": "vda1", "mountpoint": "/", "type": "ext4", "disk": []},
    {"name": "vda1", "mountpoint": "/bound", "type": "ext4", "disk": []},
    {"name": "vdb", "mountpoint": "/data", "type": "xfs", "disk": []},
    {"name": "sr0", "mountpoint": "/cd", "type": "iso9660", "disk": []},
]
EFI = {"name": "vda15", "mountpoint": "/boot/efi", "type": "vfat", "disk": []}


class HangUp(Exception):
    """The agent's answer is to end the connection."""


class Hang(Exception):
    """The agent does not answer, and takes nothing more from this client."""


class FakeAgent:
    """Serves ``path``. ``does`` maps a command to what is done instead: it gives an answer, or bytes that are sent as they are."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self.does: dict[str, Callable[[], Any]] = {}
        self.frozen_since: float | None = None
        self.frozen_seconds: list[float] = []
        self.asked: list[str] = []
        self.request: dict[str, Any] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def reset(self, **does: Callable[[], Any]) -> None:
        """From now on misbehave like this; what happened is forgotten."""
        self.does = {name.replace("_", "-"): action for name, action in does.items()}
        self.frozen_seconds.clear()
        self.asked.clear()

    def freeze(self) -> int:
        if self.frozen_since is None:
            self.frozen_since = time.monotonic()
        return 2

    def thaw(self) -> int:
        if self.frozen_since is None:
            return 0
        self.frozen_seconds.append(time.monotonic() - self.frozen_since)
        self.frozen_since = None
        return 2

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(HangUp, OSError):
                client.settimeout(0.05)
                self._answer(client)

    def _answer(self, client: socket.socket) -> None:
        buffer = b""
        while not self._ended.is_set():
            try:
                received = client.recv(4096)
            except TimeoutError:
                continue
            if not received:
                return
            buffer += received
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                if b"\xff" in line:
                    line = line.rpartition(b"\xff")[2]
                    client.sendall(b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n')
                try:
                    client.sendall(self._carry_out(json.loads(line)))
                except Hang:
                    self._until_gone(client)
                    return

    def _until_gone(self, client: socket.socket) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                if not client.recv(4096):
                    return

    def _carry_out(self, request: dict[str, Any]) -> bytes:
        command = request["execute"]
        self.request = request
        self.asked.append(command)
        before = b""
        if command in self.does:
            result = self.does[command]()
            if isinstance(result, bytes):
                return result
        elif command == "guest-sync-delimited":
            before, result = b"\xff", request["arguments"]["id"]
        elif self.frozen_since is not None and command not in ("guest-fsfreeze-thaw", "guest-fsfreeze-status"):
            return b'{"error": {"class": "CommandNotFound", "desc": "Command has been disabled: the agent is in frozen state"}}\n'
        else:
            known = {"guest-get-fsinfo": lambda: MOUNTED, "guest-fsfreeze-freeze": self.freeze, "guest-fsfreeze-thaw": self.thaw}
            result = known[command]()
        return before + json.dumps({"return": result}).encode() + b"\n"
