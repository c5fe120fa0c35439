"""What happened on a branch: events recorded in the journal, and how much was written when."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vmrewind.errors import CorruptionError
from vmrewind.history.branch import Branch
from vmrewind.history.history import History
from vmrewind.history.records import Piece, RunRecords, with_notes, with_rows
from vmrewind.history.rows import between
from vmrewind.journal import format as fmt
from vmrewind.journal.runs import DiskInfo, Position
from vmrewind.repository.segment import Rows

_KINDS: Final = frozenset(int(kind) for kind in fmt.Event)


@dataclass(frozen=True, slots=True)
class JournalEvent:
    """An event. ``content`` is its record's payload; ``{"unreadable": why}`` where that is damaged.

    ``position`` is the record's, but of a bookmark the moment that it names.
    """

    position: Position
    kind: fmt.Event
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Writes:
    """Bytes and operations that the guest wrote, and its flushes, by bucket of time. ``edges_ns`` has one element more."""

    edges_ns: NDArray[np.int64]
    bytes: NDArray[np.int64]
    operations: NDArray[np.int64]
    flushes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Flush:
    """A flush of the guest's: whatever it had been told is written to ``target`` is there at ``position``."""

    position: Position
    target: str


def events(history: History, branch: Branch) -> Iterator[JournalEvent]:
    """The events on a branch, in order."""
    for leg in branch.legs:
        records = history.records(leg.info.run)
        for piece, rows in history.retrying(partial(_notes, records)):
            for row in rows[rows["op"] == fmt.Op.EVENT]:
                seq, kind = int(row["seq"]), int(row["flags"])
                if kind not in _KINDS:
                    continue
                try:
                    where = int(row["position"]), int(row["length"]), int(row["xxh3"])
                    payload = records.payload(piece.source, None, (seq, seq), *where)
                    content = json.loads(payload)
                except (CorruptionError, ValueError) as error:
                    content = {"unreadable": str(error)}
                position = Position(leg.info.run, seq, int(row["time_ns"]))
                if kind == fmt.Event.BOOKMARK:
                    position = _named(content, position)
                if leg.cut is None or position.seq <= leg.cut:
                    yield JournalEvent(position, fmt.Event(kind), content)


def _notes(records: RunRecords) -> list[tuple[Piece, Rows]]:
    return list(with_notes(records.event_pieces()))


def _named(content: dict[str, Any], own: Position) -> Position:
    """The moment that a bookmark names. One of a quiesced guest was set later, and is on every branch that has the moment."""
    seq, time_ns = content.get("seq"), content.get("time_ns")
    if type(seq) is not int or type(time_ns) is not int or not 0 < seq <= own.seq:
        return own
    return Position(own.run, seq, time_ns)


def writes(history: History, branch: Branch, since_ns: int, until_ns: int, buckets: int) -> Writes:
    """How much the guest wrote between two times (inclusive), in so many equal buckets."""
    span_ns = max(until_ns + 1 - since_ns, buckets)
    edges = np.array([since_ns + span_ns * i // buckets for i in range(buckets + 1)], np.int64)
    total_bytes, total_operations, flushes = (np.zeros(buckets, np.int64) for _ in range(3))
    for leg in branch.legs:
        records = history.records(leg.info.run)
        for disk in leg.info.disks:
            found = history.retrying(partial(_writes_of_disk, records, disk.index, leg.cut, edges))
            total_bytes += found.bytes
            total_operations += found.operations
            flushes += found.flushes
    return Writes(edges, total_bytes, total_operations, flushes)


def _writes_of_disk(records: RunRecords, disk: int, cut: int | None, edges: NDArray[np.int64]) -> Writes:
    buckets = len(edges) - 1
    total_bytes, total_operations, flushes = (np.zeros(buckets, np.int64) for _ in range(3))
    for _, every in with_rows(records.pieces(disk)):
        rows = _on_branch(every, cut)
        rows = rows[rows["disk"] == disk]
        at = np.searchsorted(edges, rows["time_ns"].astype(np.int64), side="right") - 1
        inside = (at >= 0) & (at < buckets)
        written = inside & (rows["op"] == fmt.Op.WRITE)
        total_operations += np.bincount(at[written], minlength=buckets)
        total_bytes += np.bincount(at[written], rows["length"][written], buckets).astype(np.int64)
        flushes += np.bincount(at[inside & (rows["op"] == fmt.Op.FLUSH)], minlength=buckets)
    return Writes(edges, total_bytes, total_operations, flushes)


def flushes_before(history: History, branch: Branch, until: Position, count: int) -> list[Flush]:
    """The last flushes at or before a position on a branch, at most so many, the newest last."""
    found: list[Flush] = []
    last_leg = branch.leg(until.run)
    for leg in reversed(branch.legs[: last_leg + 1]):
        in_leg: list[Flush] = []
        cut = until.seq if leg.info.run == until.run else leg.cut
        for disk in leg.info.disks:
            in_leg += history.retrying(partial(_last_flushes, history.records(leg.info.run), disk, cut, count))
        found = [*sorted(in_leg, key=lambda flush: flush.position.seq), *found][-count:]
        if len(found) == count:
            break
    return found


def _last_flushes(records: RunRecords, disk: DiskInfo, cut: int | None, count: int) -> deque[Flush]:
    found: deque[Flush] = deque(maxlen=count)
    for _, every in with_rows(records.pieces(disk.index)):
        rows = _on_branch(every, cut)
        rows = rows[(rows["op"] == fmt.Op.FLUSH) & (rows["disk"] == disk.index)][-count:]
        found.extend(Flush(Position(records.run, int(row["seq"]), int(row["time_ns"])), disk.target) for row in rows)
    return found


def _on_branch(rows: Rows, cut: int | None) -> Rows:
    return rows if cut is None else between(rows, 0, cut)
