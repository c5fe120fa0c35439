"""What ship notices of a repository that changed and of records that nobody carries: nothing counts as shipped wrongly."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.ship_support import MIB, VM, WrittenJournal, covered, put_bases, shipped
from vmrewind.capture.policy import RUN_DONE
from vmrewind.journal import format as fmt
from vmrewind.journal.runs import Position, run_path
from vmrewind.repository.repository import ReplacedError, Repository, VmRepository
from vmrewind.repository.secret import Secret, secret_of_key_file
from vmrewind.ship import lookout, pace
from vmrewind.ship.shipper import Shipper

BOTH = ("vda", "vdb")


class Place:
    """A journal, a repository that may be made anew, and shippers between them."""

    def __init__(self, root: Path, secret: Secret | None = None) -> None:
        self.journal, self.state, self.url = root / "journal", root / "vm", str(root / "repo")
        self.state.mkdir()
        self.vm: VmRepository = Repository.init(self.url, secret).vm(VM)
        put_bases(self.vm, *BOTH)
        self.written = WrittenJournal(self.journal)
        self.written.describe()
        self.chance = random.Random(1)

    def write(self, batches: int = 3) -> None:
        for _ in range(batches):
            self.written.random_batch(self.chance)

    def make_anew(self, secret: Secret | None = None) -> None:
        for path in Path(self.url).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.vm = Repository.init(self.url, secret).vm(VM)

    def shipper(self) -> Shipper:
        return Shipper(VM, self.journal, self.url, self.state)

    def drain(self, shipper: Shipper | None = None) -> Shipper:
        shipper = shipper or self.shipper()
        while shipper.step(BOTH, hurry=True) == 0.0:
            pass
        return shipper

    def told(self, event: str) -> list[dict[str, object]]:
        path = self.state / "events" / f"{7:016x}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["event"] == event]

    @property
    def noted(self) -> dict[str, object]:
        noted: dict[str, object] = json.loads((self.journal / "shipped.json").read_bytes())
        return noted


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks come as often as there is a reason for one."""
    monkeypatch.setattr(lookout, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(lookout, "CONFIRM_SECONDS", 0.0)


@pytest.mark.usefixtures("always")
def test_a_repository_made_anew_under_a_living_ship_is_noticed_and_gets_all_that_the_journal_has(place: Place) -> None:
    place.write()
    shipper = place.drain()
    assert shipper.baseless == () and place.noted["repository"] == place.vm.repository.id
    place.make_anew()
    place.write()
    with pytest.raises(ReplacedError, match="another repository"):
        place.drain(shipper)
    assert place.vm.segments() == []
    shipper.reset()
    assert not (place.journal / "shipped.json").exists(), "capture must keep what only the old one had"
    place.drain(shipper)
    for disk in (0, 1):
        assert shipped(place.vm, 7, disk) == place.written.of(disk)
    assert [info.run for info in place.vm.runs()] == [7]
    assert place.noted["repository"] == place.vm.repository.id
    assert shipper.baseless == BOTH
    place.drain(place.shipper())
    assert [event["disks"] for event in place.told("ship.baseless")] == [list(BOTH)], "once"
    put_bases(place.vm, *BOTH)
    assert place.drain().baseless == ()


def test_nothing_is_put_with_an_old_repositorys_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "CONFIRM_SECONDS", 0.0)
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "state"))
    key = tmp_path / "key"
    secret = _key(key)
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(key))
    place = Place(tmp_path, secret)
    place.write()
    shipper = place.drain()
    shutil.rmtree(tmp_path / "state" / "repositories")
    place.make_anew(secret)
    place.write()
    with pytest.raises(ReplacedError):
        place.drain(shipper)
    assert place.vm.segments() == []
    shipper.reset()
    place.drain(shipper)
    assert shipped(place.vm, 7, 0) == place.written.of(0)


def _key(path: Path) -> Secret:
    path.write_text("5a" * 32 + "\n")
    path.chmod(0o600)
    return secret_of_key_file(path)


