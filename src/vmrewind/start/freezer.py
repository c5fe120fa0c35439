"""The process that freezes a guest: a session of its own, so that whatever ends the command, the guest is thawed.

It freezes, asks capture which record is the last, thaws, and tells its parent what it found: one JSON object a line. That record is
a moment at which everything was frozen only if the thaw finds frozen what the freeze froze, so nothing is marked before that. A
parent that dies changes nothing here; if this process dies or hangs, its parent has another one thaw (``"thaw_only"``).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vmrewind.errors import GuestAgentError, SpaceError, VmrewindError, VmStateError
from vmrewind.journal.runs import private
from vmrewind.paths import VmPaths
from vmrewind.start.control import status_in_time
from vmrewind.start.frozen_guest import FREEZE_SECONDS, DirectGuest, Guest, LibvirtGuest, to_freeze
from vmrewind.start.signals import ENDING

ASK_SECONDS: Final = 3.0
"""For so long capture may take to say which record is the last."""
FROZEN_SECONDS_MAX: Final = 10.0
_THAW_PAUSE_SECONDS: Final = 0.2
THAW_PATIENCE_SECONDS: Final = 300.0
"""An agent that has not confirmed a thaw by then is left alone."""


def main() -> None:
    """Read the order from stdin and carry it out."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    order = json.loads(sys.stdin.buffer.readline())
    guest = guest_of(order)
    try:
        if order["thaw_only"]:
            tell("done", thawed=thaw(guest))
        else:
            tell("done", **freeze_and_look(VmPaths(order["vm"]), guest))
    except VmrewindError as error:
        tell("error", kind=error.kind, message=str(error), hint=error.hint)


def guest_of(order: Mapping[str, Any]) -> Guest:
    """The way to the agent that an order names: ``socket`` or ``domain``."""
    return DirectGuest(Path(order["socket"])) if "socket" in order else LibvirtGuest(order["domain"])


def tell(event: str, **content: Any) -> None:
    """A line for the parent, who may be gone."""
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps({"event": event} | content) + "\n")
        sys.stdout.flush()


def freeze_and_look(paths: VmPaths, guest: Guest) -> dict[str, Any]:
    """Freeze, look which record is the last, thaw. Returns run, seq, time_ns and ``not_frozen``; raises after a thaw."""
    with open(paths.runtime / "freeze.lock", "w", opener=private) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VmStateError("its guest is being frozen by another command", "try again") from None
        expected, not_frozen = to_freeze(guest.file_systems())
        if not expected:
            raise GuestAgentError("the guest has mounted no file system that could be frozen", "mark it without --quiesce")
        tell("freezing")
        begun = time.monotonic()
        try:
            frozen = guest.freeze()
            seconds = time.monotonic() - begun
            if seconds > FREEZE_SECONDS:
                raise GuestAgentError(f"freezing took {seconds:.1f} s", "it writes much now: try again when it is calmer")
            if frozen < expected:
                raise GuestAgentError(
                    f"the guest froze {frozen} of {expected} file systems",
                    "its own log, or that of qemu-guest-agent, tells why; mark it without --quiesce for a crash-consistent point",
                )
            state = status_in_time(paths, ASK_SECONDS)
            if state["bypass"] is not None:
                raise SpaceError("its history has a gap now", "`vmrewind status` tells why, and when it is closed")
        except BaseException:
            tell("thawing")
            thaw(guest)
            raise
        tell("thawing")
        thawed = thaw(guest)
        if thawed < frozen:
            raise GuestAgentError(
                f"of {frozen} file systems that were frozen {thawed} were so until the end: somebody else has thawed them",
                "try again; no other program may freeze or thaw this guest meanwhile",
            )
    return {"run": state["run"], "seq": state["seq"], "time_ns": state["time_ns"], "not_frozen": not_frozen, "frozen": frozen}


def thaw(guest: Guest) -> int:
    """Thaw, again and again until the agent has confirmed it; returns how many were frozen until now."""
    deadline = time.monotonic() + THAW_PATIENCE_SECONDS
    while True:
        try:
            return guest.thaw()
        except VmStateError:
            raise  # no guest any more
        except VmrewindError:
            if time.monotonic() > deadline:
                raise
        # An agent that is away (its channel was reset, the guest is stopped) comes back when it does.
        time.sleep(_THAW_PAUSE_SECONDS)


if __name__ == "__main__":
    main()
