"""libvirt, as far as protecting a domain needs it: finding it, its stored XML, storing another, and whom QEMU runs as.

libvirt-python is imported when a connection is opened: it is an extra, and nothing that runs inside a hook may need it.
"""

from __future__ import annotations

import grp
import importlib
import pwd
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from xml.sax.saxutils import quoteattr, unescape

from vmrewind.errors import LibvirtError, VmStateError
from vmrewind.vmconfig.xml import disk_elements, parse_xml

DEFAULT_URI: Final = "qemu:///system"
LOCAL_SYSTEM: Final = re.compile(r"qemu(\+unix)?:///system(\?.*)?")
RECONNECT_SINCE: Final = 9_002_000
"""libvirt 9.2.0 is the first that passes ``<reconnect>`` of an NBD source on; earlier ones drop it silently."""
SYNCHRONOUS_COPY_SINCE: Final = 8_000_000
QEMU_CONF: Final = Path("/etc/libvirt/qemu.conf")
QEMU_USERS: Final = ("libvirt-qemu", "qemu")
"""Whom QEMU runs as unless qemu.conf says otherwise: the distributions' choices (Debian and its kin; Red Hat, SUSE)."""


class Libvirt:
    """A connection to this host's system libvirt. A context manager; every failure is a LibvirtError."""

    def __init__(self, uri: str = DEFAULT_URI) -> None:
        if not LOCAL_SYSTEM.fullmatch(uri):
            raise LibvirtError(
                f"{uri}: only this host's system libvirt can protect VMs, because hooks and images are local",
                f"run vmrewind on the host that runs the VM, with {DEFAULT_URI}",
            )
        try:
            self._module: Any = importlib.import_module("libvirt")
        except ImportError as error:
            raise LibvirtError(
                f"libvirt's Python module cannot be imported: {error}",
                "apt install python3-libvirt, or pip install 'vmrewind[libvirt]'",
            ) from None
        # the module prints every error to stderr by itself unless it is told where else to put it
        self._module.registerErrorHandler(lambda *_: None, None)
        try:
            self._connection: Any = self._module.open(uri)
        except self._module.libvirtError as error:
            raise LibvirtError(f"{uri}: {_message(error)}", "is libvirtd (or virtqemud) running, and are you root?") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()

    @property
    def version(self) -> int:
        """The daemon's version: 1,000,000 * major + 1,000 * minor + release."""
        return int(self._connection.getLibVersion())

    @property
    def knows_reconnect(self) -> bool:
        """Whether a network disk can be told to wait for its server to come back."""
        return self.version >= RECONNECT_SINCE

    @property
    def copies_synchronously(self) -> bool:
        """Whether a copy can take the guest's writes as they come, so that a busy guest cannot keep it from becoming level."""
        return self.version >= SYNCHRONOUS_COPY_SINCE and hasattr(self._module, "VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES")

    def knows(self, name: str) -> bool:
        """Whether there is a domain of that name, running or not."""
        try:
            self._connection.lookupByName(name)
        except self._module.libvirtError as error:
            if error.get_error_code() == self._module.VIR_ERR_NO_DOMAIN:
                return False
            raise LibvirtError(f"domain {name!r}: {_message(error)}", "is libvirtd running?") from None
        return True

    def domain(self, name: str) -> Domain:
        """The domain called ``name``. Raises LibvirtError if there is none."""
        try:
            return Domain(self._module, self._connection.lookupByName(name))
        except self._module.libvirtError as error:
            raise LibvirtError(f"domain {name!r}: {_message(error)}", "virsh list --all shows what there is") from None

    def define(self, xml: bytes) -> None:
        """Store a domain's XML in place of what is stored under its UUID."""
        try:
            self._connection.defineXML(xml.decode())
        except self._module.libvirtError as error:
            raise LibvirtError(f"libvirt refuses the domain's new XML: {_message(error)}", "the domain is unchanged") from None

    def start_transient(self, xml: bytes) -> Domain:
        """Start a domain that libvirt knows only while it runs, and ends when this connection does, however that comes."""
        try:
            return Domain(self._module, self._connection.createXML(xml.decode(), self._module.VIR_DOMAIN_START_AUTODESTROY))
        except self._module.libvirtError as error:
            raise LibvirtError(f"libvirt does not start it: {_message(error)}", "journalctl -u libvirtd may tell more") from None


