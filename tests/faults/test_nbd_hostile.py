"""Clients that mean no good, or are broken: capture does not die, holds little for them, and other disks do not notice."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.capture_tools import MIB, Capture, Client, DiskOf, NbdError, compose, first_difference, journal_entries, raw_image, until
from vmrewind.journal import format as fmt
from vmrewind.nbd import protocol as nbd
from vmrewind.nbd.negotiation import OPTIONS_MAX

T = TypeVar("T")

SIZE = 65 * MIB
QUIET_SIZE = 4 * MIB
LATENCY_MAX_SECONDS = 4.0
"""What the other disk may wait for one read or write. Loose: the tests' machine is shared. A flush waits for the machine's disk."""
HELD_MAX = 3 * MIB + 300 * 1024
"""What a connection can make capture hold, bytes: window, output, replies to come."""


@dataclass
class Bystander:
    """The other disk's client: writes, reads back and flushes until told to stop, and notes what it had to wait."""

    path: Path
    stop: threading.Event = field(default_factory=threading.Event)
    rounds: int = 0
    slowest_seconds: float = 0.0
    failure: Exception | None = None

    def run(self) -> None:
        try:
            with Client(self.path, "vdb") as client:
                while not self.stop.is_set():
                    data = os.urandom(512) * (1 + self.rounds % 8)
                    offset = self.rounds * 4096 % QUIET_SIZE
                    self._timed(client.write, offset, data)
                    assert self._timed(client.read, offset, len(data)) == data
                    client.flush()
                    self.rounds += 1
        except (AssertionError, OSError, NbdError) as failure:
            self.failure = failure

    def _timed(self, act: Callable[..., T], *arguments: Any) -> T:
        began = time.monotonic()
        result = act(*arguments)
        self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)
        return result


class Scene:
    """A capture whose disk vda is under attack while vdb is used."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.bystander = Bystander(capture.socket_path)
        self._thread = threading.Thread(target=self.bystander.run)
        self._open = contextlib.ExitStack()

    def begin(self) -> None:
        self._thread.start()
        until(lambda: self.bystander.rounds > 5 or self.bystander.failure, "the bystander's first rounds")
        # What a first large request leaves behind for good (allocator, code) is not what is measured.
        with self.client() as client:
            client.read(0, MIB)
        until(lambda: self.clients() == (0, 1), "its first client's end")
        self.descriptors = self._descriptors()
        self.resident = self.resident_bytes()

    def end(self) -> None:
        """Everybody goes, and everything is as it was."""
        rounds = self.bystander.rounds
        until(lambda: self.bystander.rounds > rounds + 3 or self.bystander.failure, "the other disk to go on")
        self._open.close()
        until(lambda: self.clients() == (0, 1), "the end of all connections")
        until(lambda: self._descriptors() <= self.descriptors, "their descriptors to be closed")
        self.bystander.stop.set()
        self._thread.join()
        assert self.bystander.failure is None
        assert self.bystander.slowest_seconds < LATENCY_MAX_SECONDS
        assert self.resident_bytes() - self.resident < 24 * MIB, "memory came back"
        with self.client() as client:
            client.write(0, b"alive")
            assert client.read(0, 5) == b"alive"
        disks = compose(list(journal_entries(self.capture.journal)), {0: bytes(SIZE), 1: bytes(QUIET_SIZE)})
        for index, disk in enumerate(self.capture.disks):
            assert first_difference(disks[index], disk.image.read_bytes()) is None, "history says what the image holds"

    def close(self) -> None:
        self.bystander.stop.set()
        self._open.close()
        if self._thread.ident is not None:
            self._thread.join()

    def clients(self) -> tuple[int, int]:
        disks = self.capture.instruct(command="status")["disks"]
        return disks["vda"]["clients"], disks["vdb"]["clients"]

    def _descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.capture.pid}/fd").iterdir()))

    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.capture.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def grown(self) -> int:
        """How much more memory capture has than when nobody attacked, bytes."""
        return self.resident_bytes() - self.resident

    def client(self, *, structured: bool = False) -> Client:
        """A client that stays until the end."""
        client = Client(self.capture.socket_path, structured=structured)
        self._open.callback(client.sock.close)
        return client

    def stranger(self) -> socket.socket:
        """A connection that has said nothing yet."""
        sock = until(lambda: patiently(self._connected), "room among those who wait")
        self._open.callback(sock.close)
        return sock

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        try:
            sock.connect(str(self.capture.socket_path))
        except BlockingIOError:
            sock.close()
            raise
        return sock

    def greeted(self, flags: int = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES) -> socket.socket:
        sock = self.stranger()
        assert len(sock.recv(18, socket.MSG_WAITALL)) == 18
        sock.sendall(struct.pack(">I", flags))
        return sock


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    disks = [DiskOf("vda", raw_image(tmp_path / "a.raw", SIZE)), DiskOf("vdb", raw_image(tmp_path / "b.raw", QUIET_SIZE))]
    with Capture(tmp_path, disks, journal_size=512 * MIB) as capture:
        made = Scene(capture)
        try:
            made.begin()
            yield made
            made.end()
        finally:
            made.close()


def patiently(connect: Callable[[], T]) -> T | None:
    """A connection, or what is had by one; none while the listener's queue is full."""
    try:
        return connect()
    except BlockingIOError:
        return None


