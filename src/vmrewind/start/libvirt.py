"""libvirt, as far as protecting a domain needs it: finding it, its stored XML, storing another, and whom QEMU runs as.

libvirt-python is imported when a connection is opened: it is an extra, and nothing that runs inside a hook may need it.
"""

from __future__ import annotations

import grp
import importlib
import pwd
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from xml.sax.saxutils import unescape

from vmrewind.errors import LibvirtError, VmStateError

DEFAULT_URI: Final = "qemu:///system"
LOCAL_SYSTEM: Final = re.compile(r"qemu(\+unix)?:///system(\?.*)?")
RECONNECT_SINCE: Final = 9_002_000
"""libvirt 9.2.0 is the first that passes ``<reconnect>`` of an NBD source on; earlier ones drop it silently."""
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

    def require_stopped(self) -> None:
        """Raises VmStateError unless the domain is persistent, shut off, and would start from its stored XML."""
        if not self._handle.isPersistent():
            raise VmStateError(f"domain {self.name!r} is transient: it has no stored XML to change", "virsh define it first")
        if self._handle.isActive():
            raise VmStateError(f"domain {self.name!r} is running", f"shut it down first: virsh shutdown {self.name}")
        if self._handle.hasManagedSaveImage():
            raise VmStateError(
                f"domain {self.name!r} has a saved state, which would resume with the disks that it was saved with",
                f"start it and shut it down properly, or give the state up: virsh managedsave-remove {self.name}",
            )

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
    def nvram(self) -> Path | None:
        """The file with its firmware's variables, which libvirt leaves where it is."""
        try:
            text: str = self._handle.XMLDesc(0)
        except self._module.libvirtError as error:
            raise LibvirtError(f"domain {self.name!r}: {_message(error)}", "are you root?") from None
        found = re.search(r"<nvram[^>]*>([^<]+)</nvram>", text)
        return Path(unescape(found[1])) if found else None

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
