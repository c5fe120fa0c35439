"""``vmrewind status``."""

from __future__ import annotations

import json as json_module
from datetime import datetime
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from vmrewind.errors import VmrewindError
from vmrewind.start.overview import known_vms, overview
from vmrewind.start.resolve import open_vm


def status(
    vm: Annotated[str | None, Parameter(help="The VM: its TOML file, or its name; default: every VM of this host.")] = None,
    /,
    *,
    json: Annotated[bool, Parameter(negative="", help="Print JSON: one object, or a list without VM.")] = False,
) -> None:
    """Show whether VMs are protected: their processes, journal, ship's lag, and what is wrong."""
    if vm is not None:
        found = overview(open_vm(vm))
        if json:
            print(json_module.dumps(found))
        else:
            _show(found)
        return
    every = [_overview(name) for name in known_vms()]
    if json:
        print(json_module.dumps(every))
    else:
        _list(every)


def _overview(name: str) -> dict[str, Any]:
    """One VM of many: what is wrong with it must not hide the others."""
    try:
        return overview(open_vm(name))
    except VmrewindError as error:
        return {"vm": name, "state": "unknown", "problems": [error.in_full]}
    except OSError as error:
        return {"vm": name, "state": "unknown", "problems": [str(error)]}


def _list(every: list[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    if not every:
        console.print("no VM was ever protected on this host")
        return
    table = Table("VM", "state", "disks", "last record", "lag", "problems")
    for found in every:
        problems = "[green]none[/]" if not found["problems"] else f"[red]{len(found['problems'])}[/]"
        table.add_row(
            escape(found["vm"]), found["state"], ", ".join(found.get("disks", ())), _last_record(found), _lag(found), problems
        )
    console.print(table)


def _show(found: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    colour = "green" if found["state"] == "running" and not found["problems"] else "yellow"
    console.print(f"[bold]{escape(found['vm'])}[/]: [{colour}]{found['state']}[/], last record {_last_record(found)}")
    for target, disk in found.get("disks", {}).items():
        bases = disk["bases"]
        base = f"{len(bases)} base(s), newest {bases[-1]}" if bases else "no base"
        making = disk.get("base_being_made")
        share = f": {making['share']:.0%}" if making and making["share"] is not None else ""
        made = f"; one is being made{share}, and what needs it cannot be restored before" if making else ""
        console.print(f"  disk {target}: {escape(disk['image'])} ({disk['format']}), {base}{made}")
    journal = found["journal"]
    quota = f" of {decimal(journal['quota_bytes'])}" if journal["quota_bytes"] else ""
    console.print(f"  journal: {decimal(journal['used_bytes'])}{quota} in {escape(journal['directory'])}")
    ship = found.get("ship")
    if ship is not None:
        wanted = ", ".join(ship["wanted"]) or "nothing (vmrewind ship on switches it on)"
        console.print(f"  ship: carries {wanted} to {escape(found['repository'] or '-')}; lag {_lag(found)}{_limit(ship)}")
    for role, process in found.get("processes", {}).items():
        if process is not None:
            console.print(f"  {role}: pid {process['pid']}, {'alive' if process['alive'] else '[red]dead[/]'}")
    for problem in found["problems"]:
        console.print(f"  [red]problem:[/] {escape(problem)}")


def _limit(ship: dict[str, Any]) -> str:
    limit = ship.get("bandwidth_limit")
    return f"; at most {decimal(limit)} a second" if limit else ""


def _last_record(found: dict[str, Any]) -> str:
    last = found.get("last_record")
    if last is None:
        return "-"
    moment = datetime.fromtimestamp(last["time_ns"] / 1e9).astimezone().isoformat(timespec="milliseconds")
    return f"{last['seq']} at {moment}"


def _lag(found: dict[str, Any]) -> str:
    ship = found.get("ship", {})
    if ship.get("lag_seconds") is None:
        return "-"
    return f"{ship['lag_seconds']:.1f} s, {decimal(ship['unsent_bytes'] or 0)}"
