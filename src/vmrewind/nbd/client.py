"""A client of one export on a unix socket, for who writes through a server that may be replaced under way, as capture is.

Every request is one that may be sent again: what was not answered when the connection broke is, on the next one, until it is.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Final

from vmrewind.nbd import protocol as nbd

_RETRY_SECONDS: Final = 0.1
_HANDSHAKE_SECONDS: Final = 10.0
_REPLY_DATA_MAX: Final = 64 << 10


class Closed(OSError):
    """The client was closed while, or before, a request was made: what became of that one is not known."""


class NbdClient:
    """Changes an export; one request at a time, threads take turns. A server that is away is waited for until ``close``."""

    def __init__(self, path: Path, export: str) -> None:
        self._path = path
        self._export = export.encode()
        self._turn = threading.Lock()
        self._sock: socket.socket | None = None
        self._cookie = 0
        self._closing = threading.Event()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write ``data``. Raises OSError if the server refuses, Closed."""
        self._request(nbd.CMD_WRITE, offset, len(data), data)

    def zero(self, offset: int, length: int) -> None:
        """Make ``length`` bytes zeroes, fewer than 4 GiB; raises as ``write`` does."""
        self._request(nbd.CMD_WRITE_ZEROES, offset, length)

    def flush(self) -> None:
        """What was answered before is on stable storage when this returns; raises as ``write`` does."""
        self._request(nbd.CMD_FLUSH, 0, 0)

    def greet(self) -> None:
        """Return once the server, as it is now, has answered: it need not be able to change anything. Raises Closed."""
        with self._turn:
            while not self._closing.is_set():
                self._hang_up()
                try:
                    self._connect()
                    return
                except OSError:
                    self._closing.wait(_RETRY_SECONDS)
            raise Closed("the client was closed")

    def close(self) -> None:
        """Hang up; a request that waits raises Closed."""
        self._closing.set()
        if (sock := self._sock) is not None:
            _shut(sock)
        with self._turn:
            self._hang_up()

    def _request(self, command: int, offset: int, length: int, data: bytes | memoryview = b"") -> None:
        with self._turn:
            while not self._closing.is_set():
                try:
                    sock = self._sock or self._connect()
                    self._cookie += 1
                    sock.sendall(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, command, self._cookie, offset, length))
                    sock.sendall(data)
                    magic, error, cookie = nbd.SIMPLE_REPLY.unpack(_receive(sock, nbd.SIMPLE_REPLY.size))
                    if magic != nbd.SIMPLE_REPLY_MAGIC or cookie != self._cookie:
                        raise ConnectionError("an answer to something else")
                    if error == nbd.ESHUTDOWN:
                        raise ConnectionError("the server ends")
                except OSError:
                    self._hang_up()
                    self._closing.wait(_RETRY_SECONDS)
                    continue
                if error:
                    raise OSError(error, f"{os.strerror(error)}, says the server at {self._path}")
                return
            raise Closed("the client was closed")

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_HANDSHAKE_SECONDS)
            sock.connect(str(self._path))
            magic, option_magic, _ = nbd.GREETING.unpack(_receive(sock, nbd.GREETING.size))
            if (magic, option_magic) != (nbd.NBDMAGIC, nbd.IHAVEOPT):
                raise ConnectionError(f"{self._path}: no NBD server")
            data = len(self._export).to_bytes(4, "big") + self._export + bytes(2)
            flags = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES
            sock.sendall(flags.to_bytes(4, "big") + nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_GO, len(data)) + data)
            while True:
                _, _, kind, length = nbd.OPTION_REPLY.unpack(_receive(sock, nbd.OPTION_REPLY.size))
                if length > _REPLY_DATA_MAX:
                    raise ConnectionError(f"{self._path}: an endless answer")
                _receive(sock, length)
                if kind == nbd.REP_ACK:
                    break
                if kind != nbd.REP_INFO:
                    raise ConnectionError(f"{self._path}: export refused ({kind:#x})")
            # An answer may take as long as a full journal takes to have room again.
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        self._sock = sock
        return sock

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _receive(sock: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = sock.recv(length - len(parts))
        if not part:
            raise ConnectionError("the server has gone")
        parts += part
    return bytes(parts)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
