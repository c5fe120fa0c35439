"""The control socket: bookmarks and status for the local administrator, patience with nonsense."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.capture_tools import MIB, RUN, Capture, Client, DiskOf, journal_entries, raw_image, until
from vmrewind.capture.control import LINE_MAX
from vmrewind.journal import format as fmt


@pytest.fixture
def capture(tmp_path: Path) -> Iterator[Capture]:
    disks = [DiskOf("vda", raw_image(tmp_path / "a.raw", 4 * MIB)), DiskOf("vdb", raw_image(tmp_path / "b.raw", MIB))]
    with Capture(tmp_path, disks) as made:
        yield made


def say(capture: Capture, data: bytes) -> list[dict[str, object]]:
    """Send bytes, then the end; everything that is answered until the server hangs up."""
    with capture.control() as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # It hung up in the middle: what it said is still to be read.
        said = bytearray()
        with contextlib.suppress(ConnectionError):
            while part := sock.recv(65536):
                said += part
        return [json.loads(line) for line in said.splitlines()]


def alive(capture: Capture) -> bool:
    with Client(capture.socket_path) as client:
        client.write(0, b"alive")
        return client.read(0, 5) == b"alive" and bool(capture.instruct(command="status")["ok"])


def test_a_mark_is_a_record_between_the_writes_around_it(capture: Capture) -> None:
    with Client(capture.socket_path) as client:
        client.write(0, b"before")
        answer = capture.instruct(command="mark", name="before the upgrade – ☂")
        client.write(0, b"after")
    assert answer["ok"]
    assert answer["run"] == fmt.run_name(RUN)
    entries = {entry.record.seq: entry for entry in journal_entries(capture.journal)}
    mark = entries[answer["seq"]]
    assert (mark.record.op, mark.record.flags, mark.record.disk) == (fmt.Op.EVENT, fmt.Event.BOOKMARK, fmt.ALL_DISKS)
    assert json.loads(mark.payload) == {"name": "before the upgrade – ☂", "kind": "crash-consistent"}
    assert mark.record.time_ns == answer["time_ns"]
    assert entries[answer["seq"] - 1].payload == b"before"
    assert entries[answer["seq"] + 1].payload == b"after"


@pytest.mark.parametrize("name", [None, "", 7, ["x"], "x" * 201, "two\nlines", "\x1b[31m", "\x00", " led", "trailed "])
def test_a_name_that_could_not_be_shown_is_refused(capture: Capture, name: object) -> None:
    answer = capture.instruct(command="mark", name=name)
    assert (answer["ok"], answer["kind"]) == (False, "usage")
    assert "200 printable characters" in answer["message"]
    assert not any(entry.record.flags == fmt.Event.BOOKMARK for entry in journal_entries(capture.journal))


def test_a_quiesced_mark_names_an_earlier_moment_of_this_run_and_no_other(capture: Capture) -> None:
    with Client(capture.socket_path) as client:
        client.write(0, b"frozen after this")
        state = capture.instruct(command="status")
        client.write(0, b"thawed")
    moment = {"run": state["run"], "seq": state["seq"], "time_ns": state["time_ns"], "not_frozen": ["/boot/efi"]}
    wrong: list[object] = [
        7,
        {},
        moment | {"run": fmt.run_name(RUN + 1)},
        moment | {"seq": state["seq"] + 1000},
        moment | {"seq": 0},
        moment | {"seq": True},
        moment | {"time_ns": -1},
        moment | {"not_frozen": "/"},
        moment | {"not_frozen": ["/\x1b[31m"]},
        moment | {"not_frozen": ["/" + "x" * 5000]},
        moment | {"more": 1},
    ]
    for quiesced in wrong:
        answer = capture.instruct(command="mark", name="point", quiesced=quiesced)
        assert (answer["ok"], answer["kind"]) == (False, "usage"), quiesced
    answer = capture.instruct(command="mark", name="point", quiesced=moment)
    assert answer["ok"] and answer["seq"] > state["seq"]
    (mark,) = [entry for entry in journal_entries(capture.journal) if entry.record.flags == fmt.Event.BOOKMARK]
    named = {key: moment[key] for key in ("seq", "time_ns", "not_frozen")}
    assert json.loads(mark.payload) == {"name": "point", "kind": "quiesced", **named}


def test_status_tells_disks_clients_and_position(capture: Capture) -> None:
    with Client(capture.socket_path, "vdb") as client:
        client.write(0, b"x")
        status = capture.instruct(command="status")
        assert status["pid"] == capture.pid
        assert status["run"] == fmt.run_name(RUN)
        assert status["seq"] == 2
        assert status["journal_full"] is False
        assert {target: (disk["size"], disk["clients"]) for target, disk in status["disks"].items()} == {
            "vda": (4 * MIB, 0),
            "vdb": (MIB, 1),
        }
        assert status["disks"]["vda"]["image"] == str(capture.disks[0].image)
    until(lambda: capture.instruct(command="status")["disks"]["vdb"]["clients"] == 0, "the client's end")


def test_several_instructions_on_one_connection_each_get_an_answer(capture: Capture) -> None:
    lines = b"".join(json.dumps({"command": "mark", "name": f"m{i}"}).encode() + b"\n" for i in range(30))
    answers = say(capture, lines)
    assert [answer["ok"] for answer in answers] == [True] * 30
    seqs = [answer["seq"] for answer in answers]
    assert seqs == list(range(2, 32)), "in order, each its own"


def test_an_instruction_in_pieces_is_understood(capture: Capture) -> None:
    with capture.control() as sock:
        for byte in b'{"command": "status"}\n':
            sock.sendall(bytes([byte]))
        with sock.makefile("rb") as lines:
            assert json.loads(lines.readline())["ok"]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"hello\n",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b'"status"\n',
        b"1\n",
        b"null\n",
        b'{"command": "status"\n',
        b"[" * 60_000 + b"\n",
        b'{"a":' * 10_000 + b"\n",
        b"9" * 60_000 + b"\n",
        b"NaN\n",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_nonsense_is_answered_and_ends_the_connection(capture: Capture, line: bytes) -> None:
    answers = say(capture, line + b'{"command": "mark", "name": "not reached"}\n')
    assert [(answer["ok"], answer["kind"]) for answer in answers] == [(False, "usage")]
    assert alive(capture)


@pytest.mark.parametrize("command", [None, 7, "", "stop", ["mark"], {"x": 1}, "x" * 60_000])
def test_an_unknown_instruction_is_named(capture: Capture, command: object) -> None:
    answer = capture.instruct(command=command)
    assert (answer["ok"], answer["kind"]) == (False, "usage")
    assert "knows no instruction" in answer["message"]
    assert len(answer["message"]) < 200
    assert alive(capture)


@pytest.mark.parametrize("length", [LINE_MAX, LINE_MAX + 1, 10 * LINE_MAX])
def test_an_oversized_line_is_refused(capture: Capture, length: int) -> None:
    answers = say(capture, b"x" * length)
    # Who is still sending when the server hangs up may not get to read why.
    assert [answer["kind"] for answer in answers] == ["usage"] or (length > LINE_MAX and not answers)
    assert alive(capture)


def test_clients_that_leave_early_leave_nothing_behind(capture: Capture) -> None:
    descriptors = Path(f"/proc/{capture.pid}/fd")

    def count() -> int:
        return len(list(descriptors.iterdir()))

    before = count()
    for i in range(300):
        with until(lambda: _patiently(capture), "room among those who wait") as sock:
            if i % 3:
                sock.sendall(b'{"command": "mark", "name": "gone"}\n' * (i % 3))
            if i % 5 == 0:
                sock.sendall(b"half a lin")
    until(lambda: count() <= before, "their descriptors to be closed")
    assert alive(capture), "none of them counts as a client any more"


def _patiently(capture: Capture) -> socket.socket | None:
    try:
        return capture.control()
    except BlockingIOError:
        return None


def test_a_client_that_never_reads_its_answers_is_hung_up_on(capture: Capture) -> None:
    with capture.control() as deaf:
        deaf.settimeout(10)
        with pytest.raises(ConnectionError):
            for _ in range(100_000):
                deaf.sendall(b'{"command": "status"}\n')
        assert alive(capture)


def test_random_bytes_disturb_nobody(capture: Capture) -> None:
    for i in range(60):
        say(capture, os.urandom(i * 37) + b"\n" * (i % 3))
    assert alive(capture)
