"""``vmrewind takeover``: bring a VM up on this host from its repository."""

from __future__ import annotations

import contextlib
import json as json_module
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmrewind.cli.chosen import BranchOption, position_data
from vmrewind.cli.progress import byte_progress
from vmrewind.errors import LibvirtError, UsageError, VmStateError
from vmrewind.history.moments import FORMS, format_time
from vmrewind.journal.format import run_name
from vmrewind.paths import VmPaths
from vmrewind.recover.relocation import Relocation, journal_here
from vmrewind.recover.takeover import TakenOver, take_over
from vmrewind.repository.url import anywhere
from vmrewind.start.hook_script import install, reload_daemons
from vmrewind.start.libvirt import DEFAULT_URI, Libvirt
from vmrewind.start.places import make_places
from vmrewind.start.processes import running
from vmrewind.start.resolve import parse_stored
from vmrewind.vmconfig.relocate import absent_files


def takeover(
    vm: Annotated[str, Parameter(help="The VM, as URL/VM.")],
    /,
    *,
    at: Annotated[str | None, Parameter(allow_leading_hyphen=True, help=f"The moment: {FORMS}; default: the latest.")] = None,
    images: Annotated[Path | None, Parameter(help="Where the images go: into a directory of the VM's name in this one.")] = None,
    branch: BranchOption = None,
    define: Annotated[bool, Parameter(negative="", help="Define the libvirt domain.")] = False,
    connect: Annotated[str, Parameter(help="libvirt's URI.")] = DEFAULT_URI,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Take a VM over onto this host: its disks and configuration come from the repository, its history goes on here.

    From then on the host that had it is refused to start it. Interrupted, the same command goes on, or begins anew.
    """
    stored = parse_stored(vm)
    if stored is None:
        raise UsageError(f"{vm}: names no VM in a repository", "write URL/VM; `vmrewind list URL` shows which there are")
    paths = VmPaths(stored.name)
    if running(paths):
        raise VmStateError(f"{stored.name} is running on this host", "stop it first")
    repository = stored.repository()
    where = (images or _asked(json=json)).absolute()
    make_places(paths)
    journal = journal_here(repository, paths)
    with contextlib.ExitStack() as opened:
        libvirt = opened.enter_context(Libvirt(connect)) if define else None
        relocation = Relocation(
            anywhere(stored.url),
            repository.uuid() or "",
            paths,
            journal,
            reconnect=libvirt.knows_reconnect if libvirt is not None else None,
            domain=define,
        )
        progress = opened.enter_context(byte_progress(json=json))
        last_step = _defining(libvirt) if libvirt is not None else lambda _: None
        done = take_over(repository, paths, journal, where, at, branch, relocation, progress, _say, last_step)
    absent = absent_files(relocation.load(done.config))
    _tell(done, at, _next_command(done, define=define), absent, json=json)


def _asked(*, json: bool) -> Path:
    """The directory that was not given, from whoever sits there."""
    if json or not sys.stdin.isatty():
        raise UsageError("--images is missing", "name the directory that the images are to be in: --images DIR")
    answer = input("Directory for the images: ").strip()
    if not answer:
        raise UsageError("no directory was named", "name the directory that the images are to be in: --images DIR")
    return Path(answer).expanduser()


def _say(message: str) -> None:
    print(f"vmrewind: {message}", file=sys.stderr, flush=True)


def _defining(libvirt: Libvirt) -> Callable[[Path], None]:
    def define(path: Path) -> None:
        hook = install(libvirt.version)
        try:
            libvirt.define(path.read_bytes())
        except LibvirtError as error:
            raise LibvirtError(str(error), f"correct {path}, then run the same takeover again: it goes on from here") from None
        # last: a reload reads every domain's XML again, and what is defined while it runs may be lost
        if hook.fresh and not reload_daemons():
            _say("libvirt looks for hooks when it starts: restart its daemon once")

    return define


def _next_command(done: TakenOver, *, define: bool) -> list[str]:
    """What brings the VM up now."""
    file = str(done.config)
    if done.config.suffix == ".toml":
        return [shlex.join(["vmrewind", "run", file])]
    name = shlex.quote(done.vm)
    if define:
        return [f"virsh start {name}"]
    return [f"virsh define {shlex.quote(file)}", f"vmrewind protect {name}", f"virsh start {name}"]


def _tell(done: TakenOver, at: str | None, commands: list[str], absent: list[str], *, json: bool) -> None:
    lost_seconds = max(0.0, (time.time_ns() - done.known_until_ns) / 1e9)
    position = done.position
    if json:
        told = {
            "vm": done.vm,
            "run": run_name(done.run),
            "parent": position_data(position),
            "known_until_ns": done.known_until_ns,
            "lost_seconds_max": round(lost_seconds, 3),
            "images": {target: str(path) for target, path in done.images.items()},
            "config": str(done.config),
            "absent": absent,
            "next": commands,
        }
        print(json_module.dumps(told))
        return
    moment = f"{format_time(position.time_ns)} (seq {position.seq} of run {run_name(position.run)})"
    print(f"{done.vm}, as it was at {moment}, is this host's now: run {run_name(done.run)}")
    for target, path in done.images.items():
        print(f"  {target}: {path}")
    print(f"  configuration: {done.config}")
    until = format_time(done.known_until_ns)
    print(f"  lost: what it wrote after {until}, the last record in the repository: {lost_seconds:.0f} s until now at most")
    if at is not None:
        print("  given up: what the repository has from behind the moment; it stays there, on the other host's branch")
    for missing in absent:
        print(f"  not on this host: {missing}, which the configuration names")
    print("start it:" if len(commands) == 1 else "start it, in this order:")
    for command in commands:
        print(f"  {command}")
