"""The keeper: brings a VM's two child processes up, hands over its disks, and keeps both alive until the VM stops.

It owns the listening sockets, so a capture that died is replaced by one that serves the same sockets: QEMU reconnects at once and
sends again what was not answered. In direct mode the keeper lives in ``vmrewind run``; under libvirt the hook starts it as a
process of its own (``start/keeper.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmrewind.errors import SpaceError, StartError, VmrewindError, VmStateError
from vmrewind.journal.events import EventLog
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import new_run_id, run_path, write_durably
from vmrewind.paths import VmPaths
from vmrewind.start.bases import Progress
from vmrewind.start.children import CLEAN, CaptureChild, ResyncChild, ShipChild, assignment, listen
from vmrewind.start.control import instruct
from vmrewind.start.places import make_places
from vmrewind.start.plan import Plan, Planner
from vmrewind.start.processes import Keeping, Process, running
from vmrewind.start.wanted import write_wanted
from vmrewind.vmconfig.model import VmConfig

DEATHS_MAX: Final = 5
DEATHS_SECONDS: Final = 60
"""After this many deaths of a child within this time, its next start waits: a child that cannot live must not eat the host."""
_PATIENCE_SECONDS: Final = 1.0
_SHIP_RESTART_SECONDS: Final = 0.2
_SHIP_STOP_SECONDS: Final = 10.0
_SHIP_FINISH_SECONDS: Final = 7.0
_LEFTOVER_SECONDS: Final = 60.0
_RESYNC_RETRY_SECONDS: Final = 2.0
_RESYNC_RETRY_SECONDS_MAX: Final = 300.0


@dataclass(frozen=True, slots=True)
class Storage:
    """The storage space that capture is given, known before the configuration is looked at closely."""

    name: str
    journal: Path
    journal_size: int


class Deaths:
    """Counts a child's recent deaths."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=DEATHS_MAX)

    def pause_seconds(self) -> float:
        """One more death: how long to wait before the next start."""
        now = time.monotonic()
        self._times.append(now)
        many = len(self._times) == DEATHS_MAX and now - self._times[0] < DEATHS_SECONDS
        return _PATIENCE_SECONDS if many else 0.0


