"""The promise: both disks can be had as they were after any record, from the local journal and from the repository alone.

Random requests go through a real NBD client to the real processes, one in flight, so that each request that changes something,
and each flush, is one record. Then, record by record, every view equals the model, and so do restores of a sample.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbd as libnbd
import pytest

from guests.protected import VMREWIND, vmrewind
from tests.capture_tools import WAIT_SECONDS, Entry, first_difference, journal_entries, until
from vmrewind.history.history import History
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal.runs import Position, local_runs
from vmrewind.paths import VmPaths
from vmrewind.repository.repository import Repository

VM = "web01"
SIZES = {"vda": 192 << 10, "vdb": (320 << 10) + 512}


@dataclass(frozen=True)
class Change:
    """What one request made of a disk; ``data`` None: nothing (a flush)."""

    op: fmt.Op
    target: str
    offset: int = 0
    data: bytes | None = None


@dataclass
class Vm:
    """A VM of two disks, driven through ``vmrewind capture``."""

    directory: Path
    changes: list[Change] = field(default_factory=list)
    requests: int = 0

    def __post_init__(self) -> None:
        rng = random.Random(0)
        lines = [f'name = "{VM}"', "[protection]", "enabled = true", 'repository = "repo"', 'journal = "journal"']
        lines.append('journal_size = "64MiB"')
        for target, size in SIZES.items():
            # A base with data, zeroes and holes.
            with open(self.directory / f"{target}.raw", "wb") as image:
                image.truncate(size)
                image.write(rng.randbytes(size // 3))
                image.seek(size // 2)
                image.write(bytes(8192) + rng.randbytes(8192))
            lines += ["[[protection.disk]]", f'target = "{target}"', f'image = "{target}.raw"']
        self.toml.write_text("\n".join(lines))
        self.base = {target: self.image(target).read_bytes() for target in SIZES}
        self.model = {target: bytearray(content) for target, content in self.base.items()}
        vmrewind("init", self.directory / "repo")

    @property
    def toml(self) -> Path:
        return self.directory / "web01.toml"

    @property
    def journal(self) -> Path:
        return self.directory / "journal"

    def image(self, target: str) -> Path:
        return self.directory / f"{target}.raw"

    @contextmanager
    def running(self) -> Iterator[dict[str, libnbd.NBD]]:
        """One run of it; clients of its disks. It ends cleanly, with everything shipped."""
        with open(self.directory / "stderr", "ab") as stderr:
            process = subprocess.Popen([VMREWIND, "capture", str(self.toml)], stdout=subprocess.PIPE, stderr=stderr)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, (self.directory / "stderr").read_text()
            self.uris = {target: disk["uri"] for target, disk in json.loads(line)["disks"].items()}
            handles = self.connect()
            yield handles
            for handle in handles.values():
                handle.shutdown()
            process.terminate()
            assert process.wait(WAIT_SECONDS) == 0, (self.directory / "stderr").read_text()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    def connect(self) -> dict[str, libnbd.NBD]:
        handles = {}
        for target, uri in self.uris.items():
            handles[target] = libnbd.NBD()
            handles[target].connect_uri(uri)
        return handles

    def kill_capture(self) -> None:
        """SIGKILL; returns when the keeper's next one is there."""
        keeper = VmPaths(VM).keeper
        pid = json.loads(keeper.read_bytes())["capture"]["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: json.loads(keeper.read_bytes())["capture"]["pid"] != pid, "the next capture")

    def drive(self, handles: dict[str, libnbd.NBD], rng: random.Random, count: int) -> None:
        """Random requests, each awaited; reads are compared with the model on the way."""
        for _ in range(count):
            target = rng.choice(list(SIZES))
            handle, model = handles[target], self.model[target]
            length = rng.choice([1, 7, 512, 4096, 4096, 65536, rng.randrange(1, 40_000)])
            offset = rng.choice([rng.randrange(len(model)), rng.randrange(len(model)) & ~4095])
            length = min(length, len(model) - offset)
            self.requests += 1
            match rng.choice(["read", "write", "write", "write", "write", "zero", "discard", "flush", "same"]):
                case "read":
                    assert handle.pread(length, offset) == model[offset : offset + length]
                case "write":
                    data = rng.randbytes(length)
                    handle.pwrite(data, offset, rng.choice([0, 0, 0, libnbd.CMD_FLAG_FUA]))
                    self._changed(Change(fmt.Op.WRITE, target, offset, data))
                case "same":
                    # Content that is there already, elsewhere on the disk or as zeroes: still a write.
                    data = bytes(rng.choice([bytes(length), bytes(model[:length])]))
                    handle.pwrite(data, offset)
                    self._changed(Change(fmt.Op.WRITE, target, offset, data))
                case "zero":
                    handle.zero(length, offset, rng.choice([0, libnbd.CMD_FLAG_NO_HOLE, libnbd.CMD_FLAG_FUA]))
                    self._changed(Change(fmt.Op.ZERO, target, offset, bytes(length)))
                case "discard":
                    handle.trim(length, offset)
                    self._changed(Change(fmt.Op.DISCARD, target, offset, bytes(length)))
                case "flush":
                    handle.flush()
                    self._changed(Change(fmt.Op.FLUSH, target))

    def _changed(self, change: Change) -> None:
        self.changes.append(change)
        if change.data is not None:
            self.model[change.target][change.offset : change.offset + len(change.data)] = change.data

    def entries(self) -> list[tuple[int, Entry]]:
        """(run, entry) of everything in the journal, in order of seq."""
        found = [(info.run, entry) for info in local_runs(self.journal) for entry in journal_entries(self.journal, info.run)]
        assert [entry.record.seq for _, entry in found] == list(range(1, len(found) + 1)), "runs follow one another without a hole"
        return found

    def states(self) -> Iterator[tuple[Position, dict[str, bytearray]]]:
        """Every record's moment with what the disks then were, by the model. Fails if records and requests differ."""
        disks = {target: bytearray(content) for target, content in self.base.items()}
        changes = iter(self.changes)
        for run, entry in self._entries:
            record = entry.record
            if record.op != fmt.Op.EVENT:
                change = next(changes)
                target = list(SIZES)[record.disk]
                assert (record.op, target, record.offset) == (change.op, change.target, change.offset)
                if change.data is not None:
                    assert record.length == len(change.data)
                    disks[target][change.offset : change.offset + len(change.data)] = change.data
            yield Position(run, record.seq, record.time_ns), disks
        assert next(changes, None) is None, "every request that was answered is in the journal"

    def note_entries(self) -> None:
        """Read the journal while it is there."""
        self._entries = self.entries()


def check_views(vm: Vm, history: History, every: int) -> int:
    """Each disk's view at every ``every``-th record equals the model; returns how many were looked at."""
    count = 0
    for position, disks in vm.states():
        if position.seq % every and position.seq != len(vm._entries):
            continue
        for target, content in disks.items():
            view = View.open(history, target, position)
            assert view.size == len(content)
            difference = first_difference(view.read(0, view.size), content)
            assert difference is None, f"{target} at seq {position.seq}: byte {difference} differs"
            count += 1
    return count


def check_restores(vm: Vm, wanted: set[int]) -> None:
    """The real command restores both disks to these records."""
    for position, disks in vm.states():
        if position.seq in wanted:
            output = vm.directory / "restored"
            vmrewind("restore", vm.toml, "--at", f"seq:{position.seq}", "--output", output)
            for target, content in disks.items():
                restored = next(path for path in output.rglob("*") if path.is_file() and path.name.startswith(target))
                assert first_difference(restored.read_bytes(), content) is None, f"{target} at seq {position.seq}"
            shutil.rmtree(output)


@pytest.mark.parametrize("seed", [1, 2])
def test_every_moment_of_both_disks(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    vm = Vm(tmp_path)
    with vm.running() as handles:
        vm.drive(handles, rng, 150)
        if seed == 2:
            # The history of a capture that died, and of the one that took its place, is one history.
            vm.kill_capture()
            handles.update(vm.connect())
            vm.drive(handles, rng, 100)
    with vm.running() as handles:
        # A second run goes on where the first one ended.
        vm.drive(handles, rng, 100)
    for target in SIZES:
        assert first_difference(vm.image(target).read_bytes(), vm.model[target]) is None
    vm.note_entries()
    last = len(vm._entries)
    assert last > 150

    repository = Repository.open(str(tmp_path / "repo")).vm(VM)
    with History.open(VM, vm.journal, repository, bases=VmPaths(VM).bases) as history:
        assert check_views(vm, history, 1) == 2 * last
    sample = {1, last, *rng.sample(range(2, last), 2)}
    check_restores(vm, sample)

    vm.journal.rename(tmp_path / "journal is gone")
    with History.open(VM, None, repository, bases=None) as history:
        assert check_views(vm, history, 1) == 2 * last
    check_restores(vm, sample)
