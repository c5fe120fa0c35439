"""Every error that a user can meet: what happened, to what, and what to do next.

One class per exit code. A message names the thing (file and key, disk, moment); ``hint`` says what to do. The CLI prints
both and exits with ``exit_code``; ``kind`` is the stable word for machines (``--json``) and for the error that the capture
process hands to its parent as one JSON line.

This module imports nothing, so that the capture process can use it.
"""

from __future__ import annotations


class VmrewindError(Exception):
    """Base of all errors that are shown to a user. ``str(error)`` is the message, ``hint`` the remedy."""

    exit_code = 1
    kind = "failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def in_full(self) -> str:
        """The error and its remedy in one line."""
        return f"{self} ({self.hint})" if self.hint else str(self)


class UsageError(VmrewindError):
    """The command line asks for something that does not make sense."""

    exit_code = 2
    kind = "usage"


class ConfigError(VmrewindError):
    """The VM's configuration (TOML or domain XML) is malformed, incomplete, or contradicts itself."""

    exit_code = 3
    kind = "config"


class ImageError(VmrewindError):
    """A disk image is missing, in use, of the wrong size or kind, or cannot be read or written."""

    exit_code = 4
    kind = "image"


class RepositoryError(VmrewindError):
    """A repository is missing, unreachable, from a newer version, or belongs to another VM."""

    exit_code = 5
    kind = "repository"


class MomentError(VmrewindError):
    """A moment is malformed, unknown, or outside coverage. The hint names the nearest possible ones."""

    exit_code = 6
    kind = "moment"


class CorruptionError(VmrewindError):
    """Stored data does not match its checksum or its format. The message says which file and where."""

    exit_code = 7
    kind = "corruption"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(
            message,
            hint or "put it back from another copy, if there is one; moments that do not need it can be restored all the same",
        )


class VmStateError(VmrewindError):
    """The command needs the VM running, or stopped, and it is not; or the VM is unknown here."""

    exit_code = 8
    kind = "vm-state"


class SpaceError(VmrewindError):
    """The storage space for a journal, an image or a repository does not suffice."""

    exit_code = 9
    kind = "space"


class StartError(VmrewindError):
    """A child process or QEMU did not come up, so the VM was not started."""

    exit_code = 10
    kind = "start"


class LibvirtError(VmrewindError):
    """libvirt is missing, unreachable, or refused what was asked of it."""

    exit_code = 11
    kind = "libvirt"


class SupersededError(VmrewindError):
    """Another host has taken the VM over, so what is here is not its newest state any more."""

    exit_code = 12
    kind = "superseded"


class FileError(VmrewindError):
    """A file, directory or file system inside a disk is not there, cannot be read, or would overwrite something here."""

    exit_code = 13
    kind = "file"


class NoSuchFileError(FileError):
    """Nothing is at a path inside a disk; that it is so, and not merely unreadable, is known."""

    kind = "no-such-file"


class GuestAgentError(VmrewindError):
    """The guest agent is missing, does not answer, or did not freeze the guest's file systems as asked; nothing was marked."""

    exit_code = 14
    kind = "guest-agent"


def by_kind(kind: str, message: str, hint: str = "") -> VmrewindError:
    """The error of class ``kind``, rebuilt in another process from its JSON form."""
    classes: list[type[VmrewindError]] = [*VmrewindError.__subclasses__(), *FileError.__subclasses__()]
    for cls in classes:
        if cls.kind == kind:
            return cls(message, hint)
    return VmrewindError(message, hint)
