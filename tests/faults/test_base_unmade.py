"""A base that is not made yet: whoever looks at the VM, or at its repository, is told how it stands and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.capture_tools import MIB, raw_image, until
from tests.faults.test_base_under_load import Begun, begin
from vmrewind.journal.runs import DiskInfo
from vmrewind.recover.findings import Finding, Kind
from vmrewind.recover.verify import verify
from vmrewind.repository.repository import Repository
from vmrewind.start.bases import little_left
from vmrewind.start.keeping import Keeper
from vmrewind.start.serving import Storage


def test_a_base_that_is_not_made_yet_is_no_damage_and_status_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Begun(tmp_path)

    def problem() -> str:
        return next((problem for problem in alone.status()["problems"] if "could not be made yet" in problem), "")

    with alone.serving() as ready:
        alone.write(ready, 1)
        until(lambda: alone.all_events("base.interrupted"), "the repository's error")
    assert "chunks" in problem()
    alone.let_go()
    (begun,) = alone.all_events("base.begun")
    done = vmrewind("verify", alone.repository, "--json", check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, found[-1]["outcome"]) == (0, "sound"), done.stdout
    (gap,) = [finding for finding in found[:-1] if finding["finding"] == "gap"]
    assert begun["base"] in gap["object"] and gap["message"].startswith("still being made (0% by now)")
    assert gap["hint"] == "wait until it is made" and [one["disk"] for one in gap["affected"]] == ["vda"]
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("VMREWIND_STATE_DIR", str(tmp_path / "elsewhere"))
        done = vmrewind("verify", alone.repository, check=False)
        assert done.returncode == 7
        assert "missing, or still being made on the VM's host" in done.stdout
        assert "do: wait until it is made, or put it back" in done.stdout

    # An error of the system's rather than of the store's.
    partial = alone.journal.parent / "begun-vda.partial"
    partial.unlink(missing_ok=True)
    partial.mkdir()
    with alone.serving():
        until(lambda: "partial" in problem(), "the system's error")
        partial.rmdir()
        alone.made()
        assert not problem()
    assert not list(alone.journal.parent.glob("begun-vda.*"))

    repository = Repository.open(str(alone.repository))
    findings: list[Finding] = []
    verify(repository, findings.append, lambda *_: None)
    assert not [finding for finding in findings if finding.kind is not Kind.NOTE]
    (alone.repository / "vms/alone/bases/vda" / f"{begun['base']}.json").unlink()
    verify(repository, findings.append, lambda *_: None)
    (lost,) = [finding for finding in findings if finding.kind is Kind.DAMAGE]
    assert lost.message.startswith("gone, and an earlier verification saw it") and "wait" not in lost.hint


def test_a_stop_waits_for_a_base_only_if_little_of_it_is_left(tmp_path: Path) -> None:
    size = 1024 * MIB
    image = raw_image(tmp_path / "a.raw", size)
    disks = [DiskInfo(0, "vda", size, "raw", str(image), None)]
    assert little_left(tmp_path / "journal", disks), "none is being made"
    with begin(tmp_path / "journal", image) as begun:
        assert not little_left(tmp_path / "journal", disks)
        for chunk in range(size // (4 * MIB) * 7 // 8):
            begun.take(chunk)
        assert little_left(tmp_path / "journal", disks)


def test_what_a_stop_leaves_behind_is_said_in_full(tmp_path: Path) -> None:
    """A base that is not complete does not hide that records are not in the repository."""
    keeper = Keeper(Storage("web01", tmp_path / "journal", 64 << 20, None), "direct")
    assert keeper.left_behind == []
    keeper._unmade, keeper._unsent = {"vda": 0.25, "vdb": 0.5}, 4096
    base, records = keeper.left_behind
    assert "vda (25% made), vdb (50% made)" in base and "vmrewind backup web01" in base
    assert "4096 bytes" in records and "vmrewind ship on web01" in records
    keeper._unmade, keeper._unsent = {}, None
    (records,) = keeper.left_behind
    assert "may not be in the repository" in records
