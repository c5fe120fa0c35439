"""Faults of an image while it is served: the client is told of what failed and nothing else, history says what the image has."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.capture_tools import MIB, Capture, Client, DiskOf, compose, first_difference, journal_entries, raw_image, until
from tests.fault_tools import failing
from vmrewind.capture.recovery import recover
from vmrewind.errors import ImageError
from vmrewind.journal.identity import image_identity
from vmrewind.journal.runs import read_head
from vmrewind.nbd import protocol as nbd

SIZE = 8 * MIB
KIB = 1024
READS = ("preadv", "preadv2", "pread64")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return raw_image(tmp_path / "a.raw", SIZE, fill=True)


def check(capture: Capture, before: bytes) -> None:
    """History says what the image holds; what a file cut short lacks counts as zeroes."""
    disk = compose(list(journal_entries(capture.journal)), {0: before})[0]
    assert first_difference(disk, capture.disks[0].image.read_bytes().ljust(SIZE, b"\0")) is None


def last_words(capture: Capture) -> dict[str, Any]:
    """What the process says when it ends by itself."""
    process = capture.process
    assert process is not None
    until(lambda: process.poll() is not None, "capture to end")
    return capture.said()


# -- EIO


def test_of_a_batch_just_the_write_that_failed_gets_the_error(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture, Client(capture.socket_path) as client:
        with failing(capture.pid, ["pwrite64"], path=image, when="2"):
            client.sock.sendall(
                client.request(nbd.CMD_WRITE, 0, data=b"one" * 1000)
                + client.request(nbd.CMD_WRITE, 1000, data=b"two" * 1000)
                + client.request(nbd.CMD_WRITE, 2000, data=b"three" * 1000, flags=nbd.CMD_FLAG_FUA)
                + client.request(nbd.CMD_FLUSH)
            )
            answers = {cookie: error for cookie, error, _ in (client.reply() for _ in range(4))}
        assert answers == {1: 0, 2: errno.EIO, 3: 0, 4: 0}
        check(capture, before)
        client.write(1000, b"two" * 1000)
        check(capture, before)
        assert capture.stop() == 0
        assert recover(capture.journal) is None


@pytest.mark.parametrize("structured", [False, True])
def test_a_read_error_is_the_reads_own(tmp_path: Path, image: Path, structured: bool) -> None:
    before = image.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture, Client(capture.socket_path, structured=structured) as client:
        with failing(capture.pid, READS, path=image):
            client.sock.sendall(
                client.request(nbd.CMD_READ, 0, 4096)
                + client.request(nbd.CMD_WRITE, 0, data=b"one" * 1000)
                + client.request(nbd.CMD_READ, 8192, 100)
                + client.request(nbd.CMD_FLUSH)
            )
            answers = {cookie: error for cookie, error, _ in (client.reply() for _ in range(4))}
            assert answers == {1: errno.EIO, 2: 0, 3: errno.EIO, 4: 0}
        assert client.read(0, 8192) == b"one" * 1000 + before[3000:8192]
        check(capture, before)


def test_what_a_failed_write_left_is_read_again_until_it_can_be(tmp_path: Path) -> None:
    """A write fails half done, and where it went cannot be read: history waits, and follows once it can."""
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    try:
        image = raw_image(place / "a.raw", SIZE)
        with open(image, "r+b") as file:
            file.write(b"x" * 512 * KIB)
        free = int(subprocess.run(["stat", "-f", "-c", "%a", place], capture_output=True, check=True).stdout) * 4096
        (place / "ballast").write_bytes(bytes(free))
        before = image.read_bytes()
        with Capture(tmp_path, [DiskOf("vda", image)]) as capture, Client(capture.socket_path) as client:
            with failing(capture.pid, READS, path=image):
                assert client.error(nbd.CMD_WRITE, 500 * KIB, data=b"\xee" * (64 * KIB)) == errno.ENOSPC
                until(lambda: capture.events("image.read-failed"), "the image to be unreadable")
                client.write(0, b"others go on")
            assert image.read_bytes()[510 * KIB] == 0xEE, "a part of it was done, or this test tests nothing"

            def level() -> bool:
                disk = compose(list(journal_entries(capture.journal)), {0: before})[0]
                return first_difference(disk, image.read_bytes()) is None

            until(level, "history to follow")
            with failing(capture.pid, READS, path=image):
                assert client.error(nbd.CMD_WRITE, 500 * KIB, data=b"\xdd" * (64 * KIB)) == errno.ENOSPC
                until(lambda: len(capture.events("image.read-failed")) > 1, "the image to be unreadable")
                assert capture.stop() == 0
            head = read_head(capture.journal)
            assert head is not None
            assert head.images == {}, "history and image may differ: the next start must find out"
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_failed_sync_of_the_image_ends_capture_and_the_next_replays(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    data = bytes(range(256)) * (4 * MIB // 256)
    with Capture(tmp_path, [DiskOf("vda", image)], journal_size=16 * MIB) as capture:
        with failing(capture.pid, ["fdatasync"], path=image), Client(capture.socket_path) as client:
            for at in range(0, len(data), 512 * KIB):
                client.write(at, data[at : at + 512 * KIB])
            client.flush()
            message = last_words(capture)
        assert (message["event"], message["kind"]) == ("error", "image")
        assert capture._reap() == ImageError.exit_code
        # What the kernel could not write it may forget: here it did.
        image.write_bytes(before)
        capture.start()
        (event,) = capture.events("capture.recovered")
        assert event["records_applied"] >= len(data) // (512 * KIB)
        check(capture, before)
        assert capture.stop() == 0
    assert first_difference(image.read_bytes()[: len(data)], data) is None


def test_no_flush_is_answered_as_done_when_nothing_can_be_synced(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture:
        with Client(capture.socket_path) as client, Client(capture.socket_path) as other:
            client.write(0, b"one")
            with failing(capture.pid, ["fdatasync"]):
                client.sock.sendall(client.request(nbd.CMD_FLUSH))
                other.sock.sendall(other.request(nbd.CMD_WRITE, 4096, data=b"two", flags=nbd.CMD_FLAG_FUA))
                for waiting in (client, other):
                    # Hung up on without an answer, a client asks again of the next capture.
                    with contextlib.suppress(ConnectionError):
                        assert waiting.reply()[1] == errno.EIO
                assert last_words(capture)["kind"] == "image"
        assert capture._reap() == ImageError.exit_code
        capture.start()
        with Client(capture.socket_path) as client:
            client.flush()
        check(capture, before)


# -- the file is not what it was


def test_a_file_cut_short_and_made_long_again(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    cut = 2 * MIB + 100
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture, Client(capture.socket_path) as client:
        client.write(4 * MIB, b"lost" * 1000)
        os.truncate(image, cut)
        client.sock.sendall(
            client.request(nbd.CMD_WRITE, MIB, data=b"fine" * 1000)
            + client.request(nbd.CMD_WRITE, 6 * MIB, data=b"never" * 1000)
            + client.request(nbd.CMD_WRITE, cut - 10, data=b"neither" * 10)
            + client.request(nbd.CMD_TRIM, 3 * MIB, 4096)
            + client.request(nbd.CMD_FLUSH)
        )
        answers = {cookie: error for cookie, error, _ in (client.reply() for _ in range(5))}
        assert answers == {2: 0, 3: errno.EIO, 4: errno.EIO, 5: errno.EIO, 6: 0}
        assert image.stat().st_size == cut, "what was lost must not come to read as zeroes"
        client.write(MIB + 4096, b"goes on")
        check(capture, before)
        (event,) = capture.events("image.cut-short")
        assert (event["bytes"], event["expected_bytes"]) == (cut, SIZE)
        os.truncate(image, MIB)
        client.write(0, b"shorter still")
        check(capture, before)
        os.truncate(image, SIZE)
        client.write(6 * MIB, b"there again" * 1000)
        check(capture, before)
        assert client.read(6 * MIB, 11) == b"there again"
        assert client.read(4 * MIB, 4000) == bytes(4000)
        assert capture.stop() == 0
        head = read_head(capture.journal)
        assert head is not None
        assert list(head.images) == ["vda"]


def test_a_file_cut_short_is_seen_without_a_write_too(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture:
        os.truncate(image, 3 * MIB)
        until(lambda: capture.events("image.cut-short"), "capture to see it")
        os.truncate(image, SIZE)
        until(lambda: capture.events("image.longer"), "capture to see it")
        check(capture, before)


def test_what_others_write_into_a_file_made_long_again_is_not_taken_for_history(tmp_path: Path, image: Path) -> None:
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture:
        os.truncate(image, 3 * MIB)
        until(lambda: capture.events("image.cut-short"), "capture to see it")
        with open(image, "ab") as file:
            file.write(bytes([7]) * (5 * MIB))
        until(lambda: [e for e in capture.events("image.longer") if e["changed"]], "capture to see it")
        assert capture.stop() == 0
        head = read_head(capture.journal)
        assert head is not None
        assert head.images == {}


def test_an_image_replaced_by_another_file_is_not_replayed_onto(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    other = raw_image(tmp_path / "other.raw", SIZE, fill=True)
    others = other.read_bytes()
    kept = tmp_path / "kept.raw"
    os.link(image, kept)
    with open(image, "rb") as file:
        disks = [DiskOf("vda", image, identity=image_identity(file.fileno(), image))]
    with Capture(tmp_path, disks) as capture:
        with Client(capture.socket_path) as client:
            client.write(0, b"one" * 1000)
            other.rename(image)
            until(lambda: capture.events("image.replaced"), "capture to see it")
            client.write(4096, b"two" * 1000)
        capture.kill()
        with pytest.raises(ImageError, match="another image than the one that the VM runs with"):
            capture.start()
        assert first_difference(image.read_bytes(), others) is None
    kept.rename(image)
    with Capture(tmp_path, disks) as capture:
        check(capture, before)
        assert image.read_bytes()[4096:4099] == b"two"
        with Client(capture.socket_path) as client:
            client.write(4096, b"three")
        image.rename(tmp_path / "away.raw")
        until(lambda: len(capture.events("image.replaced")) > 1, "capture to see it")
        assert capture.stop() == 0
        head = read_head(capture.journal)
        assert head is not None
        assert head.images == {}, "what lies there at the next start is not what was served"
