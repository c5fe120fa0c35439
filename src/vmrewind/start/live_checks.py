"""Before a running domain is protected: everything that its next moments could fail on is tried while it still runs.

Nothing here touches an image, which QEMU has open, or replays a journal onto one. What is left behind where all is well (the hook,
the VM's directories, the journal's reserved space, the name in the repository) is what any start needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmrewind.capture.image import device_size
from vmrewind.errors import ConfigError, ImageError, LibvirtError, SpaceError, StartError
from vmrewind.history.succession import judge, refusal
from vmrewind.journal.runs import local_runs, read_head
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import VmRepository
from vmrewind.start.children import CaptureChild
from vmrewind.start.hook_script import Installed, install, reload_daemons
from vmrewind.start.identity import known_uuid_of
from vmrewind.start.images import check_image, known_end, refuse_half_restored, refuse_half_taken_over
from vmrewind.start.saved_state import SAVED_STATES
from vmrewind.start.supersession import ask
from vmrewind.vmconfig.model import DiskConfig, VmConfig

PROBE_BYTES_MAX: Final = 64 << 20
HOOK_SECONDS: Final = 60.0
_RESERVED: Final = "free-*.seg"
_SPARE_BYTES: Final = 64 << 20
"""Of a saved state, besides memory: the state of devices, and room for others."""


def storage_of(config: VmConfig) -> Path:
    """The directory of the VM's journal."""
    journal = config.protection.journal
    return Path(journal) if journal is not None else VmPaths(config.name).default_journal


def check_history(config: VmConfig, paths: VmPaths) -> VmRepository:
    """The repository, which answers; no other host has the VM, and what is known here of it can be gone on from.

    Raises what a start would.
    """
    journal = storage_of(config)
    refuse_half_restored(config.name, journal)
    refuse_half_taken_over(config.name, journal)
    known_uuid_of(config, paths)
    _check_known_disks(config, journal)
    assert config.protection.repository is not None, "protect asks for one"
    answer = ask(config.protection.repository, config.name, journal)
    if answer.repository is None or answer.others is None:
        assert answer.problem is not None, "either there is a repository that tells its runs, or there is the reason why not"
        raise answer.problem
    head = read_head(journal, lambda _: None)
    end = head.position if head is not None else known_end(journal, local_runs(journal, lambda _: None))
    if (who := judge(journal, paths.state, answer.others, end)) is not None:
        raise refusal(config.name, answer.repository.repository.url, who)
    return answer.repository


def _check_known_disks(config: VmConfig, journal: Path) -> None:
    """History that is here already is of disks of the same format, and of raw ones of the same size."""
    runs = local_runs(journal, lambda _: None)
    for disk in config.protection.disk:
        size = check_readable(disk)
        known = next((found for info in reversed(runs) if (found := info.disk(disk.target))), None)
        if known is None:
            continue
        if known.format != disk.format:
            raise ConfigError(
                f"disk {disk.target} is {disk.format}, and its history is of a {known.format} image",
                "give it another target name while the VM is shut off",
            )
        if disk.format == "raw" and known.size != size:
            raise ImageError(
                f"{disk.image}: {size} bytes, but the base and history of {disk.target} are of {known.size} bytes",
                f"shut the VM down, vmrewind protect {config.name} without --live, vmrewind backup {config.name}",
            )


def check_readable(disk: DiskConfig) -> int:
    """The image is there, of a kind that can be protected, and can be opened here; returns its bytes. Raises ImageError."""
    check_image(disk)
    try:
        fd = os.open(disk.image, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = device_size(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise ImageError(f"disk {disk.target}: {disk.image}: {error.strerror}", "can root read and write it?") from error
    if disk.format == "raw" and (size == 0 or size % 512):
        raise ImageError(f"{disk.image}: {size} bytes is not a whole number of 512-byte sectors", "extend the image")
    return size


def check_space(largest_bytes: int, directory: Path = SAVED_STATES) -> None:
    """The saved state fits where libvirt puts it, even if it is as large as the memory. Raises SpaceError."""
    with contextlib.suppress(OSError):  # libvirt may keep it elsewhere, and says itself when it is full: the VM goes on then
        found = os.statvfs(directory)
        free = found.f_bavail * found.f_frsize
        if free < largest_bytes + _SPARE_BYTES:
            raise SpaceError(
                f"{directory}: {free >> 20} MiB are free, and the VM's memory may take {(largest_bytes + _SPARE_BYTES) >> 20} MiB",
                "make room there, or shut the VM down and leave out --live",
            )


def write_rate(expected_bytes: int, directory: Path = SAVED_STATES) -> float | None:
    """Bytes a second that the saved state's storage takes, tried with a file of up to 64 MiB; None if that is not possible."""
    length = min(expected_bytes, PROBE_BYTES_MAX) or PROBE_BYTES_MAX
    try:
        with open(os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o600), "wb", buffering=0) as probe:
            piece = os.urandom(1 << 20)  # what compresses or dedupes away would tell of another storage than this one
            began = time.monotonic()
            probe.writelines(piece for _ in range(max(1, length >> 20)))
            os.fdatasync(probe.fileno())
            return max(1, length >> 20) * len(piece) / (time.monotonic() - began)
    except OSError:
        return None


def rehearse(config: VmConfig, paths: VmPaths, xml: bytes, libvirt_version: int) -> tuple[Installed, Sequence[Path]]:
    """What a start needs on this host is there: hook, a capture that comes up, the journal's space. Raises.

    ``xml``: what the domain is to run with. Returns the hook, and the files with which the journal's space was reserved now.
    """
    hook = install(libvirt_version)
    if hook.fresh and not reload_daemons():
        raise LibvirtError(
            f"{hook.path} is new, and libvirt looks for hooks only when it starts",
            "restart its daemon once (VMs run on: systemctl restart libvirtd), then repeat this",
        )
    _run_hook(hook.path, config.name, xml)
    protection = config.protection

    async def capture() -> None:
        child = await CaptureChild.create(
            paths, storage_of(config), protection.journal_size, local_history=protection.local_history
        )
        await child.kill()

    journal = storage_of(config)
    there = set(journal.glob(_RESERVED))
    asyncio.run(capture())
    return hook, sorted(set(journal.glob(_RESERVED)) - there)


def _run_hook(hook: Path, name: str, xml: bytes) -> None:
    """The hook as libvirt runs it, at a step at which it has only to look."""
    command: Sequence[str | Path] = (hook, name, "start", "begin", "-")
    try:
        done = subprocess.run(command, input=xml, capture_output=True, timeout=HOOK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StartError(
            f"{hook}: the hook does not run: {error}", "run `vmrewind protect` from the installation to use"
        ) from error
    if done.returncode != 0:
        raise StartError(
            f"{hook}: the hook fails: {done.stderr.decode(errors='replace').strip()[-500:]}",
            "mend what it names; `vmrewind protect` writes the hook anew",
        )
