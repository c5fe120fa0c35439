"""What lies between two moments of a disk: the ranges that records may have changed, known without reading a payload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from vmrewind.errors import MomentError
from vmrewind.history.history import History
from vmrewind.history.rows import DATA_OPS
from vmrewind.journal import format as fmt
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position, RunInfo
from vmrewind.repository.segment import Rows

_CHANGES = np.isin(np.arange(256), [int(op) for op in DATA_OPS])

Stretch = tuple[RunInfo, int, int]
"""A run and the seqs [first, last] of it."""


def changed_ranges(history: History, target: str, one: Position, other: Position, block: int) -> list[tuple[int, int]]:
    """Ranges [start, end) of whole blocks in order, disjoint, outside of which the disk was the same at both positions.

    The last one may end behind the disk. Raises MomentError if that is not known: where a gap that was never closed, a new base,
    or missing records lie between them.
    """
    return history.retrying(lambda: _changed_ranges(history, target, one, other, block))


def _changed_ranges(history: History, target: str, one: Position, other: Position, block: int) -> list[tuple[int, int]]:
    spans: list[NDArray[np.int64]] = []
    for info, first, last in _between(history, one, other):
        disk = info.disk(target)
        if disk is None:
            raise MomentError(f"disk {target} was not protected in run {run_name(info.run)}")
        records = history.records(info.run)
        for hole in records.holes(disk.index, first, last):
            raise MomentError(f"run {run_name(info.run)}: {hole.cause}")
        if first == info.first_seq:
            if target in info.bases:
                raise MomentError(f"run {run_name(info.run)} began with a new base")
            if target in info.gaps and records.gap_closed(disk.index, first, last) is None:
                raise MomentError(f"run {run_name(info.run)} began with a gap: {info.gaps[target].cause}")
        bypassed = False
        for _, rows in records.select(disk.index, first, last):
            changing = rows[(rows["disk"] == disk.index) & _CHANGES[rows["op"]] & (rows["length"] > 0)]
            starts = changing["offset"].astype(np.int64)
            spans.append(np.stack((starts // block, -(-(starts + changing["length"]) // block)), axis=1))
            bypassed = _bypassed_after(rows, bypassed)
        if bypassed:
            # Nothing was recorded meanwhile; what differed at its end is recorded then.
            raise MomentError(f"run {run_name(info.run)}: its journal was bypassed, and that did not end")
    return _union(np.concatenate(spans) * block) if spans else []


def _bypassed_after(rows: Rows, before: bool) -> bool:
    """Whether the journal was bypassed behind these rows, given whether it was in front of them."""
    kinds = rows["flags"][(rows["op"] == fmt.Op.EVENT) & np.isin(rows["flags"], (fmt.Event.GAP_BEGIN, fmt.Event.GAP_END))]
    return bool(kinds[-1] == fmt.Event.GAP_BEGIN) if len(kinds) else before


def _between(history: History, one: Position, other: Position) -> Iterator[Stretch]:
    """The parts of runs that lie on the way from one position back to where they meet, and on to the other."""
    lines = [_line(history, position) for position in (one, other)]
    ends = [{info.run: last for info, last in line} for line in lines]
    meeting = next((info for info, _ in lines[0] if info.run in ends[1]), None)
    if meeting is None:
        raise MomentError("the two moments have no run in common")
    last_common = min(ends[0][meeting.run], ends[1][meeting.run])
    for line in lines:
        for info, last in line:
            if info.run == meeting.run:
                if last > last_common:
                    yield info, last_common + 1, last
                break
            yield info, info.first_seq, last


def _line(history: History, position: Position) -> Sequence[tuple[RunInfo, int]]:
    """Each run from the position's back to the root, with the last seq that counts of it."""
    line = []
    last = position.seq
    for leg in reversed(history.branch_of_run(position.run).legs):
        line.append((leg.info, last))
        if leg.info.parent is not None:
            last = leg.info.parent.seq
    return line


def _union(spans: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Disjoint ranges in order that hold the same as the spans."""
    if not len(spans):
        return []
    spans = spans[np.argsort(spans[:, 0], kind="stable")]
    reach = np.maximum.accumulate(spans[:, 1])
    first = np.append(True, spans[1:, 0] > reach[:-1])
    begins = np.flatnonzero(first)
    return list(zip(spans[begins, 0].tolist(), reach[np.append(begins[1:], len(spans)) - 1].tolist(), strict=True))
