"""One NBD connection in the transmission phase: the write path.

What a request costs in Python is paid per batch. Everything that a receive brought is parsed in one loop, which packs journal
records straight into the writer's table and replies straight into one output buffer, and keeps payloads as slices of the receive
buffer. Then: one vectored write to the journal, the image writes, one send. No object per request, no copy of a payload.

A request too large to be held whole (``LARGE``) is carried out in pieces: a write as it arrives, a read as the client takes it. So
what a connection can make this process hold is bounded, whatever is asked of it, and between two pieces others have their turn.
So is a large discard, or zeroing, while its old content has to be kept for a base.

Order within a batch: all writes as they came (journal first, then image), then the reads. NBD leaves the order of requests in
flight to the server, so this is lawful; a write is acknowledged only when journal and image both hold it.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import xxhash

from vmrewind.capture.applying import Operation, apply
from vmrewind.capture.reading import Read, Reader
from vmrewind.capture.replies import EXTENTS_MAX, status_reply
from vmrewind.capture.sending import PIECE, Sender
from vmrewind.journal import format as fmt
from vmrewind.journal.pool import JournalFull
from vmrewind.nbd import protocol as nbd

if TYPE_CHECKING:
    from vmrewind.capture.disk import Disk
    from vmrewind.capture.server import Server

WINDOW: Final = (256 << 10) + (8 << 10)
"""Receive buffer, bytes: one 256 KiB write with its header fits, and it stays in the processor's cache. It grows to hold the
largest request that is not ``LARGE``."""
LARGE: Final = PIECE
"""Requests longer than this, bytes, are carried out in pieces of at most this."""
OUTPUT_MAX: Final = 1 << 20
"""A batch ends when its replies fill this much, bytes."""
BATCH_REQUESTS_MAX: Final = 256
_BATCHES_A_TURN: Final = 8
"""Batches that are served before other connections have their turn."""
_RECEIVE_TRIES: Final = 60
"""How often the rest of a request is asked for before the loop sleeps, about a microsecond each. A unix socket holds less than a
256 KiB write, whose rest comes as soon as there is room: sleeping for it costs more (measured: 1.2 times the rate)."""
_PATIENCE_MAX: Final = 60
"""How often, at most, a next request is asked for. While a client keeps sending, sleeping and being woken costs both sides more
(measured with 4 KiB writes: 1.3 times the rate at 16 in flight, 1.5 times at 1 on a machine with nothing else to do, at less CPU
time each). Of no avail, it is done half as often the next time, so that a client that sends now and then costs a try or two."""
_REQUEST_SIZE: Final = nbd.REQUEST.size

_UNSETTLED: Final = "it has no room for what an image has refused"
_PADDING: Final = tuple(bytes(n) for n in range(fmt.ALIGNMENT))
_xxh3 = xxhash.xxh3_64_intdigest
_SIMPLE_OK: Final = nbd.SIMPLE_REPLY_MAGIC

_ALLOWED_FLAGS: Final = {
    nbd.CMD_DISC: 0xFFFF,
    nbd.CMD_FLUSH: nbd.CMD_FLAG_FUA,
    nbd.CMD_TRIM: nbd.CMD_FLAG_FUA,
    nbd.CMD_CACHE: nbd.CMD_FLAG_FUA,
    nbd.CMD_WRITE_ZEROES: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FAST_ZERO,
    nbd.CMD_BLOCK_STATUS: nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_REQ_ONE,
}


@dataclass(slots=True)
class _LargeWrite:
    """What is left to be done of a WRITE, DISCARD or ZERO, and what is wrong with it so far."""

    op: fmt.Op
    cookie: int
    flags: int
    offset: int
    left: int
    error: int = 0


class Connection:
    """A client of one disk. The server calls ``readable`` and ``writable``; ``closed`` says that it is to be forgotten."""

    def __init__(self, server: Server, sock: socket.socket, disk: Disk, *, structured: bool, block_status: bool) -> None:
        self.server = server
        self.sock = sock
        self.disk = disk
        self.structured = structured
        self.block_status = block_status
        self._read_flags = nbd.CMD_FLAG_FUA | (nbd.CMD_FLAG_DF if structured else 0)
        self.closed = False
        self.held = False
        """The journal can't take this client's writes now: nothing is read from it until ``resume``."""
        self._ending = False
        """Nothing more is served: it is closed once what was asked before is answered."""
        self._whole_max = min(LARGE, server.record_length_max)
        self._large_write: _LargeWrite | None = None
        self._unstable = 0
        self._window = bytearray(WINDOW)
        self._view = memoryview(self._window)
        self._start = 0
        self._filled = 0
        self._reader = Reader(disk.image, structured=structured)
        self._sender = Sender(sock, self._reader, structured=structured)
        self._patience = 0

    def preload(self, data: bytes | bytearray) -> None:
        """Bytes that arrived behind the handshake."""
        self._make_room(len(data))
        self._window[: len(data)] = data
        self._filled = len(data)

    def readable(self) -> None:
        """Receive and serve every complete request, and look a while for what comes next before the loop sleeps."""
        if self._ending:
            # Watched for nothing but the client's end.
            self.close()
            return
        if self._reader.full:
            return
        patience = self._patience = min(self._patience + 1, _PATIENCE_MAX)
        tries = _RECEIVE_TRIES
        receives = 0
        while receives < _BATCHES_A_TURN:
            try:
                received = self.sock.recv_into(self._view[self._filled :])
            except BlockingIOError:
                tries -= 1
                if tries > 0:
                    continue
                if not self._filled:
                    self._patience = patience // 2
                return
            except OSError:
                received = 0
            if not received:
                self.close()
                return
            if receives and not self._filled:
                patience = self._patience = _PATIENCE_MAX
            receives += 1
            self._filled += received
            if not self.resume() or self._reader.waiting:
                return
            tries = _RECEIVE_TRIES if self._filled else patience

    def resume(self) -> bool:
        """Serve what is in the window: after a receive, once the output has drained, or once the journal has room again.

        Returns whether more may be received now.
        """
        self.held = False
        for _ in range(_BATCHES_A_TURN):
            nothing_whole = self._filled - self._start < _REQUEST_SIZE and self._large_write is None
            if nothing_whole or self._blocked or not self._serve_batch():
                break
        else:
            if not self._blocked:
                self.server.want_writable(self, True)
                return False
        if self._blocked:
            return False
        self._compact()
        return True

    @property
    def _blocked(self) -> bool:
        return self.closed or self.held or self._ending or self.has_backlog

    def _compact(self) -> None:
        """Move an incomplete request to the front, and see that there is room for the rest of it."""
        start, filled = self._start, self._filled
        left = filled - start
        if start:
            if left:
                self._window[:left] = self._window[start:filled]
            self._start, self._filled = 0, left
        needed = nbd.REQUEST.size
        if self._large_write is not None and self._large_write.op is fmt.Op.WRITE:
            needed = min(self._large_write.left, self._whole_max)
        elif left >= nbd.REQUEST.size:
            *_, length = nbd.REQUEST.unpack_from(self._window)
            needed += min(length, self._whole_max)
        self._make_room(needed)

    def _make_room(self, size: int) -> None:
        if size <= len(self._window):
            return
        window = bytearray(size)
        window[: self._filled] = self._window[: self._filled]
        self._window = window
        self._view = memoryview(window)

    def _serve_batch(self) -> bool:
        """Serve one batch from the window; False if there is no complete request left in it."""
        bypass = self.server.bypass
        if self.server.arrears.refused and not self.server.arrears.settle() and not bypass.begin(_UNSETTLED):
            self._hold(_UNSETTLED)
            return False
        if self._large_write is not None:
            return self._serve_large_write(self._large_write)
        disk = self.disk
        size = disk.size
        index = disk.index
        writer = self.server.writer
        table = writer.table
        record_size = fmt.RECORD.size
        pack_record = fmt.RECORD.pack_into
        pack_reply = nbd.SIMPLE_REPLY.pack_into
        unpack = nbd.REQUEST.unpack_from
        request_size, reply_size = _REQUEST_SIZE, nbd.SIMPLE_REPLY.size
        window, view = self._window, self._view
        position, filled = self._start, self._filled
        read_flags = self._read_flags
        whole_max = self._whole_max
        payload_room = self.server.batch_payload_max

        records = 0
        table_at = writer.table_at
        payloads: list[bytes | memoryview] = []
        payload_length = 0
        operations: list[Operation] = []
        # Replies: (cookie, error) of everything but reads, in order; deferred ones wait for a flush.
        replies: list[tuple[int, int]] = []
        written: list[int] = []
        deferred: list[int] = []
        reads: list[Read] = []
        statuses: list[tuple[int, int, int, int]] = []
        output_length = 0
        requests = 0
        ending = False

        while filled - position >= request_size and requests < BATCH_REQUESTS_MAX and output_length < OUTPUT_MAX:
            magic, flags, command, cookie, offset, length = unpack(window, position)
            if magic != nbd.REQUEST_MAGIC:
                ending = True
                break
            if command == nbd.CMD_WRITE:
                body = position + request_size
                stop = body + length
                if length > nbd.REQUEST_LENGTH_MAX:
                    # Its payload would have to be skipped unread; the reference servers hang up as well.
                    ending = True
                    break
                if length > whole_max:
                    if requests:
                        break
                    error = nbd.EINVAL if flags & ~nbd.CMD_FLAG_FUA else nbd.ENOSPC if offset + length > size else 0
                    self._start = body
                    self._large_write = _LargeWrite(fmt.Op.WRITE, cookie, flags, offset, length, error)
                    return self._serve_large_write(self._large_write)
                if stop > filled:
                    break
                if flags & ~nbd.CMD_FLAG_FUA:
                    replies.append((cookie, nbd.EINVAL))
                elif offset + length > size:
                    replies.append((cookie, nbd.ENOSPC))
                elif length:
                    if payload_length + length + 8 > payload_room:
                        break
                    payload = view[body:stop]
                    pack_record(table, table_at, offset, length, index, 1, flags & nbd.CMD_FLAG_FUA, _xxh3(payload))
                    table_at += record_size
                    payloads.append(payload)
                    payload_length += length
                    if length & 7:
                        payloads.append(_PADDING[-length & 7])
                        payload_length += -length & 7
                    operations.append((records, payload, offset, length, 0, cookie))
                    records += 1
                    (deferred if flags & nbd.CMD_FLAG_FUA else written).append(cookie)
                else:
                    replies.append((cookie, 0))
                position = stop
            elif command == nbd.CMD_READ:
                if flags & ~read_flags or offset + length > size or length > nbd.REQUEST_LENGTH_MAX:
                    reads.append((cookie, offset, -nbd.EINVAL))
                elif length > LARGE:
                    if requests:
                        break
                    self._start = position + request_size
                    self._sender.read_large(cookie, flags, offset, length)
                    self._look_at_sender()
                    return True
                else:
                    reads.append((cookie, offset, length))
                    output_length += length
                position += request_size
            else:
                position += request_size
                if flags & ~_ALLOWED_FLAGS.get(command, 0xFFFF):
                    replies.append((cookie, nbd.EINVAL))
                elif command == nbd.CMD_FLUSH:
                    pack_record(table, table_at, 0, 0, index, fmt.Op.FLUSH, 0, 0)
                    table_at += record_size
                    records += 1
                    deferred.append(cookie)
                elif command in (nbd.CMD_TRIM, nbd.CMD_WRITE_ZEROES):
                    if offset + length > size:
                        replies.append((cookie, nbd.EINVAL if command == nbd.CMD_TRIM else nbd.ENOSPC))
                    elif flags & nbd.CMD_FLAG_FAST_ZERO and not (
                        disk.image.fast_zero_kept if flags & nbd.CMD_FLAG_NO_HOLE else disk.image.fast_zero
                    ):
                        replies.append((cookie, nbd.ENOTSUP))
                    elif not length:
                        replies.append((cookie, 0))
                    else:
                        op = fmt.Op.DISCARD if command == nbd.CMD_TRIM else fmt.Op.ZERO
                        kept = flags & (nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
                        if length > whole_max and disk.image.keeps:
                            if requests:
                                position -= request_size
                                break
                            self._start = position
                            self._large_write = _LargeWrite(op, cookie, kept, offset, length)
                            return self._serve_large_write(self._large_write)
                        pack_record(table, table_at, offset, length, index, op, kept, 0)
                        table_at += record_size
                        operations.append((records, None, offset, length, kept, cookie))
                        records += 1
                        (deferred if flags & nbd.CMD_FLAG_FUA else written).append(cookie)
                elif command == nbd.CMD_BLOCK_STATUS:
                    if not self.block_status or offset + length > size or not length:
                        statuses.append((cookie, 0, 0, 0))
                    else:
                        statuses.append((cookie, offset, length, flags))
                        output_length += (1 if flags & nbd.CMD_FLAG_REQ_ONE else EXTENTS_MAX) * nbd.EXTENT.size
                elif command == nbd.CMD_CACHE:
                    if offset + length > size:
                        replies.append((cookie, nbd.EINVAL))
                    else:
                        os.posix_fadvise(disk.image.fd, offset, length, os.POSIX_FADV_WILLNEED)
                        replies.append((cookie, 0))
                elif command == nbd.CMD_DISC:
                    ending = True
                    requests += 1
                    break
                else:
                    replies.append((cookie, nbd.EINVAL))
            requests += 1

        if not requests:
            if ending:
                self._end()
            return False
        if records:
            first_seq = None
            if not bypass.on:
                try:
                    first_seq = writer.commit(records, payloads, payload_length)
                except JournalFull as full:
                    if not bypass.begin(str(full)):
                        self._hold(str(full))
                        return False
            failed = apply(self.server, disk, operations, first_seq)
            if failed:
                replies.extend(failed.items())
                written = [cookie for cookie in written if cookie not in failed]
                deferred = [cookie for cookie in deferred if cookie not in failed]
        self._start = position

        output = self._sender.buffer((len(replies) + len(written) + len(reads)) * nbd.DATA_CHUNK.size + output_length)
        at = 0
        for cookie in written:
            pack_reply(output, at, _SIMPLE_OK, 0, cookie)
            at += reply_size
        for cookie, error in replies:
            pack_reply(output, at, _SIMPLE_OK, error, cookie)
            at += reply_size
        if reads:
            at = self._reader.serve(reads, output, at)
            if self._reader.waiting:
                self.server.wait_for_reads(self)
        if at:
            self._send(memoryview(output)[:at])
        for cookie, offset, length, flags in statuses:
            self._send(status_reply(disk.image, cookie, offset, length, flags, structured=self.structured))
        for cookie in deferred:
            self._answer_when_stable(cookie)
        if ending:
            self._end()
        return True

    def _serve_large_write(self, large: _LargeWrite) -> bool:
        """Carry out the next piece of a large write, a batch of its own, if it has arrived; reply after the last."""
        length = min(large.left, self._whole_max)
        start = self._start
        piece = None
        if large.op is fmt.Op.WRITE:
            if self._filled - start < length:
                return False
            piece = self._view[start : start + length]
            self._start = start + length
        elif large.error or not self.disk.image.keeps:
            length = large.left
        if not large.error:
            writer = self.server.writer
            checksum = _xxh3(piece) if piece is not None else 0
            fmt.RECORD.pack_into(
                writer.table, writer.table_at, large.offset, length, self.disk.index, large.op, large.flags, checksum
            )
            payloads = (piece, _PADDING[-length & 7]) if piece is not None else ()
            seq = None
            if not self.server.bypass.on:
                try:
                    seq = writer.commit(1, payloads, fmt.padded(length) if piece is not None else 0)
                except JournalFull as full:
                    if not self.server.bypass.begin(str(full)):
                        self._start = start
                        self._hold(str(full))
                        return False
            failed = apply(self.server, self.disk, [(0, piece, large.offset, length, large.flags, large.cookie)], seq)
            large.error = failed.get(large.cookie, 0)
        large.offset += length
        large.left -= length
        if large.left:
            return True
        self._large_write = None
        if large.flags & nbd.CMD_FLAG_FUA and not large.error:
            self._answer_when_stable(large.cookie)
        else:
            self._send(memoryview(nbd.SIMPLE_REPLY.pack(_SIMPLE_OK, large.error, large.cookie)))
        return True

    def _hold(self, reason: str) -> None:
        self.held = True
        self.server.hold(self, reason)

    def _answer_when_stable(self, cookie: int) -> None:
        self._unstable += 1
        self.server.durability.flush(self, cookie)

    def flushed(self, cookie: int, error: int) -> None:
        """A deferred request is on stable storage (or is not: ``error``): answer it."""
        if not self.closed:
            self._unstable -= 1
            code = nbd.wire_error(error) if error else 0
            self._send(memoryview(nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, code, cookie)))
            if self._ending:
                self._end()

    def _end(self) -> None:
        """The client said goodbye, or what cannot be understood: close once all that it asked before is answered."""
        self._ending = True
        if not (self.closed or self.has_backlog):
            if self._unstable or self._reader.waiting:
                self.server.want_nothing(self)
            else:
                self.close()

    def _send(self, data: memoryview) -> None:
        self._sender.send(data)
        self._look_at_sender()

    def _look_at_sender(self) -> None:
        if self._sender.lost:
            self.close()
        elif self._sender.waiting:
            self.server.want_writable(self, True)

    def finish_read(self) -> bool:
        """Wait for the oldest read that waits for the disk, and answer all that can be; False if none is left to be waited for now.

        While the client does not take its replies, none is waited for.
        """
        if self.closed or self.has_backlog:
            return False
        output = self._sender.buffer(self._reader.room(OUTPUT_MAX))
        self._send(memoryview(output)[: self._reader.wait(output)])
        if self._ending:
            self._end()
        return self._reader.waiting and not self.closed

    @property
    def has_backlog(self) -> bool:
        """Whether replies wait for room in the client's socket."""
        return self._sender.waiting

    def writable(self) -> None:
        """The client takes replies again: send what is left, then go on serving."""
        self._sender.go_on()
        self._look_at_sender()
        if not self.closed and not self.has_backlog:
            if self._reader.waiting:
                self.server.wait_for_reads(self)
            if self._ending:
                self._end()
                return
            self.server.want_writable(self, False)
            self.resume()

    def hung_up(self) -> bool:
        """Whether the client's side is closed: what it still has in the socket is then of no use to anybody."""
        return self.server.peer_is_gone(self.sock)

    def close(self) -> None:
        """Hang up. Requests without an answer count as never made: the client sends them again elsewhere."""
        if not self.closed:
            self.closed = True
            self.server.forget(self)
            self.sock.close()
