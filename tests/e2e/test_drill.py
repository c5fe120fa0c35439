"""``vmrewind verify --drill``: a moment that boots passes, one that does not fails, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guests.grub import INIT_SCRIPT, grub_disk
from guests.initramfs import initramfs
from guests.kernel import linux
from guests.machine import APPEND, qemu_command
from guests.protected import VMREWIND, Disk, ProtectedVm, vmrewind
from vmrewind.errors import SpaceError, StartError
from vmrewind.history.resolve import resolve
from vmrewind.recover.drill import Wanted
from vmrewind.recover.drill import drill as drill_it
from vmrewind.recover.drill_machine import DrillMachine, machine_of
from vmrewind.recover.restore import RestoredDisk
from vmrewind.repository.repository import Repository
from vmrewind.start.resolve import StoredVm

Usage = namedtuple("Usage", ["total", "used", "free"])

XML = b"""<domain type='qemu'><name>web</name><memory unit='MiB'>192</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os>
<devices><interface type='network'/><hostdev mode='subsystem' type='pci'/>
<disk type='network' device='disk'><target dev='vda' bus='sata'/></disk></devices></domain>"""


class Stored:
    """A VM of which just a repository is left: at ``sound`` its disk boots itself, at ``latest`` its first MiB is zeroes."""

    def __init__(self, directory: Path) -> None:
        disk = grub_disk(directory / "vda.raw")
        command = [*qemu_command(directory / "serial"), "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n"]
        self.vm = ProtectedVm(directory, "web", command, [Disk("vda", disk.path)])
        vmrewind("init", self.vm.repository)
        vmrewind("backup", self.vm.config)
        self.sound = self._newest()
        with subprocess.Popen([VMREWIND, "capture", self.vm.config], stdout=subprocess.PIPE, text=True) as capture:
            assert capture.stdout is not None
            uri = json.loads(capture.stdout.readline())["disks"]["vda"]["uri"]
            subprocess.run(
                ["qemu-io", "-f", "raw", "-c", "write -z 0 1M", "-c", "flush", uri], check=True, stdout=subprocess.DEVNULL
            )
            capture.send_signal(signal.SIGTERM)
        vmrewind("ship", "on", self.vm.config)
        self.stored = f"{self.vm.repository}/web"

    def _newest(self) -> str:
        return f"seq:{self.vm.status()['last_record']['seq']}"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    directory = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMREWIND_STATE_DIR", str(directory / "state"))
        patch.setenv("VMREWIND_RUNTIME_DIR", str(directory / "run"))
        made = Stored(directory)
    yield made


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    directory = tmp_path / "scratch"
    directory.mkdir()
    return directory


def drill(stored: Stored, scratch: Path, *arguments: str) -> tuple[int, dict[str, object]]:
    done = vmrewind("verify", stored.stored, "--drill", "--scratch", scratch, "--json", *arguments, check=False)
    assert list(scratch.iterdir()) == []
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def machines(scratch: Path) -> list[int]:
    """Pids of the QEMUs that have a disk of this scratch directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(scratch).encode() in words and b"qemu-system" in words.split(b"\0")[0]:
            found.append(int(process.name))
    return found


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_moment_that_boots_passes(stored: Stored, scratch: Path) -> None:
    code, told = drill(stored, scratch, "--at", stored.sound, "--until", "GUEST WROTE", "--seconds", "120")
    assert (code, told["drill"]) == (0, "passed"), told
    assert told["seed"] is None
    assert "virtio-net" in str(told["left_out"]), "no network"
    assert "-netdev" in str(told["left_out"])
    assert float(str(told["restore_seconds"])) > 0 < float(str(told["boot_seconds"]))


def test_a_moment_that_does_not_boot_fails(stored: Stored, scratch: Path) -> None:
    code, told = drill(stored, scratch, "--at", "latest", "--until", "GRUB STARTED", "--seconds", "4")
    assert (code, told["drill"]) == (1, "failed")
    assert "did not appear" in str(told["outcome"]) or "ended before" in str(told["outcome"])


