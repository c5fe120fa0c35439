"""The parent's side of the reader process: starts it, asks it, and gives it the bytes of the disks that it wants."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

import msgspec

from vmrewind.errors import FileError, UsageError, VmrewindError, by_kind
from vmrewind.recover.files import wire

_SILENCE_SECONDS: Final = 300.0
"""A library that neither answers nor reads for so long hangs in what a guest wrote."""
_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH")
_LIBRARIES: Final = ("pytsk3", "pyfsext", "pyfsxfs", "pyvslvm")

_A = TypeVar("_A", wire.Volume, wire.Entry, wire.Details, wire.Extents, wire.Piece, wire.Trace)


class Bytes(Protocol):
    """An image as the parent has it."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """The bytes; raises VmrewindError, OSError."""


@dataclass(frozen=True, slots=True)
class ImageOf:
    """An image and its format."""

    image: Bytes
    format: str


@dataclass(frozen=True, slots=True)
class Listing:
    """What is in a directory, in order of names. ``problem``: why there may be more than could be read; empty if that is all."""

    entries: list[wire.Entry]
    problem: str


Disks = Mapping[str, list[ImageOf]]
"""By target: the chain of images, the top one first."""


def require_libraries() -> None:
    """Raises UsageError if what takes file systems apart is not installed."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"files in disks cannot be looked at: {', '.join(missing)} not installed", "pip install 'vmrewind[files]'")


class Reader:
    """A reader process. After an error other than an answer (it died, it hangs) it is gone for good."""

    def __init__(self) -> None:
        require_libraries()
        self._disks: Disks = {}
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(_SILENCE_SECONDS)
        command = [sys.executable, "-P", "-m", "vmrewind.recover.files.reader", str(theirs.fileno())]
        # Not the repository's credentials and passphrases: what a guest wrote may take that process over.
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
        theirs.close()
        self._decoder = msgspec.msgpack.Decoder(wire.FromReader)
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._sock.close()
        self._process.kill()
        self._process.wait()

    def open(self, disks: Disks, *, replay: bool = False) -> list[wire.Volume]:
        """Look at these disks from now on; returns what is on them."""
        self._disks = disks
        layers = {name: [wire.Layer(layer.image.size, layer.format) for layer in chain] for name, chain in disks.items()}
        for _ in self._ask(wire.OpenDisks(layers, replay), wire.Volume):
            pass
        return list(self._ask(wire.GetVolumes(), wire.Volume))

    def lookup(self, volume: str, path: bytes) -> wire.Entry:
        """What is at a path; raises FileError."""
        return self._one(wire.Lookup(volume, path), wire.Entry)

    def entries(self, volume: str, inode: int) -> Listing:
        """What is in a directory."""
        found: list[wire.Entry] = []
        problem = ""
        try:
            found.extend(self._ask(wire.ListDirectory(volume, inode), wire.Entry))
        except FileError as error:
            problem = str(error)
        return Listing(sorted(found, key=lambda entry: entry.name), problem)

    def content(self, volume: str, inode: int) -> Iterator[wire.Piece]:
        """A file's content, but for holes."""
        return self._ask(wire.ReadFile(volume, inode), wire.Piece)

    def details(self, volume: str, inode: int) -> wire.Details:
        """What else is known of an inode; raises FileError."""
        return self._one(wire.GetDetails(volume, inode), wire.Details)

    def extents(self, volume: str, inode: int) -> wire.Extents:
        """Where a file's content lies."""
        return self._one(wire.GetExtents(volume, inode), wire.Extents)

    def trace(self) -> dict[str, list[tuple[int, int]]]:
        """What was read of each disk's top image since ``open``: (offset, length), in order, disjoint."""
        return {trace.disk: trace.ranges for trace in self._ask(wire.GetTrace(), wire.Trace)}

    def _one(self, question: wire.Question, kind: type[_A]) -> _A:
        answers = list(self._ask(question, kind))
        if len(answers) != 1:
            raise self._broken(f"{len(answers)} answers")
        return answers[0]

    def _ask(self, question: wire.Question, kind: type[_A]) -> Iterator[_A]:
        trouble: VmrewindError | OSError | None = None
        finished = False
        try:
            wire.send(self._sock, question)
            while True:
                received = wire.receive(self._sock)
                if received is None:
                    raise self._broken("it ended")
                message = self._decoder.decode(received)
                if isinstance(message, wire.WantData):
                    data = b""
                    try:
                        data = self._read(message)
                    except (VmrewindError, OSError) as error:
                        trouble = error
                    wire.send(self._sock, wire.Data(data))
                elif isinstance(message, wire.Failed):
                    finished = True
                    # What kept the bytes from being read says more than what became of it there.
                    raise trouble if trouble is not None else by_kind(message.kind, message.message, message.hint)
                elif isinstance(message, wire.Done):
                    finished = True
                    if trouble is not None:
                        raise trouble
                    return
                elif isinstance(message, kind):
                    yield message
                else:
                    raise self._broken(f"a {type(message).__name__}")
        except (TimeoutError, ConnectionError, ValueError) as error:
            raise self._broken(str(error)) from error
        finally:
            if not finished:
                # Whoever asks next must not get the rest of this answer.
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def _read(self, wanted: wire.WantData) -> bytes:
        chain = self._disks.get(wanted.disk, [])
        if not 0 <= wanted.layer < len(chain):
            raise self._broken(f"disk {wanted.disk!r}, layer {wanted.layer}")
        image = chain[wanted.layer].image
        if not (wanted.offset >= 0 and 0 <= wanted.length <= wire.READ_BYTES_MAX and wanted.offset + wanted.length <= image.size):
            raise self._broken(f"bytes {wanted.offset}+{wanted.length}")
        return image.read(wanted.offset, wanted.length)

    def _broken(self, what: str) -> FileError:
        self._process.kill()
        code = self._process.wait()
        return FileError(
            f"the process that takes the file system apart failed (exit code {code}): {what}",
            "the file system may be damaged: export the moment and look with other tools (vmrewind export --writable)",
        )
