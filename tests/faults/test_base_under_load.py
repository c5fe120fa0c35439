"""A base that is made while the VM writes: it is the disk as it was when its run began, whoever dies, and nothing is claimed of it
that is not known."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from guests.protected import vmrewind
from tests.capture_tools import Capture, Client, DiskOf, compose, first_difference, journal_entries, raw_image, until
from tests.e2e.test_start_after import MIB, SIZE, Alone
from tests.fault_tools import failing, kill
from tests.faults import test_capture_kill
from tests.faults.test_capture_kill import busy, guests
from tests.faults.test_capture_torn import ANOTHER_BOOT
from vmrewind.journal.copy_before_write import BegunBase, CopyBeforeWrite, State
from vmrewind.journal.identity import image_identity
from vmrewind.repository.manifest import new_base_id
from vmrewind.repository.partial import Partial
from vmrewind.repository.repository import Repository

_MAKER = """
import sys, time
from pathlib import Path
from vmrewind.journal.copy_before_write import CopyBeforeWrite
from vmrewind.repository import chunks
from vmrewind.repository.base import make_begun_base
from vmrewind.repository.repository import Repository
journal, image, url, partial, pause = sys.argv[1:]
put = chunks.Chunks.put
def slow(self, data):
    time.sleep(float(pause))
    return put(self, data)
