"""What capture's tests share: the process and its sockets, an NBD client that says what it is told, the journal as a model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from vmrewind.errors import by_kind
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Record, Segment, records, segment_files
from vmrewind.journal.runs import DiskInfo, ImageIdentity, RunInfo, run_path, write_durably
from vmrewind.nbd import protocol as nbd

UUID = uuid.UUID("1f0c9a5e-3a51-4f6e-9a55-0a7de1a0a1c1")
RUN = 0x6900_0000_1234_5678
MIB = 1 << 20
WAIT_SECONDS = 90.0

T = TypeVar("T")


def until(condition: Callable[[], T], what: str) -> T:
    """Poll until ``condition`` gives something true; fails after a deadline."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)
    return result


# -- the process


@dataclass(frozen=True)
class DiskOf:
    """A disk of an assignment."""

    target: str
    image: Path
    format: str = "raw"
    size: int | None = None
    identity: ImageIdentity | None = None


@dataclass(frozen=True)
class Call:
    """A call as it was traced: when it had returned, except ``send``, which is noted before it is made."""

    name: str
    inode: int


# Runs capture with the calls that order its promises noted in a file, one line each.
_TRACER = """
import os, runpy, socket, sys
trace = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(name, inode): os.write(trace, f"{name} {inode}\\n".encode())
def traced(name, call):
    def wrapper(fd, *rest):
        result = call(fd, *rest)
        note(name, os.fstat(fd).st_ino)
        return result
    return wrapper
for name in ("pwritev", "pwrite", "fdatasync"):
    setattr(os, name, traced(name, getattr(os, name)))
send = socket.socket.send
def traced_send(self, data):
    note("send", 0)
    return send(self, data)
socket.socket.send = traced_send
runpy.run_module("vmrewind.capture", run_name="__main__", alter_sys=True)
"""


class Capture:
    """A capture process of its own, with listening sockets that outlive it, as the keeper has them."""

    def __init__(
        self,
        directory: Path,
        disks: Sequence[DiskOf],
        *,
        journal_size: int = 32 * MIB,
        full: str = "drop-history",
        run: int = RUN,
        trace: bool = False,
        local_history: int | None = None,
    ) -> None:
        self.disks = disks
        self.journal = directory / "journal"
        self.journal_size = journal_size
        self.full = full
        self.local_history = local_history
        self.run = run
        self.events_path = directory / "events.jsonl"
        self.stderr_path = directory / "capture.stderr"
        self.trace_path = directory / "capture.trace" if trace else None
        runtime = Path(os.environ["VMREWIND_RUNTIME_DIR"])
        runtime.mkdir(parents=True, exist_ok=True)
        name = f"{directory.name[:20]}-{run & 0xFFFF:x}"
        self.socket_path = runtime / f"{name}.nbd"
        self.control_path = runtime / f"{name}.control"
        self._listeners = (_listen(self.socket_path), _listen(self.control_path))
        self.process: subprocess.Popen[bytes] | None = None
        self._resuming = False
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process at once if it lives, and close the sockets."""
        if self.process is not None:
            self.process.kill()
            self._reap()
        for listener in self._listeners:
            listener.close()
        for path in (self.socket_path, self.control_path, self.socket_path.with_suffix(".dirty")):
            path.unlink(missing_ok=True)

    def assignment(self) -> dict[str, Any]:
        """What the process is told."""
        return {
            "vm": "web01",
            "uuid": str(UUID),
            "run": fmt.run_name(self.run),
            "first_seq": 1,
            "time_floor_ns": 0,
            "parent": None,
            "disks": [
                {"index": i, "target": d.target, "image": str(d.image), "format": d.format}
                | ({"size": d.size} if d.size is not None else {})
                | ({"identity": asdict(d.identity)} if d.identity is not None else {})
                for i, d in enumerate(self.disks)
            ],
            "nbd_socket": str(self.socket_path),
            "nbd_fd": self._listeners[0].fileno(),
            "control_socket": str(self.control_path),
            "control_fd": self._listeners[1].fileno(),
            "events": str(self.events_path),
            "on_journal_full": self.full,
            "dirty_map": str(self.socket_path.with_suffix(".dirty")),
            "resuming": self._resuming,
        }

    def start(self) -> Self:
        """Start the process and wait until it serves; raises the error that it reports."""
        command = [sys.executable, *self._program(), "--journal", str(self.journal), "--journal-size", str(self.journal_size)]
        command += ["--local-history", str(self.local_history)] if self.local_history is not None else []
        with open(self.stderr_path, "ab") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                pass_fds=[listener.fileno() for listener in self._listeners],
            )
        try:
            self._expect("allotted")
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(self.assignment()).encode() + b"\n")
            self.process.stdin.close()
            self.ready = self._expect("ready")
            self._resuming = True
        except BaseException:
            self.close()
            raise
        return self

    def _program(self) -> list[str]:
        return ["-m", "vmrewind.capture"] if self.trace_path is None else ["-c", _TRACER, str(self.trace_path)]

    def _expect(self, event: str) -> dict[str, Any]:
        message = self.said()
        if message["event"] == "error":
            assert self.process is not None
            self._reap()
            raise by_kind(message["kind"], message["message"], message["hint"])
        assert message["event"] == event
        return message

    def said(self) -> dict[str, Any]:
        """The next line of the process's stdout."""
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"capture died: {self.stderr_path.read_text()}"
        message: dict[str, Any] = json.loads(line)
        return message

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """End the run cleanly; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def _reap(self) -> int:
        assert self.process is not None
        code = self.process.wait(WAIT_SECONDS)
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process = None
        return code

    def uri(self, target: str = "vda") -> str:
        return f"nbd+unix:///{target}?socket={self.socket_path}"

    def control(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(WAIT_SECONDS)
        try:
            sock.connect(str(self.control_path))
        except BaseException:
            sock.close()
            raise
        return sock

    def instruct(self, **request: Any) -> dict[str, Any]:
        with self.control() as sock:
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as lines:
                answer: dict[str, Any] = json.loads(lines.readline())
                return answer

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """The event log, or its events of one name."""
        try:
            lines = self.events_path.read_text().splitlines()
        except FileNotFoundError:
            return []
        parsed = [json.loads(line) for line in lines]
        return [event for event in parsed if name in (None, event["event"])]

    def mark_trace(self, name: str) -> None:
        """Put a word into the trace, between the calls before and those after."""
        assert self.trace_path is not None
        with open(self.trace_path, "ab", buffering=0) as trace:
            trace.write(f"{name} 0\n".encode())

    def traced(self, since: str | None = None) -> list[Call]:
        """What the process asked of the kernel, in order, from the last mark of that name on."""
        assert self.trace_path is not None
        calls = [Call(name, int(inode)) for name, inode in map(str.split, self.trace_path.read_text().splitlines())]
        if since is None:
            return calls
        return calls[max(i for i, call in enumerate(calls) if call.name == since) :]

    def describe_run(self) -> None:
        """Write the run's description, as the start process does, so that ``recover`` finds it."""
        disks = tuple(DiskInfo(i, d.target, d.image.stat().st_size, d.format, str(d.image)) for i, d in enumerate(self.disks))
        info = RunInfo(self.run, None, "web01", str(UUID), "kvm1", time.time_ns(), 1, disks)
        write_durably(run_path(self.journal, self.run), info.to_json())


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(64)
    return sock