def sent_in_full(sock: socket.socket, data: bytes) -> bool:
    """Send until the other side takes no more; whether it took all."""
    sock.setblocking(False)
    view = memoryview(data)
    try:
        while view:
            view = view[sock.send(view) :]
    except BlockingIOError:
        return False
    finally:
        sock.settimeout(30)
    return True


def hung_up(sock: socket.socket) -> bool:
    """Whether the server closes, waited for; what it still says is skipped."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


# -- requests


def test_requests_cut_at_every_byte_are_never_made(scene: Scene) -> None:
    """28 cuts of the header of each kind of request, 40 of a payload: half stay silent, half hang up."""
    cuts = [(command, cut) for command in (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_TRIM) for cut in range(1, 28)]
    cuts += [(nbd.CMD_WRITE, cut) for cut in (*range(28, 48), *range(48, 28 + 8192, 411))]
    silent = []
    for number, (command, cut) in enumerate(cuts):
        client = scene.client()
        client.sock.sendall(client.request(command, 4096, data=b"\xee" * 8192)[:cut])
        if number % 2:
            client.sock.close()
        else:
            silent.append(client)
    until(lambda: scene.clients()[0] == len(silent), "the end of those that hung up")
    assert scene.grown() < len(silent) * 512 * 1024
    with scene.client() as reader:
        assert reader.read(0, 65536) == bytes(65536)
    for client in silent:
        client.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.sock.recv(1)


def test_a_large_write_cut_anywhere_is_in_history_as_far_as_it_is_in_the_image(scene: Scene) -> None:
    """One that is carried out as it arrives may leave a part behind, without an answer, as a power cut on a disk would."""
    for cut in (0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB + 12345):
        with scene.client() as client:
            client.sock.sendall(client.request(nbd.CMD_WRITE, 4096, 3 * MIB)[:28] + os.urandom(cut))
    until(lambda: scene.clients()[0] == 0, "their end")
    image = scene.capture.disks[0].image.read_bytes()
    assert not any(image[4096 + 2 * MIB :])


def test_large_requests_that_are_wrong_get_their_error_and_the_next_is_served(scene: Scene) -> None:
    for structured in (False, True):
        with scene.client(structured=structured) as client:
            data = b"\xab" * (5 * MIB + 3)
            for offset, flags, expected in (
                (SIZE - MIB, 0, errno.ENOSPC),
                ((1 << 64) - 1, 0, errno.ENOSPC),
                (0, nbd.CMD_FLAG_NO_HOLE, errno.EINVAL),
                (SIZE, nbd.CMD_FLAG_FUA, errno.ENOSPC),
            ):
                assert client.error(nbd.CMD_WRITE, offset, data=data, flags=flags) == expected
                assert client.error(nbd.CMD_READ, offset if flags == 0 else SIZE, len(data)) == errno.EINVAL
                assert client.read(0, 5) == bytes(5)
    assert scene.grown() < 2 * HELD_MAX


@pytest.mark.parametrize("structured", [False, True])
def test_a_large_read_that_fails_half_way_never_passes_for_data(scene: Scene, structured: bool) -> None:
    os.truncate(scene.capture.disks[0].image, 3 * MIB + 4096)
    try:
        with scene.client(structured=structured) as client:
            assert client.error(nbd.CMD_READ, 4 * MIB, 2 * MIB) == errno.EIO, "at its first piece: an error as any"
            if structured:
                assert client.error(nbd.CMD_READ, 0, 5 * MIB) == errno.EIO
                assert client.read(0, 3 * MIB) == bytes(3 * MIB)
            client.sock.sendall(client.request(nbd.CMD_READ, 0, 5 * MIB, flags=nbd.CMD_FLAG_DF if structured else 0))
            head = nbd.DATA_CHUNK.size if structured else nbd.SIMPLE_REPLY.size
            assert len(client.receive(head + 3 * MIB)) == head + 3 * MIB
            assert client.hung_up(), "all was promised with the first byte"
    finally:
        os.truncate(scene.capture.disks[0].image, SIZE)


def test_hundred_connections_with_requests_of_64_mib_each(scene: Scene) -> None:
    """Writes that stop half way and reads that nobody takes: what is held for each is bounded, not the request's size."""
    clients = [scene.client(structured=bool(number % 2)) for number in range(100)]
    for number, client in enumerate(clients):
        length = nbd.REQUEST_LENGTH_MAX
        if number % 4 < 2:
            sent_in_full(client.sock, client.request(nbd.CMD_READ, 0, length) * 20)
        else:
            client.sock.sendall(client.request(nbd.CMD_WRITE, number * 4096, length) + b"\x77" * (MIB + MIB // 2))
    rounds = scene.bystander.rounds
    until(lambda: scene.bystander.rounds > rounds + 20 or scene.bystander.failure, "the other disk among them")
    assert scene.grown() < 100 * HELD_MAX
    for client in clients[:6:4]:
        assert client.reply(nbd.REQUEST_LENGTH_MAX)[1] == 0, "and it is served, if it only reads"


@pytest.mark.parametrize("structured", [False, True])
def test_clients_that_never_read_their_replies(scene: Scene, structured: bool) -> None:
    deaf = [scene.client(structured=structured) for _ in range(20)]
    for number, client in enumerate(deaf):
        requests = b"".join(
            client.request(nbd.CMD_READ, 0, (MIB, 100, 2 * MIB)[number % 3])
            + client.request(nbd.CMD_WRITE, 8192 * number, data=b"deaf" * 1000, flags=i % 2)
            + client.request(nbd.CMD_FLUSH)
            for i in range(50)
        )
        sent_in_full(client.sock, requests * 40)
    rounds = scene.bystander.rounds
    until(lambda: scene.bystander.rounds > rounds + 20 or scene.bystander.failure, "the other disk among them")
    assert scene.grown() < len(deaf) * HELD_MAX


def test_a_client_that_goes_byte_by_byte(scene: Scene) -> None:
    """Both ways, a few bytes in the time that others have for whole rounds."""
    with scene.client(structured=True) as client:
        sent = client.request(nbd.CMD_WRITE, 0, data=b"slow") + client.request(nbd.CMD_READ, 0, 4) + client.request(nbd.CMD_FLUSH)
        for byte in sent:
            rounds = scene.bystander.rounds
            client.sock.sendall(bytes([byte]))
            until(lambda rounds=rounds: scene.bystander.rounds > rounds or scene.bystander.failure, "a round of the other disk")
        reply_length = 16 + 28 + 4 + 16
        replies = b"".join(client.sock.recv(1) for _ in range(reply_length))
        assert b"slow" in replies
        client.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.sock.recv(1)


def test_a_client_that_has_much_to_ask_at_once_leaves_others_their_turn(tmp_path: Path) -> None:
    """Both have asked before the server looks: the other disk's single write does not wait for all five thousand."""
    disks = [DiskOf(target, raw_image(tmp_path / target, MIB)) for target in ("vda", "vdb")]
    with (
        Capture(tmp_path, disks) as capture,
        Client(capture.socket_path, "vda") as greedy,
        Client(capture.socket_path, "vdb") as modest,
    ):
        os.kill(capture.pid, signal.SIGSTOP)
        try:
            greedy.sock.sendall(b"".join(greedy.request(nbd.CMD_WRITE, i, data=b"m") for i in range(5000)))
            modest.sock.sendall(modest.request(nbd.CMD_WRITE, 0, data=b"1"))
        finally:
            os.kill(capture.pid, signal.SIGCONT)
        assert modest.reply()[1] == 0
        for _ in range(5000):
            assert greedy.reply()[1] == 0
        disks_in_order = [entry.record.disk for entry in journal_entries(capture.journal) if entry.record.op == fmt.Op.WRITE]
        assert disks_in_order.index(1) < 3000


@pytest.mark.parametrize("structured", [False, True])
def test_every_command_with_every_flag_is_answered_once(scene: Scene, structured: bool) -> None:
    """Also lengths of zero and places near 2^64; what is wrong changes nothing."""
    with scene.client(structured=structured) as client:
        asked: dict[int, tuple[int, int, int]] = {}
        requests = []
        for command in (*range(2), *range(3, 12), 0x7FFF, 0xFFFF):
            for flags in (*range(64), 1 << 8, 1 << 15, 0xFFFF):
                for offset, length in ((0, 0), (8192, 512), (SIZE - 1, 2), ((1 << 64) - 1, 1), ((1 << 64) - 512, 1024)):
                    data = b"\x99" * length if command == nbd.CMD_WRITE else b""
                    cookie = len(asked) + 1
                    readable = flags & ~(nbd.CMD_FLAG_FUA | (nbd.CMD_FLAG_DF if structured else 0)) == 0
                    good_read = command == nbd.CMD_READ and readable and offset == 8192
                    asked[cookie] = (command, offset, length if good_read else 0)
                    requests.append(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length) + data)
        sender = threading.Thread(target=client.sock.sendall, args=(b"".join(requests),))
        sender.start()
        for _ in range(len(asked)):
            magic = client.sock.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL)
            length = 0
            if magic == struct.pack(">I", nbd.SIMPLE_REPLY_MAGIC):
                (peeked,) = struct.unpack(">8xQ", client.sock.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL))
                length = asked[peeked][2]
            cookie, error, _ = client.reply(length)
            command, offset, _ = asked.pop(cookie)
            assert error in (0, errno.EINVAL, errno.ENOSPC, errno.ENOTSUP)
            assert error or offset <= 8192 or command == nbd.CMD_FLUSH, "a flush has no place"
        sender.join()
        assert not asked


