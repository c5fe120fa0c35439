"""The repository by its objects' meanings: VMs, runs, configurations, bases, and what must be refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.failing_store import FailingStore
from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.journal.runs import Discontinuity, DiskInfo, ImageIdentity, Position, RunInfo
from vmrewind.repository import layout
from vmrewind.repository.chunks import CHUNK_SIZE
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.manifest import Manifest, new_base_id
from vmrewind.repository.memory import MemoryStore
from vmrewind.repository.repository import Repository
from vmrewind.repository.sealed import seal

UUID = "0f0e0d0c-0b0a-0908-0706-050403020100"


def run_info(run: int = 7, **changes: object) -> RunInfo:
    fields: dict[str, object] = {
        "run": run, "parent": Position(3, 41, 1_000), "vm": "web01", "uuid": UUID, "host": "kvm1", "start_time_ns": 5,
        "first_seq": 42, "disks": (DiskInfo(0, "vda", 1 << 30, "raw", "/images/a", None),), "bases": {"vda": "x"},
        "gaps": {"vdb": Discontinuity("changed", 9)},
    }  # fmt: skip
    return RunInfo(**(fields | changes))  # type: ignore[arg-type]


def manifest(**changes: object) -> Manifest:
    fields: dict[str, object] = {
        "id": new_base_id(1_700_000_000_000_000_000), "disk": "vda", "uuid": UUID, "size": CHUNK_SIZE + 1, "chunk_size": CHUNK_SIZE,
        "time_ns": 1_700_000_000_000_000_000, "format": "raw", "backing": None, "identity": ImageIdentity("/a", 1, 2, 3, 0),
        "chunks": ("ab" * 32, None),
    }  # fmt: skip
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def test_a_repository_is_made_once_and_opened_after(tmp_path: Path) -> None:
    url = str(tmp_path / "new" / "repo")
    made = Repository.init(url)
    assert Repository.open(url).id == made.id
    with pytest.raises(RepositoryError, match="there is a repository already"):
        Repository.init(url)
    assert Repository.open(url).id == made.id


def test_opening_never_makes_one(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RepositoryError) as caught:
            Repository.open(str(place))
        assert "vmrewind init" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_newer_formats_and_unknown_encryption_are_refused() -> None:
    for change, words in [({"format": 2}, "has format 2"), ({"encryption": {"cipher": "rot13"}}, "encrypted")]:
        store = MemoryStore()
        store.put("repository.json", seal({"format": 1, "id": "ab", "created": "", "encryption": None} | change))
        with pytest.raises(RepositoryError, match=words) as caught:
            Repository.open_in(store)
        assert "newer" in caught.value.hint
        with pytest.raises(RepositoryError, match=words):
            Repository.init_in(store)


class Forgetful(MemoryStore):
    """As some S3 servers: accepts the condition and ignores it."""

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data


def test_a_store_that_overwrites_is_refused_before_anything_is_written() -> None:
    store = Forgetful()
    with pytest.raises(RepositoryError, match="overwrites"):
        Repository.init_in(store)
    assert store.objects == {}
    store.objects = dict(Repository.init_in(honest := MemoryStore()).store.objects)  # type: ignore[attr-defined]
    repository = Repository.open_in(store)
    for write in (
        lambda: repository.vm("a").register(UUID),
        lambda: repository.vm("a").put_run(run_info()),
        lambda: repository.vm("a").put_base(manifest()),
        lambda: repository.vm("a").put_config(1, "toml", b""),
        lambda: repository.vm("a").put_segment(SegmentName(1, 1, 1, 1, "a"), b""),
    ):
        with pytest.raises(RepositoryError, match="overwrites"):
            write()
    assert store.objects == honest.objects


def test_a_read_only_repository_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "repo")
    Repository.init(url).vm("web01").register(UUID)
    before = sorted(tmp_path.rglob("*"))

    def refuse(*_: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "link", refuse)
    vm = Repository.open(url).vm("web01")
    assert vm.uuid() == UUID
    with pytest.raises(RepositoryError, match="Read-only"):
        vm.put_run(run_info())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_belongs_to_one_vm() -> None:
    repository = Repository.init_in(MemoryStore())
    vm = repository.vm("web01")
    assert vm.uuid() is None
    vm.register(UUID)
    vm.register(UUID)
    assert repository.vms() == ["web01"]
    with pytest.raises(RepositoryError, match="belongs to another VM") as caught:
        vm.register("11111111-2222-3333-4444-555555555555")
    assert f'uuid = "{UUID}"' in caught.value.hint
    assert vm.uuid() == UUID


def test_vm_names_of_any_characters(tmp_path: Path) -> None:
    names = ["web01", "Büro PC", "a%2Fb", ".hidden", "..", "x+y~z", "a.b-c_d"]
    repository = Repository.init(str(tmp_path))
    for name in names:
        vm = repository.vm(name)
        vm.register(UUID)
        vm.put_run(run_info())
    assert repository.vms() == sorted(names)
    assert all([run.run for run in repository.vm(name).runs()] == [7] for name in names)
    assert sorted(path.name for path in (tmp_path / "vms").iterdir()) == sorted(
        ["web01", "B%C3%BCro%20PC", "a%252Fb", "%2Ehidden", "%2E.", "x%2By%7Ez", "a.b-c_d"]
    )


def test_runs_come_back_as_they_were_in_order() -> None:
    vm = Repository.init_in(MemoryStore()).vm("web01")
    late, early = run_info(9, parent=None), run_info(8)
    for info in (late, early, late):
        vm.put_run(info)
    assert vm.runs() == [early, late]
    with pytest.raises(RepositoryError, match="another content"):
        vm.put_run(run_info(9, host="kvm2"))


def test_configurations_are_kept_by_version() -> None:
    vm = Repository.init_in(MemoryStore()).vm("web01")
    day = 86_400_000_000_000
    for time_ns, text in [(day, b"one"), (2 * day, b"one"), (3 * day, b"two"), (4 * day, b"one")]:
        vm.put_config(time_ns, "toml", text)
    assert [(name.time_ns, vm.config(name), name.suffix) for name in vm.configs()] == [
        (day, b"one", "toml"), (3 * day, b"two", "toml"), (4 * day, b"one", "toml"),
    ]  # fmt: skip


def test_bases_come_back_as_they_were() -> None:
    vm = Repository.init_in(MemoryStore()).vm("web01")
    one = manifest()
    two = manifest(id=new_base_id(1_800_000_000_000_000_000), backing="/b", chunks=(None, None))
    for each in (two, one):
        vm.put_base(each)
    assert vm.bases("vda") == [one.id, two.id]
    assert vm.bases("vd") == []
    assert [vm.base("vda", one.id), vm.base("vda", two.id)] == [one, two]
    assert [one.chunk_length(0), one.chunk_length(1)] == [CHUNK_SIZE, 1]
    with pytest.raises(RepositoryError, match="no base nix"):
        vm.base("vda", "nix")


@pytest.mark.parametrize(
    "change", [{"chunks": ("ab" * 32,)}, {"chunks": ("AB" * 32, None)}, {"chunks": (3, None)}, {"size": -1}, {"size": True},
               {"chunk_size": 0}, {"identity": ImageIdentity("/a", 1, 2, 3, 0), "format": None}],
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CorruptionError, match="here: not a base's manifest"):
        Manifest.from_json(manifest(**change).to_json(), "here")


def test_segments_are_known_by_name() -> None:
    store = MemoryStore()
    vm = Repository.init_in(store).vm("a b")
    names = [SegmentName(1, 1, 9, 1, "a b"), SegmentName(1, 10, 12, 3, "a b"), SegmentName(2, 13, 13, 0x8000000000000001, "a b")]
    for name in reversed(names):
        store.put(name.key, b"")
    for stray in ("x", "0-0-0-0", names[0].key.rpartition("/")[2] + "x", f"{1:016x}-{9:016x}-{1:016x}-1"):
        store.put(layout.segment_prefix("a b") + stray, b"")
    assert vm.segments() == names
    assert [names[1].carries(0), names[1].carries(1), names[1].carries(2), names[2].carries(63)] == [True, True, False, True]
    assert names[1].key == "vms/a%20b/segments/0/0000000000000001-000000000000000a-000000000000000c-3"
    with pytest.raises(CorruptionError, match=f"{names[0].key}: the object is missing"):
        store.delete(names[0].key)
        vm.get_segment(names[0])


def test_names_come_in_order_whatever_order_the_store_lists_them_in() -> None:
    store = MemoryStore()
    Repository.init_in(store)
    vm = Repository.open_in(FailingStore(store, seed=1, chance=0)).vm("web01")
    for number in range(1, 11):
        vm.put_run(run_info(number))
        vm.put_config(number * 1_000_000, "toml", b"%d" % number)
        vm.put_base(manifest(id=new_base_id(number * 1_000_000_000)))
        vm.put_segment(SegmentName(number % 3, number, number, 1, "web01"), b"")
    assert [info.run for info in vm.runs()] == list(range(1, 11))
    assert [name.time_ns for name in vm.configs()] == [number * 1_000_000 for number in range(1, 11)]
    assert vm.bases("vda") == sorted(vm.bases("vda"))
    assert vm.segments() == sorted(vm.segments())


def test_times_in_names_are_utc_and_cut_to_microseconds() -> None:
    time_ns = 1_795_343_465_250_000_999
    assert layout.format_time(time_ns) == "20261122T103105.250000Z"
    assert layout.parse_time("20261122T103105.250000Z") == 1_795_343_465_250_000_000


def test_every_json_object_notices_every_flipped_bit() -> None:
    """Where a flip changes nothing that is read (white space, say), the content must still be the same."""
    store = MemoryStore()
    repository = Repository.init_in(store)
    vm = repository.vm("web01")
    vm.register(UUID)
    vm.put_run(run_info())
    vm.put_base(base := manifest())
    vm.put_config(0, "toml", b'name = "web01"')

    def read() -> object:
        found = Repository.open_in(store)
        part = found.vm("web01")
        return found.id, part.uuid(), part.runs(), part.base("vda", base.id), [part.config(name) for name in part.configs()]

    truth = read()
    for key, data in list(store.objects.items()):
        for bit in range(0, len(data) * 8, 3):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            store.objects[key] = bytes(damaged)
            try:
                assert read() == truth, (key, bit)
            except CorruptionError as error:
                assert key in str(error)
            except RepositoryError as error:
                assert "has format" in str(error)
        store.objects[key] = data
    assert json.loads(store.objects["repository.json"])["format"] == 1
