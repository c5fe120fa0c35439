"""A VM that runs under ``vmrewind run``, as a user runs it: a TOML file, the command, and the other commands beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from guests.kernel import GuestError
from guests.machine import Console
from guests.monitor import Monitor
from vmrewind.journal.copy_before_write import begun_base

VMREWIND = Path(sys.executable).with_name("vmrewind")


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the configuration; ``device`` as in the TOML file."""

    target: str
    image: Path
    format: str = "raw"
    device: str = "virtio-blk-pci"


def _run(arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([VMREWIND, *arguments], capture_output=True, text=True, timeout=600, check=False)


run_command: Callable[[Sequence[str | Path]], subprocess.CompletedProcess[str]] = _run
"""How :func:`vmrewind` runs a command; the tests have a quicker way (tests/warm.py)."""


def vmrewind(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a vmrewind command; raises GuestError with what it said if it fails and ``check`` is set."""
    done = run_command(arguments)
    if check and done.returncode:
        words = " ".join(map(str, arguments))
        raise GuestError(f"vmrewind {words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


class ProtectedVm:
    """A configuration in ``directory`` and the ``vmrewind run`` of it. Kills what is left when its ``with`` block ends."""

    def __init__(self, directory: Path, name: str, command: Sequence[str], disks: Sequence[Disk], **protection: str | int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.name = name
        self._targets = [disk.target for disk in disks]
        self.config = directory / f"{name}.toml"
        self.repository = directory / "repository"
        self.console = Console(directory / "serial")
        self.output = directory / "run.log"
        self._qmp = Path(os.environ["VMREWIND_RUNTIME_DIR"]) / f"{name}.qmp"
        self._process: subprocess.Popen[bytes] | None = None
        keys: dict[str, Any] = {"repository": str(self.repository), "journal_size": "256MiB", **protection}
        lines = [
            f"name = {json.dumps(name)}",
            "[qemu]",
            f"command = {json.dumps([*command, '-qmp', f'unix:{self._qmp},server=on,wait=off'])}",
            "[protection]",
            "enabled = true",
            *(f"{key} = {json.dumps(value)}" for key, value in keys.items()),
        ]
        for disk in disks:
            lines += ["[[protection.disk]]"]
            lines += [f"{key} = {json.dumps(str(getattr(disk, key)))}" for key in ("target", "image", "format", "device")]
        self.config.write_text("\n".join(lines) + "\n")

    def __enter__(self) -> ProtectedVm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def start(self, timeout_seconds: float = 60, *, bases: bool = True) -> None:
        """Start the VM; returns when its CPU runs and, with ``bases``, its bases are made: before, no moment can be restored.

        Raises GuestError if it does not.
        """
        before = len(list(self._event_logs()))
        Path(os.environ["VMREWIND_RUNTIME_DIR"]).mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as output:
            self._process = subprocess.Popen([VMREWIND, "run", self.config], stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        deadline = time.monotonic() + timeout_seconds
        while len(list(self._event_logs())) == before or not any(e["event"] == "cpu.started" for e in self.events()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise GuestError(f"the VM did not start:\n{self.output.read_text()}")
            time.sleep(0.02)
        if bases:
            self.wait_for_bases(timeout_seconds)

    def wait_for_bases(self, timeout_seconds: float = 60) -> None:
        """Wait until the bases of its disks are made. Raises GuestError."""
        deadline = time.monotonic() + timeout_seconds
        while any(begun_base(self.journal, target) for target in self._targets):
            if time.monotonic() > deadline:
                raise GuestError(f"its bases are not made:\n{self.output.read_text()}")
            time.sleep(0.02)

    def _event_logs(self) -> Iterator[Path]:
        return (Path(os.environ["VMREWIND_STATE_DIR"]) / "vms" / self.name / "events").glob("*.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """The event log of the last run."""
        log = max(self._event_logs())
        return [json.loads(line) for line in log.read_text().splitlines()]

    @property
    def journal(self) -> Path:
        """The journal's directory."""
        return Path(os.environ["VMREWIND_STATE_DIR"]) / "vms" / self.name / "journal"

    def running(self) -> bool:
        """Whether ``vmrewind run`` lives."""
        return self._process is not None and self._process.poll() is None

    def wait_for(self, pattern: str, timeout_seconds: float = 90, after: int = 0) -> Any:
        """Wait for a regular expression on the guest's console."""
        return self.console.wait_for(pattern, timeout_seconds, self.running, after)

    def wait(self, timeout_seconds: float = 120) -> int:
        """Wait until the VM has ended by itself; the exit code of ``vmrewind run``."""
        assert self._process is not None, "start it first"
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise GuestError(f"still running:\n{self.output.read_text()}{self.console.text()[-3000:]}") from None

    def interrupt(self) -> None:
        """Ctrl-C."""
        assert self._process is not None, "start it first"
        self._process.send_signal(signal.SIGINT)

    def quit(self) -> int:
        """End the guest as a power failure does, everything else cleanly; the exit code of ``vmrewind run``."""
        with self.monitor() as monitor:
            monitor.execute("quit")
        return self.wait()

    def monitor(self) -> Monitor:
        """QEMU's monitor."""
        return Monitor(self._qmp)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the CPU, every write that it made having reached the image: the image is then this moment's truth."""
        with self.monitor() as monitor:
            monitor.execute("stop")
            yield
            monitor.execute("cont")

    def status(self) -> dict[str, Any]:
        """``vmrewind status --json``."""
        status: dict[str, Any] = json.loads(vmrewind("status", self.config, "--json").stdout)
        return status

    def kill(self) -> None:
        """End everything at once, by SIGKILL."""
        if self._process is None:
            return
        processes = self.status().get("processes", {}) if self.running() else {}
        self._process.kill()
        self._process.wait()
        for process in processes.values():
            if process and process["alive"] and process["pid"] != self._process.pid:
                try:
                    os.kill(process["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    continue
