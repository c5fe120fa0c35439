"""Planning a run: what the images hold, which history they continue, and which bases stand below it.

Comes before any disk is assigned. What a crash left is finished first; then every image is compared, by identity, with what
the last run left. An image that nobody touched continues its history; any other begins a base of its own, and the time in between
is a gap with a cause, because what happened to it then is not known.
"""

from __future__ import annotations

import json
import socket
import time
import uuid as uuids
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmrewind.capture.image import Image
from vmrewind.errors import ConfigError, ImageError, RepositoryError, VmrewindError
from vmrewind.history.branch import last_takeover
from vmrewind.history.configuration import config_digest
from vmrewind.journal.copy_before_write import BegunBase, CopyBeforeWrite, State, remove
from vmrewind.journal.events import EventLog
from vmrewind.journal.origin import Origin, forget_lost, settled
from vmrewind.journal.runs import (
    Discontinuity,
    ImageIdentity,
    RunInfo,
    run_path,
    write_durably,
)
from vmrewind.journal.state import boot_id
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import VmRepository
from vmrewind.ship.noted import forget_shipped_elsewhere
from vmrewind.start.bases import Progress, back_up, begin, complete_begun, is_of, matching_base
from vmrewind.start.continuity import goes_on, newest_run
from vmrewind.start.identity import known_uuid_of
from vmrewind.start.images import refuse_half_restored, refuse_half_taken_over
from vmrewind.start.known_repository import is_where_it_was, note_repository
from vmrewind.start.origins import first_bases
from vmrewind.start.past import Past, look_back
from vmrewind.start.supersession import Answer, ask, refuse_superseded
from vmrewind.vmconfig.model import VmConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that may begin: its description, and what each image must still be when capture opens it."""

    info: RunInfo
    identities: Mapping[str, ImageIdentity]
    resync: Sequence[str] = ()
    """Disks whose gap is closed while the VM runs, by comparing the image with its history."""


@dataclass(frozen=True, slots=True)
class Planner:
    """Everything that planning needs to know; ``say`` tells the user what takes time."""

    config: VmConfig
    paths: VmPaths
    journal: Path
    events: EventLog
    say: Callable[[str], None] = lambda _: None
    progress: Progress | None = None
    answer: Answer = field(default=Answer(None))

    @property
    def repository(self) -> VmRepository | None:
        """The VM's repository, if it has one that can be reached now."""
        return self.answer.repository

    @property
    def _strange(self) -> bool:
        """Whether there is a repository that cannot be reached, and that is not where the VM's history was last seen to be."""
        url = self.config.protection.repository
        return self.repository is None and url is not None and not is_where_it_was(self.paths, url)

    def _matching_base(self, image: Image, vm_uuid: str) -> str | None:
        if self._strange:
            return None
        return matching_base(self.paths, self.repository, image.target, vm_uuid, image.identity())

    @classmethod
    def of(
        cls,
        config: VmConfig,
        paths: VmPaths,
        journal: Path,
        events: EventLog,
        say: Callable[[str], None],
        progress: Progress | None,
        *,
        alone: bool = False,
    ) -> Planner:
        """A planner with the VM's repository opened, if it can be reached now. ``alone`` does without one."""
        if config.protection.repository is None and alone:
            return cls(config, paths, journal, events, say, progress)
        if config.protection.repository is None:
            raise ConfigError(f"{config.source}: protection.repository is missing", "name the directory for bases and history")
        answer = ask(config.protection.repository, config.name, journal)
        return cls(config, paths, journal, events, say, progress, answer)

    def plan(self, run: int, backup: Sequence[str] = ()) -> Plan:
        """Finish the past, make the bases that are missing, and describe the run. Raises what stops a start.

        ``backup``: disks that get a base whether they need one or not, and whatever their size is now.
        """
        firsts = first_bases(self.journal)
        if not firsts:
            self.refuse_pending_restore()
        vm_uuid = self.vm_uuid()
        if self.repository is not None:
            self.repository.register(vm_uuid)
            repository = self.repository.repository
            forget_shipped_elsewhere(self.journal, repository.id)
            note_repository(self.paths, repository.url)
        past = look_back(self.config.name, self.journal, self.repository, self.events, self.say)
        refuse_superseded(self.config.name, self.answer, self.journal, self.paths, past.position, self.say, self.events)
        # The host's clock may have been set back since: runs are ordered by their ids, so a later one must have a greater one.
        run = max(run, newest_run(past.runs) + 1)
        self._check_sizes(past)
        self._warn()
        images = self.open_images(past.runs, backup)
        bases: dict[str, str] = {}
        begun_now: list[str] = []
        gaps: dict[str, Discontinuity] = {}
        resync: list[str] = []
        try:
            for image in images:
                if image.target not in backup:
                    self._check_size(image, past, vm_uuid)
                image.extend()
                continuous = self._continues(image, past)
                base = firsts.get(image.target) or self._matching_base(image, vm_uuid)
                begun = self._begun(image, past)
                if image.target in backup:
                    base = self._back_up(image, vm_uuid, begun)
                wanted = self.config.protection.repository is not None
                if base is None and wanted:
                    stands = self._stands(image, past, begun)
                    if stands and not continuous:
                        resync.append(image.target)
                    elif not stands:
                        why = "no base equals it as it is now" if past.runs else "it has none yet"
                        base = self._begin_base(image, run, vm_uuid, why, instead_of=begun)
                        begun_now.append(image.target)
                if base is not None:
                    bases[image.target] = base
                    forget_lost(self.journal, image.target)
                if past.position is not None and not continuous:
                    gaps[image.target] = Discontinuity(self._cause(image, past), past.position.time_ns)
                    self.events.write("history.gap", disk=image.target, cause=gaps[image.target].cause)
            # A base does not change an image; qcow2 was extended when it was opened, so this is what capture will see.
            identities = {image.target: image.identity() for image in images}
        except BaseException:
            for target in begun_now:
                remove(self.journal, target)
            raise
        finally:
            for image in images:
                image.close()
        parent = past.position
        info = RunInfo(
            run=run,
            parent=parent,
            vm=self.config.name,
            uuid=vm_uuid,
            host=socket.gethostname(),
            start_time_ns=max(time.time_ns(), parent.time_ns + 1 if parent else 0),
            first_seq=parent.seq + 1 if parent else 1,
            disks=tuple(image.info for image in images),
            bases=bases,
            gaps=gaps,
            claim=self._claim(past),
            config=config_digest(self.config.document.encode()),
        )
        return Plan(info, identities, resync)

    def _claim(self, past: Past) -> int:
        """The newest takeover that this host goes on from."""
        known = {info.run: info for info in (*(self.answer.others or ()), *past.runs)}
        ours = {info.run for info in past.runs} | ({past.position.run} if past.position is not None else set())
        return max((last_takeover(known, run) for run in ours), default=0)

    def refuse_pending_restore(self) -> None:
        """Raise VmStateError if the images are between two moments, or between two hosts."""
        refuse_half_restored(self.config.name, self.journal)
        refuse_half_taken_over(self.config.name, self.journal)

    def vm_uuid(self) -> str:
        """The VM's identity: given, known from earlier, or new."""
        if (known := known_uuid_of(self.config, self.paths)) is not None:
            return known
        if self.config.uuid is None and self.repository is not None and (taken := self.repository.uuid()) is not None:
            raise RepositoryError(
                f"{self.repository.repository.url}: holds a VM called {self.config.name} (uuid {taken}), "
                "and this host does not know whether it is the same",
                f'if it is, add uuid = "{taken}" to {self.config.source}; otherwise give this VM another name',
            )
        chosen = self.config.uuid or str(uuids.uuid4())
        write_durably(self.paths.identity, json.dumps({"name": self.config.name, "uuid": chosen}).encode() + b"\n")
        return chosen

    def open_images(self, runs: Sequence[RunInfo] = (), anew: Sequence[str] = ()) -> list[Image]:
        """Every protected disk's image, open and locked, of the size that it had in ``runs`` but for the disks ``anew``."""
        images: list[Image] = []
        try:
            for index, disk in enumerate(self.config.protection.disk):
                known = next((d.size for info in reversed(runs) if (d := info.disk(disk.target))), None)
                known = None if disk.target in anew else known
                images.append(Image(index, disk.target, disk.image, disk.format, known))
        except BaseException:
            for image in images:
                image.close()
            raise
        return images

    def _check_size(self, image: Image, past: Past, vm_uuid: str) -> None:
        """A disk of another size than its history's is refused, unless a backup was made of it at its new size."""
        for info in reversed(past.runs):
            known = info.disk(image.target)
            if known is None:
                continue
            if known.size != image.size and self._matching_base(image, vm_uuid) is None:
                raise ImageError(
                    f"{image.path}: {image.size} bytes, but the base and history of {image.target} are of {known.size} bytes",
                    f"if it was resized on purpose, run `vmrewind backup {self.config.name}`: its history goes on from there",
                )
            return

    def _check_sizes(self, past: Past) -> None:
        """History under one target with another format would be read wrongly."""
        for disk in self.config.protection.disk:
            known = next((d for info in reversed(past.runs) if (d := info.disk(disk.target))), None)
            if known is not None and known.format != disk.format:
                raise ConfigError(
                    f"{self.config.source}: disk {disk.target} is {disk.format}, and its history is of a {known.format} image",
                    "give the new image another target name",
                )

    def _continues(self, image: Image, past: Past) -> bool:
        left = past.head.images.get(image.target) if past.head is not None else None
        return left is not None and left.tells and left == image.identity()

    def _cause(self, image: Image, past: Past) -> str:
        if image.target in past.used:
            return "the image was used without vmrewind after the last run died"
        if past.head is None:
            return past.gap_cause
        if past.head.gap is not None:
            return past.head.gap
        if (apart := past.head.apart.get(image.target)) is not None:
            return apart.why_apart
        left = past.head.images.get(image.target)
        if left is not None and left.device and left.writes.split(":")[0] != boot_id().hex():
            return "the host was booted since: whether anybody wrote to the device meanwhile is not known"
        if left is None:
            return "the disk was not protected in the last run, was changed by others then, or was restored apart from the rest"
        return past.gap_cause

    def _warn(self) -> None:
        """Tell of settings that will lose history without anybody's noticing."""
        protection = self.config.protection
        if protection.ship == "on-demand" and protection.on_journal_full == "drop-history":
            self.say(
                f"{self.config.name}: nothing is shipped until `vmrewind ship on`: once {protection.journal_size >> 20} MiB "
                "are written, the journal drops its oldest history, and nothing can be restored until the next base"
            )

    def _begun(self, image: Image, past: Past) -> str | None:
        """The base of the disk that an earlier run began and that can be gone on with; what is left of any other is removed.

        It can if all that was written to the image since is known: by those who keep what the base does not have yet.
        """
        if (origin := Origin.read(self.journal, image.target)) is not None:
            if origin.lost:
                self._give_up(image, origin.base, origin.lost)
            return None if origin.lost else origin.base
        begun = CopyBeforeWrite.open(self.journal, image.target)
        if begun is None:
            remove(self.journal, image.target)
            return None
        with begun:
            base = begun.base
            named = any(info.bases.get(image.target) == base.id for info in past.runs)
            if begun.state is State.MAKING and named and (reason := self._why_not(image, past, base)) is not None:
                begun.fail(reason)
            if begun.state is State.MAKING and named:
                return base.id
            if begun.state is State.FAILED and named:
                self._give_up(image, base.id, begun.reason)
        remove(self.journal, image.target)
        return None

    def _why_not(self, image: Image, past: Past, base: BegunBase) -> str | None:
        """Why a base that was begun cannot be gone on with, None if it can."""
        if self.repository is not None and self.repository.repository.id != base.repository:
            return "it was begun for another repository"
        if base.size != image.size or not is_of(base, image.fd):
            return "the image is another one"
        if past.head is not None:
            kept = past.head.kept.get(image.target)
            if kept is None or kept.base != base.id or not kept.still(image.identity()):
                return "what was written to the image since the last run is not known"
        elif not past.recovered or image.block_device or image.target in past.used:
            # A device does not tell who wrote to it while nobody was there.
            return "what was written to the image since the last run died is not known"
        return None

    def _give_up(self, image: Image, base: str, reason: str) -> None:
        self.say(f"{image.target}: base {base} is given up, and what needs it cannot be restored: {reason}")
        self.events.write("base.given-up", disk=image.target, base=base, reason=reason)

    def _stands(self, image: Image, past: Past, begun: str | None) -> bool:
        """Whether the disk's history can be gone on from here without a new base. ``begun``: the base that is being made of it."""
        if past.position is None or not run_path(self.journal, past.position.run).exists() or self._strange:
            return False
        if begun is None and Origin.path(self.journal, image.target).exists():
            # Its base is lost, which the repository need not be asked about.
            return False
        return goes_on(self.journal, self.repository, past.runs, past.position, image.target, image.size, begun)

    def _reachable(self, image: Image) -> VmRepository:
        if self.repository is None:
            assert self.answer.unreachable is not None, "either there is a repository or there is the reason why not"
            raise RepositoryError(
                f"{image.target} needs a full backup before it starts, and the repository can't be used: {self.answer.unreachable}",
                self.answer.unreachable.hint,
            )
        return self.repository

    def _begin_base(self, image: Image, run: int, vm_uuid: str, why: str, instead_of: str | None) -> str:
        repository = self._reachable(image)
        if instead_of is not None:
            self._give_up(image, instead_of, "what was written since is not complete")
        base = begin(self.journal, repository.repository.id, image, run, vm_uuid)
        settled(self.journal, image.target)
        self.say(f"{image.target}: a base (full backup) of it as it is now is made while the VM runs: {why}")
        self.events.write("base.begun", disk=image.target, base=base, bytes=image.size, reason=why)
        return base

    def _back_up(self, image: Image, vm_uuid: str, begun: str | None) -> str:
        """Make a base before the run begins, after the one that is still being made: what was written in between needs that."""
        repository = self._reachable(image)
        if begun is not None:
            self.say(f"{image.target}: completing base {begun}, which was begun before")
            self._complete(image, repository, begun)
        self.say(f"{image.target}: making a base (full backup): a backup was asked for")
        manifest = back_up(self.paths, repository, image, vm_uuid, self.progress)
        self.events.write("base.made", disk=image.target, base=manifest.id, bytes=image.size)
        return manifest.id

    def _complete(self, image: Image, repository: VmRepository, begun: str) -> None:
        try:
            complete_begun(self.paths, repository, self.journal, Path(image.path), image.target, self.progress)
        except VmrewindError as error:
            origin = Origin.read(self.journal, image.target)
            if origin is None:
                raise
            # It is made of another VM's history: no base of the image has to wait for it.
            if origin.lost:
                self._give_up(image, begun, origin.lost)
            else:
                self.say(f"{image.target}: base {begun} cannot be made now, and nothing that needs it can be restored yet: {error}")
                self.events.write("base.interrupted", disk=image.target, error=str(error), hint=error.hint)
        else:
            self.events.write("base.made", disk=image.target, base=begun, bytes=image.size)