def used(journal: Path) -> int:
    """Bytes that its segments really take. Of a living capture: as they were when none was renamed or removed meanwhile."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_blocks * 512 for path in journal.glob("*.seg"))


def raw_image(path: Path, size: int, *, fill: bool = False) -> Path:
    """A sparse image, or one filled with random bytes."""
    with open(path, "wb") as file:
        if fill:
            file.write(os.urandom(size))
        else:
            file.truncate(size)
    return path


# -- the client


class NbdError(Exception):
    """The server answered with an error; ``args[0]`` is the protocol's number."""


class Client:
    """Fixed newstyle by hand. ``structured`` negotiates structured replies."""

    def __init__(self, path: Path, target: str = "vda", *, structured: bool = False, timeout: float = WAIT_SECONDS) -> None:
        self.structured = structured
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(timeout)
        self._cookie = 0
        try:
            self.sock.connect(str(path))
            assert self.receive(18)[:16] == nbd.GREETING.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, 0)[:16]
            self.sock.sendall(struct.pack(">I", nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES))
            if structured:
                self._option(nbd.OPT_STRUCTURED_REPLY, b"")
            self.size, self.flags = 0, 0
            for kind, data in self._option(nbd.OPT_GO, len(target).to_bytes(4, "big") + target.encode() + bytes(2)):
                if kind == nbd.REP_INFO and data[:2] == bytes(2):
                    self.size, self.flags = struct.unpack_from(">QH", data, 2)
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def _option(self, option: int, data: bytes) -> list[tuple[int, bytes]]:
        self.sock.sendall(nbd.OPTION.pack(nbd.IHAVEOPT, option, len(data)) + data)
        answers = []
        while True:
            magic, found, kind, length = nbd.OPTION_REPLY.unpack(self.receive(20))
            assert (magic, found) == (nbd.OPTION_REPLY_MAGIC, option)
            answers.append((kind, self.receive(length)))
            if kind == nbd.REP_ACK:
                return answers
            if kind & 1 << 31:
                raise NbdError(kind)

    def receive(self, length: int) -> bytes:
        """Exactly ``length`` bytes; raises ConnectionError if the server hangs up."""
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(length - len(data))
            if not part:
                raise ConnectionError(f"hung up after {len(data)} of {length} bytes")
            data += part
        return bytes(data)

    def request(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0, cookie: int | None = None
    ) -> bytes:
        """The bytes of a request; without a cookie the next unused one."""
        if cookie is None:
            self._cookie += 1
            cookie = self._cookie
        return nbd.REQUEST.pack(nbd.REQUEST_MAGIC, flags, command, cookie, offset, length or len(data)) + data

    def reply(self, read_length: int = 0) -> tuple[int, int, bytes]:
        """The next reply: (cookie, error, data). ``read_length``: of the read that a simple reply may answer."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == nbd.SIMPLE_REPLY_MAGIC:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            return cookie, error, self.receive(read_length) if read_length and not error else b""
        assert magic == nbd.STRUCTURED_REPLY_MAGIC
        data = b""
        while True:
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
            payload = self.receive(length)
            if kind == nbd.REPLY_ERROR:
                error, message_length = struct.unpack_from(">IH", payload)
                assert length == 6 + message_length
                assert flags & nbd.REPLY_FLAG_DONE
                return cookie, error, b""
            data += payload[8:] if kind == nbd.REPLY_OFFSET_DATA else payload
            if flags & nbd.REPLY_FLAG_DONE:
                return cookie, 0, data
            assert self.receive(4) == struct.pack(">I", nbd.STRUCTURED_REPLY_MAGIC), "nothing comes between a reply's chunks here"

    def do(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> bytes:
        """One request and its reply; raises NbdError."""
        self.sock.sendall(self.request(command, offset, length, data, flags))
        cookie, error, payload = self.reply(length if command == nbd.CMD_READ else 0)
        assert cookie == self._cookie
        if error:
            raise NbdError(error)
        return payload

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.do(nbd.CMD_WRITE, offset, 0, data, flags)

    def read(self, offset: int, length: int) -> bytes:
        return self.do(nbd.CMD_READ, offset, length)

    def flush(self) -> None:
        self.do(nbd.CMD_FLUSH)

    def error(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        """The error that a request is answered with, 0 if it succeeds."""
        try:
            self.do(command, offset, length, data, flags)
        except NbdError as error:
            return int(error.args[0])
        return 0

    def hung_up(self) -> bool:
        """Whether the server closes the connection, waited for, without another word."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True


