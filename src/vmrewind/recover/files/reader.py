"""The reader process: takes file systems apart for its parent.

It imports what it needs, then gives up everything else: it can open no file, start no process, and as root it is nobody. What a
guest wrote, and what it might make of the C libraries, stays in here; if one of them dies of it, so does only this process.
"""

from __future__ import annotations

import codecs
import ctypes
import os
import resource
import socket
import sys
from collections.abc import Iterator
from typing import Final, assert_never

import msgspec

from vmrewind.errors import FileError, VmrewindError
from vmrewind.recover.files import wire
from vmrewind.recover.files.blocks import Blocks, Image
from vmrewind.recover.files.qcow2 import Qcow2
from vmrewind.recover.files.tree import FileSystem, lookup
from vmrewind.recover.files.volumes import Found, volumes

_MEMORY_BYTES_MAX: Final = 2 << 30
_CODECS: Final = ("ascii", "latin-1", "unicode_escape", "utf-8", "utf-16-le")
"""Loaded when first used, which is too late."""
_NOBODY: Final = 65534
_NO_NEW_PRIVILEGES: Final = 38


class _Reader:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._images: dict[str, Image] = {}
        self._volumes: dict[str, Found] = {}
        self._plain: set[str] = set()
        self._replay = False

    def answers(self, question: wire.Question) -> Iterator[wire.Answer]:
        match question:
            case wire.OpenDisks(disks, replay):
                self._open(disks, replay)
            case wire.GetVolumes():
                for volume in self._volumes.values():
                    kind = volume.kind if volume.system is None else volume.system.kind
                    yield wire.Volume(
                        volume.name,
                        volume.blocks.size,
                        volume.description,
                        kind,
                        volume.label,
                        volume.notes,
                        volume.system is not None,
                    )
            case wire.Lookup(volume, path):
                yield lookup(self._system(volume), path)
            case wire.ListDirectory(volume, inode):
                yield from self._system(volume).entries(inode)
            case wire.ReadFile(volume, inode):
                yield from self._system(volume).content(inode)
            case wire.GetDetails(volume, inode):
                xattrs, device = self._system(volume).details(inode)
                yield wire.Details(xattrs, device)
            case wire.GetExtents(volume, inode):
                yield self._extents(volume, inode)
            case wire.GetTrace():
                for disk, image in self._images.items():
                    yield wire.Trace(disk, _union(image.touched))
            case _:
                assert_never(question)

    def _extents(self, volume: str, inode: int) -> wire.Extents:
        ranges, place = self._system(volume).extents(inode), self._volumes[volume].place
        # In qcow2 the disk is not where its guest sees it, and a journal that is counted in may hold content.
        if ranges is None or place is None or place[0] not in self._plain or self._replay:
            return wire.Extents(None, [])
        return wire.Extents(place[0], [(place[1] + offset, length) for offset, length in ranges])

    def _system(self, name: str) -> FileSystem:
        volume = self._volumes.get(name)
        if volume is None or volume.system is None:
            raise FileError(f"{name}: there is no file system that can be read")
        return volume.system

    def _open(self, disks: dict[str, list[wire.Layer]], replay: bool) -> None:
        self._images.clear()
        self._replay = replay
        self._plain = {disk for disk, layers in disks.items() if layers[0].format != "qcow2"}
        composed: dict[str, Blocks] = {}
        for disk, layers in disks.items():
            whole: Blocks | None = None
            for number in reversed(range(len(layers))):
                layer = layers[number]
                image = Image(self._sock, disk, number, layer.size)
                whole = Qcow2(image, whole) if layer.format == "qcow2" else image
                if number == 0:
                    self._images[disk] = image
            assert whole is not None, "a disk has an image"
            composed[disk] = whole
        self._volumes = {volume.name: volume for volume in volumes(composed, replay=replay)}


def _union(ranges: set[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if joined and offset <= (last := sum(joined[-1])):
            joined[-1] = (joined[-1][0], max(last, offset + length) - joined[-1][0])
        else:
            joined.append((offset, length))
    return joined


def _give_up_everything() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    for limit, value in (
        (resource.RLIMIT_AS, _MEMORY_BYTES_MAX),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def main() -> None:
    """Answer questions until the parent goes."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    for name in _CODECS:
        codecs.lookup(name)
    _give_up_everything()
    reader = _Reader(sock)
    decoder = msgspec.msgpack.Decoder(wire.Question)
    while (message := wire.receive(sock)) is not None:
        last: wire.Done | wire.Failed = wire.Done()
        try:
            for answer in reader.answers(decoder.decode(message)):
                wire.send(sock, answer)
        except VmrewindError as error:
            last = wire.Failed(str(error), error.hint, error.kind)
        except Exception as error:  # noqa: BLE001 - what a hostile disk leads to
            last = wire.Failed(f"what is there cannot be understood: {' '.join(repr(error).split())}", "", FileError.kind)
        wire.send(sock, last)


if __name__ == "__main__":
    main()
