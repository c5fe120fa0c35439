"""What going back costs: ``.venv/bin/python -m bench.rewind``. A large sparse disk, random writes, back, forth, beside a full copy.

The disk is filled here and there before it is first served, which makes its base. Then it is written to at random, and stopped;
then ``vmrewind rewind`` takes it back to before the writes and forth again, and ``qemu-img convert`` copies the same image, all in
one run, the copy synced as rewound images are. After each rewind the image is compared with what it is to be. Before each
measurement all that is dirty is written out and, with ``--cold``, dropped from the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from bench.machine import describe, one_line
from guests.protected import VMREWIND, vmrewind

_GIB = 1 << 30


@contextmanager
def served(*command: str | Path) -> Iterator[str]:
    """A command of vmrewind's that serves the disk until it is ended; yields its URI."""
    process = subprocess.Popen([VMREWIND, *command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None, "it was asked for"
    try:
        yield str(json.loads(process.stdout.readline())["disks"]["vda"]["uri"])
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def fio(where: Sequence[str], size: int, amount: int, block: str, pattern: str = "randwrite") -> None:
    """Write random data to where fio's words tell."""
    words = ["fio", "--name=load", *where, f"--size={size}", f"--io_size={amount}", f"--rw={pattern}", f"--bs={block}"]
    subprocess.run([*words, "--iodepth=16", "--refill_buffers"], check=True, stdout=subprocess.DEVNULL)


def _settle(directory: Path, *, cold: bool) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.fsync(fd)
            if cold:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _timed(*command: object, synced: Path | None = None) -> float:
    began = time.monotonic()
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    if synced is not None:
        subprocess.run(["sync", synced], check=True)
    return time.monotonic() - began


def _copy(image: Path, copy: Path) -> None:
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)


def _same(one: Path, other: Path) -> bool:
    command = ["qemu-img", "compare", "-f", "raw", "-F", "raw", one, other]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0


def measure(directory: Path, size: int, filled: int, written: int, rounds: int, *, cold: bool) -> dict[str, Any]:
    """Seconds of each; raises RuntimeError if a rewound image is not what it is to be."""
    os.environ["VMREWIND_STATE_DIR"] = str(directory / "state")
    os.environ["VMREWIND_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="vmr-")
    image, before, after, copy = (directory / f"{name}.raw" for name in ("vda", "before", "after", "copy"))
    with image.open("wb") as file:
        file.truncate(size)
    vmrewind("init", directory / "repository")
    config = directory / "rewind.toml"
    config.write_text(
        f'name = "rewind"\n[protection]\nenabled = true\nrepository = "repository"\njournal_size = {3 * written + (1 << 28)}\n'
        f'[[protection.disk]]\ntarget = "vda"\nimage = {json.dumps(str(image))}\n'
    )
    fio(["--ioengine=psync", f"--filename={image}"], size, filled, "1m")
    _copy(image, before)
    # One that is made while the disk is served might not be there when the load has ended.
    vmrewind("backup", config)
    with served("capture", config) as uri:
        then = datetime.now(UTC).isoformat()
        fio(["--ioengine=nbd", f"--uri={uri}"], size, written, "4k")
    _copy(image, after)
    runs = [run["run"] for run in json.loads(vmrewind("timeline", config, "--json").stdout)["runs"]]
    plan = json.loads(vmrewind("rewind", config, "--to", then, "--dry-run", "--json").stdout)["disks"]["vda"]
    seconds: dict[str, list[float]] = {"back": [], "forth": [], "qemu-img convert": []}
    for _ in range(rounds):
        _settle(directory, cold=cold)
        seconds["back"].append(_timed(VMREWIND, "rewind", config, "--to", then))
        if not _same(image, before):
            raise RuntimeError("what was rewound is not what was before")
        _settle(directory, cold=cold)
        seconds["forth"].append(_timed(VMREWIND, "rewind", config, "--to", "latest", "--branch", max(runs)))
        if not _same(image, after):
            raise RuntimeError("what was rewound forth is not what was after")
        copy.unlink(missing_ok=True)
        _settle(directory, cold=cold)
        seconds["qemu-img convert"].append(_timed("qemu-img", "convert", "-f", "raw", "-O", "raw", image, copy, synced=copy))
    return {"size_bytes": size, "extents": plan["extents"], "extent_bytes": plan["bytes"], "seconds": seconds}


def main(
    *,
    size_gib: Annotated[float, Parameter(help="Size of the disk.")] = 64,
    filled_gib: Annotated[float, Parameter(help="So much of it holds data.")] = 4,
    written_gib: Annotated[float, Parameter(help="So much is written and taken back.")] = 1,
    rounds: Annotated[int, Parameter(help="How often.")] = 1,
    cold: Annotated[bool, Parameter(negative="", help="Begin each measurement without anything in the page cache.")] = False,
    directory: Annotated[Path, Parameter(help="All goes below it.")] = Path("/var/tmp"),
    output: Annotated[Path | None, Parameter(help="A JSON file for the figures.")] = None,
) -> None:
    """Time a rewind beside a full copy of the same disk."""
    sizes = [int(gib * _GIB) // (1 << 20) * (1 << 20) for gib in (size_gib, filled_gib, written_gib)]
    place = Path(tempfile.mkdtemp(prefix="vmr-rewind-", dir=directory))
    try:
        found = measure(place, *sizes, rounds, cold=cold)
    finally:
        shutil.rmtree(place)
    machine = describe(directory)
    print(one_line(machine))
    written = f"{found['extents']} extents, {found['extent_bytes'] >> 20} MiB"
    print(f"a disk of {size_gib:g} GiB, {filled_gib:g} GiB of it data; written and taken back: {written}")
    for what, times in found["seconds"].items():
        print(f"  {what:<18} {' '.join(f'{seconds:8.1f}' for seconds in times)} s")
    if output is not None:
        output.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cyclopts.run(main))
