"""The contract of a store. Every backend runs all of it: a new one adds a line to ``STORES``."""

from __future__ import annotations

import concurrent.futures
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from vmrewind.errors import RepositoryError
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.memory import MemoryStore
from vmrewind.repository.store import AlreadyExists, NotFound, Store, open_store, put_verified

STORES: dict[str, Callable[[Path], Store]] = {
    "directory": lambda path: DirectoryStore(path / "store", create=True),
    "memory": lambda _: MemoryStore(),
}


@pytest.fixture(params=sorted(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return STORES[request.param](tmp_path)


def test_what_was_put_is_got_whole_and_in_ranges(store: Store) -> None:
    data = bytes(range(256)) * 5000
    store.put("chunks/ab/cd", data)
    assert store.get("chunks/ab/cd") == data
    assert store.get("chunks/ab/cd", 300, 10) == data[300:310]
    assert store.get("chunks/ab/cd", 300) == data[300:]
    assert store.get("chunks/ab/cd", len(data) - 3, 10) == data[-3:]
    assert store.get("chunks/ab/cd", len(data) + 3, 10) == b""
    assert store.get("chunks/ab/cd", 3, 0) == b""
    assert store.size("chunks/ab/cd") == len(data)


def test_an_empty_object_exists(store: Store) -> None:
    store.put("empty", b"")
    assert store.get("empty") == b""
    assert store.size("empty") == 0
    assert list(store.list("")) == [("empty", 0)]


def test_a_put_never_overwrites(store: Store) -> None:
    store.put("a/b", b"first")
    for data in (b"second", b"first"):
        with pytest.raises(AlreadyExists):
            store.put("a/b", data)
    assert store.get("a/b") == b"first"


def test_of_many_puts_at_once_one_wins_and_stays_whole(store: Store) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]

    def put(data: bytes) -> bytes | None:
        try:
            store.put("deep/er/key", data)
        except AlreadyExists:
            return None
        return data

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        winners = [data for data in pool.map(put, contents) if data is not None]
    assert len(winners) == 1
    assert store.get("deep/er/key") == winners[0]


def test_what_is_not_there_is_not_found(store: Store) -> None:
    store.put("a/b", b"x")
    for key in ("b", "a", "a/c", "a/b/c"):
        with pytest.raises(NotFound):
            store.get(key)
        assert store.size(key) is None or key == "a"
        assert list(store.list(key + "/")) == ([("a/b", 1)] if key == "a" else [])


def test_lists_by_prefix_of_characters_in_order_of_keys(store: Store) -> None:
    keys = sorted(["a-b/1", "a/1", "a/2/x", "a/2-y", "a.txt", "ab", "a0/z", "b/a/1", "b/a/10", "b/a/2"])
    for key in reversed(keys):
        store.put(key, key.encode())
    for prefix in {key[:length] for key in keys for length in range(len(key) + 1) if not key[:length].startswith("/")}:
        expected = [(key, len(key)) for key in keys if key.startswith(prefix)]
        assert list(store.list(prefix)) == expected, prefix
    assert list(store.list("b/a/100")) == []
    assert list(store.list("none/")) == []


def test_children_are_the_next_components_that_go_on(store: Store) -> None:
    for key in ("vms/a/vm.json", "vms/a/runs/1", "vms/b%20c/vm.json", "vms/file", "repository.json"):
        store.put(key, b"x")
    assert list(store.children("vms/")) == ["a", "b%20c"]
    assert list(store.children("")) == ["vms"]
    assert list(store.children("vms/a/")) == ["runs"]
    assert list(store.children("none/")) == []


def test_delete_removes_and_does_not_mind_what_is_not_there(store: Store) -> None:
    store.put("a/b", b"x")
    store.delete("a/b")
    store.delete("a/b")
    store.delete("never/was")
    assert store.size("a/b") is None
    assert list(store.children("")) == []
    store.put("a/b", b"y")
    assert store.get("a/b") == b"y"


def test_put_verified_accepts_its_own_echo_only(store: Store) -> None:
    put_verified(store, "k", b"same")
    put_verified(store, "k", b"same")
    with pytest.raises(RepositoryError, match="object k exists with another content"):
        put_verified(store, "k", b"other")
    assert store.get("k") == b"same"


@pytest.mark.parametrize("key", ["", "/etc/passwd", "a//b", "../x", "a/../b", ".hidden", "a/.tmp-1", "a/", "a b", "ü"])
def test_a_directory_refuses_keys_that_could_lead_elsewhere(tmp_path: Path, key: str) -> None:
    store = DirectoryStore(tmp_path)
    for operation in (lambda: store.put(key, b""), lambda: store.get(key), lambda: store.size(key), lambda: store.delete(key)):
        with pytest.raises(ValueError, match="not an object's key"):
            operation()
    assert list(tmp_path.iterdir()) == []


def test_urls_name_directories_and_other_schemes_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a repo"
    open_store(str(place), create=True).put("k", b"v")
    monkeypatch.chdir(tmp_path)
    for url in (str(place), "a repo", f"file://{tmp_path}/a%20repo", f"file://localhost{tmp_path}/a%20repo"):
        store = open_store(url)
        assert store.get("k") == b"v"
        assert store.url == url
    for url, part in [("s3://bucket/x", "s3://"), ("gs://b", "directories only"), ("file://host/x", "other host"), ("", "empty")]:
        with pytest.raises(RepositoryError, match=part):
            open_store(url, create=True)


def test_a_missing_directory_is_never_made_by_opening(tmp_path: Path) -> None:
    with pytest.raises(RepositoryError, match="no such directory") as caught:
        open_store(str(tmp_path / "unmounted"))
    assert "vmrewind init" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RepositoryError):
        open_store(str(tmp_path / "file"))


def test_leftovers_of_the_killed_are_invisible_and_in_nobodys_way(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("a/b", b"x")
    (tmp_path / "a" / ".tmp-1-dead").write_bytes(b"torn")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".tmp-2-dead").write_bytes(b"torn")
    assert list(store.list("")) == [("a/b", 1)]
    assert list(store.children("")) == ["a"]
    store.put("c/d", b"y")
    assert [key for key, _ in store.list("")] == ["a/b", "c/d"]


def test_keys_leave_no_temporary_files(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for _ in itertools.repeat(None, 2):
        try:
            store.put("a/b", b"x")
        except AlreadyExists:
            break
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
