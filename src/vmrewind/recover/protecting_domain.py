"""A booted domain that becomes a protected one of its own: every write from the first one on is journaled, by a capture of its own.

As ``protecting`` does it without libvirt. Here the hook starts the keeper, as for any protected domain, and the XML is that of any
protected domain too: this process listens where its disks are expected, and capture elsewhere, until the images are complete.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from vmrewind.errors import LibvirtError, StartError, VmrewindError
from vmrewind.history.view import View
from vmrewind.journal.runs import Position, sync_directory, write_durably
from vmrewind.paths import VmPaths
from vmrewind.recover.completing import Completing
from vmrewind.recover.filling import Filling
from vmrewind.recover.keep import KeptVm, make_directory
from vmrewind.recover.keep_domain import open_to
from vmrewind.recover.restore import Progress
from vmrewind.start.hook_script import install, reload_daemons
from vmrewind.start.libvirt import Domain, Libvirt
from vmrewind.start.processes import running
from vmrewind.vmconfig.beside import protected_beside
from vmrewind.vmconfig.domain import parse_domain


class ProtectingDomain:
    """The domain ``vm`` in ``directory``, which is made: its XML and an image for each disk. ``formats``: of those, by target.

    ``of`` and ``position``: the VM, as commands take it, and the moment that it begins from. ``owner``: (uid, gid) of libvirt's
    QEMU. Raises UsageError.
    """

    def __init__(
        self,
        libvirt: Libvirt,
        directory: Path,
        vm: KeptVm,
        formats: Mapping[str, str],
        of: str,
        position: Position,
        owner: tuple[int, int],
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._libvirt = libvirt
        self._directory = directory.absolute()
        self._vm = vm
        self._formats = formats
        self._images = {target: self._directory / f"{target}.{kind}" for target, kind in formats.items()}
        self._paths = VmPaths(vm.name)
        self._path = self._directory / f"{vm.name}.xml"
        self._origin = (of, position)
        self._say = say
        self._completing = Completing(self._paths, self._images, progress, say)
        self._thread = threading.Thread(target=self._complete, name="completing", daemon=True)
        self._document = b""
        self._told = False
        self.hand_over: Callable[[Path], None] = lambda _: None
        """Leads QEMU to who listens at a socket."""
        self.kept = False
        self._uuid: str | None = None
        make_directory(directory)
        try:
            self._completing.claim()
            open_to(self._directory, owner)
        except BaseException:
            self.give_up()
            raise

    def filling(self, target: str, view: View) -> Filling:
        """A disk that QEMU is to run on. Raises ImageError, SpaceError."""
        return self._completing.filling(target, view)

    def prepare(self, document: bytes, xml: bytes) -> bytes:
        """The XML to start it with; all that its start needs is there then, and the disks are served.

        ``document``: the VM's of the moment, ``xml``: what ``beside`` made of it. Raises VmrewindError.
        """
        hook = install(self._libvirt.version)
        if hook.fresh and not reload_daemons():
            raise LibvirtError("libvirt looks for hooks when it starts", "restart its daemon once, then boot again")
        self._document = protected_beside(
            document,
            xml,
            self._images,
            self._formats,
            self._paths.nbd_socket,
            self._vm.repository,
            reconnect=self._libvirt.knows_reconnect,
        )
        config = parse_domain(self._document)
        assert config is not None and config.uuid is not None, "it was made a protected domain with a uuid"
        write_durably(self._path, self._document)
        sync_directory(self._directory)
        self._uuid = config.uuid
        self._completing.note(*self._origin, config.uuid)
        return self._document

    @property
    def lacking(self) -> bool:
        """Whether it has run, and its images are not complete."""
        return self.kept and self._completing.lacking

    def give_up(self) -> None:
        """Remove everything, unless a guest has run."""
        if not self.kept:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._completing.give_up(self._vm.repository, self._uuid)

    def begin(self, domain: Domain) -> None:
        """Complete the images while it runs. Raises StartError."""
        keeping = running(self._paths)
        if keeping is None or not keeping.protected:
            # No write of it was answered.
            raise StartError(f"{domain.name} was started without vmrewind's hook", "see whether libvirt runs its hooks")
        self.kept = True
        self._thread.start()

    def go_on(self, domain: Domain) -> None:
        """Nothing: capture does not ask QEMU."""

    def settle(self) -> None:
        """Once the images are complete, define the domain, and lead it to capture if this libvirt's QEMU comes back."""
        if self._told or self._thread.is_alive() or not self._completing.complete:
            return
        self._told = True
        stays = "" if self._libvirt.knows_reconnect else "; this libvirt leaves its disks behind this command until it ends"
        if self._libvirt.knows_reconnect:
            try:
                self.hand_over(self._paths.filling_socket)
            except OSError as error:
                stays = f"; {error}: its disks stay behind this command until it ends"
        self.define(f"{self._vm.name} has its own images from here on{stays}")

    def end(self) -> None:
        """Its capture has ended as well: what its images lack by now, only a restore in place can complete."""
        self._completing.stop()
        if self._thread.ident is not None:
            self._thread.join()
        self._paths.nbd_socket.unlink(missing_ok=True)
        if self._completing.complete and not self._told:
            self.define("its images are complete")
        if self.lacking:
            name = self._vm.name
            self._say(
                f"{name} has ended, and its images are not complete: `vmrewind restore {name} --in-place` completes them, "
                f"then `virsh define {self._path}` makes it a domain"
            )

    def define(self, words: str) -> None:
        """Its images are complete; ``words`` are said if it can be defined, why not otherwise."""
        try:
            self._libvirt.define(self._document)
        except LibvirtError as error:
            # The guest runs on, protected.
            self._say(f"{self._vm.name}: {error} (virsh define {self._path})")
            return
        self._say(f"kept: {self._path}, and defined; {words}")

    def _complete(self) -> None:
        try:
            self._completing.run()
        except (OSError, VmrewindError) as error:
            self._say(f"{self._vm.name}: {error}: its images are not noted as complete")
