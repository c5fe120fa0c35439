"""What is measured: servers of a disk image over NBD, and QEMU's own drivers as the measure of a disk without any server.

A new peer is a class here and a line in ``PEERS``.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

START_SECONDS_MAX: Final = 60
STOP_SECONDS_MAX: Final = 120
_RANDOM_BYTES: Final = 16 << 20
_PIECE: Final = 4 << 10
_GREETING: Final = b"NBDMAGIC"
"""What every NBD server says first."""


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a benchmark keeps its files, and how large they are (bytes)."""

    data: Path
    """Images and journal: the file system that is measured."""
    sockets: Path
    """A short path: a unix socket's has at most 107 bytes."""
    image_size: int
    journal_size: int


class Peer:
    """A disk that loads can be put on. ``uri`` is None for what has no NBD server."""

    name: ClassVar[str]
    title: ClassVar[str]
    image_name: ClassVar[str]
    serves_nbd: ClassVar[bool] = False

    def __init__(self, place: Place) -> None:
        self.place = place
        self.image = place.data / self.image_name

    @property
    def uri(self) -> str | None:
        """The NBD URI of the disk."""
        return None

    @property
    def qemu_img(self) -> list[str]:
        """``qemu-img bench``'s arguments that name the disk and say how it is opened."""
        raise NotImplementedError

    @property
    def processes(self) -> dict[str, int]:
        """{role: process id} of what serves the disk."""
        return {}

    @property
    def files(self) -> list[Path]:
        """What the peer writes to."""
        return [self.image]

    def start(self) -> None:
        """Make the disk ready; the image, with no hole in it, is made if it is not there."""
        if not self.image.exists():
            make_image(self.image, self.place.image_size)

    def stop(self) -> None:
        """End what ``start`` started."""


class Server(Peer):
    """A peer that is a process with a socket. ``start_seconds`` is the time from its creation until it serves."""

    serves_nbd = True
    start_seconds = 0.0

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.log = place.data / f"{self.name}.log"
        self.socket = place.sockets / f"{self.name}.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    @property
    def qemu_img(self) -> list[str]:
        return ["-t", "none", "-f", "raw", self.uri]

    @property
    def processes(self) -> dict[str, int]:
        return {"server": self.process.pid}

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process that was started."""
        assert self._process is not None, "asked after the start"
        return self._process

    def command(self) -> list[str]:
        """What starts the server, in the foreground."""
        raise NotImplementedError

    def start(self) -> None:
        super().start()
        self.socket.unlink(missing_ok=True)
        began = time.monotonic()
        with open(self.log, "ab") as log:
            try:
                self._process = subprocess.Popen(
                    self.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=self.environment()
                )
            except FileNotFoundError as error:
                raise BenchError(f"{self.title}: {error.filename} is not installed; run script/bootstrap") from error
        self.wait_until_serving(began + START_SECONDS_MAX)
        self.start_seconds = time.monotonic() - began

    def environment(self) -> dict[str, str]:
        """The server's environment variables."""
        return dict(os.environ)

    def wait_until_serving(self, deadline: float) -> None:
        """Return when the server greets who connects; raises BenchError if it ends or ``deadline`` (monotonic) passes.

        Connecting alone would not do: qemu-nbd listens before its loop runs, and a SIGTERM that comes between is lost.
        """
        while True:
            with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
                sock.settimeout(max(0.001, deadline - time.monotonic()))
                sock.connect(str(self.socket))
                if sock.recv(len(_GREETING)) == _GREETING:
                    return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.001)
                raise self.failure("ended before it served")
            if time.monotonic() > deadline:
                raise self.failure("does not serve")

    def failure(self, what: str) -> BenchError:
        """An error that shows the end of the server's log."""
        return BenchError(f"{self.title} {what}\n{self.log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


class Nbdkit(Server):
    """nbdkit's ``file`` plugin: threads in C, nothing protected."""

    name = "nbdkit"
    title = "nbdkit file"
    image_name = "nbdkit.raw"

    def command(self) -> list[str]:
        return ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(self.socket), "file", str(self.image)]


class QemuNbd(Server):
    """qemu-nbd: QEMU's block layer behind a socket, nothing protected."""

    name = "qemu-nbd"
    title = "qemu-nbd"
    image_name = "qemu-nbd.raw"

    def command(self) -> list[str]:
        return ["qemu-nbd", "--persistent", f"--socket={self.socket}", "--format=raw", "--cache=writeback", str(self.image)]


class QemuNbdDirect(QemuNbd):
    """qemu-nbd past the page cache (cache=none, aio=native): what reads of data that is not cached are compared with."""

    name = "qemu-nbd-direct"
    title = "qemu-nbd, cache=none"
    image_name = "qemu-nbd-direct.raw"

    def command(self) -> list[str]:
        caching = ["--cache=none", "--aio=native"]
        return ["qemu-nbd", "--persistent", f"--socket={self.socket}", "--format=raw", *caching, str(self.image)]


