"""One report over all tables of a disk."""

from __future__ import annotations

from typing import Any

from vmgraft.errors import VmgraftError
from vmgraft.imagefmt.contract import Image
from vmgraft.imagefmt.partitions import _layout as layout
from vmgraft.imagefmt.partitions.apm import read_apm
from vmgraft.imagefmt.partitions.gpt import Gpt, read_gpt
from vmgraft.imagefmt.partitions.mbr import Mbr, read_mbr
from vmgraft.imagefmt.partitions.model import Disk, Partition, Reader, Table


def describe(image: Image) -> dict[str, Any]:
    """Describe the partition tables in the pristine content of an image; JSON-able, nothing of it verified.

    Args:
        image: An open image of any format.

    Returns:
        ``scheme`` (``none``, ``mbr``, ``gpt``, ``hybrid``: a GPT whose MBR lists more than the protective entry, or
        ``apm``), ``sectorSize`` in bytes, ``diskId``, ``partitions`` and ``problems``. A partition has ``number``,
        ``start`` and ``size`` in bytes, ``type`` (code or GUID), ``typeName``, ``name``, ``id`` and ``flags``. Further
        tables stand under ``mbr`` and ``apm``, with ``diskId`` and ``partitions``. ``problems`` says in sentences what
        is wrong, also that the content cannot be read.
    """
    try:
        return describe_disk(image.read, image.virtual_size)
    except VmgraftError as problem:
        return {
            "scheme": "none",
            "sectorSize": layout.SECTOR_SIZE,
            "diskId": "",
            "partitions": [],
            "problems": [f"the content cannot be read: {problem}"],
        }


def describe_disk(read: Reader, size: int) -> dict[str, Any]:
    """Describe the partition tables of anything that can be read by offset; see :func:`describe`.

    Args:
        read: (offset, length) to bytes, fewer at the end.
        size: Bytes of the disk.

    Raises:
        VmgraftError: only what ``read`` raises.
    """
    disk = Disk(read, size)
    mbr, apm = read_mbr(disk), read_apm(disk)
    gpt = read_gpt(disk, protected=mbr is not None and mbr.protective is not None)
    if gpt is not None and mbr is not None and _is_left_over(gpt, mbr):
        mbr.problems.append("parts of an earlier GPT are there too")
        gpt = None
    scheme, main, others = _choose(gpt, mbr, apm)
    problems = [*main.problems]
    if gpt is not None:
        problems += _protection_problems(disk, gpt, mbr)
    for table in others.values():
        problems += table.problems
    left = sum(max(0, len(table.partitions) - layout.MAX_LISTED) for table in (main, *others.values()))
    if left:
        problems.append(f"{left} further partitions are not listed")
    return {
        "scheme": scheme,
        "sectorSize": main.sector_size,
        **main.to_dict(),
        "problems": problems[: layout.MAX_LISTED],
        **{name: table.to_dict() for name, table in others.items()},
    }


def _choose(gpt: Gpt | None, mbr: Mbr | None, apm: Table | None) -> tuple[str, Table, dict[str, Table]]:
    """Return the scheme, the table that counts, and the others by name."""
    others = {} if apm is None else {"apm": apm}
    if gpt is not None:
        listed = [] if mbr is None else _beside_protective(mbr)
        if mbr is None or not listed:
            return "gpt", gpt, others
        return "hybrid", gpt, {"mbr": mbr, **others}
    if mbr is not None and (mbr.partitions or apm is None):
        return "mbr", mbr, others
    if apm is not None:
        return "apm", apm, {}
    return "none", Table(), {}


def _is_left_over(gpt: Gpt, mbr: Mbr) -> bool:
    """Return whether a disk was partitioned anew, and what is left of its GPT counts no more."""
    return mbr.protective is None and bool(mbr.partitions) and not (gpt.primary and gpt.disk_id)


def _beside_protective(mbr: Mbr) -> list[Partition]:
    return [item for item in mbr.partitions if int(item.type, 16) != layout.TYPE_PROTECTIVE]


def _protection_problems(disk: Disk, gpt: Gpt, mbr: Mbr | None) -> list[str]:
    """Return what is wrong with the MBR that goes with a GPT."""
    if mbr is None:
        return ["the protective MBR is missing"]
    if mbr.protective is None:
        return ["no MBR entry protects the GPT: firmware and most tools show the MBR's partitions"]
    wanted = disk.sectors(gpt.sector_size) - 1
    if not _beside_protective(mbr) and mbr.protective < min(wanted, layout.MAX_COUNT):
        return [f"the protective MBR covers {mbr.protective} of {wanted} sectors"]
    return []
