"""A guest's file systems as its agent shows, freezes and thaws them: over the agent's socket, or through libvirt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from vmrewind.errors import GuestAgentError
from vmrewind.start.guest_agent import AgentSocket
from vmrewind.start.libvirt import Libvirt

LOOK_SECONDS: Final = 5.0
FREEZE_SECONDS: Final = 4.0
"""For so long the guest may write back what it holds; its writes wait meanwhile."""
THAW_SECONDS: Final = 5.0
READ_ONLY_TYPES: Final = frozenset({"iso9660", "cdfs", "udf", "squashfs", "erofs", "cramfs", "romfs"})
"""Nobody writes to these, so there is nothing to freeze."""
UNFREEZABLE_TYPES: Final = frozenset({"vfat", "msdos", "exfat", "fat", "fat12", "fat16", "fat32", "fuseblk"})
"""No operating system can freeze these; where one is mounted, as ``/boot/efi`` is, the bookmark says so."""


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A mounted file system: its device's name in the guest, and one of the places where it is mounted."""

    device: str
    mountpoint: str
    type: str


class Guest(Protocol):
    """What both ways to an agent can do. Every failure is a GuestAgentError or a LibvirtError."""

    def file_systems(self) -> list[FileSystem]:
        """What is mounted from disks; also refused if anything is frozen already."""

    def freeze(self) -> int:
        """Freeze all; returns how many were frozen."""

    def thaw(self) -> int:
        """Thaw all; returns how many were frozen until now."""


class DirectGuest:
    """A guest by its agent's socket; connected to for each command, as the channel may be reset at any time."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def file_systems(self) -> list[FileSystem]:
        return parse_fsinfo(self._execute("guest-get-fsinfo", LOOK_SECONDS))

    def freeze(self) -> int:
        return _count("guest-fsfreeze-freeze", self._execute("guest-fsfreeze-freeze", FREEZE_SECONDS))

    def thaw(self) -> int:
        return _count("guest-fsfreeze-thaw", self._execute("guest-fsfreeze-thaw", THAW_SECONDS))

    def _execute(self, command: str, timeout_seconds: float) -> Any:
        with AgentSocket(self._socket, timeout_seconds) as agent:
            return agent.execute(command, timeout_seconds)


class LibvirtGuest:
    """A guest by its domain. libvirt waits for the agent as long as it likes: whoever needs an end in time ends this process."""

    def __init__(self, domain: str) -> None:
        self._domain = domain

    def file_systems(self) -> list[FileSystem]:
        with Libvirt() as libvirt:
            mounted = libvirt.domain(self._domain).fs_info()
        return [FileSystem(device, mountpoint, kind) for mountpoint, device, kind in mounted]

    def freeze(self) -> int:
        with Libvirt() as libvirt:
            return libvirt.domain(self._domain).fs_freeze()

    def thaw(self) -> int:
        with Libvirt() as libvirt:
            return libvirt.domain(self._domain).fs_thaw()


def parse_fsinfo(answer: Any) -> list[FileSystem]:
    """What ``guest-get-fsinfo`` returned. Raises GuestAgentError for nonsense."""
    if not isinstance(answer, list):
        raise GuestAgentError("the guest agent answers guest-get-fsinfo with something else than a list")
    found = []
    for entry in answer:
        words = [entry.get(key) for key in ("name", "mountpoint", "type")] if isinstance(entry, dict) else []
        named = [word for word in words if isinstance(word, str)]
        if len(named) != 3:
            raise GuestAgentError(f"the guest agent describes a file system as {entry!r:.100}")
        found.append(FileSystem(*named))
    return found


def to_freeze(mounted: Sequence[FileSystem]) -> tuple[int, list[str]]:
    """How many file systems a freeze must stop, and where those are mounted that it cannot: written to all the same."""
    by_device = {system.device: system for system in reversed(mounted)}
    written = [system for system in by_device.values() if system.type.casefold() not in READ_ONLY_TYPES]
    left_out = [system for system in written if system.type.casefold() in UNFREEZABLE_TYPES]
    # The guest says what these are called, and they are shown on terminals.
    shown = [place if place.isprintable() else ascii(place) for place in (system.mountpoint[:200] for system in left_out)]
    return len(written) - len(left_out), sorted(shown)


def _count(command: str, answer: Any) -> int:
    if type(answer) is not int or answer < 0:
        raise GuestAgentError(f"the guest agent answers {command} with {answer!r:.60}, which is no number of file systems")
    return answer
