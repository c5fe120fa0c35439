"""Who serves a VM's disks: capture, the next one when it dies or is replaced, or, if none can live, a server without protection.

The listening sockets outlive them all, so a QEMU whose server is gone finds the next one at once, and sends again what was not
answered.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from vmrewind.errors import StartError, VmrewindError
from vmrewind.journal.events import EventLog
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import ImageIdentity, RunInfo
from vmrewind.paths import VmPaths
from vmrewind.start.children import CLEAN, CaptureChild, assignment
from vmrewind.start.fallback import identities_now, leave_protection, take_back
from vmrewind.start.unprotected import UnprotectedServer
from vmrewind.vmconfig.model import VmConfig

DEATHS_MAX: Final = 5
DEATHS_SECONDS: Final = 60
"""A child that dies so often within this time cannot live: it must not eat the host."""
PATIENCE_SECONDS: Final = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Storage:
    """The storage space that capture is given, known before the configuration is looked at closely."""

    name: str
    journal: Path
    journal_size: int
    local_history: int | None
    """Seconds for which shipped history stays; None: as long as the size allows."""


class Deaths:
    """Counts a child's recent deaths."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=DEATHS_MAX)

    def pause_seconds(self) -> float:
        """One more death: how long to wait before the next start."""
        self._times.append(time.monotonic())
        return PATIENCE_SECONDS if self.too_many else 0.0

    @property
    def too_many(self) -> bool:
        """Whether the child cannot live."""
        return len(self._times) == DEATHS_MAX and time.monotonic() - self._times[0] < DEATHS_SECONDS

    def forget(self) -> None:
        """Count from nothing."""
        self._times.clear()


class Keeper(Protocol):
    """Whom it tells what happens."""

    @property
    def events(self) -> EventLog:
        """The log of the run that is served."""

    def note(self) -> None:
        """Who serves, or what is wrong, has changed."""

    def served_again(self) -> None:
        """The disks are served again after they were not: a VM that has paused on an error can go on."""

    def goes_on_as(self, info: RunInfo) -> None:
        """Protection has ended; another run is to go on behind a gap."""

    def protected_again(self, info: RunInfo) -> None:
        """That run has begun."""


@dataclass(slots=True)
class _Request:
    """A capture that stands by to take the place of whoever serves now, and who waits to hear when it does."""

    child: CaptureChild
    serves: asyncio.Future[None]

    def served(self) -> None:
        """Tell it, unless nobody waits any more."""
        if not self.serves.done():
            self.serves.set_result(None)

    def failed(self, error: VmrewindError) -> None:
        """Tell why not, unless nobody waits any more."""
        if not self.serves.done():
            self.serves.set_exception(error)


