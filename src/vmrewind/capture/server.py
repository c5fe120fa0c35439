"""The capture process's loop: one thread, one epoll, all disks of one VM.

It owns the journal writer and accepts NBD clients on one socket (an export per disk) and instructions on another. Handshakes are in
greeting.py, instructions in instructions.py, everything that waits for stable storage in durability.py, everything that a request
costs in connection.py, what history lacks of the images in arrears.py.
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
from pathlib import Path
from typing import Any, Final

from vmrewind.capture.arrears import Arrears
from vmrewind.capture.bypass import Bypass
from vmrewind.capture.connection import Connection
from vmrewind.capture.control import ControlClient
from vmrewind.capture.dirty import DirtyMap
from vmrewind.capture.disk import Disk, export_of
from vmrewind.capture.durability import Durability
from vmrewind.capture.greeting import Greeter
from vmrewind.capture.image import Image
from vmrewind.capture.instructions import instruct
from vmrewind.capture.policy import FullPolicy
from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.copy_before_write import State
from vmrewind.journal.events import EventLog
from vmrewind.journal.pool import JournalFull, SegmentPool
from vmrewind.journal.runs import Head, Kept, Position, write_durably
from vmrewind.journal.state import StatePage
from vmrewind.journal.writer import JournalWriter
from vmrewind.nbd.negotiation import Handshake

_TICK_SECONDS: Final = 1.0
_EXPIRE_TICKS: Final = 2
_HOLD_RETRY_SECONDS: Final = 0.05
_CONTROLS_MAX: Final = 64
_CLIENTS_MAX: Final = 256
"""Most connections at a time, handshakes included: more are hung up on, so that memory stays bounded."""


class _Nobody:
    """Waits for a flush that nobody asked for."""

    def flushed(self, cookie: int, error: int) -> None:
        """Nothing follows."""


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
        dirty: DirtyMap | None,
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
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._register(self._wakeup, self._run_posted)
        self._greeter = Greeter(self, {target: disk.export for target, disk in self.disks.items()})
        self._controls: dict[ControlClient, int] = {}
        """Who gives instructions, and its socket's number; the one that was heard of last is the last."""
        self._listeners: list[socket.socket] = []
        self._held: list[Connection] = []
        self._reading: dict[Connection, None] = {}
        """Whose reads wait for the disk, in the order of their turns."""
        self._stopping = False
        self._handing_over = False
        self._hold_began_ns = 0
        self._ticks = 0
        self.durability = Durability(journal, writer, state, images, events, pool.segments_max, self.post)
        self.arrears = Arrears(self)
        self.durability.on_lost = self.arrears.note_doubts
        self.durability.images_lack = policy.completes_images
        self.bypass = Bypass(self, dirty)
        pool.make_room = self.give_up_bases

    # -- the loop

    def serve(self) -> None:
        """Run until ``stop`` or ``hand_over`` is called, then end, and the run with it or not."""
        next_tick = time.monotonic() + _TICK_SECONDS
        while not self._stopping:
            self.turn(_HOLD_RETRY_SECONDS if self._held else max(0.0, next_tick - time.monotonic()))
            if self._held:
                self._retry_held()
            if self.bypass.resyncs_now:
                self.bypass.resync()
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + _TICK_SECONDS
                self._tick()
            if self._handing_over and not self.durability.checkpointing:
                self._leave()
                return
        self._finish()

    def turn(self, timeout: float) -> None:
        """Wait for something to happen, for so many seconds at most unless there is work left, and see to all that did."""
        if self._reading or self.bypass.resyncs_now:
            timeout = 0.0
        for fd, events in self._epoll.poll(timeout):
            # A handler may have closed what another event of the same poll is about.
            if (handler := self._handlers.get(fd)) is not None:
                handler(events)
        if self._reading:
            # One at a time: what has come in for other disks is not held up longer than that.
            connection = next(iter(self._reading))
            del self._reading[connection]
            if connection.finish_read():
                self._reading[connection] = None

    def heed_signals(self) -> None:
        """SIGTERM and SIGINT end the run cleanly from now on, SIGUSR1 leaves it to the next capture; to be called before anybody
        is told that disks are served."""
        signal.signal(signal.SIGTERM, lambda *_: self.stop())
        signal.signal(signal.SIGINT, lambda *_: self.stop())
        signal.signal(signal.SIGUSR1, lambda *_: self.post(self.hand_over))

    def stop(self) -> None:
        """End the run at the next turn of the loop."""
        self._stopping, self._handing_over = True, False
        os.eventfd_write(self._wakeup, 1)

    def hand_over(self) -> None:
        """Leave the run to another capture, which goes on with it, once the images are synced: the guest is served until then."""
        print_event("handing-over")
        self._handing_over = True
        self.durability.checkpoint()

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
        if self.writer.deleted and not self.pool.deleted:
            self._journal_deleted()
        self.bypass.tick()
        self.durability.sync_if_dirty()
        self.durability.checkpoint_if_due(self._ticks)
        self._declare_dropped()
        if self.policy.local_history_seconds is not None and self._ticks % _EXPIRE_TICKS == 0 and not self.pool.deleted:
            self.pool.expire(self.policy.may_recycle, self.policy.is_old)
        self.arrears.tick()
        self._greeter.drop_overdue()

    def _journal_deleted(self) -> None:
        # What is flushed from now on must be in the images. Until the last second it was in files without a name.
        self.events.write("journal.deleted", journal=str(self.journal), seq=self.writer.next_seq - 1)
        self.writer.abandon()
        self.bypass.begin("the journal's directory was deleted")
        self.durability.bypass_began()
        self.durability.flush(_Nobody(), 0)

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
        return len(self._greeter) + sum(len(d.connections) for d in self.disks.values())

    @staticmethod
    def _accept_any(listener: socket.socket) -> socket.socket | None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return None
        sock.setblocking(False)
        return sock

    def _accept(self, listener: socket.socket) -> None:
        if (sock := self._accept_any(listener)) is None:
            return
        # Those who connect and say nothing must not keep out a client that comes back.
        if self._clients >= _CLIENTS_MAX and not self._greeter.drop_oldest():
            sock.close()
        else:
            self._greeter.greet(sock)

    def _accept_control(self, listener: socket.socket) -> None:
        if (sock := self._accept_any(listener)) is None:
            return
        if len(self._controls) >= _CONTROLS_MAX:
            self._drop_control(next(iter(self._controls)))
        client = ControlClient(sock, lambda request, answer: instruct(self, request, answer))
        fd = self._controls[client] = sock.fileno()

        def ready(_: int) -> None:
            self._controls[client] = self._controls.pop(client)
            if not client.readable():
                self._drop_control(client)

        self._register(fd, ready)

    def _drop_control(self, client: ControlClient) -> None:
        self._unregister(self._controls.pop(client))
        client.close()

    def watch(self, sock: socket.socket) -> None:
        """A handshake begins."""
        self._register(sock.fileno(), lambda _: self._greeter.readable(sock))

    def unwatch(self, sock: socket.socket) -> None:
        """A handshake is over."""
        self._unregister(sock.fileno())

    def begin_transmission(self, sock: socket.socket, handshake: Handshake) -> None:
        """A client has chosen its export."""
        assert handshake.chosen is not None, "the handshake is done"
        disk = self.disks[handshake.chosen.name]
        # A client that comes back has given its old connection up: what is still unread there it will send again here,
        # and it must not be carried out after what it sends next.
        for old in list(disk.connections):
            if old.hung_up():
                old.close()
        connection = Connection(self, sock, disk, structured=handshake.structured, block_status=handshake.block_status)
        disk.connections.add(connection)
        self._register(sock.fileno(), lambda events: self._ready(connection, events))
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

    def want_nothing(self, connection: Connection) -> None:
        """Watch for the client's end only."""
        self._epoll.modify(connection.sock.fileno(), 0)

    def wait_for_reads(self, connection: Connection) -> None:
        """The connection has reads that wait for the disk: ``finish_read`` is to be called when nothing else is there to do."""
        self._reading.setdefault(connection)

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
        self._reading.pop(connection, None)
        if connection in self._held:
            self._held.remove(connection)

    # -- a journal that can't take more

    @property
    def holding(self) -> bool:
        """Whether a client's requests wait for room in the journal."""
        return bool(self._held)

    @property
    def held_seconds(self) -> float:
        """How long the oldest of them has been waiting."""
        return (time.monotonic_ns() - self._hold_began_ns) / 1e9 if self._hold_began_ns else 0.0

    def hold(self, connection: Connection, reason: str) -> None:
        """The journal has no room for this client's batch: serve nothing of it until it has."""
        self.want_nothing(connection)
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

    def give_up_bases(self) -> bool:
        """Give up the bases that are being made, for the room that what is kept of them takes; False if none takes any.

        What the guest writes, and its history, are worth more: a base can be made again.
        """
        bases = [disk.image.base for disk in self.disks.values() if disk.image.base is not None]
        taking = [base for base in bases if base.state is State.MAKING and base.kept_bytes]
        for base in taking:
            base.fail("the guest needed the room that it took")
        return bool(taking)

    # -- events in the journal

    def record_event(self, kind: fmt.Event, content: dict[str, Any]) -> int | None:
        """Write an event record; its seq, or None if the journal has no room now."""
        if self.bypass.on and kind is not fmt.Event.STOP:
            return None
        if self.arrears.refused and not self.arrears.settle():
            return None
        try:
            seq = self.writer.event(kind, content)
        except JournalFull:
            return None
        self.state.set_applied(self.writer.next_batch - 1)
        return seq

    # -- the end

    def _finish(self) -> None:
        """Hang up on everybody, end the run in the journal, sync all, and leave word of what the images hold."""
        print_event("stopping")
        self._hang_up()
        # The end of a run is worth a segment beyond the quota: without it the next start could not trust the images.
        self.pool.stretch = True
        gap = self.bypass.cause
        ended = self.record_event(fmt.Event.STOP, {}) if self.bypass.declare() else None
        if ended is None:
            self.events.write("capture.unclean-stop", reason="the journal has no room for the end of the run")
            if self.durability.images_too:
                self.durability.finish()
            return
        self._declare_dropped()
        self.durability.finish()
        position = Position(self.writer.run, ended, self.writer.last_time_ns)
        for disk in self.disks.values():
            disk.doubtful |= disk.index in self.durability.lost or self.arrears.unread(disk)
        # Of a disk that is left out the next start knows nothing: it declares a gap, and compares.
        known = [] if gap else [disk for disk in self.disks.values() if not (disk.doubtful or disk.replaced)]
        identities = {disk.target: disk.image.identity() for disk in known}
        cause = f"the journal took no more until the last run's end: {gap}" if gap else None
        kept = {
            disk.target: Kept(base.base.id, disk.image.identity())
            for disk in self.disks.values()
            if (base := disk.image.base) is not None and base.settle()
        }
        write_durably(self.journal / "head.json", Head(position, identities, cause, kept).to_json())
        self.events.write("capture.stopped", seq=ended)
        for disk in self.disks.values():
            disk.image.close()

    def _hang_up(self) -> None:
        """Answer nobody any more: what has no answer is sent again to whoever serves next."""
        for disk in self.disks.values():
            for connection in list(disk.connections):
                connection.close()
        for listener in self._listeners:
            listener.close()

    def _leave(self) -> None:
        """Hang up on everybody and leave journal and images as they are: the run goes on."""
        self._hang_up()
        print_event("handed-over")
        self._declare_dropped()
        self.durability.leave()
        self.events.write("capture.handed-over", pid=os.getpid(), seq=self.writer.next_seq - 1)
        for disk in self.disks.values():
            disk.image.close()


def print_event(event: str, **fields: Any) -> None:
    """One JSON line on stdout, for whoever started this process."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, (json.dumps({"event": event, **fields}) + "\n").encode())
