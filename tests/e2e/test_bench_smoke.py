"""The benchmark runs, has a figure for every load and peer, and leaves nothing behind. What the figures are is not asked."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import product
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--seconds", "0.1", "--rounds", "2", "--image-size", "16MiB", "--journal-size", "8MiB"]


def bench(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark with all its files below ``directory``."""
    command = [sys.executable, "-m", "bench", "--directory", str(directory), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def cells(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["workload"], cell["peer"]): cell for cell in report["cells"]}


def test_every_load_on_every_peer_has_its_figures(tmp_path: Path) -> None:
    output, data = tmp_path / "out" / "result.json", tmp_path / "data"
    data.mkdir()
    loads = ["4k-randrw-16", "256k-write-8", "4k-flush-16", "qemu-write-16"]
    cold = ["4k-coldread-16", "64k-coldread-16"]

    done = bench(data, *TINY, "--only", *loads, *cold, "4k-randrw-2x8", "--output", str(output))

    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    found = cells(report)
    servers = ["nbdkit", "qemu-nbd", "vmrewind"]
    drivers = ["raw-writeback", "raw-none", "blklogwrites"]
    assert set(found) == {
        *product(loads, servers),
        *product(["qemu-write-16"], drivers),
        *product(cold, ["nbdkit", "qemu-nbd-direct", "vmrewind"]),
        ("4k-randrw-2x8", "vmrewind"),
    }
    assert report["two_disks_ratio"]["4k-randrw-2x8 to 4k-randrw-16"] > 0
    for (_, peer), cell in found.items():
        assert len(cell["rounds"]) == 2
        assert cell["operations_per_second"] > 0
        assert cell["bytes_per_second"] >= 4096 * cell["operations_per_second"] * 0.99
        assert cell["vmrewind_ratio"] > 0
        assert (cell["cpu_seconds_per_gib"] is not None) == (peer not in drivers)
    for peer in servers:
        # The last flush may be cut off by the end of the time.
        assert all(abs(load["flushes"] - load["operations"] // 16) <= 1 for load in found["4k-flush-16", peer]["rounds"])
        assert len(report["start_seconds"][peer]["later"]) == 2
        assert all(size > 1 << 20 for size in report["memory_peak_bytes"][peer].values())
    assert set(report["memory_peak_bytes"]["vmrewind"]) == {"capture", "keeper"}
    assert report["machine"]["versions"]["fio"] != "not installed"
    assert "qemu-nbd" in done.stdout
    bars = ET.parse(output.with_suffix(".svg")).getroot().findall(".//{*}rect/{*}title")
    assert len(bars) == len(found), "one bar per figure"
    assert not list(data.iterdir()), "images and journal are taken away"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "8k-nonsense"], "8k-nonsense"),
        (["--peers", "nobody"], "nobody"),
        (["--image-size", "much"], "--image-size"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_what_it_cannot_do_is_named(tmp_path: Path, arguments: list[str], named: str) -> None:
    done = bench(tmp_path, *arguments)
    assert (done.returncode, named in done.stderr) == (1, True), done.stderr
