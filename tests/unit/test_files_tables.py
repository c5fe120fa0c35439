"""Tables of partitions: numbers as Linux's; what is damaged is told, and what is left of it used."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from guests.images import raw_image
from tests import file_systems as fs
from tests.file_systems import Held
from vmrewind.recover.files.tables import Partition, partitions

MIB = 1 << 20
SIZE = 32 * MIB
SECTOR = 512
DOS = "label: dos\n/x1: start=2048, size=2048\n/x3: start=6144, size=20480, type=5\n/x5: start=8192, size=2048\n"
DOS += "/x6: start=12288, size=2048\n/x7: start=16384, size=2048\n/x4: start=28672, size=2048\n"
GPT = "label: gpt\n/x1: start=2048, size=2048, name=boot\n/x4: start=8192, size=4096\n"


def disk(path: Path, table: str) -> bytearray:
    fs.run("sfdisk", "--quiet", "--no-tell-kernel", raw_image(path, SIZE), text=table)
    return bytearray(path.read_bytes())


def looked_at(content: bytearray) -> tuple[list[Partition], list[str]]:
    return partitions(Held(bytes(content)))


def places(content: bytearray) -> dict[int, tuple[int, int]]:
    found, notes = looked_at(content)
    assert notes == []
    return {each.number: (each.offset // SECTOR, each.size // SECTOR) for each in found}


def test_numbers_are_linuxs(tmp_path: Path) -> None:
    assert places(disk(tmp_path / "dos", DOS)) == {
        1: (2048, 2048),
        4: (28672, 2048),
        5: (8192, 2048),
        6: (12288, 2048),
        7: (16384, 2048),
    }
    assert places(disk(tmp_path / "gpt", GPT)) == {1: (2048, 2048), 4: (8192, 4096)}


def test_gpt_of_large_sectors(tmp_path: Path) -> None:
    small = disk(tmp_path / "gpt", GPT)
    content = bytearray(SIZE)
    content[8192 : 8192 + 32 * SECTOR] = small[2 * SECTOR : 34 * SECTOR]
    head = small[SECTOR : 2 * SECTOR]
    head[16:20] = bytes(4)
    head[16:20] = zlib.crc32(head[:92]).to_bytes(4, "little")
    content[4096 : 4096 + SECTOR] = head
    found, notes = looked_at(content)
    assert [(each.number, each.offset, each.size) for each in found] == [(1, MIB * 8, MIB * 8), (4, MIB * 32, MIB * 16)]
    assert len(notes) == 1 and "partition 4 ends" in notes[0]


@pytest.mark.parametrize("at", [SECTOR + 0, SECTOR + 30, 2 * SECTOR + 32])
def test_a_damaged_gpt_is_told_and_its_copy_used(tmp_path: Path, at: int) -> None:
    content = disk(tmp_path / "gpt", GPT)
    whole, _ = looked_at(content)
    content[at] ^= 1
    found, notes = looked_at(content)
    assert found == whole and len(notes) == 1 and "the copy at the disk's end is used" in notes[0]
    content[: 34 * SECTOR] = bytes(34 * SECTOR)
    assert looked_at(content) == (whole, notes), "without any sign of it at the disk's beginning"
    content[-SECTOR] ^= 1
    assert looked_at(content) == ([], [])
    content = disk(tmp_path / "gpt", GPT)
    content[at] ^= 1
    content[-SECTOR] ^= 1
    found, notes = looked_at(content)
    assert found == [] and len(notes) == 1 and "no good copy" in notes[0]


@pytest.mark.parametrize("table", [GPT, DOS])
def test_a_disk_shorter_than_its_table_is_told(tmp_path: Path, table: str) -> None:
    content = disk(tmp_path / "disk", table)
    whole, _ = looked_at(content)
    last = max(whole, key=lambda each: each.offset)
    found, notes = looked_at(content[: last.offset + last.size - SECTOR])
    assert found == whole and len(notes) == 1
    assert f"partition {last.number} ends {SECTOR} bytes behind the disk's end" in notes[0]


def test_a_damaged_chain_of_logical_partitions_is_told(tmp_path: Path) -> None:
    whole = disk(tmp_path / "disk", DOS)
    second = next(at for at in range(6145, 16384) if whole[at * SECTOR + 510 : at * SECTOR + 512] == b"\x55\xaa")
    content = bytearray(whole)
    content[second * SECTOR : (second + 1) * SECTOR] = bytes(SECTOR)
    found, notes = looked_at(content)
    assert [each.number for each in found] == [1, 4, 5] and len(notes) == 1 and f"sector {second}" in notes[0]
    circle = bytearray(whole)
    link = 446 + 16 + 8
    circle[second * SECTOR + link : second * SECTOR + link + 4] = (second - 6144).to_bytes(4, "little")
    found, notes = looked_at(circle)
    assert [each.number for each in found] == [1, 4, 5, 6] and len(notes) == 1
