"""Direct mode: ``vmrewind run`` starts QEMU itself, stays in the foreground as the keeper, and ends with the VM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from vmrewind.errors import ConfigError, VmrewindError
from vmrewind.paths import VmPaths
from vmrewind.start.images import declare_unprotected, make_whole, may_start_unprotected
from vmrewind.start.keeping import Keeper
from vmrewind.start.places import make_places
from vmrewind.start.qemu import Qemu
from vmrewind.start.serving import Storage
from vmrewind.start.signals import ending
from vmrewind.vmconfig.model import VmConfig
from vmrewind.vmconfig.toml import load_toml, peek_storage


def run_direct(path: Path, say: Callable[[str], None]) -> int:
    """Run the VM of a TOML file until it ends; returns QEMU's exit code (128 + n for signal n)."""
    code = asyncio.run(_run(path, say))
    return code if code >= 0 else 128 - code


async def _run(path: Path, say: Callable[[str], None]) -> int:
    peeked = peek_storage(path)
    if peeked is None:
        # Unprotected, or not readable: the strict parse says which, and the VM needs no capture.
        config = _load(path)
        say(f"{config.name}: protection is off (protection.enabled = false)")
        journal = config.protection.journal
        directory = Path(journal) if journal else VmPaths(config.name).default_journal
        reached = make_whole(config.name, directory, say)
        cause = "the VM ran with protection switched off (protection.enabled = false)"

        def declare(_: int) -> None:
            declare_unprotected(config.name, directory, reached, cause, say)

        return await _unprotected(config, say, declare)
    storage = Storage(
        peeked.name, peeked.journal or VmPaths(peeked.name).default_journal, peeked.journal_size, peeked.local_history
    )
    keeper = Keeper(storage, "direct")
    stop = asyncio.Event()
    _watch_signals(stop)
    try:
        config = await _until(stop, keeper.bring_up(lambda: _load(path), say))
    except VmrewindError as error:
        config = _load(path)
        if not may_start_unprotected(config, error):
            raise
        reached = make_whole(config.name, storage.journal, say)
        say(f"{config.name}: NOT PROTECTED: {error}")
        say(f'{config.name}: starting it all the same, because on_failure = "start-unprotected"')
        keeper.events.write("start.unprotected", error=str(error))
        keeper.note_unprotected(str(error))
        why = f'the VM was started unprotected (on_failure = "start-unprotected"): {error}'

        def begin(pid: int) -> None:
            # Known to every command before the guest runs: should this process be killed, QEMU goes on writing.
            keeper.qemu_started(pid)
            declare_unprotected(config.name, storage.journal, reached, why, say)

        try:
            return await _unprotected(config, say, begin, stop)
        finally:
            keeper.paths.keeper.unlink(missing_ok=True)
    except asyncio.CancelledError:
        say("stopped before the VM was started")
        return 130
    try:
        qemu = await Qemu.start(config, keeper.paths.nbd_socket, keeper.paths.runtime / "monitor.sock")
        keeper.qemu_started(qemu.pid)
        try:
            await qemu.start_cpu()
        except BaseException:
            await qemu.quit()
            raise
        keeper.events.write("cpu.started")
    except BaseException as error:
        keeper.events.write("start.failed", error=str(error) or type(error).__name__)
        await keeper.stop()
        raise
    keeper.after_restart = lambda: _resume_later(qemu)
    disks = ", ".join(disk.target for disk in config.protection.disk)
    say(f"{config.name}: running, protected: {disks}")
    code = await _watch(qemu, config, stop, say)
    keeper.events.write("qemu.ended", exit_code=code)
    await keeper.stop()
    for words in keeper.left_behind:
        say(words)
    return code


def _load(path: Path) -> VmConfig:
    config = load_toml(path)
    if config.qemu is None:
        raise ConfigError(f"{path}: the [qemu] table is missing", 'add [qemu] with command = ["qemu-system-x86_64", …]')
    return config


_resuming: set[asyncio.Task[None]] = set()


def _resume_later(qemu: Qemu) -> None:
    """A new capture serves: should the CPU have paused on an error in between, it goes on."""
    task = asyncio.get_running_loop().create_task(qemu.resume())
    _resuming.add(task)
    task.add_done_callback(_resuming.discard)


def _watch_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in ending():
        loop.add_signal_handler(number, stop.set)


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, VmConfig]) -> VmConfig:
    """The result of ``work``; a signal cancels it, which undoes what it did so far."""
    task = asyncio.ensure_future(work)
    asked = asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not task.done():
        task.cancel()
    return await task


async def _unprotected(
    config: VmConfig, say: Callable[[str], None], begin: Callable[[int], None], stop: asyncio.Event | None = None
) -> int:
    """Run QEMU on the images themselves; ``begin`` is told its pid before the CPU runs."""
    if stop is None:
        stop = asyncio.Event()
        _watch_signals(stop)
    paths = VmPaths(config.name)
    make_places(paths)
    qemu = await Qemu.start(config, None, paths.runtime / "monitor.sock")
    try:
        begin(qemu.pid)
        await qemu.start_cpu()
    except BaseException:
        await qemu.quit()
        raise
    return await _watch(qemu, config, stop, say)


async def _watch(qemu: Qemu, config: VmConfig, stop: asyncio.Event, say: Callable[[str], None]) -> int:
    """Wait for QEMU's end. The first signal presses the power button, a second one, or too long a wait, ends QEMU."""
    ended = asyncio.ensure_future(qemu.wait())
    asked = asyncio.ensure_future(stop.wait())
    await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        seconds = config.protection.shutdown_timeout_seconds
        say(f"{config.name}: asked the guest to shut down (up to {seconds} s; once more to end it now)")
        stop.clear()
        await qemu.press_power_button()
        again = asyncio.ensure_future(stop.wait())
        await asyncio.wait({ended, again}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        if not ended.done():
            say(f"{config.name}: the guest has not shut down: ending it")
            await qemu.quit()
    asked.cancel()
    return await ended
