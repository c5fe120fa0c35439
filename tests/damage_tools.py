"""A repository of every kind of object with a tree of runs, whose every moment is known, and ways to damage it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.history_tools import T0, UUID, VM, MadeHistory
from vmrewind.errors import VmrewindError
from vmrewind.history.history import History
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.journal.format import run_name
from vmrewind.recover.findings import Finding, Kind
from vmrewind.recover.verify import verify
from vmrewind.repository import layout
from vmrewind.repository.repository import Repository
from vmrewind.repository.secret import Secret

DISKS = {"vda": 12_288, "vdb": 8_192}
_PER_OBJECT = 4
"""Records of one segment object."""

Moment = tuple[int, int, str]
"""(run, seq, disk)"""


@dataclass
class World:
    """A repository in a directory and what it must restore. ``truth``: the disk's content at each moment."""

    url: str
    truth: dict[Moment, bytes]
    few: Sequence[Moment]
    """Some moments, of each run and disk the first, the last, and one between: what is looked at when there is much to do."""

    def path(self, key: str) -> Path:
        return Path(self.url, key)

    def objects(self, prefix: str = "") -> list[str]:
        """The keys of all objects, as the store's files are named."""
        root = Path(self.url)
        files = (path for path in root.rglob("*") if path.is_file())
        return sorted(key for path in files if (key := str(path.relative_to(root))).startswith(prefix))

    def copy(self, to: Path) -> World:
        shutil.copytree(self.url, to)
        return World(str(to), self.truth, self.few)

    def verify(self, *, data: bool = True, again_ns: int = 0) -> list[Finding]:
        """What ``verify`` finds."""
        found: list[Finding] = []
        verify(Repository.open(self.url), found.append, lambda *_: None, data=data, again_ns=again_ns)
        return found

    def restored(self, moments: Iterable[Moment] | None = None) -> dict[Moment, str]:
        """For each moment (default: all) "" if it can be restored from the repository alone, else why not.

        Fails if any byte is wrong.
        """
        outcome: dict[Moment, str] = {}
        try:
            history = History.open(VM, None, Repository.open(self.url).vm(VM))
        except VmrewindError as error:
            return dict.fromkeys(self.truth if moments is None else moments, str(error))
        with history:
            for run, seq, target in self.truth if moments is None else moments:
                content = self.truth[run, seq, target]
                try:
                    branch = history.branch(run_name(run))
                    view = View.open(history, target, resolve(history, branch, f"seq:{seq}", [target], T0 * 2))
                    found = view.read(0, view.size)
                except VmrewindError as error:
                    outcome[run, seq, target] = str(error)
                else:
                    assert found == content, f"wrong bytes of {target} at record {seq} of run {run}"
                    outcome[run, seq, target] = ""
        return outcome


def make_world(directory: Path, secret: Secret | None = None, seed: bytes = b"one") -> World:
    """Three runs, the second and a fourth going on from the first and the second, with bases, segments and configurations."""
    directory.mkdir(parents=True, exist_ok=True)
    made = MadeHistory(directory, DISKS, secret=secret)
    made.repository.register(str(UUID))
    truth: dict[Moment, bytes] = {}
    few: list[Moment] = []
    for disk in made.disks:
        disk.content[:] = os.urandom(len(disk.content))

    def run(writes: int) -> None:
        first = made.next_seq
        for i in range(writes):
            made.write("vda", 700 * i, seed + bytes([made.run % 256, i]) * (200 + i))
            made.write("vdb", 300 * i, os.urandom(250 + i))
        end = made.stop().seq
        for disk in made.disks:
            truth.update({(made.run, seq, disk.target): disk.states[seq] for seq in range(first, end + 1)})
        few.extend((made.run, seq, disk) for disk in DISKS for seq in (first, first + 3, end))
        made.repository.put_run(made.infos[made.run])
        for at in range(first, end + 1, _PER_OBJECT):
            made.ship(made.run, at, min(at + _PER_OBJECT - 1, end))

    made.start()
    run(5)
    made.repository.put_config(T0, "toml", b'name = "web01"\n')
    made.start(parent=made.position(made.writer.next_seq - 1))
    second = made.run
    run(3)
    fork = made.position(made.infos[second].first_seq + 2)
    made.go_back(fork)
    made.start(parent=fork)
    run(2)
    made.repository.put_config(T0 + 10**9, "toml", b'name = "web01"\n# changed\n')
    made.start(parent=made.position(made.writer.next_seq - 1), bases=["vda"])
    run(2)
    return World(made.repository.repository.url, truth, few)


def damage_of(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.kind is Kind.DAMAGE]


def check_promises(world: World, findings: list[Finding], key: str, *, every: bool = True) -> dict[Moment, str]:
    """What verify said is what restore does: nothing wrong, what it calls lost is refused, all else is right."""
    outcome = world.restored(None if every else world.few)
    affected = [one for finding in findings for one in finding.affected]
    for (run, seq, disk), problem in outcome.items():
        hit = [one for one in affected if one.disk in (disk, None) and one.run == run and one.first <= seq <= one.last]
        if not hit:
            assert not problem, f"{key}: verify does not know that {disk} at {seq} of run {run} is lost: {problem}"
        elif not all(one.partly for one in hit):
            assert problem, f"{key}: verify calls {disk} at {seq} of run {run} lost, and it was restored"
    return outcome


def kind_of(key: str) -> str:
    """The kind of object that a key names."""
    if key == layout.REPOSITORY or key.startswith("keys/"):
        return key
    if key.startswith(layout.CHUNKS):
        return "chunk"
    return key.split("/")[2]
