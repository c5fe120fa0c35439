"""Journals in readable form: one entry for each record, as plain data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmrewind.errors import CorruptionError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Batch, Record, Segment, records
from vmrewind.journal.runs import read_run


def dump(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a segment's valid prefix, in order.

    Keys: run, batch, seq, time (ISO 8601, UTC), time_ns, disk (index; None: the whole VM), target (None where ``runs/`` beside
    the segment does not tell), op, flags, offset, length, xxh3 (16 hex digits, None without a payload); for events also event and
    content. Raises CorruptionError for a segment without a readable header, and at what storage does not give back.
    """
    try:
        with Segment(path) as segment:
            targets = _targets(path, segment.header.run)
            for batch in segment.batches():
                for record in records(batch):
                    yield _entry(segment, batch, record, targets)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CorruptionError(f"{path}: cannot be read on: {error.strerror}") from error


def _targets(path: Path, run: int) -> dict[int, str]:
    try:
        info = read_run(path.parent, run)
    except (OSError, CorruptionError):
        return {}  # Only the disks' names are lost with it.
    return {disk.index: disk.target for disk in info.disks}


def _entry(segment: Segment, batch: Batch, record: Record, targets: dict[int, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "run": fmt.run_name(segment.header.run),
        "batch": batch.number,
        "seq": record.seq,
        "time": format_utc(record.time_ns),
        "time_ns": record.time_ns,
        "disk": None if record.disk == fmt.ALL_DISKS else record.disk,
        "target": targets.get(record.disk),
        "op": _word(fmt.Op, record.op),
        "flags": record.flags,
        "offset": record.offset,
        "length": record.length,
        "xxh3": f"{record.xxh3:016x}" if record.has_payload else None,
    }
    if record.op == fmt.Op.EVENT:
        entry["event"] = _word(fmt.Event, record.flags)
        try:
            entry["content"] = json.loads(segment.payload(record))
        except (CorruptionError, ValueError) as error:
            entry["content"] = {"unreadable": str(error)}
    return entry


def _word(kinds: type[fmt.Op] | type[fmt.Event], value: int) -> str:
    return next((kind.name.lower() for kind in kinds if kind == value), str(value))


def format_utc(time_ns: int) -> str:
    """ISO 8601 in UTC with nanoseconds, as a moment may be written."""
    seconds, fraction = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}+00:00"
