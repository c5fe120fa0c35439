"""Small JSON objects that carry their own checksum, so that a flipped bit in any of them is found out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from vmrewind.errors import CorruptionError


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def seal(content: Mapping[str, Any]) -> bytes:
    """``content`` as a JSON document with a ``checksum`` beside its keys."""
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1).encode() + b"\n"


def unseal(data: bytes, origin: str) -> dict[str, Any]:
    """The content of a sealed document; raises CorruptionError naming ``origin``."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise CorruptionError(f"{origin}: not a JSON document: {error}") from error
    if not isinstance(content, dict):
        raise CorruptionError(f"{origin}: not a JSON object")
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content):
        raise CorruptionError(f"{origin}: the checksum is wrong")
    return content
