"""A small file of the local state that storage does not give back (EIO): its name is told, and what does not need it goes on."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.bad_sectors import PAGE, bad_sector, unreadable
from tests.history_tools import UUID, VM, MadeHistory, exit_code_of_main
from tests.ship_support import WrittenJournal
from vmrewind.capture.recovery import Recovered, find_end, recover
from vmrewind.errors import CorruptionError
from vmrewind.history.stretches import merged_directory
from vmrewind.journal import format as fmt
from vmrewind.journal.content import Unreadable, content
from vmrewind.journal.copy_before_write import CopyBeforeWrite, map_path
from vmrewind.journal.events import EventLog
from vmrewind.journal.origin import FILLING
from vmrewind.journal.reader import Segment, records, segment_files
from vmrewind.journal.runs import RESTORE_PENDING, run_path
from vmrewind.journal.state import StatePage
from vmrewind.paths import VmPaths
from vmrewind.recover.in_place import _unprotected_since
from vmrewind.start.identity import known_uuid
from vmrewind.start.known_repository import is_where_it_was, note_repository
from vmrewind.start.past import look_back
from vmrewind.start.wanted import read_wanted, write_wanted
from vmrewind.vmconfig.toml import load_toml

K = 1024


class Stopped:
    """A VM of two runs, stopped, and its commands."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.made = made = MadeHistory(root, {"vda": 64 * K})
        made.start()
        made.write("vda", 0, b"one" * 100)
        made.mark("one")
        made.start(parent=made.stop())
        made.write("vda", 0, b"two" * 5000)
        made.stop()
        made.ship_runs()
        self.image = root / "vda.raw"
        self.image.write_bytes(made.disk("vda").content)
        self.toml = root / "web01.toml"
        self.toml.write_text(
            f'name = "{VM}"\n[protection]\nenabled = true\nrepository = "repo"\njournal = "journal"\n'
            '[[protection.disk]]\ntarget = "vda"\nimage = "vda.raw"\n'
        )
        self.paths = VmPaths(VM)
        shutil.copytree(root / "bases", self.paths.bases)
        self.first, self.second = sorted(made.infos)
        self.head = made.journal / "head.json"

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["vmrewind", *map(str, arguments)])
        code = exit_code_of_main()
        said = self._capsys.readouterr()
        return code, said.out, said.err


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stopped:
    return Stopped(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("which", ["head", "first", "second"])
def test_what_does_not_need_it_goes_on(vm: Stopped, tmp_path: Path, which: str) -> None:
    path = vm.head if which == "head" else run_path(vm.made.journal, getattr(vm, which))
    unreadable(path)
    code, out, _ = vm("journal", "verify", vm.made.journal)
    assert code == 0
    assert out.count("intact") == len(vm.made.segment_paths())
    code, out, _ = vm("journal", "dump", vm.made.journal)
    assert code == 0
    assert out.count(" write ") == 2
    assert out.count(" vda ") == (2 if which == "head" else 1), "the other run's disks have their names"
    code, out, _ = vm("status", vm.toml, "--json")
    assert code == 0
    (said,) = [problem for problem in json.loads(out)["problems"] if str(path) in problem]
    assert "Input/output error" in said
    code, out, _ = vm("timeline", vm.toml, "--json")
    assert code == 0
    assert json.loads(out)["disks"]["vda"]["coverage"][-1]["last"]["seq"] == max(vm.made.times)
    code, *_ = vm("restore", vm.toml, "--at", "latest", "--output", tmp_path / "out")
    assert code == 0
    assert (tmp_path / "out" / "vda.raw").read_bytes() == vm.made.disk("vda").content
    code, *_ = vm("rewind", vm.toml, "--to", "@one")
    assert code == 0
    assert vm.image.read_bytes()[:300] == b"one" * 100


def test_a_start_goes_on_without_it(vm: Stopped) -> None:
    for path in (vm.head, run_path(vm.made.journal, vm.first)):
        unreadable(path)
    said: list[str] = []
    past = look_back(VM, vm.made.journal, None, EventLog(vm.paths.events(0)), said.append)
    assert past.head is None
    assert [info.run for info in past.runs] == [vm.second]
    assert past.position is not None and past.position.run == vm.second
    assert [str(vm.head) in line or f"{vm.first:016x}" in line for line in said] == [True, True]


def test_a_rewind_after_a_crash_needs_no_older_runs_description(vm: Stopped) -> None:
    vm.head.unlink()
    state = StatePage(vm.made.journal)
    state.begin(vm.second)
    state.close()
    unreadable(run_path(vm.made.journal, vm.first))
    code, *_ = vm("rewind", vm.toml, "--to", "@one")
    assert code == 0
    assert vm.image.read_bytes()[:300] == b"one" * 100
    recovered = Recovered(vm.made.position(max(vm.made.times)), 0, host_died=False)
    assert _unprotected_since(vm.made.journal, recovered) is None


def test_a_crash_is_recovered_though_a_segment_before_the_checkpoint_cannot_be_read(tmp_path: Path) -> None:
    written = WrittenJournal(tmp_path / "journal")
    for _ in range(3):
        written.batch([(fmt.Op.WRITE, 0, b"record")])
        written.writer._roll(0)
    written.batch([(fmt.Op.WRITE, 0, b"record")])
    end = find_end(written.journal, 7, verify_after=3)
    assert end is not None
    first, second, *_ = segment_files(written.journal)
    unreadable(first.path)
    unreadable(second.path)
    assert find_end(written.journal, 7, verify_after=3) == end
    with pytest.raises(CorruptionError, match=first.path.name):
        find_end(written.journal, 7, verify_after=0)


def test_a_bases_map_and_a_log_are_named(vm: Stopped) -> None:
    path = map_path(vm.made.journal, "vda")
    with open(path, "wb"), bad_sector(path, 0), pytest.raises(OSError, match=str(path)):
        CopyBeforeWrite.open(vm.made.journal, "vda")
    log = vm.paths.events(vm.second)
    log.parent.mkdir(parents=True)
    unreadable(log)
    code, _, err = vm("events", vm.toml)
    assert code == CorruptionError.exit_code
    assert str(log) in err and "Input/output error" in err


def test_a_state_page_is_an_error_and_no_signal(vm: Stopped) -> None:
    StatePage(vm.made.journal).close()
    path = vm.made.journal / "capture.state"
    vm.head.unlink(missing_ok=True)
    with bad_sector(path, 0), pytest.raises(CorruptionError, match=str(path)):
        recover(vm.made.journal)


def test_a_state_page_is_not_needed_after_a_clean_end(vm: Stopped) -> None:
    assert vm.head.exists()
    path = vm.made.journal / "capture.state"
    path.write_bytes(b"garbage!" * 512)
    assert recover(vm.made.journal) is None


def test_files_that_decide_are_named(vm: Stopped) -> None:
    """Without them nobody knows whether the images hold a moment, or what the VM is."""
    for name in (RESTORE_PENDING, FILLING):
        path = vm.made.journal / name
        unreadable(path)
        code, _, err = vm("rewind", vm.toml, "--to", "@one")
        assert code == CorruptionError.exit_code
        assert str(path) in err and "Input/output error" in err
        path.unlink()
    vm.paths.identity.parent.mkdir(parents=True, exist_ok=True)
    for break_it in (unreadable, lambda path: path.write_bytes(b"[]")):
        vm.paths.identity.unlink(missing_ok=True)
        vm.paths.identity.write_text(json.dumps({"uuid": str(UUID)}))
        assert known_uuid(vm.paths) == str(UUID)
        break_it(vm.paths.identity)
        with pytest.raises(CorruptionError, match=str(vm.paths.identity)):
            known_uuid(vm.paths)


def test_a_saved_configuration_is_named_and_hides_no_other_vm(vm: Stopped) -> None:
    load_toml(vm.toml).save(vm.paths.config)
    code, out, _ = vm("status", "--json")
    assert (code, json.loads(out)[0]["state"]) == (0, "stopped")
    unreadable(vm.paths.config)
    code, _, err = vm("status", VM)
    assert code == CorruptionError.exit_code
    assert str(vm.paths.config) in err and "Input/output error" in err
    code, out, _ = vm("status", "--json")
    (found,) = json.loads(out)
    assert code == 0
    assert str(vm.paths.config) in found["problems"][0]


def test_directories_that_cannot_be_listed(vm: Stopped) -> None:
    merged_directory(vm.made.journal).symlink_to("merged")
    assert vm("timeline", vm.toml)[0] == 0, "it is a cache"
    load_toml(vm.toml).save(vm.paths.config)
    runs = vm.made.journal / "runs"
    shutil.rmtree(runs)
    runs.touch()
    code, _, err = vm("status", VM)
    assert code == 1
    assert f"{runs}: Not a directory" in err
    code, out, _ = vm("status", "--json")
    assert code == 0, "it hides no other VM"
    assert str(runs) in json.loads(out)[0]["problems"][0]


def test_what_is_had_elsewhere_is_not_missed(vm: Stopped, tmp_path: Path) -> None:
    for copy in (vm.paths.bases / "vda").iterdir():
        unreadable(copy)
    assert vm("restore", vm.toml, "--at", "latest", "--output", tmp_path / "out")[0] == 0
    write_wanted(vm.paths, ["vda"], None)
    unreadable(vm.paths.ship)
    assert read_wanted(vm.paths) == []
    url = str(vm.made.repository_path)
    note_repository(vm.paths, url)
    assert is_where_it_was(vm.paths, url)
    unreadable(vm.paths.state / "repository.json")
    assert not is_where_it_was(vm.paths, url)
    note_repository(vm.paths, url)
    assert is_where_it_was(vm.paths, url)


def test_an_error_that_nobody_expected_is_a_line_with_the_file(vm: Stopped) -> None:
    vm.paths.ship.mkdir(parents=True)
    code, _, err = vm("ship", "off", vm.toml)
    assert code == 1
    assert f"error: {vm.paths.ship}: Is a directory" in err
    assert "Traceback" not in err


def test_only_storage_makes_content_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        content(path)
    unreadable(path)
    with pytest.raises(Unreadable, match="Input/output error"):
        content(path)


def test_the_remedy_for_a_lost_payload_is_true(vm: Stopped, tmp_path: Path) -> None:
    path = vm.made.segment_paths()[-1]
    with Segment(path) as segment:
        (batch,) = [batch for batch in segment.batches() if any(record.op == fmt.Op.WRITE for record in records(batch))]
    with bad_sector(path, batch.payload_position + 2 * PAGE):
        code, _, err = vm("restore", vm.toml, "--at", "latest", "--output", tmp_path / "latest")
        assert code == CorruptionError.exit_code
        assert path.name in err and "moments that do not need it can be restored" in err
        assert "timeline" not in err, "it reads no payload"
        assert vm("restore", vm.toml, "--at", "@one", "--output", tmp_path / "one")[0] == 0
    assert (tmp_path / "one" / "vda.raw").read_bytes()[:300] == b"one" * 100
