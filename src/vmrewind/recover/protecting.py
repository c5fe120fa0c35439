"""A booted moment that becomes a protected VM of its own: every write from the first one on is journaled, by a capture of its own.

Its disks are images that come to hold the moment while the VM runs (``filling``), its first bases are the moment itself, made of
the other VM's history meanwhile (``start/origins.py``). Neither is needed before the guest runs, and neither's loss costs a write:
what the guest wrote is in the journal, and what it wrote on is the moment. Once the images are complete, QEMU is led from this
process's server to capture itself.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from qemu.qmp import QMPClient

from vmrewind.history.view import View
from vmrewind.journal.runs import Position, sync_directory, write_durably
from vmrewind.paths import VmPaths
from vmrewind.recover.completing import Completing
from vmrewind.recover.filling import Filling
from vmrewind.recover.keep import KeptVm, kept_toml, make_directory, until_ended
from vmrewind.recover.restore import Progress
from vmrewind.start.keeping import Keeper
from vmrewind.start.serving import Storage
from vmrewind.vmconfig.model import VmConfig
from vmrewind.vmconfig.toml import load_toml


class Protecting:
    """The VM ``vm`` in ``directory``, which is made: its TOML file and an image for each disk. ``formats``: of those, by target.

    ``of`` and ``position``: the VM, as commands take it, and the moment that it begins from. ``document``: the TOML file in force
    then. Raises ConfigError, UsageError.
    """

    def __init__(
        self,
        directory: Path,
        formats: Mapping[str, str],
        document: bytes,
        vm: KeptVm,
        of: str,
        position: Position,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._directory = directory.absolute()
        self.images = {target: self._directory / f"{target}.{kind}" for target, kind in formats.items()}
        text = kept_toml(document, self.images, vm)
        self._paths = VmPaths(vm.name)
        make_directory(directory)
        self._path = self._directory / f"{vm.name}.toml"
        self._origin = (of, position)
        self._say = say
        self._repository = vm.repository
        self._completing = Completing(self._paths, self.images, progress, say)
        self.hand_over: Callable[[Path], None] = lambda _: None
        """Leads QEMU to who listens at a socket."""
        self._keeper: Keeper | None = None
        self._ran = False
        self._stop = asyncio.Event()
        self._filling: asyncio.Task[None] | None = None
        self._uuid: str | None = None
        try:
            self._completing.claim()
            write_durably(self._path, text)
            self.config: VmConfig = load_toml(self._path)
        except BaseException:
            self.give_up()
            raise

    @property
    def socket(self) -> Path:
        """Where QEMU connects to: this process first, then capture."""
        return self._paths.nbd_socket

    def filling(self, target: str, view: View) -> Filling:
        """A disk that QEMU is to run on. Raises ImageError, SpaceError."""
        return self._completing.filling(target, view)

    def give_up(self) -> None:
        """Remove everything, unless a guest has run."""
        if not self._ran:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._completing.give_up(self._repository, self._uuid)

    async def begin(self) -> None:
        """Bring capture and ship up, with the disks assigned. Raises what stops a start."""
        of, position = self._origin
        assert self.config.uuid is not None, "it was given one"
        self._uuid = self.config.uuid
        self._completing.note(of, position, self._uuid)
        sync_directory(self._directory)
        given = self.config.protection
        storage = Storage(self.config.name, self._paths.default_journal, given.journal_size, given.local_history)
        keeper = Keeper(storage, "direct", nbd_socket=self._paths.filling_socket)
        await keeper.bring_up(lambda: self.config, self._say)
        self._keeper = keeper

    async def accompany(self, pid: int, monitor: QMPClient, ended: asyncio.Future[int], stop: asyncio.Event) -> int:
        """Complete the images while QEMU runs, and stay until it has ended. A first signal presses the power button."""
        assert self._keeper is not None, "it was begun"
        self._ran = True
        self._stop = stop
        self._keeper.qemu_started(pid)
        self._keeper.events.write("cpu.started")
        self._filling = asyncio.create_task(self._fill())
        return await until_ended(monitor, ended, stop, self._say)

    async def end(self) -> None:
        """Complete the images, if nobody is in a hurry, and end the run."""
        assert self._keeper is not None, "it was begun"
        name = self.config.name
        try:
            if self._filling is not None and not self._filling.done():
                self._stop.clear()
                self._say(f"{name} has ended, and its images are completed; Ctrl-C leaves that to a later command")
                asked = asyncio.ensure_future(self._stop.wait())
                await asyncio.wait({self._filling, asked}, return_when=asyncio.FIRST_COMPLETED)
                asked.cancel()
        finally:
            self._completing.stop()
            if self._filling is not None:
                await self._filling
            await self._keeper.stop()
            self.socket.unlink(missing_ok=True)
        if not self._ran:
            return
        for words in self._keeper.left_behind:
            self._say(words)
        if self._completing.lacking:
            self._say(f"{name}: its images are not complete: `vmrewind restore {name} --in-place` completes them")

    async def _fill(self) -> None:
        """Never raises: the guest runs on."""
        try:
            await asyncio.to_thread(self._completing.run)
            if not self._completing.complete:
                return
            # It may start on them by now.
            await asyncio.to_thread(self.hand_over, self._paths.filling_socket)
            self._say(f"kept: {self._path}; {self.config.name} runs on its own images from here on")
        except Exception as error:  # noqa: BLE001 - see above
            self._say(f"{self.config.name}: {error!r}: its disks stay behind this command until it ends")
