"""What every test has: its own state and runtime directories, so that none touches the host's; and which run in one process."""

from __future__ import annotations

import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import guests.protected
from tests.warm import commands

# No deadline: the machine's speed is not what a property test is about. The blob replays a failure anywhere.
settings.register_profile("vmrewind", deadline=None, print_blob=True)
settings.load_profile("vmrewind")

# A process of a thousand tests holds more files than a login shell's 1024: journals are left open as capture leaves its own.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (_hard, _hard))

# nohup's, and a shell's for a background job: ignored, they would be ignored in every command that a test starts, and some are
# to hear them.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


guests.protected.run_command = commands


def pytest_unconfigure() -> None:
    commands.end()


@pytest.fixture(autouse=True)
def _directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Sockets live in the runtime directory and a socket's path has at most 107 bytes: too few for pytest's directories.
    runtime = tempfile.mkdtemp(prefix="vmr-")
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("VMREWIND_RUNTIME_DIR", runtime)
    yield
    shutil.rmtree(runtime, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """All tests of classes of one name in one process, which so starts what they share (a server) once; others where there is room.

    Not by xdist's groups: 3.8 marks them in an attribute that pytest 9.2 does not read any more.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByClass(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            parts = nodeid.partition("[")[0].split("::")
            return parts[1] if len(parts) > 2 else nodeid

    return ByClass(config, log)
