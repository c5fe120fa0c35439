"""The segment pool reserves its space at once, reuses the oldest segment, and takes nothing from under a reader."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.capture_tools import MIB, UUID, until
from vmrewind.errors import SpaceError
from vmrewind.journal import format as fmt
from vmrewind.journal.pool import JournalFull, Recycled, Recycling, SegmentPool, segment_size
from vmrewind.journal.reader import Segment, SegmentFile, SegmentHeader, segment_files, unpack_segment_header

RUN = 0x42
GIB = 1 << 30


def always(verdict: Recycling) -> Callable[[SegmentFile], Recycling]:
    return lambda _: verdict


NEVER = always(Recycling.NO)


class Taker:
    """Takes segments 1, 2, 3 … of a run, ten records apart."""

    def __init__(self, pool: SegmentPool, verdict: Callable[[SegmentFile], Recycling] = NEVER, run: int = RUN) -> None:
        self.pool, self.verdict, self.run, self.number = pool, verdict, run, 0

    def take(self) -> int:
        """The size of the next segment, bytes."""
        self.number += 1
        header = SegmentHeader(UUID.bytes, self.run, self.number, 10 * self.number, self.number, 1000, 0)
        try:
            fd, size = self.pool.take(header, self.verdict)
        except JournalFull:
            self.number -= 1
            raise
        os.close(fd)
        return size


def allotted(journal: Path, size: int) -> SegmentPool:
    pool = SegmentPool(journal, size)
    pool.allot()
    return pool


def numbers(journal: Path) -> list[int]:
    return [file.number for file in segment_files(journal)]


def used(journal: Path) -> int:
    """Bytes that the directory's files really take."""
    return sum(path.stat().st_blocks * 512 for path in journal.iterdir())


@pytest.mark.parametrize(
    ("journal_size", "size"),
    [(8 * GIB, 64 * MIB), (512 * MIB, 64 * MIB), (511 * MIB, 63 * MIB), (64 * MIB, 8 * MIB), (8 * MIB, MIB), (MIB, MIB)],
)
def test_small_journals_have_smaller_segments(journal_size: int, size: int) -> None:
    assert segment_size(journal_size) == size


def test_all_space_is_reserved_at_once(tmp_path: Path) -> None:
    allotted(tmp_path, 16 * MIB)
    assert used(tmp_path) >= 16 * MIB


def test_allotting_again_keeps_what_is_there(tmp_path: Path) -> None:
    taker = Taker(allotted(tmp_path, 16 * MIB))
    taker.take()
    inodes = {path.stat().st_ino for path in tmp_path.iterdir()}
    allotted(tmp_path, 16 * MIB)
    assert {path.stat().st_ino for path in tmp_path.iterdir()} == inodes


def test_a_taken_segment_has_its_name_and_header(tmp_path: Path) -> None:
    taker = Taker(allotted(tmp_path, 16 * MIB))
    assert taker.take() == 2 * MIB
    with Segment(tmp_path / fmt.segment_name(RUN, 1)) as segment:
        assert segment.header == SegmentHeader(UUID.bytes, RUN, 1, 10, 1, 1000, 2 * MIB)
        assert list(segment.batches()) == []


def test_when_nothing_may_be_recycled_the_journal_is_full(tmp_path: Path) -> None:
    taker = Taker(allotted(tmp_path, 8 * MIB))
    for _ in range(8):
        taker.take()
    with pytest.raises(JournalFull):
        taker.take()
    assert numbers(tmp_path) == list(range(1, 9))
    assert used(tmp_path) <= 8 * MIB + 65536


def test_the_oldest_is_recycled_and_its_loss_is_told(tmp_path: Path) -> None:
    pool = allotted(tmp_path, 8 * MIB)
    taker = Taker(pool, always(Recycling.DROPS))
    for _ in range(8):
        taker.take()
    oldest = (tmp_path / fmt.segment_name(RUN, 1)).stat().st_ino
    taker.take()
    assert numbers(tmp_path) == list(range(2, 10))
    assert (tmp_path / fmt.segment_name(RUN, 9)).stat().st_ino == oldest, "the same file, warm and allotted"
    assert pool.dropped == [Recycled(RUN, 1, 10)]
    assert used(tmp_path) <= 8 * MIB + 65536


@pytest.mark.parametrize("shipped", [False, True])
def test_others_make_room_before_history_goes(tmp_path: Path, shipped: bool) -> None:
    """The file system has no room for the pool to grow, until others free what they took of it."""
    pool = SegmentPool(tmp_path, 8 * MIB, thin=True)
    pool.allot()
    taker = Taker(pool, always(Recycling.FREE if shipped else Recycling.DROPS))
    taker.take()
    taker.take()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    asked = []

    def make_room() -> bool:
        asked.append(len(asked))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return True

    pool.make_room = make_room
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, limits[1]))
    try:
        taker.take()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert pool.dropped == []
    assert (numbers(tmp_path), asked) == (([2, 3], []) if shipped else ([1, 2, 3], [0]))


