"""The capture process's loop: one thread, one epoll, all disks of one VM.

It owns the journal writer and accepts NBD clients on one socket (an export per disk) and instructions on another. Everything
that waits for stable storage is in durability.py; everything that a request costs is in connection.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vmrewind.capture.connection import Connection
from vmrewind.capture.control import ControlClient
from vmrewind.capture.durability import CHECKPOINT_SECONDS, Durability
from vmrewind.capture.image import Image
from vmrewind.capture.policy import FullPolicy
from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.events import EventLog
from vmrewind.journal.pool import JournalFull, SegmentPool
from vmrewind.journal.runs import Head, Position, write_durably
from vmrewind.journal.state import StatePage
from vmrewind.journal.writer import JournalWriter
from vmrewind.nbd import protocol as nbd
from vmrewind.nbd.negotiation import ExportInfo, Handshake, ProtocolError

_TICK_SECONDS: Final = 1.0
_HOLD_RETRY_SECONDS: Final = 0.05
_CLIENTS_MAX: Final = 256
"""Most connections at a time, handshakes included: more are hung up on, so that memory stays bounded."""
_HANDSHAKE_SECONDS_MAX: Final = 10
RESYNC_RANGES_MAX: Final = 1024
RESYNC_BYTES_MAX: Final = 4 << 20
"""Most that one resync instruction may ask for: the guest's requests wait meanwhile."""
_SEND_BUFFER: Final = 4 << 20


@dataclass(slots=True)
class Disk:
    """A protected disk and who is connected to it."""

    image: Image
    export: ExportInfo
    connections: set[Connection] = field(default_factory=set)

    @property
    def index(self) -> int:
        """The disk's number in records."""
        return self.image.index

    @property
    def size(self) -> int:
        """The export's size, bytes."""
        return self.image.size

    @property
    def target(self) -> str:
        """The disk's name, which is also the export's."""
        return self.image.target


def _are_ranges(value: Any, size: int) -> bool:
    """Whether ``value`` is a list of [offset, length] within a disk of ``size`` bytes, not more than a loop's turn should take."""
    if not isinstance(value, list) or len(value) > RESYNC_RANGES_MAX:
        return False
    total = 0
    for pair in value:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)):
            return False
        offset, length = pair
        if offset < 0 or length <= 0 or offset + length > size:
            return False
        total += length
    return total <= RESYNC_BYTES_MAX


def export_of(image: Image) -> ExportInfo:
    """What clients are told of a disk."""
    flags = (
        nbd.FLAG_HAS_FLAGS
        | nbd.FLAG_SEND_FLUSH
        | nbd.FLAG_SEND_FUA
        | nbd.FLAG_SEND_TRIM
        | nbd.FLAG_SEND_WRITE_ZEROES
        | nbd.FLAG_SEND_DF
        | nbd.FLAG_SEND_CACHE
        # A flush on any connection covers all: one thread, one journal, one page cache.
        | nbd.FLAG_CAN_MULTI_CONN
        | (nbd.FLAG_SEND_FAST_ZERO if image.fast_zero else 0)
    )
    return ExportInfo(image.target, image.size, flags, 1, 4096, nbd.REQUEST_LENGTH_MAX)


class _Greeting:
    """A client that is still in its handshake."""

    def __init__(self, sock: socket.socket, handshake: Handshake, deadline_ns: int) -> None:
        self.sock = sock
        self.handshake = handshake
        self.deadline_ns = deadline_ns


@dataclass(slots=True)
class _Refused:
    """What an image refused: records still to be voided, ranges (offset, length) still to be journaled as they are now."""

    disk: Disk
    seqs: list[int]
    ranges: list[tuple[int, int]]


