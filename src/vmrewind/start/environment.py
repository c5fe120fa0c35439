"""What a process of ours passes on to those that it starts: the umask, and which variables.

A repository's credentials are for ship and the commands that read a repository. QEMU faces a guest that may be hostile, and capture
faces QEMU: neither is given any.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Final

_CREDENTIALS: Final = re.compile(
    r"(AWS|AZURE|GOOGLE|GCP|OBSTORE|OBJECT_STORE)_.*|.*(PASSWORD|PASSPHRASE|SECRET|CREDENTIAL|TOKEN|_KEY).*", re.IGNORECASE
)


class _Umask:
    """The mask that the user had set; QEMU's own files get the modes that it asks for."""

    users = -1


def guard_files() -> None:
    """From now on every file and socket that this process and its children make is their owner's alone."""
    _Umask.users = os.umask(0o077)


def users_umask() -> int:
    """The umask that the process was started with, -1 (as subprocess takes it: none to set) if it was never changed."""
    return _Umask.users


def without_credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that tell no secret of ours, as far as their names say."""
    return {name: value for name, value in environment.items() if not _CREDENTIALS.fullmatch(name)}
