"""A base's manifest: which chunks a disk consisted of at a known moment."""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict, dataclass
from typing import Any, Final

from vmrewind.errors import CorruptionError
from vmrewind.journal.runs import ImageIdentity
from vmrewind.repository.layout import format_time
from vmrewind.repository.sealed import seal, unseal

_CHUNK_ID: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def new_base_id(time_ns: int) -> str:
    """A base id that sorts by time and that no other base has."""
    return f"{format_time(time_ns)}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A full backup of one disk.

    ``size`` is the disk's (the export's), bytes; chunk ``i`` holds the bytes from ``i * chunk_size`` on, the last one fewer;
    None stands for a chunk of zeroes. ``identity`` is the image's when it was read. ``backing`` names a qcow2 file's backing file.
    """

    id: str
    disk: str
    uuid: str
    size: int
    chunk_size: int
    time_ns: int
    format: str
    backing: str | None
    identity: ImageIdentity
    chunks: tuple[str | None, ...]

    def chunk_length(self, index: int) -> int:
        """Plain bytes of chunk ``index``."""
        return min(self.chunk_size, self.size - index * self.chunk_size)

    def to_json(self) -> bytes:
        """The object's content."""
        return seal(asdict(self) | {"chunks": list(self.chunks)})

    @classmethod
    def from_json(cls, data: bytes, origin: str) -> Manifest:
        """Parse and check an object's content; ``origin`` names it in a CorruptionError."""
        plain = unseal(data, origin)
        try:
            manifest = cls(
                id=_typed(plain, "id", str),
                disk=_typed(plain, "disk", str),
                uuid=_typed(plain, "uuid", str),
                size=_typed(plain, "size", int),
                chunk_size=_typed(plain, "chunk_size", int),
                time_ns=_typed(plain, "time_ns", int),
                format=_typed(plain, "format", str),
                backing=None if plain["backing"] is None else _typed(plain, "backing", str),
                identity=ImageIdentity(**plain["identity"]),
                chunks=tuple(_typed(plain, "chunks", list)),
            )
            manifest._check()
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptionError(f"{origin}: not a base's manifest: {error!r}") from error
        return manifest

    def _check(self) -> None:
        if self.size < 0 or self.chunk_size <= 0 or len(self.chunks) != -(-self.size // self.chunk_size):
            raise ValueError(f"{len(self.chunks)} chunks of {self.chunk_size} bytes do not make {self.size} bytes")
        for index, chunk_id in enumerate(self.chunks):
            if chunk_id is not None and not _CHUNK_ID.fullmatch(chunk_id):
                raise ValueError(f"chunk {index} has the id {chunk_id!r}")


def _typed(plain: dict[str, Any], key: str, kind: type[Any]) -> Any:
    value = plain[key]
    if type(value) is not kind:
        raise TypeError(f"{key} is {value!r}")
    return value
