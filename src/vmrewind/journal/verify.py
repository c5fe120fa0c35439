"""Verifying journals: every checksum of segments, and whether what ends early is a torn tail or damage.

A *torn tail* is what a crash leaves: the last batch of a run is incomplete and nothing valid comes after it. *Damage* is a batch
or payload that was whole once: a later batch of the same run is valid in the same file, or the next segment, the next run or
``head.json`` know of records that the valid prefix lacks.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import xxhash

from vmrewind.errors import CorruptionError, RepositoryError, UsageError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Batch, Segment, UnreadableHeader, records, segment_files, unpack_segment_header
from vmrewind.journal.runs import local_runs, read_head

_WINDOW: Final = 8 << 20
_PAGE: Final = 4096
"""What a bad sector takes with it: the kernel reads that much at once."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Damage in a segment: byte ``offset`` in the file, and what is wrong there. ``unreadable``: storage does not give it back."""

    offset: int
    message: str
    unreadable: bool = False


@dataclass(slots=True)
class SegmentReport:
    """What verifying one segment file found. ``end``: offset where the valid prefix ends; ``torn``: what a crash left there."""

    path: Path
    run: int = 0
    number: int = 0
    first_seq: int = 0
    last_seq: int = 0
    batches: int = 0
    records: int = 0
    payload_bytes: int = 0
    end: int = 0
    torn: str | None = None
    problems: list[Problem] = field(default_factory=list)


