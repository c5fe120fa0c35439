"""Restoring to files: exact, sparse, all disks at one moment, nothing overwritten, nothing half-done left."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.history_tools import MadeHistory
from vmrewind.errors import CorruptionError, SpaceError, UsageError
from vmrewind.journal.runs import run_path, write_durably
from vmrewind.recover.blocks import differing_runs, nonzero_runs
from vmrewind.recover.restore import restore

K = 1024
M = 1 << 20


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    made = MadeHistory(tmp_path, {"vda": 32 * M, "vdb": 64 * K}, journal_size=16 << 20)
    made.disk("vda").content[M : M + 100 * K] = os.urandom(100 * K)
    made.start()
    made.write("vda", M + 4 * K, b"a" * 512)
    made.write("vda", 20 * M, os.urandom(8 * K))
    made.write("vdb", 512, b"b" * 512)
    made.write("vda", 24 * M, bytes(M))
    made.write("vda", 20 * M + 4 * K, b"c" * 4 * K)
    return made


def quiet(target: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def test_every_moment_of_all_disks_byte_for_byte(made: MadeHistory, tmp_path: Path) -> None:
    with made.open() as history:
        for seq in range(1, 7):
            done = restore(history, ["vda", "vdb"], made.position(seq), tmp_path / f"out{seq}", quiet)
            assert done.position == made.position(seq)
            for disk in done.disks:
                assert disk.path == tmp_path / f"out{seq}" / f"{disk.target}.raw"
                assert disk.path.read_bytes() == made.disk(disk.target).states[seq]
                assert disk.base == made.infos[made.run].bases[disk.target]
        assert {path.name for path in (tmp_path / "out6").iterdir()} == {"vda.raw", "vdb.raw"}


def test_a_qcow2_disk_keeps_its_format_and_names_its_backing(made: MadeHistory, tmp_path: Path) -> None:
    info = made.infos[made.run]
    disks = (replace(info.disks[0], format="qcow2", backing="/images/template.qcow2"), info.disks[1])
    write_durably(run_path(made.journal, made.run), replace(info, disks=disks).to_json())
    with made.open() as history:
        (disk,) = restore(history, ["vda"], made.position(6), tmp_path / "out", quiet).disks
    assert disk.path == tmp_path / "out" / "vda.qcow2"
    assert disk.backing == "/images/template.qcow2"
    assert disk.path.read_bytes() == made.disk("vda").states[6]


def test_zeroes_become_holes(made: MadeHistory, tmp_path: Path) -> None:
    with made.open() as history:
        (disk,) = restore(history, ["vda"], made.position(6), tmp_path / "out", quiet).disks
    status = disk.path.stat()
    assert status.st_size == 32 * M
    assert disk.written_bytes < 200 * K
    assert status.st_blocks * 512 < 300 * K


def test_from_the_repository_alone(made: MadeHistory, tmp_path: Path) -> None:
    made.ship_runs()
    made.ship(made.run, 1, 3)
    made.ship(made.run, 4, 6)
    with made.open(local=False) as history:
        for disk in restore(history, ["vda", "vdb"], made.position(6), tmp_path / "out", quiet).disks:
            assert disk.path.read_bytes() == made.disk(disk.target).states[6]


def test_an_existing_file_is_not_overwritten(made: MadeHistory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "vdb.raw").write_bytes(b"precious")
    with made.open() as history, pytest.raises(UsageError, match=r"vdb\.raw exists"):
        restore(history, ["vda", "vdb"], made.position(6), out, quiet)
    assert (out / "vdb.raw").read_bytes() == b"precious"
    assert [path.name for path in out.iterdir()] == ["vdb.raw"]


def test_output_that_is_a_file(made: MadeHistory, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with made.open() as history, pytest.raises(UsageError, match="directory"):
        restore(history, ["vdb"], made.position(6), tmp_path / "file", quiet)


def test_no_space_left(made: MadeHistory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if offset >= 20 * M:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with made.open() as history, pytest.raises(SpaceError, match=r"vda\.raw"):
        restore(history, ["vdb", "vda"], made.position(6), tmp_path / "out", quiet)
    assert list((tmp_path / "out").iterdir()) == [], "not even the disk that was whole stays: they belong together"


def test_damage_leaves_nothing(made: MadeHistory, tmp_path: Path) -> None:
    chunk = next(path for path in (made.repository_path / "chunks").rglob("*") if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.chmod(0o600)
    chunk.write_bytes(data)
    with made.open() as history, pytest.raises(CorruptionError, match=chunk.name):
        restore(history, ["vda", "vdb"], made.position(6), tmp_path / "out", quiet)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_restore_left_is_taken_over(made: MadeHistory, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".vdb.raw.restoring").write_bytes(b"old" * 100 * K)
    with made.open() as history:
        restore(history, ["vdb"], made.position(6), out, quiet)
    assert (out / "vdb.raw").read_bytes() == made.disk("vdb").states[6]
    assert [path.name for path in out.iterdir()] == ["vdb.raw"]


def test_runs_of_blocks() -> None:
    data = bytes(4096) + b"x" * 4096 + b"y" + bytes(5000)
    assert list(nonzero_runs(0, data)) == [(4096, 8192 + 4096)]
    assert list(nonzero_runs(4000, data)) == [(96, 8288)]
    assert list(nonzero_runs(0, bytes(10000))) == []
    changed = bytes(4096) + b"z" * 4096 + bytes(len(data) - 8192)
    assert list(differing_runs(0, changed, data)) == [(4096, 8192, False), (8192, 12288, True)]
    assert list(differing_runs(0, data, data)) == []
