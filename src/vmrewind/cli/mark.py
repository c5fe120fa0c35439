"""``vmrewind mark``."""

from __future__ import annotations

import json as json_module
from datetime import datetime
from typing import Annotated

from cyclopts import Parameter

from vmrewind.errors import UsageError
from vmrewind.start.control import instruct
from vmrewind.start.resolve import open_vm


def mark(
    vm: Annotated[str, Parameter(help="The VM: its TOML file, or its name.")],
    name: Annotated[str, Parameter(help="The bookmark's name; restore it with --at @NAME.")],
    /,
    *,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Bookmark this moment of a running VM. The bookmark is on stable storage when the command ends."""
    if name != name.strip():
        # Where a moment is written it could not be told from what stands around it.
        raise UsageError(f"a bookmark's name has no white space at its ends: {name!r}", f"call it {name.strip()!r}")
    handle = open_vm(vm)
    answer = instruct(handle.paths, command="mark", name=name)
    if json:
        print(json_module.dumps({"vm": handle.name, "name": name} | {k: answer[k] for k in ("run", "seq", "time_ns")}))
    else:
        moment = datetime.fromtimestamp(answer["time_ns"] / 1e9).astimezone().isoformat(timespec="milliseconds")
        print(f"@{name} is {moment}, record {answer['seq']} of run {answer['run']}")
