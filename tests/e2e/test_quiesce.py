"""A guest with the real agent: frozen for a bookmark while it writes, and what the bookmark is worth afterwards."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
from pathlib import Path

from guests import writer
from guests.images import ext4_files, ext4_image, replay_and_check_ext4, tool
from guests.kernel import linux
from guests.machine import APPEND, Console, qemu_command
from guests.protected import VMREWIND, Disk, ProtectedVm, vmrewind
from tests.capture_tools import MIB, until
from tests.e2e.libvirt_host import LibvirtHost
from tests.vm_tools import restore
from vmrewind.start.freezer import FROZEN_SECONDS_MAX

KIB = 4


def needs_replay(image: Path) -> bool:
    """Whether the ext4's journal is to be replayed before the file system may be used."""
    header = subprocess.run([tool("dumpe2fs"), "-h", image], capture_output=True, text=True, check=True).stdout
    (features,) = [line for line in header.splitlines() if line.startswith("Filesystem features:")]
    return "needs_recovery" in features


def check_without_replay(image: Path, acknowledged: int) -> None:
    """The image holds the acknowledged files, whole, as it is: nothing is replayed."""
    assert not needs_replay(image)
    checked = subprocess.run([tool("e2fsck"), "-fn", image], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    files = {path.name: path for path in ext4_files(image, image.with_suffix(".files")).glob("file-*")}
    for number in range(1, acknowledged + 1):
        assert files[writer.file_name(number)].read_bytes() == writer.content(number, "vda", KIB)


def test_a_quiesced_bookmark_of_a_writing_guest_needs_no_replay(tmp_path: Path) -> None:
    socket = Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "agent.sock"
    words = writer.append(count=0, kib=KIB)
    command = qemu_command(tmp_path / "serial", linux().kernel, writer.writer_initramfs(agent=True), words)
    disk = Disk("vda", ext4_image(tmp_path / "vda.raw", 64 * MIB))
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    with ProtectedVm(tmp_path, "web01", [*command, *writer.agent_arguments(socket)], [disk]) as vm:
        vmrewind("init", vm.repository)
        vm.start()
        vm.wait_for("^ACK 5$")
        before = json.loads(vmrewind("mark", vm.config, "before", "--json").stdout)
        assert before["kind"] == "crash-consistent"
        known = writer.acknowledged(vm.console.text())[-1]
        mark = json.loads(vmrewind("mark", vm.config, "point", "--quiesce", "--json").stdout)
        assert mark["kind"] == "quiesced" and mark["not_frozen"] == [] and mark["seq"] > before["seq"]
        # Whatever instant the command is killed at, the guest writes on.
        for number in range(4):
            killed = subprocess.Popen(
                [VMREWIND, "mark", vm.config, f"killed-{number}", "--quiesce"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            threading.Event().wait(0.3 + chance.random() * 0.5)
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
            last = writer.acknowledged(vm.console.text())[-1]
            vm.wait_for(rf"^ACK {last + 3}$", FROZEN_SECONDS_MAX)
        # What the killed one left behind may still be looking whether the guest is thawed.
        until(lambda: vmrewind("mark", vm.config, "last", "--quiesce", check=False).returncode == 0, "the last bookmark")
        assert writer.errors(vm.console.text()) == [], seed
        vm.quit()
        assert restore(vm, "@point", tmp_path / "point")["kind"] == "quiesced"
        check_without_replay(tmp_path / "point/vda.raw", known)
        # A moment before, and the bookmark of a guest that nobody froze.
        for moment in (f"seq:{before['seq'] + 1}", "@before"):
            assert restore(vm, moment, tmp_path / moment)["kind"] == "crash-consistent"
            assert needs_replay(tmp_path / moment / "vda.raw")
            assert replay_and_check_ext4(tmp_path / moment / "vda.raw") == ""
        said = vmrewind("rewind", vm.config, "--to", "@point").stdout
        assert f"(seq {mark['seq']} of run {mark['run']}, quiesced)" in said
        check_without_replay(disk.image, known)
        # It was set after the moment that it names, and is on the branch that begins there all the same.
        vm.start()
        events = json.loads(vmrewind("timeline", vm.config, "--json").stdout)["events"]
        marks = {event["name"]: event for event in events if event["event"] == "bookmark"}
        assert marks.keys() == {"before", "point"} and marks["point"]["seq"] == mark["seq"]
        assert "@point: quiesced" in vmrewind("timeline", vm.config).stdout


def test_a_domain_is_frozen_through_libvirt(tmp_path: Path) -> None:
    with LibvirtHost() as host:
        console = host.directory / "console"
        kernel = shutil.copy(linux().kernel, host.directory / "kernel")
        initrd = shutil.copy(writer.writer_initramfs(agent=True), host.directory / "initrd")
        image = ext4_image(host.directory / "disk.raw", 32 * MIB)
        host.define(f"""<domain type='qemu'><name>web01</name><memory unit='MiB'>192</memory>
<os><type arch='x86_64'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>{APPEND} {writer.append(count=0, kib=KIB)}</cmdline></os>
<features><acpi/></features><on_reboot>destroy</on_reboot><devices>
<disk type='file'><driver name='qemu' type='raw'/><source file='{image}'/><target dev='vda' bus='virtio'/></disk>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<serial type='file'><source path='{console}'/></serial><memballoon model='none'/></devices></domain>""")
        host.protect("web01", "vda")
        host.virsh("start", "web01")
        Console(console).wait_for("^ACK 5$")
        known = writer.acknowledged(Console(console).text())[-1]
        mark = json.loads(host.vmrewind("mark", "web01", "point", "--quiesce", "--json").stdout)
        assert mark["kind"] == "quiesced"
        last = writer.acknowledged(Console(console).text())[-1]
        Console(console).wait_for(rf"^ACK {last + 3}$")
        # Frozen by somebody else: refused, and left as it is.
        assert host.virsh("domfsfreeze", "web01").stdout.startswith("Froze 1")
        refused = host.vmrewind("mark", "web01", "second", "--quiesce", check=False)
        assert refused.returncode == 11, refused.stderr
        assert host.virsh("domfsthaw", "web01").stdout.startswith("Thawed 1")
        host.virsh("destroy", "web01")
        host.vmrewind("restore", "web01", "--at", "@point", "--output", host.directory / "restored")
        check_without_replay(host.directory / "restored/vda.raw", known)
