"""Streams of requests, and the model that judges what they were answered and what they left."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from tests.fuzz.stream import Choices
from vmrewind.nbd import protocol as nbd

SIZE = 64 << 10
LARGE = 2048
"""Requests beyond this are carried out in pieces: the server's limit is set to it, so that small inputs reach it."""
_FAVOURITES = (nbd.CMD_READ, nbd.CMD_WRITE, nbd.CMD_WRITE, nbd.CMD_FLUSH)
_FLAGS = {
    nbd.CMD_WRITE: nbd.CMD_FLAG_FUA,
    nbd.CMD_FLUSH: nbd.CMD_FLAG_FUA,
    nbd.CMD_TRIM: nbd.CMD_FLAG_FUA,
    nbd.CMD_CACHE: nbd.CMD_FLAG_FUA,
    nbd.CMD_WRITE_ZEROES: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO,
    nbd.CMD_BLOCK_STATUS: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_REQ_ONE,
}


@dataclass
class Request:
    """One request as the server must understand it; ``data`` is what has been sent of a write's payload."""

    command: int
    flags: int
    offset: int
    length: int
    data: bytes

    @property
    def whole(self) -> bool:
        return self.command != nbd.CMD_WRITE or len(self.data) == self.length


def stream_of(choices: Choices) -> bytearray:
    """What a client says in the transmission phase. Cookies are set by ``understood``."""
    stream = bytearray()
    for number in range(64):
        if not choices:
            break
        kind = choices.number()
        place = choices.number()
        flags = choices.number()
        flags = flags << 8 if flags & 0x80 else flags & 0x3F
        offset = _offset(choices, place & 3)
        length = _length(choices, place >> 2 & 3)
        magic = nbd.REQUEST_MAGIC
        match kind & 15:
            case 8:
                command = choices.number(2)
            case 9:
                stream += choices.take(choices.number())
                continue
            case 10:
                del stream[max(0, len(stream) - choices.number()) :]
                break
            case 11:
                command, magic = kind >> 4, nbd.REQUEST_MAGIC ^ choices.number()
            case low:
                command = low if low < 8 else _FAVOURITES[low & 3]
        stream += nbd.REQUEST.pack(magic, flags, command, 0, offset, length)
        if command == nbd.CMD_WRITE and length <= 8 * LARGE:
            stream += bytes([number + 1]) * length
    return stream


def _offset(choices: Choices, mode: int) -> int:
    match mode:
        case 0:
            return choices.number(2)
        case 1:
            return SIZE - choices.number()
        case 2:
            return (1 << 64) - 1 - choices.number()
        case _:
            return choices.number() * 512 % SIZE


def _length(choices: Choices, mode: int) -> int:
    match mode:
        case 0:
            return choices.number() * 2
        case 1:
            return choices.number(2) % (8 * LARGE)
        case 2:
            return nbd.REQUEST_LENGTH_MAX - 128 + choices.number()
        case _:
            return (1 << 32) - 1 - choices.number() * 512


def understood(stream: bytearray) -> tuple[list[Request], bool]:
    """(the requests in the stream, whether the server must hang up behind them). A request's cookie is set to its number."""
    requests: list[Request] = []
    at = 0
    while len(stream) - at >= nbd.REQUEST.size:
        magic, flags, command, _, offset, length = nbd.REQUEST.unpack_from(stream, at)
        if magic != nbd.REQUEST_MAGIC or (command == nbd.CMD_WRITE and length > nbd.REQUEST_LENGTH_MAX):
            return requests, True
        stream[at + 8 : at + 16] = len(requests).to_bytes(8, "big")
        at += nbd.REQUEST.size
        if command == nbd.CMD_DISC:
            return requests, True
        data = b""
        if command == nbd.CMD_WRITE:
            data = bytes(stream[at : at + length])
            at += length
        requests.append(Request(command, flags, offset, length, data))
    return requests, False


@dataclass
class Reply:
    """What one request was answered."""

    error: int = 0
    data: dict[int, bytes] = field(default_factory=dict)
    extents: list[tuple[int, int]] | None = None
    chunks: int = 0


