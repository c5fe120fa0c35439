"""The structure of one VM's part of a repository: its small objects, the tree of its runs, and what the segments' names cover."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vmrewind.errors import CorruptionError
from vmrewind.history.rows import between, of_disk
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import DiskInfo, RunInfo
from vmrewind.paths import VmPaths
from vmrewind.recover.affected import Affected, Loss, Tree
from vmrewind.recover.contents import same_rows, whole_segment_lost
from vmrewind.recover.findings import Finding, Kind
from vmrewind.recover.restore import Progress
from vmrewind.repository import layout
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.manifest import Manifest
from vmrewind.repository.repository import VmRepository
from vmrewind.repository.segment import HEADER, Rows, ShippedSegment

PUT_BACK: Final = "put it back from another copy of the repository, if there is one"
NEW_BASE: Final = f"{PUT_BACK}; else vmrewind backup, at the VM's next stop, begins a history that does not need it"
STORE_ANEW: Final = "a backup of a disk that still holds that piece stores it anew; in an object store, remove that object first"
_SHOWN_MAX: Final = 20
"""Missing chunks of one base that are named one by one."""

Found = Callable[[Finding], None]
UseManifest = Callable[[Manifest], Sequence[int]]
"""Told of each manifest; returns the numbers of its chunks that are missing."""


@dataclass
class VmObjects:
    """What a listing shows of a VM, and what could be read of it. ``sizes``: bytes of each object by key."""

    repository: VmRepository
    sizes: dict[str, int]
    uuid: str | None = None
    runs: dict[int, RunInfo] = field(default_factory=dict)
    segments: list[SegmentName] = field(default_factory=list)
    bases: list[tuple[str, str]] = field(default_factory=list)
    """(disk, base id)"""
    gone: list[SegmentName] = field(default_factory=list)
    """Segments that an earlier verification saw."""
    damaged: dict[str, CorruptionError] = field(default_factory=dict)
    """Small objects that are there and damaged."""

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.repository.name

    @functools.cached_property
    def small(self) -> frozenset[str]:
        """The objects that are not segments: each of them is read whole each time."""
        return frozenset(key for key in self.sizes if layout.parse_segment_key(self.name, key) is None)

    @property
    def base_keys(self) -> list[str]:
        """The manifests' keys."""
        return [layout.base_key(self.name, *base) for base in self.bases]

    def tree(self) -> Tree:
        """The runs, with the bases whose manifests are there."""
        keys = {
            (i.run, target): layout.base_key(self.name, target, base)
            for i in self.runs.values()
            for target, base in i.bases.items()
        }
        return Tree(self.repository, self.runs, self.segments, {use for use, key in keys.items() if key in self.sizes}, self.gone)

    def disks(self, run: int) -> dict[int, str]:
        """Targets of a run's disks by index; nothing of a run that is not described."""
        return {disk.index: disk.target for disk in self.runs[run].disks} if run in self.runs else {}

    def losses(self, target: str, base_id: str, *, partly: bool) -> list[Loss]:
        """What the loss of a base, or of a part of it, costs."""
        users = (info for info in self.runs.values() if info.bases.get(target) == base_id)
        return [Loss(target, info.run, info.first_seq, partly) for info in users]

    def everything(self) -> list[Loss]:
        """Every moment of the VM."""
        return [Loss(disk.target, info.run, info.first_seq) for info in self.runs.values() for disk in info.disks]


