"""The names of a repository's objects, both ways: from what they hold to their keys, and back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from urllib.parse import quote, unquote

REPOSITORY: Final = "repository.json"
KEYS: Final = "keys/"
CHUNKS: Final = "chunks/"
VMS: Final = "vms/"

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SEGMENT: Final = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{1,16})", re.ASCII)


def format_time(time_ns: int) -> str:
    """A time as object names carry it, e.g. ``20261122T103105.250000Z``: UTC, cut to microseconds, sorting by time."""
    moment = _EPOCH + timedelta(microseconds=time_ns // 1000)
    return moment.strftime("%Y%m%dT%H%M%S.%fZ")


def parse_time(text: str) -> int:
    """The time of ``format_time``, ns; raises ValueError."""
    moment = datetime.strptime(text, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


def encode_name(name: str) -> str:
    """A VM's or a disk's name as one component of a key: percent-encoded beyond ``[A-Za-z0-9._-]``, and so is a dot in front."""
    encoded = quote(name, safe="").replace("~", "%7E")
    return "%2E" + encoded[1:] if encoded.startswith(".") else encoded


def decode_name(component: str) -> str:
    """The name that ``encode_name`` encoded."""
    return unquote(component)


def chunk_key(chunk_id: str) -> str:
    """Where a chunk lies; the first two digits spread the chunks over 256 directories."""
    return f"{CHUNKS}{chunk_id[:2]}/{chunk_id}"


def slot_key(slot_id: str) -> str:
    """Where a key slot of an encrypted repository lies."""
    return f"{KEYS}{slot_id}.json"


def vm_prefix(vm: str) -> str:
    """What begins the keys of all objects of a VM."""
    return f"{VMS}{encode_name(vm)}/"


def vm_key(vm: str) -> str:
    """The object that says which VM the name belongs to."""
    return f"{vm_prefix(vm)}vm.json"


def run_prefix(vm: str) -> str:
    """Where the descriptions of a VM's runs lie."""
    return f"{vm_prefix(vm)}runs/"


def run_key(vm: str, run: int) -> str:
    """The description of one run."""
    return f"{run_prefix(vm)}{run:016x}.json"


def config_prefix(vm: str) -> str:
    """Where the versions of a VM's configuration lie."""
    return f"{vm_prefix(vm)}config/"


def base_prefix(vm: str, disk: str) -> str:
    """Where the manifests of a disk's bases lie."""
    return f"{vm_prefix(vm)}bases/{encode_name(disk)}/"


def base_key(vm: str, disk: str, base_id: str) -> str:
    """The manifest of one base."""
    return f"{base_prefix(vm, disk)}{base_id}.json"


def segment_prefix(vm: str) -> str:
    """Where a VM's segments lie that hold every write (level 0)."""
    return f"{vm_prefix(vm)}segments/0/"


@dataclass(frozen=True, slots=True, order=True)
class SegmentName:
    """A shipped segment, known by name: every record of the disks in ``mask`` (bit i: disk index i), and every record of the
    whole VM, with a seq from ``first`` to ``last`` of the run."""

    run: int
    first: int
    last: int
    mask: int
    vm: str

    @property
    def key(self) -> str:
        """The object's key."""
        return f"{segment_prefix(self.vm)}{self.run:016x}-{self.first:016x}-{self.last:016x}-{self.mask:x}"

    def carries(self, disk_index: int) -> bool:
        """Whether the segment holds the records of this disk."""
        return bool(self.mask >> disk_index & 1)


def parse_segment_key(vm: str, key: str) -> SegmentName | None:
    """The segment that a key names, None for a key that is not a segment's."""
    match = _SEGMENT.fullmatch(key.removeprefix(segment_prefix(vm)))
    if match is None:
        return None
    run, first, last, mask = (int(digits, 16) for digits in match.groups())
    name = SegmentName(run, first, last, mask, vm)
    return name if first <= last and name.key == key else None


@dataclass(frozen=True, slots=True, order=True)
class ConfigName:
    """A version of a VM's configuration, known by name. ``suffix`` is ``xml`` or ``toml``; ``digest`` is its content's."""

    time_ns: int
    digest: str
    suffix: str
    vm: str

    @property
    def key(self) -> str:
        """The object's key."""
        return f"{config_prefix(self.vm)}{format_time(self.time_ns)}-{self.digest}.{self.suffix}"


def parse_config_key(vm: str, key: str) -> ConfigName | None:
    """The configuration that a key names, None for another key."""
    stem, dot, suffix = key.removeprefix(config_prefix(vm)).rpartition(".")
    time, dash, digest = stem.partition("-")
    if not dot or not dash:
        return None
    try:
        return ConfigName(parse_time(time), digest, suffix, vm)
    except ValueError:
        return None
