"""``vmrewind verify`` as a user calls it, what it remembers, and what it says of a store that fails."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.damage_tools import World, damage_of, kind_of, make_world
from tests.failing_store import FailingStore
from tests.history_tools import VM, exit_code_of_main
from vmrewind.errors import CorruptionError, RepositoryError, UsageError
from vmrewind.history.history import History
from vmrewind.journal.events import EventLog
from vmrewind.journal.format import Op
from vmrewind.paths import VmPaths, state_root
from vmrewind.recover.drill import random_moment
from vmrewind.recover.findings import Finding, Kind
from vmrewind.recover.verified import Verified
from vmrewind.recover.verify import verify
from vmrewind.repository.description import read_description
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.opening import open_store
from vmrewind.repository.repository import Repository
from vmrewind.repository.sealed import seal
from vmrewind.repository.segment import ShippedSegment, encode_segment


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("made"))


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    return made.copy(tmp_path / "repo")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["vmrewind", "verify", *arguments])
    return exit_code_of_main()


def segment(world: World, number: int = 3) -> str:
    return [key for key in world.objects() if kind_of(key) == "segments"][number]


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def read_of(world: World, **wanted: bool | int) -> tuple[int, int]:
    """(objects read whole now besides the small ones, read by earlier verifications)."""
    again_ns = int(wanted.pop("again_ns", 0))
    parts = verify(
        Repository.open(world.url), lambda _: None, lambda *_: None, data=bool(wanted.get("data", True)), again_ns=again_ns
    )
    small = sum(kind_of(key) not in ("segments", "chunk", "repository.json") for key in world.objects())
    return sum(part.read for part in parts) - small, sum(part.earlier for part in parts)


class TestCommand:
    def test_sound(self, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(monkeypatch, world.url, "--data") == 0
        out = capsys.readouterr().out
        assert f"{VM}: 4 runs, 3 bases" in out
        assert "vda: records from 2026-" in out
        assert out.splitlines()[-1] == f"{world.url}: sound (nothing found)"

    def test_damaged_with_the_moments_and_what_to_do(
        self, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        key = segment(world)
        flip(world.path(key))
        assert run(monkeypatch, f"{world.url}/{VM}") == 0, "structure alone reads no payload"
        capsys.readouterr()
        assert run(monkeypatch, f"{world.url}/{VM}", "--data") == CorruptionError.exit_code
        out = capsys.readouterr().out
        assert f"DAMAGED: {key}: " in out
        assert "lost for vdb: every moment from 2026-" in out
        assert "do: " in out

    def test_json_is_an_object_for_each_finding_and_then_the_summary(
        self, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        key = segment(world)
        world.path(key).unlink()
        assert run(monkeypatch, world.url, "--json") == CorruptionError.exit_code
        *findings, summary = map(json.loads, capsys.readouterr().out.splitlines())
        assert {finding["finding"] for finding in findings} == {"damage"}
        assert {one["disk"] for finding in findings for one in finding["affected"]} == {"vda", "vdb"}
        assert all(one["from_ns"] for finding in findings for one in finding["affected"])
        assert (summary["outcome"], summary["findings"]["damage"]) == ("damaged", len(findings))
        assert summary["parts"][0]["vm"] == VM

    def test_a_repository_or_vm_that_is_not_there(self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert run(monkeypatch, str(tmp_path / "nothing")) == RepositoryError.exit_code
        assert run(monkeypatch, f"{world.url}/other") == RepositoryError.exit_code
        assert run(monkeypatch, world.url, "--all") == UsageError.exit_code
        assert run(monkeypatch, world.url, "--data", "--older-than", "soon") == UsageError.exit_code


class TestIncremental:
    def test_what_was_read_is_not_read_again_unless_asked_for(self, world: World) -> None:
        first, earlier = read_of(world)
        assert (first > 10, earlier) == (True, 0)
        assert read_of(world) == (0, first)
        assert read_of(world, again_ns=1) == (0, first), "read since"
        assert read_of(world, again_ns=2**62) == (first, 0)

    def test_a_copy_elsewhere_is_read_for_itself(self, world: World, tmp_path: Path) -> None:
        first, _ = read_of(world)
        assert read_of(world.copy(tmp_path / "copy")) == (first, 0)

    def test_an_object_of_another_size_is_read_at_once(self, world: World) -> None:
        key = segment(world)
        assert world.verify() == []
        world.path(key).write_bytes(world.path(key).read_bytes() + b"more")
        for data in (False, True, False):
            assert [finding.object for finding in world.verify(data=data)] == [key]

    def test_damage_is_told_again_and_again_until_it_is_mended(self, world: World) -> None:
        key = segment(world)
        assert world.verify() == []
        flip(world.path(key))
        assert world.verify() == [], "read before, and of the same size: as documented"
        for again_ns in (2**62, 0, 0):
            assert [finding.object for finding in damage_of(world.verify(again_ns=again_ns))] == [key]
        flip(world.path(key))
        assert world.verify() == []

    def test_without_its_file_or_with_a_damaged_one_everything_is_read(self, world: World) -> None:
        first, _ = read_of(world)
        (database,) = (state_root() / "verified").glob("*.db")
        content = database.read_bytes()
        for damaged in (b"", b"nonsense" * 1000, content[: len(content) // 2], None):
            if damaged is None:
                database.unlink()
            else:
                database.write_bytes(damaged)
            assert world.verify(data=False) == []
            read, earlier = read_of(world)
            assert read + earlier == first
            assert read == first or damaged == content[: len(content) // 2]
            assert read_of(world) == (0, first)

    def test_a_row_that_was_changed_does_not_count(self, tmp_path: Path) -> None:
        for change in ("size = 1001", "read_ns = 5", "key = 'b'"):
            shutil.rmtree(tmp_path / "db", ignore_errors=True)
            with Verified(tmp_path / "db" / "v.db") as known:
                known.read("a", 1000)
                assert known.get("a") is not None
                known._database.execute(f"UPDATE objects SET {change}")
                assert known.get("a") is None
                assert list(known.keys("")) == []


class TestHoles:
    def test_what_ship_declared_on_this_host_is_a_gap_and_no_damage(self, world: World) -> None:
        key = segment(world, 1)
        world.path(key).unlink()
        assert [finding.kind for finding in world.verify()] == [Kind.DAMAGE] * 2
        shutil.rmtree(state_root() / "verified")
        log = EventLog(VmPaths(VM).events(100))
        log.write("ship.hole", disks=["vda", "vdb"], first_seq=5, last_seq=8, cause="recycled")
        findings = world.verify()
        assert [finding.kind for finding in findings] == [Kind.GAP] * 2
        assert all("never came here: recycled" in finding.message for finding in findings)
        assert {(one.disk, one.first) for finding in findings for one in finding.affected if one.run == 100} == {
            ("vda", 5),
            ("vdb", 5),
        }

    def test_a_hole_of_which_a_part_was_declared(self, world: World) -> None:
        world.path(segment(world, 1)).unlink()
        EventLog(VmPaths(VM).events(100)).write("ship.hole", disks=["vda", "vdb"], first_seq=5, last_seq=6, cause="recycled")
        findings = world.verify()
        assert sorted(finding.kind for finding in findings) == [Kind.DAMAGE] * 2 + [Kind.GAP] * 2
        assert all("records 7 to 8" in finding.message for finding in damage_of(findings))

    def test_a_late_duplicate_is_no_damage_and_another_record_is(self, world: World) -> None:
        repository = Repository.open(world.url)
        vm = repository.vm(VM)
        name = vm.segments()[1]
        whole = ShippedSegment(lambda offset, length: vm.get_segment(name, offset, length), name)
        rows = whole.rows[2:].copy()
        start = int(rows["position"][0])
        payload = whole.read_range(start, whole.header.payload_length - start)
        rows["position"] -= start
        late = replace(name, first=int(rows["seq"][0]))
        vm.put_segment(late, encode_segment(late, whole.header.uuid, rows, payload))
        assert world.verify() == []
        assert set(world.restored().values()) == {""}
        world.path(late.key).unlink()
        rows["time_ns"] += 1
        world.path(late.key).write_bytes(encode_segment(late, whole.header.uuid, rows, payload))
        assert {finding.object for finding in damage_of(world.verify())} == {late.key}


class TestStore:
    @pytest.mark.parametrize("seed", range(8))
    def test_a_store_that_fails_now_and_then_is_no_damage(self, world: World, seed: int) -> None:
        store = open_store(world.url)
        failing = Repository(FailingStore(store, seed, chance=0.15), read_description(store))
        findings: list[Finding] = []
        verify(failing, findings.append, lambda *_: None, data=True)
        assert {finding.kind for finding in findings} == {Kind.UNCHECKED}

    def test_a_store_that_is_gone_is_given_up_soon(
        self, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def gone(*_: object) -> None:
            raise RepositoryError("the store is away", "bring it back")

        real = DirectoryStore.get
        monkeypatch.setattr(
            DirectoryStore, "get", lambda self, key, *more: real(self, key, *more) if "segments" not in key else gone()
        )
        assert run(monkeypatch, world.url, "--data", "--json") == RepositoryError.exit_code
        *findings, summary = map(json.loads, capsys.readouterr().out.splitlines())
        assert summary["outcome"] == "incomplete"
        assert len(findings) <= 8
        assert {finding["finding"] for finding in findings} == {"unchecked"}


def test_nothing_is_written_into_the_repository(world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(world.url).rglob("*")}
    world.verify()
    assert before == {path: path.stat().st_mtime_ns for path in Path(world.url).rglob("*")}


class TestContent:
    """Objects that are whole by every checksum of their own, and wrong all the same."""

    def rewrite(self, world: World, **changes: object) -> str:
        vm = Repository.open(world.url).vm(VM)
        name = vm.segments()[1]
        whole = ShippedSegment(lambda offset, length: vm.get_segment(name, offset, length), name)
        rows = whole.rows.copy()
        payload = whole.read_range(0, whole.header.payload_length)
        if "xxh3" in changes:
            rows["xxh3"][np.flatnonzero(rows["op"] == Op.WRITE)[1]] ^= 1
        uuid = bytes(16) if "uuid" in changes else whole.header.uuid
        world.path(name.key).write_bytes(encode_segment(name, uuid, rows, payload))
        return name.key

    def test_a_record_that_is_not_what_capture_had(self, world: World) -> None:
        key = self.rewrite(world, xxh3=1)
        (finding,) = damage_of(world.verify())
        assert (finding.object, "does not match its checksum" in finding.message) == (key, True)
        assert {one.first for one in finding.affected if one.run == 100} != {5}, "just from that record on"

    def test_a_segment_of_another_vm_with_the_same_run(self, world: World) -> None:
        key = self.rewrite(world, uuid=1)
        (finding,) = damage_of(world.verify())
        assert (finding.object, "another VM" in finding.message) == (key, True)

    def test_a_base_that_names_a_chunk_of_another_length(self, world: World) -> None:
        vm = Repository.open(world.url).vm(VM)
        (vda, *_), (vdb,) = vm.bases("vda"), vm.bases("vdb")
        one, other = vm.base("vda", vda), vm.base("vdb", vdb)
        world.path(f"vms/{VM}/bases/vdb/{vdb}.json").write_bytes(replace(other, chunks=one.chunks).to_json())
        assert any(finding.object.endswith(str(one.chunks[0])) for finding in damage_of(world.verify()))

    def test_a_newest_run_without_a_description_is_not_passed_over_for_an_older_one(self, world: World) -> None:
        newest = max(key for key in world.objects() if kind_of(key) == "runs")
        world.path(newest).unlink()
        with History.open(VM, None, Repository.open(world.url).vm(VM)) as history:
            with pytest.raises(CorruptionError, match="its description is missing"):
                history.branch()
            assert history.branch("64").run == 100

    def test_objects_that_belong_to_two_vms(self, world: World) -> None:
        world.path(f"vms/{VM}/vm.json").write_bytes(seal({"uuid": "00000000-0000-0000-0000-000000000001", "name": VM}))
        findings = damage_of(world.verify(data=False))
        assert len(findings) == 7, "four runs and three bases"
        assert all("belongs to the VM with uuid" in finding.message for finding in findings)


def test_a_drills_moment_is_chosen_by_its_seed_and_can_be_restored(world: World) -> None:
    with History.open(VM, None, Repository.open(world.url).vm(VM)) as history:
        chosen = [random_moment(history, ["vda", "vdb"], seed) for seed in range(40)]
        assert chosen == [random_moment(history, ["vda", "vdb"], seed) for seed in range(40)]
    assert len(set(chosen)) > 8
    assert len({position.run for position in chosen}) > 2
    assert set(world.restored((p.run, p.seq, disk) for p in chosen for disk in ("vda", "vdb")).values()) == {""}
