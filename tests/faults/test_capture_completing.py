"""Capture under images that are not complete: what they lack only history has, so it stays whole, and the guest waits for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.capture_tools import Client, until
from tests.faults.test_capture_bypass import capture_of, ship
from tests.faults.test_capture_full import quick, write_much
from vmrewind.capture.policy import POLICIES
from vmrewind.journal.origin import filled, note_filling
from vmrewind.journal.reader import segment_files
from vmrewind.journal.runs import private_directory
from vmrewind.nbd import protocol as nbd


def _completed(directory: Path, policy: str, *, faulty: bool = False) -> Any:
    private_directory(directory / "journal")
    note_filling(directory / "journal", ["vda", "vdb"], {})
    return capture_of(directory, policy, faulty=faulty)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_holds_the_guest_until_the_images_are_complete(tmp_path: Path, policy: str) -> None:
    with _completed(tmp_path, policy) as capture, Client(capture.socket_path) as client:
        # A capture that takes a dead one's place knows it as well.
        client.write(0, b"x" * 4096)
        capture.kill()
        capture.start()
        with Client(capture.socket_path) as other:
            with quick(other), pytest.raises(TimeoutError):
                write_much(other, 12)
            assert segment_files(capture.journal)[0].number == 1, "nothing was dropped"
            status = capture.instruct(command="status")
            assert status["journal_full"] and status["bypass"] is None
            filled(capture.journal)
            if policy == "block":
                ship(capture)
            with quick(other, 5):
                assert other.reply()[1] == 0
            write_much(other, 12)
            word = {"drop-history": "history.dropped", "bypass": "bypass.begin"}
            for kind, event in word.items():
                if kind == policy:
                    until(lambda event=event: capture.events(event), event)  # type: ignore[misc]
                else:
                    assert not capture.events(event)


def test_ship_makes_room_before_the_images_are_complete(tmp_path: Path) -> None:
    with _completed(tmp_path, "drop-history") as capture, Client(capture.socket_path) as client:
        with quick(client), pytest.raises(TimeoutError):
            write_much(client, 12)
        ship(capture)
        assert client.reply()[1] == 0
        assert not capture.events("history.dropped")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_journal_that_fails_is_not_bypassed_until_the_images_are_complete(tmp_path: Path, policy: str) -> None:
    capture = _completed(tmp_path, policy, faulty=True)
    with capture, Client(capture.socket_path) as client:
        client.write(0, b"before")
        capture.fail()
        client.sock.sendall(client.request(nbd.CMD_WRITE, 8192, data=b"x" * 512))
        with quick(client), pytest.raises(TimeoutError):
            client.reply()
        assert not capture.events("bypass.begin")
        filled(capture.journal)
        if policy == "bypass":
            with quick(client, 5):
                assert client.reply()[1] == 0
        else:
            capture.heal()
            assert client.reply()[1] == 0, "held, and no error"
