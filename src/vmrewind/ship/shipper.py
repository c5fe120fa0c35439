"""Shipping: one step at a time, from the journal's state and the repository's to what is to be sent next.

A failure of either is raised; ``reset`` then drops everything, and the next step begins with what the repository lists.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import CorruptionError, VmrewindError
from vmrewind.journal.format import run_name
from vmrewind.journal.reader import segment_files
from vmrewind.journal.runs import RunInfo, described_runs, local_runs, run_path
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.ship.carrier import Carrier, Pulled
from vmrewind.ship.coverage import SEQ_MAX, Coverage
from vmrewind.ship.cursor import Cursor, Hole
from vmrewind.ship.events import declare_hole
from vmrewind.ship.plan import Plan, make_plan
from vmrewind.vmconfig.model import VmConfig

POLL_SECONDS: Final = 0.2
_METERED_MAX: Final = 20_000
"""Batches that the meter looks at in one go."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known of how far shipping is; see ``status.ShipStatus``."""

    run: int | None
    shipped_seq: int | None
    shipped_time_ns: int | None
    unsent_bytes: int | None
    lag_seconds: float | None


class Shipper:
    """Ships one VM's journal to one repository."""

    def __init__(self, vm: str, journal: Path, repository_url: str, state: Path) -> None:
        self._name = vm
        self._journal = journal
        self._url = repository_url
        self._state = state
        self._vm: VmRepository | None = None
        self._coverage = Coverage()
        self._disks: tuple[str, ...] = ()
        self._runs_seen = 0
        self._plan = Plan(None, (), ())
        self._live: Carrier | None = None
        self._backlog: Carrier | None = None
        self._described: set[int] = set()
        self._shipped_time_ns: int | None = None
        self._meter: _Meter | None = None
        self._runs: dict[int, RunInfo] = {}
        self._held: set[int] = set()
        self._lost: set[int] = set()
        """Runs whose description is nowhere to be had."""
        self._complaints: set[str] = set()
        self._noted: dict[int, int] = {}

    def step(self, disks: tuple[str, ...], *, hurry: bool = False) -> float:
        """Do what is to be done next for ``disks``; returns for how many seconds there is nothing more to do.

        ``hurry``: send what is there although it is not due. Raises VmrewindError and OSError.
        """
        if self._vm is None:
            self._connect()
        runs_seen = self._runs_version()
        if disks != self._disks or runs_seen != self._runs_seen:
            self._finish_live()
            self._disks, self._runs_seen = disks, runs_seen
            self._replan()
        wait_seconds = POLL_SECONDS
        if self._plan.live_now or not self._plan.backlog:
            wait_seconds = self._step_live(hurry=hurry)
        if self._plan.backlog:
            self._step_backlog()
            wait_seconds = 0.0
        self._meter = None
        self._note_shipped()
        return wait_seconds

    def finish(self) -> None:
        """Send what is gathered for disks that are to be carried no longer, and forget them."""
        if self._vm is not None:
            self._finish_live()
        self.reset()

    def reset(self) -> None:
        """Forget everything but how far shipping is: the repository's list tells the rest."""
        unsent_from = self._unsent_from()
        for carrier in (self._live, self._backlog):
            if carrier is not None:
                carrier.cursor.release()
        if unsent_from is not None and self._meter is None:
            self._meter = _Meter(self._journal, *unsent_from)
        self._vm = None
        self._live = self._backlog = None
        self._disks = ()
        self._plan = Plan(None, (), ())
        self._described.clear()

    def _note_shipped(self) -> None:
        """Tell capture up to where each run was carried away: what the journal-full policy goes by."""
        reached = self._reached()
        if not reached or reached == self._noted:
            return
        self._noted = reached
        path = self._journal / "shipped.json"
        temporary = path.with_name(".shipped.json.tmp")
        content = json.dumps({"runs": {run_name(run): seq for run, seq in reached.items()}}).encode()
        # Without a sync: an old word, or none, makes capture keep more than it must, never less.
        with contextlib.suppress(OSError):
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, content)
            finally:
                os.close(fd)
            temporary.replace(path)

    def _reached(self) -> dict[int, int]:
        """By run: the seq up to which everything that is to be carried is in the repository; SEQ_MAX for a finished run."""
        if not self._runs or not self._disks:
            return {}
        newest = max(self._runs)
        reached: dict[int, int] = {}
        for run in sorted(self._held | {newest}):
            info = self._runs.get(run)
            if info is not None:
                disks = [disk.index for disk in info.disks if disk.target in self._disks]
                each = (self._coverage.reached(run, index, info.first_seq) for index in disks)
                reached[run] = min(each, default=SEQ_MAX)
            elif run < newest and run not in self._lost:
                reached[run] = SEQ_MAX  # it never reached its CPU
        return reached

    def _connect(self) -> None:
        vm = Repository.open(self._url).vm(self._name)
        vm.repository.probe()
        self._coverage = Coverage(vm.segments())
        self._vm = vm

    def _runs_version(self) -> int:
        try:
            return os.stat(self._journal / "runs").st_mtime_ns  # noqa: PTH116 - looked at all the time
        except FileNotFoundError:
            return 0

    def _replan(self) -> None:
        self._runs = {info.run: info for info in self._described_runs()}
        self._held = {file.run for file in segment_files(self._journal)}
        self._plan = make_plan(self._runs, self._disks, self._coverage, self._held)
        self._describe(self._plan.runs)
        if self._backlog is not None:
            self._backlog.cursor.release()
            self._backlog = None
        live = self._plan.live
        if self._live is not None and (live is None or not self._live.carries_on(live)):
            self._live.cursor.release()
            self._live = None
        if self._live is None and live is not None:
            self._live = Carrier(self._journal, live, growing=True)

    def _described_runs(self) -> list[RunInfo]:
        """The journal's runs; of one whose description is damaged here the repository may have a copy, if it was carried before."""
        assert self._vm is not None
        damaged: list[CorruptionError] = []
        described = set(described_runs(self._journal))
        found = local_runs(self._journal, damaged.append)
        if not damaged:
            return found
        missing = described - {info.run for info in found}
        copies = [info for info in self._vm.runs() if info.run in missing]
        self._lost = missing - {info.run for info in copies}
        for error in damaged if self._lost else ():
            self._complain(f"{error}; a run that is not described cannot be shipped")
        return sorted([*found, *copies], key=lambda info: info.run)

    def _complain(self, what: str) -> None:
        """Once."""
        if what not in self._complaints:
            self._complaints.add(what)
            print(f"ship: {what}", file=sys.stderr, flush=True)  # noqa: T201

    def _describe(self, runs: tuple[RunInfo, ...]) -> None:
        """Put what a reader must know before it can use the records, first."""
        assert self._vm is not None
        if runs and not self._described:
            self._vm.register(runs[-1].uuid)
            self._put_config()
        for info in runs:
            if info.run not in self._described:
                self._vm.put_run(info)
                self._described.add(info.run)

    def _put_config(self) -> None:
        assert self._vm is not None
        path = self._state / "config.json"
        try:
            time_ns = path.stat().st_mtime_ns
            config = VmConfig.load_saved(path)
        except FileNotFoundError:
            return
        except VmrewindError as error:
            # The records are worth more than the configuration: they go on without it.
            print(f"ship: the configuration is not shipped: {error}", file=sys.stderr, flush=True)  # noqa: T201
            return
        suffix = "xml" if config.origin == "libvirt" else "toml"
        self._vm.put_config(time_ns, suffix, config.document.encode())

    def _step_live(self, *, hurry: bool) -> float:
        carrier = self._live
        if carrier is None:
            return POLL_SECONDS
        pulled = carrier.pull()
        if isinstance(pulled, Hole):
            self._step_over(carrier, pulled)
            return 0.0
        due_seconds = 0.0 if hurry or pulled is Pulled.FULL else carrier.due_in()
        if due_seconds == 0.0:
            self._send(carrier)
        if pulled is not Pulled.WAITING:
            return 0.0
        return min(due_seconds, POLL_SECONDS) or POLL_SECONDS

    def _step_backlog(self) -> None:
        entry = self._plan.backlog[0]
        if self._backlog is None:
            self._backlog = Carrier(self._journal, entry, growing=False)
        carrier = self._backlog
        pulled = carrier.pull()
        if isinstance(pulled, Hole):
            if entry.last is not None and pulled.last >= entry.last:
                pulled = Hole(pulled.first, entry.last, pulled.cause)
            self._step_over(carrier, pulled)
            if pulled.last == entry.last:
                self._next_entry()
        elif pulled is not Pulled.MORE:
            self._send(carrier)
            if pulled is not Pulled.FULL:
                self._close_entry(carrier)

    def _close_entry(self, carrier: Carrier) -> None:
        """The journal has no more of a backlog's entry: say what is missing of it, and don't look for it again."""
        entry = carrier.entry
        next_seq = carrier.gathered.first
        needed = entry.cut if entry.last is None else entry.last
        if needed is not None and next_seq <= needed:
            cause = "the local journal of the run ends before them"
            declare_hole(self._state, entry.run, entry.targets, Hole(next_seq, needed, cause))
        last = SEQ_MAX if entry.last is None else entry.last
        if next_seq <= last:
            self._coverage.add(entry.run, entry.mask, next_seq, last)
        self._next_entry()

    def _next_entry(self) -> None:
        if self._backlog is not None:
            self._backlog.cursor.release()
            self._backlog = None
        self._plan = Plan(self._plan.live, self._plan.backlog[1:], self._plan.runs)

    def _step_over(self, carrier: Carrier, hole: Hole) -> None:
        self._send(carrier)
        entry = carrier.entry
        declare_hole(self._state, entry.run, entry.targets, hole)
        self._coverage.add(entry.run, entry.mask, hole.first, hole.last)
        carrier.next_from(hole.last + 1)

    def _send(self, carrier: Carrier) -> None:
        """Put what is gathered as one segment; durable when this returns."""
        assert self._vm is not None
        gathered = carrier.gathered
        if gathered.last < gathered.first:
            return
        # A slow repository must not keep the pool from recycling.
        carrier.cursor.release()
        name, data = gathered.encode(self._name, self._uuid(carrier.entry.run))
        self._vm.put_segment(name, data)
        self._coverage.add(name.run, name.mask, name.first, name.last)
        self._shipped_time_ns = max(gathered.last_time_ns, self._shipped_time_ns or 0)
        carrier.next_from(name.last + 1)

    def _uuid(self, run: int) -> bytes:
        text = next(info.uuid for info in self._plan.runs if info.run == run)
        try:
            return uuid.UUID(text).bytes
        except ValueError as error:
            raise CorruptionError(
                f"{run_path(self._journal, run)}: {text!r} is not a uuid", "put the VM's uuid back into it"
            ) from error

    def _finish_live(self) -> None:
        if self._live is not None:
            self._send(self._live)

    def _unsent_from(self) -> tuple[int, int] | None:
        """(run, seq) of the first record of the newest run that is not known to be shipped."""
        if self._live is None:
            return None
        run = self._live.entry.run
        first = next((entry.first for entry in self._plan.backlog if entry.run == run), None)
        if first is not None and self._backlog is not None and self._backlog.entry.run == run:
            first = self._backlog.gathered.first
        return run, self._live.gathered.first if first is None else first

    def progress(self) -> Progress:
        """How far shipping is, now."""
        if self._meter is not None:
            return self._meter.progress(self._shipped_time_ns)
        if self._live is None:
            return Progress(None, None, self._shipped_time_ns, None, None)
        unsent = self._unsent_from()
        assert unsent is not None
        carriers = [carrier for carrier in (self._backlog, self._live) if carrier is not None]
        oldest = min((carrier.gathered.oldest_time_ns or time.time_ns() for carrier in carriers), default=None)
        lag_seconds = 0.0 if oldest is None else max(0.0, (time.time_ns() - oldest) / 1e9)
        unsent_bytes = sum(carrier.gathered.payload_bytes + carrier.cursor.remaining_bytes() for carrier in carriers)
        return Progress(unsent[0], unsent[1] - 1, self._shipped_time_ns, unsent_bytes, round(lag_seconds, 1))


class _Meter:
    """How much lies unsent in the journal of a run behind a seq, while the repository cannot be reached."""

    def __init__(self, journal: Path, run: int, seq: int) -> None:
        self._run = run
        self._seq = seq
        self._cursor = Cursor(journal, run, seq, growing=True, payloads=False)
        self._bytes = 0
        self._oldest_ns: int | None = None

    def progress(self, shipped_time_ns: int | None) -> Progress:
        """Read on to the journal's end, headers only."""
        for _ in range(_METERED_MAX):
            if (found := self._cursor.read()) is None:
                break
            if not isinstance(found, Hole):
                self._bytes += found.batch.payload_length
                self._oldest_ns = self._oldest_ns or found.batch.time_ns
        self._cursor.release()
        lag_seconds = 0.0 if self._oldest_ns is None else max(0.0, (time.time_ns() - self._oldest_ns) / 1e9)
        return Progress(self._run, self._seq - 1, shipped_time_ns, self._bytes, round(lag_seconds, 1))
