"""Other local users: what they can get at of a protected VM (nothing), and what they can put in its way (nothing either).

The other user is a real one, ``nobody``, in a place that everybody may enter, as /tmp is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests import images
from guests.protected import Disk, ProtectedVm, vmrewind
from tests.capture_tools import RUN, Capture, DiskOf, raw_image
from tests.e2e.libvirt_host import LibvirtHost
from tests.e2e.test_libvirt_domain import disk, domain
from tests.e2e.test_start_after import Alone
from tests.other_user import NOBODY, as_user, command_lines, environment_of, foreign_runtime, gets_at, open_journal, paths_below
from vmrewind.errors import ConfigError
from vmrewind.journal.format import run_name
from vmrewind.paths import VmPaths
from vmrewind.start.libvirt import qemu_owner
from vmrewind.start.processes import Process

MIB = 1 << 20
SECRET = "s3cret-of-the-repository"
MODE = 0o777


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory like /tmp: everybody's, sticky."""
    path = Path(tempfile.mkdtemp(prefix="vms-"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.fixture
def placed(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State and runtime directories, not made yet, in the shared place."""
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(shared / "state"))
    monkeypatch.setenv("VMREWIND_RUNTIME_DIR", str(shared / "run"))
    return shared


@pytest.mark.parametrize("umask", [0o000], indirect=True)
@pytest.mark.usefixtures("umask")
def test_another_user_gets_at_nothing_of_a_running_vm_and_no_secret_shows(placed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("VMREWIND_PASSPHRASE", SECRET)
    run = Path(os.environ["VMREWIND_RUNTIME_DIR"])
    own = placed / "own"
    as_user(["mkdir", own])
    # made by whoever sets the machine up; the test's QEMU has a socket of its own in it
    for made, mode in ((run, 0o711), (placed / "vm", 0o755)):
        made.mkdir()
        made.chmod(mode)
    image = images.raw_image(placed / "vm" / "a.raw", MIB)
    # what it is made of matters here, not what its guest does
    serial = placed / "vm" / "serial"
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-chardev", f"file,id=x,path={serial}"]
    vmrewind("init", placed / "vm" / "repository", "--encrypt")
    with ProtectedVm(placed / "vm", "web01", command, [Disk("vda", image, device="none")], journal_size="16MiB") as vm:
        vm.start()
        vmrewind("restore", vm.config, "--at", "latest", "--output", placed / "restored")
        tops = [placed / "state", run / "web01", vm.repository, placed / "restored"]
        assert gets_at(tops, own) == []
        assert "read" in " ".join(gets_at([placed / "vm"], own)), "the probe itself sees what is open: the VM's own files"
        log = VmPaths("web01").log
        assert log.exists() and {(run / "web01" / name).exists() for name in ("nbd.sock", "control.sock", "keeper.json")} == {True}
        # the repository's secrets are ship's, and not on anybody's command line
        environments = {role: environment_of(p["pid"]) for role, p in vm.status()["processes"].items() if p}
        assert {role: SECRET in environment.values() for role, environment in environments.items()} == {
            "keeper": True,
            "capture": False,
            "ship": True,
            "qemu": False,
        }
        assert [line for line in command_lines() if SECRET in line] == []
        shown = vmrewind("status", vm.config, "--json").stdout + vmrewind("events", vm.config, "--json").stdout + log.read_text()
        assert SECRET not in shown
        # QEMU's own files have the modes that its user's umask gives them
        assert serial.stat().st_mode & MODE == 0o666


@pytest.mark.parametrize("umask", [0o000, 0o777], indirect=True)
@pytest.mark.usefixtures("umask")
def test_modes_do_not_depend_on_the_umask(placed: Path) -> None:
    directory = placed / "own"
    directory.mkdir()
    directory.chmod(0o755)
    alone = Alone(directory)
    alone.config.chmod(0o600)
    alone.image.chmod(0o600)
    with alone.serving() as ready:
        alone.write(ready, 1)
        tops = [placed / "state", placed / "run", alone.repository]
        modes = {}
        for path in paths_below(tops):
            with contextlib.suppress(FileNotFoundError):  # temporary, and renamed by now
                modes[path] = path.lstat().st_mode & MODE
        assert modes.pop(placed / "run") == 0o711  # passed through by those QEMUs that run as another user
        assert {f"{path}: {mode:o}" for path, mode in modes.items() if mode not in (0o600, 0o700)} == set()
        assert len(modes) > 15


@pytest.mark.parametrize("plant", [foreign_runtime, open_journal])
def test_a_start_refuses_what_others_have_made_beforehand(placed: Path, tmp_path: Path, plant: Callable[[Path], str]) -> None:
    alone = Alone(tmp_path)
    said = plant(placed)
    done = vmrewind("backup", alone.config, check=False)  # a run that ends by itself
    assert done.returncode == ConfigError.exit_code, done.stderr
    assert said in done.stderr
    assert "chmod" in done.stderr or "remove it" in done.stderr
    assert not (placed / "state" / "vms" / "alone" / "journal" / "capture.state").exists()


def test_nobody_else_names_a_process_to_be_ended(placed: Path, tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as victim:
        try:
            process = Process.of(victim.pid)
            assert process is not None
            named = {"pid": process.pid, "started_ticks": process.started_ticks}
            gone = {"pid": 1 << 22, "started_ticks": 1}
            keeping = {"run": "00000000000000ff", "mode": "direct", "keeper": gone, "capture": None, "ship": named, "qemu": None}
            runtime = placed / "run" / "alone"
            as_user(["mkdir", "-p", runtime])
            as_user(["tee", runtime / "keeper.json"], given=json.dumps(keeping))
            for command in (["status", alone.config], ["backup", alone.config]):
                done = vmrewind(*command, check=False)
                assert done.returncode == ConfigError.exit_code and "another user" in done.stderr
            assert victim.poll() is None
            # its own word is believed: else this test would prove nothing
            for path in (placed / "run", runtime, runtime / "keeper.json"):
                os.chown(path, 0, 0)
            with alone.serving():
                assert victim.wait(30) == -15
        finally:
            victim.kill()


def test_nothing_is_imported_from_where_a_vm_is_started(placed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Alone(tmp_path)
    for module in ("argparse", "xxhash", "json", "vmrewind"):
        (placed / f"{module}.py").write_text(f"open('{tmp_path}/imported', 'w').close()\nraise SystemExit('imported {module}')\n")
    monkeypatch.chdir(placed)
    with alone.serving() as ready:
        alone.write(ready, 1)
        process = vmrewind("status", alone.config, "--json").stdout
        assert json.loads(process)["ship"] is not None
    assert not (tmp_path / "imported").exists()


def test_under_libvirt_only_qemus_user_reaches_the_disks() -> None:
    with LibvirtHost() as host:
        image = host.directory / "a.raw"
        images.raw_image(image, MIB)
        host.define(domain(disk("vda", image)))
        host.protect("web01", "vda")
        host.virsh("start", "web01", "--paused")
        runtime, (uid, gid) = VmPaths("web01").runtime, qemu_owner()
        assert uid != 0
        own = host.directory / "own"
        own.mkdir()
        own.chmod(0o777)
        tops = [runtime, VmPaths("web01").state, host.repository]
        assert gets_at(tops, own) == []
        # QEMU's user gets at the one socket, and at no more; its group alone does not
        assert gets_at(tops, own, uid, gid) == [f"connect {runtime / 'nbd.sock'}", f"link {runtime / 'nbd.sock'}"]
        assert gets_at(tops, own, NOBODY, gid) == []
        assert (runtime.stat().st_uid, runtime.stat().st_gid, runtime.stat().st_mode & MODE) == (0, gid, 0o710)
        host.virsh("destroy", "web01")


@pytest.mark.parametrize("command", ["status", "mark", "resync"])
def test_an_instruction_with_unknown_keys_is_refused(tmp_path: Path, command: str) -> None:
    with Capture(tmp_path, [DiskOf("vda", raw_image(tmp_path / "a.raw", MIB))]) as capture:
        known = {"mark": {"name": "one"}, "resync": {"run": run_name(RUN), "disk": "vda", "ranges": [], "close": False}}.get(
            command, {}
        )
        assert capture.instruct(command=command, **known)["ok"]
        answer = capture.instruct(command=command, **known, force=True)
        assert not answer["ok"] and "force" in answer["message"]
        if command == "resync":
            assert not capture.instruct(command=command, **known | {"close": "no"})["ok"]
