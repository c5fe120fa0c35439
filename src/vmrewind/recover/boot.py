"""A booted moment: a QEMU in the foreground that ends with this process, however that ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import termios
from asyncio.subprocess import Process
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from qemu.qmp import ExecuteError, QMPClient, QMPError

from vmrewind.errors import StartError
from vmrewind.start.environment import users_umask, without_credentials
from vmrewind.start.signals import ending

_CONNECT_SECONDS = 30
_QUIT_SECONDS = 10
_INTERRUPTED = 130
"""Exit code: somebody asked for the end before there was a QEMU."""


class Staying(Protocol):
    """What is done for a VM that is to stay."""

    async def begin(self) -> None:
        """Before there is a QEMU. What it raises ends all."""

    async def accompany(self, pid: int, monitor: QMPClient, ended: asyncio.Future[int], stop: asyncio.Event) -> int:
        """While QEMU runs; its exit code, or 0 if it is to be ended. ``stop`` is set each time somebody asks for that."""

    async def end(self) -> None:
        """Once there is no QEMU any more, if it was begun; whether there was one or not."""


def run_machine(command: Sequence[str], *, console: int | None, ready: Callable[[int], None], staying: Staying | None) -> int:
    """Start QEMU, call ``ready`` with its pid once its CPU runs, and wait for its end; its exit code (128 + n for signal n).

    SIGINT, SIGTERM and SIGHUP end it. ``console``: the descriptor for its serial console, None for stdout. Raises StartError.
    """
    if shutil.which(command[0]) is None:
        raise StartError(f"{command[0]} is not installed here", "install QEMU for this machine type")
    with _terminal():
        code = asyncio.run(_run(command, console, ready, staying))
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _terminal() -> Iterator[None]:
    """QEMU makes the terminal pass on each key; one that is killed leaves it so."""
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, OSError, ValueError):
        yield  # none
        return
    try:
        yield
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)


async def _run(command: Sequence[str], console: int | None, ready: Callable[[int], None], staying: Staying | None) -> int:
    stop = asyncio.Event()
    for number in ending():
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if staying is None:
        return await _run_qemu(command, console, ready, None, stop)
    begun = asyncio.ensure_future(staying.begin())
    asked = asyncio.ensure_future(stop.wait())
    await asyncio.wait({begun, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if stop.is_set() and not begun.done():
        begun.cancel()
        # What it did so far it takes back.
        await asyncio.gather(begun, return_exceptions=True)
        return _INTERRUPTED
    await begun
    try:
        if stop.is_set():
            return _INTERRUPTED
        return await _run_qemu(command, console, ready, staying, stop)
    finally:
        await staying.end()


async def _run_qemu(
    command: Sequence[str], console: int | None, ready: Callable[[int], None], staying: Staying | None, stop: asyncio.Event
) -> int:
    ours, theirs = socket.socketpair()
    monitor = QMPClient("boot")
    with ours, theirs:
        process = await asyncio.create_subprocess_exec(
            # QEMU must not outlive us, whatever ends us: its disks end with us.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *command,
            *("-chardev", f"socket,id=vmrewind-monitor,fd={theirs.fileno()}", "-mon", "chardev=vmrewind-monitor,mode=control"),
            stdout=console,
            pass_fds=(theirs.fileno(),),
            # Ctrl-C at the terminal is for us alone.
            start_new_session=True,
            env=without_credentials(os.environ),
            umask=users_umask(),
        )
        theirs.close()
        try:
            return await _watch(process, monitor, ours, stop, ready, staying)
        finally:
            await _end(process, monitor)


async def _watch(
    process: Process,
    monitor: QMPClient,
    ours: socket.socket,
    stop: asyncio.Event,
    ready: Callable[[int], None],
    staying: Staying | None,
) -> int:
    ended = asyncio.ensure_future(process.wait())
    connected = asyncio.ensure_future(_connect(monitor, ours))
    try:
        await asyncio.wait({ended, connected}, timeout=_CONNECT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        try:
            if not connected.done():
                raise StartError("QEMU did not start", "its own message is above")
            await connected
        except (QMPError, ConnectionError, EOFError) as error:
            raise StartError(f"QEMU did not start: {error}", "its own message is above") from error
        ready(process.pid)
        if staying is not None:
            return await staying.accompany(process.pid, monitor, ended, stop)
        asked = asyncio.ensure_future(stop.wait())
        await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        # Ended because we were asked to: that is what was wanted.
        return ended.result() if ended.done() else 0
    finally:
        connected.cancel()
        ended.cancel()


async def _connect(monitor: QMPClient, ours: socket.socket) -> None:
    await monitor.connect(ours)
    # The greeting comes from a thread of its own, before there are devices; an answer only once there are.
    await monitor.execute("query-status")


async def _end(process: Process, monitor: QMPClient) -> None:
    if process.returncode is None:
        with contextlib.suppress(QMPError, ExecuteError, ConnectionError, EOFError, TimeoutError):
            async with asyncio.timeout(_QUIT_SECONDS):
                await monitor.execute("quit")
                await process.wait()
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    with contextlib.suppress(QMPError, ConnectionError, EOFError, OSError):
        await monitor.disconnect()
