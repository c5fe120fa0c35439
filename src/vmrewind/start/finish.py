"""Carrying what a stopped VM's journal still holds: the same process as at run time, told to finish."""

from __future__ import annotations

import subprocess

from vmrewind.errors import ConfigError, RepositoryError
from vmrewind.start.children import ship_command
from vmrewind.start.resolve import VmHandle


def finish_shipping(handle: VmHandle) -> None:
    """Carry everything that the wanted disks' journal holds; raises RepositoryError with what ship said if that fails."""
    if handle.repository_url is None:
        raise ConfigError(f"{handle.name} has no repository", "set protection.repository")
    command = ship_command(handle.paths, handle.journal, handle.repository_url, finish=True)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise RepositoryError(said[-1] if said else "ship could not carry everything", "its reason is above; then try again")
