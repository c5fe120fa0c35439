"""``vmrewind verify``."""

from __future__ import annotations

import json as json_module
import re
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Final

from cyclopts import Parameter
from rich.filesize import decimal

from vmrewind.cli.drill import DrillOptions, run_drill
from vmrewind.cli.progress import byte_progress
from vmrewind.errors import CorruptionError, RepositoryError, UsageError
from vmrewind.history.moments import format_time
from vmrewind.journal.format import run_name
from vmrewind.recover.affected import Affected
from vmrewind.recover.findings import Finding, Kind, Part
from vmrewind.recover.verify import verify as verify_repository
from vmrewind.repository.repository import Repository
from vmrewind.start.resolve import being_made, parse_stored

_AGE: Final = re.compile(r"(\d{1,6})([hd])", re.ASCII)
_SHOWN_MAX: Final = 4
"""Lines of affected moments for one finding."""
_WORDS: Final = {Kind.DAMAGE: "DAMAGED", Kind.UNCHECKED: "not checked", Kind.OVERDUE: "OVERDUE", Kind.GAP: "gap", Kind.NOTE: "note"}
_OUTCOMES: Final = {Kind.DAMAGE: "damaged", Kind.UNCHECKED: "incomplete", Kind.OVERDUE: "overdue"}
"""The first that was found says it."""
_EXIT_CODES: Final = {"damaged": CorruptionError.exit_code, "incomplete": RepositoryError.exit_code, "overdue": 20, "sound": 0}


def verify(
    target: Annotated[str, Parameter(help="The repository, or one VM of it: URL or URL/VM.", show=True)],
    /,
    *,
    data: Annotated[bool, Parameter(negative="", help="Read every byte and check every checksum.")] = False,
    all: Annotated[bool, Parameter(negative="", help="With --data: also what an earlier verification has read.")] = False,  # noqa: A002
    older_than: Annotated[str | None, Parameter(help="With --data: read again what was read longer ago, e.g. 30d or 12h.")] = None,
    drill: Annotated[
        bool, Parameter(negative="", help="Restore a random moment of a VM into scratch space and boot it, without any network.")
    ] = False,
    at: Annotated[str | None, Parameter(allow_leading_hyphen=True, help="With --drill: this moment.")] = None,
    seed: Annotated[int | None, Parameter(help="With --drill: choose the moment by this number, as an earlier drill did.")] = None,
    scratch: Annotated[Path | None, Parameter(help="With --drill: a directory with room for the disks.")] = None,
    until: Annotated[
        str | None, Parameter(help="With --drill: the text to wait for on the serial console; default: the guest agent's answer.")
    ] = None,
    seconds: Annotated[int | None, Parameter(help="With --drill: how long to wait for it; default: 300.")] = None,
    json: Annotated[bool, Parameter(negative="", help="Print one JSON object for each finding, then a summary.")] = False,
) -> int:
    """Verify what a repository holds: that nothing is missing and, with --data, that every byte is what it was.

    Exit code 0: sound; 7: damaged; 5: nothing damaged was found, but not everything could be checked; 20: neither, but
    records are not there that should have been carried long ago, or that were deleted.
    Of a drill 0: it booted; 1: it did not; 10: QEMU refused the machine, so it could not be tried.
    """
    options = DrillOptions(at, seed, scratch, until, seconds)
    if drill:
        if data or all or older_than is not None:
            raise UsageError("--drill is a verification of its own", "leave out --data, --all and --older-than")
        if (stored := parse_stored(target)) is None:
            raise UsageError(f"{target}: --drill boots one VM of a repository", "write URL/VM")
        with stored.history() as history:
            return run_drill(history, options, json=json)
    if options != DrillOptions(None, None, None, None, None):
        raise UsageError("--at, --seed, --scratch, --until and --seconds are for --drill", "add --drill")
    again_ns = _again_ns(data=data, everything=all, older_than=older_than)
    repository, vm = _open(target)
    counts: Counter[Kind] = Counter()

    def found(finding: Finding) -> None:
        counts[finding.kind] += 1
        if json:
            print(json_module.dumps(_as_data(finding)), flush=True)
        else:
            _show(finding)

    with byte_progress(json=json) as update:
        vms = None if vm is None else [vm]
        parts = verify_repository(repository, found, update, vms=vms, data=data, again_ns=again_ns, being_made=being_made)
    nothing = vm is not None and not any(part.vm == vm and part.objects for part in parts)
    if nothing and not counts[Kind.UNCHECKED] and not counts[Kind.DAMAGE]:
        raise RepositoryError(
            f"{repository.url}: there is no VM called {vm!r}", f"vmrewind list {repository.url} shows which there are"
        )
    outcome = next((word for kind, word in _OUTCOMES.items() if counts[kind]), "sound")
    if json:
        print(json_module.dumps(_summary(repository, parts, counts, outcome)))
    else:
        for part in parts:
            _show_part(part, data=data)
        told = ", ".join(f"{counts[kind]} {kind.value}" for kind in Kind if counts[kind]) or "nothing found"
        print(f"{repository.url}: {outcome} ({told})")
    return _EXIT_CODES[outcome]


