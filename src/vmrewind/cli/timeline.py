"""``vmrewind timeline``."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from typing import Annotated, Any, Final

from cyclopts import Parameter
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from vmrewind.cli.chosen import BranchOption, Chosen
from vmrewind.history.activity import Flush, JournalEvent, Writes, events, writes
from vmrewind.history.activity import flushes_before as last_flushes
from vmrewind.history.bookmarks import as_bookmark
from vmrewind.history.branch import Branch
from vmrewind.history.coverage import Coverage
from vmrewind.history.history import History
from vmrewind.history.moments import FORMS, format_time
from vmrewind.history.resolve import resolve
from vmrewind.journal.format import Event, run_name
from vmrewind.start.resolve import VM_HELP, open_any

_BARS: Final = " ▁▂▃▄▅▆▇█"
_BUCKETS: Final = 60
_FLUSHES: Final = 10
_EVENT_WORDS: Final = {
    Event.START: "start",
    Event.STOP: "stop",
    Event.BOOKMARK: "bookmark",
    Event.CLOCK: "clock step",
    Event.GAP_BEGIN: "gap begins",
    Event.GAP_END: "gap ends",
}


def timeline(
    vm: Annotated[str, Parameter(help=VM_HELP)],
    /,
    *,
    branch: BranchOption = None,
    flushes_before: Annotated[
        str | None, Parameter(allow_leading_hyphen=True, help=f"Also list the last guest flushes up to a moment: {FORMS}.")
    ] = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Show what can be restored, when the guest wrote how much, starts, stops, bookmarks, and gaps with their causes."""
    handle = open_any(vm)
    with handle.history() as history:
        chosen = Chosen.of(handle.name, history, branch).branch
        now = history.opened_ns
        coverages = [history.coverage(target, chosen) for target in chosen.targets]
        happened = list(events(history, chosen))
        starts = [c.intervals[0].first.time_ns for c in coverages if c.intervals] + [e.position.time_ns for e in happened[:1]]
        ends = [interval.until_ns or now for c in coverages for interval in c.intervals[-1:]]
        written = writes(history, chosen, min(starts, default=now), max(ends, default=now), _BUCKETS)
        flushes: list[Flush] = []
        if flushes_before is not None:
            flushes = last_flushes(history, chosen, resolve(history, chosen, flushes_before, chosen.targets), _FLUSHES)
        if json:
            print(json_module.dumps(_as_data(history, chosen, coverages, happened, written) | _flushes_as_data(flushes)))
        else:
            console = Console(highlight=False, soft_wrap=True)
            _show(console, history, chosen, coverages, happened, written)
            if flushes_before is not None:
                _show_flushes(console, flushes_before, flushes)


def _as_data(
    history: History, branch: Branch, coverages: Sequence[Coverage], happened: Sequence[JournalEvent], written: Writes
) -> dict[str, Any]:
    return {
        "vm": history.name,
        "branch": run_name(branch.run),
        "runs": [
            {
                "run": run_name(info.run),
                "parent": {"run": run_name(info.parent.run), "seq": info.parent.seq} if info.parent else None,
                "host": info.host,
                "takeover": info.takeover,
                "start_time_ns": info.start_time_ns,
                "first_seq": info.first_seq,
                "on_branch": any(leg.info.run == info.run for leg in branch.legs),
            }
            for info in history.runs.values()
        ],
        "disks": {
            coverage.target: {
                "coverage": [
                    {
                        "first": {"run": run_name(i.first.run), "seq": i.first.seq, "time_ns": i.first.time_ns},
                        "last": {"run": run_name(i.last.run), "seq": i.last.seq, "time_ns": i.last.time_ns},
                        "until_ns": i.until_ns,
                    }
                    for i in coverage.intervals
                ],
                "gaps": [{"since_ns": g.since_ns, "until_ns": g.until_ns, "cause": g.cause} for g in coverage.gaps],
            }
            for coverage in coverages
        },
        "events": [
            {
                "event": event.kind.name.lower(),
                "run": run_name(event.position.run),
                "seq": event.position.seq,
                "time_ns": event.position.time_ns,
                **event.content,
            }
            for event in happened
        ],
        "writes": {
            "edges_ns": written.edges_ns.tolist(),
            "bytes": written.bytes.tolist(),
            "operations": written.operations.tolist(),
            "flushes": written.flushes.tolist(),
        },
    }


