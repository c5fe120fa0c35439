"""File systems and partitioned disks made without root and without mounting, and changes between two states of a served disk."""

from __future__ import annotations

import struct
import subprocess
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guests.images import raw_image, tool
from tests.capture_tools import Client

MIB = 1 << 20
BLOCK = 4096


def run(*command: object, text: str | None = None) -> str:
    """A tool; fails with what it said."""
    words = [tool(str(command[0])), *(str(word) for word in command[1:])]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def ext(path: Path, size: int, source: Path, *options: str, kind: str = "ext4") -> Path:
    """ext2, ext3 or ext4 with the files of a directory."""
    run("mke2fs", "-q", "-F", "-t", kind, "-b", "1024", *options, "-d", source, raw_image(path, size))
    return path


def debugfs(path: Path, *commands: str) -> None:
    """Changes of an ext file system in place."""
    done = subprocess.run(
        [tool("debugfs"), "-w", "-f", "-", path], input="\n".join(commands), capture_output=True, text=True, check=False
    )
    wrong = [line for line in done.stderr.splitlines()[1:] if "Allocated inode" not in line]
    assert done.returncode == 0 and not wrong, done.stderr


def xfs(path: Path, size: int, prototype: str) -> Path:
    """XFS with what a prototype file tells."""
    described = path.with_suffix(".prototype")
    described.write_text(prototype)
    run("mkfs.xfs", "--unsupported", "-q", "-p", described, raw_image(path, size))
    return path


def ntfs(path: Path, size: int, files: Mapping[str, Path]) -> Path:
    """NTFS with files in its root directory."""
    run("mkntfs", "-F", "-q", "-L", "Windows", raw_image(path, size))
    for name, source in files.items():
        ntfs_copy(path, source, name)
    return path


def ntfs_copy(path: Path, source: Path, name: str) -> None:
    """A file into an NTFS."""
    run("ntfscp", "-q", path, source, name)


def fat(path: Path, size: int, source: Path, bits: int = 16) -> Path:
    """FAT with the files of a directory."""
    run("mkfs.vfat", "-F", bits, "-s", 1, "-n", "STICK", raw_image(path, size))
    run("mcopy", "-s", "-i", path, *sorted(source.iterdir()), "::")
    return path


def disk(path: Path, size: int, parts: Sequence[Path], label: str = "gpt") -> Path:
    """A partitioned disk with these images as its partitions, aligned to MiB."""
    raw_image(path, size)
    start, lines = MIB, [f"label: {label}"]
    places = []
    for part in parts:
        length = part.stat().st_size
        lines.append(f"start={start // 512}, size={length // 512}")
        places.append(start)
        start += -(-length // MIB) * MIB
    run("sfdisk", "--quiet", "--no-tell-kernel", path, text="\n".join(lines) + "\n")
    for part, place in zip(parts, places, strict=True):
        put(path, place, part)
    return path


def put(path: Path, offset: int, part: Path) -> None:
    """A partition's content to where it belongs."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(part.read_bytes())


def write_changes(ready: dict[str, Any], before: bytes, after: bytes, target: str = "vda") -> int:
    """Write to a served disk what differs, a block at a time, in order; returns how many blocks did."""
    socket = Path(ready["disks"][target]["uri"].partition("?socket=")[2])
    client = Client(socket, target)
    count = 0
    for at in range(0, len(after), BLOCK):
        if before[at : at + BLOCK] != after[at : at + BLOCK]:
            client.write(at, after[at : at + BLOCK])
            count += 1
    client.sock.close()
    return count


def lvm(path: Path, size: int, logical: Mapping[str, Path]) -> Path:
    """A physical volume with these images as linear logical volumes of the group ``vg``; labels and metadata as pvcreate and
    vgcreate, which want block devices, would write them (lvm2's lib/format_text/layout.h)."""
    extent, data_at = MIB, MIB
    raw_image(path, size)
    volumes, place = "", 0
    for number, (name, image) in enumerate(logical.items()):
        extents = -(-image.stat().st_size // extent)
        volumes += (
            f'{name} {{\nid = "{_lvm_id(number + 10)}"\nstatus = ["READ", "WRITE", "VISIBLE"]\nflags = []\nsegment_count = 1\n'
            f"segment1 {{\nstart_extent = 0\nextent_count = {extents}\n"
            f'type = "striped"\nstripe_count = 1\nstripes = [\n"pv0", {place}\n]\n}}\n}}\n'
        )
        put(path, data_at + place * extent, image)
        place += extents
    text = (
        f'vg {{\nid = "{_lvm_id(1)}"\nseqno = 1\nformat = "lvm2"\nstatus = ["RESIZEABLE", "READ", "WRITE"]\nflags = []\n'
        f"extent_size = {extent // 512}\nmax_lv = 0\nmax_pv = 0\nmetadata_copies = 0\nphysical_volumes {{\npv0 {{\n"
        f'id = "{_lvm_id(2)}"\ndevice = "/dev/sda"\nstatus = ["ALLOCATABLE"]\nflags = []\ndev_size = {size // 512}\n'
        f"pe_start = {data_at // 512}\npe_count = {(size - data_at) // extent}\n}}\n}}\nlogical_volumes {{\n{volumes}}}\n}}\n"
        '# made by hand\ncontents = "Text Format Volume Group"\nversion = 1\ncreation_host = "h"\ncreation_time = 1\n'
    ).encode() + b"\0"
    area_at, area = 4096, data_at - 4096
    header = struct.pack("<32sQ", _lvm_id(2).replace("-", "").encode(), size) + struct.pack("<QQQQ", data_at, 0, 0, 0)
    header += struct.pack("<QQQQ", area_at, area, 0, 0)
    sector = (struct.pack("<I8s", 32, b"LVM2 001") + header).ljust(512 - 20, b"\0")
    label = b"LABELONE" + struct.pack("<QI", 1, _lvm_crc(sector)) + sector
    found = b" LVM2 x[5A%r0N*>" + struct.pack("<IQQ", 1, area_at, area) + struct.pack("<QQII", 512, len(text), _lvm_crc(text), 0)
    found = found.ljust(508, b"\0")
    with path.open("r+b") as file:
        file.seek(512)
        file.write(label)
        file.seek(area_at)
        file.write(struct.pack("<I", _lvm_crc(found)) + found + text)
    return path


def _lvm_id(number: int) -> str:
    return f"{number:06d}-aaaa-bbbb-cccc-dddd-eeee-ffffff"


def _lvm_crc(data: bytes) -> int:
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


class Held:
    """Bytes as a disk that files are looked for in."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)

    def read(self, offset: int, length: int) -> bytes:
        return self.content[offset : offset + length]
