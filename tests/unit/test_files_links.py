"""Symbolic links whose targets lie outside of their inodes, times before 1970 and from 2106 on, and inodes that
the library looks for in the wrong place."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import file_systems as fs
from tests.file_systems import Held
from tests.history_tools import MadeHistory
from vmrewind.errors import FileError
from vmrewind.recover.files.client import ImageOf, Reader
from vmrewind.recover.files.compare import Comparison, Difference
from vmrewind.recover.files.fetch import Fetched, Fetcher, Options
from vmrewind.recover.files.search import changes
from vmrewind.recover.files.wire import Entry

MIB = 1 << 20
LINKS = {length: "../" + "t" * (length - 4) + "Z" for length in (20, 59, 60, 100, 400, 1000)}
TIMES_S = {
    "1901": -2147483000,
    "1969": -5,
    "1970": 0,
    "2026": 1795409190,
    "2039": 2180000000,
    "2107": 4330000000,
    "2446": 15032385000,
}
XFS_HEADER = struct.Struct(">4sII4s16sQQQ")


@pytest.fixture(scope="module")
def readers() -> Iterator[tuple[Reader, Reader]]:
    with Reader() as one, Reader() as other:
        yield one, other


def opened(reader: Reader, content: bytes) -> tuple[str, Entry]:
    """The volume's name, and the root directory."""
    (volume,) = reader.open({"vda": [ImageOf(Held(content), "raw")]})
    return volume.name, reader.lookup(volume.name, b"/")


def entries(reader: Reader, content: bytes) -> dict[str, Entry]:
    """What is in the root directory."""
    volume, root = opened(reader, content)
    return {os.fsdecode(entry.name): entry for entry in reader.entries(volume, root.inode).entries}


def fetch(reader: Reader, content: bytes, out: Path) -> Fetched:
    """``get / OUT/root -r``, but for the command."""
    out.mkdir()
    volume, root = opened(reader, content)
    fd = os.open(out, os.O_RDONLY)
    try:
        fetcher = Fetcher(reader, volume, fd, Options(True, False, special=False, owners=False))
        fetcher.fetch(root, b"root")
    finally:
        os.close(fd)
    return fetcher.fetched


def differences(readers: tuple[Reader, Reader], before: bytes, after: bytes) -> list[Difference]:
    (volume, one), (_, other) = opened(readers[0], before), opened(readers[1], after)
    return list(Comparison(*readers, volume, {}).differences(b"/", one, other))


def ext_with_links(path: Path, kind: str, *options: str) -> bytes:
    """An ext file system with LINKS, and a way through one of them."""
    source = path.with_suffix(".source")
    source.mkdir()
    for length, target in LINKS.items():
        (source / f"link{length}").symlink_to(target)
    (source / "directory").mkdir()
    (source / "directory" / "file").write_bytes(b"found")
    (source / "way").symlink_to("./" * 40 + "directory")
    return fs.ext(path, 4 * MIB, source, *options, kind=kind).read_bytes()


