"""``script/idle``: what protection costs while nothing happens.

Starts VMs side by side, waits until each is carried to its repository, and measures for a while, by role: processor time,
wake-ups, memory, file descriptors. The first VM runs an idle Linux guest with its file system mounted; the others are QEMUs
without a machine (``-machine none``), connected to their captures like any: they ask for nothing, and neither does an idle guest.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import cyclopts
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from bench.machine import cpu_seconds, describe, one_line
from guests.images import ext4_image
from guests.kernel import GuestError, linux
from guests.machine import qemu_command
from guests.protected import Disk, ProtectedVm, vmrewind
from guests.writer import append, writer_initramfs

ROLES: Final = ("capture", "keeper", "ship")
GUEST_BYTES: Final = 192 << 20
DISK_BYTES: Final = 64 << 20
JOURNAL_SIZE: Final = "16MiB"
"""Small, because it is reserved for each VM; an idle one costs the same with any size."""
TARGET_PERCENT: Final = 0.5
_SETTLED_SECONDS: Final = 60

app = cyclopts.App(name="script/idle", help="Measure what idle protected VMs cost the host.")


@dataclass(frozen=True, slots=True)
class Cost:
    """One role's cost for one VM, on average. ``cpu_percent`` is of one core, ``wakeups`` a second."""

    role: str
    cpu_percent: float
    wakeups: float
    rss_bytes: float
    pss_bytes: float
    descriptors: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What one role's processes have used so far, and hold now."""

    cpu_seconds: float
    wakeups: int
    rss_bytes: int
    pss_bytes: int
    descriptors: int


def sample(pids: Sequence[int]) -> Sample:
    """All of these processes together."""
    rss = pss = wakeups = descriptors = 0
    for pid in pids:
        memory = Path(f"/proc/{pid}/smaps_rollup").read_text()
        rss += _kib(memory, "Rss") << 10
        pss += _kib(memory, "Pss") << 10
        descriptors += len(list(Path(f"/proc/{pid}/fd").iterdir()))
        for task in Path(f"/proc/{pid}/task").iterdir():
            text = (task / "status").read_text()
            wakeups += int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)$", text, re.MULTILINE)[0])
    return Sample(cpu_seconds(pids), wakeups, rss, pss, descriptors)


def _kib(text: str, field: str) -> int:
    return int(re.findall(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)[0])


@contextmanager
def running_vms(directory: Path, count: int) -> Iterator[list[ProtectedVm]]:
    """``count`` protected VMs, started one after the other; ended when the block is left."""
    with ExitStack() as stack:
        vms = []
        for number in range(count):
            vm = _guest(directory) if number == 0 else _bare(directory, number)
            stack.enter_context(vm)
            vm.start()
            if number == 0:
                vm.wait_for("^ACK 1$")
            vms.append(vm)
        yield vms
        for vm in vms:
            vm.quit()


def _guest(directory: Path) -> ProtectedVm:
    place = directory / "idle0"
    place.mkdir()
    guest = linux()
    command = qemu_command(place / "serial", guest.kernel, writer_initramfs(), append(count=0, pause_ms=1_000_000), memory_mib=128)
    return _protected(place, "idle0", command, Disk("vda", ext4_image(place / "vda.raw", GUEST_BYTES)))


def _bare(directory: Path, number: int) -> ProtectedVm:
    name = f"idle{number}"
    place = directory / name
    place.mkdir()
    image = place / "vda.raw"
    image.touch()
    os.truncate(image, DISK_BYTES)
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    return _protected(place, name, command, Disk("vda", image, device="none"))


def _protected(place: Path, name: str, command: list[str], disk: Disk) -> ProtectedVm:
    vm = ProtectedVm(place, name, command, [disk], journal_size=JOURNAL_SIZE)
    vmrewind("init", vm.repository)
    return vm


def processes(vms: Sequence[ProtectedVm]) -> dict[str, list[int]]:
    """The process ids by role, QEMU's under ``qemu``."""
    found: dict[str, list[int]] = {}
    for vm in vms:
        for role, process in vm.status()["processes"].items():
            if process is not None:
                found.setdefault(role, []).append(process["pid"])
    return found


def settle(vms: Sequence[ProtectedVm]) -> None:
    """Wait until everything that was written is shipped: from then on there is nothing to do."""
    deadline = time.monotonic() + _SETTLED_SECONDS
    for vm in vms:
        while (vm.status()["ship"] or {}).get("unsent_bytes") != 0:
            if time.monotonic() > deadline:
                raise GuestError(f"{vm.name}: not shipped after {_SETTLED_SECONDS} s")
            time.sleep(0.1)


