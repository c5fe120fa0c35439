"""At which moments a file changed, and which records touched a range of a disk.

A look at a file reads some ranges of the disk: its content, and every block on the way to it. As long as no record touches one of
them, a look gives the same. So the file is looked at again only behind a record that does, and what counts is what is seen then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from vmrewind.errors import FileError, MomentError, NoSuchFileError
from vmrewind.history.branch import Branch
from vmrewind.history.history import History
from vmrewind.history.layers import effective
from vmrewind.history.records import RunRecords
from vmrewind.history.rows import ROW
from vmrewind.history.sources import Source
from vmrewind.history.stretches import VOID_DISTANCE_MAX
from vmrewind.history.view import View
from vmrewind.journal.format import Op
from vmrewind.journal.runs import DiskInfo, Position
from vmrewind.recover.files.client import Reader
from vmrewind.recover.files.opening import chain_of, problem_of, readable
from vmrewind.repository.segment import Rows

Between = tuple[Position, Position]

_REBASE_ROWS: Final = 5000
"""So many records are laid over a view before a new one is made."""


@dataclass(frozen=True, slots=True)
class State:
    """A file as it was seen. ``kind``: ``absent`` if it was not there, ``unreadable`` with the reason in ``problem``."""

    kind: str
    size: int = 0
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    target: bytes = b""
    content: str = ""
    problem: str = ""


ABSENT: Final = State("absent")


@dataclass(frozen=True, slots=True)
class Change:
    """From ``position`` on the file was so. ``known_before``: False for the first that is known, and behind a gap in history."""

    position: Position
    target: str
    volume: str
    state: State
    what: tuple[str, ...]
    known_before: bool


@dataclass(frozen=True, slots=True)
class Touch:
    """A record that touched a range."""

    position: Position
    target: str
    op: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A disk's records from where it can be seen on to the end of a run's part: no gap in between."""

    disk: DiskInfo
    records: RunRecords
    start: Position
    rows: Rows
    sources: NDArray[np.int64]
    known: list[Source]
    follows: bool


class _Rolling:
    """A disk after the first ``count`` of a stretch's rows."""

    def __init__(self, history: History, stretch: _Stretch) -> None:
        self._history = history
        self._stretch = stretch
        self._starts = stretch.rows["offset"].astype(np.int64)
        self._ends = self._starts + stretch.rows["length"]
        self._from = 0
        self.view = View.open(history, stretch.disk.target, stretch.start)
        self.count = 0
        self.size = self.view.size

    def position(self) -> Position:
        """Where this is."""
        return _position(self._stretch, self.count - 1) if self.count else self._stretch.start

    def forward(self, count: int) -> None:
        """Go on to behind the first ``count`` rows."""
        self.count = count
        if count - self._from > _REBASE_ROWS:
            self.view = View.open(self._history, self._stretch.disk.target, self.position())
            self._from = count

    def next_touch(self, ranges: list[tuple[int, int]]) -> int | None:
        """How many rows there are up to the next one that touches a range; None if none does any more."""
        touched = np.flatnonzero(_touch(self._starts[self.count :], self._ends[self.count :], ranges))
        return self.count + int(touched[0]) + 1 if len(touched) else None

    def read(self, offset: int, length: int) -> bytes:
        """The bytes."""
        data = bytearray(self.view.read(offset, length))
        laid = slice(self._from, self.count)
        for within in np.flatnonzero((self._starts[laid] < offset + length) & (self._ends[laid] > offset)).tolist():
            number = self._from + within
            row = self._stretch.rows[number]
            start, end = int(self._starts[number]), int(self._ends[number])
            low, high = max(start, offset), min(end, offset + length)
            if row["op"] == Op.WRITE:
                payload = self._stretch.records.payload(
                    self._stretch.known[int(self._stretch.sources[number])],
                    self._stretch.disk.index,
                    (int(row["seq"]), int(row["seq"])),
                    int(row["position"]),
                    int(row["length"]),
                    int(row["xxh3"]),
                )
                data[low - offset : high - offset] = memoryview(payload)[low - start : high - start]
            else:
                data[low - offset : high - offset] = bytes(high - low)
        return bytes(data)


def changes(
    history: History,
    branch: Branch,
    target: str,
    reader: Reader,
    path: bytes,
    wanted: str | None,
    between: Between,
    *,
    replay: bool,
) -> Iterator[Change]:
    """Every change of what is at a path on a disk between two positions, in order, beginning with what there was at the first."""
    before: dict[str, State] = {}
    for stretch in _stretches(history, branch, target, between):
        rolling = _Rolling(history, stretch)
        known_before = stretch.follows
        while True:
            states = _look(reader, rolling, target, path, wanted, replay=replay)
            for volume in sorted(states.keys() | before.keys()):
                old, new = before.get(volume, ABSENT), states.get(volume, ABSENT)
                if old != new:
                    yield Change(rolling.position(), target, volume, new, _what(old, new), known_before)
            before, known_before = states, True
            following = rolling.next_touch(reader.trace().get(target, []))
            if following is None:
                break
            rolling.forward(following)


