"""The images that a capture serves: block devices, qcow2 files, who else has them open, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.capture_tools import MIB, RUN, Capture, Client, DiskOf, compose, first_difference, journal_entries, raw_image
from vmrewind.capture.image import Image, qcow2_export_size
from vmrewind.errors import ImageError, VmStateError
from vmrewind.nbd import protocol as nbd


def run(*command: object, code: int = 0) -> str:
    """Run a program that must end with ``code``; what it said."""
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


# -- block devices


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device of 8 MiB."""
    backing = raw_image(tmp_path / "backing", 8 * MIB, fill=True)
    path = Path(run("losetup", "--find", "--show", backing).strip())
    yield path
    run("losetup", "--detach", path)


def content(path: Path) -> bytes:
    return path.read_bytes()


def test_a_block_device_is_protected_like_a_file(tmp_path: Path, device: Path) -> None:
    before = content(device)
    with Capture(tmp_path, [DiskOf("vda", device)]) as capture:
        with Client(capture.socket_path) as client:
            assert client.size == 8 * MIB
            assert not client.flags & nbd.FLAG_SEND_FAST_ZERO
            client.write(1000, b"x" * 9999)
            client.do(nbd.CMD_TRIM, MIB, 2 * MIB)
            client.do(nbd.CMD_WRITE_ZEROES, 4 * MIB + 1, 100_000)
            client.do(nbd.CMD_WRITE_ZEROES, 5 * MIB, MIB, flags=nbd.CMD_FLAG_NO_HOLE)
            client.flush()
            assert client.read(MIB, 2 * MIB) == bytes(2 * MIB)
            assert client.read(4 * MIB, 100_002) == before[4 * MIB : 4 * MIB + 1] + bytes(100_000) + before[4 * MIB + 100_001 :][:1]
        assert capture.stop() == 0
        after = content(device)
        assert first_difference(compose(list(journal_entries(capture.journal)), {0: before})[0], after) is None
        head = json.loads((capture.journal / "head.json").read_bytes())
        assert head["images"]["vda"]["device"] == device.stat().st_rdev


def test_a_mounted_device_is_refused(tmp_path: Path, device: Path) -> None:
    run("mke2fs", "-q", "-F", "-t", "ext4", device)
    place = tmp_path / "mounted"
    place.mkdir()
    run("mount", device, place)
    try:
        with pytest.raises(ImageError, match=f"{device}: the device is in use") as caught:
            Capture(tmp_path, [DiskOf("vda", device)]).start()
        assert "unmount" in caught.value.hint
    finally:
        run("umount", place)
    with Capture(tmp_path, [DiskOf("vda", device)], run=RUN + 1):
        pass


def test_a_device_that_a_capture_serves_cannot_be_mounted(tmp_path: Path, device: Path) -> None:
    run("mke2fs", "-q", "-F", "-t", "ext4", device)
    place = tmp_path / "mounted"
    place.mkdir()
    with Capture(tmp_path, [DiskOf("vda", device)]):
        assert "already mounted or mount point busy" in run("mount", device, place, code=32)


# -- qcow2


def qcow2(path: Path, size: str, *options: str) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, size)
    return path


def fill(uri: str, size: int, pattern: int = 0x5A) -> None:
    """Write the whole virtual disk through QEMU's qcow2 driver on top of the export."""
    words: list[str] = []
    for offset in range(0, size, 8 * MIB):
        words += ["-c", f"write -P {pattern} {offset} {min(8 * MIB, size - offset)}"]
    # No discard of what a write frees: the worst case for the file's length.
    said = run("qemu-io", "-f", "qcow2", uri, *words)
    assert "failed" not in said


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-o", "cluster_size=4k"),
        ("-o", "cluster_size=16k,extended_l2=on"),
        ("-o", "compat=0.10"),
        ("-o", "refcount_bits=64,cluster_size=4k"),
        ("-o", "preallocation=full"),
    ],
    ids=lambda options: "-".join(options[1:]) or "default",
)
def test_a_qcow2_image_has_room_for_its_whole_disk(tmp_path: Path, options: tuple[str, ...]) -> None:
    image = qcow2(tmp_path / "a.qcow2", "48M", *options)
    blocks = image.stat().st_blocks
    with Capture(tmp_path, [DiskOf("vda", image, "qcow2")], journal_size=96 * MIB) as capture:
        assert image.stat().st_size >= 48 * MIB
        assert image.stat().st_blocks <= blocks + 8, "sparse: it costs nothing"
        fill(capture.uri(), 48 * MIB)
        assert "No errors were found" in run("qemu-img", "check", "-f", "qcow2", capture.uri())
        assert capture.stop() == 0
    assert "No errors were found" in run("qemu-img", "check", image)
    assert "failed" not in run("qemu-io", "-f", "qcow2", "-c", "read -P 0x5a 0 48M", image)
    extended = image.stat()
    opened = Image(0, "vda", str(image), "qcow2")
    assert opened.size == extended.st_size
    opened.close()
    assert image.stat().st_mtime_ns == extended.st_mtime_ns, "extended once, untouched since"


