"""``vmrewind mark``."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter

from vmrewind.errors import UsageError
from vmrewind.history.moments import CRASH_CONSISTENT, QUIESCED, format_time, kind_in_words
from vmrewind.start.control import instruct
from vmrewind.start.quiesce import freeze
from vmrewind.start.resolve import open_vm


def mark(
    vm: Annotated[str, Parameter(help="The VM: its TOML file, or its name.")],
    name: Annotated[str, Parameter(help="The bookmark's name; restore it with --at @NAME.")],
    /,
    *,
    quiesce: Annotated[
        bool,
        Parameter(
            negative="",
            help="Freeze the guest's file systems for this moment, through its guest agent; if it cannot, mark nothing.",
        ),
    ] = False,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Bookmark this moment of a running VM. The bookmark is on stable storage when the command ends."""
    if name != name.strip():
        # Where a moment is written it could not be told from what stands around it.
        raise UsageError(f"a bookmark's name has no white space at its ends: {name!r}", f"call it {name.strip()!r}")
    handle = open_vm(vm)
    marked: dict[str, Any]
    if quiesce:
        frozen = freeze(handle.name)
        # Set when the guest writes again: only then is it known that it was frozen at the moment that the bookmark names.
        instruct(handle.paths, command="mark", name=name, quiesced=asdict(frozen))
        marked = asdict(frozen) | {"kind": QUIESCED}
    else:
        answer = instruct(handle.paths, command="mark", name=name)
        marked = {k: answer[k] for k in ("run", "seq", "time_ns")} | {"kind": CRASH_CONSISTENT, "not_frozen": []}
    if json:
        print(json_module.dumps({"vm": handle.name, "name": name} | marked))
    else:
        words = kind_in_words(marked["kind"], marked["not_frozen"])
        print(f"@{name} is {format_time(marked['time_ns'])}, record {marked['seq']} of run {marked['run']}: {words}")
