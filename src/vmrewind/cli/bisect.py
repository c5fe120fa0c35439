"""``vmrewind bisect``: the first write after which a command fails."""

from __future__ import annotations

import json as json_module
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter

from vmrewind.cli.chosen import BranchOption, Chosen, position_data
from vmrewind.cli.drill import ending_by_signals
from vmrewind.errors import UsageError, VmrewindError
from vmrewind.history.history import History
from vmrewind.history.moments import FORMS, format_time
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import Position, private_directory
from vmrewind.paths import VmPaths
from vmrewind.recover.bisect import Change, Changes, Verdict, narrow
from vmrewind.recover.boot_machine import configuration, nodes_at
from vmrewind.recover.chunk_cache import ChunkCache
from vmrewind.recover.drill import boot_until
from vmrewind.recover.drill_machine import machine_of
from vmrewind.recover.exporting import Exported, exported
from vmrewind.recover.scratch import scratch_in
from vmrewind.start.environment import users_umask
from vmrewind.start.resolve import VM_HELP, StoredVm, open_any
from vmrewind.vmconfig.model import VmConfig

_SKIP: Final = 125
_ABORT: Final = 128
"""Exit codes from here on are signals, or trouble of the shell's: they tell nothing of the disks."""


def bisect(
    vm: Annotated[str, Parameter(help=VM_HELP)],
    /,
    *command: Annotated[str, Parameter(help="Behind `--`: the command that tests, and its arguments.")],
    from_: Annotated[str, Parameter(name="--from", allow_leading_hyphen=True, help=f"A moment that is known to be good: {FORMS}.")],
    to: Annotated[str, Parameter(allow_leading_hyphen=True, help="A later moment that is known to be bad.")],
    disk: Annotated[list[str] | None, Parameter(negative="", help="Only this disk (may be repeated).")] = None,
    boot: Annotated[
        bool, Parameter(negative="", help="Instead of a command: boot each moment, without a network; good is what gives a sign.")
    ] = False,
    until: Annotated[
        str | None, Parameter(help="With --boot: this text on the serial console is the sign; default: the guest agent's answer.")
    ] = None,
    seconds: Annotated[int | None, Parameter(help="With --boot: how long to wait for it; default: 300.")] = None,
    writable: Annotated[
        bool, Parameter(negative="", help="Let the command write, each time into a scratch file; history stays as it is.")
    ] = False,
    scratch: Annotated[
        Path | None, Parameter(help="Directory for the scratch files; default: the one for temporary files.")
    ] = None,
    branch: BranchOption = None,
    json: Annotated[bool, Parameter(negative="", help="Print each test and the result as JSON objects, one a line.")] = False,
) -> int:
    """Find the first write after which COMMAND fails, or the VM does not boot any more, as `git bisect run` finds a commit.

    COMMAND finds the disks of each moment at VMREWIND_URI_VDA and so on (VMREWIND_URI if there is one disk), and the moment in
    VMREWIND_SEQ and VMREWIND_TIME. Exit code 0 means good, 125 that this moment cannot be tested, 128 and more ends the search,
    anything else bad.
    """
    if bool(command) == boot:
        way = "write a command behind `--`: vmrewind bisect VM --from M1 --to M2 -- COMMAND; or --boot in its place"
        raise UsageError("a command and --boot are two tests" if boot else "no command to test with", way)
    if not boot and (until, seconds) != (None, None):
        raise UsageError("--until and --seconds are for --boot", "leave them out, or add --boot")
    if boot and disk is not None:
        raise UsageError("a machine boots with all of its disks", "leave --disk out")
    if scratch is not None and not (writable or boot):
        raise UsageError("--scratch is for --writable", "leave it out, or add --writable")
    found = open_any(vm)
    known = None if isinstance(found, StoredVm) else found.config
    with found.history() as history, ending_by_signals():
        chosen = Chosen.of(found.name, history, branch, disk)
        targets = chosen.targets
        one, other = chosen.at(from_), chosen.at(to)
        changes = Changes(history, chosen.branch, targets, one, other)
        if not len(changes):
            raise UsageError(
                f"nothing was written to {', '.join(targets)} between seq {one.seq} and seq {other.seq}", "choose other moments"
            )
        runtime = VmPaths(found.name).runtime
        private_directory(runtime)
        directory = scratch or Path(tempfile.gettempdir())
        with closing(ChunkCache(directory)) as cache:
            socket = runtime / f"bisect-{os.getpid()}.sock"
            test = _Boot(history, known, targets, until, seconds or 300) if boot else _Command(targets, command, json=json)
            tester = _Tester(history, targets, test, socket, cache, directory if writable or boot else None, json=json)
            tester.expect(one, Verdict.GOOD, "--from")
            tester.expect(other, Verdict.BAD, "--to")
            if not json:
                print(f"{len(changes)} writes in between", flush=True)
            good, bad = narrow(len(changes), lambda at: tester.test(changes[at].position))
        return _tell(changes, good, bad, one, tester.tests, json=json)


