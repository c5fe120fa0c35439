"""The soak's load: an NBD client that sends again on a new connection what was not answered, as QEMU does, and knows the truth.

The model keeps no disks, only a digest after every operation, in the order in which they were sent: a restored disk must be one of
those states, and its place in the order must fit the moment. Blocks are 4 KiB; a disk's digest is the XOR of its blocks' hashes.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import xxhash

from vmrewind.nbd import protocol as nbd

BLOCK: Final = 4096
_BLOCKS_MAX: Final = 16
_WINDOW: Final = 16
_ZERO: Final = bytes(BLOCK)


def block_hash(index: int, content: bytes) -> int:
    """One block's part in its disk's digest."""
    return xxhash.xxh3_64_intdigest(content, seed=index)


def digest(path: Path) -> int:
    """The digest of a disk in a file."""
    result = 0
    with open(path, "rb") as file:
        for index, content in enumerate(iter(lambda: file.read(BLOCK), b"")):
            result ^= block_hash(index, content)
    return result


@dataclass(frozen=True, slots=True)
class Sample:
    """How far a disk was at a time: operations answered, operations sent."""

    time_ns: int
    answered: int
    sent: int


class Load(threading.Thread):
    """Writes, zeroes, discards and flushes one disk at a bounded rate until ``stop``. ``error``: what the server did wrong."""

    def __init__(self, target: str, socket_path: Path, size: int, seed: int, rate: float) -> None:
        super().__init__(name=f"load-{target}", daemon=True)
        self.target = target
        self.error: str | None = None
        self.reconnects = 0
        self.bytes_written = 0
        self.samples: list[Sample] = []
        self._socket_path = socket_path
        self._random = random.Random(seed)
        self._pause_seconds = _WINDOW / rate
        self._hashes = [block_hash(index, _ZERO) for index in range(size // BLOCK)]
        self._zeroes = list(self._hashes)
        state = 0
        for value in self._hashes:
            state ^= value
        self.states = [state]
        """The disk's digest after each operation sent."""
        self.answered = 0
        self._number = 0
        self._sock: socket.socket | None = None
        self._stopping = threading.Event()
        self._wanted = threading.Event()
        self._idle = threading.Event()
        self._wanted.set()

    def stop(self) -> None:
        """End once everything sent is answered."""
        self._stopping.set()
        self._wanted.set()
        self.join(120)
        if self.is_alive():
            self.error = self.error or "the server does not answer"

    def pause(self) -> None:
        """Wait until everything sent is answered and send nothing more; ``resume`` ends that."""
        self._idle.clear()
        self._wanted.clear()
        while not self._idle.wait(1):
            if not self.is_alive():
                return

    def resume(self) -> None:
        """Go on."""
        self._wanted.set()

    def disconnect(self) -> None:
        """Close the connection; to be called while paused."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def place(self) -> tuple[int, int]:
        """(operations answered, operations sent) now."""
        return self.answered, len(self.states) - 1

    def run(self) -> None:
        """The thread."""
        try:
            while not self._stopping.is_set():
                if not self._wanted.is_set():
                    self._idle.set()
                    self._wanted.wait()
                    continue
                requests = self._make()
                self.samples.append(Sample(time.time_ns(), *self.place()))
                while not self._try(requests):
                    self.reconnects += 1
                    time.sleep(0.05)
                self.answered = len(self.states) - 1
                self.samples.append(Sample(time.time_ns(), *self.place()))
                time.sleep(self._pause_seconds * self._random.uniform(0.2, 1.8))
        except (ValueError, struct.error) as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self._idle.set()
            self.disconnect()

    def _try(self, requests: list[bytes]) -> bool:
        try:
            if self._sock is None:
                self._sock = self._connect()
            self._carry(self._sock, requests)
        except OSError:
            self.disconnect()
            return False
        return True

    # -- requests

    def _make(self) -> list[bytes]:
        """A window of requests, none of which overlaps another: what is sent again changes nothing."""
        touched: set[int] = set()
        requests: list[bytes] = []
        for cookie in range(self._random.randint(1, _WINDOW)):
            kind = self._random.random()
            count = self._random.randint(1, _BLOCKS_MAX)
            first = self._random.randrange(len(self._hashes) - count)
            blocks = range(first, first + count)
            flags = nbd.CMD_FLAG_FUA if self._random.random() < 0.05 else 0
            if kind < 0.1 or touched.intersection(blocks):
                requests.append(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_FLUSH, cookie, 0, 0))
                self.states.append(self.states[-1])
                continue
            touched.update(blocks)
            command = nbd.CMD_WRITE if kind < 0.85 else nbd.CMD_WRITE_ZEROES if kind < 0.93 else nbd.CMD_TRIM
            head = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, first * BLOCK, count * BLOCK)
            payload = self._payload(blocks) if command == nbd.CMD_WRITE else self._cleared(blocks)
            requests.append(head + payload)
        return requests

    def _payload(self, blocks: range) -> bytes:
        """Content that was never written before, and that compresses well: half an hour of it must fit on a disk."""
        parts, state = [], self.states[-1]
        for index in blocks:
            self._number += 1
            content = struct.pack("<Q", self._number) * (BLOCK // 8)
            parts.append(content)
            now = block_hash(index, content)
            state ^= self._hashes[index] ^ now
            self._hashes[index] = now
        self.states.append(state)
        self.bytes_written += len(blocks) * BLOCK
        return b"".join(parts)

    def _cleared(self, blocks: range) -> bytes:
        state = self.states[-1]
        for index in blocks:
            state ^= self._hashes[index] ^ self._zeroes[index]
            self._hashes[index] = self._zeroes[index]
        self.states.append(state)
        return b""

    # -- the protocol, as little of it as is needed

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(60)
            sock.connect(str(self._socket_path))
            _receive(sock, 18)
            sock.sendall(struct.pack(">I", nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES))
            name = self.target.encode()
            sock.sendall(nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_GO, len(name) + 6) + len(name).to_bytes(4, "big") + name + bytes(2))
            while True:
                _, _, kind, length = nbd.OPTION_REPLY.unpack(_receive(sock, nbd.OPTION_REPLY.size))
                _receive(sock, length)
                if kind == nbd.REP_ACK:
                    return sock
                if kind & 1 << 31:
                    raise ValueError(f"the server refuses {self.target}: {kind:#x}")
        except BaseException:
            sock.close()
            raise

    def _carry(self, sock: socket.socket, requests: list[bytes]) -> None:
        """Send all that is not answered and take the answers; raises OSError if the connection ends before."""
        sock.sendall(b"".join(requests))
        waiting = set(range(len(requests)))
        while waiting:
            magic, error, cookie = nbd.SIMPLE_REPLY.unpack(_receive(sock, nbd.SIMPLE_REPLY.size))
            if magic != nbd.SIMPLE_REPLY_MAGIC or cookie not in waiting or error:
                raise ValueError(f"request {cookie} of {self.target} was answered with error {error}, magic {magic:#x}")
            waiting.remove(cookie)


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            raise ConnectionError("hung up")
        data += part
    return data