def test_internal_snapshots_are_allowed_for(tmp_path: Path) -> None:
    """A snapshot holds on to its clusters, so the disk may be written once more beside them."""
    image = qcow2(tmp_path / "a.qcow2", "64M", "-o", "cluster_size=64k")
    fill(str(image), 64 * MIB, 0x11)
    run("qemu-img", "snapshot", "-c", "before", image)
    fill(str(image), 64 * MIB, 0x22)
    run("qemu-img", "snapshot", "-c", "again", image)
    with Capture(tmp_path, [DiskOf("vda", image, "qcow2")], journal_size=128 * MIB) as capture:
        fill(capture.uri(), 64 * MIB, 0x33)
    assert "No errors were found" in run("qemu-img", "check", image)


def test_a_snapshot_made_through_the_export_leaves_its_size_as_it_is(tmp_path: Path) -> None:
    """The base and the records are of that size, so history could not go on with another one."""
    image = qcow2(tmp_path / "a.qcow2", "256M")
    with Capture(tmp_path, [DiskOf("vda", image, "qcow2")], journal_size=96 * MIB) as capture:
        size = capture.ready["disks"]["vda"]["size"]
        run("qemu-img", "snapshot", "-c", "before", "--image-opts", f"driver=qcow2,file.driver=nbd,file.export=vda,"
            f"file.server.type=unix,file.server.path={capture.socket_path}")  # fmt: skip
        assert capture.stop() == 0
    before = image.stat()
    opened = Image(0, "vda", str(image), "qcow2", size)
    assert opened.size == size
    opened.extend()
    opened.close()
    assert (image.stat().st_size, image.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with Capture(tmp_path, [DiskOf("vda", image, "qcow2", size)], run=RUN + 1) as capture:
        assert capture.ready["disks"]["vda"]["size"] == size


def test_a_file_that_is_shorter_than_its_export_is_extended_when_asked(tmp_path: Path) -> None:
    image = qcow2(tmp_path / "a.qcow2", "256M")
    length = image.stat().st_size
    opened = Image(0, "vda", str(image), "qcow2", 400 * MIB)
    assert (opened.size, image.stat().st_size) == (400 * MIB, length)
    opened.extend()
    opened.close()
    assert image.stat().st_size == 400 * MIB


def test_an_image_that_outgrew_its_export_is_of_another_size(tmp_path: Path) -> None:
    """Resized while off, its virtual disk or its file: nothing is changed before that is told."""
    image = qcow2(tmp_path / "a.qcow2", "256M")
    Image(0, "vda", str(image), "qcow2").close()
    size = image.stat().st_size
    run("qemu-img", "resize", "-q", image, "2G")
    length = image.stat().st_size
    opened = Image(0, "vda", str(image), "qcow2", size)
    assert opened.size > 2 << 30
    opened.close()
    assert image.stat().st_size == length
    with pytest.raises(ImageError, match=f"disk vda is to have {size}"):
        Capture(tmp_path, [DiskOf("vda", image, "qcow2", size)]).start()
    grown = qcow2(tmp_path / "b.qcow2", "256M")
    os.truncate(grown, size + MIB)
    opened = Image(0, "vda", str(grown), "qcow2", size)
    assert opened.size == size + MIB
    opened.close()


LARGEST = [
    (bits, size, entry)
    for bits in range(9, 22)
    for size in (1 << 20, 10 << 30, (1 << 40) + 512, 8 << 40)
    for entry in (8, 16)
    if size * entry <= 32 << 20 << 2 * bits - 3 and (entry == 8 or bits >= 14)
]
"""Cluster bits, virtual sizes and bytes of an L2 entry, as far as an L1 table of at most 32 MiB reaches."""


@pytest.mark.parametrize(("cluster_bits", "virtual", "entry"), LARGEST)
def test_the_computed_size_covers_all_clusters_and_their_metadata(cluster_bits: int, virtual: int, entry: int) -> None:
    cluster = 1 << cluster_bits

    def clusters(length: int) -> int:
        return -(-length // cluster)

    data = clusters(virtual)
    l2 = clusters(data * entry)
    l1 = clusters(l2 * 8)
    # Refcounts are 64 bits wide at most, and count their own clusters too.
    blocks = clusters((data + l2 + l1) * 8)
    blocks += clusters(blocks * 8) + 1
    table = clusters(blocks * 8)
    need = (1 + data + l2 + l1 + blocks + table) * cluster
    assert need <= qcow2_export_size(virtual, cluster, 0, entry_size=entry) <= need + need // 50 + (160 << 20)
    assert qcow2_export_size(virtual, cluster, 1 << 50) >= 1 << 50


def test_extended_l2_entries_are_allowed_for(tmp_path: Path) -> None:
    image = qcow2(tmp_path / "a.qcow2", "4T", "-o", "cluster_size=16k,extended_l2=on")
    opened = Image(0, "vda", str(image), "qcow2")
    opened.close()
    assert opened.size >= (4 << 40) + (4 << 40 >> 14) * (16 + 2)


def test_a_backing_file_is_left_in_place_and_recorded(tmp_path: Path) -> None:
    backing = raw_image(tmp_path / "backing.raw", 4 * MIB, fill=True)
    image = qcow2(tmp_path / "a.qcow2", "4M", "-b", str(backing), "-F", "raw")
    opened = Image(0, "vda", str(image), "qcow2")
    assert opened.backing == str(backing)
    assert opened.info.backing == str(backing)
    opened.close()
    before = backing.read_bytes()
    with Capture(tmp_path, [DiskOf("vda", image, "qcow2")]) as capture:
        said = run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", "-c", "read -P 7 0 64k", capture.uri())
        assert "failed" not in said
    assert backing.read_bytes() == before


def test_data_in_another_file_would_go_unprotected(tmp_path: Path) -> None:
    image = qcow2(tmp_path / "a.qcow2", "4M", "-o", f"data_file={tmp_path / 'data'}")
    with pytest.raises(ImageError, match="in another file"):
        Image(0, "vda", str(image), "qcow2")


def test_a_file_system_without_room_for_large_files_is_named(tmp_path: Path) -> None:
    place = tmp_path / "ext2"
    place.mkdir()
    small = raw_image(tmp_path / "small", 8 * MIB)
    run("mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024", small)
    run("mount", "-o", "loop", small, place)
    try:
        # With 1 KiB blocks ext2 ends at 16 GiB.
        image = qcow2(place / "a.qcow2", "20G")
        with pytest.raises(ImageError, match="cannot be extended"):
            Image(0, "vda", str(image), "qcow2")
    finally:
        run("umount", place)


def test_raw_content_that_claims_to_be_qcow2_is_refused(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", MIB, fill=True)
    with pytest.raises(ImageError, match="not a qcow2 image"):
        Image(0, "vda", str(image), "qcow2")
    image.write_bytes(b"QFI\xfb")
    with pytest.raises(ImageError, match="qcow2 version 0"):
        Image(0, "vda", str(image), "qcow2")


# -- who has it


def test_qemu_sees_that_a_capture_has_the_image(tmp_path: Path) -> None:
    raw, cow = raw_image(tmp_path / "a.raw", MIB), qcow2(tmp_path / "a.qcow2", "1M")
    with Capture(tmp_path, [DiskOf("vda", raw), DiskOf("vdb", cow, "qcow2")]):
        assert 'Failed to get "write" lock' in run("qemu-io", "-f", "raw", "-c", "write 0 512", raw, code=1)
        assert 'Failed to get "write" lock' in run("qemu-io", "-f", "qcow2", "-c", "write 0 512", cow, code=1)
        assert 'Failed to get shared "write" lock' in run("qemu-img", "info", cow, code=1)
        assert "1 MiB" in run("qemu-img", "info", "-U", cow)
    assert "wrote" in run("qemu-io", "-f", "raw", "-c", "write 0 512", raw)


def test_a_capture_sees_that_qemu_has_the_image(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", MIB)
    qemu = subprocess.Popen(["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert qemu.stdin is not None
    assert qemu.stdout is not None
    try:
        qemu.stdin.write(b"write 0 512\n")
        said = b""
        while b"wrote" not in said:
            said += qemu.stdout.read(1)
        with pytest.raises(ImageError, match=re.escape(f"{image}: the image is in use by qemu-io (pid {qemu.pid})")):
            Capture(tmp_path, [DiskOf("vda", image)]).start()
    finally:
        qemu.stdin.close()
        qemu.wait()
        qemu.stdout.close()
    with Capture(tmp_path, [DiskOf("vda", image)], run=RUN + 1):
        pass


def test_a_reader_that_cannot_stand_writers_is_seen(tmp_path: Path) -> None:
    image = qcow2(tmp_path / "a.qcow2", "1M")
    qemu = subprocess.Popen(["qemu-io", "-r", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert qemu.stdin is not None
    assert qemu.stdout is not None
    try:
        qemu.stdin.write(b"read 0 512\n")
        said = b""
        while b"read 512" not in said:
            said += qemu.stdout.read(1)
        with pytest.raises(ImageError, match="in use by qemu-io"):
            Image(0, "vda", str(image), "qcow2")
    finally:
        qemu.stdin.close()
        qemu.wait()
        qemu.stdout.close()


def test_two_captures_never_serve_one_image(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", MIB)
    other = tmp_path / "other"
    other.mkdir()
    with Capture(tmp_path, [DiskOf("vda", image)]) as first:
        pid = first.pid
        with pytest.raises(ImageError, match=rf"in use by python\S* \(pid {pid}\)"):
            Capture(other, [DiskOf("vda", image)]).start()


def test_one_image_twice_in_one_capture_is_refused(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", MIB)
    with pytest.raises(ImageError, match="in use"):
        Capture(tmp_path, [DiskOf("vda", image), DiskOf("vdb", image)]).start()


def test_two_captures_never_share_a_journal(tmp_path: Path) -> None:
    first = Capture(tmp_path, [DiskOf("vda", raw_image(tmp_path / "a.raw", MIB))])
    with first, pytest.raises(VmStateError, match="another capture"):
        Capture(tmp_path, [DiskOf("vda", raw_image(tmp_path / "b.raw", MIB))], run=RUN + 1).start()


# -- what is no image


def make_nothing(path: Path) -> None:
    """Leaves the path without anything."""


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_nothing, "no such image"),
        (Path.mkdir, "Is a directory"),
        (Path.touch, "the image is empty"),
        (lambda path: path.write_bytes(bytes(1000)), "1000 bytes is not a whole number of 512-byte sectors"),
        (make_fifo, "neither a file nor a block device"),
        (lambda path: path.symlink_to("/dev/null"), "neither a file nor a block device"),
        (lambda path: path.symlink_to("nowhere"), "no such image"),
    ],
    ids=["missing", "directory", "empty", "half a sector", "fifo", "character device", "dangling link"],
)
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, make: object, said: str) -> None:
    path = tmp_path / "image"
    assert callable(make)
    make(path)
    with pytest.raises(ImageError, match=re.escape(str(path))) as caught:
        Capture(tmp_path, [DiskOf("vda", path)]).start()
    assert said in str(caught.value)
    assert not (tmp_path / "journal" / "head.json").exists()


def test_an_image_that_changed_since_it_was_planned_is_refused(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", MIB)
    capture = Capture(tmp_path, [DiskOf("vda", image)])
    opened = Image(0, "vda", str(image), "raw")
    identity = opened.identity()
    opened.close()
    assignment = capture.assignment()
    assignment["disks"][0]["identity"] = {
        "path": identity.path,
        "size": identity.size,
        "mtime_ns": identity.mtime_ns,
        "inode": identity.inode,
        "device": 0,
    }
    capture.assignment = lambda: assignment  # type: ignore[method-assign]
    with capture:
        assert capture.stop() == 0
    with open(image, "r+b") as file:
        file.write(b"somebody else")
    later = Capture(tmp_path, [DiskOf("vda", image)], run=RUN + 1)
    assignment["run"] = f"{RUN + 1:016x}"
    assignment["nbd_fd"], assignment["control_fd"] = later.assignment()["nbd_fd"], later.assignment()["control_fd"]
    later.assignment = lambda: assignment  # type: ignore[method-assign]
    with pytest.raises(ImageError, match="changed while the VM was being started"):
        later.start()
