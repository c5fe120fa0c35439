"""The soak: one VM's two disks under load for as long as asked, while its processes are killed, stopped and restarted at random and
moments are restored and compared with the truth. ``script/soak --minutes 30``.

Seeded: the same seed makes the same choices, though not the same interleaving. The last third is calm (no kills), so that memory
and descriptors of processes that live long enough can be judged. Exit code 1 on any mismatch, and the directory is kept then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from bench.soak_load import Load, Sample, digest
from vmrewind.errors import VmrewindError
from vmrewind.journal.copy_before_write import begun_base
from vmrewind.journal.verify import verify
from vmrewind.paths import VmPaths
from vmrewind.start.control import instruct
from vmrewind.start.processes import Keeping, Process

SIZE: Final = 16 << 20
TARGETS: Final = ("vda", "vdb")
ROLES: Final = ("capture", "ship", "keeper")
_VM: Final = "soak"
_VMREWIND: Final = Path(sys.executable).with_name("vmrewind")
_REFUSED: Final = 6
_PATIENCE_SECONDS: Final = 60
_SLACK_NS: Final = 500_000_000
"""By how much the journal's time and this process's may differ."""
_CALM: Final = 1 / 3
GROWTH_BYTES_MAX: Final = {"capture": 8 << 20, "ship": 16 << 20, "keeper": 8 << 20}
"""Most that a process may grow by in the calm part, bytes; ship remembers the names of what it has sent."""
GROWTH_DESCRIPTORS_MAX: Final = 4


class Mismatch(Exception):
    """What must never be was seen."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A bookmark, and for each disk the places that it may stand for: (at least, at most) so many operations."""

    name: str
    time_ns: int
    places: dict[str, tuple[int, int]]


@dataclass
class Usage:
    """A process's resident memory and open descriptors, as they were sampled in the calm part."""

    process: Process
    resident_bytes: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


