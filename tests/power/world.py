"""A host on which a VM runs under capture, loses its power and comes back, and what must hold each time.

Everything is the product's own code in this process: planning, recovery, capture's loop, durability, resync, views. Only threads
and the loop's waiting are replaced (stepped.py), time is the host's own, and the disk is lossy (layer.py). One number seeds all.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import vmrewind.capture.__main__ as process
from tests.power.guest import GuestDisk
from tests.power.layer import Killed, Layer, PowerCut, real
from tests.power.promises import Promises, difference
from tests.power.stepped import Turns, lock_class, select_with, worker_class
from vmrewind.capture.policy import FullPolicy
from vmrewind.capture.server import Server
from vmrewind.errors import MomentError, RepositoryError, VmStateError
from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.copy_before_write import CopyBeforeWrite, begun_base
from vmrewind.journal.events import EventLog
from vmrewind.journal.pool import Recycling, SegmentPool
from vmrewind.journal.reader import SegmentFile
from vmrewind.journal.runs import new_run_id, run_path, write_durably
from vmrewind.paths import VmPaths
from vmrewind.recover.resync import resync
from vmrewind.repository.repository import Repository
from vmrewind.start.bases import complete
from vmrewind.start.plan import Plan, Planner
from vmrewind.vmconfig.model import DiskConfig, Protection, VmConfig

VM = "web01"
SEGMENT = 256 << 10
SIZES = {"vda": 192 << 10, "vdb": 64 << 10}
_START_NS = 1_795_000_000 * 10**9


@dataclass
class Tally:
    """What has happened, over many worlds: so that a test can tell that it looked at something."""

    cuts: int = 0
    kills: int = 0
    stops: int = 0
    lost_records: int = 0
    images_ahead: int = 0
    resyncs: int = 0
    bases: int = 0
    """Bases completed while the guest wrote."""
    bases_gone_on_with: int = 0
    """Starts that went on with one that an earlier run began."""
    cut_starts: int = 0
    """Power cuts before capture served, recovery and planning included."""


class _Policy(FullPolicy):
    """Notes the records of a segment before it is recycled: its name, and the old content with it, may come back."""

    def __init__(self, promises: Promises, *args: Any) -> None:
        super().__init__(*args)
        self._promises = promises

    def may_recycle(self, segment: SegmentFile) -> Recycling:
        verdict = super().may_recycle(segment)
        if verdict is not Recycling.NO:
            self._promises.recycled(segment)
        return verdict


class World:
    """One host with one VM. ``live`` is one start of the VM and what comes after; ``tally`` counts over several worlds."""

    def __init__(self, seed: int, directory: Path, tally: Tally) -> None:
        self.rng = random.Random(seed)
        self.tally = tally
        self.top = directory
        self.root = directory / "host"
        self.root.mkdir()
        self.now_ns = _START_NS
        self.uptime_ns = 60 * 10**9
        self.boot = self.rng.randbytes(16)
        self.turns = Turns()
        self.paths = VmPaths(VM)
        self.journal = self.paths.default_journal
        self.server: Server | None = None
        self.plan: Plan | None = None
        self.begun: dict[str, tuple[str, bytes]] = {}
        """Of each disk whose base is being made: its id, and what it is to hold."""
        self.baseless: set[str] = set()
        """Disks whose base was given up while the VM ran: nothing can be restored until the next one."""
        self.power_lost = False
        """While the VM ran, since the last plan."""
        self.segments = self.rng.choice((4, 32, 32))
        """With 4, and a guest that writes much, the journal recycles again and again; nobody ships."""
        heavy = self.rng.random() < 0.4
        cookies = itertools.count(1)
        self.disks = []
        (self.root / "images").mkdir()
        for target, size in SIZES.items():
            content = self.rng.randbytes(size)
            (self.root / "images" / f"{target}.raw").write_bytes(content)
            os.utime(self.image(target), ns=(self.now_ns, self.now_ns))
            self.disks.append(GuestDisk(target, content, cookies, heavy=heavy))
        self.repository = Repository.init(str(directory / "repo")).vm(VM)
        self.layer = Layer(self.root, self._ignored)
        self.layer.adopt()
        self.layer.before = self._before
        self.layer.now_ns = lambda: self.now_ns
        self.left = 0
        """Noted operations until the next death; 0: none is due."""
        self.death: type[BaseException] = PowerCut
        self.dying = False
        self.promises = Promises(self.paths, self.repository, list(SIZES))
        self.run = 0
        """The run that the guest is in, or was in when the host died; 0 once it has found what that left."""
        disk_configs = [DiskConfig(target, str(self.image(target))) for target in SIZES]
        protection = Protection(True, disk_configs, str(directory / "repo"), journal_size=self.segments * SEGMENT)
        self.config = VmConfig(VM, None, None, protection, "toml", "web01.toml", "")

    def image(self, target: str) -> Path:
        return self.root / "images" / f"{target}.raw"

    @staticmethod
    def _ignored(path: Path) -> bool:
        """The event log promises nothing, and a backup's notes for going on are only that."""
        return "events" in path.parts or path.name.endswith(".partial")

    # -- time, threads, death

    def _before(self, what: str) -> None:
        """Before every noted operation (``synced``: between a sync's beginning and its end)."""
        if self.dying:
            raise self.death
        own = self.turns.own()
        if own is not None:
            own.pause()
            if self.dying:
                raise self.death
        self.now_ns += self.rng.randrange(50_000)
        if self.left and what != "synced":
            self.left -= 1
            if not self.left:
                self.dying = True
                raise self.death
        if own is None and self.turns.jobs and self.rng.random() < 0.3:
            self._let_one_run()

    def _let_one_run(self) -> None:
        self.rng.choice(self.turns.jobs).run()
        if self.dying:
            raise self.death

    def pass_time(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)

    def _patched(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(self.layer.in_place())
        host = SimpleNamespace(
            time_ns=lambda: self.now_ns, time=lambda: self.now_ns / 1e9, sleep=time.sleep,
            monotonic_ns=lambda: self.now_ns, monotonic=lambda: self.now_ns / 1e9,
        )  # fmt: skip
        modules = "capture.server capture.recovery capture.since capture.policy capture.greeting journal.runs journal.events"
        for module in (*modules.split(), "start.plan", "recover.resync", "repository.base", "history.history"):
            stack.enter_context(patch(f"vmrewind.{module}.time", host))
        stack.enter_context(patch.object(process, "Clock", lambda floor: Clock(floor, host.time_ns, host.monotonic_ns)))
        stack.enter_context(patch.object(process, "FullPolicy", partial(_Policy, self.promises)))
        for module in ("capture.recovery", "journal.state"):
            stack.enter_context(patch(f"vmrewind.{module}.boot_id", lambda: self.boot))
        stack.enter_context(patch("vmrewind.capture.since._boot_time_ns", lambda: self.now_ns - self.uptime_ns))
        stack.enter_context(patch("vmrewind.capture.durability.Worker", worker_class(self.turns)))
        stack.enter_context(patch("vmrewind.capture.durability.threading", SimpleNamespace(Lock=lock_class(self.turns))))
        stack.enter_context(patch("vmrewind.capture.server.select", select_with(self._step)))
        stack.enter_context(patch("vmrewind.journal.pool.SEGMENT_SIZE_MIN", SEGMENT))
        stack.enter_context(patch("vmrewind.recover.resync.instruct", self._instruct))
        return stack

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Nobody dies meanwhile: what is done here looks, or is not what is tested."""
        left, self.left = self.left, 0
        yield
        self.left = left

    # -- a life: from a start to a death or a clean stop

    def live(self) -> None:
        """Start the VM, let its guest work, and end it in one way or another."""
        rng = self.rng
        early = rng.random() < 0.3
        self.left = rng.randrange(1, 100 if early else 900)
        self.death = PowerCut
        self.steps = rng.randrange(5, 60)
        self.served = False
        self.idle = 0
        with self._patched():
            try:
                self._live()
                self.tally.stops += 1
                if rng.random() < 0.5:
                    # Stopped, and only then the power goes.
                    self._cut()
                else:
                    self._leave()
                    self.pass_time(rng.choice((0.5, 100, 10_000)))
            except PowerCut:
                self.power_lost = True
                self.tally.cut_starts += not self.served
                self._cut()
        for disk in self.disks:
            disk.hang_up()

    def _live(self) -> None:
        lock = process.lock_journal(self.journal)
        pool = SegmentPool(self.journal, self.segments * SEGMENT)
        pool.allot()
        run = new_run_id()
        events = EventLog(self.paths.events(run))
        planner = Planner.of(self.config, self.paths, self.journal, events, lambda _: None, None)
        plan = planner.plan(run)
        with self._unharmed():
            self._recovered(plan)
        self.plan = plan
        write_durably(run_path(self.journal, plan.info.run), plan.info.to_json())
        self.resyncs = list(plan.resync)
        self._note_begun(plan)
        while True:
            try:
                self.server = process.prepare(self.journal, pool, self._assignment(plan))
                self.served, self.run = True, plan.info.run
                for disk in self.disks:
                    disk.connect(str(self.paths.nbd_socket))
                self.server.serve()
                with self._unharmed():
                    for target in SIZES:
                        self._check_level(target)
                break
            except Killed:
                self.tally.kills += 1
                self._gone()
                self.left, self.death = self.rng.randrange(1, 500), PowerCut
                lock = process.lock_journal(self.journal)
                pool = SegmentPool(self.journal, self.segments * SEGMENT)
                pool.allot()
        with contextlib.suppress(OSError):
            os.close(lock)

    def _assignment(self, plan: Plan) -> dict[str, Any]:
        info = plan.info
        self.paths.runtime.mkdir(parents=True, exist_ok=True)
        return {
            "vm": info.vm,
            "uuid": info.uuid,
            "run": fmt.run_name(info.run),
            "first_seq": info.first_seq,
            "time_floor_ns": info.parent.time_ns if info.parent else 0,
            "parent": {"run": fmt.run_name(info.parent.run), "seq": info.parent.seq} if info.parent else None,
            "disks": [
                {"index": d.index, "target": d.target, "image": d.image, "format": d.format, "size": d.size}
                | {"identity": asdict(plan.identities[d.target])}
                for d in info.disks
            ],
            "nbd_socket": str(self.paths.nbd_socket),
            "control_socket": None,
            "events": str(self.paths.events(info.run)),
            "on_journal_full": "drop-history",
        }

    def _gone(self) -> None:
        """The process is gone, its files, sockets and threads with it."""
        self.dying = True
        self.turns.end(self.death)
        self.turns.ending = None
        self._leave()
        self.dying = False

    def end(self) -> None:
        """Leave nothing behind, wherever it stands."""
        with contextlib.suppress(PowerCut, Killed):
            self._gone()
        for disk in self.disks:
            disk.hang_up()

    def _leave(self) -> None:
        if self.server is not None:
            server, self.server = self.server, None
            server._epoll.close()
            real.close(server._wakeup)
            for listener in server._listeners:
                listener.close()
            for disk in server.disks.values():
                for connection in disk.connections:
                    connection.sock.close()
            for greeting in vars(getattr(server, "_greeter", SimpleNamespace())).get("_greetings", {}).values():
                greeting.sock.close()
        self.layer.abandon()
        self.promises.remember()

    def _cut(self) -> None:
        self.tally.cuts += 1
        self._gone()
        self.left = 0
        self.layer.cut(self.rng)
        self.boot = self.rng.randbytes(16)
        off_seconds = self.rng.choice((0.2, 5, 60, 3600))
        self.pass_time(off_seconds)
        self.uptime_ns = self.rng.choice((1, 30, 600)) * 10**9
        self.pass_time(self.uptime_ns / 1e9)

    # -- what the guest does, once in every turn of capture's loop

    def _step(self) -> None:
        assert self.server is not None
        self._before("turn")
        rng = self.rng
        for disk in self.disks:
            disk.receive()
        greeted = all(disk.greeted for disk in self.disks)
        if not self.idle and greeted and rng.random() < 0.01:
            self.idle = rng.choice((8, 15, 33, 80))
        elif self.idle == 1 and rng.random() < 0.7:
            # What a guest does after a long silence is all that is lost.
            self.left = rng.randrange(5, 25)
        self.idle = max(0, self.idle - 1)
        self.pass_time(1.0 if self.idle else rng.choice((0.0001, 0.001, 0.01, 0.3)))
        while self.turns.jobs and rng.random() < 0.4:
            self._let_one_run()
        chance = rng.random()
        if chance < 0.05:
            self.server.record_event(fmt.Event.BOOKMARK, {"name": "x" * rng.randrange(1, 5000)})
        elif chance < 0.055 and self.begun:
            self._fail(rng.choice(list(self.begun)))
        elif chance < 0.08 and self.begun:
            self._complete(rng.choice(list(self.begun)))
        elif chance < 0.15 and self.resyncs:
            self._resync(self.resyncs[-1])
        elif 0.15 <= chance < 0.16:
            # Not the host, only capture dies; the host's turn may come later.
            self.left, self.death = rng.randrange(1, 6), Killed
        chosen = rng.choice(self.disks)
        requests = [chosen.make(rng) for _ in range(rng.randrange(1, 9))] if not self.idle and rng.random() < 0.7 else []
        for disk in self.disks:
            disk.send(requests if disk is chosen else ())
        self.steps -= not self.idle
        if self.steps <= 0:
            if rng.random() < 0.5:
                self.left = rng.randrange(1, 40)
            self.server.stop()

    def _note_begun(self, plan: Plan) -> None:
        """What each base that is being made is to be: of an earlier run's, what is known already."""
        before, self.begun = self.begun, {}
        power_lost, self.power_lost = self.power_lost, False
        self.baseless -= plan.info.bases.keys()
        for disk in self.disks:
            found = begun_base(self.journal, disk.target)
            if found is None:
                continue
            if plan.info.bases.get(disk.target) == found[0]:
                self.begun[disk.target] = (found[0], self.image(disk.target).read_bytes())
            else:
                assert before[disk.target][0] == found[0], "a base is gone on with that nobody began"
                self.begun[disk.target] = before[disk.target]
                self.tally.bases_gone_on_with += 1
        lost = {base_id for base_id, _ in before.values()} - {base_id for base_id, _ in self.begun.values()}
        known = not power_lost and not self.promises.recycled_any
        assert not (lost and known), "a base was given up, and the host did not die while the VM ran"

    def _fail(self, target: str) -> None:
        """What capture cannot keep fails the base, for good."""
        assert self.server is not None
        base = self.server.disks[target].image.base
        if base is not None:
            base.fail("there is no room")
            del self.begun[target]
            self.baseless.add(target)

    def _complete(self, target: str) -> None:
        """The base that is being made of a disk is completed: it is the disk as its run found it."""
        base_id, expected = self.begun.pop(target)
        with self._unharmed():
            begun = CopyBeforeWrite.open(self.journal, target)
            assert begun is not None and begun.base.id == base_id
            manifest = complete(self.paths, self.repository, self.image(target), begun, None)
            begun.close()
            base = self.promises.base(target, manifest.id)
            assert base == expected, f"{target}: the base differs from what its run began with from {difference(base, expected)} on"
            self.tally.bases += 1

    def _resync(self, target: str) -> None:
        assert self.plan is not None
        if target in self.begun:
            self._complete(target)
        self.tally.resyncs += 1
        with self.promises.history() as history:
            info = history.runs[self.plan.info.run]
            try:
                resync(history, info, target, self.journal, self.paths, EventLog(None), 1 << 30)
            except (MomentError, RepositoryError) as refused:
                assert target in self.baseless or self._recycled(refused), "the plan said that its history can be gone on from"
                return
        self.resyncs.remove(target)
        with self._unharmed():
            self._check_level(target)

    @staticmethod
    def _recycled(refused: MomentError | RepositoryError) -> bool:
        """History is refused because the journal, which nobody shipped, was too small for it."""
        return "shipped" in str(refused)

    def _instruct(self, _: VmPaths, **request: Any) -> dict[str, Any]:
        assert self.server is not None
        answers: list[dict[str, Any]] = []
        instruct = getattr(self.server, "instruct", None)
        if instruct is None:
            from vmrewind.capture.instructions import instruct as carry_out

            carry_out(self.server, request, answers.append)
        else:
            instruct(request, answers.append)
        if not answers[0]["ok"]:
            raise VmStateError(str(answers[0]))
        return answers[0]

    # -- what must hold

    def _check_level(self, target: str) -> None:
        """History at its last record is what the image holds; unless the disk's gap is open, when it is refused."""
        assert self.plan is not None
        try:
            found = self.promises.latest(self.plan.info.run, target)
        except (MomentError, RepositoryError) as refused:
            unmade = target in self.begun or target in self.baseless
            assert target in self.resyncs or unmade or self._recycled(refused), "no gap is open"
            return
        assert target not in self.resyncs, "a gap is open"
        image = self.image(target).read_bytes()
        assert found == image, f"{target}: history is not level with the image from {difference(found, image)} on"

    def _recovered(self, plan: Plan) -> None:
        """A plan was made, so what a death left is finished."""
        parent = plan.info.parent
        views = self.promises.at_end(parent) if parent is not None else {}
        if parent is not None:
            self.tally.lost_records += self.promises.lost(parent)
        for disk in self.disks:
            target, image = disk.target, self.image(disk.target).read_bytes()
            view = views.get(target)
            # If nothing is left of the run that the guest was in, the view is of an earlier one.
            disk.check(image, view if parent is not None and parent.run == self.run else None)
            assert self.layer.settled(self.image(target)), f"{target}: what the guest finds may be lost again"
            if view is not None and view != image:
                self.tally.images_ahead += 1
                assert target in plan.info.gaps, f"{target}: goes on without a gap, and differs from its history"
            begun = begun_base(self.journal, target)
            base_id = plan.info.bases.get(target)
            if base_id is not None and (begun is None or begun[0] != base_id):
                base = self.promises.base(target, base_id)
                assert base == image, f"{target}: the base that it is said to equal differs from {difference(base, image)} on"
            disk.begin(image)
        self.run = 0


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A directory in memory, if the host has that, with the product's state in it."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="vmr-power-", dir=parent))
    runtime = tempfile.mkdtemp(prefix="vmr-")
    environment = {"VMREWIND_STATE_DIR": str(directory / "host/state"), "VMREWIND_RUNTIME_DIR": runtime}
    try:
        with patch.dict(os.environ, environment):
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)


def run_world(seed: int, tally: Tally, lives: int = 6) -> None:
    """Let one world live and die ``lives`` times; AssertionError if a promise is broken."""
    with _scratch() as directory:
        world = World(seed, directory, tally)
        try:
            for _ in range(lives):
                world.live()
        finally:
            world.end()
            gc.collect()
