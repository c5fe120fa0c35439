"""``script/process-deaths``: a VM's processes killed, and stopped for 30 s, for as many rounds as wanted.

Each round is what ``tests/faults/test_process_deaths.py`` does once, with a seed of its own, which is printed and replays it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.death_tools import EVERY_VICTIM, Mortal

PAUSE_SECONDS = 30.0


def main() -> int:
    """Run the rounds; ends with the first that fails."""
    parser = argparse.ArgumentParser(prog="script/process-deaths", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="a round takes about two minutes; default: %(default)s")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="the first round's; the next one's is one more")
    given = parser.parse_args()
    for seed in range(given.seed, given.seed + given.rounds):
        began = time.monotonic()
        print(f"round {seed - given.seed + 1} of {given.rounds}: --seed {seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="deaths-") as directory, tempfile.TemporaryDirectory(prefix="vmr-") as runtime:
            os.environ["VMREWIND_STATE_DIR"] = f"{directory}/state"
            os.environ["VMREWIND_RUNTIME_DIR"] = runtime
            lives, moments = _round(Path(directory), random.Random(seed))
        print(f"  {lives} lives, {moments} moments compared, {time.monotonic() - began:.0f} s", flush=True)
    return 0


def _round(directory: Path, chance: random.Random) -> tuple[int, int]:
    mortal = Mortal(directory, chance)
    fates = [*EVERY_VICTIM]
    chance.shuffle(fates)
    lives, alive = 0, False
    with mortal.vm:
        for victims in fates:
            if not alive:
                mortal.begin()
                lives += 1
            print(f"  SIGKILL: {', '.join(victims)}", flush=True)
            alive = mortal.kill(victims)
            if not alive:
                mortal.end(alive=False)
        if alive:
            mortal.end(alive=True)
        mortal.begin()
        for role in ("capture", "ship", "keeper"):
            print(f"  SIGSTOP for {PAUSE_SECONDS:.0f} s: {role}", flush=True)
            mortal.pause(role, PAUSE_SECONDS)
        mortal.end(alive=True)
        mortal.judge(moments=len(mortal.noted))
    return lives + 1, len(mortal.noted)


if __name__ == "__main__":
    sys.exit(main())
