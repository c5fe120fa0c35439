"""``vmrewind list``."""

from __future__ import annotations

import json as json_module
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from vmrewind.errors import VmrewindError
from vmrewind.history.history import History
from vmrewind.history.moments import format_time
from vmrewind.journal.format import run_name
from vmrewind.repository.repository import Repository, VmRepository


def list_vms(
    url: Annotated[str, Parameter(help="The repository.")],
    /,
    *,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Show the VMs that a repository holds: their disks, what moments can be restored, and which hosts ran them."""
    repository = Repository.open(url)
    found = [_described(repository.vm(name)) for name in repository.vms()]
    if json:
        print(json_module.dumps({"repository": url, "vms": found}))
        return
    console = Console(highlight=False, soft_wrap=True)
    if not found:
        console.print(f"{escape(url)} holds no VM")
    for vm in found:
        _show(console, url, vm)


def _described(vm: VmRepository) -> dict[str, Any]:
    """What is known of one VM; one that cannot be read must not hide the others."""
    found: dict[str, Any] = {"vm": vm.name}
    try:
        found["uuid"] = vm.uuid()
        found["stored_bytes"] = vm.stored_bytes()
        with History.open(vm.name, None, vm) as history:
            if history.problem is not None:
                raise history.problem
            found["runs"] = [
                {
                    "run": run_name(info.run),
                    "parent": {"run": run_name(info.parent.run), "seq": info.parent.seq} if info.parent else None,
                    "host": info.host,
                    "start_time_ns": info.start_time_ns,
                    "takeover": info.takeover,
                }
                for info in history.runs.values()
            ]
            if history.runs:
                found["disks"] = _disks(history)
    except VmrewindError as error:
        found["problem"] = str(error)
    return found


def _disks(history: History) -> dict[str, Any]:
    branch = history.branch()
    disks: dict[str, Any] = {}
    for disk in sorted(branch.legs[-1].info.disks, key=lambda disk: disk.index):
        coverage = history.coverage(disk.target, branch)
        disks[disk.target] = {
            "size_bytes": disk.size,
            "format": disk.format,
            "backing": disk.backing,
            "coverage": [
                {"first_ns": i.first.time_ns, "last_ns": i.last.time_ns, "last_run": run_name(i.last.run), "last_seq": i.last.seq}
                for i in coverage.intervals
            ],
            "gaps": [{"since_ns": gap.since_ns, "until_ns": gap.until_ns, "cause": gap.cause} for gap in coverage.gaps],
        }
    return disks


def _show(console: Console, url: str, vm: dict[str, Any]) -> None:
    runs = vm.get("runs", [])
    hosts = ", ".join(dict.fromkeys(run["host"] for run in runs)) or "-"
    stored = f", {decimal(vm['stored_bytes'])} of history" if "stored_bytes" in vm else ""
    console.print(f"[bold]{escape(url.rstrip('/'))}/{escape(vm['vm'])}[/]: {len(runs)} run(s) on {escape(hosts)}{stored}")
    for target, disk in vm.get("disks", {}).items():
        console.print(f"  {target}: {decimal(disk['size_bytes'])} ({disk['format']})")
        for interval in disk["coverage"]:
            console.print(
                f"    every moment from {format_time(interval['first_ns'])} to {format_time(interval['last_ns'])} "
                f"(seq {interval['last_seq']})"
            )
        if not disk["coverage"]:
            console.print("    no moment")
        for gap in disk["gaps"]:
            until = "the end" if gap["until_ns"] is None else format_time(gap["until_ns"])
            console.print(f"    [yellow]not[/] from {format_time(gap['since_ns'])} to {until}: {escape(gap['cause'])}")
    if "problem" in vm:
        console.print(f"  [red]problem:[/] {escape(vm['problem'])}")
