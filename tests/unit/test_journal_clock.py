"""Journal times increase strictly whatever the wall clock does, and come to mean wall time again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmrewind.journal.clock import STEP_NS, Clock

SECOND = 10**9
HOUR = 3600 * SECOND
T0 = 1_790_000_000 * SECOND


class Host:
    """A host's two clocks. ``stepped`` is how far its wall clock was set, ns."""

    def __init__(self) -> None:
        self.elapsed = 12_345 * SECOND
        self.stepped = 0
        self.frozen_at: int | None = None

    def wall(self) -> int:
        return self.frozen_at if self.frozen_at is not None else T0 + self.elapsed + self.stepped

    def monotonic(self) -> int:
        return self.elapsed

    def clock(self, floor_ns: int = 0) -> Clock:
        return Clock(floor_ns, self.wall, self.monotonic)

    def pass_seconds(self, clock: Clock, seconds: int) -> list[int]:
        """Let time go by with a check and a record a second; returns the steps that were reported."""
        steps = []
        for _ in range(seconds):
            self.elapsed += SECOND
            if (step := clock.check()) is not None:
                steps.append(step)
            clock.take(1)
        return steps


def test_times_are_wall_time() -> None:
    host = Host()
    clock = host.clock()
    assert clock.take(1) == host.wall()
    host.elapsed += 5 * SECOND
    assert clock.check() is None
    assert clock.take(1) == host.wall()


def test_records_of_a_batch_are_a_nanosecond_apart_and_the_next_batch_comes_later() -> None:
    host = Host()
    clock = host.clock()
    first = clock.take(100)
    assert clock.take(1) == first + 100
    assert clock.take(1) == first + 101


def test_a_step_forward_is_followed_at_once_and_reported_once() -> None:
    host = Host()
    clock = host.clock()
    before = clock.take(1)
    host.stepped = HOUR
    assert host.pass_seconds(clock, 10) == [HOUR]
    after = clock.take(1)
    assert abs(after - host.wall()) < SECOND
    assert after > before


def test_a_step_back_is_worked_off_at_half_speed_and_reported_once() -> None:
    host = Host()
    clock = host.clock()
    before = clock.take(1)
    host.stepped = -HOUR
    assert host.pass_seconds(clock, 3600) == [-HOUR]
    halfway = clock.take(1)
    assert halfway > before
    assert abs((halfway - host.wall()) - HOUR // 2) < 2 * SECOND, "after an hour, half of the lead is left"
    assert host.pass_seconds(clock, 3700) == []
    assert abs(clock.take(1) - host.wall()) <= STEP_NS


def test_a_second_step_back_is_reported_once_the_first_is_worked_off() -> None:
    host = Host()
    clock = host.clock()
    host.stepped = -10 * SECOND
    assert len(host.pass_seconds(clock, 30)) == 1
    host.stepped -= 10 * SECOND
    assert len(host.pass_seconds(clock, 30)) == 1


def test_slewing_is_no_step() -> None:
    host = Host()
    clock = host.clock()
    host.stepped = STEP_NS
    assert host.pass_seconds(clock, 5) == []


def test_a_frozen_wall_clock_leaves_half_speed() -> None:
    host = Host()
    clock = host.clock()
    before = clock.take(1)
    host.frozen_at = host.wall()
    host.pass_seconds(clock, 100)
    assert 40 * SECOND < clock.take(1) - before < 60 * SECOND


def test_a_branch_ahead_of_the_wall_clock_goes_on_at_half_speed() -> None:
    host = Host()
    floor = host.wall() + HOUR
    clock = host.clock(floor)
    assert clock.take(1) == floor + 1
    assert host.pass_seconds(clock, 100) == [-HOUR]
    assert 40 * SECOND < clock.take(1) - floor < 60 * SECOND, "moments stay apart, not a nanosecond each"
    host.pass_seconds(clock, 7300)
    assert abs(clock.take(1) - host.wall()) <= STEP_NS


moves = st.one_of(
    st.tuples(st.just("pass"), st.integers(0, 3 * SECOND)),
    st.tuples(
        st.just("step"), st.sampled_from([HOUR, -HOUR, SECOND, -SECOND, 1, -1]).flatmap(lambda s: st.integers(min(s, 0), max(s, 0)))
    ),
    st.tuples(st.just("check"), st.just(0)),
    st.tuples(st.just("freeze"), st.just(0)),
    st.tuples(st.just("take"), st.integers(1, 4096)),
)


@given(st.lists(moves, max_size=200), st.integers(-HOUR, HOUR))
def test_times_increase_strictly_whatever_happens(history: list[tuple[str, int]], floor: int) -> None:
    host = Host()
    clock = host.clock(host.wall() + floor)
    last = host.wall() + floor
    for move, value in history:
        match move:
            case "pass":
                host.elapsed += value
            case "step":
                host.stepped += value
            case "freeze":
                host.frozen_at = host.wall() if host.frozen_at is None else None
            case "check":
                clock.check()
            case _:
                taken = clock.take(value)
                assert taken > last
                last = taken + value - 1
