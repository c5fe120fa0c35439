"""After a death: find where the journal ends, and bring the images to just that state.

The same for capture's own death (the keeper starts another one, which goes on with the run) and for the host's (the next start
finds a run that never ended). The journal is the write-ahead log: its valid prefix counts, the images follow it. Damage before the
point that the images are known to have reached costs history, but nothing that has to be replayed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from vmrewind.capture.image import Image
from vmrewind.capture.level import noted_level
from vmrewind.capture.since import forget, leave_mark, remember, remembered, used_since
from vmrewind.errors import CorruptionError, ImageError
from vmrewind.journal import format as fmt
from vmrewind.journal.copy_before_write import CopyBeforeWrite
from vmrewind.journal.reader import Batch, Segment, SegmentHeader, UnreadableHeader, records, segment_files
from vmrewind.journal.runs import (
    RESTORE_PENDING,
    DiskInfo,
    Position,
    RunInfo,
    read_head,
    read_run,
    run_path,
    sync_directory,
)
from vmrewind.journal.state import StatePage, boot_id
from vmrewind.journal.verify import later_batch

_MARK_SECONDS: Final = 1
"""How often a replay leaves its mark."""


@dataclass(frozen=True, slots=True)
class End:
    """Where a run's journal ends: the last valid batch's segment, the byte behind it, and what comes next.

    ``readable``: where the chain of batches breaks before, by damage to what the images already have; history is readable to there.
    """

    segment: Path
    number: int
    position: int
    next_batch: int
    next_seq: int
    last_time_ns: int
    readable: End | None = None

    @property
    def last_seq(self) -> int:
        """Seq of the last record."""
        return self.next_seq - 1

    def __str__(self) -> str:
        return f"{self.segment.name}, offset {self.position}"


def find_end(journal: Path, run: int, verify_after: int) -> End | None:
    """The end of a run's valid batches, None if the run has none. Changes nothing; see ``seal``.

    Headers and tables are checked from the last segment that begins at or before the batch behind ``verify_after`` (those before
    may have been about to be recycled), payloads of every batch after ``verify_after``: earlier ones are known to be whole. A
    batch whose table is valid and whose payload is torn is the end. A segment whose header did not reach the disk is the end as
    well: nothing in it was ever promised. Damage up to batch ``verify_after`` is passed over if the batch behind that is there;
    otherwise the end is before ``verify_after``.
    """
    try:
        return _find_end(journal, run, verify_after)
    except OSError as error:
        # What cannot be read is not the end: behind it may be what was promised.
        raise CorruptionError(
            f"{error.filename or journal}: cannot be read: {error.strerror or error}",
            "repair the storage that holds the journal; nothing was changed",
        ) from error


def _find_end(journal: Path, run: int, verify_after: int) -> End | None:
    files = segment_files(journal, run)
    first = 0
    for i, file in enumerate(files):
        header = _header(file.path)
        if header is not None and header.first_batch <= verify_after + 1:
            first = i
    at: End | None = None
    readable: End | None = None
    for file in files[first:]:
        try:
            segment = Segment(file.path)
        except (CorruptionError, FileNotFoundError):
            break
        with segment:
            header = segment.header
            # The header itself tells what came before it, should nothing have been written behind it yet.
            begun = End(file.path, file.number, fmt.SEGMENT_HEADER_SIZE, header.first_batch, header.first_seq, header.created_ns)
            if at is None:
                at = begun
            elif (begun.next_batch, begun.next_seq) == (at.next_batch, at.next_seq):
                at = replace(begun, last_time_ns=at.last_time_ns)
            elif at.next_batch <= verify_after and begun.next_batch == verify_after + 1:
                readable, at = readable or at, begun
            else:
                break
            for batch in _valid_batches(segment, verify_after):
                if batch.number != at.next_batch:
                    readable = readable or at
                if batch.number > verify_after and not segment.intact(batch):
                    return _ending(at, readable)
                last_time_ns = batch.time_ns + batch.count - 1
                at = End(file.path, file.number, batch.end, batch.number + 1, batch.last_seq + 1, last_time_ns)
    return _ending(at, readable)


def _ending(at: End | None, readable: End | None) -> End | None:
    return replace(at, readable=readable) if at is not None and at.next_batch > 1 else None


def _valid_batches(segment: Segment, point: int) -> Iterator[Batch]:
    """A segment's valid batches; damage before the end of batch ``point`` is passed over to the next one, if that is there."""
    position, number = fmt.SEGMENT_HEADER_SIZE, segment.header.first_batch
    while True:
        for batch in segment.batches(position, number):
            yield batch
            position, number = batch.end, batch.number + 1
        if number > point:
            return
        later = later_batch(segment, position, point)
        if later is None or later.number != point + 1:
            return
        position, number = later.position, later.number


