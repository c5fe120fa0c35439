"""A bad sector in the journal: what ship carries all the same, and what ``journal verify`` and ``journal dump`` say."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.bad_sectors import PAGE, bad_sector, unreadable
from tests.history_tools import exit_code_of_main
from tests.ship_support import MIB, VM, WrittenJournal, covered, shipped
from vmrewind.errors import CorruptionError
from vmrewind.journal import format as fmt
from vmrewind.journal import reader
from vmrewind.journal.reader import Segment, records, segment_files
from vmrewind.journal.runs import Position
from vmrewind.journal.verify import verify
from vmrewind.repository.repository import Repository, VmRepository
from vmrewind.ship import patience, process
from vmrewind.ship.carrier import Carrier, Pulled
from vmrewind.ship.cursor import Cursor, Hole, has_records
from vmrewind.ship.instructions import Instructions
from vmrewind.ship.meter import unsent
from vmrewind.ship.patience import UnreadableNow
from vmrewind.ship.plan import Entry
from vmrewind.ship.shipper import Shipper

DISKS = ("vda", "vdb")
LONG = 6 * PAGE


class Place:
    """Three segments of a few batches, and a repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.written = WrittenJournal(root / "journal")
        self.written.describe()
        for number in (1, 2, 3):
            for byte in range(4):
                self.written.batch([(fmt.Op.WRITE, n % 2, bytes([number, byte, n]) * (LONG // 3)) for n in range(2)])
            if number < 3:
                self.written.batch([(fmt.Op.DISCARD, 0, bytes(MIB))])
                self.written.writer._roll(0)
        self.vm: VmRepository = Repository.init(str(root / "repository")).vm(VM)
        self.shipper = Shipper(VM, self.written.journal, str(root / "repository"), root / "vm")

    @property
    def last_seq(self) -> int:
        return self.written.truth[-1].seq

    def path(self, number: int) -> Path:
        return segment_files(self.written.journal)[number - 1].path

    def drain(self) -> None:
        while self.shipper.step(DISKS, hurry=True) == 0.0:
            pass
        self.shipper.settle()

    def seqs(self) -> list[int]:
        """What the repository has."""
        return sorted({record.seq for disk in (0, 1) for record in shipped(self.vm, 7, disk)})

    def holes(self) -> list[tuple[int, int, str]]:
        path = self.root / "vm" / "events" / f"{7:016x}.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [(event["first_seq"], event["last_seq"], event["cause"]) for event in events if event["event"] == "ship.hole"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def batch_of(path: Path, which: int) -> tuple[int, int, int, int]:
    """(position, payload position, first and last seq) of a batch in a segment."""
    with Segment(path) as segment:
        batch = list(segment.batches())[which]
        return batch.position, batch.payload_position, batch.first_seq, batch.last_seq


def middle(path: Path, which: int) -> int:
    """Where nothing but the payload of a batch's first record lies."""
    return batch_of(path, which)[1] + 2 * PAGE


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("part", ["header", "table", "payload"])
def test_ship_carries_what_lies_before_and_waits(place: Place, number: int, part: str) -> None:
    path = place.path(number)
    position, _, first, _ = batch_of(path, 0 if part == "header" else 2)
    with bad_sector(path, {"header": 0, "table": position, "payload": middle(path, 2)}[part]):
        for _ in range(3):
            with pytest.raises(OSError, match=rf"Errno 5\] cannot be read at offset \d+: Input/output error: .*{path.name}"):
                place.drain()
            place.shipper.reset()
        # A page of the table before may be lost with a batch: the records of one more.
        assert first - 3 <= len(place.seqs()) < first and place.seqs() == list(range(1, len(place.seqs()) + 1))
    place.drain()
    assert place.seqs() == list(range(1, place.last_seq + 1)) and place.holes() == []
    assert covered(place.vm, 7, 0) == [(1, place.last_seq)]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("part", ["header", "table", "payload"])
def test_in_the_end_it_is_a_hole_and_nothing_else_is_missing(
    place: Place, number: int, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "UNREADABLE_SECONDS", 0.0)
    place.shipper = Shipper(VM, place.written.journal, place.vm.repository.url, place.root / "vm")
    path = place.path(number)
    position, _, first, last = batch_of(path, 2)
    with bad_sector(path, {"header": 0, "table": position, "payload": middle(path, 2)}[part]):
        place.drain()
    (hole,) = place.holes()
    behind = batch_of(place.path(number + 1), 0)[2]
    match part:
        case "header":
            assert (hole[0], hole[1]) == (batch_of(path, 0)[2], behind - 1)
        case "table":
            assert first - 2 <= hole[0] <= first and hole[1] == behind - 1
        case _:
            assert hole[:2] == (first, last)
    assert "cannot be read" in hole[2] and "at offset" in hole[2] and "Input/output error" in hole[2]
    lost = range(hole[0], hole[1] + 1)
    assert place.seqs() == [seq for seq in range(1, place.last_seq + 1) if seq not in lost]


@pytest.mark.parametrize("part", ["header", "table", "payload"])
def test_in_the_newest_segment_it_is_told_until_there_is_another(place: Place, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "UNREADABLE_SECONDS", 0.0)
    place.shipper = Shipper(VM, place.written.journal, place.vm.repository.url, place.root / "vm")
    path = place.path(3)
    position, _, first, _ = batch_of(path, 3)
    with bad_sector(path, {"header": 0, "table": position, "payload": middle(path, 3)}[part]):
        with pytest.raises(CorruptionError, match=f"{path.name}.*cannot be read at offset .*: Input/output error"):
            place.drain()
        before = place.seqs()
        assert before and before[-1] < first
        place.written.writer._roll(0)
        place.written.batch([(fmt.Op.WRITE, 0, b"later")])
        place.shipper.reset()
        place.drain()
    assert place.seqs() == [*before, place.last_seq] and place.holes()[0][:2] == (before[-1] + 1, place.last_seq - 1)


class Clock:
    """Time that ship's patience goes by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(patience, "time", self)

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def tried(place: Place) -> bool:
    """Ship as its process does; whether it got through."""
    try:
        place.drain()
    except OSError:
        place.shipper.reset()
        return False
    return True


@pytest.mark.parametrize("part", ["header", "table", "payload"])
@pytest.mark.parametrize("tried_meanwhile", [False, True])
def test_what_failed_twice_has_not_failed_all_the_time(place: Place, clock: Clock, part: str, tried_meanwhile: bool) -> None:
    path = place.path(2)
    offset = {"header": 0, "table": batch_of(path, 2)[0], "payload": middle(path, 2)}[part]
    with bad_sector(path, offset):
        assert not tried(place)
    if tried_meanwhile:  # and the repository is away: nothing of it is shipped
        carrier = Carrier(place.written.journal, Entry(7, 1, None, 3, frozenset(DISKS)), place.shipper._patience, growing=True)
        while carrier.pull() is not Pulled.WAITING:
            carrier.next_from(carrier.gathered.last + 1)
        carrier.cursor.release()
    clock.seconds += patience.UNREADABLE_SECONDS + 1
    with bad_sector(path, offset):
        assert not tried(place)
    assert tried(place) and place.holes() == [] and place.seqs() == list(range(1, place.last_seq + 1))


@pytest.mark.parametrize("part", ["header", "table", "payload"])
def test_what_can_be_read_every_other_time_is_no_damage(place: Place, clock: Clock, part: str) -> None:
    path = place.path(2)
    offset = {"header": 0, "table": batch_of(path, 2)[0], "payload": middle(path, 2)}[part]

    def looked() -> int:
        """How far the journal is read, nothing of it being shipped."""
        entry = Entry(7, 1, None, 3, frozenset(DISKS))
        carrier = Carrier(place.written.journal, entry, place.shipper._patience, growing=True)
        try:
            while (pulled := carrier.pull()) is not Pulled.WAITING:
                assert not isinstance(pulled, Hole), clock.seconds
                carrier.next_from(carrier.gathered.last + 1)
            return carrier.gathered.last
        finally:
            carrier.cursor.release()

    for _ in range(15):
        with bad_sector(path, offset), pytest.raises(UnreadableNow):
            looked()
        clock.seconds += 30
        assert looked() == place.last_seq
        clock.seconds += 30


def test_bad_sectors_side_by_side_are_waited_for_once(place: Place, clock: Clock) -> None:
    path = place.path(2)
    with contextlib.ExitStack() as bad:
        for which in range(4):
            bad.enter_context(bad_sector(path, middle(path, which)))
        began = clock.seconds
        while not tried(place):
            clock.seconds += 30
        assert patience.UNREADABLE_SECONDS <= clock.seconds - began <= patience.UNREADABLE_SECONDS + 60
    assert len(place.holes()) == 4


def test_what_is_unreadable_of_another_disk_is_no_hole(place: Place) -> None:
    path = place.path(2)
    with Segment(path) as segment:
        _, other = records(list(segment.batches())[2])
    assert other.disk == 1
    with bad_sector(path, other.position + 2 * PAGE):
        while place.shipper.step(("vda",), hurry=True) == 0.0:
            pass
        place.shipper.settle()
    assert place.holes() == [] and shipped(place.vm, 7, 0) == place.written.of(0)


@pytest.mark.parametrize("on_branch", [True, False])
def test_another_runs_bad_sector_holds_up_only_what_needs_it(place: Place, clock: Clock, on_branch: bool) -> None:
    last = place.written.truth[-1]
    parent = Position(7, last.seq, last.time_ns) if on_branch else None
    newer = WrittenJournal(place.written.journal, 8, first_seq=last.seq + 1, parent=parent, bases=() if on_branch else None)
    newer.describe()
    for number in range(20):
        newer.batch([(fmt.Op.WRITE, n % 2, bytes([number, n]) * 2000) for n in range(2)])
    path = place.path(2)
    with bad_sector(path, middle(path, 1)):
        if on_branch:
            assert not tried(place) and not shipped(place.vm, 8, 0)
        else:
            assert tried(place) and shipped(place.vm, 8, 0) == newer.of(0)
            assert path.name in (place.shipper.waits_for or "")
        before = place.seqs()
        clock.seconds += 30
        assert tried(place) is not on_branch and place.seqs() == before
    place.shipper._unreadable_until = 0.0  # half a minute later
    assert tried(place) and place.shipper.waits_for is None and place.holes() == []
    assert shipped(place.vm, 7, 0) == place.written.of(0) and shipped(place.vm, 8, 1) == newer.of(1)


def test_a_file_under_another_segments_name_holds_nobody_up(place: Place) -> None:
    shutil.copy(place.path(2), place.written.journal / fmt.segment_name(7, 4))
    place.drain()
    assert place.seqs() == list(range(1, place.last_seq + 1)) and place.holes() == []
    left = unsent(VM, place.written.journal, DISKS)
    assert left is None or left.counted
    place.written.batch([(fmt.Op.WRITE, 0, b"later")])
    place.drain()
    assert place.seqs()[-1] == place.last_seq


def test_what_cannot_be_read_may_be_records(place: Place) -> None:
    with contextlib.ExitStack() as bad:
        for number in (1, 2, 3):
            bad.enter_context(bad_sector(place.path(number), 0))
        assert has_records(place.written.journal, 7)


def test_who_may_open_no_more_files_waits(place: Place, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files", "it")

    for _ in range(40):
        with monkeypatch.context() as patch:
            patch.setattr(reader.os, "open", no_more)
            with pytest.raises(OSError, match="Too many open files") as raised:
                Cursor(place.written.journal, 7, 1, growing=True, patience=place.shipper._patience).read()
        assert not isinstance(raised.value, UnreadableNow)
        clock.seconds += 30
    assert tried(place) and place.holes() == []


def finished(place: Place) -> int:
    """The exit code of the process that carries what a stopped VM left."""
    (place.root / "vm").mkdir(exist_ok=True)
    (place.root / "vm/ship.json").write_text(json.dumps({"disks": list(DISKS)}))
    (place.root / "run").mkdir(exist_ok=True)
    return process.main(
        f"--vm {VM} --journal {place.written.journal} --repository {place.vm.repository.url} --state {place.root / 'vm'}"
        f" --runtime {place.root / 'run'} --finish".split()
    )


@pytest.mark.parametrize("which", [2, 3])
def test_what_a_stopped_vm_left_is_carried_around_a_bad_sector(
    place: Place, which: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "UNREADABLE_SECONDS", 0.2)
    monkeypatch.setattr(process, "RETRY_SECONDS_MAX", 0.1)
    path = place.path(3)
    first, last = batch_of(path, which)[2:]
    with bad_sector(path, middle(path, which)):
        code = finished(place)
    said = capfd.readouterr().err
    assert path.name in said and "cannot be read at offset" in said
    if which == 2:
        assert code == 0 and place.holes()[0][:2] == (first, last)
        assert place.seqs() == [seq for seq in range(1, place.last_seq + 1) if not first <= seq <= last]
    else:  # Behind the last one is nothing that tells whether it was whole.
        assert code == CorruptionError.exit_code and place.holes() == []
        assert place.seqs() == list(range(1, first))
        assert finished(place) == 0 and place.seqs() == list(range(1, place.last_seq + 1))


def test_ship_does_without_its_log_and_with_the_instructions_it_had(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.root / "vm/events").mkdir(parents=True)
    instructed = place.root / "vm/ship.json"
    instructed.write_text(json.dumps({"disks": list(DISKS)}))
    instructions = Instructions(instructed)
    assert instructions.read().disks == DISKS
    unreadable(instructed)
    assert [instructions.read().disks for _ in range(3)] == [DISKS] * 3
    assert capsys.readouterr().err.count("ship.json: it cannot be read: Input/output error; going on as before") == 1
    monkeypatch.setattr(patience, "UNREADABLE_SECONDS", 0.0)
    place.shipper = Shipper(VM, place.written.journal, place.vm.repository.url, place.root / "vm")
    unreadable(place.root / "vm/events" / f"{7:016x}.jsonl")
    with bad_sector(place.path(2), middle(place.path(2), 2)):
        place.drain()
    assert len(place.seqs()) == place.last_seq - 2 and "cannot be shipped" in capsys.readouterr().err


def test_verify_names_every_page_that_cannot_be_read(place: Place) -> None:
    for number in (1, 2, 3):
        path = place.path(number)
        _, _, _, last = batch_of(path, -1)
        with Segment(path) as segment:
            end = list(segment.batches())[-1].end
        for page in range(0, end, PAGE):
            with bad_sector(path, page):
                reports = {report.path: report for report in verify([place.written.journal])}
            harmed = reports.pop(path)
            assert not any(report.problems for report in reports.values()), page
            assert any("cannot be read: Input/output error" in problem.message for problem in harmed.problems), page
            assert harmed.torn is None
            for problem in harmed.problems:
                assert abs(problem.offset - page) <= PAGE + LONG or problem.offset <= page, (page, problem)
            if page and not any("payload" in problem.message for problem in harmed.problems):
                assert harmed.last_seq < last
    assert not any(report.problems or report.torn for report in verify([place.written.journal]))


def test_a_bad_sector_beside_other_damage_hides_nothing(place: Place) -> None:
    path = place.path(2)
    with Segment(path) as segment:
        first, second = records(list(segment.batches())[1])
    with path.open("r+b") as file:
        file.seek(second.position + 100)
        file.write(b"?")
    with bad_sector(path, first.position + 2 * PAGE):
        report = next(report for report in verify([place.written.journal]) if report.path == path)
    assert [problem.message.split("record ")[1] for problem in report.problems] == [
        f"{first.seq} cannot be read: Input/output error ({LONG} bytes)",
        f"{second.seq} does not match its checksum ({LONG} bytes)",
    ]


def test_what_lies_behind_a_damaged_batch_is_found_behind_bad_sectors_too(place: Place) -> None:
    path = place.path(2)
    position, _, _, _ = batch_of(path, 1)
    begin, last = batch_of(path, 2)[0], batch_of(path, -1)
    pages = range(position // PAGE * PAGE + PAGE, last[0] // PAGE * PAGE, PAGE)
    with path.open("r+b") as file:
        file.seek(position + fmt.BATCH.size + 3)
        file.write(b"?")
    for page in pages:
        with bad_sector(path, page):
            (report,) = verify([path])
        (problem,) = report.problems
        assert problem.offset == position and "is not valid here" in problem.message, page
        found = int(problem.message.rpartition(" ")[2])
        # It is the next one unless its header lies in the bad page or reaches into it.
        assert found == begin or page in range(begin - fmt.BATCH.size - PAGE, begin + fmt.BATCH.size + fmt.RECORD.size * 2), page


@pytest.mark.parametrize("part", ["header", "table", "payload"])
def test_the_commands_name_the_file(
    place: Place, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place.path(2)
    with bad_sector(path, {"header": 0, "table": batch_of(path, 2)[0], "payload": middle(path, 2)}[part]):
        for command in ("verify", "dump"):
            monkeypatch.setattr(sys, "argv", ["vmrewind", "journal", command, str(place.written.journal)])
            # A dump shows no payloads.
            harmless = command == "dump" and part == "payload"
            assert exit_code_of_main() == (0 if harmless else CorruptionError.exit_code)
            said = "".join(capsys.readouterr())
            assert harmless or (path.name in said and "cannot be read" in said and "Input/output error" in said)
            assert place.path(3).name in said or command == "dump"