class Vmrewind(Server):
    """Capture alone, journaling every write to the file system that its image is on. It serves two disks."""

    name = "vmrewind"
    title = "vmrewind"
    image_name = "vmrewind.raw"
    _capture_pid = 0

    @property
    def second_image(self) -> Path:
        """The image of disk vdb."""
        return self.place.data / "vmrewind-vdb.raw"

    @property
    def second_uri(self) -> str:
        """The NBD URI of disk vdb."""
        return f"nbd+unix:///vdb?socket={self.socket}"

    def start(self) -> None:
        if not self.second_image.exists():
            make_image(self.second_image, self.place.image_size)
        super().start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///vda?socket={self.socket}"

    @property
    def journal(self) -> Path:
        """The journal's directory."""
        return self.place.data / "journal"

    @property
    def processes(self) -> dict[str, int]:
        return {"capture": self._capture_pid, "keeper": self.process.pid}

    @property
    def files(self) -> list[Path]:
        return [self.image, self.second_image, *self.journal.glob("*.seg")]

    @property
    def recycling(self) -> bool:
        """Whether every segment has been written once, so that each further write overwrites a recycled one."""
        return not list(self.journal.glob("free-*.seg"))

    def command(self) -> list[str]:
        config = self.place.data / "vmrewind.toml"
        # JSON's strings are TOML's.
        config.write_text(
            'name = "bench"\n[protection]\nenabled = true\n'
            f"journal = {json.dumps(str(self.journal))}\njournal_size = {self.place.journal_size}\n"
            f'[[protection.disk]]\ntarget = "vda"\nimage = {json.dumps(str(self.image))}\n'
            f'[[protection.disk]]\ntarget = "vdb"\nimage = {json.dumps(str(self.second_image))}\n'
        )
        return [sys.executable, "-m", "vmrewind.cli.main", "capture", str(config), "--socket", str(self.socket)]

    def environment(self) -> dict[str, str]:
        state, runtime = self.place.data / "state", self.place.sockets / "run"
        return super().environment() | {"VMREWIND_STATE_DIR": str(state), "VMREWIND_RUNTIME_DIR": str(runtime)}

    def wait_until_serving(self, deadline: float) -> None:
        pipe = self.process.stdout
        assert pipe is not None, "it was asked for"
        if not select.select([pipe], [], [], deadline - time.monotonic())[0]:
            raise self.failure("does not serve")
        line = pipe.readline()
        if not line:
            raise self.failure("ended before it served")
        self._capture_pid = json.loads(line)["pid"]

    def event_log(self) -> list[dict[str, object]]:
        """What happened in the newest run."""
        newest = max((self.place.data / "state/vms/bench/events").glob("*.jsonl"))
        return [json.loads(line) for line in newest.read_text().splitlines()]


class Driver(Peer):
    """A driver of QEMU's, inside ``qemu-img bench`` itself. They share an image: one is used at a time."""

    image_name = "driver.raw"


class RawWriteback(Driver):
    """The raw file as QEMU opens it by default: through the page cache, no server between."""

    name = "raw-writeback"
    title = "raw file, writeback"

    @property
    def qemu_img(self) -> list[str]:
        return ["-t", "writeback", "-f", "raw", str(self.image)]


class RawNone(Driver):
    """The raw file with cache=none,aio=native: what hypervisors use for speed."""

    name = "raw-none"
    title = "raw file, cache=none"

    @property
    def qemu_img(self) -> list[str]:
        return ["-t", "none", "-i", "native", "-f", "raw", str(self.image)]


class BlkLogWrites(Driver):
    """QEMU's filter that logs every write to a file: the nearest that QEMU itself has."""

    name = "blklogwrites"
    title = "QEMU blklogwrites"

    @property
    def _log(self) -> Path:
        return self.place.data / "blklogwrites.log"

    @property
    def files(self) -> list[Path]:
        return [self.image, self._log]

    @property
    def qemu_img(self) -> list[str]:
        options = f"driver=blklogwrites,file.driver=file,file.filename={self.image},log.driver=file,log.filename={self._log}"
        return ["-t", "writeback", "--image-opts", options]

    def start(self) -> None:
        super().start()
        self._log.touch()


PEERS: Final[dict[str, type[Peer]]] = {
    peer.name: peer for peer in (Nbdkit, QemuNbd, QemuNbdDirect, Vmrewind, RawWriteback, RawNone, BlkLogWrites)
}
SUBJECT: Final = Vmrewind.name
"""The peer that ratios are of."""


def make_image(path: Path, size: int) -> None:
    """A file of random bytes in the page cache: no holes, nothing that a file system could compress.

    Written in 4 KiB pieces, so that the page cache holds it in single pages. ext4 since Linux 6.16 caches what is read or
    written in larger pieces in large folios, and a small write into one then walks the state of all its blocks: 4 KiB random
    writes fell to a third for every server alike (perf: ext4_block_write_begin), which would hide the servers' differences.
    """
    if shutil.disk_usage(path.parent).free < size:
        raise BenchError(f"{path}: no room for an image of {size >> 20} MiB; name another --directory")
    with open(path, "wb", buffering=0) as file:
        write_in_pieces(file.fileno(), size)


def write_in_pieces(fd: int, size: int) -> None:
    """Write ``size`` random bytes in 4 KiB pieces, and sync: see ``make_image``."""
    content = memoryview(os.urandom(min(_RANDOM_BYTES, size)))
    for offset in range(0, size, _PIECE):
        at = offset % len(content)
        os.pwrite(fd, content[at : at + min(_PIECE, size - offset)], offset)
    os.fsync(fd)
