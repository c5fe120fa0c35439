"""What is found on disks: tables of partitions, logical volumes, file systems, qcow2 of all kinds; what is uncertain."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest

from tests import file_systems as fs
from vmrewind.errors import FileError
from vmrewind.recover.files.client import ImageOf, Reader
from vmrewind.recover.files.opening import ImageFile
from vmrewind.recover.files.qcow2 import Qcow2
from vmrewind.recover.files.wire import Volume

MIB = 1 << 20


def looked_at(*images: Path, kind: str = "raw") -> list[Volume]:
    with Reader() as reader:
        return reader.open({f"vd{'abc'[n]}": [ImageOf(ImageFile(str(image)), kind)] for n, image in enumerate(images)})


def source(directory: Path) -> Path:
    (directory / "source").mkdir()
    (directory / "source" / "file").write_bytes(b"content of the file")
    return directory / "source"


def test_logical_volumes_are_read(tmp_path: Path) -> None:
    root = fs.ext(tmp_path / "root", 4 * MIB, source(tmp_path))
    stick = fs.fat(tmp_path / "stick", 2 * MIB, tmp_path / "source", bits=12)
    disk = fs.disk(tmp_path / "disk", 16 * MIB, [fs.lvm(tmp_path / "pv", 12 * MIB, {"root": root, "stick": stick})])
    with Reader() as reader:
        volumes = {volume.name: volume for volume in reader.open({"vda": [ImageOf(ImageFile(str(disk)), "raw")]})}
        assert {name: volume.filesystem for name, volume in volumes.items()} == {
            "vda1": "lvm",
            "vg/root": "ext4",
            "vg/stick": "fat12",
        }
        for name in ("vg/root", "vg/stick"):
            entry = reader.lookup(name, b"/file")
            assert b"".join(piece.data for piece in reader.content(name, entry.inode)) == b"content of the file"
            assert reader.extents(name, entry.inode).disk is None


@pytest.mark.parametrize("label", ["dos", "gpt"])
def test_partitions_of_both_tables(tmp_path: Path, label: str) -> None:
    files = source(tmp_path)
    parts = [fs.ext(tmp_path / kind, 4 * MIB, files, kind=kind) for kind in ("ext2", "ext3", "ext4")]
    volumes = looked_at(fs.disk(tmp_path / "disk", 16 * MIB, parts, label))
    assert [(volume.name, volume.filesystem, volume.size) for volume in volumes] == [
        ("vda1", "ext2", 4 * MIB),
        ("vda2", "ext3", 4 * MIB),
        ("vda3", "ext4", 4 * MIB),
    ]


def test_file_systems_that_were_in_use_say_so(tmp_path: Path) -> None:
    ntfs = fs.ntfs(tmp_path / "ntfs", 4 * MIB, {})
    content = bytearray(ntfs.read_bytes())
    at = content.index(struct.pack("<IIBBHHHIH", 0x70, 40, 0, 0, 24, 0, 5, 12, 24))
    content[at + 24 + 10] |= 1
    ntfs.write_bytes(content)
    fat = fs.fat(tmp_path / "fat", 8 * MIB, source(tmp_path))
    content = bytearray(fat.read_bytes())
    reserved = struct.unpack_from("<H", content, 14)[0] * 512
    content[reserved + 3] &= 0x7F
    fat.write_bytes(content)
    xfs = fs.xfs(tmp_path / "xfs", 20 * MIB, "/dummy\n0 0\nd--755 0 0\n$\n")
    assert looked_at(xfs)[0].notes == []
    content = bytearray(xfs.read_bytes())
    header = content.index(b"\xfe\xed\xba\xbe")
    content[header + 512 + 9] &= 0xDF
    xfs.write_bytes(content)
    told = [volume.notes for volume in looked_at(ntfs, fat, xfs)]
    assert [len(notes) for notes in told] == [1, 1, 1], told
    assert "NTFS was in use" in told[0][0] and "FAT16 was in use" in told[1][0] and "XFS's log" in told[2][0]


@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "compat=1.1,compression_type=zstd", "cluster_size=4096"])
def test_qcow2_is_what_qemu_says(tmp_path: Path, options: str) -> None:
    chosen = random.Random(5)
    backing, base, top = tmp_path / "backing.raw", tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    backing.write_bytes(b"".join(chosen.choice([bytes(4096), chosen.randbytes(512) * 8]) for _ in range(512)))
    subprocess.run(["qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, backing, base], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, top, "3M"], check=True)
    words = ["write -P 1 1000000 70000", "write -z 200000 300000", "discard 0 65536", "write -P 2 2500000 1000"]
    fs.run("qemu-io", "-f", "qcow2", top, *(word for w in words for word in ("-c", w)))
    subprocess.run(["qemu-img", "convert", "-O", "raw", top, tmp_path / "truth"], check=True)
    truth = (tmp_path / "truth").read_bytes()
    disk = Qcow2(ImageFile(str(top)), Qcow2(ImageFile(str(base)), None))
    assert disk.size == len(truth)
    assert disk.read(0, disk.size) == truth
    for _ in range(50):
        offset, length = chosen.randrange(disk.size), chosen.randrange(200_000)
        assert disk.read(offset, length) == truth[offset : offset + length]
    with pytest.raises(FileError, match="backing file"):
        Qcow2(ImageFile(str(top)), None)


def test_a_qcow2_image_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", image, "3M"], check=True)
    with pytest.raises(FileError, match="features 0x10"):
        Qcow2(ImageFile(str(image)), None)
