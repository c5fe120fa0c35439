"""The measurement of views does run; what it finds on a large history is for it to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_it_measures_what_it_made(tmp_path: Path) -> None:
    small = ["--records", "3000", "--disk-gib", "4", "--repeats", "1", "--directory", tmp_path, "--json"]
    done = subprocess.run([sys.executable, "-m", "bench.views", *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["made"]["last_seq"] == 3001
    for how in ("from segments", "merged"):
        (opened,) = told["opened"][how]
        # Every read was of something written, whose checksum was right; what is overlapped is one extent less or more.
        assert 2900 < opened["extents"] < 3100
        assert opened["seconds_to_first_byte"] > 0 and opened["first_read_seconds"] > 0
    assert list(tmp_path.iterdir()) == []
