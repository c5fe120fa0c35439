"""An image that refuses a write: the client is told, history is as if it had not been, everything else goes on."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

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
)
from vmrewind.capture.recovery import recover
from vmrewind.errors import ImageError
from vmrewind.journal import format as fmt
from vmrewind.journal.state import StatePage
from vmrewind.nbd import protocol as nbd

SIZE = 8 * MIB
KIB = 1024


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 1 MiB, of which a quarter is left."""
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def image(full: Path) -> Path:
    """A sparse image whose first 512 KiB are allocated, and nothing else can be."""
    path = raw_image(full / "a.raw", SIZE)
    with open(path, "r+b") as file:
        file.write(b"allocated" * 58254)
        file.truncate(SIZE)
    free = int(subprocess.run(["stat", "-f", "-c", "%a", full], capture_output=True, check=True).stdout) * 4096
    (full / "ballast").write_bytes(bytes(free))
    return path


def make_room(full: Path) -> None:
    (full / "ballast").unlink()


def check(capture: Capture, before: bytes) -> None:
    """History says what the image holds."""
    disk = compose(list(journal_entries(capture.journal)), {0: before})[0]
    assert first_difference(disk, capture.disks[0].image.read_bytes()) is None


def test_only_the_refused_write_fails(tmp_path: Path, full: Path, image: Path) -> None:
    before = image.read_bytes()
    capture = Capture(tmp_path, [DiskOf("vda", image)])
    # The log lies on the full file system too: that must not hurt anybody.
    capture.events_path = full / "events.jsonl"
    with capture, Client(capture.socket_path) as client:
        client.sock.sendall(
            client.request(nbd.CMD_WRITE, 0, data=b"one" * 1000)
            + client.request(nbd.CMD_WRITE, 4 * MIB, data=b"never" * 1000)
            + client.request(nbd.CMD_WRITE, 5000, data=b"two" * 1000, flags=nbd.CMD_FLAG_FUA)
            + client.request(nbd.CMD_WRITE, 6 * MIB, data=b"never" * 1000, flags=nbd.CMD_FLAG_FUA)
            + client.request(nbd.CMD_WRITE, 10_000, data=b"three" * 1000)
        )
        answers = {cookie: error for cookie, error, _ in (client.reply() for _ in range(5))}
        assert answers == {1: 0, 2: errno.ENOSPC, 3: 0, 4: errno.ENOSPC, 5: 0}
        entries = list(journal_entries(capture.journal))
        by_seq = {entry.record.seq: entry.record for entry in entries}
        voided = [by_seq[entry.record.offset].offset for entry in entries if entry.record.op == fmt.Op.VOID]
        assert voided == [4 * MIB, 6 * MIB]
        check(capture, before)
        assert client.read(4 * MIB, 5000) == bytes(5000)
        make_room(full)
        client.write(4 * MIB, b"now" * 1000)
        client.flush()
        assert client.read(4 * MIB, 3000) == b"now" * 1000
        check(capture, before)
        assert capture.stop() == 0
        assert recover(capture.journal) is None


def test_what_a_refused_write_did_do_is_history_too(tmp_path: Path, full: Path, image: Path) -> None:
    """It reaches from allocated space into a hole: its first part is in the image for good."""
    before = image.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture, Client(capture.socket_path) as client:
        assert client.error(nbd.CMD_WRITE, 500 * KIB, data=b"\xee" * (64 * KIB)) == errno.ENOSPC
        after = image.read_bytes()
        assert after != before, "a part of it was done, or this test tests nothing"
        check(capture, before)
        assert client.read(500 * KIB, 64 * KIB) == after[500 * KIB : 564 * KIB]
        (event,) = capture.events("image.write-failed")
        assert (event["disk"], event["errors"]) == ("vda", ["No space left on device"])
        entries = list(journal_entries(capture.journal))
        (void,) = (entry.record for entry in entries if entry.record.op == fmt.Op.VOID)
        at_void = compose(entries, {0: before}, void.seq)[0]
        assert first_difference(at_void, before) is None, "until then history is as if it had never been"


def test_zeroes_that_must_stay_allocated_are_refused_alike(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture, Client(capture.socket_path) as client:
        assert client.error(nbd.CMD_WRITE_ZEROES, 256 * KIB, 2 * MIB, flags=nbd.CMD_FLAG_NO_HOLE) == errno.ENOSPC
        check(capture, before)
        assert client.error(nbd.CMD_WRITE_ZEROES, 256 * KIB, 2 * MIB) == 0
        assert client.error(nbd.CMD_WRITE_ZEROES, 0, 4096, flags=nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO) in (
            0,
            errno.ENOTSUP,
        )
        check(capture, before)


def test_a_large_write_of_several_records_fails_as_one(tmp_path: Path, image: Path) -> None:
    before = image.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image)], journal_size=64 * MIB) as capture, Client(capture.socket_path) as client:
        assert client.error(nbd.CMD_WRITE, 0, data=b"\xaa" * SIZE) == errno.ENOSPC
        client.write(0, b"goes on")
        check(capture, before)
    other = tmp_path / "small segments"
    other.mkdir()
    with (
        Capture(other, [DiskOf("vda", image)], journal_size=24 * MIB, run=RUN + 1) as capture,
        Client(capture.socket_path) as client,
    ):
        before = image.read_bytes()
        assert client.error(nbd.CMD_WRITE, 100, data=b"\xbb" * (SIZE - 100)) == errno.ENOSPC
        disk = compose(list(journal_entries(capture.journal, RUN + 1)), {0: before})[0]
        assert first_difference(disk, image.read_bytes()) is None


