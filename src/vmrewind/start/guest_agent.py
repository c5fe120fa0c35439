"""The guest agent's own protocol, on the socket that QEMU serves for its channel: what freezing and thawing needs of it.

Written down in QEMU's ``qga/qapi-schema.json``. The channel has no connections: what an earlier client asked may be answered to us.
So every exchange begins with the protocol's handshake for that: a 0xFF byte, which has the agent forget half a request, and
``guest-sync-delimited``, whose answer comes behind another 0xFF. ``qemu.qmp`` takes either byte for the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vmrewind.errors import GuestAgentError, VmStateError

ANSWER_BYTES_MAX: Final = 1 << 20
MISSING_HINT: Final = "install and start qemu-guest-agent in the guest; nothing else may hold its socket meanwhile"
_SENTINEL: Final = b"\xff"


class AgentSocket:
    """One connection to an agent. Every failure is a GuestAgentError, after at most the seconds that were given.

    One that nobody serves is a VmStateError: no guest, so nothing that could be frozen.
    """

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        self._path = path
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(timeout_seconds)
            self._socket.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            self._socket.close()
            raise VmStateError(f"{path}: nobody serves the guest agent's socket: {error.strerror}", "is the VM running?") from None
        except OSError as error:
            self._socket.close()
            raise GuestAgentError(f"{path}: the guest agent cannot be reached: {error.strerror or error}", MISSING_HINT) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()

    def execute(self, command: str, timeout_seconds: float) -> Any:
        """Carry out a command of the agent's; returns what it returns."""
        deadline = time.monotonic() + timeout_seconds
        self._synchronise(deadline)
        self._send({"execute": command}, deadline)
        answer = self._answer(deadline, command)
        if isinstance(answer, dict) and "return" in answer:
            return answer["return"]
        described = answer.get("error") if isinstance(answer, dict) else None
        if isinstance(described, dict):
            raise GuestAgentError(f"the guest agent refuses {command}: {str(described.get('desc'))[:300]!r}")
        raise self._nonsense(f"it answers {command} with neither a result nor an error")

    def _synchronise(self, deadline: float) -> None:
        """Drop what is left of earlier exchanges, on both sides."""
        number = int.from_bytes(os.urandom(4), "big")
        self._send({"execute": "guest-sync-delimited", "arguments": {"id": number}}, deadline, before=_SENTINEL)
        while True:
            self._until(_SENTINEL, deadline, "guest-sync-delimited", keep=False)
            # An answer that broke off may stand between a sentinel and the next one.
            line = self._until(b"\n", deadline, "guest-sync-delimited", keep=True).rpartition(_SENTINEL)[2]
            with contextlib.suppress(ValueError, RecursionError):
                answer = json.loads(line)
                if isinstance(answer, dict) and answer.get("return") == number and type(answer["return"]) is int:
                    return

    def _send(self, request: dict[str, Any], deadline: float, before: bytes = b"") -> None:
        self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            self._socket.sendall(before + json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._silent(str(request["execute"]), error) from None

    def _answer(self, deadline: float, command: str) -> Any:
        line = self._until(b"\n", deadline, command, keep=True)
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise self._nonsense(f"it answers {command} with {line[:60]!r}") from None

    def _until(self, end: bytes, deadline: float, command: str, *, keep: bool) -> bytes:
        """What was received up to ``end``, which goes too; what is not to be kept may be any length."""
        while (at := self._received.find(end)) < 0:
            if not keep:
                self._received.clear()
            if len(self._received) > ANSWER_BYTES_MAX:
                raise self._nonsense(f"its answer to {command} does not end")
            remaining = deadline - time.monotonic()
            try:
                if remaining <= 0:
                    raise TimeoutError("timed out")
                self._socket.settimeout(remaining)
                received = self._socket.recv(64 << 10)
            except OSError as error:
                raise self._silent(command, error) from None
            if not received:
                raise GuestAgentError(f"{self._path}: hung up in the middle of {command}", "has the VM ended?")
            self._received += received
        found = bytes(self._received[:at])
        del self._received[: at + len(end)]
        return found

    def _silent(self, command: str, error: OSError) -> GuestAgentError:
        return GuestAgentError(f"{self._path}: the guest agent does not answer {command}: {error.strerror or error}", MISSING_HINT)

    def _nonsense(self, what: str) -> GuestAgentError:
        return GuestAgentError(f"{self._path}: what listens there is no guest agent: {what}", MISSING_HINT)