def test_a_sign_that_never_comes_fails_in_time_and_the_seed_chooses_the_same_moment(stored: Stored, scratch: Path) -> None:
    code, told = drill(stored, scratch, "--until", "NEVER", "--seconds", "1")
    assert (code, told["drill"]) == (1, "failed")
    # The same seed, and without a text it is the guest agent that must answer.
    code, again = drill(stored, scratch, "--seconds", "1", "--seed", str(told["seed"]))
    assert (code, again["seq"], again["seed"]) == (1, told["seq"], told["seed"])
    assert "the guest agent did not answer within 1 s" in str(again["outcome"])


def test_a_libvirt_domain_boots_in_a_qemu_of_our_own(stored: Stored, scratch: Path) -> None:
    with configured(stored, "xml", XML):
        code, told = drill(stored, scratch, "--at", stored.sound, "--until", "GRUB STARTED", "--seconds", "60")
    assert code == 0, told
    assert told["left_out"] == ["<interface>", "<hostdev>"]


@contextmanager
def configured(stored: Stored, suffix: str, document: bytes) -> Iterator[None]:
    """With another configuration as the only one in the repository: a run's own goes before what is newer."""
    repository = Repository.open(str(stored.vm.repository)).vm("web")
    store = repository.repository.store
    own = {name.key: store.get(name.key) for name in repository.configs()}
    time_ns = repository.configs()[-1].time_ns + 1_000_000
    for key in own:
        store.delete(key)
    repository.put_config(time_ns, suffix, document)
    key = repository.configs()[-1].key
    try:
        yield
    finally:
        store.delete(key)
        for key, data in own.items():
            store.put(key, data)


def test_what_another_host_has_configured_since_is_not_what_boots(stored: Stored, scratch: Path) -> None:
    repository = Repository.open(str(stored.vm.repository)).vm("web")
    newest = repository.configs()[-1].time_ns
    repository.put_config(newest + 1_000_000, "xml", XML.replace(b"machine='q35'", b"machine='none-such'"))
    try:
        code, told = drill(stored, scratch, "--at", stored.sound, "--until", "GRUB STARTED", "--seconds", "60")
    finally:
        repository.repository.store.delete(repository.configs()[-1].key)
    assert (code, told["drill"]) == (0, "passed"), told


@pytest.mark.parametrize("suffix", ["toml", "xml"])
def test_a_vm_that_boots_by_a_kernel_outside_its_disks(stored: Stored, scratch: Path, suffix: str) -> None:
    kernel, initrd = linux().kernel, initramfs(INIT_SCRIPT)
    if suffix == "toml":
        command = qemu_command(scratch / "serial", kernel, initrd)
        document = f'[qemu]\ncommand = {json.dumps(command)}\n[[protection.disk]]\ntarget = "vda"\n'.encode()
    else:
        boot = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{APPEND}</cmdline></os>"
        document = XML.replace(b"</os>", boot.encode()).replace(b"sata", b"virtio")
    with configured(stored, suffix, document):
        code, told = drill(stored, scratch, "--at", stored.sound, "--until", "GUEST WROTE", "--seconds", "120")
    assert (code, told["drill"]) == (0, "passed"), told


def test_a_machine_that_qemu_refuses_says_nothing_of_the_moment(stored: Stored, scratch: Path) -> None:
    document = XML.replace(b"machine='q35'", b"machine='none-such'")
    with configured(stored, "xml", document):
        done = vmrewind("verify", stored.stored, "--drill", "--at", stored.sound, "--scratch", scratch, check=False)
    assert done.returncode == StartError.exit_code
    assert "could not be tried" in done.stderr
    assert "unsupported machine type" in done.stderr
    assert list(scratch.iterdir()) == []


