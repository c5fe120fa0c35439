"""A booted moment that is to stay: QEMU copies its disks to full images while the VM runs, and goes on with those.

QEMU's own mirror does it: what the guest sees is copied, so that an image stands alone, whatever the disk was made of. When all
disks are level, each is switched over to its image, and a configuration is written beside them: until then nothing was kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tomlkit
from qemu.qmp import ExecuteError, QMPClient, QMPError

from vmrewind.errors import ImageError, StartError, UsageError, VmrewindError
from vmrewind.journal.runs import sync_directory, write_durably
from vmrewind.recover.restore import Progress
from vmrewind.vmconfig.beside import random_mac
from vmrewind.vmconfig.relocate import relocate_toml

_POLL_SECONDS: Final = 0.2
_SHUTDOWN_SECONDS: Final = 60
_RESUME_SECONDS: Final = 2
_MAC: Final = re.compile(r"(?<=mac=)[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}")


@dataclass(frozen=True, slots=True)
class KeptVm:
    """The VM that the copy is to be: its name, its repository's URL, whether it is protected."""

    name: str
    repository: str
    protect: bool


def kept_toml(document: bytes, images: Mapping[str, Path], vm: KeptVm) -> bytes:
    """The TOML file of a VM of its own: other name, uuid, MAC addresses and images, raw unless it is protected. Raises ConfigError.

    A protected one has the moment's images as they are, since its history begins with them; others are QEMU's copy of the disks.
    """
    content = tomlkit.parse(relocate_toml(document, images, vm.repository, str(uuid.uuid4()), None).decode())
    plain: Any = content
    plain["name"] = vm.name
    plain["protection"]["enabled"] = vm.protect
    for disk in plain["protection"]["disk"] if not vm.protect else ():
        disk["format"] = "raw"
    plain["qemu"]["command"] = [_MAC.sub(lambda _: random_mac(), str(word)) for word in plain["qemu"]["command"]]
    return tomlkit.dumps(content).encode()


