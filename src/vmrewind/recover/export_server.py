"""An NBD server of disks that are composed as they are read, with a few threads for each client.

Unlike capture's it may wait: a read can mean a request to an object store. So where it does, requests of one client are carried out
beside one another, and answered as they are done, which the protocol allows. A client's threads take turns at receiving: who has
received a request carries it out while the next one receives. As long as requests take no time, who is at it stays at it: threads
that only compute keep one another waiting (measured as bench/export.py does: 0.95 to 1.65 times the rate of four at once). Then
short answers of reads that came together go together too (``answers``). A client that does not take its replies holds up nobody
but itself.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Final, NamedTuple

from vmrewind.errors import VmrewindError
from vmrewind.history.view import View
from vmrewind.nbd import protocol as nbd
from vmrewind.nbd.negotiation import CONTEXT_ID, ExportInfo, Handshake, ProtocolError
from vmrewind.recover.answers import Answers, Sender
from vmrewind.recover.scratch import Overlay

_REQUEST_LENGTH_MAX: Final = 32 << 20
_THREADS: Final = 4
"""For each client, and so how many of its requests are carried out at a time; more are left in its socket."""
_SLOW_SECONDS: Final = 0.005
_SIDE_BY_SIDE: Final = 32
"""So many requests after a slow one are carried out beside one another."""
_CLIENTS_MAX: Final = 32
_HANDSHAKE_SECONDS: Final = 10.0
_EXTENTS_MAX: Final = 4096
_RECEIVED_MAX: Final = 4096
"""So much is received at once where a request begins: the heads of all that a client has in flight, or few of a write's bytes."""
_HELD_ANSWER_MAX: Final = 16 << 10
"""Bytes: answers that are no longer go together."""
_READ_HEAD: Final = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_READ, 0, 0, 0)[:8]
_NOTHING: Final = memoryview(b"")
_POLL_SECONDS: Final = 0.5
_ACCEPT_AGAIN_SECONDS: Final = 0.1


class ExportServer:
    """Serves disks by name on one listening socket, views read-only. ``start`` returns at once; ``stop`` ends every connection.

    ``complain`` is told, once for each reason, why a client got an error.
    """

    def __init__(self, disks: Mapping[str, View | Overlay], listener: socket.socket, complain: Callable[[str], None]) -> None:
        self._disks = disks
        self._listener = listener
        self._exports = {name: _export(name, disk) for name, disk in disks.items()}
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._complain = complain
        self._acceptor = threading.Thread(target=self._accept, name="export-accept", daemon=True)
        self._sender = Sender()
        self._told: set[str] = set()

    def start(self) -> None:
        """Accept clients from now on."""
        self._listener.settimeout(_POLL_SECONDS)
        self._sender.start()
        self._acceptor.start()

    def stop(self) -> None:
        """Hang up on everybody and wait for what is being done."""
        self._stopping.set()
        with suppress(OSError), socket.socket(socket.AF_UNIX) as waking:
            # Whoever waits for clients would look for the event only when one comes, or half a second has passed.
            waking.setblocking(False)
            waking.connect(self._listener.getsockname())
        self._acceptor.join()
        with self._lock:
            clients = dict(self._clients)
        for sock in clients:
            _shut(sock)
        for thread in clients.values():
            thread.join()
        self._sender.stop()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                # Descriptors are used up, and whoever waits is still there: to try at once would take a processor for itself.
                self._stopping.wait(_ACCEPT_AGAIN_SECONDS)
                continue
            with self._lock:
                if len(self._clients) >= _CLIENTS_MAX:
                    sock.close()
                    continue
                thread = threading.Thread(target=self._serve, args=(sock,), name="export-client", daemon=True)
                self._clients[sock] = thread
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(_HANDSHAKE_SECONDS)
            handshake = Handshake(self._exports)
            sock.sendall(handshake.greeting)
            while handshake.chosen is None and not handshake.closed:
                if not (received := sock.recv(65536)):
                    return
                sock.sendall(handshake.feed(received))
            if handshake.chosen is not None:
                sock.settimeout(None)
                answers = self._sender.add(sock)
                try:
                    _Client(sock, answers, self._disks[handshake.chosen.name], handshake, self._tell).serve()
                finally:
                    self._sender.remove(answers)
        except (OSError, ProtocolError):
            pass  # It has gone, or speaks something else.
        finally:
            with self._lock:
                del self._clients[sock]
            sock.close()

    def _tell(self, what: str) -> None:
        with self._lock:
            if what in self._told:
                return
            self._told.add(what)
        self._complain(what)


