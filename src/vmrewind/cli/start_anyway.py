"""``vmrewind start-anyway``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from vmrewind.start.resolve import open_vm
from vmrewind.start.supersession import go_on_anyway


def start_anyway(vm: Annotated[str, Parameter(help="The VM: its TOML file, or its name.")], /) -> None:
    """Let this host start a VM that another host has taken over: what it writes becomes a branch of its own.

    A later takeover is refused again.
    """
    handle = open_vm(vm)
    who = go_on_anyway(handle)
    if who is None:
        print(f"{handle.name}: nobody has taken it over; there is nothing to overrule")
    else:
        print(f"{handle.name}: {who.words()}")
        print("It may be started here all the same: what it writes is a branch of its own, and harms nothing of the other host's.")
