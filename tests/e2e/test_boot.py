"""``vmrewind boot``: a moment runs beside the VM, which is not touched; nothing is left behind, or all of it is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from guests.images import ext4_image, qcow2_overlay, replay_and_check_ext4
from guests.initramfs import initramfs
from guests.kernel import linux
from guests.machine import APPEND, Console, qemu_command
from guests.protected import VMREWIND, Disk, ProtectedVm, vmrewind
from tests.e2e.libvirt_host import LibvirtHost
from tests.vm_tools import journal_records

SCRIPT = """\
mount -t ext4 /dev/vda /mnt || echo "ERR mount"
trap 'stop=1' TERM
if [ -e /mnt/precious ]; then echo "THERE $(cat /mnt/precious)"; else echo "MISSING"; fi
grep -q 0x1000 /sys/bus/pci/devices/*/device && echo "NIC"
[ -e /mnt/precious ] || { echo "first life" >/mnt/precious; sync; echo "MADE"; }
n=0
stop=
while [ -z "$stop" ]; do
    n=$((n + 1))
    echo "$n" >/mnt/number && sync && echo "ACK $n" || { echo "ERR write"; exit 1; }
    [ $n -eq 8 ] && { rm /mnt/precious; sync; echo "GONE"; }
    usleep 200000
done
umount /mnt || echo "ERR umount"
echo "DONE $n"
"""
"""A guest that makes a file, deletes it again, and writes on; each life of it tells whether the file was there."""


@dataclass
class Booted:
    """A ``vmrewind boot``; ``console`` has its stderr: the guest's console and what the command says."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]
    console: Console

    def wait_for(self, pattern: str) -> re.Match[str]:
        return self.console.wait_for(pattern, 60, lambda: self.process.poll() is None)

    def end(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(90)


@contextlib.contextmanager
def boot(directory: Path, *arguments: object) -> Iterator[Booted]:
    directory.mkdir(exist_ok=True)
    console = directory / "console"
    with console.open("wb") as log:
        words = [VMREWIND, "boot", *map(str, arguments), "--scratch", directory, "--json"]
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
    ready: dict[str, Any] = {}
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, console.read_text()
        ready = json.loads(line)
        yield Booted(process, ready, Console(console))
    finally:
        process.kill()
        process.communicate()
        with contextlib.suppress(OSError, KeyError):
            if b"vmrewind-monitor" in Path(f"/proc/{ready['pid']}/cmdline").read_bytes():
                os.kill(ready["pid"], signal.SIGKILL)


def gone(pid: int) -> bool:
    """Whether a process has ended, within what a busy machine may take."""
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def protected(directory: Path, *, qcow2: bool) -> ProtectedVm:
    image = ext4_image(directory / "vda.raw", 32 << 20)
    with image.open("r+b") as file:  # where the guest writes nothing, and a copy must not forget
        file.seek(20 << 20)
        file.write(os.urandom(8 << 20))
    if qcow2:
        image = qcow2_overlay(directory / "vda.qcow2", image)
    command = qemu_command(directory / "serial", linux().kernel, initramfs(SCRIPT))
    command += ["-netdev", "user,id=lan,restrict=on", "-device", "virtio-net-pci,netdev=lan,mac=52:54:00:00:00:01"]
    vm = ProtectedVm(directory, "web", command, [Disk("vda", image, "qcow2" if qcow2 else "raw")])
    vmrewind("init", vm.repository)
    return vm


def live_once(vm: ProtectedVm) -> None:
    """A life that ends, with ``@before`` before its file is deleted."""
    mark_before(vm)
    vm.wait_for("^GONE$")
    vm.quit()


def mark_before(vm: ProtectedVm) -> None:
    """Start it, and mark where its file is written and not deleted: that is soon, whatever else takes its time."""
    vm.start(bases=False)
    vm.wait_for("^ACK 2$")
    with vm.paused():
        vmrewind("mark", vm.config, "before")
    vm.wait_for_bases()


def test_a_deleted_file_is_there_beside_the_vm_that_deleted_it(tmp_path: Path) -> None:
    with protected(tmp_path, qcow2=False) as vm:
        mark_before(vm)
        vm.wait_for("^GONE$")
        with vm.paused():
            records, image = journal_records(vm.journal), digest(tmp_path / "vda.raw")
            with boot(tmp_path / "one", vm.config, "--at", "@before", "--network", "lan") as booted:
                booted.wait_for("^THERE first life")
                booted.wait_for("^ACK 2$")
                booted.wait_for("^NIC$")
                assert digest(tmp_path / "vda.raw") == image
                writes = [r for r in journal_records(vm.journal)[len(records) :] if r.get("op") in ("write", "zero", "discard")]
                assert writes == []
                assert booted.ready["name"] != "web" and booted.ready["seconds"] < 20
                line = Path(f"/proc/{booted.ready['pid']}/cmdline").read_bytes().split(b"\0")
                assert any(b"mac=52:54:00" in word for word in line) and not any(b"00:00:00:01" in word for word in line)
                assert b"file:" + bytes(tmp_path / "serial") not in line and "-serial file" in str(booted.ready["left_out"])
                serial = (tmp_path / "serial").read_bytes()
                assert b"THERE" not in serial
                after = vm.console.text()
                assert booted.end(signal.SIGTERM) == 0 and gone(booted.ready["pid"])
                assert not (Path(os.environ["VMREWIND_RUNTIME_DIR"]) / booted.ready["name"]).exists()
            assert vm.running() and "ERR" not in after
        last = int(re.findall(r"^ACK (\d+)$", vm.console.text(), re.MULTILINE)[-1])
        vm.wait_for(rf"^ACK {last + 3}$")
        # What it wrote is nowhere: the same moment is as it was, and killed outright nothing of it stays.
        with boot(tmp_path / "two", vm.config, "--at", "@before", "--name", "again") as booted:
            booted.wait_for("^THERE first life")
            last = int(re.findall(r"^ACK (\d+)$", vm.console.text(), re.MULTILINE)[-1])
            vm.wait_for(rf"^ACK {last + 3}$")
            assert "NIC" not in booted.console.text()
            # Held, so that it is not the guest that ends it when its disk is gone.
            os.kill(booted.ready["pid"], signal.SIGSTOP)
            os.kill(booted.process.pid, signal.SIGKILL)
            assert gone(booted.ready["pid"])
        assert list((tmp_path / "two").iterdir()) == [tmp_path / "two" / "console"]
        assert vm.running()


def test_what_is_kept_is_a_vm_of_its_own(tmp_path: Path) -> None:
    with protected(tmp_path, qcow2=True) as vm:
        live_once(vm)
    kept = tmp_path / "kept"
    with boot(tmp_path / "scratch", vm.config, "--at", "@before", "--keep", kept, "--name", "copy") as booted:
        booted.wait_for("^THERE first life")
        booted.wait_for("kept: ")
        numbers = re.findall(r"^ACK (\d+)$", booted.console.text(), re.MULTILINE)
        booted.wait_for(rf"^ACK {int(numbers[-1] if numbers else 0) + 3}$")
        assert booted.end() == 0, booted.console.text()
        last = int(booted.wait_for(r"^DONE (\d+)")[1])
        assert "ERR" not in booted.console.text()
    assert sorted(path.name for path in kept.iterdir()) == ["copy.toml", "vda.raw"]
    assert replay_and_check_ext4(kept / "vda.raw") == ""
    assert (kept / "vda.raw").read_bytes()[20 << 20 : 28 << 20] == (tmp_path / "vda.raw").read_bytes()[20 << 20 : 28 << 20]
    number = subprocess.run(["debugfs", "-R", "cat /number", kept / "vda.raw"], capture_output=True, text=True, check=True).stdout
    assert int(number) == last, "what the guest wrote after the switch is in the image"
    assert "enabled = false" in (kept / "copy.toml").read_text(), "it is not protected unless asked"
    assert "52:54:00:00:00:01" not in (kept / "copy.toml").read_text()


@pytest.mark.parametrize("qcow2", [False, True])
def test_what_is_protected_has_every_write_from_its_first_one_on(tmp_path: Path, qcow2: bool) -> None:
    with protected(tmp_path, qcow2=qcow2) as vm:
        live_once(vm)
    untouched = digest_of_journal(vm.journal)
    kept = tmp_path / "kept"
    with boot(tmp_path / "scratch", vm.config, "--at", "@before", "--keep", kept, "--protect", "--name", "copy") as booted:
        booted.wait_for("^THERE first life")
        booted.wait_for("^GONE$")
        booted.wait_for("kept: ")
        numbers = re.findall(r"^ACK (\d+)$", booted.console.text(), re.MULTILINE)
        booted.wait_for(rf"^ACK {int(numbers[-1]) + 3}$")
        assert booted.end() == 0, booted.console.text()
        last = int(booted.wait_for(r"^DONE (\d+)")[1])
        assert "ERR" not in booted.console.text()
    assert digest_of_journal(vm.journal) == untouched, "the other VM's history"
    image = kept / ("vda.qcow2" if qcow2 else "vda.raw")
    assert sorted(path.name for path in kept.iterdir()) == ["copy.toml", image.name]
    out = tmp_path / "out"
    for moment, precious, number in (("latest", False, last), ("seq:1", True, None)):
        vmrewind("restore", "copy", "--at", moment, "--output", out / moment)
        restored = out / moment / image.name
        if moment == "latest":
            compared = subprocess.run(["cmp", restored, image], capture_output=True, text=True, check=False)
            assert compared.returncode == 0, compared.stdout + compared.stderr
        raw = out / moment / "flat"
        subprocess.run(["qemu-img", "convert", "-O", "raw", restored, raw], check=True)
        assert replay_and_check_ext4(raw) == ""
        assert (raw.read_bytes()[20 << 20 : 28 << 20]) == (tmp_path / "vda.raw").read_bytes()[20 << 20 : 28 << 20]
        there = subprocess.run(["debugfs", "-R", "cat /precious", raw], capture_output=True, text=True, check=True).stdout
        assert ("first life" in there) == precious
        if number is not None:
            found = subprocess.run(["debugfs", "-R", "cat /number", raw], capture_output=True, text=True, check=True).stdout
            assert int(found) == number


def digest_of_journal(journal: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(journal.glob("*.seg")))).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--network", "wan"], "there are: lan"),
        (["--protect"], "--keep"),
        (["--name", "a/b"], "cannot be a VM's name"),
        (["--keep", "/proc"], "nothing is overwritten"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(stopped: ProtectedVm, arguments: list[str], words: str) -> None:
    done = vmrewind("boot", stopped.config, "--at", "latest", *arguments, check=False)
    assert done.returncode == 2 and words in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProtectedVm]:
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMREWIND_STATE_DIR", str(directory / "state"))
        patch.setenv("VMREWIND_RUNTIME_DIR", str(directory / "run"))
        vm = protected(directory, qcow2=False)
        vmrewind("backup", vm.config)
        vmrewind("ship", "on", vm.config)
    yield vm


def test_a_copy_that_is_broken_off_leaves_nothing(stopped: ProtectedVm, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    script = f"""mount -t tmpfs -o size=4m tmpfs {tmp_path}/small
    "$0" boot {stopped.config} --at latest --keep {tmp_path}/small/kept --json; echo "exit code $?"; ls -A {tmp_path}/small"""
    words = ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", script, VMREWIND]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True)
    ready, error, code = done.stdout.splitlines()
    assert "No space left" in json.loads(error)["message"] and code == "exit code 4"
    assert gone(json.loads(ready)["pid"])


_HELD = """
import os, threading, time
from vmrewind.recover.scratch import Overlay
from vmrewind.start.libvirt import Domain
holds = threading.Event()
read, begin_copy = Overlay.read_into, Domain.begin_copy
def held(self, offset, buffer):
    while offset <= {at} < offset + len(buffer) and os.path.exists({hold!r}):
        holds.set()
        time.sleep(0.01)
    read(self, offset, buffer)
def begin_later(self, target, *rest):
    # to begin the second copy, QEMU waits for the first one's read
    while target == "vdb" and os.path.exists({hold!r}) and not holds.wait(0.01):
        pass
    begin_copy(self, target, *rest)
Overlay.read_into, Domain.begin_copy = held, begin_later
"""
"""What the guest does not read, and a copy must."""


def test_a_libvirt_domain_runs_beside_itself_and_ends_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = tmp_path / "hold"
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(_HELD.format(hold=str(hold), at=40 << 20))
    with LibvirtHost() as host:
        directory = host.directory
        image = ext4_image(directory / "disk.raw", 32 << 20)
        random = os.urandom(1 << 20)
        with image.open("r+b") as file:
            file.truncate(48 << 20)
            file.seek(40 << 20)
            file.write(random)
        base = directory / "base.raw"
        base.write_bytes(random * 4)
        overlay = qcow2_overlay(directory / "overlay.qcow2", base)
        kernel, initrd = (shutil.copy(path, directory) for path in (linux().kernel, initramfs(SCRIPT)))
        console = Console(directory / "console")
        host.define(f"""<domain type='qemu'><name>web01</name><memory unit='MiB'>192</memory>
<os><type arch='x86_64'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{APPEND}</cmdline></os>
<features><acpi/></features><on_reboot>destroy</on_reboot><devices>
<disk type='file'><driver name='qemu' type='raw'/><source file='{image}'/><target dev='vda' bus='virtio'/></disk>
<disk type='file'><driver name='qemu' type='qcow2'/><source file='{overlay}'/><target dev='vdb' bus='virtio'/></disk>
<interface type='ethernet'><mac address='52:54:00:00:00:01'/><model type='virtio'/></interface>
<serial type='file'><source path='{console.path}'/></serial><memballoon model='none'/></devices></domain>""")
        host.protect("web01", "vda", "vdb")
        host.virsh("start", "web01")
        console.wait_for("^ACK 2$")
        host.virsh("suspend", "web01")
        host.vmrewind("mark", "web01", "before")
        host.virsh("resume", "web01")
        console.wait_for("^GONE$")

        def refused(code: int, words: str, *arguments: str | Path) -> None:
            done = host.vmrewind("boot", "web01", "--at", "@before", *arguments, check=False)
            assert done.returncode == code and words in " ".join(done.stderr.split()), (done.stdout, done.stderr)

        def names() -> list[str]:
            return host.virsh("list", "--all", "--name").stdout.split()

        def wait_until_gone(name: str) -> None:
            # libvirt gives a QEMU whose disk does not answer half a minute and more.
            deadline = time.monotonic() + 120
            while name in names():
                assert time.monotonic() < deadline
                time.sleep(0.05)

        @contextlib.contextmanager
        def booted(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any], Console]]:
            log = directory / "boot.log"
            with log.open("wb") as output, monkeypatch.context() as patch:
                patch.setenv("PYTHONPATH", str(tmp_path / "hooks"))
                process = host.popen("boot", "web01", "--at", "@before", "--json", *arguments, stdout=output, stderr=output)
            try:
                ready = Console(log).wait_for('^{.*"ready".*$', 60, lambda: process.poll() is None)[0]
                yield process, json.loads(ready), Console(log)
            finally:
                process.kill()
                process.wait()

        def says(name: str, pattern: str) -> str:
            pty = re.findall(r"/dev/pts/\d+", host.virsh("ttyconsole", name).stdout)[0]
            return host.run("timeout", "40", "sh", "-c", f"grep -m1 -a '{pattern}' <{pty}", check=False).stdout

        kept = directory / "kept"
        (directory / "closed").mkdir(mode=0o700)
        refused(2, "cannot get there", "--keep", directory / "closed" / "kept")
        assert not list((directory / "closed").iterdir())
        (directory / "small").mkdir(mode=0o711)
        host.run("mount", "-t", "tmpfs", "-o", "size=20m,mode=711", "tmpfs", directory / "small")
        refused(4, "could not be copied", "--keep", directory / "small" / "kept")
        assert host.run("ls", directory / "small").stdout == "" and names() == ["web01"]

        hold.touch()
        with booted("--keep", kept) as (process, ready, _):
            name = ready["name"]
            xml = host.virsh("dumpxml", name).stdout
            assert host.virsh("domuuid", name).stdout != host.virsh("domuuid", "web01").stdout
            assert "<interface" not in xml and str(image) not in xml and str(console.path) not in xml
            assert ready["left_out"] == ["<interface>"]
            # libvirt itself ends it when nobody is left who could. Its reads are held: it is not the guest that does.
            process.kill()
            process.wait()
            wait_until_gone(name)
        assert not list(kept.glob("*.xml"))
        shutil.rmtree(kept)
        with booted("--keep", kept) as (process, ready, log):
            time.sleep(3)
            process.send_signal(signal.SIGINT)
            wait_until_gone(ready["name"])
            hold.unlink()
            assert process.wait(60) == 1 and "nothing was kept" in log.text()
            assert not kept.exists() and names() == ["web01"]
        with booted("--keep", kept, "--name", "copy") as (process, ready, log):
            assert "THERE first life" in says("copy", "THERE")
            number = int(re.findall(r"^ACK (\d+)$", console.text(), re.MULTILINE)[-1])
            console.wait_for(rf"^ACK {number + 3}$")
            log.wait_for("kept: ", 60, lambda: process.poll() is None)
            sources = host.virsh("domblklist", "copy").stdout
            assert str(kept / "vda.raw") in sources and str(kept / "vdb.raw") in sources
            refused(2, "copy is being booted already", "--name", "copy")
            number = int(says("copy", "^ACK [1-9]").split()[1])
            process.send_signal(signal.SIGINT)
            assert process.wait(90) == 0, log.text()
        assert host.virsh("domstate", "copy").stdout.strip() == "shut off"
        refused(2, "a domain called copy already", "--name", "copy")
        assert sorted(path.name for path in kept.iterdir()) == ["copy.xml", "vda.raw", "vdb.raw"]
        assert replay_and_check_ext4(kept / "vda.raw") == ""
        there = subprocess.run(
            ["debugfs", "-R", "cat /number", kept / "vda.raw"], capture_output=True, text=True, check=True
        ).stdout
        assert int(there) >= number, "what the guest wrote after the switch is in the image"
        assert (kept / "vda.raw").read_bytes()[40 << 20 : 41 << 20] == random
        assert (kept / "vdb.raw").read_bytes() == base.read_bytes()
        host.virsh("undefine", "copy")
        host.virsh("define", kept / "copy.xml")
        host.virsh("start", "copy")
        assert host.virsh("domstate", "copy").stdout.strip() == "running"
        assert host.virsh("domstate", "web01").stdout.strip() == "running"
        host.virsh("destroy", "copy")
        host.virsh("destroy", "web01")