def _export(name: str, disk: View | Overlay) -> ExportInfo:
    flags = nbd.FLAG_HAS_FLAGS | nbd.FLAG_SEND_FLUSH | nbd.FLAG_SEND_DF | nbd.FLAG_CAN_MULTI_CONN | nbd.FLAG_SEND_CACHE
    flags |= (
        nbd.FLAG_SEND_TRIM | nbd.FLAG_SEND_WRITE_ZEROES | nbd.FLAG_SEND_FUA if isinstance(disk, Overlay) else nbd.FLAG_READ_ONLY
    )
    return ExportInfo(name, disk.size, flags, 1, 65536, _REQUEST_LENGTH_MAX)


class _Request(NamedTuple):
    flags: int
    command: int
    cookie: int
    offset: int
    length: int
    payload: memoryview


_ALLOWED_FLAGS: Final = {
    nbd.CMD_READ: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_DF,
    nbd.CMD_WRITE: nbd.CMD_FLAG_FUA,
    nbd.CMD_FLUSH: nbd.CMD_FLAG_FUA,
    nbd.CMD_TRIM: nbd.CMD_FLAG_FUA,
    nbd.CMD_CACHE: nbd.CMD_FLAG_FUA,
    nbd.CMD_WRITE_ZEROES: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE,
    nbd.CMD_BLOCK_STATUS: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_REQ_ONE,
}
_CHANGES: Final = (nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES)


