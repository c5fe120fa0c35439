"""The contract with a directory and with memory as store, and what is a directory's alone."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store_contract import StoreContract
from vmrewind.errors import RepositoryError
from vmrewind.repository.directory import DirectoryStore
from vmrewind.repository.memory import MemoryStore
from vmrewind.repository.opening import open_store
from vmrewind.repository.store import AlreadyExists, Store


class TestDirectory(StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return DirectoryStore(tmp_path / "store", create=True)


class TestMemory(StoreContract):
    @pytest.fixture
    def store(self) -> Store:
        return MemoryStore()


@pytest.mark.parametrize("key", ["", "/etc/passwd", "a//b", "../x", "a/../b", ".hidden", "a/.tmp-1", "a/", "a b", "ü"])
def test_a_directory_refuses_keys_that_could_lead_elsewhere(tmp_path: Path, key: str) -> None:
    store = DirectoryStore(tmp_path)
    for operation in (lambda: store.put(key, b""), lambda: store.get(key), lambda: store.size(key), lambda: store.delete(key)):
        with pytest.raises(ValueError, match="not an object's key"):
            operation()
    assert list(tmp_path.iterdir()) == []


def test_urls_name_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "a repo"
    open_store(str(place), create=True).put("k", b"v")
    monkeypatch.chdir(tmp_path)
    for url in (str(place), "a repo", f"file://{tmp_path}/a%20repo", f"file://localhost{tmp_path}/a%20repo"):
        store = open_store(url)
        assert store.get("k") == b"v"
        assert store.url == url
    for url, part in [("ftp://bucket/x", "ftp://"), ("file://host/x", "other host"), ("", "empty")]:
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


def test_a_directory_neither_needs_nor_loads_what_object_stores_need(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from vmrewind.repository.repository import Repository\n"
        "from vmrewind.vmconfig.model import check_repository\n"
        "check_repository('k', 's3://bucket/x')\n"
        "Repository.init(sys.argv[1]); Repository.open(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "repo")], check=True, timeout=60)
