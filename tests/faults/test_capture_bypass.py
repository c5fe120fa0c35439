"""``on_journal_full = "bypass"``: the guest writes on, the gap is declared, and closed once the journal takes records again."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.capture_tools import (
    MIB,
    RUN,
    Capture,
    Client,
    DiskOf,
    Entry,
    NbdError,
    compose,
    first_difference,
    journal_entries,
    raw_image,
    until,
)
from tests.fault_tools import FaultyCapture, ext4, is_root, make_read_only, on_disk
from vmrewind.capture.dirty import DirtyMap, granule_of
from vmrewind.capture.level import noted_level
from vmrewind.capture.policy import RUN_DONE
from vmrewind.capture.recovery import recover
from vmrewind.errors import CorruptionError
from vmrewind.journal import format as fmt
from vmrewind.journal.state import StatePage
from vmrewind.nbd import protocol as nbd

SIZE = 8 * MIB
QUOTA = 8 * MIB
CHUNK = 128 << 10
_BOOT_AT = 16
LEVELS = struct.Struct("<QQ")
"""Batch applied and batch checkpointed in capture.state."""
LEVELS_AT = 40


def capture_of(
    directory: Path, policy: str = "bypass", *, faulty: bool = False, journal: Path | None = None, size: int = QUOTA
) -> Any:
    images = [directory / "a.raw", directory / "b.raw"]
    for image in images:
        if not image.exists():
            raw_image(image, SIZE)
    kind = FaultyCapture if faulty else Capture
    capture = kind(directory, [DiskOf("vda", images[0]), DiskOf("vdb", images[1])], journal_size=size, full=policy)
    if journal is not None:
        capture.journal = journal
    return capture


def ship(capture: Capture, seq: int = RUN_DONE) -> None:
    temporary = capture.journal / "shipped.tmp"
    temporary.write_text(json.dumps({"runs": {fmt.run_name(RUN): seq}}))
    temporary.replace(capture.journal / "shipped.json")


def status(capture: Capture) -> dict[str, Any]:
    return capture.instruct(command="status")


def bypassing(capture: Capture) -> Any:
    return status(capture)["bypass"]


def fill(client: Client, mebibytes: int, seed: int = 0) -> None:
    """Writes in a small part of the disk, so that most of it stays as it is."""
    for i in range(mebibytes * MIB // CHUNK):
        client.write(i * CHUNK % (2 * MIB), (seed * 1000 + i).to_bytes(4, "little") * (CHUNK // 4))


def images(directory: Path) -> dict[int, bytes]:
    return {0: (directory / "a.raw").read_bytes(), 1: (directory / "b.raw").read_bytes()}


def check_history(directory: Path, entries: list[Entry]) -> None:
    composed = compose(entries, {0: bytes(SIZE), 1: bytes(SIZE)})
    for index, image in images(directory).items():
        assert first_difference(composed[index], image) is None, f"disk {index}"


def gaps(entries: list[Entry]) -> list[Entry]:
    kinds = (fmt.Event.GAP_BEGIN, fmt.Event.GAP_END)
    return [e for e in entries if e.record.op == fmt.Op.EVENT and e.record.flags in kinds]


def host_dies(journal: Path) -> None:
    """Of ``capture.state`` only what was synced counts: its applied batch is not looked at under another boot id."""
    with open(journal / "capture.state", "r+b") as file:
        file.seek(_BOOT_AT)
        file.write(os.urandom(16))


def test_the_guest_writes_on_and_the_gap_is_closed_once_there_is_room(tmp_path: Path) -> None:
    with capture_of(tmp_path) as capture, Client(capture.socket_path, "vda") as vda, Client(capture.socket_path, "vdb") as vdb:
        vdb.write(MIB, b"before" * 100)
        fill(vda, 12)
        before = bypassing(capture)
        assert before["dirty_bytes"] > 0 and not before["resyncing"]
        assert "segment" in before["cause"]
        vdb.write(3 * MIB, b"bypassed" * 100)
        vda.do(nbd.CMD_WRITE_ZEROES, 64 << 10, 64 << 10)
        vda.write(5 * MIB, b"with FUA", nbd.CMD_FLAG_FUA)
        vda.flush()
        assert capture.instruct(command="mark", name="inside")["kind"] == "space"
        resync = capture.instruct(command="resync", run=fmt.run_name(RUN), disk="vda", ranges=[], close=True)
        assert resync["kind"] == "vm-state", "the start's resync must not close this gap"
        begin = gaps(list(journal_entries(capture.journal)))
        assert [e.record.flags for e in begin] == [fmt.Event.GAP_BEGIN]
        assert json.loads(begin[0].payload.rstrip(b"\0"))["since_ns"] == before["since_ns"]
        at_begin = compose(list(journal_entries(capture.journal)), {0: bytes(SIZE), 1: bytes(SIZE)})
        assert at_begin[1][3 * MIB] == 0, "what was bypassed is in no record"

        ship(capture)
        until(lambda: bypassing(capture) is None, "the gap to be closed")
        vda.write(6 * MIB, b"after")
        assert capture.instruct(command="mark", name="outside")["ok"]
        assert capture.stop() == 0
    entries = list(journal_entries(capture.journal))
    assert [e.record.flags for e in gaps(entries)][-1] == fmt.Event.GAP_END
    assert {e.record.disk for e in gaps(entries)} == {fmt.ALL_DISKS}
    assert [e["event"] for e in capture.events() if e["event"].startswith("bypass")] == [
        "bypass.begin",
        "bypass.resync",
        "bypass.end",
    ]
    head = json.loads((capture.journal / "head.json").read_bytes())
    assert set(head["images"]) == {"vda", "vdb"} and "gap" not in head


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_time_around_a_bypass_nothing_answered_is_lost_and_the_gap_closes(tmp_path: Path, seed: int) -> None:
    """The storage fails and heals, capture dies, at random; the model is what was answered."""
    chance = random.Random(seed)
    model = {"vda": bytearray(SIZE), "vdb": bytearray(SIZE)}
    with capture_of(tmp_path, faulty=True, size=128 * MIB) as capture:
        for _ in range(10):
            clients = {target: Client(capture.socket_path, target) for target in model}
            for step in range(40):
                target = chance.choice(list(model))
                offset, length = chance.randrange(SIZE - CHUNK), chance.choice([512, 4096, 100_000])
                data = chance.randbytes(length)
                clients[target].write(offset, data)
                model[target][offset : offset + length] = data
                if step % 10 == 9:
                    chance.choice([capture.fail, capture.heal, lambda: capture.fail(errno.ENOSPC)])()
                if chance.random() < 0.1:
                    clients[target].flush()
            capture.heal()
            if chance.random() < 0.5:
                until(lambda: capture.events("bypass.resync"), "a resync")
            capture.kill()
            for client in clients.values():
                client.sock.close()
            capture.start()
            for target, client in ((t, Client(capture.socket_path, t)) for t in model):
                with client:
                    found = b"".join(client.read(at, MIB) for at in range(0, SIZE, MIB))
                assert first_difference(found, model[target]) is None, target
        until(lambda: bypassing(capture) is None, "the gap to be closed")
        assert capture.events("bypass.begin"), "or this test tests nothing"
        assert capture.stop() == 0
    last = [event["event"] for event in capture.events() if event["event"].startswith("bypass")][-1]
    assert last == "bypass.end"
    assert images(tmp_path) == {0: bytes(model["vda"]), 1: bytes(model["vdb"])}
    check_history(tmp_path, list(journal_entries(capture.journal)))


def test_the_dirty_extents_survive_sigkill_and_close_the_gap(tmp_path: Path) -> None:
    with capture_of(tmp_path, faulty=True) as capture:
        with Client(capture.socket_path) as client:
            client.write(0, b"journaled" * 1000)
            capture.fail()
            client.write(0, b"bypassed!" * 1000)
            client.write(4 * MIB, b"elsewhere" * 1000)
            dirty = bypassing(capture)["dirty_bytes"]
        capture.kill()
        capture.heal()
        capture.start()
        with Client(capture.socket_path) as client:
            assert client.read(0, 9000) == b"bypassed!" * 1000
            assert dirty == 2 * granule_of(SIZE)
        until(lambda: bypassing(capture) is None, "the gap to be closed")
        assert capture.stop() == 0
    entries = list(journal_entries(capture.journal))
    check_history(tmp_path, entries)
    begin, end = gaps(entries)
    # Before the gap every moment is as it was, behind it all is there again.
    before = compose(entries, {0: bytes(SIZE), 1: bytes(SIZE)}, begin.record.seq - 1)[0]
    assert before[:9000] == b"journaled" * 1000 and before[4 * MIB] == 0
    assert compose(entries, {0: bytes(SIZE), 1: bytes(SIZE)}, end.record.seq)[0] == images(tmp_path)[0]


def test_a_bypass_that_a_kill_interrupts_in_the_middle_of_its_resync(tmp_path: Path) -> None:
    with capture_of(tmp_path) as capture:
        with Client(capture.socket_path) as client:
            fill(client, 12)
            for at in range(2 * MIB, SIZE, CHUNK):
                client.write(at, os.urandom(CHUNK))
        for _ in range(3):
            begun = len(capture.events("bypass.resync"))
            ship(capture)
            until(lambda begun=begun: len(capture.events("bypass.resync")) > begun or not bypassing(capture), "the resync")
            capture.kill()
            capture.start()
            with Client(capture.socket_path) as client:
                client.write(random.Random(begun).randrange(SIZE - 4096), b"amid" * 1000)
        ship(capture)
        until(lambda: bypassing(capture) is None, "the gap to be closed")
        assert capture.stop() == 0
    with capture_of(tmp_path) as following:
        with Client(following.socket_path) as client:
            found = b"".join(client.read(at, MIB) for at in range(0, SIZE, MIB))
        assert found == images(tmp_path)[0]


def test_the_journal_fills_up_again_while_the_gap_is_being_closed(tmp_path: Path) -> None:
    with capture_of(tmp_path) as capture, Client(capture.socket_path) as client:
        fill(client, 12)
        for at in range(0, SIZE, CHUNK):
            client.write(at, at.to_bytes(4, "little") * (CHUNK // 4))
        # Room for a part of it only: the first segments, whose records are shipped.
        entries = list(journal_entries(capture.journal))
        ship(capture, entries[len(entries) // 4].record.seq)
        until(lambda: capture.events("bypass.resync"), "the resync")
        until(lambda: bypassing(capture)["dirty_bytes"] < SIZE, "some of it")
        fill(client, 4, seed=2)
        assert bypassing(capture) is not None
        assert len(gaps(list(journal_entries(capture.journal)))) <= 1, "it is the same gap"
        ship(capture)
        until(lambda: bypassing(capture) is None, "the gap to be closed")
        assert len(capture.events("bypass.begin")) == len(capture.events("bypass.end")) == 1
        fill(client, 1, seed=3)
        assert capture.stop() == 0


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_after_the_hosts_death_no_old_journal_is_put_over_what_a_bypass_had_flushed(tmp_path: Path, number: int) -> None:
    with capture_of(tmp_path, faulty=True) as capture:
        capture.describe_run()
        with Client(capture.socket_path) as client:
            client.write(0, b"old" * 1000)
            client.flush()
            state = StatePage(capture.journal)
            assert state.checkpoint < state.applied, "the host's death would replay it, or this test tests nothing"
            state.close()
            # What capture.state has on stable storage: its map's content is lost if it could not be synced.
            durable = (capture.journal / "capture.state").read_bytes()
            capture.fail(number)
            client.write(0, b"new" * 1000)
            client.flush()
        capture.kill()
        capture.heal()
    if number == errno.EIO:
        (capture.journal / "capture.state").write_bytes(durable)
    host_dies(capture.journal)
    recovered = recover(capture.journal)
    assert recovered is not None and recovered.host_died
    assert images(tmp_path)[0][:3000] == b"new" * 1000


def test_where_the_level_can_be_said_nowhere_a_flush_waits_and_writes_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "site"
    plugin.mkdir()
    (plugin / "sitecustomize.py").write_text("import os\ndef no(*_): raise OSError(95, 'not supported')\nos.setxattr = no\n")
    monkeypatch.setenv("PYTHONPATH", str(plugin), prepend=os.pathsep)
    with capture_of(tmp_path, faulty=True) as capture, Client(capture.socket_path) as client:
        client.write(0, b"old")
        capture.fail()
        client.write(0, b"new")
        client.sock.sendall(client.request(nbd.CMD_FLUSH))
        until(lambda: capture.events("flush.waits"), "the flush to wait")
        with Client(capture.socket_path) as other:
            other.write(4096, b"writes go on")
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.reply()
        client.sock.settimeout(30)
        capture.heal()
        assert client.reply()[1] == 0


def test_a_run_that_ends_bypassing_leaves_no_word_that_the_images_are_what_history_says(tmp_path: Path) -> None:
    with capture_of(tmp_path) as capture:
        with Client(capture.socket_path) as client:
            fill(client, 12)
        assert bypassing(capture)
        assert capture.stop() == 0
    entries = list(journal_entries(capture.journal))
    assert [e.record.flags for e in gaps(entries)] == [fmt.Event.GAP_BEGIN]
    assert entries[-1].record.flags == fmt.Event.STOP
    head = json.loads((capture.journal / "head.json").read_bytes())
    assert head["images"] == {} and "segment" in head["gap"]


def test_an_image_that_refuses_a_bypassed_write_answers_with_its_error(tmp_path: Path) -> None:
    with ext4(tmp_path, 24) if is_root() else pytest.skip("needs root") as mounted:
        sparse = mounted / "sparse.raw"
        raw_image(sparse, 64 * MIB)
        capture = Capture(tmp_path, [DiskOf("vda", sparse)], journal_size=QUOTA, full="bypass")
        with capture, Client(capture.socket_path) as client:
            fill(client, 12)
            assert bypassing(capture)
            for at in range(2 * MIB, 64 * MIB, CHUNK):
                if error := client.error(nbd.CMD_WRITE, at, data=b"x" * CHUNK):
                    break
            assert error == nbd.ENOSPC
            client.write(0, b"others are served")
            client.flush()
            ship(capture)
            until(lambda: bypassing(capture) is None, "the gap to be closed")
            image = sparse.read_bytes()
            assert capture.stop() == 0
        assert image[: len(b"others are served")] == b"others are served"


# -- every fault with every policy


class Writer:
    """A guest that writes on and on in a thread: what was answered is in ``answered``."""

    def __init__(self, capture: Capture) -> None:
        self._client = Client(capture.socket_path)
        self._stop = threading.Event()
        self.answered = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                number = self.answered + 1
                self._client.write(number % 64 * 4096, number.to_bytes(8, "little") * 512)
                if number % 50 == 0:
                    self._client.flush()
                self.answered = number
        except (OSError, NbdError) as error:
            self.error = error

    def goes_on(self, writes: int = 200) -> None:
        goal = self.answered + writes
        until(lambda: self.answered >= goal or self.error, "the guest to write on")
        assert self.error is None

    def end(self, error: type[Exception] | None = None) -> None:
        """Stop it, or find it stopped by ``error``: a connection that breaks without a reply is no error to a guest."""
        if error is None:
            self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._client.sock.close()
        assert self.error is None if error is None else isinstance(self.error, error)

    def check(self, image: Path) -> None:
        content = image.read_bytes()
        for number in range(max(1, self.answered - 63), self.answered + 1):
            at = number % 64 * 4096
            assert content[at : at + 4096] == number.to_bytes(8, "little") * 512


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("policy", ["drop-history", "bypass", "block"])
def test_storage_that_fails_for_a_while(tmp_path: Path, policy: str, number: int) -> None:
    with capture_of(tmp_path, policy, faulty=True) as capture:
        ship(capture)
        guest = Writer(capture)
        guest.goes_on()
        capture.fail(number)
        if policy == "bypass":
            until(lambda: bypassing(capture), "the bypass")
            guest.goes_on()
        else:
            until(lambda: status(capture)["journal_full"], "the hold")
        assert guest.error is None
        capture.heal()
        guest.goes_on()
        until(lambda: bypassing(capture) is None, "the gap to be closed")
        guest.end()
        capture.kill()
        guest.check(tmp_path / "a.raw")
        capture.start()
        assert capture.stop() == 0
    guest.check(tmp_path / "a.raw")
    if policy != "bypass":
        assert not gaps(list(journal_entries(capture.journal)))


@pytest.mark.skipif(not is_root(), reason="needs root: a file system of its own")
@pytest.mark.parametrize("policy", ["drop-history", "bypass", "block"])
def test_a_file_system_that_became_read_only(tmp_path: Path, policy: str) -> None:
    with ext4(tmp_path, 32) as mounted, capture_of(tmp_path, policy, journal=mounted / "journal") as capture:
        guest = Writer(capture)
        guest.goes_on()
        make_read_only(mounted)
        if policy == "bypass":
            until(lambda: bypassing(capture), "the bypass")
            guest.goes_on()
            guest.end()
            with open(tmp_path / "a.raw", "rb") as image:
                level = noted_level(image.fileno(), RUN)
            applied, _ = LEVELS.unpack_from((mounted / "journal" / "capture.state").read_bytes(), LEVELS_AT)
            _, checkpoint = LEVELS.unpack_from(on_disk(tmp_path, "journal/capture.state"), LEVELS_AT)
            assert max(level, checkpoint) == applied, "said on stable storage, where it could still be said"
            capture.stop()
            assert capture.events("capture.unclean-stop")
            assert not (mounted / "journal" / "head.json").exists()
        else:
            until(lambda: status(capture)["journal_full"], "the hold")
            assert guest.error is None
            capture.kill()
            guest.end(ConnectionError)
        guest.check(tmp_path / "a.raw")


@pytest.mark.parametrize("policy", ["drop-history", "bypass", "block"])
def test_a_journal_directory_deleted_under_way(tmp_path: Path, policy: str) -> None:
    with capture_of(tmp_path, policy) as capture:
        guest = Writer(capture)
        guest.goes_on()
        while capture.journal.exists():
            # The guest goes on meanwhile: files are renamed under the deleting hand.
            shutil.rmtree(capture.journal, ignore_errors=True)
        until(lambda: status(capture)["journal_deleted"], "it to be noticed")
        assert capture.events("journal.deleted")
        if policy == "bypass":
            guest.goes_on()
            guest.end()
        else:
            until(lambda: status(capture)["journal_full"], "the hold")
            assert guest.error is None
        capture.kill()
        if policy != "bypass":
            guest.end(ConnectionError)
        guest.check(tmp_path / "a.raw")
        # Another journal at that place is none of this run's.
        if policy == "bypass":
            capture.start()
            with Client(capture.socket_path) as client:
                client.write(7 * MIB, b"still served")
                client.flush()
            assert bypassing(capture)["dirty_bytes"]
            capture.stop()
            assert list(journal_entries(capture.journal)) == []
            assert not (capture.journal / "head.json").exists()
        else:
            with pytest.raises(CorruptionError, match="deleted while the VM was running"):
                capture.start()


# -- the map


def test_the_dirty_map_holds_what_was_marked(tmp_path: Path) -> None:
    sizes = {0: 3 * MIB + 512, 1: 40 << 40}
    dirty = DirtyMap(tmp_path / "map", 7, sizes)
    assert granule_of(sizes[1]) * (1 << 24) >= sizes[1]
    dirty.begin("why", 5)
    chance = random.Random(3)
    marked: dict[int, set[int]] = {0: set(), 1: set()}
    for index, size in sizes.items():
        granule = granule_of(size)
        for length in (1, 512, granule, 3 * granule + 1, min(size, 3000 * granule)):
            offset = chance.randrange(size - length + 1)
            dirty.mark(index, offset, length)
            marked[index] |= set(range(offset // granule, (offset + length - 1) // granule + 1))
    again = DirtyMap(tmp_path / "map", 7, sizes)
    assert (again.cause, again.since_ns) == ("why", 5)
    assert again.dirty_bytes == dirty.dirty_bytes == sum(len(m) * granule_of(sizes[i]) for i, m in marked.items())
    for index, size in sizes.items():
        found = set()
        while (piece := again.first(index)) is not None:
            assert piece[0] + piece[1] <= size
            found.add(piece[0] // granule_of(size))
            again.clear(index, piece[0])
        assert found == marked[index]
    assert again.dirty_bytes == 0
    assert DirtyMap(tmp_path / "map", 8, sizes).cause == "", "another run's map says nothing"
