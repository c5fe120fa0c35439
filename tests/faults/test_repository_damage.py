"""Every kind of object of a repository, damaged in every way: ``verify --data`` names it, and no restore ever gives a wrong image.

What verify says is lost is refused by a restore, and all else restores byte for byte, from the repository alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.damage_tools import World, check_promises, damage_of, kind_of, make_world
from vmrewind.errors import VmrewindError
from vmrewind.recover.findings import Kind
from vmrewind.repository import layout
from vmrewind.repository.chunks import CHUNK_SIZE
from vmrewind.repository.compression import decompress
from vmrewind.repository.secret import secret_of_key_file

KINDS = ("chunk", "vm.json", "config", "runs", "bases", "segments")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world") / "one")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Another VM's objects."""
    return make_world(tmp_path_factory.mktemp("world") / "two", seed=b"two")


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("world") / "secret"
    directory.mkdir()
    return make_world(directory, secret_of_key_file(directory / "key"))


def keys_of(world: World, kind: str) -> list[str]:
    keys = [key for key in world.objects() if kind_of(key) == kind]
    assert keys, kind
    return keys


def must_be_named(world: World, key: str, *, restores: bool = True) -> None:
    """Verify names the damaged object; restores are as it says."""
    findings = world.verify()
    assert key in {finding.object for finding in damage_of(findings)}, findings
    if not restores:
        return
    outcome = check_promises(world, findings, key, every=False)
    hit = [one for finding in findings for one in finding.affected]
    if any(not one.partly and (one.first, one.last) == (1, 12) for one in hit):
        assert any(outcome.values())