def journal_paths(paths: Iterable[Path]) -> list[Path]:
    """Segment files named by ``paths``, journal directories replaced by their live segments; raises UsageError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += [segment.path for segment in segment_files(path)]
        elif path.is_file():
            found.append(path)
        else:
            raise UsageError(f"{path}: no such file or directory", "name segment files or a journal directory")
    return found


def later_batch(segment: Segment, position: int, number: int, *, pass_over: bool = False) -> Batch | None:
    """The first valid batch of the segment's run behind ``position`` whose number is above ``number``.

    Batch numbers only grow in a run, so left-overs of the file's earlier life never count. ``pass_over``: what storage does not
    give back; else that ends the search, with OSError where nothing in front of it was left to be searched.
    """
    while position < segment.header.size:
        try:
            window = os.pread(segment.fd, _WINDOW, position)
        except OSError:
            if not pass_over:
                raise
            position = (position // _PAGE + 1) * _PAGE
            continue
        if len(window) < fmt.BATCH.size and not (pass_over and window):
            return None
        at = window.find(fmt.BATCH_MAGIC)
        while 0 <= at <= len(window) - fmt.BATCH.size:
            _, _, run, found, *_ = fmt.BATCH.unpack_from(window, at)
            if run == segment.header.run and found > number:
                try:
                    batch = segment.batch_at(position + at, found)
                except OSError:
                    if not pass_over:
                        raise
                    batch = None
                if batch is not None:
                    return batch
            at = window.find(fmt.BATCH_MAGIC, at + fmt.ALIGNMENT)
        # Short is what lies in front of the file's end, or of what cannot be read.
        position += max(len(window) - fmt.BATCH.size, 0) + fmt.ALIGNMENT
    return None


def verify(paths: Iterable[Path], progress: Callable[[str, int, int], None] = lambda *_: None) -> Iterator[SegmentReport]:
    """Check every segment that ``paths`` (files, journal directories) name, in order; problems are in the reports.

    ``progress`` is told (what, bytes done, bytes in total).

    Consecutive segments of a run are checked against each other; of a directory also its ``head.json`` and ``runs/``.
    """
    paths = list(paths)
    checked: list[tuple[SegmentReport, Batch | None]] = []
    found = journal_paths(paths)
    sizes = [path.stat().st_size if path.exists() else 0 for path in found]
    for number, path in enumerate(found):
        progress("journal", sum(sizes[:number]), sum(sizes))
        try:
            checked.append(_verify_segment(path))
        except FileNotFoundError:
            # A living capture may recycle a segment between the listing and the opening.
            if (misnamed := _misnamed(path)) is not None:
                checked.append((misnamed, None))
    progress("journal", sum(sizes), sum(sizes))
    reports = [report for report, _ in checked]
    for i, (report, tail) in enumerate(checked):
        if tail is not None and all(other.run != report.run for other in reports[i + 1 :]):
            _disregard(report, tail)
    _check_successors(reports)
    for path in paths:
        if path.is_dir():
            _check_missing(path, reports)
            _check_known_ends(path, reports)
    yield from reports


def _verify_segment(path: Path) -> tuple[SegmentReport, Batch | None]:
    """The report, and the last batch if its payloads are not whole: that is how a torn tail may look."""
    report = SegmentReport(path)
    try:
        segment = Segment(path)
    except (CorruptionError, RepositoryError, UnreadableHeader) as error:
        if isinstance(error, RepositoryError) and _header_is_whole(path):
            raise
        words = f"the header cannot be read: {error.strerror}" if isinstance(error, UnreadableHeader) else str(error)
        report.problems.append(Problem(0, words))
        named = fmt.parse_segment_name(path.name)
        report.run, report.number = named or (0, 0)
        return report, None
    with segment:
        header = segment.header
        report.run, report.number, report.first_seq = header.run, header.number, header.first_seq
        report.last_seq, report.end = header.first_seq - 1, fmt.SEGMENT_HEADER_SIZE
        _check_zeroes(segment, fmt.SEGMENT.size, fmt.SEGMENT_HEADER_SIZE, report)
        if (size := os.fstat(segment.fd).st_size) != header.size:
            report.problems.append(Problem(size, f"the file has {size} bytes, its header says {header.size}"))
        number, expected_seq, tail = header.first_batch, header.first_seq, None
        for batch in _readable_batches(segment, report):
            if batch.first_seq != expected_seq:
                report.problems.append(
                    Problem(batch.position, f"batch {batch.number} begins with record {batch.first_seq}, not {expected_seq}")
                )
            known = len(report.problems)
            _verify_payloads(segment, batch, report)
            # What a crash leaves can be read.
            torn = len(report.problems) > known and not any(problem.unreadable for problem in report.problems[known:])
            tail = batch if torn else None
            number, expected_seq = batch.number + 1, batch.last_seq + 1
            report.batches += 1
            report.records += batch.count
            report.payload_bytes += batch.payload_length
            report.last_seq, report.end = batch.last_seq, batch.end
        if any(problem.unreadable and problem.offset == report.end for problem in report.problems):
            tail = None
        elif (later := later_batch(segment, report.end, number, pass_over=True)) is not None:
            tail = None
            report.problems.append(
                Problem(
                    report.end,
                    f"batch {number} is not valid here, but batch {later.number} is, at offset {later.position}",
                )
            )
        elif (begun := _begun(segment, report.end, number)) is not None:
            report.torn = begun
    return report, tail


def _misnamed(path: Path) -> SegmentReport | None:
    """The report of a segment that has another one's name; None if it was recycled, so that the name is gone."""
    named = fmt.parse_segment_name(path.name)
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        # Recycling holds the lock until the new name is there.
        fcntl.flock(file.fileno(), fcntl.LOCK_SH)
        header = unpack_segment_header(file.read(fmt.SEGMENT_HEADER_SIZE), path)
        if named is not None and os.path.samestat(path.stat(), os.fstat(file.fileno())) and named != (header.run, header.number):
            holds = fmt.segment_name(header.run, header.number)
            return SegmentReport(path, *named, problems=[Problem(0, f"the file holds segment {holds}: it was renamed")])
    return None


def _header_is_whole(path: Path) -> bool:
    """Whether a header that names a newer format has the checksum that this format would give it."""
    with open(path, "rb") as file:
        head = file.read(fmt.SEGMENT.size)
    return xxhash.xxh3_64_intdigest(head[: fmt.SEGMENT_CHECKED]) == int.from_bytes(head[fmt.SEGMENT_CHECKED :], "little")


def _disregard(report: SegmentReport, tail: Batch) -> None:
    """Take a run's last batch out of its report, its payloads being incomplete."""
    report.problems = [problem for problem in report.problems if problem.offset < tail.position]
    report.torn = f"batch {tail.number} at offset {tail.position} is there without all of its payloads"
    report.batches -= 1
    report.records -= tail.count
    report.payload_bytes -= tail.payload_length
    report.last_seq, report.end = tail.first_seq - 1, tail.position


