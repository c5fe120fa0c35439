"""``script/bench``: the command line of the benchmark."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Final

import cyclopts
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.chart import svg
from bench.peers import PEERS, BenchError, Place
from bench.report import show, to_json
from bench.run import Result, Settings, run
from bench.workloads import WORKLOADS, Workload
from vmrewind.vmconfig.model import Invalid, parse_size

RESULTS: Final = Path(__file__).parent / "results"
_REPORT_WIDTH: Final = 250

app = cyclopts.App(name="script/bench", help="Measure capture, journaling every write, beside servers that protect nothing.")


@app.default
def bench(
    *,
    only: Annotated[
        list[str] | None, Parameter(consume_multiple=True, help="Loads: names or patterns ('4k-rand*'); default: all.")
    ] = None,
    peers: Annotated[list[str] | None, Parameter(consume_multiple=True, help="Peers; default: all.")] = None,
    seconds: Annotated[float, Parameter(help="How long each load runs, each round.")] = 3,
    rounds: Annotated[int, Parameter(help="How often each load runs on each peer; medians are told.")] = 3,
    image_size: Annotated[str, Parameter(help="Size of each peer's image.")] = "1GiB",
    journal_size: Annotated[str, Parameter(help="Size of capture's journal.")] = "2GiB",
    directory: Annotated[Path, Parameter(help="Images and journal go below it: the file system to measure.")] = Path("/var/tmp"),
    output: Annotated[
        Path | None, Parameter(help="The JSON file; the chart goes beside it. Default: bench/results/TIME.json")
    ] = None,
    list_: Annotated[bool, Parameter(name="--list", negative="", help="Name the loads and peers, and end.")] = False,
) -> int:
    """Run loads on peers, interleaved; print tables, write JSON and a chart."""
    if list_:
        for workload in WORKLOADS:
            print(f"{workload.name:16} {workload.title}")
        for name, peer in PEERS.items():
            print(f"{name:16} {peer.title}")
        return 0
    if seconds <= 0 or rounds < 1:
        raise BenchError("--seconds must be more than 0 and --rounds at least 1")
    settings = Settings(_selected(only), _known_peers(peers), seconds, rounds)
    with ExitStack() as stack:
        data, sockets = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmr-bench-", dir=parent))) for parent in (directory, None)
        )
        scratch = sockets / "scratch"
        scratch.mkdir()
        place = Place(data, sockets, _bytes("--image-size", image_size), _bytes("--journal-size", journal_size))
        result = _run_with_progress(settings, place, scratch)
    # Tables as wide as they are when they go to a file; a terminal wraps them as it can.
    show(result, Console(width=None if sys.stdout.isatty() else _REPORT_WIDTH, highlight=False, soft_wrap=False))
    path = output or RESULTS / f"{result.started:%Y%m%dT%H%M%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(result), indent=1) + "\n")
    path.with_suffix(".svg").write_text(svg(result))
    print(f"\n{path} and {path.with_suffix('.svg').name} written")
    return 0


def _run_with_progress(settings: Settings, place: Place, scratch: Path) -> Result:
    loads = sum(w.takes(PEERS[peer]) for w in settings.workloads for peer in settings.peers)
    starts = sum(PEERS[peer].serves_nbd for peer in settings.peers)
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("images are made", total=(loads + starts) * settings.rounds + 1)
        return run(settings, place, scratch, lambda what: bars.update(task, description=what, advance=1))


def _bytes(option: str, text: str) -> int:
    try:
        return parse_size(option, text)
    except Invalid as error:
        raise BenchError(f"{option}: {error}") from error


def _selected(patterns: list[str] | None) -> list[Workload]:
    if patterns is None:
        return list(WORKLOADS)
    for pattern in patterns:
        if not any(fnmatch(w.name, pattern) for w in WORKLOADS):
            raise BenchError(f"--only {pattern}: no such load; --list names them")
    return [w for w in WORKLOADS if any(fnmatch(w.name, pattern) for pattern in patterns)]


def _known_peers(names: list[str] | None) -> list[str]:
    for name in names or ():
        if name not in PEERS:
            raise BenchError(f"--peers {name}: no such peer; --list names them")
    return [name for name in PEERS if names is None or name in names]


def main() -> int:
    """Run the command; returns its exit code."""
    # A terminated benchmark ends its servers and takes its files away like one that is interrupted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return int(app(result_action="return_value") or 0)
    except (BenchError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
