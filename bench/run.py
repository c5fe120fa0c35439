"""One run of the benchmark: which load is put on which peer, when, and what came of it.

Rounds are the outermost loop and peers the innermost: what the rest of the machine does, and how a disk tires, then falls on all
peers alike, and a ratio is taken between neighbours in time. Dirty pages of one load are written out before the next begins.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from bench.machine import busy_seconds, children_seconds, cpu_seconds, describe, memory_peak_bytes
from bench.peers import PEERS, SUBJECT, BenchError, Peer, Place, Server, Vmrewind
from bench.workloads import Measure, Workload, write_through


@dataclass(frozen=True, slots=True)
class Settings:
    """What is asked for. ``rounds`` is also how often each server's start is timed."""

    workloads: Sequence[Workload]
    peers: Sequence[str]
    seconds: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one load on one peer."""

    measure: Measure
    cpu_seconds: float | None
    """The server's, None where there is no server."""
    others_cores: float
    """Cores that were busy meanwhile with neither server nor load: other programs, and the kernel's own threads."""


@dataclass(slots=True)
class Cell:
    """All rounds of one load on one peer."""

    workload: Workload
    peer: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Reads and writes per second, by round."""
        return [sample.measure.operations / sample.measure.seconds for sample in self.samples]

    @property
    def rate(self) -> float:
        """The median of ``rates``."""
        return median(self.rates)

    @property
    def bytes_rate(self) -> float:
        """Bytes per second, median."""
        return median(sample.measure.bytes / sample.measure.seconds for sample in self.samples)

    @property
    def spread(self) -> float:
        """How far the rounds lie apart: (highest − lowest) / median."""
        return (max(self.rates) - min(self.rates)) / self.rate

    def cpu_per(self, amount: Callable[[Measure], float]) -> float | None:
        """The server's CPU seconds per ``amount`` of what was done, median; None where there is no server."""
        return _median_or_none(None if s.cpu_seconds is None else s.cpu_seconds / amount(s.measure) for s in self.samples)


@dataclass(slots=True)
class Result:
    """Everything that a run found out."""

    started: datetime
    machine: dict[str, Any]
    settings: Settings
    place: Place
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    """By (workload, peer)."""
    start_seconds: dict[str, list[float]] = field(default_factory=dict)
    """Creation of the process to its socket being served, by peer: the first start, then one per round."""
    assign_seconds: list[float] = field(default_factory=list)
    """Of capture's starts, those alone: from the start of the start to its disks being served, as its event log tells."""
    memory_peak_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    """By peer and role."""
    holds: list[float] = field(default_factory=list)
    """Seconds for which capture held writes because the journal could take no more, one each time."""

    @property
    def others_cores(self) -> float:
        """``Sample.others_cores``, median of all: how far the machine was the benchmark's."""
        return median(sample.others_cores for cell in self.cells.values() for sample in cell.samples)

    def ratio(self, workload: Workload, peer: str) -> float | None:
        """vmrewind's rate to the peer's, the median over rounds; None where one of the two is missing."""
        subject, other = self.cells.get((workload.name, SUBJECT)), self.cells.get((workload.name, peer))
        if subject is None or other is None:
            return None
        return median(own / its for own, its in zip(subject.rates, other.rates, strict=True))

    def own_ratio(self, workload: str, other: str) -> float | None:
        """vmrewind's rate under one load to its rate under another, the median over rounds; None where one is missing."""
        first, second = self.cells.get((workload, SUBJECT)), self.cells.get((other, SUBJECT))
        if first is None or second is None:
            return None
        return median(own / its for own, its in zip(first.rates, second.rates, strict=True))


def run(settings: Settings, place: Place, scratch: Path, step: Callable[[str], None]) -> Result:
    """Do it all; ``step`` is told of every load before it begins. Raises BenchError."""
    wanted = [name for name in settings.peers if any(w.takes(PEERS[name]) for w in settings.workloads)]
    result = Result(datetime.now(UTC), describe(place.data), settings, place)
    with ExitStack() as stack:
        peers = {name: stack.enter_context(_started(PEERS[name](place))) for name in wanted}
        for peer in peers.values():
            if isinstance(peer, Server):
                result.start_seconds[peer.name] = [peer.start_seconds]
            if isinstance(peer, Vmrewind):
                step("the journal is written through once")
                _warm_up(peer, scratch)
        for number in range(settings.rounds):
            for workload in settings.workloads:
                for peer in _shuffled([peer for peer in peers.values() if workload.takes(type(peer))], workload, number):
                    step(f"{workload.title}: {peer.title}")
                    _settle(peers.values())
                    cell = result.cells.setdefault((workload.name, peer.name), Cell(workload, peer.name))
                    cell.samples.append(_sample(workload, peer, settings.seconds, number + 1, scratch))
        for peer in peers.values():
            if isinstance(peer, Server):
                _look_at(peer, result, step)
    return result


@contextmanager
def _started(peer: Peer) -> Iterator[Peer]:
    try:
        peer.start()
        yield peer
    finally:
        peer.stop()


def _shuffled(peers: list[Peer], workload: Workload, number: int) -> list[Peer]:
    """Another order for every load and round, the same in every run: what a load leaves behind in the disk falls on each peer."""
    Random(f"{workload.name} {number}").shuffle(peers)
    return peers


def _warm_up(peer: Vmrewind, scratch: Path) -> None:
    """Bring the journal to its steady state, where every write overwrites a recycled segment."""
    for _ in range(3):
        write_through(peer, peer.place.journal_size, scratch)
        if peer.recycling:
            return
    raise BenchError(f"{peer.title}: three times the journal's size was written and some of its segments are still unused")


def _settle(peers: Iterable[Peer]) -> None:
    for peer in peers:
        for file in peer.files:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _sample(workload: Workload, peer: Peer, seconds: float, seed: int, scratch: Path) -> Sample:
    pids = list(peer.processes.values())
    began, busy, load, server = time.monotonic(), busy_seconds(), children_seconds(), cpu_seconds(pids)
    try:
        measure = workload.run(peer, seconds, seed, scratch)
        server = cpu_seconds(pids) - server
    except FileNotFoundError as error:
        assert isinstance(peer, Server), "only a server has processes that can be gone"
        raise peer.failure(f"died under {workload.title}") from error
    load = children_seconds() - load
    others = (busy_seconds() - busy - load - server) / (time.monotonic() - began)
    return Sample(measure, server if pids else None, max(0.0, others))


def _look_at(peer: Server, result: Result, step: Callable[[str], None]) -> None:
    """Memory after all that load, what capture's log says, and how long a start takes once everything is there."""
    result.memory_peak_bytes[peer.name] = {role: memory_peak_bytes(pid) for role, pid in peer.processes.items()}
    if isinstance(peer, Vmrewind):
        log = peer.event_log()
        result.holds = [float(str(e["held_seconds"])) for e in log if e["event"] == "journal.room"]
    for _ in range(result.settings.rounds):
        step(f"start of {peer.title}")
        peer.stop()
        peer.start()
        result.start_seconds[peer.name].append(peer.start_seconds)
        if isinstance(peer, Vmrewind):
            times = {str(entry["event"]): int(str(entry["time_ns"])) for entry in peer.event_log()}
            result.assign_seconds.append((times["disks.assigned"] - times["start.begin"]) / 1e9)


def _median_or_none(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
