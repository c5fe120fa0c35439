"""Requests against a server with a small image and a journal, in this process, turn by turn.

The server is reset between inputs by a request of its own, so history goes on; after each input it is compared with the image.
"""

from __future__ import annotations

import socket
import struct
import time
import uuid
from pathlib import Path
from types import ModuleType
from typing import Final

from tests.capture_tools import Entry, compose, journal_entries
from tests.fuzz.requests import LARGE, SIZE, Model, Reply, stream_of, understood
from tests.fuzz.stream import Choices, pieces
from vmrewind.capture import connection, greeting, reading, replies, sending
from vmrewind.capture.__main__ import prepare
from vmrewind.capture.server import Server
from vmrewind.journal import format as fmt
from vmrewind.journal.pool import SegmentPool
from vmrewind.journal.reader import Segment, records, segment_files
from vmrewind.nbd import protocol as nbd

_INPUTS_PER_SERVER = 512
_SEGMENTS_PER_SERVER = 5
_JOURNAL_SIZE = 8 << 20
_WAIT_SECONDS = 20


LIMITS: Final[list[tuple[ModuleType, str, int]]] = [
    (connection, "LARGE", LARGE),
    (connection, "WINDOW", LARGE // 2),
    (sending, "PIECE", LARGE),
    (sending, "_OUTPUT", 512),
    (connection, "OUTPUT_MAX", 4096),
    (connection, "BATCH_REQUESTS_MAX", 8),
    (connection, "_BATCHES_A_TURN", 2),
    (connection, "EXTENTS_MAX", 2),
    (replies, "EXTENTS_MAX", 2),
    (reading, "_WAITING_MAX", 4),
    (reading, "_WAITING_BYTES_MAX", 8192),
    (greeting, "_SEND_BUFFER", 4608),
]
"""The server's limits, made small, so that inputs of some hundred bytes reach what takes megabytes otherwise."""


class Target:
    """A server, and where it keeps its files; ``fuzz`` is called with one input after another."""

    def __init__(self, directory: Path) -> None:
        for module, name, value in LIMITS:
            setattr(module, name, value)
        self._directory = directory
        self._served = 0
        self._generation = 0
        self._server = self._start()

    def _start(self) -> Server:
        self._generation += 1
        home = self._directory / str(self._generation)
        home.mkdir()
        self._image = home / "image"
        with open(self._image, "wb") as image:
            image.truncate(SIZE)
        self._journal = home / "journal"
        self._socket = home / "nbd"
        self._history = _History(self._journal)
        pool = SegmentPool(self._journal, _JOURNAL_SIZE)
        pool.allot()
        return prepare(
            self._journal,
            pool,
            {
                "vm": "fuzz",
                "uuid": str(uuid.UUID(int=1)),
                "run": fmt.run_name(1),
                "first_seq": 1,
                "time_floor_ns": 0,
                "parent": None,
                "disks": [{"index": 0, "target": "vda", "image": str(self._image), "format": "raw"}],
                "nbd_socket": str(self._socket),
                "events": str(home / "events"),
                "on_journal_full": "drop-history",
            },
        )

    def close(self) -> None:
        """End the server; fails if its whole history is not what the image holds."""
        self._server.stop()
        self._server.serve()
        entries = list(journal_entries(self._journal, 1))
        assert entries[0].record.seq == 1, "some of this history was dropped"
        assert compose(entries, {0: bytes(SIZE)})[0] == self._image.read_bytes(), "history is not what the image holds"
        for path in sorted(self._image.parent.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self._image.parent.rmdir()

    def fuzz(self, data: bytes) -> None:
        """One input; raises AssertionError if the server's doing is not lawful."""
        self._talk(b"", reset=True)
        self._talk(data)
        self._served += 1
        if self._served % _INPUTS_PER_SERVER == 0 or self._server.writer.segment_number >= _SEGMENTS_PER_SERVER:
            self.close()
            self._server = self._start()

    def _talk(self, data: bytes, *, reset: bool = False) -> None:
        choices = Choices(data)
        mode = choices.number()
        seed = choices.number()
        structured, status, lazy = bool(mode & 1), mode & 3 == 3, bool(mode & 4)
        if reset:
            stream = bytearray(nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE_ZEROES, 0, 0, SIZE))
        else:
            stream = stream_of(choices)
        requests, closing = understood(stream)
        model = Model(requests, self._image.read_bytes() if reset else bytes(SIZE), structured=structured, status=status)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._socket))
            sock.setblocking(False)
            talk = _Talk(self._server, sock)
            talk.shake_hands(structured=structured, status=status)
            for piece in pieces(bytes(stream), seed):
                talk.say(piece, lazy=lazy)
            if lazy and any(request.command == nbd.CMD_FLUSH or request.flags & nbd.CMD_FLAG_FUA for request in requests):
                talk.let_it_flush()
            answers = talk.hear_out(model, closing=closing)
        content = self._image.read_bytes()
        model.judge(answers, content)
        assert self._history.catch_up() == content, "history is not what the image holds"


