"""What fault tests share: making system calls of a living process fail."""

from __future__ import annotations

import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.capture_tools import until


@contextmanager
def failing(pid: int, calls: Sequence[str], error: str = "EIO", *, path: Path | None = None, when: str = "1+") -> Iterator[None]:
    """While this lasts, ``calls`` of a process (on ``path`` only, if given) fail without being carried out.

    ``when`` is strace's: which of them, counted per thread.
    """
    names = ",".join(calls)
    only = ["-P", str(path)] if path is not None else []
    with tempfile.TemporaryFile("w+") as said:
        strace = subprocess.Popen(
            ["strace", "-f", "-o", "/dev/null", "-p", str(pid), *only, "-e", f"inject={names}:error={error}:when={when}"],
            stderr=said,
            text=True,
        )

        def attached() -> bool:
            said.seek(0)
            text = said.read()
            assert strace.poll() is None, text
            return "attached" in text

        try:
            until(attached, "strace to attach")
            yield
        finally:
            strace.send_signal(signal.SIGINT)
            try:
                strace.wait(3)
            except subprocess.TimeoutExpired:
                # Told to let go of a process that just ends, it may wait for it for ever; without it the end goes on.
                strace.kill()
                strace.wait()
