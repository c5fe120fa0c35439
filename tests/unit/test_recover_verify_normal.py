"""What ``vmrewind verify`` says while a repository is written to, and of what is not there yet, any more, or never was."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.damage_tools import World, damage_of, kind_of, make_world
from tests.history_tools import NS, T0, UUID, VM, MadeHistory, exit_code_of_main
from vmrewind.paths import state_root
from vmrewind.recover.findings import Finding, Kind
from vmrewind.recover.verify import verify
from vmrewind.repository import layout
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.repository import Repository

NEWEST = f"{103:016x}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("made"))


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    return made.copy(tmp_path / "repo")


def findings_in(made: MadeHistory) -> list[Finding]:
    """What another machine, which never verified it, finds."""
    found: list[Finding] = []
    shutil.rmtree(state_root() / "verified", ignore_errors=True)
    verify(Repository.open(str(made.repository_path)), found.append, lambda *_: None, data=True)
    return found


def outcome(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str) -> tuple[int, str]:
    shutil.rmtree(state_root() / "verified", ignore_errors=True)
    monkeypatch.setattr(sys, "argv", ["vmrewind", "verify", url, "--json"])
    code = exit_code_of_main()
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])["outcome"]


class TestWhileItIsWrittenTo:
    @pytest.mark.parametrize(
        "shown",
        [
            "nothing",
            "the description",
            "the last segment",
            "every segment",
            "all but segments",
            "all but one segment",
            "everything",
        ],
    )
    @pytest.mark.parametrize("nth", [1, 2, 3, 4])
    def test_a_run_with_its_base_comes_during_a_listing(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int, shown: str
    ) -> None:
        before = world.copy(tmp_path / "before")
        came = newest_run(world)
        for key in came:
            before.path(key).unlink()
        real, listings = DirectoryStore.list, 0
        segments = [key for key in came if kind_of(key) == "segments"]
        seen = {
            "nothing": [],
            "the description": [key for key in came if kind_of(key) == "runs"],
            "the last segment": segments[-1:],
            "every segment": segments,
            "all but segments": [key for key in came if key not in segments],
            "all but one segment": [key for key in came if key != segments[0]],
            "everything": came,
        }[shown]

        def listing(store: DirectoryStore, prefix: str) -> Iterator[tuple[str, int]]:
            nonlocal listings
            listings += 1
            found = dict(real(store, prefix))
            if listings == nth:
                for key in came:
                    before.path(key).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(world.path(key), before.path(key))
                found |= {key: before.path(key).stat().st_size for key in seen if key.startswith(prefix)}
            yield from found.items()

        monkeypatch.setattr(DirectoryStore, "list", listing)
        assert [finding for finding in before.verify() if finding.kind is not Kind.NOTE] == []
        assert before.verify() == []


def newest_run(world: World) -> list[str]:
    """The objects that came with the newest run, its base's chunks among them."""
    vm = Repository.open(world.url).vm(VM)
    info = vm.run(layout.run_key(VM, 103))
    older = {c for one in vm.runs() if one.run != 103 for t, b in one.bases.items() for c in vm.base(t, b).chunks}
    chunks = {c for t, b in info.bases.items() for c in vm.base(t, b).chunks if c is not None} - older
    bases = [layout.base_key(VM, target, base) for target, base in info.bases.items()]
    segments = sorted(name.key for name in vm.segments() if name.run == 103)
    assert chunks
    assert len(segments) > 1
    return [*map(layout.chunk_key, sorted(chunks)), *bases, layout.run_key(VM, 103), *segments]


def two_disks(directory: Path) -> MadeHistory:
    """A run of 21 records, none of them carried."""
    made = MadeHistory(directory, {"vda": 8192, "vdb": 8192})
    made.repository.register(str(UUID))
    made.repository.put_config(T0, "toml", b'name = "web01"\n')
    made.start()
    for i in range(10):
        made.write("vda", 100 * i, bytes([i]) * 50)
        made.write("vdb", 100 * i, bytes([i]) * 50)
    made.repository.put_run(made.infos[made.run])
    return made