def test_what_was_asked_before_a_goodbye_is_answered(scene: Scene) -> None:
    """More than the socket holds, and what waits for stable storage: the connection ends after the last reply."""
    for structured in (False, True):
        with scene.client(structured=structured) as client:
            client.sock.sendall(
                b"".join(client.request(nbd.CMD_READ, 0, length) for length in (MIB, 3 * MIB, MIB))
                + client.request(nbd.CMD_WRITE, 0, data=b"x", flags=nbd.CMD_FLAG_FUA)
                + client.request(nbd.CMD_FLUSH)
                + client.request(nbd.CMD_DISC)
            )
            lengths = {1: MIB, 2: 3 * MIB, 3: MIB}
            answered = set()
            for _ in range(5):
                cookie = _next_cookie(client)
                assert client.reply(lengths.get(cookie, 0))[1] == 0
                answered.add(cookie)
            assert answered == {1, 2, 3, 4, 5}
            assert client.hung_up()


def _next_cookie(client: Client) -> int:
    head = client.sock.recv(16, socket.MSG_PEEK | socket.MSG_WAITALL)
    return int.from_bytes(head[8:16], "big")


# -- handshakes


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return nbd.OPTION.pack(nbd.IHAVEOPT, number, len(data) if length is None else length) + data


def query(name: bytes, *contexts: bytes) -> bytes:
    parts = [len(name).to_bytes(4, "big"), name, len(contexts).to_bytes(4, "big")]
    for context in contexts:
        parts += [len(context).to_bytes(4, "big"), context]
    return b"".join(parts)


