"""A booted domain that is to stay: libvirt copies its disks to full images while it runs, and it goes on with those.

What the guest sees is copied, so that an image stands alone, whatever the disk was made of. When all disks are level, each is
switched over to its image, and the domain is defined on them: until then nothing was kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from vmrewind.errors import ImageError, LibvirtError, UsageError, VmrewindError
from vmrewind.journal.runs import sync_directory, write_durably
from vmrewind.recover.keep import make_directory
from vmrewind.recover.restore import Progress
from vmrewind.start.libvirt import Domain, Libvirt
from vmrewind.vmconfig.beside import on_images
from vmrewind.vmconfig.model import format_size


class KeepingDomain:
    """Copies the disks ``targets`` into ``directory``, which it makes, and defines the domain ``name`` of ``xml`` on them.

    ``owner``: (uid, gid) of libvirt's QEMU. ``let_go`` is called once nothing is read of the moment any more. Raises UsageError.
    """

    def __init__(
        self,
        libvirt: Libvirt,
        directory: Path,
        name: str,
        xml: bytes,
        targets: Sequence[str],
        owner: tuple[int, int],
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._libvirt = libvirt
        self._directory = directory.absolute()
        self._images = {target: self._directory / f"{target}.raw" for target in targets}
        self._name = name
        self._owner = owner
        self._document = on_images(xml, self._images, dict.fromkeys(targets, "raw"))
        self.config = self._directory / f"{name}.xml"
        self._progress = progress
        self._say = say
        self.let_go: Callable[[], None] = lambda: None
        self._synchronously = libvirt.copies_synchronously
        self._begun = False
        self._copied = False
        self.kept = False
        make_directory(directory)
        try:
            open_to(self._directory, owner)
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Remove what was copied, unless all of it is there."""
        if not self.kept:
            shutil.rmtree(self._directory, ignore_errors=True)

    def begin(self, domain: Domain) -> None:
        """Nothing yet: to begin a copy, QEMU may have to wait for a read that is under way."""

    def _begin(self, domain: Domain) -> None:
        for target, image in self._images.items():
            try:
                fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    os.truncate(fd, domain.disk_size(target))
                    os.fchown(fd, *self._owner)
                finally:
                    os.close(fd)
            except OSError as error:
                raise ImageError(f"{image}: {error.strerror}", "name another directory with --keep") from error
            domain.begin_copy(target, image, self._synchronously)

    def go_on(self, domain: Domain) -> None:
        """Have libvirt copy, or look how far it is; once all disks are level, switch them over. Raises VmrewindError."""
        if self._copied:
            return
        if not self._begun:
            self._begin(domain)
            self._begun = True
            return
        try:
            copies = {target: domain.copy_progress(target) for target in self._images}
            for target, copy in copies.items():
                if copy is None and domain.active:
                    raise ImageError(
                        f"disk {target}: it could not be copied; {self._room()} are free in {self._directory}",
                        f"/var/log/libvirt/qemu/{self._name}.log may tell more; then boot it again",
                    )
                if copy is not None:
                    self._progress(f"copy of {target}", copy.done_bytes, copy.total_bytes)
            if not all(copy is not None and copy.level for copy in copies.values()):
                return
            for target in self._images:
                domain.end_copy(target)
            self._copied = True
        except LibvirtError as error:
            if domain.active:
                raise
            raise VmrewindError(
                "the VM ended before the copy was complete: nothing was kept", "boot it again, and let the copy end"
            ) from error

    def settle(self) -> None:
        """Once all disks are switched over, see that they stay, and define the domain. Raises LibvirtError."""
        if self.kept or not self._copied:
            return
        for image in self._images.values():
            fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        write_durably(self.config, self._document)
        sync_directory(self._directory)
        self.kept = True
        self.let_go()
        try:
            self._libvirt.define(self._document)
        except LibvirtError as error:
            raise LibvirtError(f"{self._name} was copied, but {error}", f"virsh define {self.config}") from None
        self._say(f"kept: {self.config}, and defined; {self._name} has its own images from here on")

    def end(self) -> None:
        """Nothing is left to be done."""

    def _room(self) -> str:
        found = os.statvfs(self._directory)
        return format_size(found.f_bavail * found.f_frsize)


def open_to(directory: Path, owner: tuple[int, int]) -> None:
    """Let the QEMU of (uid, gid) pass through the directory to what it is told to open there. Raises UsageError."""
    try:
        os.chown(directory, -1, owner[1])
        directory.chmod(0o710)
    except OSError as error:
        raise UsageError(f"{directory}: {error.strerror}", "name a directory on a file system with owners") from error
    if owner[0] in (0, os.geteuid()):
        return
    tried = subprocess.run(["test", "-x", directory], user=owner[0], group=owner[1], extra_groups=[], check=False)
    if tried.returncode != 0:
        raise UsageError(
            f"{directory}: libvirt's QEMU (user id {owner[0]}) cannot get there",
            "name a directory that it may pass through to, such as one in /var/lib/libvirt/images",
        )
