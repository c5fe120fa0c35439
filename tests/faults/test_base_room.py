"""A base that is made while the VM runs takes nothing from the guest: neither the room that its writes need nor its turn."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.capture_tools import MIB, Capture, Client, DiskOf, compose, first_difference, journal_entries, raw_image, until
from tests.fault_tools import ext4, failing, is_root
from tests.faults.test_base_under_load import begin
from vmrewind.journal import format as fmt
from vmrewind.journal.copy_before_write import CHUNK, State
from vmrewind.nbd import protocol as nbd

needs_mounts = pytest.mark.skipif(not is_root(), reason="needs root, to mount a small file system")


@needs_mounts
def test_what_is_kept_makes_room_for_a_sparse_image(tmp_path: Path) -> None:
    """Image and journal lie on one file system, where there is no room for both the image and what is kept of it."""
    with ext4(tmp_path, 64) as mounted:
        image = raw_image(mounted / "a.raw", 16 * MIB, fill=True)
        os.truncate(image, 44 * MIB)
        capture = Capture(mounted, [DiskOf("vda", image)], journal_size=8 * MIB)
        begun = begin(capture.journal, image)
        with begun, capture, Client(capture.socket_path) as client:
            for at in range(0, 44 * MIB, MIB):
                client.write(at, bytes([1 + at // MIB]) * MIB)
            client.flush()
            until(lambda: capture.events("base.given-up"), "word of it")
            assert not capture.events("image.write-failed")
            assert begun.state is State.FAILED and "needed the room" in begun.reason
            assert begun.kept_bytes == 0
            assert capture.stop() == 0
        assert image.read_bytes() == b"".join(bytes([1 + number]) * MIB for number in range(44))


@needs_mounts
@pytest.mark.parametrize("full", ["block", "drop-history"])
def test_what_is_kept_makes_room_for_a_journal_that_grows(tmp_path: Path, full: str) -> None:
    image = raw_image(tmp_path / "a.raw", 24 * MIB, fill=True)
    before = image.read_bytes()
    with ext4(tmp_path, 48) as mounted:
        capture = Capture(mounted, [DiskOf("vda", image)], journal_size=40 * MIB, full=full, local_history=3600)
        begun = begin(capture.journal, image)
        with begun, capture, Client(capture.socket_path) as client:
            for at in range(0, 24 * MIB, MIB):
                client.write(at, bytes([1 + at // MIB]) * MIB)
            assert begun.state is State.FAILED and "needed the room" in begun.reason
            assert capture.stop() == 0
        assert not capture.events("history.dropped") and not capture.events("journal.full")
        history = compose(list(journal_entries(capture.journal)), {0: before})[0]
    assert first_difference(history, image.read_bytes()) is None


def test_a_base_that_takes_no_room_is_not_given_up_for_want_of_it(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", 8 * MIB, fill=True)
    capture = Capture(tmp_path, [DiskOf("vda", image)])
    with begin(capture.journal, image) as begun, capture, Client(capture.socket_path) as client:
        begun.take(1)
        with failing(capture.pid, ["pwrite64"], "ENOSPC", path=image):
            assert client.error(nbd.CMD_WRITE, CHUNK, data=b"full" * 1024) == nbd.ENOSPC
        assert begun.state is State.MAKING


@pytest.mark.parametrize("command", [nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES])
def test_a_large_discard_that_is_kept_lets_others_have_their_turn(tmp_path: Path, command: int) -> None:
    size = 48 * MIB
    images = [raw_image(tmp_path / "a.raw", size, fill=True), raw_image(tmp_path / "b.raw", MIB, fill=True)]
    before = [image.read_bytes() for image in images]
    capture = Capture(tmp_path, [DiskOf("vda", images[0]), DiskOf("vdb", images[1])])
    path = capture.socket_path
    with begin(capture.journal, images[0]) as begun, capture, Client(path) as one, Client(path, "vdb") as other:
        one.write(0, b"before it")
        # Both requests are there when capture looks again.
        os.kill(capture.pid, signal.SIGSTOP)
        one.sock.sendall(one.request(command, 4096, size - 4096))
        one.sock.sendall(one.request(nbd.CMD_WRITE, size - MIB, 0, b"behind it"))
        other.sock.sendall(other.request(nbd.CMD_WRITE, 0, 0, b"of another disk"))
        os.kill(capture.pid, signal.SIGCONT)
        assert other.reply()[1] == 0
        assert [one.reply()[1], one.reply()[1]] == [0, 0]
        assert begun.state is State.MAKING
        with images[0].open("rb") as file:
            was = b"".join(begun.read(file.fileno(), chunk) for chunk in range(size // CHUNK))
        assert capture.stop() == 0
    entries = list(journal_entries(capture.journal))
    zeroed = [e.record.seq for e in entries if e.record.op in (fmt.Op.DISCARD, fmt.Op.ZERO)]
    (others,) = [e.record.seq for e in entries if e.record.disk == 1 and e.record.op == fmt.Op.WRITE]
    assert zeroed[0] < others < zeroed[-1], "the other disk's write waited for all of it"
    assert first_difference(was, before[0]) is None, "what was kept is not what the disk was"
    history = compose(entries, dict(enumerate(before)))
    for index, image in enumerate(images):
        assert first_difference(history[index], image.read_bytes()) is None
    assert images[0].read_bytes()[size - MIB :][:9] == b"behind it"
