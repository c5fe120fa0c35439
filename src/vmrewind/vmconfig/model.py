"""The VM's configuration as one typed model, whether it came from a TOML file or from a libvirt domain's metadata.

A :class:`VmConfig` that a loader returned has been validated: names are safe as file names, every path is absolute,
targets and images are unique. The loaders (``toml``, ``domain``) turn :class:`Invalid`, which knows only the key, into
a ConfigError that also names the file or the domain.
"""

from __future__ import annotations

import difflib
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec

from vmrewind.errors import ConfigError, CorruptionError, RepositoryError, VmStateError
from vmrewind.journal.content import Unreadable, content
from vmrewind.journal.runs import write_durably
from vmrewind.repository.address import is_object_store, parse_address
from vmrewind.repository.url import CREDENTIALS_HINT, holds_credentials, redacted

ImageFormat = Literal["raw", "qcow2"]
ShipMode = Literal["auto", "on-demand"]
JournalFullPolicy = Literal["drop-history", "bypass", "block"]
FailurePolicy = Literal["abort", "start-unprotected"]

JOURNAL_SIZE_DEFAULT: Final = 8 << 30
JOURNAL_SIZE_MIN: Final = 1 << 20
JOURNAL_SIZE_MAX: Final = 1 << 60
BANDWIDTH_LIMIT_MIN: Final = 64 << 10
BANDWIDTH_LIMIT_MAX: Final = 1 << 40
LOCAL_HISTORY_SECONDS_MAX: Final = 10 * 366 * 86_400
NAME_BYTES_MAX: Final = 200
"""Leaves room in a directory entry (255 bytes) for what is put around a VM's name."""
TARGET: Final = re.compile(r"[a-z][a-z0-9_-]{0,30}")
"""Also a valid QEMU node name, which a disk's target becomes: a letter first, 31 characters at most."""
SIZE: Final = re.compile(r"(\d{1,19})\s*(B|KiB|MiB|GiB|TiB)")
SIZE_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DURATION: Final = re.compile(r"(\d{1,9})\s*([smhd])")
DURATION_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Invalid(ValueError):
    """A value that cannot be. ``key`` is its dotted name (``protection.disk[1].image``), ``hint`` what to do."""

    def __init__(self, key: str, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.key = key
        self.hint = hint


class DiskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A protected disk. ``device`` is QEMU's device driver, with properties after commas if need be, in direct mode;
    ``"none"`` means that the command line itself attaches a device to the node called ``target``."""

    target: str
    image: str
    format: ImageFormat = "raw"
    device: str = "virtio-blk-pci"


class QemuConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How direct mode starts QEMU: the command line without the protected disks."""

    command: list[str]


class Protection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is protected, and how. ``journal`` None means the state directory; ``journal_size`` is in bytes.

    ``bandwidth_limit``: bytes a second that ship sends at most. ``local_history``: seconds for which shipped history stays
    in the journal; None: as long as the journal's size allows.
    """

    enabled: bool
    disk: list[DiskConfig] = []
    repository: str | None = None
    ship: ShipMode = "auto"
    journal: str | None = None
    journal_size: int = JOURNAL_SIZE_DEFAULT
    bandwidth_limit: int | None = None
    local_history: int | None = None
    on_journal_full: JournalFullPolicy = "drop-history"
    on_failure: FailurePolicy = "abort"
    shutdown_timeout_seconds: int = 60


class VmConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A VM's configuration. ``source`` is the TOML file's path or the domain's name, ``document`` the text itself."""

    name: str
    uuid: str | None
    qemu: QemuConfig | None
    protection: Protection
    origin: Literal["toml", "libvirt"]
    source: str
    document: str

    def save(self, path: Path) -> None:
        """Write as JSON so that after a power loss either the old or the new file is there, whole."""
        write_durably(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def load_saved(cls, path: Path) -> VmConfig:
        """Read what :meth:`save` wrote. Raises VmStateError if there is no such file, CorruptionError for a bad one."""
        try:
            config = msgspec.json.decode(content(path), type=cls)
            validate(config)
        except FileNotFoundError:
            raise VmStateError(
                f"no VM called {path.parent.name!r} is known on this host ({path} does not exist)",
                "give its TOML file, or start the VM with protection once",
            ) from None
        except (msgspec.MsgspecError, UnicodeDecodeError, Unreadable, Invalid) as error:
            raise CorruptionError(
                f"{path}: not a saved VM configuration: {error}", "start the VM once more: that writes the file anew"
            ) from error
        return config


def validate(config: VmConfig) -> None:
    """Check what types alone do not say. Raises Invalid naming the key."""
    check_name("name", config.name)
    if config.uuid is not None:
        normal_uuid("uuid", config.uuid)
    if config.qemu is not None:
        if not config.qemu.command:
            raise Invalid("qemu.command", "the command line is empty", 'give it as a list: ["qemu-system-x86_64", "-m", "256"]')
        for index, argument in enumerate(config.qemu.command):
            _check_text(f"qemu.command[{index}]", argument)
    validate_protection(config.protection)


def validate_protection(protection: Protection) -> None:
    """The part of :func:`validate` that concerns protection."""
    if protection.enabled and not protection.disk:
        raise Invalid(
            "protection.disk",
            "protection is enabled and no disk is named",
            "name at least one disk, or set enabled to no",
        )
    _check_disks(protection.disk)
    if protection.repository is not None:
        check_repository("protection.repository", protection.repository)
    if protection.journal is not None:
        _check_absolute("protection.journal", protection.journal)
    check_journal_size("protection.journal_size", protection.journal_size)
    check_bandwidth_limit("protection.bandwidth_limit", protection.bandwidth_limit)
    check_local_history("protection.local_history", protection.local_history)
    if not 0 <= protection.shutdown_timeout_seconds <= 86_400:
        raise Invalid(
            "protection.shutdown_timeout_seconds",
            f"{protection.shutdown_timeout_seconds} is not between 0 and 86400",
            "0 ends the guest at once; the default is 60",
        )


def _check_disks(disks: list[DiskConfig]) -> None:
    targets: dict[str, int] = {}
    images: dict[str, str] = {}
    for index, disk in enumerate(disks):
        key = f"protection.disk[{index}]"
        if not TARGET.fullmatch(disk.target):
            raise Invalid(
                f"{key}.target",
                f"{disk.target!r} cannot be a disk's target",
                "a target is a letter followed by letters a-z, digits, _ or -, 31 at most: vda, sdb, data-1",
            )
        if disk.target in targets:
            raise Invalid(
                f"{key}.target",
                f"the disk {disk.target!r} is named twice (also as protection.disk[{targets[disk.target]}])",
                "give each disk its own target",
            )
        targets[disk.target] = index
        key = f"{key} ({disk.target})"
        _check_absolute(f"{key}.image", disk.image)
        image = os.path.realpath(disk.image)
        if image in images:
            raise Invalid(
                f"{key}.image",
                f"{disk.image} is already the image of disk {images[image]!r}",
                "two disks cannot share an image: each needs its own",
            )
        images[image] = disk.target
        _check_text(f"{key}.device", disk.device)
        if disk.device.startswith("-"):
            raise Invalid(
                f"{key}.device",
                f"{disk.device!r} is not a device driver",
                "leave out the option: virtio-blk-pci, scsi-hd",
            )


def check_name(key: str, name: str) -> None:
    """A VM's name is also a directory's name on this host and in the repository."""
    _check_text(key, name)
    if "/" in name or name[0] in ".-" or len(os.fsencode(name)) > NAME_BYTES_MAX:
        raise Invalid(
            key,
            f"{name!r} cannot be a VM's name",
            "a name holds no '/' and no control characters, begins with neither '.' nor '-', "
            f"and has at most {NAME_BYTES_MAX} bytes",
        )


def normal_uuid(key: str, text: str) -> str:
    """The UUID in its usual form: lower case, with dashes. Raises Invalid."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise Invalid(key, f"{text!r} is not a UUID", "uuidgen prints one; leave the key out to have one made") from None


def parse_size(key: str, text: str) -> int:
    """``"8GiB"`` as bytes. Raises Invalid."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise Invalid(key, f"{text!r} is not a size", 'a size is a whole number and a unit: "512MiB", "8GiB", "1TiB"')
    return int(match[1]) * SIZE_UNITS[match[2]]


def format_size(size_bytes: int) -> str:
    """Bytes in the largest unit that is exact, as ``parse_size`` reads them."""
    units = [unit for unit, factor in SIZE_UNITS.items() if size_bytes % factor == 0]
    return f"{size_bytes // SIZE_UNITS[units[-1]]}{units[-1]}"


def parse_duration(key: str, text: str) -> int:
    """``"24h"`` as seconds. Raises Invalid."""
    match = DURATION.fullmatch(text.strip())
    if match is None:
        raise Invalid(key, f"{text!r} is not a length of time", 'it is a whole number and a unit: "30m", "24h", "7d"')
    return int(match[1]) * DURATION_UNITS[match[2]]


def format_duration(seconds: int) -> str:
    """Seconds in the largest unit that is exact, as ``parse_duration`` reads them."""
    unit = next(unit for unit, factor in reversed(DURATION_UNITS.items()) if seconds % factor == 0)
    return f"{seconds // DURATION_UNITS[unit]}{unit}"


def check_bandwidth_limit(key: str, limit: int | None) -> None:
    """Bounds of a limit in bytes a second."""
    if limit is not None and not BANDWIDTH_LIMIT_MIN <= limit <= BANDWIDTH_LIMIT_MAX:
        raise Invalid(key, f"{limit} bytes a second is not a possible limit", "at least 64KiB; leave the key out for none")


def check_local_history(key: str, seconds: int | None) -> None:
    """Bounds of how long shipped history stays."""
    if seconds is not None and not 0 <= seconds <= LOCAL_HISTORY_SECONDS_MAX:
        hint = "0s to ten years; leave the key out for as long as the journal's size allows"
        raise Invalid(key, f"{seconds} seconds is not possible", hint)


def check_journal_size(key: str, size_bytes: int) -> None:
    """Bounds of a journal's size."""
    if not JOURNAL_SIZE_MIN <= size_bytes <= JOURNAL_SIZE_MAX:
        raise Invalid(key, f"{size_bytes} bytes is not a possible size of a journal", "at least 1 MiB; the default is 8GiB")


def check_repository(key: str, text: str) -> None:
    """A directory (an absolute path or ``file:///path``), or a bucket in an object store."""
    if holds_credentials(text):
        raise Invalid(key, f"{redacted(text)!r} holds credentials, which anybody could read there", CREDENTIALS_HINT)
    _check_text(key, text)
    scheme, colon, rest = text.partition(":")
    if text.startswith("/") or (scheme == "file" and rest.startswith("///")):
        return
    if is_object_store(text):
        try:
            parse_address(text)
        except RepositoryError as error:
            raise Invalid(key, str(error), error.hint) from None
        return
    places = "give a directory (an absolute path or file:///path), or s3://BUCKET/PREFIX, gs://…, az://…"
    if colon and rest.startswith("//"):
        raise Invalid(key, f"{scheme}:// is no place for a repository that vmrewind knows", places)
    raise Invalid(key, f"{text!r} is not an absolute path", places)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint naming the known word that is nearest to ``word``, else all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(words)}"


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """One of a few words. Raises Invalid."""
    if value not in choices:
        raise Invalid(key, f"{value!r} is none of {', '.join(map(repr, choices))}", nearest(value, choices))


def config_error(where: str, error: Invalid) -> ConfigError:
    """The error that a user sees: ``where`` names the file or the domain."""
    return ConfigError(f"{where}: {error.key}: {error}", error.hint)


def _check_absolute(key: str, text: str) -> None:
    _check_text(key, text)
    if not text.startswith("/"):
        raise Invalid(key, f"{text!r} is not an absolute path", "write the whole path, beginning with /")


def _check_text(key: str, text: str) -> None:
    if not text:
        raise Invalid(key, "the value is empty", "give a value or leave the key out")
    if any(ord(character) < 32 or ord(character) == 127 or 0xD800 <= ord(character) < 0xE000 for character in text):
        raise Invalid(key, f"{text!r} holds control characters", "remove them")
