"""``vmrewind find``."""

from __future__ import annotations

import json as json_module
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

from cyclopts import Parameter

from vmrewind.cli.chosen import BranchOption, Chosen, position_data
from vmrewind.cli.inside import Partition, Replay, VmDisk, chosen
from vmrewind.errors import FileError, NoSuchFileError, UsageError
from vmrewind.history.moments import FORMS, format_time
from vmrewind.journal.runs import Position
from vmrewind.recover.files.client import Reader, require_libraries
from vmrewind.recover.files.names import as_json
from vmrewind.recover.files.search import Change, Touch, changes, touches


def find(
    vm: VmDisk,
    /,
    *,
    path: Annotated[str | None, Parameter(help="The file or directory whose changes are looked for.")] = None,
    offset: Annotated[int | None, Parameter(help="Where the range of the disk begins whose writes are looked for, bytes.")] = None,
    length: Annotated[int, Parameter(help="How long the range is, bytes.")] = 1,
    from_: Annotated[
        str | None, Parameter(name="--from", allow_leading_hyphen=True, help=f"Look from this moment on: {FORMS}.")
    ] = None,
    to: Annotated[str, Parameter(allow_leading_hyphen=True, help="Look up to this moment.")] = "latest",
    partition: Partition = None,
    replay: Replay = False,
    branch: BranchOption = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object a line.")] = False,
) -> int:
    """Find the moments at which a file changed, or the records that touched a range of a disk."""
    if (path is None) == (offset is None) or length < 1 or (offset or 0) < 0:
        raise UsageError("say what to look for", "give either --path PATH, or --offset N and --length N")
    with chosen(vm, branch) as there:
        if offset is not None:
            _refuse_behind_the_end(there, offset)
            touched = False
            for touch in (touch for target in there.targets for touch in _touches(there, target, offset, length, from_, to)):
                touched = True
                print(json_module.dumps(_touch_data(touch)) if json else _touch_line(touch), flush=True)
            if not touched:
                print("no record touched these bytes between these moments", file=sys.stderr)
            return 0
        assert path is not None, "one of the two is given"
        require_libraries()
        problems: dict[tuple[str, str], str] = {}
        with Reader() as reader:
            for target in there.targets:
                ends = _ends(there, target, from_, to)
                found = changes(there.history, there.branch, target, reader, os.fsencode(path), partition, ends, replay=replay)
                for change in found:
                    problems[change.target, change.volume] = change.state.problem
                    print(json_module.dumps(_change_data(change)) if json else _change_line(change), flush=True)
        if not problems:
            raise NoSuchFileError(
                f"{path}: is at none of these moments in a file system that can be read",
                "ls shows what there is; --from, --to and --partition say where it is looked for",
            )
        # What is unreadable in between is often being made; what is so at the end cannot be told.
        return FileError.exit_code if any(problems.values()) else 0


def _refuse_behind_the_end(there: Chosen, offset: int) -> None:
    known = (leg.info.disk(target) for leg in there.branch.legs for target in there.targets)
    size = max((disk.size for disk in known if disk is not None), default=0)
    if offset >= size:
        raise UsageError(f"--offset {offset} is behind the end of {', '.join(there.targets)}", f"there are {size} bytes")


def _touches(there: Chosen, target: str, offset: int, length: int, from_: str | None, to: str) -> Iterator[Touch]:
    return touches(there.history, there.branch, target, (offset, length), _ends(there, target, from_, to))


def _ends(there: Chosen, target: str, from_: str | None, to: str) -> tuple[Position, Position]:
    last = there.at(to)
    return there.at(from_) if from_ is not None else there.history.coverage(target, there.branch).intervals[0].first, last


def _touch_line(touch: Touch) -> str:
    where = f"{touch.target}: {touch.op} of {touch.length} bytes at {touch.offset}"
    return f"{format_time(touch.position.time_ns)} seq:{touch.position.seq} {where}"


def _touch_data(touch: Touch) -> dict[str, Any]:
    return {
        **position_data(touch.position),
        "disk": touch.target,
        "op": touch.op,
        "offset": touch.offset,
        "length": touch.length,
    }


def _change_line(change: Change) -> str:
    state = change.state
    what = ", ".join(change.what) if change.known_before else f"so since before this moment: {state.kind}"
    size = f", {state.size} bytes" if state.kind == "file" else f": {state.problem}" if state.problem else ""
    return f"{format_time(change.position.time_ns)} seq:{change.position.seq} {change.volume}: {what}{size}"


def _change_data(change: Change) -> dict[str, Any]:
    state = change.state
    return {
        **position_data(change.position),
        "volume": change.volume,
        "known_before": change.known_before,
        "what": list(change.what),
        "kind": state.kind,
        "size": state.size,
        "mode": f"{state.mode:04o}",
        "uid": state.uid,
        "gid": state.gid,
        "mtime_ns": state.mtime_ns,
        "target": as_json(state.target) if state.kind == "symlink" else None,
        "xxh3_128": state.content or None,
        "problem": state.problem or None,
    }
