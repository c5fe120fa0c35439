"""A base's chunks while a moment is served: each loaded once by whoever comes first, ahead of whoever reads on, within its room."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

from tests.capture_tools import until
from tests.history_tools import MadeHistory
from vmrewind.errors import CorruptionError
from vmrewind.history.view import View
from vmrewind.recover import chunk_cache
from vmrewind.recover.chunk_cache import ChunkCache, ServedView

MIB = 1 << 20
CHUNK = 4 * MIB


def content(chunk_id: str) -> bytes:
    return (chunk_id.encode() * CHUNK)[:CHUNK]


def test_whoever_wants_a_chunk_that_is_being_made_waits_for_it(tmp_path: Path) -> None:
    loaded: list[str] = []
    together = threading.Barrier(4)

    def load(chunk_id: str) -> bytes:
        loaded.append(chunk_id)
        threading.Event().wait(0.05)
        return content(chunk_id)

    with closing(ChunkCache(tmp_path)) as cache:
        found: list[bool] = []

        def ask() -> None:
            together.wait()
            found.extend(bytes(cache.get(chunk_id, load)) == content(chunk_id) for chunk_id in "abab")

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(loaded) == ["a", "b"] and found == [True] * 16
        assert list(tmp_path.iterdir()) == [], "the file has no name, so a kill leaves nothing"


def test_what_could_not_be_had_is_tried_anew(tmp_path: Path) -> None:
    def fail(chunk_id: str) -> bytes:
        raise CorruptionError(chunk_id)

    with closing(ChunkCache(tmp_path)) as cache:
        for _ in range(2):
            with pytest.raises(CorruptionError):
                cache.get("a", fail)
        cache.prepare("a", fail)
        assert bytes(cache.get("b", content)) == content("b")
        until(lambda: "a" not in cache._chunks, "the end of what went wrong ahead")
        assert bytes(cache.get("a", content)) == content("a")


@pytest.mark.parametrize("room", ["none", "one chunk", "not what it seemed"])
def test_without_room_chunks_are_loaded_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    loaded: list[str] = []

    def load(chunk_id: str) -> bytes:
        loaded.append(chunk_id)
        return content(chunk_id)

    if room == "one chunk":
        monkeypatch.setattr(chunk_cache, "_SHARE", os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize // (6 * MIB))
    if room == "not what it seemed":

        def full(fd: int, offset: int, length: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
    with closing(ChunkCache(tmp_path / "missing" if room == "none" else tmp_path)) as cache:
        for chunk_id in "abab":
            assert bytes(cache.get(chunk_id, load)) == content(chunk_id)
        assert loaded == (["a", "b", "b"] if room == "one chunk" else ["a", "b", "a", "b"])
        cache.prepare("c", load)
        assert bytes(cache.get("d", load)) == content("d")


def test_who_reads_on_has_the_next_chunks_made_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MadeHistory(tmp_path, {"vda": 8 * CHUNK})
    made.disk("vda").content[:] = os.urandom(8 * CHUNK)
    made.start()
    made.write("vda", 3 * CHUNK + 5, b"later")
    end = made.stop()
    truth = bytes(made.disk("vda").content)
    loaded: list[str] = []
    real = View.read_chunk

    def counted(view: View, chunk_id: str) -> bytes | memoryview:
        loaded.append(chunk_id)
        return real(view, chunk_id)

    monkeypatch.setattr(View, "read_chunk", counted)
    with closing(ChunkCache(tmp_path)) as cache, made.open() as history:
        view = ServedView.open(history, "vda", end)
        view.cache = cache
        chunks = view._manifest.chunks
        assert view.read(6 * CHUNK, 512) == truth[6 * CHUNK : 6 * CHUNK + 512]
        assert view.read(0, 512) == truth[:512] and loaded == [chunks[6], chunks[0]], "here and there nothing is made ahead"
        assert view.read(CHUNK, 512) == truth[CHUNK : CHUNK + 512]
        until(lambda: len(loaded) == 5, "the chunks ahead")
        assert set(loaded[2:]) == {chunks[1], chunks[2], chunks[3]}
        assert view.read(0, len(truth)) == truth
        assert len(set(loaded)) == len(loaded) == 8
        again = ServedView.open(history, "vda", end)
        again.cache = cache
        assert again.read(0, len(truth)) == truth and len(loaded) == 8, "another moment has them as well"
