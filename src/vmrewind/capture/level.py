"""A word on an image itself: up to which batch of a run it holds everything on stable storage.

``capture.state`` says so too, but it lies with the journal. When the journal's file system takes no more words, what a flush has
promised is in the images alone, and after the host's death an old journal must not be replayed over it. So the word goes
where the data went: an extended attribute of the image file. Block devices have none.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import Final

_NAME: Final = "user.vmrewind.level"
_LEVEL: Final = struct.Struct("<QQ")
"""run, batch."""


def note_level(fd: int, run: int, batch: int) -> None:
    """Say, durably, that the image ``fd``, which was synced, holds every batch of ``run`` up to ``batch``; raises OSError."""
    os.setxattr(fd, _NAME, _LEVEL.pack(run, batch))
    os.fsync(fd)


def noted_level(fd: int, run: int) -> int:
    """The batch of ``run`` that an image is said to have reached, 0 if nothing is said."""
    try:
        known, batch = _LEVEL.unpack(os.getxattr(fd, _NAME))
    except (OSError, struct.error):
        return 0
    return int(batch) if known == run else 0


def forget_level(fd: int) -> None:
    """The run has ended, and its journal says so itself."""
    with contextlib.suppress(OSError):
        os.removexattr(fd, _NAME)
