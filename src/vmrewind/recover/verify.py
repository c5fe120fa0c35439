"""Verifying a repository: its structure by names and small objects, and on request every byte, in parallel and with bounded memory.

What is wrong is told as it is found. A store that does not answer is no damage: what it kept from being checked is told as such.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from vmrewind.errors import CorruptionError, VmrewindError
from vmrewind.recover.affected import Tree
from vmrewind.recover.contents import Problem, check_segment, whole_segment_lost
from vmrewind.recover.findings import NEW_BASE, PUT_BACK, STORE_ANEW, Finding, Kind, Part
from vmrewind.recover.restore import Progress
from vmrewind.recover.verified import Verified
from vmrewind.recover.verify_vm import BeingMade, Found, Structure, VmObjects
from vmrewind.repository import layout
from vmrewind.repository.chunks import CHUNK_SIZE
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.layout import SegmentName
from vmrewind.repository.manifest import Manifest
from vmrewind.repository.opening import open_store
from vmrewind.repository.repository import Repository
from vmrewind.vmconfig.model import Invalid, check_name

_READERS: Final = 4
_AHEAD_MAX: Final = 8
"""Objects under way: bounds memory to so many times the largest one, 8 MiB and a record, plain and packed."""
_FAILURES_MAX: Final = 3
"""Failures in a row after which the store counts as away: each has waited for its deadline already."""
_PACKED_MAX: Final = CHUNK_SIZE + (CHUNK_SIZE >> 7)
"""More than Zstandard can make of a chunk."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What to verify. ``vms``: names, None for all; ``data``: every byte; ``again_ns``: what was read before is read again."""

    vms: Sequence[str] | None
    data: bool
    again_ns: int


class _Away(Exception):
    """The store does not answer any more."""


@dataclass(frozen=True, slots=True)
class _Read:
    """What reading one object to its end brought: problems, or why it could not be read."""

    key: str
    size: int
    problems: Sequence[Problem]
    failure: VmrewindError | None = None


