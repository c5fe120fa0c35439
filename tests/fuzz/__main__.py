"""Fuzz the NBD server's handshake and transmission, guided by coverage."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz import corpus

TARGETS = ("negotiation", "transmission")
INPUT_MAX = 512


def main() -> int:
    """Each target for its share of the time, in a process of its own; returns how many found something."""
    parser = argparse.ArgumentParser(prog="script/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long in all")
    parser.add_argument("--target", choices=TARGETS, help="only this one")
    parser.add_argument("--work", type=Path, default=Path(".fuzz"), help="where inputs and crashes are kept")
    parser.add_argument("--minimize", action="store_true", help="fuzz nothing: choose corpus.txt from the inputs kept so far")
    arguments = parser.parse_args()
    targets = [arguments.target] if arguments.target else list(TARGETS)
    failed = 0
    for target in targets:
        home = arguments.work / target
        inputs = home / "inputs"
        inputs.mkdir(parents=True, exist_ok=True)
        corpus.unpack(target, inputs)
        with tempfile.TemporaryDirectory(prefix="vmr-fuzz-") as directory:
            chosen = Path(directory, "chosen")
            chosen.mkdir()
            if arguments.minimize:
                options = ["-merge=1", str(chosen), str(inputs)]
            else:
                seconds = int(arguments.minutes * 60 / len(targets))
                options = [f"-max_total_time={seconds}", f"-artifact_prefix={home}/", "-print_final_stats=1", str(inputs)]
            command = [sys.executable, "-m", "tests.fuzz.target", target, f"-max_len={INPUT_MAX}", "-timeout=60", *options]
            if subprocess.run(command, check=False, env=os.environ | {"TMPDIR": directory}).returncode:
                failed += 1
                print(f"fuzz: {target} found something; the input is {home}/crash-*", file=sys.stderr)
            elif arguments.minimize:
                corpus.pack(target, chosen)
    return failed


if __name__ == "__main__":
    sys.exit(main())