class Structure:
    """One pass over a VM's small objects and names. ``found`` is told of what is wrong."""

    def __init__(self, vm: VmObjects, found: Found, progress: Progress) -> None:
        self._vm = vm
        self._progress = progress
        self._found = found

    def check(self, use_manifest: UseManifest) -> None:
        """Read every small object and check how they and the names fit together. Raises what the store raises."""
        vm = self._vm
        missing: list[tuple[Manifest, list[tuple[str, int]]]] = []
        claims: dict[str, str] = {}
        unknown = []
        small_bytes, done_bytes = sum(vm.sizes[key] for key in vm.small), 0
        for key in sorted(vm.sizes):
            try:
                if key == layout.vm_key(vm.name):
                    vm.uuid = vm.repository.uuid()
                elif key.startswith(layout.run_prefix(vm.name)):
                    info = vm.repository.run(key)
                    vm.runs[info.run] = info
                    claims[key] = info.uuid
                elif (config := layout.parse_config_key(vm.name, key)) is not None:
                    vm.repository.config(config)
                elif (name := layout.parse_segment_key(vm.name, key)) is not None:
                    vm.segments.append(name)
                elif (base := _base_of(vm.name, key)) is not None:
                    vm.bases.append(base)
                    manifest = vm.repository.base(*base)
                    claims[key] = manifest.uuid
                    chunks = [(str(manifest.chunks[number]), number * manifest.chunk_size) for number in use_manifest(manifest)]
                    # Of the many chunks of many bases only those that are needed stay in memory.
                    if chunks:
                        missing.append((dataclasses.replace(manifest, chunks=()), chunks))
                else:
                    unknown.append(key)
            except CorruptionError as error:
                vm.damaged[key] = error
            if key in vm.small:
                done_bytes += vm.sizes[key]
                self._progress(f"structure of {vm.name}", done_bytes, small_bytes)
        tree = vm.tree()
        self._small_objects(tree)
        self._owner(claims)
        for manifest, chunks in missing:
            self._missing_chunks(tree, manifest, chunks)
        self._runs(tree)
        parents = {info.parent.run for info in vm.runs.values() if info.parent is not None}
        for run in sorted(({name.run for name in vm.segments} | parents) - vm.runs.keys()):
            self._undescribed(tree, run)
        for name in vm.segments:
            if vm.sizes[name.key] < HEADER.size:
                message = f"the segment has {vm.sizes[name.key]} bytes, fewer than its header"
                self._damage(name.key, message, NEW_BASE, tree, whole_segment_lost(name, vm.disks(name.run)))
        for key in unknown:
            self._found(Finding(Kind.NOTE, vm.name, key, "nothing that vmrewind knows", "remove it, if somebody put it there"))

    def _damage(self, key: str, message: str, hint: str, tree: Tree, losses: Sequence[Loss], more: Iterable[Affected] = ()) -> None:
        self._found(Finding(Kind.DAMAGE, self._vm.name, key, message, hint, (*tree.affected(losses), *more)))

    def _small_objects(self, tree: Tree) -> None:
        vm = self._vm
        if layout.vm_key(vm.name) not in vm.sizes:
            hint = f"{PUT_BACK}; the VM's next start here writes it anew"
            self._damage(layout.vm_key(vm.name), "missing: it says which VM the name belongs to", hint, tree, ())
        for key, error in vm.damaged.items():
            losses: list[Loss] = []
            more: list[Affected] = []
            if key.startswith(layout.run_prefix(vm.name)):
                # Without it the tree is not known, and no moment is guessed.
                losses = vm.everything()
                more = [one for run in {name.run for name in vm.segments} - vm.runs.keys() for one in tree.undescribed(run)]
            elif (base := _base_of(vm.name, key)) is not None:
                losses = vm.losses(*base, partly=False)
            self._damage(key, str(error), NEW_BASE if losses else PUT_BACK, tree, losses, more)

    def _owner(self, claims: Mapping[str, str]) -> None:
        """The VM that the objects say they belong to is one."""
        vm = self._vm
        for key, uuid in claims.items():
            if vm.uuid is not None and uuid != vm.uuid:
                message = f"belongs to the VM with uuid {uuid}; by {layout.vm_key(vm.name)} this one has {vm.uuid}"
                self._found(
                    Finding(Kind.DAMAGE, vm.name, key, message, "find out which of the two objects was put there, and by whom")
                )

    def _missing_chunks(self, tree: Tree, manifest: Manifest, missing: Sequence[tuple[str, int]]) -> None:
        for chunk_id, at in missing[:_SHOWN_MAX]:
            message = f"missing: bytes {at} and on of base {manifest.id} of disk {manifest.disk}"
            losses = self._vm.losses(manifest.disk, manifest.id, partly=True)
            self._damage(layout.chunk_key(chunk_id), message, NEW_BASE, tree, losses)
        if len(missing) > _SHOWN_MAX:
            key = layout.base_key(self._vm.name, manifest.disk, manifest.id)
            self._damage(key, f"{len(missing) - _SHOWN_MAX} more of its chunks are missing", NEW_BASE, tree, ())

    # -- the tree

    def _runs(self, tree: Tree) -> None:
        vm = self._vm
        for info in vm.runs.values():
            key = layout.run_key(vm.name, info.run)
            if info.parent is not None and info.first_seq != info.parent.seq + 1:
                self._damage(
                    key, f"begins with record {info.first_seq}, its parent ends with {info.parent.seq}", NEW_BASE, tree, ()
                )
            if self._in_circle(info):
                self._damage(key, "is its own ancestor", NEW_BASE, tree, vm.everything())
            for target, base_id in info.bases.items():
                base_key = layout.base_key(vm.name, target, base_id)
                if base_key not in vm.sizes:
                    goes_on = info.parent is not None and target not in info.gaps
                    losses = [] if goes_on else [Loss(target, info.run, info.first_seq)]
                    way_round = ", which can be composed from the runs before it" if goes_on else ""
                    self._damage(
                        base_key,
                        f"missing: the base of disk {target} of run {run_name(info.run)}{way_round}",
                        NEW_BASE,
                        tree,
                        losses,
                    )
            for disk in info.disks:
                self._coverage(tree, info, disk)

    def _in_circle(self, info: RunInfo) -> bool:
        seen = {info.run}
        at = info
        while at.parent is not None and at.parent.run in self._vm.runs:
            at = self._vm.runs[at.parent.run]
            if at.run in seen:
                return at.run == info.run
            seen.add(at.run)
        return False

    def _undescribed(self, tree: Tree, run: int) -> None:
        """A run that others go on from, or that there are segments of."""
        vm = self._vm
        key = layout.run_key(vm.name, run)
        followers = [info for info in vm.runs.values() if info.parent is not None and info.parent.run == run]
        losses = [Loss(d.target, info.run, info.first_seq) for info in followers for d in info.disks if d.target not in info.bases]
        if key not in vm.damaged and (losses or tree.segments_of(run)):
            hint = PUT_BACK if tree.segments_of(run) else NEW_BASE
            message = f"missing: the description of run {run_name(run)}, of which there are {len(tree.segments_of(run))} segments"
            self._damage(key, message, hint, tree, losses, tree.undescribed(run))

    # -- what the names cover

    def _coverage(self, tree: Tree, info: RunInfo, disk: DiskInfo) -> None:
        names = tree.segments(info.run, disk.index)
        if not names and tree.segments_of(info.run):
            message = f"no record of disk {disk.target} of run {run_name(info.run)} was carried here"
            self._found(
                Finding(Kind.GAP, self._vm.name, layout.run_key(self._vm.name, info.run), message, "vmrewind ship on carries it")
            )
            return
        expected = info.first_seq
        last: SegmentName | None = None
        for name in names:
            if name.first > expected:
                self._hole(tree, info, disk, expected, name.first - 1)
            elif last is not None and name.first <= last.last:
                self._overlap(tree, last, name, disk)
            expected = max(expected, name.last + 1)
            last = name if last is None or name.last > last.last else last
        known = tree.known_end(info.run, disk.target)
        if known is not None and known.seq >= expected:
            if known.carried:
                self._hole(tree, info, disk, expected, known.seq)
            else:
                message = f"{_records(expected, known.seq, disk, info)} were not carried here yet"
                affected = tree.affected([Loss(disk.target, info.run, expected)])
                self._found(Finding(Kind.GAP, self._vm.name, layout.run_key(self._vm.name, info.run), message, "", affected))

    def _hole(self, tree: Tree, info: RunInfo, disk: DiskInfo, first: int, last: int) -> None:
        """Records that no object has: those that are known to have vanished are told of by themselves."""
        vm = self._vm
        key = layout.run_key(vm.name, info.run)
        explained: list[tuple[int, int, str]] = [
            (name.first, name.last, "") for name in self._vm.gone if name.run == info.run and name.carries(disk.index)
        ]
        explained += _declared_holes(vm.name, info.run, disk.target)
        at = first
        for low, high, cause in sorted(explained):
            if high < at or low > last:
                continue
            if low > at:
                self._unexplained(tree, info, disk, at, low - 1)
            at, until = high + 1, min(high, last)
            if cause:
                message = f"{_records(max(low, first), until, disk, info)} never came here: {cause}"
                losses = [Loss(disk.target, info.run, max(low, first))]
                self._found(Finding(Kind.GAP, vm.name, key, message, "vmrewind backup makes a new base", tree.affected(losses)))
        if at <= last:
            self._unexplained(tree, info, disk, at, last)

    def _unexplained(self, tree: Tree, info: RunInfo, disk: DiskInfo, first: int, last: int) -> None:
        key = f"{layout.segment_prefix(self._vm.name)}{run_name(info.run)}-{first:016x}-…"
        message = f"missing: {_records(first, last, disk, info)} are in no object"
        hint = (
            f"they were deleted, or the journal recycled them before they were carried: then host {info.host} knows of it "
            f"(vmrewind events: ship.hole) and vmrewind backup makes a new base; else {PUT_BACK}"
        )
        self._damage(key, message, hint, tree, [Loss(disk.target, info.run, first)])

    def _overlap(self, tree: Tree, one: SegmentName, other: SegmentName, disk: DiskInfo) -> None:
        """A put that was given up may have arrived late: then the records are the same."""
        low, high = other.first, min(one.last, other.last)
        try:
            rows = [self._rows(name, disk.index, low, high) for name in (one, other)]
        except CorruptionError:
            return  # what is wrong with the object itself is told where its content is read
        if not same_rows(*rows):
            message = f"has other records {low} to {high} of disk {disk.target} than {one.key}"
            losses = [Loss(disk.target, other.run, low)]
            self._damage(other.key, message, "find out what else ships this VM to this repository", tree, losses)

    def _rows(self, name: SegmentName, disk: int, low: int, high: int) -> Rows:
        segment = ShippedSegment(lambda offset, length: self._vm.repository.get_segment(name, offset, length), name)
        return of_disk(between(segment.rows, low, high), disk)


def _records(first: int, last: int, disk: DiskInfo, info: RunInfo) -> str:
    return f"records {first} to {last} of disk {disk.target} of run {run_name(info.run)}"


def _base_of(vm: str, key: str) -> tuple[str, str] | None:
    """(disk, base id) of a manifest's key, None for another key."""
    component, _, name = key.removeprefix(f"{layout.vm_prefix(vm)}bases/").partition("/")
    disk, base_id = layout.decode_name(component), name.removesuffix(".json")
    return (disk, base_id) if key == layout.base_key(vm, disk, base_id) else None


def _declared_holes(vm: str, run: int, target: str) -> Iterator[tuple[int, int, str]]:
    """(first, last, cause) of what ship, on this host, could not carry of a run."""
    try:
        lines = VmPaths(vm).events(run).read_bytes().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        if b"ship.hole" not in line:
            continue
        try:
            event = json.loads(line)
            if event["event"] == "ship.hole" and target in event["disks"]:
                yield int(event["first_seq"]), int(event["last_seq"]), str(event["cause"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut off
