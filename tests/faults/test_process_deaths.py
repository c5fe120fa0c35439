"""A VM's processes killed, alone and in pairs, at random instants under a guest that writes with fsync; and stopped for a while.

``script/process-deaths`` does the same for as many rounds as wanted.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.death_tools import Mortal
from vmrewind.paths import VmPaths

SEED = 20261122
PAUSE_SECONDS = 2.0


@pytest.mark.parametrize(
    "lives",
    [
        [("capture",), ("ship",), ("capture", "ship"), ("qemu",), ("keeper",)],
        [("capture", "qemu"), ("ship", "qemu"), ("keeper", "qemu"), ("capture", "keeper"), ("ship", "keeper")],
    ],
    ids=["alone", "with-another"],
)
def test_whoever_is_killed_the_guest_and_its_history_lose_nothing(tmp_path: Path, lives: list[tuple[str, ...]]) -> None:
    mortal = Mortal(tmp_path, random.Random(SEED))
    with mortal.vm:
        alive = False
        for victims in lives:
            if not alive:
                mortal.begin()
            alive = mortal.kill(victims)
            if not alive:
                mortal.end(alive=False)
        mortal.judge(moments=2)


def test_stopped_for_a_while_nobody_but_the_clock_notices(tmp_path: Path) -> None:
    mortal = Mortal(tmp_path, random.Random(SEED))
    with mortal.vm:
        mortal.begin()
        before = mortal.keeping()
        for role in ("capture", "ship", "keeper"):
            mortal.pause(role, PAUSE_SECONDS)
        assert mortal.keeping() == before
        mortal.end(alive=True)
        mortal.judge(moments=1)
    assert "capture.died" not in (VmPaths("mortal").events(int(before.run, 16))).read_text()
