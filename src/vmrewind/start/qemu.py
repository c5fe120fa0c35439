"""QEMU in direct mode: its command line, its start with the CPU paused, and its monitor."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from asyncio.subprocess import DEVNULL, Process
from pathlib import Path
from typing import Any, Final

from qemu.qmp import ExecuteError, QMPClient, QMPError, Runstate

from vmrewind.errors import ConfigError, StartError
from vmrewind.start.environment import users_umask, without_credentials
from vmrewind.vmconfig.model import DiskConfig, VmConfig

RECONNECT_SECONDS: Final = 86_400
"""How long QEMU keeps a request for a capture that is away. The keeper brings one back within a second; the time is long so
that a guest waits rather than sees an error if the keeper itself is gone and somebody has to look."""
_QMP_SECONDS: Final = 30
_QUIT_SECONDS: Final = 10
_STOPPABLE: Final = ("virtio-blk", "scsi-hd", "ide-hd", "usb-storage")


def qemu_command(config: VmConfig, socket: Path | None, monitor: Path) -> list[str]:
    """The configured command line with the CPU paused, a monitor, and every protected disk.

    ``socket`` is capture's; None attaches the images directly, without protection. Raises ConfigError.
    """
    assert config.qemu is not None, "direct mode has a [qemu] table"
    command = list(config.qemu.command)
    for option in ("-daemonize", "--daemonize", "-S", "--S"):
        if option in command:
            raise ConfigError(
                f"{config.source}: qemu.command: {option} cannot be used", "vmrewind starts the CPU and stays in the foreground"
            )
    nodes: list[str] = []
    devices: list[str] = []
    for disk in config.protection.disk:
        nodes += ["-blockdev", json.dumps(_node(disk, socket))]
        if disk.device != "none":
            driver = disk.device.split(",")[0]
            # Should an error ever reach QEMU, the VM pauses instead of passing it to the guest.
            policy = ",werror=stop,rerror=stop" if driver.startswith(_STOPPABLE) and "werror" not in disk.device else ""
            devices += ["-device", f"{disk.device},drive={disk.target},id=vmrewind-{disk.target}{policy}"]
    # Nodes come first: the command line's own options may refer to them.
    return [
        command[0],
        *nodes,
        *command[1:],
        *devices,
        "-S",
        "-chardev",
        f"socket,id=vmrewind-monitor,path={monitor},server=off",
        "-mon",
        "chardev=vmrewind-monitor,mode=control",
    ]


def _node(disk: DiskConfig, socket: Path | None) -> dict[str, Any]:
    protocol: dict[str, Any]
    if socket is not None:
        protocol = {
            "driver": "nbd",
            "server": {"type": "unix", "path": str(socket)},
            "export": disk.target,
            "reconnect-delay": RECONNECT_SECONDS,
            "discard": "unmap",
        }
    else:
        block = Path(disk.image).is_block_device()
        protocol = {"driver": "host_device" if block else "file", "filename": disk.image, "discard": "unmap"}
    if disk.format == "qcow2":
        return {"driver": "qcow2", "node-name": disk.target, "discard": "unmap", "file": protocol}
    if socket is None:
        return {"driver": "raw", "node-name": disk.target, "discard": "unmap", "file": protocol}
    return {**protocol, "node-name": disk.target}


class Qemu:
    """A QEMU that was started paused. ``start_cpu`` lets it go; ``wait`` gives its exit code."""

    def __init__(self, process: Process, monitor: QMPClient) -> None:
        self._process = process
        self._monitor = monitor

    @classmethod
    async def start(cls, config: VmConfig, socket: Path | None, monitor_path: Path) -> Qemu:
        """Start QEMU, CPU paused, and connect to its monitor; raises StartError if it ends at once."""
        command = qemu_command(config, socket, monitor_path)
        monitor_path.unlink(missing_ok=True)
        monitor = QMPClient(config.name)
        await monitor.start_server(str(monitor_path))
        try:
            # In a session of its own: the terminal's Ctrl-C is ours to turn into a proper shutdown.
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=DEVNULL,
                start_new_session=True,
                env=without_credentials(os.environ),
                umask=users_umask(),
            )
        except OSError as error:
            await monitor.disconnect()
            raise StartError(f"{command[0]}: {error.strerror}", "install QEMU, or correct qemu.command") from error
        accepted = asyncio.ensure_future(monitor.accept())
        ended = asyncio.ensure_future(process.wait())
        await asyncio.wait({accepted, ended}, timeout=_QMP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if ended.done() or not accepted.done():
            accepted.cancel()
            with contextlib.suppress(asyncio.CancelledError, QMPError):
                await accepted
            if not ended.done():
                process.kill()
            code = await ended
            raise StartError(f"QEMU ended before its CPU was started (exit code {code})", "its own message is above")
        monitor_path.unlink(missing_ok=True)
        try:
            await accepted
        except (QMPError, ConnectionError, EOFError) as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise StartError(
                f"QEMU ended before its CPU was started (exit code {await ended})", "its own message is above"
            ) from error
        ended.cancel()
        return cls(process, monitor)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def _execute(self, command: str) -> None:
        if self._monitor.runstate is not Runstate.RUNNING:
            return
        with contextlib.suppress(QMPError, ExecuteError, ConnectionError, EOFError):
            await self._monitor.execute(command)

    async def start_cpu(self) -> None:
        """Let the CPU run; raises StartError if QEMU refuses."""
        try:
            await self._monitor.execute("cont")
        except (QMPError, ConnectionError) as error:
            raise StartError(f"QEMU did not start its CPU: {error}") from error

    async def resume(self) -> None:
        """Let a paused CPU run again, if it can."""
        await self._execute("cont")

    async def press_power_button(self) -> None:
        """Ask the guest to shut down."""
        await self._execute("system_powerdown")

    async def quit(self) -> None:
        """End QEMU, guest or no guest, whether it answers or not."""
        try:
            async with asyncio.timeout(_QUIT_SECONDS):
                await self._execute("quit")
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def wait(self) -> int:
        """Wait for QEMU's end; its exit code, negative for a signal."""
        code = await self._process.wait()
        with contextlib.suppress(QMPError, ConnectionError, EOFError, OSError):
            await self._monitor.disconnect()
        return code
