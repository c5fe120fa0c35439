"""Which of a VM's processes are alive: the keeper writes ``keeper.json``, every command reads it.

A pid alone may belong to somebody else by now; together with the time at which the process started it does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vmrewind.journal.owned import require_own
from vmrewind.journal.runs import private
from vmrewind.paths import VmPaths, runtime_root

PID_MAX: Final = 1 << 22
"""The kernel's own limit, on any machine (proc(5), /proc/sys/kernel/pid_max)."""
_RUN: Final = re.compile("[0-9a-f]{16}")

ROLES: Final = ("keeper", "capture", "server", "ship", "qemu")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, recognised by its start time (clock ticks since boot, ``/proc/PID/stat`` field 22)."""

    pid: int
    started_ticks: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The living process with that pid, None if there is none."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        # The command's name, in parentheses, may hold anything: what counts comes behind the last one.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    def note(self) -> dict[str, int | str]:
        """What makes it known to whoever reads that later, after a reboot too."""
        return {"boot": _boot(), **asdict(self)}

    @classmethod
    def noted(cls, plain: Any) -> Process | None:
        """What ``note`` noted; None if it is of another boot, or cannot be read."""
        try:
            return _process(plain) if plain["boot"] == _boot() else None
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return Process.of(self.pid) == self

    def terminate(self) -> None:
        """Send SIGTERM to it, and never to another process that has its pid by now."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive:  # looked at now that the descriptor pins it: the pid cannot go to another process any more
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Keeping:
    """What ``keeper.json`` says: the run and its processes. ``qemu`` is None under libvirt, which has its own."""

    run: str
    mode: str
    keeper: Process
    capture: Process | None = None
    ship: Process | None = None
    qemu: Process | None = None
    server: Process | None = None
    """What serves the disks unprotected, in capture's place."""
    trouble: str | None = None
    """Why a dead capture could not be replaced yet, or why the VM is not protected, with what to do."""
    protected: bool = True
    """False: the VM runs without capture, as ``on_failure`` allows."""

    def write(self, paths: VmPaths) -> None:
        """Replace the file; a reader sees the old or the new one. It lives in memory, so nothing is synced."""
        temporary = paths.keeper.with_name(f".keeper.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", opener=private) as file:
                json.dump({"pid": self.keeper.pid, "boot": _boot(), **asdict(self)}, file)
            temporary.replace(paths.keeper)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, paths: VmPaths) -> Keeping | None:
        """What the last keeper wrote, alive or not; None if there is no file, or none that can be read.

        Raises ConfigError if another user could have written it: it names processes that get signals.
        """
        require_own(paths.runtime, runtime_root())
        try:
            plain = json.loads(paths.keeper.read_bytes())
            if plain.get("boot", _boot()) != _boot():
                return None  # the same pid and ticks may be another process's after a reboot
            # A keeper of an earlier version does not name all of them.
            processes = {role: _process(plain.get(role)) for role in ROLES}
            keeper = processes.pop("keeper")
            run, mode, trouble, protected = plain["run"], plain["mode"], plain.get("trouble"), plain.get("protected", True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        if keeper is None or not isinstance(run, str) or not _RUN.fullmatch(run):
            return None
        if not isinstance(mode, str) or not isinstance(trouble, str | None):
            return None
        return cls(run, mode, keeper, **processes, trouble=trouble, protected=bool(protected))


def _process(plain: Any) -> Process | None:
    if plain is None:
        return None
    pid, ticks = plain["pid"], plain["started_ticks"]
    if type(pid) is not int or type(ticks) is not int or not 0 < pid <= PID_MAX:
        raise ValueError("no process id")
    return Process(pid, ticks)


def _boot() -> str:
    """This boot of the kernel: start times count from it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def running(paths: VmPaths) -> Keeping | None:
    """The VM's processes if it is running under protection: a keeper, who serves its disks, or its QEMU is alive."""
    keeping = Keeping.read(paths)
    if keeping is None:
        return None
    alive = (keeping.keeper, keeping.capture, keeping.server, keeping.qemu)
    return keeping if any(process is not None and process.alive for process in alive) else None