chunks.Chunks.put = slow
begun = CopyBeforeWrite.open(Path(journal), "vda")
fd = open(image, "rb")
make_begun_base(Repository.open(url).vm("web01"), fd.fileno(), Path(image), begun, partial=Path(partial))
begun.finish()
"""


def begin(journal: Path, image: Path) -> CopyBeforeWrite:
    fd = os.open(image, os.O_RDONLY)
    try:
        size = image.stat().st_size
        base = BegunBase(new_base_id(1), 1, "r", "u", "vda", size, "raw", None, time.time_ns(), image_identity(fd, image))
    finally:
        os.close(fd)
    CopyBeforeWrite.begin(journal, base)
    begun = CopyBeforeWrite.open(journal, "vda")
    assert begun is not None
    return begun


@pytest.mark.timeout(120)
def test_kills_of_both_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and the process that makes the base are killed at random points while a guest writes all over the disk."""
    rng = random.Random(21)
    size = 128 * MIB
    monkeypatch.setattr(test_capture_kill, "SIZE", size)
    monkeypatch.setattr(test_capture_kill, "SLOT", size // test_capture_kill.SLOTS)
    vmrewind("init", tmp_path / "repository")
    image = raw_image(tmp_path / "a.raw", size, fill=True)
    before = image.read_bytes()
    capture = Capture(tmp_path, [DiskOf("vda", image)], journal_size=512 * MIB)
    begun = begin(capture.journal, image)
    shares = []
    with capture:
        with guests(capture.socket_path, {0: before}, 300) as made:
            for _ in range(6):
                noted = noted_bytes(tmp_path)
                maker = start_maker(tmp_path, capture, 0.1)
                until(lambda noted=noted: noted_bytes(tmp_path) > noted, "a chunk to be stored")
                until(busy(made, rng.randrange(1, 40)), "the guest's writes")
                time.sleep(rng.random() * 0.1)
                maker.kill()
                maker.wait()
                capture.kill()
                shares.append(begun.taken_share)
                capture.start()
            assert 0 < shares[-1] < 1, f"{shares}: or this test tests nothing"
            assert start_maker(tmp_path, capture, 0).wait(60) == 0
            for guest in made:
                guest.finish()
        assert capture.stop() == 0
    after = image.read_bytes()
    history = compose(list(journal_entries(capture.journal)), {0: before})[0]
    assert first_difference(history, after) is None
    vm = Repository.open(str(tmp_path / "repository")).vm("web01")
    (base_id,) = vm.bases("vda")
    manifest = vm.base("vda", base_id)
    chunks = [bytes(manifest.chunk_length(i)) if c is None else vm.read_chunk(c) for i, c in enumerate(manifest.chunks)]
    assert first_difference(b"".join(chunks), before) is None, "the base is not what the disk was"
    assert sum(before[at : at + 4096] != after[at : at + 4096] for at in range(0, size, 4096)) > 1000, "much was written meanwhile"


def noted_bytes(directory: Path) -> int:
    partial = directory / "partial"
    return partial.stat().st_size if partial.exists() else 0


def start_maker(directory: Path, capture: Capture, pause: float) -> subprocess.Popen[bytes]:
    words = [capture.journal, capture.disks[0].image, directory / "repository", directory / "partial", str(pause)]
    return subprocess.Popen([sys.executable, "-c", _MAKER, *map(str, words)])


def test_what_cannot_be_kept_is_no_error_of_the_guest(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", 8 * MIB, fill=True)
    capture = Capture(tmp_path, [DiskOf("vda", image)])
    begun = begin(capture.journal, image)
    with capture, Client(capture.socket_path) as client:
        client.write(0, b"kept" * 1024)
        assert begun.state is State.MAKING
        with failing(capture.pid, ["pwrite64"], "ENOSPC", path=capture.journal / "base-vda.old"):
            client.write(MIB, b"not kept" * 1024)
        client.write(2 * MIB, b"after" * 1024)
        until(lambda: capture.events("base.given-up"), "word of it")
        assert capture.stop() == 0
    assert begun.state is State.FAILED and "could not be kept" in begun.reason
    assert image.read_bytes()[MIB : MIB + 8] == b"not kept"


@pytest.mark.parametrize("how", ["cut short", "used by others"])
def test_an_image_that_others_touch_is_no_base(tmp_path: Path, how: str) -> None:
    image = raw_image(tmp_path / "a.raw", 8 * MIB, fill=True)
    capture = Capture(tmp_path, [DiskOf("vda", image)])
    begun = begin(capture.journal, image)
    with capture:
        with Client(capture.socket_path) as client:
            client.write(0, b"data" * 1024)
            client.flush()
        if how == "cut short":
            os.truncate(image, 4 * MIB)
        else:
            capture.kill()
            time.sleep(2.5)  # what capture's own last write cannot have been
            with image.open("r+b") as file:
                file.write(b"by others")
            capture.start()
        until(lambda: capture.events("base.given-up"), "word of it")
    assert begun.state is State.FAILED


# -- with the keeper


class Begun(Alone):
    """A disk whose base cannot be completed: the repository takes no chunks until ``let_go``."""

    waits_for_base = False

    def __init__(self, directory: Path, **protection: str) -> None:
        super().__init__(directory, **protection)
        self.image.write_bytes(os.urandom(SIZE))
        self.before = self.image.read_bytes()
        self.hold()

    def hold(self) -> None:
        chunks = self.repository / "chunks"
        if chunks.exists():
            chunks.rename(self.directory / "chunks")
        chunks.write_bytes(b"in the way")

    def let_go(self) -> None:
        chunks = self.repository / "chunks"
        chunks.unlink()
        if (self.directory / "chunks").exists():
            (self.directory / "chunks").rename(chunks)

    def all_events(self, name: str) -> list[dict[str, Any]]:
        """The events of that name of all runs."""
        paths = sorted((Path(os.environ["VMREWIND_STATE_DIR"]) / "vms" / "alone" / "events").glob("*.jsonl"))
        events = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        return [event for event in events if event["event"] == name]

    def made(self) -> str:
        """Wait until the base is made; its id."""
        event: dict[str, Any] = until(lambda: self.all_events("base.made"), "the base")[-1]
        return str(event["base"])

    def kill_all(self, ready: dict[str, Any]) -> None:
        """The keeper first, so that it starts nobody again; then whom it started."""
        keeping = json.loads((Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "alone" / "keeper.json").read_bytes())
        kill(ready["keeper"], keeping["capture"]["pid"], keeping["ship"]["pid"])


def refused(alone: Alone, *words: object) -> str:
    done = vmrewind(*words, check=False)
    assert done.returncode not in (0, 1), done.stdout + done.stderr
    return str(done.stderr)


def test_a_start_waits_for_no_base_and_the_next_one_goes_on_with_it(tmp_path: Path) -> None:
    alone = Begun(tmp_path)
    with alone.serving() as ready:
        (begun,) = alone.all_events("base.begun")
        alone.write(ready, 1)
        until(lambda: alone.all_events("base.interrupted"), "an error of the repository's")
        assert "still being made" in refused(alone, "restore", alone.config, "--at", "latest", "--output", tmp_path / "no")
        assert alone.status()["disks"]["vda"]["base_being_made"]["id"] == begun["base"]
        vmrewind("mark", alone.config, "first")
        alone.write(ready, 2, 8 * MIB)
    first = alone.image.read_bytes()
    assert "still being made" in refused(alone, "rewind", alone.config, "--to", "@first")
    assert alone.image.read_bytes() == first
    alone.let_go()
    with alone.serving() as ready:
        assert alone.made() == begun["base"]
        assert len(alone.all_events("base.begun")) == 1 and not alone.all_events("history.gap")
        alone.write(ready, 3, 16 * MIB)
    assert alone.restored("latest") == alone.image.read_bytes()
    assert alone.restored("seq:1") == alone.before
    marked = alone.restored("@first")
    assert marked[:MIB] == b"\1" * MIB and marked[MIB:] == alone.before[MIB:]
    assert not list(alone.journal.glob("base-*"))
    assert vmrewind("verify", alone.repository, "--data").returncode == 0


def test_a_backup_completes_the_base_that_was_begun(tmp_path: Path) -> None:
    alone = Begun(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    alone.let_go()
    (begun,) = alone.all_events("base.begun")
    vmrewind("backup", alone.config)
    bases = Repository.open(str(alone.repository)).vm("alone").bases("vda")
    assert begun["base"] in bases and len(bases) == 2
    assert alone.restored("seq:1") == alone.before
    assert alone.restored("latest") == alone.image.read_bytes()


@pytest.mark.parametrize("host_too", [False, True], ids=["all processes", "the host"])
def test_after_a_death_it_goes_on_only_if_what_was_written_is_known(tmp_path: Path, host_too: bool) -> None:
    alone = Begun(tmp_path)
    with alone.serving() as ready:
        (begun,) = alone.all_events("base.begun")
        alone.write(ready, 1)
        alone.kill_all(ready)
    if host_too:
        with (alone.journal / "capture.state").open("r+b") as file:
            file.seek(ANOTHER_BOOT)
            file.write(bytes(16))
    alone.let_go()
    with alone.serving() as ready:
        if host_too:
            assert [event["base"] for event in alone.all_events("base.given-up")] == [begun["base"]]
            assert alone.made() != begun["base"]
        else:
            assert alone.made() == begun["base"]
            until(lambda: alone.all_events("resync.done"), "the gap to be closed")
        alone.write(ready, 2)
    assert alone.restored("latest") == alone.image.read_bytes()
    if not host_too:
        assert alone.restored("seq:1") == alone.before


def test_a_changed_image_begins_another_base(tmp_path: Path) -> None:
    alone = Begun(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    with alone.image.open("r+b") as file:
        file.seek(32 * MIB)
        file.write(b"by others" * 1000)
    alone.let_go()
    with alone.serving() as ready:
        first, second = (event["base"] for event in alone.all_events("base.begun"))
        assert [event["base"] for event in alone.all_events("base.given-up")] == [first]
        assert alone.made() == second
        alone.write(ready, 2)
    assert alone.restored("latest") == alone.image.read_bytes()
    assert "never completed" in refused(alone, "restore", alone.config, "--at", "seq:1", "--output", tmp_path / "no")


def test_what_was_stored_and_is_lost_is_not_made_up(tmp_path: Path) -> None:
    """The next process would have to read again what the guest has written to since: it gives the base up instead."""
    image = raw_image(tmp_path / "a.raw", 8 * MIB, fill=True)
    vmrewind("init", tmp_path / "repository")
    capture = Capture(tmp_path, [DiskOf("vda", image)])
    begun = begin(capture.journal, image)
    url = str(tmp_path / "repository")
    vm = Repository.open(url).vm("web01")
    with capture, Client(capture.socket_path) as client:
        with Partial(tmp_path / "partial", begun.base.identity, begun.base.time_ns, begun.base.size, vm.repository.id) as partial:
            chunk_id, _ = vm.repository.chunks.put(image.read_bytes()[: 4 * MIB])
            partial.add(0, chunk_id)
            begun.take(0)
        client.write(0, b"new" * 4096)
        shutil.rmtree(tmp_path / "repository" / "chunks")
        assert start_maker(tmp_path, capture, 0).wait(30) != 0
        assert begun.state is State.FAILED and "lost chunk 0" in begun.reason
        assert vm.bases("vda") == []


def test_without_its_files_nothing_is_made_of_what_was_not_kept(tmp_path: Path) -> None:
    """Somebody removes them; the next capture finds none and keeps nothing, while whoever makes the base has them open still."""
    image = raw_image(tmp_path / "a.raw", 64 * MIB, fill=True)
    vmrewind("init", tmp_path / "repository")
    capture = Capture(tmp_path, [DiskOf("vda", image)])
    begun = begin(capture.journal, image)
    with capture:
        maker = start_maker(tmp_path, capture, 0.2)
        until(lambda: noted_bytes(tmp_path) > 300, "the first chunk")
        (capture.journal / "base-vda.old").unlink()
        capture.kill()
        capture.start()
        with Client(capture.socket_path) as client:
            client.write(60 * MIB, b"not kept" * 4096)
        assert maker.wait(30) != 0
        assert begun.state is State.FAILED and "removed" in begun.reason
        assert Repository.open(str(tmp_path / "repository")).vm("web01").bases("vda") == []


def test_what_failed_stays_failed_after_a_cut_of_the_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word is on stable storage before what it was made of goes."""
    image = raw_image(tmp_path / "a.raw", 8 * MIB, fill=True)
    begun = begin(tmp_path / "journal", image)
    asked: list[str] = []
    monkeypatch.setattr(begun, "_map", Noting(begun._map, asked))
    monkeypatch.setattr(os, "ftruncate", lambda *_: asked.append("truncate"))
    begun.fail("a reason")
    assert asked == ["flush", "truncate"]


class Noting:
    """A map whose syncs are noted."""

    def __init__(self, content: Any, asked: list[str]) -> None:
        self._content = content
        self._asked = asked

    def __getitem__(self, key: Any) -> Any:
        return self._content[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._content[key] = value

    def flush(self, *_: int) -> None:
        self._asked.append("flush")

    def close(self) -> None:
        self._content.close()


def test_an_image_that_was_only_moved_goes_on_with_its_base(tmp_path: Path) -> None:
    alone = Begun(tmp_path)
    with alone.serving() as ready:
        (begun,) = alone.all_events("base.begun")
        alone.write(ready, 1)
    moved = tmp_path / "elsewhere.raw"
    alone.image.rename(moved)
    alone.image = moved
    alone.configure(repository=str(alone.repository))
    alone.let_go()
    with alone.serving():
        assert alone.made() == begun["base"]
    assert alone.restored("seq:1") == alone.before


def test_another_repository_gets_a_base_of_its_own_at_once(tmp_path: Path) -> None:
    alone = Begun(tmp_path)
    with alone.serving() as ready:
        (begun,) = alone.all_events("base.begun")
        alone.write(ready, 1)
    vmrewind("init", tmp_path / "other")
    alone.configure(repository=str(tmp_path / "other"))
    with alone.serving() as ready:
        assert alone.all_events("base.given-up")[-1]["base"] == begun["base"]
        assert alone.made() != begun["base"]
        alone.write(ready, 2)
    assert alone.restored("latest") == alone.image.read_bytes()


def test_a_refused_start_begins_no_base(tmp_path: Path) -> None:
    alone = Begun(tmp_path)
    alone.let_go()
    with alone.serving():
        alone.made()
    os.truncate(alone.image, SIZE + MIB)
    second = raw_image(tmp_path / "b.raw", MIB)
    text = alone.config.read_text()
    at = text.index("[[protection.disk]]")
    alone.config.write_text(f'{text[:at]}[[protection.disk]]\ntarget = "vdb"\nimage = "{second}"\n{text[at:]}')
    assert "resized" in refused(alone, "capture", alone.config)
    assert len(alone.all_events("base.begun")) == 2, "vdb's, or this test tests nothing"
    assert not list(alone.journal.glob("base-*"))


def test_after_a_death_a_device_s_base_is_not_gone_on_with(tmp_path: Path) -> None:
    """Nothing tells whether others wrote to it until the next start."""
    alone = Begun(tmp_path)
    losetup = subprocess.run(["losetup", "--find", "--show", alone.image], check=True, capture_output=True, text=True)
    device = Path(losetup.stdout.strip())
    try:
        alone.image = device
        alone.configure(repository=str(alone.repository))
        with alone.serving() as ready:
            (begun,) = alone.all_events("base.begun")
            alone.write(ready, 1)
            alone.kill_all(ready)
        with device.open("r+b") as file:
            file.seek(32 * MIB)
            file.write(b"by others" * 1000)
        alone.let_go()
        with alone.serving():
            assert alone.all_events("base.given-up")[-1]["base"] == begun["base"]
            assert alone.made() != begun["base"]
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
