"""A saved state is resumed only onto the disks that it was saved with, whatever happened to libvirt or the disks meanwhile."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.e2e.libvirt_host import LibvirtHost
from tests.e2e.test_protect_live import idle_domain, live
from vmrewind.errors import VmStateError
from vmrewind.paths import VmPaths

SAVED = "/var/lib/libvirt/qemu/save/web01.save"


@pytest.fixture
def host() -> Iterator[LibvirtHost]:
    with LibvirtHost() as running_host:
        yield running_host


def refused_start(host: LibvirtHost) -> str:
    """Start it, which must fail, and leave it shut off; returns what virsh says."""
    done = host.virsh("start", "web01", check=False)
    assert done.returncode != 0, done.stdout
    assert host.virsh("domstate", "web01").stdout.strip() == "shut off"
    return done.stderr


def test_a_state_that_libvirt_did_not_remove_after_it_was_resumed_is_never_resumed_again(host: LibvirtHost) -> None:
    idle_domain(host)
    host.protect("web01", "vda")
    host.virsh("start", "web01")
    for _ in range(2):  # each is another state
        host.virsh("managedsave", "web01")
        host.run("cp", "-a", SAVED, f"{SAVED}.kept")
        host.virsh("start", "web01")
    assert "must not be resumed" not in host.vmrewind("status", "web01").stdout
    # as a libvirtd leaves it that is killed before it removes the file
    host.run("mv", f"{SAVED}.kept", SAVED)
    host.restart()
    assert "must not be resumed" in host.vmrewind("status", "web01").stdout
    again = host.vmrewind(*live(host), check=False)
    assert again.returncode == VmStateError.exit_code and "managedsave-remove" in json.loads(again.stdout)["hint"]
    host.virsh("destroy", "web01")
    said = refused_start(host)
    assert "resumed already" in said and "virsh managedsave-remove web01" in said
    # neither with its XML written anew, nor without protection
    xml = host.virsh("managedsave-dumpxml", "web01", "--security-info").stdout
    document = host.directory / "saved.xml"
    document.write_text(re.sub(r"<metadata>.*</metadata>", "", xml, flags=re.DOTALL))
    host.virsh("managedsave-define", "web01", document)
    assert "urn:vmrewind" not in host.virsh("managedsave-dumpxml", "web01").stdout
    assert "resumed already" in refused_start(host)
    host.virsh("managedsave-remove", "web01")
    host.virsh("start", "web01")
    assert host.virsh("domstate", "web01").stdout.strip() == "running"
    assert not VmPaths("web01").saved_state.exists()


def test_disks_are_not_taken_back_under_a_saved_state(host: LibvirtHost) -> None:
    image = idle_domain(host)
    host.protect("web01", "vda")
    host.virsh("start", "web01")
    host.vmrewind("mark", "web01", "here")
    host.virsh("managedsave", "web01")
    before = image.stat()
    for words in (["rewind", "--to"], ["restore", "--in-place", "--at"]):
        done = host.vmrewind(words[0], "web01", *words[1:], "@here", "--json", check=False)
        assert done.returncode == VmStateError.exit_code, (done.stdout, done.stderr)
        assert "virsh managedsave-remove web01" in json.loads(done.stdout)["hint"]
    assert image.stat().st_mtime_ns == before.st_mtime_ns
    # out of sight while the disks are taken back, and there again afterwards
    host.run("mv", SAVED, f"{SAVED}.away")
    host.vmrewind("rewind", "web01", "--to", "@here")
    host.run("mv", f"{SAVED}.away", SAVED)
    for _ in range(2):
        assert "taken to another moment" in refused_start(host)
    host.virsh("managedsave-remove", "web01")
    host.virsh("start", "web01")
    assert host.virsh("domstate", "web01").stdout.strip() == "running"