def answer_to(sock: socket.socket, number: int) -> int:
    """The reply that ends the answer to an option."""
    while True:
        magic, found, kind, length = nbd.OPTION_REPLY.unpack(sock.recv(20, socket.MSG_WAITALL))
        assert (magic, found) == (nbd.OPTION_REPLY_MAGIC, number)
        if length:
            sock.recv(length, socket.MSG_WAITALL)
        if kind == nbd.REP_ACK or kind >> 31:
            return int(kind)


def test_options_beyond_all_reason(scene: Scene) -> None:
    sock = scene.greeted()
    sock.sendall(option(nbd.OPT_STRUCTURED_REPLY))
    assert answer_to(sock, nbd.OPT_STRUCTURED_REPLY) == nbd.REP_ACK
    long_name = b"n" * 5000
    go = [len(name).to_bytes(4, "big") + name + bytes(2) for name in (long_name, b"v" * 4096, b"\xff\xfe", b"vda\0", b"")]
    cases: list[tuple[int, bytes, int]] = [
        *((nbd.OPT_GO, data, nbd.REP_ERR_UNKNOWN) for data in go),
        *((nbd.OPT_INFO, data, nbd.REP_ERR_UNKNOWN) for data in go),
        (nbd.OPT_GO, b"\xff\xff\xff\xff" + bytes(2), nbd.REP_ERR_INVALID),
        (nbd.OPT_GO, bytes(16 * MIB), nbd.REP_ERR_TOO_BIG),
        (4242, bytes(16 * MIB), nbd.REP_ERR_TOO_BIG),
        (nbd.OPT_LIST, bytes(100_000), nbd.REP_ERR_TOO_BIG),
        (nbd.OPT_SET_META_CONTEXT, query(b"vda", *[b"x:%d" % i for i in range(1000)]), nbd.REP_ACK),
        (nbd.OPT_LIST_META_CONTEXT, query(b"vda", *[b"base:allocation"] * 1000), nbd.REP_ACK),
        (nbd.OPT_SET_META_CONTEXT, query(b"vda", b"y" * 4097), nbd.REP_ERR_INVALID),
        (nbd.OPT_SET_META_CONTEXT, query(b"vda")[:-4] + b"\xff\xff\xff\xff" + bytes(60_000), nbd.REP_ERR_INVALID),
        (nbd.OPT_SET_META_CONTEXT, query(long_name, b"base:allocation"), nbd.REP_ERR_UNKNOWN),
        *((number, b"?" * number, nbd.REP_ERR_UNSUP) for number in (0, 4, 5, 11, 12, 99)),
        (0xFFFFFFFF, b"", nbd.REP_ERR_UNSUP),
    ]
    for number, data, expected in cases:
        sock.sendall(option(number, data))
        assert answer_to(sock, number) == expected, (number, len(data))
    assert scene.grown() < 8 * MIB
    sock.sendall(option(nbd.OPT_GO, b"\0\0\0\3vda\0\0"))
    assert answer_to(sock, nbd.OPT_GO) == nbd.REP_ACK, "after all that it may still begin"


