"""Which version of a VM's configuration in the repository belongs to a moment: what takeover, boot and the drill start from."""

from __future__ import annotations

import xxhash

from vmrewind.history.history import History
from vmrewind.journal.runs import Position
from vmrewind.repository.layout import ConfigName
from vmrewind.repository.repository import VmRepository


def config_digest(document: bytes) -> str:
    """What a run's description says of its configuration: XXH3-64, hex."""
    return xxhash.xxh3_64_hexdigest(document)


def config_of(history: History, repository: VmRepository, position: Position) -> ConfigName | None:
    """That of the newest run up to the position that tells which it had; else the one in force at the time, the first for times
    before it. None if the repository has none.

    Time alone would not do: another host may have put its own since, on another branch.
    """
    names = repository.configs()
    if not names:
        return None
    legs = history.branch_of_run(position.run).legs
    wanted = next((leg.info.config for leg in reversed(legs) if leg.info.config), None)
    for name in reversed(names) if wanted is not None else ():
        if config_digest(repository.config(name)) == wanted:
            return name
    return max((name for name in names if name.time_ns <= position.time_ns), default=names[0])
