"""Full backups: what is read, sent and noted, of sparse files and of files that change."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from vmrewind.errors import CorruptionError, ImageError, RepositoryError
from vmrewind.repository.base import make_base
from vmrewind.repository.chunks import CHUNK_SIZE
from vmrewind.repository.layout import chunk_key
from vmrewind.repository.manifest import Manifest
from vmrewind.repository.memory import MemoryStore
from vmrewind.repository.repository import Repository, VmRepository

UUID = "0f0e0d0c-0b0a-0908-0706-050403020100"
MIB = 1 << 20


def content(manifest: Manifest, vm: VmRepository) -> bytes:
    parts = []
    for index, chunk_id in enumerate(manifest.chunks):
        length = manifest.chunk_length(index)
        parts.append(bytes(length) if chunk_id is None else vm.read_chunk(chunk_id))
        assert len(parts[-1]) == length
    return b"".join(parts)


@pytest.fixture
def vm() -> VmRepository:
    return Repository.init_in(MemoryStore()).vm("web01")


def random_bytes(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def write_image(path: Path, size: int, pieces: dict[int, bytes]) -> bytes:
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
    return path.read_bytes()


def test_a_sparse_image_comes_back_and_its_holes_cost_nothing(vm: VmRepository, tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    truth = write_image(
        image, 40 * MIB + 512, {0: b"boot", 9 * MIB: random_bytes(1, 5 * MIB), 20 * MIB: bytes(4 * MIB), 40 * MIB: b"end"}
    )
    seen: list[tuple[int, int, int]] = []
    manifest = make_base(vm, "vda", image, uuid=UUID, partial=tmp_path / "p", progress=lambda *now: seen.append(now))
    assert vm.bases("vda") == [manifest.id]
    assert vm.base("vda", manifest.id) == manifest
    assert content(manifest, vm) == truth
    assert [chunk is None for chunk in manifest.chunks] == [False, True, False, False, True, True, True, True, True, True, False]
    assert (manifest.size, manifest.uuid, manifest.format, manifest.backing) == (len(truth), UUID, "raw", None)
    assert (manifest.identity.path, manifest.identity.size) == (str(image), len(truth))
    assert not (tmp_path / "p").exists()
    assert seen[0] == (0, len(truth), 0)
    assert seen[-1][:2] == (len(truth), len(truth))
    assert 5 * MIB < seen[-1][2] < 6 * MIB
    assert seen == sorted(seen)


def test_a_disk_larger_than_its_image_ends_in_zeroes(vm: VmRepository, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    truth = write_image(image, 3 * MIB, {0: random_bytes(1, 3 * MIB)})
    with open(image, "rb") as file:
        manifest = make_base(
            vm, "vda", file.fileno(), uuid=UUID, size=10 * MIB, format="qcow2", backing="/base.qcow2", partial=tmp_path / "p"
        )
    assert content(manifest, vm) == truth + bytes(7 * MIB)
    assert (manifest.size, manifest.format, manifest.backing) == (10 * MIB, "qcow2", "/base.qcow2")
    assert manifest.identity.path == str(image)


def test_what_is_there_is_not_sent_again_by_any_vm(vm: VmRepository, tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    write_image(image, 8 * MIB, {0: random_bytes(1, 4 * MIB), 4 * MIB: random_bytes(2, 4 * MIB)})
    make_base(vm, "vda", image, uuid=UUID, partial=tmp_path / "p")
    write_image(image, 8 * MIB, {0: random_bytes(1, 4 * MIB), 4 * MIB: random_bytes(3, 4 * MIB)})
    sent = []
    make_base(vm.repository.vm("other"), "vdz", image, uuid=UUID, partial=tmp_path / "p", progress=lambda _d, _t, s: sent.append(s))
    assert 4 * MIB <= sent[-1] < 5 * MIB
    assert len(list(vm.repository.store.list("chunks/"))) == 3


def test_equal_chunks_have_other_ids_in_another_repository(vm: VmRepository) -> None:
    assert vm.repository.chunks.id(b"x") != Repository.init_in(MemoryStore()).chunks.id(b"x")


def test_an_image_that_changes_meanwhile_makes_no_base(vm: VmRepository, tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    write_image(image, 8 * MIB, {0: random_bytes(1, 8 * MIB)})

    def disturb(done: int, total: int, sent: int) -> None:
        if done == total:
            os.utime(image, ns=(1, 1))

    with pytest.raises(ImageError, match="changed while it was backed up"):
        make_base(vm, "vda", image, uuid=UUID, partial=tmp_path / "p", progress=disturb)
    assert vm.bases("vda") == []
    make_base(vm, "vda", image, uuid=UUID, partial=tmp_path / "p")
    assert len(vm.bases("vda")) == 1


def test_a_missing_image_is_named(vm: VmRepository, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.raw"):
        make_base(vm, "vda", tmp_path / "none.raw", uuid=UUID, partial=tmp_path / "p")


def interrupted(vm: VmRepository, image: Path, partial: Path, after: int) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int, sent: int) -> None:
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        make_base(vm, "vda", image, uuid=UUID, partial=partial, progress=stop)


class Reads:
    """Counts what is read of an image, in chunks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, image: Path) -> None:
        self.chunks: set[int] = set()
        self._inode = image.stat().st_ino
        self._pread = os.pread
        monkeypatch.setattr(os, "pread", self)

    def __call__(self, fd: int, length: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == self._inode:
            self.chunks.add(offset // CHUNK_SIZE)
        return self._pread(fd, length, offset)


def test_an_interrupted_base_goes_on_where_it_was(vm: VmRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, partial = tmp_path / "a.raw", tmp_path / "state" / "p"
    truth = write_image(image, 48 * MIB, {0: random_bytes(1, 48 * MIB)})
    interrupted(vm, image, partial, 20 * MIB)
    with open(partial, "ab") as file:
        file.write(b'[7, "torn')
    assert vm.bases("vda") == []
    reads = Reads(monkeypatch, image)
    manifest = make_base(vm, "vda", image, uuid=UUID, partial=partial)
    assert reads.chunks == set(range(5, 12))
    assert content(manifest, vm) == truth


def test_progress_on_an_image_that_changed_since_does_not_count(vm: VmRepository, tmp_path: Path) -> None:
    image, partial = tmp_path / "a.raw", tmp_path / "p"
    write_image(image, 16 * MIB, {0: random_bytes(1, 16 * MIB)})
    interrupted(vm, image, partial, 8 * MIB)
    truth = write_image(image, 16 * MIB, {0: random_bytes(2, 16 * MIB)})
    assert content(make_base(vm, "vda", image, uuid=UUID, partial=partial), vm) == truth


def test_progress_does_not_count_where_mtime_was_set_back(vm: VmRepository, tmp_path: Path) -> None:
    image, partial = tmp_path / "a.raw", tmp_path / "p"
    write_image(image, 16 * MIB, {0: random_bytes(1, 16 * MIB)})
    before = image.stat().st_mtime_ns
    interrupted(vm, image, partial, 8 * MIB)
    with open(image, "r+b") as file:
        file.write(b"changed")
    os.utime(image, ns=(before, before))
    assert content(make_base(vm, "vda", image, uuid=UUID, partial=partial), vm) == image.read_bytes()


def test_progress_towards_another_repository_does_not_count(vm: VmRepository, tmp_path: Path) -> None:
    image, partial = tmp_path / "a.raw", tmp_path / "p"
    truth = write_image(image, 16 * MIB, {0: random_bytes(1, 16 * MIB)})
    interrupted(vm, image, partial, 8 * MIB)
    other = Repository.init_in(MemoryStore()).vm("web01")
    assert content(make_base(other, "vda", image, uuid=UUID, partial=partial), other) == truth


def test_chunks_that_vanished_since_are_read_again(vm: VmRepository, tmp_path: Path) -> None:
    image, partial = tmp_path / "a.raw", tmp_path / "p"
    truth = write_image(image, 16 * MIB, {0: random_bytes(1, 16 * MIB)})
    interrupted(vm, image, partial, 8 * MIB)
    for key, _ in list(vm.repository.store.list("chunks/")):
        vm.repository.store.delete(key)
    assert content(make_base(vm, "vda", image, uuid=UUID, partial=partial), vm) == truth


def test_a_store_that_fails_leaves_a_base_to_continue(tmp_path: Path) -> None:
    class Failing(MemoryStore):
        left = 3

        def put(self, key: str, data: bytes) -> None:
            if key.startswith("chunks/"):
                if self.left == 0:
                    raise RepositoryError("away")
                self.left -= 1
            super().put(key, data)

    store = Failing()
    vm = Repository.init_in(store).vm("web01")
    image, partial = tmp_path / "a.raw", tmp_path / "p"
    truth = write_image(image, 40 * MIB, {0: random_bytes(1, 40 * MIB)})
    with pytest.raises(RepositoryError, match="away"):
        make_base(vm, "vda", image, uuid=UUID, partial=partial)
    assert vm.bases("vda") == []
    store.left = 100
    assert content(make_base(vm, "vda", image, uuid=UUID, partial=partial), vm) == truth
    assert store.left == 93


@pytest.mark.parametrize("at", [0, 10, -1])
def test_a_damaged_chunk_is_found_and_named(vm: VmRepository, tmp_path: Path, at: int) -> None:
    image = tmp_path / "a.raw"
    write_image(image, 4 * MIB, {0: random_bytes(1, 4 * MIB)})
    (chunk_id,) = make_base(vm, "vda", image, uuid=UUID, partial=tmp_path / "p").chunks
    assert chunk_id is not None
    store = vm.repository.store
    assert isinstance(store, MemoryStore)
    damaged = bytearray(store.objects[chunk_key(chunk_id)])
    damaged[at] ^= 4
    store.objects[chunk_key(chunk_id)] = bytes(damaged)
    with pytest.raises(CorruptionError, match=chunk_key(chunk_id)):
        vm.read_chunk(chunk_id)
    del store.objects[chunk_key(chunk_id)]
    with pytest.raises(CorruptionError, match=f"{chunk_key(chunk_id)} is missing"):
        vm.read_chunk(chunk_id)
    other, _ = vm.repository.chunks.put(b"other")
    store.objects[chunk_key(chunk_id)] = store.objects[chunk_key(other)]
    with pytest.raises(CorruptionError, match="does not match its name"):
        vm.read_chunk(chunk_id)
