"""What holds, or describes, the content of a VM's disks is its owner's alone, whatever the umask."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import other_user
from tests.history_tools import MadeHistory
from tests.other_user import NOBODY, VM, as_user
from vmrewind.capture.__main__ import lock_journal
from vmrewind.errors import ConfigError, ImageError
from vmrewind.journal.events import EventLog
from vmrewind.journal.runs import write_durably
from vmrewind.paths import VmPaths
from vmrewind.recover.restore import restore
from vmrewind.start.places import make_places
from vmrewind.start.processes import Keeping


@pytest.fixture(params=[0o022, 0o000, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def shared(top: Path) -> list[str]:
    """Whatever below ``top`` is not its owner's alone."""
    return [f"{path}: {path.stat().st_mode:o}" for path in [top, *top.rglob("*")] if path.lstat().st_mode & 0o077]


@pytest.mark.usefixtures("umask")
def test_state_journal_and_repository_are_private(tmp_path: Path) -> None:
    top = tmp_path / "top"
    write_durably(top / "vms" / "web01" / "vm.json", b"{}")
    EventLog(tmp_path / "state" / "events" / "1.jsonl").write("an.event")
    directory = tmp_path / "made"
    directory.mkdir(mode=0o700)
    made = MadeHistory(directory, {"vda": 1 << 20})
    made.start()
    made.write("vda", 0, b"secret" * 100)
    made.stop()
    made.ship_runs()
    made.ship(made.run, 1, 3)
    (directory / "vda.image").unlink()
    assert len(list(made.repository_path.rglob("*"))) > 5
    assert shared(top) + shared(tmp_path / "state") + shared(directory) == []


@pytest.mark.usefixtures("umask")
def test_directories_that_exist_are_left_as_they_are(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    top.chmod(0o755)
    write_durably(top / "a" / "b.json", b"{}")
    MadeHistory(top, {})
    assert top.stat().st_mode & 0o777 == 0o755
    assert shared(top / "a") + shared(top / "repo") + shared(top / "journal") == []


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory like /tmp, everybody's and sticky, that is to hold state and runtime directories."""
    path = Path(tempfile.mkdtemp(prefix="vms-"))
    path.chmod(0o1777)
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(path / "state"))
    monkeypatch.setenv("VMREWIND_RUNTIME_DIR", str(path / "run"))
    yield path
    shutil.rmtree(path)


@pytest.mark.usefixtures("umask")
def test_a_vms_directories_are_its_owners_and_qemu_passes_through(place: Path) -> None:
    paths = VmPaths(VM)
    make_places(paths)
    found = {path: path.stat().st_mode & 0o777 for path in [*place.rglob("*")]}
    assert found.pop(place / "run") == 0o711
    assert set(found.values()) == {0o700}
    assert set(found) >= {paths.state, paths.runtime}
    make_places(paths, (NOBODY, NOBODY))
    assert (paths.runtime.stat().st_uid, paths.runtime.stat().st_gid) == (0, NOBODY)
    assert paths.runtime.stat().st_mode & 0o777 == 0o710
    make_places(paths)
    assert paths.runtime.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "plant",
    [
        other_user.foreign_state,
        other_user.foreign_runtime,
        other_user.foreign_link,
        other_user.open_runtime,
        other_user.open_state,
        other_user.open_above,
    ],
    ids=lambda plant: plant.__name__,
)
def test_what_others_have_made_beforehand_is_refused(place: Path, plant: Callable[[Path], str]) -> None:
    said = plant(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(ConfigError, match=said) as refused:
        make_places(VmPaths(VM))
    assert "chmod" in refused.value.hint or "remove it" in refused.value.hint
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("plant", [other_user.open_journal, other_user.foreign_journal], ids=lambda plant: plant.__name__)
def test_a_journal_that_others_can_write_to_is_refused(place: Path, plant: Callable[[Path], str]) -> None:
    said = plant(place)
    with pytest.raises(ConfigError, match=said):
        lock_journal(VmPaths(VM).default_journal)


def test_directories_of_ones_own_in_a_shared_place_are_fine(place: Path) -> None:
    (place / "elsewhere").mkdir()
    (place / "state").symlink_to(place / "elsewhere")
    make_places(VmPaths(VM))
    assert (place / "elsewhere" / "vms" / VM).is_dir()
    assert Keeping.read(VmPaths(VM)) is None
    os.close(lock_journal(place / "journals" / "one"))


def of_another_user(path: Path, _: Path) -> None:
    path.touch()
    os.chown(path, NOBODY, NOBODY)


def link_to_a_file_of_ours(path: Path, precious: Path) -> None:
    path.symlink_to(precious)


def hard_link_to_a_file_of_ours(path: Path, precious: Path) -> None:
    path.hardlink_to(precious)


def open_file(path: Path, _: Path) -> None:
    path.touch()
    path.chmod(0o666)


@pytest.mark.parametrize(
    "plant", [of_another_user, link_to_a_file_of_ours, hard_link_to_a_file_of_ours, open_file], ids=lambda plant: plant.__name__
)
def test_a_restore_writes_to_files_of_its_own(place: Path, tmp_path: Path, plant: Callable[[Path, Path], None]) -> None:
    made = MadeHistory(tmp_path, {"vda": 1 << 20})
    made.start()
    seq = made.write("vda", 0, b"secret" * 100)
    output, precious = place / "output", place / "precious"
    output.mkdir()
    precious.write_bytes(b"precious")
    plant(output / ".vda.raw.restoring", precious)
    with made.open() as history:
        if plant is open_file:  # what a restore of ours left when it was killed, under an odd umask
            restored = restore(history, ["vda"], made.position(seq), output, lambda *_: None)
            assert restored.disks[0].path.stat().st_mode & 0o777 == 0o600
        else:
            with pytest.raises(ImageError) as refused:
                restore(history, ["vda"], made.position(seq), output, lambda *_: None)
            assert "--output" in refused.value.hint
            assert not (output / "vda.raw").exists()
    assert precious.read_bytes() == b"precious"


def test_another_user_names_no_processes(place: Path) -> None:
    runtime = VmPaths(VM).runtime
    as_user(["mkdir", "-p", runtime])
    as_user(["tee", runtime / "keeper.json"], given="{}")
    with pytest.raises(ConfigError, match="another user"):
        Keeping.read(VmPaths(VM))
