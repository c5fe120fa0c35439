"""A takeover whose moment turns out to be a bad one: the new host rewinds behind it, and everybody goes by that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.e2e.test_start_after import MIB, Alone


def test_rewound_behind_its_takeover_the_vm_is_still_the_new_host_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Alone(tmp_path)
    with first.serving() as ready:
        first.write(ready, 1)
        vmrewind("mark", first.config, "good")
        first.write(ready, 2, offset=MIB)
    stored = f"{first.repository}/alone"
    first_state = tmp_path / "first"
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "second"))
    told = json.loads(vmrewind("takeover", stored, "--images", tmp_path / "b", "--json").stdout)
    second = Alone.__new__(Alone)
    second.directory, second.format, second.repository = tmp_path, "raw", first.repository
    second.config, second.image = Path(told["config"]), Path(told["images"]["vda"])
    with second.serving() as ready:
        assert "base.begun" not in second.events()
        second.write(ready, 3, offset=2 * MIB)
    vmrewind("rewind", second.config, "--to", "@good")
    with second.serving() as ready:
        second.write(ready, 4, offset=3 * MIB)
    latest = second.image.read_bytes()
    assert latest[0] == 1 and latest[MIB] == 0 and latest[3 * MIB] == 4
    vmrewind("restore", stored, "--at", "latest", "--output", tmp_path / "alone-out")
    assert (tmp_path / "alone-out" / "vda.raw").read_bytes() == latest
    # The first host means what it knows itself, and says whose the VM is now.
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(tmp_path / "state"))
    own = vmrewind("restore", first.config, "--at", "latest", "--output", tmp_path / "own")
    assert "has the VM now: --branch" in own.stderr
    assert (tmp_path / "own" / "vda.raw").read_bytes() == first.image.read_bytes()
    # Failback, by a host that never saw any of it.
    monkeypatch.setenv("VMREWIND_STATE_DIR", str(first_state))
    back = json.loads(vmrewind("takeover", stored, "--images", tmp_path / "c", "--json").stdout)
    assert Path(back["images"]["vda"]).read_bytes() == latest
