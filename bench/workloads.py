"""How it is measured: the loads, put on a disk by fio's nbd engine and by ``qemu-img bench``.

A new load is a line in ``WORKLOADS``; a new kind of load is a class with ``takes`` and ``run``.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from bench.peers import BenchError, Nbdkit, Peer, QemuNbdDirect, Vmrewind, write_in_pieces

_KIB: Final = 1 << 10
_PATIENCE_SECONDS: Final = 120
"""How much longer than asked for a load may take before it counts as hung."""
_FLUSHED_WRITES_PER_SECOND_MAX: Final = 100_000
_QEMU_WRITES_PER_SECOND: Final = 25_000
"""``qemu-img bench`` takes a number of requests, not a time."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What one load did: reads and writes, their bytes, the time, flushes; latencies in microseconds where they are known."""

    operations: int
    bytes: int
    seconds: float
    flushes: int = 0
    latency_mean_us: float | None = None
    latency_p99_us: float | None = None


class Workload(Protocol):
    """A load. ``name`` selects it, ``title`` shows it, ``group`` is the table that it stands in."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def group(self) -> str: ...

    def takes(self, peer: type[Peer]) -> bool:
        """Whether this load can be put on this kind of peer."""
        ...

    def run(self, peer: Peer, seconds: float, seed: int, scratch: Path) -> Measure:
        """Put the load on the peer's disk for about so long. Equal seeds give equal offsets. Raises BenchError."""
        ...


@dataclass(frozen=True, slots=True)
class Fio:
    """fio's nbd engine: its own NBD client (libnbd), one connection."""

    name: str
    title: str
    group: str
    pattern: str
    """fio's ``rw``."""
    block: int
    """Bytes per request."""
    depth: int
    """Requests in flight."""

    def takes(self, peer: type[Peer]) -> bool:
        """Whatever serves NBD from the page cache."""
        return peer.serves_nbd and peer is not QemuNbdDirect

    def run(self, peer: Peer, seconds: float, seed: int, scratch: Path) -> Measure:
        """See Workload."""
        options = [f"--rw={self.pattern}", f"--bs={self.block}", f"--iodepth={self.depth}", f"--randseed={seed}", "--time_based"]
        return fio(peer, options, seconds, scratch)


@dataclass(frozen=True, slots=True)
class FioFlushes:
    """4 KiB random writes by fio with a flush behind every ``every`` of them, as a list of requests that fio plays back.

    Not ``--fsync=N``: with fio 3.33's nbd engine and more than one request in flight that sends a burst of flushes, as many as
    there is room for, each time it is due (12,325 writes came with 9,131 flushes where 770 were asked for), and how many
    depends on the server's speed.
    """

    every: int
    depth: int = 16
    group: str = "flush"

    @property
    def name(self) -> str:
        """See Workload."""
        return f"4k-flush-{self.every}"

    @property
    def title(self) -> str:
        """See Workload."""
        return f"4 KiB random write, flush every {self.every}" if self.every > 1 else "4 KiB random write, flush after each"

    def takes(self, peer: type[Peer]) -> bool:
        """Whatever serves NBD from the page cache."""
        return peer.serves_nbd and peer is not QemuNbdDirect

    def run(self, peer: Peer, seconds: float, seed: int, scratch: Path) -> Measure:
        """See Workload."""
        requests = scratch / f"{self.name}-{seed}.iolog"
        if not requests.exists():
            self._write_requests(requests, int(seconds * _FLUSHED_WRITES_PER_SECOND_MAX), peer.place.image_size, seed)
        return fio(peer, [f"--read_iolog={requests}", f"--iodepth={self.depth}"], seconds, scratch)

    def _write_requests(self, path: Path, writes: int, size: int, seed: int) -> None:
        offset = random.Random(seed).randrange
        lines = ["fio version 2 iolog", "nbd add", "nbd open"]
        for number in range(1, writes + 1):
            lines.append(f"nbd write {offset(size >> 12) << 12} 4096")
            if number % self.every == 0:
                lines.append("nbd sync 0 0")
        path.write_text("\n".join(lines) + "\n")


