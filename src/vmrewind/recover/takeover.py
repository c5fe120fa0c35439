"""Takeover: bringing a VM up on this host from a repository alone, so that its history goes on here without a new full backup.

Order: the disks are restored into a directory of no name yet, the configuration is written beside them; what is to be done is noted
durably (``takeover-pending.json``: no start until it is done); the directory gets its name; the takeover is registered in the
repository (recover/claim.py); the journal gets the descriptions of the runs that came before, and a head that says which moment the
images hold; the note is removed. Killed anywhere, the same takeover can be run again: it goes on, or begins anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from vmrewind.capture.recovery import recover
from vmrewind.errors import CorruptionError, ImageError, RepositoryError, UsageError, VmrewindError, VmStateError
from vmrewind.history.branch import Branch
from vmrewind.history.configuration import config_of
from vmrewind.history.history import History
from vmrewind.history.resolve import resolve
from vmrewind.journal.content import content
from vmrewind.journal.copy_before_write import remove
from vmrewind.journal.events import EventLog
from vmrewind.journal.format import run_name
from vmrewind.journal.identity import image_identity
from vmrewind.journal.runs import (
    TAKEOVER_PENDING,
    Head,
    ImageIdentity,
    Position,
    RunInfo,
    private_directory,
    read_run,
    run_path,
    sync_directory,
    write_durably,
)
from vmrewind.paths import VmPaths
from vmrewind.recover.claim import end_of, register, takeover_run
from vmrewind.recover.in_place import stopped
from vmrewind.recover.restore import Progress, restore
from vmrewind.repository.repository import VmRepository
from vmrewind.start.identity import known_uuid
from vmrewind.start.images import refuse_half_restored
from vmrewind.start.known_repository import note_repository
from vmrewind.start.saved_state import refuse_change
from vmrewind.vmconfig.model import VmConfig

_DIRECTORY_MODE: Final = 0o711
"""Once the VM is not protected any more, QEMU's user must get through to the images."""


