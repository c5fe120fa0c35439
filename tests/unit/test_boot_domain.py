"""The end of a booted domain whose QEMU answers nothing, as it does while it waits for a read: by stand-ins that hang as long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from vmrewind.errors import LibvirtError, VmrewindError
from vmrewind.recover.boot_domain import run_domain
from vmrewind.start.libvirt import Libvirt
from vmrewind.start.signals import Asked


class Hanging:
    """A connection and its domain: from the first thing that is asked of QEMU on, nothing is answered before its end."""

    name = "hangs"
    nvram = None

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.ended = threading.Event()

    def start_transient(self, _: bytes) -> Hanging:
        return self

    def domain(self, _: str) -> Hanging:
        return self

    def knows(self, _: str) -> bool:
        return self.active

    @property
    def active(self) -> bool:
        return not self.ended.is_set()

    def destroy(self) -> None:
        self.ended.set()

    def ask(self, *_: object) -> None:
        self.asked.set()
        self.ended.wait()
        raise LibvirtError("domain 'hangs': Unable to read from monitor")

    shut_down = ask


class Staying:
    """What is done for it: nothing that begins or ends, and ``go_on``."""

    def __init__(
        self, *, kept: bool, go_on: Callable[[Any], None] = lambda _: None, settle: Callable[[Any], None] = lambda _: None
    ) -> None:
        self.kept = kept
        self.go_on = go_on
        self._settle = settle

    def begin(self, domain: object) -> None:
        pass

    def settle(self) -> None:
        self._settle(self)

    end = staticmethod(lambda: None)


class Signals:
    """A signal once QEMU hangs, or at once where it does not yet, as often as it is waited for."""

    def __init__(self, hanging: Hanging, *, at_once: int) -> None:
        self._hanging = hanging
        self._at_once = at_once

    def wait(self, seconds: float) -> bool:
        self._at_once -= 1
        return self._at_once >= 0 or self._hanging.asked.wait(seconds)


def run(hanging: Hanging, staying: Staying, *, at_once: int) -> list[str]:
    """Run it until it has ended; what was said."""
    said: list[str] = []
    libvirt, signals = cast(Libvirt, hanging), cast(Asked, Signals(hanging, at_once=at_once))
    run_domain(libvirt, libvirt, b"", lambda: None, staying, signals, said.append)
    assert not hanging.active
    return said


def test_a_copy_that_hangs_is_ended_by_a_signal() -> None:
    hanging = Hanging()
    with pytest.raises(VmrewindError, match="nothing was kept"):
        run(hanging, Staying(kept=False, go_on=hanging.ask), at_once=0)


def test_a_power_button_that_hangs_is_ended_by_the_next_signal_and_is_no_error() -> None:
    (said,) = run(Hanging(), Staying(kept=True), at_once=1)
    assert "asked the guest to shut down" in said


def test_what_fails_while_nobody_asks_for_the_end_is_an_error() -> None:
    def fail(_: object) -> None:
        raise LibvirtError("no room")

    with pytest.raises(LibvirtError, match="no room"):
        run(Hanging(), Staying(kept=True, go_on=fail), at_once=0)


def settle(staying: Staying) -> None:
    """All is there, and takes a while to be made to stay."""
    threading.Event().wait(0.3)
    staying.kept = True


def test_a_signal_while_what_is_complete_is_made_to_stay_presses_the_power_button() -> None:
    hanging = Hanging()
    said = run(hanging, Staying(kept=False, settle=settle), at_once=1)
    assert len(said) == 1 and "asked the guest to shut down" in said[0]
    assert hanging.asked.is_set(), "the power button is pressed"


def test_what_became_complete_as_it_was_ended_stays() -> None:
    hanging = Hanging()

    def settle_later(staying: Staying) -> None:
        staying.kept = staying.kept or not hanging.active

    assert run(hanging, Staying(kept=False, settle=settle_later), at_once=1) == []
