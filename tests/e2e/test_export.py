"""``vmrewind export``: a moment served over NBD to the clients that people use, read-only and with changes of its own."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from guests.protected import VMREWIND, vmrewind
from tests.capture_tools import until
from tests.e2e.test_start_after import Alone
from tests.vm_tools import journal_records

MIB = 1 << 20


@contextlib.contextmanager
def exported(*arguments: object, ended_by: signal.Signals = signal.SIGTERM) -> Iterator[dict[str, Any]]:
    """An export runs; yields its ready line, with its process id and, afterwards, what it complained of."""
    command = [VMREWIND, "export", *map(str, arguments), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        ready: dict[str, Any] = json.loads(line) | {"pid": process.pid}
        yield ready
        process.send_signal(ended_by)
        ready["stderr"] = process.communicate(timeout=60)[1]
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def run(*command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=check, timeout=120)


def uri_of(ready: dict[str, Any]) -> str:
    uri: str = ready["disks"]["vda"]["uri"]
    return uri


def everything(alone: Alone) -> tuple[list[dict[str, Any]], dict[Path, bytes], bytes]:
    """The journal's records, the repository's objects, the image."""
    objects = {path: path.read_bytes() for path in alone.repository.rglob("*") if path.is_file()}
    return journal_records(alone.journal), objects, alone.image.read_bytes()


@pytest.fixture
def past(tmp_path: Path) -> Iterator[tuple[Alone, str, bytes]]:
    """A disk that is being written to, a moment, and what it held then."""
    alone = Alone(tmp_path)
    with alone.serving() as ready:
        for number in range(1, 30):
            alone.write(ready, number, offset=random.Random(number).randrange(0, 60) * MIB, length=MIB)
        alone.write(ready, 99, offset=5 * MIB + 512, length=1536)
        then = datetime.now(UTC).isoformat()
        content = alone.image.read_bytes()
        alone.write(ready, 77, offset=0, length=8 * MIB)
        yield alone, then, content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_whichever_thread_takes_it(past: tuple[Alone, str, bytes], tmp_path: Path, number: signal.Signals) -> None:
    command = [VMREWIND, "export", str(past[0].config), "--at", "latest", "--socket", str(tmp_path / "s"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        threads = sorted(int(path.name) for path in Path(f"/proc/{process.pid}/task").iterdir())
        # the first one that it has not made for serving, if there is one: a library's, which masks nothing
        thread = next(tid for tid in threads if tid != process.pid)
        assert ctypes.CDLL(None).tgkill(process.pid, thread, number) == 0
        try:
            assert process.wait(30) == 0 and not (tmp_path / "s").exists()
        finally:
            process.kill()


def test_a_moment_is_read_by_everyday_clients(past: tuple[Alone, str, bytes], tmp_path: Path) -> None:
    alone, then, content = past
    with exported(alone.config, "--at", then) as ready:
        uri = uri_of(ready)
        assert ready["disks"]["vda"]["size"] == len(content) and not ready["writable"]
        run("nbdcopy", uri, tmp_path / "copied.raw")
        assert (tmp_path / "copied.raw").read_bytes() == content
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri, tmp_path / "converted.raw")
        assert (tmp_path / "converted.raw").read_bytes() == content
        socket = uri.partition("socket=")[2]
        listed = run("qemu-nbd", "--list", "--socket", socket).stdout
        assert "export: 'vda'" in listed and f"size:  {len(content)}" in listed
        # QEMU's own server as a client.
        relay = Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "relay.sock"
        words = ["qemu-nbd", "--read-only", "--format=raw", "--socket", relay, uri]
        relaying = subprocess.Popen([str(word) for word in words], stderr=subprocess.DEVNULL)
        until(relay.exists, "qemu-nbd")
        run("nbdcopy", f"nbd+unix:///?socket={relay}", tmp_path / "relayed.raw")
        assert relaying.wait(60) == 0 and (tmp_path / "relayed.raw").read_bytes() == content
        told = json.loads(run("nbdinfo", "--json", uri).stdout)["exports"][0]
        assert told["is_read_only"] and told["export-size"] == len(content)
        mapped = json.loads(run("nbdinfo", "--map", "--json", uri).stdout)
        assert sum(extent["length"] for extent in mapped) == len(content)
        for extent in mapped:
            if extent["type"] & 2:
                assert not any(content[extent["offset"] : extent["offset"] + extent["length"]])
        refused = run("qemu-io", "-f", "raw", uri, "-c", "write 0 512", check=False)
        assert "read-only" in refused.stderr.lower() or "permission" in refused.stderr.lower()
        # Two clients at once, each with several connections.
        both = [subprocess.Popen(["nbdcopy", "--connections=4", uri, tmp_path / f"{n}.raw"]) for n in range(2)]
        assert [process.wait(120) for process in both] == [0, 0]
        assert all((tmp_path / f"{n}.raw").read_bytes() == content for n in range(2))
    assert ready["stderr"] == ""
    assert not Path(uri.partition("socket=")[2]).exists()


def test_changes_go_into_a_scratch_file_and_history_stays(past: tuple[Alone, str, bytes], tmp_path: Path) -> None:
    alone, then, content = past
    expected = bytearray(content)
    (tmp_path / "scratch").mkdir()
    # The VM stands still meanwhile; what it wrote before may still be on its way to the repository.
    until(lambda: alone.status()["ship"]["unsent_bytes"] == 0, "everything to be shipped")
    history = everything(alone)
    with exported(alone.config, "--at", then, "--writable", "--scratch", tmp_path / "scratch") as ready:
        uri = uri_of(ready)
        chosen = random.Random(7)
        commands = []
        for pattern in range(100, 140):
            offset, length = chosen.randrange(0, len(content) - MIB), chosen.choice([1, 511, 512, 4096, 300_000])
            commands += ["-c", f"write -P {pattern} {offset} {length}"]
            expected[offset : offset + length] = bytes([pattern]) * length
            offset = chosen.randrange(0, len(content) // MIB) * MIB
            commands += ["-c", f"write -z {offset} 70000" if pattern % 2 else f"discard {offset} 65536"]
            expected[offset : offset + (70000 if pattern % 2 else 65536)] = bytes(70000 if pattern % 2 else 65536)
        run("qemu-io", "-f", "raw", uri, *commands, "-c", "flush")
        run("nbdcopy", uri, tmp_path / "changed.raw")
        assert (tmp_path / "changed.raw").read_bytes() == expected
        assert list((tmp_path / "scratch").iterdir()) == [], "a scratch file has no name, so a kill leaves nothing"
    assert everything(alone) == history
    assert alone.restored(then) == content
    with exported(alone.config, "--at", then) as again:
        run("nbdcopy", uri_of(again), tmp_path / "again.raw")
        assert (tmp_path / "again.raw").read_bytes() == content


def test_the_repository_alone_is_enough(past: tuple[Alone, str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, then, content = past
    os.kill(alone.status()["processes"]["keeper"]["pid"], signal.SIGTERM)
    alone_repository = f"{alone.repository}/alone"
    while vmrewind("restore", alone_repository, "--at", then, "--output", tmp_path / "probe", check=False).returncode:
        pass
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "elsewhere"))
    own = tmp_path / "own.sock"
    with exported(alone_repository, "--at", then, "--socket", own, ended_by=signal.SIGHUP) as ready:
        assert str(own) in uri_of(ready) and own.exists()
        run("nbdcopy", uri_of(ready), tmp_path / "copied.raw")
    assert (tmp_path / "copied.raw").read_bytes() == content
    assert not own.exists(), "nor when the terminal is gone"


def test_what_cannot_be_read_is_an_error_to_the_client_and_told(tmp_path: Path) -> None:
    alone = Alone(tmp_path, ship="on-demand")
    with alone.serving() as ready:
        alone.write(ready, 1, length=MIB)
        alone.write(ready, 2, offset=2 * MIB, length=MIB)
        with exported(alone.config, "--at", "latest") as export:
            uri = uri_of(export)
            (segment,) = [path for path in alone.journal.glob("*.seg") if not path.name.startswith("free-")]
            content = segment.read_bytes()
            with segment.open("r+b") as file:
                file.seek(content.index(bytes([1]) * 4096) + 1234)
                file.write(b"\xff")
            refused = run("qemu-io", "-r", "-f", "raw", uri, "-c", "read 0 4096", check=False)
            assert "Input/output error" in refused.stdout + refused.stderr
            assert "verification failed" not in run("qemu-io", "-r", "-f", "raw", uri, "-c", f"read -P 2 {2 * MIB} {MIB}").stdout
        assert export["stderr"].count("export: ") == 1 and segment.name in export["stderr"] and "damaged" in export["stderr"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--at", "2001-01-01"], "before"),
        (["--at", "latest", "--disk", "vdx"], "no protected disk 'vdx'"),
        (["--at", "latest", "--scratch", "/"], "--scratch is for --writable"),
        (["--at", "latest", "--writable", "--scratch", "/no/such"], "/no/such"),
        (["--at", "latest", "--socket", "/" + "x" * 120], "too long for a unix socket"),
    ],
)
def test_what_cannot_be_served_is_refused(past: tuple[Alone, str, bytes], arguments: list[str], words: str) -> None:
    refused = vmrewind("export", past[0].config, *arguments, check=False)
    assert refused.returncode not in (0, 1) and words in refused.stderr
