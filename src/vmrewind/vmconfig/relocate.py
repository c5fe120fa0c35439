"""A VM's configuration carried to another host: where images, history and journal are is changed, all else is as it was.

What else it names on the old host (other disks, firmware, kernels) is not carried; ``absent_files`` tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import tomlkit
from lxml import etree
from tomlkit.exceptions import TOMLKitError

from vmrewind.errors import ConfigError
from vmrewind.vmconfig.domain import read_protection
from vmrewind.vmconfig.model import Invalid, VmConfig, config_error
from vmrewind.vmconfig.rewrite import protect_domain
from vmrewind.vmconfig.xml import DISK, ORIGINAL, disk_elements, nbd_export, parse_xml, protection_elements

_PATHS_IN_TEXT: Final = ("loader", "nvram", "kernel", "initrd", "dtb", "emulator")
_PATHS_IN_SOURCE: Final = ("file", "dev", "dir")


def journal_in(document: bytes, suffix: str) -> Path | None:
    """The journal's directory as a configuration names it, if it does so by a whole path. Raises ConfigError."""
    if suffix == "xml":
        domain = parse_xml(document)
        try:
            given = read_protection(domain).journal if protection_elements(domain) else None
        except Invalid as error:
            raise config_error(f"domain {domain.findtext('name')!r}", error) from None
    else:
        given = _table(_toml(document), "protection").get("journal")
    return Path(given) if isinstance(given, str) and given.startswith("/") else None


def relocate_toml(document: bytes, images: Mapping[str, Path], repository: str, uuid: str, journal: Path | None) -> bytes:
    """A TOML file's text with other images (by target), repository and journal; None is the state directory. Raises ConfigError."""
    content = _toml(document)
    protection = _table(content, "protection")
    content["uuid"] = uuid
    protection["repository"] = repository
    if journal is not None:
        protection["journal"] = str(journal)
    else:
        protection.pop("journal", None)
    for disk in protection.get("disk", []):
        target = disk.get("target")
        if target not in images:
            raise _other_disks("the stored configuration", str(target), images)
        disk["image"] = str(images[target])
    return tomlkit.dumps(content).encode()


def relocate_domain(
    document: bytes, images: Mapping[str, Path], repository: str, journal: Path | None, socket: str, *, reconnect: bool | None
) -> bytes:
    """A protected domain's XML with other images (by target), repository, journal and socket. Raises ConfigError.

    ``reconnect``: whether this host's libvirt knows ``<reconnect>``; None: as the domain had it.
    """
    domain = parse_xml(document)
    domain.attrib.pop("id", "")
    where = f"domain {domain.findtext('name')!r}"
    if not protection_elements(domain):
        raise ConfigError(f"{where}: the stored configuration is of a domain that is not protected", "vmrewind restore its disks")
    for disk in protection_elements(domain)[0].iterfind(DISK):
        target, original = disk.get("target", ""), disk.find(ORIGINAL)
        if target not in images:
            raise _other_disks(where, target, images)
        if original is not None:
            original.text = _on_file(original.text or "", images[target], where, target)
    had = any(element.find("source/reconnect") is not None for element in disk_elements(domain).values())
    return protect_domain(
        etree.tostring(domain),
        [],
        socket=socket,
        reconnect=had if reconnect is None else reconnect,
        changes={"repository": repository, "journal": str(journal) if journal is not None else None},
        chain_of=lambda _: [],
    ).xml


def _on_file(text: str, image: Path, where: str, target: str) -> str:
    """The disk's own definition, which unprotect puts back, on another image."""
    try:
        disk = etree.fromstring(text, etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False))
    except (etree.XMLSyntaxError, ValueError) as error:
        raise ConfigError(
            f"{where}: disk {target}: its original definition is damaged: {error}", "restore the disks alone"
        ) from None
    source = disk.find("source")
    if source is not None:
        for name in ("file", "dev", "index"):
            source.attrib.pop(name, "")
        source.set("file", str(image))
    disk.set("type", "file")
    return etree.tostring(disk, encoding="unicode")


_FILE_OPTIONS: Final = ("-kernel", "-initrd", "-bios", "-cdrom", "-dtb", "-pflash", "file", "filename")
"""Options of QEMU, and keys in their values, behind which a file is named."""


def absent_files(config: VmConfig) -> list[str]:
    """Files that a configuration names beside the protected disks, and that are not on this host; relative ones, not here."""
    if config.qemu is not None:
        named = _named_by_command(config)
    else:
        named = _named_by_domain(config.document.encode()) if config.origin == "libvirt" else iter(())
    return sorted({path for path in named if not Path(path).exists()})


def _named_by_command(config: VmConfig) -> Iterator[str]:
    assert config.qemu is not None, "asked for a direct VM"
    previous = ""
    for word in config.qemu.command:
        key = previous if previous in _FILE_OPTIONS else ""
        for piece in re.split(r"[,=]", word):
            # What QEMU makes itself is not missed.
            named = piece.startswith("/") or (key in _FILE_OPTIONS and piece and ":" not in piece)
            if named and "unix:" not in word and previous not in ("-pidfile", "-D"):
                yield piece
            key = piece
        previous = word


def _named_by_domain(xml: bytes) -> Iterator[str]:
    domain = parse_xml(xml)
    for name in _PATHS_IN_TEXT:
        for element in domain.iter(name):
            if (text := (element.text or "").strip()).startswith("/"):
                yield text
    for disk in disk_elements(domain).values():
        source = disk.find("source")
        if source is not None and nbd_export(disk) is None:
            yield from (source.get(name, "") for name in _PATHS_IN_SOURCE if source.get(name, "").startswith("/"))


def _toml(document: bytes) -> Any:
    try:
        return tomlkit.parse(document.decode())
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise ConfigError(f"the stored configuration is not valid TOML: {error}", "vmrewind restore its disks") from None


def _table(content: Any, name: str) -> Any:
    table = content.get(name)
    if not isinstance(table, dict):
        raise ConfigError(f"the stored configuration has no [{name}]", "vmrewind restore its disks")
    return table


def _other_disks(where: str, target: str, images: Mapping[str, Path]) -> ConfigError:
    return ConfigError(
        f"{where}: names disk {target}, and the moment has {', '.join(images)}",
        "choose another moment, or `vmrewind restore` the disks and write the configuration by hand",
    )