class _History:
    """What the journal says that the image holds, followed from input to input."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._content = bytearray(SIZE)
        self._number = 0
        self._next: tuple[int, int] | None = None

    def catch_up(self) -> bytearray:
        """The image according to every record up to now."""
        entries = []
        for file in segment_files(self._journal, 1):
            if file.number < self._number:
                continue
            with Segment(file.path) as segment:
                since = self._next if file.number == self._number and self._next else ()
                self._number = file.number
                for batch in segment.batches(*since):
                    entries += [Entry(record, segment.payload(record) if record.has_payload else b"") for record in records(batch)]
                    self._next = (batch.end, batch.number + 1)
        self._content = compose(entries, {0: self._content})[0]
        return self._content


class _Talk:
    """One connection, driven from both ends."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._said = bytearray()
        self._ended = False

    def shake_hands(self, *, structured: bool, status: bool) -> None:
        options = b""
        awaited = 18
        if structured:
            options += nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_STRUCTURED_REPLY, 0)
            awaited += 20
        if status:
            query = struct.pack(">I3sII15s", 3, b"vda", 1, 15, nbd.BASE_ALLOCATION.encode())
            options += nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_SET_META_CONTEXT, len(query)) + query
            awaited += 20 + 4 + 15 + 20
        options += nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, 3) + b"vda"
        self._sock.sendall(struct.pack(">I", 3) + options)
        deadline = time.monotonic() + _WAIT_SECONDS
        while len(self._said) < awaited + 10:
            self._server.turn(0)
            self._listen()
            assert time.monotonic() < deadline, "the handshake hangs"
        assert len(self._said) == awaited + 10
        self._said.clear()

    def say(self, data: bytes, *, lazy: bool) -> None:
        """Send all of it, listening only if that is needed, or if the client is not ``lazy``."""
        view = memoryview(data)
        deadline = time.monotonic() + _WAIT_SECONDS
        while view and not self._ended:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                self._listen()
            except (BrokenPipeError, ConnectionResetError):
                self._listen()
                return
            self._server.turn(0)
            if not lazy:
                self._listen()
            assert time.monotonic() < deadline, "the server takes no more"

    def let_it_flush(self) -> None:
        """Listen to nothing while what is asked for reaches stable storage, so that its reply meets others on the way."""
        for _ in range(3):
            self._server.turn(0.005)

    def hear_out(self, model: Model, *, closing: bool) -> dict[int, Reply]:
        """Every reply; what is said behind the last, or instead of it, is not lawful."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            self._server.turn(0)
            self._listen()
            answers, taken = model.replies(bytes(self._said))
            if len(answers) == model.awaited and self._ended == closing:
                break
            assert not self._ended, "the server hung up"
            assert time.monotonic() < deadline, f"{model.awaited - len(answers)} requests are not answered"
            if not self._said[taken:]:
                self._server.turn(0.01)
        for _ in range(2):
            self._server.turn(0)
            self._listen()
        assert self._ended == closing
        assert len(self._said) == taken, "more was said than asked for"
        return answers

    def _listen(self) -> None:
        try:
            while not self._ended:
                part = self._sock.recv(65536)
                self._said += part
                self._ended = not part
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self._ended = True