def go_on(made: MadeHistory, *, bases: list[str], shipped: bool = True) -> None:
    """The run ends, and another one goes on from there."""
    assert made.writer is not None
    parent = made.position(made.writer.next_seq - 1)
    made.start(parent=parent, bases=bases)
    made.write("vda", 0, b"next")
    made.repository.put_run(made.infos[made.run])
    if shipped:
        made.ship(made.run, parent.seq + 1, made.writer.next_seq - 1)


class TestADiskSwitchedOnLater:
    def catching_up(self, directory: Path) -> MadeHistory:
        made = two_disks(directory)
        for first, last, disks in [(1, 4, ["vdb"]), (1, 16, ["vda"]), (5, 8, ["vdb"]), (17, 21, None)]:
            made.ship(made.run, first, last, disks)
        return made

    def test_is_a_gap_until_ship_has_caught_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = self.catching_up(tmp_path)
        (finding,) = findings_in(made)
        assert (finding.kind, "records 9 to 16 of disk vdb" in finding.message) == (Kind.GAP, True)
        assert "not carried yet, or deleted" in finding.message
        assert [(one.disk, one.first) for one in finding.affected] == [("vdb", 9)]
        assert outcome(monkeypatch, capsys, str(made.repository_path)) == (0, "sound")
        made.ship(made.run, 9, 16, ["vdb"])
        assert findings_in(made) == []

    def test_is_overdue_when_the_run_ended_long_ago(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = self.catching_up(tmp_path)
        monkeypatch.setattr("time.time_ns", lambda: T0 + 1800 * NS)
        go_on(made, bases=[])
        assert [finding.kind for finding in findings_in(made)] == [Kind.GAP]
        monkeypatch.setattr("time.time_ns", lambda: T0 + 3 * 3600 * NS)
        assert [finding.kind for finding in findings_in(made)] == [Kind.OVERDUE]
        assert outcome(monkeypatch, capsys, str(made.repository_path)) == (20, "overdue")

    def test_in_the_next_run_is_a_gap_in_the_one_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = two_disks(tmp_path)
        made.ship(made.run, 1, 21, ["vda"])
        made.ship(made.run, 1, 8, ["vdb"])
        monkeypatch.setattr("time.time_ns", lambda: T0 + 60 * NS)
        go_on(made, bases=[])
        (finding,) = findings_in(made)
        assert (finding.kind, "records 9 to 21 of disk vdb" in finding.message) == (Kind.GAP, True)

    def test_a_hole_that_the_other_disk_has_too_is_damage(self, tmp_path: Path) -> None:
        made = two_disks(tmp_path)
        for first, last, disks in [(1, 8, ["vdb"]), (1, 12, ["vda"]), (17, 21, None)]:
            made.ship(made.run, first, last, disks)
        assert {one.disk for finding in damage_of(findings_in(made)) for one in finding.affected} == {"vda", "vdb"}

    @pytest.mark.parametrize("lost", ["1-4", "5-8", "17-21"])
    def test_a_hole_elsewhere_is_damage_all_the_same(self, tmp_path: Path, lost: str) -> None:
        made = self.catching_up(tmp_path)
        made.ship(made.run, 9, 16, ["vdb"])
        first, last = map(int, lost.split("-"))
        (name,) = [name for name in made.repository.segments() if (name.first, name.last) == (first, last)]
        made.ship(made.run, 22, made.event(2, {}))
        Path(made.repository_path, name.key).unlink()
        assert damage_of(findings_in(made))


class TestTheEndOfARun:
    @pytest.mark.parametrize("bases", [["vda", "vdb"], []])
    def test_that_is_not_here_is_overdue(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bases: list[str]
    ) -> None:
        made = two_disks(tmp_path)
        made.ship(made.run, 1, 8)
        go_on(made, bases=bases, shipped=bool(bases))
        monkeypatch.setattr("time.time_ns", lambda: T0 + 1800 * NS)
        assert {finding.kind for finding in findings_in(made)} == {Kind.GAP}
        assert outcome(monkeypatch, capsys, str(made.repository_path)) == (0, "sound")
        monkeypatch.setattr("time.time_ns", lambda: T0 + 3 * 3600 * NS)
        assert {finding.kind for finding in findings_in(made)} == {Kind.OVERDUE}
        assert all("9 to 21" in finding.message and "or deleted" in finding.message for finding in findings_in(made))
        assert outcome(monkeypatch, capsys, str(made.repository_path)) == (20, "overdue")

    def test_of_a_disk_that_was_switched_off_is_a_gap(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.time_ns", lambda: T0 + 3 * 3600 * NS)
        made = two_disks(tmp_path)
        made.ship(made.run, 1, 8)
        made.ship(made.run, 9, 21, ["vda"])
        go_on(made, bases=["vda", "vdb"])
        assert [finding.kind for finding in findings_in(made)] == [Kind.GAP]


class TestAChangeOfRepository:
    def moved(self, directory: Path) -> MadeHistory:
        """A new repository with what the journal had left of a run from the old one, and a run that began anew."""
        made = two_disks(directory)
        shutil.rmtree(made.repository_path)
        made.repository = Repository.init(str(made.repository_path)).vm(VM)
        made.repository.register(str(UUID))
        made.repository.put_config(T0, "toml", b'name = "web01"\n')
        old = made.infos[made.run]
        bases = {target: f"20200101T000000.000000Z-{base[-8:]}" for target, base in old.bases.items()}
        made.repository.put_run(replace(old, bases=bases))
        made.ship(made.run, 5, 21)
        go_on(made, bases=["vda", "vdb"])
        return made

    def test_leaves_a_gap_for_what_is_older(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = self.moved(tmp_path)
        found = findings_in(made)
        assert [finding.kind for finding in found] == [Kind.GAP] * 4, found
        assert all("older than this repository" in finding.message for finding in found)
        assert outcome(monkeypatch, capsys, str(made.repository_path)) == (0, "sound")

    def test_a_base_that_the_newest_moments_need_is_damage(self, tmp_path: Path) -> None:
        made = self.moved(tmp_path)
        newest = made.infos[made.run]
        for target, base in newest.bases.items():
            Path(made.repository_path, layout.base_key(VM, target, base)).unlink()
        assert len(damage_of(findings_in(made))) >= 4

    def test_a_base_made_since_is_damage(self, tmp_path: Path) -> None:
        made = two_disks(tmp_path)
        made.ship(made.run, 1, 21)
        go_on(made, bases=["vda", "vdb"])
        assert findings_in(made) == []
        first = made.infos[made.run - 1]
        Path(made.repository_path, layout.base_key(VM, "vda", first.bases["vda"])).unlink()
        assert len(damage_of(findings_in(made))) == 1


class TestWhatItFound:
    @pytest.mark.parametrize("kind", ["segments", "chunk"])
    def test_is_told_by_the_next_one_too_though_that_reads_no_data(self, world: World, kind: str) -> None:
        key = next(key for key in world.objects() if kind_of(key) == kind)
        original = world.path(key).read_bytes()
        world.path(key).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        assert {finding.object for finding in damage_of(world.verify())} == {key}
        for _ in range(2):
            assert {finding.object for finding in damage_of(world.verify(data=False))} == {key}
        world.path(key).write_bytes(original)
        assert world.verify(data=False) == []


def test_a_vm_without_any_configuration_cannot_be_taken_over(world: World) -> None:
    one, *others = [key for key in world.objects() if kind_of(key) == "config"]
    for key in others:
        world.path(key).unlink()
    assert world.verify() == []
    shutil.rmtree(state_root() / "verified")
    world.path(one).unlink()
    (finding,) = damage_of(world.verify())
    assert (finding.object, "no configuration" in finding.message) == (layout.config_prefix(VM), True)
    assert finding.affected == ()
