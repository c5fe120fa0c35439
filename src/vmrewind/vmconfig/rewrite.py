"""Putting a libvirt domain's disks behind vmrewind, and taking them back: XML in, XML out.

Only the metadata element and the protected ``<disk>`` elements change. Each original ``<disk>`` is kept as escaped text
in the metadata, so that taking it back leaves the very XML that libvirt had before. What was edited on a protected disk
meanwhile (boot order, address, cache mode) is kept: just what protection replaced is put back.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from lxml import etree

from vmrewind.vmconfig.chain import Backing, backing_chain
from vmrewind.vmconfig.domain import read_protection
from vmrewind.vmconfig.model import DiskConfig, Invalid, Protection, config_error, format_duration, format_size, validate_protection
from vmrewind.vmconfig.xml import (
    DISK,
    NAMESPACE,
    ORIGINAL,
    PREFIX,
    PROTECTION,
    attributes,
    disk_elements,
    nbd_export,
    parse_xml,
    protection_elements,
)

RECONNECT_SECONDS: Final = 60
SOCKET_PATH_BYTES_MAX: Final = 107
"""``sun_path`` of a unix socket's address holds 108 bytes with the final zero."""
REPLACED: Final = ("source", "backingStore")
"""Children of ``<disk>`` that protection replaces; ``driver`` is treated by attribute."""
DRIVER_REPLACED: Final = ("io", "error_policy", "rerror_policy")
SOURCE_REFUSED: Final = {
    "encryption": "an image that libvirt decrypts cannot be read through another process",
    "slices": "only whole images can be protected, not a slice of one",
    "reservations": "persistent reservations need the device itself",
}
DISK_REFUSED: Final = {
    "readonly": "a read-only disk is never written: it needs no protection",
    "shareable": "another VM may write a shareable disk, past the capture",
    "transient": "a transient disk's writes are thrown away when the VM stops",
    "encryption": "an image that libvirt decrypts cannot be read through another process",
    "mirror": "a block job is copying the disk: finish it first (virsh blockjob)",
}


@dataclass(frozen=True, slots=True)
class Rewritten:
    """New domain XML, the protection that it declares, and the targets that this added or took away."""

    xml: bytes
    protection: Protection
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def protect_domain(
    xml: bytes,
    targets: Sequence[str],
    *,
    socket: str,
    reconnect: bool,
    changes: Mapping[str, object],
    chain_of: Callable[[str], list[Backing]] = backing_chain,
) -> Rewritten:
    """Put the disks ``targets`` of an inactive domain behind the NBD server at ``socket``.

    ``reconnect``: whether this libvirt knows ``<reconnect>`` (9.2.0 on). ``changes`` are fields of Protection to set
    (``repository``, ``ship``, ``journal`` …); all others keep their value. Disks that are protected already
    stay so and are written anew, so repeating the call is harmless and picks up a new socket or a newer libvirt.
    Raises ConfigError, ImageError.
    """
    domain = parse_xml(xml)
    where = f"domain {domain.findtext('name')!r}"
    try:
        if len(os.fsencode(socket)) > SOCKET_PATH_BYTES_MAX:
            what = f"{socket} is longer than the {SOCKET_PATH_BYTES_MAX} bytes that a socket's path may have"
            raise Invalid("socket", what, "set VMREWIND_RUNTIME_DIR to a shorter path, or give the VM a shorter name")
        originals = _protected(domain)
        present = disk_elements(domain)
        for target, original in originals.items():
            if target in present:
                _replace(present[target], _unprotected_disk(present[target], original))
        added = tuple(target for target in dict.fromkeys(targets) if target not in originals)
        present = disk_elements(domain)
        disks: list[DiskConfig] = []
        for target in [*originals, *added]:
            if target not in present:
                known = ", ".join(sorted(present)) or "none"
                raise Invalid(f"disk {target}", f"the domain has no such disk (it has: {known})", "virsh domblklist shows them")
            disks.append(_check_disk(target, present[target]))
        current = read_protection(domain) if protection_elements(domain) else Protection(enabled=True)
        protection = msgspec.structs.replace(current, **{**changes, "enabled": True, "disk": disks})
        if protection.repository is None:
            raise Invalid("repository", "none is given", "say where history is to be kept: --repository URL")
        validate_protection(protection)
        kept = [_text(present[target]) for target in [*originals, *added]]
        for disk in disks:
            element = present[disk.target]
            chain = chain_of(disk.image) if disk.format == "qcow2" and element.find("backingStore") is None else []
            _replace(element, _protected_disk(element, disk, socket, reconnect, chain))
        _write_element(domain, protection, kept)
    except Invalid as error:
        raise config_error(where, error) from None
    return Rewritten(etree.tostring(domain), protection, added)


