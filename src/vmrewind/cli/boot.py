"""``vmrewind boot``: a VM as it was at a moment, beside the one that runs."""

from __future__ import annotations

import contextlib
import fcntl
import json as json_module
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vmrewind.cli.boot_domain import BootedDomain, Kept, boot_domain
from vmrewind.cli.chosen import BranchOption, Chosen, position_data
from vmrewind.cli.drill import ending_by_signals
from vmrewind.cli.progress import byte_progress
from vmrewind.errors import UsageError
from vmrewind.history.history import History
from vmrewind.history.moments import FORMS, format_time
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position, private_directory
from vmrewind.paths import VmPaths
from vmrewind.recover.boot import run_machine
from vmrewind.recover.boot_machine import configuration, qemu_line
from vmrewind.recover.chunk_cache import ChunkCache
from vmrewind.recover.exporting import exported
from vmrewind.recover.keep import Keeping, KeptVm
from vmrewind.recover.scratch import scratch_in
from vmrewind.repository.url import anywhere
from vmrewind.start.libvirt import DEFAULT_URI
from vmrewind.start.places import make_places
from vmrewind.start.qemu import RECONNECT_SECONDS
from vmrewind.start.resolve import VM_HELP, StoredVm, VmHandle, open_any
from vmrewind.vmconfig.model import Invalid, check_name

if TYPE_CHECKING:
    from vmrewind.recover.protecting import Protecting


def boot(
    vm: Annotated[str, Parameter(help=VM_HELP)],
    /,
    *,
    at: Annotated[str, Parameter(allow_leading_hyphen=True, help=f"The moment: {FORMS}.")],
    network: Annotated[
        str,
        Parameter(help="none, or the libvirt network its interfaces are put on; without libvirt the id of a -netdev of its own."),
    ] = "none",
    name: Annotated[str | None, Parameter(help="What it is called here; default: the VM's name and the record's number.")] = None,
    scratch: Annotated[Path | None, Parameter(help="Directory for what it writes; default: the one for temporary files.")] = None,
    keep: Annotated[
        Path | None,
        Parameter(help="Copy its disks to full images in this new directory while it runs; then it is a VM of its own."),
    ] = None,
    protect: Annotated[
        bool,
        Parameter(negative="", help="With --keep: it is a protected VM, with a history of its own from its first write on."),
    ] = False,
    branch: BranchOption = None,
    connect: Annotated[str, Parameter(help="libvirt's URI, for a VM of libvirt.")] = DEFAULT_URI,
    json: Annotated[bool, Parameter(negative="", help="Print JSON objects on stdout; the console then goes to stderr.")] = False,
) -> int:
    """Start a VM as it was at a moment, at once and beside the running one, which is not touched.

    Its disks are composed as they are read, what it writes is gone with this command, and it has no network unless asked. Ends
    with the VM; Ctrl-C ends both.
    """
    begun = time.monotonic()
    if protect and keep is None:
        raise UsageError("--protect is for --keep", "what is not kept needs no history: add --keep DIR, or leave it out")
    found = open_any(vm)

    def say(message: str) -> None:
        # The guest runs on, and what is done for it goes on, although nobody may be there to hear it any more.
        with contextlib.suppress(OSError, ValueError):
            print(f"vmrewind: {message}", file=sys.stderr, flush=True)

    with found.history() as history, ending_by_signals():
        chosen = Chosen.of(found.name, history, branch, say=say)
        position = chosen.at(at)
        info = history.runs[position.run]
        formats = {disk.target: disk.format for disk in info.disks if disk.target in chosen.targets}
        known = None if isinstance(found, StoredVm) else found.config
        stored = configuration(history, known, position)
        own = name or f"{found.name}-at-{position.seq}"
        paths = _own_paths(own)
        wires = None if network == "none" else network

        def ready(left_out: Sequence[str], what: dict[str, object]) -> None:
            seconds = time.monotonic() - begun
            if json:
                where = position_data(position)
                told = {"event": "ready", "vm": found.name, "name": own, **where, **what, "left_out": list(left_out)}
                print(json_module.dumps(told | {"seconds": round(seconds, 3)}), flush=True)
                return
            for device in left_out:
                say(f"left out: {device}")
            say(f"{own}: {found.name} as it was at {_moment(position)}, running after {seconds:.1f} s; Ctrl-C ends it")

        directory = scratch or Path(tempfile.gettempdir())
        if stored.suffix == "xml":
            booted = BootedDomain(history, position, stored, own, formats, wires)
            kept_domain = None
            if keep is not None:
                kept_domain = Kept(keep, _repository(history) if protect else None, _lasting(vm, found))
            with _places(paths, booted.owner):
                boot_domain(booted, connect, paths.nbd_socket, directory, kept_domain, ready, say, json=json)
            return 0
        with _places(paths, None), contextlib.ExitStack() as opened:
            keeping: Keeping | None = None
            protecting: Protecting | None = None
            if keep is not None:
                progress = opened.enter_context(byte_progress(json=json))
                kept = KeptVm(own, _repository(history), protect)
                if protect:
                    # Not needed otherwise, and not quickly loaded.
                    from vmrewind.recover.protecting import Protecting

                    protecting = Protecting(keep, formats, stored.document, kept, _lasting(vm, found), position, progress, say)
                    opened.callback(protecting.give_up)
                else:
                    keeping = Keeping(keep, list(formats), stored.document, kept, progress, say)
                    opened.callback(keeping.give_up)
            serving_until = opened.enter_context(contextlib.ExitStack())
            cache = serving_until.enter_context(contextlib.closing(ChunkCache(directory)))
            changes = protecting.filling if protecting is not None else scratch_in(directory)
            where = protecting.socket if protecting is not None else paths.nbd_socket
            serving = serving_until.enter_context(
                exported(history, list(formats), position, where, cache=cache, changes=changes, complain=say)
            )
            reconnect_seconds, machine = 0, None
            if protecting is not None:

                def hand_over(successor: Path) -> None:
                    serving.hand_over(successor)
                    # What is not read any more is not to be held on to for as long as the VM runs.
                    serving_until.close()
                    history.close()

                protecting.hand_over = hand_over
                reconnect_seconds, machine = RECONNECT_SECONDS, protecting.config.uuid
            command, left_out = qemu_line(
                stored, own, formats, serving.socket, wires, uuid=machine, reconnect_seconds=reconnect_seconds
            )
            if keeping is not None:
                command.append("-no-shutdown")
            return run_machine(
                command,
                console=sys.stderr.fileno() if json else None,
                ready=lambda pid: ready(left_out, {"pid": pid}),
                staying=keeping or protecting,
            )


