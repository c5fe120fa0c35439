"""What capture knows to be uncertain outlives it: a fault, a kill or an upgrade, then a clean stop claims no more than is true."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.capture_tools import MIB, RUN, Capture, Client, DiskOf, compose, first_difference, journal_entries, until
from tests.fault_tools import failing
from tests.faults.test_capture_bypass import SIZE, capture_of
from vmrewind.capture.policy import RUN_DONE
from vmrewind.journal import format as fmt
from vmrewind.nbd import protocol as nbd

CHUNK = 128 << 10
ENDS = ["nothing", "killed", "handed over"]


def filled(capture: Capture, times: int = SIZE // CHUNK) -> None:
    with Client(capture.socket_path, timeout=20) as client:
        for i in range(times):
            client.write(i * CHUNK % SIZE, bytes([i & 255]) * CHUNK)
        client.flush()


def resumed(capture: Capture, how: str) -> None:
    """Have another process take this one's place in the run."""
    assert capture.process is not None
    if how == "killed":
        capture.kill()
        capture.start()
    elif how == "handed over":
        capture.process.send_signal(signal.SIGUSR1)
        capture.process.wait(20)
        capture._reap()
        capture.start()


def claimed(capture: Capture) -> dict[str, Any]:
    """What the run's clean end says that the images hold."""
    assert capture.stop() == 0
    head: dict[str, Any] = json.loads((capture.journal / "head.json").read_bytes())
    return head


def lost(capture: Capture) -> list[tuple[int, int]]:
    return [(entry.record.offset, entry.record.op) for entry in journal_entries(capture.journal)]


def differs(capture: Capture) -> int | None:
    disk = compose(list(journal_entries(capture.journal)), {0: bytes(SIZE)})[0]
    return first_difference(disk, capture.disks[0].image.read_bytes())


@pytest.mark.parametrize("how", ENDS)
def test_what_others_wrote_into_an_image_is_never_claimed(tmp_path: Path, how: str) -> None:
    with capture_of(tmp_path, "drop-history", size=64 * MIB) as capture:
        filled(capture)
        image = capture.disks[0].image
        os.truncate(image, 4 * MIB)
        # Not only seen: what comes before the loss is journaled would be journaled with it.
        until(lambda: (4 * MIB, fmt.Op.ZERO) in lost(capture), "what the cut lost to be journaled")
        with open(image, "r+b") as file:
            file.seek(6 * MIB)
            file.write(b"F" * (SIZE - 6 * MIB))
        until(lambda: capture.events("image.longer"), "the new length to be seen")
        resumed(capture, how)
        assert list(claimed(capture)["images"]) == ["vdb"]
        assert differs(capture) is not None, "or this test tests nothing"


@pytest.mark.parametrize("how", ENDS)
def test_what_a_failed_write_left_and_cannot_be_read_is_never_claimed(tmp_path: Path, how: str) -> None:
    with capture_of(tmp_path, "drop-history", size=64 * MIB) as capture:
        filled(capture)
        with (
            Client(capture.socket_path) as client,
            failing(capture.pid, ["pwrite64", "pread64"], path=capture.disks[0].image),
        ):
            assert client.error(nbd.CMD_WRITE, MIB, data=b"N" * CHUNK) == nbd.EIO
            until(lambda: capture.events("image.read-failed"), "the read to fail")
            if how == "killed":
                capture.kill()
            with open(capture.disks[0].image, "r+b") as file:
                file.seek(MIB)
                file.write(b"N" * 4096)
        if how == "killed":
            capture.start()
        else:
            resumed(capture, how)
            if how == "nothing":
                until(lambda: differs(capture) is None, "what it left to be read")
        images = claimed(capture)["images"]
        assert "vda" not in images or differs(capture) is None


@pytest.mark.parametrize("how", ["killed", "handed over"])
def test_a_lost_map_of_a_bypass_means_that_all_is_to_be_resynced(tmp_path: Path, how: str) -> None:
    with capture_of(tmp_path, size=8 * MIB) as capture:
        filled(capture, 100)
        assert capture.instruct(command="status")["bypass"] is not None
        with Client(capture.socket_path) as client:
            client.write(4 * MIB, b"elsewhere" * 1000)
            client.flush()
        capture.socket_path.with_suffix(".dirty").unlink()
        resumed(capture, how)
        assert capture.events("bypass.map-lost")
        assert not capture.instruct(command="mark", name="m")["ok"], "no bookmark within a gap"
        word = {"runs": {fmt.run_name(capture.run): RUN_DONE}}
        (capture.journal / "shipped.json").write_text(json.dumps(word))
        until(lambda: capture.instruct(command="status")["bypass"] is None, "the resync")
        head = claimed(capture)
        assert (list(head["images"]), head.get("gap")) == (["vda", "vdb"], None)


@pytest.mark.parametrize("policy", ["drop-history", "bypass"])
def test_reserved_space_that_somebody_deleted_is_had_anew(tmp_path: Path, policy: str) -> None:
    with capture_of(tmp_path, policy) as capture:
        for file in capture.journal.glob("free-*.seg"):
            file.unlink()
        filled(capture, 40)
        assert capture.instruct(command="status").get("bypass") is None
        assert differs(capture) is None
        assert not capture.events("journal.full")


def test_a_run_that_ended_within_a_bypass_does_not_make_the_next_one_bypass(tmp_path: Path) -> None:
    with capture_of(tmp_path) as capture:
        filled(capture, 100)
        assert capture.stop() == 0
    images = [disk.image for disk in capture.disks]
    disks = [DiskOf("vda", images[0]), DiskOf("vdb", images[1])]
    with Capture(tmp_path, disks, journal_size=8 * MIB, full="bypass", run=RUN + 1) as following:
        assert following.instruct(command="status")["bypass"] is None
        assert not following.events("bypass.map-lost")
        kinds = [entry.record.flags for entry in journal_entries(following.journal, RUN + 1) if entry.record.op == fmt.Op.EVENT]
        assert kinds[:1] == [fmt.Event.START]
