"""What the commands that look into disks share: VM:DISK, a moment, a file system in it; how names and notes are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from cyclopts import Parameter

from vmrewind.cli.chosen import Chosen
from vmrewind.history.moments import FORMS, format_time
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position
from vmrewind.recover.files.client import Reader, require_libraries
from vmrewind.recover.files.names import as_json, shown
from vmrewind.recover.files.opening import disks_at
from vmrewind.recover.files.wire import Entry, Volume
from vmrewind.start.resolve import open_any

VmDisk = Annotated[str, Parameter(help="The VM (its TOML file, its name, or URL/VM in a repository), or VM:DISK.")]
At = Annotated[str, Parameter(allow_leading_hyphen=True, help=f"The moment: {FORMS}.")]
Partition = Annotated[
    str | None, Parameter(help="The partition, by number or name, or the logical volume, if the path is in several.")
]
Replay = Annotated[
    bool,
    Parameter(negative="", help="Count in what the journal of ext3 or ext4 holds that is not in place yet, as mounting would."),
]
Json = Annotated[bool, Parameter(negative="", help="Print one JSON object.")]


@contextmanager
def chosen(vm: str, branch: str | None) -> Iterator[Chosen]:
    """The history of ``VM`` or ``VM:DISK``, open."""
    argument, disk = split_disk(vm)
    found = open_any(argument)
    with found.history() as history:
        yield Chosen.of(found.name, history, branch, [disk] if disk else None)


def split_disk(argument: str) -> tuple[str, str | None]:
    """The VM and the disk of ``VM:DISK``; URLs have colons too, but not behind their last slash."""
    vm, colon, disk = argument.rpartition(":")
    return (vm, disk) if colon and vm and disk and "/" not in disk else (argument, None)


@contextmanager
def looking(vm: str, at: str, branch: str | None, *, replay: bool) -> Iterator[tuple[Chosen, Position, Reader, list[Volume]]]:
    """The disks of ``VM:DISK`` at a moment, and what is on them."""
    require_libraries()
    with chosen(vm, branch) as there:
        position = there.at(at)
        with Reader() as reader:
            yield there, position, reader, reader.open(disks_at(there.history, there.targets, position), replay=replay)


def tell_moment(there: Chosen, position: Position, what: str = "") -> None:
    """The instant that a moment means, on stderr: stdout has what was asked for."""
    where = f"(seq {position.seq} of run {run_name(position.run)})"
    print(f"{there.name} at {format_time(position.time_ns)} {where}{what}", file=sys.stderr, flush=True)


def tell_notes(volume: Volume) -> None:
    """What is uncertain, on stderr."""
    for note in volume.notes:
        print(f"{volume.name}: note: {note}", file=sys.stderr)


def volume_data(volume: Volume) -> dict[str, Any]:
    """A volume for machines."""
    return {
        "name": volume.name,
        "size": volume.size,
        "description": volume.description,
        "filesystem": volume.filesystem or None,
        "label": volume.label or None,
        "readable": volume.readable,
        "notes": volume.notes,
    }


def entry_data(entry: Entry) -> dict[str, Any]:
    """A directory entry for machines."""
    return {
        "name": as_json(entry.name),
        "kind": entry.kind,
        "size": entry.size,
        "mode": f"{entry.mode:04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "mtime_ns": entry.mtime_ns,
        "links": entry.links,
        "inode": entry.inode,
        "target": as_json(entry.target) if entry.kind == "symlink" else None,
        "problem": entry.problem or None,
    }


def paths_data(found: Sequence[tuple[bytes, str]]) -> list[dict[str, str]]:
    """Paths and what there is to say of each, for machines."""
    return [{"path": as_json(path), "why": why} for path, why in found]


def tell_paths(found: Sequence[tuple[bytes, str]], what: str) -> None:
    """Paths and what there is to say of each, on stderr."""
    for path, why in found:
        print(f"{what}: {shown(path)}: {why}", file=sys.stderr)
