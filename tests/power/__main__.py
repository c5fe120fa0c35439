"""Many worlds, one after the other: see script/power-loss."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from tests.power.world import Tally, run_world


def main() -> int:
    """Run the worlds that are asked for; the exit code is 1 if any broke a promise."""
    parser = argparse.ArgumentParser(prog="script/power-loss", description="Power cuts at random operations, seeded.")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first world's seed")
    parser.add_argument("--worlds", type=int, default=1000, help="how many; each loses its power, or stops, some times")
    parser.add_argument("--lives", type=int, default=6, help="starts of the VM in each world")
    given = parser.parse_args()
    tally, broken, began = Tally(), [], time.monotonic()
    for seed in range(given.first, given.first + given.worlds):
        try:
            run_world(seed, tally, given.lives)
        except Exception:  # noqa: BLE001 -- whatever it is, the next seed is run too
            broken.append(seed)
            sys.stdout.write(f"seed {seed}:\n{traceback.format_exc(limit=-6)}\n")
            sys.stdout.flush()
    seconds = time.monotonic() - began
    sys.stdout.write(f"{given.worlds} worlds in {seconds:.0f} s: {tally}; {len(broken)} broken {broken or ''}\n")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
