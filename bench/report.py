"""What is told of a run: tables for readers (also valid Markdown), JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import one_line
from bench.peers import PEERS, SUBJECT
from bench.run import Cell, Result
from bench.workloads import GROUPS, TWO_DISKS, Workload

FORMAT: Final = 1
_BYTES_RATE_FROM: Final = 64 << 10
"""Requests this large or larger are told in MiB/s."""


def to_json(result: Result) -> dict[str, Any]:
    """The run as JSON: rates in operations and bytes per second, times in seconds, sizes in bytes."""
    return {
        "format": FORMAT,
        "started": result.started.isoformat(),
        "machine": result.machine,
        "settings": {
            "seconds": result.settings.seconds,
            "rounds": result.settings.rounds,
            "image_bytes": result.place.image_size,
            "journal_bytes": result.place.journal_size,
        },
        "cells": [_cell(result, cell) for cell in result.cells.values()],
        "start_seconds": {
            peer: {"first": first, "later": later, "later_median": median(later)}
            for peer, (first, *later) in result.start_seconds.items()
        },
        "two_disks_ratio": {f"{halves} to {whole}": result.own_ratio(halves, whole) for halves, whole in TWO_DISKS.items()},
        "others_cores": result.others_cores,
        "capture_assign_seconds": result.assign_seconds,
        "memory_peak_bytes": result.memory_peak_bytes,
        "capture_holds_seconds": result.holds,
    }


def _cell(result: Result, cell: Cell) -> dict[str, Any]:
    return {
        "workload": cell.workload.name,
        "peer": cell.peer,
        "operations_per_second": cell.rate,
        "bytes_per_second": cell.bytes_rate,
        "spread": cell.spread,
        "vmrewind_ratio": result.ratio(cell.workload, cell.peer),
        "cpu_seconds_per_100k_operations": cell.cpu_per(lambda m: m.operations / 1e5),
        "cpu_seconds_per_gib": cell.cpu_per(lambda m: m.bytes / (1 << 30)),
        "rounds": [
            {**asdict(sample.measure), "cpu_seconds": sample.cpu_seconds, "others_cores": sample.others_cores}
            for sample in cell.samples
        ],
    }


def show(result: Result, console: Console) -> None:
    """Print the tables."""
    settings, place = result.settings, result.place
    console.print(f"{result.started:%Y-%m-%d %H:%M} UTC. {one_line(result.machine)}.")
    console.print(
        f"Medians of {settings.rounds} rounds of {settings.seconds:g} s; image {place.image_size >> 20} MiB, "
        f"journal {place.journal_size >> 20} MiB. Meanwhile {result.others_cores:.1f} cores (median) were busy with neither "
        "servers nor loads."
    )
    for group, title in GROUPS.items():
        workloads = [w for w in settings.workloads if w.group == group]
        if workloads:
            console.print(f"\n{title}: per second; then vmrewind's ratio to each; ± half of the rounds' spread\n")
            console.print(_rates(result, workloads))
            console.print("\nThe server's CPU seconds per 100,000 operations / per GiB\n")
            console.print(_costs(result, workloads))
    for halves, whole in TWO_DISKS.items():
        ratio = result.own_ratio(halves, whole)
        if ratio is not None:
            console.print(f"\nvmrewind, {halves} (two disks, half the load each) to {whole} (one disk, all of it): {ratio:.2f}")
    console.print("\nServers\n")
    console.print(_servers(result))
    if result.assign_seconds:
        starts = result.assign_seconds
        console.print(f"\nvmrewind, begin of the start to disks served: {median(starts):.2f} s of the start given above.")
        held = f"{len(result.holds)} times, {sum(result.holds):.2f} s in all" if result.holds else "never"
        console.print(f"vmrewind held writes because the disk did not take the image's as fast as they came: {held}.")


def _peers_of(result: Result, workloads: list[Workload]) -> list[str]:
    """The peers of a table, in the order of PEERS, the subject last."""
    taking = [name for name in PEERS if any((w.name, name) in result.cells for w in workloads)]
    return sorted(taking, key=lambda name: name == SUBJECT)


def _table(first: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(first, no_wrap=True)
    return table


def _rates(result: Result, workloads: list[Workload]) -> Table:
    peers = _peers_of(result, workloads)
    others = [peer for peer in peers if peer != SUBJECT] if SUBJECT in peers else []
    table = _table("load")
    for heading in (*(PEERS[peer].title for peer in peers), *(f"to {PEERS[peer].title}" for peer in others)):
        table.add_column(heading, justify="right")
    for workload in workloads:
        cells = [result.cells.get((workload.name, peer)) for peer in peers]
        ratios = [result.ratio(workload, peer) for peer in others]
        table.add_row(
            workload.title,
            *("" if cell is None else f"{rate_text(cell)} ±{cell.spread / 2:.0%}" for cell in cells),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )
    return table


def rate_text(cell: Cell) -> str:
    """A cell's rate with its unit."""
    measure = cell.samples[0].measure
    if measure.bytes / measure.operations >= _BYTES_RATE_FROM:
        return f"{cell.bytes_rate / (1 << 20):,.0f} MiB"
    return f"{cell.rate:,.0f}"


def _costs(result: Result, workloads: list[Workload]) -> Table:
    peers = [peer for peer in _peers_of(result, workloads) if PEERS[peer].serves_nbd]
    table = _table("load")
    for peer in peers:
        table.add_column(PEERS[peer].title, justify="right")
    for workload in workloads:
        table.add_row(workload.title, *_cost_texts(result, workload, peers))
    return table


def _cost_texts(result: Result, workload: Workload, peers: list[str]) -> Iterator[str]:
    for peer in peers:
        cell = result.cells.get((workload.name, peer))
        operations = cell and cell.cpu_per(lambda m: m.operations / 1e5)
        volume = cell and cell.cpu_per(lambda m: m.bytes / (1 << 30))
        yield "" if operations is None or volume is None else f"{operations:.2f} / {volume:.2f}"


def _servers(result: Result) -> Table:
    table = _table("server")
    for heading in ("first start, s", "later starts, s", "peak memory"):
        table.add_column(heading, justify="right")
    for peer, (first, *later) in result.start_seconds.items():
        memory = result.memory_peak_bytes[peer]
        roles = ", ".join(f"{role} {size / (1 << 20):.0f} MiB" for role, size in memory.items())
        table.add_row(PEERS[peer].title, f"{first:.2f}", f"{median(later):.2f}", roles)
    return table
