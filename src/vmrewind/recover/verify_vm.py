"""The structure of one VM's part of a repository: its small objects, the tree of its runs, and what the segments' names cover."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from vmrewind.errors import CorruptionError
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import RunInfo
from vmrewind.recover.affected import Affected, Loss, Tree
from vmrewind.recover.contents import whole_segment_lost
from vmrewind.recover.elsewhere import Elsewhere
from vmrewind.recover.findings import NEW_BASE, PUT_BACK, WAIT, Finding, Kind
from vmrewind.recover.restore import Progress
from vmrewind.recover.verify_coverage import Coverage
from vmrewind.repository import layout
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.manifest import Manifest
from vmrewind.repository.repository import VmRepository
from vmrewind.repository.segment import HEADER

_SHOWN_MAX: Final = 20
"""Missing chunks of one base that are named one by one."""

Found = Callable[[Finding], None]
UseManifest = Callable[[Manifest], Sequence[int]]
"""Told of each manifest; returns the numbers of its chunks that are missing."""
BeingMade = Callable[[str, str, str], str | None]
"""How much of a base, 0 to 1, is made by now, by (VM, disk, base id); None if that is not known here."""


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
    late: frozenset[str] = frozenset()
    """Keys of segments that came while the VM was listed: those before them may not have been seen."""
    gone_keys: Sequence[str] = ()
    """Objects that an earlier verification saw."""
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
    def gone(self) -> list[SegmentName]:
        """Segments that an earlier verification saw."""
        return [name for key in self.gone_keys if (name := layout.parse_segment_key(self.name, key)) is not None]

    @property
    def late_segments(self) -> list[SegmentName]:
        """Those that came while the VM was listed."""
        return [name for key in self.late if (name := layout.parse_segment_key(self.name, key)) is not None]

    def is_missing(self, key: str) -> bool:
        """Whether an object is not there. What was not listed is asked for: it may have come since. Raises RepositoryError."""
        return key not in self.sizes and self.repository.repository.store.size(key) is None

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

    def __init__(self, vm: VmObjects, found: Found, progress: Progress, being_made: BeingMade) -> None:
        self._vm = vm
        self._being_made = being_made
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
                    if key not in vm.late:
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
        here = {*vm.sizes, *vm.gone_keys}
        self._elsewhere = Elsewhere(vm.name, vm.runs, here, vm.repository.repository.created_ns)
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
        if vm.is_missing(layout.vm_key(vm.name)):
            hint = f"{PUT_BACK}; the VM's next start here writes it anew"
            self._damage(layout.vm_key(vm.name), "missing: it says which VM the name belongs to", hint, tree, ())
        prefix = layout.config_prefix(vm.name)
        if vm.runs and not any(key.startswith(prefix) for key in vm.sizes) and not list(vm.repository.configs()):
            message = "missing: there is no configuration of the VM, without which neither a takeover nor a drill is possible"
            self._damage(prefix, message, f"{PUT_BACK}; the VM's next start, with shipping on, puts it there anew", tree, ())
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
        coverage = Coverage(vm.repository, tree, self._found, self._elsewhere, gone=vm.gone, late=vm.late_segments)
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
                if self._elsewhere.base(target, base_id):
                    message = (
                        f"the base of disk {target} of run {run_name(info.run)} is older than this repository: it was never here"
                    )
                    affected = tree.affected([Loss(target, info.run, info.first_seq)])
                    hint = "the repository that the VM had before has it"
                    self._found(Finding(Kind.GAP, vm.name, base_key, message, hint, affected))
                elif base_key not in vm.sizes:
                    self._missing_base(tree, info, target, base_id)
            for disk in info.disks:
                coverage.check(info, disk)

    def _missing_base(self, tree: Tree, info: RunInfo, target: str, base_id: str) -> None:
        """A run's base that was not listed."""
        vm = self._vm
        key = layout.base_key(vm.name, target, base_id)
        # Asked first: one that is completed in between is there.
        being_made = self._being_made(vm.name, target, base_id)
        if not vm.is_missing(key):
            return
        goes_on = info.parent is not None and target not in info.gaps
        losses = [] if goes_on else [Loss(target, info.run, info.first_seq)]
        what = f"the base of disk {target} of run {run_name(info.run)}"
        way_round = ", which can be composed from the runs before it" if goes_on else ""
        if being_made is not None:
            message = f"still being made{being_made}: {what}{way_round}"
            self._found(Finding(Kind.GAP, vm.name, key, message, WAIT, tree.affected(losses)))
        elif key in vm.gone_keys:
            self._damage(key, f"gone, and an earlier verification saw it: {what}{way_round}", NEW_BASE, tree, losses)
        else:
            message = f"missing, or still being made on the VM's host: {what}{way_round}"
            self._damage(key, message, f"{WAIT}, or {NEW_BASE}", tree, losses)

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
        needed = [(info, d.target) for info in followers for d in info.disks if d.target not in info.bases]
        elsewhere = not tree.segments_of(run) and all(self._elsewhere.history(info, target) for info, target in needed)
        losses = [Loss(target, info.run, info.first_seq) for info, target in needed]
        if losses and elsewhere and key not in vm.damaged and key not in vm.gone_keys:
            message = f"run {run_name(run)}, older than this repository, was never here"
            hint = "the repository that the VM had before has it"
            self._found(Finding(Kind.GAP, vm.name, key, message, hint, tree.affected(losses)))
        elif key not in vm.damaged and (losses or tree.segments_of(run)) and vm.is_missing(key):
            hint = PUT_BACK if tree.segments_of(run) else NEW_BASE
            message = f"missing: the description of run {run_name(run)}, of which there are {len(tree.segments_of(run))} segments"
            self._damage(key, message, hint, tree, losses, tree.undescribed(run))


def _base_of(vm: str, key: str) -> tuple[str, str] | None:
    """(disk, base id) of a manifest's key, None for another key."""
    component, _, name = key.removeprefix(f"{layout.vm_prefix(vm)}bases/").partition("/")
    disk, base_id = layout.decode_name(component), name.removesuffix(".json")
    return (disk, base_id) if key == layout.base_key(vm, disk, base_id) else None
