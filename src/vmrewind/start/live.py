"""Protecting a domain that runs: it is saved, the disks in its saved state are swapped for capture's, and it is started again.

So it comes up by the very same path as any protected start. At no time do two processes write an image: libvirt starts no QEMU
before the old one has ended. Killed at any point, this leaves a domain that runs, or one that ``virsh start`` resumes from its
saved state, in one of its two forms; both are told by the XML alone, so nothing is noted besides. Whatever fails after the save
brings the domain back as it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmrewind.errors import ConfigError, LibvirtError, StartError, UsageError, VmrewindError, VmStateError
from vmrewind.journal.runs import RunInfo, private, read_run, write_durably
from vmrewind.paths import VmPaths
from vmrewind.start.hook import stop_keeper
from vmrewind.start.hook_script import Installed
from vmrewind.start.libvirt import Domain, Libvirt, qemu_owner
from vmrewind.start.live_checks import check_history, check_space, rehearse, storage_of, write_rate
from vmrewind.start.places import make_places
from vmrewind.start.processes import running
from vmrewind.start.signals import uninterrupted
from vmrewind.vmconfig.domain import parse_domain
from vmrewind.vmconfig.model import VmConfig
from vmrewind.vmconfig.rewrite import Rewritten, protect_domain
from vmrewind.vmconfig.xml import has_protection

RECONNECT_SECONDS: Final = 30.0
"""How long a libvirt that went away in the middle is waited for."""
_RECONNECT_POLL_SECONDS: Final = 0.2
_HOOK_FAILED: Final = re.compile(r"unexpected exit status (\d+): vmrewind: (.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A domain that can be protected as it runs. Nothing has changed yet; ``go`` does it."""

    uri: str
    name: str
    config: VmConfig
    before: bytes
    """The stored XML as it is."""
    after: Rewritten
    hook: Installed
    memory_bytes: int
    """About what is to be saved and read back while the VM stands still."""
    rate: float | None
    """Bytes a second that the storage took just now."""
    reconnect: bool
    snapshots: int
    paused: bool
    """Somebody had paused it."""
    reserved: Sequence[Path]
    """What the journal's space was reserved with just now."""


@dataclass(frozen=True, slots=True)
class Protected:
    """A domain that runs on, protected from the first record of ``run`` on. Its CPU stood still for ``pause_seconds`` at most."""

    run: RunInfo
    pause_seconds: float


def prepare(libvirt: Libvirt, uri: str, name: str, targets: Sequence[str], changes: Mapping[str, object]) -> Prepared:
    """Look whether the running domain can be protected, and try all that can fail. Raises what stands in the way."""
    domain = libvirt.domain(name)
    paths = VmPaths(name)
    domain.require_savable()
    runs_with = domain.running_xml()
    if has_protection(runs_with):
        raise VmStateError(
            f"domain {name!r} runs protected already",
            f"vmrewind status {name} tells more; other disks or settings: shut it down and leave out --live",
        )
    before = domain.stored_xml(passwords=True)
    if not targets and not has_protection(before):
        raise UsageError(f"{name}: no disk is named", "name each disk to protect: --disk vda (virsh domblklist shows them)")
    reconnect = libvirt.knows_reconnect
    socket = str(paths.nbd_socket)
    after = protect_domain(before, targets, socket=socket, reconnect=reconnect, changes=changes)
    swapped = swap(runs_with, after, socket, reconnect=reconnect)
    if swapped.protection != after.protection:
        raise ConfigError(
            f"domain {name!r}: a disk's image or format is another one in the stored XML than in the running domain",
            "compare virsh dumpxml with virsh dumpxml --inactive; shut the domain down and leave out --live",
        )
    config = parse_domain(swapped.xml)
    assert config is not None, "it was protected just now"
    chosen = [disk.target for disk in config.protection.disk]
    if busy := domain.busy_disks(chosen):
        raise VmStateError(f"domain {name!r}: a block job works on {', '.join(busy)}", f"virsh blockjob {name} {busy[0]} shows it")
    repository = check_history(config, paths)
    expected, largest = domain.memory_bytes
    check_space(largest)
    assert config.uuid is not None, "libvirt gives every domain one"
    repository.register(config.uuid)
    rate = write_rate(expected)
    hook, reserved = rehearse(config, paths, swapped.xml, libvirt.version)
    return Prepared(uri, name, config, before, after, hook, expected, rate, reconnect, domain.snapshots, domain.paused, reserved)


