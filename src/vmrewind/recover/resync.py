"""Resync: bringing a disk's history level with its image again while the VM runs. ``python -m vmrewind.recover.resync``.

After the host's death, or a change behind our back, image and history may differ in places that nobody knows. The image is read
once and compared with what history says it was: pieces that no record has touched by their chunk id (nothing is fetched), others
by content. What differs is journaled anew by capture, as the image holds it at that instant, between two of the guest's writes.
When all is compared, capture closes the gap: from that record on, history and image are the same.

A block that the guest writes meanwhile is journaled by that write; comparing it twice costs space and nothing else.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vmrewind.errors import ImageError, SpaceError, VmrewindError, VmStateError
from vmrewind.history.history import History
from vmrewind.history.view import View
from vmrewind.journal.closed_gaps import note_gap_closed
from vmrewind.journal.events import EventLog
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import DiskInfo, RunInfo
from vmrewind.paths import VmPaths
from vmrewind.recover.blocks import differing_runs
from vmrewind.repository.chunks import CHUNK_SIZE
from vmrewind.repository.repository import Repository
from vmrewind.start.control import instruct
from vmrewind.start.errand import parser, yield_to_the_guest

_RANGES: Final = 512
_ZEROES: Final = bytes(CHUNK_SIZE)
_PATIENCE_SECONDS: Final = 60
"""How long a capture that is being restarted, or whose journal is full, is waited for."""


def main() -> int:
    """Resync the disks of a run that are named; returns the exit code."""
    arguments = parser("vmrewind.recover.resync")
    arguments.add_argument("--bytes-max", type=int, required=True, help="give up if more than this differs")
    given = arguments.parse_args()
    yield_to_the_guest()
    paths = VmPaths(given.vm)
    events = EventLog(paths.events(given.run))
    try:
        repository = Repository.open(given.repository).vm(given.vm)
        with History.open(given.vm, given.journal, repository, bases=paths.bases) as history:
            info = history.runs[given.run]
            for target in given.disks:
                resync(history, info, target, given.journal, paths, events, given.bytes_max)
    except VmrewindError as error:
        events.write("resync.failed", error=str(error), hint=error.hint)
        sys.stderr.write(f"resync: {given.vm}: {error}\n")
        return error.exit_code
    return 0


def resync(history: History, info: RunInfo, target: str, journal: Path, paths: VmPaths, events: EventLog, bytes_max: int) -> None:
    """Resync one disk of a running VM. Raises what keeps its history at its parent's end from being read, and SpaceError if
    more than ``bytes_max`` bytes differ: then it is another disk, and a base is what it needs."""
    disk = info.disk(target)
    if disk is None or info.parent is None:
        raise VmStateError(f"run {run_name(info.run)} has no disk {target} with a history to be resynced")
    began = time.monotonic()
    events.write("resync.begin", disk=target, bytes=disk.size)
    view = View.open(history, target, info.parent)
    journaled = 0
    pending: list[list[int]] = []
    for offset, length in _differences(view, disk, history):
        journaled += length
        if journaled > bytes_max:
            raise SpaceError(
                f"disk {target}: more than {bytes_max >> 20} MiB differ from its history, too much for the journal",
                f"its history goes on with a new base: stop the VM and run `vmrewind backup {paths.name}`",
            )
        pending.append([offset, length])
        if len(pending) == _RANGES or sum(size for _, size in pending) >= CHUNK_SIZE // 2:
            _ask(paths, run=run_name(info.run), disk=target, ranges=pending)
            pending = []
    answer_seq = _ask(paths, run=run_name(info.run), disk=target, ranges=pending, close=True)
    note_gap_closed(journal, info.run, disk.index, answer_seq)
    seconds = round(time.monotonic() - began, 3)
    events.write("resync.done", disk=target, bytes_journaled=journaled, seq=answer_seq, seconds=seconds)


def _differences(view: View, disk: DiskInfo, history: History) -> Iterator[tuple[int, int]]:
    """(offset, length) of what the image holds otherwise than the view, at most half a chunk each."""
    chunks = history.reachable_repository(f"the base of {disk.target}").repository.chunks
    try:
        fd = os.open(disk.image, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"{disk.image}: cannot be read: {error.strerror}") from error
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for offset in range(0, disk.size, CHUNK_SIZE):
            length = min(CHUNK_SIZE, disk.size - offset)
            try:
                found = os.pread(fd, length, offset)
            except OSError as error:
                raise ImageError(f"{disk.image}: offset {offset}: {error.strerror}") from error
            if len(found) != length:
                raise ImageError(f"{disk.image}: ends at {offset + len(found)}, before the disk's {disk.size} bytes")
            untouched = view.untouched_chunk(offset // CHUNK_SIZE)
            if untouched is not None:
                chunk_id = untouched[0]
                if found == _ZEROES[:length] if chunk_id is None else chunks.id(found) == chunk_id:
                    continue
            for start, end, _ in differing_runs(offset, view.read(offset, length), found):
                for at in range(start, end, CHUNK_SIZE // 2):
                    yield offset + at, min(CHUNK_SIZE // 2, end - at)
    finally:
        os.close(fd)


def _ask(paths: VmPaths, **request: object) -> int:
    """Have capture do it, waiting for one that is away or has no room; returns the seq that it ended with."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return int(instruct(paths, command="resync", **request)["seq"])
        except (VmStateError, SpaceError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
