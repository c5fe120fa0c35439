"""Domain XML read safely, and the names of the protection element in it.

The XML comes from libvirt, but also from files and from guests' owners: no entities, no DTD, no network, bounded size.
"""

from __future__ import annotations

from typing import Final
from xml.parsers import expat

from lxml import etree

from vmrewind.errors import ConfigError

NAMESPACE: Final = "urn:vmrewind:protection:1"
PREFIX: Final = "cdp"
PROTECTION: Final = f"{{{NAMESPACE}}}protection"
DISK: Final = f"{{{NAMESPACE}}}disk"
ORIGINAL: Final = f"{{{NAMESPACE}}}original"
"""Holds the text of the ``<disk>`` element as it was before protection."""
XML_BYTES_MAX: Final = 16 << 20
"""libvirt refuses a domain's XML of more than 10 MB."""
GOOD_XML: Final = "virsh dumpxml DOMAIN prints a good one"


class _PrologEnd(Exception):
    """The root element has begun."""


def parse_xml(xml: bytes) -> etree._Element:
    """The ``<domain>`` element. Raises ConfigError: malformed (with line and column), a DTD, another root element."""
    if len(xml) > XML_BYTES_MAX:
        raise ConfigError(f"the domain XML has more than {XML_BYTES_MAX} bytes", GOOD_XML)
    _refuse_doctype(xml)
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False, load_dtd=False, strip_cdata=False)
    try:
        root = etree.fromstring(xml, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise ConfigError(f"the domain XML is malformed: {error}", GOOD_XML) from None
    if root.tag not in ("domain", "domstatus"):
        raise ConfigError(f"the XML is no domain: its root element is <{root.tag}>", GOOD_XML)
    domain = root if root.tag == "domain" else root.find("domain")
    if domain is None:
        raise ConfigError("the XML is no domain: <domstatus> holds no <domain>", GOOD_XML)
    return domain


def _refuse_doctype(xml: bytes) -> None:
    """A DTD can only stand before the root element, and expat tells of it before any entity in it is looked at."""

    def doctype(*_: object) -> None:
        raise ConfigError("the domain XML holds a document type declaration", "remove <!DOCTYPE …>: libvirt writes none")

    def element(*_: object) -> None:
        raise _PrologEnd

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = doctype
    parser.StartElementHandler = element
    try:
        parser.Parse(xml, True)
    except _PrologEnd:
        pass
    except expat.ExpatError as error:
        raise ConfigError(f"the domain XML is malformed: {error}", GOOD_XML) from None


def protection_elements(domain: etree._Element) -> list[etree._Element]:
    """Elements of our namespace in ``<metadata>``: libvirt keeps at most one, a hand-written file may hold more."""
    return domain.findall(f"metadata/{{{NAMESPACE}}}*")


def has_protection(xml: bytes) -> bool:
    """Whether a domain's metadata holds anything of ours, enabled or not. Raises ConfigError for malformed XML."""
    return bool(protection_elements(parse_xml(xml)))


def attributes(element: etree._Element) -> dict[str, str]:
    """An element's attributes, namespaced ones under their ``{namespace}name``."""
    return {str(name): str(value) for name, value in element.attrib.items()}


def local_name(element: etree._Element) -> str:
    """An element's name without its namespace."""
    return str(etree.QName(element).localname)


def disk_elements(domain: etree._Element) -> dict[str, etree._Element]:
    """The domain's ``<disk>`` elements by target."""
    found: dict[str, etree._Element] = {}
    for disk in domain.iterfind("devices/disk"):
        target = disk.find("target")
        if target is not None and (name := target.get("dev")):
            found[name] = disk
    return found


def nbd_export(disk: etree._Element) -> tuple[str, str] | None:
    """(export name, unix socket path) of a disk that is reached over NBD on a unix socket, else None."""
    source = disk.find("source")
    if disk.get("type") != "network" or source is None or source.get("protocol") != "nbd":
        return None
    host = source.find("host")
    if host is None or host.get("transport") != "unix":
        return None
    return source.get("name") or "", host.get("socket") or ""
