"""A journal written by the real writer, and what a repository has of it, record by record."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.pool import Recycling, SegmentPool
from vmrewind.journal.runs import DiskInfo, Position, RunInfo, run_path, write_durably
from vmrewind.journal.writer import JournalWriter
from vmrewind.repository import layout
from vmrewind.repository.repository import VmRepository
from vmrewind.repository.segment import ShippedSegment

VM = "web01"
UUID = "0f0e0d0c-0b0a-0908-0706-050403020100"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Truth:
    """A record as it was written."""

    seq: int
    time_ns: int
    offset: int
    length: int
    disk: int
    op: int
    flags: int
    payload: bytes


class WrittenJournal:
    """A run's journal in the making. ``truth`` is every record written, in order."""

    def __init__(
        self,
        journal: Path,
        run: int = 7,
        *,
        first_seq: int = 1,
        size: int = 64 * MIB,
        disks: Iterable[str] = ("vda", "vdb"),
        parent: Position | None = None,
        bases: Iterable[str] | None = None,
    ) -> None:
        self.journal = journal
        self.pool = SegmentPool(journal, size)
        self.pool.allot()
        self.run = run
        self.truth: list[Truth] = []
        self.writer = JournalWriter(self.pool, uuid.UUID(UUID).bytes, run, Clock(), lambda *_: Recycling.DROPS, first_seq)
        targets = tuple(disks)
        self.info = RunInfo(
            run, parent, VM, UUID, "host", 1, first_seq,
            tuple(DiskInfo(i, target, 1 << 30, "raw", f"/{target}") for i, target in enumerate(targets)),
            dict.fromkeys(targets if bases is None else bases, "base"),
        )  # fmt: skip

    def close(self) -> None:
        """Close what a capture leaves to the end of its process."""
        finished, open_now, _ = self.writer.take_unsynced()
        for fd in {*finished, open_now} - {-1}:
            os.close(fd)

    def describe(self) -> None:
        """As the start process does before the CPU runs."""
        write_durably(run_path(self.journal, self.run), self.info.to_json())

    def batch(self, records: Iterable[tuple[int, int, bytes]]) -> None:
        """Write a batch of (op, disk, payload); for operations without a payload, its length counts."""
        payloads = []
        made = []
        for i, (op, disk, payload) in enumerate(records):
            has = op in fmt.PAYLOAD_OPS
            xxh3 = xxhash.xxh3_64_intdigest(payload) if has else 0
            offset = (len(self.truth) + i) * 4096
            fmt.RECORD.pack_into(
                self.writer.table, self.writer.table_at + i * fmt.RECORD.size, offset, len(payload), disk, op, i % 4, xxh3
            )
            if has:
                payloads.append(payload.ljust(fmt.padded(len(payload)), b"\0"))
            made.append(Truth(0, 0, offset, len(payload), disk, op, i % 4, payload if has else b""))
        seq = self.writer.commit(len(made), payloads, sum(map(len, payloads)))
        time_ns = self.writer.last_time_ns - len(made) + 1
        self.truth.extend(replace(record, seq=seq + i, time_ns=time_ns + i) for i, record in enumerate(made))

    def random_batch(self, chance: random.Random, payload_max: int = 20_000) -> None:
        """A batch of up to 40 operations on two disks, now and then an event of the whole VM."""
        records = []
        for _ in range(chance.randint(1, 40)):
            op = chance.choice([fmt.Op.WRITE] * 6 + [fmt.Op.ZERO, fmt.Op.DISCARD, fmt.Op.FLUSH, fmt.Op.EVENT])
            disk = fmt.ALL_DISKS if op is fmt.Op.EVENT else chance.randrange(2)
            records.append((int(op), disk, chance.randbytes(chance.randint(1, payload_max))))
        self.batch(records)

    def of(self, *indices: int) -> list[Truth]:
        """What must be shipped of these disks."""
        return [record for record in self.truth if record.disk in (*indices, fmt.ALL_DISKS)]


def put_bases(vm: VmRepository, *disks: str) -> None:
    """Something in the place of the bases that a ``WrittenJournal``'s run stands on."""
    for disk in disks:
        vm.repository.put(layout.base_key(VM, disk, "base"), b"{}")


def shipped(vm: VmRepository, run: int, disk: int) -> list[Truth]:
    """Every record of a disk and of the whole VM that segments carrying the disk hold, in order of seq; none may be there twice."""
    found: list[Truth] = []
    for name in vm.segments():
        if name.run != run or not name.carries(disk):
            continue
        segment = ShippedSegment(lambda offset, length, name=name: vm.get_segment(name, offset, length), name)
        for row in segment.rows:
            if int(row["disk"]) in (disk, fmt.ALL_DISKS):
                fields = (int(row[field]) for field in ("seq", "time_ns", "offset", "length", "disk", "op", "flags"))
                found.append(Truth(*fields, segment.payload(row)))
    found.sort(key=lambda record: record.seq)
    seqs = [record.seq for record in found]
    assert len(seqs) == len(set(seqs)), "a record was shipped twice"
    return found


def covered(vm: VmRepository, run: int, disk: int) -> list[tuple[int, int]]:
    """The ranges of seqs that the names say are there, joined where they touch; none may overlap."""
    ranges: list[tuple[int, int]] = []
    for name in vm.segments():
        if name.run == run and name.carries(disk):
            assert not ranges or name.first > ranges[-1][1], "two segments cover the same seq"
            if ranges and name.first == ranges[-1][1] + 1:
                ranges[-1] = (ranges[-1][0], name.last)
            else:
                ranges.append((name.first, name.last))
    return ranges