def test_a_place_in_the_boot_order_is_given_once() -> None:
    disks = [RestoredDisk(target, Path(target), "raw", 1, 1, "", None) for target in ("vda", "vdb", "vdc")]
    machine = DrillMachine(
        ["qemu", "-device", "scsi-hd,drive=vda,bootindex=2"], {"vda": "", "vdb": "nvme", "vdc": "nvme,bootindex=3"}
    )
    words = " ".join(machine.with_disks(disks, 9))
    assert sorted(re.findall(r"drive=(\w+),bootindex=(\d)|bootindex=(\d),drive=(\w+)", words)) == [
        ("", "", "3", "vdc"), ("vda", "2", "", ""), ("vdb", "1", "", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(stored: Stored, scratch: Path, number: signal.Signals) -> None:
    # A machine that does not boot does not end either, by itself.
    command = [VMREWIND, "verify", stored.stored, "--drill", "--at", "latest", "--scratch", scratch, "--until", "NEVER"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        wait_until(lambda: machines(scratch) or process.poll() is not None, "the machine runs")
        (pid,) = machines(scratch)
        process.send_signal(number)
        assert process.wait(60) == (130 if number != signal.SIGKILL else -signal.SIGKILL)
    wait_until(lambda: not machines(scratch), f"QEMU {pid} ends")
    if number != signal.SIGKILL:
        assert list(scratch.iterdir()) == []


def test_too_little_space_is_told_before_anything_is_restored(
    stored: Stored, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 2**30 - 2**20, 2**20))
    with StoredVm("web", str(stored.vm.repository)).history() as history:
        position = resolve(history, history.branch(), stored.sound, ["vda"])
        with pytest.raises(SpaceError, match=f"{scratch}: 1048576 bytes are free"):
            drill_it(history, ["vda"], position, Wanted("NEVER", 1, scratch), lambda *_: pytest.fail("nothing is restored"))
    assert list(scratch.iterdir()) == []


def test_the_machine_is_ended_with_the_drill_though_its_process_lives_on(stored: Stored, scratch: Path) -> None:
    with StoredVm("web", str(stored.vm.repository)).history() as history:
        position = resolve(history, history.branch(), "latest", ["vda"])
        result = drill_it(history, ["vda"], position, Wanted("NEVER", 1, scratch), lambda *_: None)
    assert not result.passed
    assert machines(scratch) == []
    assert list(scratch.iterdir()) == []


def test_what_does_not_make_sense_is_refused(stored: Stored, scratch: Path) -> None:
    assert vmrewind("verify", stored.stored, "--drill", "--scratch", scratch / "none", check=False).returncode == 2
    assert vmrewind("verify", str(stored.vm.repository), "--drill", check=False).returncode == 2
    assert vmrewind("verify", stored.stored, "--at", "latest", check=False).returncode == 2


def test_of_a_command_line_only_what_boots_the_machine_is_kept() -> None:
    document = b"""
[qemu]
command = ["qemu-system-x86_64", "-m", "256", "--nic", "user", "-drive", "file=/other.raw,if=virtio", "-qmp", "unix:/x,server=on",
 "-drive", "if=pflash,format=raw,readonly=on,file=/code.fd", "-drive", "if=pflash,format=raw,file=/vars.fd", "-daemonize",
 "-device", "virtio-scsi-pci,id=s", "-device", "scsi-hd,drive=sda,bus=s.0", "-device", "scsi-hd,drive=foreign",
 "-device", "vfio-pci,host=1",
 "/another.raw", "-S", "-virtfs", "local,path=/home"]
[[protection.disk]]
target = "sda"
device = "none"
[[protection.disk]]
target = "vda"
"""
    machine = machine_of(document, "toml", "a test")
    assert machine.command == [
        "qemu-system-x86_64", "-m", "256", "-drive", "if=pflash,format=raw,readonly=on,file=/code.fd",
        "-device", "virtio-scsi-pci,id=s", "-device", "scsi-hd,drive=sda,bus=s.0",
    ]  # fmt: skip
    assert machine.devices == {"sda": "", "vda": "virtio-blk-pci"}
    assert len(machine.left_out) == 10
