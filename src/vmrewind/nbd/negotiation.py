"""The server's side of the handshake (fixed newstyle), as a machine that is fed bytes and gives bytes.

It does no I/O, so it can be tested and fuzzed on its own. Once :attr:`Handshake.chosen` is set the connection is in the
transmission phase and :meth:`Handshake.feed` is not called again; what is left in its buffer already belongs to that phase.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vmrewind.nbd import protocol as nbd

OPTION_LENGTH_MAX: Final = 64 << 10
"""Longest option data that is looked at, bytes; longer options are skipped unread and refused."""
OPTIONS_MAX: Final = 1024
"""Most options of one handshake: a client that lists asks two for each export."""
CONTEXT_ID: Final = 1


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client learns of an export. Sizes in bytes; ``flags`` are the transmission flags."""

    name: str
    size: int
    flags: int
    block_size_min: int
    block_size_preferred: int
    block_size_max: int


class _State(enum.Enum):
    CLIENT_FLAGS = enum.auto()
    OPTIONS = enum.auto()
    SKIPPING = enum.auto()
    CLOSED = enum.auto()


class ProtocolError(Exception):
    """The client does not speak the protocol: the connection is to be closed without another word."""


class Handshake:
    """One connection's handshake. ``greeting`` is what the server says first."""

    greeting: Final = nbd.GREETING.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES)

    def __init__(self, exports: Mapping[str, ExportInfo]) -> None:
        self._exports = exports
        self._state = _State.CLIENT_FLAGS
        self._no_zeroes = False
        self._skip = 0
        self._skipped_option = 0
        self._options_left = OPTIONS_MAX
        self._context_export: str | None = None
        self.buffer = bytearray()
        self.chosen: ExportInfo | None = None
        self.structured = False
        self.closed = False
        """The client said goodbye: close once what ``feed`` returned is sent."""

    @property
    def block_status(self) -> bool:
        """Whether BLOCK_STATUS was negotiated for the chosen export."""
        return self.structured and self.chosen is not None and self._context_export == self.chosen.name

    def _flags(self, export: ExportInfo) -> int:
        """The transmission flags: fragments exist only in structured replies, so only they can be told not to occur."""
        return export.flags if self.structured else export.flags & ~nbd.FLAG_SEND_DF

    def feed(self, data: bytes | memoryview) -> bytes:
        """Take what the client sent, return what to answer. Raises ProtocolError."""
        self.buffer += data
        out = bytearray()
        while not self.closed and self.chosen is None and self._step(out):
            pass
        return bytes(out)

    def _step(self, out: bytearray) -> bool:
        buffer = self.buffer
        if self._state is _State.SKIPPING:
            taken = min(self._skip, len(buffer))
            del buffer[:taken]
            self._skip -= taken
            if self._skip:
                return False
            self._state = _State.OPTIONS
            self._reply(out, self._skipped_option, nbd.REP_ERR_TOO_BIG)
            return True
        if self._state is _State.CLIENT_FLAGS:
            if len(buffer) < 4:
                return False
            flags = int.from_bytes(buffer[:4], "big")
            del buffer[:4]
            if flags & ~(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES):
                raise ProtocolError(f"unknown client flags {flags:#x}")
            self._no_zeroes = bool(flags & nbd.FLAG_NO_ZEROES)
            self._state = _State.OPTIONS
            return True
        if len(buffer) < nbd.OPTION.size:
            return False
        magic, option, length = nbd.OPTION.unpack_from(buffer)
        if magic != nbd.IHAVEOPT:
            raise ProtocolError("an option without its magic")
        if not self._options_left:
            raise ProtocolError("options without end")
        if length > OPTION_LENGTH_MAX:
            if option == nbd.OPT_EXPORT_NAME:
                raise ProtocolError("an export name beyond any limit")
            del buffer[: nbd.OPTION.size]
            self._options_left -= 1
            self._skip, self._skipped_option, self._state = length, option, _State.SKIPPING
            return True
        if len(buffer) < nbd.OPTION.size + length:
            return False
        data = bytes(buffer[nbd.OPTION.size : nbd.OPTION.size + length])
        del buffer[: nbd.OPTION.size + length]
        self._options_left -= 1
        self._option(out, option, data)
        return True

    def _option(self, out: bytearray, option: int, data: bytes) -> None:
        match option:
            case nbd.OPT_EXPORT_NAME:
                self._export_name(out, data)
            case nbd.OPT_ABORT:
                self._reply(out, option, nbd.REP_ACK)
                self.closed = True
            case nbd.OPT_LIST:
                self._list(out, data)
            case nbd.OPT_INFO | nbd.OPT_GO:
                self._info(out, option, data)
            case nbd.OPT_STRUCTURED_REPLY:
                if data:
                    self._reply(out, option, nbd.REP_ERR_INVALID)
                else:
                    self.structured = True
                    self._reply(out, option, nbd.REP_ACK)
            case nbd.OPT_LIST_META_CONTEXT | nbd.OPT_SET_META_CONTEXT:
                self._meta_context(out, option, data)
            case _:
                self._reply(out, option, nbd.REP_ERR_UNSUP)

    def _reply(self, out: bytearray, option: int, kind: int, data: bytes = b"") -> None:
        out += nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data

    def _find(self, name: bytes) -> ExportInfo | None:
        """The export of that name; the empty name is the default export when there is just one."""
        if not name and len(self._exports) == 1:
            return next(iter(self._exports.values()))
        try:
            return self._exports.get(name.decode())
        except UnicodeDecodeError:
            return None

    def _export_name(self, out: bytearray, data: bytes) -> None:
        export = self._find(data)
        if export is None:
            raise ProtocolError("EXPORT_NAME of an unknown export: the protocol knows no other answer than to close")
        out += struct.pack(">QH", export.size, self._flags(export))
        if not self._no_zeroes:
            out += nbd.EXPORT_NAME_ZEROES
        self.chosen = export

    def _list(self, out: bytearray, data: bytes) -> None:
        if data:
            self._reply(out, nbd.OPT_LIST, nbd.REP_ERR_INVALID)
            return
        for name in self._exports:
            encoded = name.encode()
            self._reply(out, nbd.OPT_LIST, nbd.REP_SERVER, len(encoded).to_bytes(4, "big") + encoded)
        self._reply(out, nbd.OPT_LIST, nbd.REP_ACK)

    def _info(self, out: bytearray, option: int, data: bytes) -> None:
        name_length = int.from_bytes(data[:4], "big")
        rest = data[4 + name_length :]
        if len(data) < 6 + name_length or len(rest) != 2 + 2 * int.from_bytes(rest[:2], "big"):
            self._reply(out, option, nbd.REP_ERR_INVALID)
            return
        export = self._find(data[4 : 4 + name_length])
        if export is None:
            self._reply(out, option, nbd.REP_ERR_UNKNOWN)
            return
        self._reply(out, option, nbd.REP_INFO, struct.pack(">HQH", nbd.INFO_EXPORT, export.size, self._flags(export)))
        sizes = struct.pack(
            ">HIII",
            nbd.INFO_BLOCK_SIZE,
            export.block_size_min,
            export.block_size_preferred,
            export.block_size_max,
        )
        self._reply(out, option, nbd.REP_INFO, sizes)
        self._reply(out, option, nbd.REP_ACK)
        if option == nbd.OPT_GO:
            self.chosen = export

    def _meta_context(self, out: bytearray, option: int, data: bytes) -> None:
        parsed = _parse_queries(data)
        setting = option == nbd.OPT_SET_META_CONTEXT
        if setting:
            self._context_export = None
        if parsed is None or not self.structured:
            self._reply(out, option, nbd.REP_ERR_INVALID)
            return
        name, queries = parsed
        export = self._find(name)
        if export is None:
            self._reply(out, option, nbd.REP_ERR_UNKNOWN)
            return
        wanted = {nbd.BASE_ALLOCATION.encode()} if setting else {nbd.BASE_ALLOCATION.encode(), b"base:"}
        if any(query in wanted for query in queries) or (not setting and not queries):
            # LIST has no selection to refer to: its context ids are reserved and zero.
            context = (CONTEXT_ID if setting else 0).to_bytes(4, "big")
            self._reply(out, option, nbd.REP_META_CONTEXT, context + nbd.BASE_ALLOCATION.encode())
            if setting:
                self._context_export = export.name
        self._reply(out, option, nbd.REP_ACK)


def _parse_queries(data: bytes) -> tuple[bytes, list[bytes]] | None:
    """(export name, queries) of a meta context option, None if its lengths do not add up."""
    name_length = int.from_bytes(data[:4], "big")
    at = 4 + name_length
    if len(data) < at + 4:
        return None
    name, count = data[4:at], int.from_bytes(data[at : at + 4], "big")
    at += 4
    queries = []
    for _ in range(count):
        if len(data) < at + 4:
            return None
        length = int.from_bytes(data[at : at + 4], "big")
        at += 4
        if length > nbd.NAME_LENGTH_MAX or len(data) < at + length:
            return None
        queries.append(data[at : at + length])
        at += length
    return (name, queries) if at == len(data) else None
