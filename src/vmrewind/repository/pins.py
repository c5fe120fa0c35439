"""What this host remembers of encrypted repositories, so that nobody who can write to a store can make it take another one for it.

``<state>/repositories/<digest of the URL>.json`` says which repository the URL led to, and that it was encrypted. Without it, who
puts another ``repository.json`` into the store would have history written, or disks restored, in plain text.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Final

import xxhash

from vmrewind.errors import RepositoryError
from vmrewind.journal.runs import write_durably
from vmrewind.paths import state_root
from vmrewind.repository.description import Description
from vmrewind.repository.secret import given_secrets
from vmrewind.repository.url import place_of

_DIRECTORY: Final = "repositories"


def allow_known(url: str, description: Description) -> None:
    """Raise RepositoryError if ``url`` led to another repository before, or if what it leads to should be encrypted and is not."""
    path, known = _known(url)
    if known is not None and (known, True) != (description.id, description.encrypted):
        found = "another one" if known != description.id else "one that is not encrypted"
        raise RepositoryError(
            f"{url}: this host knows the encrypted repository {known} there, and now finds {found} (id {description.id})",
            f"somebody may have replaced it; if that was you, remove {path}",
        )
    if not description.encrypted and (given := given_secrets()):
        raise RepositoryError(
            f"{url}: a key is given ({given[0].origin}), but the repository is not encrypted",
            "if it never was, take the key's variables away; a host with both kinds has its keys in /etc/vmrewind/keys",
        )


def allow_new(url: str, *, encrypted: bool) -> None:
    """Raise RepositoryError if a new repository at ``url`` would have to be encrypted and shall not be."""
    path, known = _known(url)
    if known is not None and not encrypted:
        raise RepositoryError(
            f"{url}: this host knows an encrypted repository there, {known}",
            f"add --encrypt; if it may be plain now, remove {path}",
        )
    if not encrypted and (given := given_secrets()):
        raise RepositoryError(
            f"{url}: a key is given ({given[0].origin}) for a repository that shall not be encrypted",
            "add --encrypt, or take the key's variables away",
        )


def pin(url: str, repository_id: str) -> None:
    """Remember an encrypted repository that was opened with its key, or made. Where nothing can be written, nothing is."""
    path, place = _pin(url)
    content = json.dumps({"url": place, "repository": repository_id}).encode() + b"\n"
    with contextlib.suppress(OSError):
        if not path.is_file() or path.read_bytes() != content:
            write_durably(path, content)


def _pin(url: str) -> tuple[Path, str]:
    place = place_of(url)
    return state_root() / _DIRECTORY / f"{xxhash.xxh3_128_hexdigest(place.encode())}.json", place


def _known(url: str) -> tuple[Path, str | None]:
    """The pin's file, and the id of the encrypted repository that the URL led to."""
    path, place = _pin(url)
    try:
        content = json.loads(path.read_bytes())
        known = content["repository"] if content["url"] == place else None
    except FileNotFoundError:
        return path, None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RepositoryError(
            f"{path}: cannot be read: {error}", f"it says which repository {url} is; remove it to learn anew"
        ) from error
    return path, known
