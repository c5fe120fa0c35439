"""Rewinding: only what was written since is looked at, back and forth, across branches, and whatever interrupts it."""

from __future__ import annotations

import itertools
import json
import os
import random
import shlex
import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.capture_tools import Client, until
from tests.e2e.test_start_after import MIB, SIZE, Alone
from tests.fault_tools import kill
from tests.faults.test_recover_in_place import K, M, Stopped, quiet, restored_or_killed
from tests.history_tools import MadeHistory, exit_code_of_main
from vmrewind.errors import ImageError, MomentError, VmStateError
from vmrewind.history.resolve import resolve
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal.copy_before_write import begun_base
from vmrewind.journal.runs import Discontinuity, Head, ImageIdentity, Kept, Position, read_head, write_durably
from vmrewind.nbd import protocol as nbd
from vmrewind.recover.in_place import restore_in_place
from vmrewind.recover.intent import pending
from vmrewind.recover.rewind_plan import RewindPlan, planned

KILLS = 20
_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def noted(made: Stopped, position: Position) -> None:
    """What capture notes at a clean end: the images as they are."""
    identities = {}
    for target, path in made.images.items():
        status = path.stat()
        identities[target] = ImageIdentity(str(path), status.st_size, status.st_mtime_ns, status.st_ino, 0)
    write_durably(made.journal / "head.json", Head(position, identities).to_json())


@pytest.fixture
def made(tmp_path: Path) -> Stopped:
    made = Stopped(tmp_path)
    noted(made, made.end)
    return made


def rewind(made: Stopped, position: Position, *targets: str, discard: bool = False) -> int:
    images = {target: made.images[target] for target in targets or made.images}
    with made.open() as history:
        done = restore_in_place(history, images, position, made.journal, quiet, discard_unprotected=discard, only_changed=True)
    return sum(disk.written_bytes for disk in done.disks)


def plan_of(made: Stopped, position: Position, target: str) -> RewindPlan:
    with made.open() as history:
        plan = planned(history, target, made.images[target], position, made.journal)
    assert (plan.ranges is None) == (plan.reason is not None)
    return plan


def reason(made: Stopped, position: Position) -> str | None:
    return plan_of(made, position, "vda").reason


def contents(made: Stopped) -> dict[str, bytes]:
    return {target: path.read_bytes() for target, path in made.images.items()}


def truth(made: Stopped, seq: int) -> dict[str, bytes]:
    return {target: made.disk(target).states[seq] for target in made.images}


def test_back_and_forth_without_reading_the_whole_disk(made: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(_: list[View]) -> None:
        raise AssertionError("the whole disk was read")

    monkeypatch.setattr("vmrewind.recover.in_place.read_whole", whole)
    chosen = random.Random(3)
    for seq in (20, 1, made.end.seq, 2, *(chosen.randrange(1, made.end.seq) for _ in range(8)), made.end.seq):
        rewind(made, made.position(seq))
        assert contents(made) == truth(made, seq)
    assert rewind(made, made.end) == 0


def test_from_branch_to_branch(made: Stopped) -> None:
    """Back, on as another run, from there to the end of what was taken back, and back to the other one's."""
    first_end = made.end
    middle = made.position(9)
    rewind(made, middle)
    made.go_back(middle)
    second_run = made.start(parent=middle)
    made.write("vda", 5 * M, b"second" * 1000)
    made.write("vdb", 1, b"odd offset")
    second_end = made.stop()
    for target, path in made.images.items():
        path.write_bytes(made.disk(target).content)
    noted(made, second_end)
    second = contents(made)
    assert reason(made, first_end) is None
    first_run = first_end.run
    rewind(made, first_end)
    head = read_head(made.journal)
    assert head is not None and head.position.run == first_run != second_run
    restored = contents(made)
    with made.open() as history:
        for target in made.images:
            assert View.open(history, target, first_end).read(0, len(restored[target])) == restored[target]
    rewind(made, second_end)
    assert contents(made) == second


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("touched", "changed since the VM stopped"),
        ("crashed", "did not end cleanly"),
        ("gap", "began with a gap"),
        ("base", "began with a new base"),
        ("bypass", "bypassed"),
    ],
)
def test_what_is_not_known_has_the_whole_disk_compared(made: Stopped, what: str, words: str) -> None:
    """And the outcome is right all the same."""
    target_seq = 7
    position = made.position(target_seq)
    wanted = truth(made, target_seq)
    if what in ("gap", "base"):
        parent = made.end
        gaps = {"vda": Discontinuity("somebody wrote to it", parent.time_ns)}
        made.start(parent=parent, gaps=gaps if what == "gap" else None, bases=["vda", "vdb"] if what == "base" else None)
        made.write("vda", 0, b"x")
        end = made.stop()
    elif what == "bypass":
        made.start(parent=made.end)
        made.event(fmt.Event.GAP_BEGIN, {"cause": "full"})
        end = made.stop()
    else:
        end = made.end
    made.images["vda"].write_bytes(os.urandom(12 * M))
    if what == "crashed":
        (made.journal / "head.json").unlink()
    elif what != "touched":
        noted(made, end)
    assert words in str(reason(made, position))
    if what == "touched":
        with pytest.raises(ImageError, match="no history has"):
            rewind(made, position)
    rewind(made, position, discard=what == "touched")
    assert contents(made) == wanted


