"""What was found sound in a repository, and when: a local file that spares a verification what the last ones read.

Objects are write-once, so one that was read whole and right, and still has its size, needs no second look. The file is no truth: a
row that is damaged does not count, a file that is damaged is begun anew, and what is not in it is read.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import xxhash

from vmrewind.journal.runs import private_directory
from vmrewind.paths import state_root

_COMMIT_EVERY: Final = 256
"""Objects between two commits: so many are read again after a crash."""
_DOUBT: Final = -1
_TABLE: Final = (
    "CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, size INTEGER, read_ns INTEGER, checksum TEXT) WITHOUT ROWID"
)


@dataclass(frozen=True, slots=True)
class Known:
    """An object as it was seen last. ``size``: bytes; ``read_ns``: when all of it was read and right, 0 if it never was."""

    size: int
    read_ns: int

    @property
    def doubtful(self) -> bool:
        """Whether it was not right when it was read last."""
        return self.read_ns == _DOUBT


class Verified:
    """The open file. Used by one thread; several processes may have it open at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._uncommitted = 0
        private_directory(path.parent)
        try:
            self._database = _open(path)
        except sqlite3.DatabaseError:
            _remove(path)
            self._database = _open(path)

    @classmethod
    def of(cls, repository_id: str, url: str) -> Self:
        """The file for a repository at this place: a copy elsewhere has the same id and is verified by itself."""
        return cls(state_root() / "verified" / f"{repository_id}-{xxhash.xxh3_64_hexdigest(url.encode())}.db")

    def get(self, key: str) -> Known | None:
        """What is known of an object, None if nothing is, or nothing that can be relied on."""
        for row in self._rows("SELECT key, size, read_ns, checksum FROM objects WHERE key = ?", key):
            return _sound(row)
        return None

    def keys(self, prefix: str) -> Iterator[str]:
        """The keys of every object that was ever seen behind a prefix, in order."""
        for row in self._rows(
            "SELECT key, size, read_ns, checksum FROM objects WHERE key >= ? AND key < ?", prefix, prefix + "\x7f"
        ):
            if _sound(row) is not None:
                yield row[0]

    def seen(self, key: str, size: int) -> None:
        """Note that an object is there; what is known of it stays."""
        if self.get(key) is None:
            self._put(key, size, 0)

    def read(self, key: str, size: int) -> None:
        """Note that all of an object was read now, and right."""
        self._put(key, size, time.time_ns())

    def doubt(self, key: str, size: int) -> None:
        """Note that an object is not right: it is to be read again, and the size that it had when it was seen first stays."""
        known = self.get(key)
        self._put(key, size if known is None else known.size, _DOUBT)

    def _put(self, key: str, size: int, read_ns: int) -> None:
        self._change("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?)", key, size, read_ns, _checksum(key, size, read_ns))

    def _rows(self, statement: str, *values: object) -> list[tuple[str, int, int, str]]:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.DatabaseError:
            return []

    def _change(self, statement: str, *values: object) -> None:
        # What cannot be noted is read again the next time.
        with contextlib.suppress(sqlite3.DatabaseError):
            self._database.execute(statement, values)
            self._uncommitted += 1
            if self._uncommitted >= _COMMIT_EVERY:
                self._database.commit()
                self._uncommitted = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        sound = True
        with contextlib.suppress(sqlite3.OperationalError):  # locked by another verification
            try:
                self._database.commit()
                sound = self._database.execute("PRAGMA quick_check").fetchone() == ("ok",)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                sound = False
        self._database.close()
        if not sound:
            _remove(self.path)


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=10)
    try:
        database.execute(_TABLE)
        database.execute("SELECT key, size, read_ns, checksum FROM objects LIMIT 1").fetchall()
        database.commit()
    except BaseException:
        database.close()
        raise
    return database


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)


def _checksum(key: str, size: int, read_ns: int) -> str:
    return xxhash.xxh3_64_hexdigest(f"{key} {size} {read_ns}".encode())


def _sound(row: tuple[str, int, int, str]) -> Known | None:
    key, size, read_ns, checksum = row
    return Known(size, read_ns) if checksum == _checksum(key, size, read_ns) else None
