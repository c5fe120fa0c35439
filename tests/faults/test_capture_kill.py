"""Capture killed with SIGKILL under load: the client resends what was not answered, and nothing that was answered is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.capture_tools import (
    MIB,
    WAIT_SECONDS,
    Capture,
    Client,
    DiskOf,
    Entry,
    compose,
    first_difference,
    journal_entries,
    raw_image,
    until,
)
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Segment, records, segment_files
from vmrewind.nbd import protocol as nbd

SIZE = 8 * MIB
SLOTS = 16
SLOT = SIZE // SLOTS


@dataclass
class Outstanding:
    """A request without an answer. ``data``: what it makes of the range, None for a flush."""

    request: bytes
    offset: int
    data: bytes | None


class Guest(threading.Thread):
    """Writes to a disk as QEMU does: 16 requests in flight, unanswered ones sent again, byte for byte, after a reconnect.

    Each request in flight has a part of the disk to itself, so that what the disk holds is known: ``acknowledged``, but for
    the ranges of what is outstanding.
    """

    def __init__(self, socket_path: Path, target: str, content: bytes, seed: int) -> None:
        super().__init__(name=target)
        self.acknowledged = bytearray(content)
        self.outstanding: dict[int, Outstanding] = {}
        self.answers = 0
        self.reconnects = 0
        self.connected = False
        self.failure: BaseException | None = None
        self._socket_path = socket_path
        self._target = target
        self._random = random.Random(seed)
        self._cookie = 0
        self._end_wanted = threading.Event()

    def run(self) -> None:
        try:
            with suppress(StopIteration):
                while True:
                    self._serve_until_cut()
                    self.reconnects += 1
        except BaseException as error:  # noqa: BLE001 - it belongs to the test's thread
            self.failure = error

    def _serve_until_cut(self) -> None:
        """Connect, send what is outstanding, go on; StopIteration once all is answered and the end is wanted."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                client = Client(self._socket_path, self._target)
                break
            except OSError:
                assert time.monotonic() < deadline, "nobody serves the disk any more"
        self.connected = True
        try:
            self._serve(client)
        except ConnectionError:
            self.connected = False

    def _serve(self, client: Client) -> None:
        with client:
            for waiting in self.outstanding.values():
                client.sock.sendall(waiting.request)
            while True:
                while not self._end_wanted.is_set() and len(self.outstanding) < SLOTS:
                    client.sock.sendall(self._next(client).request)
                if not self.outstanding:
                    raise StopIteration
                cookie, error, _ = client.reply()
                assert error == 0, f"the guest got error {error}"
                done = self.outstanding.pop(cookie)
                if done.data is not None:
                    self.acknowledged[done.offset : done.offset + len(done.data)] = done.data
                self.answers += 1

    def _next(self, client: Client) -> Outstanding:
        rng = self._random
        busy = {waiting.offset // SLOT for waiting in self.outstanding.values() if waiting.data is not None}
        slot = rng.choice([slot for slot in range(SLOTS) if slot not in busy])
        length = rng.choice([512, 4096, 4096, 4096, 65536, rng.randrange(1, 1 << 17)])
        offset = slot * SLOT + rng.randrange(SLOT - length + 1)
        self._cookie += 1
        kind = rng.randrange(12)
        flags = nbd.CMD_FLAG_FUA if rng.random() < 0.1 else 0
        if kind == 0:
            made = Outstanding(client.request(nbd.CMD_FLUSH, cookie=self._cookie), 0, None)
        elif kind <= 2:
            command = nbd.CMD_TRIM if kind == 1 else nbd.CMD_WRITE_ZEROES
            made = Outstanding(client.request(command, offset, length, flags=flags, cookie=self._cookie), offset, bytes(length))
        else:
            data = rng.randbytes(length)
            made = Outstanding(client.request(nbd.CMD_WRITE, offset, data=data, flags=flags, cookie=self._cookie), offset, data)
        self.outstanding[self._cookie] = made
        return made

    def end(self) -> None:
        """Ask for no more."""
        self._end_wanted.set()

    def finish(self) -> None:
        """Ask for no more, wait until all is answered; raises what went wrong."""
        self.end()
        self.join(WAIT_SECONDS)
        assert not self.is_alive(), "requests are without an answer"
        if self.failure is not None:
            raise self.failure

    def check_acknowledged(self, disk: bytes | bytearray) -> None:
        """``disk`` holds everything acknowledged. Only while nothing moves; outstanding ranges may hold either content."""
        expected = bytearray(self.acknowledged)
        for waiting in list(self.outstanding.values()):
            if waiting.data is not None:
                end = waiting.offset + len(waiting.data)
                expected[waiting.offset : end] = disk[waiting.offset : end]
        assert first_difference(disk, expected) is None, f"{self.name}: an acknowledged write is lost"


@contextmanager
def guests(socket_path: Path, before: dict[int, bytes], seed: int) -> Iterator[list[Guest]]:
    """One guest thread per disk; none is left running."""
    made = [Guest(socket_path, f"vd{'ab'[index]}", content, seed + index) for index, content in before.items()]
    for guest in made:
        guest.start()
    try:
        yield made
    finally:
        for guest in made:
            guest.end()


def busy(made: list[Guest], answers: int) -> Callable[[], bool]:
    """Whether each guest has got so many more answers since now, or has failed."""
    wanted = [guest.answers + answers for guest in made]
    return lambda: all(guest.answers >= count for guest, count in zip(made, wanted, strict=True)) or any(g.failure for g in made)


def test_forty_kills_lose_nothing(tmp_path: Path) -> None:
    rng = random.Random(7)
    images = [raw_image(tmp_path / f"{name}.raw", SIZE, fill=True) for name in "ab"]
    before = {i: image.read_bytes() for i, image in enumerate(images)}
    capture = Capture(tmp_path, [DiskOf("vda", images[0]), DiskOf("vdb", images[1])], journal_size=384 * MIB)
    with capture, guests(capture.socket_path, before, 100) as made:
        for kill in range(40):
            until(busy(made, rng.randrange(1, 60)), "the guests' writes")
            time.sleep(rng.random() * 0.004)
            capture.kill()
            if kill % 8 == 0:
                _check_the_dead(capture, images, before, made)
            capture.start()
        for guest in made:
            guest.finish()
            assert guest.reconnects >= 20
        assert capture.stop() == 0
    entries = list(journal_entries(capture.journal))
    disks = compose(entries, before)
    for index, image in enumerate(images):
        content = image.read_bytes()
        assert first_difference(content, made[index].acknowledged) is None, "the image is not what the guest wrote"
        assert first_difference(disks[index], content) is None, "history is not what the image holds"
    assert len(capture.events("capture.recovered")) == 40
    assert [entry.record.seq for entry in entries] == list(range(1, len(entries) + 1))


def _check_the_dead(capture: Capture, images: list[Path], before: dict[int, bytes], made: list[Guest]) -> None:
    """Between a death and the next start nothing moves: what was acknowledged is in the journal and in the image."""
    until(lambda: not any(guest.connected for guest in made), "the guests to notice")
    disks = compose(_whole(capture), before)
    for index, guest in enumerate(made):
        guest.check_acknowledged(disks[index])
        guest.check_acknowledged(images[index].read_bytes())


def _whole(capture: Capture) -> list[Entry]:
    """The journal's entries as the next capture will find them: a last batch without its payload is none."""
    entries: list[Entry] = []
    for file in segment_files(capture.journal, capture.run):
        with Segment(file.path) as segment:
            for batch in segment.batches():
                if not segment.intact(batch):
                    return entries
                entries += [Entry(r, segment.payload(r) if r.has_payload else b"") for r in records(batch)]
    return entries


# -- with the keeper


@contextmanager
def kept(directory: Path, images: list[Path]) -> Iterator[tuple[subprocess.Popen[bytes], Path, Path]]:
    """``vmrewind capture``; (its process, the NBD socket, the journal)."""
    toml = directory / "web01.toml"
    lines = ['name = "web01"', "[protection]", "enabled = true", 'journal = "journal"', 'journal_size = "256MiB"']
    for index, image in enumerate(images):
        lines += ["[[protection.disk]]", f'target = "vd{"ab"[index]}"', f'image = "{image.name}"']
    toml.write_text("\n".join(lines))
    command = [Path(sys.executable).parent / "vmrewind", "capture", toml]
    with open(directory / "stderr", "wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, (directory / "stderr").read_text()
        assert json.loads(line)["event"] == "ready"
        yield process, Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "web01" / "nbd.sock", directory / "journal"
    finally:
        process.terminate()
        try:
            process.wait(WAIT_SECONDS)
        finally:
            process.kill()
            process.stdout.close()


@pytest.mark.timeout(120)
def test_the_keeper_replaces_twenty_killed_captures_on_the_same_socket(tmp_path: Path) -> None:
    rng = random.Random(11)
    images = [raw_image(tmp_path / f"{name}.raw", SIZE, fill=True) for name in "ab"]
    before = {i: image.read_bytes() for i, image in enumerate(images)}
    keeper = Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "web01" / "keeper.json"
    killed: set[int] = set()

    def capture_pid() -> int | None:
        plain = json.loads(keeper.read_bytes())["capture"]
        return plain["pid"] if plain and plain["pid"] not in killed else None

    with kept(tmp_path, images) as (process, socket_path, journal):
        with guests(socket_path, before, 200) as made:
            for _ in range(20):
                pid = until(capture_pid, "the next capture")
                until(busy(made, rng.randrange(1, 30)), "the guests' writes")
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            for guest in made:
                guest.finish()
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
        (run,) = {file.run for file in segment_files(journal)}
        entries = list(journal_entries(journal, run))
        disks = compose(entries, before)
        for index, image in enumerate(images):
            assert first_difference(image.read_bytes(), made[index].acknowledged) is None
            assert first_difference(disks[index], made[index].acknowledged) is None
        assert entries[-1].record.flags == fmt.Event.STOP
        assert json.loads((journal / "head.json").read_bytes())["seq"] == entries[-1].record.seq
