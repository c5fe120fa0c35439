"""``script/bench-ship``: how fast ship and a full backup carry data away, and how many bytes for one of the guest's, beside others.

Two kinds of work: *journal*, a guest's writes on their way from the journal to the repository, beside ``rclone copy`` of the same
journal; *base*, the full backup of an image, beside ``qemu-img convert -c`` and ``restic backup``. Each to a directory and to a
SeaweedFS on loopback; rounds outermost, so that what the machine does besides falls on all alike. A directory's time lasts until
its file system is synced, whoever wrote there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import cyclopts
from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import busy_seconds, describe, one_line
from tests.object_servers import Missing, ObjectServer, SeaweedFS
from tests.ship_support import VM, WrittenJournal
from vmrewind.errors import VmrewindError
from vmrewind.journal import format as fmt
from vmrewind.journal.format import segment_name
from vmrewind.journal.reader import segment_files
from vmrewind.repository.opening import open_store
from vmrewind.repository.repository import Repository

WRITE_BYTES: Final = 64 << 10
_VENV: Final = Path(sys.executable).parent
_BASE: Final = """
import sys, uuid
from pathlib import Path
from vmrewind.repository.base import make_base
from vmrewind.repository.repository import Repository
image, url, partial = sys.argv[1:]
make_base(Repository.open(url).vm("web01"), "vda", Path(image), uuid=str(uuid.uuid4()), partial=Path(partial))
"""
_SCRIPT = cyclopts.App(name="script/bench-ship", help="Measure shipping and full backups beside rclone, restic and qemu-img.")


class BenchError(Exception):
    """The benchmark cannot be run; its text says why."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One transfer. ``bytes_stored``: what the target holds afterwards; ``others_cores``: what was busy besides."""

    work: str
    tool: str
    target: str
    seconds: float
    cpu_seconds: float
    bytes_stored: int
    others_cores: float


@dataclass(frozen=True, slots=True)
class Data:
    """The same content as an image and as a guest's writes in a journal."""

    image: Path
    journal: Path
    size: int


