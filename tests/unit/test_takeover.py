"""Taking a VM over from its repository: what is made of it here, what is refused, and what a kill at any step leaves."""

from __future__ import annotations

import json
import os
import shutil
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.history_tools import UUID, VM, MadeHistory
from tests.unit.test_stored_vm import Command
from vmrewind.errors import ConfigError, ImageError, MomentError, UsageError, VmStateError
from vmrewind.history.history import History
from vmrewind.history.resolve import resolve
from vmrewind.history.succession import look
from vmrewind.journal.runs import RESTORE_PENDING, TAKEOVER_PENDING, local_runs, read_head
from vmrewind.paths import VmPaths
from vmrewind.recover.findings import Finding, Kind
from vmrewind.recover.relocation import Relocation, journal_here
from vmrewind.recover.takeover import TakenOver, take_over
from vmrewind.recover.verify import verify
from vmrewind.start import saved_state
from vmrewind.start.continuity import goes_on
from vmrewind.start.images import refuse_half_taken_over
from vmrewind.vmconfig.toml import load_toml

TOML = f"""# by hand
name = "{VM}"

[qemu]
command = ["qemu-system-x86_64", "-drive", "file=/nowhere/other.iso,media=cdrom"] # kept

[protection]
enabled = true
repository = "../old/repo"
journal = "old-journal"
journal_size = "1MiB"

[[protection.disk]]
target = "vda"
image = "images/a.raw"

[[protection.disk]]
target = "vdb"
image = "/images/b.raw"
"""


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    """A VM whose host is gone: seq 1 to 4 were shipped, 5 was not."""
    (tmp_path / "a").mkdir()
    made = MadeHistory(tmp_path / "a", {"vda": 1 << 20, "vdb": 65536})
    made.start()
    made.write("vda", 4096, b"first" * 100)
    made.mark("upgrade")
    made.write("vdb", 0, b"second" * 100)
    made.write("vda", 0, b"never shipped")
    made.ship_runs()
    made.ship(made.run, 1, 4)
    made.repository.register(str(UUID))
    made.repository.put_config(made.times[1] - 1, "toml", TOML.encode())
    return made


def taken(made: MadeHistory, images: Path, at: str | None = None, branch: str | None = None) -> TakenOver:
    paths = VmPaths(VM)
    relocation = Relocation(str(made.repository_path), str(UUID), paths, journal_here(made.repository, paths))
    return take_over(made.repository, paths, relocation.journal, images, at, branch, relocation, lambda *_: None, lambda _: None)


def check(made: MadeHistory, done: TakenOver, seq: int) -> None:
    """The images hold the moment, this host may start, its start needs no base, and every host knows whose the VM is."""
    paths = VmPaths(VM)
    journal = paths.default_journal
    assert (done.position.seq, done.position.run) == (seq, made.run)
    for target, path in done.images.items():
        assert path.read_bytes() == made.disk(target).states[seq]
    assert look(made.repository, journal, paths.state) is None
    other = look(made.repository, made.journal, made.directory)
    assert other is not None and (other.run, other.left) == (done.run, done.position)
    head = read_head(journal)
    assert head is not None and head.position.run == done.run
    runs = local_runs(journal)
    assert [info.run for info in runs][-1] == done.run and runs[-1].takeover
    for target, size in (("vda", 1 << 20), ("vdb", 65536)):
        assert goes_on(journal, made.repository, runs, head.position, target, size)
    config = load_toml(done.config)
    assert {disk.target: Path(disk.image) for disk in config.protection.disk} == dict(done.images)
    assert (config.protection.repository, config.uuid) == (str(made.repository_path), str(UUID))
    assert config.protection.journal is None, "it was relative to a file of another host"
    assert "# by hand" in done.config.read_text() and "# kept" in done.config.read_text()
    refuse_half_taken_over(VM, journal)
    assert not (done.config.parent.parent / f".{VM}.taking-over").exists()
    with History.open(VM, None, made.repository) as history:
        latest = resolve(history, history.branch(), "latest", ["vda", "vdb"])
        assert latest == head.position, "from the repository alone it can be restored, and taken over, at once"


def test_the_latest_moment(made: MadeHistory, tmp_path: Path) -> None:
    done = taken(made, tmp_path / "b")
    check(made, done, 4)
    findings: list[Finding] = []
    verify(made.repository.repository, findings.append, lambda *_: None, data=True)
    assert [finding for finding in findings if finding.kind is Kind.DAMAGE] == []
    assert done.known_until_ns == made.times[4]
    assert (tmp_path / "b" / VM).stat().st_mode & 0o777 == 0o711
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in done.images.values())