class Configuring(Protocol):
    """How the stored configuration becomes one of this host."""

    def write(self, stored: bytes, suffix: str, images: Mapping[str, Path], directory: Path) -> str:
        """Write it into ``directory``, naming the images; returns the file's name. Raises ConfigError."""

    def load(self, path: Path) -> VmConfig:
        """Read and check what was written. Raises ConfigError."""


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What a takeover made. ``position`` is the moment taken over, ``known_until_ns`` the time of the last record that the
    repository had of the VM then; ``images`` by target."""

    vm: str
    run: int
    position: Position
    known_until_ns: int
    images: Mapping[str, Path]
    config: Path


@dataclass(frozen=True, slots=True)
class _Note:
    """What was restored and is to be made this host's own."""

    directory: Path
    at: str | None
    config: str
    known_until_ns: int
    info: RunInfo
    before: Sequence[RunInfo]
    images: Mapping[str, ImageIdentity]

    def to_json(self) -> bytes:
        plain = {
            "directory": str(self.directory),
            "at": self.at,
            "config": self.config,
            "known_until_ns": self.known_until_ns,
            "info": self.info.to_json().decode(),
            "before": [info.to_json().decode() for info in self.before],
            "images": {target: asdict(identity) for target, identity in self.images.items()},
        }
        return json.dumps(plain).encode() + b"\n"

    @classmethod
    def read(cls, journal: Path) -> _Note | None:
        path = journal / TAKEOVER_PENDING
        try:
            plain: dict[str, Any] = json.loads(content(path))
            return cls(
                Path(plain["directory"]),
                plain["at"],
                plain["config"],
                plain["known_until_ns"],
                RunInfo.from_json(plain["info"].encode(), str(path)),
                [RunInfo.from_json(info.encode(), str(path)) for info in plain["before"]],
                {target: ImageIdentity(**identity) for target, identity in plain["images"].items()},
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptionError(f"{path}: not a takeover's note: {error!r}", "remove it, and run the takeover again") from error


def take_over(
    repository: VmRepository,
    paths: VmPaths,
    journal: Path,
    images: Path,
    at: str | None,
    branch: str | None,
    configuring: Configuring,
    progress: Progress,
    say: Callable[[str], None],
    last_step: Callable[[Path], None] = lambda _: None,
) -> TakenOver:
    """Take the repository's VM over onto this host: its images to ``images``/<name>, its state to ``paths`` and ``journal``.

    ``at`` is a moment, None the latest one. ``last_step`` is called with the configuration's file, last of all. Raises
    VmStateError if the VM runs here, UsageError if there are files already, ImageError for disks that no repository
    holds whole, and what history and repository raise.
    """
    _refuse_another(paths, repository)
    private_directory(journal)
    with stopped(journal):
        refuse_half_restored(repository.name, journal)
        refuse_change(paths)
        note = _noted(journal, images / repository.name, at)
        if note is not None and _is_out_of_date(repository, note, branch):
            _begin_anew(note, journal, say)
            note = None
        if note is None:
            with _partial(images, repository.name) as partial:
                note = _restore(repository, partial, images / repository.name, at, branch, configuring, progress)
                write_durably(journal / TAKEOVER_PENDING, note.to_json())
                _give_name(partial, note)
        register(repository, note.info)
        _finish_old_run(journal, say)
        _become(note, paths, journal, configuring)
        note_repository(paths, repository.repository.url)
        config = note.directory / note.config
        last_step(config)
        EventLog(paths.events(note.info.run)).write("takeover.done", parent=run_name(_parent(note).run), seq=_parent(note).seq)
        (journal / TAKEOVER_PENDING).unlink()
        sync_directory(journal)
    found = {target: Path(identity.path) for target, identity in note.images.items()}
    return TakenOver(repository.name, note.info.run, _parent(note), note.known_until_ns, found, config)


def _refuse_another(paths: VmPaths, repository: VmRepository) -> None:
    """Two VMs of one name would share their local state."""
    if (known := known_uuid(paths)) is not None and known != (wanted := repository.uuid()):
        raise VmStateError(
            f"{repository.name}: this host knows another VM of that name (uuid {known}, the repository's has {wanted})",
            f"move {paths.state} away if that one is gone for good",
        )


def _noted(journal: Path, directory: Path, at: str | None) -> _Note | None:
    """A takeover that was begun and can be gone on with, None if one begins anew."""
    note = _Note.read(journal)
    if note is None:
        return None
    found = {target: _identity(Path(identity.path)) for target, identity in note.images.items()}
    if not any(found.values()):
        # Its files have not got their name yet, or were moved away since.
        return None
    if (note.directory, note.at) != (directory, at):
        raise UsageError(
            f"a takeover into {note.directory}, at {note.at or 'the latest moment'}, was begun here and did not end",
            f"run that one again; or remove {note.directory} and {journal / TAKEOVER_PENDING}",
        )
    if found != note.images:
        raise ImageError(
            f"{note.directory}: its images were changed since the takeover was begun",
            f"move {note.directory} away, and run it again",
        )
    return note


def _is_out_of_date(repository: VmRepository, note: _Note, branch: str | None) -> bool:
    """Whether the repository has gone on since the note was written: what it says is not the moment to take over any more.

    One that is registered counts: other hosts go by it already.
    """
    with History.open(repository.name, None, repository) as history:
        if history.problem is not None:
            raise history.problem
        if note.info.run in history.runs:
            return False
        if any(run > note.info.run for run in history.runs):
            return True
        chosen = history.branch(branch)
        return note.at is None and resolve(history, chosen, "latest", chosen.targets) != _parent(note)


def _begin_anew(note: _Note, journal: Path, say: Callable[[str], None]) -> None:
    """Remove what a takeover of a former moment restored; its images are as it left them."""
    say(f"the repository has gone on since {note.directory} was restored: restoring it anew")
    (journal / TAKEOVER_PENDING).unlink()
    sync_directory(journal)
    for identity in note.images.values():
        Path(identity.path).unlink()
    (note.directory / note.config).unlink(missing_ok=True)
    try:
        note.directory.rmdir()
    except OSError as error:
        raise UsageError(f"{note.directory}: holds other files as well", "move it away, and run the takeover again") from error


def _known_until(history: History, branch: Branch) -> int:
    """Time of the last record of the branch that the repository has."""
    return max(i.last.time_ns for target in branch.targets for i in history.coverage(target, branch).intervals[-1:])


def _identity(path: Path) -> ImageIdentity | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return image_identity(fd, path)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _partial(images: Path, name: str) -> Iterator[Path]:
    """An empty directory beside the one to be; what a killed takeover left there is removed."""
    directory, partial = images / name, images / f".{name}.taking-over"
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists; nothing is overwritten", "move it away, or name another directory with --images")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"{partial}: cannot be made a directory: {error.strerror}", "name another directory with --images"
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{directory}: another takeover is writing it", "wait for it") from error
        if os.fstat(fd).st_uid != os.geteuid():
            raise ImageError(f"{partial}: was put there by somebody else", "name another directory with --images")
        for entry in partial.iterdir():
            entry.unlink()
        partial.chmod(_DIRECTORY_MODE)
        yield partial
        if partial.exists():
            shutil.rmtree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(fd)


def _restore(
    repository: VmRepository,
    partial: Path,
    directory: Path,
    at: str | None,
    branch: str | None,
    configuring: Configuring,
    progress: Progress,
) -> _Note:
    with History.open(repository.name, None, repository) as history:
        if history.problem is not None:
            raise history.problem
        chosen = history.branch(branch)
        position = resolve(history, chosen, at or "latest", chosen.targets)
        source = history.runs[position.run]
        if {disk.target for disk in source.disks} != set(chosen.targets):
            raise UsageError(
                f"{repository.name} had other disks then: {', '.join(disk.target for disk in source.disks)}",
                f"choose the branch of that run: --branch {run_name(source.run).lstrip('0')}",
            )
        for disk in source.disks:
            if disk.backing is not None:
                raise ImageError(
                    f"disk {disk.target} stands on the backing file {disk.backing}, which no repository holds",
                    "restore the disk (vmrewind restore --output), put its backing file where it belongs, and make one image of "
                    "the two (qemu-img convert)",
                )
        known_until_ns = _known_until(history, chosen)
        restored = restore(history, chosen.targets, position, partial, progress)
        final = {disk.target: directory / disk.path.name for disk in restored.disks}
        legs = history.branch_of_run(position.run).legs
        stored = config_of(history, repository, position)
        if stored is None:
            raise RepositoryError(
                f"{repository.repository.url}: holds no configuration of {repository.name}",
                "restore its disks (vmrewind restore --output) and write the configuration by hand",
            )
        config = configuring.write(repository.config(stored), stored.suffix, final, partial)
        configured = {disk.target for disk in configuring.load(partial / config).protection.disk}
        if configured != set(final):
            raise ImageError(
                f"{repository.name}: its configuration names the disks {', '.join(sorted(configured))}, its history has "
                f"{', '.join(final)}",
                "choose another moment, or restore the disks with --output",
            )
        identities = {}
        for made in restored.disks:
            identity = _identity(made.path)
            assert identity is not None, "it was just restored"
            identities[made.target] = replace(identity, path=str(final[made.target]))
        before = [leg.info for leg in legs]
        info = takeover_run(source, position, final, history.runs)
    return _Note(directory, at, config, known_until_ns, info, before, identities)


def _give_name(partial: Path, note: _Note) -> None:
    sync_directory(partial)
    try:
        partial.rename(note.directory)
    except OSError as error:
        raise UsageError(f"{note.directory}: {error.strerror}; nothing is overwritten", "move it away") from error
    sync_directory(note.directory.parent)


def _finish_old_run(journal: Path, say: Callable[[str], None]) -> None:
    """What an earlier life of the VM on this host left in its journal, and on its old images, is made whole."""
    try:
        recover(journal, say)
    except VmrewindError as error:
        say(f"what the last run on this host left is not put onto its old images: {error}")


def _become(note: _Note, paths: VmPaths, journal: Path, configuring: Configuring) -> None:
    """Have the VM's next start here go on from the takeover."""
    for info in (*note.before, note.info):
        try:
            read_run(journal, info.run)
        except (FileNotFoundError, CorruptionError):
            write_durably(run_path(journal, info.run), info.to_json())
    write_durably(paths.identity, json.dumps({"name": note.info.vm, "uuid": note.info.uuid}).encode() + b"\n")
    configuring.load(note.directory / note.config).save(paths.config)
    for disk in note.info.disks:
        # What an earlier life of the VM here began is of another image.
        remove(journal, disk.target)
    write_durably(journal / "head.json", Head(end_of(note.info), dict(note.images)).to_json())


def _parent(note: _Note) -> Position:
    assert note.info.parent is not None, "a takeover goes on from a moment"
    return note.info.parent