@dataclass(frozen=True, slots=True)
class FioCold:
    """Random reads of what is not in the page cache: dropped before, and nothing is read twice.

    Afterwards the image is written anew in 4 KiB pieces: the page cache holds what was read in large folios, which slow writes.
    """

    block: int
    depth: int = 16
    group: str = "cold"

    @property
    def name(self) -> str:
        """See Workload."""
        return f"{self.block >> 10}k-coldread-{self.depth}"

    @property
    def title(self) -> str:
        """See Workload."""
        return f"{self.block >> 10} KiB random read, {self.depth} in flight, page cache dropped"

    def takes(self, peer: type[Peer]) -> bool:
        """The ways to serve a file that are best at this."""
        return peer in (Nbdkit, QemuNbdDirect, Vmrewind)

    def run(self, peer: Peer, seconds: float, seed: int, scratch: Path) -> Measure:
        """See Workload. Shorter if all of the image has been read before."""
        with open(peer.image, "r+b", buffering=0) as image:
            os.fsync(image.fileno())
            os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            measure = fio(
                peer, ["--rw=randread", f"--bs={self.block}", f"--iodepth={self.depth}", f"--randseed={seed}"], seconds, scratch
            )
            os.posix_fadvise(image.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            write_in_pieces(image.fileno(), peer.place.image_size)
        return measure


@dataclass(frozen=True, slots=True)
class FioTwoDisks:
    """Half of a load on each of two disks at once: to be compared with the whole load on one."""

    pattern: str
    word: str
    depth: int
    """Requests in flight on each disk."""
    group: str = "random"

    @property
    def name(self) -> str:
        """See Workload."""
        return f"4k-{self.pattern}-2x{self.depth}"

    @property
    def title(self) -> str:
        """See Workload."""
        return f"4 KiB random {self.word}, two disks, {self.depth} in flight on each"

    def takes(self, peer: type[Peer]) -> bool:
        """What serves two disks with one process."""
        return peer is Vmrewind

    def run(self, peer: Peer, seconds: float, seed: int, scratch: Path) -> Measure:
        """See Workload."""
        assert isinstance(peer, Vmrewind), "nothing else is taken"
        options = [f"--rw={self.pattern}", f"--bs={4 * _KIB}", f"--iodepth={self.depth}", f"--randseed={seed}", "--time_based"]
        return fio(peer, options, seconds, scratch, second_uri=peer.second_uri)


@dataclass(frozen=True, slots=True)
class QemuImg:
    """``qemu-img bench``: 4 KiB writes through QEMU's block layer, so what a guest's disk would get below its controller."""

    name: str
    title: str
    depth: int
    group: str = "qemu"

    def takes(self, peer: type[Peer]) -> bool:
        """Whatever there is: QEMU opens NBD and files alike."""
        return peer is not QemuNbdDirect

    def run(self, peer: Peer, seconds: float, seed: int, scratch: Path) -> Measure:  # noqa: ARG002
        """See Workload. The writes are sequential, so there is nothing to seed; their number stands for the time."""
        block = 4 * _KIB
        count = max(1, int(seconds * _QEMU_WRITES_PER_SECOND))
        command = ["qemu-img", "bench", "-w", "-c", str(count), "-d", str(self.depth), "-s", str(block), *peer.qemu_img]
        output = _run(peer, command, seconds).stdout
        found = re.search(r"Run completed in ([\d.]+) seconds", output)
        if not found:
            raise BenchError(f"{peer.title}: qemu-img bench said: {output}")
        return Measure(count, count * block, max(float(found[1]), 0.001))


def fio(peer: Peer, options: list[str], seconds: float | None, scratch: Path, *, second_uri: str | None = None) -> Measure:
    """Run fio on the peer's disk, and the same on a second at once if one is given, for at most so long. Raises BenchError."""
    output = scratch / "fio.json"
    if seconds is not None:
        options = [*options, f"--runtime={max(1, round(seconds * 1000))}ms"]
    command = ["fio", f"--output={output}", "--output-format=json", "--eta=never"]
    for number, uri in enumerate(uri for uri in (peer.uri, second_uri) if uri is not None):
        command += [f"--name=load{number}", "--ioengine=nbd", f"--uri={uri}", f"--size={peer.place.image_size}", *options]
    done = _run(peer, command, seconds or 0)
    text = output.read_text()
    # libnbd's and fio's own messages come first in the same file.
    start = text.find("{")
    if start < 0:
        raise BenchError(f"{peer.title}: fio said: {text}{done.stderr}")
    jobs: list[dict[str, Any]] = json.loads(text[start:])["jobs"]
    kinds = [job[kind] for job in jobs for kind in ("read", "write") if job[kind]["total_ios"]]
    if any(job["error"] for job in jobs) or not kinds:
        raise BenchError(f"{peer.title}: fio did nothing (errors {[job['error'] for job in jobs]}): {text[:start]}{done.stderr}")
    operations = sum(kind["total_ios"] for kind in kinds)
    latencies = [kind["clat_ns"] for kind in kinds]
    return Measure(
        operations=operations,
        bytes=sum(kind["io_bytes"] for kind in kinds),
        seconds=max(kind["runtime"] for kind in kinds) / 1000,
        flushes=sum(job["sync"]["total_ios"] for job in jobs),
        latency_mean_us=sum(latency["mean"] * latency["N"] for latency in latencies) / operations / 1000,
        latency_p99_us=max(latency["percentile"]["99.000000"] for latency in latencies) / 1000,
    )


def write_through(peer: Peer, length: int, scratch: Path) -> None:
    """Write ``length`` bytes to the peer's disk, from its beginning and round again."""
    fio(peer, ["--rw=write", "--bs=256k", "--iodepth=4", f"--io_size={length}"], None, scratch)


def _run(peer: Peer, command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + _PATIENCE_SECONDS)
    except FileNotFoundError as error:
        raise BenchError(f"{command[0]} is not installed; run script/bootstrap") from error
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{peer.title}: {' '.join(command)} does not end") from error
    if done.returncode:
        raise BenchError(f"{peer.title}: {' '.join(command)} failed ({done.returncode}): {done.stderr or done.stdout}")
    return done


def _random(pattern: str, word: str, depth: int) -> Fio:
    return Fio(f"4k-{pattern}-{depth}", f"4 KiB random {word}, {depth} in flight", "random", pattern, 4 * _KIB, depth)


def _sequential(pattern: str, kib: int) -> Fio:
    return Fio(f"{kib}k-{pattern}-8", f"{kib} KiB sequential {pattern}, 8 in flight", "sequential", pattern, kib * _KIB, 8)


WORKLOADS: Final[tuple[Workload, ...]] = (
    *(
        _random(pattern, word, depth)
        for pattern, word in (("randwrite", "write"), ("randread", "read"), ("randrw", "read and write"))
        for depth in (1, 4, 16)
    ),
    FioTwoDisks("randwrite", "write", 8),
    FioTwoDisks("randrw", "read and write", 8),
    *(_sequential(pattern, kib) for pattern in ("write", "read") for kib in (64, 256)),
    *(FioFlushes(every) for every in (1, 16, 128)),
    QemuImg("qemu-write-16", "4 KiB write through QEMU, 16 in flight", 16),
    FioCold(4 * _KIB),
    FioCold(64 * _KIB),
)
TWO_DISKS: Final = {"4k-randwrite-2x8": "4k-randwrite-16", "4k-randrw-2x8": "4k-randrw-16"}
"""Loads on two disks at once, and what the same number of requests in flight does on one."""
GROUPS: Final = {
    "random": "Random",
    "sequential": "Sequential",
    "flush": "With flushes, 16 in flight",
    "cold": "Reads that are not in the page cache",
    "qemu": "Through QEMU's block layer (qemu-img bench)",
}
