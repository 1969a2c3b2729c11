"""Apple partition maps, as hybrid ISO images carry them: Inside Macintosh: Devices, chapter 3."""

from __future__ import annotations

from construct import ConstructError

from vmgraft.imagefmt.partitions import _layout as layout
from vmgraft.imagefmt.partitions.model import Disk, Partition, Table, printable


def read_apm(disk: Disk) -> Table | None:
    """Return the disk's Apple partition map, or None where there is none.

    Hybrid images have a boot loader or an MBR in block 0, so the first map entry is what counts.
    """
    unit = next((size for size in layout.APM_BLOCK_SIZES if disk.read(size, 2) == layout.APM_MARK), None)
    if unit is None:
        return None
    table = Table(sector_size=unit)
    total = 1
    number = 0
    while number < min(total, layout.MAX_APM_ENTRIES):
        number += 1
        try:
            entry = layout.APM_ENTRY.parse(disk.read(number * unit, layout.APM_ENTRY_SIZE))
        except ConstructError:
            table.problems.append(f"entry {number} of the Apple partition map is missing")
            break
        total = entry.map_blocks if number == 1 else total
        kind = printable(entry.type.decode("ascii", "replace"))
        name = printable(entry.name.decode("ascii", "replace"))
        if number == 1 and kind != layout.APM_OWN_TYPE:
            return None
        table.partitions.append(Partition(number, entry.start * unit, entry.count * unit, kind, kind, name))
        if (entry.start + entry.count) * unit > disk.size:
            table.problems.append(f"entry {number} of the Apple partition map reaches behind the end of the disk")
    if total > layout.MAX_APM_ENTRIES:
        table.problems.append(f"the Apple partition map states {total} entries")
    return table if table.partitions else None
