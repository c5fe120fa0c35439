"""Asking a running capture, or its keeper: one JSON object to its socket, one back."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final

from vmrewind.errors import VmStateError, by_kind
from vmrewind.paths import VmPaths
from vmrewind.start.processes import running

_TIMEOUT_SECONDS: Final = 15
_KEEPER_TIMEOUT_SECONDS: Final = 300
"""What a keeper is asked for may wait for a sync of the images."""


def instruct(paths: VmPaths, **request: Any) -> dict[str, Any]:
    """Send capture an instruction and return the answer; raises VmStateError if nobody listens, else the error that it names."""
    _refuse_absent(paths)
    return _ask(paths, "capture", paths.control_socket, _TIMEOUT_SECONDS, request)


def status_in_time(paths: VmPaths, timeout_seconds: float) -> dict[str, Any]:
    """Capture's status, for somebody who cannot wait long."""
    _refuse_absent(paths)
    return _ask(paths, "capture", paths.control_socket, timeout_seconds, {"command": "status"})


def instruct_keeper(paths: VmPaths, **request: Any) -> dict[str, Any]:
    """The same for the keeper."""
    return _ask(paths, "keeper", paths.keeper_socket, _KEEPER_TIMEOUT_SECONDS, request)


def _refuse_absent(paths: VmPaths) -> None:
    """The keeper holds capture's socket open also while nobody answers there: do not wait for an answer then."""
    keeping = running(paths)
    if keeping is not None and keeping.keeper.alive:
        if not keeping.protected:
            raise VmStateError(f"{paths.name} runs without protection", f"`vmrewind status {paths.name}` says why")
        if keeping.capture is None or not keeping.capture.alive:
            raise VmStateError(f"the capture of {paths.name} has died", "it is being restarted: try again")


def _ask(paths: VmPaths, who: str, path: Path, timeout_seconds: float, request: dict[str, Any]) -> dict[str, Any]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout_seconds)
            sock.connect(str(path))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as lines:
                line = lines.readline()
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise VmStateError(f"{paths.name} is not running under protection", "start it first") from error
    except PermissionError as error:
        raise VmStateError(f"{path}: permission denied", "run this as the user that started the VM") from error
    except OSError as error:
        raise VmStateError(
            f"the {who} of {paths.name} does not answer: {error}", f"look at {paths.log} and at `vmrewind status {paths.name}`"
        ) from error
    if not line:
        raise VmStateError(f"the {who} of {paths.name} hung up without an answer", "it is being restarted: try again")
    answer: dict[str, Any] = json.loads(line)
    if not answer.get("ok"):
        raise by_kind(str(answer.get("kind")), str(answer.get("message")), str(answer.get("hint", "")))
    return answer
