"""The NBD server as its clients meet it: two disks in one process, every command, every odd request."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import nbd as libnbd
import pytest

from tests.capture_tools import MIB, Capture, Client, DiskOf, compose, first_difference, journal_entries, raw_image, until
from vmrewind.journal import format as fmt
from vmrewind.nbd import protocol as nbd

SIZE = 8 * MIB
HOLE_AND_ZERO = nbd.STATE_HOLE | nbd.STATE_ZERO


class Two:
    """A capture with two disks, and what they held before."""

    def __init__(self, directory: Path, **options: int | str) -> None:
        images = [raw_image(directory / "a.raw", SIZE, fill=True), raw_image(directory / "b.raw", SIZE // 2)]
        self.images = images
        self.before = {i: image.read_bytes() for i, image in enumerate(images)}
        disks = [DiskOf("vda", images[0]), DiskOf("vdb", images[1])]
        self.capture = Capture(directory, disks, **options)  # type: ignore[arg-type]

    def client(self, target: str = "vda", *, structured: bool = False) -> Client:
        return Client(self.capture.socket_path, target, structured=structured)

    def check(self) -> None:
        """History says what the images hold."""
        disks = compose(list(journal_entries(self.capture.journal)), self.before)
        for index, image in enumerate(self.images):
            assert first_difference(disks[index], image.read_bytes()) is None


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    with made.capture:
        yield made


def ops(two: Two) -> list[tuple[int, int, int, int, int]]:
    """(op, flags, disk, offset, length) of what clients did."""
    found = [entry.record for entry in journal_entries(two.capture.journal)]
    return [(r.op, r.flags, r.disk, r.offset, r.length) for r in found if r.op != fmt.Op.EVENT]


# -- what it is for


def test_a_write_is_in_journal_and_image_when_it_is_acknowledged(two: Two) -> None:
    with two.client("vda") as vda, two.client("vdb") as vdb:
        vda.write(4096, b"a" * 5000)
        assert two.images[0].read_bytes()[4096:9096] == b"a" * 5000
        vdb.write(0, b"b")
        assert two.images[1].read_bytes()[:1] == b"b"
        assert ops(two) == [(fmt.Op.WRITE, 0, 0, 4096, 5000), (fmt.Op.WRITE, 0, 1, 0, 1)]
        assert vda.read(4095, 5002) == two.before[0][4095:4096] + b"a" * 5000 + two.before[0][9096:9097]
        assert vdb.read(0, 4096) == b"b" + bytes(4095)
    two.check()


def test_every_command_is_a_record(two: Two) -> None:
    with two.client() as client:
        client.write(0, b"x" * 512, nbd.CMD_FLAG_FUA)
        client.do(nbd.CMD_TRIM, 4096, 8192)
        client.do(nbd.CMD_WRITE_ZEROES, 65536, 4096)
        client.do(nbd.CMD_WRITE_ZEROES, 131072, 4096, flags=nbd.CMD_FLAG_NO_HOLE)
        client.do(nbd.CMD_WRITE_ZEROES, 196608, 100, flags=nbd.CMD_FLAG_FAST_ZERO)
        client.flush()
        client.do(nbd.CMD_CACHE, 0, 4096)
        assert client.read(4096, 8192) == bytes(8192)
        assert client.read(131072, 4096) == bytes(4096)
    assert ops(two) == [
        (fmt.Op.WRITE, fmt.FLAG_FUA, 0, 0, 512),
        (fmt.Op.DISCARD, 0, 0, 4096, 8192),
        (fmt.Op.ZERO, 0, 0, 65536, 4096),
        (fmt.Op.ZERO, fmt.FLAG_NO_HOLE, 0, 131072, 4096),
        (fmt.Op.ZERO, 0, 0, 196608, 100),
        (fmt.Op.FLUSH, 0, 0, 0, 0),
    ]
    two.check()


def test_discards_and_zeroes_read_as_zeroes_at_any_alignment(two: Two) -> None:
    with two.client() as client:
        for command in (nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
            for offset, length in ((1, 1), (511, 3), (4095, 2), (10_000, 100_001), (SIZE - 1, 1)):
                client.write(max(0, offset - 1), b"\xff" * min(length + 2, SIZE - max(0, offset - 1)))
                client.do(command, offset, length)
                assert client.read(offset, length) == bytes(length)
                assert client.read(offset - 1, 1) == b"\xff"
    two.check()


def test_writes_of_one_batch_are_applied_in_order(two: Two) -> None:
    """Sent at once they are served as one batch: the last of overlapping writes wins, in image and history."""
    with two.client() as client:
        requests = b""
        for i in range(200):
            requests += client.request(nbd.CMD_WRITE, 1000 + i % 7, data=bytes([i]) * (512 + i))
            if i % 10 == 9:
                requests += client.request(nbd.CMD_TRIM, 1100, 50)
        client.sock.sendall(requests)
        for _ in range(220):
            assert client.reply()[1] == 0
    two.check()
    times = {entry.record.seq for entry in journal_entries(two.capture.journal)}
    assert len(times) >= 220


def test_requests_cut_anywhere_are_served_whole(two: Two) -> None:
    with two.client() as client:
        requests = b"".join(client.request(nbd.CMD_WRITE, 4096 * i, data=bytes([i]) * 700) for i in range(8))
        step = 61
        for at in range(0, len(requests), step):
            client.sock.sendall(requests[at : at + step])
        for _ in range(8):
            assert client.reply()[1] == 0
        for i in range(8):
            assert client.read(4096 * i, 700) == bytes([i]) * 700


# -- what is wrong with a request is answered, and the connection stays


UNKNOWN_FLAG = 1 << 9


@pytest.mark.parametrize("structured", [False, True])
def test_a_wrong_request_gets_its_error_and_the_next_is_served(two: Two, structured: bool) -> None:
    with two.client(structured=structured) as client:
        wrong: list[tuple[int, int, int, bytes, int, int]] = [
            # command, offset, length, data, flags, error
            (nbd.CMD_READ, SIZE - 1, 2, b"", 0, errno.EINVAL),
            (nbd.CMD_READ, SIZE, 1, b"", 0, errno.EINVAL),
            (nbd.CMD_READ, (1 << 64) - 1, 512, b"", 0, errno.EINVAL),
            (nbd.CMD_READ, 0, nbd.REQUEST_LENGTH_MAX + 1, b"", 0, errno.EINVAL),
            (nbd.CMD_READ, 0, 512, b"", UNKNOWN_FLAG, errno.EINVAL),
            (nbd.CMD_WRITE, SIZE - 1, 0, b"xx", 0, errno.ENOSPC),
            (nbd.CMD_WRITE, (1 << 64) - 1, 0, b"xx", 0, errno.ENOSPC),
            (nbd.CMD_WRITE, 0, 0, b"xx", UNKNOWN_FLAG, errno.EINVAL),
            (nbd.CMD_WRITE, 0, 0, b"xx", nbd.CMD_FLAG_NO_HOLE, errno.EINVAL),
            (nbd.CMD_TRIM, SIZE - 1, 2, b"", 0, errno.EINVAL),
            (nbd.CMD_TRIM, 0, 512, b"", UNKNOWN_FLAG, errno.EINVAL),
            (nbd.CMD_WRITE_ZEROES, SIZE - 1, 2, b"", 0, errno.ENOSPC),
            (nbd.CMD_WRITE_ZEROES, 0, 512, b"", UNKNOWN_FLAG, errno.EINVAL),
            (nbd.CMD_FLUSH, 0, 0, b"", UNKNOWN_FLAG, errno.EINVAL),
            (nbd.CMD_CACHE, SIZE, 1, b"", 0, errno.EINVAL),
            (nbd.CMD_CACHE, 0, 1, b"", UNKNOWN_FLAG, errno.EINVAL),
            (nbd.CMD_BLOCK_STATUS, 0, 512, b"", 0, errno.EINVAL),
            (8, 0, 512, b"", 0, errno.EINVAL),
            (0xFFFF, 0, 512, b"", 0, errno.EINVAL),
        ]
        for command, offset, length, data, flags, expected in wrong:
            assert client.error(command, offset, length, data, flags) == expected, (command, offset, length, flags)
            client.write(0, b"still here")
            assert client.read(0, 10) == b"still here"
        if not structured:
            assert client.error(nbd.CMD_READ, 0, 512, flags=nbd.CMD_FLAG_DF) == errno.EINVAL
    assert {op for op, *_ in ops(two)} == {fmt.Op.WRITE}
    two.check()


def test_wrong_requests_among_right_ones_touch_nothing_else(two: Two) -> None:
    with two.client() as client:
        client.sock.sendall(
            client.request(nbd.CMD_WRITE, 0, data=b"one")
            + client.request(nbd.CMD_WRITE, SIZE - 1, data=b"out of range")
            + client.request(nbd.CMD_READ, SIZE, 4096)
            + client.request(77)
            + client.request(nbd.CMD_WRITE, 512, data=b"two")
        )
        answers = {cookie: error for cookie, error, _ in (client.reply() for _ in range(5))}
        assert answers == {1: 0, 2: errno.ENOSPC, 3: errno.EINVAL, 4: errno.EINVAL, 5: 0}
    assert [(offset, length) for _, _, _, offset, length in ops(two)] == [(0, 3), (512, 3)]


def test_empty_requests_succeed_and_leave_no_record(two: Two) -> None:
    with two.client() as client:
        for command in (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
            assert client.error(command, 0, 0) == 0
    assert ops(two) == []


def test_a_wrong_magic_ends_the_connection_after_what_came_before_it(two: Two) -> None:
    with two.client() as client:
        client.sock.sendall(client.request(nbd.CMD_WRITE, 0, data=b"kept") + b"\0" * 28)
        assert client.reply()[1] == 0
        assert client.hung_up()
    with two.client() as client:
        assert client.read(0, 4) == b"kept"


def test_a_goodbye_ends_the_connection(two: Two) -> None:
    with two.client() as client:
        client.sock.sendall(
            client.request(nbd.CMD_WRITE, 0, data=b"last words") + client.request(nbd.CMD_DISC, 1 << 60, 99, flags=3)
        )
        assert client.reply()[1] == 0
        assert client.hung_up()
    assert two.images[0].read_bytes()[:10] == b"last words"
    two.check()


def test_a_write_beyond_the_limit_ends_the_connection_unread(two: Two) -> None:
    with two.client() as client:
        client.sock.sendall(client.request(nbd.CMD_WRITE, 0, nbd.REQUEST_LENGTH_MAX + 1))
        assert client.hung_up()
    assert ops(two) == []


def test_half_a_request_disturbs_nobody_and_leaves_nothing(two: Two) -> None:
    with two.client() as other:
        for cut in (1, 27, 28, 29, 28 + 4095):
            with two.client() as client:
                client.sock.sendall(client.request(nbd.CMD_WRITE, 0, data=b"x" * 4096)[:cut])
                other.write(8192, bytes([cut & 255]) * 100)
            assert other.read(8192, 100) == bytes([cut & 255]) * 100
        assert other.read(0, 4096) == two.before[0][:4096]
    assert all(offset == 8192 for _, _, _, offset, _ in ops(two))


# -- large requests


@pytest.mark.parametrize("mebibytes", [48, 64])
def test_large_requests(tmp_path: Path, mebibytes: int) -> None:
    image = raw_image(tmp_path / "a.raw", 65 * MIB)
    data = os.urandom(MIB) * mebibytes
    with Capture(tmp_path, [DiskOf("vda", image)], journal_size=128 * MIB) as capture, Client(capture.socket_path) as client:
        client.write(12345, data, nbd.CMD_FLAG_FUA)
        assert first_difference(client.read(12345, len(data)), data) is None
        client.write(0, b"small again")
        entries = list(journal_entries(capture.journal))
        assert first_difference(compose(entries, {0: bytes(65 * MIB)})[0], image.read_bytes()) is None
        lengths = [entry.record.length for entry in entries if entry.record.op == fmt.Op.WRITE]
        assert max(lengths) <= fmt.RECORD_LENGTH_MAX


def test_large_requests_through_a_small_journal(tmp_path: Path) -> None:
    """Segments smaller than the request: it becomes as many records as it takes."""
    image = raw_image(tmp_path / "a.raw", 4 * MIB)
    data = os.urandom(3 * MIB + 333)
    with Capture(tmp_path, [DiskOf("vda", image)], journal_size=8 * MIB) as capture, Client(capture.socket_path) as client:
        client.write(7, data)
        client.write(0, b"and" * 5)
        entries = list(journal_entries(capture.journal))
        assert first_difference(compose(entries, {0: bytes(4 * MIB)})[0], image.read_bytes()) is None
        assert client.read(15, len(data) - 8) == data[8:]


# -- stable storage


def test_a_flush_is_answered_after_the_writes_before_it(two: Two) -> None:
    with two.client() as client:
        client.sock.sendall(
            b"".join(client.request(nbd.CMD_WRITE, 512 * i, data=b"w" * 512) for i in range(50)) + client.request(nbd.CMD_FLUSH)
        )
        order = [client.reply()[0] for _ in range(51)]
        assert order[-1] == 51


@pytest.mark.parametrize("how", ["fua", "flush"])
def test_stable_means_that_the_journal_was_synced_behind_every_write(tmp_path: Path, how: str) -> None:
    made = Two(tmp_path, trace=True)
    with made.capture as capture, made.client() as client:
        client.write(0, b"plain" * 100)
        capture.mark_trace("begin")
        client.write(4096, b"w" * 500, nbd.CMD_FLAG_FUA if how == "fua" else 0)
        if how == "flush":
            client.flush()
        calls = capture.traced("begin")
    journal = {path.stat().st_ino for path in capture.journal.glob("*.seg")}
    answer = max(i for i, call in enumerate(calls) if call.name == "send")
    written = max(i for i, call in enumerate(calls) if call.name == "pwritev" and call.inode in journal)
    synced = [i for i, call in enumerate(calls) if call.name == "fdatasync" and call.inode in journal]
    assert any(written < sync < answer for sync in synced), calls


def test_a_checkpoint_syncs_the_journal_before_the_images(tmp_path: Path) -> None:
    """Else a power failure could leave an image further than its log."""
    made = Two(tmp_path, trace=True, journal_size=8 * MIB)
    with made.capture as capture, made.client() as client:
        for i in range(40):
            client.write(MIB // 8 * i, bytes([i]) * (MIB // 8))
        until(lambda: capture.instruct(command="status")["batch_checkpointed"] > 0, "a checkpoint once a segment is full")
        calls = capture.traced()
    journal = {path.stat().st_ino for path in capture.journal.glob("*.seg")}
    image = made.images[0].stat().st_ino
    first = next(i for i, call in enumerate(calls) if call.name == "fdatasync" and call.inode == image)
    unsynced: set[int] = set()
    for call in calls[:first]:
        if call.inode in journal:
            (unsynced.add if call.name == "pwritev" else unsynced.discard)(call.inode)
    current = max(capture.journal.glob(f"{fmt.run_name(capture.run)}-*.seg")).stat().st_ino
    assert unsynced <= {current}, "only what was written since the checkpoint began may be unsynced"


# -- replies


def test_structured_replies_carry_offset_and_data(two: Two) -> None:
    with two.client(structured=True) as client:
        assert client.flags & nbd.FLAG_SEND_DF
        client.sock.sendall(client.request(nbd.CMD_READ, 4096, 1000, flags=nbd.CMD_FLAG_DF))
        head = client.receive(20)
        assert nbd.CHUNK.unpack(head) == (nbd.STRUCTURED_REPLY_MAGIC, nbd.REPLY_FLAG_DONE, nbd.REPLY_OFFSET_DATA, 1, 1008)
        assert struct.unpack(">Q", client.receive(8)) == (4096,)
        assert client.receive(1000) == two.before[0][4096:5096]
    with two.client() as client:
        assert not client.flags & nbd.FLAG_SEND_DF


@pytest.mark.parametrize("structured", [False, True])
def test_many_reads_at_once_answer_each_its_own(two: Two, structured: bool) -> None:
    with two.client(structured=structured) as client:
        wanted = {i + 1: (i * 7919 % (SIZE - 5000), 1 + i * 31 % 5000) for i in range(300)}
        client.sock.sendall(b"".join(client.request(nbd.CMD_READ, *where) for where in wanted.values()))
        for _ in range(len(wanted)):
            if structured:
                cookie, error, data = client.reply()
            else:
                magic, error, cookie = nbd.SIMPLE_REPLY.unpack(client.receive(16))
                assert magic == nbd.SIMPLE_REPLY_MAGIC
                data = client.receive(wanted[cookie][1])
            offset, length = wanted.pop(cookie)
            assert (error, first_difference(data, two.before[0][offset : offset + length])) == (0, None)


@pytest.mark.parametrize("structured", [False, True])
def test_reads_of_cold_data(two: Two, structured: bool) -> None:
    """Not in the page cache: the read that must not wait gives way to one that may."""
    with open(two.images[0], "rb") as image:
        os.fsync(image.fileno())
        os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with two.client(structured=structured) as client:
        wanted = {i + 1: i * 65536 % SIZE for i in range(64)}
        client.sock.sendall(b"".join(client.request(nbd.CMD_READ, offset, 4096) for offset in wanted.values()))
        for _ in range(len(wanted)):
            cookie, error, data = client.reply(4096)
            offset = wanted.pop(cookie)
            assert (error, data) == (0, two.before[0][offset : offset + 4096])


def test_reads_of_cold_data_are_answered_before_a_client_that_leaves_is_hung_up_on(two: Two) -> None:
    with open(two.images[0], "rb") as image:
        os.fsync(image.fileno())
        os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with two.client() as client:
        asked = b"".join(client.request(nbd.CMD_READ, i * 65536, 4096) for i in range(16))
        client.sock.sendall(asked + client.request(nbd.CMD_DISC, 0, 0))
        assert len({client.reply(4096)[0] for _ in range(16)}) == 16
        assert client.sock.recv(1) == b""


@pytest.mark.parametrize("structured", [False, True])
def test_an_image_cut_short_is_an_error_of_just_the_reads_behind_its_end(two: Two, structured: bool) -> None:
    os.truncate(two.images[0], MIB)
    with two.client(structured=structured) as client:
        wanted = [(0, 4096), (MIB, 4096), (4096, 512), (MIB - 512, 1024), (8192, 100), (2 * MIB, 1), (0, 1)]
        client.sock.sendall(b"".join(client.request(nbd.CMD_READ, *where) for where in wanted))
        for _ in wanted:
            if structured:
                cookie, error, data = client.reply()
            else:
                _, error, cookie = nbd.SIMPLE_REPLY.unpack(client.receive(nbd.SIMPLE_REPLY.size))
                data = b"" if error else client.receive(wanted[cookie - 1][1])
            offset, length = wanted[cookie - 1]
            if offset + length > MIB:
                assert error == errno.EIO
            else:
                assert (error, data) == (0, two.before[0][offset : offset + length])


# -- several clients


def test_a_client_that_never_reads_its_replies_disturbs_nobody(two: Two) -> None:
    with two.client("vda") as deaf, two.client("vdb") as vdb, two.client("vda") as vda:
        request = deaf.request(nbd.CMD_READ, 0, MIB)
        deaf.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            for _ in range(100_000):
                deaf.sock.send(request)
        before = _resident_bytes(two.capture.pid)
        for i in range(200):
            vdb.write(4096 * i, b"fine" * 1024)
            vda.write(4096 * i, b"fine" * 1024)
        assert vdb.read(0, 4) == b"fine"
        assert _resident_bytes(two.capture.pid) - before < 16 * MIB
        deaf.sock.setblocking(True)
        for _ in range(20):
            assert deaf.reply(MIB)[1] == 0


def test_a_deaf_client_that_leaves_is_forgotten(two: Two) -> None:
    with two.client("vda") as deaf:
        deaf.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            for _ in range(100_000):
                deaf.sock.send(deaf.request(nbd.CMD_READ, 0, MIB))
        assert two.capture.instruct(command="status")["disks"]["vda"]["clients"] == 1
    until(lambda: two.capture.instruct(command="status")["disks"]["vda"]["clients"] == 0, "the end of its connection")


def test_more_connections_than_allowed_are_hung_up_on_and_the_rest_are_served(two: Two) -> None:
    with two.client() as first:
        crowd: list[Client] = []
        try:
            crowd.extend(two.client() for _ in range(255))
            for _ in range(5):
                with pytest.raises((ConnectionError, OSError)):
                    two.client()
            first.write(0, b"served")
            assert crowd[-1].read(0, 6) == b"served"
        finally:
            for client in crowd:
                client.sock.close()

        def room() -> bool:
            try:
                with two.client() as late:
                    return late.read(0, 6) == b"served"
            except ConnectionError:
                return False

        until(room, "a place once others have left")


def test_clients_of_one_disk_see_each_other_and_flush_for_each_other(two: Two) -> None:
    with two.client() as one, two.client() as other:
        assert one.flags & nbd.FLAG_CAN_MULTI_CONN
        threads = [threading.Thread(target=_write_stripes, args=(client, i)) for i, client in enumerate((one, other))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        other.flush()
        assert one.read(0, 4096) == b"\0" * 2048 + b"\1" * 2048
    two.check()


def _write_stripes(client: Client, number: int) -> None:
    for i in range(200):
        client.write(4096 * i + 2048 * number, bytes([number]) * 2048)


def test_a_client_that_comes_back_finds_its_old_requests_abandoned(two: Two) -> None:
    """What an old connection still holds unread must not be carried out after what its client sends anew."""
    old, new = two.client(), socket.socket(socket.AF_UNIX)
    old.sock.setsockopt(socket.SOL_SOCKET, 32, 64 * MIB)  # SO_SNDBUFFORCE: more than the server takes at once
    new.settimeout(30)
    os.kill(two.capture.pid, signal.SIGSTOP)
    try:
        for _ in range(80):
            # With FUA the reply, which would show that nobody is there, comes late.
            old.sock.sendall(old.request(nbd.CMD_WRITE, 0, data=b"old" * 20_000, flags=nbd.CMD_FLAG_FUA))
        old.sock.close()
        new.connect(str(two.capture.socket_path))
        write = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.CMD_WRITE, 1, 0, 3) + b"new"
        new.sendall(struct.pack(">I", 3) + nbd.OPTION.pack(nbd.IHAVEOPT, nbd.OPT_EXPORT_NAME, 3) + b"vda" + write)
    finally:
        os.kill(two.capture.pid, signal.SIGCONT)
    with new, new.makefile("rb") as answers:
        assert answers.read(18 + 10)[:8] == b"NBDMAGIC"
        assert nbd.SIMPLE_REPLY.unpack(answers.read(16)) == (nbd.SIMPLE_REPLY_MAGIC, 0, 1)
        until(lambda: two.capture.instruct(command="status")["disks"]["vda"]["clients"] == 1, "the end of the old connection")
        with two.client() as client:
            assert client.read(0, 3) == b"new"
    two.check()


# -- block status


def test_the_allocation_map_tells_holes_and_data(two: Two) -> None:
    handle = libnbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_uri(two.capture.uri("vdb"))
    handle.pwrite(b"x" * 65536, MIB)
    extents: list[tuple[int, int]] = []

    def note(context: str, offset: int, entries: list[int], _: object) -> int:
        assert context == "base:allocation"
        extents.extend(zip(entries[::2], entries[1::2], strict=True))
        return 0

    handle.block_status(SIZE // 2, 0, note)
    assert extents == [(MIB, HOLE_AND_ZERO), (65536, 0), (SIZE // 2 - MIB - 65536, HOLE_AND_ZERO)]
    extents.clear()
    handle.block_status(SIZE // 2, 0, note, libnbd.CMD_FLAG_REQ_ONE)
    assert extents == [(MIB, HOLE_AND_ZERO)]
    extents.clear()
    handle.block_status(10, MIB + 5, note)
    assert extents == [(10, 0)]
    handle.zero(4096, MIB)
    extents.clear()
    handle.block_status(8192, MIB, note)
    assert extents == [(4096, HOLE_AND_ZERO), (4096, 0)]
    handle.zero(4096, MIB + 8192, libnbd.CMD_FLAG_NO_HOLE)
    extents.clear()
    handle.block_status(65536 - 8192, MIB + 8192, note)
    assert sum(length for length, _ in extents) == 65536 - 8192
    with pytest.raises(libnbd.Error) as caught:
        handle.block_status(4096, SIZE // 2 - 512, note)
    assert caught.value.errnum == errno.EINVAL
    handle.shutdown()


def test_block_status_is_refused_without_its_context(two: Two) -> None:
    with two.client(structured=True) as client:
        assert client.error(nbd.CMD_BLOCK_STATUS, 0, 4096) == errno.EINVAL


# -- through libnbd


def test_libnbd_sees_an_export_that_can_everything(two: Two) -> None:
    handle = libnbd.NBD()
    handle.connect_uri(two.capture.uri())
    assert handle.get_size() == SIZE
    assert not handle.is_read_only()
    for able in ("flush", "fua", "trim", "zero", "fast_zero", "cache", "df", "multi_conn"):
        assert getattr(handle, f"can_{able}")(), able
    assert handle.get_block_size(libnbd.SIZE_MINIMUM) == 1
    assert handle.get_block_size(libnbd.SIZE_MAXIMUM) == nbd.REQUEST_LENGTH_MAX
    handle.zero(4096, 0, libnbd.CMD_FLAG_FAST_ZERO)
    assert handle.pread(4096, 0) == bytearray(4096)
    handle.shutdown()


def test_libnbd_drives_both_disks_with_many_requests_in_flight(two: Two) -> None:
    """Rounds of requests that don't overlap, 64 in flight on each disk; what they leave is known after each round."""
    model = {target: bytearray(two.before[i]) for i, target in enumerate(("vda", "vdb"))}
    handles = {}
    for target in model:
        handles[target] = libnbd.NBD()
        handles[target].connect_uri(two.capture.uri(target))
    for round_number in range(4):
        for slot in range(64):
            for target, handle in handles.items():
                at = slot * len(model[target]) // 64 + slot * round_number * 13
                data = os.urandom(1 + slot * 331)
                model[target][at : at + len(data)] = data
                handle.aio_pwrite(libnbd.Buffer.from_bytearray(bytearray(data)), at)
        for handle in handles.values():
            while handle.aio_in_flight():
                handle.poll(-1)
    for target, handle in handles.items():
        handle.flush()
        assert first_difference(handle.pread(len(model[target]), 0), model[target]) is None
        handle.shutdown()
    two.check()


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
