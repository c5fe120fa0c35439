"""A backup killed with SIGKILL at any instant goes on where it was and ends in a right base."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from vmrewind.repository.repository import Repository

SCRIPT = """
import sys
from pathlib import Path
from vmrewind.repository.base import make_base
from vmrewind.repository.repository import Repository
url, image, partial = sys.argv[1:]
make_base(Repository.open(url).vm("web01"), "vda", Path(image), uuid="u", partial=Path(partial))
"""
DEADLINE_SECONDS = 60


def noted(partial: Path) -> int:
    try:
        return partial.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_a_backup_killed_again_and_again_reads_nothing_much_twice(tmp_path: Path) -> None:
    url, image, partial = str(tmp_path / "repo"), tmp_path / "a.raw", tmp_path / "p"
    repository = Repository.init(url)
    truth = np.random.default_rng(1).bytes(96 << 20)
    image.write_bytes(truth)
    chance = random.Random(7)
    done = 0
    while True:
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, url, str(image), str(partial)])
        goal = noted(partial) + chance.randint(2, 8)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while child.poll() is None and noted(partial) < goal:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            child.wait()
            done += 1
            lines = partial.read_bytes().splitlines(keepends=True)
            indices = [json.loads(line)[0] for line in lines[1:] if line.endswith(b"\n")]
            assert indices == list(range(len(indices)))
            assert len(indices) >= goal - 2
            continue
        assert child.wait() == 0
        break
    assert done >= 2
    (base_id,) = repository.vm("web01").bases("vda")
    manifest = repository.vm("web01").base("vda", base_id)
    assert b"".join(repository.read_chunk(chunk) for chunk in manifest.chunks if chunk) == truth
    assert not partial.exists()
    assert image.stat().st_size == manifest.size
