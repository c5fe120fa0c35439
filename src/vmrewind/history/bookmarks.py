"""Bookmarks on a branch: the moments that they name, and what kind of point each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmrewind.history.activity import JournalEvent, events
from vmrewind.history.branch import Branch
from vmrewind.history.history import History
from vmrewind.history.moments import CRASH_CONSISTENT, QUIESCED, kind_in_words
from vmrewind.journal.format import Event
from vmrewind.journal.runs import Position


@dataclass(frozen=True, slots=True)
class Bookmark:
    """A bookmark. ``position`` is the moment that it names: its own record, or an earlier one at which the guest was frozen."""

    position: Position
    name: str
    kind: str
    not_frozen: Sequence[str]
    problem: str | None = None
    """Why its record cannot be read: then nothing but its position is known, its record's."""

    @property
    def in_words(self) -> str:
        """What kind of point it is."""
        return kind_in_words(self.kind, self.not_frozen)


def bookmarks(history: History, branch: Branch) -> list[Bookmark]:
    """Every bookmark on a branch, in the order in which they were set."""
    return [as_bookmark(event) for event in events(history, branch) if event.kind is Event.BOOKMARK]


def as_bookmark(event: JournalEvent) -> Bookmark:
    """What a BOOKMARK record says. What cannot be read of it makes no point quiesced."""
    content = event.content
    if "unreadable" in content:
        return Bookmark(event.position, "", CRASH_CONSISTENT, (), content["unreadable"])
    name, not_frozen = str(content.get("name", "")), content.get("not_frozen")
    if content.get("kind") == QUIESCED and isinstance(not_frozen, list) and content.get("seq") == event.position.seq:
        return Bookmark(event.position, name, QUIESCED, [str(path) for path in not_frozen])
    return Bookmark(event.position, name, CRASH_CONSISTENT, ())


def kind_of(history: History, branch: Branch, moment: str, position: Position) -> str:
    """What kind of point the position of ``moment``, as the user wrote it, is: only a bookmark can say that it is quiesced."""
    if moment.strip().startswith("@"):
        for mark in bookmarks(history, branch):
            if mark.position == position and mark.name == moment.strip()[1:]:
                return mark.in_words
    return CRASH_CONSISTENT
