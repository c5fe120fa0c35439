"""The layers of an index: when they are joined, and what that leaves."""

from __future__ import annotations

import numpy as np
import pytest

from vmrewind.history import index
from vmrewind.history.index import OWNER, Layers, Owners

RECORDS = 1000


def records(offsets: np.ndarray) -> Owners:
    """A record of 4 KiB at each of these offsets."""
    made = np.zeros(len(offsets), OWNER)
    made["offset"], made["length"] = offsets, 4096
    return made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "LAYER_RECORDS", RECORDS)
    monkeypatch.setattr(index, "JOINED_EXTENTS", 4 * RECORDS)


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
    monkeypatch.setattr(index, "joined", lambda _: pytest.fail("nothing would have become less"))
    offsets = np.random.default_rng(1).permutation(20 * RECORDS) * 4096
    layers = Layers()
    for part in offsets.reshape(20, RECORDS):
        layers.add(records(part))
    assert [len(layer.records) for layer in layers.finish()] == [RECORDS] * 20


def test_few_records_that_own_nothing_may_stay_and_many_do_not() -> None:
    apart = np.arange(RECORDS) * 4096
    few, many = np.append(apart, apart[:5]), np.append(apart, apart)
    assert len(index.layer_of([records(few)]).records) == len(few)
    assert len(index.layer_of([records(many)]).records) == RECORDS
