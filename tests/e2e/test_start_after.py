"""What a start makes of what it finds: clocks set back, history lost, restores interrupted, processes left over."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guests.protected import VMREWIND, vmrewind
from tests.capture_tools import Client, until
from tests.fault_tools import kill
from vmrewind.journal.copy_before_write import begun_base
from vmrewind.start.processes import Process

MIB = 1 << 20
SIZE = 64 * MIB


class Alone:
    """A disk served by ``vmrewind capture``, with a repository."""

    _journal: str | None = None
    waits_for_base = True
    """Whether what is done while it is served begins when the base is made: before, no moment can be restored."""

    def __init__(self, directory: Path, image_format: str = "raw", **protection: str) -> None:
        self.directory = directory
        self.format = image_format
        self.image = directory / f"vda.{image_format}"
        self.repository = directory / "repository"
        self.config = directory / "alone.toml"
        subprocess.run(["qemu-img", "create", "-q", "-f", image_format, self.image, str(SIZE)], check=True)
        vmrewind("init", self.repository)
        self.configure(repository=str(self.repository), **protection)

    def configure(self, **protection: str) -> None:
        self._journal = protection.get("journal")
        keys = {"journal_size": "64MiB", **protection}
        lines = ['name = "alone"', "[protection]", "enabled = true", *(f"{k} = {json.dumps(v)}" for k, v in keys.items())]
        self.config.write_text(
            "\n".join([*lines, "[[protection.disk]]", 'target = "vda"', f'image = "{self.image}"', f'format = "{self.format}"', ""])
        )

    @contextmanager
    def serving(self, **environment: str) -> Iterator[dict[str, Any]]:
        """Capture runs; yields its ready line, with the keeper's process id added."""
        process = subprocess.Popen(
            [VMREWIND, "capture", self.config],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        assert process.stdout is not None and process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            if self.waits_for_base:
                until(lambda: begun_base(self.journal, "vda") is None, "the base")
            yield json.loads(line) | {"keeper": process.pid}
            if process.poll() is None:
                process.terminate()
            process.wait(60)
        finally:
            # After a failure too: killed, it would leave its children behind, and they the images that they hold.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()

    def write(self, ready: dict[str, Any], pattern: int, offset: int = 0, length: int = MIB) -> None:
        uri = ready["disks"]["vda"]["uri"]
        commands = [f"write -P {pattern} {offset} {length}", "flush"]
        subprocess.run(
            ["qemu-io", "-f", "raw", uri, *(w for c in commands for w in ("-c", c))], check=True, stdout=subprocess.DEVNULL
        )

    def restored(self, moment: str, *more: str) -> bytes:
        output = self.directory / f"out-{time.monotonic_ns()}"
        vmrewind("restore", self.config, "--at", moment, "--output", output, *more)
        return (output / f"vda.{self.format}").read_bytes()

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(vmrewind("status", self.config, "--json").stdout)
        return status

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in vmrewind("events", self.config, "--json").stdout.splitlines()]

    @property
    def journal(self) -> Path:
        return Path(self._journal or f"{os.environ['VMREWIND_STATE_DIR']}/vms/alone/journal")


