"""Key slots: the repository key, wrapped by a passphrase or by a key file. Each is a write-once object, ``keys/<id>.json``.

So a key is added by adding an object, and nothing that is encrypted changes. Removing one takes away the way to the repository
key, not the repository key from those who have had it.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.repository.keys import KEY_SIZE, derive
from vmrewind.repository.layout import KEYS, slot_key
from vmrewind.repository.sealed import seal, unseal
from vmrewind.repository.secret import KEY_FILE, PASSPHRASE, Secret
from vmrewind.repository.store import Store, get_or_corrupt, put_verified

SCRYPT_N: Final = 1 << 17
"""128 MiB and some 0.3 s for each guess at a passphrase."""
_SCRYPT_N_MAX: Final = 1 << 20
"""What a slot may ask for: 1 GiB. A hostile one must not take all memory of a host."""
_SCRYPT_R: Final = 8
_SALT: Final = 32
_NONCE: Final = bytes(12)
"""Fit for one message; a slot's wrapping key, of a salt of its own, wraps one."""
_SLOTS_MAX: Final = 64
_ID: Final = re.compile(r"[0-9a-f]{16}", re.ASCII)
_HINT: Final = "vmrewind key list shows which keys open it; docs/repositories.md says how a key is given"


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot that is intact. ``kind`` is that of the secret which opens it."""

    id: str
    kind: str
    created: str
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Slots:
    """A repository's slots, oldest first, and what is damaged: messages that name the objects."""

    intact: tuple[Slot, ...]
    damaged: tuple[str, ...]


def add_slot(store: Store, repository_id: str, repository_key: bytes, secret: Secret) -> str:
    """Make a slot that ``secret`` opens; returns its id."""
    slot_id = secrets.token_hex(8)
    salt = secrets.token_bytes(_SALT)
    kdf: dict[str, Any] = {"name": "hkdf-sha256", "salt": _text(salt)}
    if secret.kind == PASSPHRASE:
        kdf = {"name": "scrypt", "n": SCRYPT_N, "r": _SCRYPT_R, "p": 1, "salt": _text(salt)}
    wrapping, check = _wrapping_key(secret, kdf)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    content = {"repository": repository_id, "slot": slot_id, "kind": secret.kind, "created": created, "kdf": kdf, "check": check}
    wrapped = AESGCM(wrapping).encrypt(_NONCE, repository_key, _associated(content))
    put_verified(store, slot_key(slot_id), seal(content | {"wrapped": _text(wrapped)}))
    return slot_id


def read_slots(store: Store, repository_id: str) -> Slots:
    """The slots of the repository; those that another repository's failed making left behind are none."""
    intact, damaged = [], []
    for number, (key, _) in enumerate(sorted(store.list(KEYS))):
        if number == _SLOTS_MAX:
            raise RepositoryError(f"{store.url}: more than {_SLOTS_MAX} key slots below {KEYS}", "remove those that nobody needs")
        origin = f"{store.url}: {key}"
        try:
            content = unseal(get_or_corrupt(store, key), origin)
            if content.get("repository") != repository_id:
                continue
            slot = Slot(content["slot"], content["kind"], content["created"], content)
            if not _ID.fullmatch(slot.id) or slot_key(slot.id) != key or slot.kind not in (PASSPHRASE, KEY_FILE):
                raise CorruptionError(f"{origin}: not the key slot of this name")
        except (KeyError, TypeError) as error:
            damaged.append(f"{origin}: not a key slot: {error!r}")
        except CorruptionError as error:
            damaged.append(str(error))
        else:
            intact.append(slot)
    return Slots(tuple(sorted(intact, key=lambda slot: (slot.created, slot.id))), tuple(damaged))


def open_slots(store: Store, slots: Slots, find: Callable[[], list[Secret]]) -> tuple[bytes, Slot]:
    """The repository key, and the first slot that one of the secrets opens.

    Raises CorruptionError if no slot is left whole, RepositoryError if none of the secrets opens any.
    """
    if not slots.intact:
        what = "; ".join(slots.damaged) or f"there is no key slot below {KEYS}"
        raise CorruptionError(
            f"{store.url}: {what}: without one the repository cannot be decrypted",
            "put the objects below keys/ back from a copy; nothing else can open the repository",
        )
    tried = find()
    damaged = list(slots.damaged)
    for secret in tried:
        for slot in slots.intact:
            if slot.kind != secret.kind:
                continue
            try:
                key = open_slot(store, slot, secret)
            except CorruptionError as error:
                damaged.append(str(error))
                continue
            if key is not None:
                return key, slot
    origins = ", ".join(secret.origin for secret in tried)
    what = f"{store.url}: the key does not open the repository: {origins}"
    if damaged:
        raise CorruptionError(f"{what}; damaged: {'; '.join(damaged)}", _HINT)
    raise RepositoryError(what, _HINT)


def open_slot(store: Store, slot: Slot, secret: Secret) -> bytes | None:
    """The repository key from one slot, None if the secret is not the slot's."""
    content = dict(slot.content)
    try:
        wrapped = _bytes(content.pop("wrapped"))
        wrapping, check = _wrapping_key(secret, content["kdf"])
        if not secrets.compare_digest(check, content["check"]):
            return None
        key = AESGCM(wrapping).decrypt(_NONCE, wrapped, _associated(content))
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key of {len(key)} bytes")
    except (KeyError, TypeError, ValueError, InvalidTag) as error:
        raise CorruptionError(
            f"{store.url}: {slot_key(slot.id)}: the key slot was changed ({error!r})", "put it back from a copy"
        ) from None
    return key


def _wrapping_key(secret: Secret, kdf: Mapping[str, Any]) -> tuple[bytes, str]:
    """The key that wraps, and a word that tells whether the secret is the right one: GCM alone would not commit to one key."""
    salt = _bytes(kdf["salt"])
    if secret.kind == PASSPHRASE:
        n = kdf["n"]
        if kdf["name"] != "scrypt" or type(n) is not int or not 2 <= n <= _SCRYPT_N_MAX or n & n - 1:
            raise ValueError(f"{kdf['name']!r} with n = {n!r}")
        if (kdf["r"], kdf["p"]) != (_SCRYPT_R, 1):
            raise ValueError(f"scrypt with r = {kdf['r']!r}, p = {kdf['p']!r}")
        master = _scrypt(secret.value, salt, n)
    elif kdf["name"] == "hkdf-sha256":
        master = secret.value
    else:
        raise ValueError(f"{kdf['name']!r}")
    return derive(master, salt, b"vmrewind 1: wrapping"), derive(master, salt, b"vmrewind 1: check").hex()


@functools.lru_cache(maxsize=8)
def _scrypt(passphrase: bytes, salt: bytes, n: int) -> bytes:
    """Kept, since a process whose store is away for a while opens the repository again and again."""
    return Scrypt(salt=salt, length=KEY_SIZE, n=n, r=_SCRYPT_R, p=1).derive(passphrase)


def _associated(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
