"""QEMU around a guest: the command line, the serial console as a file, and a process that is started and stopped."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from guests.kernel import GuestError
from guests.monitor import Monitor

APPEND = "console=ttyS0 quiet loglevel=4 panic=-1 random.trust_cpu=on no_timer_check nokaslr mitigations=off cryptomgr.notests"
"""Serial console; a panic reboots at once, which ``-no-reboot`` turns into QEMU's end.

The check of the timer's interrupt waits for ticks that an emulated machine on a busy host gets too late: it would panic.
An emulated kernel spends an eighth of its boot on what the last three words leave out: hardening, and tests of its own ciphers."""

POLL_SECONDS = 0.01


def qemu_command(
    serial: Path, kernel: Path | None = None, initrd: Path | None = None, append: str = "", memory_mib: int = 192
) -> list[str]:
    """A QEMU command line without any disk, as the ``[qemu] command`` of a configuration wants it.

    Without ``kernel`` the machine boots from its first disk. ``serial`` is the file that gets the console.
    """
    command = ["qemu-system-x86_64", "-accel", "tcg", "-m", str(memory_mib), "-display", "none", "-nodefaults"]
    command += ["-no-reboot", "-serial", f"file:{serial}"]
    if kernel:
        command += ["-kernel", str(kernel), "-append", f"{APPEND} {append}".strip()]
    if initrd:
        command += ["-initrd", str(initrd)]
    return command


def disk_arguments(image: Path, image_format: str = "raw", index: int = 0) -> list[str]:
    """Attach an image as a virtio disk (``vda`` for index 0), without vmrewind."""
    drive = f"if=none,id=disk{index},file={image},format={image_format},discard=unmap"
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive=disk{index},bootindex={index + 1}"]


@dataclass(frozen=True, slots=True)
class Console:
    """A serial console that QEMU writes to a file, whoever started that QEMU."""

    path: Path

    def text(self) -> str:
        """Everything so far; lines end in a newline, whatever the guest's terminal made of it."""
        return self.path.read_text("utf-8", "replace") if self.path.exists() else ""

    def wait_for(
        self, pattern: str, timeout_seconds: float = 60, alive: Callable[[], bool] = lambda: True, after: int = 0
    ) -> re.Match[str]:
        """Wait until the regular expression matches whole lines of the text from position ``after`` on; returns the match.

        Raises GuestError when time is up, or when ``alive`` says that nothing more will come.
        """
        deadline = time.monotonic() + timeout_seconds
        compiled = re.compile(pattern, re.MULTILINE)
        while True:
            was_alive = alive()
            text = self.text()
            # Of a line that is still coming, "$" would match the end: of "ACK 1" before it is "ACK 12".
            if match := compiled.search(text, after, text.rfind("\n") + 1 if was_alive else len(text)):
                return match
            if not was_alive:
                raise GuestError(f"the machine ended without {pattern!r} on {self.path}:\n{self._tail()}")
            if time.monotonic() > deadline:
                raise GuestError(f"no {pattern!r} on {self.path} within {timeout_seconds} s:\n{self._tail()}")
            time.sleep(POLL_SECONDS)

    def _tail(self) -> str:
        return self.text()[-3000:]


class Machine:
    """A running QEMU, started on creation and killed on exit from its ``with`` block.

    ``command`` is a whole QEMU command line whose serial console goes to ``serial``.
    """

    def __init__(self, command: Sequence[str], serial: Path) -> None:
        self.console = Console(serial)
        # Short whatever the directory of the test: a unix socket's path has at most 107 bytes.
        self._directory = tempfile.TemporaryDirectory(prefix="guest-")
        self._qmp = Path(self._directory.name) / "qmp"
        self._log = Path(self._directory.name) / "stderr"
        # QEMU must not outlive a test run that is killed.
        guarded = ["setpriv", "--pdeathsig", "KILL", "--", *command, "-qmp", f"unix:{self._qmp},server=on,wait=off"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(guarded, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
        self._directory.cleanup()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process.pid

    def running(self) -> bool:
        """Whether QEMU lives."""
        return self._process.poll() is None

    def wait_for(self, pattern: str, timeout_seconds: float = 60, after: int = 0) -> re.Match[str]:
        """Wait for a regular expression on the console; fails at once when QEMU ends without it."""
        try:
            return self.console.wait_for(pattern, timeout_seconds, self.running, after)
        except GuestError as error:
            raise GuestError(f"{error}\n{self._log.read_text()}") from None

    def wait(self, timeout_seconds: float = 60) -> int:
        """Wait until QEMU has ended by itself; returns its exit code."""
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise GuestError(f"QEMU still runs after {timeout_seconds} s:\n{self.console.text()[-3000:]}") from None

    def power_button(self) -> None:
        """Press the power button (QMP ``system_powerdown``)."""
        with Monitor(self._qmp) as monitor:
            monitor.execute("system_powerdown")

    def kill(self) -> None:
        """End QEMU the hard way, as a power failure does. Nothing happens if it has ended already."""
        self._process.kill()
        self._process.wait()
