"""The last resort under libvirt: ``on_failure = "start-unprotected"`` when protection cannot start.

The domain's disks are NBD sources, so somebody has to serve them: QEMU's own storage daemon does, from the same images, on the same
socket, with nothing journaled. The next protected start sees images that the last run did not leave so, and declares the gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from asyncio.subprocess import DEVNULL, Process
from typing import Final

from vmrewind.capture.image import Image
from vmrewind.errors import StartError
from vmrewind.journal.runs import private
from vmrewind.paths import VmPaths
from vmrewind.start.environment import without_credentials
from vmrewind.start.places import make_places
from vmrewind.vmconfig.model import VmConfig

_READY_SECONDS: Final = 20


class UnprotectedServer:
    """A running ``qemu-storage-daemon``."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, config: VmConfig, paths: VmPaths, owner: tuple[int, int]) -> UnprotectedServer:
        """Serve every disk of the configuration; raises StartError if that fails too."""
        make_places(paths, owner)
        paths.nbd_socket.unlink(missing_ok=True)
        for index, disk in enumerate(config.protection.disk):
            # Opening it extends a qcow2 file: an NBD export cannot grow. It also tells at once if somebody else has the image.
            Image(index, disk.target, disk.image, disk.format).close()
        command = ["qemu-storage-daemon"]
        for disk in config.protection.disk:
            try:
                block = stat.S_ISBLK(os.stat(disk.image).st_mode)  # noqa: PTH116 - follows links, as QEMU does
            except OSError as error:
                raise StartError(f"{disk.image}: {error.strerror}", "without its image no VM starts, protected or not") from error
            driver = "host_device" if block else "file"
            filename = disk.image.replace(",", ",,")
            command += ["--blockdev", f"driver={driver},node-name={disk.target},filename={filename},discard=unmap"]
        command += ["--nbd-server", f"addr.type=unix,addr.path={paths.nbd_socket}"]
        for disk in config.protection.disk:
            command += ["--export", f"type=nbd,id={disk.target},node-name={disk.target},name={disk.target},writable=on"]
        mask = os.umask(0o177)
        try:
            with open(paths.log, "ab", opener=private) as log:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=without_credentials(os.environ),
                )
        except OSError as error:
            raise StartError(f"qemu-storage-daemon: {error.strerror}", "apt install qemu-system-common") from error
        finally:
            os.umask(mask)
        deadline = time.monotonic() + _READY_SECONDS
        while not paths.nbd_socket.exists():
            if process.returncode is not None or time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                raise StartError("qemu-storage-daemon does not serve the images either", f"what it said is in {paths.log}")
            await asyncio.sleep(0.02)
        os.chown(paths.nbd_socket, *owner)
        return cls(process)

    async def stop(self) -> None:
        """End it; it syncs its images."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        await self._process.wait()
