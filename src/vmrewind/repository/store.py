"""The contract that every storage backend fulfils: five operations on write-once objects, and nothing about directories.

Two outcomes are part of the contract and are no errors: a key that exists already, and one that does not exist. What else goes
wrong is a VmrewindError of the backend that names the object. AlreadyExists may be the echo of one's own put, which an earlier try
had brought there: who gets it compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from vmrewind.errors import CorruptionError, RepositoryError


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
        """(key, bytes) of every object whose key begins with ``prefix``, in no order that could be relied on."""

    def children(self, prefix: str) -> Sequence[str]:
        """The components that follow ``prefix`` (empty, or ending in ``/``) in keys that go on behind them, sorted.

        Some stores name one for a while although its last key was deleted."""

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens if there is none."""


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
