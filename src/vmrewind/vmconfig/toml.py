"""A VM's configuration from a TOML file: direct mode, and any command that is given a file instead of a VM's name.

Strict: every key is known, every error is a ConfigError that names file, key and remedy. Relative paths are relative to
the file. ``peek_storage`` is the tolerant early look that capture's storage space is allotted by, ahead of that.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from vmrewind.errors import ConfigError
from vmrewind.vmconfig.model import (
    JOURNAL_SIZE_DEFAULT,
    DiskConfig,
    FailurePolicy,
    ImageFormat,
    Invalid,
    JournalFullPolicy,
    Protection,
    QemuConfig,
    ShipMode,
    VmConfig,
    check_choice,
    check_journal_size,
    check_local_history,
    check_name,
    config_error,
    nearest,
    normal_uuid,
    parse_duration,
    parse_size,
    validate,
)

DOCUMENT_BYTES_MAX: Final = 1 << 20
"""A VM's configuration has a few hundred bytes; what is a thousand times that is some other file."""


class _Document(msgspec.Struct, frozen=True):
    """The file's top level."""

    name: str
    uuid: str | None = None
    qemu: QemuConfig | None = None
    protection: Protection = Protection(enabled=False)


_TABLES: Final[dict[str, type[msgspec.Struct]]] = {
    "": _Document,
    "qemu": QemuConfig,
    "protection": Protection,
    "protection.disk": DiskConfig,
}
_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "protection.ship": get_args(ShipMode),
    "protection.on_journal_full": get_args(JournalFullPolicy),
    "protection.on_failure": get_args(FailurePolicy),
}


@dataclass(frozen=True, slots=True)
class Storage:
    """What an early look tells of a VM's journal: ``journal`` None means the state directory, the size is in bytes.

    ``local_history`` as in ``model.Protection``.
    """

    name: str
    journal: Path | None
    journal_size: int
    local_history: int | None = None


def load_toml(path: Path | str) -> VmConfig:
    """Read and validate a VM's TOML file. Raises ConfigError."""
    path = Path.cwd() / path
    text = _read(path)
    try:
        raw = _parse(path, text)
        return _build(path, text, raw)
    except Invalid as error:
        raise config_error(str(path), error) from None


def peek_storage(path: Path | str) -> Storage | None:
    """The VM's name and storage space, as far as the file tells; None if it tells no name or wants no protection. Never raises."""
    path = Path.cwd() / path
    try:
        raw = _parse(path, _read(path))
        name = raw["name"]
        check_name("name", name)
    except (ConfigError, Invalid, KeyError, TypeError, AttributeError):
        return None
    protection: object = raw.get("protection")
    if not isinstance(protection, dict) or protection.get("enabled") is not True:
        return None
    journal = protection.get("journal")
    if not isinstance(journal, str) or not journal or "\0" in journal:
        journal = None
    place = None if journal is None else Path(_absolute(path, journal))
    return Storage(name, place, peek_size(protection.get("journal_size")), peek_duration(protection.get("local_history")))


def peek_size(value: object) -> int:
    """A journal size in any form that it is written in, bytes; the default if it is absent or unusable."""
    try:
        size = parse_size("", value) if isinstance(value, str) else value
        if type(size) is int:
            check_journal_size("", size)
            return size
    except Invalid:
        pass
    return JOURNAL_SIZE_DEFAULT


def peek_duration(value: object) -> int | None:
    """A length of time in any form that it is written in, seconds; None if it is absent or unusable."""
    try:
        seconds = parse_duration("", value) if isinstance(value, str) else value
        if type(seconds) is int:
            check_local_history("", seconds)
            return seconds
    except Invalid:
        pass
    return None


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(DOCUMENT_BYTES_MAX + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file", "give the path of the VM's TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", "give the path of the VM's TOML file") from error
    if len(data) > DOCUMENT_BYTES_MAX:
        raise ConfigError(f"{path}: larger than {DOCUMENT_BYTES_MAX} bytes", "this is not a VM's TOML file: give its path")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8", "give the path of the VM's TOML file, which is UTF-8"
        ) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply", "the file needs tables at most three deep") from None
    except ValueError as error:  # TOMLDecodeError, and int()'s refusal of thousands of digits
        raise ConfigError(f"{path}: not valid TOML: {error}", "correct the line that is named") from None


