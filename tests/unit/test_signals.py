"""Waiting for a signal to end: whichever thread takes it, and whether somebody waits by then or not."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from vmrewind.start.signals import ENDING, asked_to_end, handled, uninterrupted


@pytest.fixture
def other() -> Iterator[int]:
    """A thread that was there before and masks nothing, by its identifier."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert thread.ident is not None
    yield thread.ident
    done.set()
    thread.join()


@pytest.mark.parametrize("number", ENDING)
def test_another_threads_signal_ends_the_wait(other: int, number: signal.Signals) -> None:
    with asked_to_end() as asked:
        threading.Timer(0.3, signal.pthread_kill, (other, number)).start()
        assert asked.wait(20)


@pytest.mark.parametrize("number", ENDING)
def test_what_came_before_the_wait_is_not_lost(other: int, number: signal.Signals) -> None:
    with asked_to_end() as asked:
        signal.pthread_kill(other, number)
        time.sleep(0.1)
        assert asked.wait(20)
        assert not asked.wait(0), "each is told once"


def test_each_signal_is_told(other: int) -> None:
    with asked_to_end() as asked:
        for _ in range(2):
            signal.pthread_kill(other, signal.SIGINT)
            assert asked.wait(20)
        assert not asked.wait(0.05)


def test_it_is_heard_however_many_descriptors_are_open() -> None:
    """A history holds as many as the journal has segments; ``select`` knows none beyond 1023."""
    crowd = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with asked_to_end() as asked:
            assert not asked.wait(0)
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.wait(20)
    finally:
        for descriptor in crowd:
            os.close(descriptor)


def test_nohup_keeps_a_closed_terminal_from_ending_it() -> None:
    with handled(signal.SIG_IGN, [signal.SIGHUP]), asked_to_end() as asked:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not asked.wait(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.wait(20)


def test_afterwards_they_do_what_they_did() -> None:
    ours, theirs = os.pipe2(os.O_NONBLOCK)
    before = signal.set_wakeup_fd(theirs)
    try:
        handlers = [signal.getsignal(number) for number in ENDING]
        with asked_to_end() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.wait(20)
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGTERM)
        assert [signal.getsignal(number) for number in ENDING] == handlers
        assert select.select([ours], [], [], 0)[0] == []
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert select.select([ours], [], [], 0)[0] == [ours], "whoever had the wakeup descriptor has it again"
    finally:
        assert signal.set_wakeup_fd(before) == theirs
        os.close(ours)
        os.close(theirs)
