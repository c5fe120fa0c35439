"""Shipping: one step at a time, from the journal's state and the repository's to what is to be sent next.

A failure of either is raised; ``reset`` then drops everything, and the next step begins with what the repository lists. While a
segment is being put, the next one is read and compressed (sender.py): at most one is under way and one in the making.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.journal.copy_before_write import begun_base
from vmrewind.journal.reader import segment_files
from vmrewind.journal.runs import RunInfo, run_path
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.repository.segment import HEADER
from vmrewind.ship.carrier import Carrier, Pulled
from vmrewind.ship.coverage import SEQ_MAX, Coverage
from vmrewind.ship.cursor import Hole
from vmrewind.ship.descriptions import Descriptions
from vmrewind.ship.events import declare_baseless, declare_hole
from vmrewind.ship.gather import PAYLOAD_MAX, Gathered
from vmrewind.ship.lookout import Lookout
from vmrewind.ship.meter import Meter, Start, noted_starts
from vmrewind.ship.noted import forget_shipped_elsewhere, note
from vmrewind.ship.pace import Pace
from vmrewind.ship.patience import Patience, UnreadableNow
from vmrewind.ship.plan import Entry, Plan, bases_needed, make_plan
from vmrewind.ship.sender import Sender

POLL_SECONDS: Final = 0.2
QUIET_POLL_SECONDS: Final = 1.0
"""How long a journal to which nothing is added is not looked at: no longer than the oldest record may wait to be sent."""
UNREADABLE_RETRY_SECONDS: Final = 30.0
"""After so long what storage did not give back is tried again."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known of how far shipping is; see ``status.ShipStatus``."""

    run: int | None
    shipped_seq: int | None
    shipped_time_ns: int | None
    unsent_bytes: int | None
    lag_seconds: float | None


