"""The host loses its power, at any operation: what was flushed is there, image and history come to agree, nothing is made up.

The model of the disk is in tests/power/layer.py, that of the guest in tests/power/guest.py, what is checked in
tests/power/world.py. ``script/power-loss`` runs thousands.
"""

from __future__ import annotations

import pytest

from tests.power.world import Tally, run_world

WORLDS = 8


@pytest.mark.parametrize("first", range(0, 40, WORLDS))
def test_power_cuts_at_any_operation(first: int) -> None:
    tally = Tally()
    for seed in range(first, first + WORLDS):
        try:
            run_world(seed, tally)
        except Exception as error:
            error.add_note(f"replay: script/power-loss --first {seed} --worlds 1")
            raise
    # Not one of them may have come to nothing.
    assert tally.cuts > 2 * WORLDS
    assert min(tally.cut_starts, tally.lost_records, tally.resyncs, tally.stops, tally.kills) > 0
