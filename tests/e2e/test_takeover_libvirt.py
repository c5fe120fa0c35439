"""A libvirt domain taken over: defined from the repository alone, started by virsh; the old host's start is refused by the hook."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from guests import images
from guests.writer import acknowledged
from tests.e2e.libvirt_host import LibvirtHost
from tests.e2e.test_libvirt_guest import MIB, define_writer


def test_a_domain_is_defined_and_started_elsewhere_and_the_old_host_is_refused(tmp_path: Path) -> None:
    state = Path(os.environ["VMREWIND_STATE_DIR"])
    with LibvirtHost() as host:
        console = define_writer(host, images.ext4_image(host.directory / "disk.raw", 32 * MIB), "raw")
        host.protect("web01", "vda")
        host.virsh("start", "web01")
        console.wait_for("^ACK 3$")
        host.virsh("destroy", "web01")
        seen = acknowledged(console.text())[-1]
        old_xml = host.stored_xml("web01")
        # From here on it is another host: nothing is known of the VM but what the repository has.
        host.virsh("undefine", "web01")
        state.rename(tmp_path / "old")
        place = host.directory / "images"
        words = ("takeover", f"{host.repository}/web01", "--images", place, "--define", "--json")
        taken = json.loads(host.vmrewind(*words).stdout)
        assert taken["next"] == ["virsh start web01"] and taken["absent"] == []
        host.virsh("start", "web01")
        first = int(console.wait_for(r"^WRITING from (\d+)$")[1])
        assert first > seen
        console.wait_for(f"^ACK {first}$")
        events = [json.loads(line)["event"] for line in host.vmrewind("events", "web01", "--json").stdout.splitlines()]
        assert "base.begun" not in events and "history.gap" not in events, events
        host.virsh("destroy", "web01")
        host.virsh("undefine", "web01")
        # The old host is back, with all that it had.
        state.rename(tmp_path / "new")
        shutil.move(tmp_path / "old", state)
        host.define(old_xml)
        refused = host.virsh("start", "web01", check=False)
        assert refused.returncode != 0 and "took it over" in refused.stderr and "start-anyway web01" in refused.stderr, (
            refused.stderr
        )
        host.vmrewind("start-anyway", "web01")
        host.virsh("start", "web01")
        host.virsh("destroy", "web01")
