"""``vmrewind diff``."""

from __future__ import annotations

import json as json_module
import os
import sys
from contextlib import ExitStack
from typing import Annotated, Any

from cyclopts import Parameter

from vmrewind.cli.chosen import BranchOption, Chosen, position_data
from vmrewind.cli.inside import (
    Json,
    Partition,
    Replay,
    VmDisk,
    chosen,
    tell_moment,
    tell_notes,
    volume_data,
)
from vmrewind.errors import FileError, MomentError, NoSuchFileError
from vmrewind.history.changes import changed_ranges
from vmrewind.history.moments import FORMS
from vmrewind.journal.runs import Position
from vmrewind.recover.files.client import Reader, require_libraries
from vmrewind.recover.files.compare import Comparison, Difference, Ranges
from vmrewind.recover.files.names import as_json, shown
from vmrewind.recover.files.opening import disks_at, problem_of, readable
from vmrewind.recover.files.wire import Entry, Volume

_LETTERS = {"added": "A", "changed": "M", "removed": "D", "unreadable": "?"}


def diff(
    vm: VmDisk,
    path: Annotated[str, Parameter(help="Only what is at this path, and below it.")] = "/",
    /,
    *,
    from_: Annotated[str, Parameter(name="--from", allow_leading_hyphen=True, help=f"The one moment: {FORMS}.")],
    to: Annotated[str, Parameter(allow_leading_hyphen=True, help="The other moment.")],
    partition: Partition = None,
    replay: Replay = False,
    branch: BranchOption = None,
    json: Json = False,
) -> int:
    """Tell which files were added, changed (and what of them) and removed between two moments."""
    require_libraries()
    with ExitStack() as stack:
        there = stack.enter_context(chosen(vm, branch))
        one, other = there.at(from_), there.at(to)
        before, after = stack.enter_context(Reader()), stack.enter_context(Reader())
        seen = [
            (reader, reader.open(disks_at(there.history, there.targets, position), replay=replay))
            for reader, position in ((before, one), (after, other))
        ]
        if not json:
            tell_moment(there, one)
            tell_moment(there, other)
        changed = _changed(there, one, other)
        names = {volume.name: volume for _, volumes in seen for volume in readable(volumes, partition)}
        data: list[dict[str, Any]] = []
        missing: FileError | None = None
        compared, unreadable = 0, False
        for name, volume in names.items():
            entries, problem = [], ""
            for reader, volumes in seen:
                entry, error = _at(reader, volumes, name, path)
                entries.append(entry)
                missing = missing or error
                if error is not None and not isinstance(error, NoSuchFileError):
                    problem = str(error)
            if problem:
                found = [Difference(os.fsencode(path), "unreadable", (problem,))]
            elif entries == [None, None]:
                continue
            else:
                found = list(Comparison(before, after, name, changed).differences(os.fsencode(path), *entries))
            compared += 1
            unreadable = unreadable or any(difference.change == "unreadable" for difference in found)
            if json:
                data.append({"volume": volume_data(volume), "differences": [_as_data(difference) for difference in found]})
                continue
            tell_notes(volume)
            for difference in found:
                print(_line(difference, name if len(names) > 1 else ""))
        if not compared:
            raise missing or FileError("there is no file system that can be read", "ls without a path shows what there is")
        if json:
            print(json_module.dumps({"vm": there.name, "from": position_data(one), "to": position_data(other), "volumes": data}))
        return FileError.exit_code if unreadable else 0


def _at(reader: Reader, volumes: list[Volume], name: str, path: str) -> tuple[Entry | None, FileError | None]:
    if problem := problem_of(volumes, name):
        return None, FileError(problem)
    if all(volume.name != name or not volume.readable for volume in volumes):
        return None, None
    try:
        return reader.lookup(name, os.fsencode(path)), None
    except FileError as error:
        return None, error


def _changed(there: Chosen, one: Position, other: Position) -> dict[str, Ranges]:
    """Where the disks changed in between, of those of which that is known."""
    changed: dict[str, Ranges] = {}
    for target in there.targets:
        try:
            changed[target] = changed_ranges(there.history, target, one, other, 512)
        except MomentError as error:
            print(f"{target}: every file is read and compared: {error}", file=sys.stderr)
    return changed


def _line(difference: Difference, volume: str) -> str:
    where = f"{volume}:" if volume else ""
    what = f" ({', '.join(difference.what)})" if difference.what else ""
    return f"{_LETTERS[difference.change]} {where}{shown(difference.path)}{what}"


def _as_data(difference: Difference) -> dict[str, Any]:
    return {"path": as_json(difference.path), "change": difference.change, "what": list(difference.what)}
