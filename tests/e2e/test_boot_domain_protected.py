"""``vmrewind boot --keep --protect`` of a libvirt domain: every write from the first one on is in its history, whoever dies."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.images import ext4_image, qcow2_overlay, replay_and_check_ext4
from guests.initramfs import initramfs
from guests.kernel import linux
from guests.machine import APPEND, Console
from tests.e2e.libvirt_host import LibvirtHost
from tests.e2e.test_boot import SCRIPT
from vmrewind.journal.runs import local_runs
from vmrewind.paths import VmPaths

_MIB = 1 << 20
_HELD = """
import os, time
from vmrewind.recover.filling import Filling
fill = Filling.fill
def held(self, stop, progress):
    def told(done, total):
        progress(done, total)
        while done >= {half} and os.path.exists({hold!r}):
            time.sleep(0.01)
    fill(self, stop, told)
Filling.fill = held
"""
"""Images are completed up to the middle, and no further while the file ``hold`` is there."""


class Booting:
    """A stopped domain with a full backup, and copies of it that are booted."""

    def __init__(self, host: LibvirtHost, tmp_path: Path) -> None:
        self.host = host
        self.hold = tmp_path / "hold"
        self.kept = host.directory / "kept"
        self._hooks = tmp_path / "hooks"
        self._hooks.mkdir()
        (self._hooks / "sitecustomize.py").write_text(_HELD.format(half=16 * _MIB, hold=str(self.hold)))
        directory = host.directory
        image = ext4_image(directory / "disk.raw", 32 * _MIB)
        self.random = os.urandom(_MIB)
        with image.open("r+b") as file:
            file.truncate(48 * _MIB)
            file.seek(40 * _MIB)
            file.write(self.random)
        base = directory / "base.raw"
        base.write_bytes(self.random * 4)
        overlay = qcow2_overlay(directory / "overlay.qcow2", base)
        kernel, initrd = (shutil.copy(path, directory) for path in (linux().kernel, initramfs(SCRIPT)))
        host.define(f"""<domain type='qemu'><name>web01</name><memory unit='MiB'>192</memory>
<os><type arch='x86_64'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{APPEND}</cmdline></os>
<features><acpi/></features><on_reboot>destroy</on_reboot><devices>
<disk type='file'><driver name='qemu' type='raw'/><source file='{image}'/><target dev='vda' bus='virtio'/></disk>
<disk type='file'><driver name='qemu' type='qcow2'/><source file='{overlay}'/><target dev='vdb' bus='virtio'/></disk>
<console type='pty'/><memballoon model='none'/></devices></domain>""")
        host.protect("web01", "vda", "vdb")
        host.vmrewind("backup", "web01")

    @contextlib.contextmanager
    def booted(self, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[subprocess.Popen[bytes], Console]]:
        log = self.host.directory / "boot.log"
        words = ["boot", "web01", "--at", "latest", "--json", "--keep", self.kept, "--protect", "--name", name]
        with log.open("wb") as output, monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(self._hooks))
            process = self.host.popen(*map(str, words), stdout=output, stderr=output)
        try:
            Console(log).wait_for('^{.*"ready".*$', 60, lambda: process.poll() is None)
            yield process, Console(log)
        finally:
            process.kill()
            process.wait()

    def acknowledged(self, name: str) -> int:
        pty = re.findall(r"/dev/pts/\d+", self.host.virsh("ttyconsole", name).stdout)[0]
        said = self.host.run("timeout", "60", "sh", "-c", f"grep -m1 -a '^ACK [2-9]' <{pty}", check=False).stdout
        return int(said.split()[1])

    def names(self) -> list[str]:
        return self.host.virsh("list", "--all", "--name").stdout.split()

    def wait_until_ended(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while name in self.names() or VmPaths(name).keeper.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def check_disks(self, number: int) -> None:
        """The images have what they were begun with, and what the guest wrote up to ``number``."""
        copy = shutil.copy(self.kept / "vda.raw", self.host.directory / "copy.raw")
        assert replay_and_check_ext4(copy) == ""
        words = ["debugfs", "-R", "cat /number", copy]
        assert int(subprocess.run(words, capture_output=True, text=True, check=True).stdout or 0) >= number
        assert copy.read_bytes()[40 * _MIB : 41 * _MIB] == self.random
        flat = self.host.directory / "flat.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", self.kept / "vdb.qcow2", flat], check=True)
        assert flat.read_bytes() == self.random * 4

    def start(self, name: str) -> None:
        """As any protected domain: nothing was written past its history."""
        self.host.virsh("start", name)
        assert json.loads(self.host.vmrewind("status", name, "--json", check=False).stdout)["problems"] == []
        runs = local_runs(VmPaths(name).default_journal, lambda _: None)
        assert len(runs) == 2 and not runs[-1].gaps and runs[-1].parent is not None
        self.host.virsh("destroy", name)


def test_it_is_a_protected_domain_from_its_first_write_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LibvirtHost() as host:
        booting = Booting(host, tmp_path)
        with booting.booted("copy", monkeypatch) as (process, log):
            log.wait_for("kept: ", 60, lambda: process.poll() is None)
            number = booting.acknowledged("copy")
            process.send_signal(signal.SIGINT)
            assert process.wait(90) == 0, log.text()
        assert host.virsh("domstate", "copy").stdout.strip() == "shut off"
        booting.check_disks(number)
        host.vmrewind("restore", "copy", "--at", "latest", "--output", host.directory / "restored")
        for name in ("vda.raw", "vdb.qcow2"):
            assert (host.directory / "restored" / name).read_bytes() == (booting.kept / name).read_bytes()
        booting.start("copy")


def test_ended_before_its_images_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LibvirtHost() as host:
        booting = Booting(host, tmp_path)
        booting.hold.touch()
        with booting.booted("stops", monkeypatch) as (process, log):
            process.send_signal(signal.SIGINT)
            log.wait_for("asked the guest", 60, lambda: process.poll() is None)
            process.send_signal(signal.SIGINT)
            booting.wait_until_ended("stops")
            booting.hold.unlink()
            assert process.wait(90) == 0, log.text()
            assert "`vmrewind restore stops --in-place` completes them" in log.text()
        assert host.virsh("domstate", "stops").stdout.strip() == "shut off"
        booting.check_disks(0)


def test_killed_before_its_images_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LibvirtHost() as host:
        booting = Booting(host, tmp_path)
        booting.hold.touch()
        with booting.booted("dies", monkeypatch) as (process, log):
            number = booting.acknowledged("dies")
            assert "kept: " not in log.text()
            process.kill()
            process.wait()
            booting.wait_until_ended("dies")
        assert booting.names() == ["web01"]
        host.virsh("define", booting.kept / "dies.xml")
        refused = host.virsh("start", "dies", check=False)
        assert refused.returncode != 0 and "vmrewind restore dies --in-place" in refused.stderr
        host.vmrewind("restore", "dies", "--in-place")
        booting.check_disks(number)
        booting.start("dies")