class Verification:
    """One verification. ``found`` is told of each finding, ``progress`` of the bytes read."""

    def __init__(
        self, repository: Repository, scope: Scope, known: Verified, found: Found, progress: Progress, being_made: BeingMade
    ) -> None:
        self._repository = repository
        self._store = repository.store
        self._scope = scope
        self._known = known
        self._found = found
        self._progress = progress
        self._being_made = being_made
        self._chunks: dict[bytes, int] | None = None
        """Bytes of every chunk that is there, by id; None if that could not be learned."""
        self._used: dict[bytes, int] = {}
        """Plain length of every chunk that some base names, by id."""
        self._vms: list[tuple[VmObjects, Tree]] = []
        self._failures = 0

    def run(self) -> list[Part]:
        """Verify; returns what was checked."""
        parts: list[Part] = []
        try:
            with self._asking(None, layout.CHUNKS):
                self._chunks = self._list_chunks()
            with self._asking(None, layout.VMS):
                names = list(self._names())
                parts += [self._vm(name) for name in names]
            parts.append(self._chunk_part())
            if self._scope.vms is None:
                self._key_slots()
                self._strangers()
        except _Away:
            pass
        return parts

    @contextmanager
    def _asking(self, vm: str | None, what: str) -> Iterator[None]:
        """Turn the store's errors into findings."""
        try:
            yield
        except VmrewindError as error:
            self._unchecked(vm, what, error)

    def _unchecked(self, vm: str | None, what: str, error: VmrewindError) -> None:
        kind = Kind.DAMAGE if isinstance(error, CorruptionError) else Kind.UNCHECKED
        self._found(Finding(kind, vm, what, str(error), error.hint))
        self._failures += kind is Kind.UNCHECKED
        if self._failures >= _FAILURES_MAX:
            self._found(Finding(Kind.UNCHECKED, None, self._repository.url, "the store does not answer: the rest was not checked"))
            raise _Away

    def _names(self) -> Iterator[str]:
        if self._scope.vms is not None:
            yield from self._scope.vms
            return
        components = set(self._store.children(layout.VMS))
        components |= {key.split("/")[1] for key in self._known.keys(layout.VMS)}
        for name in sorted(map(layout.decode_name, components)):
            try:
                check_name("vm", name)
            except Invalid as error:
                self._found(Finding(Kind.NOTE, None, layout.vm_prefix(name), f"no VM's name: {error}", "find out who put it there"))
            else:
                yield name

    # -- a VM

    def _vm(self, name: str) -> Part:
        part = Part(name)
        repository = self._repository.vm(name)
        with self._asking(name, layout.vm_prefix(name)):
            # Segments first: what they need was put before them, so the second listing has it. Each is in no order: of what
            # came while it was made it may show a segment without the one before.
            first = dict(self._store.list(layout.segment_prefix(name)))
            sizes = first | dict(self._store.list(layout.vm_prefix(name)))
            late = frozenset(key for key in sizes.keys() - first.keys() if layout.parse_segment_key(name, key) is not None)
            vm = VmObjects(repository, sizes, late=late)
            if not sizes and not any(True for _ in self._known.keys(layout.vm_prefix(name))):
                return part
            vm.gone_keys = gone = [key for key in self._known.keys(layout.vm_prefix(name)) if key not in sizes]
            findings: list[Finding] = []
            Structure(vm, findings.append, self._progress, self._being_made).check(self._use)
            tree = vm.tree()
            told = {finding.object for finding in findings}
            for key in gone:
                if key not in told:
                    self._gone(vm, tree, key)
            for finding in findings:
                self._found(finding)
            self._vms.append((vm, tree))
            part.objects, part.stored_bytes = len(sizes), sum(sizes.values())
            part.runs, part.bases = len(vm.runs), len(vm.bases)
            part.covered = list(_covered(vm, tree))
            for key in vm.small:
                if key not in vm.damaged:
                    self._known.read(key, sizes[key])
            part.read, part.read_bytes = len(vm.small), sum(sizes[key] for key in vm.small)
            self._segments(vm, tree, part)
        return part

    def _gone(self, vm: VmObjects, tree: Tree, key: str) -> None:
        """An object that an earlier verification saw."""
        known = self._known.get(key)
        segment = layout.parse_segment_key(vm.name, key)
        losses = whole_segment_lost(segment, vm.disks(segment.run)) if segment is not None else ()
        message = f"gone: an earlier verification saw it{f', {known.size} bytes' if known is not None else ''}"
        hint = f"{PUT_BACK}; if it was removed on purpose, {self._known.path} can be removed, too: it remembers it"
        self._found(Finding(Kind.DAMAGE, vm.name, key, message, hint, tree.affected(losses)))

    def _segments(self, vm: VmObjects, tree: Tree, part: Part) -> None:
        owner = uuid.UUID(vm.uuid).bytes if vm.uuid is not None else None

        def read(name: SegmentName) -> _Read:
            data = vm.repository.get_segment(name)
            return _Read(name.key, len(data), check_segment(data, name, owner, vm.disks(name.run)))

        tasks = [(name.key, partial(_reading, name.key, partial(read, name))) for name in self._due(vm, part)]
        names = {name.key: name for name in vm.segments}
        for done in self._read_all(tasks, f"segments of {vm.name}", vm.sizes, part):
            if isinstance(done.failure, CorruptionError):
                losses = whole_segment_lost(names[done.key], vm.disks(names[done.key].run))
                self._found(Finding(Kind.DAMAGE, vm.name, done.key, str(done.failure), NEW_BASE, tree.affected(losses)))
            elif done.failure is not None:
                self._unchecked(vm.name, done.key, done.failure)
            for problem in done.problems:
                self._found(Finding(Kind.DAMAGE, vm.name, done.key, problem.message, NEW_BASE, tree.affected(problem.losses)))

    def _due(self, vm: VmObjects, part: Part) -> Iterator[SegmentName]:
        for name in vm.segments:
            if self._is_due(name.key, vm.sizes[name.key], part):
                yield name

    def _is_due(self, key: str, size: int, part: Part) -> bool:
        """Whether an object is to be read: with ``data``, unless it was; else if it is not what it was, or is in doubt."""
        known = self._known.get(key)
        if known is not None and (known.size != size or known.doubtful):
            return True
        self._known.seen(key, size)
        if not self._scope.data:
            return False
        if known is not None and known.read_ns >= max(self._scope.again_ns, 1):
            part.earlier += 1
            return False
        return True

    def _read_all(
        self, tasks: Sequence[tuple[str, Callable[[], _Read]]], what: str, sizes: dict[str, int], part: Part
    ) -> Iterator[_Read]:
        """Read objects several at a time; what is right is noted."""
        total, done = sum(sizes[key] for key, _ in tasks), 0
        with ThreadPoolExecutor(_READERS, thread_name_prefix="verify") as pool:
            ahead: deque[Future[_Read]] = deque()
            waiting = deque(tasks)
            try:
                while waiting or ahead:
                    while waiting and len(ahead) < _AHEAD_MAX:
                        ahead.append(pool.submit(waiting.popleft()[1]))
                    read = ahead.popleft().result()
                    done += sizes[read.key]
                    self._progress(what, done, total)
                    if read.failure is None:
                        self._failures = 0
                        part.read += 1
                        part.read_bytes += read.size
                        if not read.problems:
                            self._known.read(read.key, sizes[read.key])
                    if read.problems or isinstance(read.failure, CorruptionError):
                        self._known.doubt(read.key, sizes[read.key])
                    if read.problems or read.failure is not None:
                        yield read
            finally:
                for future in ahead:
                    future.cancel()

    # -- chunks

    def _list_chunks(self) -> dict[bytes, int]:
        chunks = {}
        for key, size in self._store.list(layout.CHUNKS):
            chunk_id = key.rpartition("/")[2]
            if len(chunk_id) == 64 and key == layout.chunk_key(chunk_id) and not chunk_id.strip("0123456789abcdef"):
                chunks[bytes.fromhex(chunk_id)] = size
            else:
                self._found(Finding(Kind.NOTE, None, key, "nothing that vmrewind knows", "remove it, if somebody put it there"))
        return chunks

    def _use(self, manifest: Manifest) -> Sequence[int]:
        missing: dict[bytes, int] = {}
        for index, chunk_id in enumerate(manifest.chunks):
            if chunk_id is None:
                continue
            packed = bytes.fromhex(chunk_id)
            if self._chunks is not None and packed not in self._chunks:
                # It may have come since they were listed.
                size = self._store.size(layout.chunk_key(chunk_id))
                if size is None:
                    missing.setdefault(packed, index)
                    continue
                self._chunks[packed] = size
            self._used[packed] = manifest.chunk_length(index)
        return list(missing.values())

    def _chunk_part(self) -> Part:
        part = Part(None)
        if self._chunks is None:
            return part
        used = {chunk_id.hex(): self._chunks[chunk_id] for chunk_id in self._used if chunk_id in self._chunks}
        part.objects, part.stored_bytes = len(used), sum(used.values())
        sizes = {layout.chunk_key(chunk_id): size for chunk_id, size in used.items()}
        bad: dict[str, str] = {}
        tasks: list[tuple[str, Callable[[], _Read]]] = []
        for chunk_id, size in used.items():
            key = layout.chunk_key(chunk_id)
            if not 0 < size <= _PACKED_MAX:
                bad[chunk_id] = f"chunk {key} has {size} bytes: no chunk has"
            elif self._is_due(key, size, part):
                tasks.append((key, partial(_reading, key, partial(self._read_chunk, chunk_id))))
        for done in self._read_all(tasks, "chunks", sizes, part):
            if done.failure is not None and not isinstance(done.failure, CorruptionError):
                self._unchecked(None, done.key, done.failure)
                continue
            bad[done.key.rpartition("/")[2]] = str(done.failure or done.problems[0].message)
        if bad:
            self._damaged_chunks(bad)
        orphans = self._chunks.keys() - self._used.keys()
        if self._scope.vms is None and orphans and not self._unread_bases:
            size = sum(self._chunks[chunk_id] for chunk_id in orphans)
            message = f"{len(orphans)} chunks, {size} bytes, that no base names: of backups that were interrupted, or are under way"
            self._found(Finding(Kind.NOTE, None, layout.CHUNKS, message, "the next backup of the same content uses them"))
        return part

    def _read_chunk(self, chunk_id: str) -> _Read:
        data = self._repository.read_chunk(chunk_id)
        key, wanted = layout.chunk_key(chunk_id), self._used[bytes.fromhex(chunk_id)]
        wrong = [Problem(f"chunk {key} holds {len(data)} bytes, a base says {wanted}", ())] if len(data) != wanted else []
        return _Read(key, len(data), wrong)

    def _damaged_chunks(self, bad: dict[str, str]) -> None:
        """Tell of damaged chunks with the bases that they are part of: which those are is read once more."""
        for vm, tree in self._vms:
            for target, base_id in vm.bases:
                with self._asking(vm.name, layout.base_key(vm.name, target, base_id)):
                    if layout.base_key(vm.name, target, base_id) in vm.damaged:
                        continue
                    manifest = vm.repository.base(target, base_id)
                    for chunk_id in bad.keys() & {chunk_id for chunk_id in manifest.chunks if chunk_id is not None}:
                        at = manifest.chunks.index(chunk_id) * manifest.chunk_size
                        message = f"{bad[chunk_id]} (bytes {at} and on of base {base_id} of disk {target})"
                        affected = tree.affected(vm.losses(target, base_id, partly=True))
                        self._found(Finding(Kind.DAMAGE, vm.name, layout.chunk_key(chunk_id), message, STORE_ANEW, affected))

    @property
    def _unread_bases(self) -> bool:
        """Whether there are bases of which it is not known what they name."""
        return self._failures > 0 or any(_base in vm.damaged for vm, _ in self._vms for _base in vm.base_keys)

    # -- keys

    def _key_slots(self) -> None:
        if not self._repository.encrypted:
            return
        from vmrewind.repository.slots import read_slots

        with self._asking(None, layout.KEYS):
            for what in read_slots(self._store, self._repository.id).damaged:
                remedy = f"put it back from a copy, or: vmrewind key remove {self._repository.url} SLOT"
                self._found(Finding(Kind.DAMAGE, None, layout.KEYS, f"{what}; another key slot opens the repository", remedy))

    # -- what is nobody's

    def _strangers(self) -> None:
        with self._asking(None, self._repository.url):
            for component in self._store.children(""):
                if component not in ("chunks", "vms", "keys"):
                    self._found(
                        Finding(Kind.NOTE, None, f"{component}/", "nothing that vmrewind knows", "find out who put it there")
                    )
            url = self._repository.url
            store = open_store(url) if "://" not in url or url.startswith("file:") else None
            for path in store.leftovers() if isinstance(store, DirectoryStore) else ():
                message = "left by a writer that was killed, unless one is at work right now"
                self._found(Finding(Kind.NOTE, None, str(path), message, "it may be deleted when nothing writes to the repository"))


