"""``vmrewind events``."""

from __future__ import annotations

import json as json_module
import re
from typing import Annotated, Any

from cyclopts import Parameter

from vmrewind.errors import CorruptionError, MomentError, UsageError
from vmrewind.journal.content import Unreadable, content
from vmrewind.start.resolve import open_vm


def events(
    vm: Annotated[str, Parameter(help="The VM: its TOML file, or its name.")],
    /,
    *,
    run: Annotated[str | None, Parameter(help="The run, by the beginning of its id; default: the last one.")] = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object a line.")] = False,
) -> None:
    """Show the event log of a run: each step of its start, restarts of its processes, what went wrong."""
    handle = open_vm(vm)
    if run is not None and not re.fullmatch("[0-9a-f]{1,16}", run):
        raise UsageError(f"{run!r} is not the beginning of a run's id", "an id has 16 hex digits: vmrewind timeline shows them")
    logs = sorted((handle.paths.state / "events").glob(f"{run or ''}*.jsonl"))
    if not logs:
        raise MomentError(f"{handle.name}: no run {run or ''} has an event log here", "see `vmrewind timeline` for its runs")
    if run is not None and len(logs) > 1:
        raise MomentError(f"{handle.name}: {len(logs)} runs begin with {run}", "give more of the run's id")
    try:
        text = content(logs[-1]).decode(errors="replace")
    except Unreadable as error:
        raise CorruptionError(f"{logs[-1]}: {error}", "what it told is lost, history is not; --run shows another run's") from error
    for line in text.splitlines():
        if json:
            print(line)
            continue
        try:
            event: dict[str, Any] = json_module.loads(line)
        except ValueError:
            continue  # cut off by a crash in the middle of its writing
        fields = {k: v for k, v in event.items() if k not in ("time", "time_ns", "event")}
        told = " ".join(f"{key}={value if isinstance(value, str) else json_module.dumps(value)}" for key, value in fields.items())
        print(f"{event['time']}  {event['event']:<22} {told}")
