"""A VM's configuration from its libvirt domain XML: the protection element in ``<metadata>``.

Strict inside our namespace, indifferent to everything else. The element and the domain's disks must agree: a disk that
the element names but that does not go through vmrewind would be a VM that is believed to be protected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, get_args

from lxml import etree

from vmrewind.errors import ConfigError
from vmrewind.paths import VmPaths
from vmrewind.vmconfig.model import (
    JOURNAL_SIZE_DEFAULT,
    DiskConfig,
    FailurePolicy,
    ImageFormat,
    Invalid,
    JournalFullPolicy,
    Protection,
    ShipMode,
    VmConfig,
    check_choice,
    check_name,
    config_error,
    nearest,
    normal_uuid,
    parse_duration,
    parse_size,
    validate,
)
from vmrewind.vmconfig.toml import Storage, peek_duration, peek_size
from vmrewind.vmconfig.xml import (
    DISK,
    GOOD_XML,
    NAMESPACE,
    ORIGINAL,
    PROTECTION,
    attributes,
    disk_elements,
    local_name,
    nbd_export,
    parse_xml,
    protection_elements,
)

PROTECTION_ATTRIBUTES: Final = frozenset(
    {
        "enabled",
        "repository",
        "ship",
        "journal",
        "journal-size",
        "bandwidth-limit",
        "local-history",
        "on-journal-full",
        "on-failure",
        "shutdown-timeout-seconds",
    }
)
DISK_ATTRIBUTES: Final = frozenset({"target", "image", "format"})
_CHOICES: Final = {
    "ship": get_args(ShipMode),
    "on-journal-full": get_args(JournalFullPolicy),
    "on-failure": get_args(FailurePolicy),
}
PROTECT_AGAIN: Final = "vmrewind unprotect, then vmrewind protect, with the VM shut off, writes it anew"


def parse_domain(xml: bytes) -> VmConfig | None:
    """The configuration of a domain, None if it is not protected. Raises ConfigError."""
    domain = parse_xml(xml)
    if not protection_elements(domain):
        return None
    name = (domain.findtext("name") or "").strip()
    where = f"domain {name!r}"
    try:
        check_name("name", name)
        protection = read_protection(domain)
        if not protection.enabled:
            _check_disabled(domain, name)
            return None
        uuid = domain.findtext("uuid")
        config = VmConfig(
            name=name,
            uuid=normal_uuid("uuid", uuid.strip()) if uuid else None,
            qemu=None,
            protection=protection,
            origin="libvirt",
            source=name,
            document=xml.decode(),
        )
        validate(config)
        _check_sources(domain, config)
    except Invalid as error:
        raise config_error(where, error) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: byte {error.start} of the XML is not UTF-8", GOOD_XML) from None
    return config


def peek_storage(xml: bytes) -> Storage | None:
    """The VM's name and storage space, as far as the XML tells; None if it tells of no protected VM. Never raises."""
    try:
        domain = parse_xml(xml)
        name = (domain.findtext("name") or "").strip()
        check_name("name", name)
    except (ConfigError, Invalid):
        return None
    elements = protection_elements(domain)
    if not elements or elements[0].get("enabled") == "no":
        return None
    journal = elements[0].get("journal", "")
    place = Path(journal) if journal.startswith("/") else None
    local_history = peek_duration(elements[0].get("local-history"))
    try:
        size = _size("journal-size", elements[0].get("journal-size", ""))
    except Invalid:
        return Storage(name, place, JOURNAL_SIZE_DEFAULT, local_history)
    return Storage(name, place, peek_size(size), local_history)


def _full_policy(word: str | None) -> JournalFullPolicy:
    return next((policy for policy in get_args(JournalFullPolicy) if policy == word), "drop-history")


