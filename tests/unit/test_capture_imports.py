"""Capture runs on the standard library and xxhash alone, and is up quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

import vmrewind
from tests.capture_tools import MIB, Capture, Client, DiskOf, raw_image

PACKAGES = ("vmrewind.capture", "vmrewind.errors", "vmrewind.journal", "vmrewind.nbd", "vmrewind.paths")

_RUN = """
import atexit, json, os, runpy, sys
out = sys.argv.pop(1)
def tell():
    names = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    with open(out, "w") as file: json.dump(names, file)
atexit.register(tell)
runpy.run_module("vmrewind.capture", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of an interpreter that has nothing but the standard library, xxhash and vmrewind to import."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "vmrewind").symlink_to(Path(next(iter(vmrewind.__path__))))
    (site / "xxhash").symlink_to(Path(xxhash.__file__).parent)
    return os.environ | {"PYTHONPATH": str(site), "PYTHONNOUSERSITE": "1"}


def test_a_whole_run_imports_nothing_else(tmp_path: Path, bare: dict[str, str]) -> None:
    capture = Capture(tmp_path, [DiskOf("vda", raw_image(tmp_path / "a.raw", MIB))])
    seen = tmp_path / "modules.json"
    command = [sys.executable, "-S", "-c", _RUN, str(seen), "--journal", str(capture.journal), "--journal-size", str(8 * MIB)]
    assignment = capture.assignment()
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=bare,
        pass_fds=(assignment["nbd_fd"], assignment["control_fd"]),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(assignment).encode() + b"\n")
        process.stdin.close()
        assert json.loads(process.stdout.readline())["event"] == "allotted"
        assert json.loads(process.stdout.readline())["event"] == "ready"
        with Client(capture.socket_path) as client:
            client.write(0, b"x" * 4096)
            client.flush()
            assert capture.instruct(command="mark", name="here")["ok"]
            assert capture.instruct(command="status")["ok"]
        process.terminate()
        assert process.wait(20) == 0
    capture.close()
    standard = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))
    files = {name: file for name, file in json.loads(seen.read_text()).items() if file}
    foreign = {
        name
        for name, file in files.items()
        if not file.startswith(standard) and not name.startswith(("xxhash", "__mp_main__")) and name != "__main__"
    }
    assert all(name == "vmrewind" or name.startswith(PACKAGES) for name in foreign), foreign
    for heavy in ("asyncio", "ssl", "email", "http", "multiprocessing", "numpy"):
        assert heavy not in files, f"{heavy} makes every protected VM's capture larger and later"


def test_a_missing_xxhash_is_the_only_thing_that_stops_it(tmp_path: Path, bare: dict[str, str]) -> None:
    """The bare interpreter is bare."""
    (tmp_path / "site" / "xxhash").unlink()
    done = subprocess.run(
        [sys.executable, "-S", "-m", "vmrewind.capture", "--help"], check=False, capture_output=True, text=True, env=bare
    )
    assert "No module named 'xxhash'" in done.stderr


def test_time_from_start_to_listening(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    capture = Capture(tmp_path, [DiskOf("vda", raw_image(tmp_path / "a.raw", MIB))], journal_size=64 * MIB)
    began = time.monotonic()
    with capture:
        seconds = time.monotonic() - began
        record_property("seconds", seconds)
        sys.stdout.write(f"capture listens after {seconds * 1000:.0f} ms\n")
        assert seconds < 5
