"""``vmrewind protect --live``: a running domain becomes protected, or runs on as it was, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from guests import images, writer
from guests.kernel import linux
from guests.machine import APPEND, Console
from tests.e2e.libvirt_host import LibvirtHost
from vmrewind.errors import ConfigError, LibvirtError, RepositoryError, StartError, VmrewindError, VmStateError
from vmrewind.paths import VmPaths
from vmrewind.start.processes import running

MIB = 1 << 20
KIB = 4
PAUSE_SECONDS_MAX = 30
"""A bound that a busy machine keeps, too; what it was is printed."""


@pytest.fixture
def host() -> Iterator[LibvirtHost]:
    with LibvirtHost() as running_host:
        yield running_host


class Acknowledgements:
    """Watches a guest's console: the longest that it was silent."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._times: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Acknowledgements:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = 0
        while not self._done.wait(0.005):
            if (size := self._console.path.stat().st_size) != seen:
                seen = size
                self._times.append(time.monotonic())

    @property
    def longest_seconds(self) -> float:
        return max(after - before for before, after in zip(self._times, self._times[1:], strict=False))


def define_writer(host: LibvirtHost, *disks: tuple[str, Path, str], memory_mib: int = 128) -> Console:
    """A domain whose guest writes numbered files to each disk until it is ended; returns its console, which is never cut short."""
    console = host.directory / "console"
    kernel = shutil.copy(linux().kernel, host.directory / "kernel")
    initrd = shutil.copy(writer.writer_initramfs(), host.directory / "initrd")
    targets = tuple(target for target, _, _ in disks)
    elements = "".join(
        f"<disk type='file'><driver name='qemu' type='{kind}'/><source file='{image}'/><target dev='{target}' bus='virtio'/></disk>"
        for target, image, kind in disks
    )
    host.define(f"""<domain type='qemu'><name>web01</name><memory unit='MiB'>{memory_mib}</memory>
<os><type arch='x86_64'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
<cmdline>{APPEND} {writer.append(count=0, kib=KIB, disks=targets)}</cmdline></os>
<features><acpi/></features><on_reboot>destroy</on_reboot><devices>{elements}
<serial type='file'><source path='{console}' append='on'/></serial><memballoon model='none'/></devices></domain>""")
    return Console(console)


def idle_domain(host: LibvirtHost, name: str = "web01", extra: str = "") -> Path:
    """A machine that needs no guest: it starts, finds nothing to boot, and idles. Returns its image."""
    image = images.raw_image(host.directory / f"{name}.raw", MIB)
    host.define(f"""<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory>
<os><type arch='x86_64'>hvm</type></os><devices>
<disk type='file'><driver name='qemu' type='raw'/><source file='{image}'/><target dev='vda' bus='virtio'/></disk>{extra}
<memballoon model='none'/><graphics type='vnc' passwd='sekrit'><listen type='socket'/></graphics></devices></domain>""")
    return image


def live(host: LibvirtHost, *options: str | Path, name: str = "web01", repository: Path | None = None) -> list[str | Path]:
    """The command's words."""
    where: list[str | Path] = ["--repository", repository or host.repository, "--journal-size", "64MiB"]
    return ["protect", name, "--live", "--json", "--disk", "vda", *where, *options]


def next_acknowledged(console: Console, more: int = 5) -> int:
    """Wait until the guest has written so many files more; returns the last one's number."""
    last = writer.acknowledged(console.text())[-1] + more
    console.wait_for(rf"^ACK {last}$")
    return last


def runs_protected(host: LibvirtHost, name: str = "web01") -> bool:
    """Whether the domain runs protected; that its XML and its processes say the same is checked."""
    assert host.virsh("domstate", name).stdout.strip() == "running"
    keeping = running(VmPaths(name))
    in_xml = "protocol='nbd'" in host.virsh("dumpxml", name).stdout
    assert in_xml == (keeping is not None)
    assert keeping is None or (keeping.protected and keeping.keeper.alive)
    assert host.virsh("managedsave-dumpxml", name, check=False).returncode != 0
    return in_xml


