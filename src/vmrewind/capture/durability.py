"""Stable storage, off the loop: syncing the journal for flushes, checkpointing the images.

The journal is the images' write-ahead log, so a flush syncs the journal only; flushes that arrive while a sync runs share the
next one. The images are synced by checkpoints, each behind a sync of the journal, in a thread that a flush never waits for.

While the journal is bypassed (bypass.py), and for a flush whose journal sync failed, the images are synced instead or as well. What
is said then of the journal's replay matters: after the host's death an old journal must not be put over what was promised. So such
a flush is answered only when the checkpoint is on stable storage too, in ``capture.state`` or on each image itself (level.py). If
neither can be had, it waits: the guest is neither told an untruth nor an error. So it does while the images are not complete.

An image that can't be synced has lost writes, and asking again would only seem to succeed: the kernel forgets what it could not
write. The journal has those writes, so capture ends, and the one that takes its place replays them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Final, NoReturn, Protocol

from vmrewind.capture.image import Image
from vmrewind.capture.level import forget_level, note_level
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

            def complete(done: Callable[[int], None] = done, result: int = result) -> None:
                self.busy = False
                done(result)

            self._post(complete)

    def stop(self) -> None:
        """Finish the job at hand and end the thread."""
        self._jobs.put(None)
        self._thread.join()


_NOT_YET: Final = -1
"""A flush's result: it can't be promised now, ask again later."""

CHECKPOINT_SECONDS: Final = 30
"""Longest time that image writes stay unsynced: it bounds what is replayed after the host's death."""
_CHECKPOINT_JOURNAL_PART: Final = 4
"""A checkpoint is due, too, when one such part of the journal was written since the last: what is not checkpointed cannot be
recycled, and syncing the images may take as long as filling another part. More often costs more: a block that the guest writes
again and again is written out each time."""


