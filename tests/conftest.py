"""What every test has: its own state and runtime directories, so that none touches the host's."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: the machine's speed is not what a property test is about. The blob replays a failure anywhere.
settings.register_profile("vmrewind", deadline=None, print_blob=True)
settings.load_profile("vmrewind")


@pytest.fixture(autouse=True)
def _directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Sockets live in the runtime directory and a socket's path has at most 107 bytes: too few for pytest's directories.
    runtime = tempfile.mkdtemp(prefix="vmr-")
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("VMREWIND_RUNTIME_DIR", runtime)
    yield
    shutil.rmtree(runtime, ignore_errors=True)
