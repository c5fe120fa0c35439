"""A domain made into one that runs beside it: nothing of the host is shared, and what is left out is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

from vmrewind.errors import ConfigError
from vmrewind.vmconfig.beside import beside

UUID = "11111111-2222-4333-8444-555555555555"
SOCKET = Path("/run/vmrewind/copy/nbd.sock")
DOMAIN = b"""<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>web01</name><uuid>6d1b4a86-58f0-4c32-a4a7-0d7d2a9ac3c1</uuid><genid>6d1b4a86-58f0-4c32-a4a7-0d7d2a9ac3c2</genid>
<metadata><cdp:protection xmlns:cdp='urn:vmrewind:protection:1' enabled='yes'/></metadata>
<memory unit='GiB'>4</memory><vcpu>2</vcpu>
<sysinfo type='smbios'><system><entry name='uuid'>6d1b4a86-58f0-4c32-a4a7-0d7d2a9ac3c1</entry></system></sysinfo>
<os><type arch='x86_64' machine='q35'>hvm</type><loader type='pflash' readonly='yes'>/usr/share/OVMF/CODE.fd</loader>
<nvram template='/usr/share/OVMF/VARS.fd' type='file'>/var/lib/own/web01_VARS.fd
<source file='/var/lib/own/web01_VARS.fd'/></nvram></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='network' device='disk'><driver name='qemu' type='qcow2' error_policy='stop' rerror_policy='stop' cache='none'/>
<source protocol='nbd' name='vda'><host transport='unix' socket='/run/vmrewind/web01/nbd.sock'/><reconnect delay='60'/></source>
<backingStore type='file'><format type='raw'/><source file='/var/lib/own/base.raw'/><backingStore/></backingStore>
<target dev='vda' bus='virtio'/><boot order='1'/></disk>
<disk type='file' device='disk'><source file='/var/lib/own/data.raw'/><target dev='vdb'/></disk>
<disk type='file' device='cdrom'><source file='/var/lib/own/install.iso'/><target dev='sda'/><readonly/></disk>
<interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='vnet0'/><model type='virtio'/>
<address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></interface>
<serial type='file'><source path='/var/lib/own/serial.log'/><log file='/var/lib/own/x'/><target port='0'/></serial>
<console type='unix'><source mode='bind' path='/var/lib/own/console.sock'/><target type='serial' port='0'/></console>
<channel type='unix'><source mode='bind' path='/var/lib/own/agent.sock'/>
<target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<channel type='pty'><target type='virtio' name='other'/></channel>
<input type='tablet' bus='usb'/><input type='evdev'><source dev='/dev/input/event1'/></input>
<graphics type='vnc' port='5901' listen='0.0.0.0' passwd='secret'><listen type='address' address='0.0.0.0'/></graphics>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
<rng model='virtio'><backend model='egd' type='unix'><source mode='connect' path='/var/lib/own/egd'/></backend></rng>
<filesystem type='mount'><source dir='/var/lib/own/share'/><target dir='x'/></filesystem>
<hostdev mode='subsystem' type='usb'/><tpm model='tpm-crb'/>
<vsock model='virtio'><cid address='3'/></vsock><video><model type='virtio'/></video>
</devices><qemu:commandline><qemu:arg value='-serial'/><qemu:arg value='file:/var/lib/own/y'/></qemu:commandline></domain>"""


def made(network: str | None = None) -> tuple[etree._Element, list[str]]:
    xml, left_out = beside(DOMAIN, "copy", UUID, {"vda": "qcow2"}, SOCKET, network)
    return etree.fromstring(xml), left_out


def test_nothing_of_the_domains_own_is_named() -> None:
    domain, left_out = made()
    text = etree.tostring(domain).decode().replace("/var/lib/own/base.raw", "")
    assert "/var/lib/own" not in text and "web01" not in text and "6d1b4a86" not in text and "secret" not in text
    assert "vmrewind:protection" not in text and domain.get("id") is None
    assert (domain.findtext("name"), domain.findtext("uuid"), domain.findtext("vcpu")) == ("copy", UUID, "2")
    assert domain.findtext("sysinfo/system/entry") == UUID
    kinds = [child.tag for child in domain.findall("devices/*")]
    assert kinds == ["emulator", "disk", "disk", "serial", "console", "channel", "input", "graphics", "rng", "video"]
    for named in ("<commandline>", "<filesystem>", "<hostdev>", "<interface>", "<tpm>", "<vsock>", "<rng>", "<input>", "<channel>"):
        assert left_out.count(named) == 1
    assert "disk vdb, which is not protected" in left_out and "the firmware's variables" in left_out


def test_its_disks_are_the_moments_and_its_cd_drive_is_empty() -> None:
    domain, _ = made()
    disk, drive = domain.findall("devices/disk")
    source, driver = disk.find("source"), disk.find("driver")
    assert source is not None and driver is not None and disk.get("type") == "network"
    (host,) = source
    assert dict(source.attrib) == {"protocol": "nbd", "name": "vda"} and host.get("socket") == str(SOCKET)
    assert dict(driver.attrib) == {"name": "qemu", "type": "qcow2", "cache": "none"}
    assert disk.find("backingStore/source[@file='/var/lib/own/base.raw']") is not None and disk.find("boot") is not None
    assert drive.find("source") is None and drive.get("device") == "cdrom"


def test_with_a_network_its_interfaces_are_on_that_one_with_other_addresses() -> None:
    domain, left_out = made("lab")
    (interface,) = domain.findall("devices/interface")
    assert interface.get("type") == "network" and [child.tag for child in interface] == ["model", "address", "source", "mac"]
    assert interface.find("source[@network='lab']") is not None
    mac = interface.find("mac")
    assert mac is not None and str(mac.get("address")).startswith("52:54:00:") and mac.get("address") != "52:54:00:00:00:01"
    assert "<interface>" not in left_out


def test_a_configuration_without_the_moments_disks_is_refused() -> None:
    with pytest.raises(ConfigError, match="vdz"):
        beside(DOMAIN, "copy", UUID, {"vda": "raw", "vdz": "raw"}, SOCKET, None)
