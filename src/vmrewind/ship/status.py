"""What ship says about itself: ``ship.json`` in the VM's runtime directory, for ``vmrewind status``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from vmrewind.journal.runs import private

INTERVAL_SECONDS: Final = 1.0
"""Least time between two reports."""
BEAT_SECONDS: Final = 5.0
"""A report that stays the same is written again at this age: ship lives and works."""
SILENCE_SECONDS: Final = 10.0
"""A ship that has said nothing for so long does not respond."""
_PID_MAX: Final = 1 << 22


@dataclass(frozen=True, slots=True)
class ShipStatus:
    """``state``: idle (told to carry nothing), shipping, or waiting (for a run to begin, or after ``error``, to try again).

    ``run`` is 16 hex digits. Every record up to ``shipped_seq`` of the disks named is in the repository; ``shipped_time_ns`` is
    the time of the newest record that was sent. ``unsent_bytes``: payload known to be captured and not sent. ``lag_seconds``: age
    of the oldest record that is not sent, 0 without one. ``bandwidth_limit``: bytes a second. ``superseded``:
    who has taken the VM over. ``baseless``: the disks of which nothing can be restored from the repository, as it lacks their base.
    ``silent_seconds``: for how long ship has not responded, 0 if it does. What is not known is None.
    """

    pid: int
    state: str
    disks: tuple[str, ...] = ()
    run: str | None = None
    shipped_seq: int | None = None
    shipped_time_ns: int | None = None
    unsent_bytes: int | None = 0
    lag_seconds: float | None = 0.0
    error: str | None = None
    bandwidth_limit: int | None = None
    superseded: str | None = None
    baseless: tuple[str, ...] = ()
    silent_seconds: float = 0.0


def baseless_words(disks: Iterable[str]) -> str:
    """What it means for disks to be ``baseless``, and what to do."""
    named = ", ".join(sorted(disks))
    return (
        f"nothing of disk {named} can be restored from this repository until it has a base: stop the VM and start it, "
        "or run `vmrewind backup` while it is stopped"
    )


def status_path(runtime: Path) -> Path:
    """Where a VM's ship reports, in its runtime directory."""
    return runtime / "ship.json"


def status(runtime: Path) -> ShipStatus | None:
    """The last report of a VM's ship, None if there is none or the process that wrote it is gone."""
    try:
        plain: dict[str, Any] = json.loads(status_path(runtime).read_bytes())
        # By the monotonic clock, which all processes share: a step of the wall clock is no silence.
        age_seconds = max(0.0, time.monotonic() - float(plain.pop("monotonic_seconds")))
        found = ShipStatus(**plain | {key: tuple(plain[key]) for key in ("disks", "baseless")})
        if type(found.pid) is not int or not 0 < found.pid <= _PID_MAX:
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives, as another user
    if age_seconds <= SILENCE_SECONDS:
        return found
    # Since its last word anything may have happened.
    lag_seconds = None if found.lag_seconds is None else round(found.lag_seconds + age_seconds, 1)
    return replace(found, silent_seconds=round(age_seconds, 1), lag_seconds=lag_seconds)


class Reporter:
    """Writes the report when it differs from the last one or that is old, and at most once in ``INTERVAL_SECONDS``."""

    def __init__(self, runtime: Path) -> None:
        self._path = status_path(runtime)
        self._written: ShipStatus | None = None
        self._next = self._beat_at = 0.0

    @property
    def due(self) -> bool:
        """Whether a report may be written now; what it costs to know can be saved otherwise."""
        return time.monotonic() >= self._next

    def write(self, now: ShipStatus) -> None:
        """Replace the report. It lies in memory (tmpfs), so nothing is synced; a failure is not worth stopping for."""
        monotonic_seconds = time.monotonic()
        self._next = monotonic_seconds + INTERVAL_SECONDS
        if now == self._written and monotonic_seconds < self._beat_at:
            return
        temporary = self._path.with_name(f".{self._path.name}.{now.pid}.tmp")
        try:
            with open(temporary, "w", opener=private) as file:
                file.write(json.dumps(asdict(now) | {"monotonic_seconds": monotonic_seconds}) + "\n")
            temporary.replace(self._path)
        except OSError:
            return
        self._written = now
        self._beat_at = monotonic_seconds + BEAT_SECONDS

    def remove(self) -> None:
        """The process ends: there is nothing to say any more."""
        self._path.unlink(missing_ok=True)