class Soak:
    """One run of it. ``seconds`` is the whole, ``rate`` operations per second and disk."""

    def __init__(self, directory: Path, seconds: float, seed: int, rate: float, journal_size: str) -> None:
        self.directory = directory
        self.seconds = seconds
        self.random = random.Random(seed)
        self.config = directory / "soak.toml"
        self.paths = VmPaths(_VM)
        self.journal = self.paths.default_journal
        self.counts: dict[str, int] = {}
        self.marks: list[Mark] = []
        self.refusable: list[tuple[int, int]] = []
        """Times, ns, that history may refuse: everything was killed, until the resync has closed the gap."""
        self.usage: dict[str, Usage] = {}
        self._keeper: subprocess.Popen[str] | None = None
        disks = "".join(f'[[protection.disk]]\ntarget = "{t}"\nimage = "{t}.raw"\n' for t in TARGETS)
        self.config.write_text(
            f'name = "{_VM}"\n[protection]\nenabled = true\nrepository = "repository"\njournal_size = "{journal_size}"\n'
            f'on_journal_full = "block"\n{disks}'
        )
        for target in TARGETS:
            with open(directory / f"{target}.raw", "wb") as file:
                file.truncate(SIZE)
        self._vmrewind("init", directory / "repository")
        self.loads = [Load(t, self.paths.nbd_socket, SIZE, seed + i, rate) for i, t in enumerate(TARGETS)]

    # -- the whole

    def run(self) -> None:
        """Do it all; raises Mismatch."""
        began = time.monotonic()
        calm_from = began + self.seconds * (1 - _CALM)
        self._start()
        for load in self.loads:
            load.start()
        try:
            while (now := time.monotonic()) < began + self.seconds:
                time.sleep(self.random.uniform(0.2, 2.5))
                self._check_loads()
                if now < calm_from:
                    self._disturb()
                else:
                    self._sample()
                self._mark()
                if self.random.random() < 0.4:
                    self._compare()
            for load in self.loads:
                load.stop()
            self._check_loads()
        finally:
            self._end()
        self._compare_the_end()
        self._judge()

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def _check_loads(self) -> None:
        for load in self.loads:
            if load.error is not None:
                raise Mismatch(f"{load.target}: {load.error}")

    # -- the VM

    def _vmrewind(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([_VMREWIND, *map(str, words)], capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise Mismatch(f"vmrewind {words[0]} failed with exit code {done.returncode}: {done.stderr}")
        return done

    def _start(self) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            self._keeper = subprocess.Popen(
                [_VMREWIND, "capture", self.config], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            assert self._keeper.stdout is not None, "it was made with a pipe"
            if self._keeper.stdout.readline():
                return
            said = self._keeper.communicate()[1]
            # A keeper was killed: until the clients' connections are seen to be gone, its capture is not cleared away.
            if "still connected" not in said or time.monotonic() > deadline:
                raise Mismatch(f"the VM does not start: {said}")
            time.sleep(0.1)

    def _end(self) -> None:
        if self._keeper is not None:
            self._keeper.terminate()
            try:
                self._keeper.communicate(timeout=_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.communicate()
                raise Mismatch("the keeper does not end") from None
            self._keeper = None

    def _process(self, role: str) -> Process | None:
        keeping = Keeping.read(self.paths)
        found: Process | None = getattr(keeping, role) if keeping is not None else None
        return found if found is not None and found.alive else None

    def _signal(self, role: str, number: signal.Signals) -> bool:
        if (process := self._process(role)) is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        return True

    # -- disturbances

    def _disturb(self) -> None:
        what = self.random.choices(
            ("kill capture", "kill ship", "stop a process", "restart", "kill the keeper", "kill everything"), (8, 4, 4, 1, 1, 1)
        )[0]
        self._count(what)
        if what == "kill capture":
            self._signal("capture", signal.SIGKILL)
        elif what == "kill ship":
            self._signal("ship", signal.SIGKILL)
        elif what == "stop a process":
            role = self.random.choice(ROLES)
            if self._signal(role, signal.SIGSTOP):
                time.sleep(self.random.uniform(0.1, 3))
                self._signal(role, signal.SIGCONT)
        elif what == "restart":
            self._pause_loads()
            self._end()
            self._start()
        elif what == "kill the keeper":
            self._pause_loads()
            for load in self.loads:
                load.disconnect()
            self._kill_keeper()
            self._start()
        else:
            self._kill_everything()
        for load in self.loads:
            load.resume()

    def _pause_loads(self) -> None:
        for load in self.loads:
            load.pause()

    def _kill_keeper(self) -> None:
        assert self._keeper is not None, "it runs"
        self._keeper.kill()
        self._keeper.communicate()

    def _kill_everything(self) -> None:
        """Under load. The next start can't know who touched the images meanwhile: a gap, which a resync closes."""
        began_ns = time.time_ns()
        for role in self.random.sample(ROLES, len(ROLES)):
            self._signal(role, signal.SIGKILL)
        self._kill_keeper()
        self._start()
        # A resync takes whatever the guest writes meanwhile for a difference: with much of it, it gives up. So no load now.
        self._pause_loads()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._resynced() < len(TARGETS):
            if time.monotonic() > deadline:
                raise Mismatch("the gap after a death of all processes was not closed")
            time.sleep(0.1)
        self.refusable.append((began_ns - 3 * 10**9, time.time_ns() + _SLACK_NS))

    def _resynced(self) -> int:
        keeping = Keeping.read(self.paths)
        if keeping is None:
            return 0
        try:
            lines = self.paths.events(int(keeping.run, 16)).read_text().splitlines()
        except FileNotFoundError:
            return 0
        return sum(json.loads(line)["event"] == "resync.done" for line in lines)

    # -- the truth

    def _mark(self) -> None:
        name = f"m{len(self.marks)}"
        before = {load.target: load.place()[0] for load in self.loads}
        try:
            answer = instruct(self.paths, command="mark", name=name)
        except (VmrewindError, OSError):
            return  # Its capture has just been killed.
        places = {load.target: (before[load.target], load.place()[1]) for load in self.loads}
        self.marks.append(Mark(name, int(answer["time_ns"]), places))

    def _compare(self) -> None:
        """Restore a random moment and look whether it ever was."""
        if any(begun_base(self.journal, target) for target in TARGETS):
            self._count("looks that came before the bases were made")
            return
        if self.random.random() < 0.5 and self.marks:
            mark = self.random.choice(self.marks[-100:] if self.random.random() < 0.5 else self.marks)
            self._restore(f"@{mark.name}", mark.time_ns, mark.places)
            self._count("restores by bookmark")
        elif self.marks:
            time_ns = self.random.randint(self.marks[0].time_ns, self.marks[-1].time_ns)
            moment = datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{time_ns % 10**9:09d}+00:00"
            places = {load.target: _place(load.samples, time_ns) for load in self.loads}
            self._restore(moment, time_ns, places)
            self._count("restores by time")

    def _restore(self, moment: str, time_ns: int, places: dict[str, tuple[int, int]]) -> None:
        output = self.directory / "restored"
        done = self._vmrewind("restore", self.config, "--at", moment, "--output", output, check=False)
        try:
            if done.returncode == _REFUSED and any(first <= time_ns <= last for first, last in self.refusable):
                self._count("moments refused in a gap")
                return
            if done.returncode:
                raise Mismatch(f"{moment} is not restored: exit code {done.returncode}: {done.stderr}")
            for load in self.loads:
                low, high = places[load.target]
                found = digest(output / f"{load.target}.raw")
                if found not in load.states[low : high + 1]:
                    where = [place for place, state in enumerate(load.states) if state == found]
                    raise Mismatch(f"{moment}: {load.target} is not as it was after {low} to {high} operations, but after {where}")
        finally:
            shutil.rmtree(output, ignore_errors=True)

    def _compare_the_end(self) -> None:
        """Everything has ended: image, history and model agree, with the journal and without it."""
        for load in self.loads:
            if digest(self.directory / f"{load.target}.raw") != load.states[-1]:
                raise Mismatch(f"the image of {load.target} is not what was written to it")
        problems = [f"{report.path.name}: {problem}" for report in verify([self.journal]) for problem in report.problems]
        if problems:
            raise Mismatch(f"the journal is damaged: {problems[0]}")
        last = {load.target: (len(load.states) - 1,) * 2 for load in self.loads}
        now_ns = time.time_ns()
        self._restore("latest", now_ns, last)
        away = self.journal.with_name("journal-away")
        self.journal.rename(away)
        self._restore("latest", now_ns, last)
        for mark in self.random.sample(self.marks, min(5, len(self.marks))):
            self._restore(f"@{mark.name}", mark.time_ns, mark.places)
            self._count("restores without the journal")
        away.rename(self.journal)

    # -- resources

    def _sample(self) -> None:
        for role in ROLES:
            if (process := self._process(role)) is None:
                continue
            if role not in self.usage or self.usage[role].process != process:
                self.usage[role] = Usage(process)
            with contextlib.suppress(OSError):
                resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                descriptors = sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())
                self.usage[role].resident_bytes.append(resident)
                self.usage[role].descriptors.append(descriptors)

    def _judge(self) -> None:
        for role, usage in self.usage.items():
            # The first quarter is warming up: buffers grow to what the load needs.
            memory = usage.resident_bytes[len(usage.resident_bytes) // 4 :]
            files = usage.descriptors[len(usage.descriptors) // 4 :]
            if memory and memory[-1] - memory[0] > GROWTH_BYTES_MAX[role]:
                raise Mismatch(f"{role} grew from {memory[0] >> 10} KiB to {memory[-1] >> 10} KiB while nothing happened to it")
            if files and max(files[-3:]) - min(files[:3]) > GROWTH_DESCRIPTORS_MAX:
                raise Mismatch(f"{role} went from {files[0]} to {files[-1]} descriptors while nothing happened to it")

    def report(self) -> dict[str, Any]:
        """What happened, in figures."""
        usage = {
            role: {
                "resident_kib": _course([resident >> 10 for resident in found.resident_bytes]),
                "descriptors": _course(found.descriptors),
                "samples": len(found.descriptors),
            }
            for role, found in self.usage.items()
            if found.descriptors
        }
        return {
            "seconds": round(self.seconds),
            "operations": sum(len(load.states) - 1 for load in self.loads),
            "mib_written": sum(load.bytes_written for load in self.loads) >> 20,
            "reconnects": sum(load.reconnects for load in self.loads),
            "bookmarks": len(self.marks),
            **{what: self.counts[what] for what in sorted(self.counts)},
            "usage (first, highest, last)": usage,
        }


def _course(values: list[int]) -> str:
    return f"{values[0]}, {max(values)}, {values[-1]}"


def _place(samples: list[Sample], time_ns: int) -> tuple[int, int]:
    """Between how many and how many operations a disk had had at a time."""
    low = max((s.answered for s in samples if s.time_ns < time_ns - _SLACK_NS), default=0)
    high = min((s.sent for s in samples if s.time_ns > time_ns + _SLACK_NS), default=samples[-1].sent)
    return low, high


def main() -> int:
    """Parse the arguments, soak, report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="script/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--rate", type=float, default=150, help="operations per second and disk")
    parser.add_argument("--journal-size", default="16MiB", help="small, so that recycling goes round often")
    parser.add_argument("--directory", type=Path, default=None, help="where everything lies; default: a temporary directory")
    given = parser.parse_args()
    seed = secrets.randbits(32) if given.seed is None else given.seed
    directory = Path(tempfile.mkdtemp(prefix="soak-", dir=given.directory))
    runtime = Path(tempfile.mkdtemp(prefix="vmr-"))
    os.environ |= {"VMREWIND_STATE_DIR": str(directory / "state"), "VMREWIND_RUNTIME_DIR": str(runtime)}
    print(f"soak: {given.minutes:g} minutes, seed {seed}", flush=True)
    soak = Soak(directory, given.minutes * 60, seed, given.rate, given.journal_size)
    try:
        soak.run()
    except Mismatch as mismatch:
        print(json.dumps(soak.report(), indent=1))
        print(f"soak: FAILED (seed {seed}): {mismatch}\nsoak: everything is in {directory}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(runtime, ignore_errors=True)
    print(json.dumps(soak.report(), indent=1))
    print(f"soak: passed (seed {seed})")
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
