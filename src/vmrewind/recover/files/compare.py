"""Which files were added, changed and removed between two states of a file system."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

from vmrewind.errors import FileError
from vmrewind.recover.files.client import Reader
from vmrewind.recover.files.wire import Entry, Piece

_DEPTH_MAX: Final = 200
_FIELDS: Final = ("kind", "size", "mode", "uid", "gid", "mtime_ns", "target")
_ZEROES: Final = bytes(1 << 20)

Ranges = Sequence[tuple[int, int]]
"""[start, end), in order, disjoint."""


@dataclass(frozen=True, slots=True)
class Difference:
    """``change``: added, changed, removed, or unreadable; ``what``: what of a file changed."""

    path: bytes
    change: str
    what: tuple[str, ...]


class Comparison:
    """Compares two readers' file systems of one name. ``changed``: by disk, the ranges outside of which it did not change; a file
    whose content lies outside of them is not read. Of a disk that is not in it nothing is known."""

    def __init__(self, before: Reader, after: Reader, volume: str, changed: Mapping[str, Ranges]) -> None:
        self._before = before
        self._after = after
        self._volume = volume
        self._changed = changed
        self._seen: set[tuple[int, int]] = set()

    def differences(self, path: bytes, one: Entry | None, other: Entry | None) -> Iterator[Difference]:
        """What differs at a path, given what is there (None: nothing), and below it."""
        yield from self._entries(path, one, other, 0)

    def _entries(self, path: bytes, one: Entry | None, other: Entry | None, depth: int) -> Iterator[Difference]:
        if one is None or other is None:
            yield Difference(path, "added" if one is None else "removed", ())
        else:
            if one.problem or other.problem:
                yield Difference(path, "unreadable", (other.problem or one.problem,))
                return
            try:
                if what := self._what(one, other):
                    yield Difference(path, "changed", what)
            except FileError as error:
                yield Difference(path, "unreadable", (str(error),))
        kinds = [entry.kind == "directory" for entry in (one, other) if entry is not None]
        if not any(kinds):
            return
        key = (one.inode if one is not None else -1, other.inode if other is not None else -1)
        if key in self._seen or depth > _DEPTH_MAX:
            yield Difference(path, "unreadable", ("directories are in themselves, or too deep",))
            return
        self._seen.add(key)
        (old, old_problem), (new, new_problem) = (
            _below(self._before, self._volume, one),
            _below(self._after, self._volume, other),
        )
        if old_problem or new_problem:
            yield Difference(path, "unreadable", (new_problem or old_problem,))
        # What a damaged directory shows is neither all that it has nor all its own: names that one side lacks tell nothing.
        damaged = bool(old_problem or new_problem)
        for name in sorted(old.keys() & new.keys() if damaged else old.keys() | new.keys()):
            yield from self._entries(path.rstrip(b"/") + b"/" + name, old.get(name), new.get(name), depth + 1)

    def _what(self, one: Entry, other: Entry) -> tuple[str, ...]:
        what = [field.removesuffix("_ns") for field in _FIELDS if getattr(one, field) != getattr(other, field)]
        if one.kind == "directory" and other.kind == "directory":
            # Its size and time follow from what is in it, which is told.
            return tuple(field for field in what if field not in ("size", "mtime"))
        if one.kind == other.kind == "file" and one.size == other.size and self._content_differs(one, other):
            what.append("content")
        return tuple(what)

    def _content_differs(self, one: Entry, other: Entry) -> bool:
        places = [reader.extents(self._volume, e.inode) for reader, e in ((self._before, one), (self._after, other))]
        disk = places[0].disk
        if disk is not None and places[0] == places[1] and (changed := self._changed.get(disk)) is not None:
            ends = [end for _, end in changed]
            at = ((bisect_right(ends, start), start + size) for start, size in places[0].ranges)
            if not any(number < len(ends) and changed[number][0] < end for number, end in at):
                return False
        return _differ(self._before.content(self._volume, one.inode), self._after.content(self._volume, other.inode))


def _below(reader: Reader, volume: str, entry: Entry | None) -> tuple[dict[bytes, Entry], str]:
    if entry is None or entry.kind != "directory":
        return {}, ""
    listing = reader.entries(volume, entry.inode)
    return {child.name: child for child in listing.entries}, listing.problem


def _differ(one: Iterator[Piece], other: Iterator[Piece]) -> bool:
    """Whether two contents of one size differ; both are read to their ends, as the readers want it."""
    differ = False
    for old, new in zip_longest(_dense(one), _dense(other)):
        differ = differ or old != new
    return differ


def _dense(pieces: Iterator[Piece]) -> Iterator[tuple[int, bytes]]:
    """The pieces cut at multiples of their greatest size and filled up with zeroes; those of zeroes alone are left out."""
    size = len(_ZEROES)
    number, block = -1, bytearray()
    for piece in pieces:
        at, data = piece.offset, memoryview(piece.data)
        while data:
            if at // size != number:
                if any(block):
                    yield number, bytes(block)
                number, block = at // size, bytearray(size)
            taken = min(len(data), size - at % size)
            block[at % size : at % size + taken] = data[:taken]
            at, data = at + taken, data[taken:]
    if any(block):
        yield number, bytes(block)