def test_killed_at_any_step_it_is_completed_by_the_next_try(made: Stopped) -> None:
    """Forth, since what it writes then is no holes."""
    original, wanted, position = truth(made, 2), truth(made, made.end.seq), made.end
    half = 0
    for writes in range(200):
        for target, path in made.images.items():
            path.write_bytes(original[target])
        (made.journal / "restore-pending.json").unlink(missing_ok=True)
        noted(made, made.position(2))
        if restored_or_killed(made, position, writes, only_changed=True):
            assert writes > 8, "the kill never came"
            break
        half += contents(made) not in (original, wanted)
        if pending(made.journal) is not None:
            assert "half-way" in str(reason(made, position))
        rewind(made, position)
        assert contents(made) == wanted and pending(made.journal) is None
    else:
        pytest.fail("it never ended")
    assert half > 3, "no kill met a half rewound image"


def test_disk_by_disk_each_keeps_its_moment(made: Stopped, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of the disk that is left as it is stays known, also over a rewind that is interrupted."""
    middle, before = made.position(9), contents(made)

    def whole(_: list[View]) -> None:
        raise AssertionError("the whole disk was read")

    def interrupted(_: object) -> None:
        raise OSError("here")

    monkeypatch.setattr("vmrewind.recover.in_place.read_whole", whole)
    monkeypatch.setattr("vmrewind.recover.in_place._Job.write", interrupted)
    with pytest.raises(ImageError, match="cannot be written"):
        rewind(made, middle, "vda")
    monkeypatch.undo()
    assert pending(made.journal) is not None and "half-way" in str(reason(made, middle))
    monkeypatch.setattr("vmrewind.recover.in_place.read_whole", whole)
    plan = plan_of(made, middle, "vdb")
    assert plan.since == made.end and plan.reason is None
    monkeypatch.undo()
    rewind(made, middle, "vda")
    assert contents(made) == {"vda": truth(made, 9)["vda"], "vdb": before["vdb"]}
    monkeypatch.setattr("vmrewind.recover.in_place.read_whole", whole)
    assert [plan_of(made, middle, target).since for target in ("vda", "vdb")] == [middle, made.end]
    with made.open() as history:
        branch = history.branch()
        assert resolve(history, branch, "latest", ["vda"]) == middle
        # vdb was not taken back: what it holds now is not what record 9 was.
        with pytest.raises(MomentError, match=rf"holds record {made.end.seq} of run .* left as it was"):
            resolve(history, branch, "latest", ["vdb"])
    rewind(made, made.position(4), "vda")
    rewind(made, middle)
    assert contents(made) == truth(made, 9)
    head = read_head(made.journal)
    assert head is not None and head.position == middle and set(head.images) == {"vda", "vdb"} and not head.apart
    # One after the other to one moment is the same as together.
    rewind(made, made.end, "vdb")
    rewind(made, made.end, "vda")
    head = read_head(made.journal)
    assert contents(made) == before and head is not None and set(head.images) == {"vda", "vdb"} and not head.apart


@pytest.mark.parametrize("known", ["declared", "seen"])
def test_what_no_history_has_is_not_forgotten_by_a_rewind_of_another_disk(made: Stopped, known: str) -> None:
    if known == "declared":
        write_durably(made.journal / "head.json", Head(made.end, {}, "it ran without protection").to_json())
    made.images["vdb"].write_bytes(os.urandom(5 * M))
    written = made.images["vdb"].read_bytes()
    rewind(made, made.position(7), "vda", discard=known == "declared")
    for targets in (["vdb"], ["vda", "vdb"]):
        with pytest.raises(ImageError, match=r"vdb.*no history has"):
            rewind(made, made.position(7), *targets)
    assert made.images["vdb"].read_bytes() == written
    rewind(made, made.position(7), discard=True)
    assert contents(made) == truth(made, 7)


def test_a_base_that_is_being_made_of_another_disk_stays_noted(made: Stopped) -> None:
    head = read_head(made.journal)
    assert head is not None
    kept = {target: Kept(f"base-of-{target}", identity) for target, identity in head.images.items()}
    write_durably(made.journal / "head.json", replace(head, kept=kept).to_json())
    rewind(made, made.position(7), "vda")
    head = read_head(made.journal)
    assert head is not None and head.kept == {"vdb": kept["vdb"]}


def test_a_disk_that_ends_within_a_block(tmp_path: Path) -> None:
    made = MadeHistory(tmp_path, {"vda": 3 * M + 512})
    made.start()
    first = made.position(made.write("vda", 3 * M + 100, b"first"))
    made.write("vda", 3 * M + 507, b"second"[:5])
    end = made.stop()
    image = tmp_path / "vda.img"
    image.write_bytes(made.disk("vda").content)
    status = image.stat()
    identity = ImageIdentity(str(image), status.st_size, status.st_mtime_ns, status.st_ino, 0)
    write_durably(made.journal / "head.json", Head(end, {"vda": identity}).to_json())
    with made.open() as history:
        assert planned(history, "vda", image, first, made.journal).ranges == [(3 * M, 3 * M + 4096)]
        restore_in_place(history, {"vda": image}, first, made.journal, quiet, only_changed=True)
    assert image.read_bytes() == made.disk("vda").states[first.seq]


def test_the_command_shows_rewinds_and_undoes(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1, offset=0, length=300 * K)
        alone.write(ready, 2, offset=20 * M, length=64 * K)
        then = datetime.now(UTC).isoformat()
        before = alone.image.read_bytes()
        alone.write(ready, 3, offset=100 * K, length=10 * K)
        alone.write(ready, 4, offset=40 * M + 512, length=512)
        refused = vmrewind("rewind", alone.config, "--to", then, check=False)
        assert refused.returncode != 0 and "is running" in refused.stderr
    after = alone.image.read_bytes()
    plan = json.loads(vmrewind("rewind", alone.config, "--to", then, "--dry-run", "--json").stdout)["disks"]["vda"]
    assert alone.image.read_bytes() == after
    assert plan["extents"] == 2 and plan["bytes"] == 12 * K + 4 * K and plan["whole_disk_because"] is None
    told = vmrewind("rewind", alone.config, "--to", then).stdout
    assert "s back" in told and "in 2 extents" in told
    assert alone.image.read_bytes() == before
    # The run shown is the one that has the rest as well: it is cut here, and named by --branch it is not.
    shown = vmrewind("timeline", alone.config).stdout
    (run,) = _runs(alone)
    assert f"branch {run}, taken back to record " in shown and f"what it did before that: --branch {run}" in shown
    assert "taken back" not in vmrewind("timeline", alone.config, "--branch", run).stdout
    undo = shlex.split(told.rpartition("to undo it: vmrewind ")[2])
    assert undo[:2] == ["rewind", str(alone.config)]
    assert "s forth" in vmrewind(*undo).stdout
    assert alone.image.read_bytes() == after
    vmrewind("rewind", alone.config, "--to", then)
    with alone.serving() as ready:
        alone.write(ready, 9, offset=50 * M, length=4096)
    vmrewind("rewind", alone.config, "--to", "latest", "--branch", min(_runs(alone)))
    assert alone.image.read_bytes() == after


def test_after_a_death_the_command_tells_the_time_lost_and_undoes(tmp_path: Path) -> None:
    """And what would be refused is refused by --dry-run too."""
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1, length=300 * K)
        vmrewind("mark", alone.config, "good")
        good = alone.image.read_bytes()
        alone.write(ready, 2, length=100 * K)
        last = alone.status()["last_record"]
        refused = vmrewind("rewind", alone.config, "--to", "@good", "--dry-run", check=False)
        assert refused.returncode == VmStateError.exit_code and "is running" in refused.stderr
        processes = alone.status()["processes"]
        kill(*(processes[role]["pid"] for role in ("keeper", "capture", "ship")))
    after = alone.image.read_bytes()
    (disk,) = json.loads(vmrewind("rewind", alone.config, "--to", "@good", "--dry-run", "--json").stdout)["disks"].values()
    assert disk["from"] == last and "did not end cleanly" in disk["whole_disk_because"]
    told = vmrewind("rewind", alone.config, "--to", "@good").stdout
    assert "s back" in told and alone.image.read_bytes() == good
    vmrewind(*shlex.split(told.rpartition("to undo it: vmrewind ")[2]))
    assert alone.image.read_bytes() == after
    with alone.image.open("r+b") as image:
        image.write(b"no history has this")
    for dry in (["--dry-run"], []):
        refused = vmrewind("rewind", alone.config, "--to", "@good", *dry, check=False)
        assert refused.returncode == ImageError.exit_code and "no history has" in refused.stderr and not refused.stdout


class TwoDisks(Alone):
    """A second disk beside the first."""

    def configure(self, **protection: str) -> None:
        super().configure(**protection)
        self.second = self.directory / "vdb.raw"
        self.second.write_bytes(bytes(MIB))
        with self.config.open("a") as file:
            file.write(f'[[protection.disk]]\ntarget = "vdb"\nimage = "{self.second}"\nformat = "raw"\n')


def test_a_start_after_one_disk_was_rewound_resyncs_the_other(tmp_path: Path) -> None:
    alone = TwoDisks(tmp_path)
    with alone.serving() as ready:
        until(lambda: begun_base(alone.journal, "vdb") is None, "the base")
        vmrewind("mark", alone.config, "one")
        for target in ("vda", "vdb"):
            client = Client(Path(ready["disks"][target]["uri"].partition("?socket=")[2]), target)
            client.write(4096, target.encode() * 1000)
            client.sock.close()
    (run,) = _runs(alone)
    vmrewind("rewind", alone.config, "--to", "@one", "--disk", "vda")
    told = vmrewind("rewind", alone.config, "--to", "@one").stdout
    undo = told.rpartition("to undo it: vmrewind ")[2]
    assert told.count("s back") == 2 and shlex.split(undo)[-2:] == ["--disk", "vdb"]
    vmrewind(*shlex.split(undo))
    vmrewind("rewind", alone.config, "--to", "@one", "--disk", "vda")
    (problem,) = alone.status()["problems"]
    assert problem.startswith("vdb: ") and "left as it was when another disk was taken" in problem
    (vda, vdb) = json.loads(vmrewind("rewind", alone.config, "--to", "@one", "--dry-run", "--json").stdout)["disks"].values()
    assert vda["extents"] == 0 and vdb["extents"] == 1 and vdb["from"]["seq"] > vda["from"]["seq"]
    held = alone.image.read_bytes(), alone.second.read_bytes()
    with alone.serving():
        until(lambda: "resync.done" in alone.events(), "the resync")
    output = tmp_path / "out"
    vmrewind("restore", alone.config, "--at", "latest", "--output", output)
    assert ((output / "vda.raw").read_bytes(), (output / "vdb.raw").read_bytes()) == held
    told = vmrewind("timeline", alone.config).stdout
    assert "vdb" in told and "left as it was" in told and run in told


def test_killed_at_random_instants_completed_and_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Back and forth in turn, so that each undo is killed as well; then the run that goes on from there."""
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    span = 16 * MIB
    alone = Alone(tmp_path)

    def content() -> bytes:
        """What was written to; the rest of the disk stays as it was."""
        with alone.image.open("rb") as file:
            return file.read(span)

    with alone.serving() as ready:
        first = Path(ready["disks"]["vda"]["uri"].partition("?socket=")[2])
        states = []
        for _ in range(2):
            client = Client(first, "vda")
            for number in range(1500):
                offset = chance.randrange(span // 512 - 16) * 512
                client.write(offset, bytes([chance.randrange(256)]) * chance.choice([512, 4096, 8192]))
                if number % 50 == 0:
                    client.do(nbd.CMD_WRITE_ZEROES, chance.randrange(span // MIB) * MIB, 128 << 10)
            client.sock.close()
            vmrewind("mark", alone.config, f"state-{len(states)}")
            states.append(content())
    assert states[0] != states[1]
    (run,) = _runs(alone)

    def begin(state: int) -> int:
        """The command, in a process of its own that has its libraries loaded; its pid."""
        child = os.fork()
        if child:
            return child
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        sys.argv = ["vmrewind", "rewind", str(alone.config), "--to", f"@state-{state}", "--branch", run]
        os._exit(exit_code_of_main())

    def complete(state: int) -> float:
        begun = time.monotonic()
        assert os.waitpid(begin(state), 0)[1] == 0, seed
        assert content() == states[state], seed
        return time.monotonic() - begun

    monkeypatch.setattr(sys, "argv", ["vmrewind", "rewind", str(alone.config), "--to", "@state-0", "--dry-run"])
    assert exit_code_of_main() == 0
    capfd.readouterr()
    seconds = min(complete(0), complete(1))
    met = set()
    for number in itertools.count():
        if number >= KILLS and {"half", "whole"} <= met:
            break
        assert number < 10 * KILLS, (seed, met)
        state = number % 2
        child = begin(state)
        # Every other pair from when it has begun to write, which is its shortest part.
        while number % 4 > 1 and pending(alone.journal) is None and os.waitid(os.P_PID, child, _ENDED) is None:
            pass
        threading.Event().wait(chance.random() * seconds / (8 if number % 4 > 1 else 1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        half = content() not in states
        begun = pending(alone.journal) is not None
        assert begun or not half, (seed, number)
        met.add("half" if half else "begun" if begun else "whole")
        if half and "half" not in met:
            refused = vmrewind("capture", alone.config, check=False)
            assert refused.returncode and "restore" in refused.stderr
        complete(state)
        assert pending(alone.journal) is None
    # What goes on from there is another run, and however that one ends, the moment before the rewind can be had again.
    complete(0)
    with alone.serving() as ready:
        alone.write(ready, 9, offset=3 * MIB)
        processes = alone.status()["processes"]
        kill(*(processes[role]["pid"] for role in ("keeper", "capture", "ship")))
    assert len(_runs(alone)) == 2
    complete(1)
    assert alone.image.read_bytes() == states[1].ljust(SIZE, b"\0")


def _runs(alone: Alone) -> list[str]:
    return [run["run"] for run in json.loads(vmrewind("timeline", alone.config, "--json").stdout)["runs"]]
