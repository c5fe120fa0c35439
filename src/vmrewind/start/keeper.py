"""The keeper as a process of its own, under libvirt: ``python -m vmrewind.start.keeper``, started by the hook.

It reports once, on a pipe, whether the VM may start, and then lives until the hook at the VM's release sends SIGINT. SIGTERM, which
a shutdown of the host or an administrator sends, ends it too, but not before the VM has let go of its disks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vmrewind.errors import ConfigError, VmrewindError
from vmrewind.paths import VmPaths
from vmrewind.start.environment import guard_files
from vmrewind.start.images import declare_unprotected, make_whole, may_start_unprotected
from vmrewind.start.keeping import Keeper
from vmrewind.start.leftovers import connected
from vmrewind.start.libvirt import Libvirt, qemu_owner
from vmrewind.start.listening import listen
from vmrewind.start.origins import first_bases
from vmrewind.start.places import make_places
from vmrewind.start.serving import Storage
from vmrewind.start.unprotected import UnprotectedServer, prepare_images
from vmrewind.vmconfig.domain import parse_domain, peek_storage
from vmrewind.vmconfig.model import VmConfig

_RESUME_SECONDS: Final = 60
"""How long after capture's return a VM that pauses on an I/O error is resumed: a resume that comes too early pauses again."""
_RESUME_POLL_SECONDS: Final = 0.2
_CONNECTED_POLL_SECONDS: Final = 0.5


