"""Putting a domain's disks behind vmrewind and taking them back: what changes, what stays, what is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from vmrewind.errors import ConfigError, ImageError, VmrewindError
from vmrewind.paths import VmPaths
from vmrewind.vmconfig.chain import Backing, backing_chain
from vmrewind.vmconfig.domain import parse_domain
from vmrewind.vmconfig.rewrite import Rewritten, protect_domain, unprotect_domain

VDA = """<disk type='file' device='disk'>
  <driver name='qemu' type='raw' cache='none' io='native' discard='unmap' queues='2'/>
  <source file='/images/a.raw' startupPolicy='optional'><seclabel model='dac' relabel='no'/></source>
  <target dev='vda' bus='virtio'/><serial>abc</serial><boot order='1'/>
  <address type='pci' slot='0x03'/>
</disk>"""
VDB = """<disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg0/b'/>
  <target dev='vdb' bus='virtio'/></disk>"""


def domain(*disks: str, metadata: str = "") -> bytes:
    return f"<domain type='qemu'><name>web01</name>{metadata}<devices>{''.join(disks)}<video/></devices></domain>".encode()


def protect(xml: bytes, targets: Sequence[str] = ("vda",), reconnect: bool = True, **changes: Any) -> Rewritten:
    return protect_domain(
        xml,
        targets,
        socket=str(VmPaths("web01").nbd_socket),
        reconnect=reconnect,
        changes={"repository": "/repo", **changes},
    )


def canonical(xml: bytes) -> bytes:
    """Without what libvirt formats anyway: quotes and space between elements."""
    root = etree.fromstring(xml, etree.XMLParser(remove_blank_text=True))
    return etree.tostring(root, method="c14n")


def disk_of(xml: bytes, target: str) -> etree._Element:
    found = etree.fromstring(xml).xpath(f"/domain/devices/disk[target/@dev='{target}']")
    assert isinstance(found, list)
    (disk,) = found
    assert isinstance(disk, etree._Element)
    return disk


@pytest.mark.parametrize("reconnect", [True, False])
def test_protected_and_back(reconnect: bool) -> None:
    before = domain(VDA, VDB)
    after = protect(before, ["vda", "vdb"], reconnect)
    assert after.added == ("vda", "vdb")
    config = parse_domain(after.xml)
    assert config is not None
    assert config.protection == after.protection
    assert [(disk.target, disk.image) for disk in config.protection.disk] == [
        ("vda", "/images/a.raw"),
        ("vdb", "/dev/vg0/b"),
    ]
    back = unprotect_domain(after.xml)
    assert back.removed == ("vda", "vdb")
    assert canonical(back.xml) == canonical(before)


def test_only_source_and_driver_change() -> None:
    disk = disk_of(protect(domain(VDA)).xml, "vda")
    assert disk.get("type") == "network"
    assert [child.tag for child in disk] == ["driver", "source", "target", "serial", "boot", "address"]
    driver = disk.find("driver")
    assert driver is not None
    kept = {"name": "qemu", "type": "raw", "cache": "none", "discard": "unmap", "queues": "2"}
    assert dict(driver.attrib) == kept | {"error_policy": "stop", "rerror_policy": "stop"}
    assert disk.find("source/reconnect[@delay='60']") is not None


@pytest.mark.parametrize("reconnect", [True, False])
def test_a_capture_that_stays_away_pauses_the_vm_rather_than_telling_the_guest(reconnect: bool) -> None:
    disk = disk_of(protect(domain(VDA.replace("io='native'", "error_policy='report'")), reconnect=reconnect).xml, "vda")
    assert (disk.find("source/reconnect") is not None) == reconnect
    assert disk.find("driver[@error_policy='stop'][@rerror_policy='stop']") is not None


def test_other_disks_and_metadata_are_left_alone() -> None:
    before = domain(VDA, VDB, metadata="<metadata><o:x xmlns:o='urn:o'>kept</o:x></metadata>")
    after = protect(before)
    assert canonical(etree.tostring(disk_of(after.xml, "vdb"))) == canonical(VDB.encode())
    assert b"kept" in after.xml
    assert canonical(unprotect_domain(after.xml).xml) == canonical(before)


def test_repeating_changes_nothing() -> None:
    once = protect(domain(VDA))
    twice = protect(once.xml)
    assert twice.added == ()
    assert canonical(twice.xml) == canonical(once.xml)
    assert unprotect_domain(domain(VDA)).removed == ()
    assert canonical(unprotect_domain(domain(VDA)).xml) == canonical(domain(VDA))


def test_repeating_adds_disks_and_changes_settings_and_picks_up_a_newer_libvirt() -> None:
    before = domain(VDA, VDB)
    first = protect(before, ["vda"], reconnect=False, ship="on-demand", journal="/j", journal_size=1 << 30)
    second = protect(first.xml, ["vdb"], repository="/other", on_journal_full="block", on_failure="start-unprotected")
    assert second.added == ("vdb",)
    config = parse_domain(second.xml)
    assert config is not None
    protection = config.protection
    assert [disk.target for disk in protection.disk] == ["vda", "vdb"]
    assert (protection.repository, protection.ship, protection.journal) == ("/other", "on-demand", "/j")
    assert (protection.journal_size, protection.on_journal_full, protection.on_failure) == (1 << 30, "block", "start-unprotected")
    assert disk_of(second.xml, "vda").find("source/reconnect") is not None
    assert canonical(unprotect_domain(second.xml).xml) == canonical(before)


def test_edits_made_while_protected_survive() -> None:
    after = protect(domain(VDA), reconnect=False).xml
    root = etree.fromstring(after)
    for path, attribute, value in (("boot", "order", "2"), ("driver", "cache", "writeback")):
        element = root.find(f"devices/disk/{path}")
        assert element is not None
        element.set(attribute, value)
    back = disk_of(unprotect_domain(etree.tostring(root)).xml, "vda")
    assert back.find("boot[@order='2']") is not None
    driver = back.find("driver")
    assert driver is not None
    assert (driver.get("cache"), driver.get("io"), driver.get("error_policy")) == ("writeback", "native", None)


def test_a_disk_that_was_removed_or_given_another_source_by_hand_is_left_as_it_is() -> None:
    after = protect(domain(VDA, VDB), ["vda", "vdb"]).xml
    root = etree.fromstring(after)
    devices = root.find("devices")
    assert devices is not None
    devices.remove(devices[0])
    devices.replace(devices[0], etree.fromstring(VDB.replace("/dev/vg0/b", "/dev/vg0/moved")))
    back = unprotect_domain(etree.tostring(root))
    assert back.removed == ()
    assert b"/dev/vg0/moved" in back.xml
    assert b"urn:vmrewind" not in back.xml


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def qcow2(image: Path, inner: str = "") -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>{inner}"
        "<target dev='vda'/></disk>"
    )


def test_a_backing_chain_is_spelled_out(tmp_path: Path) -> None:
    base, middle, top = tmp_path / "base.raw", tmp_path / "middle.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "raw", base, "1M")
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", middle)
    qemu_img("create", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
    assert backing_chain(str(top)) == [Backing(str(middle), "qcow2", "file"), Backing(str(base), "raw", "file")]
    before = domain(qcow2(top))
    after = protect(before)
    store = disk_of(after.xml, "vda").find("backingStore")
    assert store is not None
    assert canonical(etree.tostring(store)) == canonical(
        f"<backingStore type='file'><format type='qcow2'/><source file='{middle}'/>"
        f"<backingStore type='file'><format type='raw'/><source file='{base}'/><backingStore/></backingStore>"
        "</backingStore>".encode()
    )
    assert canonical(unprotect_domain(after.xml).xml) == canonical(before)


def test_a_chain_that_the_operator_wrote_is_kept(tmp_path: Path) -> None:
    own = "<backingStore type='file'><format type='raw'/><source file='/own'/><backingStore/></backingStore>"
    before = domain(qcow2(tmp_path / "absent.qcow2", own))
    after = protect(before)
    assert disk_of(after.xml, "vda").find("backingStore/source[@file='/own']") is not None
    assert canonical(unprotect_domain(after.xml).xml) == canonical(before)


def test_a_qcow2_without_backing_ends_its_chain(tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img("create", "-f", "qcow2", top, "1M")
    store = disk_of(protect(domain(qcow2(top))).xml, "vda").find("backingStore")
    assert store is not None
    assert len(store) == 0


def test_qcow2_files_that_cannot_be_protected(tmp_path: Path) -> None:
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    qemu_img("create", "-f", "raw", base, "1M")
    with pytest.raises(ImageError, match="cannot be examined as qcow2"):
        protect(domain(qcow2(base)))
    with pytest.raises(ImageError, match=r"cannot be examined as qcow2.*No such file"):
        protect(domain(qcow2(top)))
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", top, "1M")
    with pytest.raises(ImageError, match="keeps its data in another file"):
        protect(domain(qcow2(top)))
    qemu_img("create", "-f", "qcow2", top, "1M")
    qemu_img("rebase", "-u", "-b", base, "-F", "raw", top)
    base.unlink()
    with pytest.raises(ImageError, match="cannot be examined"):
        protect(domain(qcow2(top)))


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        (VDA.replace("device='disk'", "device='cdrom'"), "it is a cdrom"),
        (VDA.replace("device='disk'", "device='lun'"), "it is a lun"),
        (VDA.replace("<serial>", "<readonly/><serial>"), "<readonly/>"),
        (VDA.replace("<serial>", "<shareable/><serial>"), "<shareable/>"),
        (VDA.replace("<serial>", "<transient/><serial>"), "<transient/>"),
        (VDA.replace("<serial>", "<encryption format='luks'/><serial>"), "<encryption/>"),
        (VDA.replace("<seclabel model='dac' relabel='no'/>", "<slices/>"), "its source has <slices>"),
        (VDA.replace("<seclabel model='dac' relabel='no'/>", "<encryption/>"), "its source has <encryption>"),
        (VDA.replace("type='raw'", "type='vmdk'"), "its format is 'vmdk'"),
        ("<disk type='volume'><source pool='p' volume='v'/><target dev='vda'/></disk>", "its type is 'volume'"),
        ("<disk type='network'><source protocol='rbd' name='x'/><target dev='vda'/></disk>", "its type is 'network'"),
        ("<disk type='file'><target dev='vda'/></disk>", "its type is 'file'"),
        ("<disk type='file'><source startupPolicy='optional'/><target dev='vda'/></disk>", "names no image"),
        (VDB, "the domain has no such disk (it has: vdb)"),
        (VDA.replace("/images/a.raw", "a.raw"), "not an absolute path"),
    ],
)
def test_a_disk_that_cannot_be_protected(disk: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        protect(domain(disk))
    assert said in str(caught.value)
    assert "domain 'web01'" in str(caught.value)
    assert caught.value.hint


def test_two_disks_with_one_image() -> None:
    with pytest.raises(ConfigError, match="already the image of disk 'vda'"):
        protect(domain(VDA, VDA.replace("vda", "vdb")), ["vda", "vdb"])


def test_no_repository() -> None:
    with pytest.raises(ConfigError, match="repository: none is given"):
        protect(domain(VDA), repository=None)


def test_a_socket_path_that_is_too_long() -> None:
    with pytest.raises(ConfigError, match="longer than the 107 bytes"):
        protect_domain(domain(VDA), ["vda"], socket="/" + "x" * 107, reconnect=True, changes={"repository": "/r"})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"<cdp:original>", b"<cdp:original>x", "damaged"),
        (b"&lt;disk type", b"&lt;disc type", "damaged"),
        (b"repository=", b"repositry=", "this attribute is not known"),
    ],
)
def test_an_element_that_was_damaged_is_not_guessed_at(old: bytes, new: bytes, said: str) -> None:
    xml = protect(domain(VDA)).xml
    assert old in xml
    for attempt in (unprotect_domain, protect):
        with pytest.raises(VmrewindError, match=said):
            attempt(xml.replace(old, new))


def test_an_original_that_is_missing_is_not_guessed_at() -> None:
    root = etree.fromstring(protect(domain(VDA)).xml)
    original = root.find(".//{*}original")
    assert original is not None
    parent = original.getparent()
    assert parent is not None
    parent.remove(original)
    with pytest.raises(ConfigError, match="not kept here"):
        unprotect_domain(etree.tostring(root))
    parent.append(etree.Element("{urn:vmrewind:protection:1}original"))
    parent[0].text = "<interface/>"
    with pytest.raises(ConfigError, match="no disk with a source"):
        unprotect_domain(etree.tostring(root))
