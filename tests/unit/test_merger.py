"""The keeper has what is complete merged, in a process of its own, and an idle VM costs it nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest

from tests.history_tools import MadeHistory
from vmrewind.history.stretches import merged_stretches
from vmrewind.history.view import View
from vmrewind.journal import pool
from vmrewind.journal.format import Op
from vmrewind.paths import VmPaths
from vmrewind.start import merger


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeHistory:
    """A run of nine closed segments that has ended, and another one that goes on."""
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("VMREWIND_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(pool, "SEGMENTS_MIN", 20)
    made = MadeHistory(tmp_path, {"vda": 1 << 16}, journal_size=20 << 20)
    made.start()
    for number in range(9):
        made.batch([(Op.WRITE, "vda", number * 512, bytes([number + 1]) * 4096)])
        made.close_segment()
    made.start(parent=made.stop())
    made.ship_runs()
    return made


def test_what_an_ended_run_left_is_merged_once(made: MadeHistory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    looks: list[None] = []
    chosen: list[None] = []
    merge, newest, choose = merger.merge_tables, merger._newest, merger.next_stretch

    async def noted(paths: VmPaths, journal: Path) -> None:
        asked.append(journal)
        await merge(paths, journal)

    monkeypatch.setattr(merger, "merge_tables", noted)
    monkeypatch.setattr(merger, "_newest", lambda journal: (looks.append(None), newest(journal))[1])
    monkeypatch.setattr(merger, "next_stretch", lambda journal: (chosen.append(None), choose(journal))[1])
    made.write("vda", 0, b"now" * 200)
    made.void(made.write("vda", 512, b"never" * 100), "vda")

    async def keep() -> None:
        task = asyncio.create_task(merger.keep_merged(VmPaths("web01"), made.journal, 0.01))
        deadline = time.monotonic() + 120
        while not (merged_stretches(made.journal) and len(looks) > 5) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(keep())
    assert [(stretch.first, stretch.last) for stretch in merged_stretches(made.journal)] == [(1, 9)]
    assert len(asked) == len(chosen) == 1, "nothing has come since"
    last = made.infos[made.run].parent
    assert last is not None
    with made.open() as history:
        assert sum(source.table is not None for source in history.records(last.run).local) == 9
        assert View.open(history, "vda", last).read(0, 1 << 16) == made.disk("vda").states[last.seq]
