"""The shell script in libvirt's hooks directory: what it passes by, what it hands over, how it gets there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmrewind.errors import LibvirtError
from vmrewind.paths import VmPaths
from vmrewind.start import hook_script

V9, V6 = 9_000_000, 6_000_000
PROTECTED = b'<domain><name>web01</name><metadata><p:protection xmlns:p="urn:vmrewind:protection:1"/></metadata></domain>\n'
PLAIN = b"<domain><name>web01</name></domain>\n" + b"<!-- a domain's XML has a few KiB -->\n" * 200


@pytest.fixture(autouse=True)
def _hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMREWIND_LIBVIRT_HOOKS", str(tmp_path / "hooks"))
    monkeypatch.setattr(hook_script, "DAEMONS", {})


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installed script, handing over to a program that tells what it was given."""
    python = tmp_path / "it's a python"
    python.write_text('#!/bin/sh\necho "$VMREWIND_STATE_DIR" "$@" >&2\ncat\nexit 7\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return hook_script.install(V9).path


def run(script: Path, *arguments: str, xml: bytes = PROTECTED) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([script, *arguments], input=xml, capture_output=True, check=False, env={"PATH": "/usr/bin:/bin"})


STEPS = [("prepare", "begin"), ("start", "begin"), ("started", "begin"), ("release", "end"), ("migrate", "begin")]


@pytest.mark.parametrize("step", STEPS)
def test_a_protected_domain_is_handed_over(script: Path, step: tuple[str, str]) -> None:
    done = run(script, "web 01", *step, "-")
    assert done.returncode == 7
    assert done.stdout == PROTECTED
    state = os.environ["VMREWIND_STATE_DIR"]
    assert done.stderr.decode() == f"{state} -P -m vmrewind.start.hook web 01 {' '.join(step)} -\n"


@pytest.mark.parametrize("step", [*STEPS, ("stopped", "end"), ("reconnect", "begin"), ("restore", "begin")])
def test_a_domain_without_protection_is_passed_by(script: Path, step: tuple[str, str]) -> None:
    done = run(script, "web01", *step, "-", xml=PLAIN)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("step", [("reconnect", "begin"), ("restore", "begin"), ("attach", "begin"), ("stopped", "end")])
def test_operations_that_are_none_of_ours_are_passed_by(script: Path, step: tuple[str, str]) -> None:
    done = run(script, "web01", *step, "-")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_keeper_that_is_left_over_is_cared_for_though_the_domain_is_protected_no_more(script: Path) -> None:
    keeper = VmPaths("web01").keeper
    keeper.parent.mkdir(parents=True)
    keeper.touch()
    assert run(script, "web01", "prepare", "begin", "-", xml=PLAIN).returncode == 7
    assert run(script, "web02", "prepare", "begin", "-", xml=PLAIN).returncode == 0


def test_passing_by_takes_milliseconds(script: Path) -> None:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        run(script, "web01", "prepare", "begin", "-", xml=PLAIN)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.02


def test_installing_again_changes_nothing_and_another_installation_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first = hook_script.install(V9)
    assert first.changed
    assert first.fresh
    assert first.path.name == "vmrewind"
    assert first.path.parent.name == "qemu.d"
    assert os.access(first.path, os.X_OK)
    assert not hook_script.install(V9).changed
    first.path.chmod(0o644)
    again = hook_script.install(V9)
    assert again.changed
    assert not again.fresh
    monkeypatch.setattr(sys, "executable", "/elsewhere/python")
    assert hook_script.install(V9).changed
    assert b"/elsewhere/python" in first.path.read_bytes()
    assert [path.name for path in first.path.parent.iterdir()] == ["vmrewind"]


def test_an_old_libvirt_has_one_script_and_another_one_is_not_overwritten() -> None:
    path = hook_script.hook_path(V6)
    assert path.name == "qemu"
    assert hook_script.install(V6).changed
    path.write_text("#!/bin/sh\n# somebody else's\n")
    with pytest.raises(LibvirtError, match="another hook script"):
        hook_script.install(V6)
    assert "somebody else's" in path.read_text()


def test_a_directory_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMREWIND_LIBVIRT_HOOKS", "/proc/nowhere")
    with pytest.raises(LibvirtError, match=r"/proc/nowhere/qemu\.d/vmrewind"):
        hook_script.install(V9)


def test_only_the_daemon_itself_is_told_to_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid_file = tmp_path / "pid"
    monkeypatch.setattr(hook_script, "DAEMONS", {"cat": pid_file, "absent": tmp_path / "none"})
    with (
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as cat,
        subprocess.Popen(["sh", "-c", "read x"], stdin=subprocess.PIPE) as other,
    ):
        pid_file.write_text(f"{other.pid}\n")  # a stale pid file: the id belongs to another process now
        assert hook_script.reload_daemons() == ()
        pid_file.write_text(f"{cat.pid}\n")
        assert hook_script.reload_daemons() == ("cat",)
        assert cat.wait(60) == -1
        assert other.poll() is None
        assert other.stdin is not None
        other.stdin.write(b"\n")
