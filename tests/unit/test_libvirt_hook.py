"""The hook's steps, with a keeper that does nothing but what the contract says: report, run on, end on SIGINT."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmrewind.errors import ConfigError, ImageError, StartError, VmStateError
from vmrewind.paths import VmPaths
from vmrewind.start import hook
from vmrewind.start.processes import Keeping, Process

KEEPER = """
import json, os, signal, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
behaviour = os.environ["BEHAVIOUR"]
report, runtime = int(arguments["--report-fd"]), os.environ["RUNTIME"]
assert open(arguments["--xml"]).read().startswith("<domain")
print("this goes to the log")
if behaviour == "dies":
    sys.exit("no such thing as luck")
if behaviour == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
if behaviour == "refuses":
    error = {"ok": False, "kind": "image", "message": "/a.raw: in use", "hint": "stop the other"}
    os.write(report, json.dumps(error).encode() + b"\\n")
    sys.exit(4)
if behaviour == "babbles":
    os.write(report, b"what?\\n")
def end(*_):
    open(runtime + "/ended", "w").close()
    sys.exit(0)
signal.signal(signal.SIGINT, end)
fds = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
os.makedirs(runtime + "/web01", exist_ok=True)
ticks = int(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
own = {"pid": os.getpid(), "started_ticks": ticks}
state = {"run": "00000000000000ff", "mode": "libvirt", "keeper": own, "capture": own, "ship": None, "qemu": None}
state |= {"fds": sorted(fds), "sid": os.getsid(0)}
json.dump(state, open(runtime + "/web01/keeper.json", "w"))
if behaviour == "serves":
    os.write(report, b'{"ok": true}\\n')
os.close(report)
while True:
    signal.pause()
"""
PROTECTED = (
    b'<domain><name>web01</name><metadata><p:protection xmlns:p="urn:vmrewind:protection:1" enabled="yes" repository="/r">'
    b'<p:disk target="vda" image="/a"/></p:protection></metadata></domain>'
)
PLAIN = b"<domain><name>web01</name></domain>"


@pytest.fixture(autouse=True)
def _keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "keeper_double.py").write_text(KEEPER)
    monkeypatch.setattr(hook, "KEEPER_MODULE", "keeper_double")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RUNTIME", os.environ["VMREWIND_RUNTIME_DIR"])
    monkeypatch.setenv("BEHAVIOUR", "serves")
    yield
    hook.stop_keeper(VmPaths("web01"))


def keeper_state() -> dict[str, Any]:
    state: dict[str, Any] = json.loads(VmPaths("web01").keeper.read_bytes())
    return state


def keeper_process() -> Process:
    return Process(**keeper_state()["keeper"])


def write_keeping(keeper: Process, mode: str, capture: Process | None = None, ship: Process | None = None) -> None:
    VmPaths("web01").runtime.mkdir(parents=True, exist_ok=True)
    Keeping("00000000000000ff", mode, keeper, capture, ship).write(VmPaths("web01"))


def test_a_protected_domain_has_a_keeper_from_prepare_to_release() -> None:
    hook.handle("web01", "prepare", "begin", PROTECTED)
    paths = VmPaths("web01")
    assert (paths.state / "domain.xml").read_bytes() == PROTECTED
    keeper = keeper_process()
    assert keeper.alive
    hook.handle("web01", "start", "begin", PROTECTED)
    hook.handle("web01", "started", "begin", PROTECTED)
    events = [json.loads(line) for line in paths.events(0xFF).read_text().splitlines()]
    assert [event["event"] for event in events] == ["qemu.started", "cpu.started"]
    hook.handle("web01", "release", "end", PROTECTED)
    assert not keeper.alive
    assert (Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "ended").exists()


def test_the_keeper_holds_nothing_of_the_hook() -> None:
    inherited, other = os.pipe()
    os.set_inheritable(other, True)
    try:
        hook.handle("web01", "prepare", "begin", PROTECTED)
        state = keeper_state()
        fds = state["fds"]
        log = str(VmPaths("web01").log)
        assert [fd for fd in fds if not fd.startswith(("pipe:", "/proc/"))] == sorted(["/dev/null", log])
        assert len([fd for fd in fds if fd.startswith("pipe:")]) == 1
        assert str(Path(f"/proc/self/fd/{other}").readlink()) not in fds
        assert state["sid"] == state["keeper"]["pid"]
    finally:
        os.close(inherited)
        os.close(other)


def test_a_domain_without_protection_is_left_alone() -> None:
    off = PROTECTED.replace(b'"yes"', b'"no"')
    for xml in (PLAIN, off):
        for step in ("prepare begin", "start begin", "started begin", "release end", "migrate begin"):
            hook.handle("web01", *step.split(), xml)
    assert not VmPaths("web01").state.exists()


@pytest.mark.parametrize("operation", ["reconnect", "restore", "attach", "stopped", "prepare", "unheard-of", ""])
def test_other_operations_do_nothing(operation: str) -> None:
    hook.handle("web01", operation, "end" if operation == "prepare" else "begin", PROTECTED)
    assert not VmPaths("web01").state.exists()


def test_what_the_keeper_refuses_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHAVIOUR", "refuses")
    with pytest.raises(ImageError, match=r"/a\.raw: in use") as caught:
        hook.handle("web01", "prepare", "begin", PROTECTED)
    assert caught.value.hint == "stop the other"
    hook.handle("web01", "release", "end", PROTECTED)


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [("dies", "exit code 1.*no such thing as luck"), ("is killed", "exit code -9"), ("babbles", "exit code")],
)
def test_a_keeper_that_does_not_report_is_a_failed_start(monkeypatch: pytest.MonkeyPatch, behaviour: str, said: str) -> None:
    monkeypatch.setenv("BEHAVIOUR", behaviour)
    monkeypatch.setattr(hook, "EXIT_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(StartError, match=said) as caught:
        hook.handle("web01", "prepare", "begin", PROTECTED)
    assert "vmrewind.log" in caught.value.hint


def test_a_keeper_that_is_left_over_is_stopped_first() -> None:
    hook.handle("web01", "prepare", "begin", PROTECTED)
    first = keeper_process()
    hook.handle("web01", "prepare", "begin", PROTECTED)
    second = keeper_process()
    assert first != second
    assert not first.alive
    assert second.alive
    hook.handle("web01", "prepare", "begin", PLAIN)
    assert not second.alive


def test_release_without_a_keeper_is_fine() -> None:
    hook.handle("web01", "release", "end", PROTECTED)
    keeper = VmPaths("web01").keeper
    keeper.parent.mkdir(parents=True)
    for content in ("", "{}", "[]", '{"keeper": 1}', "\0"):
        keeper.write_text(content)
        hook.handle("web01", "release", "end", PROTECTED)
        hook.handle("web01", "started", "begin", PROTECTED)


def test_a_pid_that_belongs_to_another_process_by_now_is_left_alone() -> None:
    own = Process.of(os.getpid())
    assert own is not None
    another = Process(own.pid, own.started_ticks - 1)
    write_keeping(another, "libvirt", another, another)
    hook.handle("web01", "release", "end", PROTECTED)  # would end this test


def test_the_children_of_a_keeper_that_was_killed_are_ended_capture_first(tmp_path: Path) -> None:
    order = tmp_path / "order"
    # each notes its end; ship must not see its end come before capture's
    script = (
        "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[2], 'a').write(sys.argv[1]), sys.exit()))\n"
    )
    script += "print(flush=True)\nwhile True: signal.pause()"
    children = []
    for role in ("capture ", "ship"):
        child = subprocess.Popen([sys.executable, "-c", script, role, order], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        children.append(child)
    capture, ship = (Process.of(child.pid) for child in children)
    write_keeping(Process(1, 0), "libvirt", capture, ship)
    hook.handle("web01", "release", "end", PROTECTED)
    assert order.read_text() == "capture ship"
    for child in children:
        with child:
            assert child.wait(60) == 0


def test_a_vm_that_runs_in_direct_mode_is_not_taken_over() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        keeper = Process.of(other.pid)
        assert keeper is not None
        write_keeping(keeper, "direct")
        with pytest.raises(VmStateError, match=f"running already, without libvirt .process {other.pid}"):
            hook.handle("web01", "prepare", "begin", PROTECTED)
        assert other.poll() is None
        VmPaths("web01").keeper.unlink()


def test_a_qemu_that_libvirt_lost_sight_of_is_not_given_a_second_beside_it() -> None:
    hook.handle("web01", "prepare", "begin", PROTECTED)
    keeper = keeper_process()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(VmPaths("web01").control_socket))
        control.listen()

        def answer() -> None:
            connection, _ = control.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b'{"ok": true, "disks": {"vda": {"clients": 1}, "vdb": {"clients": 0}}}\n')

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(VmStateError, match="still connected to vda"):
            hook.handle("web01", "prepare", "begin", PROTECTED)
        thread.join()
    assert keeper.alive


def test_a_keeper_that_does_not_finish_is_reported() -> None:
    hook.handle("web01", "prepare", "begin", PROTECTED)
    pid = keeper_process().pid
    os.kill(pid, signal.SIGSTOP)  # stopped, it does not take SIGINT
    try:
        began = time.monotonic()
        with pytest.raises(VmStateError, match="did not finish within"):
            hook.stop_keeper(VmPaths("web01"), timeout_seconds=0.1)
        assert time.monotonic() - began < 5
    finally:
        os.kill(pid, signal.SIGCONT)


def test_migration_is_refused() -> None:
    with pytest.raises(VmStateError, match="cannot migrate"):
        hook.handle("web01", "migrate", "begin", PROTECTED)


def test_xml_that_cannot_be_understood_is_not_taken_for_unprotected() -> None:
    with pytest.raises(ConfigError, match="malformed"):
        hook.handle("web01", "prepare", "begin", PROTECTED[:-5])


def test_a_state_directory_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMREWIND_STATE_DIR", "/proc/nowhere")
    with pytest.raises(StartError, match="/proc/nowhere"):
        hook.handle("web01", "prepare", "begin", PROTECTED)


def test_the_process_says_what_is_wrong_and_exits_with_the_errors_code() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "vmrewind.start.hook", *arguments], input=PROTECTED, capture_output=True, check=False
        )

    refused = run("web01", "migrate", "begin", "-")
    assert refused.returncode == VmStateError.exit_code
    assert refused.stderr.startswith(b"vmrewind: web01 is protected by vmrewind")
    assert refused.stdout == b""
    for operation in ("reconnect", "restore", "release"):
        done = run("web01", operation, "begin", "-")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
