"""The two child processes: how each is created, and how capture is handed its storage space, its disks and its sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from vmrewind.errors import StartError, by_kind
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import ImageIdentity, RunInfo, private, private_directory
from vmrewind.paths import VmPaths
from vmrewind.start.environment import without_credentials
from vmrewind.vmconfig.model import VmConfig

CLEAN: Final = "exit code 0"
HANDED_OVER: Final = "handed over"
"""How a capture ends that has left its run to the next one."""
_HEED_SECONDS: Final = 5.0
"""A capture that has not heeded a signal by then hangs."""
_STOP_HEED_SECONDS: Final = 30.0
"""The same of one that is to end the run: nobody waits for its disks any more, so slow storage gets more time."""
_HAND_OVER_SECONDS: Final = 60.0
"""For so long its last checkpoint may take, and the sync that is at hand when it ends."""
_STANDBY_SECONDS: Final = 20.0
_ALLOT_SECONDS: Final = 60.0
_ALLOT_BYTES_PER_SECOND_MIN: Final = 16 << 20
"""A file system that cannot reserve space has zeroes written to it."""
_READY_SECONDS: Final = 600.0
_RECOVER_BYTES_PER_SECOND_MIN: Final = 1 << 20
"""A recovery must never be killed because it is slow: the next one would be no faster."""
# With 20 protected VMs on a host, each process's own arenas would cost more than its work.
# The safe path keeps them from importing what lies in the directory that the VM happens to be started in.
_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "2", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": "1"}


class CaptureChild:
    """One capture process. ``create`` gives it its storage space, ``assign`` its disks; then it serves.

    One that stands by has started, and touches nothing before it is assigned its disks.
    """

    def __init__(self, process: Process, log: Path, journal_size: int, *, standby: bool = False) -> None:
        self._process = process
        self._log = log
        self._standby = standby
        self._handed_over = False
        self._allot_seconds = _ALLOT_SECONDS + journal_size / _ALLOT_BYTES_PER_SECOND_MIN
        self._ready_seconds = _READY_SECONDS + journal_size / _RECOVER_BYTES_PER_SECOND_MIN

    @classmethod
    async def create(
        cls,
        paths: VmPaths,
        journal: Path,
        journal_size: int,
        inherit: tuple[int, ...] = (),
        *,
        local_history: int | None = None,
        standby: bool = False,
    ) -> CaptureChild:
        """Start the process and wait until its storage space is allotted, or it stands by.

        Raises what it reports, or StartError if it reports nothing for too long; then it has been killed.
        """
        command = [sys.executable, "-m", "vmrewind.capture", "--journal", str(journal), "--journal-size", str(journal_size)]
        command += ["--local-history", str(local_history)] if local_history is not None else []
        command += ["--standby"] if standby else []
        environment = without_credentials(os.environ)
        process = await spawn(paths, command, stdin=PIPE, stdout=PIPE, inherit=inherit, environment=environment)
        child = cls(process, paths.log, journal_size, standby=standby)
        try:
            if standby:
                await child._expect("standby", _STANDBY_SECONDS)
            else:
                await child._expect("allotted", child._allot_seconds)
        except BaseException:
            await child.kill()
            raise
        return child

    async def assign(self, assignment: Mapping[str, Any]) -> Mapping[str, Any]:
        """Hand over the disks and wait until they are served; raises what the process reports, StartError if that is nothing."""
        assert self._process.stdin is not None, "the process was created with a pipe"
        try:
            self._process.stdin.write(json.dumps(assignment).encode() + b"\n")
            await self._process.stdin.drain()
            self._process.stdin.close()
        except (BrokenPipeError, ConnectionResetError):
            pass  # It has died, and what it said before is about to be read.
        if self._standby:
            await self._expect("allotted", self._allot_seconds)
        return await self._expect("ready", self._ready_seconds)

    async def _expect(self, event: str, seconds: float) -> Mapping[str, Any]:
        hint = f"what it said last is in {self._log}"
        try:
            async with asyncio.timeout(seconds):
                message = await self._read()
                if message is None:
                    code = await self._process.wait()
                    raise StartError(f"the capture process ended ({ending_words(code)}) before it was {event}", hint)
                if message["event"] == "error":
                    await self._process.wait()
                    raise by_kind(message["kind"], message["message"], message["hint"])
        except TimeoutError as error:
            await self.kill()
            raise StartError(f"the capture process was not {event} within {seconds:.0f} s", hint) from error
        except (ValueError, KeyError, TypeError) as error:
            raise StartError(f"the capture process said something else than {event!r}: {error!r}", hint) from error
        if message["event"] != event:
            raise StartError(f"the capture process said {message['event']!r} instead of {event!r}", hint)
        return message

    async def _read(self) -> dict[str, Any] | None:
        """The next thing that it says, None at its end; raises ValueError for what is no event."""
        assert self._process.stdout is not None, "the process was created with a pipe"
        line = await self._process.stdout.readline()
        if not line:
            return None
        message = json.loads(line)
        if not isinstance(message, dict) or not isinstance(message.get("event"), str):
            raise ValueError(f"{line[:80]!r} is no event")
        return message

    async def _heard(self) -> str | None:
        """The name of the next event, None at its end; what is no event is passed over."""
        while True:
            with contextlib.suppress(ValueError):
                message = await self._read()
                event = None if message is None else str(message["event"])
                self._handed_over |= event == "handed-over"
                return event

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def wait(self) -> str:
        """Wait for its end; returns how it ended, in words."""
        return ending_words(await self._process.wait())

    async def hand_over(self) -> float:
        """Have it end and leave the run to the next capture; returns when it stopped serving (``time.monotonic()``).

        One that hangs is killed: the journal is built for that.
        """
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        stopped = time.monotonic()
        try:
            async with asyncio.timeout(_HEED_SECONDS):
                heeded = await self._heard()
            async with asyncio.timeout(_HAND_OVER_SECONDS):
                while heeded not in (None, "handed-over"):
                    heeded = await self._heard()
                stopped = time.monotonic()
                await self._process.wait()
        except TimeoutError:
            await self.kill()
        return stopped

    async def stop(self) -> str:
        """Ask for a clean end of the run and wait for it; returns how it ended: ``CLEAN`` if the run ended with it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(_STOP_HEED_SECONDS):
                while await self._heard() not in (None, "stopping"):
                    pass
        except TimeoutError:
            await self.kill()
        # From here on it syncs the images, which takes as long as it takes.
        ending = await self.wait()
        while not self._handed_over and await self._heard() is not None:
            pass
        return HANDED_OVER if self._handed_over and ending == CLEAN else ending

    async def kill(self) -> None:
        """End it at once; the journal is built for that."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


def ship_command(paths: VmPaths, journal: Path, repository: str, *, finish: bool) -> list[str]:
    """The command line of a ship process."""
    command = [sys.executable, "-m", "vmrewind.ship", "--vm", paths.name, "--journal", str(journal)]
    command += ["--repository", repository, "--state", str(paths.state), "--runtime", str(paths.runtime)]
    return [*command, "--finish"] if finish else command


class ShipChild:
    """One ship process: idle until ``ship.json`` names disks."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def create(cls, paths: VmPaths, journal: Path, repository: str, *, finish: bool = False) -> ShipChild:
        """Start the process; with ``finish`` it carries what is there and ends."""
        command = ship_command(paths, journal, repository, finish=finish)
        return cls(await spawn(paths, command, stdin=DEVNULL, stdout=DEVNULL))

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def wait(self) -> str:
        """Wait for its end; returns how it ended, in words."""
        return ending_words(await self._process.wait())

    def abandon(self) -> None:
        """Kill it without waiting: a process that hangs in its storage ends when that lets go."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def stop(self) -> str:
        """Ask it to send what is there, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        return await self.wait()