def swap(xml: bytes, after: Rewritten, socket: str, *, reconnect: bool) -> Rewritten:
    """The XML of a running or saved domain with the disks that ``after`` protects behind the socket, under the same settings."""
    protection = after.protection
    fields = {name: getattr(protection, name) for name in protection.__struct_fields__ if name not in ("enabled", "disk")}
    targets = [disk.target for disk in protection.disk]
    return protect_domain(xml, targets, socket=socket, reconnect=reconnect, changes=fields)


@contextlib.contextmanager
def claimed(name: str) -> Iterator[None]:
    """One such command for a domain at a time. Raises VmStateError."""
    paths = VmPaths(name)
    make_places(paths, qemu_owner())
    with open(paths.runtime / "live.lock", "w", opener=private) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VmStateError(f"domain {name!r} is being protected by another command", "wait for it") from None
        yield


def go(prepared: Prepared) -> Protected:
    """Save the domain, swap its disks, start it. Raises why that failed; the domain is then as it was, or the hint says how to
    get there."""
    with uninterrupted():
        return _Switch(prepared).go()


class _Switch:
    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._name = prepared.name
        self._paths = VmPaths(prepared.name)
        self._saved: bytes | None = None
        """The XML that the domain was saved with."""
        self._began = 0.0
        self._saved_ns = 0

    def go(self) -> Protected:
        try:
            with Libvirt(self._prepared.uri) as libvirt:
                self._store(libvirt)
                domain = libvirt.domain(self._name)
                self._began, self._saved_ns = time.monotonic(), time.time_ns()
                domain.save()
                self._saved = domain.saved_xml()
                socket = str(self._paths.nbd_socket)
                domain.define_saved(swap(self._saved, self._prepared.after, socket, reconnect=self._prepared.reconnect).xml)
                domain.start()
                pause_seconds = time.monotonic() - self._began
        except Exception as error:  # noqa: BLE001 - whatever it is, the domain must not stay down
            pause_seconds = self._bring_back(_plain(error))
        return self._protected(pause_seconds)

    def _store(self, libvirt: Libvirt) -> None:
        """The next cold start is to be a protected one too."""
        libvirt.define(self._prepared.after.xml)
        stored = parse_domain(libvirt.domain(self._name).stored_xml(passwords=False))
        if stored is None or stored.protection != self._prepared.after.protection:
            raise LibvirtError(
                f"domain {self._name!r}: libvirt did not keep what was written into its XML",
                "report this with the libvirt version (virsh version) and the domain's XML",
            )

    def _protected(self, pause_seconds: float) -> Protected:
        """The domain runs with capture's disks; raises StartError if it may do so without capture (``on_failure``)."""
        with self._reconnected() as libvirt:
            domain = libvirt.domain(self._name)
            if domain.has_saved_state:
                # libvirt forgets it after a start, but not if it was killed in between; resumed once more, it would harm the disks
                domain.forget_saved_state()
        keeping = running(self._paths)
        if keeping is None or not keeping.protected:
            why = keeping.trouble if keeping is not None else None
            raise StartError(
                f"{self._name} runs, and is NOT protected{': ' + why if why else ''}",
                f"mend that, then shut it down and start it: vmrewind status {self._name}",
            )
        self._paths.before_live.unlink(missing_ok=True)
        return Protected(read_run(storage_of(self._prepared.config), int(keeping.run, 16)), pause_seconds)

    def _bring_back(self, error: VmrewindError) -> float:
        """Have the domain run as it did before ``error``, and raise it. Should the domain run with capture's disks all the same,
        returns the seconds that it stood still at most."""
        try:
            with self._reconnected() as libvirt:
                domain = libvirt.domain(self._name)
                if domain.active and has_protection(domain.running_xml()):
                    if domain.paused != self._prepared.paused:
                        raise LibvirtError(f"it is protected, and paused: virsh resume {self._name} lets it go on")
                    return time.monotonic() - self._began
                outcome = self._resume_as_it_was(domain)
                libvirt.define(self._prepared.before)
        except Exception as second:  # noqa: BLE001 - whatever it is, the user must hear what helps
            raise self._stuck(error, _plain(second)) from error
        with contextlib.suppress(OSError):
            for segment in self._prepared.reserved:
                segment.unlink(missing_ok=True)
        raise type(error)(f"{error}; {self._name} {outcome}", "mend what it names, then repeat the command") from error

    def _resume_as_it_was(self, domain: Domain) -> str:
        if domain.active:
            return "runs on as before, unprotected"
        if not domain.has_saved_state:
            return "has ended meanwhile; its XML is as it was"
        stop_keeper(self._paths)
        if self._may_have_gone_on():
            raise _GoneOn(
                "it may have gone on, protected, after the save, and has ended: its saved memory does not fit its disks any more",
                f"virsh managedsave-remove {self._name}, then virsh start: protected, as after a power failure",
            )
        if self._saved is not None:
            domain.define_saved(self._saved)
        domain.start()
        return "was resumed as it was, unprotected"

    def _may_have_gone_on(self) -> bool:
        """Whether a CPU was started since the save: libvirt forgets the saved state only after that."""
        logs = (path for path in self._paths.events(0).parent.glob("*.jsonl") if path.stat().st_mtime_ns >= self._saved_ns)
        return any('"event": "cpu.started"' in log.read_text() for log in logs)

    def _stuck(self, error: VmrewindError, second: VmrewindError) -> VmrewindError:
        """It could not be brought back either: say what does."""
        if isinstance(second, _GoneOn):
            return type(error)(f"{error}; {self._name} could not be brought back: {second}", second.hint)
        if self._saved_ns and self._may_have_gone_on():
            return type(error)(
                f"{error}; and what {self._name} does now cannot be seen: {second.in_full}. It may have gone on, protected, "
                "after the save: its saved memory does not fit its disks any more, and must not be resumed",
                f"virsh managedsave-remove {self._name}; unless it runs (virsh domstate {self._name}), virsh start {self._name}",
            )
        resume = f"virsh start {self._name}"
        if self._saved is not None:
            kept = self._paths.before_live
            with contextlib.suppress(OSError):
                write_durably(kept, self._saved)
                resume = f"virsh managedsave-define {self._name} {kept} && {resume}"
        return type(error)(
            f"{error}; and {self._name} could not be brought back: {second.in_full}. Nothing is lost: "
            "if it does not run, its memory is saved, and its disks are as they were then",
            f"unless it runs (virsh domstate {self._name}): {resume}",
        )

    def _reconnected(self) -> Libvirt:
        """A connection of its own: the old one is of no use if libvirt was restarted."""
        deadline = time.monotonic() + RECONNECT_SECONDS
        while True:
            try:
                return Libvirt(self._prepared.uri)
            except LibvirtError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_RECONNECT_POLL_SECONDS)


class _GoneOn(VmStateError):
    """The saved memory may be older than the disks."""


def _plain(error: Exception) -> VmrewindError:
    """What the hook said, as an error of its own class, out of libvirt's report of it; any other error in our words."""
    if not isinstance(error, VmrewindError):
        return VmrewindError(f"{type(error).__name__}: {error}")
    found = _HOOK_FAILED.search(str(error))
    if found is None:
        return error
    classes = {cls.exit_code: cls for cls in VmrewindError.__subclasses__()}
    failed = classes.get(int(found[1]), StartError)
    return failed(f"the protected start failed: {found[2].strip()}")
