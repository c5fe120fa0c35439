"""After a death: find where the journal ends, and bring the images to just that state.

The same for capture's own death (the keeper starts another one, which goes on with the run) and for the host's (the next start
finds a run that never ended). The journal is the write-ahead log: its valid prefix counts, the images follow it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vmrewind.capture.image import Image
from vmrewind.errors import CorruptionError, ImageError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Batch, Segment, SegmentHeader, records, segment_files
from vmrewind.journal.runs import Position, RunInfo, local_runs, read_head, run_path
from vmrewind.journal.state import StatePage, boot_id


@dataclass(frozen=True, slots=True)
class End:
    """Where a run's journal ends: the last valid batch's segment, the byte behind it, and what comes next."""

    segment: Path
    number: int
    position: int
    next_batch: int
    next_seq: int
    last_time_ns: int


def find_end(journal: Path, run: int, verify_after: int) -> End | None:
    """The end of a run's valid prefix, None if the run has no valid batch.

    Headers and tables are checked from the last segment that begins at or before batch ``verify_after``, payloads of every batch
    after ``verify_after``: earlier ones are known to be whole. A batch whose table is valid and whose payload is torn ends
    the prefix; its header is destroyed, so that every later reader finds the same end. A segment whose header did not
    reach the disk ends it as well: nothing in it was ever promised.
    """
    files = segment_files(journal, run)
    first = 0
    for i, file in enumerate(files):
        header = _header(file.path)
        if header is not None and header.first_batch <= verify_after:
            first = i
    end: End | None = None
    for file in files[first:]:
        try:
            segment = Segment(file.path)
        except (CorruptionError, FileNotFoundError):
            break
        with segment:
            header = segment.header
            if end is not None and (header.first_batch, header.first_seq) != (end.next_batch, end.next_seq):
                break
            if header.first_batch > 1:
                # The header itself tells what came before it, should nothing have been written behind it yet.
                last_time_ns = end.last_time_ns if end is not None else header.created_ns
                end = End(file.path, file.number, fmt.SEGMENT_HEADER_SIZE, header.first_batch, header.first_seq, last_time_ns)
            for batch in segment.batches():
                if batch.number > verify_after and not segment.intact(batch):
                    _destroy(file.path, batch)
                    return end
                last_time_ns = batch.time_ns + batch.count - 1
                end = End(file.path, file.number, batch.end, batch.number + 1, batch.last_seq + 1, last_time_ns)
    return end


def _header(path: Path) -> SegmentHeader | None:
    try:
        with Segment(path) as segment:
            return segment.header
    except (CorruptionError, FileNotFoundError):
        return None


def _destroy(path: Path, batch: Batch) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, bytes(fmt.BATCH.size), batch.position)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def segments_after(journal: Path, run: int, batch: int) -> list[Path]:
    """The segments of a run that hold a batch after ``batch``, or may."""
    files = segment_files(journal, run)
    first = 0
    for i, file in enumerate(files):
        header = _header(file.path)
        if header is not None and header.first_batch <= batch + 1:
            first = i
    return [file.path for file in files[first:]]


def _batches(journal: Path, run: int, after: int, end: End) -> Iterator[tuple[Segment, Batch]]:
    """A run's batches after batch ``after`` up to its end, each with its open segment."""
    for path in segments_after(journal, run, after):
        with Segment(path) as segment:
            for batch in segment.batches():
                if batch.number > after:
                    yield segment, batch
        if path == end.segment:
            return


def replay(journal: Path, run: int, after: int, end: End, images: Mapping[int, Image]) -> int:
    """Apply a run's batches after batch ``after`` up to its end to the images; returns how many records were applied.

    Raises ImageError if an image refuses.
    """
    voided = {r.offset for _, batch in _batches(journal, run, after, end) for r in records(batch) if r.op == fmt.Op.VOID}
    applied = 0
    for segment, batch in _batches(journal, run, after, end):
        for record in records(batch):
            image = images.get(record.disk)
            if image is None or record.seq in voided:
                continue
            try:
                if record.op == fmt.Op.WRITE:
                    image.write(segment.payload(record), record.offset)
                elif record.op in (fmt.Op.ZERO, fmt.Op.DISCARD):
                    image.zero(record.offset, record.length, keep_allocated=bool(record.flags & fmt.FLAG_NO_HOLE))
                else:
                    continue
            except OSError as error:
                raise ImageError(
                    f"{image.path}: cannot be brought to record {end.next_seq - 1}, which the journal holds: {error.strerror}",
                    "free space where the image is, or repair what it lies on; the journal keeps the record until then",
                ) from error
            applied += 1
    return applied


def recovery_point(state: StatePage) -> int:
    """The batch up to which the images are known to follow: exact after a process's death, a checkpoint after the host's."""
    return state.applied if state.boot == boot_id() else state.checkpoint


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found of an earlier run that did not end cleanly, and how many records its images lacked."""

    position: Position
    records_applied: int
    host_died: bool


def recover(journal: Path, report: Callable[[str], None] = lambda _: None) -> Recovered | None:
    """Finish the last run of a journal directory if it did not end cleanly; None if there is nothing to finish.

    Opens and locks its images, so it raises ImageError while anybody, a living capture above all, still has them.
    """
    if not (journal / "capture.state").exists():
        return None
    state = StatePage(journal)
    try:
        run = state.run
        head = read_head(journal)
        if run == 0 or head is not None or not run_path(journal, run).exists():
            return None
        info = next(r for r in local_runs(journal) if r.run == run)
        point = recovery_point(state)
        host_died = state.boot != boot_id()
        images = _open_images(info)
        try:
            # After the host's death any page may be missing: everything since the checkpoint is verified again.
            end = find_end(journal, run, point)
            if end is None:
                if point == 0:
                    # The host died before the first record was on stable storage: the run never was.
                    return None
                raise CorruptionError(
                    f"{journal}: run {fmt.run_name(run)} did not end cleanly and none of its records is readable",
                    "move the journal directory away and start again: a new base will be made",
                )
            report(f"run {fmt.run_name(run)} did not end cleanly: bringing its images to record {end.next_seq - 1}")
            count = replay(journal, run, point, end, images)
            for image in images.values():
                image.sync()
        finally:
            for image in images.values():
                image.close()
        state.set_applied(end.next_batch - 1)
        state.set_checkpoint(end.next_batch - 1)
        return Recovered(Position(run, end.next_seq - 1, end.last_time_ns), count, host_died)
    finally:
        state.close()


def _open_images(info: RunInfo) -> dict[int, Image]:
    images: dict[int, Image] = {}
    try:
        for disk in info.disks:
            image = Image(disk.index, disk.target, disk.image, disk.format)
            images[disk.index] = image
            if image.size != disk.size:
                raise ImageError(
                    f"{disk.image}: {image.size} bytes, but the journal that must be replayed was written for {disk.size}",
                    "put the image back that the VM last ran with, or move the journal directory away",
                )
    except BaseException:
        for image in images.values():
            image.close()
        raise
    return images
