"""Content-addressed pieces of disk images, shared by all bases of all VMs of a repository.

A chunk's id is the keyed BLAKE3 of its plain bytes, so that two repositories have different ids for the same piece. The key is
derived from the repository's id; an encrypted repository's is secret, so that its ids tell nothing. The object is one zstd frame.
"""

from __future__ import annotations

from typing import Final

import blake3

from vmrewind.errors import CorruptionError
from vmrewind.repository.compression import compress, decompress
from vmrewind.repository.layout import chunk_key
from vmrewind.repository.store import AlreadyExists, Store, get_or_corrupt

CHUNK_SIZE: Final = 4 << 20
_KEY_CONTEXT: Final = "vmrewind repository format 1: chunk ids"


def public_key(repository_id: str) -> bytes:
    """The key of a repository that is not encrypted."""
    return blake3.blake3(repository_id.encode(), derive_key_context=_KEY_CONTEXT).digest()


class Chunks:
    """The chunks of one repository. May be used from several threads. ``key`` makes the ids, 32 bytes.

    With ``verified`` a chunk that is there is read before it counts as stored: a backup that stands on chunks nobody looked at is
    none. Reading them costs a directory as much as reading the image; from an object store it would cost what their sharing saves.
    """

    def __init__(self, store: Store, key: bytes, *, verified: bool) -> None:
        self._store = store
        self._verified = verified
        self._key = key

    def id(self, data: bytes | memoryview) -> str:
        """The id of a piece of plain bytes: 64 hex digits."""
        return blake3.blake3(data, key=self._key).hexdigest()

    def exists(self, chunk_id: str) -> bool:
        """Whether the chunk is stored."""
        return self._store.size(chunk_key(chunk_id)) is not None

    def put(self, data: bytes | memoryview) -> tuple[str, int]:
        """Store a piece unless it is there; returns its id and how many bytes were sent. Durable when this returns."""
        chunk_id = self.id(data)
        if self.exists(chunk_id):
            if not self._verified or self._sound(chunk_id):
                return chunk_id, 0
            # What does not match its name is no chunk of anybody's: every base that names it is whole again with the right one.
            self._store.delete(chunk_key(chunk_id))
        packed = compress(data)
        try:
            self._store.put(chunk_key(chunk_id), packed)
        except AlreadyExists:
            # Another writer was first, perhaps with another version of zstd: the plain bytes are what must agree.
            self.read(chunk_id)
            return chunk_id, 0
        return chunk_id, len(packed)

    def _sound(self, chunk_id: str) -> bool:
        try:
            self.read(chunk_id)
        except CorruptionError:
            return False
        return True

    def read(self, chunk_id: str) -> bytes:
        """The chunk's plain bytes, verified by their id; raises CorruptionError naming the object."""
        key = chunk_key(chunk_id)
        packed = get_or_corrupt(self._store, key)
        try:
            data = decompress(packed, CHUNK_SIZE)
        except ValueError as error:
            raise self._damaged(key, str(error)) from error
        if self.id(data) != chunk_id:
            raise self._damaged(key, "its content does not match its name")
        return data

    def _damaged(self, key: str, why: str) -> CorruptionError:
        return CorruptionError(
            f"{self._store.url}: chunk {key} is damaged: {why}",
            "a backup of a disk that still holds that piece stores it anew; in an object store, remove that object first",
        )
