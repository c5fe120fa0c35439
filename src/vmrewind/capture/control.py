"""The control socket: one JSON object a line, one answer each. Its client is local and trusted with the VM, never more."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any, Final

LINE_MAX: Final = 64 << 10
"""Longest instruction, bytes."""
_TURN: Final = 4 << 10
"""What is received before the disks have their turn, bytes: some hundred instructions at most."""

Answer = Callable[[dict[str, Any]], None]


class ControlClient:
    """One connection; ``instruct(request, answer)`` carries out a request and may answer later."""

    def __init__(self, sock: socket.socket, instruct: Callable[[dict[str, Any], Answer], None]) -> None:
        self._sock = sock
        self._instruct = instruct
        self._buffer = bytearray()
        self._unanswered = 0
        self._ending = False

    def readable(self) -> bool:
        """Receive and carry out what is complete; False when the client is gone or talks nonsense."""
        try:
            received = self._sock.recv(_TURN)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._buffer += received
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            try:
                request = json.loads(line)
            except (ValueError, RecursionError):
                request = None
            if not isinstance(request, dict):
                self._answer({"ok": False, "kind": "usage", "message": "an instruction is one JSON object a line"})
                return False
            self._unanswered += 1
            self._instruct(request, self._answer_request)
        if len(self._buffer) >= LINE_MAX:
            self._answer({"ok": False, "kind": "usage", "message": f"an instruction has at most {LINE_MAX} bytes"})
            return False
        return bool(received)

    def _answer_request(self, answer: dict[str, Any]) -> None:
        self._answer(answer)
        self._unanswered -= 1
        if self._ending:
            self.close()

    def _answer(self, answer: dict[str, Any]) -> None:
        line = json.dumps(answer).encode() + b"\n"
        with contextlib.suppress(OSError):
            if self._sock.send(line) == len(line):
                return
        # Gone, or it does not read its answers: whoever watches the socket finds its end.
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up, once everything asked is answered: a client may say all that it wants and end its side."""
        self._ending = True
        if not self._unanswered:
            self._sock.close()
