"""Files inside disks as they were: from every file system, through partitions and qcow2, and from a repository alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.protected import vmrewind
from tests import file_systems as fs
from tests.e2e.test_start_after import SIZE, Alone
from tests.history_tools import VM, MadeHistory, exit_code_of_main
from vmrewind.errors import UsageError
from vmrewind.recover.files import client

MIB = 1 << 20
LARGE = random.Random(1).randbytes(300_000)
EARLIER, LATER = b"as it was\n", b"as it is now\n"


def told(*arguments: object) -> dict[str, Any]:
    """What a command says with --json."""
    data: dict[str, Any] = json.loads(vmrewind(*map(str, arguments), "--json").stdout)
    return data


def names(*arguments: object) -> list[str]:
    return [entry["name"] for entry in told("ls", *arguments)["entries"]]


def make_source(directory: Path, content: bytes) -> Path:
    """Files that every file system can hold."""
    (directory / "etc").mkdir(parents=True)
    (directory / "etc" / "passwd").write_bytes(content)
    (directory / "etc" / "passwd").chmod(0o644)
    (directory / "large.bin").write_bytes(LARGE)
    return directory


def all_kinds(directory: Path, content: bytes) -> Path:
    """A disk with ext4, XFS, NTFS and FAT, in this order."""
    source = make_source(directory / "source", content)
    prototype = f"/dummy\n0 0\nd--755 0 0\netc d--750 7 8\npasswd ---640 5 6 {source}/etc/passwd\n$\n"
    prototype += f"large.bin ---644 0 0 {source}/large.bin\nlink l--777 0 0 etc/passwd\nnull c--666 0 0 1 3\n$\n"
    parts = [
        fs.ext(directory / "ext4", 12 * MIB, source),
        fs.xfs(directory / "xfs", 20 * MIB, prototype),
        fs.ntfs(directory / "ntfs", 8 * MIB, {"passwd": source / "etc" / "passwd", "large.bin": source / "large.bin"}),
        fs.fat(directory / "fat", 8 * MIB, source),
    ]
    return fs.disk(directory / "disk", SIZE, parts)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The disk with every file system, before and after."""
    directory = tmp_path_factory.mktemp("disks")
    return all_kinds(directory / "one", EARLIER).read_bytes(), all_kinds(directory / "other", LATER).read_bytes()


@pytest.fixture
def past(tmp_path: Path, disks: tuple[bytes, bytes]) -> Iterator[Alone]:
    """A served disk that held one state at @one, and another at @other."""
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        fs.write_changes(ready, bytes(SIZE), disks[0])
        vmrewind("mark", alone.config, "one")
        fs.write_changes(ready, disks[0], disks[1])
        vmrewind("mark", alone.config, "other")
        yield alone


def test_every_file_system_at_every_moment(past: Alone, tmp_path: Path) -> None:
    volumes = {volume["name"]: volume for volume in told("ls", past.config, "--at", "@one")["volumes"]}
    assert {name: volume["filesystem"] for name, volume in volumes.items()} == {
        "vda1": "ext4",
        "vda2": "xfs",
        "vda3": "ntfs",
        "vda4": "fat16",
    }
    assert volumes["vda3"]["label"] == "Windows" and all(volume["notes"] == [] for volume in volumes.values())
    for moment, content in (("@one", EARLIER), ("@other", LATER)):
        for number, passwd in ((1, "etc/passwd"), (2, "etc/passwd"), (3, "passwd"), (4, "etc/passwd")):
            place = tmp_path / f"{moment}-{number}"
            done = told("get", past.config, "--at", moment, "--partition", number, "/", place, "-r")
            assert done["problems"] == [] and done["volume"]["notes"] == []
            assert (place / passwd).read_bytes() == content
            assert (place / "large.bin").read_bytes() == LARGE
    assert told("ls", past.config, "--at", "latest", "--partition", 4, "/ETC/Passwd")["entries"][0]["size"] == len(LATER)
    assert names(past.config, "--at", "@one", "--partition", "vda2", "/") == ["etc", "large.bin", "link", "null"]
    assert vmrewind("ls", past.config, "--at", "@one", "-h", check=False).returncode == 0


