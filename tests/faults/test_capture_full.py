"""A journal that cannot take more: what goes, what stays, who waits; never an error to the guest, never a hole."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.capture_tools import (
    MIB,
    RUN,
    Capture,
    Client,
    DiskOf,
    compose,
    first_difference,
    journal_entries,
    raw_image,
    until,
    used,
)
from vmrewind.capture.policy import RUN_DONE
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment, segment_files
from vmrewind.journal.state import StatePage
from vmrewind.nbd import protocol as nbd

SIZE = 4 * MIB
QUOTA = 8 * MIB
CHUNK = 128 << 10


def capture_of(directory: Path, policy: str, *, run: int = RUN) -> Capture:
    images = [directory / "a.raw", directory / "b.raw"]
    for image in images:
        if not image.exists():
            raw_image(image, SIZE)
    return Capture(directory, [DiskOf("vda", images[0]), DiskOf("vdb", images[1])], journal_size=QUOTA, full=policy, run=run)


def write_much(client: Client, mebibytes: int) -> None:
    """Writes as fast as they are taken, each with its own content."""
    for i in range(mebibytes * MIB // CHUNK):
        client.write(i * CHUNK % SIZE, i.to_bytes(4, "little") * (CHUNK // 4))


def ship(capture: Capture, seq: int, run: int = RUN) -> None:
    """Ship's word that it has carried everything of a run up to a record, and RUN if it is older."""
    temporary = capture.journal / "shipped.tmp"
    temporary.write_text(json.dumps({"runs": {fmt.run_name(RUN): RUN_DONE, fmt.run_name(run): seq}}))
    temporary.replace(capture.journal / "shipped.json")


@contextmanager
def quick(client: Client, seconds: float = 0.5) -> Iterator[None]:
    """Inside, waiting for a reply longer than this is a TimeoutError."""
    before = client.sock.gettimeout()
    client.sock.settimeout(seconds)
    try:
        yield
    finally:
        client.sock.settimeout(before)