@dataclass(frozen=True, slots=True)
class _Command:
    """The user's command as a test."""

    targets: Sequence[str]
    command: Sequence[str]
    json: bool

    def test(self, serving: Exported, position: Position) -> int:
        """Its exit code. Raises UsageError if it cannot be run."""
        environment = {f"VMREWIND_URI_{target.upper().replace('-', '_')}": uri for target, uri in serving.uris.items()}
        if len(environment) < len(self.targets):
            raise UsageError("two disks differ in - and _ alone, which variables cannot", "name one of them with --disk")
        if len(self.targets) == 1:
            environment["VMREWIND_URI"] = next(iter(serving.uris.values()))
        environment |= {"VMREWIND_SEQ": str(position.seq), "VMREWIND_TIME": format_time(position.time_ns)}
        try:
            done = subprocess.run(
                self.command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                # With --json standard output is for objects alone.
                stdout=sys.stderr if self.json else None,
                umask=users_umask(),
                check=False,
            )
        except OSError as error:
            raise UsageError(f"{self.command[0]}: {error.strerror}", "behind `--` comes the command that tests") from error
        return done.returncode


@dataclass(frozen=True, slots=True)
class _Boot:
    """Whether it boots as a test: in the drill's machine, from what is served."""

    history: History
    known: VmConfig | None
    targets: Sequence[str]
    until: str | None
    seconds: int

    def test(self, serving: Exported, position: Position) -> int:
        """0 if the sign came, 1 if not. Raises ConfigError, and StartError if QEMU does not take the machine."""
        stored = configuration(self.history, self.known, position)
        machine = machine_of(stored.document, stored.suffix, stored.origin)
        formats = {disk.target: disk.format for disk in self.history.runs[position.run].disks if disk.target in self.targets}
        nodes = nodes_at(serving.socket, formats)
        passed, outcome, _ = boot_until(lambda agent: machine.watched(nodes, agent), self.until, self.seconds)
        print(f"bisect: seq {position.seq}: {outcome}", file=sys.stderr, flush=True)
        return 0 if passed else 1


@dataclass(slots=True)
class _Tester:
    """Serves a moment, has it tested, and tells how that went."""

    history: History
    targets: Sequence[str]
    subject: _Command | _Boot
    socket: Path
    cache: ChunkCache
    scratch: Path | None
    json: bool
    tests: int = 0

    def expect(self, position: Position, wanted: Verdict, option: str) -> None:
        """Raises UsageError if one of the ends is not what the user takes it for."""
        if (verdict := self.test(position)) is not wanted:
            said = "cannot be tested (exit code 125)" if verdict is Verdict.SKIP else f"is {verdict.value} already"
            if verdict is Verdict.GOOD:
                said = "is good still"
            raise UsageError(
                f"the test says that {option}, {format_time(position.time_ns)} (seq:{position.seq}), {said}",
                "--from must be a good moment, --to a later, bad one",
            )

    def test(self, position: Position) -> Verdict:
        """Raises UsageError if the command cannot be run, VmrewindError if it wants to end the search."""
        code = self._run(position)
        verdict = Verdict.GOOD if code == 0 else Verdict.SKIP if code == _SKIP else Verdict.BAD
        ends = not 0 <= code < _ABORT
        self.tests += 1
        if self.json:
            told = {"event": "test", **position_data(position), "exit_code": code, "verdict": None if ends else verdict.value}
            print(json_module.dumps(told), flush=True)
        elif not ends:
            print(f"seq {position.seq}, {format_time(position.time_ns)}: {verdict.value} (exit code {code})", flush=True)
        if ends:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise VmrewindError(
                f"the command {how} at seq:{position.seq}: the search ends here", "125 skips a moment; 1 calls it bad"
            )
        return verdict

    def _run(self, position: Position) -> int:
        """The test's exit code; that of a moment to skip if it read what cannot be had: its word means nothing then."""
        unreadable = []

        def complain(what: str) -> None:
            unreadable.append(what)
            print(f"bisect: seq {position.seq}: {what}", file=sys.stderr, flush=True)

        with exported(
            self.history, self.targets, position, self.socket, cache=self.cache, changes=scratch_in(self.scratch), complain=complain
        ) as serving:
            code = self.subject.test(serving, position)
        return _SKIP if unreadable else code


def _described(change: Change) -> dict[str, Any]:
    op = change.op.name.lower() if change.op is not None else "gap"
    return {**position_data(change.position), "disk": change.target, "op": op, "offset": change.offset, "length": change.length}


def _tell(changes: Changes, good: int, bad: int, one: Position, tests: int, *, json: bool) -> int:
    """Print what was found; exit code 0 if that is one change, 1 if it may be one of several."""
    exact = bad - good == 1
    last_good = changes[good].position if good >= 0 else one
    if json:
        result = {"event": "found", "exact": exact, "tests": tests, "last_good": position_data(last_good)}
        print(json_module.dumps(result | {"first_bad": _described(changes[bad]), "candidates": bad - good}))
    else:
        if not exact:
            print(f"not narrowed down further: the first bad one is among {bad - good} writes that cannot be tested, or this one:")
        change = changes[bad]
        position = change.position
        what = f"first bad: seq {position.seq} of run {run_name(position.run)}, {format_time(position.time_ns)}: "
        if change.op is None:
            print(f"{what}the first moment of {change.target} behind a gap; what changed in the gap is in no record")
        else:
            print(f"{what}{change.op.name.lower()} on {change.target}, offset {change.offset}, {change.length} bytes")
        print(f"last good: seq:{last_good.seq}, {format_time(last_good.time_ns)} ({tests} tests)")
    return 0 if exact else VmrewindError.exit_code
