"""A VM whose processes are killed, life after life, and what must hold of guest, image and history through all of it."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from guests.protected import ProtectedVm, vmrewind
from guests.writer import acknowledged, content, errors
from tests.capture_tools import until
from tests.e2e.test_direct_mode import processes_of
from tests.vm_tools import files_in, restore, writer_vm
from vmrewind.paths import VmPaths
from vmrewind.start.processes import Keeping, Process

ROLES = ("capture", "ship", "keeper", "qemu")
EVERY_VICTIM = [(role,) for role in ROLES] + list(itertools.combinations(ROLES, 2))
"""Each process alone, and each two at once."""
_DELAY_SECONDS_MAX = 0.5
_KIB = 8
_PAUSE_MS = 10
_DISK_BYTES = 64 << 20


@dataclass(slots=True)
class Mortal:
    """A VM with a writing guest, and what is known of it: ``noted`` are times with what the guest had been told is safe by then."""

    directory: Path
    chance: random.Random
    vm: ProtectedVm = field(init=False)
    safe: set[int] = field(default_factory=set)
    noted: list[tuple[str, set[int]]] = field(default_factory=list)
    begun: set[int] = field(default_factory=set)
    """What the guest may have written when a life ended, without being told that it is safe."""
    gap_due: bool = False
    """Nobody was left who knew what the images hold."""
    ended_well: bool = False
    """The last life was ended by a power failure of the guest alone."""

    def __post_init__(self) -> None:
        self.vm = writer_vm(self.directory, "mortal", kib=_KIB, pause_ms=_PAUSE_MS, size_bytes=_DISK_BYTES)

    def keeping(self) -> Keeping:
        """What the keeper last wrote."""
        found = Keeping.read(VmPaths("mortal"))
        assert found is not None
        return found

    def process(self, role: str) -> Process | None:
        """The process that has the role now, if it is alive."""
        process: Process | None = getattr(self.keeping(), role)
        return process if process is not None and process.alive else None

    def acknowledged(self) -> set[int]:
        """What the guest was told is safe, in this life."""
        return set(acknowledged(self.vm.console.text()))

    def note(self) -> None:
        """This instant: what the console shows is read before the clock is."""
        known = self.safe | self.acknowledged()
        self.noted.append((datetime.now(UTC).isoformat(), known))

    def goes_on(self, count: int = 3) -> None:
        """The guest writes on."""
        last = max(self.acknowledged())
        self.vm.console.wait_for(f"^ACK {last + count}$", 60)

    def begin(self) -> None:
        """Start the VM; a gap that a death of all who know has left is closed before this returns."""
        self.vm.console.path.unlink(missing_ok=True)
        self.vm.start()
        self.vm.wait_for(r"^ACK \d+$")
        begun = [event["event"] for event in self.vm.events()]
        assert ("history.gap" in begun) == self.gap_due
        if self.gap_due:
            until(lambda: any(event["event"] == "resync.done" for event in self.vm.events()), "the resync")
        self.goes_on(1)

    def strike(self, victims: Sequence[str], number: signal.Signals = signal.SIGKILL) -> None:
        """Signal processes at a random instant of the guest's writing."""
        self.note()
        pids = [process.pid for role in victims if (process := self.process(role)) is not None]
        assert len(pids) == len(victims)
        # Spun, not slept: the instant is to fall anywhere in what the others do.
        until_ns = time.monotonic_ns() + int(self.chance.uniform(0, _DELAY_SECONDS_MAX) * 1e9)
        while time.monotonic_ns() < until_ns:
            pass
        for pid in pids:
            os.kill(pid, number)

    def kill(self, victims: Sequence[str]) -> bool:
        """Kill processes and see what must follow; False if that was the end of this life."""
        before = self.keeping()
        self.gap_due = {"keeper", "capture"} <= set(victims)
        self.strike(victims)
        if "qemu" in victims:
            assert self.vm.wait() == (-signal.SIGKILL if "keeper" in victims else 128 + signal.SIGKILL)
            return False
        if "keeper" in victims:
            self._orphaned(guest_runs="capture" not in victims)
            assert before.qemu is not None
            os.kill(before.qemu.pid, signal.SIGKILL)
            until(lambda: self.process("qemu") is None, "QEMU's end")
            return False
        self.goes_on()
        for role in victims:
            until(lambda role=role: self.process(role) not in (None, getattr(before, role)), f"another {role}")
        return True

    def _orphaned(self, *, guest_runs: bool) -> None:
        """The keeper is dead: a guest whose capture lives goes on, and nobody may start the VM beside it."""
        assert self.vm.wait() == -signal.SIGKILL
        assert any("keeper" in problem for problem in self.vm.status()["problems"])
        assert vmrewind("run", self.vm.config, check=False).returncode == 8
        if guest_runs:
            self.goes_on()
            assert vmrewind("restart-capture", self.vm.config, check=False).returncode == 8

    def pause(self, role: str, seconds: float) -> None:
        """Stop a process for so long and let it go on: nobody but the clock notices."""
        self.strike([role], signal.SIGSTOP)
        ends_ns = time.monotonic_ns() + int(seconds * 1e9)
        until(lambda: time.monotonic_ns() > ends_ns, "the time")
        process = self.process(role)
        assert process is not None
        os.kill(process.pid, signal.SIGCONT)
        self.goes_on()

    def end(self, *, alive: bool) -> None:
        """End this life, and count what the guest was told is safe in it; it has seen no error."""
        self.ended_well = alive
        if alive:
            self.note()
            self.vm.quit()
            self.gap_due = False
        assert errors(self.vm.console.text()) == []
        self.safe |= self.acknowledged()
        self.begun |= {max(self.safe) + 1, max(self.safe) + 2}

    def _check(self, image: Path, scratch: str, safe: set[int]) -> None:
        """The disk holds what is safe, whole, and nothing that the guest had not begun to write by then."""
        found = files_in(image, self.directory / scratch)
        assert [number for number in safe if found.get(number) != content(number, kib=_KIB)] == []
        assert set(found) - safe <= self.begun | {max(safe) + 1, max(safe) + 2}
        image.unlink()

    def judge(self, moments: int) -> None:
        """Everything safe is in image and history; so many of the moments noted are restored and compared."""
        if not self.ended_well:
            self.begin()
            self.end(alive=True)
        assert processes_of(self.vm) == []
        assert self.vm.status()["problems"] == []
        left = [path.name for path in VmPaths("mortal").runtime.iterdir() if path.name not in ("keeper.lock", "ship.json")]
        left += [path.name for path in VmPaths("mortal").state.rglob(".*")]
        assert left == []
        image = (self.directory / "vda.raw").read_bytes()
        restore(self.vm, "latest", self.directory / "latest")
        assert (self.directory / "latest" / "vda.raw").read_bytes() == image
        self._check(self.directory / "latest" / "vda.raw", "files", self.safe)
        chosen = self.noted if moments >= len(self.noted) else self.chance.sample(self.noted, moments)
        for at, (moment, known) in enumerate(chosen):
            restore(self.vm, moment, self.directory / f"at-{at}")
            self._check(self.directory / f"at-{at}" / "vda.raw", f"files-{at}", known)