def _header(path: Path) -> SegmentHeader | None:
    try:
        with Segment(path) as segment:
            return segment.header
    except (CorruptionError, FileNotFoundError, UnreadableHeader):
        return None


def seal(journal: Path, run: int, end: End) -> None:
    """Destroy what a crash left of a run behind its end, so that every later reader finds the same end.

    That is, in the end's segment, the headers of batches whose payload is torn or that come behind a lost one, and all
    segments behind. None of it was ever promised to anybody, nor replayed.
    """
    fd = os.open(end.segment, os.O_RDWR | os.O_CLOEXEC)
    try:
        with Segment(end.segment) as segment:
            position, number = end.position, end.next_batch - 1
            while (later := later_batch(segment, position, number)) is not None:
                for batch in segment.batches(later.position, later.number):
                    os.pwrite(fd, bytes(fmt.BATCH.size), batch.position)
                    position, number = batch.end, batch.number
        os.fdatasync(fd)
    finally:
        os.close(fd)
    for file in segment_files(journal, run):
        if file.number > end.number:
            file.path.unlink(missing_ok=True)
    sync_directory(journal)


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
            for batch in _valid_batches(segment, after):
                if batch.number > after:
                    yield segment, batch
        if path == end.segment:
            return


def replay(journal: Path, run: int, after: int, end: End, images: Mapping[int, Image]) -> int:
    """Apply a run's batches after batch ``after`` up to its end to the images; returns how many records were applied.

    Records of a disk that has no image here are left out. Raises ImageError if an image refuses.
    """
    leave_mark(journal)
    mark_due = time.monotonic() + _MARK_SECONDS
    voided = {r.offset for _, batch in _batches(journal, run, after, end) for r in records(batch) if r.op == fmt.Op.VOID}
    applied = 0
    for segment, batch in _batches(journal, run, after, end):
        if time.monotonic() > mark_due:
            leave_mark(journal)
            mark_due = time.monotonic() + _MARK_SECONDS
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
                    f"{image.path}: cannot be brought to record {end.last_seq}, which the journal holds: {error.strerror}",
                    "free space where the image is, or repair what it lies on; the journal keeps the record until then",
                ) from error
            applied += 1
    leave_mark(journal)
    return applied


