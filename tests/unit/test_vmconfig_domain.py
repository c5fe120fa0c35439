"""The protection element of a domain: what it means, and what each mistake in it is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmrewind.errors import ConfigError
from vmrewind.paths import VmPaths
from vmrewind.vmconfig.domain import parse_domain, peek_storage
from vmrewind.vmconfig.toml import Storage

ELEMENT = '<cdp:protection xmlns:cdp="urn:vmrewind:protection:1" enabled="yes" repository="/r">{disks}</cdp:protection>'
DISK = '<cdp:disk target="vda" image="/a.raw"/>'


def source(name: str = "vda", socket: str | None = None) -> str:
    socket = socket or str(VmPaths("web01").nbd_socket)
    return f"<source protocol='nbd' name='{name}'><host transport='unix' socket='{socket}'/></source>"


def domain(element: str = ELEMENT.format(disks=DISK), disk: str | None = None, name: str = "web01") -> bytes:
    disk = disk or f"<disk type='network'><driver type='raw'/>{source()}<target dev='vda'/></disk>"
    return f"""<domain type='qemu'><name>{name}</name><uuid>512d52e5-1e45-4bdc-b7f3-69e5efc43ae6</uuid>
<metadata><other xmlns="urn:other"/>{element}</metadata><devices>{disk}</devices></domain>""".encode()


def refused(xml: bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_domain(xml)
    assert caught.value.hint
    return caught.value


def test_a_protected_domain() -> None:
    config = parse_domain(domain())
    assert config is not None
    assert (config.name, config.source, config.origin) == ("web01", "web01", "libvirt")
    assert config.uuid == "512d52e5-1e45-4bdc-b7f3-69e5efc43ae6"
    assert config.qemu is None
    assert config.document.encode() == domain()
    assert [(disk.target, disk.image, disk.format) for disk in config.protection.disk] == [("vda", "/a.raw", "raw")]
    assert (config.protection.repository, config.protection.ship) == ("/r", "auto")


def test_every_attribute() -> None:
    element = ELEMENT.format(disks=DISK).replace(
        'enabled="yes"',
        'enabled="yes" ship="on-demand" journal="/j" journal-size="1GiB" on-journal-full="block" '
        'on-failure="start-unprotected" shutdown-timeout-seconds="7"',
    )
    config = parse_domain(domain(element))
    assert config is not None
    protection = config.protection
    assert (protection.ship, protection.journal, protection.journal_size) == ("on-demand", "/j", 1 << 30)
    assert (protection.on_journal_full, protection.on_failure) == ("block", "start-unprotected")
    assert protection.shutdown_timeout_seconds == 7
    assert peek_storage(domain(element)) == Storage("web01", Path("/j"), 1 << 30)


def test_a_qcow2_disk() -> None:
    disk = f"<disk type='network'><driver type='qcow2'/>{source()}<target dev='vda'/></disk>"
    element = ELEMENT.format(disks='<cdp:disk target="vda" image="/a" format="qcow2"/>')
    config = parse_domain(domain(element, disk))
    assert config is not None
    assert config.protection.disk[0].format == "qcow2"


def test_a_domain_without_the_element_or_switched_off_is_not_protected() -> None:
    plain = "<disk type='file'><source file='/a.raw'/><target dev='vda'/></disk>"
    assert parse_domain(domain("", plain)) is None
    assert peek_storage(domain("", plain)) is None
    off = ELEMENT.format(disks=DISK).replace('enabled="yes"', 'enabled="no"')
    assert parse_domain(domain(off, plain)) is None
    assert peek_storage(domain(off, plain)) is None


def test_a_domain_that_is_not_protected_may_have_any_name() -> None:
    assert parse_domain(b"<domain><name>-x</name></domain>") is None


def test_comments_and_the_kept_original_are_passed_over() -> None:
    disks = '<!-- x --><cdp:disk target="vda" image="/a.raw"><cdp:original>&lt;disk/&gt;</cdp:original></cdp:disk><?p q?>'
    assert parse_domain(domain(ELEMENT.format(disks=disks))) is not None


def changed(old: str, new: str) -> bytes:
    element = ELEMENT.format(disks=DISK)
    assert old in element
    return domain(element.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('enabled="yes"', "", "protection/@enabled: this attribute is missing"),
        ('enabled="yes"', 'enabled="true"', "protection/@enabled: 'true' is none of"),
        ('enabled="yes"', 'enabled="yes" repo="x"', "protection/@repo: this attribute is not known"),
        ('enabled="yes"', 'enabled="yes" ship="never"', "protection/@ship: 'never' is none of"),
        ('enabled="yes"', 'enabled="yes" on-journal-full="stop"', "protection/@on-journal-full: 'stop' is none of"),
        ('enabled="yes"', 'enabled="yes" on-failure="hope"', "protection/@on-failure: 'hope' is none of"),
        ('enabled="yes"', 'enabled="yes" journal="j"', "protection.journal: 'j' is not an absolute path"),
        ('enabled="yes"', 'enabled="yes" journal-size="1"', "protection.journal_size: 1 bytes"),
        ('enabled="yes"', 'enabled="yes" journal-size="much"', "protection/@journal-size: 'much' is not a size"),
        ('enabled="yes"', 'enabled="yes" bandwidth-limit="9B"', "protection.bandwidth_limit: 9 bytes a second"),
        ('enabled="yes"', 'enabled="yes" local-history="9"', "protection/@local-history: '9' is not a length of time"),
        ('enabled="yes"', 'enabled="yes" shutdown-timeout-seconds="x"', "protection/@shutdown-timeout-seconds"),
        ('repository="/r"', 'repository="r"', "protection.repository: 'r' is not an absolute path"),
        ('repository="/r"', 'repository="s3://bucket?x=y"', "holds credentials"),
        (DISK, "", "no disk is named"),
        (DISK, "<cdp:disc/>", "protection/disc: this element is not known"),
        (DISK, "<disk/>", "protection/disk: this element is not known"),
        (DISK, DISK * 2, "the disk 'vda' is named twice"),
        ('target="vda"', "", "protection/disk[1]/@target: this attribute is missing"),
        ('image="/a.raw"', "", "protection/disk[1]/@image: this attribute is missing"),
        ('image="/a.raw"', 'image="/a.raw" fromat="raw"', "protection/disk[1]/@fromat: this attribute is not known"),
        ('image="/a.raw"', 'image="/a.raw" format="vdi"', "protection/disk[1]/@format: 'vdi' is none of"),
        ('image="/a.raw"', 'image="a.raw"', "'a.raw' is not an absolute path"),
        ('image="/a.raw"/>', 'image="/a.raw"><cdp:x/></cdp:disk>', "protection/disk[1]/x: this element is not known"),
        ('target="vda"', 'target="vdb"', "disk vdb: the domain has no such disk (it has: vda)"),
        ("cdp:protection xmlns", "cdp:protecton xmlns", "malformed"),
    ],
)
def test_a_mistake_in_the_element_is_named(old: str, new: str, said: str) -> None:
    assert said in str(refused(changed(old, new)))


def test_two_elements_or_another_of_our_namespace() -> None:
    assert "may hold one" in str(refused(domain(ELEMENT.format(disks=DISK) * 2)))
    assert "may hold one" in str(refused(domain('<x xmlns="urn:vmrewind:protection:1"/>')))


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        ("<disk type='file'><source file='/a.raw'/><target dev='vda'/></disk>", "not vmrewind's socket"),
        ("<disk type='network'><source protocol='nbd'><host name='h'/></source><target dev='vda'/></disk>", "not vmrewind's"),
        (f"<disk type='network'>{source('vdb')}<target dev='vda'/></disk>", "the export 'vdb'"),
        (f"<disk type='network'>{source(socket='/elsewhere')}<target dev='vda'/></disk>", "/elsewhere"),
        (
            "<disk type='network'><driver type='qcow2'/>{source}<target dev='vda'/></disk>",
            "the domain says format 'qcow2', the protection element 'raw'",
        ),
    ],
)  # fmt: skip
def test_a_disk_that_does_not_go_through_vmrewind(disk: str, said: str) -> None:
    assert said in str(refused(domain(disk=disk.replace("{source}", source()))))


def test_a_cloned_domain_is_refused() -> None:
    assert "a renamed or cloned domain" in refused(domain(name="web02")).hint


def test_protection_switched_off_by_hand_with_the_disk_left_behind() -> None:
    off = ELEMENT.format(disks=DISK).replace('enabled="yes"', 'enabled="no"')
    error = refused(domain(off))
    assert "switched off" in str(error)
    assert "vmrewind unprotect" in error.hint


LAUGHS = (
    '<?xml version="1.0"?><!DOCTYPE d [<!ENTITY l0 "ha">'
    + "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    + "]><domain><name>&l9;</name></domain>"
)


@pytest.mark.parametrize(
    ("xml", "said"),
    [
        (b"", "malformed"),
        (b"<domain>", "malformed"),
        (b"<domain><name>a</nam></domain>", "line 1, column"),
        (b"\xff\xfe<", "malformed"),
        (b"<domain>\x00</domain>", "malformed"),
        (b"name = 'a toml file'", "malformed"),
        (b"<network/>", "its root element is <network>"),
        (domain(name=""), "name: the value is empty"),
        (domain(name="a/b"), "cannot be a VM's name"),
        pytest.param(b"<domain>" * 5000, "malformed", id="deep"),
        pytest.param(LAUGHS.encode(), "document type declaration", id="laughs"),
        pytest.param(LAUGHS.encode("utf-16"), "document type declaration", id="laughs-utf16"),
        (b'<!DOCTYPE d SYSTEM "file:///etc/passwd"><domain/>', "document type declaration"),
        (b'<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><domain><name>&x;</name></domain>', "document type"),
        (b"<domain><name>&undefined;</name></domain>", "malformed"),
        (domain().replace(b"512d52e5", b"xyz"), "uuid: 'xyz"),
    ],
)
def test_xml_that_is_not_a_domain(xml: bytes, said: str) -> None:
    assert said in str(refused(xml))
    assert peek_storage(xml) is None or b"xyz" in xml


def test_the_early_look_passes_over_mistakes() -> None:
    element = '<p:protection xmlns:p="urn:vmrewind:protection:1" journal="rel" journal-size="x" unknown="1"/>'
    assert peek_storage(domain(element)) == Storage("web01", None, 8 << 30)


@pytest.mark.parametrize(("written", "size"), [("2097152", 2 << 20), ("1GiB", 1 << 30), ("9" * 30, 8 << 30), ("", 8 << 30)])
def test_the_early_look_sees_the_size_that_the_strict_one_does(written: str, size: int) -> None:
    xml = changed('enabled="yes"', f'enabled="yes" journal-size="{written}"')
    assert peek_storage(xml) == Storage("web01", None, size)
    try:
        config = parse_domain(xml)
    except ConfigError:
        return  # the early look passes over what the strict one then refuses
    assert config is not None
    assert config.protection.journal_size == size