def fill_to_the_last_byte(capture: Capture, client: Client) -> dict[str, Any]:
    """Leave no room for even a bookmark in a journal without room for a write; returns how a bookmark is refused."""
    with quick(client, 0.2), pytest.raises(TimeoutError):
        for i in range(2 * CHUNK // 4096):
            client.write(4096 * i, b"small" * 800)
    for name in ("a longer name " * 14, "short"):
        while (answer := capture.instruct(command="mark", name=name))["ok"]:
            pass
    return answer


def test_drop_history_recycles_the_oldest_and_declares_it(tmp_path: Path) -> None:
    with capture_of(tmp_path, "drop-history") as capture:
        with Client(capture.socket_path) as client:
            write_much(client, 40)
            last_seq = capture.instruct(command="status")["seq"]
        assert capture.stop() == 0
        entries = list(journal_entries(capture.journal))
        first = entries[0].record.seq
        assert first > 1
        assert entries[-1].record.seq == last_seq + 1
        dropped = capture.events("history.dropped")
        seqs = [event["first_seq"] for event in dropped]
        assert seqs == sorted(seqs)
        assert seqs[0] == 1
        assert max(seqs) < first
        assert len(dropped) == segment_files(capture.journal)[0].number - 1, "each one is declared"
        assert {event["run"] for event in dropped} == {fmt.run_name(RUN)}
        assert used(capture.journal) <= QUOTA + CHUNK
        assert capture.events("journal.full") == [] or capture.events("journal.room")


def test_what_is_not_checkpointed_is_never_recycled(tmp_path: Path) -> None:
    """However fast the guest writes: whatever the images may lack on stable storage can be replayed."""
    capture = capture_of(tmp_path, "drop-history")
    with capture:
        for burst in range(6):
            with Client(capture.socket_path) as client:
                write_much(client, 6 + 2 * burst)
            capture.kill()
            state = StatePage(capture.journal)
            checkpoint, applied = state.checkpoint, state.applied
            state.close()
            with Segment(segment_files(capture.journal)[0].path) as oldest:
                assert oldest.header.first_batch <= checkpoint + 1
            assert applied > checkpoint, "killed in the middle, or this test tests nothing"
            capture.start()
        assert segment_files(capture.journal)[0].number > 8


def test_shipped_history_is_recycled_without_a_word(tmp_path: Path) -> None:
    with capture_of(tmp_path, "drop-history") as capture:
        with Client(capture.socket_path) as client:
            write_much(client, 4)
            ship(capture, RUN_DONE)
            write_much(client, 20)
        assert capture.stop() == 0
        assert capture.events("history.dropped") == []


def test_block_holds_the_guest_until_ship_lets_go(tmp_path: Path) -> None:
    with (
        capture_of(tmp_path, "block") as capture,
        Client(capture.socket_path, "vda") as vda,
        Client(capture.socket_path, "vdb") as vdb,
    ):
        with quick(vda), pytest.raises(TimeoutError):
            write_much(vda, 12)
        status = capture.instruct(command="status")
        assert status["journal_full"]
        assert segment_files(capture.journal)[0].number == 1, "nothing was dropped"
        (full,) = capture.events("journal.full")
        assert full["policy"] == "block"
        answer = fill_to_the_last_byte(capture, vdb)
        assert answer["kind"] == "space"
        assert used(capture.journal) <= QUOTA + CHUNK

        # Ship has carried the first segments only: just those may go.
        with Segment(segment_files(capture.journal)[3].path) as fourth:
            ship(capture, fourth.header.first_seq - 1)
        assert vda.reply()[1] == 0
        assert vdb.reply()[1] == 0
        until(lambda: capture.events("journal.room"), "the end of the hold")
        assert segment_files(capture.journal)[0].number in (2, 3, 4)
        assert capture.events("history.dropped") == []
        ship(capture, RUN_DONE)
        write_much(vda, 12)
        assert not capture.instruct(command="status")["journal_full"]


def test_requests_held_are_served_in_order_once_there_is_room(tmp_path: Path) -> None:
    with capture_of(tmp_path, "block") as capture, Client(capture.socket_path) as client:
        with quick(client), pytest.raises(TimeoutError):
            write_much(client, 12)
        requests = [client.request(nbd.CMD_WRITE, 4096 * (i % 5), data=bytes([i]) * 3000) for i in range(40)]
        requests.append(client.request(nbd.CMD_FLUSH))
        client.sock.sendall(b"".join(requests))
        ship(capture, RUN_DONE)
        for _ in range(42):
            assert client.reply()[1] == 0
        for i in range(35, 40):
            assert client.read(4096 * (i % 5), 3000) == bytes([i]) * 3000
        entries = list(journal_entries(capture.journal))
        held = [entry.payload[0] for entry in entries if entry.record.op == fmt.Op.WRITE and entry.record.length == 3000]
        assert held == list(range(40))


def test_a_held_client_that_leaves_takes_its_requests_along(tmp_path: Path) -> None:
    with capture_of(tmp_path, "block") as capture:
        with Client(capture.socket_path) as client:
            with quick(client), pytest.raises(TimeoutError):
                write_much(client, 12)
            client.sock.sendall(b"".join(client.request(nbd.CMD_WRITE, 0, data=b"gone" * 1000) for _ in range(20)))
        until(lambda: capture.instruct(command="status")["disks"]["vda"]["clients"] == 0, "its end to be seen")
        assert not capture.instruct(command="status")["journal_full"]
        ship(capture, RUN_DONE)
        with Client(capture.socket_path) as client:
            client.write(0, b"next")
            assert client.read(0, 4) == b"next"


def test_a_held_run_ends_cleanly_nonetheless(tmp_path: Path) -> None:
    with capture_of(tmp_path, "block") as capture:
        with Client(capture.socket_path, "vda") as vda, Client(capture.socket_path, "vdb") as vdb:
            with quick(vda), pytest.raises(TimeoutError):
                write_much(vda, 12)
            fill_to_the_last_byte(capture, vdb)
            assert capture.stop() == 0
        entries = list(journal_entries(capture.journal))
        assert (entries[-1].record.op, entries[-1].record.flags) == (fmt.Op.EVENT, fmt.Event.STOP)
        head = json.loads((capture.journal / "head.json").read_bytes())
        assert head["seq"] == entries[-1].record.seq
        disk = compose(entries, {0: bytes(SIZE)})[0]
        assert first_difference(disk, (tmp_path / "a.raw").read_bytes()) is None
    # The next run finds no room at all, and begins.
    with capture_of(tmp_path, "block", run=RUN + 1) as capture:
        (start,) = journal_entries(capture.journal, RUN + 1)
        assert start.record.flags == fmt.Event.START
        with Client(capture.socket_path) as client:
            assert client.read(0, 4) == (tmp_path / "a.raw").read_bytes()[:4]
            ship(capture, RUN_DONE)
            client.write(0, b"more")


def test_a_reader_keeps_its_segment_and_the_guest_its_pace(tmp_path: Path) -> None:
    with capture_of(tmp_path, "drop-history") as capture, Client(capture.socket_path) as client:
        write_much(client, 3)
        path = segment_files(capture.journal)[0].path
        with Segment(path) as reader:
            content = os.pread(reader.fd, MIB, 0)
            write_much(client, 10)
            assert os.pread(reader.fd, MIB, 0) == content
            assert next(reader.batches()).number == 1
            write_much(client, 40)
            assert capture.events("journal.full") == [] or capture.events("journal.room")
            assert os.pread(reader.fd, MIB, 0) == content
        assert not path.exists()
        until(lambda: capture.events("history.dropped"), "the loss to be declared")
        assert used(capture.journal) <= QUOTA + CHUNK


def test_a_flush_needs_room_too_and_reads_of_others_do_not(tmp_path: Path) -> None:
    with capture_of(tmp_path, "block") as capture, Client(capture.socket_path) as client, Client(capture.socket_path) as reader:
        with quick(client), pytest.raises(TimeoutError):
            write_much(client, 12)
        assert len(reader.read(0, CHUNK)) == CHUNK
        ship(capture, RUN_DONE)
        assert client.reply()[1] == 0
        client.flush()


def test_the_control_socket_answers_while_the_guest_is_held(tmp_path: Path) -> None:
    with capture_of(tmp_path, "block") as capture, Client(capture.socket_path) as client:
        with quick(client), pytest.raises(TimeoutError):
            write_much(client, 12)
        for _ in range(20):
            assert capture.instruct(command="status")["journal_full"]
        with socket.socket(socket.AF_UNIX) as idle:
            idle.connect(str(capture.socket_path))
            assert idle.recv(8) == b"NBDMAGIC"
