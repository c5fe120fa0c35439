"""``python -m bench.views``: what it costs to open a moment of a large disk with a long history.

The journal has the real format and is written by the real writer, but for its payloads, which are holes: zeroes that take no space,
with their right checksums. So any amount of history fits, while record tables, which are all that opening reads, lie there as they
would. Each measurement is a process of its own. The tables are in the page cache, because they have just been written. It is opened
first as capture leaves it, then with merged tables; each way ``vmrewind export`` is started
too, as a user starts it, until it is ready.
"""

from __future__ import annotations

import cProfile
import io
import json
import os
import pstats
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final
from unittest.mock import patch

import cyclopts
import numpy as np
import xxhash
from cyclopts import Parameter

from bench.machine import describe, one_line
from vmrewind.history.history import History
from vmrewind.history.resolve import resolve
from vmrewind.history.rows import TABLE
from vmrewind.history.stretches import merged_directory
from vmrewind.history.view import View
from vmrewind.journal import format as fmt
from vmrewind.journal.clock import Clock
from vmrewind.journal.pool import Recycling, SegmentPool
from vmrewind.journal.runs import DiskInfo, ImageIdentity, RunInfo, private_directory, run_path, write_durably
from vmrewind.journal.writer import JournalWriter
from vmrewind.repository.chunks import CHUNK_SIZE
from vmrewind.repository.manifest import Manifest, new_base_id
from vmrewind.vmconfig.model import DiskConfig, Protection, VmConfig

VM: Final = "bench"
TARGET: Final = "vda"
RUN: Final = 1
SECTOR: Final = 512
LENGTH_MAX: Final = 64 << 10
_MIB: Final = 1 << 20
_READS: Final = 200
_SEED: Final = 1

app = cyclopts.App(name="python -m bench.views", help="Measure opening a moment of a large disk with a long history.")


@app.default
def main(
    *,
    records: Annotated[int, Parameter(help="How many writes the history holds.")] = 10_000_000,
    disk_gib: Annotated[int, Parameter(help="The disk's size.")] = 1024,
    batch: Annotated[int, Parameter(help="Records in a batch: how many requests the guest had in flight.")] = 16,
    repeats: Annotated[int, Parameter(help="How often it is opened.")] = 3,
    directory: Annotated[Path | None, Parameter(help="Where the journal is made; default: the one for temporary files.")] = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object.")] = False,
) -> None:
    """Make a history, open it a few times, and once more under the profiler."""
    with tempfile.TemporaryDirectory(prefix="bench-views-", dir=directory) as name:
        made = _make(Path(name), records, disk_gib << 30, batch)
        measured = {"from segments": [_in_a_process(Path(name)) for _ in range(repeats)]}
        ready = {"from segments": _ready(Path(name), repeats)}
        profiled = {"from segments": _in_a_process(Path(name), "--profile")}
        made["merging"] = _merged(Path(name))
        measured["merged"] = [_in_a_process(Path(name)) for _ in range(repeats)]
        ready["merged"] = _ready(Path(name), repeats)
        profiled["merged"] = _in_a_process(Path(name), "--profile")
        machine = describe(Path(name))
    if json:
        print(_json(machine | {"made": made, "opened": measured, "export": ready}))
        return
    print(one_line(machine))
    print(f"{records} records, {disk_gib} GiB, {batch} a batch: {made['segments']} segments, written in {made['seconds']:.1f} s")
    print("merged: " + ", ".join(f"{key} {value}" for key, value in made["merging"].items()))
    for how, runs in measured.items():
        print(f"{how}:")
        for figures in runs:
            print("  " + ", ".join(f"{key} {value}" for key, value in figures.items()))
        print(
            "  vmrewind export is ready: " + "; ".join(f"{one['seconds']} s, {one['cpu_seconds']} s of CPU" for one in ready[how])
        )
        print(profiled[how]["profile"])


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content)


