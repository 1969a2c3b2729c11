"""Internal snapshots: the table of them, and the header through which one of them is seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NoReturn

from vmgraft.errors import MalformedImageError, UsageError
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.qcow2.header import Header
from vmgraft.imagefmt.qcow2.source import Source

_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table.

    Attributes:
        offset: File offset of the entry.
        id: Its identifier, unique in an image that QEMU wrote. Bytes that are no UTF-8 are escaped as in file names, so
            that the command line can name them.
        name: Its name, likewise.
        l1_table_offset: File offset of its L1 table.
        l1_size: Entries of that table.
        size: Bytes of guest content, or None where the entry does not say (version 2): the image's own.
        vm_state_size: Bytes of saved machine state; 0 for a snapshot of the disk alone.
        date: Nanoseconds since 1970 UTC.
        vm_clock: Nanoseconds the guest had been running.
    """

    offset: int
    id: str
    name: str
    l1_table_offset: int
    l1_size: int
    size: int | None
    vm_state_size: int
    date: int
    vm_clock: int

    def facts(self, header: Header) -> dict[str, Any]:
        """Return what reports say about it, JSON-able."""
        seconds, rest = divmod(self.date, _NANO)
        return {
            "id": _shown(self.id),
            "name": _shown(self.name),
            "virtualSize": header.size if self.size is None else self.size,
            "date": datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest // 1000).isoformat(),
            "vmStateSize": self.vm_state_size,
            "vmClock": self.vm_clock / _NANO,
        }


def _shown(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_snapshots(source: Source, header: Header) -> tuple[Snapshot, ...]:
    """Read the snapshot table.

    Raises:
        MalformedImageError: it is cut, too long, or an entry is out of bounds.
    """
    if not header.nb_snapshots:
        return ()
    table = source.read(header.snapshots_offset, lay.MAX_SNAPSHOT_TABLE)
    found = []
    at = 0
    for _ in range(header.nb_snapshots):
        snapshot, at = _entry(table, at, source, header)
        found.append(snapshot)
    return tuple(found)


def _bad(source: Source, offset: int, field: str, message: str) -> NoReturn:
    raise MalformedImageError(
        message, file=source.file, offset=offset, field=f"snapshot.{field}", hint="`qemu-img check` shows the damage"
    )


def _entry(table: bytes, at: int, source: Source, header: Header) -> tuple[Snapshot, int]:
    """Return the entry at ``at`` in the table, and where the next one begins."""
    where = header.snapshots_offset + at
    body = at + lay.SNAPSHOT_ENTRY.size
    if body > len(table):
        _bad(source, where, "entry", "the snapshot table ends behind the file, or is too long")
    fields = lay.SNAPSHOT_ENTRY.unpack_from(table, at)
    l1_offset, l1_size, id_size, name_size, seconds, nanoseconds, clock, vm_state, extra_size = fields
    if extra_size > lay.MAX_SNAPSHOT_EXTRA:
        message = f"{extra_size} bytes are above the limit of {lay.MAX_SNAPSHOT_EXTRA}"
        _bad(source, where + 36, "extra_data_size", message)
    names = body + extra_size
    end = names + id_size + name_size
    if end > len(table):
        _bad(source, where, "entry", "the snapshot table ends behind the file, or is too long")
    if nanoseconds >= _NANO:
        _bad(source, where + 20, "date_nsec", f"{nanoseconds} nanoseconds are more than a second")
    size = None
    if extra_size >= 8:
        vm_state = int.from_bytes(table[body : body + 8], "big")
    if extra_size >= lay.SNAPSHOT_EXTRA.size:
        vm_state, size = lay.SNAPSHOT_EXTRA.unpack_from(table, body)
        if not lay.SECTOR <= size <= lay.MAX_SIZE:
            _bad(source, where + 48, "disk_size", f"virtual size {size} is not within {lay.SECTOR}..2^63-1")
        size = size // lay.SECTOR * lay.SECTOR
    snapshot = Snapshot(
        offset=where,
        id=table[names : names + id_size].decode("utf-8", "surrogateescape"),
        name=table[names + id_size : end].decode("utf-8", "surrogateescape"),
        l1_table_offset=l1_offset,
        l1_size=l1_size,
        size=size,
        vm_state_size=vm_state,
        date=seconds * _NANO + nanoseconds,
        vm_clock=clock,
    )
    return snapshot, end + 7 & ~7


def find_snapshot(snapshots: tuple[Snapshot, ...], wanted: str, file: str) -> Snapshot:
    """Return the snapshot with that identifier, else the one of that name; the order in which QEMU looks, too.

    Raises:
        UsageError: there is none, or the name is not unique.
    """
    for key in ("id", "name"):
        found = [snapshot for snapshot in snapshots if getattr(snapshot, key) == wanted]
        if len(found) > 1:
            ids = ", ".join(_shown(snapshot.id) for snapshot in found[:8])
            message = f"{len(found)} snapshots have the {key} {_shown(wanted)!r}"
            raise UsageError(message, file=file, hint=f"their ids: {ids}")
        if found:
            return found[0]
    listed = ", ".join(f"{_shown(snapshot.name)!r} (id {_shown(snapshot.id)})" for snapshot in snapshots[:8])
    hint = f"there are {len(snapshots)}: {listed}" if snapshots else "there are none"
    raise UsageError(f"no internal snapshot is called {_shown(wanted)!r}", file=file, hint=hint)


def snapshot_header(header: Header, snapshot: Snapshot, source: Source) -> Header:
    """Return the header with the L1 table and the size of a snapshot in the place of its own.

    Raises:
        MalformedImageError: the snapshot's L1 table is out of bounds.
    """
    size = header.size if snapshot.size is None else snapshot.size
    offset, length = snapshot.l1_table_offset, snapshot.l1_size * 8
    if length > lay.MAX_L1_BYTES:
        message = f"{snapshot.l1_size} entries are above the limit of {lay.MAX_L1_BYTES // 8}"
        _bad(source, snapshot.offset + 8, "l1_size", message)
    needed = -(-size // (header.l2_entries * header.cluster_size))
    if snapshot.l1_size < needed:
        message = f"{snapshot.l1_size} entries are too few: the virtual size needs {needed}"
        _bad(source, snapshot.offset + 8, "l1_size", message)
    if offset % header.cluster_size or offset < header.cluster_size or offset + length > source.size:
        message = f"{length} bytes at {offset} are not aligned to a cluster inside the file"
        _bad(source, snapshot.offset, "l1_table_offset", message)
    return replace(header, size=size, l1_table_offset=offset, l1_size=snapshot.l1_size)
