"""The soak runs, disturbs, compares and ends well; and it is able to fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.soak_load import digest

ROOT = Path(__file__).resolve().parents[2]


def soak(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.soak", "--directory", str(directory), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def test_a_short_soak_finds_nothing_wrong(tmp_path: Path) -> None:
    done = soak(tmp_path, "--minutes", "0.2", "--seed", "3", "--journal-size", "8MiB")

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1])
    assert report["operations"] > 100
    assert report["bookmarks"] > 0
    assert report["restores without the journal"] > 0
    assert set(report["usage (first, highest, last)"]) <= {"capture", "ship", "keeper"}
    assert list(tmp_path.iterdir()) == []


def test_the_model_tells_one_byte_from_another(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    empty = digest(disk)
    with open(disk, "r+b") as file:
        file.seek(700_000)
        file.write(b"\1")
    assert digest(disk) != empty
