"""A small file of the local state that makes no sense costs what it alone knew, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.history_tools import MadeHistory
from tests.ship_support import UUID, VM, WrittenJournal, shipped
from vmrewind.errors import CorruptionError
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal.runs import local_runs, read_head, run_path
from vmrewind.journal.verify import verify
from vmrewind.repository.repository import Repository
from vmrewind.ship.shipper import Shipper

K = 1024
GARBAGE = [b"", b"{", b"[]", b"null", b'{"run": 7}', b"\xff\xfe", b'{"run": "x"}']


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    """Two runs, both described in the repository, stopped."""
    made = MadeHistory(tmp_path, {"vda": 64 * K})
    made.start()
    made.write("vda", 0, b"one" * 100)
    made.start(parent=made.stop())
    made.write("vda", 0, b"two" * 100)
    made.stop()
    return made


def restored(made: MadeHistory) -> None:
    """The newest state can be had."""
    with made.open() as history:
        position = resolve(history, history.branch(), "latest", ["vda"], made.now_ns)
        view = View.open(history, "vda", position)
        assert view.read(0, view.size) == bytes(made.disk("vda").content)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("which", [0, 1])
def test_a_runs_description_is_had_from_the_repository(made: MadeHistory, garbage: bytes, which: int) -> None:
    made.ship_runs()
    run = sorted(made.infos)[which]
    run_path(made.journal, run).write_bytes(garbage)
    restored(made)
    damaged: list[CorruptionError] = []
    assert [info.run for info in local_runs(made.journal, damaged.append)] == [sorted(made.infos)[1 - which]]
    assert str(run_path(made.journal, run)) in str(damaged[0])
    assert damaged[0].hint
    assert verify([made.journal])


def test_another_runs_description_under_its_name_is_damage(made: MadeHistory) -> None:
    first, second = (run_path(made.journal, run) for run in sorted(made.infos))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CorruptionError, match="describes run"):
        local_runs(made.journal)


def test_an_older_state_is_never_given_for_the_newest_one_that_nothing_describes(made: MadeHistory) -> None:
    first, newest = sorted(made.infos)
    run_path(made.journal, newest).write_bytes(b"{")
    with made.open() as history:
        with pytest.raises(CorruptionError, match=f"{newest:016x}") as caught:
            history.branch()
        assert f"{first:016x}" in caught.value.hint
        on_first = history.branch(f"{first:016x}")
        position = resolve(history, on_first, "latest", ["vda"], made.now_ns)
        assert View.open(history, "vda", position).read(0, 300) == b"one" * 100


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_head_is_none(made: MadeHistory, garbage: bytes) -> None:
    (made.journal / "head.json").write_bytes(garbage)
    damaged: list[CorruptionError] = []
    assert read_head(made.journal, damaged.append) is None
    assert "head.json" in str(damaged[0])
    assert damaged[0].hint
    restored(made)
    assert verify([made.journal])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_copy_of_a_manifest_is_none(made: MadeHistory, garbage: bytes) -> None:
    (copy,) = (made.directory / "bases" / "vda").iterdir()
    copy.write_bytes(garbage)
    restored(made)
    with made.open(repository=False) as history:
        problem = history.base_problem(made.infos[min(made.infos)], "vda")
        assert problem is not None and "not known here" in problem


def test_ship_goes_on_without_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    vm = Repository.init(str(tmp_path / "repo")).vm(VM)
    vm.register(UUID)
    written = []
    for run, parent in ((7, None), (8, None), (9, None)):
        journal = WrittenJournal(tmp_path / "journal", run, parent=parent)
        journal.describe()
        journal.batch([(fmt.Op.WRITE, 0, b"record")])
        written.append(journal)
    vm.put_run(written[0].info)
    for run in (7, 8):
        run_path(tmp_path / "journal", run).write_bytes(b"{")
    shipper = Shipper(VM, tmp_path / "journal", str(tmp_path / "repo"), tmp_path / "state")
    while shipper.step(("vda", "vdb"), hurry=True) == 0.0:
        pass
    assert shipped(vm, 7, 0) == written[0].of(0)
    assert shipped(vm, 8, 0) == []
    assert shipped(vm, 9, 0) == written[2].of(0)
    said = (tmp_path / "journal" / "shipped.json").read_text()
    assert fmt.run_name(7) in said and fmt.run_name(8) not in said, "what was not carried is not called so"
    assert capfd.readouterr().err.count(fmt.run_name(8)) == 1
