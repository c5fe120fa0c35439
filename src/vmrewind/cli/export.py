"""``vmrewind export``."""

from __future__ import annotations

import json as json_module
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmrewind.cli.chosen import BranchOption, Chosen, position_data
from vmrewind.errors import UsageError
from vmrewind.history.bookmarks import kind_of
from vmrewind.history.moments import FORMS, format_time
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import private_directory
from vmrewind.paths import VmPaths
from vmrewind.recover.chunk_cache import ChunkCache
from vmrewind.recover.exporting import exported
from vmrewind.recover.scratch import scratch_in
from vmrewind.start.resolve import open_any
from vmrewind.start.signals import asked_to_end


def export(
    vm: Annotated[str, Parameter(help="The VM: its TOML file, its name, or URL/VM in a repository.")],
    /,
    *,
    at: Annotated[str, Parameter(allow_leading_hyphen=True, help=f"The moment: {FORMS}.")],
    disk: Annotated[list[str] | None, Parameter(negative="", help="Only this disk (may be repeated).")] = None,
    socket: Annotated[Path | None, Parameter(help="Listen here; default: a socket in the VM's runtime directory.")] = None,
    writable: Annotated[
        bool, Parameter(negative="", help="Take writes, into a scratch file that goes with this command; history stays as it is.")
    ] = False,
    scratch: Annotated[
        Path | None, Parameter(help="Directory for the scratch files; default: the one for temporary files.")
    ] = None,
    branch: BranchOption = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object once the disks are served.")] = False,
) -> None:
    """Serve a VM's disks as of a moment over NBD, until interrupted (SIGINT, SIGTERM, SIGHUP). Nothing is copied beforehand."""
    if scratch is not None and not writable:
        raise UsageError("--scratch is for --writable", "leave it out, or add --writable")
    found = open_any(vm)
    path = (socket or VmPaths(found.name).runtime / f"export-{os.getpid()}.sock").absolute()
    if socket is not None and path.exists():
        raise UsageError(f"{path}: exists already", "name a socket that is not there yet, or remove it if nobody listens")
    with found.history() as history:
        chosen = Chosen.of(found.name, history, branch, disk)
        targets, position = chosen.targets, chosen.at(at)
        kind = kind_of(history, chosen.branch, at, position)
        directory = scratch or Path(tempfile.gettempdir())
        private_directory(path.parent)

        def complain(what: str) -> None:
            print(f"export: {what}", file=sys.stderr, flush=True)

        changes = scratch_in(directory if writable else None)
        with (
            asked_to_end() as asked,
            closing(ChunkCache(directory)) as cache,
            exported(history, targets, position, path, cache=cache, changes=changes, complain=complain) as serving,
        ):
            uris = serving.uris
            if json:
                served = {target: {"uri": uris[target], "size": serving.disks[target].size} for target in targets}
                where = position_data(position) | {"kind": kind}
                print(
                    json_module.dumps({"event": "ready", "vm": found.name, **where, "writable": writable, "disks": served}),
                    flush=True,
                )
            else:
                print(
                    f"{found.name} at {format_time(position.time_ns)} (seq {position.seq} of run {run_name(position.run)}, {kind}):"
                )
                for uri in uris.values():
                    print(f"  {uri}")
                print("served until this command is interrupted", flush=True)
            asked.wait()
