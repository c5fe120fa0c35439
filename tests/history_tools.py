"""Histories made by hand for tests: a journal written through the real writer at chosen times, a repository, and a model."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from vmrewind.cli.main import main
from vmrewind.history.history import History
from vmrewind.history.rows import ROW, RecordTables
from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.pool import Recycling, SegmentPool
from vmrewind.journal.reader import Segment, segment_files
from vmrewind.journal.runs import (
    Discontinuity,
    DiskInfo,
    Head,
    ImageIdentity,
    Position,
    RunInfo,
    run_path,
    write_durably,
)
from vmrewind.journal.writer import JournalWriter
from vmrewind.repository.base import make_base
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.repository.secret import Secret
from vmrewind.repository.segment import encode_segment, payload_lengths

VM = "web01"
UUID = uuid.UUID("6d1b4a86-58f0-4c32-a4a7-0d7d2a9ac3c1")
NS = 1_000_000_000
T0 = 1_790_000_000 * NS
"""When histories begin here: some time in 2026."""


def exit_code_of_main() -> int:
    """Run the command line of ``sys.argv`` in this process."""
    try:
        return main()
    except SystemExit as end:
        return int(end.code or 0)


@dataclass
class Disk:
    """A disk of the model: its content now, and after each record."""

    target: str
    content: bytearray
    states: dict[int, bytes] = field(default_factory=dict)


class MadeHistory:
    """A VM's history in the making. ``now_ns`` is the clock: set it, or let ``tick`` do so."""

    def __init__(
        self,
        directory: Path,
        sizes: dict[str, int],
        *,
        journal_size: int = 8 << 20,
        secret: Secret | None = None,
        states: bool = True,
    ) -> None:
        """``states``: keep what the disks were after each record, in memory."""
        self.states = states
        self.directory = directory
        self.journal = directory / "journal"
        self.repository_path = directory / "repo"
        self.repository: VmRepository = Repository.init(str(self.repository_path), secret).vm(VM)
        self.pool = SegmentPool(self.journal, journal_size)
        self.pool.allot()
        self.now_ns = T0
        self.disks = [Disk(target, bytearray(size)) for target, size in sizes.items()]
        self.run = 0
        self.next_seq = 1
        self.infos: dict[int, RunInfo] = {}
        self.writer: JournalWriter | None = None
        self.times: dict[int, int] = {}
        self.recycling = Recycling.NO

    # -- runs

    def base(self, target: str) -> str:
        """Make a base of a disk as it is now; returns its id."""
        image = self.directory / f"{target}.image"
        image.write_bytes(self.disk(target).content)
        partial = self.directory / "partial"
        manifest = make_base(self.repository, target, image, uuid=str(UUID), partial=partial)
        write_durably(self.directory / "bases" / target / f"{manifest.id}.json", manifest.to_json())
        return manifest.id

    def start(
        self,
        *,
        bases: Sequence[str] | None = None,
        parent: Position | None = None,
        gaps: dict[str, Discontinuity] | None = None,
        run: int | None = None,
    ) -> int:
        """Begin a run, with new bases for the disks named (default: all in a first run). Returns the run."""
        self.run = run if run is not None else (max(self.infos, default=99) + 1)
        if bases is None:
            bases = [disk.target for disk in self.disks] if parent is None else []
        self.next_seq = parent.seq + 1 if parent is not None else 1
        self.infos[self.run] = RunInfo(
            run=self.run,
            parent=parent,
            vm=VM,
            uuid=str(UUID),
            host="kvm1",
            start_time_ns=self.now_ns,
            first_seq=self.next_seq,
            disks=tuple(DiskInfo(i, d.target, len(d.content), "raw", f"/{d.target}") for i, d in enumerate(self.disks)),
            bases={target: self.base(target) for target in bases},
            gaps=gaps or {},
        )
        write_durably(run_path(self.journal, self.run), self.infos[self.run].to_json())
        (self.journal / "head.json").unlink(missing_ok=True)
        clock = Clock(parent.time_ns if parent is not None else 0, lambda: self.now_ns, lambda: self.now_ns)
        self.writer = JournalWriter(self.pool, UUID.bytes, self.run, clock, lambda _: self.recycling, self.next_seq)
        self.event(fmt.Event.START, {"vm": VM})
        return self.run

    def stop(self) -> Position:
        """End the run cleanly, with a head."""
        seq = self.event(fmt.Event.STOP, {})
        position = Position(self.run, seq, self.times[seq])
        identities = {d.target: ImageIdentity(f"/{d.target}", len(d.content), 1, 1, 0) for d in self.disks}
        write_durably(self.journal / "head.json", Head(position, identities).to_json())
        return position

    def position(self, seq: int) -> Position:
        """The position of a record of the run at hand."""
        return Position(self.run, seq, self.times[seq])

    def go_back(self, position: Position) -> None:
        """Make the model's disks what they were after a record."""
        for disk in self.disks:
            disk.content[:] = disk.states[position.seq]

    # -- records

    def disk(self, target: str) -> Disk:
        return next(disk for disk in self.disks if disk.target == target)

    def tick(self, seconds: float = 1) -> None:
        self.now_ns += int(seconds * NS)

    def batch(self, records: Sequence[tuple[int, str, int, bytes | int]]) -> int:
        """Write records (op, target, offset, data or length) as one batch; returns the first seq."""
        assert self.writer is not None
        first = self.writer.next_seq
        payloads, total = [], 0
        for i, (op, target, offset, what) in enumerate(records):
            data = what if isinstance(what, bytes) else b""
            length = len(data) if isinstance(what, bytes) else what
            index = next(n for n, disk in enumerate(self.disks) if disk.target == target)
            xxh3 = xxhash.xxh3_64_intdigest(data) if data else 0
            fmt.RECORD.pack_into(self.writer.table, self.writer.table_at + i * fmt.RECORD.size, offset, length, index, op, 0, xxh3)
            payloads.append(data.ljust(fmt.padded(len(data)), b"\0"))
            total += fmt.padded(len(data))
        assert self.writer.commit(len(records), payloads, total) == first
        time_ns = self.writer.last_time_ns - len(records) + 1
        for i, (op, target, offset, what) in enumerate(records):
            content = self.disk(target).content
            if op == fmt.Op.WRITE:
                assert isinstance(what, bytes)
                content[offset : offset + len(what)] = what
            elif op in (fmt.Op.ZERO, fmt.Op.DISCARD):
                assert isinstance(what, int)
                content[offset : offset + what] = bytes(what)
            self._note(first + i, time_ns + i)
        return first

    def write(self, target: str, offset: int, data: bytes) -> int:
        """Write one record in a batch of its own, a second later; returns its seq."""
        self.tick()
        return self.batch([(fmt.Op.WRITE, target, offset, data)])

    def event(self, kind: fmt.Event, content: dict[str, object]) -> int:
        """Write an event record, a second later; returns its seq."""
        assert self.writer is not None
        self.tick()
        seq = self.writer.event(kind, content)
        self._note(seq, self.writer.last_time_ns)
        return seq

    def mark(self, name: str) -> int:
        """Write a bookmark; returns its seq."""
        return self.event(fmt.Event.BOOKMARK, {"name": name})

    def void(self, seq: int, target: str) -> None:
        """Void a record. The model is the caller's to correct."""
        assert self.writer is not None
        index = next(n for n, disk in enumerate(self.disks) if disk.target == target)
        own = self.writer.next_seq
        self.writer.void([seq], index)
        self._note(own, self.writer.last_time_ns)

    def close_segment(self) -> None:
        """Go on in another segment."""
        assert self.writer is not None
        self.writer._roll(0)

    def _note(self, seq: int, time_ns: int) -> None:
        self.times[seq] = time_ns
        for disk in self.disks if self.states else ():
            disk.states[seq] = bytes(disk.content)

    # -- shipping and reading

    def ship(self, run: int, first: int, last: int, targets: Sequence[str] | None = None) -> SegmentName:
        """Ship the records [first, last] of some disks (default: all) as one object."""
        wanted = [i for i, disk in enumerate(self.disks) if targets is None or disk.target in targets]
        rows, payload = [], bytearray()
        for file in segment_files(self.journal, run):
            with Segment(file.path) as segment:
                for row in RecordTables(segment.tables()).rows:
                    if first <= row["seq"] <= last and (row["disk"] == fmt.ALL_DISKS or row["disk"] in wanted):
                        row = row.copy()
                        data = b""
                        if row["op"] in (fmt.Op.WRITE, fmt.Op.EVENT):
                            with open(file.path, "rb") as raw:
                                raw.seek(int(row["position"]))
                                data = raw.read(int(row["length"]))
                        row["position"] = len(payload)
                        payload += data.ljust(fmt.padded(len(data)), b"\0")
                        rows.append(row)
        name = SegmentName(run, first, last, sum(1 << i for i in wanted), VM)
        packed = np.array(rows, ROW)
        assert int(payload_lengths(packed["op"], packed["length"]).sum()) == len(payload)
        self.repository.put_segment(name, encode_segment(name, UUID.bytes, packed, bytes(payload)))
        return name

    def ship_runs(self) -> None:
        """Describe every run in the repository."""
        for info in self.infos.values():
            self.repository.put_run(info)

    def open(self, *, local: bool = True, repository: bool = True) -> History:
        """Open what was made, as a host that has the journal, or one that has not."""
        journal, bases = (self.journal, self.directory / "bases") if local else (None, None)
        return History.open(VM, journal, self.repository if repository else None, bases=bases)

    def segment_paths(self) -> list[Path]:
        return [file.path for file in segment_files(self.journal)]
