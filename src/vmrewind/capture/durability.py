"""Stable storage, off the loop: syncing the journal for flushes, checkpointing the images.

The journal is the images' write-ahead log, so a flush syncs the journal only; flushes that arrive while a sync runs share the
next one. The images are synced by checkpoints, each behind a sync of the journal, in a thread that a flush never waits for.

An image that can't be synced has lost writes, and asking again would only seem to succeed: the kernel forgets what it could not
write. The journal has those writes, so capture ends, and the one that takes its place replays them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Final, NoReturn, Protocol

from vmrewind.capture.image import Image
from vmrewind.errors import ImageError
from vmrewind.journal.events import EventLog
from vmrewind.journal.runs import sync_directory
from vmrewind.journal.state import StatePage
from vmrewind.journal.writer import JournalWriter


class Waiter(Protocol):
    """Who asked for a flush."""

    def flushed(self, cookie: int, error: int) -> None:
        """The flush is done; ``error`` is an errno, 0 for success."""


class Worker:
    """One thread that runs jobs in order and hands each job's completion back to the loop."""

    def __init__(self, name: str, post: Callable[[Callable[[], None]], None]) -> None:
        self._jobs: SimpleQueue[tuple[Callable[[], int], Callable[[int], None]] | None] = SimpleQueue()
        self._post = post
        self.busy = False
        self.error = 0
        """What the last job that failed returned; there for ``Durability.finish``, when no completion is run any more."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], int], done: Callable[[int], None]) -> None:
        """Run ``job`` in the thread, then ``done(its result)`` in the loop. One job at a time: look at ``busy`` first."""
        self.busy = True
        self._jobs.put((job, done))

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, done = item
            result = job()
            if result:
                self.error = result

            def complete(done: Callable[[int], None] = done, result: int = result) -> None:
                self.busy = False
                done(result)

            self._post(complete)

    def stop(self) -> None:
        """Finish the job at hand and end the thread."""
        self._jobs.put(None)
        self._thread.join()


CHECKPOINT_SECONDS: Final = 30
"""Longest time that image writes stay unsynced: it bounds what is replayed after the host's death."""


class Durability:
    """Knows what is dirty and who waits."""

    def __init__(
        self,
        journal: Path,
        writer: JournalWriter,
        state: StatePage,
        images: Sequence[Image],
        events: EventLog,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._journal = journal
        self._writer = writer
        self._state = state
        self._images = images
        self._events = events
        self._flusher = Worker("flush", post)
        self._checkpointer = Worker("checkpoint", post)
        self._checkpointing = False
        self._waiting: list[tuple[Waiter, int]] = []

    def flush(self, waiter: Waiter, cookie: int) -> None:
        """Tell ``waiter`` once everything journaled so far is on stable storage."""
        self._waiting.append((waiter, cookie))
        if not self._flusher.busy:
            self._start_flush()

    def sync_if_dirty(self) -> None:
        """Sync the journal unless nothing was written since the last time; called once a second."""
        if self._writer.dirty and not self._flusher.busy:
            self._start_flush()

    def _start_flush(self) -> None:
        waiters, self._waiting = self._waiting, []
        finished, current, rolled = self._writer.take_unsynced()

        def done(error: int) -> None:
            for waiter, cookie in waiters:
                waiter.flushed(cookie, error)
            if error:
                self._images_lost_writes(error)
            if self._waiting and not self._flusher.busy:
                self._start_flush()

        self._flusher.submit(lambda: self._sync_journal(finished, current, rolled), done)

    def _sync_journal(self, finished: list[int], current: int, rolled: bool) -> int:
        try:
            try:
                for fd in finished:
                    os.fdatasync(fd)
                os.fdatasync(current)
                if rolled:
                    sync_directory(self._journal)
            finally:
                for fd in finished:
                    os.close(fd)
        except OSError as error:
            # The kernel forgets pages whose writing failed, so trying again would only seem to succeed. The images hold
            # the same writes: syncing them keeps the promise that a flush gives to the guest.
            self._events.write("journal.sync-failed", error=str(error), journal=str(self._journal))
            return self._sync_images()
        return 0

    def _sync_images(self) -> int:
        try:
            for image in self._images:
                image.sync()
        except OSError as error:
            self._events.write("image.sync-failed", error=str(error))
            return error.errno or 5
        return 0

    def checkpoint(self) -> None:
        """Start a checkpoint unless one is running or there is nothing to do."""
        batch = self._state.applied
        if self._checkpointing or batch == self._state.checkpoint:
            return
        self._checkpointing = True
        self.flush(_JournalSynced(lambda: self._checkpointer.submit(lambda: self._checkpoint(batch), self._checkpointed)), 0)

    def _checkpoint(self, batch: int) -> int:
        if error := self._sync_images():
            return error
        try:
            self._state.set_checkpoint(batch)
        except OSError as failure:
            # The page's number is right whenever it gets to the disk; until then an older one only means more to replay.
            self._events.write("journal.sync-failed", error=str(failure), journal=str(self._journal))
        return 0

    def _checkpointed(self, error: int) -> None:
        self._checkpointing = False
        if error:
            self._images_lost_writes(error)

    def _images_lost_writes(self, error: int) -> NoReturn:
        self._state.set_applied(self._state.checkpoint)
        raise ImageError(
            f"an image cannot be written to stable storage: {os.strerror(error)}",
            "free space where the images are, or repair what they lie on; the journal keeps their writes until then",
        )

    def finish(self) -> None:
        """The last sync and checkpoint, in this thread; raises ImageError if an image fails."""
        self._flusher.stop()
        self._checkpointer.stop()
        finished, current, rolled = self._writer.take_unsynced()
        error = self._sync_journal(finished, current, rolled) or self._sync_images()
        # The kernel tells once that it lost a write: a job that was under way may be the one that it told.
        error = self._flusher.error or self._checkpointer.error or error
        if error:
            self._images_lost_writes(error)
        self._state.set_checkpoint(self._state.applied)


class _JournalSynced:
    """A checkpoint that waits for the journal: an image must never be on stable storage further than its log."""

    def __init__(self, go_on: Callable[[], None]) -> None:
        self._go_on = go_on

    def flushed(self, _: int, error: int) -> None:
        """The journal is on stable storage, or the images were synced in its place. With an error, capture is about to end."""
        if not error:
            self._go_on()
