"""The keys of an encrypted repository: all of them come from one random repository key, and none is used for two things.

HKDF-SHA256 throughout. The repository's id is the salt, so that even the same repository key would give two repositories
different keys.
"""

from __future__ import annotations

import ctypes
from typing import Final

import blake3
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_SIZE: Final = 32
_PR_SET_DUMPABLE: Final = 4
_DIGEST_DIGITS: Final = 16


def derive(key: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 of a key: 32 bytes."""
    return HKDF(algorithm=SHA256(), length=KEY_SIZE, salt=salt, info=info).derive(key)


class Keys:
    """What a repository key gives: ``objects`` encrypts contents, ``chunk_ids`` names chunks."""

    def __init__(self, repository_key: bytes, repository_id: str) -> None:
        # No core file of this process, and no look into its memory by another one of the same user.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        salt = repository_id.encode()
        self.repository_key = repository_key
        self.objects = derive(repository_key, salt, b"vmrewind 1: objects")
        self.chunk_ids = derive(repository_key, salt, b"vmrewind 1: chunk ids")
        self._names = derive(repository_key, salt, b"vmrewind 1: names")

    def digest(self, data: bytes) -> str:
        """A digest of content for an object's name, which tells nothing to those without the key: 16 hex digits."""
        return blake3.blake3(data, key=self._names).hexdigest()[:_DIGEST_DIGITS]
