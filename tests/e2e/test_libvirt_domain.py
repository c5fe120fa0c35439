"""Protecting and unprotecting domains of a real libvirt, and libvirt's hook around their starts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests import images
from tests.e2e.libvirt_host import LibvirtHost
from vmrewind.errors import ConfigError, ImageError, LibvirtError, RepositoryError, UsageError, VmStateError
from vmrewind.paths import VmPaths
from vmrewind.start.processes import running
from vmrewind.vmconfig.domain import parse_domain

MIB = 1 << 20


@pytest.fixture
def host() -> Iterator[LibvirtHost]:
    with LibvirtHost() as running_host:
        yield running_host


def disk(target: str, image: Path, kind: str = "raw", *, block: bool = False, inner: str = "") -> str:
    source = f"<source dev='{image}'/>" if block else f"<source file='{image}'/>"
    return (
        f"<disk type='{'block' if block else 'file'}' device='disk'>"
        f"<driver name='qemu' type='{kind}' cache='none' io='native' discard='unmap'/>{source}"
        f"<target dev='{target}' bus='virtio'/>{inner}</disk>"
    )


def domain(*disks: str, name: str = "web01", extra: str = "") -> str:
    """A machine that needs no guest: it starts, finds nothing to boot, and idles."""
    return f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>{extra}
<os><type arch='x86_64'>hvm</type></os>
<devices>{"".join(disks)}<graphics type='vnc' passwd='sekrit'><listen type='socket'/></graphics></devices></domain>"""


def test_protect_and_unprotect_leave_the_xml_byte_for_byte_as_it_was(host: LibvirtHost) -> None:
    raw, base, top = host.directory / "a.raw", host.directory / "base.raw", host.directory / "top.qcow2"
    images.raw_image(raw, MIB)
    images.raw_image(base, MIB)
    images.qcow2_overlay(top, base)
    device = next(path for path in sorted(Path("/dev").iterdir()) if path.is_block_device())
    metadata = "<metadata><o:x xmlns:o='urn:other'>kept &amp; left alone</o:x></metadata>"
    for extra in ("", metadata):
        host.define(
            domain(
                disk("vda", raw, inner="<serial>abc</serial><boot order='1'/>"),
                disk("vdb", top, "qcow2"),
                disk("vdc", device, block=True),
                disk("vdd", host.directory / "d.raw"),
                extra=extra,
            )
        )
        before = host.stored_xml("web01")
        report = json.loads(host.protect("web01", "vda", "vdb", "vdc", options=["--json"]).stdout)
        assert report["added"] == ["vda", "vdb", "vdc"]
        protected = host.stored_xml("web01")
        config = parse_domain(protected.encode())
        assert config is not None
        found = {disk.target: (disk.image, disk.format) for disk in config.protection.disk}
        assert found == {"vda": (str(raw), "raw"), "vdb": (str(top), "qcow2"), "vdc": (str(device), "raw")}
        assert f"<source file='{base}'/>" in protected
        assert host.protect("web01", "vda", "vdb", "vdc").stdout.count("(as before)") == 3
        assert host.stored_xml("web01") == protected
        assert json.loads(host.vmrewind("unprotect", "web01", "--json").stdout)["disks"] == ["vda", "vdb", "vdc"]
        assert host.stored_xml("web01") == before
        assert "is not protected" in host.vmrewind("unprotect", "web01").stdout
        assert host.stored_xml("web01") == before
        host.virsh("undefine", "web01")


def test_what_cannot_be_protected_is_refused_and_nothing_changes(host: LibvirtHost) -> None:
    raw = images.raw_image(host.directory / "a.raw", MIB)
    host.define(domain(disk("vda", raw), disk("vdb", host.directory / "absent.raw"), disk("vdc", Path("/dev/null"))))
    before = host.stored_xml("web01")
    there = str(host.repository)

    def refused(kind: type[Exception], *arguments: str) -> str:
        done = host.vmrewind("protect", *arguments, "--json", check=False)
        assert done.returncode == kind.exit_code, (done.stdout, done.stderr)
        error = json.loads(done.stdout)
        assert error["hint"]
        message: str = error["message"]
        return message

    assert "no disk is named" in refused(UsageError, "web01", "--repository", there)
    assert "'web02'" in refused(LibvirtError, "web02", "--disk", "vda", "--repository", there)
    assert "repository: none is given" in refused(ConfigError, "web01", "--disk", "vda")
    assert "there is no repository" in refused(RepositoryError, "web01", "--disk", "vda", "--repository", str(host.directory))
    assert "absent.raw: No such file" in refused(ImageError, "web01", "--disk", "vdb", "--repository", there)
    assert "neither a file nor a block device" in refused(ImageError, "web01", "--disk", "vdc", "--repository", there)
    assert "it has: vda, vdb, vdc" in refused(ConfigError, "web01", "--disk", "vdx", "--repository", there)
    assert "is not a size" in refused(UsageError, "web01", "--disk", "vda", "--journal-size", "8", "--repository", there)
    assert host.stored_xml("web01") == before
    host.define(domain(disk("vda", raw), name="web03"))
    host.virsh("start", "web03", "--paused")
    assert "is running" in refused(VmStateError, "web03", "--disk", "vda", "--repository", there)