def unprotect_domain(xml: bytes) -> Rewritten:
    """Give every protected disk its own source back and remove the protection element.

    ``added`` is empty, ``removed`` names the disks that were put back: a disk that is gone, or was given another source by
    hand, is left as it is. Raises ConfigError.
    """
    domain = parse_xml(xml)
    where = f"domain {domain.findtext('name')!r}"
    try:
        originals = _protected(domain)
    except Invalid as error:
        raise config_error(where, error) from None
    present = disk_elements(domain)
    restored = [target for target in originals if target in present and nbd_export(present[target]) is not None]
    for target in restored:
        _replace(present[target], _unprotected_disk(present[target], originals[target]))
    for element in protection_elements(domain):
        _remove(element)
    metadata = domain.find("metadata")
    if originals and metadata is not None and len(metadata) == 0:
        _remove(metadata)
    return Rewritten(etree.tostring(domain), Protection(enabled=False), removed=tuple(restored))


def _protected(domain: etree._Element) -> dict[str, etree._Element]:
    """The original ``<disk>`` elements by target, empty if the domain has no protection element. Raises Invalid."""
    elements = protection_elements(domain)
    if not elements:
        return {}
    read_protection(domain)  # refuses an element that this version does not understand
    originals: dict[str, etree._Element] = {}
    for disk in elements[0].iterfind(DISK):
        target = disk.get("target", "")
        text = disk.findtext(ORIGINAL)
        key = f"protection/disk[@target={target!r}]"
        hint = "virsh edit: give the disk its source back by hand and remove the protection element"
        if text is None:
            raise Invalid(key, "the disk's original definition is not kept here", hint)
        try:
            original = etree.fromstring(text, etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False))
        except (etree.XMLSyntaxError, ValueError) as error:
            raise Invalid(key, f"the disk's original definition is damaged: {error}", hint) from None
        if original.tag != "disk" or original.find("source") is None:
            raise Invalid(key, "the disk's original definition is no disk with a source", hint)
        originals[target] = original
    return originals


def _check_disk(target: str, disk: etree._Element) -> DiskConfig:
    """What the disk is, if it can be protected. Raises Invalid with the reason why not."""
    key = f"disk {target}"
    kind, device = disk.get("type"), disk.get("device", "disk")
    if device != "disk":
        raise Invalid(key, f"it is a {device}, and only disks can be protected", "leave it out")
    for name, reason in DISK_REFUSED.items():
        if disk.find(name) is not None:
            raise Invalid(key, f"it is marked <{name}/>: {reason}", f"leave the disk out, or remove <{name}/>")
    source = disk.find("source")
    if kind not in ("file", "block") or source is None:
        hint = "leave the disk out"
        if kind == "volume":
            hint = "virsh vol-path shows the volume's path: make it a disk of type file or block"
        raise Invalid(key, f"its type is {kind!r}, and only local files and block devices can be protected", hint)
    for name, reason in SOURCE_REFUSED.items():
        if source.find(name) is not None:
            raise Invalid(key, f"its source has <{name}>: {reason}", "leave the disk out")
    image = source.get("file" if kind == "file" else "dev")
    if not image:
        raise Invalid(key, "its source names no image", "leave the disk out")
    driver = disk.find("driver")
    image_format = "raw" if driver is None else driver.get("type", "raw")
    if image_format not in ("raw", "qcow2"):
        what = f"its format is {image_format!r}, and only raw and qcow2 can be protected"
        raise Invalid(key, what, "convert it: qemu-img convert")
    return DiskConfig(target, image, "qcow2" if image_format == "qcow2" else "raw")


