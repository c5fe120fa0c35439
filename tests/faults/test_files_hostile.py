"""File systems that were made, or damaged, to do harm: what comes of them stays in the reader process and below the destination."""

from __future__ import annotations

import os
import random
import signal
import stat
from pathlib import Path

import pytest

from tests import file_systems as fs
from vmrewind.errors import FileError, RepositoryError
from vmrewind.recover.files.client import ImageOf, Reader
from vmrewind.recover.files.fetch import Fetched, Fetcher, Options
from vmrewind.recover.files.names import as_json, shown

MIB = 1 << 20


class Held:
    """Bytes as an image; what is done at each read may be given."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.on_read = lambda: None

    def read(self, offset: int, length: int) -> bytes:
        self.on_read()
        return self.content[offset : offset + length]


def small(directory: Path, *commands: str) -> bytes:
    """An ext4 without checksums, so that it can be patched, with /tree."""
    (directory / "source" / "tree" / "sub").mkdir(parents=True)
    (directory / "source" / "tree" / "sub" / "file").write_bytes(b"inside")
    (directory / "source" / "tree" / "ordinary").write_bytes(b"ordinary")
    (directory / "source" / "tree" / "link-A").symlink_to(directory / "outside")
    (directory / "source" / "tree" / "XXYetcYpasswd").write_bytes(b"no")
    image = fs.ext(directory / "image", 4 * MIB, directory / "source", "-O", "^metadata_csum,^has_journal")
    fs.debugfs(image, *commands)
    return image.read_bytes()


def fetch(content: bytes, out: Path, *, special: bool = False, overwrite: bool = False) -> Fetched:
    """``get / OUT -r``, but for the command."""
    out.mkdir(exist_ok=True)
    with Reader() as reader:
        (volume,) = reader.open({"vda": [ImageOf(Held(content), "raw")]})
        fd = os.open(out, os.O_RDONLY)
        try:
            fetcher = Fetcher(reader, volume.name, fd, Options(True, overwrite, special, owners=os.geteuid() == 0))
            fetcher.fetch(reader.lookup(volume.name, b"/tree"), b"tree")
        finally:
            os.close(fd)
    return fetcher.fetched


def test_nothing_is_written_outside_of_the_destination(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    content = small(tmp_path)
    # A name that leads upwards, and a directory that has the name of a link which stands before it.
    content = content.replace(b"XXYetcYpasswd", b"../etc/passwd").replace(b"link-A", b"sub\0\0\0")
    patched = bytearray(content)
    at = patched.index(b"sub\0\0\0")
    patched[at - 2] = 3
    for overwrite in (False, True):
        fetched = fetch(bytes(patched), tmp_path / f"out-{overwrite}", overwrite=overwrite)
        assert list(outside.iterdir()) == []
        told = dict(fetched.problems)
        assert told[b"tree/../etc/passwd"] == "its name cannot be one here"
        assert b"tree/sub" in told, "of two with one name the second is refused"
        assert (tmp_path / f"out-{overwrite}" / "tree" / "ordinary").read_bytes() == b"ordinary"
        assert not any(path.name.startswith(".vmrewind-") for path in (tmp_path / f"out-{overwrite}").rglob("*"))


def test_a_link_that_is_there_already_is_not_followed(tmp_path: Path) -> None:
    content = small(tmp_path)
    (tmp_path / "outside").write_bytes(b"mine")
    out = tmp_path / "out"
    (out / "tree").mkdir(parents=True)
    (out / "tree" / "ordinary").symlink_to(tmp_path / "outside")
    with pytest.raises(FileError, match="exists already"):
        fetch(content, out)
    (tmp_path / "elsewhere").mkdir()
    (out / "tree" / "sub").symlink_to(tmp_path / "elsewhere")
    fetched = fetch(content, out, overwrite=True)
    assert b"tree/sub" in dict(fetched.problems) and list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "outside").read_bytes() == b"mine"
    assert not (out / "tree" / "ordinary").is_symlink() and (out / "tree" / "ordinary").read_bytes() == b"ordinary"


def test_circles_devices_privileges_and_monstrous_sizes(tmp_path: Path) -> None:
    content = small(
        tmp_path,
        "ln /tree /tree/sub/circle",
        "cd /tree",
        "mknod disk b 8 0",
        "mknod pipe p",
        "set_inode_field /tree/ordinary mode 0104755",
        "set_inode_field /tree/sub/file size 0x7fffffffffff",
        "ea_set /tree/ordinary security.capability xx",
    )
    fetched = fetch(content, tmp_path / "out")
    assert any(path.endswith(b"sub/circle") and "in itself" in why for path, why in fetched.problems)
    left = {path.rpartition(b"/")[2]: why for path, why in fetched.left_out}
    assert left[b"disk"] == "block-device" and left[b"pipe"] == "fifo" and b"ordinary" in left
    ordinary = tmp_path / "out" / "tree" / "ordinary"
    assert not ordinary.stat().st_mode & (stat.S_ISUID | stat.S_ISGID) and "security.capability" not in os.listxattr(ordinary)
    huge = tmp_path / "out" / "tree" / "sub" / "file"
    assert not huge.exists() or huge.stat().st_blocks * 512 < MIB
    again = fetch(content, tmp_path / "special", special=True)
    if os.geteuid() == 0:
        assert (tmp_path / "special" / "tree" / "ordinary").stat().st_mode & stat.S_ISUID
        pipe = tmp_path / "special" / "tree" / "pipe"
        assert stat.S_ISFIFO(pipe.lstat().st_mode)
        try:
            assert os.major((tmp_path / "special" / "tree" / "disk").lstat().st_rdev) == 8
        except FileNotFoundError:
            assert any(path.endswith(b"/disk") for path, _ in again.problems), "a host that allows none is told of"


def test_names_are_shown_without_what_a_terminal_obeys() -> None:
    name = b"a\n\x1b[2J\xff\\\xc2\x9b\xe2\x80\xae" + "ü".encode()
    assert shown(name) == "a\\n\\x1b[2J\\xff\\\\\\x9b\\u202eü"
    assert os.fsencode(as_json(name)) == name


def test_the_reader_can_open_nothing_and_dies_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Held(small(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    # Where files are fetched to, a guest may have put what looks like a module.
    monkeypatch.chdir(tmp_path)
    for module in ("ctypes", "resource", "msgspec", "pytsk3", "xxhash"):
        Path(f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    seen: list[str] = []
    with Reader() as reader:
        process = Path("/proc") / str(reader.pid)
        image.on_read = lambda: seen.append((process / "limits").read_text() + (process / "status").read_text())
        (volume,) = reader.open({"vda": [ImageOf(image, "raw")]})
        limits = {line[:26].strip(): line[26:].split()[:2] for line in seen[0].splitlines() if line.startswith("Max ")}
        assert limits["Max open files"] == limits["Max processes"] == limits["Max file size"] == ["0", "0"]
        assert "NoNewPrivs:\t1" in seen[0]
        if os.geteuid() == 0:
            assert "Uid:\t65534\t65534\t65534\t65534" in seen[0] and "Groups:\t \n" in seen[0]
        assert not (tmp_path / "ran").exists()
        if os.geteuid() == 0:
            assert b"sesame" not in (process / "environ").read_bytes()
        image.on_read = lambda: os.kill(reader.pid, signal.SIGSEGV)
        with pytest.raises(FileError, match="exit code -11"):
            list(reader.content(volume.name, reader.lookup(volume.name, b"/tree/ordinary").inode))
            reader.open({"vda": [ImageOf(image, "raw")]})


def test_what_keeps_a_disk_from_being_read_is_told_as_it_is(tmp_path: Path) -> None:
    image = Held(small(tmp_path))

    def fail() -> None:
        raise RepositoryError("the store is gone")

    with Reader() as reader:
        image.on_read = fail
        with pytest.raises(RepositoryError, match="the store is gone"):
            reader.open({"vda": [ImageOf(image, "raw")]})


def test_damage_anywhere_is_an_answer_or_an_error(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "dir").mkdir(parents=True)
    (source / "dir" / "file").write_bytes(bytes(range(256)) * 40)
    prototype = f"/dummy\n0 0\nd--755 0 0\ndir d--755 0 0\nfile ---644 0 0 {source}/dir/file\n$\n$\n"
    images = [
        fs.ext(tmp_path / "ext4", 4 * MIB, source),
        fs.ntfs(tmp_path / "ntfs", 4 * MIB, {"file": source / "dir" / "file"}),
        fs.fat(tmp_path / "fat", 2 * MIB, source, bits=12),
        fs.xfs(tmp_path / "xfs", 20 * MIB, prototype),
    ]
    chosen = random.Random(20)
    reader = Reader()
    outcomes = {"read": 0, "refused": 0, "died": 0}
    for path in images:
        whole = path.read_bytes()
        used = [at for at in range(0, len(whole), 512) if any(whole[at : at + 512])]
        for _ in range(25):
            content = bytearray(whole)
            for at in chosen.choices(used[: max(40, len(used) // 4)], k=4):
                place = at + chosen.randrange(512)
                content[place : place + 4] = chosen.choice([bytes(4), b"\xff" * 4, chosen.randbytes(4)])
            try:
                for volume in reader.open({"vda": [ImageOf(Held(bytes(content)), "raw")]}, replay=True):
                    if volume.readable:
                        walk(reader, volume.name, reader.lookup(volume.name, b"/").inode, set())
                outcomes["read"] += 1
            except FileError as error:
                died = "exit code" in str(error)
                outcomes["died" if died else "refused"] += 1
                if died:
                    reader.close()
                    reader = Reader()
    reader.close()
    assert outcomes["read"] > 20 and sum(outcomes.values()) == 100, outcomes


def walk(reader: Reader, volume: str, inode: int, seen: set[int]) -> None:
    if inode in seen or len(seen) > 20:
        return
    seen.add(inode)
    for entry in reader.entries(volume, inode).entries:
        if entry.kind == "directory":
            walk(reader, volume, entry.inode, seen)
        elif entry.kind == "file" and entry.size < MIB:
            for _ in reader.content(volume, entry.inode):
                pass