def xfs_with_links(path: Path, reader: Reader) -> bytes:
    """An XFS with LINKS as a kernel writes them: mkfs leaves out the headers of those outside of the inode."""
    lines = [f"link{length} l--777 0 0 {target}" for length, target in LINKS.items()]
    content = bytearray(fs.xfs(path, 20 * MIB, "\n".join(["/dummy", "0 0", "d--755 0 0", *lines, "$", ""])).read_bytes())
    found = entries(reader, bytes(content))
    (block,) = struct.unpack_from(">I", content, 4)
    for length, target in LINKS.items():
        at = content.index(target.encode())
        if at % block == 0:
            header = XFS_HEADER.pack(b"XSLM", 0, length, bytes(4), bytes(16), found[f"link{length}"].inode, at // 512, 0)
            content[at : at + block] = (header + target.encode()).ljust(block, b"\0")
    assert content.count(b"XSLM") == 2, "those of 400 and 1000 bytes do not fit into the inode"
    return bytes(content)


@pytest.mark.parametrize("kind", ["ext2", "ext4", "inline_data", "xfs"])
def test_a_target_of_any_length_is_read_followed_and_fetched(kind: str, readers: tuple[Reader, Reader], tmp_path: Path) -> None:
    reader = readers[0]
    if kind == "xfs":
        content = xfs_with_links(tmp_path / "image", reader)
    else:
        options = ("-O", "inline_data") if kind == "inline_data" else ()
        content = ext_with_links(tmp_path / "image", "ext2" if kind == "ext2" else "ext4", *options)
    found = entries(reader, content)
    assert {length: (os.fsdecode(found[f"link{length}"].target), found[f"link{length}"].problem) for length in LINKS} == {
        length: (target, "") for length, target in LINKS.items()
    }
    if kind != "xfs":
        volume, _ = opened(reader, content)
        assert reader.lookup(volume, b"/way/file").kind == "file"
    assert not fetch(reader, content, tmp_path / "out").problems
    assert {length: str((tmp_path / "out" / "root" / f"link{length}").readlink()) for length in LINKS} == LINKS
    # As long as before, at the same time.
    changed = LINKS[1000].replace("tZ", "uZ").encode()
    told = differences(readers, content, content.replace(LINKS[1000].encode(), changed))
    assert told == [Difference(b"/link1000", "changed", ("target",))]


def test_a_target_that_cannot_be_read_is_a_problem_and_not_a_link_to_something_else(
    readers: tuple[Reader, Reader], tmp_path: Path
) -> None:
    reader = readers[0]
    whole = xfs_with_links(tmp_path / "image", reader)
    at = whole.index(LINKS[400].encode()) - XFS_HEADER.size
    content = bytearray(whole)
    for place, value in ((3, 0), (7, 1), (11, 0), (39, 0), (XFS_HEADER.size + 9, 0)):  # Magic, offset, length, owner; a NUL.
        content[:] = whole
        content[at + place] = value
        found = entries(reader, bytes(content))["link400"]
        assert (found.kind, found.target) == ("symlink", b"") and "its target cannot be read" in found.problem, place
    fetched = fetch(reader, bytes(content), tmp_path / "out")
    assert [path for path, _ in fetched.problems] == [b"root/link400"]
    assert not (tmp_path / "out" / "root" / "link400").is_symlink()
    assert str((tmp_path / "out" / "root" / "link1000").readlink()) == LINKS[1000], "the rest goes on"
    told = differences(readers, bytes(content), bytes(content))
    assert [(each.path, each.change) for each in told] == [(b"/link400", "unreadable")]
    volume, _ = opened(reader, bytes(content))
    with pytest.raises(FileError, match="link400 cannot be followed"):
        reader.lookup(volume, b"/link400/below")


def test_a_change_of_a_target_outside_of_the_inode_is_found(readers: tuple[Reader, Reader], tmp_path: Path) -> None:
    first = xfs_with_links(tmp_path / "image", readers[0])
    at = first.index(LINKS[1000].encode()) - XFS_HEADER.size
    other = first[at : at + 4096].replace(b"tZ", b"uZ")
    broken = b"?" + other[1:]
    made = MadeHistory(tmp_path, {"vda": len(first)}, states=False)
    made.disk("vda").content[:] = first
    made.start()
    written = [made.write("vda", at, block) for block in (first[at : at + 4096], other, broken)]
    made.stop()
    made.ship_runs()
    with made.open() as history:
        between = made.position(written[0]), made.position(written[2])
        found = list(changes(history, history.branch(), "vda", readers[0], b"/link1000", None, between, replay=False))
    assert [(change.position.seq, change.what) for change in found[1:]] == [
        (written[1], ("target",)),
        (written[2], ("target", "problem")),
    ]
    assert [change.state.target.decode() for change in found] == [LINKS[1000], LINKS[1000].replace("tZ", "uZ"), ""]


@pytest.mark.parametrize("inode_size", [128, 256])
def test_times_before_1970_and_from_2106_on(inode_size: int, readers: tuple[Reader, Reader], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    has_more = inode_size > 128
    times_s = {name: time_s for name, time_s in TIMES_S.items() if has_more or time_s < 1 << 31}
    commands = []
    for name, time_s in times_s.items():
        (source / name).write_bytes(b"x")
        below = (time_s + (1 << 31)) % (1 << 32) - (1 << 31)
        # Nanoseconds, and the two bits above the 32 of the seconds: the kernel's fs/ext4/ext4.h.
        extra = 987654321 << 2 | time_s - below >> 32
        for field in ("mtime", "ctime"):
            commands.append(f"set_inode_field /{name} {field} @{below % (1 << 32)}")
            if has_more:
                commands.append(f"set_inode_field /{name} {field}_extra {extra:#x}")
    image = fs.ext(tmp_path / "image", 4 * MIB, source, "-I", str(inode_size))
    fs.debugfs(image, *commands)
    content = image.read_bytes()
    truth = {name: time_s * 10**9 + (987654321 if has_more else 0) for name, time_s in times_s.items()}
    found = entries(readers[0], content)
    assert {name: found[name].mtime_ns for name in truth} == truth
    assert {name: found[name].ctime_ns for name in truth} == truth
    assert not fetch(readers[0], content, tmp_path / "out").problems
    # Not every host's file system can hold what is far away.
    near = {name: time_ns for name, time_ns in truth.items() if abs(time_ns) < 1 << 60}
    assert {name: (tmp_path / "out" / "root" / name).stat().st_mtime_ns for name in near} == near


def test_what_lies_behind_descriptors_in_other_places_is_a_problem(readers: tuple[Reader, Reader], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(200):
        (source / f"file{number}").write_text(f"{number}")
    options = ("-O", "meta_bg,^resize_inode,^flex_bg,^has_journal", "-g", "256", "-N", "512")
    content = fs.ext(tmp_path / "image", 16 * MIB, source, *options).read_bytes()
    found = [entry for name, entry in entries(readers[0], content).items() if name.startswith("file")]
    lost = {entry.name for entry in found if entry.problem}
    # A block holds the descriptors of 16 groups, and a group has 8 inodes, the first 10 of which are the file system's own.
    assert lost == {entry.name for entry in found if entry.inode > 128} and 80 < len(lost) < 100
    assert all("meta_bg" in entry.problem and entry.kind == "unknown" for entry in found if entry.inode > 128)
    fetched = fetch(readers[0], content, tmp_path / "out")
    assert {path.removeprefix(b"root/") for path, _ in fetched.problems} == lost
    for entry in found:
        name = os.fsdecode(entry.name)
        if entry.name not in lost:
            assert (tmp_path / "out" / "root" / name).read_text() == name.removeprefix("file")
