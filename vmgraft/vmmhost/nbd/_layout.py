"""The words of the NBD protocol, as far as this server speaks it.

Names, values and layouts are those of the NetworkBlockDevice project's protocol description (doc/proto.md): "Newstyle
negotiation", "Transmission phase" and "Values". Every integer on the wire is big-endian.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

# --- handshake -------------------------------------------------------------------------------------------------------

#: What the server says first: NBDMAGIC, IHAVEOPT, handshake flags.
GREETING: Final = struct.Struct(">8s8sH")
INIT_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
FLAG_FIXED_NEWSTYLE: Final = 1
FLAG_NO_ZEROES: Final = 2
CLIENT_FLAGS: Final = struct.Struct(">I")
#: A client's option: magic, number, length of the data behind it.
OPTION: Final = struct.Struct(">8sII")
#: The answer to one: magic, option, kind, length of the data behind it.
OPTION_REPLY: Final = struct.Struct(">QIII")
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
#: The answer to NBD_OPT_EXPORT_NAME: size, transmission flags; then 124 zeros unless NO_ZEROES was agreed on.
OLD_REPLY: Final = struct.Struct(">QH")
OLD_PADDING: Final = bytes(124)

#: Longest string the protocol allows ("Conventions": 4096 bytes).
MAX_NAME: Final = 4096
#: Longest option data that is read; nothing the server understands needs more.
MAX_OPTION: Final = 16384
#: Options of one client until it is let go: an honest one needs a handful.
MAX_OPTIONS: Final = 64
#: Queries in one meta-context option that are looked at.
MAX_QUERIES: Final = 64
#: The one metadata context, and the number a client sees it under.
ALLOCATION: Final = "base:allocation"
ALLOCATION_ID: Final = 1


class Opt(IntEnum):
    """Options (NBD_OPT_*)."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Rep(IntEnum):
    """Kinds of answers to options (NBD_REP_*)."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_INVALID = 0x80000003
    ERR_UNKNOWN = 0x80000006
    ERR_TOO_BIG = 0x80000009


class Info(IntEnum):
    """What NBD_REP_INFO tells (NBD_INFO_*)."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Export(IntFlag):
    """Transmission flags (NBD_FLAG_*)."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_DF = 128
    CAN_MULTI_CONN = 256


# --- transmission ----------------------------------------------------------------------------------------------------

#: A request: magic, command flags, type, cookie, offset, length.
REQUEST: Final = struct.Struct(">IHHQQI")
REQUEST_MAGIC: Final = 0x25609513
#: A simple reply: magic, error, cookie.
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
SIMPLE_REPLY_MAGIC: Final = 0x67446698
#: A structured reply chunk: magic, flags, type, cookie, length of what follows.
CHUNK: Final = struct.Struct(">IHHQI")
CHUNK_MAGIC: Final = 0x668E33EF
CHUNK_DONE: Final = 1
#: NBD_REPLY_TYPE_OFFSET_DATA begins with the offset, NBD_REPLY_TYPE_ERROR with error and length of its message.
OFFSET: Final = struct.Struct(">Q")
ERROR_HEAD: Final = struct.Struct(">IH")
#: NBD_REPLY_TYPE_BLOCK_STATUS: context number, then (length, flags) for each extent.
CONTEXT: Final = struct.Struct(">I")
EXTENT: Final = struct.Struct(">II")
#: base:allocation: NBD_STATE_HOLE and NBD_STATE_ZERO.
STATE_ZEROS: Final = 3
STATE_DATA: Final = 0

#: Most bytes one request may read or write, told to clients; what qemu-nbd and nbdkit take too.
MAX_PAYLOAD: Final = 32 << 20
#: Extents in one answer to NBD_CMD_BLOCK_STATUS.
MAX_EXTENTS: Final = 4096


class Cmd(IntEnum):
    """Request types (NBD_CMD_*)."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    BLOCK_STATUS = 7


class CmdFlag(IntFlag):
    """Command flags (NBD_CMD_FLAG_*)."""

    FUA = 1
    DF = 4
    REQ_ONE = 8


class ChunkType(IntEnum):
    """Kinds of chunks (NBD_REPLY_TYPE_*)."""

    NONE = 0
    OFFSET_DATA = 1
    BLOCK_STATUS = 5
    ERROR = 32769


class Errno(IntEnum):
    """Errors a reply may carry (NBD_E*)."""

    PERM = 1
    IO = 5
    INVAL = 22
    NOSPC = 28
    OVERFLOW = 75
    NOTSUP = 95
    SHUTDOWN = 108
