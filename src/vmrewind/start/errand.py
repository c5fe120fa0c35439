"""What a process is told that the keeper sends on an errand for a run: the words, and who reads them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

from vmrewind.paths import VmPaths

_NICENESS: Final = 10
"""The guest's own work goes first."""


def command(module: str, paths: VmPaths, journal: Path, repository: str, run: str) -> list[str]:
    """The command line that sends ``module``, but for the options of its own and the disks."""
    words = [sys.executable, "-m", module, "--vm", paths.name, "--journal", str(journal)]
    return [*words, "--repository", repository, "--run", run]


def parser(module: str) -> argparse.ArgumentParser:
    """What reads that, but for the options of its own."""
    made = argparse.ArgumentParser(prog=module)
    made.add_argument("--vm", required=True)
    made.add_argument("--journal", type=Path, required=True)
    made.add_argument("--repository", required=True)
    made.add_argument("--run", type=lambda word: int(word, 16), required=True)
    made.add_argument("disks", nargs="+")
    return made


def yield_to_the_guest() -> None:
    """Give this process a low priority."""
    os.nice(_NICENESS)
