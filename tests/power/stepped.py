"""Capture's threads, made to run one noted operation at a time, and its loop, made to turn when the test says so."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.power.layer import Killed, PowerCut

_GIVE_UP_SECONDS = 60


class Turns:
    """Who may run: the main thread, or one of the workers' jobs until its next noted operation."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.ending: type[BaseException] | None = None
        """Set when the process, or the power, has gone: whoever runs next ends."""

    def own(self) -> Job | None:
        """The job that this thread is."""
        return next((job for job in self.jobs if job.thread is threading.current_thread()), None)

    def end(self, ending: type[BaseException]) -> None:
        """Every job ends where it is."""
        self.ending = ending
        while self.jobs:
            self.jobs[0].run()


class Job:
    """A worker's job in a thread of its own, which runs only while ``run`` waits for it."""

    def __init__(self, turns: Turns, work: Callable[[], int], done: Callable[[int], None]) -> None:
        self._turns = turns
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._work, self._done = work, done
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._body, daemon=True)
        turns.jobs.append(self)
        self.thread.start()

    def run(self) -> None:
        """Let it go on to its next noted operation, or its end."""
        self._go.release()
        assert self._paused.acquire(timeout=_GIVE_UP_SECONDS), "a worker hangs"
        if self.failure is not None:
            raise self.failure

    def pause(self) -> None:
        """Called in the thread: let the others run."""
        self._paused.release()
        self._go.acquire()

    def _body(self) -> None:
        self._go.acquire()
        try:
            if self._turns.ending is None:
                result = self._work()
                if self._turns.ending is None:
                    self._done(result)
        except (PowerCut, Killed):
            pass
        except BaseException as failure:  # noqa: BLE001 -- raised again by run
            self.failure = failure
        self._turns.jobs.remove(self)
        self._paused.release()


def worker_class(turns: Turns) -> type:
    """A stand-in for ``durability.Worker`` whose jobs are run by ``turns``."""

    class Stepped:
        def __init__(self, _: str, post: Callable[[Callable[[], None]], None]) -> None:
            self._post = post
            self.busy = False
            self.error = 0
            self._job: Job | None = None

        def submit(self, job: Callable[[], int], done: Callable[[int], None]) -> None:
            def finished(result: int) -> None:
                self.error = result or self.error

                def complete() -> None:
                    self.busy = False
                    done(result)

                self._post(complete)

            self.busy = True
            self._job = Job(turns, job, finished)

        def stop(self) -> None:
            while self._job is not None and self._job in turns.jobs:
                self._job.run()

    return Stepped


def lock_class(turns: Turns) -> type:
    """A stand-in for ``threading.Lock`` among threads of which only one runs: whoever waits lets the others run."""

    class SteppedLock:
        def __init__(self) -> None:
            self._held = False

        def __enter__(self) -> None:
            while self._held:
                own = turns.own()
                if own is not None:
                    own.pause()
                    if turns.ending is not None:
                        raise turns.ending
                else:
                    for job in list(turns.jobs):
                        job.run()
            self._held = True

        def __exit__(self, *_: object) -> None:
            self._held = False

    return SteppedLock


def select_with(step: Callable[[], None]) -> SimpleNamespace:
    """The module ``select`` with an epoll that calls ``step`` before it looks, and never waits."""

    class Stepping:
        def __init__(self) -> None:
            self._epoll = select.epoll()

        def poll(self, *_: Any) -> list[tuple[int, int]]:
            step()
            return self._epoll.poll(0)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._epoll, name)

    names = {name: getattr(select, name) for name in dir(select) if not name.startswith("__")}
    return SimpleNamespace(**(names | {"epoll": Stepping}))
