"""A guest deletes a file: it is got back, diff names it, find gives the moment, which boots beside the guest and is rewound to."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from guests.images import ext4_image, qcow2_overlay, qcow2_to_raw, replay_and_check_ext4
from guests.initramfs import initramfs
from guests.kernel import linux
from guests.machine import qemu_command
from guests.protected import Disk, ProtectedVm, vmrewind
from tests.e2e.test_boot import boot
from tests.file_systems import run
from tests.history_tools import exit_code_of_main
from tests.vm_tools import journal_records
from vmrewind.history.moments import format_time

SCRIPT = """\
mkdir -p /mnt/vda
mount -t ext4 /dev/vda /mnt/vda || exit 1
if [ -e /mnt/vda/etc/config ]; then
    echo "THERE $(md5sum </mnt/vda/etc/config)"
    rm /mnt/vda/etc/config
    sync
    echo CHANGED
    sleep 600
fi
mkdir /mnt/vda/etc
yes precious | head -c 100000 > /mnt/vda/etc/config
echo other > /mnt/vda/etc/other
sync
echo WRITTEN
usleep 3000000
rm /mnt/vda/etc/config
sync /mnt/vda/etc
echo REMOVED
sleep 600
"""
CONTENT = (b"precious\n" * 20000)[:100000]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["raw", "qcow2 above a backing file"])
def test_a_deleted_file_is_got_back_booted_and_rewound_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    image = ext4_image(tmp_path / "vda.raw", 64 << 20)
    if kind != "raw":
        image = qcow2_overlay(tmp_path / "vda.qcow2", image)
    command = qemu_command(tmp_path / "serial", linux().kernel, initramfs(SCRIPT), "")
    with ProtectedVm(tmp_path, "guest", command, [Disk("vda", image, kind.partition(" ")[0])]) as vm:
        vmrewind("init", vm.repository)
        vm.start(bases=False)
        vm.wait_for("^WRITTEN")
        vmrewind("mark", vm.config, "written")
        vm.wait_for_bases()
        vm.wait_for("^REMOVED")
        removed = json.loads(vmrewind("mark", vm.config, "removed", "--json").stdout)["seq"]

        def here(*arguments: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["vmrewind", *map(str, arguments)])
            capfd.readouterr()
            return (exit_code_of_main(), *capfd.readouterr())

        def told(*arguments: object) -> list[dict[str, Any]]:
            code, out, err = here(*arguments, "--replay", "--json")
            assert code == 0, err
            return [json.loads(line) for line in out.splitlines()]

        (compared,) = told("diff", vm.config, "--from", "@written", "--to", "@removed")
        assert [(d["path"], d["change"]) for d in compared["volumes"][0]["differences"]] == [("/etc/config", "removed")]
        *_, change = told("find", vm.config, "--path", "/etc/config")
        assert change["what"] == ["removed"] and change["seq"] < removed
        before = format_time(change["time_ns"] - 10**9)
        (got,) = told("get", vm.config, "--at", before, "/etc/config", tmp_path / "config")
        assert (tmp_path / "config").read_bytes() == CONTENT and got["problems"] == []
        # It was committed to the journal, and is not in place yet: that is said.
        code, _, said = here("ls", vm.config, "--at", "@removed", "/etc/config")
        assert code == 0 and "--replay" in said
        code, _, said = here("ls", vm.config, "--at", "@removed", "/etc/config", "--replay")
        assert code == 13 and "is not there" in said
        with vm.paused():
            image_before, count = digest(image), len(journal_records(vm.journal))
            with boot(tmp_path / "booted", vm.config, "--at", f"seq:{change['seq'] - 1}") as booted:
                booted.wait_for(f"^THERE {hashlib.md5(CONTENT).hexdigest()}")
                booted.wait_for("^CHANGED")
                since = journal_records(vm.journal)[count:]
                assert not [record for record in since if record.get("op") in ("write", "zero", "discard")]
                assert digest(image) == image_before
                assert booted.end() == 0
        vm.quit()
        stopped = digest(image)
        vmrewind("rewind", vm.config, "--to", "@written")
        raw = image if kind == "raw" else qcow2_to_raw(image, tmp_path / "rewound.raw")
        copy = tmp_path / "copy.raw"
        copy.write_bytes(raw.read_bytes())
        assert replay_and_check_ext4(copy) == ""
        run("debugfs", "-R", f"dump /etc/config {tmp_path}/rewound", copy)
        assert (tmp_path / "rewound").read_bytes() == CONTENT
        (run_id,) = [run["run"] for run in json.loads(vmrewind("timeline", vm.config, "--json").stdout)["runs"]]
        vmrewind("rewind", vm.config, "--to", "latest", "--branch", run_id)
        assert digest(image) == stopped