class Shipper:
    """Ships one VM's journal to one repository.

    ``meanwhile`` is called once a second while the repository makes it wait; ``progress`` may be asked then.
    """

    def __init__(
        self, vm: str, journal: Path, repository_url: str, state: Path, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        self._name = vm
        self._journal = journal
        self._url = repository_url
        self._state = state
        self._vm: VmRepository | None = None
        self._coverage = Coverage()
        self._disks: tuple[str, ...] = ()
        self._disks_known: tuple[str, ...] = ()
        """The disks last carried, also while the repository is away."""
        self._runs_seen = 0
        self._plan = Plan(None, (), ())
        self._live: Carrier | None = None
        self._backlog: Carrier | None = None
        self._descriptions = Descriptions(journal, state)
        self._shipped_time_ns: int | None = None
        self._meter: Meter | None = None
        self._patience = Patience()
        self._aside: dict[Entry, Carrier] = {}
        """What of the backlog was begun, and then storage did not give back the rest."""
        self._unreadable: dict[Entry, str] = {}
        """What of it is not tried now, and what storage said."""
        self._unreadable_until = 0.0
        self._sender = Sender(meanwhile)
        self._sending: Gathered | None = None
        self.pace = Pace()
        self.baseless: tuple[str, ...] = ()
        """Disks of which the repository has nothing that can be restored, as it lacks their base."""
        self._lookout = Lookout(journal, state, self._descriptions.complain)
        self._cut: list[SegmentName] = []
        """Objects that are too short to hold what their names say."""
        self.held_back = False
        """Whether there is something to do that only the bandwidth limit holds back."""
        self._runs: dict[int, RunInfo] = {}
        self._held: set[int] = set()
        self._noted: tuple[dict[int, int], dict[int, int]] = {}, {}

    @property
    def waits_for(self) -> str | None:
        """What keeps a part of the backlog from being read, in words; the rest goes on."""
        return next(iter(self._unreadable.values()), None)

    @property
    def superseded(self) -> str | None:
        """Who has taken the VM over, in words."""
        return self._lookout.superseded

    def step(self, disks: tuple[str, ...], *, hurry: bool = False) -> float:
        """Do what is to be done next for ``disks``; returns for how many seconds there is nothing more to do.

        ``hurry``: send what is there although it is not due. Raises VmrewindError and OSError.
        """
        self.held_back = False
        self._disks_known = disks
        if self._vm is None:
            self._connect()
        runs_seen = self._runs_version()
        if disks != self._disks or runs_seen != self._runs_seen:
            self._finish_live()
            self._disks, self._runs_seen = disks, runs_seen
            self._replan()
        if self._lookout.due and self._plan.runs:
            self._look_out()
        wait_seconds = QUIET_POLL_SECONDS
        if self._plan.live_now or not self._plan.backlog:
            wait_seconds = self._step_live(hurry=hurry)
        if self._plan.backlog:
            wait_seconds = min(wait_seconds, self._step_backlog())
        if wait_seconds:
            # Nothing is left to make meanwhile.
            self._sender.settle()
        self._note_shipped()
        return wait_seconds

    def finish(self) -> None:
        """Send what is gathered for disks that are to be carried no longer, and forget them."""
        try:
            if self._vm is not None:
                self._finish_live()
                self._sender.settle()
                self._note_shipped()
        finally:
            self.reset()

    def settle(self) -> None:
        """Wait until everything that was sent is durable; raises what the repository raised."""
        self._sender.settle()

    def reset(self) -> None:
        """Forget everything but how far shipping is: the repository's list tells the rest."""
        self._sender.abandon()
        self._sending = None
        if self._meter is not None and self._meter.sent_bytes:
            self._meter = None
        for carrier in (self._live, self._backlog):
            if carrier is not None:
                carrier.cursor.release()
        self._vm = None
        self._live = self._backlog = None
        self._aside, self._unreadable = {}, {}
        self._disks = ()
        self._plan = Plan(None, (), ())
        self._descriptions.forget()
        if self._lookout.lost:
            # Capture must not let go of anything on the strength of what a repository had that is gone.
            self._lookout.lost = False
            self._noted = {}, {}
            forget_shipped_elsewhere(self._journal, None)

    def _note_shipped(self) -> None:
        """Tell capture up to where each run was carried away: what the journal-full policy goes by."""
        carried, runs = self._reached(self._disks), self._reached(self._disks, whole=True)
        if not carried or (carried, runs) == self._noted:
            return
        self._noted = carried, runs
        repository = self._vm.repository.id if self._vm is not None else None
        note(self._journal, repository, self._disks, runs, carried)

    def _reached(self, disks_carried: tuple[str, ...], *, whole: bool = False) -> dict[int, int]:
        """By run: the seq up to which these disks (``whole``: all) are in the repository; SEQ_MAX for a finished run."""
        if not self._runs or not disks_carried:
            return {}
        newest = max(self._runs)
        reached: dict[int, int] = {}
        for run in sorted(self._held | {newest}):
            info = self._runs.get(run)
            if info is not None:
                disks = [disk.index for disk in info.disks if whole or disk.target in disks_carried]
                each = (self._coverage.reached(run, index, info.first_seq) for index in disks)
                reached[run] = min(each, default=SEQ_MAX)
            elif run < newest and run not in self._descriptions.lost:
                reached[run] = SEQ_MAX  # it never reached its CPU
        return reached

    def _connect(self) -> None:
        def connected() -> tuple[VmRepository, list[tuple[SegmentName, int]]]:
            vm = Repository.open(self._url).vm(self._name)
            vm.repository.probe()
            return vm, vm.sized_segments()

        self._vm, segments = self._sender.run(connected)
        forget_shipped_elsewhere(self._journal, self._vm.repository.id)
        self._noted = {}, {}
        self._coverage = Coverage(name for name, size in segments if size >= HEADER.size)
        self._cut = [name for name, size in segments if size < HEADER.size]
        for name in self._cut:
            self._descriptions.complain(
                f"{self._vm.repository.url}: {name.key} was cut short and holds nothing; it is shipped anew if the journal has it"
            )
        self._lookout.begin()
        self._meter = None

    def _runs_version(self) -> int:
        try:
            return os.stat(self._journal / "runs").st_mtime_ns  # noqa: PTH116 - looked at all the time
        except FileNotFoundError:
            return 0

    def _replan(self) -> None:
        assert self._vm is not None
        self._sender.settle()
        self._runs = {info.run: info for info in self._descriptions.runs(self._vm)}
        self._held = {file.run for file in segment_files(self._journal)}
        self._plan = make_plan(self._runs, self._disks, self._coverage, self._held)
        vm, runs = self._vm, self._plan.runs
        self._sender.run(lambda: self._descriptions.put(vm, runs))
        self._look_for_bases(vm)
        self._drop_backlog()
        self._aside, self._unreadable = {}, {}
        live = self._plan.live
        if self._live is not None and (live is None or not self._live.carries_on(live)):
            self._live.cursor.release()
            self._live = None
        if self._live is None and live is not None:
            self._live = Carrier(self._journal, live, self._patience, growing=True)

    def _look_out(self) -> None:
        vm, newest = self._vm, max(self._runs)
        assert vm is not None
        self._sender.run(lambda: self._lookout.look(vm, newest))

    def _look_for_bases(self, vm: VmRepository) -> None:
        needed = bases_needed(self._runs, self._disks)
        there = self._sender.run(lambda: {target: vm.bases(target) for target in needed})
        begun = {target: found[0] for target in needed if (found := begun_base(self._journal, target)) is not None}
        lacking = {target for target, base in needed.items() if base not in there[target] and base != begun.get(target)}
        self.baseless = tuple(sorted(lacking))
        if self.baseless:
            declare_baseless(self._state, max(self._runs), vm.repository.id, self.baseless)

    def _step_live(self, *, hurry: bool) -> float:
        carrier = self._live
        if carrier is None:
            return POLL_SECONDS
        pulled = self._pull(carrier)
        if isinstance(pulled, Hole):
            self._step_over(carrier, pulled)
            return 0.0
        due_seconds = 0.0 if hurry or pulled is Pulled.FULL else carrier.due_in()
        if due_seconds == 0.0 and carrier.gathered:
            if held := self._held_back_seconds():
                return held
            self._send(carrier)
        if pulled is not Pulled.WAITING:
            return 0.0
        # The oldest record decides when to look again; as long as there is none, nothing is due before it is a second old.
        return min(due_seconds or POLL_SECONDS, POLL_SECONDS if carrier.gathered else QUIET_POLL_SECONDS)

    def _pull(self, carrier: Carrier) -> Pulled | Hole:
        try:
            return carrier.pull(self.pace.piece_bytes(PAYLOAD_MAX))
        except (OSError, CorruptionError):
            # What could be read does not wait for what could not.
            self._sender.settle()
            self._note_shipped()
            raise

    def _held_back_seconds(self) -> float:
        """How long the limit holds back what is due, at most until somebody should look at the instructions again."""
        seconds = min(self.pace.wait_seconds(), POLL_SECONDS)
        self.held_back = seconds > 0
        return seconds

    def _step_backlog(self) -> float:
        """Returns how long the limit, or storage that does not give it back, holds it back."""
        if self._unreadable and time.monotonic() >= self._unreadable_until:
            self._unreadable = {}
        if self._backlog is None:
            due = next((entry for entry in self._plan.backlog if entry not in self._unreadable), None)
            if due is None:
                return QUIET_POLL_SECONDS
            self._backlog = self._aside.pop(due, None) or Carrier(self._journal, due, self._patience, growing=False)
        carrier = self._backlog
        entry = carrier.entry
        try:
            pulled = self._pull(carrier)
        except UnreadableNow as error:
            if not self._plan.live_now:
                raise  # What comes behind it on the branch could not be restored.
            if not self._unreadable:
                self._unreadable_until = time.monotonic() + UNREADABLE_RETRY_SECONDS
            self._unreadable[entry] = str(error)
            self._descriptions.complain(f"{error}; it is tried again, the rest goes on")
            self._drop_backlog()
            self._aside[entry] = carrier
            return POLL_SECONDS
        if isinstance(pulled, Hole):
            if entry.last is not None and pulled.last >= entry.last:
                pulled = Hole(pulled.first, entry.last, pulled.cause)
            self._step_over(carrier, pulled)
            if pulled.last == entry.last:
                self._next_entry()
        elif pulled is not Pulled.MORE:
            if carrier.gathered and (held := self._held_back_seconds()):
                return held
            self._send(carrier)
            if pulled is not Pulled.FULL:
                self._close_entry(carrier)
        return 0.0

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
        done = self._backlog.entry if self._backlog is not None else None
        self._drop_backlog()
        self._plan = Plan(self._plan.live, tuple(entry for entry in self._plan.backlog if entry != done), self._plan.runs)

    def _drop_backlog(self) -> None:
        if self._backlog is not None:
            self._backlog.cursor.release()
            self._backlog = None

    def _step_over(self, carrier: Carrier, hole: Hole) -> None:
        self._send(carrier)
        entry = carrier.entry
        declare_hole(self._state, entry.run, entry.targets, hole)
        self._coverage.add(entry.run, entry.mask, hole.first, hole.last)
        carrier.next_from(hole.last + 1)

    def _send(self, carrier: Carrier) -> None:
        """Begin to put what is gathered as one segment, once the one before is durable."""
        vm, gathered, newest = self._vm, carrier.gathered, max(self._runs)
        assert vm is not None
        if not gathered:
            return
        # A slow repository must not keep the pool from recycling.
        carrier.cursor.release()
        name, data = gathered.encode(self._name, self._uuid(carrier.entry.run))

        def landed() -> None:
            self._sending = None
            if self._meter is not None:
                self._meter.sent_bytes += gathered.payload_bytes
            self._coverage.add(name.run, name.mask, name.first, name.last)
            self._shipped_time_ns = max(gathered.last_time_ns, self._shipped_time_ns or 0)

        def put() -> None:
            self._lookout.confirm_before_put(vm, newest)
            self._drop_cut(vm, name)
            vm.put_segment(name, data)

        self._sender.start(put, landed)
        self._sending = gathered
        self.pace.spent(len(data))
        carrier.next_from(name.last + 1)

    def _drop_cut(self, vm: VmRepository, name: SegmentName) -> None:
        """Remove what would stand beside a segment, or in its place, and holds nothing: the segment has its records."""
        for cut in self._cut:
            if cut.run == name.run and cut.mask & name.mask and cut.first <= name.last and name.first <= cut.last:
                try:
                    vm.drop_cut_segment(cut)
                except RepositoryError as error:
                    self._descriptions.complain(f"what is left of {cut.key} cannot be removed: {error}")

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

    def progress(self) -> Progress:
        """How far shipping is, now. Raises CorruptionError and OSError if the journal cannot be read."""
        starts = self._unsent_starts() if self._runs else noted_starts(self._journal, self._disks_known)
        if not starts:
            return Progress(None, None, self._shipped_time_ns, None, None)
        carriers = [carrier for carrier in (self._backlog, self._live) if carrier is not None]
        lacking = [*([self._sending] if self._sending is not None else []), *(carrier.gathered for carrier in carriers)]
        unsent_bytes = sum(gathered.payload_bytes for gathered in lacking)
        times = [carrier.oldest_time_ns for carrier in carriers]
        times += [self._sending.oldest_time_ns] if self._sending is not None else []
        oldest = min((time_ns for time_ns in times if time_ns is not None), default=None)
        lag_seconds = 0.0 if oldest is None else max(0.0, (time.time_ns() - oldest) / 1e9)
        if self._caught_up:
            self._meter = None
        else:
            # It may take long: what it leaves behind is counted, once, and then what is added.
            if self._meter is None or (self._vm is None and self._meter.starts != starts):
                self._meter = Meter(self._journal, starts)
            self._meter.read()
            unsent_bytes = max(unsent_bytes, self._meter.unsent_bytes)
            lag_seconds = lag_seconds if carriers else self._meter.lag_seconds
        return Progress(starts[-1].run, starts[-1].first - 1, self._shipped_time_ns, unsent_bytes, round(lag_seconds, 1))

    @property
    def _caught_up(self) -> bool:
        """Whether everything that was in the journal at the last look is sent or gathered."""
        away = self._vm is None or self._sender.waits
        return not (away or self._plan.backlog or self._live is None or self._live.behind)

    def _unsent_starts(self) -> list[Start]:
        """What is not known to be in the repository of every run with something left; the newest is the last."""
        starts = []
        for run in sorted(self._held | {max(self._runs)}):
            if (info := self._runs.get(run)) is not None:
                disks = [disk.index for disk in info.disks if disk.target in self._disks_known]
                reached = {index: self._coverage.reached(run, index, info.first_seq) for index in disks}
                if firsts := {index: seq + 1 for index, seq in reached.items() if seq != SEQ_MAX}:
                    starts.append(Start(run, firsts))
        # Else the newest has none of the disks.
        return starts if starts and starts[-1].run == max(self._runs) else []
