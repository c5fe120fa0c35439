"""A guest under libvirt: it writes while it is protected, and what it was promised is there when it is taken back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests import images, writer
from guests.kernel import linux
from guests.machine import APPEND, Console
from tests.e2e.libvirt_host import LibvirtHost
from vmrewind.paths import VmPaths
from vmrewind.start.processes import running

MIB = 1 << 20
KIB = 4


@pytest.fixture
def host() -> Iterator[LibvirtHost]:
    with LibvirtHost() as running_host:
        yield running_host


def define_writer(host: LibvirtHost, image: Path, kind: str) -> Console:
    """A domain whose guest writes numbered files to ``image`` until it is ended; returns its console."""
    console = host.directory / "console"
    kernel = shutil.copy(linux().kernel, host.directory / "kernel")
    initrd = shutil.copy(writer.writer_initramfs(), host.directory / "initrd")
    host.define(f"""<domain type='qemu'><name>web01</name><memory unit='MiB'>192</memory>
<os><type arch='x86_64'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>{APPEND} {writer.append(count=0, kib=KIB)}</cmdline></os>
<features><acpi/></features><on_reboot>destroy</on_reboot><devices>
<disk type='file'><driver name='qemu' type='{kind}'/><source file='{image}'/><target dev='vda' bus='virtio'/></disk>
<serial type='file'><source path='{console}'/></serial><memballoon model='none'/></devices></domain>""")
    return Console(console)


def check_restored(host: LibvirtHost, moment: str, acknowledged: int, kind: str) -> None:
    """Restored to ``moment``, the disk is sound and holds at least the acknowledged files, each whole."""
    output = host.directory / f"restored-{acknowledged}"
    host.vmrewind("restore", "web01", "--at", moment, "--output", output)
    restored = output / f"vda.{kind}"
    if kind == "qcow2":
        restored = images.qcow2_to_raw(restored, output / "flat.raw")
    assert images.replay_and_check_ext4(restored) == ""
    files = {path.name: path.read_bytes() for path in images.ext4_files(restored, output / "files").glob("file-*")}
    for number in range(1, acknowledged + 1):
        assert files[writer.file_name(number)] == writer.content(number, "vda", KIB)
    # the write after the last acknowledged one may have begun
    assert acknowledged <= len(files) <= acknowledged + 1


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_guest_that_is_destroyed_is_taken_back_to_moments_of_its_life(host: LibvirtHost, kind: str) -> None:
    image = images.ext4_image(host.directory / "disk.raw", 32 * MIB)
    if kind == "qcow2":
        image = images.qcow2_overlay(host.directory / "disk.qcow2", image)
    console = define_writer(host, image, kind)
    host.protect("web01", "vda")
    host.virsh("start", "web01")
    moments = []
    for number in (5, 15):
        console.wait_for(rf"^ACK {number}$")
        # the guest is held for a moment, so that what it was promised until then is known exactly
        host.virsh("suspend", "web01")
        last = writer.acknowledged(console.text())[-1]
        host.vmrewind("mark", "web01", f"after-{last}")
        host.virsh("resume", "web01")
        moments.append(last)
    console.wait_for(rf"^ACK {moments[-1] + 5}$")
    host.virsh("destroy", "web01")
    assert writer.errors(console.text()) == []
    assert running(VmPaths("web01")) is None
    for last in moments:
        check_restored(host, f"@after-{last}", last, kind)
    check_restored(host, "latest", writer.acknowledged(console.text())[-1], kind)
    # what was shipped suffices
    shutil.rmtree(VmPaths("web01").default_journal)
    shutil.rmtree(host.directory / f"restored-{moments[0]}")
    check_restored(host, f"@after-{moments[0]}", moments[0], kind)


def test_a_guest_whose_capture_is_killed_again_and_again_sees_no_error(host: LibvirtHost) -> None:
    console = define_writer(host, images.ext4_image(host.directory / "disk.raw", 32 * MIB), "raw")
    host.protect("web01", "vda")
    host.virsh("start", "web01")
    console.wait_for(r"^ACK 3$")
    last = 3
    for _ in range(3):
        keeping = running(VmPaths("web01"))
        assert keeping is not None
        assert keeping.capture is not None
        os.kill(keeping.capture.pid, signal.SIGKILL)
        last = writer.acknowledged(console.text())[-1] + 10
        console.wait_for(rf"^ACK {last}$")
    host.virsh("destroy", "web01")
    assert writer.errors(console.text()) == []
    log = VmPaths("web01").events(int(keeping.run, 16)).read_text()
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events.count("capture.restarted") == 3
    check_restored(host, "latest", writer.acknowledged(console.text())[-1], "raw")


def test_the_power_button_ends_the_guest_and_then_the_keeper(host: LibvirtHost) -> None:
    console = define_writer(host, images.ext4_image(host.directory / "disk.raw", 32 * MIB), "raw")
    host.protect("web01", "vda")
    host.virsh("start", "web01")
    console.wait_for(r"^ACK 3$")
    keeping = running(VmPaths("web01"))
    assert keeping is not None
    host.virsh("shutdown", "web01")
    console.wait_for("^DONE")
    deadline = time.monotonic() + 60
    while host.virsh("domstate", "web01").stdout.strip() != "shut off" or keeping.keeper.alive:
        assert time.monotonic() < deadline
    assert json.loads((VmPaths("web01").default_journal / "head.json").read_bytes())["images"].keys() == {"vda"}


def test_a_keeper_told_to_end_keeps_the_guests_disks_until_the_guest_has_ended(host: LibvirtHost) -> None:
    console = define_writer(host, images.ext4_image(host.directory / "disk.raw", 32 * MIB), "raw")
    host.protect("web01", "vda")
    host.virsh("start", "web01")
    console.wait_for(r"^ACK 3$")
    keeping = running(VmPaths("web01"))
    assert keeping is not None
    os.kill(keeping.keeper.pid, signal.SIGTERM)
    log = VmPaths("web01").events(int(keeping.run, 16))
    deadline = time.monotonic() + 30
    while "keeper.end-deferred" not in log.read_text():
        assert time.monotonic() < deadline
    # an upgrade goes on as if nothing had been said
    host.vmrewind("restart-capture", "web01")
    last = writer.acknowledged(console.text())[-1] + 5
    console.wait_for(rf"^ACK {last}$")
    assert host.virsh("domstate", "web01").stdout.strip() == "running" and keeping.keeper.alive
    host.virsh("destroy", "web01")
    assert writer.errors(console.text()) == []
    assert running(VmPaths("web01")) is None
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("capture.handed-over") == 1 and "capture.stopped" in events and "capture.died" not in events
    check_restored(host, "latest", writer.acknowledged(console.text())[-1], "raw")
