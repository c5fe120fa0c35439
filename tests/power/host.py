"""A whole host loses its power: a Linux of its own, whose disk notes every write and every flush, with the real capture on it.

``python -m tests.power.host`` is what runs on that host. Its guest works in rounds, made from a seed, so that whoever knows the
seed knows every request. After a round's last answer the round's number is written past the end of the file system, straight to
the disk: where that stands in the disk's log, all of the round was answered and nothing of the next one but one was sent.

The log is the one of QEMU's ``blklogwrites``, in the format of Linux's dm-log-writes: a sector with the superblock, then of every
operation a sector with its head, and its data (Documentation/admin-guide/device-mapper/log-writes.rst).
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import select
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.capture_tools import MIB, Capture, DiskOf
from tests.power import SECTOR
from tests.power.guest import GuestDisk

TARGETS = ("vda", "vdb")
IMAGE_BYTES = MIB
JOURNAL_BYTES = 16 * MIB
FILE_SYSTEM_BYTES = 48 * MIB
DISK_BYTES = FILE_SYSTEM_BYTES + MIB
"""The mark's sector comes right behind the file system."""

_MAGIC = 0x6A736677736872
_SUPERBLOCK = struct.Struct("<QQQL")
_HEAD = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD = 1, 2, 4


# -- the guest's work, the same wherever it is made from the same seed


def image_content(seed: int, target: str) -> bytes:
    """What an image holds before the guest's first write."""
    return random.Random(f"{seed} {target}").randbytes(IMAGE_BYTES)


class Work:
    """The guest's disks, and its requests round by round."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        cookies = itertools.count(1)
        self.disks = [GuestDisk(target, image_content(seed, target), cookies, heavy=False) for target in TARGETS]

    def send_round(self, *, really: bool = True) -> None:
        """Make the next round's requests, noted as sent; ``really`` sends them."""
        for disk in self.disks:
            requests = [disk.make(self._rng) for _ in range(self._rng.randrange(1, 5))]
            if really:
                disk.send(requests)

    def finish_round(self) -> None:
        """Wait until all is answered."""
        poll = select.poll()
        while waiting := [disk for disk in self.disks if disk.unanswered or not disk.greeted]:
            for disk in waiting:
                assert disk.sock is not None
                poll.register(disk.sock, select.POLLIN)
            assert poll.poll(60_000), "no answer for a minute"
            for disk in waiting:
                disk.receive()
                disk.send()

    def answered_round(self) -> None:
        """Take the round for answered."""
        for disk in self.disks:
            while disk.unanswered:
                _, request = disk.unanswered.popitem()
                disk.note_answer(request)


def at_cut(seed: int, rounds: int) -> list[GuestDisk]:
    """The guest's disks after so many rounds were answered, and perhaps a part of the next one."""
    work = Work(seed)
    for _ in range(rounds):
        work.send_round(really=False)
        work.answered_round()
    work.send_round(really=False)
    return work.disks


def main() -> None:
    """Run capture and its guest on the host's disk, whose file system is mounted at ``/disk``; arguments: seed and rounds."""
    seed, rounds = map(int, sys.argv[1:])
    mark = mmap.mmap(-1, SECTOR)
    device = os.open("/dev/vda", os.O_WRONLY | os.O_DIRECT)
    disks = [DiskOf(target, Path("/disk") / f"{target}.raw") for target in TARGETS]
    capture = Capture(Path("/disk"), disks, journal_size=JOURNAL_BYTES)
    capture.events_path, capture.stderr_path = Path("/tmp/events"), Path("/tmp/stderr")
    capture.describe_run()
    with capture:
        work = Work(seed)
        for disk in work.disks:
            disk.connect(str(capture.socket_path))
        work.finish_round()
        for n in range(rounds + 1):
            if n:
                work.send_round()
                work.finish_round()
            mark[:8] = n.to_bytes(8, "little")
            os.pwritev(device, [mark], FILE_SYSTEM_BYTES)
        # The log's superblock knows of everything before the last flush.
        os.sync()
        sys.stdout.write("WORK DONE\n")


# -- the disk


@dataclass(frozen=True, slots=True)
class Logged:
    """An operation of the disk. ``flush``: everything before it is on stable storage; ``fua``: it is itself."""

    offset: int
    data: bytes
    flush: bool
    fua: bool

    @property
    def mark(self) -> int | None:
        """The number of the round that was answered before, if this says so."""
        is_mark = self.data and self.offset == FILE_SYSTEM_BYTES
        return int.from_bytes(self.data[:8], "little") if is_mark else None


def read_log(path: Path) -> Iterator[Logged]:
    """Every operation, in the order in which the disk got them."""
    with open(path, "rb") as log:
        magic, version, count, sector_size = _SUPERBLOCK.unpack(log.read(_SUPERBLOCK.size))
        assert (magic, version, sector_size) == (_MAGIC, 1, SECTOR)
        log.seek(SECTOR)
        for _ in range(count):
            sector, sectors, flags, _ = _HEAD.unpack_from(log.read(SECTOR))
            assert not flags & ~(_FLUSH | _FUA), f"flags {flags:#x}: the disk offers neither discards nor zeroes"
            data = log.read(sectors * SECTOR)
            assert len(data) == sectors * SECTOR
            yield Logged(sector * SECTOR, data, bool(flags & _FLUSH), bool(flags & _FUA))


class LossyDisk:
    """A disk with a volatile write cache whose power is cut, again and again, always later in its log."""

    def __init__(self, before: bytes, log: list[Logged]) -> None:
        self._log = log
        self._stable = bytearray(before)
        self._flushed = 0
        """The operations before this one are in ``_stable``."""

    def cut(self, end: int, rng: random.Random) -> tuple[bytearray, int]:
        """What the disk holds if the power goes after ``end`` operations, and how many of them were lost, wholly or in part.

        What was flushed is there. Of each later operation all, nothing, or some of its sectors.
        """
        flush = next((i for i in range(end - 1, self._flushed - 1, -1) if self._log[i].flush), self._flushed)
        for done in self._log[self._flushed : flush]:
            self._stable[done.offset : done.offset + len(done.data)] = done.data
        self._flushed = flush
        content = bytearray(self._stable)
        whole, torn = rng.choice(((0.0, 0.0), (0.5, 0.3), (0.5, 0.0), (0.9, 0.1)))
        lost = 0
        for done in self._log[flush:end]:
            luck = 0.0 if done.fua else rng.random()
            if done.fua or luck < whole:
                content[done.offset : done.offset + len(done.data)] = done.data
                continue
            lost += 1 if done.data else 0
            if luck < whole + torn:
                for at in range(0, len(done.data), SECTOR):
                    if rng.random() < 0.5:
                        content[done.offset + at : done.offset + at + SECTOR] = done.data[at : at + SECTOR]
        return content, lost


if __name__ == "__main__":
    main()