def make_data(directory: Path, size: int, seed: int = 1) -> Data:
    """Of each four pieces of 64 KiB two are random, one is text, one is zeroes but for a few bytes: half of it compresses."""
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randint(2, 6)).hex().encode() for _ in range(400)]
    image = directory / "image.raw"
    written = WrittenJournal(directory / "journal", size=size + size // 8 + (128 << 20), disks=["vda"])
    with open(image, "wb") as file:
        for number in range(size // WRITE_BYTES):
            kind = number % 4
            if kind < 2:
                piece = chance.randbytes(WRITE_BYTES)
            elif kind == 2:
                piece = b" ".join(chance.choices(words, k=WRITE_BYTES // 4))[:WRITE_BYTES]
            else:
                piece = chance.randbytes(64).ljust(WRITE_BYTES, b"\0")
            file.write(piece)
            written.batch([(fmt.Op.WRITE, 0, piece)])
            written.truth.clear()
    written.describe()
    for free in written.journal.glob("free-*.seg"):
        free.unlink()
    # What lies behind the last batch is reserved, and nobody's data.
    last = segment_files(written.journal)[-1]
    os.truncate(written.journal / segment_name(last.run, last.number), written.writer._position)
    os.sync()
    return Data(image, written.journal, size)


class Target:
    """A place to carry to: every transfer gets a new one below it."""

    def __init__(self, name: str, directory: Path, server: ObjectServer | None) -> None:
        self.name = name
        self._directory = directory
        self._server = server
        self._number = 0

    @property
    def environment(self) -> Mapping[str, str]:
        """For tools that carry there: for ours, for restic, for rclone's remote ``t``."""
        if self._server is None:
            return {"RCLONE_CONFIG_T_TYPE": "local"}
        aws = self._server.environment
        return {
            **aws,
            "RCLONE_CONFIG_T_TYPE": "s3", "RCLONE_CONFIG_T_PROVIDER": "Other", "RCLONE_CONFIG_T_ENDPOINT": self._server.endpoint,
            "RCLONE_CONFIG_T_ACCESS_KEY_ID": aws["AWS_ACCESS_KEY_ID"],
            "RCLONE_CONFIG_T_SECRET_ACCESS_KEY": aws["AWS_SECRET_ACCESS_KEY"],
        }  # fmt: skip

    def fresh(self) -> str:
        """A new place's URL or path."""
        if self._server is not None:
            return self._server.url("bench")
        self._number += 1
        path = self._directory / f"target-{self._number}"
        path.mkdir()
        return str(path)

    def for_rclone(self, place: str) -> str:
        return f"t:{place.removeprefix('s3://')}"

    def for_restic(self, place: str) -> str:
        return place if self._server is None else f"s3:{self._server.endpoint}/{place.removeprefix('s3://')}"

    def synced(self) -> Sequence[str]:
        """The command that ends when all that was carried is on stable storage."""
        return ["sync", "-f", str(self._directory)] if self._server is None else ["true"]

    def stored(self, place: str) -> int:
        """Bytes that a place holds."""
        if self._server is None:
            return sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
        return sum(size for _, size in open_store(place).list(""))

    def clear(self, place: str) -> None:
        """A directory's content goes; a bucket's stays until the server ends."""
        if self._server is None:
            shutil.rmtree(place)


Tool = Callable[[Data, Target, str, Path], list[list[str]]]
"""Makes what is needed at a place, untimed, and returns the commands to time."""


def _ship(data: Data, _: Target, place: str, scratch: Path) -> list[list[str]]:
    Repository.init(place)
    state = scratch / "state"
    state.mkdir()
    (state / "ship.json").write_text('{"disks": ["vda"]}')
    (data.journal / "shipped.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "vmrewind.ship", "--vm", VM, "--journal", str(data.journal), "--repository", place]
    return [[*command, "--state", str(state), "--runtime", str(scratch), "--finish"]]


def _rclone(data: Data, target: Target, place: str, _: Path) -> list[list[str]]:
    return [
        [str(_VENV / "rclone"), "copy", "--config", "/dev/null", "--include", "*.seg", str(data.journal), target.for_rclone(place)]
    ]


def _base(data: Data, _: Target, place: str, scratch: Path) -> list[list[str]]:
    Repository.init(place)
    return [[sys.executable, "-c", _BASE, str(data.image), place, str(scratch / "partial")]]


def _restic(data: Data, target: Target, place: str, scratch: Path) -> list[list[str]]:
    (scratch / "password").write_text("bench")
    restic = ["restic", "-q", "--cache-dir", str(scratch / "cache"), "--password-file", str(scratch / "password")]
    restic += ["-r", target.for_restic(place)]
    subprocess.run([*restic, "init"], check=True, stdout=subprocess.DEVNULL, env={**os.environ, **target.environment})
    return [[*restic, "backup", str(data.image)]]


def _qemu_img(data: Data, _: Target, place: str, __: Path) -> list[list[str]]:
    return [["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(data.image), f"{place}/image.qcow2"]]


TOOLS: Final[Mapping[tuple[str, str], Tool]] = {
    ("journal", "vmrewind ship"): _ship,
    ("journal", "rclone copy"): _rclone,
    ("base", "vmrewind backup"): _base,
    ("base", "restic backup"): _restic,
    ("base", "qemu-img convert -c"): _qemu_img,
}
_DIRECTORY_ONLY: Final = "qemu-img convert -c"


def transfer(work: str, tool: str, data: Data, target: Target, directory: Path) -> Sample:
    """Carry the data once."""
    place = target.fresh()
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=directory) as scratch:
        commands = TOOLS[work, tool](data, target, place, Path(scratch))
        began, busy, cpu = time.monotonic(), busy_seconds(), 0.0
        for command in [*commands, list(target.synced())]:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, **target.environment})
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise BenchError(f"{tool} to {target.name} ended with exit code {process.returncode}")
            cpu += used.ru_utime + used.ru_stime
        seconds = time.monotonic() - began
        others = max(0.0, busy_seconds() - busy - cpu) / seconds
    stored = target.stored(place)
    target.clear(place)
    return Sample(work, tool, target.name, seconds, cpu, stored, others)


def run(size: int, rounds: int, directory: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything, interleaved; the result as it is written to the JSON file."""
    machine = describe(directory)
    say("the data is made")
    data = make_data(directory, size)
    server = SeaweedFS(directory / "server")
    samples: list[Sample] = []
    try:
        server.start()
        os.environ.update(server.environment)
        (directory / "targets").mkdir()
        targets = [Target("directory", directory / "targets", None), Target("SeaweedFS", directory, server)]
        for number in range(rounds):
            for target in targets:
                for work, tool in TOOLS:
                    if tool == _DIRECTORY_ONLY and target.name != "directory":
                        continue
                    say(f"round {number + 1} of {rounds}: {tool} to {target.name}")
                    samples.append(transfer(work, tool, data, target, directory))
    finally:
        server.stop(9)
    return {
        "kind": "shipping",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "guest_bytes": size,
        "write_bytes": WRITE_BYTES,
        "rounds": rounds,
        "samples": [asdict(sample) for sample in samples],
        "others_cores": statistics.median(sample.others_cores for sample in samples),
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """The table; also valid Markdown."""
    console.print(f"{one_line(result['machine'])}.")
    console.print(
        f"{result['guest_bytes'] >> 20} MiB, half of it compressible, medians of {result['rounds']} rounds; meanwhile "
        f"{result['others_cores']:.1f} cores were busy with something else (for SeaweedFS: the server included).\n"
    )
    table = Table(box=box.MARKDOWN)
    for heading in ("work", "tool", "to", "MiB/s", "stored per byte", "CPU seconds per GiB"):
        table.add_column(heading, justify="left" if heading in ("work", "tool", "to") else "right")
    for key in dict.fromkeys((s["work"], s["tool"], s["target"]) for s in result["samples"]):
        mine = [s for s in result["samples"] if (s["work"], s["tool"], s["target"]) == key]
        size = result["guest_bytes"]
        rates = [size / s["seconds"] / (1 << 20) for s in mine]
        spread = (max(rates) - min(rates)) / 2 / statistics.median(rates)
        table.add_row(
            *key,
            f"{statistics.median(rates):.0f} ±{spread:.0%}",
            f"{statistics.median(s['bytes_stored'] for s in mine) / size:.3f}",
            f"{statistics.median(s['cpu_seconds'] for s in mine) / (size / (1 << 30)):.1f}",
        )
    console.print(table)


@_SCRIPT.default
def shipping(
    *,
    mib: Annotated[int, Parameter(help="Size of the data, MiB.")] = 512,
    rounds: Annotated[int, Parameter(help="How often; medians are told.")] = 3,
    directory: Annotated[Path, Parameter(help="Everything goes below it: the file system to measure.")] = Path("/var/tmp"),
    output: Annotated[Path | None, Parameter(help="Write the figures as JSON to this file.")] = None,
) -> int:
    """Carry the same data with each tool, interleaved; print a table, write JSON."""
    if mib < 1 or rounds < 1:
        raise BenchError("--mib and --rounds must be at least 1")
    for program in ("restic", "qemu-img", "sync"):
        if shutil.which(program) is None:
            raise BenchError(f"{program} is not installed: script/bootstrap installs it")
    with ExitStack() as stack:
        data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmr-ship-", dir=directory)))
        result = run(mib << 20, rounds, data, lambda what: print(what, file=sys.stderr, flush=True))
    show(result, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def main() -> int:
    """Run the command; returns its exit code."""
    try:
        return int(_SCRIPT(result_action="return_value") or 0)
    except (BenchError, VmrewindError, Missing, OSError) as error:
        print(f"bench-ship: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
