"""A guest deletes a file: it is got back from a second before, diff names it, find gives the moment; while the guest runs on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guests.images import ext4_image
from guests.initramfs import initramfs
from guests.kernel import linux
from guests.machine import qemu_command
from guests.protected import Disk, ProtectedVm, vmrewind
from vmrewind.history.moments import format_time

SCRIPT = """\
mkdir -p /mnt/vda
mount -t ext4 /dev/vda /mnt/vda || exit 1
mkdir /mnt/vda/etc
yes precious | head -c 100000 > /mnt/vda/etc/config
echo other > /mnt/vda/etc/other
sync
echo WRITTEN
sleep 2
rm /mnt/vda/etc/config
sync /mnt/vda/etc
echo REMOVED
sleep 600
"""
CONTENT = (b"precious\n" * 20000)[:100000]


def test_a_deleted_file_is_got_back_from_a_running_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk("vda", ext4_image(tmp_path / "vda.raw", 64 << 20))
    command = qemu_command(tmp_path / "serial", linux().kernel, initramfs(SCRIPT), "")
    with ProtectedVm(tmp_path, "guest", command, [disk]) as vm:
        vmrewind("init", vm.repository)
        vm.start()
        vm.wait_for("^WRITTEN")
        vmrewind("mark", vm.config, "written")
        vm.wait_for("^REMOVED")
        removed = json.loads(vmrewind("mark", vm.config, "removed", "--json").stdout)["seq"]

        def told(*arguments: object) -> list[dict[str, Any]]:
            done = vmrewind(*map(str, arguments), "--replay", "--json")
            return [json.loads(line) for line in done.stdout.splitlines()]

        (compared,) = told("diff", vm.config, "--from", "@written", "--to", "@removed")
        assert [(d["path"], d["change"]) for d in compared["volumes"][0]["differences"]] == [("/etc/config", "removed")]
        *_, change = told("find", vm.config, "--path", "/etc/config")
        assert change["what"] == ["removed"] and change["seq"] < removed
        before = format_time(change["time_ns"] - 10**9)
        (got,) = told("get", vm.config, "--at", before, "/etc/config", tmp_path / "config")
        assert (tmp_path / "config").read_bytes() == CONTENT and got["problems"] == []
        # It was committed to the journal, and is not in place yet: that is said.
        there = vmrewind("ls", vm.config, "--at", "@removed", "/etc/config")
        assert "--replay" in there.stderr
        gone = vmrewind("ls", vm.config, "--at", "@removed", "/etc/config", "--replay", check=False)
        assert gone.returncode == 13 and "is not there" in gone.stderr
        vm.quit()
