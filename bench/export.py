"""What reading a moment over NBD costs: ``.venv/bin/python -m bench.export``. ``vmrewind export`` beside nbdkit, the same bytes.

Three disks: one whose data is all in the base (a directory), one that was written in 64 KiB pieces since, whose data is all in the
local journal, and one that was written at random in 4 KiB pieces. Each is read with nbdcopy and fio from the export, and from
nbdkit's ``file`` plugin with an image that holds the same; interleaved, medians, all of it in the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import cyclopts
from cyclopts import Parameter

from bench.machine import describe, one_line
from bench.rewind import fio, served
from guests.protected import vmrewind

_MIB: Final = 1 << 20
_KINDS: Final = {"base": None, "journal, 64 KiB writes": "64k", "journal, 4 KiB random writes": "4k"}


@contextmanager
def _nbdkit(image: Path, socket: Path) -> Iterator[str]:
    process = subprocess.Popen(["nbdkit", "-f", "-U", socket, "file", image])
    try:
        while not socket.exists():
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait()
        socket.unlink(missing_ok=True)


def _copied(uri: str) -> float:
    began = time.monotonic()
    subprocess.run(["nbdcopy", uri, "null:"], check=True)
    return time.monotonic() - began


def _read(pattern: str, block: str, uri: str, seconds: float) -> float:
    """MiB a second."""
    words = ["fio", "--name=read", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", f"--bs={block}", "--iodepth=16"]
    words += ["--time_based", f"--runtime={int(seconds * 1000)}ms", "--output-format=json"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
    # It says something in front of the object now and then.
    return float(json.loads(done.stdout[done.stdout.index(b"{") :])["jobs"][0]["read"]["bw_bytes"]) / _MIB


def _made(directory: Path, kind: str | None, size: int) -> tuple[Path, Path]:
    """(configuration, image) of a stopped VM whose disk is full."""
    directory.mkdir()
    image, config = directory / "vda.raw", directory / "export.toml"
    with image.open("wb") as file:
        file.truncate(size)
    name = f"export-{directory.name}"
    vmrewind("init", directory / "repository")
    config.write_text(
        f'name = "{name}"\n[protection]\nenabled = true\nrepository = "repository"\njournal_size = {3 * size}\n'
        f'[[protection.disk]]\ntarget = "vda"\nimage = {json.dumps(str(image))}\n'
    )
    if kind is None:
        fio(["--ioengine=psync", f"--filename={image}"], size, size, "1m", "write")
    # Of the disk before its load; one that is made while it is served might not be there when the load has ended.
    vmrewind("backup", config)
    if kind is not None:
        with served("capture", config) as uri:
            fio(["--ioengine=nbd", f"--uri={uri}"], size, size, kind, "write" if kind == "64k" else "randwrite")
    return config, image


def measure(directory: Path, size: int, rounds: int, seconds: float) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """MiB a second by kind and load: (export's, nbdkit's) of each round."""
    os.environ["VMREWIND_STATE_DIR"] = str(directory / "state")
    os.environ["VMREWIND_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="vmr-")
    loads: dict[str, Callable[[str], float]] = {
        "nbdcopy": lambda uri: size / _MIB / _copied(uri),
        "64 KiB sequential": lambda uri: _read("read", "64k", uri, seconds),
        "256 KiB sequential": lambda uri: _read("read", "256k", uri, seconds),
        "64 KiB random": lambda uri: _read("randread", "64k", uri, seconds),
        "4 KiB random": lambda uri: _read("randread", "4k", uri, seconds),
    }
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for number, (kind, block) in enumerate(_KINDS.items()):
        config, image = _made(directory / str(number), block, size)
        found[kind] = {load: ([], []) for load in loads}
        with (
            served("export", config, "--at", "latest", "--json") as ours,
            _nbdkit(image, Path(os.environ["VMREWIND_RUNTIME_DIR"]) / "nbdkit.sock") as theirs,
        ):
            for _ in range(rounds):
                for load, run in loads.items():
                    for uri, into in zip((ours, theirs), found[kind][load], strict=True):
                        into.append(run(uri))
    return found


def main(
    *,
    size_mib: Annotated[int, Parameter(help="Size of each disk.")] = 512,
    rounds: Annotated[int, Parameter(help="How often.")] = 3,
    seconds: Annotated[float, Parameter(help="Of each of fio's loads.")] = 2,
    directory: Annotated[Path, Parameter(help="All goes below it.")] = Path("/var/tmp"),
    output: Annotated[Path | None, Parameter(help="A JSON file for the figures.")] = None,
) -> None:
    """Time reads of an export beside nbdkit's."""
    place = Path(tempfile.mkdtemp(prefix="vmr-export-", dir=directory))
    try:
        found = measure(place, size_mib * _MIB, rounds, seconds)
    finally:
        shutil.rmtree(place)
    machine = describe(directory)
    print(one_line(machine))
    for kind, loads in found.items():
        print(kind)
        for load, (ours, theirs) in loads.items():
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            medians = f"{statistics.median(ours):7.0f} MiB/s, nbdkit {statistics.median(theirs):7.0f}"
            print(f"  {load:<20} {medians}: {ratio:.2f}")
    if output is not None:
        output.write_text(json.dumps({"machine": machine, "size_bytes": size_mib * _MIB, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(cyclopts.run(main))
