"""Restoring in place: only what differs is written, and whatever interrupts it, it is noticed and can be completed."""

from __future__ import annotations

import fcntl
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.history_tools import MadeHistory
from vmrewind.capture.locks import lock_image
from vmrewind.capture.recovery import recover
from vmrewind.errors import CorruptionError, ImageError, SpaceError, UsageError, VmStateError
from vmrewind.journal.reader import segment_files
from vmrewind.journal.runs import Position, read_head, run_path, write_durably
from vmrewind.journal.state import StatePage
from vmrewind.recover.in_place import restore_in_place
from vmrewind.recover.intent import pending

K = 1024
M = 1 << 20


class Stopped(MadeHistory):
    """A VM that was stopped, with its images."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, {"vda": 12 * M, "vdb": 5 * M}, journal_size=32 << 20)
        self.disk("vda").content[: 2 * M] = os.urandom(2 * M)
        self.start()
        for i in range(12):
            self.write("vda", i * M, bytes([i + 1]) * 300 * K)
            self.write("vdb", i * 400 * K, os.urandom(8 * K))
        self.end = self.stop()
        self.images = {disk.target: directory / f"{disk.target}.img" for disk in self.disks}
        for target, path in self.images.items():
            path.write_bytes(self.disk(target).content)


@pytest.fixture
def made(tmp_path: Path) -> Stopped:
    return Stopped(tmp_path)


def quiet(target: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def restore(made: Stopped, seq: int, *targets: str) -> int:
    images = {target: made.images[target] for target in targets or made.images}
    with made.open() as history:
        done = restore_in_place(history, images, made.position(seq), made.journal, quiet)
    return sum(disk.written_bytes for disk in done.disks)


def test_images_become_what_they_were_and_the_head_says_so(made: Stopped) -> None:
    for seq in (5, 1, 20):
        restore(made, seq)
        head = read_head(made.journal)
        assert head is not None
        assert head.position == made.position(seq)
        for target, path in made.images.items():
            assert path.read_bytes() == made.disk(target).states[seq]
            status = path.stat()
            identity = head.images[target]
            assert (identity.size, identity.mtime_ns, identity.inode) == (status.st_size, status.st_mtime_ns, status.st_ino)
        assert pending(made.journal) is None


def test_only_what_differs_is_written(made: Stopped) -> None:
    assert restore(made, made.end.seq) == 0
    written = restore(made, made.end.seq - 2)
    assert 0 < written <= 8 * K
    assert restore(made, made.end.seq - 2) == 0


def test_one_disk_alone_leaves_a_head_of_that_disk(made: Stopped) -> None:
    before = made.images["vdb"].read_bytes()
    restore(made, 4, "vda")
    head = read_head(made.journal)
    assert head is not None
    assert set(head.images) == {"vda"}
    assert made.images["vdb"].read_bytes() == before


def test_zeroes_become_holes(made: Stopped) -> None:
    made.images["vda"].write_bytes(b"\xff" * 12 * M)
    restore(made, 1, "vda")
    assert made.images["vda"].read_bytes() == made.disk("vda").states[1]
    assert made.images["vda"].stat().st_blocks * 512 < 3 * M


def test_an_image_in_use_is_refused_and_nothing_changes(made: Stopped) -> None:
    content = {target: path.read_bytes() for target, path in made.images.items()}
    with open(made.images["vdb"], "r+b") as user:
        lock_image(user.fileno(), made.images["vdb"])
        with pytest.raises(ImageError, match="in use"):
            restore(made, 3)
    assert {target: path.read_bytes() for target, path in made.images.items()} == content
    assert read_head(made.journal) is not None
    assert pending(made.journal) is None


def test_a_living_capture_is_refused(made: Stopped) -> None:
    fd = os.open(made.journal, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(VmStateError, match="running"):
            restore(made, 3)
    finally:
        os.close(fd)


def test_another_size_is_refused(made: Stopped) -> None:
    os.truncate(made.images["vda"], 13 * M)
    with pytest.raises(ImageError, match="12582912"):
        restore(made, 3)


def test_without_a_journal_it_is_refused(made: Stopped, tmp_path: Path) -> None:
    with made.open() as history, pytest.raises(UsageError, match="no journal"):
        restore_in_place(history, made.images, made.position(3), tmp_path / "none", quiet)


def test_damage_is_found_before_anything_changes(made: Stopped) -> None:
    chunk = next(path for path in (made.repository_path / "chunks").rglob("*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.chmod(0o600)
    chunk.write_bytes(data)
    content = made.images["vda"].read_bytes()
    with pytest.raises(CorruptionError):
        restore(made, 2)
    assert made.images["vda"].read_bytes() == content
    assert read_head(made.journal) is not None
    assert pending(made.journal) is None


def restored_or_killed(made: Stopped, position: Position, steps: int, *, only_changed: bool = False) -> bool:
    """Restore in place in a process of its own that is killed after so many steps; False if it was."""
    child = os.fork()
    if child == 0:
        left = steps

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*given: Any, **named: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real(*given, **named)

            return call

        for name in ("pwrite", "unlink", "replace", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            with made.open() as history:
                restore_in_place(history, made.images, position, made.journal, quiet, only_changed=only_changed)
        except BaseException:  # noqa: BLE001 - the parent tells by the code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def test_killed_at_any_step_it_is_noticed_and_completed_by_running_it_again(made: Stopped) -> None:
    position = made.position(6)
    wanted = {target: made.disk(target).states[6] for target in made.images}
    original = {target: path.read_bytes() for target, path in made.images.items()}
    head = (made.journal / "head.json").read_bytes()
    states = set()
    for writes in range(200):
        done = restored_or_killed(made, position, writes)
        content = {target: path.read_bytes() for target, path in made.images.items()}
        begun, known = pending(made.journal), read_head(made.journal)
        if done:
            assert writes > 8, "the kill never came"
            break
        # Whatever a start would believe is true: a head that fits, or an intent that makes it refuse.
        if begun is None:
            assert known is not None
            assert content == (wanted if known.position == position else original)
        states.add((begun is None, known is None, content == original, content == wanted))
        if begun is not None:
            assert (begun.position, begun.targets) == (position, ["vda", "vdb"])
            with pytest.raises(VmStateError, match="vdb"):
                restore(made, 6, "vda")
        restore(made, 6)
        assert {target: path.read_bytes() for target, path in made.images.items()} == wanted
        assert pending(made.journal) is None
        for target, path in made.images.items():
            path.write_bytes(original[target])
        (made.journal / "head.json").write_bytes(head)
    else:
        pytest.fail("it never ended")
    assert len(states) >= 4, f"the kills met too few different states: {states}"


def crash(made: Stopped) -> bytes:
    """Let the host have died in a second run: what it flushed is in the journal, and not in the images. What vdb should hold."""
    parent = made.position(made.end.seq)
    run = made.start(parent=parent)
    info = made.infos[run]
    disks = tuple(replace(disk, image=str(made.images[disk.target])) for disk in info.disks)
    write_durably(run_path(made.journal, run), replace(info, disks=disks).to_json())
    made.write("vda", 5000, b"flushed" * 100)
    made.write("vdb", 7000, b"flushed" * 100)
    state = StatePage(made.journal)
    state.begin(run)
    state.close()
    with open(made.journal / "capture.state", "r+b") as file:
        file.seek(16)
        file.write(os.urandom(16))
    return bytes(made.disk("vdb").content)


def test_after_a_crash_the_other_disks_keep_what_was_flushed(made: Stopped) -> None:
    wanted = crash(made)
    assert made.images["vdb"].read_bytes() != wanted
    with made.open() as history:
        position = made.position(max(made.times))
        restore_in_place(history, {"vda": made.images["vda"]}, position, made.journal, quiet)
    assert made.images["vda"].read_bytes() == made.disk("vda").states[position.seq]
    assert made.images["vdb"].read_bytes() == wanted
    assert recover(made.journal) is None


def test_a_recovery_that_fails_keeps_one_disk_from_being_restored_alone(made: Stopped) -> None:
    """Of all disks together nothing is lost by it."""
    crash(made)
    (damaged,) = (file.path for file in segment_files(made.journal, made.run))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    state = StatePage(made.journal)
    state.set_checkpoint(1)
    state.close()
    before = made.images["vda"].read_bytes()
    position = Position(min(made.infos), 6, made.times[6])
    with made.open() as history:
        with pytest.raises(CorruptionError, match="none of its records is readable"):
            restore_in_place(history, {"vda": made.images["vda"]}, position, made.journal, quiet)
        assert made.images["vda"].read_bytes() == before
        restore_in_place(history, made.images, position, made.journal, quiet)
    assert made.images["vdb"].read_bytes() == made.disk("vdb").states[6]


def test_a_qcow2_file_that_became_shorter_gets_its_export_size_back(tmp_path: Path) -> None:
    made = Stopped(tmp_path)
    info = made.infos[made.run]
    disks = tuple(replace(disk, format="qcow2") for disk in info.disks)
    write_durably(run_path(made.journal, made.run), replace(info, disks=disks).to_json())
    os.truncate(made.images["vda"], 3 * M)
    restore(made, 9, "vda")
    assert made.images["vda"].read_bytes() == made.disk("vda").states[9]


def test_no_space_says_that_the_image_is_half_restored(made: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SpaceError) as caught:
        restore(made, 2)
    assert "again" in caught.value.hint
    monkeypatch.undo()
    begun = pending(made.journal)
    assert begun is not None
    restore(made, 2)
    assert made.images["vda"].read_bytes() == made.disk("vda").states[2]
