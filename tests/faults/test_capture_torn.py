"""What a death leaves at the journal's end: wherever it is torn, image and journal come to agree, and both stay that way."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash

from tests.capture_tools import MIB, RUN, Capture, Client, DiskOf, Entry, compose, first_difference, journal_entries, raw_image
from vmrewind.capture.recovery import Recovered, find_end, recover
from vmrewind.errors import CorruptionError, ImageError
from vmrewind.journal import format as fmt
from vmrewind.journal.reader import Batch, Segment, records, segment_files
from vmrewind.journal.state import StatePage
from vmrewind.journal.verify import verify
from vmrewind.nbd import protocol as nbd

SIZE = 2 * MIB
ANOTHER_BOOT = 16
"""Offset of the boot id in capture.state."""


@dataclass
class Dead:
    """A journal and an image as a killed capture left them, and every batch of its run."""

    directory: Path
    before: bytes
    batches: list[tuple[Path, Batch]]
    entries: list[Entry]

    @property
    def journal(self) -> Path:
        return self.directory / "journal"

    @property
    def image(self) -> Path:
        return self.directory / "a.raw"

    def disk_after(self, batch: int) -> bytearray:
        """The disk after a batch, by number."""
        last = self.batches[batch - 1][1].last_seq if batch else 0
        return compose(self.entries, {0: self.before}, last)[0]

    def set_state(self, *, applied: int, checkpoint: int = 0, other_boot: bool = False) -> None:
        state = StatePage(self.journal)
        state.set_applied(applied)
        state.set_checkpoint(checkpoint)
        state.close()
        if other_boot:
            with open(self.journal / "capture.state", "r+b") as file:
                file.seek(ANOTHER_BOOT)
                file.write(os.urandom(16))
        self.date_image(0)

    def date_image(self, seconds: float) -> None:
        """Let the image's last change be that long after capture's last sign of life."""
        signs = [self.journal / "capture.state", *(file.path for file in segment_files(self.journal))]
        ns = max(path.stat().st_mtime_ns for path in signs) + int(seconds * 1e9)
        os.utime(self.image, ns=(ns, ns))

    @contextmanager
    def copy(self, scratch: Path) -> Iterator[Dead]:
        """The same in a directory of its own, where the run's description names the copied image."""
        shutil.copytree(self.directory, scratch)
        batches = [(scratch / path.relative_to(self.directory), batch) for path, batch in self.batches]
        made = Dead(scratch, self.before, batches, self.entries)
        named = Capture(scratch, [DiskOf("vda", made.image)])
        named.describe_run()
        named.close()
        yield made
        shutil.rmtree(scratch)

    def check_recovered(self, batch: int, *, host_died: bool = False) -> Recovered:
        """``recover`` brings image and journal to the moment after ``batch``; doing it again changes nothing."""
        recovered = recover(self.journal)
        assert recovered is not None
        assert recovered.host_died == host_died
        assert recovered.position.seq == self.batches[batch - 1][1].last_seq
        assert first_difference(self.image.read_bytes(), self.disk_after(batch)) is None
        entries = list(journal_entries(self.journal))
        assert entries[-1].record.seq == recovered.position.seq, "every reader finds the same end"
        assert entries[-1].record.time_ns == recovered.position.time_ns
        again = recover(self.journal)
        assert again is not None
        assert (again.position, again.records_applied) == (recovered.position, 0)
        return recovered


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Dead]]:
    """Makes runs that were killed after some batches in segments of 1 MiB."""
    made: dict[int, Dead] = {}

    def make(count: int) -> Dead:
        if count not in made:
            made[count] = _make(tmp_path_factory.mktemp(f"dead-{count}"), count)
        return made[count]

    yield make


