"""An input's bytes as choices: what they are drawn from, and how a stream is cut into what arrives at once."""

from __future__ import annotations

import random
from collections.abc import Iterator


class Choices:
    """Draws numbers from an input; behind its end they are zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether there is anything left."""
        return self._at < len(self._data)

    def number(self, width: int = 1) -> int:
        """The next ``width`` bytes as a number."""
        return int.from_bytes(self.take(width).ljust(width, b"\0"), "big")

    def take(self, length: int) -> bytes:
        """At most ``length`` bytes as they are."""
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken


def pieces(stream: bytes, seed: int) -> Iterator[bytes]:
    """The stream in pieces: whole for seed 0, byte by byte for 1, else as the seed has it."""
    if seed < 2:
        step = len(stream) or 1 if seed == 0 else 1
        yield from (stream[at : at + step] for at in range(0, len(stream), step))
        return
    cuts = random.Random(seed)
    at = 0
    while at < len(stream):
        length = cuts.choice((1, 3, 27, 28, 29, 100, 1000, 5000))
        yield stream[at : at + length]
        at += length
