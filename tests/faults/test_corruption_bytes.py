"""Any byte at rest that is not what it was: found and located, or provably unused; what does not need it restores, and right."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.history_tools import MadeHistory
from vmrewind.errors import CorruptionError, VmrewindError
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment
from vmrewind.journal.runs import read_head, run_path
from vmrewind.journal.verify import SegmentReport, verify
from vmrewind.repository.base import make_base
from vmrewind.repository.compression import compress

DISK = 8192


@pytest.fixture
def made(tmp_path: Path) -> MadeHistory:
    """A run of two disks in one segment of which some 3 KiB are used, ended cleanly."""
    made = MadeHistory(tmp_path, {"vda": DISK, "vdb": DISK})
    made.disk("vda").content[:] = os.urandom(DISK)
    made.start()
    for i in range(12):
        made.write("vda", 100 * i, bytes([i + 1]) * (21 + i))
        made.write("vdb", 50 * i, bytes([i + 101]) * 13)
    made.tick()
    made.batch([(fmt.Op.ZERO, "vda", 0, 300), (fmt.Op.WRITE, "vda", 64, b"in one batch"), (fmt.Op.DISCARD, "vdb", 10, 90)])
    made.mark("here")
    made.stop()
    return made


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def restored(made: MadeHistory, seqs: Iterable[int], **sources: bool) -> dict[int, bool]:
    """For each moment whether it was restored; fails if any byte is wrong. Any refusal is one of ours."""
    found = {}
    for seq in seqs:
        try:
            with made.open(**sources) as history:
                for target in ("vda", "vdb"):
                    position = resolve(history, history.branch(), f"seq:{seq}", [target], made.now_ns)
                    view = View.open(history, target, position)
                    content = view.read(0, view.size)
                    assert content == made.disk(target).states[seq], f"wrong bytes of {target} at seq:{seq}"
            found[seq] = True
        except VmrewindError as error:
            assert str(error)
            found[seq] = False
    return found


def test_every_byte_of_a_segment(made: MadeHistory) -> None:
    (path,) = made.segment_paths()
    with Segment(path) as segment:
        batches = list(segment.batches())
    end, last = batches[-1].end, max(made.times)
    moments = (batches[3].last_seq, batches[-4].first_seq, last)
    assert restored(made, moments) == dict.fromkeys(moments, True)
    padding = range(fmt.SEGMENT.size, fmt.SEGMENT_HEADER_SIZE, 61)
    for at, offset in enumerate((*range(fmt.SEGMENT.size), *padding, *range(fmt.SEGMENT_HEADER_SIZE, end))):
        flip(path, offset)
        (report,) = verify([made.journal])
        assert report.problems, f"a flipped byte at {offset} was not seen"
        holder = next((batch for batch in batches if batch.position <= offset < batch.end), None)
        low = holder.position if holder is not None else 0
        assert low <= report.problems[0].offset <= offset, f"a flipped byte at {offset} was located at {report.problems[0].offset}"
        if at % 23 == 0:
            for seq, fine in restored(made, moments).items():
                before = holder is not None and seq < holder.first_seq
                assert fine or not before, f"a flipped byte at {offset} costs seq:{seq}, which lies before it"
        flip(path, offset)
    assert verify_all(made) == []
    for offset in range(end, path.stat().st_size, 99_991):
        flip(path, offset)
    assert verify_all(made) == []
    assert restored(made, moments) == dict.fromkeys(moments, True)


def verify_all(made: MadeHistory) -> list[tuple[str, str]]:
    return [(report.path.name, problem.message) for report in verify([made.journal]) for problem in report.problems]


def test_a_segment_cut_anywhere(made: MadeHistory) -> None:
    (path,) = made.segment_paths()
    whole, last = path.read_bytes(), max(made.times)
    with Segment(path) as segment:
        batches = list(segment.batches())
    for size in (*range(0, batches[-1].end, 149), batches[-1].end, len(whole) - 1):
        os.truncate(path, size)
        (report,) = verify([made.journal])
        assert report.problems, f"cut to {size} bytes: not seen"
        fine = restored(made, (2, 9, last))
        for seq, was in fine.items():
            needed = next(batch.end for batch in batches if batch.last_seq >= seq)
            assert was == (size >= needed), f"cut to {size} bytes: seq:{seq}"
        path.write_bytes(whole)


@pytest.fixture
def long(tmp_path: Path) -> MadeHistory:
    """A run in at least four segments."""
    made = MadeHistory(tmp_path, {"vda": DISK, "vdb": DISK})
    made.start()
    for _ in range(70):
        made.disk("vda").content[:] = bytes(DISK)
        made.batch([(fmt.Op.WRITE, "vda", 0, os.urandom(DISK))] * 7)
        made.tick()
    made.stop()
    assert len(made.segment_paths()) >= 4
    return made


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda paths: swap(paths[1], paths[2]), 1),
        (lambda paths: paths[2].unlink(), 1),
        (lambda paths: paths[2].rename(paths[2].with_name(fmt.segment_name(7, 3))), 1),
        (lambda paths: paths[-1].unlink(), -2),
        (lambda paths: paths[2].write_bytes(paths[1].read_bytes()), 2),
    ],
    ids=["swapped", "deleted", "renamed", "last deleted", "copied over"],
)
def test_segments_that_changed_places(long: MadeHistory, harm: Callable[[list[Path]], object], named: int) -> None:
    paths = long.segment_paths()
    starts = []
    for path in paths:
        with Segment(path) as segment:
            starts.append(segment.header.first_seq)
    last = max(long.times)
    moments = (2, starts[1] - 1, starts[2] + 10, last)
    assert all(restored(long, moments).values())
    harm(paths)
    reports: list[SegmentReport] = list(verify([long.journal]))
    assert paths[named].name in {report.path.name for report in reports if report.problems}
    fine = restored(long, moments)
    assert fine[2], "what lies before is not touched"
    assert not fine[last]


def objects(made: MadeHistory, part: str) -> list[Path]:
    return sorted(path for path in made.repository_path.rglob("*") if path.is_file() and part in str(path))


@pytest.mark.parametrize("part", ["segments", "chunks", "bases", "runs", "repository.json"])
def test_every_object_of_a_repository(made: MadeHistory, part: str) -> None:
    """Each damaged in many places, then cut, then gone, on a host that has nothing else: right, or refused."""
    last = max(made.times)
    made.ship_runs()
    made.ship(made.run, 1, 10)
    made.ship(made.run, 11, last)
    moments = (5, last)
    assert all(restored(made, moments, local=False).values())
    found = objects(made, part)
    assert found
    refused = 0
    for path in found:
        path.chmod(0o600)
        whole = path.read_bytes()
        for offset in range(0, len(whole), max(1, len(whole) // 60)):
            flip(path, offset, 0x01)
            refused += not all(restored_unopened(made, moments).values())
            path.write_bytes(whole)
        path.write_bytes(whole[: len(whole) // 2])
        assert not all(restored_unopened(made, moments).values())
        path.unlink()
        assert not all(restored_unopened(made, moments).values())
        path.write_bytes(whole)
    assert refused > 30
    assert all(restored(made, moments, local=False).values())


def restored_unopened(made: MadeHistory, moments: Iterable[int]) -> dict[int, bool]:
    """As ``restored``, of a host that has only the repository and opens it anew."""
    from vmrewind.history.history import History
    from vmrewind.repository.repository import Repository

    found = {}
    for seq in moments:
        try:
            repository = Repository.open(str(made.repository_path)).vm(made.repository.name)
            with History.open(repository.name, None, repository) as history:
                for target in ("vda", "vdb"):
                    position = resolve(history, history.branch(), f"seq:{seq}", [target], made.now_ns)
                    view = View.open(history, target, position)
                    assert view.read(0, view.size) == made.disk(target).states[seq], f"wrong bytes of {target} at seq:{seq}"
            found[seq] = True
        except VmrewindError as error:
            assert str(error)
            found[seq] = False
    return found


def test_every_byte_of_a_runs_description_and_of_the_head(made: MadeHistory) -> None:
    last = max(made.times)
    path = run_path(made.journal, made.run)
    for offset in range(0, path.stat().st_size, 3):
        flip(path, offset, 0x01)
        restored(made, (9, last), repository=True)
        flip(path, offset, 0x01)
    path = made.journal / "head.json"
    whole = read_head(made.journal)
    for offset in range(path.stat().st_size):
        flip(path, offset, 0x01)
        # What is not refused must mean the same: a blank more or less.
        with contextlib.suppress(CorruptionError):
            assert read_head(made.journal) == whole
        flip(path, offset, 0x01)


def test_a_damaged_chunk_is_made_whole_by_the_next_backup(made: MadeHistory) -> None:
    image = made.directory / "vda.image"
    (manifest,) = [made.repository.base("vda", base) for base in made.repository.bases("vda")]
    chunks = made.repository.repository.chunks
    (chunk_id,) = [chunk for chunk in manifest.chunks if chunk is not None]
    (path,) = [path for path in objects(made, "chunks") if path.name.endswith(chunk_id[-8:])]
    path.chmod(0o600)
    flip(path, path.stat().st_size // 2)
    with pytest.raises(CorruptionError, match=chunk_id) as caught:
        chunks.read(chunk_id)
    assert "backup" in caught.value.hint
    path.write_bytes(compress(b"whole, but another's"))
    with pytest.raises(CorruptionError, match="does not match its name"):
        chunks.read(chunk_id)
    again = make_base(made.repository, "vda", image, uuid=manifest.uuid, partial=made.directory / "partial")
    assert again.chunks == manifest.chunks
    assert chunks.read(chunk_id) == image.read_bytes()
    inode = path.stat().st_ino
    make_base(made.repository, "vda", image, uuid=manifest.uuid, partial=made.directory / "partial")
    assert path.stat().st_ino == inode, "a sound one is left alone"
