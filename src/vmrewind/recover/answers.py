"""Answers to a client's requests, sent together where they come quickly, and none held back for long.

Each answer of its own costs a wake-up at either end. But nobody knows how long the read takes behind which an answer waits: storage
may be slow, or far away. So what is held is sent after a few milliseconds by a thread that does nothing else, and never waits for a
client. It sleeps as long as nothing is held.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Final

_HELD_MAX: Final = 64 << 10
"""Bytes."""
_HELD_SECONDS: Final = 0.004


class Answers:
    """What goes to one client. Used from several threads."""

    def __init__(self, sock: socket.socket, hurry: threading.Event) -> None:
        self._sock = sock
        self._hurry = hurry
        self._lock = threading.Lock()
        self._held = bytearray()

    def send(self, answer: bytes | bytearray) -> None:
        """Send it, and what is held, all in order. Raises OSError if the client has gone."""
        with self._lock:
            if self._held:
                self._held += answer
                answer, self._held = self._held, bytearray()
            self._sock.sendall(answer)

    def hold(self, answer: bytes | bytearray) -> None:
        """Send it with the next one, or soon. Raises as ``send`` does."""
        with self._lock:
            self._held += answer
            full = len(self._held) >= _HELD_MAX
        if full:
            self.send(b"")
        elif not self._hurry.is_set():
            self._hurry.set()

    def send_held(self) -> None:
        """Send what is held, as much as the client takes at once."""
        # Who has the lock sends what is held, or has just begun to hold something and says so.
        if not self._held or not self._lock.acquire(blocking=False):
            return
        try:
            # Who has gone is found out by who receives.
            with suppress(OSError):
                sent = self._sock.send(self._held, socket.MSG_DONTWAIT)
                del self._held[:sent]
            if self._held:
                self._hurry.set()
        finally:
            self._lock.release()


class Sender:
    """Sends what clients' answers are held. ``start``, and ``stop`` when all clients are gone."""

    def __init__(self) -> None:
        self._hurry = threading.Event()
        self._stopping = False
        self._lock = threading.Lock()
        self._all: set[Answers] = set()
        self._thread = threading.Thread(target=self._work, name="export-sender", daemon=True)

    def start(self) -> None:
        """From now on nothing is held for long."""
        self._thread.start()

    def stop(self) -> None:
        """Send nothing any more."""
        self._stopping = True
        self._hurry.set()
        self._thread.join()

    def add(self, sock: socket.socket) -> Answers:
        """Those of a client, until they are removed."""
        answers = Answers(sock, self._hurry)
        with self._lock:
            self._all.add(answers)
        return answers

    def remove(self, answers: Answers) -> None:
        """The client has gone."""
        with self._lock:
            self._all.discard(answers)

    def _work(self) -> None:
        while self._hurry.wait() and not self._stopping:
            # Whoever holds an answer from here on says so again.
            self._hurry.clear()
            time.sleep(_HELD_SECONDS)
            with self._lock:
                boxes = list(self._all)
            for box in boxes:
                box.send_held()