class _Client:
    """One client in the transmission phase."""

    def __init__(
        self,
        sock: socket.socket,
        answers: Answers,
        disk: View | Overlay,
        handshake: Handshake,
        complain: Callable[[str], None],
    ) -> None:
        self._sock = sock
        self._answers = answers
        self._disk = disk
        self._structured = handshake.structured
        self._block_status = handshake.block_status
        self._received = memoryview(bytes(handshake.buffer))
        self._complain = complain
        self._over = False
        self._side_by_side = 0
        self._receiving = threading.Lock()

    def serve(self) -> None:
        """Carry out what the client asks until it goes; everything it asked for is answered before this returns."""
        others = [threading.Thread(target=self._work, name="export-client", daemon=True) for _ in range(_THREADS - 1)]
        for thread in others:
            thread.start()
        self._work()
        for thread in others:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._receiving:
                # To let go of the lock would wake a thread that waits for it, only to see it taken again.
                while (request := None if self._over else self._next()) is not None and self._side_by_side == 0:
                    self._carry_out(request, more=self._has_read())
                if request is None:
                    self._over = True
                    return
                self._side_by_side -= 1
            self._carry_out(request, more=False)

    def _has_read(self) -> bool:
        """Whether the next request is here as a whole, and a read."""
        return len(self._received) >= nbd.REQUEST.size and self._received[: len(_READ_HEAD)] == _READ_HEAD

    def _next(self) -> _Request | None:
        """The next request, None if the client said goodbye, is gone, or speaks something else."""
        try:
            return self._read_request()
        except OSError:
            return None

    def _read_request(self) -> _Request | None:
        if len(self._received) < nbd.REQUEST.size and not self._receive_requests():
            return None
        magic, flags, command, cookie, offset, length = nbd.REQUEST.unpack_from(self._received)
        self._received = self._received[nbd.REQUEST.size :]
        if magic != nbd.REQUEST_MAGIC or command == nbd.CMD_DISC:
            return None
        payload: memoryview | None = _NOTHING
        if command == nbd.CMD_WRITE:
            # A longer payload would have to be read to get past it; the protocol allows to hang up.
            payload = self._receive(length) if length <= _REQUEST_LENGTH_MAX else None
        return None if payload is None else _Request(flags, command, cookie, offset, length, payload)

    def _receive_requests(self) -> bool:
        """Receive a request's head and what has come behind it; False if the client has gone."""
        while len(self._received) < nbd.REQUEST.size:
            if not (more := self._sock.recv(_RECEIVED_MAX)):
                return False
            self._received = memoryview(bytes(self._received) + more)
        return True

    def _receive(self, size: int) -> memoryview | None:
        buffer = bytearray(size)
        view = memoryview(buffer)
        taken = min(size, len(self._received))
        view[:taken], self._received = self._received[:taken], self._received[taken:]
        while taken < size:
            got = self._sock.recv_into(view[taken:])
            if not got:
                return None
            taken += got
        return view

    def _carry_out(self, request: _Request, *, more: bool) -> None:
        """``more``: a read is here already that is carried out next, so that its answer may take this one along."""
        begun = time.monotonic()
        answer: bytes | bytearray
        try:
            try:
                answer = self._answer(request)
            except VmrewindError as error:
                self._complain(error.in_full)
                answer = self._failed(request, nbd.EIO)
            except OSError as error:
                self._complain(f"{error.strerror or error}")
                answer = self._failed(request, nbd.wire_error(error.errno))
            except Exception as error:  # noqa: BLE001 - a defect must be told, and must not leave the client waiting
                self._complain(repr(error))
                answer = self._failed(request, nbd.EIO)
            quick = time.monotonic() - begun <= _SLOW_SECONDS
            if more and quick and request.command == nbd.CMD_READ and len(answer) <= _HELD_ANSWER_MAX:
                self._answers.hold(answer)
            else:
                self._answers.send(answer)
        except OSError:
            _shut(self._sock)  # The client has gone; its receiving end finds out.
        if time.monotonic() - begun > _SLOW_SECONDS:
            self._side_by_side = _SIDE_BY_SIDE

    def _answer(self, request: _Request) -> bytes | bytearray:
        if error := self._refusal(request):
            return self._failed(request, error)
        disk = self._disk
        if request.command == nbd.CMD_READ and request.length:
            return self._data(request, disk)
        if request.command == nbd.CMD_BLOCK_STATUS:
            return self._status(request)
        if isinstance(disk, Overlay):
            if request.command == nbd.CMD_WRITE:
                disk.write(request.offset, request.payload)
            elif request.command in _CHANGES:
                disk.zero(request.offset, request.length)
            if request.command == nbd.CMD_FLUSH or (request.command in _CHANGES and request.flags & nbd.CMD_FLAG_FUA):
                disk.flush()
        return self._done(request)

    def _refusal(self, request: _Request) -> int:
        """The protocol's error for a request that is not to be carried out, 0 for one that is."""
        allowed = _ALLOWED_FLAGS.get(request.command)
        if allowed is None or request.flags & ~allowed:
            return nbd.EINVAL
        if request.command in _CHANGES and not isinstance(self._disk, Overlay):
            return nbd.EPERM
        if request.offset + request.length > self._disk.size:
            return nbd.ENOSPC if request.command in (nbd.CMD_WRITE, nbd.CMD_WRITE_ZEROES) else nbd.EINVAL
        if request.command == nbd.CMD_READ and request.length > _REQUEST_LENGTH_MAX:
            return nbd.EINVAL
        if request.command == nbd.CMD_BLOCK_STATUS and not (self._block_status and request.length):
            return nbd.EINVAL
        return 0

    def _done(self, request: _Request) -> bytes:
        if request.command == nbd.CMD_READ and self._structured:
            return nbd.CHUNK.pack(nbd.STRUCTURED_REPLY_MAGIC, nbd.REPLY_FLAG_DONE, nbd.REPLY_NONE, request.cookie, 0)
        return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, request.cookie)

    def _failed(self, request: _Request, error: int) -> bytes:
        if self._structured and request.command in (nbd.CMD_READ, nbd.CMD_BLOCK_STATUS):
            return nbd.ERROR_CHUNK.pack(
                nbd.STRUCTURED_REPLY_MAGIC, nbd.REPLY_FLAG_DONE, nbd.REPLY_ERROR, request.cookie, 6, error, 0
            )
        return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, request.cookie)

    def _data(self, request: _Request, disk: View | Overlay) -> bytearray:
        head = nbd.DATA_CHUNK if self._structured else nbd.SIMPLE_REPLY
        answer = bytearray(head.size + request.length)
        disk.read_into(request.offset, memoryview(answer)[head.size :])
        if self._structured:
            magic, done, kind = nbd.STRUCTURED_REPLY_MAGIC, nbd.REPLY_FLAG_DONE, nbd.REPLY_OFFSET_DATA
            head.pack_into(answer, 0, magic, done, kind, request.cookie, request.length + 8, request.offset)
        else:
            head.pack_into(answer, 0, nbd.SIMPLE_REPLY_MAGIC, 0, request.cookie)
        return answer

    def _status(self, request: _Request) -> bytes:
        limit = 1 if request.flags & nbd.CMD_FLAG_REQ_ONE else _EXTENTS_MAX
        extents = b"".join(
            nbd.EXTENT.pack(extent.length, nbd.STATE_HOLE | nbd.STATE_ZERO if extent.zero else 0)
            for extent in islice(self._disk.extents(request.offset, request.length), limit)
        )
        head = nbd.STATUS_CHUNK.pack(
            nbd.STRUCTURED_REPLY_MAGIC, nbd.REPLY_FLAG_DONE, nbd.REPLY_BLOCK_STATUS, request.cookie, 4 + len(extents), CONTEXT_ID
        )
        return head + extents


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