class Keeper:
    """One run's keeper. ``bring_up`` ends with both children in place and every disk assigned; the CPU may then be started."""

    def __init__(self, storage: Storage, mode: str, owner: tuple[int, int] | None = None, nbd_socket: Path | None = None) -> None:
        self.storage = storage
        self.mode = mode
        self.paths = VmPaths(storage.name)
        self.run = new_run_id()
        self.events = EventLog(self.paths.events(self.run))
        self.after_restart: Callable[[], None] = lambda: None
        """Called after a dead capture was replaced."""
        self.nbd_socket = nbd_socket or self.paths.nbd_socket
        self._owner = owner
        self._capture: CaptureChild | None = None
        self._ship: ShipChild | None = None
        self._sockets: tuple[socket.socket, ...] = ()
        self._assignment: dict[str, Any] = {}
        self._plan: Plan | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._qemu_pid: int | None = None
        self._repository: str | None = None
        self._trouble: str | None = None
        self._lock = -1

    @property
    def bases(self) -> dict[str, str]:
        """The bases that the disks equal at the run's beginning, by target."""
        return dict(self._plan.info.bases) if self._plan is not None else {}

    @property
    def run_name(self) -> str:
        """The run's id as it is written."""
        return run_name(self.run)

    @property
    def capture_pid(self) -> int:
        """The living capture's process id."""
        assert self._capture is not None, "asked after the start"
        return self._capture.pid

    # -- the order of a start: docs/architecture.md

    async def bring_up(
        self,
        load: Callable[[], VmConfig],
        say: Callable[[str], None],
        progress: Progress | None,
        backup: Sequence[str] = (),
    ) -> VmConfig:
        """Create capture, read the configuration, assign the disks, create ship. On failure nothing is left behind.

        ``backup``: disks that get a new base in any case.
        """
        make_places(self.paths, self._owner)
        self._lock_vm()
        await clear_leftovers(self.paths)
        self.events.write("start.begin", vm=self.storage.name, run=self.run_name, mode=self.mode)
        try:
            return await self._bring_up(load, say, progress, backup)
        except BaseException as error:
            self.events.write("start.failed", error=str(error) or type(error).__name__)
            await self.stop()
            raise

    async def _bring_up(
        self, load: Callable[[], VmConfig], say: Callable[[str], None], progress: Progress | None, backup: Sequence[str]
    ) -> VmConfig:
        self._sockets = (listen(self.nbd_socket, self._owner), listen(self.paths.control_socket, None))
        storage = self.storage
        self._capture = await self._create_capture()
        self._note()
        self.events.write("capture.created", pid=self._capture.pid, journal=str(storage.journal), bytes=storage.journal_size)

        config = load()
        self.events.write("config.parsed", disks=[disk.target for disk in config.protection.disk])
        config.save(self.paths.config)

        def make_plan() -> Plan:
            planner = Planner.of(config, self.paths, storage.journal, self.events, say, progress, alone=self.mode == "alone")
            return planner.plan(self.run, backup)

        plan = await asyncio.to_thread(make_plan)
        self._rename(plan.info.run)
        write_durably(run_path(storage.journal, self.run), plan.info.to_json())
        self._plan = plan
        self._assignment = assignment(plan, config, self.paths, self.nbd_socket, *self._sockets)
        try:
            ready = await self._capture.assign(self._assignment)
        except BaseException:
            # Not one record was written: the run never was.
            run_path(storage.journal, self.run).unlink()
            raise
        # From now on a capture that finds no journal of this run must not begin one: it was deleted.
        self._assignment["resuming"] = True
        self.events.write("disks.assigned", disks=ready["disks"], socket=str(self.nbd_socket))

        self._tasks.append(asyncio.create_task(self._keep_capture()))
        if config.protection.repository is not None:
            auto = config.protection.ship == "auto"
            write_wanted(self.paths, [disk.target for disk in config.protection.disk] if auto else [])
            repository = config.protection.repository
            self._repository = repository
            self._ship = await self._create_ship(repository)
            self._note()
            self.events.write("ship.created", pid=self._ship.pid, state="auto" if auto else "idle")
            self._tasks.append(asyncio.create_task(self._keep_ship(repository)))
            if plan.resync:
                self._tasks.append(asyncio.create_task(self._resync(repository, plan.resync)))
        return config

    def _lock_vm(self) -> None:
        """One keeper for a VM: held until this process ends. Of two starts at once, one is refused and touches nothing."""
        lock = os.open(self.paths.runtime / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            name = self.paths.name
            raise VmStateError(f"{name} is already running, or being started", f"see `vmrewind status {name}`") from error
        self._lock = lock

    def _rename(self, run: int) -> None:
        """The plan gave the run another id than this keeper began with."""
        if run != self.run:
            log = self.paths.events(self.run)
            self.run = run
            log.replace(self.paths.events(run))
            self.events = EventLog(self.paths.events(run))
            self._note()

    def qemu_started(self, pid: int) -> None:
        """QEMU is there, its CPU still paused."""
        self._qemu_pid = pid
        self._note()
        self.events.write("qemu.started", pid=pid)

    def note_unprotected(self) -> None:
        """The VM runs without protection: no child of this keeper's is alive."""
        self._capture = self._ship = None
        self._note()

    async def _create_capture(self) -> CaptureChild:
        inherit = tuple(sock.fileno() for sock in self._sockets)
        return await CaptureChild.create(self.paths, self.storage.journal, self.storage.journal_size, inherit)

    async def _create_ship(self, repository: str) -> ShipChild:
        return await ShipChild.create(self.paths, self.storage.journal, repository)

    def _note(self) -> None:
        """Tell the other commands who is alive."""
        own = Process.of(os.getpid())
        assert own is not None, "this process is alive"
        Keeping(
            self.run_name,
            self.mode,
            own,
            Process.of(self._capture.pid) if self._capture else None,
            Process.of(self._ship.pid) if self._ship else None,
            Process.of(self._qemu_pid) if self._qemu_pid else None,
            self._trouble,
        ).write(self.paths)

    # -- keeping

    async def _keep_capture(self) -> None:
        deaths = Deaths()
        while True:
            assert self._capture is not None, "capture was created before it is kept"
            ending = await self._capture.wait()
            if self._stopping:
                return
            self.events.write("capture.died", pid=self._capture.pid, ending=ending)
            await asyncio.sleep(deaths.pause_seconds())
            await self._replace_capture()
            self.after_restart()

    async def _replace_capture(self) -> None:
        """Start captures until one serves: the guest waits meanwhile, and nothing it was promised is lost."""
        while True:
            try:
                self._capture = await self._create_capture()
                self._note()
                await self._capture.assign(self._assignment)
            except (VmrewindError, OSError) as error:
                hint = getattr(error, "hint", "")
                trouble = f"{error} ({hint})" if hint else str(error)
                if trouble != self._trouble:
                    self._trouble = trouble
                    self.events.write("capture.restart-failed", error=str(error), hint=hint)
                self._note()
                await asyncio.sleep(_PATIENCE_SECONDS)
            else:
                self._trouble = None
                self._note()
                self.events.write("capture.restarted", pid=self._capture.pid)
                return

    async def _keep_ship(self, repository: str) -> None:
        deaths = Deaths()
        while True:
            assert self._ship is not None, "ship was created before it is kept"
            ending = await self._ship.wait()
            if self._stopping:
                return
            self.events.write("ship.died", pid=self._ship.pid, ending=ending)
            await asyncio.sleep(_SHIP_RESTART_SECONDS + deaths.pause_seconds())
            self._ship = await self._create_ship(repository)
            self._note()
            self.events.write("ship.restarted", pid=self._ship.pid)

    async def _resync(self, repository: str, disks: Sequence[str]) -> None:
        """Close the gaps that this run began with. A resync that fails is tried again: the repository may be away for a while."""
        pause_seconds = _RESYNC_RETRY_SECONDS
        while True:
            child = await ResyncChild.create(
                self.paths, self.storage.journal, repository, self.run_name, disks, self.storage.journal_size // 2
            )
            try:
                ending = await child.wait()
            except asyncio.CancelledError:
                await child.kill()
                raise
            if ending in (CLEAN, f"exit code {SpaceError.exit_code}"):
                return
            await asyncio.sleep(pause_seconds)
            pause_seconds = min(2 * pause_seconds, _RESYNC_RETRY_SECONDS_MAX)

    # -- the end

    async def stop(self) -> None:
        """End the run cleanly: capture first, so that its last records are there for ship to send."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._capture is not None:
            if self._plan is None:
                await self._capture.kill()
            else:
                self.events.write("capture.ended", ending=await self._capture.stop())
        await self._stop_ship()
        for sock in self._sockets:
            sock.close()
        for path in (self.nbd_socket, self.paths.control_socket, self.paths.keeper):
            path.unlink(missing_ok=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def _stop_ship(self) -> None:
        if self._ship is None:
            return
        try:
            ending = await asyncio.wait_for(self._ship.stop(), _SHIP_STOP_SECONDS)
            if ending != CLEAN and self._repository is not None:
                # It was dead already, or too young to be told: another one carries what is left, if that is soon done.
                self._ship = await ShipChild.create(self.paths, self.storage.journal, self._repository, finish=True)
                ending = await asyncio.wait_for(self._ship.wait(), _SHIP_FINISH_SECONDS)
        except TimeoutError:
            # A repository that hangs must not hold up the VM's stop. What is not carried yet follows at the next start.
            self._ship.abandon()
            ending = "abandoned: the repository does not answer"
        self.events.write("ship.ended", ending=ending)


async def clear_leftovers(paths: VmPaths) -> None:
    """Refuse a VM that is running; end a capture that its keeper and its QEMU have left behind."""
    keeping = running(paths)
    if keeping is None:
        left = Keeping.read(paths)
        if left is not None and left.ship is not None and left.ship.alive:
            # It would go on with the next run, under the repository that it was given in its time.
            await _end(left.ship)
        return
    alive = keeping.qemu is not None and keeping.qemu.alive
    if keeping.keeper.alive:
        raise VmStateError(f"{paths.name} is already running (pid {keeping.keeper.pid})", f"see `vmrewind status {paths.name}`")
    if alive:
        assert keeping.qemu is not None, "it is what is alive"
        # It would come back to the next capture's socket, beside the next QEMU: two guests writing one disk.
        raise VmStateError(
            f"{paths.name}: its keeper has died, but its QEMU (pid {keeping.qemu.pid}) is still there",
            f"end that QEMU first: kill {keeping.qemu.pid}",
        )
    assert keeping.capture is not None, "if its keeper is dead, what runs is its capture"
    status = await asyncio.to_thread(lambda: instruct(paths, command="status"))
    if any(disk["clients"] for disk in status["disks"].values()):
        raise VmStateError(
            f"{paths.name}: its keeper has died, but a QEMU is still connected to its disks",
            f"stop that QEMU first; its disks are served by pid {keeping.capture.pid} until then",
        )
    for process in (keeping.capture, keeping.ship):
        if process is not None:
            await _end(process)


async def _end(process: Process) -> None:
    """Have a process that an earlier run left behind end, and wait for it; raises StartError if it does not."""
    process.terminate()
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    while process.alive:
        if time.monotonic() > deadline:
            raise StartError(f"pid {process.pid}, left over from an earlier run of the VM, does not end", "see what it waits for")
        await asyncio.sleep(0.05)
