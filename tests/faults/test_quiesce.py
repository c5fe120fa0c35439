"""Agents that misbehave, commands and freezers that are killed: the guest is thawed in time; "quiesced" is never said wrongly."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guests.images import raw_image
from guests.machine import qemu_command
from guests.protected import VMREWIND, Disk, ProtectedVm, vmrewind
from guests.writer import agent_arguments
from tests.capture_tools import MIB, until
from tests.e2e.test_start_after import Alone
from tests.fake_agent import EFI, MOUNTED, FakeAgent, Hang, HangUp
from tests.fault_tools import kill
from vmrewind.errors import GuestAgentError, VmrewindError, VmStateError
from vmrewind.paths import VmPaths
from vmrewind.start.freezer import FROZEN_SECONDS_MAX
from vmrewind.start.processes import running
from vmrewind.start.quiesce import freeze


@contextmanager
def vm_with(tmp_path: Path) -> Iterator[tuple[ProtectedVm, FakeAgent]]:
    """A protected VM whose guest is its firmware, and an agent that stands where QEMU's channel to a real one would be."""
    socket = Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "agent.sock"
    disk = Disk("vda", raw_image(tmp_path / "vda.raw", MIB))
    command = [*qemu_command(tmp_path / "serial"), *agent_arguments(socket)]
    with ProtectedVm(tmp_path, "web01", command, [disk], journal_size="16MiB") as vm:
        vmrewind("init", vm.repository)
        vm.start()
        with FakeAgent(socket) as agent:
            yield vm, agent


def bookmarks(vm: ProtectedVm) -> list[dict[str, Any]]:
    events = json.loads(vmrewind("timeline", vm.config, "--json").stdout)["events"]
    return [event for event in events if event["event"] == "bookmark"]


def raises(error: type[BaseException]) -> Callable[[], Any]:
    def do() -> Any:
        raise error

    return do


def test_an_agent_that_does_not_do_its_work_makes_no_bookmark(tmp_path: Path) -> None:
    with vm_with(tmp_path) as (vm, agent):

        def half() -> int:
            agent.freeze()
            return 1

        def refuse() -> bytes:
            return b'{"error": {"class": "GenericError", "desc": "failed to freeze /data: busy"}}\n'

        def froze_and_hangs() -> Any:
            agent.freeze()
            raise Hang

        def stolen() -> int:
            agent.thaw()
            return 1

        fs = "guest_get_fsinfo"
        freezing, thawing = "guest_fsfreeze_freeze", "guest_fsfreeze_thaw"
        cases: list[tuple[str, Callable[[], Any], str]] = [
            (freezing, half, "froze 1 of 2"),
            (freezing, refuse, "failed to freeze /data: busy"),
            (freezing, lambda: 0, "froze 0 of 2"),
            (freezing, lambda: "two", "no number of file systems"),
            (freezing, lambda: True, "no number of file systems"),
            (freezing, lambda: -2, "no number of file systems"),
            (freezing, lambda: b"[1, 2]\n", "neither a result nor an error"),
            (freezing, lambda: b"\x00\x01nonsense\n", "no guest agent"),
            (freezing, raises(HangUp), "hung up"),
            (freezing, froze_and_hangs, "does not answer guest-fsfreeze-freeze"),
            (thawing, stolen, "somebody else has thawed"),
            (fs, lambda: b"x" * (3 << 20), "does not end"),
            (fs, lambda: {"name": "vda"}, "something else than a list"),
            (fs, lambda: [{"name": "vda"}], "describes a file system as"),
            (fs, lambda: [MOUNTED[-1]], "no file system that could be frozen"),
            ("guest_sync_delimited", lambda: b'\xff{"return": 1}\n', "does not answer guest-sync-delimited"),
        ]
        for command, action, words in cases:
            agent.reset(**{command: action})
            with pytest.raises(GuestAgentError) as refused:
                freeze("web01")
            assert words in str(refused.value), (words, str(refused.value))
            assert agent.frozen_since is None, words
            assert all(seconds < FROZEN_SECONDS_MAX for seconds in agent.frozen_seconds), (words, agent.frozen_seconds)
            if command == freezing:
                assert "guest-fsfreeze-thaw" in agent.asked, words
        # A thaw is asked for until the agent confirms it.
        unwilling = iter((refuse(), b"nonsense\n"))
        agent.reset(guest_fsfreeze_freeze=half, guest_fsfreeze_thaw=lambda: next(unwilling, None) or agent.thaw())
        with pytest.raises(GuestAgentError, match="froze 1 of 2"):
            freeze("web01")
        assert agent.frozen_since is None and agent.asked.count("guest-fsfreeze-thaw") == 3
        agent.reset(guest_fsfreeze_freeze=half)
        done = vmrewind("mark", vm.config, "point", "--quiesce", check=False)
        assert done.returncode == GuestAgentError.exit_code and "froze 1 of 2" in done.stderr, done.stderr
        assert bookmarks(vm) == []
        # What an earlier client left behind in the channel is none of our answers.
        agent.reset(
            guest_sync_delimited=lambda: (
                b'{"return": 5}\n\xff\xff{"return": 7}\nx\xff{"return": %d}\n' % agent.request["arguments"]["id"]
            )
        )
        freeze("web01")
        assert len(agent.frozen_seconds) == 1
        # A file system that nothing can freeze is named wherever the bookmark is.
        agent.reset(guest_get_fsinfo=lambda: [*MOUNTED, EFI, EFI | {"name": "x", "mountpoint": "/\x1b[31m"}])
        said = vmrewind("mark", vm.config, "point", "--quiesce").stdout
        assert r"quiesced except '/\x1b[31m', /boot/efi" in said
        (mark,) = bookmarks(vm)
        assert mark["kind"] == "quiesced" and mark["not_frozen"][1] == "/boot/efi"


