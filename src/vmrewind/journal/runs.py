"""What is known of a run besides its records: ``runs/<run>.json`` and ``head.json`` (docs/architecture.md gives both).

Plain JSON and dataclasses, because the start process, capture, ship and the history all use them and capture may import the
standard library only.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from vmrewind.errors import CorruptionError
from vmrewind.journal.content import Unreadable, content
from vmrewind.journal.format import run_name

Report = Callable[[CorruptionError], None]
"""Told of a file that cannot be read, which is done without then; it may raise the error instead."""

RESTORE_PENDING = "restore-pending.json"
"""In a journal directory: a restore in place has begun and not ended, so the images hold no moment."""

TAKEOVER_PENDING = "takeover-pending.json"
"""In a journal directory: a takeover has begun and not ended, so the VM is not this host's yet."""


def new_run_id() -> int:
    """A run id that sorts by time and that no other host will make: unix milliseconds, then 22 random bits."""
    return time.time_ns() // 1_000_000 << 22 | secrets.randbits(22)


@dataclass(frozen=True, slots=True)
class Position:
    """A moment as (run, seq): the state right after that record. ``time_ns`` is the record's time since the epoch."""

    run: int
    seq: int
    time_ns: int

    def as_plain(self) -> dict[str, Any]:
        """As files of the local state have it: the run by its name."""
        return asdict(self) | {"run": run_name(self.run)}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Position:
        """What ``as_plain`` gave. Raises KeyError, TypeError, ValueError."""
        return cls(int(plain["run"], 16), int(plain["seq"]), int(plain["time_ns"]))


@dataclass(frozen=True, slots=True)
class ImageIdentity:
    """What tells whether a disk image was touched behind our back (journal/identity.py). ``device`` is the block device's number,
    0 for files; ``writes`` is what the kernel has counted of writes to it, empty for files and where it does not tell."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    device: int
    writes: str = ""

    @property
    def tells(self) -> bool:
        """Whether an equal identity at another time means that nobody touched the image in between."""
        return not self.device or bool(self.writes)


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """A disk as a run assigned it. ``size`` is the export's, bytes; ``index`` is the disk number in its records."""

    index: int
    target: str
    size: int
    format: str
    image: str
    backing: str | None = None


@dataclass(frozen=True, slots=True)
class Discontinuity:
    """Why a disk of a run does not continue its parent's history, and since when that history is unknown."""

    cause: str
    since_ns: int


