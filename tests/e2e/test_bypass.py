"""``on_journal_full = "bypass"`` as its user sees it: status, timeline, restores, the next start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guests.protected import vmrewind
from tests.capture_tools import until
from tests.e2e.test_start_after import MIB, Alone
from tests.fault_tools import ext4, is_root, make_read_only

MOMENT_REFUSED = 6


def bypassing(directory: Path) -> Alone:
    return Alone(directory, journal_size="8MiB", ship="on-demand", on_journal_full="bypass")


def coverage(alone: Alone) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(vmrewind("timeline", alone.config, "--json").stdout)
    return found["disks"]["vda"]


def refused(alone: Alone, moment: str) -> str:
    answer = vmrewind("restore", alone.config, "--at", moment, "--output", alone.directory / "no", check=False)
    assert answer.returncode == MOMENT_REFUSED
    return str(answer.stderr)


def bypass_of(alone: Alone) -> Any:
    return alone.status()["capture"]["bypass"]


def test_a_gap_is_shown_refused_and_closed(tmp_path: Path) -> None:
    alone = bypassing(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
        vmrewind("mark", alone.config, "before")
        before = alone.image.read_bytes()
        for number in range(2, 14):
            alone.write(ready, number, number % 8 * MIB)
        found = bypass_of(alone)
        assert found["dirty_bytes"] >= MIB
        until(lambda: any("NOT PROTECTED now" in problem for problem in alone.status()["problems"]), "the status to say so")
        assert "bypass.begin" in alone.events()
        (gap,) = coverage(alone)["gaps"]
        assert gap["until_ns"] is None
        assert "gap" in refused(alone, "latest")
        inside = gap["since_ns"] + 1000
        assert alone.restored("@before") == before

        vmrewind("ship", "on", alone.config)
        until(lambda: bypass_of(alone) is None, "the gap to be closed")
        assert not [problem for problem in alone.status()["problems"] if "gap" in problem]
        alone.write(ready, 99, 9 * MIB)
        # Had ship not carried enough yet, that was bypassed again.
        until(lambda: bypass_of(alone) is None, "the gap to be closed")
        assert alone.restored("latest") == alone.image.read_bytes()
        gaps = coverage(alone)["gaps"]
        assert gaps[0]["since_ns"] <= inside < gaps[0]["until_ns"]
        assert gaps[-1]["until_ns"] is not None
        refused(alone, f"seq:{seq_of(alone, 'gap_begin')}")
        assert alone.restored("@before") == before
    assert alone.restored("latest") == alone.image.read_bytes()
    with alone.serving() as ready:
        assert "history.gap" not in alone.events()
        alone.write(ready, 100, 10 * MIB)
    assert alone.restored("latest") == alone.image.read_bytes()


def seq_of(alone: Alone, event: str) -> int:
    found = json.loads(vmrewind("timeline", alone.config, "--json").stdout)["events"]
    return next(int(each["seq"]) for each in found if each["event"] == event)


def test_a_run_that_ends_in_the_gap_is_resynced_by_the_next(tmp_path: Path) -> None:
    alone = bypassing(tmp_path)
    with alone.serving() as ready:
        for number in range(1, 14):
            alone.write(ready, number, number % 8 * MIB)
        assert bypass_of(alone)
    refused(alone, "latest")
    alone.configure(repository=str(alone.repository), journal_size="64MiB", ship="auto", on_journal_full="bypass")
    with alone.serving() as ready:
        until(lambda: "resync.done" in alone.events(), "the resync")
        alone.write(ready, 99, 9 * MIB)
        gaps = coverage(alone)["gaps"]
        assert len(gaps) == 1 and gaps[0]["until_ns"] is not None
    assert alone.restored("latest") == alone.image.read_bytes()


@pytest.mark.skipif(not is_root(), reason="needs root: a file system of its own")
def test_a_gap_that_the_journal_cannot_even_be_told_of_is_refused_as_well(tmp_path: Path) -> None:
    with ext4(tmp_path, 64) as mounted:
        alone = Alone(tmp_path, journal_size="8MiB", on_journal_full="bypass", journal=str(mounted / "journal"))
        with alone.serving() as ready:
            alone.write(ready, 1)
            vmrewind("mark", alone.config, "before")
            before = alone.image.read_bytes()
            make_read_only(mounted)
            alone.write(ready, 2)
            assert bypass_of(alone)["cause"]
            assert "takes no records" in refused(alone, "latest")
            assert coverage(alone)["gaps"][-1]["until_ns"] is None
            assert alone.restored("@before") == before
        refused(alone, "latest")
        assert alone.image.read_bytes()[:MIB] == bytes([2]) * MIB
