"""The images of a VM that was begun from a moment, completed while it runs: what is common to a QEMU of ours and a domain."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from vmrewind.capture.since import leave_mark
from vmrewind.errors import UsageError, VmrewindError
from vmrewind.history.view import View
from vmrewind.journal.origin import FILLING, Origin, filled, note_filling
from vmrewind.journal.runs import Position, private_directory
from vmrewind.nbd.client import Closed
from vmrewind.paths import VmPaths
from vmrewind.recover.filling import Filling
from vmrewind.recover.restore import Progress
from vmrewind.repository.manifest import new_base_id
from vmrewind.repository.repository import Repository
from vmrewind.start.processes import Process

_RETRY_SECONDS: Final = 5.0


class Completing:
    """Of the VM that has ``paths``, with its ``images`` by disk. ``run`` is for a thread, everything else for another one."""

    def __init__(self, paths: VmPaths, images: Mapping[str, Path], progress: Progress, say: Callable[[str], None]) -> None:
        self._paths = paths
        self._images = images
        self._progress = progress
        self._say = say
        self._fillings: dict[str, Filling] = {}
        self._ending = threading.Event()
        self._claimed = False
        self.complete = False

    @property
    def lacking(self) -> bool:
        """Whether it is on disk that the images are not complete."""
        return (self._paths.default_journal / FILLING).exists()

    def filling(self, target: str, view: View) -> Filling:
        """A disk that QEMU is to run on. Raises ImageError, SpaceError."""
        made = Filling(view, self._images[target], target, self._paths.filling_socket, lambda what: self._say(f"{target}: {what}"))
        self._fillings[target] = made
        return made

    def claim(self) -> None:
        """Take the VM's name on this host. Raises UsageError if it is, or was, somebody's."""
        private_directory(self._paths.state.parent)
        try:
            self._paths.state.mkdir(mode=0o700)
        except FileExistsError:
            raise UsageError(
                f"there is, or was, a VM called {self._paths.name} here: {self._paths.state}", "give it another name with --name"
            ) from None
        self._claimed = True

    def give_up(self, repository: str, uuid: str | None) -> None:
        """No guest ever ran: nothing is to be left of it. ``uuid``: of what the repository may have."""
        if not self._claimed:
            return
        if uuid is not None:
            try:
                Repository.open(repository).vm(self._paths.name).forget(uuid)
            except VmrewindError as error:
                self._say(f"the repository keeps the name {self._paths.name}, of which nothing is left here: {error}")
        shutil.rmtree(self._paths.state, ignore_errors=True)

    def note(self, of: str, position: Position, uuid: str) -> None:
        """Note durably, before the VM's first start, from which moment of the VM ``of`` the one with ``uuid`` is begun."""
        journal = self._paths.default_journal
        private_directory(journal)
        for target in self._images:
            Origin(of, position, new_base_id(time.time_ns()), uuid).write(journal, target)
        own = Process.of(os.getpid())
        assert own is not None, "this process is alive"
        note_filling(journal, list(self._images), own.note())

    def run(self) -> None:
        """Complete the images, however often it has to be tried, unless ``stop`` comes before. Raises OSError."""
        for target, filling in self._fillings.items():
            self._complete(target, filling)
        if self._ending.is_set():
            return
        try:
            for filling in self._fillings.values():
                # Capture notes what an image is when it ends. It has not ended: what it notes is the complete one.
                filling.greet_capture()
        except Closed:
            return
        leave_mark(self._paths.default_journal)
        filled(self._paths.default_journal)
        self.complete = True

    def stop(self) -> None:
        """Let ``run`` end soon; requests that wait for capture fail."""
        self._ending.set()
        for filling in self._fillings.values():
            filling.abandon()

    def _complete(self, target: str, filling: Filling) -> None:
        def progress(done: int, total: int) -> None:
            # Nobody may be there to hear it any more.
            with contextlib.suppress(OSError):
                self._progress(f"copy of {target}", done, total)

        told = ""
        while not self._ending.is_set():
            try:
                filling.fill(self._ending, progress)
                return
            except VmrewindError as error:
                # The guest runs on the moment all the same.
                words = error.in_full
                if words != told:
                    told = words
                    self._say(f"{target}: cannot be copied now, and is tried again: {words}")
            self._ending.wait(_RETRY_SECONDS)
