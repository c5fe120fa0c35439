"""``vmrewind get``."""

from __future__ import annotations

import json as json_module
import os
import posixpath
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.filesize import decimal

from vmrewind.cli.chosen import BranchOption, position_data
from vmrewind.cli.inside import (
    At,
    Json,
    Partition,
    Replay,
    VmDisk,
    looking,
    paths_data,
    tell_moment,
    tell_notes,
    tell_paths,
    volume_data,
)
from vmrewind.errors import FileError, UsageError
from vmrewind.recover.files.fetch import Fetcher, Options
from vmrewind.recover.files.opening import choose


def get(
    vm: VmDisk,
    path: Annotated[str, Parameter(help="The file or directory in the disk.")],
    dest: Annotated[Path, Parameter(help="Where to: a directory, or the new name in one; default: here.")] = Path(),
    /,
    *,
    at: At,
    recursive: Annotated[bool, Parameter(name=["--recursive", "-r"], negative="", help="A directory, with what is in it.")] = False,
    overwrite: Annotated[bool, Parameter(negative="", help="Replace files that exist already.")] = False,
    special: Annotated[
        bool,
        Parameter(
            negative="",
            help="Also devices, pipes, set-uid and set-gid bits, and attributes that give privileges, as the guest made them.",
        ),
    ] = False,
    partition: Partition = None,
    replay: Replay = False,
    branch: BranchOption = None,
    json: Json = False,
) -> int:
    """Fetch a file, or a directory, as it was in a disk at a moment."""
    with looking(vm, at, branch, replay=replay) as (there, position, reader, volumes):
        if not json:
            tell_moment(there, position)
        volume, entry = choose(reader, volumes, partition, os.fsencode(path))
        directory, name = _destination(
            dest, os.fsencode(posixpath.basename(path.rstrip("/"))) or os.fsencode(volume.name.replace("/", "-"))
        )
        owners = os.geteuid() == 0 and volume.filesystem.startswith(("ext", "xfs")) and volume.filesystem != "exfat"
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fetcher = Fetcher(reader, volume.name, fd, Options(recursive, overwrite, special, owners))
            fetcher.fetch(entry, name)
        finally:
            os.close(fd)
        fetched = fetcher.fetched
        if json:
            done = {
                "path": path,
                "destination": str(directory / os.fsdecode(name)),
                "files": fetched.files,
                "directories": fetched.directories,
                "links": fetched.links,
                "others": fetched.others,
                "bytes": fetched.size,
                "problems": paths_data(fetched.problems),
                "left_out": paths_data(fetched.left_out),
            }
            print(json_module.dumps({"vm": there.name, **position_data(position), "volume": volume_data(volume)} | done))
        else:
            tell_notes(volume)
            tell_paths(fetched.left_out, "left out")
            tell_paths(fetched.problems, "not fetched")
            kinds = {"files": fetched.files, "directories": fetched.directories, "links": fetched.links, "others": fetched.others}
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
            print(f"{dest}: {counts or 'nothing'} ({decimal(fetched.size)})")
        return FileError.exit_code if fetched.problems else 0


def _destination(dest: Path, name: bytes) -> tuple[Path, bytes]:
    """The directory that is written to, and the new name in it. Raises UsageError."""
    if dest.is_dir():
        return dest, name
    if not dest.parent.is_dir():
        raise UsageError(f"{dest}: its directory does not exist", "make it first")
    return dest.parent, os.fsencode(dest.name)