def read_protection(domain: etree._Element) -> Protection:
    """The protection element as the model has it. Raises Invalid; the caller has seen that there is one."""
    elements = protection_elements(domain)
    if len(elements) > 1 or elements[0].tag != PROTECTION:
        what = f"<metadata> may hold one <protection> of {NAMESPACE} and nothing else of that namespace"
        raise Invalid(f"metadata/{local_name(elements[-1])}", what, PROTECT_AGAIN)
    element = elements[0]
    _check_attributes(element, "protection", PROTECTION_ATTRIBUTES)
    given = attributes(element)
    enabled = given.get("enabled")
    if enabled is None:
        raise Invalid("protection/@enabled", "this attribute is missing", 'write enabled="yes" or enabled="no"')
    check_choice("protection/@enabled", enabled, ("yes", "no"))
    for attribute, choices in _CHOICES.items():
        if (value := given.get(attribute)) is not None:
            check_choice(f"protection/@{attribute}", value, choices)
    size, limit, local_history = given.get("journal-size"), given.get("bandwidth-limit"), given.get("local-history")
    timeout = given.get("shutdown-timeout-seconds", "60")
    if not (timeout.isascii() and timeout.isdigit() and len(timeout) < 10):
        raise Invalid("protection/@shutdown-timeout-seconds", f"{timeout!r} is not a whole number", 'the default is "60"')
    return Protection(
        enabled=enabled == "yes",
        disk=_disks(element),
        repository=given.get("repository"),
        ship="on-demand" if given.get("ship") == "on-demand" else "auto",
        journal=given.get("journal"),
        journal_size=JOURNAL_SIZE_DEFAULT if size is None else _size("journal-size", size),
        bandwidth_limit=None if limit is None else _size("bandwidth-limit", limit),
        local_history=None if local_history is None else parse_duration("protection/@local-history", local_history),
        on_journal_full=_full_policy(given.get("on-journal-full")),
        on_failure="start-unprotected" if given.get("on-failure") == "start-unprotected" else "abort",
        shutdown_timeout_seconds=int(timeout),
    )


def _size(attribute: str, text: str) -> int:
    """With or without a unit: a bare number is bytes, as in TOML."""
    if text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    return parse_size(f"protection/@{attribute}", text)


def _disks(element: etree._Element) -> list[DiskConfig]:
    disks: list[DiskConfig] = []
    for child in element.iterchildren("*"):
        if child.tag != DISK:
            name = local_name(child)
            raise Invalid(f"protection/{name}", "this element is not known", nearest(name, ["disk"]))
        key = f"protection/disk[{len(disks) + 1}]"
        _check_attributes(child, key, DISK_ATTRIBUTES)
        for inner in child.iterchildren("*"):
            if inner.tag != ORIGINAL:
                raise Invalid(f"{key}/{local_name(inner)}", "this element is not known", PROTECT_AGAIN)
        given = attributes(child)
        for required in ("target", "image"):
            if required not in given:
                raise Invalid(f"{key}/@{required}", "this attribute is missing", PROTECT_AGAIN)
        check_choice(f"{key}/@format", given.get("format", "raw"), get_args(ImageFormat))
        disks.append(DiskConfig(given["target"], given["image"], "qcow2" if given.get("format") == "qcow2" else "raw"))
    return disks


def _check_attributes(element: etree._Element, key: str, known: frozenset[str]) -> None:
    for name in attributes(element):
        if name not in known:
            raise Invalid(f"{key}/@{name}", "this attribute is not known", nearest(name, known))


def _check_sources(domain: etree._Element, config: VmConfig) -> None:
    """Every protected disk is there, goes through this VM's socket, and has the format that the element says."""
    disks = disk_elements(domain)
    socket = str(VmPaths(config.name).nbd_socket)
    for disk in config.protection.disk:
        key = f"disk {disk.target}"
        element = disks.get(disk.target)
        if element is None:
            known = ", ".join(sorted(disks)) or "none"
            what = f"the domain has no such disk (it has: {known}), but its protection element names it"
            raise Invalid(key, what, PROTECT_AGAIN)
        export = nbd_export(element)
        if export is None:
            what = "the protection element names this disk, but its source is not vmrewind's socket"
            raise Invalid(key, what, PROTECT_AGAIN)
        if export != (disk.target, socket):
            raise Invalid(
                key,
                f"its source is the export {export[0]!r} at {export[1]}, not {disk.target!r} at {socket}",
                f"a renamed or cloned domain keeps the old source: {PROTECT_AGAIN}",
            )
        driver = element.find("driver")
        found = "raw" if driver is None else driver.get("type") or "raw"
        if found != disk.format:
            what = f"the domain says format {found!r}, the protection element {disk.format!r}"
            raise Invalid(key, what, PROTECT_AGAIN)


def _check_disabled(domain: etree._Element, name: str) -> None:
    """Protection that was switched off by hand leaves disks behind that nobody serves."""
    socket = str(VmPaths(name).nbd_socket)
    for target, element in disk_elements(domain).items():
        export = nbd_export(element)
        if export is not None and export[1] == socket:
            raise Invalid(
                f"disk {target}",
                'protection is switched off (enabled="no"), but the disk still goes through vmrewind',
                "vmrewind unprotect restores the disk's own source",
            )
