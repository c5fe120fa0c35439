"""Asking a running capture: one JSON object to its control socket, one back."""

from __future__ import annotations

import json
import socket
from typing import Any, Final

from vmrewind.errors import VmStateError, by_kind
from vmrewind.paths import VmPaths

_TIMEOUT_SECONDS: Final = 15


def instruct(paths: VmPaths, **request: Any) -> dict[str, Any]:
    """Send an instruction and return the answer; raises VmStateError if nobody listens, else the error that capture names."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_TIMEOUT_SECONDS)
            sock.connect(str(paths.control_socket))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as lines:
                line = lines.readline()
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise VmStateError(f"{paths.name} is not running under protection", "start it first") from error
    except PermissionError as error:
        raise VmStateError(f"{paths.control_socket}: permission denied", "run this as the user that started the VM") from error
    except OSError as error:
        raise VmStateError(
            f"the capture of {paths.name} does not answer: {error}", f"look at {paths.log} and at `vmrewind status {paths.name}`"
        ) from error
    if not line:
        raise VmStateError(f"the capture of {paths.name} hung up without an answer", "it is being restarted: try again")
    answer: dict[str, Any] = json.loads(line)
    if not answer.get("ok"):
        raise by_kind(str(answer.get("kind")), str(answer.get("message")), str(answer.get("hint", "")))
    return answer
