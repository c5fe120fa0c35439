"""What can befall a directory under a running process: full, read-only, unmounted, without hard links."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vmrewind.errors import RepositoryError, SpaceError
from vmrewind.repository.directory import DirectoryStore


class Failing:
    """Makes one system call fail with ``number`` from its ``after``-th use on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, number: int, after: int = 0) -> None:
        self._real = getattr(os, call)
        self._number = number
        self._left = after
        monkeypatch.setattr(os, call, self)

    def __call__(self, *arguments: object, **named: object) -> object:
        if self._left == 0:
            raise OSError(self._number, os.strerror(self._number))
        self._left -= 1
        return self._real(*arguments, **named)


@pytest.mark.parametrize(
    ("call", "number", "kind", "words"),
    [
        ("write", errno.ENOSPC, SpaceError, "no space left"),
        ("fsync", errno.ENOSPC, SpaceError, "no space left"),
        ("write", errno.EDQUOT, SpaceError, "no space left"),
        ("fsync", errno.EIO, RepositoryError, "kernel's log"),
        ("link", errno.EPERM, RepositoryError, "hard links"),
        ("link", errno.EROFS, RepositoryError, "mount it writable"),
        ("open", errno.EACCES, RepositoryError, "owner and mode"),
        ("open", errno.ESTALE, RepositoryError, "mount it again"),
    ],
)
def test_a_put_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, kind: type[RepositoryError], words: str
) -> None:
    store = DirectoryStore(tmp_path)
    store.put("a/first", b"1")
    with monkeypatch.context() as context:
        Failing(context, call, number)
        with pytest.raises(kind) as caught:
            store.put("a/second", b"2")
    assert words in str(caught.value) + caught.value.hint
    assert "second" in str(caught.value)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["first"]
    store.put("a/second", b"2")


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:1000]))
    DirectoryStore(tmp_path).put("k", bytes(range(250)) * 100)
    assert (tmp_path / "k").read_bytes() == bytes(range(250)) * 100


def test_a_directory_that_was_replaced_is_not_written_to(tmp_path: Path) -> None:
    """As an unmount does it: the mount point is there, and empty."""
    place = tmp_path / "mnt"
    place.mkdir()
    store = DirectoryStore(place)
    store.put("a/b", b"x")
    place.rename(tmp_path / "elsewhere")
    for operation in (
        lambda: store.get("a/b"),
        lambda: store.size("a/b"),
        lambda: store.put("a/c", b""),
        lambda: list(store.list("a/")),
    ):
        with pytest.raises(RepositoryError):
            operation()
    place.mkdir()
    for operation in (
        lambda: store.get("a/b"),
        lambda: store.size("a/b"),
        lambda: store.put("a/c", b""),
        lambda: list(store.list("a/")),
    ):
        with pytest.raises(RepositoryError, match="unmounted"):
            operation()
    assert list(place.iterdir()) == []


def test_a_directory_removed_since_is_made_again(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("a/b/c", b"x")
    store.delete("a/b/c")
    (tmp_path / "a" / "b").rmdir()
    store.put("a/b/c", b"y")
    assert store.get("a/b/c") == b"y"


def test_file_directory_and_new_parents_are_synced_before_a_put_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(tmp_path)).partition(".tmp-")[0])
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    store = DirectoryStore(tmp_path)
    store.put("a/b/c", b"x")
    assert synced == [".", "a", "a/b/", "a/b"]
    synced.clear()
    store.put("a/b/d", b"x")
    assert synced == ["a/b/", "a/b"]
