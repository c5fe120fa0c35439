"""The first child process: ``python -m vmrewind.capture --journal DIR --journal-size BYTES``.

It allots its storage space and says so, reads one line from stdin (the assignment: run, disks, sockets; docs/architecture.md),
says that it is ready, and serves until SIGTERM. With ``--standby`` it touches nothing before it has that line: the capture whose
place it takes serves until then. Standard library and xxhash only: it is in the path of every guest I/O, and
there is one for every protected VM of a host.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import socket
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vmrewind.capture.dirty import DirtyMap
from vmrewind.capture.image import Image
from vmrewind.capture.policy import POLICIES, FullPolicy
from vmrewind.capture.recovery import End, find_end, recovery_point, replay, seal, segments_after
from vmrewind.capture.server import Server, print_event
from vmrewind.capture.since import used_since
from vmrewind.errors import ConfigError, CorruptionError, ImageError, VmrewindError, VmStateError
from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.copy_before_write import CopyBeforeWrite
from vmrewind.journal.events import EventLog
from vmrewind.journal.owned import require_own
from vmrewind.journal.pool import SegmentPool
from vmrewind.journal.runs import ImageIdentity, private_directory, sync_directory
from vmrewind.journal.state import StatePage
from vmrewind.journal.writer import JournalWriter

_LOST: Final = "{}: this run's journal is not there any more: it was deleted while the VM was running"
_M_MMAP_THRESHOLD: Final = -3


def _give_memory_back() -> None:
    """Have the C library return large buffers to the kernel as they are freed, where it can be told.

    Left alone it keeps them for later once the first was freed: after a hundred clients with large requests, some 30 MiB.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 << 10)


def main() -> int:
    """Run the process; returns its exit code."""
    parser = argparse.ArgumentParser(prog="vmrewind.capture")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--journal-size", type=int, required=True)
    parser.add_argument("--local-history", type=int, metavar="SECONDS")
    parser.add_argument("--standby", action="store_true")
    arguments = parser.parse_args()
    os.umask(0o077)
    line = ""
    try:
        if arguments.standby:
            print_event("standby", pid=os.getpid())
            line = sys.stdin.readline()
            if not line:
                return 0
        lock = lock_journal(arguments.journal)
        pool = SegmentPool(arguments.journal, arguments.journal_size, thin=arguments.local_history is not None)
        pool.allot()
        print_event("allotted", pid=os.getpid(), journal=str(arguments.journal), bytes=arguments.journal_size)
        line = line or sys.stdin.readline()
        if not line:
            return 0
        server = prepare(arguments.journal, pool, json.loads(line), arguments.local_history)
        gc.collect()
        gc.freeze()
        gc.disable()
        _give_memory_back()
        server.heed_signals()
        print_event(
            "ready",
            pid=os.getpid(),
            run=fmt.run_name(server.writer.run),
            seq=server.writer.next_seq - 1,
            disks={target: {"size": disk.size} for target, disk in server.disks.items()},
        )
        server.serve()
    except VmrewindError as error:
        print_event("error", kind=error.kind, message=str(error), hint=error.hint)
        return error.exit_code
    except OSError as error:
        hint = "repair what the journal and the images lie on; they keep what was written until then"
        print_event("error", kind=VmrewindError.kind, message=f"{arguments.journal}: {error}", hint=hint)
        return VmrewindError.exit_code
    os.close(lock)
    return 0


def lock_journal(journal: Path) -> int:
    """Keep other captures off this journal; the lock lasts until the returned descriptor is closed."""
    import fcntl

    try:
        private_directory(journal)
        require_own(journal)
        fd = os.open(journal, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"{journal}: not usable as a journal: {error.strerror}", "set journal to a directory") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise VmStateError(f"{journal}: another capture is using this journal", "stop that VM first") from error
    return fd