class Server:
    """Serves the disks of one run until told to stop."""

    def __init__(
        self,
        journal: Path,
        pool: SegmentPool,
        writer: JournalWriter,
        state: StatePage,
        clock: Clock,
        images: list[Image],
        events: EventLog,
        policy: FullPolicy,
    ) -> None:
        self.journal = journal
        self.writer = writer
        self.state = state
        self.events = events
        self.policy = policy
        self.clock = clock
        self.pool = pool
        self.disks = {image.target: Disk(image, export_of(image)) for image in images}
        self.batch_payload_max = writer.payload_max
        self.record_length_max = min(fmt.RECORD_LENGTH_MAX, writer.payload_max - fmt.ALIGNMENT)
        self.read_nowait = os.RWF_NOWAIT
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._register(self._wakeup, self._run_posted)
        self._greetings: dict[int, _Greeting] = {}
        self._controls: set[ControlClient] = set()
        self._listeners: list[socket.socket] = []
        self._held: list[Connection] = []
        self.refused: list[_Refused] = []
        """What ``settle`` is to do before anything else is journaled."""
        self._stopping = False
        self._hold_began_ns = 0
        self._ticks = 0
        self.durability = Durability(journal, writer, state, images, events, self.post)

    # -- the loop

    def serve(self) -> None:
        """Run until ``stop`` is called, then end the run cleanly."""
        next_tick = time.monotonic() + _TICK_SECONDS
        while not self._stopping:
            timeout = _HOLD_RETRY_SECONDS if self._held else max(0.0, next_tick - time.monotonic())
            for fd, events in self._epoll.poll(timeout):
                # A handler may have closed what another event of the same poll is about.
                if (handler := self._handlers.get(fd)) is not None:
                    handler(events)
            if self._held:
                self._retry_held()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK_SECONDS
                self._tick()
        self._finish()

    def heed_signals(self) -> None:
        """SIGTERM and SIGINT end the run cleanly from now on; to be called before anybody is told that disks are served."""
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        signal.signal(signal.SIGINT, lambda *_: self.stop())

    def stop(self) -> None:
        """End the run at the next turn of the loop."""
        self._stopping = True
        os.eventfd_write(self._wakeup, 1)

    def post(self, callback: Callable[[], None]) -> None:
        """Run ``callback`` in the loop; may be called from any thread."""
        self._posted.append(callback)
        os.eventfd_write(self._wakeup, 1)

    def _run_posted(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        while self._posted:
            self._posted.popleft()()

    def _tick(self) -> None:
        self._ticks += 1
        step = self.clock.check()
        if step is not None:
            self.events.write("clock.step", step_seconds=step / 1e9)
            self.record_event(fmt.Event.CLOCK, {"step_ns": step})
        self.durability.sync_if_dirty()
        if self._ticks % CHECKPOINT_SECONDS == 0 or self.policy.checkpoint_due(self.writer, self.state):
            self.durability.checkpoint()
        self._declare_dropped()
        if self.refused:
            self.settle()
        now = time.monotonic_ns()
        for greeting in [g for g in self._greetings.values() if g.deadline_ns < now]:
            self._drop_greeting(greeting)

    def _declare_dropped(self) -> None:
        for dropped in self.writer.dropped:
            self.events.write(
                "history.dropped",
                run=fmt.run_name(dropped.run),
                segment=dropped.number,
                first_seq=dropped.first_seq,
                reason="the journal is full and its oldest history was not shipped",
            )
        self.writer.dropped.clear()

    def _register(self, fd: int, handler: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def _unregister(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    # -- clients

    def listen(self, nbd_socket: socket.socket, control_socket: socket.socket | None) -> None:
        """Accept NBD clients, and instructions if there is a socket for them."""
        nbd_socket.setblocking(False)
        self._listeners.append(nbd_socket)
        self._register(nbd_socket.fileno(), lambda _: self._accept(nbd_socket))
        if control_socket is not None:
            control_socket.setblocking(False)
            self._listeners.append(control_socket)
            self._register(control_socket.fileno(), lambda _: self._accept_control(control_socket))

    @property
    def _clients(self) -> int:
        return len(self._greetings) + len(self._controls) + sum(len(d.connections) for d in self.disks.values())

    def _accept_any(self, listener: socket.socket) -> socket.socket | None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return None
        if self._clients >= _CLIENTS_MAX:
            sock.close()
            return None
        sock.setblocking(False)
        return sock

    def _accept(self, listener: socket.socket) -> None:
        if (sock := self._accept_any(listener)) is None:
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        handshake = Handshake({target: disk.export for target, disk in self.disks.items()})
        greeting = _Greeting(sock, handshake, time.monotonic_ns() + _HANDSHAKE_SECONDS_MAX * 10**9)
        fd = sock.fileno()
        self._greetings[fd] = greeting
        self._register(fd, lambda _: self._greet(greeting))
        self._answer(greeting, handshake.greeting)

    def _answer(self, greeting: _Greeting, data: bytes) -> bool:
        try:
            # The replies of a handshake fit any socket buffer unless the client does not read: then it is no client.
            if greeting.sock.send(data) == len(data):
                return True
        except OSError:
            pass
        self._drop_greeting(greeting)
        return False

    def _drop_greeting(self, greeting: _Greeting) -> None:
        fd = greeting.sock.fileno()
        self._unregister(fd)
        self._greetings.pop(fd, None)
        greeting.sock.close()

    def _greet(self, greeting: _Greeting) -> None:
        handshake = greeting.handshake
        answer = b""
        try:
            received = greeting.sock.recv(65536)
            answer = handshake.feed(received)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            received = b""
        if not received:
            self._drop_greeting(greeting)
            return
        if answer and not self._answer(greeting, answer):
            return
        if handshake.closed:
            self._drop_greeting(greeting)
        elif handshake.chosen is not None:
            self._begin_transmission(greeting)

    def _begin_transmission(self, greeting: _Greeting) -> None:
        handshake = greeting.handshake
        assert handshake.chosen is not None, "the handshake is done"
        disk = self.disks[handshake.chosen.name]
        # A client that comes back has given its old connection up: what is still unread there it will send again here,
        # and it must not be carried out after what it sends next.
        for old in list(disk.connections):
            if old.hung_up():
                old.close()
        fd = greeting.sock.fileno()
        self._unregister(fd)
        del self._greetings[fd]
        connection = Connection(self, greeting.sock, disk, structured=handshake.structured, block_status=handshake.block_status)
        disk.connections.add(connection)
        self._register(fd, lambda events: self._ready(connection, events))
        if handshake.buffer:
            connection.preload(handshake.buffer)
            connection.resume()

    @staticmethod
    def _ready(connection: Connection, events: int) -> None:
        if events & select.EPOLLOUT:
            connection.writable()
        else:
            connection.readable()

    def want_writable(self, connection: Connection, wanted: bool) -> None:
        """Watch for room in the client's socket instead of requests, or for requests again."""
        self._epoll.modify(connection.sock.fileno(), select.EPOLLOUT if wanted else select.EPOLLIN)

    @staticmethod
    def peer_is_gone(sock: socket.socket) -> bool:
        """Whether the other end of ``sock`` is closed."""
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    def forget(self, connection: Connection) -> None:
        """A connection is about to close its socket."""
        self._unregister(connection.sock.fileno())
        connection.disk.connections.discard(connection)
        if connection in self._held:
            self._held.remove(connection)

    # -- a journal that can't take more

    def hold(self, connection: Connection, reason: str) -> None:
        """The journal has no room for this client's batch: serve nothing of it until it has."""
        self._epoll.modify(connection.sock.fileno(), 0)
        if not self._hold_began_ns:
            self._hold_began_ns = time.monotonic_ns()
            self.events.write("journal.full", policy=self.policy.name, journal=str(self.journal), reason=reason)
        if connection not in self._held:
            self._held.append(connection)
        self.durability.checkpoint()

    def _retry_held(self) -> None:
        held, self._held = self._held, []
        for connection in held:
            if not connection.closed:
                self.want_writable(connection, connection.has_backlog)
                connection.resume()
        if not self._held:
            seconds = (time.monotonic_ns() - self._hold_began_ns) / 1e9
            self._hold_began_ns = 0
            self.events.write("journal.room", held_seconds=round(seconds, 3))

    # -- events in the journal

    def record_event(self, kind: fmt.Event, content: dict[str, Any]) -> int | None:
        """Write an event record; its seq, or None if the journal has no room now."""
        if self.refused and not self.settle():
            return None
        try:
            seq = self.writer.event(kind, content)
        except JournalFull:
            return None
        self.state.set_applied(self.writer.next_batch - 1)
        return seq

    def image_refused(self, disk: Disk, seqs: list[int], ranges: list[tuple[int, int]], errors: list[int]) -> None:
        """The image refused records of the last batch: void them, and journal what it holds where they went."""
        self.events.write("image.write-failed", disk=disk.target, errors=[os.strerror(e) for e in errors])
        self.refused.append(_Refused(disk, seqs, ranges))
        self.settle()

    def settle(self) -> bool:
        """Write what history still lacks of what the images hold; False if the journal has no room for it.

        Nothing else is journaled before that is done.
        """
        try:
            for refused in list(self.refused):
                if refused.seqs:
                    self.writer.void(refused.seqs, refused.disk.index)
                    refused.seqs = []
                while refused.ranges:
                    # A write that failed may have done a part of its work.
                    self._journal_as_is(refused.disk, *refused.ranges[-1])
                    refused.ranges.pop()
                self.refused.remove(refused)
        except JournalFull:
            return False
        self.state.set_applied(self.writer.next_batch - 1)
        return True

    def _journal_as_is(self, disk: Disk, offset: int, length: int) -> bool:
        """Journal a range as the image holds it; False if the image cannot be read there. Raises JournalFull."""
        try:
            for extent, is_data in disk.image.allocation(offset, length):
                end = offset + extent
                while offset < end:
                    data = disk.image.read(min(end - offset, self.record_length_max), offset) if is_data else None
                    self.writer.write(disk.index, offset, data, end - offset)
                    offset += len(data) if data is not None else end - offset
        except OSError as error:
            self.events.write("image.read-failed", disk=disk.target, offset=offset, error=str(error))
            return False
        return True

    # -- instructions

    def _accept_control(self, listener: socket.socket) -> None:
        if (sock := self._accept_any(listener)) is None:
            return
        client = ControlClient(sock, self.instruct)
        self._controls.add(client)
        fd = sock.fileno()

        def ready(_: int) -> None:
            if not client.readable():
                self._unregister(fd)
                self._controls.discard(client)
                client.close()

        self._register(fd, ready)

    def instruct(self, request: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """Carry out one instruction of the control socket and answer it."""
        match request.get("command"):
            case "status":
                answer({"ok": True, **self.status()})
            case "mark":
                self._mark(request, answer)
            case "resync":
                self._resync(request, answer)
            case command:
                answer({"ok": False, "kind": "usage", "message": f"capture knows no instruction {command!r:.100}"})

    def _resync(self, request: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        """Journal ranges of a disk anew as the image holds them now, and if asked, declare its history level with its image.

        Carried out between two batches, so what is journaled is what the image holds at that place in the order of writes.
        """
        disk = self.disks.get(str(request.get("disk")))
        ranges = request.get("ranges", [])
        if request.get("run") != fmt.run_name(self.writer.run):
            # A resync that outlived its run compares with the wrong history: it must not close a gap of this one.
            answer({"ok": False, "kind": "usage", "message": "this capture serves another run"})
            return
        if disk is None or not _are_ranges(ranges, disk.size):
            answer({"ok": False, "kind": "usage", "message": "resync takes a disk and ranges within it"})
            return
        try:
            if self.refused and not self.settle():
                raise JournalFull("it has no room for what an image has refused")
            for offset, length in ranges:
                if not self._journal_as_is(disk, offset, length):
                    answer({"ok": False, "kind": "image", "message": f"{disk.image.path}: cannot be read at {offset}"})
                    return
            if request.get("close"):
                self.writer.event(fmt.Event.GAP_END, {"resynced": disk.target}, disk.index)
        except JournalFull as full:
            answer({"ok": False, "kind": "space", "message": f"the journal has no room: {full}"})
            return
        self.state.set_applied(self.writer.next_batch - 1)
        answer({"ok": True, "seq": self.writer.next_seq - 1})

    def _mark(self, request: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
        name = request.get("name")
        if not isinstance(name, str) or not 0 < len(name) <= 200 or not name.isprintable() or name != name.strip():
            message = "a bookmark's name is 1 to 200 printable characters, without white space at its ends"
            answer({"ok": False, "kind": "usage", "message": message})
            return
        seq = self.record_event(fmt.Event.BOOKMARK, {"name": name})
        if seq is None:
            answer({"ok": False, "kind": "space", "message": "the journal has no room for a bookmark now"})
            return
        run, time_ns = fmt.run_name(self.writer.run), self.writer.last_time_ns

        class Marked:
            def flushed(self, _: int, error: int) -> None:
                if error:
                    answer({"ok": False, "kind": "failed", "message": f"not on stable storage: {os.strerror(error)}"})
                else:
                    answer({"ok": True, "run": run, "seq": seq, "time_ns": time_ns})

        self.durability.flush(Marked(), 0)

    def status(self) -> dict[str, Any]:
        """What ``vmrewind status`` asks for."""
        return {
            "pid": os.getpid(),
            "run": fmt.run_name(self.writer.run),
            "seq": self.writer.next_seq - 1,
            "time_ns": self.writer.last_time_ns,
            "batch": self.writer.next_batch - 1,
            "batch_checkpointed": self.state.checkpoint,
            "journal_full": bool(self._held),
            "disks": {
                target: {
                    "image": disk.image.path,
                    "size": disk.size,
                    "format": disk.image.format,
                    "clients": len(disk.connections),
                }
                for target, disk in self.disks.items()
            },
        }

    # -- the end

    def _finish(self) -> None:
        """Hang up on everybody, end the run in the journal, sync all, and leave word of what the images hold."""
        for disk in self.disks.values():
            for connection in list(disk.connections):
                connection.close()
        for listener in self._listeners:
            listener.close()
        # The end of a run is worth a segment beyond the quota: without it the next start could not trust the images.
        self.pool.stretch = True
        ended = self.record_event(fmt.Event.STOP, {})
        if ended is None:
            self.events.write("capture.unclean-stop", reason="the journal has no room for the end of the run")
            return
        self._declare_dropped()
        self.durability.finish()
        position = Position(self.writer.run, ended, self.writer.last_time_ns)
        identities = {target: disk.image.identity() for target, disk in self.disks.items()}
        write_durably(self.journal / "head.json", Head(position, identities).to_json())
        self.events.write("capture.stopped", seq=ended)
        for disk in self.disks.values():
            disk.image.close()


def print_event(event: str, **fields: Any) -> None:
    """One JSON line on stdout, for whoever started this process."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, (json.dumps({"event": event, **fields}) + "\n").encode())
