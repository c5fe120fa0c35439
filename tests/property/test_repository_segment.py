"""Whatever records there are, a shipped segment gives them back, all at once or one by one, and notices any damage."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.journal import format as fmt
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.segment import FRAME_SIZE, HEADER, SHIP_ROW, ShippedSegment, encode_segment, same_records

UUID = bytes(range(16))


def make(specs: list[tuple[int, int, int, bytes]], mask: int = 0b101) -> tuple[SegmentName, np.ndarray, bytes]:
    """``specs``: (gap before, op, disk, payload) of each record."""
    rows = np.zeros(len(specs), SHIP_ROW)
    stream = bytearray()
    seq = 999
    for i, (gap, op, disk, payload) in enumerate(specs):
        seq += 1 + gap
        has = op in fmt.PAYLOAD_OPS
        xxh3 = xxhash.xxh3_64_intdigest(payload) if has else 0
        rows[i] = (seq, 10**18 + seq, i * 4096, len(stream), xxh3, len(payload), disk, op, i % 4)
        if has:
            stream += payload.ljust(fmt.padded(len(payload)), b"\0")
    return SegmentName(0xABCD, 1000, seq + 5, mask, "web01"), rows, bytes(stream)


class Reader:
    """Reads from memory and keeps count, as the object store's bill does."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.calls: list[tuple[int, int]] = []

    def __call__(self, offset: int, length: int) -> bytes:
        self.calls.append((offset, length))
        return self.data[offset : offset + length]


specs = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([int(op) for op in fmt.Op]),
        st.sampled_from([0, 2, fmt.ALL_DISKS]),
        st.binary(max_size=40) | st.builds(lambda n, b: bytes([b]) * n, st.integers(0, 700_000), st.integers(0, 255)),
    ),
    max_size=30,
)


@given(specs=specs, order=st.randoms())
@settings(max_examples=60)
def test_records_come_back_in_any_order(specs: list[tuple[int, int, int, bytes]], order: object) -> None:
    name, rows, stream = make(specs)
    segment = ShippedSegment(Reader(encode_segment(name, UUID, rows, stream)), name)
    assert segment.header.uuid == UUID
    assert segment.rows.dtype == SHIP_ROW
    assert segment.rows.tobytes() == rows.tobytes()
    numbers = list(range(len(specs)))
    order.shuffle(numbers)  # type: ignore[attr-defined]
    for i in numbers:
        assert segment.payload(segment.rows[i]) == (specs[i][3] if specs[i][1] in fmt.PAYLOAD_OPS else b"")
    assert segment.read_range(0, len(stream)) == stream


@given(st.data())
@settings(max_examples=60)
def test_any_flipped_bit_is_found_and_named(data: st.DataObject) -> None:
    payloads = [np.random.default_rng(i).bytes(size) for i, size in enumerate((5, 4096, 300_000, 0, 100_000))]
    name, rows, stream = make([(0, fmt.Op.WRITE, 0, payload) for payload in payloads] + [(0, fmt.Op.ZERO, 2, b"1234")])
    whole = encode_segment(name, UUID, rows, stream)
    damaged = bytearray(whole)
    at = data.draw(st.integers(0, HEADER.size - 1) | st.integers(0, len(whole) - 1))
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    segment = ShippedSegment(Reader(bytes(damaged)), name)
    with pytest.raises((CorruptionError, RepositoryError), match=name.key):
        for row in segment.rows:
            segment.payload(row)


@given(st.data())
@settings(max_examples=30)
def test_a_cut_off_object_is_found_out(data: st.DataObject) -> None:
    name, rows, stream = make([(0, fmt.Op.WRITE, 0, bytes(range(256)) * 40), (0, fmt.Op.WRITE, 2, bytes(300_000))])
    whole = encode_segment(name, UUID, rows, stream)
    segment = ShippedSegment(Reader(whole[: data.draw(st.integers(0, len(whole) - 1))]), name)
    with pytest.raises(CorruptionError, match=name.key):
        for row in segment.rows:
            segment.payload(row)


def test_a_damaged_payload_names_its_record_and_spares_the_others() -> None:
    rng = np.random.default_rng(1)
    name, rows, stream = make([(0, fmt.Op.WRITE, 0, rng.bytes(FRAME_SIZE)) for _ in range(4)])
    whole = bytearray(encode_segment(name, UUID, rows, stream))
    whole[-10] ^= 1
    segment = ShippedSegment(Reader(bytes(whole)), name)
    for row in segment.rows[:3]:
        segment.payload(row)
    with pytest.raises(CorruptionError, match=r"frame 3 .*record 1003"):
        segment.payload(segment.rows[3])


def test_an_object_under_another_name_is_refused() -> None:
    name, rows, stream = make([(0, fmt.Op.FLUSH, 0, b"")])
    whole = encode_segment(name, UUID, rows, stream)
    other = SegmentName(name.run + 1, name.first, name.last, name.mask, name.vm)
    with pytest.raises(CorruptionError, match="it is the segment of run 000000000000abcd"):
        _ = ShippedSegment(Reader(whole), other).rows


def test_a_newer_version_is_refused_as_such() -> None:
    name, rows, stream = make([])
    whole = bytearray(encode_segment(name, UUID, rows, stream))
    whole[8] = 2
    with pytest.raises(CorruptionError, match="checksum"):
        _ = ShippedSegment(Reader(bytes(whole)), name).rows
    whole[HEADER.size - 8 : HEADER.size] = xxhash.xxh3_64_intdigest(whole[: HEADER.size - 8]).to_bytes(8, "little")
    with pytest.raises(RepositoryError, match="segment format 2") as caught:
        _ = ShippedSegment(Reader(bytes(whole)), name).rows
    assert not isinstance(caught.value, CorruptionError)


def test_one_record_is_read_without_the_rest_and_neighbours_without_reading_again() -> None:
    rng = np.random.default_rng(2)
    name, rows, stream = make([(0, fmt.Op.WRITE, 0, rng.bytes(4096)) for _ in range(2048)])
    reader = Reader(encode_segment(name, UUID, rows, stream))
    segment = ShippedSegment(reader, name)
    for row in segment.rows[1000:1010]:
        segment.payload(row)
    assert len(reader.calls) <= 3
    assert sum(length for _, length in reader.calls) < len(reader.data) / 8


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rows: rows["disk"].__setitem__(0, 1),
        lambda rows: rows["seq"].__setitem__(0, 999),
        lambda rows: rows["seq"].__setitem__(1, 10_000),
        lambda rows: rows["seq"].__setitem__(1, 1000),
        lambda rows: rows["position"].__setitem__(1, 0),
        lambda rows: rows["length"].__setitem__(1, 20),
    ],
)
def test_nonsense_is_not_even_encoded(wrong: object) -> None:
    name, rows, stream = make([(0, fmt.Op.WRITE, 0, b"12345678"), (0, fmt.Op.WRITE, 2, b"abc")])
    wrong(rows)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"its|it has"):
        encode_segment(name, UUID, rows, stream)


def test_same_records_looks_at_records_and_not_at_bytes() -> None:
    name, rows, stream = make([(0, fmt.Op.WRITE, 0, b"12345678")])
    one = encode_segment(name, UUID, rows, stream)
    assert same_records(name, one, bytes(bytearray(one)))
    rows["time_ns"] += 1
    assert not same_records(name, one, encode_segment(name, UUID, rows, stream))