def check_restored(host: LibvirtHost, moment: str, acknowledged: int, kinds: dict[str, str], more: int = 1) -> None:
    """Restored to ``moment``, each disk is sound and holds the acknowledged files, each whole, and at most so many more."""
    output = host.directory / f"restored-{moment.strip('@').replace(':', '')}"
    host.vmrewind("restore", "web01", "--at", moment, "--output", output)
    for target, kind in kinds.items():
        restored = output / f"{target}.{kind}"
        if kind == "qcow2":
            restored = images.qcow2_to_raw(restored, output / "flat.raw")
        assert images.replay_and_check_ext4(restored) == ""
        found = images.ext4_files(restored, output / f"files-{target}").glob("file-*")
        files = {path.name: path.read_bytes() for path in found}
        for number in range(1, acknowledged + 1):
            assert files[writer.file_name(number)] == writer.content(number, target, KIB)
        assert acknowledged <= len(files) <= acknowledged + more


def test_a_guest_under_load_is_protected_and_every_moment_from_then_on_restores(host: LibvirtHost) -> None:
    raw = images.ext4_image(host.directory / "a.raw", 16 * MIB)
    top = images.qcow2_overlay(host.directory / "b.qcow2", images.ext4_image(host.directory / "b.raw", 16 * MIB))
    console = define_writer(host, ("vda", raw, "raw"), ("vdb", top, "qcow2"))
    kinds = {"vda": "raw", "vdb": "qcow2"}
    stored = host.stored_xml("web01")
    host.virsh("start", "web01")
    console.wait_for(r"^ACK 5$")
    before = writer.acknowledged(console.text())[-1]
    with Acknowledgements(console) as watched:
        done = host.vmrewind(*live(host, "--disk", "vdb"))
        next_acknowledged(console)
    assert runs_protected(host)
    report = json.loads(done.stdout)
    assert "can be protected as it runs" in done.stderr and "MiB of its memory" in done.stderr
    told = f"the command says {report['pause_seconds']:.2f} s at most"
    sys.stdout.write(f"the guest was silent for {watched.longest_seconds:.2f} s, {told}\n")
    assert watched.longest_seconds < PAUSE_SECONDS_MAX
    moments = {}
    for _ in range(2):
        # the guest is held for a moment, so that what it was promised until then is known exactly
        host.virsh("suspend", "web01")
        last = writer.acknowledged(console.text())[-1]
        host.vmrewind("mark", "web01", f"after-{last}")
        host.virsh("resume", "web01")
        moments[f"@after-{last}"] = last
        next_acknowledged(console)
    host.virsh("destroy", "web01")
    assert writer.errors(console.text()) == []
    moments["latest"] = writer.acknowledged(console.text())[-1]
    for moment, last in moments.items():
        check_restored(host, moment, last, kinds)
    # what it was promised before the pause is there from the first moment on
    check_restored(host, f"seq:{report['seq']}", before, kinds, more=min(moments.values()) - before)
    # the next cold start is a protected one too, and taking it all back leaves what there was
    host.virsh("start", "web01")
    assert runs_protected(host)
    host.virsh("destroy", "web01")
    host.vmrewind("unprotect", "web01")
    assert host.stored_xml("web01") == stored


def interposed(host: LibvirtHost, monkeypatch: pytest.MonkeyPatch, what: str, exit_code: int, *options: str) -> str:
    """Run the command with something done around one of its calls of libvirt; returns what it says."""
    with monkeypatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent / "interposed"))
        environment.setenv("INTERPOSED", what)
        environment.setenv("INTERPOSED_FILE", str(VmPaths("web01").keeper))
        done = host.vmrewind(*live(host, *options), check=False)
    assert done.returncode == exit_code, (done.stdout, done.stderr)
    return done.stdout