def test_a_sound_one_has_no_findings_and_restores_every_moment(world: World) -> None:
    assert world.verify() == []
    assert set(world.restored().values()) == {""}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_anywhere(world: World, tmp_path: Path, kind: str) -> None:
    keys = keys_of(world, kind)
    for case, key in enumerate((keys[0],) if kind != "segments" else (keys[0], keys[len(keys) // 2])):
        original = world.path(key).read_bytes()
        size = len(original)
        # A segment's fields one by one: magic, version, header size, uuid, run, seqs, mask, counts, lengths, checksums.
        fields = [0, 9, 13, 17, 35, 43, 51, 57, 65, 73, 81, 85, 90, 93, 97, 105, 113, 121] if kind == "segments" else []
        offsets = {*fields, *(size * i // 12 for i in range(12)), size - 1}
        damaged = world.copy(tmp_path / f"{case}")
        for number, offset in enumerate(sorted(offsets)):
            data = bytearray(original)
            data[offset] ^= 1 << offset % 8
            damaged.path(key).write_bytes(data)
            if kind == "chunk" and decompresses_to_the_same(original, bytes(data)):
                continue  # a bit of Zstandard's frame header that means nothing: the chunk is its plain bytes
            # What no moment depends on is looked at by restores now and then only, which are what takes time here.
            must_be_named(damaged, key, restores=number % (2 if kind in ("chunk", "segments") else 5) == 0)
        damaged.path(key).write_bytes(original)
        assert damaged.verify() == [], "what was damaged and is right again is read again"


def decompresses_to_the_same(one: bytes, other: bytes) -> bool:
    try:
        return decompress(one, CHUNK_SIZE) == decompress(other, CHUNK_SIZE)
    except ValueError:
        return False


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_or_extended(world: World, tmp_path: Path, kind: str) -> None:
    key = keys_of(world, kind)[0]
    original = world.path(key).read_bytes()
    size = len(original)
    damaged = world.copy(tmp_path / "copy")
    for content in (b"", original[: size // 3], original[:-2], original + b"x"):
        damaged.path(key).write_bytes(content)
        must_be_named(damaged, key)


@pytest.mark.parametrize("kind", KINDS)
def test_deleted_after_it_was_seen_once(world: World, tmp_path: Path, kind: str) -> None:
    """Of what is missing names tell much; that the last object of its kind was there, only an earlier verification."""
    for case, key in enumerate(keys_of(world, kind)):
        damaged = world.copy(tmp_path / f"{case}")
        assert damaged.verify(data=False) == []
        damaged.path(key).unlink()
        must_be_named(damaged, key)
        assert key in {finding.object for finding in damage_of(damaged.verify(data=False))}


@pytest.mark.parametrize("kind", ["chunk", "runs", "bases", "segments", "vm.json"])
def test_deleted_before_anybody_saw_it(world: World, tmp_path: Path, kind: str) -> None:
    for case, key in enumerate(keys_of(world, kind)):
        damaged = world.copy(tmp_path / f"{case}")
        damaged.path(key).unlink()
        findings = damaged.verify()
        if kind != "segments":
            assert key in {finding.object for finding in damage_of(findings)}
        elif (name := layout.parse_segment_key("web01", key)) is not None and not is_last(world, key):
            assert any(f"records {name.first} to" in finding.message for finding in damage_of(findings)), findings
        if findings or not is_last(world, key):
            check_promises(damaged, findings, key, every=False)
        else:
            damaged.restored()


def is_last(world: World, key: str) -> bool:
    """Whether a segment is the last one of a run on which no other run depends with all it has."""
    run = layout.parse_segment_key("web01", key)
    assert run is not None
    return key == [other for other in keys_of(world, "segments") if f"/{run.run:016x}-" in other][-1] and run.run in (101, 103)


@pytest.mark.parametrize("kind", ["chunk", "config", "runs", "bases", "segments"])
def test_swapped_with_another_of_its_kind(world: World, tmp_path: Path, kind: str) -> None:
    one, *_, other = keys_of(world, kind)
    damaged = world.copy(tmp_path / "copy")
    damaged.path(one).write_bytes(world.path(other).read_bytes())
    damaged.path(other).write_bytes(world.path(one).read_bytes())
    must_be_named(damaged, one)
    must_be_named(damaged, other)


@pytest.mark.parametrize("kind", ["chunk", "config", "runs", "bases", "segments"])
def test_replaced_by_another_vms(world: World, stranger: World, tmp_path: Path, kind: str) -> None:
    key, theirs = keys_of(world, kind)[-1], keys_of(stranger, kind)[0]
    damaged = world.copy(tmp_path / "copy")
    damaged.path(key).write_bytes(stranger.path(theirs).read_bytes())
    must_be_named(damaged, key)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encrypted_one(encrypted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(Path(encrypted.url).parent / "key"))
    keys = keys_of(encrypted, kind)
    key = keys[0]
    original = encrypted.path(key).read_bytes()
    size = len(original)
    damaged = encrypted.copy(tmp_path / "copy")
    assert damaged.verify() == []
    for offset in (0, 9, 20, 60, size // 2, size - 1):
        data = bytearray(original)
        data[offset] ^= 1
        damaged.path(key).write_bytes(data)
        assert key in {finding.object for finding in damage_of(damaged.verify(again_ns=2**62))}
    check_promises(damaged, damaged.verify(again_ns=2**62), key, every=False)
    others = keys[1:2] if kind != "vm.json" else keys_of(encrypted, "runs")[:1]
    for content in (original[: size // 2], original + b"x", encrypted.path(others[0]).read_bytes()):
        damaged.path(key).write_bytes(content)
        assert key in {finding.object for finding in damage_of(damaged.verify(again_ns=2**62))}
    damaged.path(key).unlink()
    assert key in {finding.object for finding in damage_of(damaged.verify())}
    check_promises(damaged, damaged.verify(), key, every=False)


def test_the_repositorys_description(world: World, tmp_path: Path) -> None:
    original = world.path(layout.REPOSITORY).read_bytes()
    damaged = world.copy(tmp_path / "copy")
    for offset in range(len(original) - 1):
        data = bytearray(original)
        data[offset] ^= 4
        damaged.path(layout.REPOSITORY).write_bytes(data)
        with pytest.raises(VmrewindError) as told:
            damaged.verify()
        assert damaged.url in str(told.value)
    damaged.path(layout.REPOSITORY).unlink()
    with pytest.raises(VmrewindError, match="there is no repository here"):
        damaged.verify()


def test_structure_alone_finds_what_is_missing_or_of_impossible_size(world: World, tmp_path: Path) -> None:
    damaged = world.copy(tmp_path / "copy")
    chunk, segment = keys_of(world, "chunk")[0], keys_of(world, "segments")[2]
    damaged.path(chunk).write_bytes(b"")
    damaged.path(segment).write_bytes(b"short")
    assert {chunk, segment} == {finding.object for finding in damage_of(damaged.verify(data=False))}


def test_what_nobody_needs_is_a_note(world: World, tmp_path: Path) -> None:
    odd = world.copy(tmp_path / "copy")
    strangers = ["vms/web01/notes", "chunks/readme", "chunks/ab/" + "ab" * 32, "vms/web01/segments/0/.tmp-1-2", "stuff/file"]
    for key in strangers:
        odd.path(key).parent.mkdir(parents=True, exist_ok=True)
        odd.path(key).write_bytes(b"x")
    findings = odd.verify()
    assert {finding.kind for finding in findings} == {Kind.NOTE}
    assert len(findings) == 5
    assert set(odd.restored().values()) == {""}
