"""Clients that are still in their handshake: what they are answered, and how long they may take."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from vmrewind.nbd.negotiation import ExportInfo, Handshake, ProtocolError

_HANDSHAKE_SECONDS_MAX: Final = 10
_SEND_BUFFER: Final = 4 << 20


class Loop(Protocol):
    """What a handshake needs of the loop that it runs in."""

    def watch(self, sock: socket.socket) -> None:
        """Call ``Greeter.readable(sock)`` whenever there is something to receive."""

    def unwatch(self, sock: socket.socket) -> None:
        """Do so no more."""

    def begin_transmission(self, sock: socket.socket, handshake: Handshake) -> None:
        """The handshake is done; the socket is the loop's, which watches it otherwise from now on."""


@dataclass(frozen=True, slots=True)
class _Greeting:
    sock: socket.socket
    handshake: Handshake
    deadline_ns: int


class Greeter:
    """Every handshake under way."""

    def __init__(self, loop: Loop, exports: Mapping[str, ExportInfo]) -> None:
        self._loop = loop
        self._exports = exports
        self._greetings: dict[socket.socket, _Greeting] = {}

    def __len__(self) -> int:
        """How many clients have not chosen an export yet."""
        return len(self._greetings)

    def greet(self, sock: socket.socket) -> None:
        """A client was accepted: say what is served here."""
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        handshake = Handshake(self._exports)
        greeting = _Greeting(sock, handshake, time.monotonic_ns() + _HANDSHAKE_SECONDS_MAX * 10**9)
        self._greetings[sock] = greeting
        self._loop.watch(sock)
        self._answer(greeting, handshake.greeting)

    def readable(self, sock: socket.socket) -> None:
        """Receive what the client says and answer it."""
        greeting = self._greetings[sock]
        handshake = greeting.handshake
        answer = b""
        try:
            received = sock.recv(65536)
            answer = handshake.feed(received)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            received = b""
        if not received:
            self._drop(greeting)
            return
        if answer and not self._answer(greeting, answer):
            return
        if handshake.closed:
            self._drop(greeting)
        elif handshake.chosen is not None:
            self._loop.unwatch(sock)
            del self._greetings[sock]
            self._loop.begin_transmission(sock, handshake)

    def drop_oldest(self) -> bool:
        """Hang up on whoever has been at it the longest; False if there is nobody."""
        for greeting in self._greetings.values():
            self._drop(greeting)
            return True
        return False

    def drop_overdue(self) -> None:
        """Hang up on whoever takes too long."""
        now = time.monotonic_ns()
        for greeting in [g for g in self._greetings.values() if g.deadline_ns < now]:
            self._drop(greeting)

    def _answer(self, greeting: _Greeting, data: bytes) -> bool:
        try:
            # The replies of a handshake fit any socket buffer unless the client does not read: then it is no client.
            if greeting.sock.send(data) == len(data):
                return True
        except OSError:
            pass
        self._drop(greeting)
        return False

    def _drop(self, greeting: _Greeting) -> None:
        self._loop.unwatch(greeting.sock)
        self._greetings.pop(greeting.sock, None)
        greeting.sock.close()