def test_a_killed_capture_does_not_revive_what_was_refused(tmp_path: Path, full: Path, image: Path) -> None:
    before = image.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture:
        capture.describe_run()
        with Client(capture.socket_path) as client:
            client.write(0, b"one")
            assert client.error(nbd.CMD_WRITE, 4 * MIB, data=b"never" * 1000) == errno.ENOSPC
            assert client.error(nbd.CMD_WRITE, 500 * KIB, data=b"\xee" * (64 * KIB)) == errno.ENOSPC
        capture.kill()
        after = image.read_bytes()
        capture.start()
        assert first_difference(image.read_bytes(), after) is None
        capture.kill()
        # After the host's death everything is replayed, onto an image that may be as old as the run.
        subprocess.run(["mount", "-o", "remount,size=16m", full], check=True)
        image.write_bytes(before)
        with open(capture.journal / "capture.state", "r+b") as file:
            file.seek(16)
            file.write(bytes(16))
        assert recover(capture.journal) is not None
        assert first_difference(image.read_bytes(), after) is None
        check(capture, before)


def test_a_replay_that_the_image_refuses_says_so_and_loses_nothing(tmp_path: Path, full: Path, image: Path) -> None:
    capture = Capture(tmp_path, [DiskOf("vda", image)])
    with capture:
        capture.describe_run()
        make_room(full)
        with Client(capture.socket_path) as client:
            client.write(2 * MIB, b"x" * 4096)
        capture.kill()
        with open(image, "r+b") as file:
            file.truncate(2 * MIB)
            file.truncate(SIZE)
        free = int(subprocess.run(["stat", "-f", "-c", "%a", full], capture_output=True, check=True).stdout) * 4096
        (full / "ballast").write_bytes(bytes(free))
        state = StatePage(capture.journal)
        state.set_applied(0)
        state.close()
        with pytest.raises(ImageError, match="cannot be brought to record 2, which the journal holds: No space left on device"):
            recover(capture.journal)
        make_room(full)
        recovered = recover(capture.journal)
        assert recovered is not None
        assert recovered.records_applied == 1
        assert image.read_bytes()[2 * MIB : 2 * MIB + 4096] == b"x" * 4096


def test_a_full_journal_makes_history_wait_and_the_next_write_too(tmp_path: Path, full: Path, image: Path) -> None:
    """There is always room to void; for what the refused write left behind there may not be."""
    before = image.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image)], journal_size=8 * MIB, full="block") as capture:
        with Client(capture.socket_path) as client, Client(capture.socket_path) as other:
            for i in range(40):
                client.write(i * 1000, bytes([i]) * (200 * KIB))
            assert client.error(nbd.CMD_WRITE, 512 * KIB - 12 * KIB, data=b"\xcc" * (16 * KIB)) == errno.ENOSPC
            other.sock.sendall(other.request(nbd.CMD_WRITE, 0, data=b"later"))
            until(lambda: capture.instruct(command="status")["journal_full"], "the journal to be full")
            assert capture.instruct(command="mark", name="x")["kind"] == "space"
            (capture.journal / "shipped.json").write_text(json.dumps({"runs": {fmt.run_name(RUN): 30}}))
            assert other.reply()[1] == 0
            assert capture.instruct(command="mark", name="x")["ok"]
        image_now = image.read_bytes()
        entries = list(journal_entries(capture.journal))
        known = compose(entries, {0: image_now})[0]
        assert first_difference(known, image_now) is None
        (void,) = (entry.record for entry in entries if entry.record.op == fmt.Op.VOID)
        as_is = [entry for entry in entries if entry.record.seq in (void.seq + 1, void.seq + 2)]
        assert [entry.record.op for entry in as_is] == [fmt.Op.WRITE, fmt.Op.ZERO]
        assert as_is[0].payload == b"\xcc" * (12 * KIB)
        assert before[: 12 * KIB] != as_is[0].payload


# -- an image that takes writes and loses them


@pytest.fixture
def thin_device(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(A loop device of 8 MiB, the 1 MiB file system it lies on): it takes writes into its cache and cannot write them back."""
    place = tmp_path / "thin"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    raw_image(place / "backing", SIZE)
    made = subprocess.run(["losetup", "--find", "--show", place / "backing"], capture_output=True, text=True, check=True)
    yield Path(made.stdout.strip()), place
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
    subprocess.run(["umount", place], check=True)


def test_writes_that_the_image_lost_are_replayed(tmp_path: Path, thin_device: tuple[Path, Path]) -> None:
    """The kernel reports a lost write once; asked again it says that all is well. The journal knows better."""
    device, place = thin_device
    data = bytes(range(256)) * (4 * MIB // 256)
    with Capture(tmp_path, [DiskOf("vda", device)], journal_size=16 * MIB) as capture:
        with Client(capture.socket_path) as client:
            for at in range(0, len(data), 512 * KIB):
                client.write(at, data[at : at + 512 * KIB])
            client.flush()
        # A segment is full, so a checkpoint comes within a second, and the device refuses it.
        message = capture.said()
        assert (message["event"], message["kind"]) == ("error", "image")
        assert "cannot be written to stable storage" in message["message"]
        assert capture.process is not None
        assert capture.process.wait(60) == ImageError.exit_code
        capture._reap()
        assert capture.events("image.sync-failed")
        subprocess.run(["mount", "-o", "remount,size=32m", place], check=True)
        # What was in the cache only is now gone from it, as it would be sooner or later.
        subprocess.run(["blockdev", "--flushbufs", device], check=True)
        assert device.read_bytes()[: len(data)] != data, "the device lost nothing, so this test tests nothing"
        capture.start()
        with Client(capture.socket_path) as client:
            assert first_difference(client.read(0, len(data)), data) is None
        assert capture.stop() == 0
    assert first_difference(device.read_bytes()[: len(data)], data) is None
