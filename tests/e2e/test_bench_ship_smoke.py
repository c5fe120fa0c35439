"""The measurement of shipping (script/bench-ship) has a figure for every tool and target, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.shipping import TOOLS

ROOT = Path(__file__).parents[2]


def test_every_tool_carries_all_of_the_data(tmp_path: Path) -> None:
    output, data = tmp_path / "out.json", tmp_path / "data"
    data.mkdir()
    command = [sys.executable, "-m", "bench.shipping", "--mib", "8", "--rounds", "1", "--directory", data, "--output", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    found = {(sample["work"], sample["tool"], sample["target"]): sample for sample in result["samples"]}
    assert len(found) == 2 * len(TOOLS) - 1 == len(result["samples"])
    for (_, tool, _), sample in found.items():
        # Half of the data is random: nobody can store less, and only a copy stores as much as there is.
        assert 0.5 < sample["bytes_stored"] / result["guest_bytes"] < (1.2 if tool == "rclone copy" else 0.85), sample
        assert sample["seconds"] > 0 and sample["cpu_seconds"] > 0
    assert not list(data.iterdir())
