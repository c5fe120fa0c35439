"""Progress: bars on a terminal's stderr, events for machines there with --json, and never anything of it on stdout."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import threading
from pathlib import Path

import pytest

from guests.protected import VMREWIND, vmrewind
from tests.capture_tools import Client
from tests.damage_tools import World, kind_of, make_world
from tests.e2e.test_start_after import Alone
from vmrewind.cli.progress import JsonProgress

MIB = 1 << 20


class TestEvents:
    def test_a_few_a_second_and_the_end_always(self) -> None:
        now, output = 0.0, io.StringIO()
        progress = JsonProgress(output, lambda: now)
        for step in range(1001):
            now = step / 100
            progress.update("vda", step * 1000, 1_000_000)
        progress.update("vda", 1_000_000, 1_000_000)
        progress.update("vdb", 5, 5)
        events = [json.loads(line) for line in output.getvalue().splitlines()]
        assert 15 <= len(events) <= 22
        assert events[-2]["done_bytes"] == events[-2]["total_bytes"] == 1_000_000
        assert events[-1] == {
            "event": "progress", "what": "vdb", "done_bytes": 5, "total_bytes": 5, "bytes_per_second": 0, "seconds_left": None,
        }  # fmt: skip
        assert events[4]["bytes_per_second"] == 100_000
        assert events[4]["seconds_left"] == pytest.approx(7.5, abs=0.3)

    def test_from_many_threads_lines_stay_whole(self) -> None:
        output = io.StringIO()
        progress = JsonProgress(output)

        def work(name: str) -> None:
            for step in range(200):
                progress.update(f"{name}{step}", 1, 1)

        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({json.loads(line)["what"] for line in output.getvalue().splitlines()}) == 800


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) with a pseudo-terminal as stderr and a pipe as stdout."""
    ours, theirs = pty.openpty()
    said = bytearray()

    def collect() -> None:
        try:
            while data := os.read(ours, 65536):
                said.extend(data)
        except OSError:
            return  # the last one who had the terminal open has gone

    reader = threading.Thread(target=collect)
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([VMREWIND, *arguments], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as process:
        os.close(theirs)
        reader.start()
        out, _ = process.communicate(timeout=120)
    reader.join(60)
    os.close(ours)
    return process.returncode, out, said.decode("utf-8", "replace")


def events_of(*arguments: str | Path) -> tuple[str, set[str]]:
    """The last line of stdout with --json, and what progress was told about on stderr."""
    done = vmrewind(*arguments, "--json")
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert all(event["event"] == "progress" for event in events)
    assert "progress" not in done.stdout
    ends = {event["what"] for event in events if event["done_bytes"] == event["total_bytes"]}
    return done.stdout.splitlines()[-1], ends


@pytest.fixture
def vm(tmp_path: Path) -> Path:
    """The TOML file of a VM whose image has 8 MiB of data."""
    directory = tmp_path / "vm"
    directory.mkdir()
    (directory / "vda.raw").write_bytes(os.urandom(8 * MIB))
    (directory / "web.toml").write_text(
        'name = "web"\n[protection]\nenabled = true\nrepository = "repo"\njournal_size = "16MiB"\n'
        '[[protection.disk]]\ntarget = "vda"\nimage = "vda.raw"\n[qemu]\ncommand = ["qemu-system-x86_64", "-accel", "tcg"]\n'
    )
    vmrewind("init", directory / "repo")
    return directory / "web.toml"


def test_every_long_command_tells_machines(vm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = f"{vm.parent}/repo/web"
    last, told = events_of("backup", vm)
    assert (json.loads(last)["vm"], told) == ("web", {"base of vda"})
    last, told = events_of("ship", "on", vm)
    assert (json.loads(last)["shipping"], told) == (["vda"], {"history"})
    last, told = events_of("restore", vm, "--at", "latest", "--output", tmp_path / "files")
    assert (json.loads(last)["vm"], told) == ("web", {"vda"})
    with (vm.parent / "vda.raw").open("r+b") as image:
        image.write(b"changed past vmrewind")
    last, told = events_of("restore", vm, "--at", "seq:1", "--in-place", "--discard-unprotected")
    assert (json.loads(last)["vm"], told) == ("web", {"vda", "vda (compare)"})
    last, told = events_of("verify", stored, "--data")
    assert (json.loads(last)["outcome"], told) == ("sound", {"structure of web", "segments of web", "chunks"})
    _, told = events_of("journal", "verify", tmp_path / "state/vms/web/journal")
    assert told == {"journal"}
    command = [VMREWIND, "verify", stored, "--drill", "--at", "latest", "--scratch", tmp_path, "--until", "NEVER", "--seconds", "1"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert json.loads(done.stdout.splitlines()[-1])["drill"] == "failed"
    assert json.loads(done.stderr.splitlines()[-1])["what"] == "vda"
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "another host"))
    last, told = events_of("takeover", stored, "--at", "seq:1", "--images", tmp_path / "taken")
    assert json.loads(last)["vm"] == "web"
    assert told == {"vda"}


def test_what_a_stopped_vm_left_is_counted_while_it_is_carried(tmp_path: Path) -> None:
    alone = Alone(tmp_path, ship="on-demand")
    with alone.serving() as ready, Client(Path(ready["disks"]["vda"]["uri"].partition("socket=")[2])) as client:
        for at in range(12):
            client.write(at * MIB, os.urandom(MIB))
    command = [VMREWIND, "ship", "on", alone.config, "--bandwidth-limit", "4MiB", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert any(0 < event["done_bytes"] < event["total_bytes"] for event in events), events
    assert events[-1]["done_bytes"] == events[-1]["total_bytes"] >= 12 * MIB
    assert alone.restored("latest") == alone.image.read_bytes()


def test_on_a_terminal_there_are_bars_and_stdout_is_clean(vm: Path, tmp_path: Path) -> None:
    stored = f"{vm.parent}/repo/web"
    for bar, arguments in {
        "base of vda": ("backup", vm),
        "history": ("ship", "on", vm),
        "vda": ("restore", vm, "--at", "latest", "--output", tmp_path / "files"),
        "vda (compare)": ("restore", vm, "--at", "latest", "--in-place"),
        "chunks": ("verify", stored, "--data", "--all"),
        "journal": ("journal", "verify", tmp_path / "state/vms/web/journal"),
    }.items():
        code, out, err = run(*arguments)
        assert code == 0, err
        assert bar in err, arguments
        assert "━" in err
        assert "\x1b" not in out
        assert out


def test_findings_go_to_stdout_while_there_are_bars(tmp_path: Path) -> None:
    world: World = make_world(tmp_path / "world")
    key = next(key for key in world.objects() if kind_of(key) == "segments")
    world.path(key).write_bytes(b"nothing of a segment" * 10)
    code, out, err = run("verify", world.url, "--data")
    assert code == 7
    assert f"DAMAGED: {key}" in out
    assert "DAMAGED" not in err
