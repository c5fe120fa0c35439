"""Reading a small file of a VM's local state, so that storage that fails is met like content that makes no sense."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Final

_OURS: Final = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""These say nothing of the content: there is no file, or it is this process that may not, or has no room."""


class Unreadable(ValueError):
    """Storage does not give a file's content back (EIO): as good as content that makes no sense, and so a ValueError as that is."""

    def __repr__(self) -> str:
        return str(self)


def content(path: Path) -> bytes:
    """The file's content. Raises Unreadable, and FileNotFoundError and others that are not about the content as they are."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in _OURS:
            raise
        raise Unreadable(f"it cannot be read: {error.strerror}") from error
