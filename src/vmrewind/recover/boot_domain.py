"""A booted moment of a libvirt domain: a transient domain that ends with this process, however that ends."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable
from typing import Final, Protocol

from vmrewind.errors import LibvirtError, VmrewindError
from vmrewind.start.libvirt import Domain, Libvirt

SIGNALS: Final = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""What ends it. To be blocked before any thread starts: they inherit that, and the signals wait for ``sigtimedwait``."""
_RESUME_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.5
_SHUTDOWN_SECONDS: Final = 60
_AGAIN: Final = "boot it again, and let the copy end"


class StayingDomain(Protocol):
    """What is done for a domain that is to stay."""

    @property
    def kept(self) -> bool:
        """Whether it stays by now."""

    def begin(self, domain: Domain) -> None:
        """Once its CPU runs."""

    def go_on(self, domain: Domain) -> None:
        """Again and again while it runs. What it raises ends all."""

    def end(self) -> None:
        """Once it has ended, if it was begun."""


def run_domain(
    libvirt: Libvirt, xml: bytes, ready: Callable[[], None], staying: StayingDomain | None, say: Callable[[str], None]
) -> None:
    """Start the domain, call ``ready``, and stay until it has ended or a signal comes; libvirt itself ends it should we be killed.

    If it is to stay, a signal ends it only as long as it is not kept; then the first one presses the power button.
    """
    domain = libvirt.start_transient(xml)
    nvram = None
    try:
        nvram = domain.nvram
        ready()
        if staying is None:
            while domain.active and signal.sigtimedwait(SIGNALS, _POLL_SECONDS) is None:
                pass
        else:
            staying.begin(domain)
            _accompany(domain, staying, say)
    finally:
        domain.destroy()
        if staying is not None:
            staying.end()
        if nvram is not None and (staying is None or not staying.kept):
            nvram.unlink(missing_ok=True)


def _accompany(domain: Domain, staying: StayingDomain, say: Callable[[str], None]) -> None:
    pressed_at = None
    tried_at = time.monotonic()
    while domain.active:
        staying.go_on(domain)
        if time.monotonic() > tried_at + _RESUME_SECONDS:
            tried_at = time.monotonic()
            # Room was made, or the repository is back.
            with contextlib.suppress(LibvirtError):
                domain.resume_after_io_error()
        asked = signal.sigtimedwait(SIGNALS, _POLL_SECONDS) is not None
        if asked and not staying.kept:
            raise VmrewindError("ended before the copy was complete: nothing was kept", _AGAIN)
        if pressed_at is not None and (asked or time.monotonic() > pressed_at + _SHUTDOWN_SECONDS):
            return
        if asked:
            say(f"asked the guest to shut down (up to {_SHUTDOWN_SECONDS} s; once more to end it now)")
            pressed_at = time.monotonic()
            domain.shut_down()
    if not staying.kept:
        raise VmrewindError("the VM ended before the copy was complete: nothing was kept", _AGAIN)
