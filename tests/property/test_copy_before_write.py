"""Copy-before-write: whatever is written in whatever order, a base is the disk as it was when it began."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest

from vmrewind.errors import SpaceError
from vmrewind.journal.copy_before_write import CHUNK, BegunBase, CopyBeforeWrite, State, begun_base, map_path
from vmrewind.journal.holes import KEEP_SIZE, PUNCH_HOLE, fallocate
from vmrewind.journal.identity import image_identity

SIZES = [CHUNK, 3 * CHUNK, 2 * CHUNK + 512, CHUNK + 5 * 4096 + 1536]


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing stays open behind a test."""
    made: list[Disk] = []
    monkeypatch.setattr(Disk, "made", made, raising=False)
    yield
    for disk in made:
        disk.begun.close()
        with suppress(OSError):
            os.close(disk.fd)


class Disk:
    """An image of random content with holes, its base begun, and what it held then."""

    made: ClassVar[list[Disk]]

    def __init__(self, directory: Path, size: int, rng: random.Random) -> None:
        self.size = size
        self.path = directory / "image"
        with self.path.open("wb") as file:
            file.truncate(size)
            for _ in range(rng.randrange(6)):
                offset = rng.randrange(size)
                file.seek(offset)
                file.write(rng.randbytes(min(rng.randrange(1, 2 << 20), size - offset)))
        self.before = self.path.read_bytes()
        self.fd = os.open(self.path, os.O_RDWR)
        self.journal = directory / "journal"
        identity = image_identity(self.fd, self.path)
        CopyBeforeWrite.begin(self.journal, BegunBase("b", 1, "r", "u", "vda", size, "raw", None, 1, identity))
        self.begun = self.open()
        self.taken: dict[int, bytes] = {}
        self.made.append(self)

    def open(self) -> CopyBeforeWrite:
        begun = CopyBeforeWrite.open(self.journal, "vda")
        assert begun is not None
        return begun

    def write(self, rng: random.Random) -> None:
        """A batch as capture carries it out."""
        batch = []
        for _ in range(rng.choice([1, 1, 4, 16])):
            length = min(rng.choice([512, 1536, 4096, 4096, 65536, rng.randrange(1, 1 << 20), 2 * CHUNK]), self.size)
            offset = rng.randrange(self.size - length + 1)
            batch.append((offset - offset % 512, length))
        self.begun.keep(self.fd, batch)
        for offset, length in batch:
            if rng.random() < 0.3:
                fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
            else:
                os.pwrite(self.fd, rng.randbytes(length), offset)

    def take(self, chunk: int) -> None:
        """As whoever makes the base takes a chunk."""
        self.taken[chunk] = self.begun.read(self.fd, chunk)
        self.begun.take(chunk)


@pytest.mark.parametrize("seed", range(60))
def test_what_is_taken_is_what_was_there(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    disk = Disk(tmp_path, rng.choice(SIZES), rng)
    chunks = list(range(-(-disk.size // CHUNK)))
    rng.shuffle(chunks)
    while chunks:
        match rng.randrange(8):
            case 0:
                disk.take(chunks.pop())
            case 1:
                # A death, of either: the files are all that is left.
                disk.begun.close()
                disk.begun = disk.open()
            case _:
                disk.write(rng)
    assert b"".join(disk.taken[chunk] for chunk in sorted(disk.taken)) == disk.before
    assert disk.begun.state is State.MAKING and disk.begun.taken_share == 1.0


def test_what_is_taken_is_kept_no_longer(tmp_path: Path) -> None:
    rng = random.Random(1)
    disk = Disk(tmp_path, 3 * CHUNK, rng)
    os.pwrite(disk.fd, rng.randbytes(disk.size), 0)
    before = os.pread(disk.fd, disk.size, 0)
    old = disk.journal / "base-vda.old"
    disk.begun.keep(disk.fd, [(0, CHUNK)])
    assert old.read_bytes() == before[:CHUNK] and old.stat().st_blocks * 512 >= CHUNK
    disk.take(0)
    assert old.stat().st_blocks == 0
    disk.begun.keep(disk.fd, [(0, CHUNK + 512)])
    assert old.stat().st_blocks * 512 <= 64 << 10, "only the block that is not in the base yet"


def test_a_second_write_to_a_block_keeps_nothing(tmp_path: Path) -> None:
    disk = Disk(tmp_path, CHUNK, random.Random(2))
    disk.begun.keep(disk.fd, [(4096, 4096)])
    os.pwrite(disk.fd, b"new" * 1000, 4096)
    disk.begun.keep(disk.fd, [(4096, 512), (4096 + 512, 3584)])
    disk.take(0)
    assert disk.taken[0] == disk.before


def test_what_cannot_be_kept_fails_the_base_and_nothing_else(tmp_path: Path) -> None:
    disk = Disk(tmp_path, CHUNK, random.Random(3))
    os.close(disk.fd)
    disk.begun.keep(disk.fd, [(0, 4096)])
    assert disk.begun.state is State.FAILED and "offset 0" in disk.begun.reason and os.strerror(errno.EBADF) in disk.begun.reason
    assert begun_base(disk.journal, "vda") is None
    disk.begun.fail("another reason")
    assert "another" not in disk.begun.reason


def test_an_image_that_was_cut_short_fails_it(tmp_path: Path) -> None:
    disk = Disk(tmp_path, CHUNK, random.Random(4))
    os.ftruncate(disk.fd, 4096)
    disk.begun.keep(disk.fd, [(8192, 4096)])
    assert disk.begun.state is State.FAILED
    with pytest.raises(OSError, match="cut short"):
        disk.begun.read(disk.fd, 0)


@pytest.mark.parametrize("harm", ["header", "length", "old"])
def test_files_that_make_no_sense_are_no_base(tmp_path: Path, harm: str) -> None:
    disk = Disk(tmp_path, CHUNK, random.Random(5))
    path = map_path(disk.journal, "vda")
    if harm == "header":
        with path.open("r+b") as file:
            file.seek(20)
            file.write(b"\0\0\0")
    elif harm == "length":
        os.truncate(path, path.stat().st_size - 1)
    else:
        (disk.journal / "base-vda.old").unlink()
    assert CopyBeforeWrite.open(disk.journal, "vda") is None


def test_no_room_for_the_map_is_an_error_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SpaceError, match="no room"):
        Disk(tmp_path, CHUNK, random.Random(6))
    assert CopyBeforeWrite.open(tmp_path / "journal", "vda") is None


def test_a_finished_base_leaves_no_files(tmp_path: Path) -> None:
    disk = Disk(tmp_path, CHUNK, random.Random(7))
    with disk.open() as other:
        other.finish()
    assert disk.begun.state is State.DONE, "whoever has it open sees it"
    assert list(disk.journal.iterdir()) == [] and CopyBeforeWrite.open(disk.journal, "vda") is None