def test_whatever_comes_in_between_the_guest_runs_on_without_an_error(host: LibvirtHost, monkeypatch: pytest.MonkeyPatch) -> None:
    console = define_writer(host, ("vda", images.ext4_image(host.directory / "a.raw", 16 * MIB), "raw"))
    stored = host.stored_xml("web01")
    host.virsh("start", "web01")
    console.wait_for(r"^ACK 5$")
    there, away = host.repository, host.directory / "away"
    journal = VmPaths("web01").default_journal

    # a start that is refused after the save, by the repository and by the journal's storage
    answer = json.loads(
        interposed(host, monkeypatch, f"before create [ -e {away} ] || mv {there} {away}", RepositoryError.exit_code)
    )
    assert "was resumed as it was, unprotected" in answer["message"] and str(there) in answer["message"] and answer["hint"]
    away.rename(there)
    assert not runs_protected(host) and host.stored_xml("web01") == stored
    assert not list(journal.glob("*.seg"))
    next_acknowledged(console)
    spoil = f"[ -f {journal} ] || {{ mv {journal} {journal}.was && touch {journal}; }}"
    answer = json.loads(interposed(host, monkeypatch, f"before create {spoil}", ConfigError.exit_code))
    assert "was resumed as it was, unprotected" in answer["message"]
    journal.unlink()
    journal.with_name("journal.was").rename(journal)
    assert not runs_protected(host) and host.stored_xml("web01") == stored
    next_acknowledged(console)

    # killed: before the save, after it, and when the saved state is a protected one
    interposed(host, monkeypatch, "before managedSave kill", -signal.SIGKILL)
    assert not runs_protected(host)
    next_acknowledged(console)
    for call in ("managedSave", "managedSaveDefineXML"):
        interposed(host, monkeypatch, f"after {call} kill", -signal.SIGKILL)
        assert host.virsh("domstate", "web01").stdout.strip() == "shut off"
        refused = host.vmrewind(*live(host), check=False)
        assert refused.returncode == VmStateError.exit_code and "virsh start web01 resumes it" in json.loads(refused.stdout)["hint"]
        host.virsh("start", "web01")
        assert runs_protected(host) == (call == "managedSaveDefineXML")
        next_acknowledged(console)
    host.virsh("destroy", "web01")
    assert writer.errors(console.text()) == []
    check_restored(host, "latest", writer.acknowledged(console.text())[-1], {"vda": "raw"})


