"""The loss of a site: host A dies with everything on it, host B brings the VM up from the object store alone, and A comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guests.protected import VMREWIND, Disk, ProtectedVm, vmrewind
from guests.writer import acknowledged, errors
from tests.fault_tools import kill
from tests.network_hosts import Host, Network, inside
from tests.object_servers import SeaweedFS
from tests.vm_tools import check_files, files_in, journal_records, writer_vm
from vmrewind.errors import SupersededError
from vmrewind.journal.format import run_name
from vmrewind.journal.runs import described_runs

NAME = "web01"
SIZE = 64 << 20


def test_the_site_is_lost_and_another_host_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Network(tmp_path, ["a", "b"]) as network:
        server = SeaweedFS(tmp_path / "store", "0.0.0.0")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{network.address}:{server.port}")
        try:
            with inside(network.middle):
                server.start()
                url = server.url("kvm")
            lose_and_take_over(network, url, tmp_path, monkeypatch)
        finally:
            server.stop(signal.SIGKILL)


def lose_and_take_over(network: Network, url: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = network.hosts["a"], network.hosts["b"]
    kept = directory / "kept"
    with a.here(monkeypatch):
        vmrewind("init", url)
        vm = writer_vm(directory / "a", NAME, size_bytes=SIZE, repository=url)
        with vm:
            vm.start()
            vm.wait_for("^ACK 10$")
            until(lambda: (vm.status()["ship"].get("shipped_seq") or 0) > 50, vm)
            # The line goes before the host does, as it may.
            network.cut(a)
            vm.wait_for(f"^ACK {max(acknowledged(vm.console.text())) + 20}$")
            lag, killed_ns = kill_in_mid_write(vm)
        written = acknowledged(vm.console.text())
    (directory / "a").rename(kept)
    assert len(written) > 10

    began = time.monotonic()
    with b.here(monkeypatch):
        (listed,) = json.loads(vmrewind("list", url, "--json").stdout)["vms"]
        assert (listed["vm"], len(listed["runs"])) == (NAME, 1)
        taken = json.loads(vmrewind("takeover", f"{url}/{NAME}", "--images", directory / "b/images", "--json").stdout)
        image = Path(taken["images"]["vda"])
        shutil.copy(image, directory / "taken.raw")
        successor = taken_over_vm(directory / "b", taken, a, b)
        with successor:
            successor.start()
            first = int(successor.wait_for(r"^WRITING from (\d+)$")[1])
            successor.wait_for(f"^ACK {first}$")
            rto_seconds = time.monotonic() - began
            start = [event["event"] for event in successor.events()]
            assert "base.begun" not in start and "history.gap" not in start, start
            assert errors(successor.console.text()) == []
            successor.quit()
    lost = [record for record in journal_records(kept / "state/vms" / NAME / "journal") if record["seq"] > taken["parent"]["seq"]]
    rpo_seconds = (killed_ns - min((record["time_ns"] for record in lost), default=killed_ns)) / 1e9
    print(  # noqa: T201 - what was measured
        f"\nloss of the site: RPO {rpo_seconds:.2f} s ({len(lost)} records; status had shown a lag of at most {lag:.2f} s), "
        f"RTO {rto_seconds:.1f} s (with a guest's boot by emulation)"
    )
    assert lost and rpo_seconds <= lag
    assert taken["lost_seconds_max"] >= rpo_seconds

    kept.rename(directory / "a")
    network.join(a)
    with a.here(monkeypatch):
        back(vm, directory, url, taken, image, lost)
        failback = json.loads(vmrewind("takeover", f"{url}/{NAME}", "--images", directory / "a/back", "--json").stdout)
        assert Path(failback["images"]["vda"]).read_bytes() == image.read_bytes()
    with b.here(monkeypatch):
        refused = vmrewind("run", successor.config, check=False)
        assert refused.returncode == SupersededError.exit_code, refused.stderr


def back(vm: ProtectedVm, directory: Path, url: str, taken: dict[str, Any], image: Path, lost: list[dict[str, Any]]) -> None:
    """A is there again, with everything that it had."""
    refused = vmrewind("run", vm.config, check=False)
    told = " ".join(refused.stderr.split())
    assert refused.returncode == SupersededError.exit_code and "took it over" in told and taken["run"] in told, told
    assert f"{len(lost)} records of this host lie behind" in told, told
    # What B took over is what A had written up to that record, byte for byte.
    vmrewind(
        "restore", NAME, "--at", f"seq:{taken['parent']['seq']}", "--branch", taken["parent"]["run"], "--output", directory / "had"
    )
    assert (directory / "had/vda.raw").read_bytes() == (directory / "taken.raw").read_bytes()
    found = files_in(directory / "had/vda.raw", directory / "files")
    check_files(found, sorted(found)[:-2])
    # Overruled, A's own history goes on beside B's.
    vmrewind("start-anyway", NAME)
    write_as_a_branch(vm)
    own = run_name(max(described_runs(vm.journal)))
    for branch, wanted in ((["--branch", own], directory / "a/vda.raw"), ([], image)):
        output = directory / f"branch-{len(branch)}"
        vmrewind("restore", f"{url}/{NAME}", "--at", "latest", *branch, "--output", output)
        assert (output / "vda.raw").read_bytes() == wanted.read_bytes()


def write_as_a_branch(vm: ProtectedVm) -> None:
    """Serve A's disk once more, without a guest, until its history is level with it again, and write to it."""
    process = subprocess.Popen([VMREWIND, "capture", vm.config], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        uri = json.loads(process.stdout.readline())["disks"]["vda"]["uri"]
        write = ["-c", f"write -P 77 {SIZE - 65536} 65536", "-c", "flush"]
        subprocess.run(["qemu-io", "-f", "raw", uri, *write], check=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 90
        while all(event["event"] != "resync.done" for event in vm.events()):
            assert time.monotonic() < deadline and process.poll() is None, vm.events()
            time.sleep(0.05)
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def kill_in_mid_write(vm: ProtectedVm) -> tuple[float, int]:
    """Kill whatever runs on the host at once; (the lag that status last showed, grown to that time, seconds; the time, ns)."""
    # What status shows is at least as new as this.
    shown_ns = (Path(os.environ["VMREWIND_RUNTIME_DIR"]) / NAME / "ship.json").stat().st_mtime_ns
    status = vm.status()
    pids = [process["pid"] for process in status["processes"].values() if process is not None]
    assert len(pids) == 4
    killed_ns = time.time_ns()
    kill(*pids)
    vm.wait()
    # Rounded to a tenth in the report.
    return status["ship"]["lag_seconds"] + 0.05 + max(0, killed_ns - shown_ns) / 1e9, killed_ns


def taken_over_vm(directory: Path, taken: dict[str, Any], a: Host, b: Host) -> ProtectedVm:
    """The VM on its new host; whoever takes it over sees to it that consoles and sockets are where that host has room for them."""
    config = Path(taken["config"])
    text = config.read_text().replace(str(directory.parent / "a"), str(directory)).replace(str(a.runtime), str(b.runtime))
    vm = ProtectedVm(directory, NAME, ["unused"], [Disk("vda", Path("/unused"))])
    config.write_text(text)
    vm.config = config
    return vm


def until(condition: Callable[[], bool], vm: ProtectedVm) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline and vm.running(), vm.output.read_text()
        time.sleep(0.05)