def _look(reader: Reader, rolling: _Rolling, target: str, path: bytes, wanted: str | None, *, replay: bool) -> dict[str, State]:
    states = {}
    volumes = reader.open({target: chain_of(rolling.view, rolling)}, replay=replay)
    if wanted is None:
        problems = {volume.name: problem_of(volumes, volume.name) for volume in volumes}
        states = {name: State("unreadable", problem=problem) for name, problem in problems.items() if problem}
    for volume in readable(volumes, wanted):
        try:
            entry = reader.lookup(volume.name, path)
            digest = xxhash.xxh3_128()
            if entry.kind == "file":
                for piece in reader.content(volume.name, entry.inode):
                    digest.update(piece.offset.to_bytes(8, "little"))
                    digest.update(piece.data)
            states[volume.name] = State(
                entry.kind,
                entry.size if entry.kind != "directory" else 0,
                entry.mode,
                entry.uid,
                entry.gid,
                entry.mtime_ns,
                entry.target,
                digest.hexdigest() if entry.kind == "file" else "",
                entry.problem,
            )
        except NoSuchFileError:
            continue
        except FileError as error:
            states[volume.name] = State("unreadable", problem=str(error))
    return states


def _what(old: State, new: State) -> tuple[str, ...]:
    if old.kind == "absent":
        return ("appeared",)
    if new.kind == "absent":
        return ("removed",)
    fields = ("kind", "size", "mode", "uid", "gid", "mtime_ns", "target", "content", "problem")
    return tuple(field.removesuffix("_ns") for field in fields if getattr(old, field) != getattr(new, field))


def touches(history: History, branch: Branch, target: str, place: tuple[int, int], between: Between) -> Iterator[Touch]:
    """The records between two positions that touched a range of a disk, in order: from tables alone."""
    for stretch in _stretches(history, branch, target, between):
        starts = stretch.rows["offset"].astype(np.int64)
        hits = _touch(starts, starts + stretch.rows["length"], [place])
        for number in np.flatnonzero(hits).tolist():
            row = stretch.rows[number]
            yield Touch(_position(stretch, number), target, Op(int(row["op"])).name.lower(), int(row["offset"]), int(row["length"]))


def _position(stretch: _Stretch, number: int) -> Position:
    row = stretch.rows[number]
    return Position(stretch.start.run, int(row["seq"]), int(row["time_ns"]))


def _touch(starts: NDArray[np.int64], ends: NDArray[np.int64], ranges: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which of the rows' ranges touch one of the ranges (offset, length), which are in order and disjoint."""
    lows = np.array([offset for offset, _ in ranges], np.int64)
    highs = np.array([offset + length for offset, length in ranges], np.int64)
    if not len(lows):
        return np.zeros(len(starts), np.bool_)
    at = np.searchsorted(highs, starts, side="right")
    hits: NDArray[np.bool_] = (at < len(lows)) & (lows[np.minimum(at, len(lows) - 1)] < ends)
    return hits


def _stretches(history: History, branch: Branch, target: str, between: Between) -> Iterator[_Stretch]:
    first, last = between
    begin, end = (branch.leg(first.run), first.seq), (branch.leg(last.run), last.seq)
    if begin > end:
        raise MomentError("the second moment is before the first", "exchange them")
    at: tuple[int, int] | None = None
    while (found := history.retrying(partial(_following, history, branch, target, between, at))) is not None:
        at, stretch = found
        yield stretch


def _following(
    history: History, branch: Branch, target: str, between: Between, after: tuple[int, int] | None
) -> tuple[tuple[int, int], _Stretch] | None:
    """The first stretch behind (leg, seq), and where it ends. Coverage is asked each time: it may have got less meanwhile."""
    first, last = between
    begin, end = (branch.leg(first.run), first.seq), (branch.leg(last.run), last.seq)
    coverage = history.coverage(target, branch)
    starts = {(interval.first.run, interval.first.seq) for interval in coverage.intervals}
    for leg, low, high in coverage.stretches:
        info = branch.legs[leg].info
        disk = info.disk(target)
        low = max(low, first.seq) if leg == begin[0] else low
        high = min(high, last.seq) if leg == end[0] else high
        if disk is None or not begin[0] <= leg <= end[0] or low > high or (after is not None and (leg, low) <= after):
            continue
        records = history.records(info.run)
        row = records.row_at(disk.index, low)
        start = Position(info.run, low, int(row["time_ns"]) if row is not None else info.start_time_ns)
        pieces = list(records.select(disk.index, low + 1, high + VOID_DISTANCE_MAX))
        rows = np.concatenate([rows for _, rows in pieces]) if pieces else np.empty(0, ROW)
        numbers = np.repeat(np.arange(len(pieces)), [len(rows) for _, rows in pieces])
        counts = effective(rows, disk.index, high)
        follows = (info.run, low) not in starts and (leg, low) != begin
        sources = [source for source, _ in pieces]
        return (leg, high), _Stretch(disk, records, start, rows[counts], numbers[counts], sources, follows)
    return None
