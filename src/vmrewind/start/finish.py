"""Carrying what a stopped VM's journal still holds: the same process as at run time, told to finish."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Final

from vmrewind.errors import ConfigError, CorruptionError, RepositoryError
from vmrewind.ship.status import status
from vmrewind.start.children import ship_command
from vmrewind.start.places import make_places
from vmrewind.start.resolve import VmHandle

_LOOK_SECONDS: Final = 0.5


def finish_shipping(handle: VmHandle, progress: Callable[[str, int, int], None], say: Callable[[str], None]) -> None:
    """Carry everything that the wanted disks' journal holds; raises RepositoryError or CorruptionError with what ship said.

    What the journal's storage does not give back is tried again for ten minutes.

    ``say`` is told what keeps it waiting, ``progress`` (what, bytes done, bytes in total) as far as
    ship knows it.
    """
    if handle.repository_url is None:
        raise ConfigError(f"{handle.name} has no repository", "set protection.repository")
    if not handle.paths.runtime.is_dir():
        make_places(handle.paths)
    command = ship_command(handle.paths, handle.journal, handle.repository_url, finish=True)
    total = left = 0
    words = told = ""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as ship:
        while True:
            try:
                _, words = ship.communicate(timeout=_LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                report = status(handle.paths.runtime)
                if report is not None and report.pid == ship.pid and report.error and report.error != told:
                    told = report.error
                    say(f"{told}; it is tried again")
                if report is not None and report.pid == ship.pid and report.unsent_bytes is not None:
                    left = report.unsent_bytes
                    total = max(total, left)
                    progress("history", total - left, total)
            except BaseException:
                ship.terminate()  # what it has carried is there: the next one goes on behind it
                raise
    if not ship.returncode:
        progress("history", total, total)
    else:
        said = words.strip().splitlines()
        kind = CorruptionError if ship.returncode == CorruptionError.exit_code else RepositoryError
        raise kind(said[-1] if said else "ship could not carry everything", "see to that, then try again")