def _build(path: Path, text: str, raw: dict[str, Any]) -> VmConfig:
    _check_keys(raw, "", "")
    protection = raw.get("protection", {})
    _check_choices(protection)
    for name, parse in (("journal_size", parse_size), ("bandwidth_limit", parse_size), ("local_history", parse_duration)):
        if isinstance(text_value := protection.get(name), str):
            protection[name] = parse(f"protection.{name}", text_value)
    try:
        document = msgspec.convert(raw, _Document)
    except msgspec.ValidationError as error:
        raise _translated(error, raw) from None
    config = VmConfig(
        name=document.name,
        uuid=None if document.uuid is None else normal_uuid("uuid", document.uuid),
        qemu=document.qemu,
        protection=_with_absolute_paths(path, document.protection),
        origin="toml",
        source=str(path),
        document=text,
    )
    validate(config)
    return config


def _check_keys(value: Any, table: str, key: str) -> None:
    """Every table is a table and knows its keys. ``table`` names the schema, ``key`` the place."""
    if not isinstance(value, dict):
        raise Invalid(key, f"expected a table, got {_kind(value)}", f"write it as [{table}]")
    known = [field.name for field in msgspec.structs.fields(_TABLES[table])]
    prefix = f"{key}." if key else ""
    for name, inner in value.items():
        if name not in known:
            raise Invalid(f"{prefix}{name}", "this key is not known", nearest(name, known))
        schema = f"{table}.{name}" if table else name
        if schema == "protection.disk":
            if not isinstance(inner, list):
                raise Invalid(
                    schema,
                    f"expected a list of tables, got {_kind(inner)}",
                    "write each disk under its own [[protection.disk]]",
                )
            for index, disk in enumerate(inner):
                _check_keys(disk, schema, f"{schema}[{index}]")
        elif schema in _TABLES:
            _check_keys(inner, schema, schema)


def _check_choices(protection: dict[str, Any]) -> None:
    """Ahead of the conversion, whose message for a wrong word does not tell the right ones."""
    for schema, choices in _CHOICES.items():
        value = protection.get(schema.rpartition(".")[2])
        if isinstance(value, str):
            check_choice(schema, value, choices)
    for index, disk in enumerate(protection.get("disk", [])):
        if isinstance(disk.get("format"), str):
            check_choice(f"protection.disk[{index}].format", disk["format"], get_args(ImageFormat))


def _translated(error: msgspec.ValidationError, raw: dict[str, Any]) -> Invalid:
    """msgspec's message, ``Expected `str`, got `int` - at `$.protection.disk[0].image` ``, as key and remedy."""
    what, _, place = str(error).partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    if missing := re.search(r"missing required field `(\w+)`", what):
        return Invalid(f"{key}.{missing[1]}" if key else missing[1], "this key is missing", "add it")
    expected = re.search(r"Expected `([^`]+)`", what)
    words = {"str": "a text in quotes", "bool": "true or false", "int": "a whole number", "array": "a list"}
    wanted = words.get(expected[1].split(" | ")[0], expected[1]) if expected else what
    return Invalid(key, f"expected {wanted}, got {_kind(_value_at(raw, key))}", "correct the value")


def _value_at(raw: Any, key: str) -> Any:
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", key):
        raw = raw[name] if name else raw[int(index)]
    return raw


def _kind(value: Any) -> str:
    """A TOML value's kind in TOML's words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a table"}
    return kinds.get(type(value), "a date or time")


def _with_absolute_paths(path: Path, protection: Protection) -> Protection:
    replace = msgspec.structs.replace
    repository = protection.repository
    if repository and not re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|s3:|gs:|az:)", repository):
        repository = _absolute(path, repository)
    return replace(
        protection,
        disk=[replace(disk, image=_absolute(path, disk.image)) for disk in protection.disk],
        repository=repository,
        journal=_absolute(path, protection.journal) if protection.journal is not None else None,
    )


def _absolute(path: Path, text: str) -> str:
    """``text`` relative to the file's directory; an empty text stays empty, for the validation to name."""
    return os.path.normpath(path.parent / text) if text else text
