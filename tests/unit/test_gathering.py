"""Short pieces of files are copied together, and a file that is not there any more as it was ends nobody."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tests.fault_tools import no_descriptors_left
from vmrewind.history import gathering
from vmrewind.history.gathering import PAD_SIZE, PARTS_MAX, gather, mapped

PAGE = 4096


def _mapped(path: Path, content: bytes) -> memoryview:
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        return mapped(fd)
    finally:
        os.close(fd)


def test_parts_of_several_files_come_one_behind_the_other(tmp_path: Path) -> None:
    content = os.urandom(8 * PAGE)
    one, other = _mapped(tmp_path / "one", content), _mapped(tmp_path / "other", content[::-1])
    gathered, _ = gather([one[100:5000], other[7:8], one[PAGE : 2 * PAGE]])
    assert gathered == content[100:5000] + content[::-1][7:8] + content[PAGE : 2 * PAGE]
    part = PAD_SIZE // PARTS_MAX
    assert gather([one[n : n + part] for n in range(PARTS_MAX)])[0] == b"".join(content[n : n + part] for n in range(PARTS_MAX))


def test_what_was_cut_off_a_file_is_not_there(tmp_path: Path) -> None:
    content = os.urandom(3 * PAGE)
    parts = [(whole := _mapped(tmp_path / "cut", content))[:PAGE], whole[2 * PAGE :], whole[:PAGE]]
    assert gather(parts)[0] == content[:PAGE] + content[2 * PAGE :] + content[:PAGE]
    os.truncate(tmp_path / "cut", PAGE)
    assert gather(parts)[0] == content[:PAGE]
    assert gather(parts[1:])[0] == b""


def test_what_cannot_be_mapped_is_empty(tmp_path: Path) -> None:
    assert _mapped(tmp_path / "empty", b"") == b""


def test_threads_gather_side_by_side(tmp_path: Path) -> None:
    content = os.urandom(4 * PAGE)
    file = _mapped(tmp_path / "file", content)
    together = Barrier(4)

    def gathered(number: int) -> bytes:
        found, _ = gather([file[number * PAGE : (number + 1) * PAGE]])
        together.wait(30)
        return bytes(found)

    with ThreadPoolExecutor(4) as pool:
        assert b"".join(pool.map(gathered, range(4))) == content


def test_a_thread_that_has_no_descriptors_left_gathers_nothing_and_later_does(tmp_path: Path) -> None:
    content = os.urandom(PAGE)
    file = _mapped(tmp_path / "file", content)
    with ThreadPoolExecutor(1) as pool:
        with no_descriptors_left():
            assert pool.submit(gather, [file]).result(30) == (b"", False)
        with no_descriptors_left(but=1):
            assert pool.submit(gather, [file]).result(30) == (b"", False), "a mapping takes one of its own"
            os.close(os.open(tmp_path, os.O_RDONLY))
        assert pool.submit(lambda: bytes(gather([file])[0])).result(30) == content


@pytest.mark.parametrize("often", [True, False])
def test_what_was_gathered_long_ago_does_not_count_as_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: bool) -> None:
    monkeypatch.setattr(gathering, "_FAULTS", 1)
    monkeypatch.setattr(gathering, "_LET_GO_SECONDS", 0 if often else 3600)
    monkeypatch.setattr(gathering, "_maps", gathering._Maps())
    monkeypatch.setattr(gathering, "_FILE_BYTES_MAX", (before := _file_memory_bytes()) + (8 << 20))
    content = os.urandom(32 << 20)
    files = [_mapped(tmp_path / name, content) for name in ("one", "other")]
    for at in range(0, len(content), PAD_SIZE):
        for file in files:
            assert gather([file[at : at + PAD_SIZE]])[0] == content[at : at + PAD_SIZE]
    assert (_file_memory_bytes() - before < 24 << 20) == often


def _file_memory_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:"))
    return int(line.split()[1]) << 10
