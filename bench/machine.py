"""What the machine is, and what a process costs: figures mean nothing without the first and little without the second."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_UTIME: Final = 11
"""Index of utime in /proc/PID/stat behind the command's closing parenthesis; stime follows (proc(5))."""


def describe(directory: Path) -> dict[str, Any]:
    """Processor, kernel, the file system that holds ``directory``, and the versions of what is measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "virtual": bool(re.search(r"^flags\s*:.*\bhypervisor\b", cpuinfo, re.MULTILINE)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "file_system": _file_system(directory),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {
            "vmrewind": version("vmrewind"),
            "commit": _first_line(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
            "python": platform.python_version(),
            "nbdkit": _first_line(["nbdkit", "--version"]).removeprefix("nbdkit "),
            "qemu": _first_line(["qemu-img", "--version"]).removeprefix("qemu-img version "),
            "fio": _first_line(["fio", "--version"]).removeprefix("fio-"),
        },
    }


def one_line(machine: dict[str, Any]) -> str:
    """``describe``'s answer for a reader."""
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    return (
        f"{machine['cores']} × {machine['cpu']}{' (virtual)' if machine['virtual'] else ''}, "
        f"{machine['memory_bytes'] / (1 << 30):.0f} GiB, Linux {machine['kernel']}, {machine['file_system']}; {versions}; "
        f"load average at the start {machine['load_average'][0]}"
    )


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time that these processes, with all their threads, have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[_UTIME]) + int(fields[_UTIME + 1])
    return ticks / _TICKS_PER_SECOND


def busy_seconds() -> float:
    """Time for which the machine's processors have not been idle so far, all together; time that a hypervisor took is in it."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_SECOND


def children_seconds() -> float:
    """User and system time of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def memory_peak_bytes(pid: int) -> int:
    """The most that the process ever had resident."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found, "every process that is not a kernel thread has a VmHWM"
    return int(found[1]) << 10


def _file_system(directory: Path) -> str:
    """``ext4 on /dev/vda`` of the mount that holds ``directory``: the last of the longest mount points (proc(5), mountinfo)."""
    real = directory.resolve()
    best, found = -1, "an unknown file system"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount.split()[4]))
        if real.is_relative_to(point) and len(point.parts) >= best:
            best, found = len(point.parts), " on ".join(kind.split()[:2])
    return found


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "not installed"
    return (done.stdout.splitlines() or ["unknown"])[0]