def test_what_was_shipped_is_recycled_without_loss(tmp_path: Path) -> None:
    pool = allotted(tmp_path, 8 * MIB)
    taker = Taker(pool, always(Recycling.FREE))
    for _ in range(20):
        taker.take()
    assert pool.dropped == []
    assert numbers(tmp_path) == list(range(13, 21))


def test_history_never_gets_a_hole(tmp_path: Path) -> None:
    taker = Taker(allotted(tmp_path, 8 * MIB), lambda file: Recycling.NO if file.number == 1 else Recycling.DROPS)
    for _ in range(8):
        taker.take()
    with pytest.raises(JournalFull):
        taker.take()
    assert numbers(tmp_path) == list(range(1, 9)), "the oldest must stay, so the second oldest stays too"


def test_older_runs_go_first(tmp_path: Path) -> None:
    pool = allotted(tmp_path, 8 * MIB)
    old = Taker(pool, run=RUN)
    for _ in range(6):
        old.take()
    new = Taker(pool, always(Recycling.DROPS), run=RUN + 1)
    for _ in range(4):
        new.take()
    assert [(file.run, file.number) for file in segment_files(tmp_path)] == [(RUN, n) for n in range(3, 7)] + [
        (RUN + 1, n) for n in range(1, 5)
    ]


def test_a_segment_that_is_being_read_is_left_to_its_reader_and_replaced(tmp_path: Path) -> None:
    pool = allotted(tmp_path, 8 * MIB)
    taker = Taker(pool, always(Recycling.DROPS))
    for _ in range(8):
        taker.take()
    with Segment(tmp_path / fmt.segment_name(RUN, 1)) as reader:
        for _ in range(3):
            taker.take()
        assert numbers(tmp_path) == list(range(4, 12)), "the guest goes on within the quota"
        assert SegmentHeader(UUID.bytes, RUN, 1, 10, 1, 1000, MIB) == reader.header
        assert unpack_segment_header(os.pread(reader.fd, fmt.SEGMENT_HEADER_SIZE, 0), Path("kept")) == reader.header
        assert os.fstat(reader.fd).st_nlink == 0, "its space comes back when the reader is done"
        assert pool.dropped == [Recycled(RUN, number, 10 * number) for number in (1, 2, 3)]
    assert used(tmp_path) <= 8 * MIB + 65536


def test_a_reader_of_everything_that_never_ends_holds_up_nobody(tmp_path: Path) -> None:
    taker = Taker(allotted(tmp_path, 8 * MIB), always(Recycling.DROPS))
    for _ in range(8):
        taker.take()
    readers = [Segment(file.path) for file in segment_files(tmp_path)]
    for _ in range(100):
        taker.take()
    assert numbers(tmp_path) == list(range(101, 109))
    assert used(tmp_path) <= 8 * MIB + 65536
    for number, reader in enumerate(readers, 1):
        with reader:
            assert unpack_segment_header(os.pread(reader.fd, fmt.SEGMENT_HEADER_SIZE, 0), Path("kept")).number == number