def _merged(directory: Path) -> dict[str, Any]:
    """Merge the tables, as the keeper has it done; what that costs and takes."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "vmrewind.history.merging", directory / "journal"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    tables = list(merged_directory(directory / "journal").iterdir())
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "tables": len(tables),
        "bytes": sum(path.stat().st_size for path in tables),
    }


def _in_a_process(directory: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "bench.views", "measure", directory, *more], stdout=subprocess.PIPE, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _ready(directory: Path, repeats: int) -> list[dict[str, float]]:
    """How long ``vmrewind export`` takes from the process's start to the line that says that it serves, s."""
    # A socket's path has at most 107 bytes: the directory of the data may be too long for it.
    runtime = tempfile.mkdtemp(prefix="vmr-")
    environment = os.environ | {"VMREWIND_STATE_DIR": str(directory), "VMREWIND_RUNTIME_DIR": runtime}
    # As where it is installed: bytecode is there, for which the first start is not counted.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")
    command = [str(Path(sys.executable).with_name("vmrewind")), "export", VM, "--at", "latest", "--json"]
    figures: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as export:
            assert export.stdout is not None
            line = json.loads(export.stdout.readline())
            seconds = time.perf_counter() - begun
            ticks = Path(f"/proc/{export.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            export.terminate()
        assert line["event"] == "ready", line
        figures.append({"seconds": round(seconds, 3), "cpu_seconds": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")})
    shutil.rmtree(runtime)
    return figures[1:]


@app.command
def measure(directory: Path, *, profile: Annotated[bool, Parameter(negative="")] = False) -> None:
    """One measurement, in this process: seconds, bytes, counts, as one JSON object."""
    before_bytes = _held_bytes()
    profiler = cProfile.Profile(time.process_time)  # what else runs on the machine is no part of it
    if profile:
        profiler.enable()
    figures: dict[str, Any] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begun, cpu_begun = time.perf_counter(), time.process_time()
        result = call()
        figures[f"{name}_seconds"] = round(time.perf_counter() - begun, 4)
        figures[f"{name}_cpu_seconds"] = round(time.process_time() - cpu_begun, 4)
        return result

    with timed("history", lambda: History.open(VM, directory / "journal", None, bases=_state(directory) / "bases")) as history:
        branch = history.branch()
        last = json.loads((directory / "made.json").read_text())["last_seq"]
        position = timed("resolve", lambda: resolve(history, branch, f"seq:{last}", [TARGET]))
        view = timed("view", lambda: View.open(history, TARGET, position))
        figures["peak_bytes_above_imports"] = _peak_bytes() - before_bytes
        # Where something was written: anywhere else the base's zeroes are answered for.
        at = np.random.default_rng(_SEED).choice(view._index._layers[0].extents[0][:-1], _READS + 1) & -4096
        timed("first_read", lambda: view.read(int(at[0]), 4096))
        timed(f"{_READS}_reads", lambda: [view.read(int(offset), 4096) for offset in at[1:]])
        figures["held_bytes"] = _held_bytes() - before_bytes
        figures["layers_extents"], figures["extents"] = len(view._index), len(view._index.whole())
        figures["peak_bytes_per_extent"] = round(figures["peak_bytes_above_imports"] / max(figures["extents"], 1), 1)
        figures["held_bytes_per_extent"] = round(figures["held_bytes"] / max(figures["extents"], 1), 1)
    for kind in ("seconds", "cpu_seconds"):
        steps = (figures[f"{step}_{kind}"] for step in ("history", "resolve", "view", "first_read"))
        figures[f"{kind}_to_first_byte"] = round(sum(steps), 3)
    if profile:
        profiler.disable()
        out = io.StringIO()
        pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(10)
        figures["profile"] = out.getvalue().partition("filename:lineno(function)\n")[2].strip("\n")
    print(_json(figures))


def _state(directory: Path) -> Path:
    """The VM's state on a host whose state is in ``directory``."""
    return directory / "vms" / VM


def _make(directory: Path, records: int, size: int, batch: int) -> dict[str, Any]:
    """Write a history of random writes, 512 bytes to 64 KiB long, most of them short, on a disk that was all zeroes."""
    begun = time.perf_counter()
    vm, journal = uuid.uuid4(), directory / "journal"
    private_directory(journal)
    image = ImageIdentity("/bench", size, 1, 1, 0)
    manifest = Manifest(
        new_base_id(time.time_ns()),
        TARGET,
        str(vm),
        size,
        CHUNK_SIZE,
        time.time_ns(),
        "raw",
        None,
        image,
        (None,) * (size // CHUNK_SIZE),
    )
    write_durably(_state(directory) / "bases" / TARGET / f"{manifest.id}.json", manifest.to_json())
    protection = Protection(enabled=True, disk=[DiskConfig(TARGET, "/bench")], journal=str(journal))
    VmConfig(VM, None, None, protection, "toml", "", "").save(_state(directory) / "config.json")
    disks = (DiskInfo(0, TARGET, size, "raw", "/bench"),)
    info = RunInfo(RUN, None, VM, str(vm), "bench", time.time_ns(), 1, disks, {TARGET: manifest.id})
    write_durably(run_path(journal, RUN), info.to_json())
    chance = np.random.default_rng(_SEED)
    lengths = (np.exp(chance.uniform(0, np.log(LENGTH_MAX // SECTOR), records)).astype(np.uint64) * SECTOR).astype(np.uint32)
    offsets = chance.integers(0, (size - LENGTH_MAX) // SECTOR, records, np.uint64) * SECTOR
    checksums = np.array([xxhash.xxh3_64_intdigest(bytes(n * SECTOR)) for n in range(LENGTH_MAX // SECTOR + 1)], np.uint64)
    # Twice what the payloads take: what a batch does not fill of its segment is lost.
    pool = SegmentPool(journal, int(lengths.sum() * 1.1) + records * 128 + 16 * fmt.SEGMENT_SIZE)
    with patch("os.posix_fallocate", lambda fd, _, length: os.truncate(fd, length)):
        pool.allot()
    writer = JournalWriter(pool, vm.bytes, RUN, Clock(), lambda _: Recycling.NO, 1)
    writer.event(fmt.Event.START, {"vm": VM})
    table = np.frombuffer(memoryview(writer.table), TABLE, fmt.RECORDS_MAX, writer.table_at)
    table["op"], table["disk"], table["flags"] = fmt.Op.WRITE, 0, 0
    for first in range(0, records, batch):
        part = slice(first, min(first + batch, records))
        count = part.stop - first
        table["op"][:count] = fmt.Op.WRITE
        table["offset"][:count] = offsets[part]
        table["length"][:count] = lengths[part]
        table["xxh3"][:count] = checksums[lengths[part] // SECTOR]
        writer.commit(count, (), int(lengths[part].sum()))
    made = {"last_seq": writer.next_seq - 1, "segments": writer.segment_number, "seconds": time.perf_counter() - begun}
    (directory / "made.json").write_text(_json(made))
    return made


def _peak_bytes() -> int:
    # Not from getrusage: there a process begins with its parent's.
    status = Path("/proc/self/status").read_text().partition("VmHWM:")[2]
    return int(status.split()[0]) << 10


def _held_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    app()
