"""Waiting for a booted guest's end: one that waits for room is let go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vmrewind.recover import keep


class Monitor:
    def __init__(self, statuses: list[str]) -> None:
        self._statuses = statuses
        self.executed: list[str] = []

    async def execute(self, command: str) -> Any:
        if command == "query-status":
            return {"status": self._statuses.pop(0)}
        self.executed.append(command)
        return {}


def test_a_guest_that_paused_on_an_error_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "_RESUME_SECONDS", 0)
    monkeypatch.setattr(keep, "_POLL_SECONDS", 0.001)
    monitor = Monitor(["running", "io-error", "io-error", "running", "shutdown"])
    said: list[str] = []

    async def waiting() -> int:
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        return await keep.until_ended(monitor, ended, asyncio.Event(), said.append)  # type: ignore[arg-type]

    assert asyncio.run(waiting()) == 0
    assert monitor.executed == ["cont", "cont"]
    assert len(said) == 1 and "the guest waits" in said[0]