def verify(
    repository: Repository,
    found: Found,
    progress: Progress,
    *,
    vms: Iterable[str] | None = None,
    data: bool = False,
    again_ns: int = 0,
    being_made: BeingMade = lambda *_: None,
) -> list[Part]:
    """Verify a repository, or some VMs of it; ``found`` is told of each finding. Returns what was checked.

    ``data``: every byte of what no verification has read since ``again_ns`` (a time; 0: ever). ``being_made`` knows the bases that
    are being made on this host. What the store raises is a finding.
    """
    with Verified.of(repository.id, repository.url) as known:
        scope = Scope(list(vms) if vms is not None else None, data, again_ns)
        return Verification(repository, scope, known, found, progress, being_made).run()


def _reading(key: str, read: Callable[[], _Read]) -> _Read:
    try:
        return read()
    except VmrewindError as error:
        return _Read(key, 0, (), error)


def _covered(vm: VmObjects, tree: Tree) -> Iterator[tuple[str, int | None, int | None]]:
    """For each disk the time of its first and last record here, over all runs."""
    spans: dict[str, list[int]] = {}
    for info in vm.runs.values():
        for disk in info.disks:
            known = spans.setdefault(disk.target, [])
            if names := tree.segments(info.run, disk.index):
                ends = tree.time(info, disk.index, names[0].first), tree.time(info, disk.index, names[-1].last, before=True)
                known += [at for at in ends if at is not None]
    for target, times in sorted(spans.items()):
        yield target, min(times, default=None), max(times, default=None)
