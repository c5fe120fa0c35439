"""``vmrewind rewind``."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from typing import Annotated, Any

from cyclopts import Parameter
from rich.filesize import decimal

from vmrewind.cli.chosen import BranchOption, Chosen, position_data
from vmrewind.cli.progress import byte_progress
from vmrewind.cli.restore import images_of, on_this_host, report
from vmrewind.history.bookmarks import kind_of
from vmrewind.history.moments import FORMS, format_time
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position
from vmrewind.recover.in_place import refuse_in_place, restore_in_place
from vmrewind.recover.rewind_plan import RewindPlan, planned
from vmrewind.start.resolve import open_any


def rewind(
    vm: Annotated[str, Parameter(help="The VM, stopped: its TOML file, or its name.")],
    /,
    *,
    to: Annotated[str, Parameter(allow_leading_hyphen=True, help=f"The moment: {FORMS}.")],
    disk: Annotated[
        list[str] | None, Parameter(negative="", help="Only this disk (may be repeated); default: all together.")
    ] = None,
    dry_run: Annotated[bool, Parameter(negative="", help="Say what would be done, and do nothing.")] = False,
    discard_unprotected: Annotated[bool, Parameter(negative="", help="Give up writes of an image that no history has.")] = False,
    branch: BranchOption = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Take a stopped VM's own images back to a moment, looking only at what was written since.

    What is taken back stays in history, on a branch of its own: rewinding to its end undoes it.
    """
    own = on_this_host(open_any(vm), "rewound")
    with own.history() as history:
        chosen = Chosen.of(own.name, history, branch, disk)
        position = chosen.at(to)
        kind = kind_of(history, chosen.branch, to, position)
        images = images_of(own, history, position, chosen.targets)
        refuse_in_place(history, images, position, own.journal, discard_unprotected=discard_unprotected)
        plans = [planned(history, target, image, position, own.journal) for target, image in images.items()]
        if not json:
            _tell(own.name, position, kind, plans)
        elif dry_run:
            print(json_module.dumps(_as_data(own.name, position, plans)))
        if dry_run:
            return
        with byte_progress(json=json) as update:
            restored = restore_in_place(
                history, images, position, own.journal, update, discard_unprotected=discard_unprotected, only_changed=True
            )
    report(restored, kind, json=json)
    if not json:
        _tell_undoing(vm, position, plans, every_disk=disk is None)


def _tell(name: str, position: Position, kind: str, plans: list[RewindPlan]) -> None:
    print(f"{name} goes to {format_time(position.time_ns)} (seq {position.seq} of run {run_name(position.run)}, {kind})")
    for plan in plans:
        print(f"  {plan.target}: {_way(plan.since, position)}")
        if plan.ranges is None:
            print(f"    the whole disk is compared: {plan.reason}")
        else:
            total = sum(end - start for start, end in plan.ranges)
            print(f"    written since: {decimal(total)} in {len(plan.ranges)} extents")
    sys.stdout.flush()


def _way(since: Position | None, position: Position) -> str:
    if since is None:
        return "from a moment that is not known"
    seconds = (since.time_ns - position.time_ns) / 1e9
    way = f"{seconds:.3f} s back" if seconds >= 0 else f"{-seconds:.3f} s forth"
    return f"from {format_time(since.time_ns)} (seq {since.seq} of run {run_name(since.run)}): {way}"


def _tell_undoing(vm: str, position: Position, plans: list[RewindPlan], *, every_disk: bool) -> None:
    """A command for each moment that disks came from."""
    origins: dict[Position, list[str]] = {}
    for plan in plans:
        if plan.since is not None and plan.since != position:
            origins.setdefault(plan.since, []).append(plan.target)
    for since, targets in origins.items():
        only = "" if every_disk and len(targets) == len(plans) else "".join(f" --disk {target}" for target in targets)
        print(f"to undo it: vmrewind rewind {shlex.quote(vm)} --to seq:{since.seq} --branch {run_name(since.run)}{only}")


def _as_data(name: str, position: Position, plans: list[RewindPlan]) -> dict[str, Any]:
    return {
        "vm": name,
        "to": position_data(position),
        "disks": {
            plan.target: {
                "from": position_data(plan.since) if plan.since is not None else None,
                "extents": len(plan.ranges) if plan.ranges is not None else None,
                "bytes": sum(end - start for start, end in plan.ranges) if plan.ranges is not None else None,
                "whole_disk_because": plan.reason,
            }
            for plan in plans
        },
    }
