"""A store around a store that encrypts every object but the repository's description and its key slots.

An object is a header and pages of 64 KiB, each sealed by itself with AES-256-GCM, so that a range is read and verified without the
rest. Each put draws a random salt, from which, with the object's name, the object's key comes: no key is ever used for two
contents, whatever is repeated. What binds a page to its place: the key to name and put, the nonce to the page's number. The
header is sealed too and holds the plain size, which says where the last page ends; so what is flipped, cut, lengthened, reordered,
or another object under this name, does not open. ``docs/repository-format.md`` has the tables.
"""

from __future__ import annotations

import secrets
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vmrewind.errors import CorruptionError
from vmrewind.repository.keys import derive
from vmrewind.repository.layout import KEYS, REPOSITORY
from vmrewind.repository.store import NotFound, Store

MAGIC: Final = b"VMRWENC1"
PAGE: Final = 64 << 10
"""Plain bytes of a page. A record's read touches some 256 KiB of a segment: larger pages would be read in vain."""
TAG: Final = 16
_SALT: Final = 32
_HEADER: Final = struct.Struct(f"<8sQ{_SALT}s")
HEADER_SIZE: Final = _HEADER.size + TAG
_HEADER_NONCE: Final = b"\xff" * 12
_HEADERS_CACHED: Final = 1 << 16
"""Some 300 bytes each. A range of an object whose header is known costs one request, otherwise two."""


@dataclass(frozen=True, slots=True)
class _Header:
    """What is known of an object: its own key, its plain size in bytes."""

    key: bytes
    size: int


