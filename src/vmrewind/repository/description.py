"""``repository.json``: which repository it is, of which format, and whether it is encrypted. What it says, pins.py doubts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.repository.layout import REPOSITORY
from vmrewind.repository.sealed import seal, unseal
from vmrewind.repository.store import NotFound, Store

FORMAT: Final = 1
ENCRYPTION: Final = {"format": 1, "cipher": "aes-256-gcm", "page": 65536}
"""What ``encryption`` says in an encrypted repository. Whoever reads anything else there does not know how to read on."""


@dataclass(frozen=True, slots=True)
class Description:
    """A repository's description; ``document`` is the object as it is stored; ``created_ns`` None if it does not say when."""

    id: str
    encrypted: bool
    document: bytes
    created_ns: int | None


def describe(repository_id: str, *, encrypted: bool) -> Description:
    """The description of a new repository."""
    created = datetime.now(UTC).replace(microsecond=0)
    encryption = ENCRYPTION if encrypted else None
    document = seal({"format": FORMAT, "id": repository_id, "created": created.isoformat(), "encryption": encryption})
    return Description(repository_id, encrypted, document, int(created.timestamp()) * 10**9)


def parse_description(document: bytes, url: str) -> Description:
    """Raises RepositoryError for a newer format or an unknown encryption, CorruptionError for a damaged description."""
    origin = f"{url}: {REPOSITORY}"
    _refuse_newer(document, url)
    content = unseal(document, origin)
    encryption = content.get("encryption")
    if encryption not in (None, ENCRYPTION):
        raise RepositoryError(
            f"{url}: the repository is encrypted in a way that this vmrewind does not know",
            "use the vmrewind that made it, or a newer one",
        )
    repository_id = content.get("id")
    if content.get("format") != FORMAT or not isinstance(repository_id, str):
        raise CorruptionError(f"{origin}: not a repository's description")
    return Description(repository_id, encryption is not None, document, _time_ns(content.get("created")))


def _time_ns(created: object) -> int | None:
    try:
        return int(datetime.fromisoformat(str(created)).timestamp()) * 10**9
    except (ValueError, OverflowError):
        return None


def read_description(store: Store) -> Description:
    """The description of the repository in a store; raises RepositoryError, also if there is none, and CorruptionError."""
    try:
        return parse_description(store.get(REPOSITORY), store.url)
    except NotFound:
        raise RepositoryError(
            f"{store.url}: there is no repository here",
            f"mount what holds it, or make one: vmrewind init {store.url}",
        ) from None


def _refuse_newer(document: bytes, url: str) -> None:
    """Before anything else is believed: a newer format may be sealed in another way."""
    try:
        found = json.loads(document)["format"]
    except (ValueError, KeyError, TypeError):
        return  # not newer but damaged, which is found out next
    if isinstance(found, int) and found > FORMAT:
        raise RepositoryError(
            f"{url}: the repository has format {found}, this vmrewind knows up to {FORMAT}",
            "use the vmrewind that made it, or a newer one",
        )
