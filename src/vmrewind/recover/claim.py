"""A takeover's run: it begins at the moment taken over and ends at once, as a run without a guest.

With it the repository knows, before the VM starts, that another host has the VM now (history/succession.py), and its history ends
with a moment that can be restored, though nothing was written yet. Description and records follow from the run alone, so that
putting them again changes nothing.
"""

from __future__ import annotations

import json
import socket
import time
import uuid as uuids
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from vmrewind.journal import format as fmt
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position, RunInfo, new_run_id
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.repository import VmRepository
from vmrewind.repository.segment import SHIP_ROW, encode_segment


def takeover_run(source: RunInfo, position: Position, images: Mapping[str, Path], known: Iterable[int]) -> RunInfo:
    """The run that takes over at ``position`` of ``source``; ``known`` are the runs of the repository, which come before it."""
    return RunInfo(
        run=max(new_run_id(), max(known, default=0) + 1),
        parent=position,
        vm=source.vm,
        uuid=source.uuid,
        host=socket.gethostname(),
        start_time_ns=max(time.time_ns(), position.time_ns + 1),
        first_seq=position.seq + 1,
        disks=tuple(replace(disk, image=str(images[disk.target])) for disk in source.disks),
        takeover=True,
    )


def end_of(info: RunInfo) -> Position:
    """The moment with which a takeover's run ends: that of its STOP record."""
    return Position(info.run, info.first_seq + 1, info.start_time_ns + 1)


def register(repository: VmRepository, info: RunInfo) -> None:
    """Put the run into the repository, durably; again if need be. From then on no other host starts the VM unasked."""
    assert info.parent is not None, "a takeover goes on from a moment"
    repository.register(info.uuid)
    repository.put_run(info)
    begun = {
        "vm": info.vm,
        "host": info.host,
        "takeover": True,
        "parent": {"run": run_name(info.parent.run), "seq": info.parent.seq},
    }
    rows = np.zeros(2, SHIP_ROW)
    payload = b""
    for i, (kind, content) in enumerate([(fmt.Event.START, json.dumps(begun).encode()), (fmt.Event.STOP, b"{}")]):
        row = rows[i]
        row["seq"], row["time_ns"], row["position"] = info.first_seq + i, info.start_time_ns + i, len(payload)
        row["length"], row["xxh3"] = len(content), xxhash.xxh3_64_intdigest(content)
        row["disk"], row["op"], row["flags"] = fmt.ALL_DISKS, fmt.Op.EVENT, kind
        payload += content.ljust(fmt.padded(len(content)), b"\0")
    mask = sum(1 << disk.index for disk in info.disks)
    name = SegmentName(info.run, info.first_seq, end_of(info).seq, mask, repository.name)
    repository.put_segment(name, encode_segment(name, uuids.UUID(info.uuid).bytes, rows, payload))
