"""A base that is not made yet: whoever looks at the VM, or at its repository, is told how it stands and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guests.protected import vmrewind
from tests.faults.test_base_under_load import Begun


def test_verify_takes_no_base_that_is_being_made_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Begun(tmp_path)
    with alone.serving() as ready:
        alone.write(ready, 1)
    alone.let_go()
    (begun,) = alone.all_events("base.begun")
    done = vmrewind("verify", alone.repository, "--json", check=False)
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, findings[-1]["outcome"]) == (0, "sound"), done.stdout
    (gap,) = [finding for finding in findings[:-1] if finding["finding"] == "gap"]
    assert begun["base"] in gap["object"] and gap["message"].startswith("still being made (0% by now)")
    assert gap["hint"] == "wait until it is made" and [one["disk"] for one in gap["affected"]] == ["vda"]

    # Another host, or one that has given it up.
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("VMREWIND_STATE_DIR", str(tmp_path / "elsewhere"))
        done = vmrewind("verify", alone.repository, check=False)
        assert done.returncode == 7
        assert "missing, or still being made on the VM's host" in done.stdout
        assert "do: wait until it is made, or put it back" in done.stdout

    vmrewind("backup", alone.config)
    done = vmrewind("verify", alone.repository, "--data")
    assert "gap" not in done.stdout
    (alone.repository / "vms/alone/bases/vda" / f"{begun['base']}.json").unlink()
    done = vmrewind("verify", alone.repository, check=False)
    assert done.returncode == 7
    assert "gone, and an earlier verification saw it" in done.stdout and "wait until" not in done.stdout
