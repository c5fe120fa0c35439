"""The contract of a store. Every backend runs all of it, by a class of its own with the fixture ``store``."""

from __future__ import annotations

import concurrent.futures

import pytest

from vmrewind.errors import RepositoryError
from vmrewind.repository.store import AlreadyExists, NotFound, Store, put_verified


class StoreContract:
    def test_what_was_put_is_got_whole_and_in_ranges(self, store: Store) -> None:
        data = bytes(range(256)) * 5000
        store.put("chunks/ab/cd", data)
        assert store.get("chunks/ab/cd") == data
        assert store.get("chunks/ab/cd", 300, 10) == data[300:310]
        assert store.get("chunks/ab/cd", 300) == data[300:]
        assert store.get("chunks/ab/cd", len(data) - 3, 10) == data[-3:]
        assert store.get("chunks/ab/cd", len(data) + 3, 10) == b""
        assert store.get("chunks/ab/cd", 3, 0) == b""
        assert store.size("chunks/ab/cd") == len(data)

    def test_an_empty_object_exists(self, store: Store) -> None:
        store.put("empty", b"")
        assert store.get("empty") == b""
        assert store.size("empty") == 0
        assert list(store.list("")) == [("empty", 0)]

    def test_a_put_never_overwrites(self, store: Store) -> None:
        store.put("a/b", b"first")
        for data in (b"second", b"first"):
            with pytest.raises(AlreadyExists):
                store.put("a/b", data)
        assert store.get("a/b") == b"first"

    def test_of_many_puts_at_once_one_wins_and_stays_whole(self, store: Store) -> None:
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

    def test_what_is_not_there_is_not_found(self, store: Store) -> None:
        store.put("a/b", b"x")
        for key in ("b", "a", "a/c", "a/b/c"):
            with pytest.raises(NotFound):
                store.get(key)
            assert store.size(key) is None or key == "a"
            assert list(store.list(key + "/")) == ([("a/b", 1)] if key == "a" else [])

    def test_lists_by_prefix_of_characters(self, store: Store) -> None:
        keys = sorted(["a-b/1", "a/1", "a/2/x", "a/2-y", "a.txt", "ab", "a0/z", "b/a/1", "b/a/10", "b/a/2"])
        for key in reversed(keys):
            store.put(key, key.encode())
        for prefix in {key[:length] for key in keys for length in range(len(key) + 1) if not key[:length].startswith("/")}:
            expected = [(key, len(key)) for key in keys if key.startswith(prefix)]
            assert sorted(store.list(prefix)) == expected, prefix
        assert list(store.list("b/a/100")) == []
        assert list(store.list("none/")) == []

    def test_children_are_the_next_components_that_go_on(self, store: Store) -> None:
        for key in ("vms/a/vm.json", "vms/a/runs/1", "vms/b%20c/vm.json", "vms/file", "repository.json"):
            store.put(key, b"x")
        assert list(store.children("vms/")) == ["a", "b%20c"]
        assert list(store.children("")) == ["vms"]
        assert list(store.children("vms/a/")) == ["runs"]
        assert list(store.children("none/")) == []

    def test_delete_removes_and_does_not_mind_what_is_not_there(self, store: Store) -> None:
        store.put("a/b", b"x")
        store.delete("a/b")
        store.delete("a/b")
        store.delete("never/was")
        assert store.size("a/b") is None
        assert list(store.list("")) == []
        store.put("a/b", b"y")
        assert store.get("a/b") == b"y"

    def test_put_verified_accepts_its_own_echo_only(self, store: Store) -> None:
        put_verified(store, "k", b"same")
        put_verified(store, "k", b"same")
        with pytest.raises(RepositoryError, match="object k exists with another content"):
            put_verified(store, "k", b"other")
        assert store.get("k") == b"same"
