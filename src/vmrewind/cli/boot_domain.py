"""The libvirt half of ``vmrewind boot``: the moment as a transient domain."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmrewind.cli.progress import byte_progress
from vmrewind.errors import UsageError
from vmrewind.history.history import History
from vmrewind.history.view import View
from vmrewind.journal.runs import Position
from vmrewind.recover.boot_domain import run_domain
from vmrewind.recover.boot_machine import Stored
from vmrewind.recover.chunk_cache import ChunkCache
from vmrewind.recover.exporting import exported
from vmrewind.recover.keep import KeptVm
from vmrewind.recover.keep_domain import KeepingDomain
from vmrewind.recover.protecting_domain import ProtectingDomain
from vmrewind.recover.scratch import Overlay, scratch_in
from vmrewind.start.libvirt import Libvirt, qemu_owner
from vmrewind.start.signals import asked_to_end
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


@dataclass(frozen=True, slots=True)
class Kept:
    """What is to stay of it: ``directory``, for its disks; ``repository``, if it is to be protected, and ``of``, its VM."""

    directory: Path
    repository: str | None
    of: str


def boot_domain(
    booted: BootedDomain,
    uri: str,
    socket: Path,
    scratch: Path,
    keep: Kept | None,
    ready: Callable[[Sequence[str], dict[str, object]], None],
    say: Callable[[str], None],
    *,
    json: bool,
) -> None:
    """Run it, with its disks at ``socket``, until it ends or a signal comes."""
    history, name, targets = booted.history, booted.name, list(booted.formats)
    xml, left_out = beside(booted.stored.document, name, str(uuid.uuid4()), booted.formats, socket, booted.network)
    with Libvirt(uri) as libvirt, Libvirt(uri) as aside:
        if libvirt.knows(name):
            raise UsageError(f"libvirt has a domain called {name} already", "give it another name with --name")
        staying: KeepingDomain | ProtectingDomain | None = None
        with contextlib.ExitStack() as opened:
            asked = opened.enter_context(asked_to_end())
            changes: Callable[[str, View], Overlay] | None = scratch_in(scratch)
            if keep is not None:
                progress = opened.enter_context(byte_progress(json=json))
                if keep.repository is None:
                    staying = KeepingDomain(libvirt, keep.directory, name, xml, targets, booted.owner, progress, say)
                else:
                    vm = KeptVm(name, keep.repository, protect=True)
                    staying = ProtectingDomain(
                        libvirt, keep.directory, vm, booted.formats, keep.of, booted.position, booted.owner, progress, say
                    )
                    changes = staying.filling
                opened.callback(staying.give_up)
            serving_until = opened.enter_context(contextlib.ExitStack())
            cache = serving_until.enter_context(contextlib.closing(ChunkCache(scratch)))
            serving = serving_until.enter_context(
                exported(
                    history,
                    targets,
                    booted.position,
                    socket,
                    cache=cache,
                    changes=changes,
                    complain=say,
                    owner=booted.owner,
                )
            )

            def let_go() -> None:
                serving_until.close()
                history.close()

            def hand_over(successor: Path) -> None:
                serving.hand_over(successor)
                let_go()

            if isinstance(staying, KeepingDomain):
                staying.let_go = let_go
            elif staying is not None:
                staying.hand_over = hand_over
                xml = staying.prepare(booted.stored.document, xml)
            run_domain(libvirt, aside, xml, lambda: ready(left_out, {"domain": name}), staying, asked, say)
        if isinstance(staying, ProtectingDomain) and staying.lacking:
            _complete(staying, name, say, json=json)


def _complete(domain: ProtectingDomain, name: str, say: Callable[[str], None], *, json: bool) -> None:
    """Complete the images of a domain that has ended, by what a later command would do."""
    from vmrewind.cli.restore import restore

    say("this is done now; Ctrl-C leaves it to you")
    with contextlib.suppress(KeyboardInterrupt):
        restore(name, in_place=True, json=json)
        domain.define("its images are complete")
