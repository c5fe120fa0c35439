"""The host loses its power, at any operation: what was flushed is there, image and history come to agree, nothing is made up.

The model of the disk is in tests/power/layer.py, that of the guest in tests/power/guest.py, what is checked in
tests/power/world.py. ``script/power-loss`` runs thousands.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.capture_tools import MIB, Capture, Client, DiskOf, raw_image
from tests.power.world import Tally, run_world
from vmrewind.capture.recovery import recover
from vmrewind.journal.reader import Segment, pack_segment_header, segment_files
from vmrewind.journal.state import StatePage

WORLDS = 8


@pytest.mark.parametrize("first", range(0, 16, WORLDS))
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


def test_a_segment_whose_recycling_was_lost_stands_in_nobodys_way(tmp_path: Path) -> None:
    """Its new header got to the disk and its new name did not; what recovery needs begins with the segment behind it."""
    image = raw_image(tmp_path / "a.raw", 2 * MIB)
    with Capture(tmp_path, [DiskOf("vda", image)], journal_size=8 * MIB) as capture, Client(capture.socket_path) as client:
        capture.describe_run()
        for i in range(40):
            client.write(i * 4096, bytes([i + 1]) * (64 << 10))
        journal, content = capture.journal, image.read_bytes()
        capture.kill()
    first, second, *_ = segment_files(journal)
    with Segment(first.path) as old, Segment(second.path) as following:
        header, point = old.header, following.header.first_batch - 1
    with open(first.path, "r+b") as file:
        file.write(pack_segment_header(replace(header, number=9, first_batch=1000, first_seq=1000)))
    state = StatePage(journal)
    state.set_checkpoint(point)
    state.close()
    with open(journal / "capture.state", "r+b") as file:
        file.seek(16)
        file.write(b"another boot id!")
    recovered = recover(journal)
    assert recovered is not None
    assert recovered.host_died
    assert recovered.position.seq == 41, "the START record and forty writes"
    assert image.read_bytes() == content