def _make(directory: Path, count: int) -> Dead:
    rng = random.Random(count)
    image = raw_image(directory / "a.raw", SIZE, fill=True)
    before = image.read_bytes()
    with Capture(directory, [DiskOf("vda", image)], journal_size=8 * MIB) as capture, Client(capture.socket_path) as client:
        for i in range(count):
            offset = rng.randrange(SIZE - 70_000)
            if i % 7 == 5:
                client.do(nbd.CMD_TRIM, offset, rng.randrange(1, 50_000))
            # Several requests at once, so that batches have several records.
            requests = [
                client.request(nbd.CMD_WRITE, offset + 2000 * n, data=rng.randbytes(rng.randrange(1, 3000))) for n in range(4)
            ]
            requests.append(client.request(nbd.CMD_WRITE, offset, data=rng.randbytes(60_000)))
            client.sock.sendall(b"".join(requests))
            for _ in requests:
                assert client.reply()[1] == 0
        capture.kill()
    entries = list(journal_entries(capture.journal))
    batches = []
    for file in segment_files(capture.journal):
        with Segment(file.path) as segment:
            batches += [(file.path, batch) for batch in segment.batches()]
    return Dead(directory, before, batches, entries)


def last_batch(dead: Dead) -> tuple[Path, Batch]:
    return dead.batches[-1]