class EncryptedStore:
    """Implements :class:`vmrewind.repository.store.Store` on another one. Sizes are those of the plain text; CorruptionError is
    raised for an object that is not what was put under its name.

    Sizes in ``size`` and ``list`` are reckoned from what the store tells; only reading verifies.
    """

    def __init__(self, store: Store, key: bytes) -> None:
        self._store = store
        self._key = key
        self._lock = threading.Lock()
        self._headers: OrderedDict[str, _Header] = OrderedDict()

    @property
    def url(self) -> str:
        """How the user named the store."""
        return self._store.url

    def put(self, key: str, data: bytes) -> None:
        """Encrypt with a key of its own and put."""
        if is_plain(key):
            self._store.put(key, data)
            return
        salt = secrets.token_bytes(_SALT)
        cipher = AESGCM(self._object_key(key, salt))
        head = _HEADER.pack(MAGIC, len(data), salt)
        parts = [head, cipher.encrypt(_HEADER_NONCE, b"", head)]
        view = memoryview(data)
        parts += [cipher.encrypt(_nonce(number), view[at : at + PAGE], None) for number, at in enumerate(range(0, len(view), PAGE))]
        self._forget(key)
        self._store.put(key, b"".join(parts))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """Read the pages that hold the range, and verify them."""
        if is_plain(key):
            return self._store.get(key, offset, length)
        if length is None and offset == 0:
            return self._get_whole(key)
        known = self._known(key)
        if known is not None:
            try:
                return self._get_range(key, known, offset, length)
            except (CorruptionError, NotFound):
                self._forget(key)  # deleted since, perhaps made anew: with another salt
        return self._get_unknown(key, offset, length)

    def size(self, key: str) -> int | None:
        """Plain bytes of the object, None if there is none."""
        stored = self._store.size(key)
        return stored if stored is None or is_plain(key) else plain_size(stored)

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys and plain sizes."""
        for key, stored in self._store.list(prefix):
            yield key, stored if is_plain(key) else plain_size(stored)

    def children(self, prefix: str) -> Sequence[str]:
        """As the store has them: names are not encrypted."""
        return self._store.children(prefix)

    def delete(self, key: str) -> None:
        """Remove the object."""
        self._forget(key)
        self._store.delete(key)

    def _get_whole(self, key: str) -> bytes:
        stored = self._store.get(key)
        header = self._open_header(key, stored)
        if len(stored) > stored_size(header.size):
            raise self._damaged(key, f"{len(stored)} bytes instead of {stored_size(header.size)}")
        return self._open_pages(key, header, 0, stored, HEADER_SIZE, _pages(header.size))

    def _get_unknown(self, key: str, offset: int, length: int | None) -> bytes:
        if length is None or offset >= PAGE:
            header = self._open_header(key, self._store.get(key, 0, HEADER_SIZE))
            return self._get_range(key, header, offset, length)
        # Header and first pages lie side by side: one request for both.
        pages = _pages(offset + length)
        stored = self._store.get(key, 0, HEADER_SIZE + pages * (PAGE + TAG))
        header = self._open_header(key, stored)
        end = min(header.size, offset + length)
        return self._open_pages(key, header, 0, stored, HEADER_SIZE, _pages(end))[offset:end] if end > offset else b""

    def _get_range(self, key: str, header: _Header, offset: int, length: int | None) -> bytes:
        end = header.size if length is None else min(header.size, offset + length)
        if end <= offset:
            # Nothing is read, so only its header can say that the object is there at all.
            self._open_header(key, self._store.get(key, 0, HEADER_SIZE))
            return b""
        first, last = offset // PAGE, _pages(end)
        at = HEADER_SIZE + first * (PAGE + TAG)
        stored = self._store.get(key, at, min(HEADER_SIZE + last * (PAGE + TAG), stored_size(header.size)) - at)
        start = first * PAGE
        return self._open_pages(key, header, first, stored, 0, last)[offset - start : end - start]

    def _open_pages(self, key: str, header: _Header, first: int, stored: bytes, at: int, last: int) -> bytes:
        """The plain bytes of the pages [first, last), which lie in ``stored`` from ``at`` on."""
        cipher = AESGCM(header.key)
        view = memoryview(stored)
        plain = []
        for number in range(first, last):
            size = min(PAGE, header.size - number * PAGE) + TAG
            page = view[at : at + size]
            if len(page) < size:
                raise self._damaged(key, f"it ends in page {number}, though it has {_pages(header.size)} pages")
            try:
                plain.append(cipher.decrypt(_nonce(number), page, None))
            except InvalidTag:
                raise self._damaged(key, f"page {number} (plain bytes from {number * PAGE} on) does not open") from None
            at += size
        return plain[0] if len(plain) == 1 else b"".join(plain)

    def _open_header(self, key: str, stored: bytes) -> _Header:
        if len(stored) < HEADER_SIZE:
            raise self._damaged(key, f"it ends in its header, after {len(stored)} bytes")
        head, tag = stored[: _HEADER.size], stored[_HEADER.size : HEADER_SIZE]
        magic, size, salt = _HEADER.unpack(head)
        if magic != MAGIC:
            raise self._damaged(key, "it does not begin as an encrypted object does")
        object_key = self._object_key(key, salt)
        try:
            AESGCM(object_key).decrypt(_HEADER_NONCE, tag, head)
        except InvalidTag:
            raise self._damaged(key, "its header does not open, or it is another object than its name says") from None
        header = _Header(object_key, size)
        with self._lock:
            self._headers[key] = header
            if len(self._headers) > _HEADERS_CACHED:
                self._headers.popitem(last=False)
        return header

    def _object_key(self, key: str, salt: bytes) -> bytes:
        return derive(self._key, salt, key.encode())

    def _known(self, key: str) -> _Header | None:
        with self._lock:
            return self._headers.get(key)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._headers.pop(key, None)

    def _damaged(self, key: str, why: str) -> CorruptionError:
        return CorruptionError(f"{self.url}: object {key} cannot be decrypted: {why}")


def is_plain(key: str) -> bool:
    """Whether the object is what the key is found by, and so cannot be encrypted."""
    return key == REPOSITORY or key.startswith(KEYS)


def stored_size(plain: int) -> int:
    """Bytes that an object of ``plain`` bytes takes in the store."""
    return HEADER_SIZE + plain + _pages(plain) * TAG


def plain_size(stored: int) -> int:
    """Plain bytes of an object that takes ``stored`` bytes; of one that is cut short, what may be left of it."""
    full, rest = divmod(max(0, stored - HEADER_SIZE), PAGE + TAG)
    return full * PAGE + max(0, rest - TAG)


def _pages(plain: int) -> int:
    return -(-plain // PAGE)


def _nonce(page: int) -> bytes:
    return page.to_bytes(12, "little")