def _flushes_as_data(flushes: Sequence[Flush]) -> dict[str, Any]:
    moments = [(flush.position, flush.target) for flush in flushes]
    return {"flushes": [{"run": run_name(p.run), "seq": p.seq, "time_ns": p.time_ns, "disk": disk} for p, disk in moments]}


def _show(
    console: Console,
    history: History,
    branch: Branch,
    coverages: Sequence[Coverage],
    happened: Sequence[JournalEvent],
    written: Writes,
) -> None:
    cut = branch.legs[-1].cut
    taken_back = f", taken back to record {cut}," if cut is not None else ""
    console.print(f"[bold]{escape(history.name)}[/], branch {run_name(branch.run)}{taken_back} of {len(history.runs)} run(s)")
    for coverage in coverages:
        console.print(f"\n[bold]{coverage.target}[/]: every moment")
        for interval in coverage.intervals:
            until = "now" if interval.until_ns is None else format_time(interval.until_ns)
            console.print(
                f"  from {format_time(interval.first.time_ns)} to {until}  (seq {interval.first.seq} to {interval.last.seq})"
            )
        if not coverage.intervals:
            console.print("  none")
        for gap in coverage.gaps:
            until = "the end" if gap.until_ns is None else format_time(gap.until_ns)
            console.print(f"  [yellow]not[/] from {format_time(gap.since_ns)} to {until}: {escape(gap.cause)}")
    console.print(f"\n[bold]writes[/]: {decimal(int(written.bytes.sum()))} in {int(written.operations.sum())} operations")
    console.print(f"  {chart(written.bytes.tolist())}")
    console.print(f"[bold]flushes[/]: {int(written.flushes.sum())}")
    console.print(f"  {chart(written.flushes.tolist())}")
    console.print(f"  {format_time(int(written.edges_ns[0]))} to {format_time(int(written.edges_ns[-1]))}")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
    for event in happened:
        table.add_row(
            format_time(event.position.time_ns), f"seq {event.position.seq}", _EVENT_WORDS[event.kind], escape(_detail(event))
        )
    console.print("\n[bold]events[/]")
    console.print(table)
    others = [run_name(run) for run in history.runs if all(leg.info.run != run for leg in branch.legs)]
    if others:
        console.print(f"\nother runs (timeline --branch): {', '.join(others)}")


def _show_flushes(console: Console, moment: str, flushes: Sequence[Flush]) -> None:
    """What was written before such a moment was on the guest's stable storage then: the end of somebody's fsync."""
    console.print(f"\n[bold]last flushes[/] up to {escape(moment)}")
    for flush in flushes:
        console.print(f"  {format_time(flush.position.time_ns)}  seq {flush.position.seq}  {flush.target}")
    if not flushes:
        console.print("  none")


def chart(values: Sequence[int]) -> str:
    """A line of bars, the highest value full; anything above zero is visible."""
    top = max(values, default=0)
    return "".join(_BARS[-(-value * (len(_BARS) - 1) // top)] if value else _BARS[0] for value in values)


def _detail(event: JournalEvent) -> str:
    match event.kind:
        case Event.BOOKMARK:
            if "name" in event.content:
                mark = as_bookmark(event)
                return f"@{mark.name}: {mark.in_words}"
        case Event.CLOCK:
            return f"{event.content.get('step_ns', 0) / 1e9:+.3f} s"
        case Event.GAP_BEGIN:
            return str(event.content.get("cause", ""))
    return str(event.content.get("unreadable", ""))
