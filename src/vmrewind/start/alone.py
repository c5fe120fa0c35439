"""Capture alone, without a VM: for tests, benchmarks, and any NBD client that wants its writes journaled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmrewind.errors import ConfigError
from vmrewind.paths import VmPaths
from vmrewind.start.keeping import Keeper
from vmrewind.start.serving import Storage
from vmrewind.vmconfig.model import VmConfig
from vmrewind.vmconfig.toml import load_toml, peek_storage


async def capture_alone(
    path: Path,
    socket: Path | None,
    stop: asyncio.Event,
    ready: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> int:
    """Serve the disks of a TOML file until ``stop`` is set.

    With a repository, bases are made as at a VM's start; without one the journal stands alone.
    """
    storage = peek_storage(path)
    if storage is None:
        config = load_toml(path)
        raise ConfigError(f"{config.source}: protection is off", "set protection.enabled = true")
    journal = storage.journal or VmPaths(storage.name).default_journal
    keeper = Keeper(Storage(storage.name, journal, storage.journal_size, storage.local_history), "alone", nbd_socket=socket)

    def load() -> VmConfig:
        return load_toml(path)

    config = await keeper.bring_up(load, say)
    disks = {disk.target: {"uri": f"nbd+unix:///{disk.target}?socket={keeper.nbd_socket}"} for disk in config.protection.disk}
    ready({"event": "ready", "pid": keeper.capture_pid, "run": keeper.run_name, "disks": disks})
    await stop.wait()
    await keeper.stop()
    return 0
