"""The process around shipping: told to start and stop by a file, stopped by SIGTERM, undeterred by a repository that is away.

Until disks are named only the standard library and xxhash are imported.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmrewind.errors import CorruptionError, RepositoryError, VmrewindError
from vmrewind.journal.runs import private, private_directory
from vmrewind.ship.instructions import Instruction, Instructions
from vmrewind.ship.patience import UnreadableNow
from vmrewind.ship.status import Reporter, ShipStatus

if TYPE_CHECKING:
    from vmrewind.ship.shipper import Progress, Shipper

POLL_SECONDS: Final = 0.2
IDLE_POLL_SECONDS: Final = 1.0
RETRY_SECONDS_MIN: Final = 0.5
RETRY_SECONDS_MAX: Final = 30.0
_UNREADABLE: Final = -1
_LEFT: Final = "told to stop with records unsent, they follow at the VM's next start"
FINISH_SECONDS: Final = 5.0
"""For so long what is there is shipped after SIGTERM. Nothing depends on it: the next start goes on from the journal."""


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM; returns the exit code."""
    parser = argparse.ArgumentParser(prog="vmrewind.ship", description="Carries a VM's captured records to its repository.")
    parser.add_argument("--vm", required=True, help="the VM's name")
    parser.add_argument("--journal", required=True, type=Path, help="the journal's directory")
    parser.add_argument("--repository", required=True, help="the repository's URL")
    parser.add_argument("--state", required=True, type=Path, help="the VM's state directory, with ship.json and config.json")
    parser.add_argument("--runtime", required=True, type=Path, help="the VM's runtime directory, for the report")
    parser.add_argument("--finish", action="store_true", help="carry what is there, however long it takes, and end")
    given = parser.parse_args(arguments)
    process = _Process(given.vm, given.journal, given.repository, given.state, given.runtime)
    return process.finish() if given.finish else process.run()


