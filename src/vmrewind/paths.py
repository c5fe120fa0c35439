"""Where things live on a host. Standard library only: the capture process imports this.

``VMREWIND_STATE_DIR`` (default ``/var/lib/vmrewind``, or ``$XDG_STATE_HOME/vmrewind`` without root) outlives reboots;
``VMREWIND_RUNTIME_DIR`` (default ``/run/vmrewind``, or ``$XDG_RUNTIME_DIR/vmrewind``, or ``/tmp/vmrewind-UID``)
holds sockets and pid files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def state_root() -> Path:
    """The directory that holds every protected VM's local state."""
    if given := os.environ.get("VMREWIND_STATE_DIR"):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/vmrewind")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "vmrewind"


def runtime_root() -> Path:
    """The directory that holds sockets and pid files."""
    if given := os.environ.get("VMREWIND_RUNTIME_DIR"):
        return Path(given).absolute()
    if os.geteuid() == 0:
        return Path("/run/vmrewind")
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(given) / "vmrewind"
    return Path(f"/tmp/vmrewind-{os.geteuid()}")


@dataclass(frozen=True, slots=True)
class VmPaths:
    """The places of one VM. ``journal`` is separate because the configuration may put it elsewhere."""

    name: str

    @property
    def state(self) -> Path:
        """Everything about the VM that outlives a reboot."""
        return state_root() / "vms" / self.name

    @property
    def identity(self) -> Path:
        """``{"name", "uuid"}``, made when the VM is first seen."""
        return self.state / "vm.json"

    @property
    def config(self) -> Path:
        """The configuration of the last start, so that a VM's name suffices for every later command."""
        return self.state / "config.json"

    @property
    def before_live(self) -> Path:
        """The XML of a domain that ``protect --live`` saved and could not bring back."""
        return self.state / "before-live.xml"

    @property
    def saved_state(self) -> Path:
        """What the hook knows of the domain's saved state (start/saved_state.py)."""
        return self.state / "saved-state.json"

    @property
    def default_journal(self) -> Path:
        """Where the journal is unless the configuration names another place."""
        return self.state / "journal"

    @property
    def bases(self) -> Path:
        """``<disk>/<base id>.json``: copies of the manifests of bases made on this host."""
        return self.state / "bases"

    @property
    def ship(self) -> Path:
        """``{"disks": [target, ...]}``: what ship is instructed to carry."""
        return self.state / "ship.json"

    def events(self, run: int) -> Path:
        """The event log of a run, one JSON object a line."""
        return self.state / "events" / f"{run:016x}.jsonl"

    @property
    def log(self) -> Path:
        """What the VM's child processes print to stderr."""
        return self.state / "vmrewind.log"

    @property
    def runtime(self) -> Path:
        """Sockets and pid files."""
        return runtime_root() / self.name

    @property
    def nbd_socket(self) -> Path:
        """The socket that QEMU connects to; the export's name is the disk's target."""
        return self.runtime / "nbd.sock"

    @property
    def filling_socket(self) -> Path:
        """Capture's, as long as the process that completes the VM's images serves QEMU at ``nbd_socket``."""
        return self.runtime / "filling.sock"

    @property
    def control_socket(self) -> Path:
        """The socket for questions and instructions to capture: one JSON object a line, one answer each."""
        return self.runtime / "control.sock"

    @property
    def dirty_map(self) -> Path:
        """What a bypass of the journal wrote: capture's own."""
        return self.runtime / "dirty.map"

    @property
    def keeper_socket(self) -> Path:
        """The socket for instructions to the keeper, in the same way."""
        return self.runtime / "keeper.sock"

    @property
    def keeper(self) -> Path:
        """``{"pid", "run", "capture_pid", "ship_pid", ...}`` of the living keeper."""
        return self.runtime / "keeper.json"