def test_an_earlier_moment_and_from_there_another_host_once_more(made: MadeHistory, tmp_path: Path) -> None:
    done = taken(made, tmp_path / "b", "@upgrade")
    check(made, done, 3)
    assert done.known_until_ns == made.times[4]
    shutil.move(VmPaths(VM).state, tmp_path / "hostb")
    again = taken(made, tmp_path / "c")
    assert again.position.run == done.run and again.run > done.run
    assert again.images["vda"].read_bytes() == made.disk("vda").states[3]
    who = look(made.repository, tmp_path / "hostb/journal", tmp_path / "hostb")
    assert who is not None and who.run == again.run
    with pytest.raises(MomentError):
        taken(made, tmp_path / "d", "seq:99")
    assert not (tmp_path / "d" / VM).exists()


def test_nothing_is_overwritten(made: MadeHistory, tmp_path: Path) -> None:
    (tmp_path / "b" / VM).mkdir(parents=True)
    (tmp_path / "b" / VM / "vda.raw").write_text("mine")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        taken(made, tmp_path / "b")
    assert (tmp_path / "b" / VM / "vda.raw").read_text() == "mine"
    assert not made.repository.runs()[-1].takeover and not (VmPaths(VM).default_journal / TAKEOVER_PENDING).exists()


def test_another_vm_of_that_name_on_this_host_is_refused(made: MadeHistory, tmp_path: Path) -> None:
    paths = VmPaths(VM)
    paths.state.mkdir(parents=True)
    paths.identity.write_text(json.dumps({"name": VM, "uuid": "another"}))
    with pytest.raises(VmStateError, match="another VM of that name"):
        taken(made, tmp_path / "b")


def test_a_saved_memory_of_the_vm_on_this_host_is_given_up_first(
    made: MadeHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_state, "SAVED_STATES", tmp_path)
    VmPaths(VM).state.mkdir(parents=True)
    (VmPaths(VM).state / "domain.xml").touch()
    saved = tmp_path / f"{VM}.save"
    saved.touch()
    with pytest.raises(VmStateError, match="memory is saved"):
        taken(made, tmp_path / "images")
    saved.unlink()
    check(made, taken(made, tmp_path / "images"), 4)


def test_a_restore_in_place_that_did_not_end_is_ended_first(made: MadeHistory, tmp_path: Path) -> None:
    journal = VmPaths(VM).default_journal
    journal.mkdir(parents=True)
    (journal / RESTORE_PENDING).write_text("{}")
    with pytest.raises(VmStateError, match="half restored"):
        taken(made, tmp_path / "b")


def test_a_disk_on_a_backing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    made = MadeHistory(tmp_path / "a", {"vda": 65536})
    made.start()
    info = made.infos[made.run]
    made.infos[made.run] = replace(info, disks=(replace(info.disks[0], format="qcow2", backing="/images/template.qcow2"),))
    made.ship_runs()
    made.ship(made.run, 1, 1)
    made.repository.register(str(UUID))
    made.repository.put_config(made.times[1] - 1, "toml", TOML.encode())
    with pytest.raises(ImageError, match=r"template.qcow2, which no repository holds"):
        taken(made, tmp_path / "b")


def test_disks_of_the_configuration_that_have_no_history_are_refused(made: MadeHistory, tmp_path: Path) -> None:
    more = TOML + '\n[[protection.disk]]\ntarget = "vdc"\nimage = "/c"\n'
    made.repository.put_config(made.times[2], "toml", more.encode())
    with pytest.raises(ConfigError, match="vdc"):
        taken(made, tmp_path / "b")
    assert not made.repository.runs()[-1].takeover