class _Process:
    def __init__(self, vm: str, journal: Path, repository: str, state: Path, runtime: Path) -> None:
        self._vm = vm
        self._journal = journal
        self._repository = repository
        self._state = state
        self._instructions = Instructions(state / "ship.json")
        self._reporter = Reporter(runtime)
        self._instruction = Instruction()
        self._shipper: Shipper | None = None
        self._stopping = False
        self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._error = ""
        self._failed_at = 0.0
        self._retry_at = 0.0
        self._retry_seconds = 0.0

    def run(self) -> int:
        signal.set_wakeup_fd(self._wakeup[1])
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGALRM, self._give_up)
        with self._lock() as locked:
            while locked and not self._stopping:
                self._wait(self._turn())
            if locked:
                self._drain(time.monotonic() + FINISH_SECONDS)
                self._reporter.remove()
        return 0

    def finish(self) -> int:
        """Carry what is there and end: 0 if the repository then has everything, else the exit code of what keeps it from that."""
        with self._lock() as locked:
            if not locked:
                return RepositoryError.exit_code
            try:
                return self._finish()
            finally:
                self._reporter.remove()

    def _finish(self) -> int:
        while True:
            code = self._drain(deadline=float("inf"))
            if code != _UNREADABLE or self._stopping:
                return CorruptionError.exit_code if code == _UNREADABLE else code
            # Nobody else tries again.
            self._report("waiting", self._instruction.disks)
            self._wait(RETRY_SECONDS_MAX)

    def _stop(self, *_: object) -> None:
        self._stopping = True
        # A repository that hangs in the middle of a put must not hold up the VM's stop.
        signal.alarm(int(FINISH_SECONDS) + 2)

    def _give_up(self, *_: object) -> None:
        self._say("the repository does not answer; what is not shipped yet follows at the VM's next start")
        os._exit(0)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[bool]:
        """One ship for a VM on this host: wait for a former one to end. Gives False if told to stop meanwhile."""
        private_directory(self._state)
        with open(self._state / "ship.lock", "wb", opener=private) as file:
            while not self._stopping:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._wait(POLL_SECONDS)
                    continue
                break
            yield not self._stopping

    def _wait(self, seconds: float) -> None:
        """Until the time is over or a signal comes."""
        if seconds > 0 and not self._stopping and select.select([self._wakeup[0]], [], [], seconds)[0]:
            os.read(self._wakeup[0], 4096)

    def _turn(self) -> float:
        """One look at what is to be done; returns how long there is nothing to do."""
        disks = self._instructed()
        if not disks:
            self._switch_off()
            self._report("idle", disks)
            return IDLE_POLL_SECONDS
        if time.monotonic() < self._retry_at:
            self._report("waiting", disks)
            return POLL_SECONDS
        try:
            wait_seconds = self._ready().step(disks)
        except (VmrewindError, OSError) as error:
            self._failed(error)
            self._report("waiting", disks)
            return POLL_SECONDS
        self._succeeded()
        self._report("shipping", disks)
        return wait_seconds

    def _ready(self) -> Shipper:
        if self._shipper is None:
            from vmrewind.ship.shipper import Shipper

            self._shipper = Shipper(self._vm, self._journal, self._repository, self._state, self._meanwhile)
        self._shipper.pace.limit = self._instruction.bandwidth_limit
        return self._shipper

    def _instructed(self) -> tuple[str, ...]:
        """The disks to carry now."""
        self._instruction = self._instructions.read()
        return self._instruction.disks

    def _meanwhile(self) -> None:
        """The repository makes us wait: what is said of the lag must not grow old."""
        self._report("waiting" if self._error else "shipping", self._instruction.disks)

    def _switch_off(self) -> None:
        if self._shipper is None:
            return
        try:
            self._shipper.finish()
        except (VmrewindError, OSError) as error:
            self._say(f"switched off with records unsent: {_words(error)}")
        self._shipper = None
        self._error, self._retry_at, self._retry_seconds = "", 0.0, 0.0

    def _drain(self, deadline: float) -> int:
        """Carry what is there until ``deadline`` (monotonic seconds); 0, or an exit code if something is left.

        ``_UNREADABLE`` is for what storage does not give back now, and may yet.
        """
        disks = self._instructed()
        if not disks:
            return 0
        try:
            shipper = self._ready()
            while (seconds := shipper.step(disks, hurry=True)) == 0.0 or shipper.held_back:
                if time.monotonic() >= deadline:
                    self._say(_LEFT)
                    return RepositoryError.exit_code
                self._report("shipping", disks)
                time.sleep(seconds)
            if (words := shipper.waits_for) is None:
                return 0
            code = _UNREADABLE
        except (VmrewindError, OSError) as error:
            words = _words(error)
            code = error.exit_code if isinstance(error, VmrewindError) else RepositoryError.exit_code
            if isinstance(error, UnreadableNow):
                code = _UNREADABLE
            if self._shipper is not None:
                self._shipper.reset()
        if words != self._error:
            self._error = words
            left = "records are left unsent" if deadline == float("inf") else _LEFT
            self._say(f"{left}: {words}")
        return code

    def _failed(self, error: VmrewindError | OSError) -> None:
        if not self._error:
            self._failed_at = time.monotonic()
        if str(error) != self._error:
            self._say(f"{_words(error)}; trying again for as long as it takes")
        self._error = str(error)
        self._retry_seconds = min(max(2 * self._retry_seconds, RETRY_SECONDS_MIN), RETRY_SECONDS_MAX)
        self._retry_at = time.monotonic() + self._retry_seconds
        if self._shipper is not None:
            self._shipper.reset()

    def _succeeded(self) -> None:
        if self._error:
            self._say(f"shipping again after {time.monotonic() - self._failed_at:.0f} s")
            self._error, self._retry_seconds = "", 0.0

    def _report(self, state: str, disks: tuple[str, ...]) -> None:
        if not self._reporter.due:
            return
        pid = os.getpid()
        error = self._error or (self._shipper.waits_for if self._shipper is not None else None) or None
        limit = self._instruction.bandwidth_limit
        if self._shipper is None:
            self._reporter.write(ShipStatus(pid, state, disks, error=error, bandwidth_limit=limit))
            return
        try:
            now: Progress | None = self._shipper.progress()
        except (VmrewindError, OSError):
            now = None  # the journal cannot be read: the next step says so
        if now is None or now.run is None:
            self._reporter.write(
                ShipStatus(pid, "waiting", disks, unsent_bytes=None, lag_seconds=None, error=error, bandwidth_limit=limit)
            )
            return
        self._reporter.write(
            ShipStatus(
                pid, state, disks, f"{now.run:016x}", now.shipped_seq, now.shipped_time_ns, now.unsent_bytes, now.lag_seconds,
                error, limit, self._shipper.superseded, self._shipper.baseless,
            )
        )  # fmt: skip

    def _say(self, what: str) -> None:
        print(f"ship: {self._vm}: {what}", file=sys.stderr, flush=True)  # noqa: T201


def _words(error: VmrewindError | OSError) -> str:
    """On one line, as a log wants it."""
    return " ".join((error.in_full if isinstance(error, VmrewindError) else str(error)).split())
