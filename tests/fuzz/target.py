"""The process that fuzzes: ``python -m tests.fuzz.target TARGET`` and libFuzzer's options."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vmrewind.nbd", "vmrewind.capture", "vmrewind.journal.writer"]):
    from tests.fuzz import negotiation, transmission

_test_one = negotiation.fuzz if sys.argv[1] == "negotiation" else transmission.Target(Path(tempfile.mkdtemp())).fuzz
# Minimizing, it runs itself again, through a shell, by the first of its arguments.
_itself = f"{shlex.quote(sys.executable)} -m tests.fuzz.target {sys.argv[1]}"
atheris.Setup([_itself, *sys.argv[2:]], _test_one)
atheris.Fuzz()
