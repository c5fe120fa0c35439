"""Which VM this host knows by a name: the uuid that its first start noted."""

from __future__ import annotations

import json

from vmrewind.errors import CorruptionError
from vmrewind.journal.content import content
from vmrewind.paths import VmPaths


def known_uuid(paths: VmPaths) -> str | None:
    """The VM's uuid as it was noted here, None if it never was. Raises CorruptionError."""
    try:
        return str(json.loads(content(paths.identity))["uuid"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptionError(
            f"{paths.identity}: not a VM's identity: {error!r}",
            'write it anew: {"name": NAME, "uuid": UUID}, as libvirt or `vmrewind list URL --json` shows them',
        ) from error