def measure(pids: dict[str, list[int]], seconds: float) -> list[Cost]:
    """Each role's cost per VM, over so long a time."""
    before = {role: sample(pids[role]) for role in pids}
    began = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - began
    costs = []
    for role, were in before.items():
        now, many = sample(pids[role]), len(pids[role])
        costs.append(
            Cost(
                role,
                100 * (now.cpu_seconds - were.cpu_seconds) / took / many,
                (now.wakeups - were.wakeups) / took / many,
                now.rss_bytes / many,
                now.pss_bytes / many,
                now.descriptors / many,
            )
        )
    return costs


def median(rounds: Sequence[Sequence[Cost]]) -> list[Cost]:
    """The rounds' medians, figure by figure."""
    return [
        Cost(
            role[0].role,
            *(
                statistics.median(getattr(cost, figure) for cost in role)
                for figure in ("cpu_percent", "wakeups", "rss_bytes", "pss_bytes", "descriptors")
            ),
        )
        for role in zip(*rounds, strict=True)
    ]


def together(costs: Sequence[Cost]) -> Cost:
    """Capture, keeper and ship of one VM."""
    ours = [cost for cost in costs if cost.role in ROLES]
    figures = ("cpu_percent", "wakeups", "rss_bytes", "pss_bytes", "descriptors")
    return Cost("together", *(sum(getattr(cost, figure) for cost in ours) for figure in figures))


def run(vms: int, seconds: float, rounds: int, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Start, measure, end; the result as it is written to the JSON file."""
    machine = describe(directory)
    with running_vms(directory, vms) as started:
        say(f"{vms} VMs run; waiting until they are idle")
        settle(started)
        pids = processes(started)
        measured = []
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: {seconds:.0f} s")
            measured.append(measure(pids, seconds))
    costs = median(measured)
    return {
        "kind": "idle",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "vms": vms,
        "seconds": seconds,
        "rounds": [[asdict(cost) for cost in one] for one in measured],
        "per_vm": [asdict(cost) for cost in [*costs, together(costs)]],
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table."""
    console.print(one_line(result["machine"]))
    vms = result["vms"]
    table = Table(title=f"{vms} idle protected VMs; each figure is one VM's, in parentheses all {vms} together")
    for heading in ("", "% of a core", "wake-ups/s", "RSS MiB", "PSS MiB", "descriptors"):
        table.add_column(heading, justify="left" if not heading else "right")
    for cost in result["per_vm"]:
        rss, pss = cost["rss_bytes"] / (1 << 20), cost["pss_bytes"] / (1 << 20)
        many = vms if cost["role"] != "qemu" else 1
        table.add_row(
            cost["role"],
            f"{cost['cpu_percent']:.3f} ({cost['cpu_percent'] * vms:.1f})",
            f"{cost['wakeups']:.1f}",
            f"{rss:.1f}",
            f"{pss:.1f} ({pss * many:.0f})" if many > 1 else f"{pss:.1f}",
            f"{cost['descriptors']:.0f}",
            end_section=cost["role"] == "qemu",
        )
    console.print(table)


@app.default
def idle(
    *,
    vms: Annotated[int, Parameter(help="How many VMs run side by side.")] = 20,
    seconds: Annotated[float, Parameter(help="How long each round measures.")] = 60,
    rounds: Annotated[int, Parameter(help="How many rounds; medians are told.")] = 3,
    directory: Annotated[Path, Parameter(help="Images, journals and repositories go below it.")] = Path("/var/tmp"),
    output: Annotated[Path | None, Parameter(help="Write the figures as JSON to this file.")] = None,
) -> int:
    """Measure; exit code 1 if capture, keeper and ship of a VM need more than half a percent of a core."""
    with ExitStack() as stack:
        data, short = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmr-idle-", dir=parent))) for parent in (directory, None)
        )
        os.environ["VMREWIND_STATE_DIR"] = str(data / "state")
        os.environ["VMREWIND_RUNTIME_DIR"] = str(short)
        result = run(vms, seconds, rounds, data, lambda what: print(what, file=sys.stderr, flush=True))
    show(result, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    used = result["per_vm"][-1]["cpu_percent"]
    print(f"an idle protected VM costs {used:.2f} % of a core; the target is {TARGET_PERCENT} %")
    return 0 if used < TARGET_PERCENT else 1


def main() -> int:
    """Run the command; returns its exit code."""
    try:
        return int(app(result_action="return_value") or 0)
    except GuestError as error:
        print(f"idle: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
