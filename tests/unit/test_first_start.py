"""A VM that is begun from another one's moment: who may start on its images, and when they count as complete."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from vmrewind.history.view import Extent, View
from vmrewind.journal.origin import Origin, note_filling
from vmrewind.journal.runs import Position, RunInfo, private_directory, run_path, write_durably
from vmrewind.paths import VmPaths
from vmrewind.recover.completing import Completing
from vmrewind.start.listening import listen
from vmrewind.start.origins import first_bases
from vmrewind.start.processes import Process

POSITION = Position(7, 3, 1)


def _begun(journal: Path, by: Process) -> dict[str, int | str]:
    Origin("web01", POSITION, "base-1", "uuid").write(journal, "vda")
    note = by.note()
    note_filling(journal, ["vda"], note)
    return note


def test_only_the_first_start_in_front_of_the_living_process(tmp_path: Path) -> None:
    own = Process.of(os.getpid())
    assert own is not None
    assert first_bases(tmp_path) == {}
    note = _begun(tmp_path, own)
    assert first_bases(tmp_path) == {"vda": "base-1"}
    note_filling(tmp_path, ["vda"], note | {"boot": "another"})
    assert first_bases(tmp_path) == {}, "the same pid and start time, after a reboot"
    note_filling(tmp_path, ["vda"], note | {"started_ticks": 1})
    assert first_bases(tmp_path) == {}, "another process has that pid by now"
    note_filling(tmp_path, ["vda"], note)
    private_directory(run_path(tmp_path, 8).parent)
    write_durably(run_path(tmp_path, 8), RunInfo(8, None, "copy", "uuid", "here", 1, 1, ()).to_json())
    assert first_bases(tmp_path) == {}, "a run has begun: a start in front of nobody would take incomplete images"


def test_nobody_starts_on_them_once_the_process_has_died(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        process = Process.of(other.pid)
        assert process is not None
        _begun(tmp_path, process)
        assert first_bases(tmp_path) == {"vda": "base-1"}
        other.kill()
    assert first_bases(tmp_path) == {}


class _Moment:
    """A view as far as completing looks."""

    size = 1 << 20

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, zero=False)

    def read(self, _offset: int, length: int) -> bytes:
        return b"x" * length


def test_images_are_complete_only_before_the_end_of_their_capture(tmp_path: Path) -> None:
    """Capture notes what an image is when it ends: copied on after that, the image would look as if somebody had used it."""
    told: list[int] = []
    paths = VmPaths("copy")
    image = tmp_path / "vda.raw"
    completing = Completing(paths, {"vda": image}, lambda _what, done, _total: told.append(done), lambda _: None)
    completing.note("web01", POSITION, "uuid")
    filling = completing.filling("vda", cast("View", _Moment()))
    private_directory(paths.runtime)
    with listen(paths.filling_socket, None) as capture:
        capture.settimeout(30)
        thread = threading.Thread(target=completing.run)
        thread.start()
        asked, _ = capture.accept()
        assert told == [_Moment.size] and image.read_bytes() == b"x" * _Moment.size, "it is asked once all is copied"
        assert completing.lacking
        # It ends without an answer.
        asked.close()
    completing.stop()
    thread.join(30)
    assert not thread.is_alive() and not completing.complete and completing.lacking
    filling.close()
