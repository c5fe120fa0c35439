"""A booted moment of a libvirt domain: a transient domain that ends with this process, however that ends."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Final, Protocol

from vmrewind.errors import LibvirtError, VmrewindError
from vmrewind.repository import background
from vmrewind.start.libvirt import Domain, Libvirt
from vmrewind.start.signals import Asked

_RESUME_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.5
_SHUTDOWN_SECONDS: Final = 60
_LAST_SECONDS: Final = 30.0
"""For what is asked of a QEMU that has ended."""
_AGAIN: Final = "boot it again, and let the copy end"


class StayingDomain(Protocol):
    """What is done for a domain that is to stay."""

    @property
    def kept(self) -> bool:
        """Whether it stays by now."""

    def begin(self, domain: Domain) -> None:
        """Once its CPU runs. Asks nothing of QEMU."""

    def go_on(self, domain: Domain) -> None:
        """Ask of QEMU what is to be asked, again and again while it runs, in a thread of its own. What it raises ends all."""

    def settle(self) -> None:
        """Do what follows from it, and asks nothing of QEMU. No signal is heard meanwhile."""

    def end(self) -> None:
        """Once it has ended, if it was begun."""


def run_domain(
    libvirt: Libvirt,
    aside: Libvirt,
    xml: bytes,
    ready: Callable[[], None],
    staying: StayingDomain | None,
    asked: Asked,
    say: Callable[[str], None],
) -> None:
    """Start the domain, call ``ready``, and stay until it has ended or a signal comes; libvirt itself ends it should we be killed.

    If it is to stay, a signal ends it only as long as it is not kept; then the first one presses the power button. ``aside``: a
    connection for what is asked in another thread. One for both would not do: libvirt 9.0's client may never send what a second
    thread asks while the first one waits for its answer.
    """
    domain = libvirt.start_transient(xml)
    nvram = None
    try:
        nvram = domain.nvram
        ready()
        if staying is None:
            while domain.active and not asked.wait(_POLL_SECONDS):
                pass
        else:
            staying.begin(domain)
            _accompany(domain, _Care(aside, domain.name, staying), staying, asked, say)
    finally:
        domain.destroy()
        if staying is not None:
            staying.end()
        if nvram is not None and (staying is None or not staying.kept):
            nvram.unlink(missing_ok=True)


def _accompany(domain: Domain, care: _Care, staying: StayingDomain, asked: Asked, say: Callable[[str], None]) -> None:
    pressed_at = None
    given_up = False
    try:
        while domain.active and not given_up:
            care.go_on()
            now = asked.wait(_POLL_SECONDS)
            staying.settle()
            if now and pressed_at is None and staying.kept:
                say(f"asked the guest to shut down (up to {_SHUTDOWN_SECONDS} s; once more to end it now)")
                pressed_at = time.monotonic()
                care.press_power_button()
            else:
                given_up = now or (pressed_at is not None and time.monotonic() > pressed_at + _SHUTDOWN_SECONDS)
    finally:
        try:
            domain.destroy()
        finally:
            error = care.end()
            if not staying.kept:
                staying.settle()  # Its last disk may have been switched over in this very moment: then all is there.
    if staying.kept:
        return
    if given_up:
        raise VmrewindError("ended before the copy was complete: nothing was kept", _AGAIN)
    if error is not None:
        raise error
    raise VmrewindError("the VM ended before the copy was complete: nothing was kept", _AGAIN)


class _Care:
    """All that is asked of QEMU while a domain that is to stay runs, in a thread of its own.

    QEMU answers nothing while it waits for a read of its disks, as it does when a copy begins, and the storage of those may be far
    away, or gone. Whoever asks it something waits as long; somebody else has to hear the signal that ends it all.
    """

    def __init__(self, libvirt: Libvirt, name: str, staying: StayingDomain) -> None:
        self._libvirt = libvirt
        self._name = name
        self._staying = staying
        self._doing: Future[None] | None = None
        self._resumed_at = time.monotonic()
        self._press = False

    def go_on(self) -> None:
        """Do what is to be done now, unless the last of it is being done yet; raises what that raised."""
        if self._doing is not None:
            if not self._doing.done():
                return
            self._doing.result()
        self._doing = background.begin(self._do)

    def press_power_button(self) -> None:
        """Soon."""
        self._press = True

    def end(self) -> BaseException | None:
        """The domain has ended: wait for what is being done; what it raised."""
        if self._doing is None:
            return None
        wait([self._doing], _LAST_SECONDS)
        return self._doing.exception() if self._doing.done() else None

    def _do(self) -> None:
        if not self._libvirt.knows(self._name):
            return  # It has ended.
        domain = self._libvirt.domain(self._name)
        if self._press:
            self._press = False
            domain.shut_down()
        self._staying.go_on(domain)
        if time.monotonic() > self._resumed_at + _RESUME_SECONDS:
            self._resumed_at = time.monotonic()
            # Room was made, or the repository is back.
            with contextlib.suppress(LibvirtError):
                domain.resume_after_io_error()