def test_a_takeover_killed_at_any_step_can_be_run_again(made: MadeHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are syncs, renames and removals: between two of them nothing durable happens. A process's death needs no real sync."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    state = VmPaths(VM).state
    pristine = {path for path in made.repository_path.rglob("*") if path.is_file()}
    step = 0
    while True:
        step += 1
        for left in (state, tmp_path / "b"):
            shutil.rmtree(left, ignore_errors=True)
        for path in {path for path in made.repository_path.rglob("*") if path.is_file()} - pristine:
            path.unlink()
        if not _killed_at(step, made, tmp_path / "b"):
            break
        if (VmPaths(VM).default_journal / TAKEOVER_PENDING).exists():
            with pytest.raises(VmStateError, match="was begun and did not end"):
                refuse_half_taken_over(VM, VmPaths(VM).default_journal)
        if (tmp_path / "b" / VM).exists() and not (VmPaths(VM).default_journal / TAKEOVER_PENDING).exists():
            # It was killed when all was done.
            assert read_head(VmPaths(VM).default_journal) is not None
            continue
        check(made, taken(made, tmp_path / "b"), 4)
    assert step > 25


def _killed_at(step: int, made: MadeHistory, images: Path) -> bool:
    """Take over in a process of its own that dies at its ``step``-th step; False if it came to its end."""
    child = os.fork()
    if child == 0:
        done = [0]

        def dying(real: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                done[0] += 1
                if done[0] == step:
                    os._exit(9)
                return real(*arguments, **named)

            return call

        for name in ("fsync", "replace", "rename", "unlink", "link"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            taken(made, images)
        except BaseException:  # noqa: BLE001 - the parent tells by the code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_a_takeover_that_was_begun_is_not_mixed_up_with_another(made: MadeHistory, tmp_path: Path) -> None:
    journal = VmPaths(VM).default_journal
    done = taken(made, tmp_path / "b")
    note = {
        "directory": str(tmp_path / "b" / VM), "at": None, "config": f"{VM}.toml", "known_until_ns": 1,
        "info": local_runs(journal)[-1].to_json().decode(), "before": [],
        "images": {"vda": {"path": str(done.images["vda"]), "size": 1, "mtime_ns": 1, "inode": 1, "device": 0}},
    }  # fmt: skip
    (journal / TAKEOVER_PENDING).write_text(json.dumps(note))
    with pytest.raises(UsageError, match="did not end"):
        taken(made, tmp_path / "other")
    with pytest.raises(ImageError, match="were changed since"):
        taken(made, tmp_path / "b")


def test_the_command_says_what_was_taken_lost_and_is_missing_and_what_comes_next(
    made: MadeHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vmrewind = Command(monkeypatch, capsys)
    url = f"{made.repository_path}/{VM}"
    assert vmrewind("takeover", VM, "--images", tmp_path)[0] == 2
    code, told = vmrewind("takeover", url)
    assert code == 2 and "--images is missing" in told
    code, told = vmrewind("takeover", url, "--images", tmp_path / "c", "--json", "--at", "@upgrade")
    data = json.loads(told)
    assert code == 0 and data["parent"]["seq"] == 3
    assert abs(data["lost_seconds_max"] - (time.time_ns() - made.times[4]) / 1e9) < 60
    code, told = vmrewind("takeover", url, "--images", tmp_path / "b")
    assert code == 0, told
    run_file = tmp_path / "b" / VM / f"{VM}.toml"
    for words in ("(seq 5 of run", "s until now at most", "not on this host: /nowhere/other.iso", f"vmrewind run {run_file}"):
        assert words in told
    status = vmrewind("status", VM)
    assert status[0] == 0 and str(tmp_path / "b" / VM / "vda.raw") in status[1]


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up behind it."""


def interrupted(made: MadeHistory, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A takeover that was killed when its images were there and the repository did not know of it."""

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("vmrewind.recover.takeover.register", kill)
        taken(made, images)
    assert (images / VM / "vda.raw").exists() and not any(info.takeover for info in made.repository.runs())


def test_a_takeover_that_goes_on_after_the_repository_did_takes_the_newest_moment(
    made: MadeHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(made, tmp_path / "b", monkeypatch)
    made.ship(made.run, 5, 5)
    done = taken(made, tmp_path / "b")
    check(made, done, 5)
    assert done.known_until_ns == made.times[5]


def test_a_takeover_that_goes_on_after_another_one_comes_behind_it(
    made: MadeHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(made, tmp_path / "b", monkeypatch)
    here = VmPaths(VM).state
    here.rename(tmp_path / "away")
    other = taken(made, tmp_path / "c")
    here.rename(tmp_path / "c-state")
    (tmp_path / "away").rename(here)
    done = taken(made, tmp_path / "b")
    assert done.run > other.run and done.position.run == other.run


def test_its_own_branch_s_configuration_and_not_the_newest(made: MadeHistory, tmp_path: Path) -> None:
    info = made.infos[made.run]
    (run_path := made.repository_path / f"vms/{VM}/runs/{made.run:016x}.json").unlink()
    made.repository.put_run(replace(info, config=xxhash.xxh3_64_hexdigest(TOML.encode())))
    assert run_path.exists()
    made.repository.put_config(made.times[2], "toml", TOML.replace("# by hand", "# another host's").encode())
    assert "# by hand" in taken(made, tmp_path / "b").config.read_text()