@pytest.mark.parametrize(
    "said",
    [
        struct.pack(">I", 4),
        struct.pack(">I", 0xFFFFFFFF),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack(">I", 1) + bytes(16),
        struct.pack(">I", 1) + option(nbd.OPT_EXPORT_NAME, b"nowhere"),
        struct.pack(">I", 1) + option(nbd.OPT_EXPORT_NAME, b"x" * 4096),
        struct.pack(">I", 1) + option(nbd.OPT_EXPORT_NAME, b"\xc3\x28"),
        struct.pack(">I", 1) + option(nbd.OPT_EXPORT_NAME, b"", 0xFFFFFFFF),
        struct.pack(">I", 1) + option(4000) * (OPTIONS_MAX + 1),
        struct.pack(">I", 1) + option(nbd.OPT_LIST) * (OPTIONS_MAX + 1),
        struct.pack(">I", 1) + option(nbd.OPT_ABORT),
    ],
    ids=["flags", "all-flags", "http", "zeroes", "unknown", "long", "not-utf8", "endless-name", "endless", "endless-list", "abort"],
)
def test_a_handshake_that_cannot_go_on_is_hung_up_on(scene: Scene, said: bytes) -> None:
    for _ in range(20):
        sock = scene.stranger()
        with contextlib.suppress(ConnectionError):
            sock.sendall(said)
        assert hung_up(sock)


