"""Shipping over a store that fails: what is in the repository is always a prefix of the journal, without hole.

``VMREWIND_SHIP_SEEDS`` says for how many seeds (500; a thousand, or more, by hand).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.failing_store import FailingStore
from tests.ship_support import MIB, VM, Truth, WrittenJournal
from vmrewind.errors import RepositoryError
from vmrewind.journal import format as fmt
from vmrewind.journal.runs import Position
from vmrewind.recover.findings import Finding
from vmrewind.recover.verify import verify
from vmrewind.repository.memory import MemoryStore
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.repository.secret import secret_of_key_file
from vmrewind.repository.segment import ShippedSegment
from vmrewind.ship import shipper as shipper_module
from vmrewind.ship.shipper import Shipper

SEEDS = int(os.environ.get("VMREWIND_SHIP_SEEDS", "500"))
GROUPS = 4
BOTH = ("vda", "vdb")


def history_of(vm: VmRepository, run: int, disk: int) -> list[Truth]:
    """A disk's records as a reader has them: by seq; one that is there twice must be the same both times."""
    found: dict[int, Truth] = {}
    for name in vm.segments():
        if name.run == run and name.carries(disk):
            segment = ShippedSegment(lambda offset, length, name=name: vm.get_segment(name, offset, length), name)
            for row in segment.rows:
                if int(row["disk"]) in (disk, fmt.ALL_DISKS):
                    fields = (int(row[field]) for field in ("seq", "time_ns", "offset", "length", "disk", "op", "flags"))
                    record = Truth(*fields, segment.payload(row))
                    assert found.setdefault(record.seq, record) == record
    return [found[seq] for seq in sorted(found)]


def reached(vm: VmRepository, run: int, disk: int, first: int) -> int:
    """The seq up to which the names cover the disk from ``first`` on; there must be nothing behind a hole."""
    names = [name for name in vm.segments() if name.run == run and name.carries(disk)]
    last = first - 1
    for name in names:
        assert name.first <= last + 1, f"a hole before {name}"
        last = max(last, name.last)
    return last


class Run:
    """One seed: a journal that is written while it is shipped over a failing store, by shippers that die."""

    def __init__(self, directory: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chance = random.Random(seed)
        self.seed = seed
        self.memory = MemoryStore()
        self.store = FailingStore(self.memory, seed, self.chance.choice([0.05, 0.2, 0.5]))
        key_file = directory / "key"
        monkeypatch.setenv("VMREWIND_KEY_FILE", str(key_file))
        Repository.init_in(self.memory, secret_of_key_file(key_file) if seed % 2 else None)
        self.vm = Repository.open_in(self.memory).vm(VM)
        self.journal = directory / f"journal-{seed}"
        self.state = directory / f"vm-{seed}"
        self.written: list[WrittenJournal] = []
        self.disks = self.chance.choice([BOTH, ("vda",), ("vdb",)])
        monkeypatch.setattr(shipper_module.Repository, "open", lambda _: Repository.open_in(self.store))
        # Small segments: puts that are made while others are under way.
        monkeypatch.setattr(shipper_module, "PAYLOAD_MAX", self.chance.choice([600, 8 * MIB]))
        self.shipper = self.new_shipper()

    def new_shipper(self) -> Shipper:
        return Shipper(VM, self.journal, "memory://", self.state)

    def begin(self) -> None:
        parent = None
        if self.written:
            last = self.written[-1].truth[-1]
            parent = Position(self.written[-1].run, last.seq, last.time_ns)
        run, first_seq = 7 + len(self.written), 1 if parent is None else parent.seq + 1
        journal = WrittenJournal(
            self.journal, run, first_seq=first_seq, size=4 * MIB, parent=parent, bases=BOTH if parent is None else ()
        )
        journal.batch([(fmt.Op.WRITE, 0, b"first")])
        journal.describe()
        self.written.append(journal)

    def step(self) -> None:
        """What the ship process does in a turn."""
        try:
            self.shipper.step(self.disks, hurry=self.chance.random() < 0.7)
        except RepositoryError:
            self.shipper.reset()

    def check(self) -> None:
        """A prefix, at this instant: of each run, and of a run nothing before its parent is whole."""
        whole = True
        for written in self.written:
            for disk in self.indices():
                last = reached(self.vm, written.run, disk, written.truth[0].seq)
                assert last <= written.truth[-1].seq
                assert whole or last < written.truth[0].seq, "a run is there before its parent"
            lasts = [reached(self.vm, written.run, disk, written.truth[0].seq) for disk in self.indices()]
            whole = whole and min(lasts) == written.truth[-1].seq

    def indices(self) -> list[int]:
        return [BOTH.index(disk) for disk in self.disks]

    def play(self) -> None:
        self.begin()
        for _ in range(self.chance.randint(4, 12)):
            event = self.chance.random()
            if event < 0.35:
                self.written[-1].random_batch(self.chance, 400)
            elif event < 0.42 and len(self.written) < 3:
                self.begin()
            elif event < 0.52:
                # Killed: nothing of the old one is left. Its last put is over first, so that a failure replays from its seed.
                with contextlib.suppress(RepositoryError):
                    self.shipper.settle()
                self.shipper = self.new_shipper()
            else:
                self.step()
            self.check()
        self.store.settle()
        self.shipper.reset()
        deadline = time.monotonic() + 30
        while self.shipper.step(self.disks, hurry=True) == 0.0:
            assert time.monotonic() < deadline
        self.check()
        if self.seed % 20 < 2:
            found: list[Finding] = []
            verify(Repository.open_in(self.memory), found.append, lambda *_: None, vms=[VM], data=True)
            known = [
                finding
                for finding in found
                if finding.object.endswith(("/base.json", "/config/")) or "no record of disk" in finding.message
            ]
            assert found == known, "these journals have no configuration, bases in name only, and a disk not carried is a gap"
        for written in self.written:
            for disk in self.indices():
                assert history_of(self.vm, written.run, disk) == written.of(disk)
                assert reached(self.vm, written.run, disk, written.truth[0].seq) == written.truth[-1].seq


@pytest.mark.parametrize("group", range(GROUPS))
def test_whatever_the_store_does_the_repository_is_a_prefix_of_the_journal(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: Counter[str] = Counter()
    for seed in range(group, SEEDS, GROUPS):
        run = Run(tmp_path, seed, monkeypatch)
        try:
            run.play()
        except BaseException as error:
            error.add_note(f"seed {seed}; the store did {dict(run.store.happened)}")
            raise
        for written in run.written:
            written.close()
        shutil.rmtree(run.journal)
        happened += run.store.happened
    for kind in ("error", "lost", "late", "never", "echo", "slow", "error in the middle of a list", "late, and there already"):
        assert happened[kind] > 0, f"the store never did this: {kind}"
