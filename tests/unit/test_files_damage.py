"""A directory or an inode that is damaged is told, and never taken for an empty one: by listing, fetching, comparing, searching."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from tests import file_systems as fs
from tests.file_systems import Held
from tests.history_tools import MadeHistory
from vmrewind.errors import FileError, NoSuchFileError
from vmrewind.recover.files.client import ImageOf, Reader
from vmrewind.recover.files.compare import Comparison
from vmrewind.recover.files.fetch import Fetcher, Options
from vmrewind.recover.files.search import changes

MIB = 1 << 20
BLOCK = 1024
OTHER = b"a block of another directory"
KINDS = [("ext2",), ("ext4",), ("ext4", "-O", "^metadata_csum")]
MANY = 120
"""Files in a directory: with so many its blocks are the leaves of a hash tree."""


@pytest.fixture(scope="module")
def readers() -> Iterator[tuple[Reader, Reader]]:
    with Reader() as one, Reader() as other:
        yield one, other


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a file system with a small directory in its root and a large one."""
    directory = tmp_path_factory.mktemp("damage")
    source = directory / "source"
    (source / "many").mkdir(parents=True)
    (source / "few").mkdir()
    (source / "few" / "file").write_bytes(b"content")
    for number in range(MANY):
        (source / "many" / f"a-name-of-some-length-{number}").write_bytes(b"")

    def make(kind: str, *options: str) -> Path:
        path = directory / "-".join((kind, *options)).replace("/", "")
        if kind == "fat":
            return fs.fat(path, 4 * MIB, source)
        fs.ext(path, 4 * MIB, source, *options, kind=kind)
        if kind == "ext4":
            # The tree of hashes, which mke2fs does not make.
            fs.run("sh", "-c", f"e2fsck -fyD {path} >/dev/null; test $? -le 1")
        return path

    return make


def blocks_of(path: Path, what: str) -> list[int]:
    listed = fs.run("debugfs", "-R", f"blocks {what}", path)
    return [int(word) for word in listed.split()]


def opened(reader: Reader, content: bytes) -> str:
    (volume,) = reader.open({"vda": [ImageOf(Held(bytes(content)), "raw")]})
    return volume.name


def problem_of(reader: Reader, content: bytes, path: bytes) -> tuple[str, int]:
    """Why a directory is not all that there is, and how many names are there all the same."""
    listing = reader.entries(opened(reader, content), reader.lookup("vda", path).inode)
    return listing.problem, len(listing.entries)


@pytest.mark.parametrize("kind", [*KINDS, ("ext4", "-O", "inline_data", "-I", "256")])
def test_directories_of_all_kinds_are_whole(
    kind: tuple[str, ...], image: Callable[..., Path], readers: tuple[Reader, Reader]
) -> None:
    content = image(*kind).read_bytes()
    assert problem_of(readers[0], content, b"/many") == ("", MANY)
    assert problem_of(readers[0], content, b"/few") == ("", 1)
    assert problem_of(readers[0], content, b"/")[0] == ""