def test_a_protected_domain_starts_writes_through_its_keeper_and_stops(host: LibvirtHost) -> None:
    raw, base, top = host.directory / "a.raw", host.directory / "base.raw", host.directory / "top.qcow2"
    images.raw_image(raw, MIB)
    images.raw_image(base, MIB)
    images.qcow2_overlay(top, base)
    host.define(domain(disk("vda", raw), disk("vdb", top, "qcow2")))
    host.protect("web01", "vda", "vdb")
    host.virsh("start", "web01")
    keeping = running(VmPaths("web01"))
    assert keeping is not None
    assert keeping.mode == "libvirt"
    for index in range(2):
        device = f"/machine/peripheral/virtio-disk{index}/virtio-backend"
        command = f'qemu-io -d {device} "write -P 0x5a 4096 8192"'
        assert host.virsh("qemu-monitor-command", "--hmp", "web01", command).stdout.strip() == ""
    log = host.run("cat", "/var/log/libvirt/qemu/web01.log").stdout
    assert log.count("wrote 8192/8192 bytes at offset 4096") == 2
    assert raw.read_bytes()[4096:12288] == b"\x5a" * 8192
    names = [json.loads(line)["event"] for line in VmPaths("web01").events(int(keeping.run, 16)).read_text().splitlines()]
    wanted = ["start.begin", "capture.created", "config.parsed", "disks.assigned", "ship.created", "qemu.started", "cpu.started"]
    assert [name for name in names if name in wanted] == wanted
    host.virsh("destroy", "web01")
    assert running(VmPaths("web01")) is None
    assert not keeping.keeper.alive
    # the guest's view of the qcow2 disk, read through its format driver
    read = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-r", "-c", "read -P 0x5a 4096 8192", top], capture_output=True, text=True, check=True
    )
    assert "Pattern verification failed" not in read.stdout
    host.vmrewind("unprotect", "web01")
    host.virsh("start", "web01")
    assert running(VmPaths("web01")) is None


def test_a_protected_domain_is_known_by_its_name_before_its_first_start(host: LibvirtHost) -> None:
    raw = images.raw_image(host.directory / "a.raw", MIB)
    host.define(domain(disk("vda", raw)))
    host.protect("web01", "vda")
    assert "sekrit" not in VmPaths("web01").config.read_text()
    host.vmrewind("backup", "web01")
    host.virsh("start", "web01")
    keeping = running(VmPaths("web01"))
    assert keeping is not None
    assert "base.begun" not in VmPaths("web01").events(int(keeping.run, 16)).read_text()


def test_a_start_that_fails_says_why_and_leaves_nothing_behind(host: LibvirtHost) -> None:
    raw = images.raw_image(host.directory / "a.raw", MIB)
    host.define(domain(disk("vda", raw)))
    host.protect("web01", "vda")
    raw.rename(host.directory / "moved.raw")
    started = host.virsh("start", "web01", check=False)
    assert started.returncode != 0
    assert str(raw) in started.stderr
    assert "vmrewind: " in started.stderr
    assert host.virsh("domstate", "web01").stdout.strip() == "shut off"
    assert running(VmPaths("web01")) is None
    (host.directory / "moved.raw").rename(raw)
    host.virsh("start", "web01")
    assert running(VmPaths("web01")) is not None


def test_domains_without_protection_are_left_alone_beside_a_protected_one(host: LibvirtHost) -> None:
    one = images.raw_image(host.directory / "a.raw", MIB)
    two = images.raw_image(host.directory / "b.raw", MIB)
    host.define(domain(disk("vda", one)))
    host.define(domain(disk("vda", two), name="web02"))
    host.protect("web01", "vda")
    host.virsh("start", "web02")
    assert not VmPaths("web02").state.exists()
    host.virsh("destroy", "web02")


def test_a_migration_of_a_protected_domain_is_refused_and_a_running_one_cannot_be_unprotected(host: LibvirtHost) -> None:
    raw = images.raw_image(host.directory / "a.raw", MIB)
    host.define(domain(disk("vda", raw)))
    host.protect("web01", "vda")
    host.virsh("start", "web01")
    done = host.vmrewind("unprotect", "web01", check=False)
    assert done.returncode == VmStateError.exit_code
    assert "is running" in done.stderr
    moved = host.virsh("migrate", "--live", "web01", "qemu+unix:///system", check=False)
    assert moved.returncode != 0
    assert "this version cannot migrate a protected VM" in moved.stderr
    assert host.virsh("domstate", "web01").stdout.strip() == "running"


def test_a_restart_of_libvirtd_leaves_a_protected_vm_running(host: LibvirtHost) -> None:
    raw = images.raw_image(host.directory / "a.raw", MIB)
    host.define(domain(disk("vda", raw)))
    host.protect("web01", "vda")
    host.virsh("start", "web01")
    before = running(VmPaths("web01"))
    host.restart()
    assert host.virsh("domstate", "web01").stdout.strip() == "running"
    assert running(VmPaths("web01")) == before
    host.virsh("destroy", "web01")
    assert running(VmPaths("web01")) is None


def test_a_vm_that_may_start_unprotected_does_and_is_protected_again_at_its_next_start(host: LibvirtHost) -> None:
    raw = images.raw_image(host.directory / "a.raw", MIB)
    there = host.repository
    host.define(domain(disk("vda", raw)))
    host.protect("web01", "vda", options=["--on-failure", "start-unprotected"])
    there.rename(host.directory / "unmounted")
    host.virsh("start", "web01")
    keeping = running(VmPaths("web01"))
    assert keeping is not None
    assert keeping.capture is None
    host.virsh("destroy", "web01")
    assert running(VmPaths("web01")) is None
    (host.directory / "unmounted").rename(there)
    host.virsh("start", "web01")
    keeping = running(VmPaths("web01"))
    assert keeping is not None
    assert keeping.capture is not None
