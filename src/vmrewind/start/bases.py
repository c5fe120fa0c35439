"""Bases at a VM's start: is there one that the image still equals, and if not, make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmrewind.capture.image import Image
from vmrewind.errors import CorruptionError
from vmrewind.journal.runs import ImageIdentity, write_durably
from vmrewind.paths import VmPaths
from vmrewind.repository.base import make_base
from vmrewind.repository.manifest import Manifest
from vmrewind.repository.repository import VmRepository

Progress = Callable[[str, int, int, int], None]
"""Called with (disk, bytes done, bytes in total, bytes sent)."""


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A base made on this host: enough of its manifest to recognise the image that it was made of."""

    id: str
    disk: str
    uuid: str
    size: int
    identity: ImageIdentity


def local_bases(paths: VmPaths, disk: str) -> list[BaseCopy]:
    """The bases of a disk that were made on this host, newest first."""
    found = []
    for path in sorted((paths.bases / disk).glob("*.json"), reverse=True):
        try:
            manifest = Manifest.from_json(path.read_bytes(), str(path))
        except CorruptionError:
            # A copy only: the repository has the manifest. At worst a base is made that was not needed.
            continue
        found.append(BaseCopy(manifest.id, manifest.disk, manifest.uuid, manifest.size, manifest.identity))
    return found


def matching_base(paths: VmPaths, repository: VmRepository | None, disk: str, uuid: str, identity: ImageIdentity) -> str | None:
    """The newest base that the image still equals, by its identity; None if there is none.

    A base that the repository no longer has is none. Without a repository (it cannot be reached) the local copy's word is taken.
    """
    if not identity.tells:
        return None
    present = None if repository is None else set(repository.bases(disk))
    for base in local_bases(paths, disk):
        if base.uuid == uuid and base.identity == identity and (present is None or base.id in present):
            return base.id
    return None


def back_up(paths: VmPaths, repository: VmRepository, image: Image, uuid: str, progress: Progress | None) -> Manifest:
    """Make a base of an open, locked image, and keep a copy of its manifest here."""

    def report(done: int, total: int, sent: int) -> None:
        if progress is not None:
            progress(image.target, done, total, sent)

    manifest = make_base(
        repository,
        image.target,
        image.fd,
        uuid=uuid,
        path=Path(image.path),
        size=image.size,
        format=image.format,
        backing=image.backing,
        partial=paths.state / f"backup-{image.target}.partial",
        progress=report,
    )
    write_durably(paths.bases / image.target / f"{manifest.id}.json", manifest.to_json())
    return manifest