@dataclass(frozen=True, slots=True)
class DiskCopy:
    """How far a copy is; ``level`` once the image has all that the disk has, and gets what is written from then on."""

    done_bytes: int
    total_bytes: int
    level: bool


class Domain:
    """One domain."""

    def __init__(self, module: Any, handle: Any) -> None:
        self._module = module
        self._handle = handle
        self.name: str = handle.name()

    def stored_xml(self, *, passwords: bool) -> bytes:
        """The XML that the next start uses. To define the domain again, its passwords (VNC, SPICE) are needed too."""
        flags = self._module.VIR_DOMAIN_XML_INACTIVE | (self._module.VIR_DOMAIN_XML_SECURE if passwords else 0)
        try:
            text: str = self._handle.XMLDesc(flags)
        except self._module.libvirtError as error:
            raise LibvirtError(f"domain {self.name!r}: {_message(error)}", "are you root?") from None
        return text.encode()

    @property
    def snapshots(self) -> int:
        """How many snapshots the domain has; each holds the XML of its time."""
        return int(self._handle.snapshotNum())

    def require_stopped(self, otherwise: str = "") -> None:
        """Raises VmStateError unless the domain is persistent, shut off, and would start from its stored XML.

        ``otherwise``: what can be done instead while it runs.
        """
        if not self._handle.isPersistent():
            raise VmStateError(f"domain {self.name!r} is transient: it has no stored XML to change", "virsh define it first")
        if self._handle.isActive():
            raise VmStateError(f"domain {self.name!r} is running", f"shut it down first: virsh shutdown {self.name}{otherwise}")
        if self._handle.hasManagedSaveImage():
            raise VmStateError(
                f"domain {self.name!r} has a saved state, which would resume with the disks that it was saved with",
                f"start it and shut it down properly, or give the state up: virsh managedsave-remove {self.name}",
            )

    def running_xml(self) -> bytes:
        """The XML of the domain as it runs, with its passwords, in the form that its saved state has it. Raises LibvirtError."""
        with self._asking("are you root?"):
            text: str = self._handle.XMLDesc(self._module.VIR_DOMAIN_XML_SECURE | self._module.VIR_DOMAIN_XML_MIGRATABLE)
        return text.encode()

    def require_savable(self) -> None:
        """Raises VmStateError unless the domain is persistent, runs or was paused by somebody, and nothing is being done to it."""
        with self._asking("is libvirtd running?"):
            state, reason = self._handle.state()
            if not self._handle.isPersistent():
                raise VmStateError(f"domain {self.name!r} is transient: it has no stored XML to change", "virsh define it first")
            saved = self.has_saved_state
            job = self._handle.jobInfo()[0] if self._handle.isActive() else self._module.VIR_DOMAIN_JOB_NONE
        module = self._module
        if saved and state == module.VIR_DOMAIN_SHUTOFF:
            raise VmStateError(
                f"domain {self.name!r} is shut off and has a saved state", f"virsh start {self.name} resumes it; then repeat this"
            )
        if saved:
            raise VmStateError(
                f"domain {self.name!r} runs, and has an older saved state: resumed by a later start, it would destroy the disks",
                f"virsh managedsave-remove {self.name}: it is of no use any more",
            )
        if state == module.VIR_DOMAIN_SHUTOFF:
            raise VmStateError(f"domain {self.name!r} is shut off", "leave out --live: it is protected from its next start on")
        by_somebody = (module.VIR_DOMAIN_PAUSED_USER, module.VIR_DOMAIN_PAUSED_UNKNOWN, module.VIR_DOMAIN_PAUSED_FROM_SNAPSHOT)
        if state not in (module.VIR_DOMAIN_RUNNING, module.VIR_DOMAIN_BLOCKED) and (
            state != module.VIR_DOMAIN_PAUSED or reason not in by_somebody
        ):
            raise VmStateError(
                f"domain {self.name!r} neither runs nor was it paused by somebody (virsh domstate --reason {self.name})",
                "have it run, or shut it down and leave out --live",
            )
        if job != module.VIR_DOMAIN_JOB_NONE:
            raise VmStateError(
                f"libvirt is doing something with domain {self.name!r}", f"wait for it: virsh domjobinfo {self.name}"
            )

    def busy_disks(self, targets: list[str]) -> list[str]:
        """Those of the disks that a block job works on. Raises LibvirtError."""
        with self._asking(f"virsh domblklist {self.name}"):
            return [target for target in targets if self._handle.blockJobInfo(target, 0)]

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """About how much of its memory a saved state has to hold, and how much it may be at most. Raises LibvirtError."""
        with self._asking("is it running?"):
            largest = int(self._handle.maxMemory()) << 10
            resident = int(self._handle.memoryStats().get("rss", 0)) << 10
        return min(resident, largest) or largest, largest

    @property
    def has_saved_state(self) -> bool:
        """Whether the next start resumes it from where it was saved."""
        return bool(self._handle.hasManagedSaveImage())

    def save(self) -> None:
        """Stop the CPU, save the memory, end QEMU. The domain runs on if it cannot be saved. Raises LibvirtError."""
        with self._asking("nothing has changed; what libvirt names is in the way of saving its memory"):
            self._handle.managedSave()

    def saved_xml(self) -> bytes:
        """The XML that the saved state resumes with, with its passwords. Raises LibvirtError."""
        with self._asking(f"virsh start {self.name} resumes it"):
            text: str = self._handle.managedSaveGetXMLDesc(self._module.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE)
        return text.encode()

    def define_saved(self, xml: bytes) -> None:
        """Have the saved state resume with other XML of the same machine. Raises LibvirtError."""
        with self._asking(f"virsh start {self.name} resumes it"):
            self._handle.managedSaveDefineXML(xml.decode())

    def forget_saved_state(self) -> None:
        """Remove a saved state that the domain was resumed from. Raises LibvirtError."""
        with self._asking(f"virsh managedsave-remove {self.name}"):
            self._handle.managedSaveRemove()

    def start(self) -> None:
        """Start it, from its saved state if it has one: running or paused, as it was saved. Raises LibvirtError."""
        with self._asking(f"virsh start {self.name}"):
            self._handle.create()

    @contextmanager
    def _asking(self, hint: str) -> Iterator[None]:
        try:
            yield
        except self._module.libvirtError as error:
            raise LibvirtError(f"domain {self.name!r}: {_message(error)}", hint) from None

    def fs_info(self) -> list[tuple[str, str, str]]:
        """(mount point, device, type) of what the guest has mounted, as its agent says. Raises LibvirtError."""
        return [tuple(entry[:3]) for entry in self._agent(self._handle.fsInfo)]

    def fs_freeze(self) -> int:
        """Freeze the guest's file systems; how many there were. Raises LibvirtError."""
        return int(self._agent(self._handle.fsFreeze))

    def fs_thaw(self) -> int:
        """Thaw them; how many were frozen. Raises LibvirtError."""
        return int(self._agent(self._handle.fsThaw))

    def _agent(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except self._module.libvirtError as error:
            if error.get_error_code() == self._module.VIR_ERR_OPERATION_INVALID and not self._handle.isActive():
                raise VmStateError(f"domain {self.name!r} is not running", "start it first") from None
            raise LibvirtError(
                f"domain {self.name!r}: {_message(error)}",
                "the domain needs a channel org.qemu.guest_agent.0, its guest a running qemu-guest-agent",
            ) from None

    def resume_after_io_error(self) -> bool:
        """Let the CPU of a domain go on that paused on an I/O error; False if it did not. Raises LibvirtError."""
        try:
            state, reason = self._handle.state()
            if (state, reason) != (self._module.VIR_DOMAIN_PAUSED, self._module.VIR_DOMAIN_PAUSED_IOERROR):
                return False
            self._handle.resume()
        except self._module.libvirtError as error:
            raise LibvirtError(f"domain {self.name!r}: {_message(error)}", "virsh resume it") from None
        return True

    @property
    def active(self) -> bool:
        """Whether it runs, or pauses; a transient one is gone for good once it does not."""
        try:
            return bool(self._handle.isActive())
        except self._module.libvirtError as error:
            if error.get_error_code() == self._module.VIR_ERR_NO_DOMAIN:
                return False
            raise LibvirtError(f"domain {self.name!r}: {_message(error)}", "is libvirtd running?") from None

    @property
    def paused(self) -> bool:
        """Whether its CPU stands still."""
        with self._asking("is libvirtd running?"):
            return bool(self._handle.state()[0] == self._module.VIR_DOMAIN_PAUSED)

    @property
    def nvram(self) -> Path | None:
        """The file with its firmware's variables, which libvirt leaves where it is."""
        try:
            text: str = self._handle.XMLDesc(0)
        except self._module.libvirtError as error:
            raise LibvirtError(f"domain {self.name!r}: {_message(error)}", "are you root?") from None
        found = re.search(r"<nvram[^>]*>([^<]+)</nvram>", text)
        return Path(unescape(found[1])) if found else None

    def disk_size(self, target: str) -> int:
        """Bytes that the guest sees. Raises LibvirtError."""
        with self._asking(f"virsh domblkinfo {self.name} {target}"):
            return int(self._handle.blockInfo(target)[0])

    def begin_copy(self, target: str, image: Path, synchronous: bool) -> None:
        """Copy what the guest sees of a disk to a raw image, which is there with the disk's size. Raises LibvirtError."""
        module = self._module
        flags = module.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | module.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        if synchronous:
            flags |= module.VIR_DOMAIN_BLOCK_COPY_SYNCHRONOUS_WRITES
        xml = f"<disk type='file'><source file={quoteattr(str(image))}/><driver type='raw'/></disk>"
        with self._asking("what libvirt names is in the way of copying its disks"):
            self._handle.blockCopy(target, xml, None, flags)

    def copy_progress(self, target: str) -> DiskCopy | None:
        """Of a copy that was begun; None if there is none any more. Raises LibvirtError."""
        with self._asking(f"virsh blockjob {self.name} {target}"):
            found = self._handle.blockJobInfo(target, 0)
            text: str = self._handle.XMLDesc(0)
        if not found:
            return None
        disk = disk_elements(parse_xml(text.encode()))[target]
        level = disk.find("mirror[@job='copy'][@ready='yes']") is not None
        return DiskCopy(int(found["cur"]), int(found["end"]), level)

    def end_copy(self, target: str) -> None:
        """Have the domain go on with the image of a copy that is level. Raises LibvirtError."""
        with self._asking(f"virsh blockjob {self.name} {target}"):
            self._handle.blockJobAbort(target, self._module.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)

    def shut_down(self) -> None:
        """Press its power button, if it runs. Raises LibvirtError."""
        if self.active:
            with self._asking(f"virsh shutdown {self.name}"):
                self._handle.shutdown()

    def destroy(self) -> None:
        """End it as pulling the plug does, if it has not ended."""
        if not self.active:
            return
        try:
            self._handle.destroy()
        except self._module.libvirtError as error:
            if self.active:
                raise LibvirtError(f"domain {self.name!r}: {_message(error)}", f"virsh destroy {self.name}") from None


def qemu_owner(conf: Path = QEMU_CONF) -> tuple[int, int]:
    """(uid, gid) of the QEMU processes that libvirt starts: ``user`` and ``group`` of qemu.conf, else the distribution's."""
    try:
        text = conf.read_text(errors="replace")
    except OSError:
        text = ""
    user, group = _setting(text, "user"), _setting(text, "group")
    if user is None:
        user = next((name for name in QEMU_USERS if _exists(pwd.getpwnam, name)), "root")
    if group is None:
        group = user if _exists(grp.getgrnam, user) else None
    try:
        uid = int(user) if user.lstrip("+").isdigit() else pwd.getpwnam(user).pw_uid
        if group is not None:
            return uid, int(group) if group.lstrip("+").isdigit() else grp.getgrnam(group).gr_gid
        return uid, pwd.getpwuid(uid).pw_gid
    except KeyError as error:
        raise LibvirtError(
            f"{conf}: QEMU's user or group does not exist: {error.args[0]}", "correct user and group there"
        ) from None


def _setting(text: str, key: str) -> str | None:
    found = re.findall(rf"""^[ \t]*{key}[ \t]*=[ \t]*(?:"([^"]+)"|'([^']+)'|([^\s"'#]+))""", text, re.MULTILINE)
    return next(filter(None, found[-1])) if found else None


def _exists(look_up: Any, name: str) -> bool:
    try:
        look_up(name)
    except KeyError:
        return False
    return True


def _message(error: Any) -> str:
    return str(error.get_error_message() or error)
