"""What a verification finds: the words that it is reported with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from vmrewind.recover.affected import Affected

PUT_BACK: Final = "put it back from another copy of the repository, if there is one"
WAIT: Final = "wait until it is made"
NEW_BASE: Final = f"{PUT_BACK}; else vmrewind backup, at the VM's next stop, begins a history that does not need it"
STORE_ANEW: Final = "a backup of a disk that still holds that piece stores it anew; in an object store, remove that object first"


class Kind(StrEnum):
    """What a finding means. ``GAP`` and ``NOTE`` leave a repository sound."""

    DAMAGE = "damage"
    """Something is wrong, or missing, that history needs."""
    UNCHECKED = "unchecked"
    """The store could not be asked: nothing is known."""
    OVERDUE = "overdue"
    """Records that ship should have carried long ago, or that were deleted: the names do not tell which."""
    GAP = "gap"
    """Records that the repository never had, or has yet to get, for a reason that is known."""
    NOTE = "note"
    """Nothing that a moment depends on."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. ``object`` is a key, or a place; ``affected`` the moments that cannot be restored because of it."""

    kind: Kind
    vm: str | None
    object: str
    message: str
    hint: str = ""
    affected: Sequence[Affected] = ()


@dataclass(slots=True)
class Part:
    """What was checked of a VM, or of the chunks, which all VMs share (``vm`` None). ``read``: objects of which every byte was read
    now; ``earlier``: those that were by an earlier verification. ``covered``: (disk, from ns, until ns) of what is on record."""

    vm: str | None
    objects: int = 0
    stored_bytes: int = 0
    read: int = 0
    read_bytes: int = 0
    earlier: int = 0
    runs: int = 0
    bases: int = 0
    covered: list[tuple[str, int | None, int | None]] = field(default_factory=list)
