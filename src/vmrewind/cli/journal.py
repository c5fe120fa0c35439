"""``vmrewind journal dump`` and ``vmrewind journal verify``."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from vmrewind.cli.progress import byte_progress
from vmrewind.errors import CorruptionError, UsageError
from vmrewind.journal import dump as journal_dump
from vmrewind.journal import verify as journal_verify
from vmrewind.journal.format import run_name

Paths = Annotated[list[Path], Parameter(help="Segment files, or journal directories.")]
Json = Annotated[bool, Parameter(negative="", help="Print one JSON object a line.")]


def dump(paths: Paths, /, *, json: Json = False) -> None:
    """Print every record of segments: sequence number, time, disk, operation, range, checksum."""
    damaged = []
    for path in _segments(paths):
        try:
            for entry in journal_dump.dump(path):
                print(json_module.dumps(entry) if json else _line(entry))
        except FileNotFoundError:
            continue  # recycled by a living capture since it was listed
        except CorruptionError as error:
            damaged.append(str(error))
            print(error, file=sys.stderr)
    if damaged:
        raise CorruptionError(f"{len(damaged)} segment(s) could not be read", "vmrewind journal verify tells more")


def _line(entry: dict[str, Any]) -> str:
    disk = "-" if entry["disk"] is None else entry["target"] or str(entry["disk"])
    if entry["op"] == "event":
        what = f"{entry['event']} {json_module.dumps(entry['content'])}"
    elif entry["op"] == "void":
        what = f"record {entry['offset']} never happened"
    elif entry["op"] == "flush":
        what = ""
    else:
        what = f"{entry['offset']}+{entry['length']}" + (f" xxh3 {entry['xxh3']}" if entry["xxh3"] else "")
    return f"{entry['seq']:>10} {entry['time']} {disk:<5} {entry['op']:<7} {what}".rstrip()


def verify(paths: Paths, /, *, json: Json = False) -> None:
    """Check every checksum of segments, and that the segments of a run follow one another."""
    _segments(paths)
    bad = 0
    with byte_progress(json=json) as update:
        reports = list(journal_verify.verify(paths, update))
    for report in reports:
        bad += bool(report.problems)
        if json:
            print(json_module.dumps(_as_data(report)))
            continue
        extent = f"{report.records} records ({report.first_seq} to {report.last_seq}) in {report.batches} batches"
        print(f"{report.path}: run {run_name(report.run)}, {extent}, {'DAMAGED' if report.problems else 'intact'}")
        for problem in report.problems:
            print(f"  offset {problem.offset}: {problem.message}")
        if report.torn is not None:
            print(f"  torn tail: {report.torn}; nothing behind it counts")
    if bad:
        raise CorruptionError(
            f"{bad} segment(s) are damaged",
            "what was shipped is in the repository still; moments that do not need the rest can be restored all the same",
        )


def _segments(paths: list[Path]) -> list[Path]:
    found = journal_verify.journal_paths(paths)
    if not found:
        raise UsageError("there is no segment there", "name segment files or a journal directory that holds some")
    return found


def _as_data(report: journal_verify.SegmentReport) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "run": run_name(report.run),
        "number": report.number,
        "first_seq": report.first_seq,
        "last_seq": report.last_seq,
        "batches": report.batches,
        "records": report.records,
        "payload_bytes": report.payload_bytes,
        "end": report.end,
        "intact": not report.problems,
        "torn": report.torn,
        "problems": [{"offset": problem.offset, "message": problem.message} for problem in report.problems],
    }
