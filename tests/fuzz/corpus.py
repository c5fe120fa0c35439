"""The fixed corpus: a line of ``corpus.txt`` is an input, its target and its bytes in hexadecimal; a handmade one says what for."""

from __future__ import annotations

import hashlib
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus.txt"


def inputs(target: str) -> list[bytes]:
    """The target's inputs."""
    lines = (line.split("#")[0].split() for line in CORPUS.read_text().splitlines() if line and not line.startswith("#"))
    return [bytes.fromhex("".join(rest)) for name, *rest in lines if name == target]


def unpack(target: str, directory: Path) -> None:
    """Each input as a file of its own, as a fuzzer wants them."""
    for data in inputs(target):
        (directory / hashlib.sha1(data).hexdigest()).write_bytes(data)


def pack(target: str, directory: Path) -> None:
    """Put the files of ``directory`` in the place of the target's inputs, except those that say what they are for."""
    kept = [line for line in CORPUS.read_text().splitlines() if "#" in line or line.split(" ", 1)[0] != target]
    files = sorted((path.read_bytes() for path in directory.iterdir()), key=lambda data: (len(data), data))
    CORPUS.write_text("\n".join([*kept, *(f"{target} {data.hex()}" for data in files)]) + "\n")