def test_an_option_of_four_gibibytes_is_never_held(scene: Scene) -> None:
    socks = [scene.greeted() for _ in range(20)]
    for sock in socks:
        sock.sendall(option(nbd.OPT_GO, b"", 0xFFFFFFFF) + bytes(4 * MIB))
    rounds = scene.bystander.rounds
    until(lambda: scene.bystander.rounds > rounds + 10 or scene.bystander.failure, "the other disk among them")
    assert scene.grown() < 16 * MIB


def at_a_rate(per_second: int, seconds: float, act: Callable[[int], None]) -> None:
    """Call ``act`` with 0, 1, 2, … at that rate."""
    never = threading.Event()
    began = time.monotonic()
    for number in range(int(per_second * seconds)):
        never.wait(max(0.0, began + number / per_second - time.monotonic()))
        act(number)


def test_two_hundred_connects_a_second(scene: Scene) -> None:
    """Some leave at once, some after a word, some after their handshake, and one in eight stays silent."""

    def connect(number: int) -> None:
        match number % 8:
            case 0:
                scene.stranger()
            case 1 | 2 | 3:
                scene.client().sock.close()
            case 4:
                scene.greeted().close()
            case _:
                scene.stranger().close()

    at_a_rate(200, 3, connect)
    assert scene.grown() < 32 * MIB


def test_a_crowd_that_says_nothing_keeps_nobody_out(scene: Scene) -> None:
    with scene.client() as before:
        crowd = [scene.stranger() for _ in range(400)]
        for _ in range(3):
            with scene.client() as late:
                late.write(0, b"late, but served")
                assert before.read(0, 16) == b"late, but served"
        assert hung_up(crowd[0])


# -- the control socket


def test_a_crowd_on_the_control_socket_keeps_nobody_out(scene: Scene) -> None:
    """Neither those who give instructions nor the disks' clients."""
    with contextlib.ExitStack() as crowd:
        for number in range(300):
            sock = crowd.enter_context(until(lambda: patiently(scene.capture.control), "room among those who wait"))
            with contextlib.suppress(ConnectionError):
                sock.sendall(b'{"command": "status"' * (number % 50))
        assert until(lambda: patiently(lambda: scene.capture.instruct(command="status")), "an answer")["ok"]
        with scene.client() as client:
            client.write(0, b"x")
        assert scene.grown() < 16 * MIB


def test_control_clients_that_never_read(scene: Scene) -> None:
    with contextlib.ExitStack() as crowd:
        for line in (b'{"command": "status"}\n', b'{"command": "mark", "name": "x"}\n', b'{"command": "' + b"y" * 60_000 + b'"}\n'):
            for _ in range(10):
                sock = crowd.enter_context(scene.capture.control())
                sent_in_full_or_refused(sock, line * (1 + 80_000 // len(line)))
        assert scene.capture.instruct(command="status")["ok"]
        assert scene.grown() < 16 * MIB


def sent_in_full_or_refused(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        sent_in_full(sock, data)
