"""Answers that are held are sent soon, whole and in order, and wait for no client."""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

from vmrewind.recover.answers import Answers, Sender


def test_what_a_client_does_not_take_at_once_comes_later_in_order() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as pool:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        hurry = threading.Event()
        answers = Answers(ours, hurry)
        content = os.urandom(50_000)
        answers.hold(content[:49_000])
        assert hurry.is_set()
        hurry.clear()
        answers.send_held()
        assert hurry.is_set(), "there is more"
        answers.hold(content[49_000:])
        received = theirs.recv(1000)
        answers.send_held()
        rest = pool.submit(answers.send, b"the last one")
        while len(received) < len(content) + 12:
            received += theirs.recv(1 << 16)
        rest.result(30)
        hurry.clear()
        answers.send_held()
        assert received == content + b"the last one" and not hurry.is_set()


def test_who_takes_nothing_holds_up_nobody() -> None:
    sender, (stuck, deaf), (ours, theirs) = Sender(), socket.socketpair(), socket.socketpair()
    with stuck, deaf, ours, theirs:
        sender.start()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sender.add(stuck).hold(bytes(60_000))
        theirs.settimeout(30)
        answers = sender.add(ours)
        for number in range(3):
            answers.hold(b"%d" % number)
            assert theirs.recv(10) == b"%d" % number
        sender.stop()