def main() -> int:
    """Run the keeper of one domain; returns its exit code."""
    parser = argparse.ArgumentParser(prog="vmrewind.start.keeper")
    parser.add_argument("--domain", required=True)
    parser.add_argument("--xml", type=Path, required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    arguments = parser.parse_args()
    guard_files()

    def report(**fields: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(arguments.report_fd, json.dumps(fields).encode() + b"\n")
            os.close(arguments.report_fd)

    try:
        asyncio.run(_keep(arguments.domain, arguments.xml, lambda: report(ok=True)))
    except VmrewindError as error:
        report(ok=False, kind=error.kind, message=str(error), hint=error.hint)
        return error.exit_code
    except Exception as error:
        report(
            ok=False,
            kind="failed",
            message=f"{type(error).__name__}: {error}",
            hint="this is a bug; the VM's log has the traceback",
        )
        raise
    return 0


async def _keep(domain: str, xml_path: Path, report_ready: Callable[[], None]) -> None:
    xml = xml_path.read_bytes()
    peeked = peek_storage(xml)
    if peeked is None:
        raise ConfigError(f"domain {domain!r} has no vmrewind protection element", "run `vmrewind protect` for it")
    if peeked.name != domain:
        raise ConfigError(f"domain {domain!r}: its XML is of {peeked.name!r}", "virsh dumpxml shows what libvirt has stored")
    storage = Storage(
        peeked.name, peeked.journal or VmPaths(peeked.name).default_journal, peeked.journal_size, peeked.local_history
    )
    paths = VmPaths(storage.name)
    keeper = Keeper(storage, "libvirt", qemu_owner(), paths.filling_socket if first_bases(storage.journal) else None)
    stop = asyncio.Event()
    ready = asyncio.Event()
    _heed_signals(keeper, stop, ready)

    def tell_ready() -> None:
        ready.set()
        report_ready()

    def load() -> VmConfig:
        config = parse_domain(xml)
        if config is None:
            raise ConfigError(f"domain {domain!r} is not protected", "run `vmrewind protect` for it")
        return config

    try:
        await keeper.bring_up(load, _log)
    except VmrewindError as error:
        config = load()
        if not may_start_unprotected(config, error):
            raise
        reached = make_whole(config.name, storage.journal, _log)

        why = f'the VM was started unprotected (on_failure = "start-unprotected"): {error}'

        def declare_and_tell() -> None:
            declare_unprotected(config.name, storage.journal, reached, why, _log)
            tell_ready()

        await _serve_unprotected(keeper, config, error, declare_and_tell, stop)
        return
    resumer = Resumer(domain, keeper)
    keeper.after_restart = resumer.capture_is_back
    tell_ready()
    await stop.wait()
    await keeper.stop()
    for words in keeper.left_behind:
        _log(words)


def _heed_signals(keeper: Keeper, stop: asyncio.Event, ready: asyncio.Event) -> None:
    """SIGINT, the hook's word that the VM has ended, sets ``stop``. SIGTERM does before the VM may start; later only once nobody
    has had the disks for so long that a VM which lost its connection would have come back."""
    loop = asyncio.get_running_loop()
    waiting: list[asyncio.Task[None]] = []

    async def when_released() -> None:
        if ready.is_set():
            _log("told to end, and the VM may have its disks: ending once it has let go of them")
            keeper.events.write("keeper.end-deferred", reason="the VM may have its disks")
            used = time.monotonic()
            while time.monotonic() - used < _RESUME_SECONDS:
                if not keeper.serves or connected(keeper.nbd_socket):
                    used = time.monotonic()
                await asyncio.sleep(_CONNECTED_POLL_SECONDS)
        stop.set()

    def terminate() -> None:
        if not waiting:
            waiting.append(loop.create_task(when_released()))

    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGTERM, terminate)


async def _serve_unprotected(
    keeper: Keeper, config: VmConfig, error: VmrewindError, report_ready: Callable[[], None], stop: asyncio.Event
) -> None:
    """The administrator rather has the VM run unprotected than not at all: serve its images as they are."""
    make_places(keeper.paths, qemu_owner())
    prepare_images(config)
    with contextlib.closing(listen(keeper.nbd_socket, qemu_owner())) as listener:
        server = await UnprotectedServer.start(config, keeper.paths, keeper.nbd_socket, listener)
    keeper.note_unprotected(str(error), server.pid)
    keeper.events.write("start.unprotected", error=str(error))
    _log(f"{config.name}: NOT PROTECTED: {error}")
    report_ready()
    await stop.wait()
    await server.stop()
    for path in (keeper.nbd_socket, keeper.paths.keeper):
        path.unlink(missing_ok=True)


def _log(message: str) -> None:
    """Into the VM's log, which is this process's stderr."""
    sys.stderr.write(f"vmrewind: {message}\n")
    sys.stderr.flush()


class Resumer:
    """Resumes the domain when it paused because capture was away.

    libvirt before 9.2 cannot tell QEMU to wait for a server that comes back, so the disks are defined with error_policy stop:
    the VM pauses instead of passing an error to its guest. Libvirt is only talked to after a restart, never during a hook.
    """

    def __init__(self, domain: str, keeper: Keeper) -> None:
        self._domain = domain
        self._keeper = keeper
        self._lock = threading.Lock()
        self._deadline = 0.0
        self._watching = False

    def capture_is_back(self) -> None:
        """Watch the domain for a while; a watch that is under way goes on for as long from now."""
        with self._lock:
            self._deadline = time.monotonic() + _RESUME_SECONDS
            if not self._watching:
                self._watching = True
                # A daemon thread: the hook that ends this process holds the domain's lock in libvirt, so a call that is under way
                # then returns only when this process is gone. Nothing may wait for it.
                threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                self._resume_if_paused()
            except VmrewindError as error:
                _log(f"cannot resume {self._domain}: {error}")
            time.sleep(_RESUME_POLL_SECONDS)
            with self._lock:
                if time.monotonic() > self._deadline:
                    self._watching = False
                    return

    def _resume_if_paused(self) -> None:
        with Libvirt() as libvirt:
            if libvirt.domain(self._domain).resume_after_io_error():
                self._keeper.events.write("vm.resumed", reason="it had paused on an I/O error while capture was away")


if __name__ == "__main__":
    sys.exit(main())
