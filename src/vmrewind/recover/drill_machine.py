"""The machine of a drill: a QEMU command line of our own, with just what the VM needs to boot from its disks, and nothing outside.

Not a copy of the libvirt domain, nor the whole command line: what is not on a short list is left out, so that no network, no other
image, no device, socket or file of the host is ever touched, and a drill runs where there is no libvirt.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

from vmrewind.errors import ConfigError
from vmrewind.recover.restore import RestoredDisk
from vmrewind.vmconfig.xml import parse_xml

_KEPT: Final = (
    "-accel", "-append", "-bios", "-boot", "-cpu", "-enable-kvm", "-global", "-initrd", "-kernel", "-m", "-machine", "-M",
    "-no-acpi", "-no-hpet", "-nodefaults", "-rtc", "-smp", "-vga",
)  # fmt: skip
_DEVICES: Final = ("ahci", "ich9-ahci", "ide-hd", "nvme", "pcie-root-port", "scsi-hd", "virtio-blk", "virtio-scsi", "virtio-rng")
_BUSES: Final = {
    "virtio": (None, "virtio-blk-pci"),
    "scsi": ("virtio-scsi-pci", "scsi-hd"),
    "sata": ("ich9-ahci", "ide-hd"),
    "ide": (None, "ide-hd"),
}
"""libvirt's word for a bus: the controller to add, and the disk's device."""


@dataclass(slots=True)
class DrillMachine:
    """``command``: QEMU without disks and consoles; ``devices``: the device of each disk by target; ``left_out``: options."""

    command: list[str]
    devices: Mapping[str, str]
    left_out: list[str] = field(default_factory=list)

    def with_nodes(self, nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The command line with a disk for each block node, by target; without consoles and without a word on networks."""
        command = [self.command[0], "-parallel", "none", "-display", "none", "-monitor", "none"]
        for node in nodes.values():
            command += ["-blockdev", json.dumps(node)]
        command += self.command[1:]
        # 0 is that of QEMU's own ROM for -kernel.
        free = (number for number in count(1) if str(number) not in _boot_places((*self.command, *self.devices.values())))
        for target in nodes:
            if device := self.devices.get(target, "virtio-blk-pci"):
                place = "" if "bootindex" in device else f",bootindex={next(free)}"
                command += ["-device", f"{device},drive={target}{place}"]
        return command

    def with_disks(self, disks: Sequence[RestoredDisk], agent_fd: int) -> list[str]:
        """The whole command line. The serial console is stdout; ``agent_fd`` is one end of a socket pair, the guest agent's."""
        nodes = {}
        for disk in disks:
            file = {"driver": "file", "filename": str(disk.path), "discard": "unmap"}
            nodes[disk.target] = {"driver": disk.format, "node-name": disk.target, "discard": "unmap", "file": file}
        return self.watched(nodes, agent_fd)

    def watched(self, nodes: Mapping[str, Mapping[str, Any]], agent_fd: int) -> list[str]:
        """The same with a disk for each block node, by target."""
        command = [*self.with_nodes(nodes), "-no-reboot", "-nic", "none"]
        command += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        command += ["-chardev", f"socket,id=agent,fd={agent_fd}", "-device", "virtio-serial-pci,id=agent-bus"]
        command += ["-device", "virtserialport,bus=agent-bus.0,chardev=agent,name=org.qemu.guest_agent.0"]
        return command


def _boot_places(words: Iterable[str]) -> set[str]:
    """The places in the boot order that a command line gives away itself."""
    return {value for word in words for name, _, value in (part.partition("=") for part in word.split(",")) if name == "bootindex"}


def machine_of(document: bytes, suffix: str, origin: str) -> DrillMachine:
    """The machine of a configuration as the repository keeps it. Raises ConfigError."""
    return _of_domain(document, origin) if suffix == "xml" else _of_toml(document, origin)


