"""The run's event log: one JSON object a line, appended by every process that has something to tell."""

from __future__ import annotations

import contextlib
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vmrewind.journal.runs import private_directory


class EventLog:
    """Appends to a log file; each event is one ``write`` to a file opened for appending, so writers never mix their lines."""

    def __init__(self, path: Path | str | None) -> None:
        self.path = Path(path) if path is not None else None

    def write(self, event: str, **fields: Any) -> None:
        """Append an event with the wall time. Without a path, nothing is kept.

        A log that can't be written (its file system is full, say) must not stop what it tells of: the line is lost then.
        """
        if self.path is None:
            return
        now = time.time_ns()
        stamp = datetime.fromtimestamp(now / 1e9, UTC).isoformat(timespec="microseconds")
        line = json.dumps({"time": stamp, "time_ns": now, "event": event, **fields}) + "\n"
        with contextlib.suppress(OSError):
            private_directory(self.path.parent)
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, line.encode())
            finally:
                os.close(fd)
