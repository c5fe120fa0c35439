"""Whose a directory is. What vmrewind finds in its own directories it believes, so nobody else may put anything there.

A directory in a shared place, /tmp say, may have been made beforehand by another user, or be a link of theirs.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vmrewind.errors import ConfigError


def require_own(directory: Path, top: Path | None = None) -> None:
    """Raises ConfigError if another user could change what is in ``directory``, or put another one in its place.

    Looks at the directory and at those above it up to ``top``: each must be ours or root's and not open to everybody's writing.
    Above ``top`` it is enough that nobody else can rename what is ours. Directories that do not exist yet are passed over.
    """
    top = top or directory
    for place in (directory, *directory.parents):
        if place.is_relative_to(top):
            _require_ours(place)
        else:
            _require_settled(place)
    for place in Path(os.path.realpath(directory)).parents:
        _require_settled(place)


def _require_ours(place: Path) -> None:
    trusted = (0, os.geteuid())
    try:
        named, found = os.lstat(place), os.stat(place)  # of a link: who made it, and what it leads to
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror}", "run this as the user whose directory it is") from error
    for owner in (named.st_uid, found.st_uid):
        if owner not in trusted:
            raise ConfigError(
                f"{place} belongs to another user (uid {owner}), who could change what vmrewind believes",
                "find out who made it and remove it, or run this as that user",
            )
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"{place} is no directory", "move it away")
    if found.st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"{place} can be written to by every user (mode {stat.S_IMODE(found.st_mode):o})",
            f"see what is in it, then chmod o-w {place}",
        )


def _require_settled(place: Path) -> None:
    try:
        mode = os.stat(place).st_mode
    except OSError:
        return
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise ConfigError(
            f"{place} can be written to by every user, who could put another directory in the place of what is in it",
            f"chmod o-w {place}, or +t",
        )
