"""The promise: a moment is the same whether merged tables are used or not, and whatever became of them or of their segments."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history_tools import MadeHistory
from vmrewind.history import index, layers, merging, stretches, view
from vmrewind.history.merged import MergedTable
from vmrewind.history.merging import merge
from vmrewind.history.view import View
from vmrewind.journal import pool
from vmrewind.journal.format import Op

SIZE = 32 << 10
VOID_DISTANCE = 8

ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda pair: (pair[0], min(pair[1], SIZE - pair[0])))
sectors = st.tuples(st.integers(0, 63), st.integers(1, 3)).map(lambda pair: (pair[0] * 512, min(pair[1], 64 - pair[0]) * 512))
Written = tuple[Op, str, tuple[int, int], int]
records = st.tuples(
    st.sampled_from([Op.WRITE, Op.WRITE, Op.WRITE, Op.ZERO, Op.DISCARD, Op.FLUSH]),
    st.sampled_from(["vda", "vdb"]),
    st.one_of(sectors, sectors, ranges),
    st.integers(1, 255),
)
batches = st.lists(st.tuples(st.lists(records, min_size=1, max_size=4), st.booleans(), st.booleans()), min_size=2, max_size=14)
"""Of each batch its records, whether its first one is voided behind it, and whether a segment ends there."""


@contextmanager
def small() -> Iterator[pytest.MonkeyPatch]:
    """Short stretches, layers and regions; storage that is not waited for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda _: None)
        for module in (stretches, merging, view):
            patch.setattr(module, "VOID_DISTANCE_MAX", VOID_DISTANCE)
        patch.setattr(pool, "SEGMENTS_MIN", 20)
        patch.setattr(stretches, "SEGMENTS_MIN", 1)
        patch.setattr(stretches, "SEGMENTS_MAX", 3)
        patch.setattr(layers, "LAYER_RECORDS", 4)
        patch.setattr(index, "REGION_EXTENTS", 4)
        patch.setattr(layers, "JOINED_EXTENTS", 12)
        yield patch


class Model:
    """A history of two disks in segments of a few batches, and what each disk is after each record."""

    def __init__(self, directory: Path, written: list[tuple[list[Written], bool, bool]]) -> None:
        self.made = made = MadeHistory(directory, {"vda": SIZE, "vdb": SIZE}, journal_size=20 << 20)
        for disk in made.disks:
            disk.content[:] = disk.target.encode() * (SIZE // 3) + b"xx"[: SIZE % 3]
        self.bases = {disk.target: bytes(disk.content) for disk in made.disks}
        made.start()
        self.changes: list[tuple[int, Written]] = []
        self.voids: set[int] = set()
        for batch, is_voided, closes in written:
            first = made.batch([(op, disk, at, bytes([fill]) * n if op == Op.WRITE else n) for op, disk, (at, n), fill in batch])
            self.changes += list(enumerate(batch, first))
            if is_voided:
                made.void(first, batch[0][1])
                self.voids.add(first)
            if closes:
                made.close_segment()

    @property
    def end(self) -> int:
        """Seq of the next record."""
        assert self.made.writer is not None
        return self.made.writer.next_seq

    def content(self, target: str, seq: int) -> bytes:
        """What a disk is after a record, every VOID heeded that follows within the distance."""
        content = bytearray(self.bases[target])
        for own, (op, disk, (at, length), fill) in self.changes:
            if disk == target and own <= seq and op != Op.FLUSH and own not in self.voids:
                content[at : at + length] = bytes([fill if op == Op.WRITE else 0]) * length
        return bytes(content)

    def check(self, *, used: bool | None = None) -> None:
        """Every moment of every disk, and whether merged tables are used for any."""
        layers: list[MergedTable] = []
        with self.made.open() as history, pytest.MonkeyPatch.context() as patch:
            read = MergedTable.layer
            patch.setattr(MergedTable, "layer", lambda table, disk: (layers.append(table), read(table, disk))[1])
            for disk in self.made.disks:
                for seq in range(1, self.end):
                    assert View.open(history, disk.target, self.made.position(seq)).read(0, SIZE) == self.content(disk.target, seq)
        assert used is None or bool(layers) == used


@settings(max_examples=12)
@given(batches, st.booleans())
def test_merged_or_not_every_moment_equals_the_model(written: list[tuple[list[Written], bool, bool]], ended: bool) -> None:
    with tempfile.TemporaryDirectory() as directory, small():
        model = Model(Path(directory), written)
        model.check(used=False)
        if ended:
            made = model.made
            last = made.stop()
            run, writer = made.run, made.writer
            made.start(parent=last)
            made.run, made.writer = run, writer
        merged = merge(model.made.journal)
        closed = sum(closes for _, _, closes in written)
        assert not ended or closed < 2 or merged, "what an ended run has closed is merged"
        model.check(used=bool(merged))
        assert merge(model.made.journal) == [], "there is nothing more to do"
