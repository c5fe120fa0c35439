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
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from vmrewind.errors import CorruptionError, VmStateError
from vmrewind.journal.copy_before_write import begun_base, remove
from vmrewind.journal.events import EventLog
from vmrewind.journal.format import run_name
from vmrewind.journal.origin import FILLING
from vmrewind.journal.runs import RunInfo, new_run_id, run_path, write_durably
from vmrewind.paths import VmPaths
from vmrewind.ship.meter import unsent
from vmrewind.start.bases import Progress
from vmrewind.start.children import CLEAN, ShipChild
from vmrewind.start.errands import Errands
from vmrewind.start.fallback import begun
from vmrewind.start.keeper_control import KeeperControl
from vmrewind.start.leftovers import clear_leftovers
from vmrewind.start.listening import listen
from vmrewind.start.merger import keep_merged
from vmrewind.start.places import make_places
from vmrewind.start.plan import Plan, Planner
from vmrewind.start.processes import Keeping, Process
from vmrewind.start.serving import Deaths, Serving, Storage
from vmrewind.start.wanted import read_wanted, write_wanted
from vmrewind.vmconfig.model import VmConfig

_SHIP_RESTART_SECONDS: Final = 0.2
_SHIP_STOP_SECONDS: Final = 10.0
_SHIP_FINISH_SECONDS: Final = 7.0
_RETRY_SECONDS: Final = 1.0

T = TypeVar("T")