def _verify_payloads(segment: Segment, batch: Batch, report: SegmentReport) -> None:
    try:
        whole: memoryview | None = memoryview(segment.read(batch.payload_length, batch.payload_position))
    except OSError:
        whole = None  # Each for itself, then.
    for record in records(batch):
        if not record.has_payload:
            continue
        length = fmt.padded(record.length)
        if whole is not None:
            at = record.position - batch.payload_position
            data = whole[at : at + length]
        else:
            try:
                data = memoryview(segment.read(length, record.position))
            except OSError as error:
                message = f"the payload of record {record.seq} cannot be read: {error.strerror} ({record.length} bytes)"
                report.problems.append(Problem(record.position, message, unreadable=True))
                continue
        if xxhash.xxh3_64_intdigest(data[: record.length]) != record.xxh3:
            message = f"the payload of record {record.seq} does not match its checksum ({record.length} bytes)"
            report.problems.append(Problem(record.position, message))
        elif any(data[record.length :]):
            report.problems.append(Problem(record.position + record.length, f"padding behind record {record.seq} is not zero"))


def _readable_batches(segment: Segment, report: SegmentReport) -> Iterator[Batch]:
    """The valid batches, as far as they can be read; what cannot is a problem."""
    try:
        yield from segment.batches()
    except OSError as error:
        report.problems.append(Problem(report.end, f"cannot be read: {error.strerror}", unreadable=True))


def _check_zeroes(segment: Segment, start: int, end: int, report: SegmentReport) -> None:
    data = os.pread(segment.fd, end - start, start)
    if rest := data.lstrip(b"\0"):
        report.problems.append(Problem(start + len(data) - len(rest), "the segment header's padding is not zero"))


def _begun(segment: Segment, position: int, number: int) -> str | None:
    head = os.pread(segment.fd, fmt.BATCH.size, position)
    if len(head) < fmt.BATCH.size:
        return None
    magic, _, run, found, *_ = fmt.BATCH.unpack(head)
    if magic == fmt.BATCH_MAGIC and run == segment.header.run and found == number:
        return f"batch {number} at offset {position} was begun and not completed"
    return None


def _check_successors(reports: Sequence[SegmentReport]) -> None:
    for report, following in itertools.pairwise(reports):
        consecutive = following.run == report.run and following.number == report.number + 1
        if consecutive and report.end and following.end and following.first_seq != report.last_seq + 1:
            _ends_early(report, f"segment {following.path.name} begins with record {following.first_seq}")


def _check_missing(journal: Path, reports: Sequence[SegmentReport]) -> None:
    """Only a run's oldest segments are ever recycled: a number that is missing behind them was lost."""
    here = [report for report in reports if report.path.parent == journal]
    for report, following in itertools.pairwise(here):
        if following.run == report.run and following.number > report.number + 1:
            missing = fmt.segment_name(report.run, report.number + 1)
            _ends_early(report, f"segment {missing} behind it is missing, and {following.path.name} is there")


def _check_known_ends(journal: Path, reports: Sequence[SegmentReport]) -> None:
    ends = {report.run: report for report in reports if report.path.parent == journal}
    # They are witnesses only: what a damaged one would have known is not known here, and whoever needs it complains.
    damaged: list[CorruptionError] = []
    runs, head = local_runs(journal, damaged.append), read_head(journal, damaged.append)
    known = [(run.parent, f"run {fmt.run_name(run.run)} continues") for run in runs if run.parent]
    if head is not None:
        known.append((head.position, "head.json holds"))
    for position, what in known:
        report = ends.get(position.run)
        if report is not None and report.end and position.seq > report.last_seq:
            _ends_early(report, f"{what} record {position.seq}")


def _ends_early(report: SegmentReport, witness: str) -> None:
    if any(problem.offset == report.end for problem in report.problems):
        return
    report.torn = None
    message = f"the segment ends with record {report.last_seq} here, but {witness}"
    report.problems.append(Problem(report.end, message))
