"""``vmrewind ls``."""

from __future__ import annotations

import json as json_module
import os
import stat
from typing import Annotated, Final

from cyclopts import Parameter
from rich.filesize import decimal

from vmrewind.cli.chosen import BranchOption, position_data
from vmrewind.cli.inside import (
    At,
    Json,
    Partition,
    Replay,
    VmDisk,
    entry_data,
    looking,
    tell_moment,
    tell_notes,
    tell_paths,
    volume_data,
)
from vmrewind.errors import FileError, UsageError
from vmrewind.history.moments import format_time
from vmrewind.recover.files.client import Listing
from vmrewind.recover.files.names import shown
from vmrewind.recover.files.opening import choose
from vmrewind.recover.files.wire import Entry, Volume

_TYPES: Final = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "character-device": stat.S_IFCHR,
    "block-device": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}

_YEAR_2: Final = -62_104_060_800
_YEAR_9999: Final = 253_370_764_800
"""Seconds since 1970: what can be shown as a date in any time zone lies between them."""


def ls(
    vm: VmDisk,
    path: Annotated[str | None, Parameter(help="What to list; default: the partitions and file systems.")] = None,
    /,
    *,
    at: At,
    partition: Partition = None,
    replay: Replay = False,
    branch: BranchOption = None,
    json: Json = False,
) -> int:
    """List what was in a disk at a moment: a directory, a file or, without a path, partitions and file systems."""
    if path is None and partition is not None:
        raise UsageError("--partition is for a path", "add the path, for example /")
    with looking(vm, at, branch, replay=replay) as (there, position, reader, volumes):
        if not json:
            tell_moment(there, position)
        data = {"vm": there.name, **position_data(position)}
        if path is None:
            if json:
                print(json_module.dumps(data | {"volumes": [volume_data(volume) for volume in volumes]}))
            else:
                _show_volumes(volumes)
            return 0
        volume, entry = choose(reader, volumes, partition, os.fsencode(path))
        listing = reader.entries(volume.name, entry.inode) if entry.kind == "directory" else Listing([entry], "")
        entries = listing.entries
        code = FileError.exit_code if listing.problem or any(each.problem for each in entries) else 0
        if json:
            shown_entries = [entry_data(entry) for entry in entries]
            listed = {"path": path, "kind": entry.kind, "entries": shown_entries, "problem": listing.problem or None}
            print(json_module.dumps(data | {"volume": volume_data(volume)} | listed))
            return code
        tell_notes(volume)
        for entry in entries:
            print(_line(entry))
        if listing.problem:
            tell_paths([(os.fsencode(path), listing.problem)], "not all is listed")
        return code


def _show_volumes(volumes: list[Volume]) -> None:
    for volume in volumes:
        kind = volume.filesystem or "no file system that is known"
        label = f" {shown(os.fsencode(volume.label))!r}" if volume.label else ""
        print(f"{volume.name:12} {decimal(volume.size):>10}  {kind}{label} ({shown(os.fsencode(volume.description))})")
        for note in volume.notes:
            print(f"{'':12} note: {note}")


def _line(entry: Entry) -> str:
    mode = stat.filemode(_TYPES.get(entry.kind, 0) | entry.mode)
    end = f" -> {shown(entry.target)}" if entry.kind == "symlink" else ""
    if entry.problem:
        end += f" ({entry.problem})"
    seconds = entry.mtime_ns // 10**9
    time = format_time(seconds * 10**9) if _YEAR_2 <= seconds < _YEAR_9999 else str(entry.mtime_ns)
    return f"{mode} {entry.links:>3} {entry.uid:>6} {entry.gid:>6} {entry.size:>12} {time} {shown(entry.name)}{end}"
