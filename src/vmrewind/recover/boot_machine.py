"""What ``boot`` starts: the configuration that was in force at a moment, and a QEMU command line or a domain's XML made of it."""

from __future__ import annotations

import uuid as uuids
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmrewind.errors import ConfigError, UsageError
from vmrewind.history.configuration import config_of
from vmrewind.history.history import History
from vmrewind.journal.runs import Position
from vmrewind.recover.drill_machine import DrillMachine, machine_of
from vmrewind.vmconfig.beside import random_mac
from vmrewind.vmconfig.model import VmConfig


@dataclass(frozen=True, slots=True)
class Stored:
    """A configuration's text; ``suffix`` is ``toml`` or ``xml``, ``origin`` where it is from."""

    document: bytes
    suffix: str
    origin: str


def configuration(history: History, config: VmConfig | None, position: Position) -> Stored:
    """That of the moment, from the repository; what is known here where the repository has none. Raises ConfigError."""
    repository = history.repository
    if repository is not None and (name := config_of(history, repository, position)) is not None:
        return Stored(repository.config(name), name.suffix, name.key)
    if config is None:
        raise ConfigError(f"{history.name}: the repository holds no configuration of it", "ship carries it: vmrewind ship on")
    return Stored(config.document.encode(), "xml" if config.origin == "libvirt" else "toml", config.source)


def qemu_line(
    stored: Stored,
    name: str,
    formats: Mapping[str, str],
    socket: Path,
    network: str | None,
    *,
    uuid: str | None = None,
    reconnect_seconds: int = 0,
) -> tuple[list[str], list[str]]:
    """(the command line of a QEMU with the disks at ``socket``, what was left out). ``formats``: of the disks, by target.

    ``network``: the id of a -netdev of the configuration, None for none. ``uuid``: the machine's, by default a new one.
    ``reconnect_seconds``: how long it keeps a request for a server that is away. The serial console is stdin and stdout. Raises
    ConfigError, UsageError.
    """
    machine = machine_of(stored.document, stored.suffix, stored.origin)
    wires = ["-nic", "none"] if network is None else _wires(machine, network)
    nodes = nodes_at(socket, formats, reconnect_seconds)
    command = machine.with_nodes(nodes) + wires
    command += ["-name", name, "-uuid", uuid or str(uuids.uuid4())]
    command += ["-chardev", "stdio,id=console", "-serial", "chardev:console"]
    return command, machine.left_out


def nodes_at(socket: Path, formats: Mapping[str, str], reconnect_seconds: int = 0) -> dict[str, dict[str, Any]]:
    """Block nodes by target of the disks that are served there. ``formats``: of the disks, by target."""
    return {target: _node(target, kind, socket, reconnect_seconds) for target, kind in formats.items()}


def _node(target: str, kind: str, socket: Path, reconnect_seconds: int) -> dict[str, Any]:
    nbd: dict[str, Any] = {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}, "export": target, "discard": "unmap"}
    nbd["reconnect-delay"] = reconnect_seconds
    if kind == "raw":
        return {**nbd, "node-name": target}
    return {"driver": kind, "node-name": target, "discard": "unmap", "file": nbd}


def _wires(machine: DrillMachine, network: str) -> list[str]:
    """A -netdev and the devices on it, taken back from what was left out, each with another MAC address."""
    taken: list[str] = []
    known: list[str] = []
    for entry in list(machine.left_out):
        option, _, value = entry.partition(" ")
        head, *parts = value.split(",")
        given = dict(part.partition("=")[::2] for part in parts)
        if option == "-netdev":
            known.append(given.get("id", ""))
            if given.get("id") == network:
                machine.left_out.remove(entry)
                taken = [option, value, *taken]
        elif option == "-device" and given.get("netdev") == network:
            machine.left_out.remove(entry)
            kept = [part for part in parts if not part.startswith("mac=")]
            taken += [option, ",".join([head, *kept, f"mac={random_mac()}"])]
    if network not in known:
        there = f"there are: {', '.join(known)}" if known else "it has none"
        raise UsageError(f"the configuration has no -netdev with id={network}", f"{there}; leave --network out for none")
    return taken
