"""The progress of a base backup that may be interrupted: a local file of JSON lines.

The first line says what is being read and where it goes; each further one ``[index, chunk id or null]`` is written after that
chunk is durable in the repository. A line that a crash cut off, and everything behind it, does not count.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vmrewind.journal.runs import ImageIdentity, private, private_directory, sync_directory

_SYNC_EVERY: Final = 64
"""Lines between two syncs: after a power loss at most so many chunks are read again."""


class Partial:
    """An open progress file. ``known`` is what an earlier try found out, empty if that was about anything else."""

    def __init__(self, path: Path, identity: ImageIdentity, ctime_ns: int, size: int, repository_id: str) -> None:
        self.known: dict[int, str | None] = {}
        self._path = path
        self._unsynced = 0
        header: dict[str, Any] = {
            "base": 1, "identity": asdict(identity), "ctime_ns": ctime_ns, "size": size, "repository": repository_id,
        }  # fmt: skip
        private_directory(path.parent)
        self._file = open(path, "a+b", opener=private)
        try:
            valid = self._read(header)
            self._file.truncate(valid)
            if valid == 0:
                self._file.write(json.dumps(header).encode() + b"\n")
                self.sync()
                sync_directory(path.parent)
        except BaseException:
            self._file.close()
            raise

    def _read(self, header: dict[str, Any]) -> int:
        """Fill ``known``; returns how many bytes of the file count."""
        self._file.seek(0)
        valid = 0
        for line in self._file:
            try:
                content = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            if valid == 0:
                if content != header:
                    return 0
            elif isinstance(content, list) and len(content) == 2:
                self.known[content[0]] = content[1]
            else:
                break
            valid += len(line)
        return valid

    def add(self, index: int, chunk_id: str | None) -> None:
        """Note that a chunk is done."""
        self._file.write(json.dumps([index, chunk_id]).encode() + b"\n")
        self._file.flush()
        self._unsynced += 1
        if self._unsynced >= _SYNC_EVERY:
            self.sync()

    def sync(self) -> None:
        """Bring what was noted to stable storage."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def remove(self) -> None:
        """The base is complete: nothing is left to continue."""
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