def test_a_path_that_is_ambiguous_or_not_there_is_refused(past: Alone) -> None:
    both = vmrewind("ls", past.config, "--at", "@one", "/etc/passwd", check=False)
    assert both.returncode == 2 and "vda1, vda2, vda4" in both.stderr and "--partition" in both.stderr
    # Only NTFS has it there.
    assert told("ls", f"{past.config}:vda", "--at", "@one", "/passwd")["volume"]["name"] == "vda3"
    missing = vmrewind("get", past.config, "--at", "@one", "--partition", "1", "/etc/nothing", check=False)
    assert missing.returncode == 13 and "/etc/nothing" in missing.stderr
    never = vmrewind("find", past.config, "--path", "/etc/nothing", "--from", "@other", check=False)
    assert never.returncode == 13 and "/etc/nothing" in never.stderr
    behind = vmrewind("find", past.config, "--offset", str(SIZE), check=False)
    assert behind.returncode == 2 and str(SIZE) in behind.stderr
    untouched = vmrewind("find", past.config, "--offset", str(SIZE - 4 * MIB), check=False)
    assert untouched.returncode == 0 and untouched.stdout == "" and "no record" in untouched.stderr
    unknown = vmrewind("ls", past.config, "--at", "@one", "--partition", "7", "/", check=False)
    assert unknown.returncode == 2 and "vda1, vda2, vda3, vda4" in unknown.stderr
    disk = vmrewind("ls", f"{past.config}:vdb", "--at", "@one", check=False)
    assert disk.returncode == 2 and "vdb" in disk.stderr


def test_the_repository_alone_is_enough(past: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = f"{past.repository}/alone"
    while vmrewind("ls", stored, "--at", "@other", check=False).returncode:
        pass
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "elsewhere"))
    told("get", f"{stored}:vda", "--at", "@one", "--partition", "2", "/etc", tmp_path / "etc", "-r")
    assert (tmp_path / "etc" / "passwd").read_bytes() == EARLIER