def _of_toml(document: bytes, origin: str) -> DrillMachine:
    try:
        raw: dict[str, Any] = tomllib.loads(document.decode())
        words = [str(word) for word in raw["qemu"]["command"]]
        disks = {str(disk["target"]): str(disk.get("device", "virtio-blk-pci")) for disk in raw["protection"]["disk"]}
        command = [words[0]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{origin}: tells of no machine: {error!r}", "give the moment of another one with --at") from error
    left_out: list[str] = []
    attached: set[str] = set()
    at = 1
    while at < len(words):
        if not words[at].startswith("-"):
            left_out.append(words[at])  # an image
            at += 1
            continue
        # Any option may be written with two dashes.
        option = "-" + words[at].lstrip("-")
        value = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("-") else None
        given = [option] if value is None else [option, value]
        at += len(given)
        if option == "-device" and value is not None and value.startswith(_DEVICES):
            drive = dict(part.partition("=")[::2] for part in value.split(",")).get("drive")
            if drive is None or disks.get(drive) == "none":
                attached |= {drive} if drive else set()
                command += given
                continue
        if option in _KEPT or (option == "-drive" and value is not None and _is_firmware(value)):
            command += given
        else:
            left_out.append(" ".join(given))
    devices = {
        target: "" if target in attached else "virtio-blk-pci" if device == "none" else device for target, device in disks.items()
    }
    return DrillMachine(command, devices, left_out)


def _is_firmware(drive: str) -> bool:
    """Whether a -drive is firmware that the guest cannot write to."""
    parts = dict(part.partition("=")[::2] for part in drive.split(","))
    return parts.get("if") == "pflash" and parts.get("readonly", parts.get("read-only")) == "on"


def _of_domain(document: bytes, origin: str) -> DrillMachine:
    domain = parse_xml(document)
    kind = domain.find("os/type")
    if kind is None or (kind.text or "").strip() != "hvm":
        raise ConfigError(f"{origin}: not a fully virtualised machine", "a drill can boot those only")
    command = [f"qemu-system-{kind.get('arch') or 'x86_64'}"]
    left_out = [f"<{element.tag}>" for element in domain.findall("devices/*") if element.tag in ("hostdev", "interface", "tpm")]
    smm = ",smm=on" if domain.find("features/smm[@state='on']") is not None else ""
    if machine := kind.get("machine"):
        command += ["-machine", machine + smm]
    command += ["-accel", "kvm"] if domain.get("type") == "kvm" and Path("/dev/kvm").exists() else []
    command += ["-accel", "tcg"]
    command += ["-m", f"{_memory_mib(domain.findtext('memory'), domain.find('memory'), origin)}"]
    command += ["-smp", (domain.findtext("vcpu") or "1").strip()]
    for option, tag in (("-kernel", "kernel"), ("-initrd", "initrd"), ("-append", "cmdline")):
        if text := (domain.findtext(f"os/{tag}") or "").strip():
            command += [option, text]
    loader = domain.find("os/loader")
    if loader is not None and (path := (loader.text or "").strip()):
        firmware = f"if=pflash,unit=0,format=raw,readonly=on,file={path}" if loader.get("type") == "pflash" else None
        command += ["-drive", firmware] if firmware else ["-bios", path]
    devices: dict[str, str] = {}
    for target in domain.findall("devices/disk/target"):
        bus = target.get("bus") or "virtio"
        controller, device = _BUSES.get(bus, (None, "virtio-blk-pci"))
        if controller and controller not in command:
            command += ["-device", controller]
        devices[target.get("dev") or ""] = device
    return DrillMachine(command, devices, left_out)


def _memory_mib(text: str | None, element: Any, origin: str) -> int:
    factors = {"b": 1, "bytes": 1, "KiB": 1 << 10, "k": 1 << 10, "MiB": 1 << 20, "M": 1 << 20, "GiB": 1 << 30, "G": 1 << 30}
    try:
        return int(text or "") * factors[element.get("unit", "KiB")] >> 20
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{origin}: <memory> is not understood: {error!r}", "correct it in the domain") from error
