"""The NBD protocol's numbers and structs. Source: doc/proto.md of NetworkBlockDevice/nbd. All big-endian."""

from __future__ import annotations

import struct
from typing import Final

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

GREETING: Final = struct.Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""
OPTION: Final = struct.Struct(">QII")
"""IHAVEOPT, option, length of the data that follows."""
OPTION_REPLY: Final = struct.Struct(">QIII")
"""OPTION_REPLY_MAGIC, option, reply type, length of the data that follows."""
REQUEST: Final = struct.Struct(">IHHQQI")
"""REQUEST_MAGIC, command flags, command, cookie, offset, length."""
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
"""SIMPLE_REPLY_MAGIC, error, cookie."""
CHUNK: Final = struct.Struct(">IHHQI")
"""STRUCTURED_REPLY_MAGIC, flags, chunk type, cookie, length of the chunk's payload."""
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")
"""CHUNK and the offset that begins the payload of OFFSET_DATA."""
ERROR_CHUNK: Final = struct.Struct(">IHHQIIH")
"""CHUNK and the payload of ERROR without a message: error, message length."""
STATUS_CHUNK: Final = struct.Struct(">IHHQII")
"""CHUNK and the context id that begins the payload of BLOCK_STATUS."""
EXTENT: Final = struct.Struct(">II")
"""length (bytes), state."""

# Handshake flags.
FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2

# Options.
OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10

# Option replies.
REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERR_UNSUP: Final = 0x80000001
REP_ERR_INVALID: Final = 0x80000003
REP_ERR_UNKNOWN: Final = 0x80000006
REP_ERR_TOO_BIG: Final = 0x80000009

INFO_EXPORT: Final = 0
INFO_BLOCK_SIZE: Final = 3

# Transmission flags.
FLAG_HAS_FLAGS: Final = 1 << 0
FLAG_READ_ONLY: Final = 1 << 1
FLAG_SEND_FLUSH: Final = 1 << 2
FLAG_SEND_FUA: Final = 1 << 3
FLAG_SEND_TRIM: Final = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
FLAG_SEND_DF: Final = 1 << 7
FLAG_CAN_MULTI_CONN: Final = 1 << 8
FLAG_SEND_CACHE: Final = 1 << 10
FLAG_SEND_FAST_ZERO: Final = 1 << 11

# Commands.
CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

# Command flags.
CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4

# Structured reply chunks.
REPLY_FLAG_DONE: Final = 1
REPLY_NONE: Final = 0
REPLY_OFFSET_DATA: Final = 1
REPLY_BLOCK_STATUS: Final = 5
REPLY_ERROR: Final = 0x8001

BASE_ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

# Errors on the wire.
EPERM: Final = 1
EIO: Final = 5
ENOMEM: Final = 12
EINVAL: Final = 22
ENOSPC: Final = 28
EOVERFLOW: Final = 75
ENOTSUP: Final = 95
ESHUTDOWN: Final = 108

NAME_LENGTH_MAX: Final = 4096
"""Longest export or context name, bytes: the protocol's limit for strings."""
REQUEST_LENGTH_MAX: Final = 64 << 20
"""Longest READ or WRITE that is accepted, bytes."""
EXPORT_NAME_ZEROES: Final = bytes(124)


def wire_error(errno_value: int | None) -> int:
    """The protocol's error for an operating system's errno."""
    if errno_value in (EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP):
        return int(errno_value)
    if errno_value in (122, 27):  # EDQUOT, EFBIG
        return ENOSPC
    return EIO