def make_directory(directory: Path) -> None:
    """Make the directory for a VM that is to stay. Raises UsageError."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        raise UsageError(f"{directory} exists; nothing is overwritten", "name another directory with --keep") from None
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror}", "name another directory with --keep") from error


class Keeping:
    """Copies the disks ``targets`` into ``directory``, which it makes, and writes ``document``'s VM beside them."""

    def __init__(
        self,
        directory: Path,
        targets: list[str],
        document: bytes,
        vm: KeptVm,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._directory = directory.absolute()
        self._images = {target: self._directory / f"{target}.raw" for target in targets}
        # What cannot become a configuration is refused before anything is started.
        self._document = kept_toml(document, self._images, vm)
        self.config = self._directory / f"{vm.name}.toml"
        self._progress = progress
        self._say = say
        make_directory(directory)
        self.done = False

    def give_up(self) -> None:
        """Remove what was copied, unless all of it is there."""
        if not self.done:
            shutil.rmtree(self._directory, ignore_errors=True)

    async def begin(self) -> None:
        """Nothing: QEMU does it all."""

    async def accompany(self, _pid: int, monitor: QMPClient, ended: asyncio.Future[int], stop: asyncio.Event) -> int:
        """Copy while QEMU runs, then stay until it has ended. A guest that shuts down waits for the copy, by -no-shutdown.

        A first signal presses the power button once the copy is there; before, it ends all, as does a second one.
        """
        asked = asyncio.ensure_future(stop.wait())
        copying = asyncio.ensure_future(self._copy(monitor))
        happening: set[asyncio.Future[Any]] = {ended, asked, copying}
        await asyncio.wait(happening, return_when=asyncio.FIRST_COMPLETED)
        if not copying.done():
            copying.cancel()
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError, QMPError, ConnectionError, EOFError):
                await copying
            raise VmrewindError("ended before the copy was complete: nothing was kept", "boot it again, and let the copy end")
        try:
            await copying
        except ExecuteError as error:
            raise StartError(
                f"QEMU does not copy the disks: {error}", "boot it without --keep, or restore with --output"
            ) from error
        except (QMPError, ConnectionError, EOFError) as error:
            raise StartError("QEMU ended before the copy was complete: nothing was kept", "its own message is above") from error
        write_durably(self.config, self._document)
        sync_directory(self._directory)
        self.done = True
        self._say(f"kept: {self.config}; the VM runs on its own images from here on")
        asked.cancel()
        return await until_ended(monitor, ended, stop, self._say)

    async def end(self) -> None:
        """Nothing is left to be done."""

    async def _copy(self, monitor: QMPClient) -> None:
        """Raises ImageError, and what QEMU says."""
        nodes: Any = await monitor.execute("query-named-block-nodes", {"flat": True})
        sizes = {node["node-name"]: int(node["image"]["virtual-size"]) for node in nodes}
        for number, (target, image) in enumerate(self._images.items()):
            fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.truncate(fd, sizes[target])
            finally:
                os.close(fd)
            file = {"driver": "file", "filename": str(image), "discard": "unmap"}
            await monitor.execute("blockdev-add", {"driver": "raw", "node-name": f"kept{number}", "discard": "unmap", "file": file})
            await monitor.execute(
                "blockdev-mirror",
                {
                    "job-id": _job(target),
                    "device": target,
                    "target": f"kept{number}",
                    "sync": "full",
                    # What the guest writes goes to both, so that a busy guest cannot keep the copy from becoming level.
                    "copy-mode": "write-blocking",
                    "auto-dismiss": False,
                },
            )
        waiting = {_job(target): target for target in self._images}
        ready: set[str] = set()
        while waiting:
            jobs: Any = await monitor.execute("query-jobs")
            for job in jobs:
                name, status = job["id"], job["status"]
                if name not in waiting:
                    continue
                self._progress(f"copy of {waiting[name]}", int(job["current-progress"]), int(job["total-progress"]))
                if status == "concluded":
                    if error := job.get("error"):
                        raise ImageError(f"disk {waiting[name]}: QEMU could not copy it: {error}", "make room, then boot it again")
                    await monitor.execute("job-dismiss", {"id": name})
                    del waiting[name]
                elif status == "ready":
                    ready.add(name)
            if ready and ready >= waiting.keys():
                # All are level: from here on they are switched over one after the other, each without a pause.
                for name in ready:
                    await monitor.execute("job-complete", {"id": name})
                ready = set()
            await asyncio.sleep(_POLL_SECONDS)
        for image in self._images.values():
            fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
            try:
                await asyncio.to_thread(os.fsync, fd)
            finally:
                os.close(fd)


async def until_ended(monitor: QMPClient, ended: asyncio.Future[int], stop: asyncio.Event, say: Callable[[str], None]) -> int:
    """Wait until a guest has shut down; its QEMU's exit code, 0 while that still runs.

    The first ``stop`` presses the power button; a second one, or too long a wait, ends the waiting.
    """
    pressed_at = None
    paused_at = None
    now = asyncio.get_running_loop().time
    while not ended.done() and (status := await _status(monitor)) != "shutdown":
        if status == "io-error" and (paused_at is None or now() > paused_at + _RESUME_SECONDS):
            if paused_at is None:
                say("the guest waits: a disk of it refuses to be read or written, for want of room above all; that is tried again")
            paused_at = now()
            with contextlib.suppress(QMPError):
                await monitor.execute("cont")
        if stop.is_set():
            stop.clear()
            if pressed_at is not None:
                break
            say(f"asked the guest to shut down (up to {_SHUTDOWN_SECONDS} s; once more to end it now)")
            pressed_at = now()
            with contextlib.suppress(QMPError):
                await monitor.execute("system_powerdown")
        if pressed_at is not None and now() > pressed_at + _SHUTDOWN_SECONDS:
            break
        await asyncio.wait({ended}, timeout=_POLL_SECONDS)
    return ended.result() if ended.done() else 0


async def _status(monitor: QMPClient) -> str:
    try:
        found: Any = await monitor.execute("query-status")
    except (QMPError, ConnectionError, EOFError):
        return "shutdown"
    return str(found["status"])


def _job(target: str) -> str:
    return f"keep-{target}"