def test_a_clock_that_was_set_back_between_runs(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    ahead = tmp_path / "ahead"
    ahead.mkdir()
    (ahead / "sitecustomize.py").write_text(
        "import time\n_now, _ns = time.time, time.time_ns\n"
        "time.time = lambda: _now() + 7200\ntime.time_ns = lambda: _ns() + 7200 * 10**9\n"
    )
    with alone.serving(PYTHONPATH=str(ahead)) as ready:
        alone.write(ready, 1)
    with alone.serving() as ready:
        alone.write(ready, 2)
    assert alone.restored("latest") == alone.image.read_bytes()
    assert alone.image.read_bytes()[0] == 2
    shutil.rmtree(alone.journal)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_a_start_makes_a_base_when_the_history_below_was_lost(tmp_path: Path) -> None:
    alone = Alone(tmp_path, journal_size="8MiB", ship="on-demand")
    with alone.serving() as ready:
        for number in range(24):
            alone.write(ready, number + 1, number * MIB)
    lost = vmrewind("restore", alone.config, "--at", "latest", "--output", tmp_path / "no", check=False)
    assert lost.returncode == 6
    with alone.serving() as ready:
        assert "base.begun" in alone.events()
        alone.write(ready, 99)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_history_that_was_recycled_here_and_shipped_is_gone_on_from(tmp_path: Path) -> None:
    alone = Alone(tmp_path, journal_size="8MiB", on_journal_full="block")
    with alone.serving() as ready:
        for number in range(24):
            alone.write(ready, number + 1, number * MIB)
    with alone.serving() as ready:
        assert "base.begun" not in alone.events() and "history.gap" not in alone.events()
        alone.write(ready, 99)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_what_another_repository_has_does_not_count_as_shipped_to_this_one(tmp_path: Path) -> None:
    alone = Alone(tmp_path, journal_size="8MiB")
    with alone.serving() as ready:
        first_run = json.loads(vmrewind("status", alone.config, "--json").stdout)["run"]
        for number in range(3):
            alone.write(ready, number + 1, number * MIB)
    assert json.loads((alone.journal / "shipped.json").read_bytes())["runs"][first_run]
    vmrewind("init", tmp_path / "other")
    alone.configure(repository=str(tmp_path / "other"), journal_size="8MiB", ship="on-demand")
    with alone.serving() as ready:
        assert not (alone.journal / "shipped.json").exists()
        for number in range(24):
            alone.write(ready, number + 1, number * MIB)
    log = [json.loads(line) for line in vmrewind("events", alone.config, "--json").stdout.splitlines()]
    assert first_run in {event["run"] for event in log if event["event"] == "history.dropped"}


def test_a_repository_that_was_never_seen_is_not_taken_to_have_anything(tmp_path: Path) -> None:
    """Neither the old one's bases nor what was shipped to it are in the new one, and a start that needs them waits for it."""
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    other, away = tmp_path / "other", tmp_path / "away"
    vmrewind("init", other)
    other.rename(away)
    alone.configure(repository=str(other))
    refused = vmrewind("capture", alone.config, check=False)
    assert refused.returncode == 5 and "needs a full backup" in refused.stderr
    away.rename(other)
    with alone.serving() as ready:
        assert "base.begun" in alone.events()
        alone.write(ready, 2)
    then = tmp_path / "then"
    vmrewind("restore", f"{other}/alone", "--at", "latest", "--output", then)
    assert (then / "vda.raw").read_bytes() == alone.image.read_bytes()
    # One that is known may be away: the VM starts all the same, and needs nothing of it.
    other.rename(away)
    with alone.serving() as ready:
        alone.write(ready, 3)
    away.rename(other)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_half_restored_images_are_never_started(tmp_path: Path) -> None:
    alone = Alone(tmp_path, on_failure="start-unprotected")
    with alone.serving() as ready:
        alone.write(ready, 1)
    alone.config.write_text(alone.config.read_text().replace("[protection]", '[qemu]\ncommand = ["false"]\n[protection]', 1))
    (alone.journal / "restore-pending.json").write_text("{}")
    for config in (alone.config.read_text(), alone.config.read_text().replace("enabled = true", "enabled = false")):
        alone.config.write_text(config)
        done = vmrewind("run", alone.config, check=False)
        assert done.returncode == 8 and "half restored" in done.stderr, done.stderr


def test_an_unprotected_start_after_a_crash_has_everything_that_was_flushed(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 7)
        processes = alone.status()["processes"]
        kill(*(processes[role]["pid"] for role in ("keeper", "capture", "ship")))
    # The host's death: another boot, and the image lacks what was never synced to it.
    state = bytearray((alone.journal / "capture.state").read_bytes())
    state[16:32] = bytes(16)
    (alone.journal / "capture.state").write_bytes(state)
    written = (alone.journal / "capture.state").stat().st_mtime
    with alone.image.open("r+b") as file:
        file.write(bytes(MIB))
    os.utime(alone.image, (written - 60, written - 60))
    alone.config.write_text(
        alone.config.read_text()
        .replace("[protection]", '[qemu]\ncommand = ["qemu-system-x86_64", "-nonsense"]\n[protection]', 1)
        .replace("enabled = true", "enabled = false")
    )
    vmrewind("run", alone.config, check=False)
    assert alone.image.read_bytes()[:MIB] == b"\7" * MIB


def test_a_ship_that_was_left_over_does_not_serve_the_next_run(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
        before = alone.status()["processes"]
        kill(*(before[role]["pid"] for role in ("keeper", "capture")))
    other = tmp_path / "other"
    vmrewind("init", other)
    alone.configure(repository=str(other))
    with alone.serving() as ready:
        assert Process.of(before["ship"]["pid"]) is None
        alone.write(ready, 2)
    shutil.rmtree(alone.journal)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_a_qcow2_image_with_an_internal_snapshot_goes_on(tmp_path: Path) -> None:
    alone = Alone(tmp_path, "qcow2")
    with alone.serving() as ready:
        uri = ready["disks"]["vda"]["uri"]
        subprocess.run(["qemu-io", "-f", "qcow2", uri, "-c", "write -P 5 0 1M"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["qemu-img", "snapshot", "-c", "inside", f"json:{json.dumps(_qcow2_over(uri))}"], check=True)
        before = json.loads(vmrewind("mark", alone.config, "snapshot", "--json").stdout)
        truth = alone.image.read_bytes()
    with alone.serving():
        assert "history.gap" not in alone.events() and "base.begun" not in alone.events()
    assert alone.restored(f"seq:{before['seq']}") == truth
    vmrewind("restore", alone.config, "--at", "@snapshot", "--in-place")
    assert alone.image.read_bytes() == truth


def _qcow2_over(uri: str) -> dict[str, Any]:
    export, _, socket = uri.removeprefix("nbd+unix:///").partition("?socket=")
    return {"driver": "qcow2", "file": {"driver": "nbd", "export": export, "server": {"type": "unix", "path": socket}}}


def test_a_backup_can_be_restored_as_soon_as_it_is_made(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.image.open("r+b") as file:
        file.write(b"first")
    vmrewind("backup", alone.config)
    first = alone.image.read_bytes()
    assert alone.restored("latest") == first
    with alone.image.open("r+b") as file:
        file.write(b"second")
    vmrewind("backup", alone.config)
    shutil.rmtree(alone.journal)
    assert alone.restored("latest") == alone.image.read_bytes() != first
    with alone.serving():
        pass


def test_of_two_starts_at_once_one_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        again = vmrewind("capture", alone.config, check=False)
        assert again.returncode == 8 and "already running" in again.stderr
        alone.write(ready, 1)
        assert alone.status()["problems"] == []
    assert alone.restored("latest") == alone.image.read_bytes()


def test_a_start_waits_for_a_client_that_is_letting_go_and_refuses_beside_one_that_stays(tmp_path: Path) -> None:
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        os.kill(ready["keeper"], signal.SIGKILL)
        sock = Path(ready["disks"]["vda"]["uri"].partition("?socket=")[2])
    with Client(sock, "vda"):
        refused = vmrewind("capture", alone.config, check=False)
        assert refused.returncode == 8 and "still connected" in refused.stderr
    going = Client(sock, "vda")
    going.write(0, b"7" * 512)
    threading.Timer(2.0, going.sock.close).start()
    with alone.serving():
        assert "history.gap" not in alone.events()
    assert alone.restored("latest") == alone.image.read_bytes()
