"""``URL/VM``: a VM that a repository holds, on a machine that never saw it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.history_tools import UUID, VM, MadeHistory, exit_code_of_main
from vmrewind.errors import UsageError, VmStateError
from vmrewind.paths import state_root
from vmrewind.repository.repository import Repository
from vmrewind.start.resolve import StoredVm, open_vm, parse_stored


class Command:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> tuple[int, str]:
        self._monkeypatch.setattr(sys, "argv", ["vmrewind", *map(str, arguments)])
        code = exit_code_of_main()
        captured = self._capsys.readouterr()
        return code, captured.out if code == 0 else captured.out + captured.err


@pytest.fixture
def vmrewind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    """A VM whose host is gone: everything was shipped, nothing else is left."""
    made = MadeHistory(tmp_path, {"vda": 65536, "vdb": 65536})
    made.start()
    made.write("vda", 0, b"first" * 100)
    made.mark("upgrade")
    made.write("vdb", 0, b"second" * 100)
    end = made.stop()
    made.ship_runs()
    made.ship(made.run, 1, end.seq)
    made.repository.register(str(UUID))
    shutil.rmtree(made.journal)
    return made


def test_what_an_argument_means(tmp_path: Path) -> None:
    Repository.init(str(tmp_path / "repo"))
    assert parse_stored(f"{tmp_path}/repo/web 01%#?") == StoredVm("web 01%#?", f"{tmp_path}/repo")
    assert parse_stored("s3://bucket/pre/web") == StoredVm("web", "s3://bucket/pre")
    assert parse_stored("s3://bucket/web") == StoredVm("web", "s3://bucket")
    assert parse_stored("az://c/x.toml") == StoredVm("x.toml", "az://c")
    assert parse_stored("file:///mnt/web%20") == StoredVm("web%20", "file:///mnt")
    assert parse_stored(f"{tmp_path}/repo/web.toml") is None
    assert parse_stored(f"{tmp_path}/other/web") is None
    assert parse_stored("web") is None
    for wrong in ("s3://bucket", "s3://bucket/", "gs://bucket/pre/", "s3://b/.web", f"{tmp_path}/repo/-x"):
        with pytest.raises(UsageError):
            parse_stored(wrong)


def test_what_works_on_a_vm_of_this_host_refuses_one_in_a_repository(tmp_path: Path, vmrewind: Command) -> None:
    with pytest.raises(UsageError, match="works on a VM of this host"):
        open_vm("s3://bucket/web")
    Repository.init(str(tmp_path / "repo"))
    for command in (["mark", "x"], ["status"], ["events"], ["backup"], ["ship", "on"], ["restart-capture"]):
        words = [*command[:-1], command[-1]] if command[0] == "ship" else command[:1]
        more = command[1:] if command[0] == "mark" else []
        code, told = vmrewind(*words, f"{tmp_path}/repo/web", *more)
        assert code == 2 and "works on a VM of this host" in told, (command, told)
    code, told = vmrewind("restore", f"{tmp_path}/repo/web", "--at", "latest", "--in-place")
    assert code == 2 and "cannot be restored in place" in told


def test_list_timeline_and_restore_from_the_repository_alone(made: MadeHistory, tmp_path: Path, vmrewind: Command) -> None:
    url = str(made.repository_path)
    code, told = vmrewind("list", url, "--json")
    (vm,) = json.loads(told)["vms"]
    assert code == 0 and (vm["vm"], vm["uuid"], len(vm["runs"])) == (VM, str(UUID), 1)
    assert vm["runs"][0]["host"] == "kvm1" and vm["stored_bytes"] > 0
    (interval,) = vm["disks"]["vda"]["coverage"]
    assert (interval["first_ns"], interval["last_ns"], interval["last_seq"]) == (made.times[1], made.times[5], 5)
    code, told = vmrewind("list", url)
    assert code == 0 and f"{url}/{VM}" in told and "every moment from" in told and "vdb: 65.5 kB (raw)" in told
    code, told = vmrewind("timeline", f"{url}/{VM}", "--json")
    assert code == 0 and json.loads(told)["disks"]["vdb"]["coverage"][0]["last"]["seq"] == 5
    code, told = vmrewind("restore", f"{url}/{VM}", "--at", "@upgrade", "--output", tmp_path / "out")
    assert code == 0, told
    assert (tmp_path / "out/vda.raw").read_bytes() == made.disk("vda").states[3]
    assert (tmp_path / "out/vdb.raw").read_bytes() == made.disk("vdb").states[3]
    assert not state_root().exists(), "reading a repository leaves nothing on the machine"


def test_a_vm_that_is_not_there_is_named_with_those_that_are(made: MadeHistory, vmrewind: Command) -> None:
    code, told = vmrewind("timeline", f"{made.repository_path}/web0")
    assert code == VmStateError.exit_code and "holds no VM called 'web0'" in told and VM in told


def test_one_vm_that_cannot_be_read_does_not_hide_the_others(made: MadeHistory, vmrewind: Command) -> None:
    made.repository.repository.vm("broken 1").register("u")
    runs = made.repository_path / "vms/broken%201/runs"
    runs.mkdir()
    (runs / f"{1:016x}.json").write_text("damaged")
    code, told = vmrewind("list", made.repository_path)
    assert code == 0 and "problem:" in told and f"{VM}: 1 run(s) on kvm1" in told.replace("\n", " ")


def test_a_journal_of_this_host_is_not_looked_at(made: MadeHistory, tmp_path: Path, vmrewind: Command) -> None:
    """It may be another VM's of the same name, or an older state of this one."""
    journal = state_root() / "vms" / VM / "journal"
    (journal / "runs").mkdir(parents=True)
    (journal / "runs" / f"{made.run + 1:016x}.json").write_text("damaged")
    code, told = vmrewind("restore", f"{made.repository_path}/{VM}", "--at", "latest", "--output", tmp_path / "out")
    assert code == 0, told
    assert (tmp_path / "out/vdb.raw").read_bytes() == made.disk("vdb").states[5]
