"""From a repository's key slots, and what this process is given, to the repository's keys; and who else may have them."""

from __future__ import annotations

import secrets

from vmrewind.errors import CorruptionError, RepositoryError
from vmrewind.repository.description import Description, read_description
from vmrewind.repository.keys import KEY_SIZE, Keys
from vmrewind.repository.layout import slot_key
from vmrewind.repository.opening import open_store
from vmrewind.repository.pins import allow_known
from vmrewind.repository.secret import Secret, find_secrets
from vmrewind.repository.slots import Slots, add_slot, open_slots, read_slots
from vmrewind.repository.store import NotFound, Store, put_verified


def new_keys(store: Store, repository_id: str, secret: Secret) -> tuple[Keys, str]:
    """The keys of a repository to be, and the slot in the store that ``secret`` opens."""
    repository_key = secrets.token_bytes(KEY_SIZE)
    return Keys(repository_key, repository_id), add_slot(store, repository_id, repository_key, secret)


def unlock(store: Store, repository_id: str) -> Keys:
    """The keys of an encrypted repository. Raises RepositoryError, CorruptionError as ``open_slots`` and ``find_secrets`` do."""
    return Keys(_open(store, repository_id, read_slots(store, repository_id))[0], repository_id)


def key_slots(url: str) -> Slots:
    """The key slots of a repository; no key is needed to see them."""
    store, description = _encrypted(url)
    return read_slots(store, description.id)


def add_key(url: str, secret: Secret) -> str:
    """Have ``secret`` open the repository too, which takes a key that does already; returns the new slot's id."""
    store, description = _encrypted(url)
    key, _ = _open(store, description.id, read_slots(store, description.id))
    slot_id = add_slot(store, description.id, key, secret)
    slots = read_slots(store, description.id)
    mine = Slots(tuple(slot for slot in slots.intact if slot.id == slot_id), slots.damaged)
    if open_slots(store, mine, lambda: [secret])[0] != key:
        raise CorruptionError(f"{url}: {slot_key(slot_id)}: the new key slot does not hold what was put into it")
    return slot_id


def remove_key(url: str, slot_id: str) -> None:
    """Remove a slot. Raises RepositoryError if it is not there, or unless what is given here opens another one that stays."""
    store, description = _encrypted(url)
    slots = read_slots(store, description.id)
    try:
        content = store.get(slot_key(slot_id))
    except (NotFound, ValueError):
        raise RepositoryError(f"{url}: there is no key slot {slot_id}", f"vmrewind key list {url}") from None
    staying = Slots(tuple(slot for slot in slots.intact if slot.id != slot_id), slots.damaged)
    if not staying.intact:
        raise RepositoryError(
            f"{url}: {slot_id} is the last key slot; without one nobody can ever read the repository", "add another key first"
        )
    try:
        _, opened = open_slots(store, staying, lambda: find_secrets(description.id, url))
    except (RepositoryError, CorruptionError) as error:
        raise RepositoryError(
            f"{url}: {slot_id} is not removed: what is given here opens no other key slot ({error})",
            "give the key that you want to keep, so that it is seen to work",
        ) from error
    store.delete(slot_key(slot_id))
    if opened.id not in (slot.id for slot in read_slots(store, description.id).intact):
        put_verified(store, slot_key(slot_id), content)
        raise RepositoryError(f"{url}: {slot_id} was put back: the slot {opened.id} was removed meanwhile", "see vmrewind key list")


def _open(store: Store, repository_id: str, slots: Slots) -> tuple[bytes, str]:
    key, slot = open_slots(store, slots, lambda: find_secrets(repository_id, store.url))
    return key, slot.id


def _encrypted(url: str) -> tuple[Store, Description]:
    store = open_store(url)
    description = read_description(store)
    allow_known(url, description)
    if not description.encrypted:
        raise RepositoryError(f"{url}: the repository is not encrypted", "vmrewind init --encrypt makes one that is")
    return store, description