def prepare(journal: Path, pool: SegmentPool, assignment: Mapping[str, Any], local_history_seconds: int | None = None) -> Server:
    """Open the disks, go on with the run or begin it, and listen."""
    events = EventLog(assignment["events"])
    if assignment["on_journal_full"] not in POLICIES:
        raise ConfigError(f"on_journal_full: {assignment['on_journal_full']!r} is none of {', '.join(POLICIES)}")
    run = int(assignment["run"], 16)
    state = StatePage(journal)
    lost = bool(assignment.get("resuming")) and state.run != run
    end: End | None = None
    point = recovery_point(state)
    images = open_images(assignment["disks"], resuming=state.run == run or lost)
    for image in images:
        image.base = CopyBeforeWrite.open(journal, image.target)
    if state.run == run:
        end = find_end(journal, run, point)
        readable = (end.readable or end) if end is not None else None
        if (readable.next_batch - 1 if readable is not None else 0) < point:
            # Going on would leave a hole: the images hold writes that no reader of the journal can find.
            where = readable or fmt.segment_name(run, 1)
            raise CorruptionError(
                f"{journal}: the journal is damaged at {where}: batches up to {point} were written, and are not there",
                "stop the VM and start it again: the missing history becomes a gap, and a new base is made",
            )
    policy = FullPolicy(assignment["on_journal_full"], journal, state, local_history_seconds)
    used: set[int] = set()
    if end is not None:
        if not state.bypassed:
            # Before anything is replayed, which changes what tells it.
            found = used_since(images, journal, end.segment, end.last_time_ns, host_died=False)
            used = {image.index for image in found}
        for image in images:
            if image.index in used and image.base is not None:
                image.base.fail("the image was used by others while capture was away")
        seal(journal, run, end)
        applied = replay(journal, run, point, end, {image.index: image for image in images})
        state.set_applied(end.next_batch - 1)
        events.write("capture.recovered", pid=os.getpid(), seq=end.next_seq - 1, records_applied=applied)
    clock = Clock(end.last_time_ns if end else assignment["time_floor_ns"])
    first_seq = end.next_seq if end else assignment["first_seq"]
    writer = JournalWriter(
        pool,
        uuid.UUID(assignment["uuid"]).bytes,
        run,
        clock,
        policy.may_recycle,
        first_seq,
        end.next_batch if end else 1,
    )
    if end is not None:
        unsynced = [path for path in segments_after(journal, run, state.checkpoint) if path != end.segment]
        writer.resume(end.segment, end.number, end.position, unsynced)
        writer.last_time_ns = end.last_time_ns
    dirty = None
    if policy.name == "bypass":
        dirty = DirtyMap(Path(assignment["dirty_map"]), run, {image.index: image.size for image in images})
    server = Server(journal, pool, writer, state, clock, images, events, policy, dirty)
    if end is not None:
        for disk in server.disks.values():
            disk.doubtful = state.is_doubtful(disk.index) or disk.index in used
            if disk.index in used:
                events.write("image.used", disk=disk.target, image=disk.image.path)
        server.arrears.note_doubts()
    if lost:
        # Whatever is at that place now, it is not this run's journal: nothing is added to it.
        writer.abandon()
        if not server.bypass.begin(_LOST.format(journal)):
            raise CorruptionError(_LOST.format(journal), "stop the VM and start it again: its history goes on with a new base")
    elif end is None:
        # From here on the images may move away from what the last run left: its word about them goes first.
        (journal / "head.json").unlink(missing_ok=True)
        sync_directory(journal)
        state.begin(run)
        # A run's beginning does not wait for room: it may be what lets ship make some.
        pool.stretch = True
        server.record_event(fmt.Event.START, {"vm": assignment["vm"], "parent": assignment["parent"]})
        pool.stretch = False
    server.listen(
        listening_socket(assignment["nbd_socket"], assignment.get("nbd_fd")),
        listening_socket(assignment["control_socket"], assignment.get("control_fd")) if assignment.get("control_socket") else None,
    )
    return server


def open_images(disks: list[Mapping[str, Any]], *, resuming: bool) -> list[Image]:
    """Open and lock every disk's image. At a run's beginning each must still be what its base or the last run left."""
    images: list[Image] = []
    for disk in disks:
        image = Image(disk["index"], disk["target"], disk["image"], disk["format"], disk.get("size"))
        images.append(image)
        expected = disk.get("identity")
        if expected and resuming:
            _refuse_another_file(image, ImageIdentity(**expected))
        elif expected and image.identity() != ImageIdentity(**expected):
            raise ImageError(f"{image.path}: changed while the VM was being started", "find out by whom, then start again")
        if image.size != disk.get("size", image.size):
            raise ImageError(
                f"{image.path}: {image.size} bytes, but disk {image.target} is to have {disk['size']}",
                "put the image back that the VM last ran with, then start again",
            )
        image.extend()
    return images


def _refuse_another_file(image: Image, expected: ImageIdentity) -> None:
    """What the last capture served must not be replayed onto a file that was put in its image's place since."""
    status = os.fstat(image.fd)
    here = (0, status.st_rdev) if image.block_device else (status.st_ino, 0)
    if here != (expected.inode, expected.device):
        raise ImageError(
            f"{image.path}: another image than the one that the VM runs with",
            "put that one back, and the VM goes on; or stop the VM: its next start takes what is there then",
        )


def listening_socket(path: str, fd: int | None) -> socket.socket:
    """The keeper's socket if it hands one over: it stays open while captures come and go. Else one of our own."""
    if fd is not None:
        return socket.socket(fileno=fd)
    if len(path.encode()) > 107:
        raise ConfigError(f"{path}: too long for a unix socket (107 bytes)", "set VMREWIND_RUNTIME_DIR to a shorter path")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(mask)
    sock.listen(64)
    return sock


if __name__ == "__main__":
    sys.exit(main())