def _repository(history: History) -> str:
    return anywhere(history.reachable_repository("what --keep names").repository.url)


def _lasting(argument: str, found: VmHandle | StoredVm) -> str:
    """The VM as a command in another directory can take it, and after its TOML file has gone if it can."""
    if isinstance(found, StoredVm):
        return f"{anywhere(found.url)}/{found.name}"
    return found.name if found.paths.config.exists() else str(Path(argument).absolute())


def _moment(position: Position) -> str:
    return f"{format_time(position.time_ns)} (seq {position.seq} of run {run_name(position.run)})"


def _own_paths(name: str) -> VmPaths:
    """The places of the VM to be; raises UsageError if its name is another one's."""
    try:
        check_name("--name", name)
    except Invalid as error:
        raise UsageError(str(error), error.hint) from None
    paths = VmPaths(name)
    with socket.socket(socket.AF_UNIX) as asking:
        listening = paths.nbd_socket.exists() and asking.connect_ex(str(paths.nbd_socket)) == 0
    if listening or paths.config.exists():
        raise UsageError(f"there is a VM called {name} here already", "give it another name with --name")
    return paths


@contextlib.contextmanager
def _places(paths: VmPaths, owner: tuple[int, int] | None) -> Iterator[None]:
    """Its runtime directory, which QEMU's user gets through; nothing of it stays."""
    if owner is not None:
        make_places(paths, owner)
    else:
        private_directory(paths.runtime)
    # Two that boot under one name must not serve one socket.
    fd = os.open(paths.runtime, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{paths.name} is being booted already", "give it another name with --name") from None
        # It is a VM's only once something is in it.
        with contextlib.suppress(OSError):
            paths.state.rmdir()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                paths.runtime.rmdir()
    finally:
        os.close(fd)
