"""The handshake of one connection: fixed newstyle, until the client has chosen an export (proto.md, "Option types")."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vmgraft.vmmhost.core.disk import BLOCK
from vmgraft.vmmhost.core.drives import Disk
from vmgraft.vmmhost.nbd import _layout as nbd
from vmgraft.vmmhost.nbd._layout import Export, Info, Opt, Rep
from vmgraft.vmmhost.nbd.wire import GoneError, Wire


@dataclass(frozen=True, slots=True)
class NbdExport:
    """One name under which a client finds a disk.

    Attributes:
        name: At most 4096 bytes of UTF-8; the first export of a server also answers to the empty name.
        disk: Its content; ``content.CheckedContent`` is served by many threads at once, others by one at a time.
        read_only: Refuse writes.
        description: Text for people who list the exports.
    """

    name: str
    disk: Disk
    read_only: bool = True
    description: str = ""

    @property
    def flags(self) -> Export:
        """The transmission flags."""
        flags = Export.HAS_FLAGS | Export.SEND_FLUSH | Export.SEND_DF | Export.CAN_MULTI_CONN
        return flags | (Export.READ_ONLY if self.read_only else Export.SEND_FUA)


@dataclass(frozen=True, slots=True)
class Agreed:
    """What a client chose: an export, structured replies, and whether it asks for the allocation context."""

    export: NbdExport
    structured: bool
    allocation: bool


class _MalformedError(Exception):
    """The data of an option is not laid out as the protocol says."""


class Negotiation:
    """Answers options until the client picks an export, goes, or is let go.

    Args:
        wire: The connection.
        exports: What can be chosen; the first is the default.
        seconds: Time for the whole handshake.
    """

    def __init__(self, wire: Wire, exports: Sequence[NbdExport], seconds: float) -> None:
        self._wire, self._exports = wire, exports
        self._deadline = time.monotonic() + seconds
        self._structured = False
        self._allocation_of: NbdExport | None = None
        self._no_zeroes = False

    def run(self) -> Agreed | None:
        """Return what was agreed on, or None when the client ended the handshake.

        Raises:
            GoneError: the client broke the protocol, took too long or went away.
        """
        self._send(nbd.GREETING.pack(nbd.INIT_MAGIC, nbd.OPTION_MAGIC, nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES))
        (flags,) = nbd.CLIENT_FLAGS.unpack(self._receive(nbd.CLIENT_FLAGS.size))
        if flags & ~(nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES):
            raise GoneError("the client knows flags that the protocol does not")
        self._no_zeroes = bool(flags & nbd.FLAG_NO_ZEROES)
        for _ in range(nbd.MAX_OPTIONS):
            magic, option, length = nbd.OPTION.unpack(self._receive(nbd.OPTION.size))
            if magic != nbd.OPTION_MAGIC or length > nbd.MAX_OPTION:
                raise GoneError("what the client sends is no option, or too long for one")
            data = self._receive(length)
            if option == Opt.EXPORT_NAME:
                return self._old_style(data)
            if option == Opt.ABORT:
                self._reply(option, Rep.ACK)
                return None
            chosen = self._answer(option, data)
            if chosen is not None:
                return self._agree(chosen)
        raise GoneError("too many options")

    def _answer(self, option: int, data: bytes) -> NbdExport | None:
        """Answer one option; return the export that NBD_OPT_GO chose."""
        try:
            if option in (Opt.INFO, Opt.GO):
                export = self._info(option, data)
                return export if option == Opt.GO else None
            if option == Opt.LIST:
                self._list(data)
            elif option == Opt.STRUCTURED_REPLY:
                _empty(data)
                self._structured = True
                self._reply(option, Rep.ACK)
            elif option in (Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT):
                self._contexts(option, data)
            else:
                self._reply(option, Rep.ERR_UNSUP)
        except _MalformedError as error:
            self._reply(option, Rep.ERR_INVALID, str(error).encode())
        return None

    def _info(self, option: int, data: bytes) -> NbdExport | None:
        fields = _Fields(data)
        name = fields.text()
        requests = [fields.number(">H") for _ in range(fields.number(">H"))]
        fields.end()
        export = self._find(name)
        if export is None:
            self._reply(option, Rep.ERR_UNKNOWN, b"no such export")
            return None
        self._reply(option, Rep.INFO, struct.pack(">HQH", Info.EXPORT, export.disk.size, export.flags))
        # Told whether asked for or not: clients that do not know it pass over it.
        self._reply(option, Rep.INFO, struct.pack(">HIII", Info.BLOCK_SIZE, 1, BLOCK, nbd.MAX_PAYLOAD))
        for kind, text in ((Info.NAME, export.name), (Info.DESCRIPTION, export.description)):
            if kind in requests and (text or kind is Info.NAME):
                self._reply(option, Rep.INFO, struct.pack(">H", kind) + text.encode())
        self._reply(option, Rep.ACK)
        return export

    def _list(self, data: bytes) -> None:
        _empty(data)
        for export in self._exports:
            name = export.name.encode()
            self._reply(Opt.LIST, Rep.SERVER, struct.pack(">I", len(name)) + name + export.description.encode())
        self._reply(Opt.LIST, Rep.ACK)

    def _contexts(self, option: int, data: bytes) -> None:
        fields = _Fields(data)
        name = fields.text()
        count = fields.number(">I")
        if count > nbd.MAX_QUERIES:
            raise _MalformedError("too many queries")
        queries = [fields.text() for _ in range(count)]
        fields.end()
        setting = option == Opt.SET_META_CONTEXT
        if setting and not self._structured:
            raise _MalformedError("structured replies come first")
        export = self._find(name)
        if export is None:
            self._reply(option, Rep.ERR_UNKNOWN, b"no such export")
            return
        wanted = nbd.ALLOCATION in queries or (not setting and (not queries or "base:" in queries))
        if setting:
            self._allocation_of = export if wanted else None
        if wanted:
            self._reply(option, Rep.META_CONTEXT, nbd.CONTEXT.pack(nbd.ALLOCATION_ID) + nbd.ALLOCATION.encode())
        self._reply(option, Rep.ACK)

    def _old_style(self, data: bytes) -> Agreed:
        name = data.decode("utf-8", "replace")
        export = self._find(name)
        if export is None:
            raise GoneError("no such export")  # this option has no other way to say so
        self._send(nbd.OLD_REPLY.pack(export.disk.size, export.flags) + (b"" if self._no_zeroes else nbd.OLD_PADDING))
        return self._agree(export)

    def _agree(self, export: NbdExport) -> Agreed:
        return Agreed(export, self._structured, self._structured and self._allocation_of is export)

    def _find(self, name: str) -> NbdExport | None:
        return next((export for export in self._exports if export.name == name), None if name else self._exports[0])

    def _reply(self, option: int, kind: Rep, data: bytes = b"") -> None:
        self._send(nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _send(self, data: bytes) -> None:
        self._wire.send([data], self._left())

    def _receive(self, length: int) -> bytes:
        return self._wire.receive(length, self._left())

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())


class _Fields:
    """Reads the data of an option from its start."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, layout: str) -> int:
        size = struct.calcsize(layout)
        (value,) = struct.unpack(layout, self._take(size))
        return int(value)

    def text(self) -> str:
        """Return a string with its 32-bit length before it."""
        length = self.number(">I")
        if length > nbd.MAX_NAME:
            raise _MalformedError("a string is too long")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise _MalformedError("a string is not UTF-8") from error

    def end(self) -> None:
        if self._at != len(self._data):
            raise _MalformedError("there is data behind the last field")

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise _MalformedError("the data ends inside a field")
        self._at += length
        return self._data[self._at - length : self._at]


def _empty(data: bytes) -> None:
    if data:
        raise _MalformedError("this option has no data")
