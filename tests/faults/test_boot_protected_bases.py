"""The first base of a VM that was begun from another one's moment: made late, interrupted, or lost with that moment."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guests.protected import VMREWIND, vmrewind
from tests.capture_tools import first_difference, until
from tests.e2e.test_start_after import MIB, SIZE, Alone
from tests.faults import test_boot_protected
from tests.faults.test_boot_protected import Copy, Source, Writer, apart, bootable, booted, copied
from vmrewind.capture.dirty import is_bypassed
from vmrewind.errors import MomentError, VmrewindError, VmStateError
from vmrewind.history.resolve import resolve
from vmrewind.journal.origin import Origin, note_filling
from vmrewind.journal.runs import DiskInfo, RunInfo
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import Repository
from vmrewind.start import fallback
from vmrewind.start.origins import Moment
from vmrewind.start.resolve import open_vm

_LATE = """
if "vmrewind.start.bases" in getattr(sys, "orig_argv", []):
    while os.path.exists({path!r}):
        time.sleep(0.01)
"""


class Original(Source):
    """A VM whose history is nowhere but in its journal."""

    def lose(self) -> None:
        """As recycling does."""
        for segment in self.alone.journal.glob("*.seg"):
            segment.unlink()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Original, Path]]:
    """It has stopped; and its local state."""
    directory = tmp_path_factory.mktemp("original")
    with apart(directory) as state:
        alone = bootable(Alone(directory, ship="on-demand"))
        with open(alone.image, "r+b") as file:
            file.write(os.urandom(3 * MIB))
            file.seek(SIZE - 9 * MIB)
            file.write(os.urandom(3 * MIB))
        with alone.serving() as ready:
            until(lambda: any(VmPaths("alone").bases.glob("*/*.json")), "the base")
            alone.write(ready, 1, 5 * MIB)
            vmrewind("mark", alone.config, "here")
        yield Original(alone, alone.restored("@here")), state


@pytest.fixture
def original(made: tuple[Original, Path]) -> Original:
    return copied(*made)


@contextlib.contextmanager
def late(original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[tuple[Copy, Path]]:
    """A copy whose base is begun to be made once a file is gone; and the file."""
    file = tmp_path / "late"
    file.touch()
    monkeypatch.setattr(test_boot_protected, "_SLOW", test_boot_protected._SLOW + _LATE.replace("{path!r}", repr(str(file))))
    with booted(original, tmp_path, name) as copy:
        yield copy, file


def status(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(vmrewind("status", name, "--json", check=False).stdout)
    return found


def told(copy: Copy, event: str) -> bool:
    return event in vmrewind("events", copy.name).stdout


def refusal(*words: str | Path) -> str:
    done = vmrewind(*words, check=False)
    assert done.returncode != 0, done.stdout
    return " ".join(done.stderr.split())


def write(copy: Copy) -> None:
    with contextlib.closing(Writer(copy, 17)) as writer:
        for _ in range(20):
            writer.step()


def test_a_moment_lost_before_its_base_is_made(original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with late(original, tmp_path, monkeypatch, "lost") as (copy, file):
        write(copy)
        making = status(copy.name)["disks"]["vda"]["base_being_made"]
        assert making["share"] is None
        assert "one is being made, and" in vmrewind("status", copy.name).stdout
        waiting = refusal("restore", copy.name, "--at", "latest", "--output", tmp_path / "early")
        assert f"restore {copy.name} --in-place` completes it" in waiting and "%" not in waiting
        original.lose()
        file.unlink()
        until(lambda: told(copy, "base.given-up"), "the base to be given up")
        found = status(copy.name)
        assert "base_being_made" not in found["disks"]["vda"]
        assert any("given up" in problem and "alone" in problem for problem in found["problems"])
        # The command still has the moment, and completes the images from it.
        (tmp_path / "hold").unlink()
        until(copy.kept, "images that are complete")
        copy.end()
        assert copy.process.wait(60) == 0, copy.console.read_text()
        assert first_difference(copy.image.read_bytes(), bytes(copy.content)) is None
        assert "being made" not in refusal("restore", copy.name, "--at", "latest", "--output", tmp_path / "lost")
        with subprocess.Popen([VMREWIND, "capture", copy.config], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as start:
            assert start.stdout is not None and start.stdout.readline()
            until(lambda: list((copy.paths.bases / "vda").glob("*.json")), "the new base")
            start.terminate()
        assert not [problem for problem in status(copy.name)["problems"] if "base" in problem]
        copy.check()


def test_what_interrupts_a_base_does_not_lose_its_moment(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = original.alone.repository.with_name("away")
    with late(original, tmp_path, monkeypatch, "interrupted") as (copy, file):
        write(copy)
        original.alone.repository.rename(away)
        file.unlink()
        until(lambda: any("could not be made yet" in problem for problem in status(copy.name)["problems"]), "the interruption")
        original.lose()
        away.rename(original.alone.repository)
        until(lambda: copy.base_is_made, "the base")
        (tmp_path / "hold").unlink()
        until(copy.kept, "images that are complete")
        copy.end()
        assert copy.process.wait(60) == 0, copy.console.read_text()
        assert not [problem for problem in status(copy.name)["problems"] if "base" in problem]
        copy.states["seq:1"] = original.content
        copy.check()


def test_images_whose_rest_is_lost(original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with late(original, tmp_path, monkeypatch, "half") as (copy, _):
        write(copy)
        copy.end()
        until(lambda: "its images are completed; Ctrl-C" in copy.console.read_text(), "the end of QEMU")
        copy.process.send_signal(2)
        time.sleep(1)  # It has seen that before it may go on; else it completes them, and the test fails below.
        (tmp_path / "hold").unlink()
        assert copy.process.wait(60) == 0
        console = " ".join(copy.console.read_text().split())
        assert "the base of vda is not complete" in console and "the next start" not in console and "vmrewind backup" not in console
        original.lose()
        for words in ("restore", copy.name, "--in-place"), ("backup", copy.config):
            said = refusal(*words)
            assert "what vda lacks is lost" in said and "filling.json" in said, said
        assert any("what vda lacks is lost" in problem for problem in status(copy.name)["problems"])
        # As it says. That the moment is lost, the backup may be the first to find.
        (copy.paths.default_journal / "filling.json").unlink()
        origin = Origin.read(copy.paths.default_journal, "vda")
        assert origin is not None and origin.lost
        replace(origin, lost="").write(copy.paths.default_journal, "vda")
        content = copy.image.read_bytes()
        vmrewind("backup", copy.config)
        vmrewind("restore", copy.name, "--at", "latest", "--output", tmp_path / "restored")
        assert first_difference((tmp_path / "restored" / "vda.raw").read_bytes(), content) is None


def test_only_a_history_that_can_be_read_tells_that_a_moment_is_lost(original: Original, tmp_path: Path) -> None:
    repository = Repository.open(str(original.alone.repository)).vm("copy")
    away = original.alone.repository.with_name("away")
    with open_vm("alone").history() as history:
        position = resolve(history, history.branch(), "@here", ["vda"])
    origin = Origin("alone", position, "base-1", "uuid")
    origin.write(tmp_path, "vda")

    def lost() -> bool:
        with pytest.raises(VmrewindError) as refused:
            Moment.open("copy", tmp_path, "vda", origin, lambda: repository)
        found = Origin.read(tmp_path, "vda")
        assert found is not None and bool(found.lost) == isinstance(refused.value, MomentError)
        return bool(found.lost)

    segment = min(original.alone.journal.glob("*.seg"))
    content = segment.read_bytes()
    segment.write_bytes(bytes(len(content)))
    assert not lost(), "damage may be mended"
    segment.write_bytes(content)
    Moment.open("copy", tmp_path, "vda", origin, lambda: repository).close()
    original.lose()
    original.alone.repository.rename(away)
    assert not lost(), "a repository that is away may have it"
    away.rename(original.alone.repository)
    assert lost()


def test_no_guest_ever_ran(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    journal = VmPaths("alone").default_journal
    journal.mkdir(parents=True)
    note_filling(journal, ["vda"], {})
    for words in ("restore", alone.config, "--in-place"), ("backup", alone.config):
        said = refusal(*words)
        assert "no guest ever ran" in said and str(VmPaths("alone").state) in said and "--in-place`" not in said, said


def test_nothing_is_left_to_be_completed_in_place(original: Original) -> None:
    said = refusal("restore", original.alone.config, "--in-place")
    assert "nothing that was begun in place" in said and "--at is missing" in said


def test_images_that_are_not_complete_are_not_served_unprotected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guest's owner is told must not be to restore under it."""
    image = tmp_path / "vda.raw"
    image.write_bytes(bytes(MIB))
    note_filling(tmp_path, ["vda"], {})
    monkeypatch.setattr(fallback, "begun", lambda *_: True)
    info = RunInfo(7, None, "copy", "uuid", "here", 1, 1, (DiskInfo(0, "vda", MIB, "raw", str(image)),))
    assert not is_bypassed(tmp_path / "dirty", 7)
    with pytest.raises(VmStateError) as refused:
        fallback.leave_protection(tmp_path, tmp_path / "dirty", info, {}, lambda _: None)
    assert "not complete" in str(refused.value) and "restore" not in f"{refused.value} {refused.value.hint}"
