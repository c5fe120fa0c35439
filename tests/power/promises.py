"""What must hold of journal, history and bases: once what a death left is finished, and whenever the disks are at rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.power.layer import real
from vmrewind.errors import CorruptionError, MomentError, RepositoryError
from vmrewind.history.history import History
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Record, Segment, SegmentFile, records, segment_files
from vmrewind.journal.runs import Position
from vmrewind.journal.verify import verify
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import VmRepository


@dataclass(frozen=True)
class Kept:
    """A record as capture wrote it, whatever becomes of it later."""

    disk: int
    op: int
    offset: int
    length: int
    payload: bytes

    def same_as(self, record: Record) -> bool:
        return (self.disk, self.op, self.offset, self.length) == (record.disk, record.op, record.offset, record.length)


class Promises:
    """Of one VM with the disks ``targets``, in the order of their indices."""

    def __init__(self, paths: VmPaths, repository: VmRepository, targets: list[str]) -> None:
        self._paths = paths
        self._journal = paths.default_journal
        self._repository = repository
        self._targets = targets
        self._written: dict[tuple[int, int], Kept] = {}
        self._recycled: set[str] = set()

    def history(self) -> History:
        return History.open(self._paths.name, self._journal, self._repository, bases=self._paths.bases)

    def remember(self, only: SegmentFile | None = None) -> None:
        """Note every record that capture wrote, of one segment or of all, as it may be lost in an instant."""
        for file in [only] if only is not None else segment_files(self._journal):
            for record, fd in _records(file.path):
                payload = real.pread(fd, record.length, record.position) if record.has_payload else b""
                self._written[(file.run, record.seq)] = Kept(record.disk, record.op, record.offset, record.length, payload)

    def recycled(self, segment: SegmentFile) -> None:
        """A segment is about to be overwritten. Its name, and what is left of its old content, may come back."""
        self.remember(segment)
        self._recycled.add(segment.path.name)

    @property
    def recycled_any(self) -> bool:
        """Whether any history was."""
        return bool(self._recycled)

    def lost(self, end: Position) -> int:
        """How many records of a run were written and are behind its end."""
        return sum(1 for run, seq in self._written if run == end.run and seq > end.seq)

    def latest(self, run: int, target: str) -> bytes:
        """The disk at the run's last record, as history has it; raises MomentError."""
        last = max(record.seq for file in segment_files(self._journal, run) for record, _ in _records(file.path))
        with self.history() as history:
            view = View.open(history, target, Position(run, last, 0))
            return view.read(0, view.size)

    def at_end(self, end: Position) -> dict[str, bytes]:
        """The disks at the end of a run that was finished, as far as they can be restored to there.

        Everything that is readable of the run is what capture wrote, nothing lies behind the end, no checksum is wrong, and
        what a record wrote last is what is restored, as composed here, by hand.
        """
        for report in verify([self._journal]):
            # What was given up is not promised; that it is reported as damage then is all that comes of it.
            if report.run == end.run and report.path.name not in self._recycled:
                assert not report.problems, f"{report.path.name}: {report.problems}"
        here = [record for file in segment_files(self._journal, end.run) for record, _ in _records(file.path)]
        for record in here:
            assert record.seq <= end.seq, f"record {record.seq} behind the end, {end.seq}, is taken"
            kept = self._written.get((end.run, record.seq))
            assert kept is not None, f"record {record.seq} was never written"
            assert kept.same_as(record), f"record {record.seq} is another one: {record}, {kept}"
        assert not here or here[-1].seq == end.seq, f"the run is said to end with {end.seq}, its records with {here[-1].seq}"
        views: dict[str, bytes] = {}
        with self.history() as history:
            for index, target in enumerate(self._targets):
                try:
                    view = View.open(history, target, end)
                except MomentError:
                    continue
                except RepositoryError as missing:
                    assert "there is no base" in str(missing), "a base that was given up is all that may be missing"
                    continue
                views[target] = view.read(0, view.size)
                composed = self._composed(views[target], index, end.run, here)
                assert views[target] == composed, f"{target}: wrongly restored from {difference(views[target], composed)} on"
        return views

    def _composed(self, view: bytes, index: int, run: int, here: list[Record]) -> bytearray:
        content = bytearray(view)
        for record in here:
            kept = self._written[(run, record.seq)]
            if kept.disk == index and kept.op in (fmt.Op.WRITE, fmt.Op.ZERO, fmt.Op.DISCARD):
                data = kept.payload if kept.op == fmt.Op.WRITE else bytes(kept.length)
                content[kept.offset : kept.offset + kept.length] = data
        return content

    def base(self, target: str, base_id: str) -> bytes:
        """What a base says that its disk was."""
        manifest = self._repository.base(target, base_id)
        return b"".join(
            self._repository.read_chunk(chunk) if chunk is not None else bytes(manifest.chunk_length(i))
            for i, chunk in enumerate(manifest.chunks)
        )


def _records(path: Path) -> Iterator[tuple[Record, int]]:
    """The records of a segment's valid batches, and the open segment's descriptor; none of a segment that is no segment."""
    try:
        segment = Segment(path)
    except (CorruptionError, FileNotFoundError):
        return
    with segment:
        for batch in segment.batches():
            for record in records(batch):
                yield record, segment.fd


def difference(one: bytes | bytearray, other: bytes | bytearray) -> int:
    """Offset of the first byte that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
