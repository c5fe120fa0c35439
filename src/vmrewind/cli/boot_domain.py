"""The libvirt half of ``vmrewind boot``: the moment as a transient domain."""

from __future__ import annotations

import contextlib
import signal
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmrewind.cli.progress import byte_progress
from vmrewind.errors import UsageError
from vmrewind.history.history import History
from vmrewind.journal.runs import Position
from vmrewind.recover.boot_domain import SIGNALS, run_domain
from vmrewind.recover.boot_machine import Stored
from vmrewind.recover.chunk_cache import ChunkCache
from vmrewind.recover.exporting import exported
from vmrewind.recover.keep_domain import KeepingDomain
from vmrewind.recover.scratch import scratch_in
from vmrewind.start.libvirt import Libvirt, qemu_owner
from vmrewind.vmconfig.beside import beside


@dataclass(frozen=True, slots=True)
class BootedDomain:
    """A moment, and the domain ``name`` that it is to be. ``formats``: of its disks, by target. ``owner``: QEMU's user."""

    history: History
    position: Position
    stored: Stored
    name: str
    formats: Mapping[str, str]
    network: str | None
    owner: tuple[int, int] = field(default_factory=qemu_owner)


def boot_domain(
    booted: BootedDomain,
    uri: str,
    socket: Path,
    scratch: Path,
    keep: Path | None,
    ready: Callable[[Sequence[str], dict[str, object]], None],
    say: Callable[[str], None],
    *,
    json: bool,
) -> None:
    """Run it, with its disks at ``socket``, until it ends or a signal comes."""
    history, name, targets = booted.history, booted.name, list(booted.formats)
    xml, left_out = beside(booted.stored.document, name, str(uuid.uuid4()), booted.formats, socket, booted.network)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with contextlib.ExitStack() as opened:
        libvirt = opened.enter_context(Libvirt(uri))
        if libvirt.knows(name):
            raise UsageError(f"libvirt has a domain called {name} already", "give it another name with --name")
        keeping: KeepingDomain | None = None
        if keep is not None:
            progress = opened.enter_context(byte_progress(json=json))
            keeping = KeepingDomain(libvirt, keep, name, xml, targets, booted.owner, progress, say)
            opened.callback(keeping.give_up)
        serving_until = opened.enter_context(contextlib.ExitStack())
        cache = serving_until.enter_context(contextlib.closing(ChunkCache(scratch)))
        serving_until.enter_context(
            exported(
                history,
                targets,
                booted.position,
                socket,
                cache=cache,
                changes=scratch_in(scratch),
                complain=say,
                owner=booted.owner,
            )
        )
        if keeping is not None:

            def let_go() -> None:
                serving_until.close()
                history.close()

            keeping.let_go = let_go
        run_domain(libvirt, xml, lambda: ready(left_out, {"domain": name}), keeping, say)
