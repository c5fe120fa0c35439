"""``local_history``: what is shipped and old leaves the journal, nothing else does, and nobody notices."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.capture_tools import MIB, UUID, Capture, Client, DiskOf, first_difference, journal_entries, raw_image, until, used
from tests.history_tools import MadeHistory
from tests.ship_support import VM, WrittenJournal, covered, shipped
from vmrewind.capture.policy import POLICIES, FullPolicy
from vmrewind.errors import SpaceError
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal import pool as pool_module
from vmrewind.journal.pool import JournalFull, Recycling, SegmentPool
from vmrewind.journal.reader import Segment, SegmentHeader, segment_files
from vmrewind.journal.state import StatePage
from vmrewind.repository.repository import Repository

RUN = 7
FREE, DROPS, NO = Recycling.FREE, Recycling.DROPS, Recycling.NO


def thin(journal: Path, size: int = 64 * MIB) -> SegmentPool:
    pool = SegmentPool(journal, size, thin=True)
    pool.allot()
    return pool


def take(pool: SegmentPool, number: int, verdict: Recycling = NO, run: int = RUN) -> None:
    header = SegmentHeader(UUID.bytes, run, number, 10 * number, number, 1000, 0)
    os.close(pool.take(header, lambda _: verdict)[0])


def names(journal: Path) -> list[tuple[int, int]]:
    return [(file.run, file.number) for file in segment_files(journal)]


def test_a_thin_pool_takes_space_as_it_needs_it_and_gives_it_back(tmp_path: Path) -> None:
    pool = thin(tmp_path, 128 * MIB)
    reserve = used(tmp_path)
    assert reserve == 2 * 16 * MIB
    for number in range(1, 9):
        take(pool, number)
    assert used(tmp_path) == 128 * MIB
    with pytest.raises(JournalFull):
        take(pool, 9)
    pool.expire(lambda file: FREE if file.number < 8 else NO, lambda _: True)
    assert names(tmp_path) == [(RUN, 8)]
    assert used(tmp_path) == 16 * MIB + reserve
    for number in range(9, 16):
        take(pool, number)
    assert used(tmp_path) == 128 * MIB
    assert pool.dropped == []


def test_a_journal_that_is_thin_from_now_on_gives_its_space_back_at_the_start(tmp_path: Path) -> None:
    SegmentPool(tmp_path, 128 * MIB).allot()
    assert used(tmp_path) == 128 * MIB
    thin(tmp_path, 128 * MIB)
    assert used(tmp_path) == 32 * MIB


def test_a_file_system_that_others_filled_keeps_no_capture_from_taking_a_dead_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = thin(tmp_path)
    for number in range(1, 4):
        take(pool, number)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool_module.os, "posix_fallocate", full)
    again = thin(tmp_path)
    with pytest.raises(JournalFull):
        take(again, 4)
    take(again, 4, FREE)
    assert names(tmp_path) == [(RUN, 2), (RUN, 3), (RUN, 4)]
    with pytest.raises(SpaceError):
        thin(tmp_path / "new")


def test_only_what_is_shipped_and_old_goes_and_the_oldest_first(tmp_path: Path) -> None:
    pool = thin(tmp_path)
    for number in range(1, 7):
        take(pool, number)
    verdicts = {1: FREE, 2: FREE, 3: DROPS, 4: FREE, 5: FREE, 6: NO}
    pool.expire(lambda file: verdicts[file.number], lambda file: file.number != 2)
    assert [number for _, number in names(tmp_path)] == [2, 3, 4, 5, 6], "the second is too young, and none behind it goes"
    pool.expire(lambda file: verdicts[file.number], lambda _: True)
    assert [number for _, number in names(tmp_path)] == [3, 4, 5, 6], "not shipped: none behind it goes"
    assert pool.dropped == []


def test_a_reader_keeps_what_expires_under_it(tmp_path: Path) -> None:
    pool = thin(tmp_path)
    for number in range(1, 4):
        take(pool, number)
    with Segment(tmp_path / fmt.segment_name(RUN, 1)) as reader:
        before = os.pread(reader.fd, 4096, 0)
        pool.expire(lambda file: FREE if file.number < 3 else NO, lambda _: True)
        assert names(tmp_path) == [(RUN, 3)]
        for number in range(4, 12):
            take(pool, number, FREE)
        assert os.pread(reader.fd, 4096, 0) == before


def test_who_opens_an_expired_segment_sees_that_it_is_gone(tmp_path: Path) -> None:
    pool = thin(tmp_path)
    take(pool, 1)
    take(pool, 2)
    path = tmp_path / fmt.segment_name(RUN, 1)
    other = tmp_path / "other"
    os.link(path, other)
    pool.expire(lambda file: FREE if file.number == 1 else NO, lambda _: True)
    other.rename(path)  # as for one who opened it by its name and waits for the lock
    with pytest.raises(FileNotFoundError, match="recycled"):
        Segment(path)


class Killed(BaseException):
    """At this operation."""


def test_killed_at_any_operation_of_an_expiry_nothing_but_the_expired_is_gone(tmp_path: Path) -> None:
    operations = 0
    for at in range(1, 100):
        journal = tmp_path / f"{at}"
        pool = thin(journal)
        for number in range(1, 7):
            take(pool, number)
        left = at

        def dying(call: object, left_before: list[int]) -> object:
            def wrapper(*arguments: object, **named: object) -> object:
                left_before[0] -= 1
                if left_before[0] == 0:
                    raise Killed
                return call(*arguments, **named)  # type: ignore[operator]

            return wrapper

        count = [left]
        with pytest.MonkeyPatch.context() as patch:
            for name in ("rename", "pwrite", "unlink"):
                patch.setattr(pool_module.os, name, dying(getattr(os, name), count))
            try:
                pool.expire(lambda file: FREE if file.number < 6 else NO, lambda _: True)
            except Killed:
                operations = at
            else:
                assert operations == at - 1 > 5
                return
        live = [number for _, number in names(journal)]
        assert live == list(range(7 - len(live), 7)), "the newest, without a hole"
        for file in segment_files(journal):
            with Segment(file.path) as segment:
                assert segment.header.number == file.number
        again = thin(journal)
        for number in range(7, 12):
            take(again, number, FREE)
            with Segment(journal / fmt.segment_name(RUN, number)) as segment:
                assert segment.header.number == number
        assert used(journal) <= again.quota
    pytest.fail("it never came to its end")


@pytest.fixture
def two_runs(tmp_path: Path) -> Iterator[tuple[Path, StatePage]]:
    """Runs 7, not shipped, and 8, shipped but for its last segment; run 9 is the one that capture writes."""
    for run in (7, 8):
        written = WrittenJournal(tmp_path, run, size=8 * MIB)
        while written.writer.segment_number < 3:
            written.batch([(fmt.Op.WRITE, 0, bytes(MIB // 4))])
    with Segment(segment_files(tmp_path, 8)[-1].path) as last:
        word = {"runs": {fmt.run_name(8): last.header.first_seq - 1}}
    (tmp_path / "shipped.json").write_text(json.dumps(word))
    page = StatePage(tmp_path)
    page.begin(9)
    yield tmp_path, page
    page.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_unshipped_goes_while_anything_shipped_could(policy: str, two_runs: tuple[Path, StatePage]) -> None:
    journal, state = two_runs
    pool = SegmentPool(journal, 8 * MIB)
    pool.allot()
    full = FullPolicy(policy, journal, state)

    def roll(number: int) -> None:
        os.close(pool.take(SegmentHeader(UUID.bytes, 9, number, number, number, 0, 0), full.may_recycle)[0])

    for number in (1, 2):
        roll(number)
    assert [run for run, _ in names(journal)] == [7, 7, 7, 8, 8, 8, 9, 9], "the journal is full now"
    for number in (3, 4):
        roll(number)
    assert [file for file in names(journal) if file[0] != 9] == [(7, 1), (7, 2), (7, 3), (8, 3)]
    assert pool.dropped == []
    if policy == "drop-history":
        roll(5)
        assert [(lost.run, lost.number) for lost in pool.dropped] == [(7, 1)]
    else:
        with pytest.raises(JournalFull):
            roll(5)
        assert (7, 1) in names(journal)


def test_history_stays_whole_while_segments_expire_under_a_reader(tmp_path: Path) -> None:
    made = MadeHistory(tmp_path, {"vda": 1 << 20}, journal_size=64 * MIB)
    made.start()
    chance = random.Random(1)
    while len(made.segment_paths()) < 2:
        made.write("vda", chance.randrange(16) << 16, chance.randbytes(65536))
    last = made.writer.next_seq - 1 if made.writer is not None else 0
    made.ship_runs()
    middle = last // 2
    made.ship(made.run, 1, middle)
    made.ship(made.run, middle + 1, last)
    with made.open() as reading:
        position = resolve(reading, reading.branch(), f"seq:{middle}", ["vda"], made.now_ns)
        view = View.open(reading, "vda", position)
        first = made.segment_paths()[0]
        made.pool.expire(lambda file: FREE if file.path == first else NO, lambda _: True)
        assert made.segment_paths()[0] != first
        assert view.read(0, 1 << 20) == made.disk("vda").states[middle]
    for seq in (1, middle, last):
        with made.open() as afterwards:
            position = resolve(afterwards, afterwards.branch(), f"seq:{seq}", ["vda"], made.now_ns)
            assert View.open(afterwards, "vda", position).read(0, 1 << 20) == made.disk("vda").states[seq]


def test_captures_killed_while_a_living_journal_expires_lose_nothing(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", 4 * MIB)
    url = str(tmp_path / "repo")
    vm = Repository.init(url).vm(VM)
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm/ship.json").write_text('{"disks": ["vda"]}')
    chance = random.Random(2)
    with Capture(tmp_path, [DiskOf("vda", image)], journal_size=32 * MIB, full="block", local_history=0) as capture:
        capture.describe_run()
        command = [sys.executable, "-m", "vmrewind.ship", "--vm", VM, "--journal", str(capture.journal), "--repository", url]
        command += ["--state", str(tmp_path / "vm"), "--runtime", str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as ship:
            try:
                for _ in range(3):
                    with Client(capture.socket_path) as client:
                        for _ in range(60):
                            client.write(chance.randrange(32) * 131072, chance.randbytes(131072))
                        client.flush()
                    before = segment_files(capture.journal)[0].number
                    until(lambda before=before: segment_files(capture.journal)[0].number > before, "an expiry")
                    capture.kill()
                    capture.start()
                assert capture.stop() == 0
            finally:
                ship.terminate()
        entries = list(journal_entries(capture.journal, capture.run))
    records = {record.seq: record for record in shipped(vm, capture.run, 0)}
    assert entries[0].record.seq > 1, "nothing expired"
    last = entries[-1].record.seq
    assert covered(vm, capture.run, 0) == [(1, last)]
    for entry in entries:
        assert records[entry.record.seq].payload == entry.payload
    content = bytearray(4 * MIB)
    for seq in sorted(records):
        record = records[seq]
        if record.op == fmt.Op.WRITE:
            content[record.offset : record.offset + record.length] = record.payload
    assert first_difference(content, image.read_bytes()) is None
    assert used(capture.journal) <= 32 * MIB
