"""Block devices have no modification time: what tells that one was written to while the VM was off, and what does not."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.capture_tools import MIB, until
from tests.e2e.test_start_after import Alone
from vmrewind.journal.identity import image_identity

SIZE = 16 * MIB


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device of 16 MiB."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(range(256)) * (SIZE // 256))
    made = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True, check=True).stdout.strip()
    yield Path(made)
    subprocess.run(["losetup", "--detach", made], check=True)


@pytest.fixture
def alone(tmp_path: Path, device: Path) -> Alone:
    """A VM with the device for its disk, whose history has begun."""
    alone = Alone(tmp_path)
    alone.image = device
    alone.configure(repository=str(alone.repository))
    with alone.serving() as ready:
        alone.write(ready, 1)
    return alone


def gaps(alone: Alone) -> list[str]:
    lines = vmrewind("events", alone.config, "--json").stdout.splitlines()
    return [event["cause"] for event in map(json.loads, lines) if event["event"] == "history.gap"]


def resynced(alone: Alone) -> None:
    until(lambda: "resync.done" in alone.events(), "the resync")


def overwrite(device: Path) -> None:
    with open(device, "r+b") as file:
        file.seek(3 * MIB)
        file.write(b"behind our back")


def test_a_device_that_nobody_wrote_to_goes_on(alone: Alone) -> None:
    alone.image.read_bytes()
    with alone.serving() as ready:
        assert gaps(alone) == [] and "base.begun" not in alone.events()
        alone.write(ready, 2)
    assert alone.restored("latest") == alone.image.read_bytes()


@pytest.mark.parametrize("how", ["write", "discard"])
def test_a_device_written_to_while_off_is_a_gap_and_resynced(alone: Alone, how: str) -> None:
    if how == "write":
        overwrite(alone.image)
    else:
        subprocess.run(["blkdiscard", "--offset", "0", "--length", str(MIB), alone.image], check=True)
    with alone.serving():
        assert gaps(alone) == ["the image is not as the last run left it: it was changed while the VM was off"]
        resynced(alone)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_after_another_boot_nothing_is_known_of_a_device(alone: Alone) -> None:
    path = alone.journal / "head.json"
    head = json.loads(path.read_bytes())
    del head["xxh3"]
    writes = head["images"]["vda"]["writes"]
    head["images"]["vda"]["writes"] = "0" * 32 + writes[32:]
    path.write_text(json.dumps(head))
    with alone.serving():
        assert gaps(alone) == ["the host was booted since: whether anybody wrote to the device meanwhile is not known"]
        resynced(alone)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_a_backup_of_a_device_is_no_base_once_the_device_was_written_to(alone: Alone) -> None:
    vmrewind("backup", alone.config)
    overwrite(alone.image)
    with alone.serving():
        assert len(gaps(alone)) == 1
        resynced(alone)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_what_is_in_the_page_cache_only_counts_and_so_does_another_attachment(device: Path) -> None:
    fd = os.open(device, os.O_RDWR)
    try:
        first = image_identity(fd, device)
        assert first.tells and first == image_identity(fd, device)
        os.pwrite(fd, b"not written back yet", 8192)
        assert image_identity(fd, device) != first
        second = image_identity(fd, device)
    finally:
        os.close(fd)
    backing = Path("/sys/dev/block").joinpath(_number(device), "loop/backing_file").read_text().strip()
    subprocess.run(["losetup", "--detach", device], check=True)
    subprocess.run(["losetup", device, backing], check=True)
    fd = os.open(device, os.O_RDWR)
    try:
        assert image_identity(fd, device) != second
    finally:
        os.close(fd)


def test_a_device_whose_writes_the_kernel_does_not_count_is_never_trusted(alone: Alone) -> None:
    iostats = Path("/sys/dev/block") / _number(alone.image) / "queue/iostats"
    iostats.write_text("0")
    try:
        fd = os.open(alone.image, os.O_RDWR)
        try:
            assert not image_identity(fd, alone.image).tells
        finally:
            os.close(fd)
        with alone.serving():
            assert len(gaps(alone)) == 1
            resynced(alone)
        assert alone.restored("latest") == alone.image.read_bytes()
    finally:
        iostats.write_text("1")


def _number(device: Path) -> str:
    number = device.stat().st_rdev
    return f"{os.major(number)}:{os.minor(number)}"
