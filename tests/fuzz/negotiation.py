"""The handshake under arbitrary options in arbitrary pieces."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tests.fuzz.stream import Choices, pieces
from vmrewind.nbd import protocol as nbd
from vmrewind.nbd.negotiation import OPTION_LENGTH_MAX, OPTIONS_MAX, ExportInfo, Handshake, ProtocolError

FLAGS = nbd.FLAG_HAS_FLAGS | nbd.FLAG_SEND_DF
NAMES = (b"vda", b"vdb", b"", b"nowhere", b"\xff\xfe", b"n" * 4097)
CONTEXTS = (b"base:allocation", b"base:", b"x:y", b"", b"c" * 4097)
_KNOWN = {nbd.OPT_EXPORT_NAME, nbd.OPT_ABORT, nbd.OPT_LIST, nbd.OPT_INFO, nbd.OPT_GO, nbd.OPT_STRUCTURED_REPLY}
_META = (nbd.OPT_LIST_META_CONTEXT, nbd.OPT_SET_META_CONTEXT)


def fuzz(data: bytes) -> None:
    """One input; raises AssertionError if what the handshake says is not lawful."""
    choices = Choices(data)
    mode = choices.number()
    names = ("vda", "vdb") if mode & 1 else ("vda",)
    exports = {name: ExportInfo(name, 1 << 20 << i, FLAGS, 1, 4096, 1 << 25) for i, name in enumerate(names)}
    seed = choices.number()
    stream = _stream(choices, mode)
    whole, cut = Handshake(exports), Handshake(exports)
    said, failed = _feed(whole, stream, 0)
    said_in_pieces, failed_in_pieces = _feed(cut, stream, seed)
    assert failed == failed_in_pieces, "cuts change nothing"
    assert (whole.chosen, whole.closed, whole.structured) == (cut.chosen, cut.closed, cut.structured)
    if not failed:
        assert said == said_in_pieces
        assert whole.block_status == cut.block_status
    _Judge(exports, stream, said_in_pieces).judge(cut, failed=failed)


def _stream(choices: Choices, mode: int) -> bytes:
    flags = choices.number(4) if mode & 2 else nbd.FLAG_FIXED_NEWSTYLE | (mode >> 2 & 2)
    stream = bytearray(struct.pack(">I", flags))
    for _ in range(48):
        if not choices:
            break
        what = choices.number()
        number = what & 15
        body = _body(choices, what >> 4)
        if what >> 4 == 15:
            stream += choices.take(choices.number())
        elif what >> 4 == 14:
            stream += nbd.OPTION.pack(nbd.IHAVEOPT, choices.number(4), choices.number(4)) + body
        else:
            stream += nbd.OPTION.pack(nbd.IHAVEOPT, number, len(body)) + body
    return bytes(stream)


def _body(choices: Choices, kind: int) -> bytes:
    if kind < 4:
        return b""
    if kind < 7:
        return choices.take(choices.number())
    if kind == 7:
        return bytes(OPTION_LENGTH_MAX - 2 + choices.number() % 8)
    name = NAMES[choices.number() % len(NAMES)]
    if kind == 8:
        return name
    if kind < 11:
        count = choices.number() % 4
        return len(name).to_bytes(4, "big") + name + count.to_bytes(2, "big") + bytes(2 * count)
    count = choices.number() % 4
    body = len(name).to_bytes(4, "big") + name + count.to_bytes(4, "big")
    for _ in range(count):
        context = CONTEXTS[choices.number() % len(CONTEXTS)]
        body += len(context).to_bytes(4, "big") + context
    return body


def _feed(handshake: Handshake, stream: bytes, seed: int) -> tuple[bytes, bool]:
    said = bytearray()
    try:
        for piece in pieces(stream, seed):
            if handshake.chosen is not None or handshake.closed:
                handshake.buffer += piece
            else:
                said += handshake.feed(piece)
                if handshake.chosen is None and not handshake.closed:
                    assert len(handshake.buffer) < OPTION_LENGTH_MAX + nbd.OPTION.size + 1, "more is held than one option"
    except ProtocolError:
        return bytes(said), True
    return bytes(said), False


@dataclass
class _Judge:
    """Walks the client's stream beside the server's."""

    exports: dict[str, ExportInfo]
    stream: bytes
    said: bytes
    at: int = 4
    heard: int = 0
    structured: bool = False
    context_of: str | None = None

    def judge(self, handshake: Handshake, *, failed: bool) -> None:
        ended, chosen = self._walk(failed=failed)
        assert failed == (ended == "failed"), f"failed: {failed}, expected: {ended}"
        if failed:
            return
        assert handshake.closed == (ended == "closed")
        assert (handshake.chosen.name if handshake.chosen else None) == chosen
        assert handshake.structured == self.structured
        assert handshake.block_status == (self.structured and chosen is not None and self.context_of == chosen)
        assert self.heard == len(self.said), "something was said that nobody asked for"
        if chosen is not None or ended == "closed":
            assert bytes(handshake.buffer) == self.stream[self.at :], "the rest belongs to the transmission"

    def _walk(self, *, failed: bool) -> tuple[str, str | None]:
        if len(self.stream) < 4:
            return "open", None
        flags = int.from_bytes(self.stream[:4], "big")
        if flags & ~3:
            return "failed", None
        for count in range(len(self.stream)):
            if len(self.stream) - self.at < nbd.OPTION.size:
                return "open", None
            magic, option, length = nbd.OPTION.unpack_from(self.stream, self.at)
            if magic != nbd.IHAVEOPT or count == OPTIONS_MAX or (option == nbd.OPT_EXPORT_NAME and length > OPTION_LENGTH_MAX):
                return "failed", None
            data = self.stream[self.at + nbd.OPTION.size :][:length]
            if len(data) < length:
                return "open", None
            self.at += nbd.OPTION.size + length
            if option == nbd.OPT_EXPORT_NAME:
                export = self._export(data)
                if export is None:
                    return "failed", None
                self._hear_export(export, zeroes=not flags & nbd.FLAG_NO_ZEROES, failed=failed)
                return "open", export.name
            expected, chosen = self._expected(option, data)
            if not failed:
                self._hear(option, data, expected)
            if option == nbd.OPT_ABORT and expected == nbd.REP_ACK:
                return "closed", None
            if chosen is not None:
                return "open", chosen
        raise AssertionError("an endless stream")

    def _export(self, name: bytes) -> ExportInfo | None:
        if name == b"" and len(self.exports) == 1:
            return self.exports["vda"]
        return {export.name.encode(): export for export in self.exports.values()}.get(name)

    def _expected(self, option: int, data: bytes) -> tuple[int, str | None]:
        """(the reply that must end the answer, the export that is chosen by it)."""
        if len(data) > OPTION_LENGTH_MAX:
            return nbd.REP_ERR_TOO_BIG, None
        if option in (nbd.OPT_INFO, nbd.OPT_GO):
            name = data[4 : 4 + int.from_bytes(data[:4], "big")]
            rest = data[4 + len(name) :]
            if len(data) < 6 or len(name) != int.from_bytes(data[:4], "big") or len(rest) < 2:
                return nbd.REP_ERR_INVALID, None
            if len(rest) != 2 + 2 * int.from_bytes(rest[:2], "big"):
                return nbd.REP_ERR_INVALID, None
            export = self._export(name)
            if export is None:
                return nbd.REP_ERR_UNKNOWN, None
            return nbd.REP_ACK, export.name if option == nbd.OPT_GO else None
        if option in (nbd.OPT_LIST, nbd.OPT_STRUCTURED_REPLY):
            if data:
                return nbd.REP_ERR_INVALID, None
            self.structured |= option == nbd.OPT_STRUCTURED_REPLY
            return nbd.REP_ACK, None
        if option in _META:
            return self._expected_of_meta(option, data), None
        return nbd.REP_ACK if option in _KNOWN else nbd.REP_ERR_UNSUP, None

    def _expected_of_meta(self, option: int, data: bytes) -> int:
        setting = option == nbd.OPT_SET_META_CONTEXT
        if setting:
            self.context_of = None
        if not self.structured:
            return nbd.REP_ERR_INVALID
        try:
            name, rest = _string(data)
            count, rest = int.from_bytes(rest[:4], "big"), rest[4:] if len(rest) >= 4 else None
            queries = []
            for _ in range(count):
                query, rest = _string(rest)
                if len(query) > nbd.NAME_LENGTH_MAX:
                    raise ValueError
                queries.append(query)
            if rest is None or rest:
                raise ValueError
        except (ValueError, TypeError):
            return nbd.REP_ERR_INVALID
        export = self._export(name)
        if export is None:
            return nbd.REP_ERR_UNKNOWN
        if setting and b"base:allocation" in queries:
            self.context_of = export.name
        return nbd.REP_ACK

    def _hear(self, option: int, data: bytes, expected: int) -> None:
        """The replies to one option."""
        before = []
        while True:
            magic, found, kind, length = nbd.OPTION_REPLY.unpack_from(self.said, self.heard)
            payload = self.said[self.heard + nbd.OPTION_REPLY.size :][:length]
            assert (magic, found, len(payload)) == (nbd.OPTION_REPLY_MAGIC, option, length)
            self.heard += nbd.OPTION_REPLY.size + length
            if kind == nbd.REP_ACK or kind >> 31:
                assert kind == expected, f"option {option}: {kind:#x}, expected {expected:#x}"
                assert not payload
                break
            before.append((kind, payload))
        if expected != nbd.REP_ACK:
            assert not before
        elif option == nbd.OPT_LIST:
            assert before == [(nbd.REP_SERVER, len(name).to_bytes(4, "big") + name.encode()) for name in self.exports]
        elif option in (nbd.OPT_INFO, nbd.OPT_GO):
            assert {kind for kind, _ in before} == {nbd.REP_INFO}
            export = self._export(data[4 : 4 + int.from_bytes(data[:4], "big")])
            assert export is not None
            assert struct.pack(">HQH", nbd.INFO_EXPORT, export.size, self._flags()) in [payload for _, payload in before]
        elif option in _META:
            assert len(before) <= 1
            assert all(kind == nbd.REP_META_CONTEXT and payload[4:] == b"base:allocation" for kind, payload in before)
            if option == nbd.OPT_SET_META_CONTEXT:
                assert bool(before) == (self.context_of is not None)
        else:
            assert not before

    def _hear_export(self, export: ExportInfo, *, zeroes: bool, failed: bool) -> None:
        if not failed:
            expected = struct.pack(">QH", export.size, self._flags()) + (bytes(124) if zeroes else b"")
            assert self.said[self.heard :] == expected
            self.heard = len(self.said)

    def _flags(self) -> int:
        return FLAGS if self.structured else FLAGS & ~nbd.FLAG_SEND_DF


def _string(data: bytes | None) -> tuple[bytes, bytes]:
    if data is None or len(data) < 4:
        raise ValueError
    length = int.from_bytes(data[:4], "big")
    if len(data) < 4 + length:
        raise ValueError
    return data[4 : 4 + length], data[4 + length :]