def _protected_disk(disk: etree._Element, config: DiskConfig, socket: str, reconnect: bool, chain: list[Backing]) -> etree._Element:
    new = copy.deepcopy(disk)
    new.set("type", "network")
    driver = new.find("driver")
    if driver is None:
        driver = etree.Element("driver", name="qemu")
        new.insert(0, driver)
    driver.set("type", config.format)
    if "io" in driver.attrib:
        del driver.attrib["io"]  # libvirt accepts it on a network disk and does not pass it on
    # Without reconnect, or when capture stays away for longer, a broken connection becomes an I/O error: that pauses the VM,
    # which goes on when capture is back, rather than reaching its guest.
    driver.set("error_policy", "stop")
    driver.set("rerror_policy", "stop")
    source = etree.Element("source", protocol="nbd", name=config.target)
    etree.SubElement(source, "host", transport="unix", socket=socket)
    if reconnect:
        etree.SubElement(source, "reconnect", delay=str(RECONNECT_SECONDS))
    old = new.find("source")
    assert old is not None
    _replace(old, source)
    if config.format == "qcow2" and new.find("backingStore") is None:
        source.addnext(_backing_store(chain))
    return new


def _backing_store(chain: list[Backing]) -> etree._Element:
    """The chain spelled out, with the empty element that ends it."""
    if not chain:
        return etree.Element("backingStore")
    image = chain[0]
    element = etree.Element("backingStore", type=image.kind)
    etree.SubElement(element, "format", type=image.format)
    etree.SubElement(element, "source", {"file" if image.kind == "file" else "dev": image.path})
    element.append(_backing_store(chain[1:]))
    return element


def _unprotected_disk(disk: etree._Element, original: etree._Element) -> etree._Element:
    """``disk`` with what protection replaced put back; everything else as it is now."""
    new = copy.deepcopy(disk)
    new.set("type", original.get("type", "file"))
    driver, old = new.find("driver"), original.find("driver")
    if driver is not None:
        before, now = {} if old is None else attributes(old), attributes(driver)
        driver.attrib.clear()
        for name in [*before, *(name for name in now if name not in before)]:
            value = before.get(name) if name in DRIVER_REPLACED else now.get(name)
            if value is not None:
                driver.set(name, value)
        if old is None and set(driver.attrib) <= {"name", "type"} and len(driver) == 0:
            _remove(driver)
    for name in REPLACED:
        for child in new.findall(name):
            _remove(child)
    position = 0 if new.find("driver") is None else 1
    for name in reversed(REPLACED):
        if (kept := original.find(name)) is not None:
            new.insert(position, copy.deepcopy(kept))
    return new


def _write_element(domain: etree._Element, protection: Protection, originals: list[str]) -> None:
    """Put the protection element into ``<metadata>``, in place of the one that may be there."""
    for old in protection_elements(domain):
        _remove(old)
    metadata = domain.find("metadata")
    if metadata is None:
        metadata = etree.SubElement(domain, "metadata")
    element = etree.SubElement(metadata, PROTECTION, nsmap={PREFIX: NAMESPACE})
    default = Protection(enabled=True)
    element.set("enabled", "yes")
    element.set("repository", protection.repository or "")
    element.set("ship", protection.ship)
    if protection.journal is not None:
        element.set("journal", protection.journal)
    if protection.journal_size != default.journal_size:
        element.set("journal-size", format_size(protection.journal_size))
    if protection.bandwidth_limit is not None:
        element.set("bandwidth-limit", format_size(protection.bandwidth_limit))
    if protection.local_history is not None:
        element.set("local-history", format_duration(protection.local_history))
    for attribute in ("on-journal-full", "on-failure", "shutdown-timeout-seconds"):
        field = attribute.replace("-", "_")
        if (value := getattr(protection, field)) != getattr(default, field):
            element.set(attribute, str(value))
    for disk, original in zip(protection.disk, originals, strict=True):
        child = etree.SubElement(element, DISK, target=disk.target, image=disk.image)
        if disk.format != "raw":
            child.set("format", disk.format)
        etree.SubElement(child, ORIGINAL).text = original


def _text(element: etree._Element) -> str:
    return etree.tostring(element, encoding="unicode", with_tail=False)


def _replace(old: etree._Element, new: etree._Element) -> None:
    parent = old.getparent()
    assert parent is not None
    new.tail = old.tail
    parent.replace(old, new)


def _remove(element: etree._Element) -> None:
    parent = element.getparent()
    assert parent is not None
    parent.remove(element)