class Keeper:
    """One run's keeper. ``bring_up`` ends with both children in place and every disk assigned; the CPU may then be started."""

    def __init__(self, storage: Storage, mode: str, owner: tuple[int, int] | None = None, nbd_socket: Path | None = None) -> None:
        self.storage = storage
        self.mode = mode
        self.paths = VmPaths(storage.name)
        self.run = new_run_id()
        self.events = EventLog(self.paths.events(self.run))
        self.after_restart: Callable[[], None] = lambda: None
        """Called when the disks are served again after they were not."""
        self.nbd_socket = nbd_socket or self.paths.nbd_socket
        self._owner = owner
        self._serving: Serving | None = None
        self._ship: ShipChild | None = None
        self._sockets: list[socket.socket] = []
        self._control = KeeperControl({"restart-capture": self._restart_capture})
        self._plan: Plan | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._repository: str | None = None
        self._errands: Errands | None = None
        self._unmade: dict[str, float | None] = {}
        self._stopping = False
        self._qemu_pid: int | None = None
        self._trouble: str | None = None
        self._server_pid: int | None = None
        self._lock = -1
        self._noting_again: asyncio.TimerHandle | None = None
        self._unsent: int | None = 0

    @property
    def bases(self) -> dict[str, str]:
        """The bases that the disks equal at the run's beginning, by target."""
        return dict(self._plan.info.bases) if self._plan is not None else {}

    @property
    def run_name(self) -> str:
        """The run's id as it is written."""
        return run_name(self.run)

    @property
    def serves(self) -> bool:
        """Whether the disks are served now, by capture or without protection."""
        return self._serving is None or self._serving.serves

    @property
    def capture_pid(self) -> int:
        """The living capture's process id."""
        assert self._serving is not None and self._serving.capture is not None, "asked after the start"
        return self._serving.capture.pid

    # -- the order of a start: docs/architecture.md

    async def bring_up(
        self,
        load: Callable[[], VmConfig],
        say: Callable[[str], None],
        progress: Progress | None = None,
        backup: Sequence[str] = (),
    ) -> VmConfig:
        """Create capture, read the configuration, assign the disks, create ship. On failure nothing is left behind.

        ``backup``: disks that get a new base in any case, before they are assigned; ``progress`` is told of that.
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
            self._forget_unbegun()
            raise

    def _forget_unbegun(self) -> None:
        """Of a run without a record nothing is to be left. One with records needs its description, or they are lost."""
        # A journal that cannot be looked at keeps it: a description too many does no harm.
        with contextlib.suppress(OSError, CorruptionError):
            if self._plan is not None and not begun(self.storage.journal, self.run):
                run_path(self.storage.journal, self.run).unlink(missing_ok=True)
                for target, base in self._plan.info.bases.items():
                    if (found := begun_base(self.storage.journal, target)) is not None and found[0] == base:
                        remove(self.storage.journal, target)

    async def _bring_up(
        self, load: Callable[[], VmConfig], say: Callable[[str], None], progress: Progress | None, backup: Sequence[str]
    ) -> VmConfig:
        listeners = (self._listen(self.nbd_socket, self._owner), self._listen(self.paths.control_socket))
        storage = self.storage
        self._serving = Serving(self, self.paths, storage, self.nbd_socket, listeners, say)
        capture = await self._serving.create()
        self.note()
        self.events.write("capture.created", pid=capture.pid, journal=str(storage.journal), bytes=storage.journal_size)

        config = load()
        self.events.write("config.parsed", disks=[disk.target for disk in config.protection.disk])
        config.save(self.paths.config)

        def make_plan() -> Plan:
            planner = Planner.of(config, self.paths, storage.journal, self.events, say, progress, alone=self.mode == "alone")
            return planner.plan(self.run, backup)

        plan = await asyncio.to_thread(make_plan)
        self._rename(plan.info.run)
        self._plan = plan
        write_durably(run_path(storage.journal, self.run), plan.info.to_json())
        ready = await self._serving.assign(config, plan.info, plan.identities)
        self.events.write("disks.assigned", disks=ready["disks"], socket=str(self.nbd_socket))

        self._tasks.append(self._begin("serving", self._serving.keep))
        self._tasks.append(self._begin("merging", lambda: keep_merged(self.paths, storage.journal)))
        await self._control.listen(self._listen(self.paths.keeper_socket))
        if config.protection.repository is not None:
            auto = config.protection.ship == "auto"
            wanted = [disk.target for disk in config.protection.disk] if auto else []
            write_wanted(self.paths, wanted, config.protection.bandwidth_limit)
            repository = config.protection.repository
            self._ship = await self._create_ship(repository)
            self.note()
            self.events.write("ship.created", pid=self._ship.pid, state="auto" if auto else "idle")
            self._tasks.append(self._begin("ship", lambda: self._keep_ship(repository)))
            self._repository = repository
            self._errands = Errands(self.paths, storage.journal, repository, self._begin)
            self._errands.begin_bases(self.run_name, [disk.target for disk in config.protection.disk])
            self._errands.begin_resync(self.run_name, plan.resync, storage.journal_size // 2)
        return config

    def _listen(self, path: Path, owner: tuple[int, int] | None = None) -> socket.socket:
        self._sockets.append(listen(path, owner))
        return self._sockets[-1]

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
            self.note()

    def qemu_started(self, pid: int) -> None:
        """QEMU is there, its CPU still paused."""
        self._qemu_pid = pid
        self.note()
        self.events.write("qemu.started", pid=pid)

    def note_unprotected(self, why: str, server_pid: int | None = None) -> None:
        """The VM was started without protection: of this keeper's children at most a server of its images is alive."""
        self._serving = self._ship = None
        self._trouble = why
        self._server_pid = server_pid
        self.note()

    async def _create_ship(self, repository: str) -> ShipChild:
        return await ShipChild.create(self.paths, self.storage.journal, repository)

    def note(self) -> None:
        """Tell the other commands who is alive: now, or as soon as the file can be written."""
        if self._noting_again is not None:
            self._noting_again.cancel()
        failed_before, self._noting_again = self._noting_again is not None, None
        try:
            self._keeping().write(self.paths)
        except OSError as error:
            if not failed_before:
                self.events.write("keeper.note-failed", error=str(error))
            self._noting_again = asyncio.get_running_loop().call_later(_RETRY_SECONDS, self.note)

    def _keeping(self) -> Keeping:
        own = Process.of(os.getpid())
        assert own is not None, "this process is alive"
        serving = self._serving
        capture = serving.capture.pid if serving is not None and serving.capture is not None else None
        server = serving.server.pid if serving is not None and serving.server is not None else self._server_pid
        ship = self._ship.pid if self._ship is not None else None
        pids = {"capture": capture, "ship": ship, "qemu": self._qemu_pid, "server": server}
        processes = {role: Process.of(pid) for role, pid in pids.items() if pid is not None}
        trouble = serving.trouble if serving is not None else self._trouble
        protected = serving is not None and serving.server is None
        return Keeping(self.run_name, self.mode, own, **processes, trouble=trouble, protected=protected)

    @property
    def left_behind(self) -> list[str]:
        """After the end: in words, what of the run the repository does not have, nothing if it has all."""
        left = []
        if self._unmade:
            name = self.paths.name
            disks = ", ".join(
                f"{target} ({share:.0%} made)" if share is not None else target for target, share in self._unmade.items()
            )
            completes = (
                f"`vmrewind restore {name} --in-place` completes it"
                if (self.storage.journal / FILLING).exists()
                else f"the next start goes on with it, and so does `vmrewind backup {name}`"
            )
            left.append(f"{name}: the base of {disks} is not complete, and nothing can be restored without it: {completes}")
        if self._unsent != 0:
            what = "what" if self._unsent is None else f"{self._unsent} bytes that"
            left.append(
                f"{self.paths.name}: {what} it wrote {'may not be' if self._unsent is None else 'are not'} in the repository: "
                f"`vmrewind ship on {self.paths.name}` carries it; do so before another host takes it over"
            )
        return left

    # -- keeping

    async def _persist(self, what: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do it again until it does not fail: nobody else would, while the VM runs. Each new reason is told once."""
        told = ""
        while True:
            try:
                return await work()
            except Exception as error:  # noqa: BLE001 - see above
                if repr(error) != told:
                    told = repr(error)
                    self.events.write("keeper.failed", what=what, error=told)
            await asyncio.sleep(_RETRY_SECONDS)

    def served_again(self) -> None:
        """Part of ``Serving``'s contract."""
        self.after_restart()

    def goes_on_as(self, info: RunInfo) -> None:
        """Part of ``Serving``'s contract."""
        if self._errands is not None:
            self._errands.give_up()
        self.run = info.run
        self.events = EventLog(self.paths.events(info.run))

    def protected_again(self, info: RunInfo) -> None:
        """Part of ``Serving``'s contract."""
        if self._errands is not None:
            self._errands.begin_resync(run_name(info.run), list(info.gaps), self.storage.journal_size // 2)

    def _begin(self, what: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        return asyncio.create_task(self._persist(what, work))

    async def _restart_capture(self) -> dict[str, Any]:
        assert self._serving is not None, "instructions are taken once the disks are served"
        self.events.write("capture.restart-asked")
        seconds = await self._serving.restart()
        return {"pid": self.capture_pid, "run": self.run_name, "pause_seconds": round(seconds, 3)}

    async def _keep_ship(self, repository: str) -> None:
        deaths = Deaths()
        while True:
            assert self._ship is not None, "ship was created before it is kept"
            ending = await self._ship.wait()
            if self._stopping:
                return
            self.events.write("ship.died", pid=self._ship.pid, ending=ending)
            await asyncio.sleep(_SHIP_RESTART_SECONDS + deaths.pause_seconds())
            self._ship = await self._persist("ship", lambda: self._create_ship(repository))
            self.note()
            self.events.write("ship.restarted", pid=self._ship.pid)

    # -- the end

    async def stop(self) -> None:
        """End the run cleanly: capture first, so that its last records are there for ship to send."""
        self._stopping = True
        await self._control.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._errands is not None:
            await self._errands.stop_resync()
        if self._serving is not None:
            try:
                ending = await self._serving.stop()
            except Exception as error:  # noqa: BLE001 - ship and the sockets are to be ended all the same
                ending = f"failed: {error!r}"
            self.events.write("capture.ended", ending=ending)
        if self._errands is not None and self._plan is not None:
            self._unmade = await self._errands.stop_bases(self._plan.info.disks)
        await self._stop_ship()
        if self._noting_again is not None:
            self._noting_again.cancel()
        for sock in self._sockets:
            sock.close()
        for path in (self.nbd_socket, self.paths.control_socket, self.paths.keeper_socket, self.paths.keeper):
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
        self._unsent = await asyncio.to_thread(self._unsent_bytes)
        self.events.write("ship.ended", ending=ending, unsent_bytes=self._unsent)

    def _unsent_bytes(self) -> int | None:
        """What the run leaves to be carried; None if the journal does not tell."""
        try:
            left = unsent(self.paths.name, self.storage.journal, read_wanted(self.paths))
        except (CorruptionError, OSError):
            return None
        return left.unsent_bytes if left is not None else 0
