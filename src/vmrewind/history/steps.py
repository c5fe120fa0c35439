"""Steps of the host's clock, as the journal has recorded them, and what they mean for "so long ago".

The journal's time follows a step forward at once, so a part of it never was; after a step back it runs at half speed until both
agree again (journal/clock.py). Whoever says "90 seconds ago" means time that passed, whatever the clocks said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmrewind.history.activity import events
from vmrewind.history.branch import Branch
from vmrewind.history.history import History
from vmrewind.journal.format import Event


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the wall clock, ns, negative for back, and the journal's time right after it."""

    time_ns: int
    step_ns: int

    @property
    def lead_ns(self) -> int:
        """How far the journal's time was ahead of the wall clock after it."""
        return max(0, -self.step_ns)

    def journal_ns(self, passed_ns: int) -> int:
        """The journal's time when so much time had passed since the step."""
        worked_off = passed_ns // 2 if passed_ns < 2 * self.lead_ns else passed_ns - self.lead_ns
        return self.time_ns + worked_off

    def passed_ns(self, journal_ns: int) -> int:
        """How much time had passed since the step at a journal's time."""
        since = journal_ns - self.time_ns
        return 2 * since if since < self.lead_ns else since + self.lead_ns


def steps(history: History, branch: Branch) -> list[Step]:
    """The steps on a branch, in order."""
    found = (event for event in events(history, branch) if event.kind is Event.CLOCK)
    return [Step(event.position.time_ns, int(event.content["step_ns"])) for event in found if "step_ns" in event.content]


def ago(known: Sequence[Step], now_ns: int, age_ns: int) -> int:
    """The journal's time ``age_ns`` before now; ``now_ns`` is the wall clock's."""
    if not known:
        return now_ns - age_ns
    last = known[-1]
    at_ns = last.journal_ns(now_ns - (last.time_ns - last.lead_ns))
    for step in reversed(known):
        passed_ns = step.passed_ns(at_ns)
        if age_ns <= passed_ns:
            return step.journal_ns(passed_ns - age_ns)
        age_ns -= passed_ns
        at_ns = step.time_ns - max(0, step.step_ns)
    return at_ns - age_ns
