"""A domain's XML made into that of another one that can run beside it: other disks, name, uuid and MAC addresses.

What is on a short list is kept, and nothing else: no device, file or socket of the host is shared with the domain it is made from.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from lxml import etree

from vmrewind.errors import ConfigError
from vmrewind.vmconfig.domain import read_protection
from vmrewind.vmconfig.model import Invalid, config_error
from vmrewind.vmconfig.rewrite import protect_domain
from vmrewind.vmconfig.xml import disk_elements, local_name, parse_xml

_KEPT_DEVICES: Final = frozenset(
    {
        "audio",
        "channel",
        "console",
        "controller",
        "disk",
        "emulator",
        "graphics",
        "input",
        "interface",
        "iommu",
        "memballoon",
        "panic",
        "rng",
    }
    | {"serial", "sound", "video", "watchdog"}
)
_KEPT_ATTRIBUTES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "input": {"type": ("keyboard", "mouse", "tablet")},
    "channel": {"type": ("unix", "spicevmc")},
    "audio": {"type": ("none", "spice")},
}


def random_mac() -> str:
    """A MAC address of the range that QEMU and libvirt take theirs from."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def beside(
    document: bytes, name: str, uuid: str, formats: Mapping[str, str], socket: Path, network: str | None
) -> tuple[bytes, list[str]]:
    """(the XML of the other domain, what was left out). ``formats``: of the disks at ``socket``, by target. ``network``: the
    libvirt network that its interfaces are put on, None for none. Raises ConfigError."""
    domain = parse_xml(document)
    domain.attrib.pop("id", "")
    left_out: list[str] = []
    for element in domain.findall("*"):
        if str(element.tag).startswith("{"):
            left_out.append(f"<{local_name(element)}>")  # QEMU's own command line, and the like
        if str(element.tag).startswith("{") or element.tag in ("name", "uuid", "metadata", "genid"):
            domain.remove(element)
    for entry in domain.iterfind("sysinfo/system/entry[@name='uuid']"):
        entry.text = uuid
    for tag, text in (("uuid", uuid), ("name", name)):
        element = etree.Element(tag)
        element.text = text
        domain.insert(0, element)
    if (nvram := domain.find("os/nvram")) is not None:
        # The variables that the firmware writes are the other domain's; without a path libvirt makes new ones.
        left_out.append("the firmware's variables")
        nvram.text = None
        _drop(nvram, "source")
        for attribute in ("type", "format"):
            nvram.attrib.pop(attribute, "")
    devices = domain.find("devices")
    if devices is None or not formats.keys() <= disk_elements(domain).keys():
        raise ConfigError(f"domain {name!r}: its configuration has not the disks {', '.join(formats)}", "choose another moment")
    for device in devices.findall("*"):
        if (why := _refit(device, formats, socket, network)) is not None:
            left_out.append(why)
            devices.remove(device)
    return etree.tostring(domain), left_out


def on_images(xml: bytes, images: Mapping[str, Path], formats: Mapping[str, str]) -> bytes:
    """The XML of a domain with its disks, by target, on images of these formats instead of what ``beside`` gave them."""
    domain = parse_xml(xml)
    disks = disk_elements(domain)
    for target, image in images.items():
        disk = disks[target]
        disk.set("type", "file")
        if formats[target] == "raw":
            _drop(disk, "backingStore")
        for driver in disk.findall("driver"):
            driver.set("type", formats[target])
        for source in disk.findall("source"):
            disk.replace(source, etree.Element("source", file=str(image)))
    return etree.tostring(domain)


def protected_beside(
    document: bytes,
    xml: bytes,
    images: Mapping[str, Path],
    formats: Mapping[str, str],
    socket: Path,
    repository: str,
    *,
    reconnect: bool,
) -> bytes:
    """The XML of a domain that is protected as ``document``'s is, but with another journal. ``xml``: what ``beside`` made of that.

    ``images``: those of its disks, by target. Raises ConfigError, ImageError.
    """
    original = parse_xml(document)
    try:
        given = read_protection(original)
    except Invalid as error:
        raise config_error(f"domain {original.findtext('name')!r}", error) from None
    changes = {name: getattr(given, name) for name in given.__struct_fields__ if name not in ("enabled", "disk", "journal")}
    plain = on_images(xml, images, formats)
    return protect_domain(
        plain, list(images), socket=str(socket), reconnect=reconnect, changes=changes | {"repository": repository}
    ).xml


def _refit(device: etree._Element, formats: Mapping[str, str], socket: Path, network: str | None) -> str | None:
    """Change what a device shares with the host; what it is if it cannot stay."""
    kind = local_name(device)
    allowed = _KEPT_ATTRIBUTES.get(kind, {})
    if kind not in _KEPT_DEVICES or any(device.get(name) not in values for name, values in allowed.items()):
        return f"<{kind}>"
    if kind == "disk":
        return _refit_disk(device, formats, socket)
    if kind == "interface":
        return _refit_interface(device, network)
    if kind in ("serial", "console"):
        device.set("type", "pty")
        _drop(device, "source", "log", "protocol")
        device.attrib.pop("tty", "")
    elif kind == "channel":
        _drop(device, "source")
    elif kind == "graphics":
        _refit_graphics(device)
    elif kind == "rng" and device.find("backend[@model='random']") is None:
        return "<rng>"
    return None


def _refit_disk(disk: etree._Element, formats: Mapping[str, str], socket: Path) -> str | None:
    target = disk.find("target")
    name = target.get("dev", "") if target is not None else ""
    if name not in formats:
        if disk.get("device") == "cdrom":
            _drop(disk, "source", "backingStore")
            return None
        return f"disk {name}, which is not protected"
    disk.set("type", "network")
    _drop(disk, "source", "mirror", "auth", "encryption")
    driver = disk.find("driver")
    if driver is None:
        driver = etree.SubElement(disk, "driver", name="qemu")
    driver.set("type", formats[name])
    for attribute in ("io", "error_policy", "rerror_policy"):
        driver.attrib.pop(attribute, "")
    source = etree.Element("source", protocol="nbd", name=name)
    etree.SubElement(source, "host", transport="unix", socket=str(socket))
    driver.addnext(source)
    return None


def _refit_interface(interface: etree._Element, network: str | None) -> str | None:
    if network is None:
        return "<interface>"
    interface.set("type", "network")
    for child in list(interface):
        if child.tag not in ("model", "address", "boot", "mtu", "link", "alias", "rom"):
            interface.remove(child)
    etree.SubElement(interface, "source", network=network)
    etree.SubElement(interface, "mac", address=random_mac())
    return None


def _refit_graphics(graphics: etree._Element) -> None:
    """On a port of its own, for this host alone: the password is not in the stored XML."""
    for name in ("port", "tlsPort", "websocket", "socket", "passwd"):
        graphics.attrib.pop(name, "")
    graphics.set("autoport", "yes")
    graphics.set("listen", "127.0.0.1")
    _drop(graphics, "listen")


def _drop(element: etree._Element, *names: str) -> None:
    for name in names:
        for child in element.findall(name):
            element.remove(child)
