"""The promise: a view of any record's moment equals the disk as it was then."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history_tools import MadeHistory
from vmrewind.history import index as index_module
from vmrewind.history import layers as layers_module
from vmrewind.history.index import Index
from vmrewind.history.layers import Layers, effective, owners_of
from vmrewind.history.reading import read_whole
from vmrewind.history.rows import ROW
from vmrewind.history.view import View
from vmrewind.journal.format import Op

SIZE = 64 << 10

ranges = st.tuples(st.integers(0, 127), st.integers(1, 128)).map(lambda pair: (pair[0] * 512, min(pair[1], 128 - pair[0]) * 512))
byte_ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda pair: (pair[0], min(pair[1], SIZE - pair[0])))


@given(
    st.lists(st.one_of(ranges, byte_ranges), max_size=60),
    st.integers(1, 61),
    st.integers(1, 64),
    st.integers(0, 64),
    st.sampled_from([0, 1 << 40, 1 << 61]),
)
def test_index_names_the_last_writer_of_every_byte(
    written: list[tuple[int, int]], layer_records: int, region_extents: int, joined_extents: int, begin: int
) -> None:
    model = np.full(SIZE, -1)
    for i, (offset, length) in enumerate(written):
        model[offset : offset + length] = i
    index = index_of([(begin + offset, length) for offset, length in written], layer_records, region_extents, joined_extents)
    every = index.whole()
    in_regions = [part for columns in index.within(begin, SIZE) for part in zip(*(c.tolist() for c in columns), strict=True)]
    for extents in (every.tolist(), in_regions):
        found = np.full(SIZE, -1)
        end_before = begin
        for start, length, owner in extents:
            assert end_before <= start and length, "extents are disjoint and in order"
            end_before = start + length
            source = int(index.sources(owner))
            found[start - begin : end_before - begin] = source
            assert index.record(owner)[0] == begin + written[source][0], "sources go with their records"
        assert np.array_equal(found, model)


def test_what_is_overwritten_again_and_again_takes_memory_once() -> None:
    written = [(at * 512, 512) for _ in range(100) for at in range(20)]
    assert len(index_of(written, 10, 8, 40)) <= 20 + 40
    assert len(index_of(written, 10, 8, 60)) <= 20, "few are one layer"


def index_of(written: list[tuple[int, int]], layer_records: int, region_extents: int, joined_extents: int) -> Index:
    """The index of writes, each from a source of its own, in layers and regions of a few."""
    rows = np.zeros(len(written), ROW)
    for i, (offset, length) in enumerate(written):
        rows[i] = (i + 1, i, offset, 0, 0, length, 0, Op.WRITE, 0)
    parts = [owners_of(rows[i : i + 1], np.ones(1, np.bool_), "here") for i in range(len(rows))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers_module, "LAYER_RECORDS", layer_records)
        patch.setattr(layers_module, "JOINED_EXTENTS", joined_extents)
        patch.setattr(layers_module, "_PATIENCE", 2)
        patch.setattr(index_module, "REGION_EXTENTS", region_extents)
        layers = Layers()
        for part in parts:
            layers.add(part)
        return Index(layers.finish())


def test_effective_leaves_out_what_was_voided_and_what_came_later() -> None:
    rows = np.zeros(5, ROW)
    rows["seq"] = [1, 2, 3, 4, 5]
    rows["op"] = [Op.WRITE, Op.WRITE, Op.DISCARD, Op.VOID, Op.FLUSH]
    rows["length"] = 512
    rows[3]["offset"] = 2
    assert effective(rows, 0, 5).tolist() == [True, False, True, False, False]
    assert effective(rows, 0, 2).tolist() == [True, False, False, False, False]
    assert effective(rows, 1, 5).tolist() == [False] * 5


records = st.lists(
    st.tuples(
        st.sampled_from([Op.WRITE, Op.WRITE, Op.WRITE, Op.ZERO, Op.DISCARD, Op.FLUSH]),
        st.sampled_from(["vda", "vdb"]),
        st.one_of(ranges, byte_ranges),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=15)
@given(st.lists(records, min_size=1, max_size=4), st.data())
def test_every_moment_of_every_disk_equals_the_model(
    batches: list[list[tuple[Op, str, tuple[int, int], int]]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers_module, "LAYER_RECORDS", data.draw(st.sampled_from([1, 3, 1000]), "records in a layer"))
        patch.setattr(layers_module, "JOINED_EXTENTS", data.draw(st.sampled_from([0, 5, 1000]), "extents joined to one layer"))
        patch.setattr(index_module, "REGION_EXTENTS", data.draw(st.sampled_from([1, 4, 1000]), "extents in a region"))
        patch.setattr("vmrewind.history.view._FEW", 2)
        made = MadeHistory(Path(directory), {"vda": SIZE, "vdb": SIZE + 4096}, journal_size=4 << 20)
        made.disk("vda").content[100:5000] = b"base" * 1225
        made.start()
        for batch in batches:
            made.tick()
            made.batch(
                [
                    (op, target, offset, bytes([fill]) * length if op == Op.WRITE else length)
                    for op, target, (offset, length), fill in batch
                ]
            )
        last = made.stop().seq
        made.ship_runs()
        cut = data.draw(st.integers(1, last), "shipped as two objects, cut at")
        made.ship(made.run, 1, cut)
        if cut < last:
            made.ship(made.run, cut + 1, last)
        for local in (True, False):
            with made.open(local=local) as history:
                for disk in made.disks:
                    for seq in range(1, last + 1):
                        view = View.open(history, disk.target, made.position(seq))
                        assert view.read(0, view.size) == disk.states[seq]
                        at = data.draw(st.integers(0, view.size - 1))
                        length = data.draw(st.integers(0, view.size - at))
                        assert view.read(at, length) == disk.states[seq][at : at + length]
                        rebuilt = bytearray(view.size)
                        yielded = 0
                        for _, offset, part in read_whole([view]):
                            rebuilt[offset : offset + len(part)] = part
                            yielded += len(part)
                        assert rebuilt == disk.states[seq]
                        assert yielded == view.data_bytes
                        covered = 0
                        for extent in view.extents():
                            assert extent.offset == covered
                            covered += extent.length
                            if extent.zero:
                                assert not any(disk.states[seq][extent.offset : covered])
                        assert covered == view.size
