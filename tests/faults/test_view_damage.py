"""Every byte that a view gives is verified when it is read, however little of a record that is, and whatever was read before."""

from __future__ import annotations

import fcntl
import gc
import os
import random
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fault_tools import no_descriptors_left, open_descriptors
from tests.history_tools import MadeHistory
from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.history.gathering import gather
from vmrewind.history.sources import _DESCRIPTORS_SPARE
from vmrewind.history.view import View
from vmrewind.journal.format import Op
from vmrewind.journal.reader import Segment, records
from vmrewind.recover.export_server import _CLIENTS_MAX, _THREADS

K = 1024
SIZE = 256 * K
NEIGHBOURS = 8
LONG_AT, LONG = 64 * K + 512, 96 * K + 100
SHORT_AT, SHORT = 200 * K, 10 * K


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    """Neighbours on the disk that are neighbours in a segment, neighbours there alone, zeroes, a long record with a part of a block
    at its end, a short one."""
    made = MadeHistory(tmp_path, {"vda": SIZE})
    made.start()
    content = random.Random(1).randbytes
    made.batch([(Op.WRITE, "vda", n * 4 * K, content(4 * K)) for n in range(NEIGHBOURS)])
    made.batch([(Op.WRITE, "vda", at, content(4 * K)) for at in (40 * K, 48 * K)] + [(Op.ZERO, "vda", 56 * K, 4 * K)])
    made.tick()
    made.write("vda", LONG_AT, content(LONG))
    made.tick()
    made.write("vda", SHORT_AT, content(SHORT))
    made.tick()
    made.write("vda", 250 * K, content(512))  # A damaged last record would be taken for a torn tail.
    return made


@contextmanager
def damaged(made: MadeHistory, offset: int) -> Iterator[int]:
    """A bit of the byte that the disk has at ``offset`` is flipped in the journal; gives the seq of its record."""
    (path,) = made.segment_paths()
    with Segment(path) as segment:
        record = next(
            record
            for batch in segment.batches()
            for record in records(batch)
            if record.op == Op.WRITE and record.offset <= offset < record.offset + record.length
        )
    at = record.position + offset - record.offset
    fd = os.open(path, os.O_RDWR)
    try:
        sound = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([sound[0] ^ 0x10]), at)
        yield record.seq
        os.pwrite(fd, sound, at)
    finally:
        os.close(fd)


def test_parts_of_any_size_are_the_disks_bytes_the_first_time_and_again(made: MadeHistory) -> None:
    chance = random.Random(2)
    seq = max(made.times)
    with made.open() as history:
        view = View.open(history, "vda", made.position(seq))
        content = made.disk("vda").states[seq]
        for _ in range(2000):
            offset = chance.randrange(SIZE)
            length = min(chance.choice([1, 512, 4 * K, 20 * K, SIZE]), SIZE - offset)
            buffer = bytearray(chance.randbytes(length))
            view.read_into(offset, memoryview(buffer))
            assert buffer == content[offset : offset + length], f"{offset}+{length}"


@pytest.mark.parametrize(("parts_max", "pad_size"), [(3, 1 << 20), (1024, 16 * K)])
def test_what_is_gathered_at_once_is_bounded_and_read_but_once(
    made: MadeHistory, monkeypatch: pytest.MonkeyPatch, parts_max: int, pad_size: int
) -> None:
    def checked(parts: Sequence[memoryview]) -> tuple[memoryview, bool]:
        assert 0 < len(parts) <= parts_max and sum(map(len, parts)) <= pad_size
        return gather(parts)

    monkeypatch.setattr("vmrewind.history.payloads.PARTS_MAX", parts_max)
    monkeypatch.setattr("vmrewind.history.payloads.PAD_SIZE", pad_size)
    monkeypatch.setattr("vmrewind.history.payloads.gather", checked)
    monkeypatch.setattr("vmrewind.history.payloads.Payloads.get", None)
    seq = max(made.times)
    with made.open() as history:
        view = View.open(history, "vda", made.position(seq))
        for begin, end in ((0, LONG_AT), (LONG_AT + LONG, SIZE), (1, 10 * K)):
            assert view.read(begin, end - begin) == made.disk("vda").states[seq][begin:end]