# Only checksums tell a block of one directory in another.
@pytest.mark.parametrize(("kind", "junk"), [*product(KINDS, (b"\0", b"\xa5")), (("ext4",), OTHER)])
def test_a_damaged_block_of_a_directory_is_a_problem(
    kind: tuple[str, ...], junk: bytes, image: Callable[..., Path], readers: tuple[Reader, Reader], tmp_path: Path
) -> None:
    path = image(*kind)
    whole = path.read_bytes()
    if junk == OTHER:
        at = blocks_of(path, "/few")[0] * BLOCK
        junk = whole[at : at + BLOCK]
    broken = {}
    for name, number in (("/", 0), ("/many", 0), ("/many", 3)):
        changed = bytearray(whole)
        at = blocks_of(path, name)[number] * BLOCK
        changed[at : at + BLOCK] = (junk * BLOCK)[:BLOCK]
        problem, _ = problem_of(readers[0], bytes(changed), name.encode())
        assert f"is damaged: block {number}" in problem, (name, number)
        broken[name, number] = bytes(changed)
    content = broken["/", 0]
    with pytest.raises(FileError, match="is damaged") as raised:
        readers[0].lookup(opened(readers[0], content), b"/few/file")
    assert not isinstance(raised.value, NoSuchFileError), "that it is not there is not known"
    out = tmp_path / "out"
    out.mkdir()
    fd = os.open(out, os.O_RDONLY)
    volume = opened(readers[0], broken["/many", 3])
    fetcher = Fetcher(readers[0], volume, fd, Options(True, False, special=False, owners=False))
    fetcher.fetch(readers[0].lookup(volume, b"/"), b"root")
    os.close(fd)
    assert [path for path, _ in fetcher.fetched.problems] == [b"root/many"]
    assert (out / "root" / "few" / "file").read_bytes() == b"content" and len(list((out / "root" / "many").iterdir())) > 50
    for before, after in ((whole, broken["/many", 3]), (broken["/many", 3], whole), (whole, broken["/", 0])):
        names = [opened(reader, content) for reader, content in zip(readers, (before, after), strict=True)]
        ends = [reader.lookup(name, b"/") for reader, name in zip(readers, names, strict=True)]
        told = list(Comparison(*readers, "vda", {}).differences(b"/", *ends))
        assert {each.change for each in told} == {"unreadable"}, told


def test_a_block_of_another_directory_is_no_beginning_of_this_one(
    image: Callable[..., Path], readers: tuple[Reader, Reader]
) -> None:
    path = image("ext2")
    content = bytearray(path.read_bytes())
    few, root = (blocks_of(path, name)[0] * BLOCK for name in ("/few", "/"))
    content[root : root + BLOCK] = content[few : few + BLOCK]
    assert "does not begin with itself" in problem_of(readers[0], bytes(content), b"/")[0]


def test_a_damaged_fat_directory_is_a_problem(image: Callable[..., Path], readers: tuple[Reader, Reader]) -> None:
    content = bytearray(image("fat").read_bytes())
    assert problem_of(readers[0], bytes(content), b"/many") == ("", MANY)
    at = content.index(b".          ")
    content[at : at + 512] = bytes(512)
    problems = [problem_of(readers[0], bytes(content), name)[0] for name in (b"/few", b"/many")]
    assert sorted(bool(problem) for problem in problems) == [False, True]


def test_find_tells_damage_on_the_way_and_nothing_removed(
    image: Callable[..., Path], readers: tuple[Reader, Reader], tmp_path: Path
) -> None:
    path = image("ext4")
    first = path.read_bytes()
    made = MadeHistory(tmp_path, {"vda": len(first)}, states=False)
    made.disk("vda").content[:] = first
    made.start()
    root = blocks_of(path, "<2>")[0] * BLOCK
    table = int(fs.run("debugfs", "-R", "imap <2>", path).split()[-3].rstrip(","))
    seqs = [made.write("vda", root, data) for data in (first[root : root + BLOCK], bytes(BLOCK), first[root : root + BLOCK])]
    seqs += [
        made.write("vda", table * BLOCK, bytes(BLOCK)),
        made.write("vda", BLOCK, first[BLOCK : BLOCK + 88] + b"\0\0" + first[BLOCK + 90 : 2 * BLOCK]),
    ]
    made.stop()
    made.ship_runs()
    with made.open() as history:
        between = made.position(seqs[0]), made.position(seqs[-1])
        found = list(changes(history, history.branch(), "vda", readers[0], b"/few/file", None, between, replay=False))
    kinds = [change.state.kind for change in found]
    assert kinds == ["file", "unreadable", "file", "unreadable", "unreadable"], found
    assert "is damaged" in found[1].state.problem and "inode is damaged" in found[3].state.problem
    assert "superblock" in found[4].state.problem
