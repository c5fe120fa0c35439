"""What encryption costs a core: ``.venv/bin/python -m bench.encryption``. Incompressible data, a store in memory, medians.

The figures are in docs/repositories.md. The plain store's own time is taken away: it is memory copied, or not even that.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Final

from vmrewind.repository.encrypted import EncryptedStore
from vmrewind.repository.memory import MemoryStore
from vmrewind.repository.secret import PASSPHRASE, Secret
from vmrewind.repository.slots import add_slot

_OBJECT: Final = 8 << 20


def _median_seconds(call: Callable[[], object], rounds: int) -> float:
    """Of one call, in time of the core."""
    times = []
    for _ in range(rounds):
        before = time.process_time()
        call()
        times.append(time.process_time() - before)
    return statistics.median(times)


def measure(rounds: int = 50) -> dict[str, float]:
    """Seconds by what was done."""
    store = EncryptedStore(MemoryStore(), bytes(32))
    data = os.urandom(_OBJECT)
    chance = random.Random(1)

    def put() -> None:
        store.delete("k")
        store.put("k", data)

    found = {"put 8 MiB": _median_seconds(put, rounds), "get 8 MiB": _median_seconds(lambda: store.get("k"), rounds)}
    for length in (256 << 10, 4 << 10):

        def ranges(length: int = length) -> None:
            for _ in range(20):
                store.get("k", chance.randrange(_OBJECT - length), length)

        found[f"get a range of {length >> 10} KiB"] = _median_seconds(ranges, rounds) / 20
    secrets = iter([Secret(PASSPHRASE, os.urandom(16), "") for _ in range(3)])
    found["a passphrase"] = _median_seconds(lambda: add_slot(MemoryStore(), "", bytes(32), next(secrets)), 3)
    return found


if __name__ == "__main__":
    for what, seconds in measure().items():
        rate = f"  {8 / seconds:6.0f} MiB/s" if what.endswith("8 MiB") else ""
        print(f"{what:<24} {seconds * 1e6:9.0f} µs{rate}")
