"""The last resort: the images served without protection (``on_failure = "start-unprotected"``).

The VM's disks are NBD sources, so somebody has to serve them: QEMU's own storage daemon does, from the same images, on the socket
that capture would serve, with nothing journaled. Capture's next start sees images that the last run did not leave so, or finds the
gap declared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path
from typing import Final

from vmrewind.capture.image import Image
from vmrewind.errors import StartError
from vmrewind.journal.runs import private
from vmrewind.paths import VmPaths
from vmrewind.start.environment import without_credentials
from vmrewind.vmconfig.model import VmConfig

_READY_SECONDS: Final = 20
_GREETING: Final = b"NBDMAGIC"


def prepare_images(config: VmConfig) -> None:
    """Extend qcow2 images: an NBD export cannot grow. It also tells at once if somebody else has an image."""
    for index, disk in enumerate(config.protection.disk):
        Image(index, disk.target, disk.image, disk.format).close()


class UnprotectedServer:
    """A running ``qemu-storage-daemon``."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: VmConfig, paths: VmPaths, nbd_socket: Path, listener: socket.socket) -> UnprotectedServer:
        """Serve every disk of the configuration on ``listener``, bound to ``nbd_socket``; raises StartError if that fails too."""
        command = ["qemu-storage-daemon"]
        for disk in config.protection.disk:
            try:
                block = stat.S_ISBLK(os.stat(disk.image).st_mode)  # noqa: PTH116 - follows links, as QEMU does
            except OSError as error:
                raise StartError(f"{disk.image}: {error.strerror}", "without its image no VM runs, protected or not") from error
            driver = "host_device" if block else "file"
            filename = disk.image.replace(",", ",,")
            command += ["--blockdev", f"driver={driver},node-name={disk.target},filename={filename},discard=unmap"]
        command += ["--nbd-server", f"addr.type=fd,addr.str={listener.fileno()}"]
        for disk in config.protection.disk:
            command += ["--export", f"type=nbd,id={disk.target},node-name={disk.target},name={disk.target},writable=on"]
        try:
            with open(paths.log, "ab", opener=private) as log:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    pass_fds=(listener.fileno(),),
                    env=without_credentials(os.environ),
                )
        except OSError as error:
            raise StartError(f"qemu-storage-daemon: {error.strerror}", "apt install qemu-system-common") from error
        server = cls(process)
        greeted = asyncio.ensure_future(_greeted(nbd_socket))
        ended = asyncio.ensure_future(process.wait())
        await asyncio.wait({greeted, ended}, timeout=_READY_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        serves = not ended.done() and greeted.done() and greeted.result()
        for task in (greeted, ended):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if not serves:
            await server.kill()
            raise StartError("qemu-storage-daemon does not serve the images either", f"what it said is in {paths.log}")
        return server

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait for its end; its exit code, negative for a signal."""
        return await self._process.wait()

    async def kill(self) -> None:
        """End it at once, the socket left to the next one: what it has answered is in the images."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """End it; it syncs its images."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        await self._process.wait()


async def _greeted(nbd_socket: Path) -> bool:
    """Whether a client of the socket is greeted: it is once every image is open."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(nbd_socket))
    except OSError:
        return False
    try:
        return await reader.read(len(_GREETING)) == _GREETING
    except OSError:
        return False
    finally:
        writer.close()
