"""Which VM this host knows by a name: the uuid that its first start noted."""

from __future__ import annotations

import json

from vmrewind.errors import CorruptionError, VmStateError
from vmrewind.journal.content import content
from vmrewind.paths import VmPaths
from vmrewind.vmconfig.model import VmConfig


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


def known_uuid_of(config: VmConfig, paths: VmPaths) -> str | None:
    """The same; raises VmStateError if the configuration is another VM's of that name."""
    known = known_uuid(paths)
    if known is not None and config.uuid not in (None, known):
        raise VmStateError(
            f"{config.name}: this host knows a VM of that name with uuid {known}, not {config.uuid}",
            f"rename one of them, or move {paths.state} away if the old one is gone for good",
        )
    return known
