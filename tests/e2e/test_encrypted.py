"""A guest in an encrypted repository: what it wrote comes back, and nobody without the key finds any of it there."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guests.protected import Disk, ProtectedVm, vmrewind
from guests.writer import acknowledged, content, file_name
from tests.vm_tools import check_files, files_in, restore, writer_vm


def until(condition: Callable[[], bool], vm: ProtectedVm) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, vm.status()


def test_without_its_key_or_its_key_slot_a_vm_starts_and_its_journal_is_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMREWIND_KEY_FILE", str(tmp_path / "key"))
    vmrewind("init", tmp_path / "repository", "--encrypt", "--key-file", tmp_path / "key")
    (slot,) = (tmp_path / "repository" / "keys").iterdir()
    slot.chmod(0o600)
    whole = slot.read_bytes()
    # what its guest does does not matter here
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    (tmp_path / "a.raw").write_bytes(os.urandom(1 << 20))
    with ProtectedVm(tmp_path, "web01", command, [Disk("vda", tmp_path / "a.raw", device="none")], journal_size="16MiB") as vm:
        vm.start()
        vm.quit()
        for damaged, key, words in [(whole[:-20], "key", slot.name), (whole, "", "no key is given")]:
            slot.write_bytes(damaged)
            monkeypatch.setenv("VMREWIND_KEY_FILE", str(tmp_path / key) if key else "")
            vm.start()
            until(lambda words=words: words in (vm.status()["ship"].get("error") or ""), vm)  # type: ignore[misc]
            vm.quit()
            timeline = vmrewind("timeline", vm.config, "--json")
            assert "vda" in timeline.stdout


def test_a_guests_writes_come_back_and_are_nowhere_to_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way ship loses its key, says so, and goes on where it was when it has it again."""
    keys = tmp_path / "etc" / "keys"
    monkeypatch.setenv("VMREWIND_ENVIRONMENT", str(tmp_path / "etc" / "environment"))
    made = vmrewind("init", tmp_path / "repository", "--encrypt", "--key-file", tmp_path / "key").stdout
    own = keys / f"{made.split('(id ')[1].split(',')[0]}.key"
    keys.mkdir(parents=True)
    shutil.move(tmp_path / "key", own)
    with writer_vm(tmp_path, "secret-name-of-no-file", pause_ms=20) as vm:
        vm.start()
        vm.wait_for("^ACK 5$")
        until(lambda: (vm.status()["ship"].get("shipped_seq") or 0) > 20, vm)
        before = vm.status()["ship"]
        own.rename(tmp_path / "away")
        os.kill(vm.status()["processes"]["ship"]["pid"], signal.SIGKILL)
        until(lambda: "no key is given" in (vm.status()["ship"].get("error") or ""), vm)
        seen = max(acknowledged(vm.console.text()))
        vm.wait_for(f"^ACK {seen + 3}$")
        (tmp_path / "away").rename(own)
        until(lambda: (vm.status()["ship"].get("shipped_seq") or 0) > before["shipped_seq"], vm)
        last = max(acknowledged(vm.console.text()))
        vm.quit()
        said = vm.output.read_text() + str(vm.status())
    assert own.read_text().strip() not in said
    shutil.rmtree(vm.journal)
    restore(vm, "latest", tmp_path / "end")
    assert (tmp_path / "end" / "vda.raw").read_bytes() == (tmp_path / "vda.raw").read_bytes()
    check_files(files_in(tmp_path / "end" / "vda.raw", tmp_path / "files"), range(1, last + 1))
    # The same words are on the image and in the configuration, so that they would be found.
    config = vm.config.read_bytes()
    words = [content(3)[:40], file_name(3).encode(), b"lost+found", b"qemu-system", str(tmp_path / "vda.raw").encode()]
    plain = (tmp_path / "vda.raw").read_bytes() + config
    assert [word for word in words if word not in plain] == []
    objects = [path for path in (tmp_path / "repository").rglob("*") if path.is_file()]
    assert len(objects) > 8
    compressed = 0
    for path in objects:
        stored = path.read_bytes()
        assert [word for word in words if word in stored] == [], path
        compressed += stored.count(b"\x28\xb5\x2f\xfd")
        assert (stored[:8] == b"VMRWENC1") == (path.name != "repository.json" and path.parent.name != "keys"), path
    assert compressed <= 1, "Zstandard's magic is there, more often than by chance"
    assert not any(file_name(3) in str(path) or "raw" in path.name for path in objects)
