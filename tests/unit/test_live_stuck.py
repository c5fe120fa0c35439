"""What ``protect --live`` tells when it cannot bring the domain back."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from vmrewind.errors import LibvirtError, StartError
from vmrewind.journal.events import EventLog
from vmrewind.paths import VmPaths
from vmrewind.start.live import _Switch


@pytest.mark.parametrize("went_on", [True, False])
def test_what_may_have_gone_on_is_never_told_to_be_resumed(*, went_on: bool) -> None:
    prepared: Any = SimpleNamespace(name="web01")
    switch = _Switch(prepared)
    switch._saved, switch._saved_ns = b"<domain/>", time.time_ns() - 1_000_000_000
    paths = VmPaths("web01")
    paths.state.mkdir(parents=True)
    if went_on:
        EventLog(paths.events(1)).write("cpu.started")
    told = switch._stuck(StartError("no answer"), LibvirtError("libvirt is away", "is it running?"))
    assert isinstance(told, StartError)
    assert told.hint is not None
    if went_on:
        assert "virsh managedsave-remove web01" in told.hint
        assert "managedsave-define" not in told.hint
        assert "must not be resumed" in str(told)
        assert "Nothing is lost" not in str(told)
    else:
        assert "managedsave-define" in told.hint