class Serving:
    """A run's disks and who serves them. ``create`` and ``assign`` bring capture up, ``keep`` sees that somebody always serves."""

    def __init__(
        self,
        keeper: Keeper,
        paths: VmPaths,
        storage: Storage,
        nbd_socket: Path,
        listeners: tuple[socket.socket, socket.socket],
        say: Callable[[str], None],
    ) -> None:
        self.capture: CaptureChild | None = None
        self.server: UnprotectedServer | None = None
        self.trouble: str | None = None
        """Why nobody serves, or why it is done without protection."""
        self._keeper = keeper
        self._paths = paths
        self._storage = storage
        self._nbd_socket = nbd_socket
        self._listeners = listeners
        self._say = say
        self._config: VmConfig | None = None
        self._info: RunInfo | None = None
        self._identities: Mapping[str, ImageIdentity] = {}
        self._begun = False
        self._serves = False
        self._request: _Request | None = None
        self._asked = asyncio.Event()
        self._restarting = asyncio.Lock()
        self._deaths = Deaths()
        self._unserved_since = 0.0

    @property
    def serves(self) -> bool:
        """Whether anybody serves the disks."""
        return self._serves or self.server is not None

    async def create(self) -> CaptureChild:
        """Create capture and have its storage space allotted."""
        self.capture = await self._create(standby=False)
        return self.capture

    async def assign(self, config: VmConfig, info: RunInfo, identities: Mapping[str, ImageIdentity]) -> Mapping[str, Any]:
        """Hand the disks to capture; returns what it says when it serves them."""
        assert self.capture is not None, "it was created"
        self._config, self._info, self._identities = config, info, identities
        ready = await self.capture.assign(self._assignment())
        self._begun = self._serves = True
        return ready

    def _assignment(self) -> dict[str, Any]:
        assert self._config is not None and self._info is not None, "known since the first assignment"
        given = assignment(self._info, self._identities, self._config, self._paths, self._nbd_socket, *self._listeners)
        # Once the run has begun, a capture that finds no journal of it must not begin one: it was deleted.
        return given | {"resuming": self._begun}

    async def _create(self, *, standby: bool) -> CaptureChild:
        inherit = tuple(listener.fileno() for listener in self._listeners)
        storage = self._storage
        return await CaptureChild.create(
            self._paths, storage.journal, storage.journal_size, inherit, local_history=storage.local_history, standby=standby
        )

    # -- keeping

    async def keep(self) -> None:
        """See that the disks are always served; until it is cancelled. Should it fail, it can be called again."""
        while True:
            request = await self._until_nobody_serves()
            await self._serve_again(request)
            self._keeper.served_again()

    async def _until_nobody_serves(self) -> _Request | None:
        """Wait until whoever serves has died, or was ended for the one that is returned."""
        while self.serves:
            serving = self.server or self.capture
            assert serving is not None, "somebody serves"
            ending = await self._ended_or_asked(serving.wait())
            request = self._take()
            if ending is None and request is None:
                continue  # Whoever asked has thought better of it.
            if ending is not None:
                self._unserved_since = time.monotonic()
                self._serves = False
                if self.server is not None:
                    self._keeper.events.write("unprotected.server-died", pid=serving.pid, exit_code=ending)
                else:
                    self._keeper.events.write("capture.died", pid=serving.pid, ending=ending)
                    pause_seconds = self._deaths.pause_seconds()
                    await asyncio.sleep(0 if request is not None else pause_seconds)
                return request
            assert request is not None, "it was asked for"
            try:
                if isinstance(serving, CaptureChild):
                    self._unserved_since = await serving.hand_over()
                else:
                    self._unserved_since = time.monotonic()
                    await serving.kill()
                self._serves = False
            except BaseException:
                request.failed(StartError("the running capture could not be ended", "the VM's log may tell more"))
                await request.child.kill()
                raise
            return request
        return self._take()

    async def _ended_or_asked(self, ending: Coroutine[Any, Any, T]) -> T | None:
        """How the process ended; None if another one was asked for before."""
        ended = asyncio.ensure_future(ending)
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({ended, asked}, return_when=asyncio.FIRST_COMPLETED)
            return ended.result() if ended.done() else None
        finally:
            ended.cancel()
            asked.cancel()

    def _take(self) -> _Request | None:
        request, self._request = self._request, None
        self._asked.clear()
        return request

    async def _serve_again(self, request: _Request | None) -> None:
        """Try until somebody serves: the guest waits meanwhile, and nothing it was promised is lost."""
        assert self._config is not None, "served before"
        may_leave = self._config.protection.on_failure == "start-unprotected"
        unprotected, self.server = self.server is not None, None
        leave = may_leave and not unprotected and self._deaths.too_many
        while True:
            try:
                if leave and request is None:
                    await self._leave_protection(self.trouble or f"capture died {DEATHS_MAX} times within {DEATHS_SECONDS} s")
                    self._deaths.forget()
                else:
                    await self._put_in_place(request.child if request is not None else await self._create(standby=False))
            except Exception as error:  # noqa: BLE001 - whatever a broken upgrade does, the guest waits for another try
                self._tell(error)
                self._deaths.pause_seconds()
                leave = not leave and may_leave and (unprotected or self._deaths.too_many)
                if request is not None:
                    request.failed(
                        error if isinstance(error, VmrewindError) else StartError(repr(error), "the VM's log may tell more")
                    )
                elif not leave:
                    await asyncio.sleep(PATIENCE_SECONDS)
            else:
                if request is not None:
                    request.served()
                return
            request = self._take()

    async def _put_in_place(self, child: CaptureChild) -> None:
        assert self._info is not None, "assigned before"
        try:
            if not self._begun:
                self._identities = await asyncio.to_thread(identities_now, self._info, self._identities)
            await child.assign(self._assignment())
        except BaseException:
            await child.kill()
            raise
        self.capture, self.trouble, self._serves = child, None, True
        self._keeper.note()
        self._keeper.events.write("capture.restarted", pid=child.pid)
        if not self._begun:
            self._begun = True
            self._keeper.events.write("protection.resumed", run=run_name(self._info.run))
            self._keeper.protected_again(self._info)

    def _tell(self, error: Exception) -> None:
        hint = getattr(error, "hint", "")
        what = str(error) if isinstance(error, VmrewindError | OSError) else repr(error)
        trouble = f"{what} ({hint})" if hint else what
        if trouble != self.trouble:
            self.trouble = trouble
            self._keeper.events.write("capture.restart-failed", error=what, hint=hint)
        self._keeper.note()

    async def _leave_protection(self, why: str) -> None:
        """Serve the images as they are once they hold all that the journal has, and declare the gap."""
        assert self._config is not None and self._info is not None, "served before"
        journal, dirty_map = self._storage.journal, self._paths.dirty_map
        info = await asyncio.to_thread(leave_protection, journal, dirty_map, self._info, self._identities, self._say)
        try:
            self.server = await UnprotectedServer.start(self._config, self._paths, self._nbd_socket, self._listeners[0])
        except BaseException:
            take_back(self._storage.journal, self._info, info)
            raise
        self.capture = None
        self.trouble = why
        lost = {"reason": why, "pid": self.server.pid, "following_run": run_name(info.run)}
        self._keeper.events.write("protection.lost", **lost)
        if info.run != self._info.run:
            self._info, self._begun = info, False
            self._keeper.goes_on_as(info)
            self._keeper.events.write("protection.lost", **lost)
        self._keeper.note()
        self._say(f"{self._storage.name}: NOT PROTECTED: {why}")
        self._say(f"{self._storage.name}: its disks are served unprotected until `vmrewind restart-capture {self._storage.name}`")

    async def restart(self) -> float:
        """Put a new capture in the place of whoever serves; returns for how many seconds nobody did.

        It is started before the other one is ended. Raises what keeps it from starting, and then nothing has changed; or what
        keeps it from serving, and then another one is tried until one does.
        """
        async with self._restarting:
            child = await self._create(standby=True)
            request = self._request = _Request(child, asyncio.get_running_loop().create_future())
            self._asked.set()
            try:
                await request.serves
                return time.monotonic() - self._unserved_since
            finally:
                if self._request is request:
                    # Whoever asked has hung up, or the VM stops, before anybody was ended for it.
                    self._request = None
                    await child.kill()

    # -- the end

    async def stop(self) -> str:
        """End the run cleanly, as far as it has begun; returns how that went."""
        if self.server is not None:
            await self.server.stop()
            return "the images were served unprotected"
        if self.capture is None:
            return "there was none"
        if self._info is None:
            await self.capture.kill()
            return "it served nothing yet"
        ending = await self.capture.stop()
        if ending == CLEAN or not self._begun:
            return ending
        try:
            # It was dead, or too young to be told, or had left the run to one that does not serve yet: another one ends the run,
            # so that no gap is left where nothing happened.
            await self._put_in_place(await self._create(standby=False))
        except Exception as error:  # noqa: BLE001 - the VM has stopped: what could not be ended, its next start recovers
            self._tell(error)
            return ending
        return await self.capture.stop()
