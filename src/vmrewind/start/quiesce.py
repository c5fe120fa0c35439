"""A moment at which a running guest's file systems were all frozen: the command's side of ``freezer.py``.

This side only watches. It has no part in the thaw unless the freezer dies or hangs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vmrewind.errors import ConfigError, GuestAgentError, VmStateError, by_kind
from vmrewind.paths import VmPaths
from vmrewind.start.environment import without_credentials
from vmrewind.start.freezer import FROZEN_SECONDS_MAX, THAW_PATIENCE_SECONDS
from vmrewind.start.frozen_guest import LOOK_SECONDS
from vmrewind.start.processes import running
from vmrewind.start.readiness import readable
from vmrewind.vmconfig.model import VmConfig

CHANNEL_NAME: Final = "org.qemu.guest_agent.0"
_BEGIN_SECONDS: Final = LOOK_SECONDS + 25
"""Until the freezer begins: its own start on a busy host, then a look at what is mounted, for which libvirt takes its time."""
_RESCUE_SECONDS: Final = FROZEN_SECONDS_MAX - 1.5
"""After that long without a thaw under way the freezer hangs; what thaws in its place needs a moment to start."""
_THAW_SECONDS: Final = 15.0
"""For so long a thaw that is under way is waited for; after that it goes on alone."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """The record after which every file system was frozen, but those mounted at ``not_frozen``, which cannot be."""

    run: str
    seq: int
    time_ns: int
    not_frozen: list[str]


def freeze(name: str) -> Frozen:
    """Freeze the guest of a running VM, look which record is its last, thaw.

    Raises when nothing is to be marked; the guest is thawed then, or the error says that it may not be.
    """
    order = {"vm": name, **_way_to_agent(VmPaths(name))}
    with _Freezer(order | {"thaw_only": False}) as freezer:
        return _watch(name, order, freezer)


def _watch(name: str, order: dict[str, Any], freezer: _Freezer) -> Frozen:
    frozen = thawing = False
    deadline = time.monotonic() + _BEGIN_SECONDS
    try:
        while True:
            told = freezer.told(deadline)
            match told["event"]:
                case "freezing":
                    frozen = True
                    deadline = time.monotonic() + _RESCUE_SECONDS
                case "thawing":
                    thawing = True
                    deadline = time.monotonic() + _THAW_SECONDS
                case "error":
                    raise by_kind(told["kind"], f"{name}: {told['message']}", told["hint"])
                case _:
                    return Frozen(told["run"], told["seq"], told["time_ns"], told["not_frozen"])
    except _Silent as silent:
        if thawing and not silent.dead:
            raise _left_frozen(name) from None
        freezer.kill()
        if frozen:
            _rescue(name, order)
        state = "the guest is thawed" if frozen else "the guest was not frozen"
        raise GuestAgentError(f"{name}: the process that freezes the guest {silent}; {state}", "nothing was marked") from None


def _rescue(name: str, order: dict[str, Any]) -> None:
    with _Freezer(order | {"thaw_only": True}) as rescuer:
        try:
            told = rescuer.told(time.monotonic() + _THAW_SECONDS)
        except _Silent:
            raise _left_frozen(name) from None
    if told["event"] == "error":
        raise by_kind(told["kind"], f"{name}: {told['message']}", told["hint"])


def _left_frozen(name: str) -> GuestAgentError:
    return GuestAgentError(
        f"{name}: THE GUEST MAY STILL BE FROZEN: its agent does not confirm that it has thawed it",
        f"a process in the background asks it for {THAW_PATIENCE_SECONDS:.0f} s; if the guest writes nothing then, reset it",
    )


class _Silent(Exception):
    """A freezer tells nothing more: it has died, or time is up."""

    def __init__(self, what: str, *, dead: bool) -> None:
        super().__init__(what)
        self.dead = dead


class _Freezer:
    """One process of ``freezer.py``."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vmrewind.start.freezer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=without_credentials(os.environ),
        )
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        self._output = self._process.stdout
        self._received = b""
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has died, as its output tells

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._output.close()
        self._process.poll()

    def told(self, deadline: float) -> dict[str, Any]:
        """The next thing that it tells. Raises _Silent."""
        while b"\n" not in self._received:
            if not readable([self._output.fileno()], deadline - time.monotonic()):
                raise _Silent("hangs", dead=False)
            received = os.read(self._output.fileno(), 64 << 10)
            if not received:
                self._process.wait()
                raise _Silent("has died", dead=True)
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        told: dict[str, Any] = json.loads(line)
        if told["event"] in ("done", "error"):
            self._process.wait()
        return told

    def kill(self) -> None:
        """End it, also while it is stopped: it holds the agent's socket."""
        self._process.kill()
        self._process.wait()


def _way_to_agent(paths: VmPaths) -> dict[str, str]:
    """How a running VM's agent is reached: its ``socket`` or its ``domain``. Raises VmStateError, ConfigError, GuestAgentError."""
    keeping = running(paths)
    if keeping is None:
        raise VmStateError(f"{paths.name} is not running under protection", "start it first")
    config = VmConfig.load_saved(paths.config)
    if config.origin == "libvirt":
        return {"domain": config.name}
    if config.qemu is None:
        raise GuestAgentError(
            f"{paths.name}: `vmrewind capture` serves its disks, and did not start its QEMU, so its guest's agent is not known",
            "freeze the guest's file systems by other means, and mark the point without --quiesce",
        )
    path = agent_socket(config.qemu.command, config.source)
    if not path.is_absolute():
        if keeping.qemu is None or not keeping.qemu.alive:
            raise VmStateError(f"{paths.name}: its QEMU is not running", "start it first")
        path = Path(f"/proc/{keeping.qemu.pid}/cwd").readlink() / path
    return {"socket": str(path)}


def agent_socket(command: Sequence[str], source: str) -> Path:
    """The socket that a QEMU command line serves for the guest agent. Raises ConfigError if there is none."""
    chardevs: dict[str, dict[str, str]] = {}
    channel = None
    for option, value in pairwise(command):
        match option.replace("--", "-", 1):
            case "-chardev":
                given = _options(value, "backend")
                chardevs[given.get("id", "")] = given
            case "-device":
                given = _options(value, "driver")
                if given.get("driver") == "virtserialport" and given.get("name") == CHANNEL_NAME:
                    channel = given.get("chardev", "")
    if channel is None:
        raise ConfigError(
            f"{source}: qemu.command: the guest has no channel to its agent",
            "add -device virtio-serial -chardev socket,id=agent,path=PATH,server=on,wait=off "
            f"-device virtserialport,chardev=agent,name={CHANNEL_NAME}, and start the VM anew",
        )
    served = chardevs.get(channel, {})
    if served.get("backend") != "socket" or "path" not in served or served.get("server", "off") != "on":
        raise ConfigError(
            f"{source}: qemu.command: the guest agent's chardev {channel!r} is no unix socket that QEMU serves",
            f"make it -chardev socket,id={channel},path=PATH,server=on,wait=off, and start the VM anew",
        )
    return Path(served["path"])


def _options(text: str, first: str) -> dict[str, str]:
    """QEMU's ``a,b=c,d``: what has no name is ``first`` in the beginning, later a switch; a comma is written twice.

    Or the same as a JSON object, as ``-device`` takes it.
    """
    if text.startswith("{"):
        try:
            plain = json.loads(text)
        except ValueError:
            return {}
        return {key: str(value) for key, value in plain.items()}
    options: dict[str, str] = {}
    for at, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.replace("\0", ",").partition("=")
        if equals:
            options[key] = value
        else:
            options[first if at == 0 else key] = key if at == 0 else "on"
    return options
