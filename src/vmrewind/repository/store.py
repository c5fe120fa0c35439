"""The contract that every storage backend fulfils: five operations on write-once objects, and nothing about directories.

Two outcomes are part of the contract and are no errors: a key that exists already, and one that does not exist. What else goes
wrong is a VmrewindError of the backend that names the object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.repository.url import CREDENTIALS_HINT, holds_credentials, redacted


class AlreadyExists(Exception):
    """A put found an object of this key; the object was left as it is."""


class NotFound(Exception):
    """There is no object of this key."""


class Store(Protocol):
    """Objects by key. A key is ``/``-separated components of ``[A-Za-z0-9._%-]``, none of which begins with a dot.

    Operations raise RepositoryError (SpaceError where the storage is full) besides the two signals above, and may be called
    from several threads.
    """

    @property
    def url(self) -> str:
        """How the user named the store."""

    def put(self, key: str, data: bytes) -> None:
        """Make an object, durable and whole when this returns. Raises AlreadyExists and leaves an existing one alone."""

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """``length`` bytes from ``offset`` on, fewer where the object ends; all the rest without ``length``. Raises NotFound."""

    def size(self, key: str) -> int | None:
        """Bytes of the object, None if there is none."""

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(key, bytes) of every object whose key begins with ``prefix``, in order of keys (as strings of characters)."""

    def children(self, prefix: str) -> Sequence[str]:
        """The components that follow ``prefix`` (empty, or ending in ``/``) in keys that go on behind them, sorted."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""


def open_store(url: str, *, create: bool = False) -> Store:
    """The store that ``url`` names: a directory's path or file:// URL. Only with ``create`` is a missing directory made."""
    from vmrewind.repository.directory import DirectoryStore

    if holds_credentials(url):
        raise RepositoryError(f"{redacted(url)}: the URL holds credentials, which anybody could read in it", CREDENTIALS_HINT)
    scheme, separator, _ = url.partition("://")
    if not separator:
        if not url:
            raise RepositoryError("the repository's URL is empty", "name a directory")
        return DirectoryStore(Path(url).absolute(), url, create=create)
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise RepositoryError(f"{url}: a file URL names no other host", "write file:///path, or just the path")
        return DirectoryStore(Path(unquote(parts.path)), url, create=create)
    raise RepositoryError(
        f"{url}: this version keeps repositories in directories only (a path, or file:///path), not in {scheme}://",
        "name a directory, for example one on a network file system",
    )


def get_or_corrupt(store: Store, key: str) -> bytes:
    """The whole object, which something else in the repository says must be there; raises CorruptionError if it is not."""
    try:
        return store.get(key)
    except NotFound as error:
        raise CorruptionError(f"{store.url}: object {key} is missing") from error


def put_verified(store: Store, key: str, data: bytes) -> None:
    """Put an object that may be there already with the same content, as when a put that seemed to fail had arrived.

    Raises RepositoryError if the key holds something else.
    """
    try:
        store.put(key, data)
    except AlreadyExists:
        if store.get(key) != data:
            raise RepositoryError(
                f"{store.url}: object {key} exists with another content; nothing was overwritten",
                "find out what else writes to this repository",
            ) from None
