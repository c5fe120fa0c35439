"""The drill of ``vmrewind verify --drill``: what is printed, and its exit code."""

from __future__ import annotations

import json as json_module
import secrets
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vmrewind.cli.chosen import position_data
from vmrewind.cli.progress import byte_progress
from vmrewind.errors import VmrewindError
from vmrewind.history.history import History
from vmrewind.history.moments import format_time
from vmrewind.history.resolve import resolve
from vmrewind.journal.format import run_name
from vmrewind.recover.drill import Wanted, drill, random_moment
from vmrewind.start.signals import ENDING, handled


@dataclass(frozen=True, slots=True)
class DrillOptions:
    """What the user asked for; None: the default."""

    at: str | None
    seed: int | None
    scratch: Path | None
    until: str | None
    seconds: int | None


def run_drill(history: History, options: DrillOptions, *, json: bool) -> int:
    """Carry a drill out and tell how it went; returns the exit code: 0 it passed, 1 it failed."""
    branch = history.branch()
    seed = None
    if options.at is not None:
        position = resolve(history, branch, options.at, branch.targets)
    else:
        seed = options.seed if options.seed is not None else secrets.randbelow(1 << 32)
        position = random_moment(history, branch.targets, seed)
    chosen = "" if seed is None else f", chosen by --seed {seed}"
    if not json:
        where = f"seq {position.seq} of run {run_name(position.run)}"
        print(
            f"{history.name} at {format_time(position.time_ns)} ({where}{chosen}): restoring {', '.join(branch.targets)}",
            flush=True,
        )
    wanted = Wanted(options.until, options.seconds or 300, options.scratch or Path(tempfile.gettempdir()))
    with ending_by_signals(), byte_progress(json=json) as update:
        result = drill(history, branch.targets, position, wanted, update)
    if json:
        print(
            json_module.dumps(
                {
                    "vm": history.name,
                    "drill": "passed" if result.passed else "failed",
                    "outcome": result.outcome,
                    **position_data(position),
                    "seed": seed,
                    "restore_seconds": round(result.restore_seconds, 3),
                    "boot_seconds": round(result.boot_seconds, 3),
                    "written_bytes": sum(disk.written_bytes for disk in result.disks),
                    "left_out": list(result.left_out),
                    "console": result.console,
                }
            )
        )
    else:
        for left_out in result.left_out:
            print(f"left out of the machine: {left_out}")
        written = sum(disk.written_bytes for disk in result.disks)
        print(f"restored {written} bytes in {result.restore_seconds:.1f} s; {result.boot_seconds:.1f} s from power-on")
        if not result.passed and result.console:
            print("the console's last lines:\n" + result.console)
        print(f"drill {'passed' if result.passed else 'FAILED'}: {result.outcome}")
    return 0 if result.passed else VmrewindError.exit_code


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end us as Ctrl-C does: with everything cleared up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    with handled(interrupt, [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]):
        yield
