"""The keeper's own socket: one JSON instruction a connection, one answer. Its client is local and trusted with the VM.

A client that hangs up before it has its answer has thought better of it: what it asked for is given up, if it can still be.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Final

from vmrewind.errors import UsageError, VmrewindError

_LINE_MAX: Final = 4096
_LINE_SECONDS: Final = 10.0

Carry = Callable[[], Coroutine[Any, Any, dict[str, Any]]]


class KeeperControl:
    """Listens until it is closed; ``commands`` carries each out and returns the answer's fields."""

    def __init__(self, commands: dict[str, Carry]) -> None:
        self._commands = commands
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, listener: socket.socket) -> None:
        """Take instructions from now on."""
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=_LINE_MAX)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "called in a task"
        self._tasks.add(task)
        try:
            answer = await self._answer(reader)
            writer.write(json.dumps(answer).encode() + b"\n")
            with contextlib.suppress(OSError):
                await writer.drain()
        except asyncio.CancelledError:
            # The keeper stops; whoever waits for the answer is hung up on.
            return
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_LINE_SECONDS):
                line = await reader.readline()
            request = json.loads(line)
            carry = self._commands[request["command"]]
        except (TimeoutError, OSError, ValueError, KeyError, TypeError, RecursionError):
            error: VmrewindError = UsageError(f"the keeper takes one line of JSON, its command one of {', '.join(self._commands)}")
        else:
            try:
                return {"ok": True, **await _unless_hung_up(reader, carry())}
            except VmrewindError as failed:
                error = failed
            except OSError as failed:
                error = VmrewindError(str(failed))
            except Exception as failed:  # noqa: BLE001 - an answer, whatever happens: somebody waits for it
                error = VmrewindError(repr(failed), "this is a bug; the VM's log may tell more")
        return {"ok": False, "kind": error.kind, "message": str(error), "hint": error.hint}

    async def close(self) -> None:
        """Take no more, and give up what is under way."""
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unless_hung_up(reader: asyncio.StreamReader, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    carried = asyncio.ensure_future(work)
    hung_up = asyncio.ensure_future(_end(reader))
    try:
        await asyncio.wait({carried, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not carried.done():
            raise VmrewindError("whoever asked has hung up")
        return await carried
    finally:
        carried.cancel()
        hung_up.cancel()
        await asyncio.gather(carried, hung_up, return_exceptions=True)


async def _end(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while await reader.read(_LINE_MAX):
            pass