def _again_ns(*, data: bool, everything: bool, older_than: str | None) -> int:
    if not data and (everything or older_than is not None):
        raise UsageError("--all and --older-than are for --data", "add --data: without it nothing is read that could be read again")
    if everything:
        return time.time_ns()
    if older_than is None:
        return 0
    match = _AGE.fullmatch(older_than)
    if match is None:
        raise UsageError(f"--older-than {older_than!r} is no age", "write days or hours: 30d, 12h")
    return time.time_ns() - int(match[1]) * {"h": 3600, "d": 86400}[match[2]] * 1_000_000_000


def _open(target: str) -> tuple[Repository, str | None]:
    """The repository that a URL names, or that the URL in front of a VM's name does."""
    try:
        return Repository.open(target), None
    except RepositoryError as error:
        if (stored := parse_stored(target)) is None:
            raise
        try:
            return Repository.open(stored.url), stored.name
        except RepositoryError:
            raise error from None


def _place(affected: Affected) -> str:
    start = format_time(affected.from_ns) if affected.from_ns is not None else "a time that cannot be read"
    end = format_time(affected.until_ns) if affected.until_ns is not None else "the run's end"
    seqs = f"seq {affected.first} to {affected.last} of run {run_name(affected.run)}"
    where = " where that data was not written anew since" if affected.partly else ""
    return f"{affected.disk or 'each disk'}: every moment from {start} to {end} ({seqs}){where}"


def _show(finding: Finding) -> None:
    print(f"{_WORDS[finding.kind]}: {finding.object}: {finding.message}")
    for affected in finding.affected[:_SHOWN_MAX]:
        print(f"  {'not restorable:' if finding.kind is Kind.GAP else 'lost for'} {_place(affected)}")
    if len(finding.affected) > _SHOWN_MAX:
        print(f"  and in {len(finding.affected) - _SHOWN_MAX} later runs")
    if finding.hint:
        print(f"  do: {finding.hint}", flush=True)


def _show_part(part: Part, *, data: bool) -> None:
    what = "chunks" if part.vm is None else f"{part.vm}: {part.runs} runs, {part.bases} bases,"
    objects = f"{part.objects} in use" if part.vm is None else f"{part.objects} objects"
    line = f"{what} {objects}, {decimal(part.stored_bytes)}"
    if data:
        line += f"; read whole: {part.read} ({decimal(part.read_bytes)}), by earlier verifications: {part.earlier}"
    print(line)
    for disk, since, until in part.covered:
        if since is not None and until is not None:
            print(f"  {disk}: records from {format_time(since)} to {format_time(until)}")


def _as_data(finding: Finding) -> dict[str, Any]:
    return {
        "finding": finding.kind.value,
        "vm": finding.vm,
        "object": finding.object,
        "message": finding.message,
        "hint": finding.hint,
        "affected": [
            {
                "disk": one.disk,
                "run": run_name(one.run),
                "first_seq": one.first,
                "last_seq": one.last,
                "from_ns": one.from_ns,
                "until_ns": one.until_ns,
                "partly": one.partly,
            }
            for one in finding.affected
        ],
    }


def _summary(repository: Repository, parts: list[Part], counts: Counter[Kind], outcome: str) -> dict[str, Any]:
    return {
        "repository": repository.url,
        "outcome": outcome,
        "findings": {kind.value: counts[kind] for kind in Kind},
        "parts": [
            {
                "vm": part.vm,
                "runs": part.runs,
                "bases": part.bases,
                "objects": part.objects,
                "stored_bytes": part.stored_bytes,
                "read": part.read,
                "read_bytes": part.read_bytes,
                "read_earlier": part.earlier,
                "records": {disk: {"from_ns": since, "until_ns": until} for disk, since, until in part.covered},
            }
            for part in parts
        ],
    }