def test_a_guest_that_somebody_else_has_frozen_stays_so(tmp_path: Path) -> None:
    with vm_with(tmp_path) as (vm, agent):
        agent.freeze()
        with pytest.raises(GuestAgentError, match="frozen state"):
            freeze("web01")
        assert agent.frozen_since is not None and "guest-fsfreeze-thaw" not in agent.asked
        agent.thaw()
        # Two commands at once: each freeze is one command's alone.
        agent.reset(guest_fsfreeze_freeze=lambda: time.sleep(0.3) or agent.freeze())
        outcomes: list[object] = []

        def attempt() -> None:
            try:
                outcomes.append(freeze("web01"))
            except VmrewindError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=attempt) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [outcome for outcome in outcomes if isinstance(outcome, VmrewindError)]
        assert len(refused) < 3 and all(isinstance(outcome, VmStateError) for outcome in refused), refused
        assert agent.frozen_since is None and len(agent.frozen_seconds) == 3 - len(refused)
        vm.quit()
        with pytest.raises(VmStateError):
            freeze("web01")


def freezers() -> list[int]:
    """The processes of ``freezer.py`` that were started in this test's directories."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (directory / "cmdline").read_bytes(), (directory / "environ").read_bytes()
        except OSError:
            continue
        if b"vmrewind.start.freezer" in command and os.environ["VMREWIND_RUNTIME_DIR"].encode() in environment:
            found.append(int(directory.name))
    return found


def test_whoever_is_killed_at_whatever_instant_the_guest_is_thawed(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    with vm_with(tmp_path) as (vm, agent):

        def slowly() -> int:
            agent.freeze()
            time.sleep(0.2)
            return 2

        agent.reset(guest_fsfreeze_freeze=slowly)
        frozen = 0
        for number in range(12):
            whom = "command" if number % 2 == 0 else "freezer"
            agent.asked.clear()
            command = subprocess.Popen(
                [VMREWIND, "mark", vm.config, f"killed-{number}", "--quiesce"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            until(lambda: "guest-get-fsinfo" in agent.asked, "the freezer")
            threading.Event().wait(chance.random() * 0.4)
            if whom == "command":
                os.killpg(command.pid, signal.SIGKILL)
            else:
                kill(*freezers())
            _, said = command.communicate(timeout=30)
            frozen += "guest-fsfreeze-freeze" in agent.asked
            until(lambda: not freezers(), f"the freezer's end (seed {seed})")
            assert agent.frozen_since is None, (seed, number, whom)
            if whom == "freezer":
                assert command.returncode == 0 or "has died" in said, (seed, number, said)
        assert frozen > 3 and all(seconds < FROZEN_SECONDS_MAX for seconds in agent.frozen_seconds), (seed, agent.frozen_seconds)
        # Every bookmark that there is names a moment that the agent did freeze; those killed before have none.
        assert all(mark["kind"] == "quiesced" for mark in bookmarks(vm))
        assert vmrewind("mark", vm.config, "after", "--quiesce").stdout.endswith(": quiesced\n")


def test_a_freezer_or_a_capture_that_is_stopped_or_dies_holds_the_guest_no_longer_than_ten_seconds(tmp_path: Path) -> None:
    with vm_with(tmp_path) as (vm, agent):

        def stop_the_freezer() -> int:
            for pid in freezers():
                os.kill(pid, signal.SIGSTOP)
            return agent.freeze()

        agent.reset(guest_fsfreeze_freeze=stop_the_freezer)
        with pytest.raises(GuestAgentError, match="hangs; the guest is thawed"):
            freeze("web01")
        assert agent.frozen_since is None and agent.frozen_seconds[0] < FROZEN_SECONDS_MAX
        keeping = running(VmPaths("web01"))
        assert keeping is not None and keeping.capture is not None
        agent.reset()
        os.kill(keeping.capture.pid, signal.SIGSTOP)
        try:
            with pytest.raises(VmStateError, match="does not answer"):
                freeze("web01")
        finally:
            os.kill(keeping.capture.pid, signal.SIGCONT)
        assert agent.frozen_since is None and agent.frozen_seconds[0] < FROZEN_SECONDS_MAX
        assert bookmarks(vm) == []

        def kill_capture() -> int:
            frozen = agent.freeze()
            now = running(VmPaths("web01"))
            assert now is not None and now.capture is not None
            os.kill(now.capture.pid, signal.SIGKILL)
            return frozen

        agent.reset(guest_fsfreeze_freeze=kill_capture)
        done = vmrewind("mark", vm.config, "dead", "--quiesce", check=False)
        assert agent.frozen_since is None and agent.frozen_seconds[0] < FROZEN_SECONDS_MAX
        # The keeper may have replaced it in time; else nothing is marked.
        assert [mark["name"] for mark in bookmarks(vm)] == ([] if done.returncode else ["dead"]), done.stderr


def test_a_vm_whose_qemu_somebody_else_started_is_refused_with_words(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving():
        refused = vmrewind("mark", alone.config, "never", "--quiesce", check=False)
    assert refused.returncode == 14 and "did not start its QEMU" in refused.stderr and "Traceback" not in refused.stderr
    assert not json.loads(vmrewind("timeline", alone.config, "--json").stdout)["events"][1:-1]