class Model:
    """What a disk may hold and answer; ``content`` is what it holds before the first request."""

    def __init__(self, requests: list[Request], content: bytes, *, structured: bool, status: bool) -> None:
        self._requests = requests
        self._structured = structured
        self._status = status
        self._states = [content]

    @property
    def awaited(self) -> int:
        """How many replies there must be."""
        return sum(request.whole for request in self._requests)

    def lawful(self, request: Request) -> set[int]:
        """The errors that a request may be answered with, 0 for none."""
        beyond = request.offset + request.length > SIZE
        known = _FLAGS.get(request.command, 0)
        if request.command == nbd.CMD_READ:
            known = nbd.CMD_FLAG_FUA | (nbd.CMD_FLAG_DF if self._structured else 0)
        strange = bool(request.flags & ~known)
        match request.command:
            case nbd.CMD_READ | nbd.CMD_TRIM | nbd.CMD_CACHE:
                return {errno.EINVAL} if strange or beyond else {0}
            case nbd.CMD_WRITE | nbd.CMD_WRITE_ZEROES:
                if strange or beyond:
                    return ({errno.EINVAL} if strange else set()) | ({errno.ENOSPC} if beyond else set())
                return {0, errno.ENOTSUP} if request.flags & nbd.CMD_FLAG_FAST_ZERO else {0}
            case nbd.CMD_FLUSH:
                return {errno.EINVAL} if strange else {0}
            case nbd.CMD_BLOCK_STATUS:
                return {errno.EINVAL} if strange or beyond or not self._status or not request.length else {0}
            case _:
                return {errno.EINVAL}

    def replies(self, said: bytes) -> tuple[dict[int, Reply], int]:
        """(what the server has said in full by now by request, the bytes that took); fails if that is not lawful."""
        replies: dict[int, Reply] = {}
        done: set[int] = set()
        at = 0
        while len(said) - at >= 16:
            magic = int.from_bytes(said[at : at + 4], "big")
            simple = magic == nbd.SIMPLE_REPLY_MAGIC
            assert simple or (self._structured and magic == nbd.STRUCTURED_REPLY_MAGIC), f"{magic:#x} at {at} is no reply"
            cookie = int.from_bytes(said[at + 8 : at + 16], "big")
            assert cookie < len(self._requests), f"nobody asked {cookie}"
            assert cookie not in done, f"request {cookie} is answered twice"
            request = self._requests[cookie]
            assert request.whole, f"request {cookie} was not sent whole"
            reply = replies.setdefault(cookie, Reply())
            if simple:
                assert not (self._structured and request.command == nbd.CMD_READ)
                reply.error = int.from_bytes(said[at + 4 : at + 8], "big")
                length = 0 if reply.error or request.command != nbd.CMD_READ else request.length
                payload = said[at + 16 : at + 16 + length]
                if len(payload) < length:
                    break
                reply.data[request.offset] = payload
                at += 16 + length
                done.add(cookie)
                continue
            if len(said) - at < nbd.CHUNK.size:
                break
            _, flags, kind, _, length = nbd.CHUNK.unpack_from(said, at)
            payload = said[at + nbd.CHUNK.size : at + nbd.CHUNK.size + length]
            if len(payload) < length:
                break
            at += nbd.CHUNK.size + length
            self._take_chunk(request, reply, kind, payload)
            if flags & nbd.REPLY_FLAG_DONE:
                done.add(cookie)
        return {cookie: replies[cookie] for cookie in done}, at

    @staticmethod
    def _take_chunk(request: Request, reply: Reply, kind: int, payload: bytes) -> None:
        reply.chunks += 1
        if kind == nbd.REPLY_ERROR:
            reply.error = int.from_bytes(payload[:4], "big")
            assert reply.error
            assert len(payload) == 6 + int.from_bytes(payload[4:6], "big")
        elif kind == nbd.REPLY_OFFSET_DATA:
            assert request.command == nbd.CMD_READ
            assert len(payload) > 8
            offset = int.from_bytes(payload[:8], "big")
            assert all(offset >= at + len(data) or offset + len(payload) - 8 <= at for at, data in reply.data.items())
            reply.data[offset] = payload[8:]
        elif kind == nbd.REPLY_BLOCK_STATUS:
            assert request.command == nbd.CMD_BLOCK_STATUS
            assert (len(payload) - 4) % 8 == 0
            reply.extents = [nbd.EXTENT.unpack_from(payload, at) for at in range(4, len(payload), 8)]
        else:
            assert kind == nbd.REPLY_NONE, f"chunk type {kind}"
            assert not payload

    def judge(self, replies: dict[int, Reply], content: bytes) -> None:
        """Every request's reply, and what they have left in the image."""
        assert set(replies) == {cookie for cookie, request in enumerate(self._requests) if request.whole}
        began: list[int] = []
        for cookie, request in enumerate(self._requests):
            began.append(len(self._states) - 1)
            lawful = self.lawful(request)
            if cookie in replies:
                assert replies[cookie].error in lawful, f"request {cookie}, {request}: error {replies[cookie].error}, not {lawful}"
            error = replies[cookie].error if cookie in replies else min(lawful)
            if not error:
                self._carry_out(request)
        assert content == self._states[-1], "the image does not hold what was written"
        for cookie, request in enumerate(self._requests):
            if cookie in replies and not replies[cookie].error:
                states = self._states[began[cookie] :]
                if request.command == nbd.CMD_READ:
                    self._judge_read(request, replies[cookie], states)
                elif request.command == nbd.CMD_BLOCK_STATUS:
                    self._judge_status(request, replies[cookie], states)

    def _carry_out(self, request: Request) -> None:
        state = self._states[-1]
        if request.command == nbd.CMD_WRITE:
            # Of a large one that broke off, whole pieces are carried out.
            kept = len(request.data) if request.whole else len(request.data) // LARGE * LARGE if request.length > LARGE else 0
            data = request.data[:kept]
        elif request.command in (nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
            data = bytes(request.length)
        else:
            return
        if data:
            self._states.append(state[: request.offset] + data + state[request.offset + len(data) :])

    @staticmethod
    def _judge_read(request: Request, reply: Reply, states: list[bytes]) -> None:
        data = b"".join(reply.data[at] for at in sorted(reply.data))
        assert len(data) == request.length
        if reply.chunks:
            assert not request.length or min(reply.data) == request.offset
            assert not request.flags & nbd.CMD_FLAG_DF or reply.chunks == 1
        stop = request.offset + request.length
        assert any(state[request.offset : stop] == data for state in states), "it read what never was there"

    @staticmethod
    def _judge_status(request: Request, reply: Reply, states: list[bytes]) -> None:
        assert reply.extents
        assert all(length for length, _ in reply.extents)
        assert sum(length for length, _ in reply.extents) <= request.length
        assert not request.flags & nbd.CMD_FLAG_REQ_ONE or len(reply.extents) == 1
        at = request.offset
        for length, state_flags in reply.extents:
            if state_flags & nbd.STATE_ZERO:
                assert any(not any(state[at : at + length]) for state in states), "what is called zero is not"
            at += length