@dataclass(frozen=True, slots=True)
class RunInfo:
    """The beginning of a run. ``bases[target]`` is the id of the base that the disk equals at ``first_seq``."""

    run: int
    parent: Position | None
    vm: str
    uuid: str
    host: str
    start_time_ns: int
    first_seq: int
    disks: tuple[DiskInfo, ...]
    bases: Mapping[str, str] = field(default_factory=dict)
    gaps: Mapping[str, Discontinuity] = field(default_factory=dict)
    takeover: bool = False
    """Whether the run stands for a takeover: from it on the VM belongs to the host that made it (history/succession.py)."""
    claim: int = 0
    """The newest takeover that the run's host went on from, 0 for none. The parent need not tell: a rewind goes back behind it."""
    config: str = ""
    """XXH3-64 of the VM's configuration, hex; empty in a takeover's own run."""

    def disk(self, target: str) -> DiskInfo | None:
        """The disk called ``target``, None if this run had no such disk."""
        return next((disk for disk in self.disks if disk.target == target), None)

    def to_json(self) -> bytes:
        """The file's content."""
        plain = asdict(self) | {"run": run_name(self.run), "bases": dict(self.bases)}
        plain["gaps"] = {target: asdict(gap) for target, gap in self.gaps.items()}
        if self.parent is not None:
            plain["parent"]["run"] = run_name(self.parent.run)
        for key in ("takeover", "claim", "config"):
            if not plain[key]:
                del plain[key]  # what is described already must not be described in another way
        if self.claim:
            plain["claim"] = run_name(self.claim)
        return _sealed(plain)

    @classmethod
    def from_json(cls, data: bytes, origin: str) -> RunInfo:
        """Parse a file's content; ``origin`` names it in a CorruptionError."""
        try:
            plain = _unsealed(data)
            return cls(
                run=int(plain["run"], 16),
                parent=Position.of_plain(plain["parent"]) if plain["parent"] else None,
                vm=plain["vm"],
                uuid=plain["uuid"],
                host=plain["host"],
                start_time_ns=int(plain["start_time_ns"]),
                first_seq=int(plain["first_seq"]),
                disks=tuple(DiskInfo(**disk) for disk in plain["disks"]),
                bases=plain["bases"],
                gaps={target: Discontinuity(**gap) for target, gap in plain["gaps"].items()},
                takeover=bool(plain.get("takeover", False)),
                claim=int(plain.get("claim", "0"), 16),
                config=str(plain.get("config", "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _no_description(origin, error) from error


@dataclass(frozen=True, slots=True)
class Kept:
    """A base that is being made and that all writes were kept for until the run's end; the image's identity then."""

    base: str
    identity: ImageIdentity

    def still(self, now: ImageIdentity) -> bool:
        """Whether nobody has written to the image since, wherever its file lies by now; not if that cannot be told."""
        if self.identity.device or now.device:
            return self.identity.tells and self.identity == now
        left = self.identity
        return (left.size, left.mtime_ns, left.inode) == (now.size, now.mtime_ns, now.inode)


@dataclass(frozen=True, slots=True)
class DiskHead:
    """The moment that one disk's image holds, and the identity by which it is recognised (None: it cannot be)."""

    position: Position
    identity: ImageIdentity | None
    gap: str | None = None
    """As a Head's."""

    @property
    def why_apart(self) -> str:
        """In words, why such a disk's history does not go on from the moment that others were taken to without it."""
        held = f"it holds record {self.position.seq} of run {run_name(self.position.run)}"
        return self.gap or f"{held}: it was left as it was when another disk was taken to another moment"


@dataclass(frozen=True, slots=True)
class Head:
    """The moment that the images hold while no capture is alive, and the identity by which each is recognised."""

    position: Position
    images: Mapping[str, ImageIdentity]
    gap: str | None = None
    """The cause of a gap that begins with the moment, and goes on: what the images hold now is not known; ``images`` is empty."""
    kept: Mapping[str, Kept] = field(default_factory=dict)
    """Of each disk whose base is still being made, whether or not its history is known to the end."""
    apart: Mapping[str, DiskHead] = field(default_factory=dict)
    """The disks that were left as they were when others were taken to the moment, and so hold one of their own."""

    def of(self, target: str) -> DiskHead:
        """What is known of one disk."""
        return self.apart.get(target) or DiskHead(self.position, self.images.get(target), self.gap)

    def to_json(self) -> bytes:
        """The file's content."""
        plain: dict[str, Any] = self.position.as_plain() | {
            "images": {target: asdict(identity) for target, identity in self.images.items()},
        }
        plain |= {"gap": self.gap} if self.gap is not None else {}
        plain |= {"kept": {target: asdict(kept) for target, kept in self.kept.items()}} if self.kept else {}
        apart = {target: asdict(one) | {"position": one.position.as_plain()} for target, one in self.apart.items()}
        plain |= {"apart": apart} if apart else {}
        return _sealed(plain)

    @classmethod
    def from_json(cls, data: bytes) -> Head:
        """Parse a file's content. Raises ValueError, KeyError, TypeError, AttributeError if it makes no sense."""
        plain = _unsealed(data)
        images = {target: ImageIdentity(**identity) for target, identity in plain["images"].items()}
        kept = {t: Kept(one["base"], ImageIdentity(**one["identity"])) for t, one in plain.get("kept", {}).items()}
        apart = {}
        for target, one in plain.get("apart", {}).items():
            identity = ImageIdentity(**one["identity"]) if one["identity"] else None
            apart[target] = DiskHead(Position.of_plain(one["position"]), identity, one["gap"])
        return cls(Position.of_plain(plain), images, plain.get("gap"), kept, apart)

    @classmethod
    def from_file(cls, path: Path) -> Head:
        """Read and parse the file. Raises FileNotFoundError, CorruptionError."""
        try:
            return cls.from_json(content(path))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptionError(
                f"{path}: not a head description: {error!r}",
                "the next start takes the images for changed; or remove it",
            ) from error


def _sealed(plain: Mapping[str, Any]) -> bytes:
    """A small file's content with its checksum in it: a digit that changed at rest would lead to another moment, or disk."""
    return json.dumps({**plain, "xxh3": _checksum(plain)}, indent=1).encode() + b"\n"


def _unsealed(data: bytes) -> dict[str, Any]:
    """The content of a small file; raises ValueError. One without a checksum is taken as it is."""
    plain: dict[str, Any] = json.loads(data)
    if "xxh3" in plain and plain.pop("xxh3") != _checksum(plain):
        raise ValueError("its checksum is wrong")
    return plain


def _checksum(plain: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(plain, sort_keys=True).encode())


def run_path(journal: Path, run: int) -> Path:
    """Where a run's description lies in a journal directory."""
    return journal / "runs" / f"{run_name(run)}.json"


def _refuse(error: CorruptionError) -> None:
    raise error


def _no_description(origin: str, error: Exception) -> CorruptionError:
    return CorruptionError(
        f"{origin}: not a run's description: {error!r}", "put it back from the repository (vms/<vm>/runs) or from a backup"
    )


def described_runs(journal: Path) -> list[int]:
    """Every run that a journal directory has a description of, readable or not, oldest first."""
    try:
        stems = [name.removesuffix(".json") for name in os.listdir(journal / "runs") if name.endswith(".json")]
    except FileNotFoundError:
        return []
    return sorted(int(stem, 16) for stem in stems if re.fullmatch("[0-9a-f]{16}", stem))


def read_run(journal: Path, run: int) -> RunInfo:
    """A run's description; raises CorruptionError if it makes no sense."""
    path = run_path(journal, run)
    try:
        info = RunInfo.from_json(content(path), str(path))
    except Unreadable as error:
        raise _no_description(str(path), error) from error
    if info.run != run:
        raise CorruptionError(f"{path}: describes run {run_name(info.run)}", "put the right file back, from the repository say")
    return info


def local_runs(journal: Path, report: Report = _refuse) -> list[RunInfo]:
    """Every run that a journal directory describes, oldest first; empty if the directory does not exist.

    Raises CorruptionError for a damaged description, or hands it to ``report`` and leaves the run out.
    """
    found = []
    for run in described_runs(journal):
        try:
            found.append(read_run(journal, run))
        except CorruptionError as error:
            report(error)
    return found


def read_head(journal: Path, report: Report = _refuse) -> Head | None:
    """The journal's head, None while a capture is alive, after it died, or before the first run.

    Raises CorruptionError for a damaged one, or hands it to ``report``: then there is none.
    """
    path = journal / "head.json"
    try:
        return Head.from_file(path)
    except FileNotFoundError:
        return None
    except CorruptionError as error:
        report(error)
        return None


def write_durably(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that after a power loss either the old or the new content is there, whole.

    The file is its owner's alone, and so is every directory that is made for it.
    """
    private_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb", opener=private) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def private(path: str, flags: int) -> int:
    """An opener of files that, when they are made, are their owner's alone: they hold, or describe, what is on a VM's disks."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def private_directory(path: Path) -> None:
    """Make a directory and its parents where they are missing, each its owner's alone; those that exist are left as they are.

    Durable when this returns: what is synced in a directory is lost with the directory's own name.
    """
    if path.is_dir():
        return
    private_directory(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
