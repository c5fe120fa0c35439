"""Shipping step by step: real journals, a real directory as repository."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.ship_support import MIB, UUID, VM, WrittenJournal, covered, shipped
from vmrewind.capture.policy import RUN_DONE
from vmrewind.errors import RepositoryError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment, segment_files
from vmrewind.journal.runs import Position
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.ship import carrier
from vmrewind.ship.meter import unsent
from vmrewind.ship.shipper import Shipper

BOTH = ("vda", "vdb")


class Place:
    """A journal, a repository, and shippers between them."""

    def __init__(self, root: Path) -> None:
        self.journal = root / "journal"
        self.state = root / "vm"
        self.url = str(root / "repo")
        self.vm: VmRepository = Repository.init(self.url).vm(VM)

    def shipper(self) -> Shipper:
        return Shipper(VM, self.journal, self.url, self.state)

    def drain(self, disks: tuple[str, ...], shipper: Shipper | None = None) -> Shipper:
        """Ship all that is there."""
        shipper = shipper or self.shipper()
        while shipper.step(disks, hurry=True) == 0.0:
            pass
        return shipper

    def holes(self, run: int) -> list[tuple[list[str], int, int]]:
        path = self.state / "events" / f"{run:016x}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(e["disks"], e["first_seq"], e["last_seq"]) for e in lines if e["event"] == "ship.hole"]

    def noted(self, key: str = "runs") -> dict[int, int]:
        word = json.loads((self.journal / "shipped.json").read_bytes())
        return {int(run, 16): seq for run, seq in word[key].items()}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def some_batches(written: WrittenJournal, count: int, seed: int = 1) -> None:
    chance = random.Random(seed)
    for _ in range(count):
        written.random_batch(chance)


def test_every_record_of_a_run_arrives(place: Place) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    some_batches(written, 60)
    place.drain(BOTH)
    for disk in (0, 1):
        assert shipped(place.vm, 7, disk) == written.of(disk)
        assert covered(place.vm, 7, disk) == [(1, written.truth[-1].seq)]
    assert place.vm.uuid() == UUID
    assert place.vm.runs() == [written.info]
    assert place.noted() == {7: written.truth[-1].seq}
    assert place.holes(7) == []


def test_nothing_happens_before_the_run_is_described(place: Place) -> None:
    written = WrittenJournal(place.journal)
    some_batches(written, 3)
    shipper = place.shipper()
    assert shipper.step(BOTH) > 0
    assert list(place.vm.repository.store.list("vms/")) == []
    assert shipper.progress().run is None
    written.describe()
    place.drain(BOTH, shipper)
    assert shipped(place.vm, 7, 0) == written.of(0)


def test_records_wait_a_second_or_for_eight_mebibytes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    written.batch([(fmt.Op.WRITE, 0, b"one")])
    shipper = place.shipper()
    assert 0 < shipper.step(BOTH) <= 0.2
    assert place.vm.segments() == []
    for _ in range(8):
        written.batch([(fmt.Op.WRITE, 0, os.urandom(MIB))])
    assert shipper.step(BOTH) == 0.0
    shipper.settle()
    assert [(name.first, name.last) for name in place.vm.segments()] == [(1, 9)]
    written.batch([(fmt.Op.WRITE, 0, b"two")])
    assert 0 < shipper.step(BOTH) <= 0.2
    monkeypatch.setattr(carrier.time, "monotonic", lambda now=carrier.time.monotonic: now() + carrier.AGE_SECONDS)
    shipper.step(BOTH)
    assert [(name.first, name.last) for name in place.vm.segments()] == [(1, 9), (10, 10)]


def test_much_is_cut_into_segments_of_eight_mebibytes(place: Place) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    for _ in range(40):
        written.batch([(fmt.Op.WRITE, 0, os.urandom(MIB))])
    place.drain(BOTH)
    sizes = [size for key, size in place.vm.repository.store.list("vms/web01/segments/")]
    assert 4 <= len(sizes) <= 6
    assert max(sizes) < 10 * MIB
    assert shipped(place.vm, 7, 0) == written.truth


def test_another_process_goes_on_where_one_was(place: Place) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    for seed in range(5):
        some_batches(written, 10, seed)
        place.drain(BOTH)
    assert shipped(place.vm, 7, 0) == written.of(0)
    assert covered(place.vm, 7, 1) == [(1, written.truth[-1].seq)]


def test_only_named_disks_are_carried_and_whole_vm_records_with_each(place: Place) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    some_batches(written, 30)
    place.drain(("vdb",))
    assert shipped(place.vm, 7, 1) == written.of(1)
    assert shipped(place.vm, 7, 0) == []
    assert {name.mask for name in place.vm.segments()} == {0b10}
    assert place.noted() == {7: 0}, "of vda nothing is there"
    assert place.noted("carried") == {7: written.truth[-1].seq}
    assert covered(place.vm, 7, 1) == [(1, written.truth[-1].seq)]


def test_writes_of_other_disks_alone_make_no_segments_for_a_while(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    shipper = place.shipper()
    for _ in range(20):
        written.batch([(fmt.Op.WRITE, 0, os.urandom(MIB))])
    shipper.step(("vdb",))
    assert place.vm.segments() == []
    monkeypatch.setattr(carrier.time, "monotonic", lambda now=carrier.time.monotonic: now() + carrier.QUIET_SECONDS)
    shipper.step(("vdb",))
    assert [(name.first, name.last, name.mask) for name in place.vm.segments()] == [(1, 20, 0b10)]
    assert shipped(place.vm, 7, 1) == []


def test_a_disk_switched_on_later_is_backfilled_and_joins(place: Place) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    some_batches(written, 20)
    shipper = place.drain(("vda",))
    then = written.truth[-1].seq
    some_batches(written, 20, 2)
    place.drain(BOTH, shipper)
    some_batches(written, 20, 3)
    place.drain(BOTH, shipper)
    for disk in (0, 1):
        assert shipped(place.vm, 7, disk) == written.of(disk)
        assert covered(place.vm, 7, disk) == [(1, written.truth[-1].seq)]
    assert {name.mask for name in place.vm.segments() if name.last <= then} == {0b01, 0b10}
    assert place.vm.segments()[-1].mask == 0b11
    assert place.noted() == {7: written.truth[-1].seq}


def test_the_others_do_not_wait_for_a_disk_that_catches_up(place: Place) -> None:
    written = WrittenJournal(place.journal, size=256 * MIB)
    written.describe()
    for _ in range(80):
        written.batch([(fmt.Op.WRITE, 1, os.urandom(MIB)), (fmt.Op.WRITE, 0, b"a")])
    shipper = place.drain(("vda",))
    before = len(place.vm.segments())
    written.batch([(fmt.Op.WRITE, 0, os.urandom(MIB))] * 9)
    last = written.truth[-1].seq
    assert shipper.step(BOTH) == 0.0
    steps = 1
    while covered(place.vm, 7, 0)[-1][1] < last:
        shipper.step(BOTH)
        steps += 1
    assert steps <= 2
    shipper.settle()
    assert covered(place.vm, 7, 1)[0][0] == 1
    assert covered(place.vm, 7, 1)[0][1] < 100
    assert len(place.vm.segments()) > before
    place.drain(BOTH, shipper)
    assert covered(place.vm, 7, 1) == [(1, last)]


def test_a_disk_switched_off_leaves_no_hole_when_it_is_on_again(place: Place) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    shipper = place.shipper()
    for seed, disks in enumerate([BOTH, ("vda",), BOTH, ("vdb",), BOTH]):
        some_batches(written, 10, seed)
        place.drain(disks, shipper)
    for disk in (0, 1):
        assert shipped(place.vm, 7, disk) == written.of(disk)
        assert covered(place.vm, 7, disk) == [(1, written.truth[-1].seq)]


def test_what_is_gathered_goes_out_when_shipping_is_switched_off(place: Place) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    shipper = place.shipper()
    written.batch([(fmt.Op.WRITE, 0, b"one")])
    shipper.step(BOTH)
    shipper.finish()
    assert shipped(place.vm, 7, 0) == written.truth


def two_runs(place: Place, bases: tuple[str, ...] = ()) -> tuple[WrittenJournal, WrittenJournal]:
    first = WrittenJournal(place.journal, 7)
    first.describe()
    some_batches(first, 30)
    last = first.truth[-1]
    second = WrittenJournal(place.journal, 8, first_seq=last.seq + 1, parent=Position(7, last.seq, last.time_ns), bases=bases)
    second.describe()
    some_batches(second, 30, 2)
    return first, second


def test_the_parents_of_the_run_are_completed_first(place: Place) -> None:
    first, second = two_runs(place)
    shipper = place.shipper()
    order: list[int] = []
    while shipper.step(BOTH, hurry=True) == 0.0:
        order = sorted(name.run for name in place.vm.segments())
        assert order == [7] * order.count(7) + [8] * order.count(8)
        assert 8 not in order or covered(place.vm, 7, 0) == [(1, first.truth[-1].seq)]
    for disk in (0, 1):
        assert shipped(place.vm, 7, disk) == first.of(disk)
        assert shipped(place.vm, 8, disk) == second.of(disk)
    assert place.vm.runs() == [first.info, second.info]
    assert place.holes(7) == place.holes(8) == []
    assert place.noted() == {7: RUN_DONE, 8: second.truth[-1].seq}


def test_a_parent_behind_a_base_is_carried_after_what_is_needed(place: Place) -> None:
    first, second = two_runs(place, bases=BOTH)
    shipper = place.shipper()
    shipper.step(BOTH, hurry=True)
    assert covered(place.vm, 8, 0) == [(second.info.first_seq, second.truth[-1].seq)]
    place.drain(BOTH, shipper)
    assert shipped(place.vm, 7, 0) == first.of(0)


def test_what_was_taken_back_is_carried_too_and_not_called_shipped_before(place: Place) -> None:
    first = WrittenJournal(place.journal, 7)
    first.describe()
    some_batches(first, 10)
    place.drain(BOTH)
    cut = first.truth[-1]
    parent = Position(7, cut.seq, cut.time_ns)
    undone = WrittenJournal(place.journal, 8, first_seq=cut.seq + 1, parent=parent, bases=())
    undone.describe()
    some_batches(undone, 10, 2)
    third = WrittenJournal(place.journal, 9, first_seq=cut.seq + 1, parent=parent, bases=())
    third.describe()
    some_batches(third, 10, 3)
    shipper = place.shipper()
    while shipper.step(BOTH, hurry=True) == 0.0:
        assert 8 not in place.noted() or covered(place.vm, 8, 0) or place.noted()[8] == cut.seq
    for disk in (0, 1):
        assert shipped(place.vm, 8, disk) == undone.of(disk)
        assert shipped(place.vm, 9, disk) == third.of(disk)
    assert place.noted() == {7: RUN_DONE, 8: RUN_DONE, 9: third.truth[-1].seq}
    assert [info.run for info in place.vm.runs()] == [7, 8, 9]


def test_a_damaged_run_holds_up_no_other(place: Place) -> None:
    first = WrittenJournal(place.journal, 7)
    first.describe()
    while first.writer.segment_number < 2:
        first.batch([(fmt.Op.WRITE, 0, os.urandom(MIB))])
    last = segment_files(place.journal, 7)[-1].path
    second = WrittenJournal(place.journal, 8, first_seq=first.truth[-1].seq + 1, bases=BOTH)
    second.describe()
    some_batches(second, 10)
    with open(last, "r+b") as file:
        file.write(b"damaged!")
    place.drain(BOTH)
    assert shipped(place.vm, 8, 0) == second.of(0)
    assert covered(place.vm, 7, 0)[0][0] == 1


def test_a_run_that_never_reached_its_cpu_waits_for_nothing(place: Place) -> None:
    first = WrittenJournal(place.journal, 6)
    some_batches(first, 1)
    with open(segment_files(place.journal, 6)[0].path, "r+b") as file:
        file.seek(fmt.SEGMENT_HEADER_SIZE)
        file.write(bytes(MIB))
    written = WrittenJournal(place.journal)
    written.describe()
    some_batches(written, 1)
    place.drain(BOTH)
    assert place.noted() == {6: RUN_DONE, 7: written.truth[-1].seq}


def test_a_new_run_under_a_living_ship_is_followed_and_the_old_one_completed(place: Place) -> None:
    first = WrittenJournal(place.journal, 7)
    first.describe()
    some_batches(first, 10)
    shipper = place.drain(BOTH)
    some_batches(first, 10, 3)
    last = first.truth[-1]
    second = WrittenJournal(place.journal, 8, first_seq=last.seq + 1, parent=Position(7, last.seq, last.time_ns), bases=BOTH)
    second.describe()
    some_batches(second, 10, 4)
    place.drain(BOTH, shipper)
    assert shipped(place.vm, 7, 0) == first.of(0)
    assert shipped(place.vm, 8, 0) == second.of(0)


def test_what_was_recycled_before_it_was_shipped_is_declared_once(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    written = WrittenJournal(place.journal, size=16 * MIB)
    written.describe()
    while written.writer.segment_number < 20:
        written.batch([(fmt.Op.WRITE, 0, os.urandom(MIB))])
    with Segment(segment_files(place.journal)[0].path) as oldest:
        first = oldest.header.first_seq
    place.drain(BOTH)
    assert place.holes(7) == [(["vda", "vdb"], 1, first - 1)]
    assert covered(place.vm, 7, 0) == [(first, written.truth[-1].seq)]
    assert shipped(place.vm, 7, 0) == [record for record in written.truth if record.seq >= first]
    assert capfd.readouterr().err.count(f"records 1 to {first - 1} cannot be shipped") == 1
    written.batch([(fmt.Op.WRITE, 0, b"more")])
    place.drain(BOTH)
    assert place.holes(7) == [(["vda", "vdb"], 1, first - 1)]
    assert covered(place.vm, 7, 0) == [(first, written.truth[-1].seq)]
    assert capfd.readouterr().err == ""


def test_a_parent_whose_journal_ends_before_its_child_begins_is_a_declared_hole(place: Place) -> None:
    first, _ = two_runs(place)
    for file in segment_files(place.journal, 7):
        file.path.unlink()
    place.drain(BOTH)
    place.drain(BOTH)
    assert place.holes(7) == [(["vda", "vdb"], 1, first.truth[-1].seq)]
    assert {name.run for name in place.vm.segments()} == {8}


def test_a_lost_parent_that_is_all_in_the_repository_is_no_hole(place: Place) -> None:
    first = WrittenJournal(place.journal, 7)
    first.describe()
    some_batches(first, 10)
    place.drain(BOTH)
    for file in segment_files(place.journal, 7):
        file.path.unlink()
    last = first.truth[-1]
    second = WrittenJournal(place.journal, 8, first_seq=last.seq + 1, parent=Position(7, last.seq, last.time_ns), bases=())
    second.describe()
    some_batches(second, 10, 2)
    place.drain(BOTH)
    assert place.holes(7) == []
    assert shipped(place.vm, 8, 1) == second.of(1)


def test_another_vms_name_is_refused(place: Place) -> None:
    place.vm.register("11111111-2222-3333-4444-555555555555")
    written = WrittenJournal(place.journal)
    written.describe()
    some_batches(written, 1)
    with pytest.raises(RepositoryError, match="belongs to another VM"):
        place.drain(BOTH)
    assert place.vm.segments() == []


def test_an_outage_is_survived_and_measured(place: Place) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    some_batches(written, 5)
    shipper = place.drain(BOTH)
    sent = written.truth[-1].seq
    assert shipper.progress().shipped_seq == sent
    assert shipper.progress().unsent_bytes == 0
    Path(place.url).rename(place.url + ".away")
    some_batches(written, 5, 2)
    for _ in range(2):
        with pytest.raises(RepositoryError):
            place.drain(BOTH, shipper)
        shipper.reset()
    unsent = sum(fmt.padded(len(record.payload)) for record in written.truth if record.seq > sent)
    for _ in range(2):
        progress = shipper.progress()
        assert (progress.run, progress.shipped_seq, progress.unsent_bytes) == (7, sent, unsent)
        assert progress.lag_seconds is not None
    Path(place.url + ".away").rename(place.url)
    place.drain(BOTH, shipper)
    assert shipped(place.vm, 7, 0) == written.of(0)
    assert covered(place.vm, 7, 0) == [(1, written.truth[-1].seq)]
    assert shipper.progress().unsent_bytes == 0


def test_a_repository_that_is_away_does_not_keep_the_pool_from_recycling(place: Place) -> None:
    written = WrittenJournal(place.journal, size=16 * MIB)
    written.describe()
    shipper = place.drain(BOTH)
    Path(place.url).rename(place.url + ".away")
    while written.writer.segment_number < 20:
        written.batch([(fmt.Op.WRITE, 0, os.urandom(MIB))])
        try:
            shipper.step(BOTH)
        except RepositoryError:
            shipper.reset()
            shipper.progress()
    assert len(segment_files(place.journal)) == written.pool.segments_max


def test_the_configuration_travels_with_the_records(place: Place) -> None:
    from vmrewind.vmconfig.toml import load_toml

    path = place.journal.parent / "web01.toml"
    path.write_text(
        'name = "web01"\n[qemu]\ncommand = ["qemu"]\n[protection]\nenabled = true\nrepository = "repo"\n'
        '[[protection.disk]]\ntarget = "vda"\nimage = "a.raw"\n'
    )
    load_toml(path).save(place.state / "config.json")
    written = WrittenJournal(place.journal)
    written.describe()
    some_batches(written, 1)
    place.drain(BOTH)
    place.drain(BOTH)
    (name,) = place.vm.configs()
    assert name.suffix == "toml"
    assert place.vm.config(name) == path.read_bytes()


def test_a_configuration_that_cannot_be_read_holds_nothing_up(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.state.mkdir()
    (place.state / "config.json").write_text("{")
    written = WrittenJournal(place.journal)
    written.describe()
    some_batches(written, 1)
    place.drain(BOTH)
    assert shipped(place.vm, 7, 0) == written.of(0)
    assert "configuration is not shipped" in capfd.readouterr().err


def test_who_has_taken_the_vm_over_is_told_once_and_shipping_goes_on(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    some_batches(written, 5)
    shipper = place.drain(BOTH)
    assert shipper.superseded is None
    last = written.truth[-1]
    elsewhere = replace(written.info, run=9, parent=Position(7, last.seq, last.time_ns), host="other", takeover=True, bases={})
    place.vm.put_run(elsewhere)
    for seed in (2, 3):
        some_batches(written, 5, seed)
        shipper = place.drain(BOTH)
        assert shipper.superseded is not None
        assert "host other took it over" in shipper.superseded
    assert shipped(place.vm, 7, 0) == written.of(0)
    log = (place.state / "events" / f"{7:016x}.jsonl").read_text().splitlines()
    assert [found["by_host"] for line in log if (found := json.loads(line))["event"] == "ship.superseded"] == ["other"]
    assert capfd.readouterr().err.count("took it over") == 1


def test_a_damaged_run_of_others_does_not_hold_up_shipping(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    place.vm.repository.store.put(f"vms/{VM}/runs/{9:016x}.json", b"damaged")
    written = WrittenJournal(place.journal)
    written.describe()
    shipper = place.shipper()
    for seed in (1, 2):
        some_batches(written, 5, seed)
        place.drain(BOTH, shipper)
    assert shipped(place.vm, 7, 0) == written.of(0)
    assert "cannot be known" in capfd.readouterr().err


@pytest.mark.parametrize("lands", [False, True])
def test_a_put_that_fails_before_or_after_its_object_is_there_loses_and_doubles_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, lands: bool
) -> None:
    put = DirectoryStore.put
    chance = random.Random(3)
    failures = 0

    def failing(self: DirectoryStore, key: str, data: bytes) -> None:
        nonlocal failures
        fails = chance.random() < 0.5
        if lands or not fails:
            put(self, key, data)
        if fails:
            failures += 1
            raise RepositoryError("the connection broke")

    monkeypatch.setattr(DirectoryStore, "put", failing)
    written = WrittenJournal(place.journal)
    written.describe()
    shipper = place.shipper()
    for seed in range(15):
        some_batches(written, 3, seed)
        arrived = False
        while not arrived:
            try:
                place.drain(BOTH, shipper)
                arrived = True
            except RepositoryError:
                shipper.reset()
    assert failures > 5
    for disk in (0, 1):
        assert shipped(place.vm, 7, disk) == written.of(disk)
        assert covered(place.vm, 7, disk) == [(1, written.truth[-1].seq)]


def test_what_a_stopped_vm_has_not_shipped_is_counted_by_disk(place: Place) -> None:
    written = WrittenJournal(place.journal)
    written.describe()
    written.batch([(fmt.Op.WRITE, 0, b"x" * 8192), (fmt.Op.WRITE, 1, b"y" * 409_600)])
    assert (left := unsent(VM, place.journal, ("vda",))) is not None
    assert left.counted and left.unsent_bytes == 8192
    shipper = place.drain(("vda",))
    assert unsent(VM, place.journal, ("vda",)) is None
    written.batch([(fmt.Op.WRITE, 1, b"y" * 409_600)])
    assert unsent(VM, place.journal, ("vda",)) is None, "another disk's records are nobody's lag"
    written.batch([(fmt.Op.WRITE, 0, b"x" * 20_480), (fmt.Op.DISCARD, 0, b"z" * 4096)])
    assert (left := unsent(VM, place.journal, ("vda",))) is not None
    assert left.unsent_bytes == 20_480 and "20480 bytes are not in the repository: `vmrewind ship on" in left.words()
    # Switched on since ship noted what it carried: what it noted of vda says nothing of both, so vda's first record counts again.
    assert (left := unsent(VM, place.journal, BOTH)) is not None
    assert left.unsent_bytes == 847_872
    place.drain(BOTH, shipper)
    assert unsent(VM, place.journal, BOTH) is None
    (place.journal / "shipped.json").unlink()
    assert (left := unsent(VM, place.journal, BOTH)) is not None, "not known to be there is not there"