# -- the journal as a model


@dataclass(frozen=True)
class Entry:
    """A record with its payload."""

    record: Record
    payload: bytes


def journal_entries(journal: Path, run: int = RUN) -> Iterator[Entry]:
    """Every record of a run, payloads verified; fails on a hole in the seqs or a time that does not increase."""
    expected: int | None = None
    last_time_ns = 0
    for file in segment_files(journal, run):
        with Segment(file.path) as segment:
            for batch in segment.batches():
                for record in records(batch):
                    assert expected is None or record.seq == expected, f"hole: {expected} expected, {record.seq} found"
                    assert record.time_ns > last_time_ns, f"record {record.seq}: time does not increase"
                    expected, last_time_ns = record.seq + 1, record.time_ns
                    yield Entry(record, segment.payload(record) if record.has_payload else b"")


def compose(entries: Sequence[Entry], before: Mapping[int, bytes], until_seq: int | None = None) -> dict[int, bytearray]:
    """The disks, by index, after the records up to ``until_seq``: what history says they are."""
    disks = {index: bytearray(content) for index, content in before.items()}
    voided = {entry.record.offset for entry in entries if entry.record.op == fmt.Op.VOID}
    for entry in entries:
        record = entry.record
        if until_seq is not None and record.seq > until_seq:
            break
        if record.seq in voided or record.disk not in disks:
            continue
        disk = disks[record.disk]
        if record.op == fmt.Op.WRITE:
            disk[record.offset : record.offset + record.length] = entry.payload
        elif record.op in (fmt.Op.ZERO, fmt.Op.DISCARD):
            disk[record.offset : record.offset + record.length] = bytes(record.length)
    return disks


def first_difference(one: bytes | bytearray, other: bytes | bytearray) -> int | None:
    """Offset of the first byte that differs, None if nothing does: images are too long for an assertion's explanation."""
    if one == other:
        return None
    if len(one) != len(other):
        return min(len(one), len(other))
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] != other[low:middle]:
            high = middle
        else:
            low = middle
    return low
