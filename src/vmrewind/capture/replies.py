"""Replies that are not one fixed header: errors of reads, and what BLOCK_STATUS tells."""

from __future__ import annotations

from typing import Final

from vmrewind.capture.image import Image
from vmrewind.nbd import protocol as nbd

EXTENTS_MAX: Final = 4096


def pack_read_error(output: bytearray, at: int, cookie: int, error: int, *, structured: bool) -> int:
    """Put the reply of a read that brings no data (``error`` 0: none was asked for) into ``output``; returns where it ends."""
    if not structured:
        nbd.SIMPLE_REPLY.pack_into(output, at, nbd.SIMPLE_REPLY_MAGIC, error, cookie)
        return at + nbd.SIMPLE_REPLY.size
    magic, done = nbd.STRUCTURED_REPLY_MAGIC, nbd.REPLY_FLAG_DONE
    if error:
        nbd.ERROR_CHUNK.pack_into(output, at, magic, done, nbd.REPLY_ERROR, cookie, 6, error, 0)
        return at + nbd.ERROR_CHUNK.size
    nbd.CHUNK.pack_into(output, at, magic, done, nbd.REPLY_NONE, cookie, 0)
    return at + nbd.CHUNK.size


def status_reply(image: Image, cookie: int, offset: int, length: int, flags: int, *, structured: bool) -> memoryview:
    """The reply of a BLOCK_STATUS request; ``length`` 0: it was not a lawful one."""
    if not length:
        output = bytearray(nbd.ERROR_CHUNK.size)
        return memoryview(output)[: pack_read_error(output, 0, cookie, nbd.EINVAL, structured=structured)]
    extents = bytearray()
    limit = 1 if flags & nbd.CMD_FLAG_REQ_ONE else EXTENTS_MAX
    for count, (extent, is_data) in enumerate(image.allocation(offset, length)):
        if count == limit:
            break
        extents += nbd.EXTENT.pack(extent, 0 if is_data else nbd.STATE_HOLE | nbd.STATE_ZERO)
    head = nbd.STATUS_CHUNK.pack(
        nbd.STRUCTURED_REPLY_MAGIC, nbd.REPLY_FLAG_DONE, nbd.REPLY_BLOCK_STATUS, cookie, 4 + len(extents), 1
    )
    return memoryview(head + extents)