def assignment(
    info: RunInfo,
    identities: Mapping[str, ImageIdentity],
    config: VmConfig,
    paths: VmPaths,
    nbd_socket: Path,
    nbd: socket.socket,
    control: socket.socket,
) -> dict[str, Any]:
    """What capture is told of its run (docs/architecture.md)."""
    return {
        "vm": info.vm,
        "uuid": info.uuid,
        "run": run_name(info.run),
        "first_seq": info.first_seq,
        "time_floor_ns": info.parent.time_ns if info.parent else 0,
        "parent": {"run": run_name(info.parent.run), "seq": info.parent.seq} if info.parent else None,
        "disks": [
            {
                "index": disk.index,
                "target": disk.target,
                "image": disk.image,
                "format": disk.format,
                "size": disk.size,
                "identity": asdict(identities[disk.target]),
            }
            for disk in info.disks
        ],
        "nbd_socket": str(nbd_socket),
        "nbd_fd": nbd.fileno(),
        "control_socket": str(paths.control_socket),
        "control_fd": control.fileno(),
        "events": str(paths.events(info.run)),
        "on_journal_full": config.protection.on_journal_full,
        "dirty_map": str(paths.dirty_map),
    }


async def spawn(
    paths: VmPaths,
    command: list[str],
    *,
    stdin: int,
    stdout: int,
    inherit: tuple[int, ...] = (),
    environment: Mapping[str, str] = os.environ,
) -> Process:
    """A child in a session of its own, so that the terminal's Ctrl-C is the keeper's alone; its stderr goes to the VM's log."""
    private_directory(paths.state)
    with open(paths.log, "ab", opener=private) as log:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=stdin,
            stdout=stdout,
            stderr=log,
            pass_fds=inherit,
            start_new_session=True,
            env={**environment, **_ENVIRONMENT},
        )


def ending_words(code: int) -> str:
    """How a process ended."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