@pytest.mark.parametrize("when", ["during", "after"])
def test_killed_while_the_domain_is_started_it_comes_up_protected(
    host: LibvirtHost, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    idle_domain(host)
    host.virsh("start", "web01")
    interposed(host, monkeypatch, f"{when} create kill", -signal.SIGKILL)
    deadline = time.monotonic() + 60
    while host.virsh("domstate", "web01").stdout.strip() != "running" or "inactive" in host.virsh("domjobinfo", "web01").stdout:
        assert time.monotonic() < deadline
    assert runs_protected(host)
    refused = host.vmrewind(*live(host), check=False)
    assert refused.returncode == VmStateError.exit_code and "runs protected already" in json.loads(refused.stdout)["message"]
    # QEMU's user still gets at the socket, should it have to connect again
    assert VmPaths("web01").runtime.stat().st_mode & 0o777 == 0o710


def test_a_domain_that_cannot_be_brought_back_is_resumed_by_the_command_that_is_named(
    host: LibvirtHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle_domain(host)
    stored = host.stored_xml("web01")
    host.virsh("start", "web01")
    answer = json.loads(interposed(host, monkeypatch, "before create false", VmrewindError.exit_code))
    assert "could not be brought back" in answer["message"] and "its memory is saved" in answer["message"]
    assert host.virsh("domstate", "web01").stdout.strip() == "shut off"
    host.run("sh", "-c", answer["hint"].partition(": ")[2])
    assert not runs_protected(host)
    assert "urn:vmrewind" in host.stored_xml("web01")
    assert VmPaths("web01").before_live.stat().st_mode & 0o777 == 0o600
    host.vmrewind(*live(host))
    assert runs_protected(host) and not VmPaths("web01").before_live.exists()
    host.virsh("destroy", "web01")
    host.vmrewind("unprotect", "web01")
    assert host.stored_xml("web01") == stored
    # resumed from a memory that is older than the disks, it would destroy them
    host.virsh("start", "web01")
    events = VmPaths("web01").events(1 << 63)
    went_on = f"""echo '{{"event": "cpu.started"}}' >{events}; false"""
    answer = json.loads(interposed(host, monkeypatch, f"before create {went_on}", VmrewindError.exit_code))
    assert "does not fit its disks" in answer["message"] and "managedsave-remove" in answer["hint"]
    assert host.virsh("domstate", "web01").stdout.strip() == "shut off"


def test_libvirtd_dies_while_the_domain_is_saved_and_the_domain_comes_back(
    host: LibvirtHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle_domain(host)
    stored = host.stored_xml("web01")
    host.virsh("start", "web01")
    reached, go_on = host.directory / "reached", host.directory / "go-on"
    wait = f"[ -e {reached} ] || {{ touch {reached}; until [ -e {go_on} ]; do sleep 0.05; done; }}"
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(interposed, host, monkeypatch, f"before create {wait}", LibvirtError.exit_code)
        while not reached.exists():
            assert not answer.done(), answer.result()
        host.restart()
        go_on.touch()
        assert "was resumed as it was, unprotected" in answer.result()
    assert not runs_protected(host) and host.stored_xml("web01") == stored
    # and if it is the domain that goes
    ended = interposed(host, monkeypatch, "before managedSave virsh destroy web01", LibvirtError.exit_code)
    assert "has ended meanwhile" in ended and host.stored_xml("web01") == stored


def test_a_paused_domain_stays_paused_and_ctrl_c_comes_too_late(host: LibvirtHost, monkeypatch: pytest.MonkeyPatch) -> None:
    idle_domain(host)
    host.virsh("start", "web01", "--paused")
    answer = json.loads(interposed(host, monkeypatch, "after managedSave kill -INT $PPID; kill -HUP $PPID; kill -TERM $PPID", 0))
    assert answer["pause_seconds"] > 0
    assert host.virsh("domstate", "web01").stdout.strip() == "paused"
    assert running(VmPaths("web01")) is not None
    host.virsh("resume", "web01")
    assert runs_protected(host)


def test_what_cannot_be_protected_as_it_runs_is_refused_and_nothing_changes(host: LibvirtHost) -> None:
    image = idle_domain(host)
    before = host.stored_xml("web01")

    def refused(kind: type[VmrewindError], *, name: str = "web01", repository: Path | None = None) -> str:
        done = host.vmrewind(*live(host, name=name, repository=repository), check=False)
        assert done.returncode == kind.exit_code, (done.stdout, done.stderr)
        error = json.loads(done.stdout)
        assert error["hint"]
        message: str = error["message"]
        return message

    assert "is shut off" in refused(VmStateError)
    host.virsh("start", "web01")
    pid = host.run("cat", "/run/libvirt/qemu/web01.pid").stdout
    # the stored XML has another image than the one that runs
    other = images.raw_image(host.directory / "other.raw", MIB)
    host.define(before.replace(str(image), str(other)))
    assert "is another one in the stored XML" in refused(ConfigError)
    host.define(before)
    assert "there is no repository" in refused(RepositoryError, repository=host.directory)
    Path(VmPaths("web01").state).mkdir(parents=True, exist_ok=True)
    VmPaths("web01").identity.write_text('{"name": "web01", "uuid": "00000000-0000-4000-8000-000000000000"}')
    assert "knows a VM of that name" in refused(VmStateError)
    VmPaths("web01").identity.unlink()
    copy = host.directory / "copy.raw"
    host.virsh("blockcopy", "web01", "vda", copy, "--transient-job", "--bandwidth", "1", "--format", "raw")
    assert "block job" in refused(VmStateError)
    host.virsh("blockjob", "web01", "vda", "--abort")
    # what libvirt itself cannot save
    idle_domain(host, "web02", "<shmem name='s'><model type='ivshmem-plain'/><size unit='M'>1</size></shmem>")
    second = host.stored_xml("web02")
    host.virsh("start", "web02")
    message = refused(LibvirtError, name="web02")
    assert "shmem" in message and "runs on as before, unprotected" in message
    assert not runs_protected(host, "web02") and host.stored_xml("web02") == second
    assert not runs_protected(host) and host.stored_xml("web01") == before
    assert host.run("cat", "/run/libvirt/qemu/web01.pid").stdout == pid
    # a domain that libvirt knows only while it runs
    host.virsh("undefine", "web01")
    assert "is transient" in refused(VmStateError)


def test_a_domain_that_may_start_unprotected_does_and_the_command_says_so(
    host: LibvirtHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle_domain(host)
    host.virsh("start", "web01")
    there, away = host.repository, host.directory / "away"
    options = ("--on-failure", "start-unprotected")
    answer = json.loads(interposed(host, monkeypatch, f"before create mv {there} {away}", StartError.exit_code, *options))
    assert "runs, and is NOT protected" in answer["message"] and str(there) in answer["message"]
    assert host.virsh("domstate", "web01").stdout.strip() == "running"
    keeping = running(VmPaths("web01"))
    assert keeping is not None and not keeping.protected
