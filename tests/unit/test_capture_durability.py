"""The last sync tells what a sync that was under way was told: the kernel says once that it lost a write."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.capture_tools import MIB, RUN, raw_image, until
from vmrewind.capture.durability import Durability
from vmrewind.capture.image import Image
from vmrewind.errors import ImageError
from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.events import EventLog
from vmrewind.journal.pool import Recycling, SegmentPool
from vmrewind.journal.state import StatePage
from vmrewind.journal.writer import JournalWriter


class Losing(Image):
    """An image that lost a write, which its next sync is told and no other."""

    lost = 1

    def sync(self) -> None:
        if self.lost:
            self.lost -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync()


def parts(directory: Path) -> tuple[StatePage, JournalWriter, Losing, EventLog]:
    journal = directory / "journal"
    pool = SegmentPool(journal, 8 * MIB)
    pool.allot()
    state = StatePage(journal)
    state.begin(RUN)
    writer = JournalWriter(pool, uuid.uuid4().bytes, RUN, Clock(0), lambda _: Recycling.NO, 1)
    writer.event(fmt.Event.START, {})
    image = Losing(0, "vda", str(raw_image(directory / "a.raw", MIB)), "raw")
    return state, writer, image, EventLog(directory / "events.jsonl")


def test_a_checkpoint_that_fails_while_the_run_ends_is_no_clean_end(tmp_path: Path) -> None:
    state, writer, image, events = parts(tmp_path)
    posted: list[Callable[[], None]] = []
    durability = Durability(tmp_path / "journal", writer, state, [image], events, 8, posted.append)
    state.set_applied(1)
    durability.checkpoint()
    until(lambda: posted, "the journal's sync")
    posted.pop()()
    # The loop is left now: what the checkpoint posts is never run.
    with pytest.raises(ImageError, match="cannot be written to stable storage"):
        durability.finish()
    assert (state.applied, state.checkpoint) == (0, 0), "what was lost is replayed"
    image.close()
    state.close()


def test_a_flush_that_fails_while_the_run_ends_is_no_clean_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal cannot be synced, and the images, which are synced in its place, neither."""
    state, writer, image, events = parts(tmp_path)
    posted: list[Callable[[], None]] = []
    durability = Durability(tmp_path / "journal", writer, state, [image], events, 8, posted.append)
    state.set_applied(1)

    def failing(fd: int) -> None:
        monkeypatch.undo()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", failing)
    durability.sync_if_dirty()
    with pytest.raises(ImageError, match="cannot be written to stable storage"):
        durability.finish()
    assert state.checkpoint == 0
    image.close()
    state.close()


def test_without_a_failure_the_end_is_a_checkpoint(tmp_path: Path) -> None:
    state, writer, image, events = parts(tmp_path)
    image.lost = 0
    durability = Durability(tmp_path / "journal", writer, state, [image], events, 8, lambda _: None)
    state.set_applied(1)
    durability.sync_if_dirty()
    durability.finish()
    assert (state.applied, state.checkpoint) == (1, 1)
    image.close()
    state.close()


class _Asking:
    def __init__(self) -> None:
        self.answers: list[int] = []

    def flushed(self, _cookie: int, error: int) -> None:
        self.answers.append(error)


def test_images_that_lack_something_do_not_stand_in_for_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush whose journal sync failed waits for them: the next sync would only seem to be better."""
    state, writer, image, events = parts(tmp_path)
    posted: list[Callable[[], None]] = []
    durability = Durability(tmp_path / "journal", writer, state, [image], events, 8, posted.append)
    state.set_applied(1)
    image.lost = 0
    lacking = True
    durability.images_lack = lambda: lacking

    def failing(fd: int) -> None:
        monkeypatch.undo()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", failing)
    asking = _Asking()
    durability.flush(asking, 0)
    for _ in range(3):
        until(lambda: posted, "the flush")
        posted.pop()()
        assert asking.answers == []
        durability.sync_if_dirty()
    until(lambda: posted, "the flush")
    lacking = False
    posted.pop()()
    durability.sync_if_dirty()
    until(lambda: posted, "the flush")
    posted.pop()()
    assert asking.answers == [0] and state.checkpoint == 1
    durability.leave()
    image.close()
    state.close()