def test_metadata_is_kept_and_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", EARLIER)
    tree = source / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "file").write_bytes(b"content")
    (tree / "hard").hardlink_to(tree / "file")
    (tree / "absolute").symlink_to("/etc/passwd")
    (tree / "relative").symlink_to("../../../../file")
    (tree / "sparse").write_bytes(b"begin")
    with (tree / "sparse").open("r+b") as file:
        file.seek(3 * MIB)
        file.write(b"end")
    (tree / "below" / "inline").write_bytes(b"short")
    (tree / "file").chmod(0o640)
    (tree / "below").chmod(0o510)
    for path in (tree / "file", tree / "below"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    image = fs.ext(tmp_path / "image", 24 * MIB, source, "-O", "inline_data")
    fs.debugfs(
        image, "ea_set /tree/file user.note kept", "set_inode_field /tree/file uid 1234", "set_inode_field /tree/file gid 99"
    )
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        fs.write_changes(ready, bytes(24 * MIB), image.read_bytes())
        arguments = ("get", alone.config, "--at", "latest", "/tree", tmp_path / "out", "-r")
        done = told(*arguments)
        assert (done["files"], done["directories"], done["links"], done["problems"]) == (4, 2, 2, [])
        out = tmp_path / "out"
        listed = subprocess.run(["diff", "-r", "--no-dereference", tree, out], capture_output=True, text=True, check=False)
        assert listed.returncode == 0, listed.stdout
        assert (out / "file").stat().st_ino == (out / "hard").stat().st_ino
        found = (out / "file").stat()
        assert (found.st_mode & 0o7777, found.st_mtime) == (0o640, 1_600_000_000)
        assert ((out / "below").stat().st_mode & 0o7777, (out / "below").stat().st_mtime) == (0o510, 1_600_000_000)
        assert (out / "absolute").readlink() == Path("/etc/passwd")
        assert (out / "sparse").stat().st_blocks * 512 < MIB
        if os.geteuid() == 0:
            assert (found.st_uid, found.st_gid) == (1234, 99)
        try:
            assert os.getxattr(out / "file", "user.note") == b"kept"
        except OSError:
            assert any("user.note" in left["why"] for left in done["left_out"]), "what could not be kept is told"
        (out / "file").write_bytes(b"mine")
        refused = vmrewind(*map(str, arguments[:-2]), out / "file", "-r", check=False)
        assert refused.returncode == 13 and "--overwrite" in refused.stderr and (out / "file").read_bytes() == b"mine"
        told(*arguments[:-3], "/tree/file", out, "--overwrite")
        assert (out / "file").read_bytes() == b"content"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_diff_names_what_changed_and_find_when(tmp_path: Path, image_format: str) -> None:
    source = make_source(tmp_path / "source", EARLIER)
    (source / "gone").mkdir()
    (source / "gone" / "file").write_bytes(b"gone")
    for number in range(20):
        (source / f"same-{number}").write_bytes(bytes([number]) * 3000)
    image = fs.ext(tmp_path / "image", 12 * MIB, source)
    first = image.read_bytes()
    # The same length and the same times: only the content tells. Then metadata alone, then a file less and one more.
    place = first.index(LARGE[:1024])
    second = bytearray(first)
    second[place + 100 : place + 103] = b"new"
    image.write_bytes(second)
    fs.debugfs(image, "set_inode_field /etc/passwd mode 0100600")
    third = image.read_bytes()
    fs.debugfs(image, "rm /gone/file", "rmdir /gone", f"write {source}/same-1 added")
    fourth = image.read_bytes()
    alone = Alone(tmp_path, image_format)
    marks = []
    with alone.serving() as ready:
        before = bytes(12 * MIB)
        for number, state in enumerate((first, bytes(second), third, fourth)):
            if image_format == "raw":
                fs.write_changes(ready, before, state)
            else:
                write_inside(tmp_path, ready, before, state)
            before = state
            marks.append(json.loads(vmrewind("mark", alone.config, f"m{number}", "--json").stdout)["seq"])

        def between(one: int, other: int, *more: str) -> dict[str, tuple[str, list[str]]]:
            (volume,) = told("diff", alone.config, "--from", f"@m{one}", "--to", f"@m{other}", *more)["volumes"]
            return {found["path"]: (found["change"], found["what"]) for found in volume["differences"]}

        assert between(0, 0) == {}
        assert between(0, 1) == {"/large.bin": ("changed", ["content"])}
        assert between(1, 2) == {"/etc/passwd": ("changed", ["mode"])}
        last = {"/gone": ("removed", []), "/gone/file": ("removed", []), "/added": ("added", [])}
        assert between(2, 3) == last
        assert between(3, 2, "/gone") == {"/gone": ("added", []), "/gone/file": ("added", [])}
        lines = vmrewind("diff", alone.config, "--from", "@m0", "--to", "@m3").stdout.splitlines()
        assert sorted(lines) == ["A /added", "D /gone", "D /gone/file", "M /etc/passwd (mode)", "M /large.bin (content)"]

        def found(path: str, *more: str) -> list[dict[str, Any]]:
            output = vmrewind("find", alone.config, "--path", path, "--json", *more).stdout
            return [json.loads(line) for line in output.splitlines()]

        (birth, change) = found("/large.bin", "--from", "@m0")
        assert not birth["known_before"] and birth["seq"] == marks[0] and birth["size"] == len(LARGE)
        assert change["what"] == ["content"] and marks[0] < change["seq"] < marks[1]
        whole = found("/gone/file")
        assert whole[-1]["what"] == ["removed"] and marks[2] < whole[-1]["seq"] < marks[3]
        assert [change["what"] for change in found("/etc/passwd", "--from", "@m0")] == [["appeared"], ["mode"]]
        # Right before that record the file is there, right after it is not.
        seq = whole[-1]["seq"]
        assert vmrewind("ls", alone.config, "--at", f"seq:{seq - 1}", "/gone/file", check=False).returncode == 0
        assert vmrewind("ls", alone.config, "--at", f"seq:{seq}", "/gone/file", check=False).returncode == 13
        if image_format == "raw":
            arguments = ("find", alone.config, "--offset", str(place + 50), "--length", "60", "--from", "@m0", "--json")
            (touch,) = [json.loads(line) for line in vmrewind(*arguments).stdout.splitlines()]
            assert touch["seq"] == change["seq"] and touch["offset"] <= place + 100 < touch["offset"] + touch["length"]
            assert len(vmrewind(*arguments[:-3]).stdout.splitlines()) == 2


def write_inside(directory: Path, ready: dict[str, Any], before: bytes, after: bytes) -> None:
    """What differs, written through QEMU's qcow2 driver above the served bytes."""
    words: list[str] = []
    for at in range(0, len(after), fs.BLOCK):
        if before[at : at + fs.BLOCK] != after[at : at + fs.BLOCK]:
            (directory / f"piece-{at}").write_bytes(after[at : at + fs.BLOCK])
            words += ["-c", f"write -s {directory}/piece-{at} {at} {fs.BLOCK}"]
    subprocess.run(["qemu-io", "-f", "qcow2", ready["disks"]["vda"]["uri"], *words, "-c", "flush"], check=True, capture_output=True)


def test_a_backing_file_is_read_and_missed(tmp_path: Path) -> None:
    backing = fs.ext(tmp_path / "backing.raw", 12 * MIB, make_source(tmp_path / "source", EARLIER))
    alone = Alone(tmp_path, "qcow2")
    alone.image.unlink()
    words = ["-f", "qcow2", "-F", "raw", "-b", str(backing), str(alone.image)]
    subprocess.run(["qemu-img", "create", "-q", *words], check=True)
    with alone.serving() as ready:
        uri = ready["disks"]["vda"]["uri"]
        place = backing.read_bytes().index(LARGE[:1024])
        subprocess.run(["qemu-io", "-f", "qcow2", uri, "-c", f"write -P 7 {place} 1024"], check=True, capture_output=True)
        told("get", alone.config, "--at", "latest", "/", tmp_path / "out", "-r")
        assert (tmp_path / "out" / "etc" / "passwd").read_bytes() == EARLIER
        assert (tmp_path / "out" / "large.bin").read_bytes() == b"\7" * 1024 + LARGE[1024:]
        backing.rename(tmp_path / "elsewhere")
        refused = vmrewind("ls", alone.config, "--at", "latest", "/", check=False)
        assert refused.returncode == 4 and str(backing) in refused.stderr


def test_windows_disks_and_logical_volumes_in_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """NTFS with an MBR's partition around it and with nothing, then LVM: one disk's states, one after the other."""
    size, step = 14 * MIB, MIB // 2
    source = make_source(tmp_path / "source", EARLIER)
    files = {"passwd": source / "etc" / "passwd", "large.bin": source / "large.bin"}
    unpartitioned = fs.ntfs(tmp_path / "unpartitioned", 6 * MIB, files)
    files["passwd"].write_bytes(LATER)
    partitioned = fs.disk(tmp_path / "mbr", size, [fs.ntfs(tmp_path / "ntfs", 6 * MIB, files)], "dos")
    logical = fs.lvm(tmp_path / "lvm", size, {"root": fs.ext(tmp_path / "root", 8 * MIB, source)})
    made = MadeHistory(tmp_path, {"vda": size}, journal_size=64 * MIB)
    made.start()
    for name, image in (("plain", unpartitioned), ("mbr", partitioned), ("lvm", logical)):
        content = image.read_bytes().ljust(size, b"\0")
        for at in range(0, size, step):
            if made.disk("vda").content[at : at + step] != content[at : at + step]:
                made.write("vda", at, content[at : at + step])
        made.mark(name)
    made.stop()
    config = tmp_path / f"{VM}.toml"
    config.write_text(
        f'name = "{VM}"\n[protection]\nenabled = true\nrepository = "{made.repository_path}"\n'
        f'journal = "{made.journal}"\n[[protection.disk]]\ntarget = "vda"\nimage = "{tmp_path}/vda.raw"\n'
    )

    def said(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["vmrewind", *map(str, arguments), "--json"])
        capfd.readouterr()
        code = exit_code_of_main()
        told = capfd.readouterr()
        assert code == 0, told.err
        data: dict[str, Any] = json.loads(told.out)
        return data

    for moment, name, passwd, content in (
        ("@plain", "vda", "/passwd", EARLIER),
        ("@mbr", "vda1", "/passwd", LATER),
        ("@lvm", "vg/root", "/etc/passwd", LATER),
    ):
        assert name in [volume["name"] for volume in said("ls", config, "--at", moment)["volumes"]]
        (entry,) = said("ls", config, "--at", moment, "/large.bin")["entries"]
        assert entry["size"] == len(LARGE)
        place = tmp_path / f"out-{moment}"
        done = said("get", config, "--at", moment, "/", place, "-r")
        assert done["volume"]["name"] == name and done["problems"] == []
        assert (place / passwd[1:]).read_bytes() == content and (place / "large.bin").read_bytes() == LARGE


def test_damage_is_told_by_every_command(tmp_path: Path) -> None:
    image = fs.ext(tmp_path / "image", 4 * MIB, make_source(tmp_path / "source", EARLIER))
    whole = image.read_bytes()
    (root, *_) = fs.run("debugfs", "-R", "blocks <2>", image).split()
    broken = bytearray(whole)
    broken[int(root) * 1024 : (int(root) + 1) * 1024] = bytes(1024)
    fs.debugfs(image, "clri <2>")
    states = {"whole": whole, "broken": bytes(broken), "cleared": image.read_bytes()}
    alone, before = Alone(tmp_path), bytes(4 * MIB)
    with alone.serving() as ready:
        for name, state in states.items():
            fs.write_changes(ready, before, state)
            vmrewind("mark", alone.config, name)
            before = state
        for name, what in (("broken", "is damaged"), ("cleared", "its inode is damaged")):
            for command in (
                ("ls", alone.config, "--at", f"@{name}", "/"),
                ("get", alone.config, "--at", f"@{name}", "/", tmp_path / f"out-{name}", "-r"),
                ("diff", alone.config, "--from", "@whole", "--to", f"@{name}"),
                ("diff", alone.config, "--from", f"@{name}", "--to", "@whole", "/etc"),
            ):
                done = vmrewind(*map(str, command), check=False)
                assert done.returncode == 13 and what in done.stdout + done.stderr, (command, done)
                assert not any(line.startswith(("A ", "D ")) for line in done.stdout.splitlines()), done.stdout


def test_a_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_LIBRARIES", ("pytsk3", "no_such_library"))
    with pytest.raises(UsageError, match="no_such_library not installed") as told:
        client.require_libraries()
    assert "vmrewind[files]" in told.value.hint
