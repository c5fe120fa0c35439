"""Which of a VM's processes are alive: the keeper writes ``keeper.json``, every command reads it.

A pid alone may belong to somebody else by now; together with the time at which the process started it does not.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from vmrewind.paths import VmPaths


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

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return Process.of(self.pid) == self


@dataclass(frozen=True, slots=True)
class Keeping:
    """What ``keeper.json`` says: the run and its processes. ``qemu`` is None under libvirt, which has its own."""

    run: str
    mode: str
    keeper: Process
    capture: Process | None = None
    ship: Process | None = None
    qemu: Process | None = None
    trouble: str | None = None
    """Why a dead capture could not be replaced yet, with what to do."""

    def write(self, paths: VmPaths) -> None:
        """Replace the file; a reader sees the old or the new one. It lives in memory, so nothing is synced."""
        temporary = paths.keeper.with_name(f".keeper.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"pid": self.keeper.pid, **asdict(self)}))
        temporary.replace(paths.keeper)

    @classmethod
    def read(cls, paths: VmPaths) -> Keeping | None:
        """What the last keeper wrote, alive or not; None if there is no file, or none that can be read."""
        try:
            plain = json.loads(paths.keeper.read_bytes())
            processes = {role: Process(**plain[role]) if plain[role] else None for role in ("keeper", "capture", "ship", "qemu")}
            keeper = processes.pop("keeper")
            if keeper is None:
                return None
            return cls(plain["run"], plain["mode"], keeper, **processes, trouble=plain.get("trouble"))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def running(paths: VmPaths) -> Keeping | None:
    """The VM's processes if it is running under protection: a keeper, a capture or its QEMU is alive."""
    keeping = Keeping.read(paths)
    if keeping is None:
        return None
    alive = (keeping.keeper, keeping.capture, keeping.qemu)
    return keeping if any(process is not None and process.alive for process in alive) else None