@pytest.mark.usefixtures("always")
def test_a_repository_that_lost_the_run_gets_it_anew(place: Place) -> None:
    place.write()
    shipper = place.drain()
    for path in (Path(place.url) / "vms").iterdir():
        shutil.rmtree(path)
    with pytest.raises(ReplacedError, match="is gone"):
        shipper.step(BOTH)
    shipper.reset()
    place.drain(shipper)
    assert shipped(place.vm, 7, 0) == place.written.of(0)


def test_the_first_write_notices_that_the_repository_is_another_one(place: Place) -> None:
    opened = Repository.open(place.url)
    place.make_anew()
    with pytest.raises(ReplacedError, match="another repository"):
        opened.probe()


@pytest.mark.usefixtures("always")
def test_who_has_taken_the_vm_over_is_told_also_while_there_is_always_something_to_carry(place: Place) -> None:
    place.write()
    shipper = place.drain()
    last = place.written.truth[-1]
    parent = Position(7, last.seq, last.time_ns)
    place.vm.put_run(replace(place.written.info, run=9, parent=parent, host="other", takeover=True, bases={}))
    while place.written.truth[-1].seq < last.seq + 100:
        place.written.batch([(fmt.Op.WRITE, 0, bytes(MIB // 2))])
    assert shipper.step(BOTH) == 0.0, "a step that is not quiet"
    assert shipper.superseded is not None


@pytest.mark.parametrize("length", [0, 50])
def test_a_segment_that_was_cut_to_nothing_is_shipped_anew(place: Place, length: int, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        place.write()
        place.drain()
    cut = place.vm.segments()[1]
    path = Path(place.url) / cut.key
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:length])
    place.drain()
    for disk in (0, 1):
        assert shipped(place.vm, 7, disk) == place.written.of(disk)
        assert covered(place.vm, 7, disk) == [(1, place.written.truth[-1].seq)]
    assert "was cut short" in capfd.readouterr().err


def test_an_ended_run_whose_description_is_missing_is_lost_and_not_done(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.write()
    last = place.written.truth[-1]
    run_path(place.journal, 7).unlink()
    second = WrittenJournal(place.journal, 8, first_seq=last.seq + 1)
    second.describe()
    second.random_batch(place.chance)
    place.drain()
    assert place.noted["runs"] == {f"{8:016x}": second.truth[-1].seq}
    assert "is missing and the journal has records" in capfd.readouterr().err


def test_an_ended_run_whose_description_only_the_repository_has_is_carried(place: Place) -> None:
    place.write()
    place.drain()
    place.write()
    last = place.written.truth[-1]
    run_path(place.journal, 7).unlink()
    second = WrittenJournal(place.journal, 8, first_seq=last.seq + 1, parent=Position(7, last.seq, last.time_ns), bases=())
    second.describe()
    second.random_batch(place.chance)
    place.drain()
    assert shipped(place.vm, 7, 0) == place.written.of(0)
    assert place.noted["runs"] == {f"{7:016x}": RUN_DONE, f"{8:016x}": second.truth[-1].seq}


def test_a_debt_is_paid_off_at_the_limit_that_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    paced = pace.Pace()
    paced.limit = MIB
    paced.spent(8 * MIB)
    now.seconds += 2
    assert paced.wait_seconds() == 6
    paced.limit = 1000 * MIB
    assert paced.wait_seconds() == 0.006
    paced.limit = MIB // 2
    assert paced.wait_seconds() == 12
    paced.limit = None
    assert paced.wait_seconds() == 0
    paced.limit = MIB
    assert paced.wait_seconds() == 0
    paced.spent(8 * MIB)
    now.seconds += 2
    paced.limit = 2 * MIB
    assert paced.wait_seconds() == 3, "what passed before the change was paid at the old rate"


def test_with_a_limit_all_that_lies_behind_it_is_counted(place: Place) -> None:
    shipper = place.drain()
    shipper.pace.limit = MIB
    sent = place.written.truth[-1].seq if place.written.truth else 0
    for _ in range(12):
        place.written.batch([(fmt.Op.WRITE, 0, place.chance.randbytes(MIB))])
    while not shipper.held_back:
        shipper.step(BOTH)
        shipper.settle()
    reached = max((name.last for name in place.vm.segments()), default=sent)
    left = sum(fmt.padded(len(record.payload)) for record in place.written.truth if record.seq > reached)
    assert left > 5 * MIB
    assert shipper.progress().unsent_bytes == left
