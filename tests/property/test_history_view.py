"""The promise: a view of any record's moment equals the disk as it was then."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.history_tools import MadeHistory
from vmrewind.history.index import build_index, effective, owners_of
from vmrewind.history.reading import read_whole
from vmrewind.history.rows import ROW
from vmrewind.history.view import View
from vmrewind.journal.format import Op

SIZE = 64 << 10

ranges = st.tuples(st.integers(0, 127), st.integers(1, 128)).map(lambda pair: (pair[0] * 512, min(pair[1], 128 - pair[0]) * 512))
byte_ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda pair: (pair[0], min(pair[1], SIZE - pair[0])))


@given(st.lists(st.one_of(ranges, byte_ranges), max_size=60))
def test_index_names_the_last_writer_of_every_byte(written: list[tuple[int, int]]) -> None:
    rows = np.zeros(len(written), ROW)
    model = np.full(SIZE, -1)
    for i, (offset, length) in enumerate(written):
        rows[i] = (i + 1, i, offset, 0, 0, length, 0, Op.WRITE, 0)
        model[offset : offset + length] = i + 1
    index = build_index([owners_of(rows[i : i + 1], "here") for i in range(len(rows))])
    found = np.full(SIZE, -1)
    end_before = 0
    for start, end, owner in zip(index.starts, index.ends(slice(None)), index.owners, strict=True):
        assert end_before <= start < end, "extents are disjoint and in order"
        end_before = end
        source = int(index.sources(np.array([owner], np.uint32))[0])
        found[start:end] = source + 1
        assert index.records["offset"][owner] == written[source][0], "sources go with their records"
    assert np.array_equal(found, model)


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
    with tempfile.TemporaryDirectory() as directory:
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
