"""The layers of an index: when they are joined, and what that leaves."""

from __future__ import annotations

import numpy as np
import pytest

from vmrewind.history import layers as layers_module
from vmrewind.history.layers import OWNER, Layers, Owners, layer_of

RECORDS = 1000


def records(offsets: np.ndarray) -> Owners:
    """A record of 4 KiB at each of these offsets."""
    made = np.zeros(len(offsets), OWNER)
    made["offset"], made["length"] = offsets, 4096
    return made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "LAYER_RECORDS", RECORDS)
    monkeypatch.setattr(layers_module, "JOINED_EXTENTS", 4 * RECORDS)


@pytest.mark.usefixtures("small")
def test_what_is_written_again_and_again_takes_its_memory_once() -> None:
    chance, layers = np.random.default_rng(1), Layers()
    for _ in range(200):
        layers.add(records(chance.permutation(RECORDS) * 4096))
        held = sum(len(layer.records) for layer in layers._made)
        assert held <= 5 * RECORDS, "the last writers, and what came since they were joined"
    assert [len(layer.records) for layer in layers.finish()] == [RECORDS]


@pytest.mark.usefixtures("small")
def test_layers_that_lie_apart_are_not_joined_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers_module, "joined", lambda _: pytest.fail("nothing would have become less"))
    offsets = np.random.default_rng(1).permutation(20 * RECORDS) * 4096
    layers = Layers()
    for part in offsets.reshape(20, RECORDS):
        layers.add(records(part))
    assert [len(layer.records) for layer in layers.finish()] == [RECORDS] * 20


@pytest.mark.parametrize("unit", [1, 512])
@pytest.mark.parametrize("top", [(1 << 32) - 2, (1 << 32) - 1, 1 << 32])
def test_extents_far_in_are_found_however_their_places_are_kept(top: int, unit: int) -> None:
    offsets = np.array([0, unit, top * unit])
    made = records(offsets)
    made["length"] = min(unit, 100)
    layer = layer_of([made])
    far = top * unit
    assert layer.clipped(0, 1 << 62)[0].tolist() == offsets.tolist()
    assert layer.clipped(far, far + 1)[0].tolist() == [far]
    assert layer.clipped(far - 1, far)[0].tolist() == []
    assert layer.clipped(far + min(unit, 100), 1 << 62)[0].tolist() == []
    assert layer.covers(np.array([0, unit - 1, 2 * unit, far - 1, far, far + unit, 1 << 61])).tolist() == [
        True, unit == 1, False, False, True, False, False,
    ]  # fmt: skip


def test_few_records_that_own_nothing_may_stay_and_many_do_not() -> None:
    apart = np.arange(RECORDS) * 4096
    few, many = np.append(apart, apart[:5]), np.append(apart, apart)
    assert len(layer_of([records(few)]).records) == len(few)
    assert len(layer_of([records(many)]).records) == RECORDS


def test_what_begins_where_four_bytes_just_tell_it_and_ends_behind_is_there_up_to_its_end() -> None:
    unit = 512
    begin = ((1 << 32) - 3) * unit
    made = records(np.array([0, begin]))
    layer = layer_of([made])
    assert layer.shift and layer.starts.itemsize == 4
    assert layer.covers(np.array([begin - 1, begin, begin + 3 * unit, begin + 4095, begin + 4096])).tolist() == [
        False, True, True, True, False,
    ]  # fmt: skip
    assert layer.clipped(begin + 3 * unit, begin + 4 * unit)[0].tolist() == [begin + 3 * unit]