def recovery_point(state: StatePage) -> int:
    """The batch up to which the images are known to follow: exact after a process's death, a checkpoint after the host's."""
    return state.applied if state.boot == boot_id() else state.checkpoint


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found of an earlier run that did not end cleanly, and how many records its images lacked.

    ``position``: where its readable history ends. ``changed``: disks that somebody used since; nothing was replayed onto them.
    """

    position: Position
    records_applied: int
    host_died: bool
    changed: frozenset[str] = frozenset()


def recover(journal: Path, report: Callable[[str], None] = lambda _: None) -> Recovered | None:
    """Finish the last run of a journal directory if it did not end cleanly; None if there is nothing to finish.

    To be called before anybody uses the images again, protected or not; it may be called at any time and any number of times.
    Opens and locks the images, so it raises ImageError while anybody, a living capture above all, still has them;
    CorruptionError if damage hides what must be replayed.
    """
    if not (journal / "capture.state").exists() or (journal / RESTORE_PENDING).exists():
        return None
    if read_head(journal, lambda _: None) is not None:  # A damaged one is none; planning tells of it.
        return None
    state = StatePage(journal)
    try:
        run = state.run
        if run == 0 or not run_path(journal, run).exists():
            return None
        info = read_run(journal, run)
        point = recovery_point(state)
        host_died = state.boot != boot_id()
        images = _open_images(info)
        if host_died:
            # A capture whose journal took no more words left them on the images.
            point = max(point, min((noted_level(image.fd, run) for image in images.values()), default=0))
        try:
            # After the host's death any page may be missing: everything since the checkpoint is verified again.
            end = find_end(journal, run, point)
            if end is None:
                if point == 0:
                    # The host died before the first record was on stable storage: the run never was.
                    _renew(images, host_died=host_died)
                    return None
                raise CorruptionError(
                    f"{journal}: run {fmt.run_name(run)} did not end cleanly and none of its records is readable",
                    "move the journal directory away and start again: a new base will be made",
                )
            changed = _changed(journal, run, end, images, host_died=host_died)
            # Whatever changes an image's modification time from here on is this recovery's doing.
            leave_mark(journal)
            for disk in info.disks:
                if disk.target in changed:
                    report(f"{disk.target}: the image was used since run {fmt.run_name(run)} died: it is left as it is")
                    images.pop(disk.index).close()
                else:
                    _make_ready(images[disk.index], disk)
                    if not host_died:
                        images[disk.index].base = CopyBeforeWrite.open(journal, disk.target)
            _renew(images, host_died=host_died)
            count = _bring_up(journal, run, point, end, images, report)
            for image in images.values():
                image.sync()
        finally:
            for image in images.values():
                image.close()
        reached = max(end.next_batch - 1, point)
        state.set_applied(reached)
        state.set_checkpoint(reached)
        leave_mark(journal)
        if changed:
            forget(journal)
        known = end.readable or end
        return Recovered(Position(run, known.last_seq, known.last_time_ns), count, host_died, changed)
    finally:
        state.close()


def _changed(journal: Path, run: int, end: End, images: Mapping[int, Image], *, host_died: bool) -> frozenset[str]:
    """The disks that must not be replayed onto. Noted durably first, as all that follows changes what tells them."""
    found = used_since(images.values(), journal, end.segment, end.last_time_ns, host_died=host_died)
    changed = remembered(journal, run) | {image.target for image in found}
    if changed:
        remember(journal, run, changed)
    return changed


def _bring_up(journal: Path, run: int, point: int, end: End, images: Mapping[int, Image], report: Callable[[str], None]) -> int:
    if end.next_batch <= point:
        # The images have more than can be read. Only if nothing lies behind that may have been promised too, all is well.
        if _hides_more(journal, run, point, end):
            raise CorruptionError(
                f"{journal}: the journal is damaged at {end}, which hides where what must be replayed onto the images begins",
                "move the journal directory away and start again: what was not shipped is lost, and a new base will be made",
            )
        report(f"run {fmt.run_name(run)} did not end cleanly, and its journal is damaged at {end}; its images have all of it")
        return 0
    damage = f"; the journal is damaged before, at {end.readable}" if end.readable is not None else ""
    report(f"run {fmt.run_name(run)} did not end cleanly: bringing its images to record {end.last_seq}{damage}")
    seal(journal, run, end)
    return replay(journal, run, point, end, images)


def _renew(images: Mapping[int, Image], *, host_died: bool) -> None:
    """A modification time may not have reached the disk although what was written then has: an image that a base or a head
    was made of long ago looks as if nothing had been written since."""
    if host_died:
        for image in images.values():
            image.renew_identity()


def _hides_more(journal: Path, run: int, point: int, end: End) -> bool:
    if any(file.number > end.number for file in segment_files(journal, run)):
        return True
    with Segment(end.segment) as segment:
        return later_batch(segment, end.position, point) is not None


def _make_ready(image: Image, disk: DiskInfo) -> None:
    if image.size != disk.size:
        raise ImageError(
            f"{disk.image}: {image.size} bytes, but the journal that must be replayed was written for {disk.size}",
            "put the image back that the VM last ran with, or move the journal directory away",
        )
    image.extend()


def _open_images(info: RunInfo) -> dict[int, Image]:
    images: dict[int, Image] = {}
    try:
        for disk in info.disks:
            images[disk.index] = Image(disk.index, disk.target, disk.image, disk.format, disk.size)
    except BaseException:
        for image in images.values():
            image.close()
        raise
    return images
