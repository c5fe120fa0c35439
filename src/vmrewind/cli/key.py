"""``vmrewind key list``, ``key add``, ``key remove``: who can open an encrypted repository."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from vmrewind.repository.secret import new_passphrase, secret_of_key_file
from vmrewind.repository.unlocking import add_key, key_slots, remove_key

Url = Annotated[str, Parameter(help="The repository.")]
Json = Annotated[bool, Parameter(negative="", help="Print one JSON object.")]
KeyFile = Annotated[Path | None, Parameter(help="A key file; it is made if it is not there.")]


def list_keys(url: Url, /, *, json: Json = False) -> None:
    """Show the keys that open a repository. It takes none of them."""
    slots = key_slots(url)
    shown = [{"slot": slot.id, "kind": slot.kind, "created": slot.created} for slot in slots.intact]
    if json:
        print(json_module.dumps({"repository": url, "slots": shown, "damaged": list(slots.damaged)}))
        return
    for slot in shown:
        print(f"{slot['slot']}  {slot['kind']:<10}  {slot['created']}")
    for what in slots.damaged:
        print(f"damaged: {what}")


def add(url: Url, /, *, key_file: KeyFile = None, json: Json = False) -> None:
    """Have another key open a repository: a key file, or a passphrase, which is asked for (or read from standard input).

    What opens the repository today is given as always: by VMREWIND_KEY_FILE, VMREWIND_PASSPHRASE, or in /etc/vmrewind/keys.
    """
    secret = new_passphrase(url) if key_file is None else secret_of_key_file(key_file)
    slot_id = add_key(url, secret)
    if json:
        print(json_module.dumps({"repository": url, "slot": slot_id}))
    else:
        print(f"{secret.origin} opens {url} from now on (slot {slot_id})")


def remove(url: Url, slot: Annotated[str, Parameter(help="As key list shows it.")], /, *, json: Json = False) -> None:
    """Take a key away. It takes another key, which stays.

    Nothing is encrypted anew: whoever had the key, and can read the repository or a copy of the slot, can read all of it, also what
    is yet to come. If a key fell into wrong hands, begin a new repository.
    """
    remove_key(url, slot)
    if json:
        print(json_module.dumps({"repository": url, "removed": slot}))
    else:
        print(f"slot {slot} is removed; who has opened the repository with it before may have kept what opens it for ever")