@pytest.mark.parametrize("read_before", [False, True])
def test_damage_is_found_by_whoever_reads_it_and_by_nobody_else(made: MadeHistory, read_before: bool) -> None:
    chance = random.Random(3)
    seq = max(made.times)
    content = made.disk("vda").states[seq]
    offsets = [n * 4 * K + chance.randrange(4 * K) for n in range(NEIGHBOURS)]
    offsets += [LONG_AT + at for at in (0, 4 * K - 1, 4 * K, 50 * K, LONG - 101, LONG - 1)] + [SHORT_AT, SHORT_AT + SHORT - 1]
    with made.open() as history:
        view = View.open(history, "vda", made.position(seq))
        if read_before:
            assert view.read(LONG_AT + 9, 700) == content[LONG_AT + 9 : LONG_AT + 709]
            assert view.read(0, SIZE) == content
        for offset in offsets:
            low = min(offset // 512 * 512, SIZE - 512)
            with damaged(made, offset) as which:
                for begin, end in ((offset, offset + 1), (low, low + 512), (low // (4 * K) * 4 * K, SIZE), (0, SIZE)):
                    with pytest.raises(CorruptionError) as caught:
                        view.read(begin, end - begin)
                    assert f"record {which} " in str(caught.value), (offset, begin, end)
                beside = offset + 8 * K if offset < 20 * K else 0
                assert view.read(beside, 2 * K) == content[beside : beside + 2 * K]
            assert view.read(low, 512) == content[low : low + 512]


@pytest.mark.parametrize("read_before", [False, True])
def test_another_copy_stands_in_whatever_part_is_read(made: MadeHistory, read_before: bool) -> None:
    seq = max(made.times)
    content = made.disk("vda").states[seq]
    made.ship(made.run, 1, seq)
    with made.open() as history:
        view = View.open(history, "vda", made.position(seq))
        if read_before:
            assert view.read(0, SIZE) == content
            assert view.read(LONG_AT + 9, 700) == content[LONG_AT + 9 : LONG_AT + 709]
        for offset in (5 * 4 * K + 7, LONG_AT + 4 * K, LONG_AT + LONG - 1, SHORT_AT + 5):
            with damaged(made, offset):
                for begin, length in ((0, SIZE), (offset, 1), (offset - 3, 300)):
                    length = min(length, SIZE - begin)
                    assert view.read(begin, length) == content[begin : begin + length]


def test_of_several_copies_any_whole_one_stands_in(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    seq = max(made.times)
    content = made.disk("vda").states[seq]
    keys = [made.ship(made.run, 1, NEIGHBOURS + 1), made.ship(made.run, 1, seq)]
    copies = [made.repository_path / key.key for key in keys]
    offset = 5 * 4 * K + 7
    with damaged(made, offset) as which:
        for lost in copies:
            whole = lost.read_bytes()
            lost.chmod(0o600)
            flipped = bytearray(whole)
            flipped[len(whole) // 2] ^= 1
            for instead in (flipped, whole[:64] + bytes(len(whole) - 64), None):
                with made.open() as history:
                    view = View.open(history, "vda", made.position(seq))
                    lost.unlink()
                    if instead is not None:
                        lost.write_bytes(instead)
                    assert view.read(offset, 9) == content[offset : offset + 9]
                lost.write_bytes(whole)
        for number in range(len(copies)):
            with made.open() as history:
                view = View.open(history, "vda", made.position(seq))
                away = history.records(made.run).shipped[number]

                def unreachable(*_: object) -> bytes:
                    raise RepositoryError("the store does not answer")

                monkeypatch.setattr(away, "_reader", unreachable)
                assert view.read(offset, 9) == content[offset : offset + 9]
        with made.open() as history:
            view = View.open(history, "vda", made.position(seq))
            for lost in copies:
                lost.unlink()
            with pytest.raises(CorruptionError, match=f"record {which} is damaged") as caught:
                view.read(offset, 9)
            assert all(key.key in caught.value.hint for key in keys)


def test_a_segment_that_is_cut_short_while_it_is_read_ends_nobody(made: MadeHistory) -> None:
    seq = max(made.times)
    content = made.disk("vda").states[seq]
    (path,) = made.segment_paths()
    with Segment(path) as segment:
        cut = next(record for batch in segment.batches() for record in records(batch) if record.offset == 6 * 4 * K)
    with made.open() as history:
        view = View.open(history, "vda", made.position(seq))
        assert view.read(0, SIZE) == content
        os.truncate(path, cut.position + 100)
        assert view.read(0, 6 * 4 * K) == content[: 6 * 4 * K]
        for begin, end in ((cut.offset - 1, cut.offset + 1), (0, 8 * 4 * K), (SHORT_AT - 1, SHORT_AT + 1)):
            with pytest.raises(CorruptionError, match=" record "):
                view.read(begin, end - begin)


def test_a_journal_that_cannot_be_mapped_is_read_all_the_same(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmrewind.history.sources.mapped", lambda _: memoryview(b""))
    test_parts_of_any_size_are_the_disks_bytes_the_first_time_and_again(made)
    monkeypatch.setattr("vmrewind.history.payloads.Payloads.get", None)
    seq = max(made.times)
    with made.open() as history:
        view = View.open(history, "vda", made.position(seq))
        assert view.read(0, 60 * K) == made.disk("vda").states[seq][: 60 * K], "without reading any of it twice"


@pytest.mark.parametrize("read_before", [False, True])
def test_what_is_open_is_read_though_descriptors_are_used_up(made: MadeHistory, read_before: bool) -> None:
    seq = max(made.times)
    content = made.disk("vda").states[seq]
    with made.open() as history, ThreadPoolExecutor(1) as pool:
        view = View.open(history, "vda", made.position(seq))
        if read_before:
            assert view.read(0, 60 * K) == content[: 60 * K]
        with no_descriptors_left():
            for begin, end in ((0, 32 * K), (1, 10 * K), (38 * K, 52 * K), (0, LONG_AT + LONG)):
                assert pool.submit(view.read, begin, end - begin).result(30) == content[begin:end], (begin, end)


@pytest.mark.parametrize("others", [0, 600])
def test_there_is_room_for_descriptors_of_all_segments_and_of_those_who_read(made: MadeHistory, others: int) -> None:
    """Whatever ``others`` the process has open."""
    made.close_segment()
    made.batch([(Op.WRITE, "vda", at, b"x" * 512) for at in (0, 1024)])
    made.tick()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    crowd = [os.open(os.devnull, os.O_RDONLY) for _ in range(others)]
    before = open_descriptors()
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 1, hard))
    try:
        with made.open() as history:
            view = View.open(history, "vda", made.position(max(made.times)))
            view.read(0, SIZE)
            opened = open_descriptors() - before
            assert opened >= 4, "two segments, each mapped"
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before + 2 * 2 + _DESCRIPTORS_SPARE
    finally:
        for fd in crowd:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert _DESCRIPTORS_SPARE >= _CLIENTS_MAX * (1 + _THREADS * 2)


def test_closing_gives_locks_and_descriptors_up_whoever_has_a_failure_in_hand(made: MadeHistory) -> None:
    gather([memoryview(b"x")])  # This thread has what it needs from here on.
    before = open_descriptors()
    (path,) = made.segment_paths()
    seq = max(made.times)
    with made.open() as history:
        view = View.open(history, "vda", made.position(seq))
        view.read(0, 32 * K)
        with damaged(made, 10 * K), pytest.raises(CorruptionError) as kept:
            view.read(0, 32 * K)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert kept.value is not None
    del kept
    gc.collect()
    assert view.size == SIZE and open_descriptors() == before
