"""A drill: a moment restored into scratch space and booted without any network, until a sign of life appears.

Nothing is left behind: the scratch directory is removed and QEMU is ended, by its process id, however the drill ends.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import MomentError, SpaceError, StartError, UsageError
from vmrewind.history.configuration import config_of
from vmrewind.history.coverage import common
from vmrewind.history.history import History
from vmrewind.history.moments import format_time
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.journal.runs import Position
from vmrewind.recover.drill_machine import DrillMachine, machine_of
from vmrewind.recover.restore import Progress, RestoredDisk, restore
from vmrewind.start.environment import without_credentials
from vmrewind.start.readiness import readable
from vmrewind.start.signals import uninterrupted

_SPARE_BYTES: Final = 256 << 20
"""What the guest may write while it boots, besides a tenth of what was restored."""
_CONSOLE_MAX: Final = 1 << 20
_ASK_SECONDS: Final = 1.0
"""Between two questions to the guest agent."""
_TAIL_LINES: Final = 15
_REASON_LINES: Final = 3


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a drill does: ``until`` is the text to wait for on the serial console (None: the guest agent's answer)."""

    until: str | None
    seconds: float
    scratch: Path


@dataclass(frozen=True, slots=True)
class Result:
    """How it went. ``outcome``: what was seen; ``console``: its last lines."""

    passed: bool
    outcome: str
    disks: Sequence[RestoredDisk]
    restore_seconds: float
    boot_seconds: float
    left_out: Sequence[str]
    console: str


def random_moment(history: History, targets: Sequence[str], seed: int) -> Position:
    """A moment at which every disk can be restored, each instant of all the coverage as likely as any other. Raises MomentError."""
    branch = history.branch()
    coverages = [history.coverage(target, branch) for target in targets]
    newest = max((c.intervals[-1].last.time_ns for c in coverages if c.intervals), default=0)
    spans = [(since, newest if until is None else until) for since, until in common(coverages)]
    spans = [(since, until) for since, until in spans if until >= since]
    if not spans:
        return resolve(history, branch, "latest", targets)  # which tells why there is none
    chance = random.Random(seed)
    since, until = chance.choices(spans, [until - since + 1 for since, until in spans])[0]
    return resolve(history, branch, format_time(chance.randint(since, until)), targets)


def drill(history: History, targets: Sequence[str], position: Position, wanted: Wanted, progress: Progress) -> Result:
    """Restore the disks at a position and boot them. Raises what keeps it from being tried; that it does not boot is a result."""
    machine = _machine(history, position)
    with _scratch(wanted.scratch) as directory:
        _check_space(history, targets, position, directory)
        begun = time.monotonic()
        restored = restore(history, targets, position, directory, progress)
        restore_seconds = time.monotonic() - begun
        begun = time.monotonic()
        passed, outcome, console = boot_until(lambda fd: machine.with_disks(restored.disks, fd), wanted.until, wanted.seconds)
        boot_seconds = time.monotonic() - begun
    tail = "\n".join(console.splitlines()[-_TAIL_LINES:])
    return Result(passed, outcome, restored.disks, restore_seconds, boot_seconds, machine.left_out, tail)


def _machine(history: History, position: Position) -> DrillMachine:
    """The machine of the configuration that was in force at a position."""
    repository = history.reachable_repository("the configuration")
    name = config_of(history, repository, position)
    if name is None:
        raise MomentError(f"{history.name}: its configuration is not in the repository", "ship carries it: vmrewind ship on")
    return machine_of(repository.config(name), name.suffix, name.key)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    try:
        directory = Path(tempfile.mkdtemp(prefix="vmrewind-drill-", dir=parent))
    except OSError as error:
        raise UsageError(f"{parent}: cannot be used: {error.strerror}", "name another --scratch directory") from error
    try:
        yield directory
    finally:
        with uninterrupted():
            shutil.rmtree(directory)


def _check_space(history: History, targets: Sequence[str], position: Position, directory: Path) -> None:
    needed = sum(View.open(history, target, position).data_bytes for target in targets)
    needed += needed // 10 + _SPARE_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise SpaceError(
            f"{directory.parent}: {free} bytes are free, up to {needed} are needed", "name another --scratch directory"
        )


def boot_until(command_with: Callable[[int], list[str]], until: str | None, seconds: float) -> tuple[bool, str, str]:
    """(whether the sign came, what was seen, the console) of a QEMU, which is ended then. ``until`` and ``seconds`` as ``Wanted``.

    ``command_with``: its command line, given the descriptor of the guest agent's end. Raises StartError if it does not take that.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile() as complaints:
        command = command_with(theirs.fileno())
        # QEMU must not outlive us, whatever ends us.
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        if shutil.which(command[0]) is None:
            raise StartError(f"{command[0]} is not installed here", "install QEMU for this machine type")
        process = subprocess.Popen(
            [*guard, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
            env=without_credentials(os.environ),
        )
        theirs.close()
        try:
            passed, outcome, console = _watch(process, ours, until, seconds)
        finally:
            with uninterrupted():
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
        complaints.seek(0)
        said = _text(complaints.read(_CONSOLE_MAX))
    # -9: we ended it.
    if not passed and not console and process.returncode not in (0, -signal.SIGKILL):
        reason = "; ".join(said.split("\n")[:_REASON_LINES]).strip("; ") or f"exit code {process.returncode}"
        raise StartError(
            f"{command[0]} could not be tried: it refuses the machine before anything runs: {reason}",
            "that tells nothing of the moment: correct the VM's configuration, or drill on a host that has what it names",
        )
    return passed, outcome, console + said


def _watch(process: subprocess.Popen[bytes], agent: socket.socket, until: str | None, seconds: float) -> tuple[bool, str, str]:
    assert process.stdout is not None, "it is a pipe"
    out = process.stdout.fileno()
    agent.setblocking(False)
    sign = until.encode() if until is not None else None
    console, said = b"", b""
    question = json.dumps({"execute": "guest-sync", "arguments": {"id": os.getpid()}}).encode() + b"\n"
    answer = json.dumps({"return": os.getpid()}).encode()
    deadline = time.monotonic() + seconds
    ask_at = 0.0
    waiting = [out, agent.fileno()]
    while (now := time.monotonic()) < deadline:
        if sign is None and now >= ask_at:
            ask_at = now + _ASK_SECONDS
            with suppress(OSError):
                agent.send(question)
        ready = readable(waiting, min(deadline - now, _ASK_SECONDS))
        if agent.fileno() in ready:
            try:
                said = (said + agent.recv(65536))[-_CONSOLE_MAX:]
            except OSError:
                waiting = [out]
            if sign is None and answer in said:
                return True, "the guest agent answered", _text(console)
        if out in ready:
            data = os.read(out, 65536)
            if not data:
                return False, f"the machine ended before the sign came (exit code {process.wait()})", _text(console)
            console = (console + data)[-_CONSOLE_MAX:]
            if sign is not None and sign in console:
                return True, f"{until!r} appeared on the serial console", _text(console)
    missing = "the guest agent did not answer" if sign is None else f"{until!r} did not appear on the serial console"
    return False, f"{missing} within {seconds:g} s", _text(console)


def _text(console: bytes) -> str:
    """The console as text without what moves the cursor of whoever reads it."""
    text = console.decode("utf-8", "replace").replace("\r\n", "\n")
    return "".join(character for character in text if character == "\n" or character.isprintable())