def damage(path: Path, start: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


def sectors(batch: Batch) -> list[int]:
    """The offsets at which a disk may have stopped writing the batch: its start and every 512 bytes' boundary in it."""
    return [batch.position, *range((batch.position | 511) + 1, batch.end, 512)]


@pytest.mark.parametrize("how", ["zeroes", "garbage", "older content", "one sector"])
def test_a_batch_torn_anywhere_never_happened(template: Callable[[int], Dead], tmp_path: Path, how: str) -> None:
    """Capture died in its write to the journal: the image has nothing of it."""
    dead = template(6)
    _, batch = last_batch(dead)
    number = batch.number
    rng = random.Random(5)
    with dead.copy(tmp_path / "dead") as copy:
        torn = copy.batches[-1][0]
        whole = torn.read_bytes()
        earlier = copy.batches[0][1]
        for cut in sectors(batch):
            torn.write_bytes(whole)
            stop = batch.end if how != "one sector" else min(cut + 512, batch.end)
            match how:
                case "zeroes":
                    rubbish = bytes(stop - cut)
                case "older content":
                    rubbish = (whole[earlier.position : earlier.end] * 9)[: stop - cut]
                case _:
                    rubbish = rng.randbytes(stop - cut)
            damage(torn, cut, rubbish)
            copy.image.write_bytes(copy.disk_after(number - 1))
            copy.set_state(applied=number - 1)
            copy.check_recovered(number - 1)


def test_a_batch_that_is_whole_but_was_not_applied_is_applied(template: Callable[[int], Dead], tmp_path: Path) -> None:
    with template(6).copy(tmp_path / "dead") as copy:
        number = len(copy.batches)
        rng = random.Random(9)
        for missing in range(number):
            disk = copy.disk_after(missing)
            ahead = copy.disk_after(number)
            for _ in range(30):
                # The last batches were under way: some of their sectors are in the image, some are not.
                at = rng.randrange(SIZE // 512) * 512
                disk[at : at + 512] = ahead[at : at + 512]
            copy.image.write_bytes(disk)
            copy.set_state(applied=missing)
            recovered = copy.check_recovered(number)
            assert (recovered.records_applied > 0) == (missing < number)


@pytest.mark.parametrize("checkpoint", [0, 1, 20, 43, 44])
def test_after_the_hosts_death_the_journal_is_replayed_from_the_checkpoint(
    template: Callable[[int], Dead], tmp_path: Path, checkpoint: int
) -> None:
    """Several segments; the image is as the checkpoint left it, but for pages that the kernel had written back already."""
    dead = template(40)
    assert len(segment_files(dead.journal)) >= 3
    rng = random.Random(checkpoint)
    with dead.copy(tmp_path / "dead") as copy:
        number = len(copy.batches)
        disk, ahead = copy.disk_after(checkpoint), copy.disk_after(number)
        for page in rng.sample(range(SIZE // 4096), 150):
            disk[page * 4096 : page * 4096 + 4096] = ahead[page * 4096 : page * 4096 + 4096]
        copy.image.write_bytes(disk)
        copy.set_state(applied=number, checkpoint=checkpoint, other_boot=True)
        copy.check_recovered(number, host_died=True)


def test_after_the_hosts_death_any_unsynced_batch_may_be_torn(template: Callable[[int], Dead], tmp_path: Path) -> None:
    """The prefix ends at the first that is, wherever in the journal that is; what lies behind it is not replayed."""
    dead = template(40)
    rng = random.Random(3)
    with dead.copy(tmp_path / "dead") as copy:
        originals = {path: path.read_bytes() for path, _ in copy.batches}
        checkpoint = 10
        for _ in range(25):
            victim = rng.randrange(checkpoint + 1, len(copy.batches) + 1)
            path, batch = copy.batches[victim - 1]
            for original, content in originals.items():
                original.write_bytes(content)
            at = rng.choice(sectors(batch))
            damage(path, at, rng.randbytes(min(512, batch.end - at)))
            copy.image.write_bytes(copy.disk_after(checkpoint))
            copy.set_state(applied=len(copy.batches), checkpoint=checkpoint, other_boot=True)
            recovered = recover(copy.journal)
            assert recovered is not None
            assert recovered.host_died
            assert recovered.position.seq == copy.batches[victim - 2][1].last_seq
            assert first_difference(copy.image.read_bytes(), copy.disk_after(victim - 1)) is None


@pytest.mark.parametrize("header", ["zeroes", "recycled", "garbage"])
def test_after_the_hosts_death_a_segments_header_may_be_missing(
    template: Callable[[int], Dead], tmp_path: Path, header: str
) -> None:
    """Its new name reached the disk, its content did not."""
    dead = template(40)
    with dead.copy(tmp_path / "dead") as copy:
        files = segment_files(copy.journal)
        first, last = files[0].path.read_bytes(), files[-1].path
        last.write_bytes({"zeroes": bytes(MIB), "recycled": first, "garbage": os.urandom(MIB)}[header])
        end = next(i for i, (path, _) in enumerate(copy.batches) if path == last)
        copy.image.write_bytes(copy.disk_after(3))
        copy.set_state(applied=len(copy.batches), checkpoint=3, other_boot=True)
        recovered = recover(copy.journal)
        assert recovered is not None
        assert recovered.position.seq == copy.batches[end - 1][1].last_seq
        assert first_difference(copy.image.read_bytes(), copy.disk_after(end)) is None


def test_a_segment_that_was_just_begun_is_the_end(template: Callable[[int], Dead], tmp_path: Path) -> None:
    """Killed between a segment's header and its first batch."""
    dead = template(40)
    with dead.copy(tmp_path / "dead") as copy:
        last = segment_files(copy.journal)[-1].path
        first = next(i for i, (path, _) in enumerate(copy.batches) if path == last)
        with open(last, "r+b") as file:
            file.seek(fmt.SEGMENT_HEADER_SIZE)
            file.write(bytes(MIB - fmt.SEGMENT_HEADER_SIZE))
        for verify_after in (0, first, 1 << 64):
            end = find_end(copy.journal, RUN, verify_after)
            assert end is not None
            assert (end.segment, end.position) == (last, fmt.SEGMENT_HEADER_SIZE)
            assert (end.next_batch, end.next_seq) == (first + 1, copy.batches[first - 1][1].last_seq + 1)
        copy.image.write_bytes(copy.disk_after(first))
        copy.set_state(applied=first)
        with Capture(copy.directory, [DiskOf("vda", copy.image)], journal_size=8 * MIB) as capture:
            with Client(capture.socket_path) as client:
                client.write(0, b"goes on")
            entries = list(journal_entries(capture.journal))
        assert entries[-1].payload == b"goes on"
        assert entries[-1].record.seq == copy.batches[first - 1][1].last_seq + 1


@pytest.mark.parametrize("keep", [0, 1, 3, 40])
def test_a_capture_that_goes_on_writes_over_the_torn_batch(template: Callable[[int], Dead], tmp_path: Path, keep: int) -> None:
    """The same batch number, other content, shorter: what is left of the torn one behind it must not come to life."""
    dead = template(6)
    with dead.copy(tmp_path / "dead") as copy:
        path, batch = last_batch(copy)
        number = batch.number
        cut = sectors(batch)[keep]
        damage(path, cut, os.urandom(min(512, batch.end - cut)))
        copy.image.write_bytes(copy.disk_after(number - 1))
        copy.set_state(applied=number - 1)
        with Capture(copy.directory, [DiskOf("vda", copy.image)], journal_size=8 * MIB) as capture:
            assert capture.ready["seq"] == copy.batches[-2][1].last_seq
            with Client(capture.socket_path) as client:
                for i in range(20):
                    client.write(i * 5000, bytes([i]) * (i + 1))
                    after = list(journal_entries(capture.journal))
                    assert after[-1].record.seq == copy.batches[-2][1].last_seq + i + 1
                    assert first_difference(compose(after, {0: copy.before})[0], copy.image.read_bytes()) is None
            assert capture.stop() == 0


def test_damage_in_what_was_applied_is_never_written_over(template: Callable[[int], Dead], tmp_path: Path) -> None:
    """Not torn: damaged. A capture that went on there would leave a hole that nobody could see."""
    dead = template(6)
    with dead.copy(tmp_path / "dead") as copy:
        path, batch = copy.batches[2]
        damage(path, batch.position + 20, b"\xff")
        copy.set_state(applied=len(copy.batches))
        before = path.read_bytes()
        with pytest.raises(CorruptionError, match=f"damaged at {path.name}, offset {batch.position}"):
            Capture(copy.directory, [DiskOf("vda", copy.image)], journal_size=8 * MIB).start()
        assert path.read_bytes() == before
        recovered = recover(copy.journal)
        assert recovered is not None
        assert recovered.position.seq == copy.batches[1][1].last_seq, "from here on there is a gap, which the start declares"


def test_a_run_without_a_durable_record_never_was(template: Callable[[int], Dead], tmp_path: Path) -> None:
    """The host died within the first second."""
    with template(6).copy(tmp_path / "dead") as copy:
        for path in {path for path, _ in copy.batches}:
            path.write_bytes(bytes(MIB))
        copy.set_state(applied=5, other_boot=True)
        assert recover(copy.journal) is None


def test_a_run_whose_records_are_all_unreadable_is_an_error(template: Callable[[int], Dead], tmp_path: Path) -> None:
    with template(6).copy(tmp_path / "dead") as copy:
        for path in {path for path, _ in copy.batches}:
            path.write_bytes(bytes(MIB))
        copy.set_state(applied=5, checkpoint=5, other_boot=True)
        with pytest.raises(CorruptionError, match="none of its records is readable"):
            recover(copy.journal)


def test_another_images_size_stops_the_replay(template: Callable[[int], Dead], tmp_path: Path) -> None:
    with template(6).copy(tmp_path / "dead") as copy:
        os.truncate(copy.image, SIZE + 512)
        copy.date_image(0)
        with pytest.raises(ImageError, match=f"{SIZE + 512} bytes"):
            recover(copy.journal)


@pytest.mark.parametrize(("other_boot", "later"), [(True, 5), (False, 5), (True, 3600)])
def test_an_image_that_was_used_since_is_left_as_it_is(
    template: Callable[[int], Dead], tmp_path: Path, other_boot: bool, later: float
) -> None:
    """The VM ran without protection after the crash: what it wrote is newer than what the journal holds."""
    with template(6).copy(tmp_path / "dead") as copy:
        number = len(copy.batches)
        copy.image.write_bytes(b"newer" + copy.disk_after(2)[5:])
        copy.set_state(applied=2, checkpoint=2, other_boot=other_boot)
        copy.date_image(later)
        before = copy.image.read_bytes()
        dated = copy.image.stat().st_mtime_ns
        recovered = recover(copy.journal)
        assert recovered is not None
        assert recovered.changed == {"vda"}
        assert recovered.records_applied == 0
        assert recovered.position.seq == copy.batches[number - 1][1].last_seq
        copy.image.touch()
        assert recover(copy.journal) is not None
        assert copy.image.read_bytes() == before
        assert dated != copy.image.stat().st_mtime_ns, "or the second use was none"


def test_an_image_is_not_replayed_onto_twice(template: Callable[[int], Dead], tmp_path: Path) -> None:
    """Recovered, then used without protection: whatever boots and times say, the second recovery has nothing to do."""
    with template(6).copy(tmp_path / "dead") as copy:
        number = len(copy.batches)
        copy.image.write_bytes(copy.disk_after(2))
        copy.set_state(applied=number, checkpoint=2, other_boot=True)
        copy.check_recovered(number, host_died=True)
        copy.image.write_bytes(b"newer" * 1000)
        os.truncate(copy.image, SIZE)
        before = copy.image.read_bytes()
        again = recover(copy.journal)
        assert again is not None
        assert again.records_applied == 0
        assert copy.image.read_bytes() == before


def test_only_the_image_that_was_used_is_left_out(tmp_path: Path) -> None:
    images = [raw_image(tmp_path / name, SIZE) for name in ("a.raw", "b.raw")]
    with Capture(tmp_path, [DiskOf("vda", images[0]), DiskOf("vdb", images[1])]) as capture:
        capture.describe_run()
        for target in ("vda", "vdb"):
            with Client(capture.socket_path, target) as client:
                client.write(4096, b"old" * 1000)
                client.flush()
        capture.kill()
    state = StatePage(capture.journal)
    state.set_applied(0)
    state.close()
    for image in images:
        image.write_bytes(bytes(SIZE))
    died = (capture.journal / "capture.state").stat().st_mtime
    os.utime(images[0], (died, died))
    os.utime(images[1], (died + 60, died + 60))
    recover_until_killed(capture.journal)
    recovered = recover(capture.journal)
    assert recovered is not None
    assert recovered.changed == {"vdb"}
    assert images[0].read_bytes()[4096:7096] == b"old" * 1000
    assert images[1].read_bytes() == bytes(SIZE)
    assert not (capture.journal / "recovering.json").exists()


def recover_until_killed(journal: Path) -> None:
    """A recovery that is killed when it has replayed all, and not said so yet."""
    code = (
        "import os, sys, pathlib; from vmrewind.capture import recovery\n"
        "recovery.Image.sync = lambda self: os.kill(os.getpid(), 9)\n"
        "recovery.recover(pathlib.Path(sys.argv[1]))"
    )
    child = subprocess.run([sys.executable, "-c", code, str(journal)], check=False, timeout=30)
    assert child.returncode == -signal.SIGKILL


def test_a_recovery_that_was_interrupted_is_done_again(template: Callable[[int], Dead], tmp_path: Path) -> None:
    """Its own writes are not taken for somebody else's."""
    with template(6).copy(tmp_path / "dead") as copy:
        number = len(copy.batches)
        copy.image.write_bytes(copy.disk_after(2))
        copy.set_state(applied=2)
        recover_until_killed(copy.journal)
        for path in (copy.image, copy.journal / "capture.state"):
            later = path.stat().st_mtime_ns + 3600 * 10**9
            os.utime(path, ns=(later, later))
        recovered = copy.check_recovered(number)
        assert (recovered.changed, recovered.records_applied > 0) == (frozenset(), True)


@pytest.mark.parametrize("where", ["header", "table"])
@pytest.mark.parametrize("victim", [2, 20, 22, 23])
def test_damage_before_the_checkpoint_does_not_stop_the_replay(
    template: Callable[[int], Dead], tmp_path: Path, where: str, victim: int
) -> None:
    """The images have what is damaged; what was flushed behind it they may lack."""
    with template(40).copy(tmp_path / "dead") as copy:
        number, checkpoint = len(copy.batches), 23
        path, batch = copy.batches[victim - 1]
        damage(path, batch.position + (2 if where == "header" else fmt.BATCH.size + 3), b"\xee")
        copy.image.write_bytes(copy.disk_after(checkpoint))
        copy.set_state(applied=number, checkpoint=checkpoint, other_boot=True)
        said: list[str] = []
        recovered = recover(copy.journal, said.append)
        assert recovered is not None
        assert first_difference(copy.image.read_bytes(), copy.disk_after(number)) is None
        first = segment_of(copy, checkpoint)
        if path == first:
            assert recovered.position.seq == batch.first_seq - 1, "history is readable to there"
            assert f"to record {copy.batches[-1][1].last_seq}; the journal is damaged before, at {path.name}" in said[0]
        again = recover(copy.journal)
        assert again is not None
        assert again.records_applied == 0


def segment_of(copy: Dead, number: int) -> Path:
    """The segment from which batch ``number``, and what comes after it, is read."""
    starts = {path: batch.number for path, batch in reversed(copy.batches)}
    return max((start, path) for path, start in starts.items() if start <= number)[1]


def test_damage_that_hides_where_the_replay_begins_is_told(template: Callable[[int], Dead], tmp_path: Path) -> None:
    with template(40).copy(tmp_path / "dead") as copy:
        first = segment_of(copy, 20)
        inside = [batch for path, batch in copy.batches if path == first]
        victim, checkpoint = inside[1], inside[2].number
        for batch in inside[1:4]:
            damage(first, batch.position, b"\xee" * 8)
        copy.image.write_bytes(copy.disk_after(checkpoint))
        copy.set_state(applied=len(copy.batches), checkpoint=checkpoint, other_boot=True)
        before = copy.image.read_bytes()
        with pytest.raises(CorruptionError, match=f"damaged at {first.name}, offset {victim.position}"):
            recover(copy.journal)
        assert copy.image.read_bytes() == before


def test_a_capture_does_not_go_on_behind_damage_to_what_was_applied(template: Callable[[int], Dead], tmp_path: Path) -> None:
    with template(6).copy(tmp_path / "dead") as copy:
        path, batch = copy.batches[2]
        damage(path, batch.position + 20, b"\xff")
        copy.image.write_bytes(copy.disk_after(5))
        copy.set_state(applied=5)
        with pytest.raises(CorruptionError, match=f"damaged at {path.name}, offset {batch.position}"):
            Capture(copy.directory, [DiskOf("vda", copy.image)], journal_size=8 * MIB).start()


def test_what_lies_behind_a_lost_batch_is_gone_for_every_reader(template: Callable[[int], Dead], tmp_path: Path) -> None:
    dead = template(40)
    with dead.copy(tmp_path / "dead") as copy:
        victim = next(batch.number for path, batch in copy.batches if path == segment_files(copy.journal)[1].path) + 2
        path, batch = copy.batches[victim - 1]
        damage(path, batch.position, bytes(min(512, batch.end - batch.position)))
        copy.image.write_bytes(copy.disk_after(10))
        copy.set_state(applied=len(copy.batches), checkpoint=10, other_boot=True)
        assert any(report.problems for report in verify([copy.journal])), "or there is nothing to mend"
        copy.check_recovered(victim - 1, host_died=True)
        for report in verify([copy.journal]):
            assert report.problems == []
        assert {report.path for report in verify([copy.journal])} == {file.path for file in segment_files(copy.journal)[:2]}


def test_after_a_clean_end_there_is_nothing_to_recover(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", SIZE)
    with Capture(tmp_path, [DiskOf("vda", image)]) as capture:
        capture.describe_run()
        with Client(capture.socket_path) as client:
            client.write(0, b"x")
        assert capture.stop() == 0
    assert recover(capture.journal) is None


def test_what_was_voided_stays_undone(template: Callable[[int], Dead], tmp_path: Path) -> None:
    """A replay of a record that the image refused would bring to life what its writer was told had failed."""
    with template(6).copy(tmp_path / "dead") as copy:
        path, batch = last_batch(copy)
        *_, victim = records(batch)
        head = fmt.BATCH.pack(fmt.BATCH_MAGIC, 0, RUN, batch.number + 1, batch.time_ns + 1000, batch.last_seq + 1, 1, 0, 0)
        table = fmt.RECORD.pack(victim.seq, 0, 0, fmt.Op.VOID, 0, 0)
        checksum = xxhash.xxh3_64_intdigest(head[16:] + table)
        damage(path, batch.end, head[:8] + struct.pack("<Q", checksum) + head[16:] + table)
        number = batch.number
        expected = compose(list(journal_entries(copy.journal)), {0: copy.before})[0]
        copy.image.write_bytes(copy.disk_after(number - 1))
        copy.set_state(applied=number - 1)
        assert recover(copy.journal) is not None
        assert first_difference(copy.image.read_bytes(), expected) is None
        assert first_difference(expected, copy.disk_after(number)) is not None
