"""The main job, once, with everything made here: ``script/demo``.

A guest that writes without pause is protected from its first instruction on. While it runs, its CPU is held three times for
an instant, the image copied as the truth of that moment, and the moment noted, each time in another form: a bookmark, a time, a
record's number. After the guest's end all three are restored and compared with the truth, byte by byte.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from guests.images import ext4_image
from guests.kernel import linux
from guests.machine import qemu_command
from guests.protected import Disk, ProtectedVm, vmrewind
from guests.writer import acknowledged, append, errors, writer_initramfs

FILES = 150
DISK_BYTES = 128 << 20


def main() -> int:
    """Run the demo in a directory of its own; 0 if every byte was right."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory(prefix="vmrewind-demo-") as name:
        directory = Path(name)
        os.environ["VMREWIND_STATE_DIR"] = str(directory / "state")
        os.environ["VMREWIND_RUNTIME_DIR"] = str(directory / "run")
        return _demo(console, directory)


def _demo(console: Console, directory: Path) -> int:
    console.rule("1. a guest, made here")
    guest = linux()
    image = directory / "vda.raw"
    ext4_image(image, DISK_BYTES)
    command = qemu_command(directory / "serial", guest.kernel, writer_initramfs(), append(count=FILES, kib=32, pause_ms=20))
    vm = ProtectedVm(directory, "demo", command, [Disk("vda", image)])
    console.print(f"kernel {guest.kernel.name}, a disk of {DISK_BYTES >> 20} MiB with ext4, {FILES} files to write with fsync")

    console.rule("2. full backup, then the protected start")
    vmrewind("init", vm.repository)
    _show(console, "backup", vm.config)
    moments: list[tuple[str, str, Path]] = []
    with vm:
        vm.start()
        started = next(e for e in vm.events() if e["event"] == "cpu.started")
        console.print(f"the CPU was started at {started['time']}; capture was there before:")
        for event in vm.events():
            console.print(f"  {event['time']}  {event['event']}")

        console.rule("3. three moments, noted while the guest writes")
        for number, form in enumerate(("bookmark", "time", "seq")):
            vm.wait_for(f"^ACK {(number + 1) * FILES // 4}$")
            truth = directory / f"truth-{number}.raw"
            with vm.paused():
                subprocess.run(["cp", "--sparse=always", image, truth], check=True)
                marked = json.loads(vmrewind("mark", vm.config, f"moment-{number}", "--json").stdout)
                noted = datetime.now(UTC).isoformat()
                # Past the noted time before the guest writes again: the clock has nanoseconds, a written moment has less.
                time.sleep(0.002)
            files = len(acknowledged(vm.console.text()))
            moment = {"bookmark": f"@moment-{number}", "time": noted, "seq": f"seq:{marked['seq']}"}[form]
            moments.append((moment, f"{files} files", truth))
            console.print(f"  --at {moment}: {files} files acknowledged; image copied as the truth")
        code = vm.wait()
    wrong = errors(vm.console.text())
    console.print(f"the guest ended: exit code {code}, {len(acknowledged(vm.console.text()))} files, {len(wrong)} errors")

    console.rule("4. the timeline")
    _show(console, "timeline", vm.config)

    console.rule("5. restored, and compared with the truth byte by byte")
    summary = Table("moment", "the guest had written", "restored in", "equal to the truth")
    right = code == 0 and not wrong
    for number, (moment, written, truth) in enumerate(moments):
        begun = time.monotonic()
        output = directory / f"restored-{number}"
        vmrewind("restore", vm.config, "--at", moment, "--output", output)
        seconds = time.monotonic() - begun
        equal = filecmp.cmp(output / "vda.raw", truth, shallow=False)
        right = right and equal
        summary.add_row(moment, written, f"{seconds:.1f} s", "[green]yes[/]" if equal else "[red]NO[/]")
    shutil.rmtree(vm.journal)
    output = directory / "restored-remote"
    vmrewind("restore", vm.config, "--at", moments[1][0], "--output", output)
    equal = filecmp.cmp(output / "vda.raw", moments[1][2], shallow=False)
    right = right and equal
    summary.add_row(
        f"{moments[1][0]}\n(journal deleted, repository only)", moments[1][1], "", "[green]yes[/]" if equal else "[red]NO[/]"
    )
    console.print(summary)
    console.print("[bold green]every byte right[/]" if right else "[bold red]A DIFFERENCE WAS FOUND[/]")
    return 0 if right else 1


def _show(console: Console, *arguments: str | Path) -> None:
    console.print(f"$ vmrewind {arguments[0]} demo.toml", style="bold")
    console.print(vmrewind(*arguments).stdout.rstrip(), markup=False)


if __name__ == "__main__":
    sys.exit(main())
