"""Every byte of one shipped segment: what is wrong with it, and which records that costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.journal import format as fmt
from vmrewind.recover.affected import Loss
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.segment import INDEX_ROW, Rows, ShippedSegment


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong in an object, and what is lost by it."""

    message: str
    losses: tuple[Loss, ...]


def whole_segment_lost(name: SegmentName, disks: Mapping[int, str]) -> tuple[Loss, ...]:
    """What an object costs that is missing or cannot be read. ``disks``: targets by index."""
    return tuple(Loss(target, name.run, name.first) for index, target in disks.items() if name.carries(index))


def check_segment(data: bytes, name: SegmentName, uuid: bytes | None, disks: Mapping[int, str]) -> list[Problem]:
    """What is wrong with the object ``data`` of the segment ``name`` of the VM ``uuid`` (16 bytes; None: not known)."""
    segment = ShippedSegment(lambda offset, length: data[offset : offset + length], name)
    everything = whole_segment_lost(name, disks)
    try:
        header, rows = segment.header, segment.rows
    except (CorruptionError, RepositoryError) as error:
        # A newer format than the repository's own cannot be: it is damage, too.
        return [Problem(str(error), everything)]
    if uuid is not None and header.uuid != uuid:
        return [Problem(f"object {name.key} is another VM's segment", everything)]
    problems = []
    index = np.frombuffer(data[header.frames_at - header.frame_count * INDEX_ROW.itemsize : header.frames_at], INDEX_ROW)
    end = header.frames_at + (int(index["end"][-1]) if len(index) else 0)
    if len(data) > end:
        problems.append(Problem(f"object {name.key} has {len(data) - end} bytes behind its end", ()))
    payload = bytearray(header.payload_length)
    lost = np.zeros(len(rows), bool)
    starts = rows["position"].astype(np.int64)
    ends = starts + rows["length"]
    has_payload = np.isin(rows["op"], [int(op) for op in fmt.PAYLOAD_OPS])
    for number in range(header.frame_count):
        low = number * header.frame_size
        high = min(low + header.frame_size, header.payload_length)
        try:
            payload[low:high] = segment.read_range(low, high - low)
        except CorruptionError as error:
            here = has_payload & (starts < high) & (ends > low)
            problems.append(Problem(str(error), _lost(rows[here], name, disks)))
            lost |= here
    view = memoryview(payload)
    wrong = [
        i
        for i in np.flatnonzero(has_payload & ~lost).tolist()
        if xxhash.xxh3_64_intdigest(view[starts[i] : ends[i]]) != int(rows["xxh3"][i])
    ]
    if wrong:
        seq = int(rows["seq"][wrong[0]])
        message = f"object {name.key}: the payload of record {seq} does not match its checksum"
        more = f" (nor do those of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        problems.append(Problem(message + more, _lost(rows[wrong], name, disks)))
    return problems


def _lost(rows: Rows, name: SegmentName, disks: Mapping[int, str]) -> tuple[Loss, ...]:
    """For each disk the first record that is lost; events are of no disk, and no disk's content needs their payload."""
    losses = []
    for index, target in disks.items():
        seqs = rows["seq"][(rows["disk"] == index) & (rows["op"] == fmt.Op.WRITE)]
        if len(seqs):
            losses.append(Loss(target, name.run, int(seqs[0]), partly=True))
    return tuple(losses)


def same_rows(one: Rows, other: Rows) -> bool:
    """Whether rows of two objects are the same records, wherever their payloads lie in each."""
    fields = [field for field in one.dtype.names or () if field != "position"]
    return len(one) == len(other) and all(np.array_equal(one[field], other[field]) for field in fields)