def test_without_space_for_another_the_reader_keeps_its_segment_and_the_journal_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = allotted(tmp_path, 8 * MIB)
    taker = Taker(pool, always(Recycling.DROPS))
    for _ in range(8):
        taker.take()

    def no_space(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Segment(tmp_path / fmt.segment_name(RUN, 1)):
        monkeypatch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(JournalFull):
            taker.take()
        assert numbers(tmp_path) == list(range(1, 9))
        assert pool.dropped == []
    taker.take()
    assert numbers(tmp_path) == list(range(2, 10))


def test_a_reader_that_comes_while_its_segment_is_recycled_is_told_so(tmp_path: Path) -> None:
    """It has the file open by its old name and waits for its lock: it must get neither the old nor the new segment."""
    pool = allotted(tmp_path, 8 * MIB)
    path = tmp_path / fmt.segment_name(RUN, 1)
    outcome: list[object] = []

    def read() -> None:
        try:
            with Segment(path) as segment:
                outcome.append(segment.header)
        except FileNotFoundError as error:
            outcome.append(error)

    reader = threading.Thread(target=read)

    taker = Taker(pool, always(Recycling.DROPS))
    for _ in range(8):
        taker.take()
    rename, pwrite = os.rename, os.pwrite

    def rename_with_company(source: Path, target: Path) -> None:
        if Path(source) == path:
            reader.start()
            until(lambda: _waits_for_lock(path) or outcome, "the reader at the lock")
        rename(source, target)

    def late_pwrite(fd: int, data: bytes, offset: int) -> int:
        reader.join(0.2)  # Time to get in where it should not.
        return pwrite(fd, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", rename_with_company)
        patch.setattr(os, "pwrite", late_pwrite)
        taker.take()
    reader.join(60)
    assert len(outcome) == 1
    assert isinstance(outcome[0], FileNotFoundError)


def _waits_for_lock(path: Path) -> bool:
    """Whether somebody is blocked on a lock of the file, as the kernel tells it."""
    inode = f":{path.stat().st_ino} "
    return any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


def test_beyond_the_quota_when_told_to_stretch(tmp_path: Path) -> None:
    pool = allotted(tmp_path, 8 * MIB)
    taker = Taker(pool)
    for _ in range(8):
        taker.take()
    pool.stretch = True
    taker.take()
    assert len(numbers(tmp_path)) == 9
    with pytest.raises(JournalFull):
        for _ in range(100):
            taker.take()
    assert used(tmp_path) <= 16 * MIB + 65536


def test_a_larger_journal_keeps_its_history(tmp_path: Path) -> None:
    small = Taker(allotted(tmp_path, 8 * MIB))
    for _ in range(8):
        small.take()
    pool = allotted(tmp_path, 32 * MIB)
    large = Taker(pool, always(Recycling.DROPS), run=RUN + 1)
    assert [large.take() for _ in range(6)] == [4 * MIB] * 6
    assert pool.dropped == [], "24 MiB beside the old 8 fit the new size"
    large.take()
    assert [item.number for item in pool.dropped] == [1, 2, 3, 4], "just as much history as the new segment needs room"
    assert used(tmp_path) <= 32 * MIB + 65536


def test_a_smaller_journal_shrinks_as_it_is_used(tmp_path: Path) -> None:
    large = Taker(allotted(tmp_path, 32 * MIB))
    for _ in range(8):
        large.take()
    pool = allotted(tmp_path, 8 * MIB)
    small = Taker(pool, always(Recycling.DROPS), run=RUN + 1)
    for _ in range(8):
        small.take()
    assert used(tmp_path) <= 8 * MIB + 65536


def test_an_unreadable_old_segment_is_recycled_like_any_other(tmp_path: Path) -> None:
    pool = allotted(tmp_path, 8 * MIB)
    taker = Taker(pool, always(Recycling.DROPS))
    for _ in range(8):
        taker.take()
    with open(tmp_path / fmt.segment_name(RUN, 1), "r+b") as file:
        file.write(bytes(4096))
    taker.take()
    assert pool.dropped == [Recycled(RUN, 1, None)]
    assert numbers(tmp_path) == list(range(2, 10))


def test_left_overs_of_a_crash_are_used_again(tmp_path: Path) -> None:
    allotted(tmp_path, 8 * MIB)
    (tmp_path / "free-00000000.seg").rename(tmp_path / "free-recycled.seg")
    (tmp_path / "free-extra.seg").write_bytes(b"half made")
    taker = Taker(allotted(tmp_path, 8 * MIB))
    assert [taker.take() for _ in range(8)] == [MIB] * 8
    assert used(tmp_path) <= 8 * MIB + 65536


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """6 MiB of tmpfs."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_no_room_is_found_out_at_the_start_and_nothing_is_left_behind(small_file_system: Path) -> None:
    with pytest.raises(SpaceError, match="no room for a journal of 16 MiB") as caught:
        allotted(small_file_system / "journal", 16 * MIB)
    assert "journal_size" in caught.value.hint
    assert list((small_file_system / "journal").iterdir()) == []


def test_a_journal_that_cannot_fit_takes_nothing_before_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To try, and give back, would leave other users of the file system without room meanwhile."""

    def tried(*_: int) -> None:
        pytest.fail("it allocates")

    monkeypatch.setattr(os, "posix_fallocate", tried)
    with pytest.raises(SpaceError, match="No space left on device"):
        allotted(tmp_path / "journal", 900 << 40)
    assert list((tmp_path / "journal").iterdir()) == []


def test_a_second_start_without_room_keeps_the_first_ones_free_segments(small_file_system: Path) -> None:
    journal = small_file_system / "journal"
    Taker(allotted(journal, 2 * MIB)).take()
    with pytest.raises(SpaceError):
        allotted(journal, 8 * MIB)
    assert len(list(journal.iterdir())) == 2


def test_no_room_beyond_the_quota_means_full(small_file_system: Path) -> None:
    journal = small_file_system / "journal"
    taker = Taker(allotted(journal, 4 * MIB), always(Recycling.DROPS))
    for _ in range(4):
        taker.take()
    (small_file_system / "rest").write_bytes(bytes(int(1.5 * MIB)))
    with Segment(journal / fmt.segment_name(RUN, 1)) as reader:
        with pytest.raises(JournalFull):
            taker.take()
        assert os.pread(reader.fd, 8, 0) == fmt.SEGMENT_MAGIC
    taker.take()


def test_a_limit_on_file_sizes_is_a_lack_of_space(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from vmrewind.journal.pool import SegmentPool; from vmrewind.errors import SpaceError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))\n"
        "try: SegmentPool(Path(sys.argv[1]), 8 << 20).allot()\n"
        "except SpaceError: print('no room')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "journal")], capture_output=True, text=True, check=True)
    assert done.stdout == "no room\n"


def test_the_lock_is_gone_once_the_segment_is_in_place(tmp_path: Path) -> None:
    Taker(allotted(tmp_path, 8 * MIB)).take()
    with open(tmp_path / fmt.segment_name(RUN, 1), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
