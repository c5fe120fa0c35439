"""A configuration carried to another host: what must change does, all else stays."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from vmrewind.errors import ConfigError
from vmrewind.paths import VmPaths
from vmrewind.vmconfig.domain import parse_domain
from vmrewind.vmconfig.relocate import absent_files, journal_in, relocate_domain, relocate_toml
from vmrewind.vmconfig.rewrite import protect_domain, unprotect_domain
from vmrewind.vmconfig.toml import load_toml
from vmrewind.vmconfig.xml import parse_xml

DOMAIN = b"""<domain type='kvm' id='7'>
  <name>web01</name>
  <uuid>6d1b4a86-58f0-4c32-a4a7-0d7d2a9ac3c1</uuid>
  <os><type arch='x86_64'>hvm</type><nvram>/old/nvram.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/old/web01.qcow2' index='1'/>
      <backingStore/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw' io='native'/>
      <source dev='/dev/vg/web01'/>
      <target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='/old/install.iso'/>
      <target dev='sda' bus='sata'/>
    </disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/><source network='default'/></interface>
  </devices>
</domain>"""
IMAGES = {"vda": Path("/new/web01/vda.qcow2"), "vdb": Path("/new/web01/vdb.raw")}
URL = "s3://bucket/kvm"


def protected(socket: str = "/old/nbd.sock", journal: str | None = None) -> bytes:
    changes = {"repository": "/old/repo", "journal": journal}
    return protect_domain(DOMAIN, ["vda", "vdb"], socket=socket, reconnect=True, changes=changes).xml


@pytest.mark.parametrize("reconnect", [True, False, None])
def test_a_domain_serves_its_new_images_through_this_hosts_socket(reconnect: bool | None) -> None:
    socket = str(VmPaths("web01").nbd_socket)
    xml = relocate_domain(protected(), IMAGES, URL, Path("/fast/journal"), socket, reconnect=reconnect)
    config = parse_domain(xml)
    assert config is not None
    assert {disk.target: (Path(disk.image), disk.format) for disk in config.protection.disk} == {
        "vda": (IMAGES["vda"], "qcow2"), "vdb": (IMAGES["vdb"], "raw"),
    }  # fmt: skip
    assert (config.protection.repository, config.protection.journal) == (URL, "/fast/journal")
    assert (xml.count(b"<reconnect") == 2) is (reconnect is not False)
    assert b"52:54:00:00:00:01" in xml and "id" not in parse_xml(xml).attrib
    assert absent_files(config) == ["/old/install.iso", "/old/nvram.fd"]


def test_unprotect_puts_the_new_images_into_its_disks() -> None:
    xml = relocate_domain(protected(), IMAGES, URL, None, str(VmPaths("web01").nbd_socket), reconnect=True)
    plain = unprotect_domain(xml).xml
    assert b"/new/web01/vda.qcow2" in plain and b'file="/new/web01/vdb.raw"' in plain.replace(b"'", b'"')
    assert b"/old/web01.qcow2" not in plain and b"/dev/vg/web01" not in plain
    assert b"/old/install.iso" in plain


def test_a_domain_whose_disks_are_others_or_that_is_not_protected_is_refused() -> None:
    with pytest.raises(ConfigError, match="vdb"):
        relocate_domain(protected(), {"vda": IMAGES["vda"]}, URL, None, "/s", reconnect=True)
    with pytest.raises(ConfigError, match="not protected"):
        relocate_domain(DOMAIN, IMAGES, URL, None, "/s", reconnect=True)


def test_where_the_journal_was() -> None:
    assert journal_in(protected(journal="/fast/j"), "xml") == Path("/fast/j")
    assert journal_in(protected(), "xml") is None
    assert journal_in(b'name="a"\n[protection]\njournal="/fast/j"\n', "toml") == Path("/fast/j")
    assert journal_in(b'name="a"\n[protection]\njournal="beside"\n', "toml") is None
    for damaged in (b"name=", b"\xff", b'name="a"'):
        with pytest.raises(ConfigError):
            journal_in(damaged, "toml")


@pytest.mark.parametrize("inline", [True, False])
def test_a_toml_file_keeps_all_else(tmp_path: Path, inline: bool) -> None:
    disks = (
        'disk = [{target = "vda", image = "a"}, {target = "vdb", image = "b", device = "scsi-hd"}]\n'
        if inline
        else '[[protection.disk]]\ntarget = "vda"\nimage = "a"\n'
        '[[protection.disk]]\ntarget = "vdb"\nimage = "b"\ndevice = "scsi-hd"\n'
    )
    text = f'name = "web01"\n# why\n[qemu]\ncommand = ["x", "-m", "1"]\n[protection]\nenabled = true\njournal = "j"\n{disks}'
    made = relocate_toml(text.encode(), IMAGES, URL, "6d1b4a86-58f0-4c32-a4a7-0d7d2a9ac3c1", None)
    path = tmp_path / "web01.toml"
    path.write_bytes(made)
    config = load_toml(path)
    assert [disk.image for disk in config.protection.disk] == [str(path) for path in IMAGES.values()]
    assert config.protection.disk[1].device == "scsi-hd" and config.qemu is not None and config.qemu.command == ["x", "-m", "1"]
    assert config.uuid == "6d1b4a86-58f0-4c32-a4a7-0d7d2a9ac3c1" and config.protection.repository == URL
    assert b"# why" in made and "journal" not in tomllib.loads(made.decode())["protection"]


def test_files_of_a_direct_vm_that_are_not_here_are_named_whether_absolute_or_not(tmp_path: Path) -> None:
    command = [
        "qemu-system-x86_64",
        "-kernel",
        "vmlinuz",
        "-drive",
        "if=none,file=/old/a.iso,id=x",
        "-fw_cfg",
        "name=opt/x,file=fw.bin",
    ]
    command += ["-monitor", "unix:/run/m.sock,server=on", "-pidfile", "/run/pid", "-name", "plain"]
    (tmp_path / "vda.raw").touch()
    text = (
        f'name = "web01"\n[qemu]\ncommand = {json.dumps(command)}\n[protection]\nenabled = true\nrepository = "/r"\n'
        f'[[protection.disk]]\ntarget = "vda"\nimage = "{tmp_path}/vda.raw"\n'
    )
    path = tmp_path / "web01.toml"
    path.write_text(text)
    assert absent_files(load_toml(path)) == ["/old/a.iso", "fw.bin", "vmlinuz"]
    path.write_text(text.replace(f"[qemu]\ncommand = {json.dumps(command)}\n", ""))
    assert absent_files(load_toml(path)) == []