class Durability:
    """Knows what is dirty and who waits. Used by the loop's thread, except where a worker's job is."""

    def __init__(
        self,
        journal: Path,
        writer: JournalWriter,
        state: StatePage,
        images: Sequence[Image],
        events: EventLog,
        segments_max: int,
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
        self._checkpoint_segment = 0
        """The segment that was written when the last checkpoint began."""
        self._checkpoint_segments = max(1, segments_max // _CHECKPOINT_JOURNAL_PART)
        self._waiting: list[tuple[Waiter, int]] = []
        self.images_too = False
        """Whether the images hold writes that the journal does not, so that a flush must sync them."""
        self._bypasses = 0
        self._journal_only_next = False
        self.lost: set[int] = set()
        """Disks whose images lost writes that no journal has; a bypass's."""
        self.on_lost: Callable[[], None] = lambda: None
        """Called when ``lost`` has grown, before anybody is answered."""
        self._image_error = 0
        """What an image's sync failed with: the kernel tells it once, to whichever thread asks."""
        self._failed_image = 0
        self._journal_fails = False
        self._journal_lost = False
        """The journal could not be synced, nor the images be asked in its place since; it would only seem to be, now."""
        self.images_lack: Callable[[], bool] = lambda: False
        """Whether the images lack what only history has, so that they cannot stand in for the journal."""
        self._waits = False
        self._level = threading.Lock()
        self._level_durable = -1
        self._level_on_images = False

    def bypass_began(self) -> None:
        """From now on the images get writes that are not journaled."""
        self._bypasses += 1
        self.images_too, self._journal_only_next = True, False

    def bypass_ended(self) -> None:
        """Everything is journaled again; the images need one more sync."""
        self._journal_only_next = True

    def flush(self, waiter: Waiter, cookie: int) -> None:
        """Tell ``waiter`` once everything journaled so far is on stable storage."""
        self._waiting.append((waiter, cookie))
        if not self._flusher.busy:
            self._start_flush()

    def sync_if_dirty(self) -> None:
        """Sync the journal unless nothing was written since the last time; called once a second."""
        if (self._writer.dirty or self._waiting or self._journal_only_next) and not self._flusher.busy:
            self._start_flush()

    def _start_flush(self) -> None:
        waiters, self._waiting = self._waiting, []
        journaled = self._writer.dirty
        finished, current, rolled = self._writer.take_unsynced()
        images_too, batch = self.images_too, self._state.applied
        last_of = self._bypasses if self._journal_only_next else None

        def done(error: int) -> None:
            if error == _NOT_YET:
                # The next second's tick tries again.
                self._waiting = waiters + self._waiting
                return
            if error and images_too:
                self.lost.add(self._failed_image)
                self.on_lost()
            if last_of == self._bypasses and not error:
                self.images_too = self._journal_only_next = False
            for waiter, cookie in waiters:
                waiter.flushed(cookie, error)
            if error and not images_too:
                self._images_lost_writes(error)
            if self._waiting and not self._flusher.busy:
                self._start_flush()

        def sync() -> int:
            # While it is bypassed, nothing waits for a journal that may take long to fail.
            synced = (journaled or not images_too) and self._sync_journal(finished, current, rolled)
            if synced and not images_too and not self._journal_lost:
                return 0
            return self._sync_images_instead(batch)

        self._flusher.submit(sync, done)

    def _sync_images_instead(self, batch: int) -> int:
        """Have the images hold what a flush promises, everything up to ``batch`` and whatever is not journaled."""
        if self.images_lack():
            self._journal_lost = True
            self._say_that_it_waits("the images are not complete, and cannot stand in for the journal, which failed")
            return _NOT_YET
        if not (error := self._sync_images() or self._say_level(batch)):
            self._journal_lost = False
        return error

    def _say_that_it_waits(self, error: str) -> None:
        if not self._waits:
            self._waits = True
            self._events.write("flush.waits", error=error, journal=str(self._journal))

    def _sync_journal(self, finished: list[int], current: int, rolled: bool) -> bool:
        try:
            try:
                if os.fstat(current).st_nlink == 0:
                    raise FileNotFoundError(errno.ENOENT, "the segment was deleted")
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
            if not self._journal_fails:
                self._events.write("journal.sync-failed", error=str(error), journal=str(self._journal))
            self._journal_fails = True
            return False
        self._journal_fails = False
        return True

    def _say_level(self, batch: int) -> int:
        """Say, durably, that the images, which were synced, hold everything up to ``batch``."""
        with self._level:
            if self._image_error or batch <= self._level_durable:
                return self._image_error
            try:
                self._set_checkpoint(batch)
            except OSError:
                try:
                    for image in self._images:
                        note_level(image.fd, self._writer.run, batch)
                except OSError as error:
                    self._say_that_it_waits(str(error))
                    return _NOT_YET
                self._level_durable, self._level_on_images = batch, True
            self._waits = False
        return 0

    def _set_checkpoint(self, batch: int) -> None:
        # Two threads sync images; the one that began later may be done first.
        self._state.set_checkpoint(max(batch, self._state.checkpoint))
        self._level_durable, self._level_on_images = max(batch, self._level_durable), False

    def _sync_images(self, *, with_identity: bool = False) -> int:
        with self._level:
            if self._image_error:
                return self._image_error
            try:
                for image in self._images:
                    self._failed_image = image.index
                    image.sync()
                    if with_identity:
                        image.sync_identity()
            except OSError as error:
                self._events.write("image.sync-failed", error=str(error))
                self._image_error = error.errno or errno.EIO
            return self._image_error

    def checkpoint_if_due(self, ticks: int) -> None:
        """Called once a second, with how many seconds it has been so far."""
        written = self._writer.segment_number - self._checkpoint_segment
        if ticks % CHECKPOINT_SECONDS == 0 or written >= self._checkpoint_segments:
            self.checkpoint()

    @property
    def checkpointing(self) -> bool:
        """Whether a checkpoint is under way."""
        return self._checkpointing

    def checkpoint(self) -> None:
        """Start a checkpoint unless one is running or there is nothing to do."""
        batch = self._state.applied
        if self._checkpointing or batch == self._state.checkpoint:
            return
        self._checkpointing = True
        self._checkpoint_segment = self._writer.segment_number
        self.flush(_JournalSynced(lambda: self._checkpointer.submit(lambda: self._checkpoint(batch), self._checkpointed)), 0)

    def _checkpoint(self, batch: int) -> int:
        if error := self._sync_images():
            return error
        try:
            with self._level:
                if self._image_error:
                    return self._image_error
                self._set_checkpoint(batch)
        except OSError as failure:
            # The page's number is right whenever it gets to the disk; until then an older one only means more to replay.
            self._events.write("journal.sync-failed", error=str(failure), journal=str(self._journal))
        return 0

    def _checkpointed(self, error: int) -> None:
        self._checkpointing = False
        if error and not self.images_too:
            self._images_lost_writes(error)

    def _images_lost_writes(self, error: int) -> NoReturn:
        if not self.images_too:
            # The journal has them all, and nothing newer is in the images: the next capture replays them.
            self._state.set_applied(self._state.checkpoint)
        raise ImageError(
            f"an image cannot be written to stable storage: {os.strerror(error)}",
            "free space where the images are, or repair what they lie on; the journal keeps their writes until then",
        )

    def leave(self) -> None:
        """End the threads, what they do at hand being done; raises ImageError if an image fails. Whoever goes on syncs the rest."""
        self._flusher.stop()
        self._checkpointer.stop()
        # The kernel tells once that it lost a write, and has told it here.
        if self._image_error:
            self._images_lost_writes(self._image_error)

    def finish(self) -> None:
        """The last sync and checkpoint, in this thread; raises ImageError if an image fails."""
        self._flusher.stop()
        self._checkpointer.stop()
        finished, current, rolled = self._writer.take_unsynced()
        self._sync_journal(finished, current, rolled)
        if error := self._sync_images(with_identity=True):
            self._images_lost_writes(error)
        if not self._say_level(self._state.applied) and not self._level_on_images:
            for image in self._images:
                forget_level(image.fd)


class _JournalSynced:
    """A checkpoint that waits for the journal: an image must never be on stable storage further than its log."""

    def __init__(self, go_on: Callable[[], None]) -> None:
        self._go_on = go_on

    def flushed(self, _: int, error: int) -> None:
        """The journal is on stable storage, or the images were synced in its place. With an error, capture is about to end."""
        if not error:
            self._go_on()
