"""Facts about a volume for people and reports; bounded reads at fixed places, nothing of it is trusted."""

from __future__ import annotations

from typing import Any

from construct import ConstructError

from vmgraft.imagefmt._layout import LOCATOR_SIZE, MAGIC
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.iso9660.descriptors import VolumeDescriptors
from vmgraft.imagefmt.iso9660.eltorito import boot_entries

#: ECMA-167, 2/9.1: volume structure descriptors that announce UDF, in the sectors behind the ISO 9660 ones.
_UDF_IDENTIFIERS = (b"NSR02", b"NSR03")
_UDF_SCAN = 16
#: Inside Macintosh: Devices, 3: what an entry of an Apple partition map begins with, by the block sizes of hybrids.
_APM_PLACES = (512, 2048)
_APM_MARK = b"PM"


def volume_facts(file: FlatFile, volume: VolumeDescriptors, content_size: int) -> dict[str, Any]:
    """Return JSON-able facts: identifiers, sizes, boot entries, extensions, sessions, and which hybrids the image is.

    Args:
        file: The image.
        volume: Its descriptors.
        content_size: Bytes of the original image.
    """
    head = file.read(0, 1024)
    udf = _udf(file, volume)
    return {
        "volumeId": volume.texts["volume_id"],
        "identifiers": {name: text for name, text in volume.texts.items() if text},
        "created": volume.created,
        "volumeSize": volume.size,
        "behindVolume": content_size - volume.size,
        "descriptors": list(volume.kinds),
        "applicationUse": _application_use(file),
        "joliet": volume.joliet_level is not None,
        "jolietLevel": volume.joliet_level,
        "enhanced": "enhanced" in volume.kinds,
        **_rock_ridge(file, volume.root_sector),
        "udf": udf is not None,
        "udfDescriptor": udf,
        "sessions": _sessions(file, volume, content_size),
        "isohybridMbr": head[510:512] == b"\x55\xaa",
        "isohybridGpt": head[512:520] == b"EFI PART",
        "isohybridApm": any(file.read(place, len(_APM_MARK)) == _APM_MARK for place in _APM_PLACES),
        "elTorito": boot_entries(file, volume.boot_catalog),
    }


def _application_use(file: FlatFile) -> str:
    """Say whether the field has room for a locator: then a graft is found by it, else by its footer only."""
    field = file.read(layout.LOCATOR_OFFSET, LOCATOR_SIZE)
    return "free" if field in layout.BLANKS or field.startswith(MAGIC) else "taken"


def _udf(file: FlatFile, volume: VolumeDescriptors) -> str | None:
    start = layout.FIRST_DESCRIPTOR + len(volume.kinds)
    for index in range(_UDF_SCAN):
        identifier = file.read((start + index) * layout.SECTOR_SIZE + 1, 5)
        if identifier in _UDF_IDENTIFIERS:
            return identifier.decode("ascii")
    return None


def _rock_ridge(file: FlatFile, root_sector: int) -> dict[str, Any]:
    """Look for SUSP in the root directory's first record, and for the extensions that its ER entries name."""
    record = file.read(root_sector * layout.SECTOR_SIZE, layout.SECTOR_SIZE)
    length = record[0] if record else 0
    # The identifier of a directory's first record is one byte long, which makes the record's fixed part even.
    area = record[layout.DIRECTORY_RECORD + 1 : length]
    if not area.startswith(layout.SUSP_MARK):
        return {"rockRidge": False, "extensions": []}
    extensions: list[str] = []
    for _ in range(layout.MAX_CONTINUATIONS):
        following = _susp_entries(area, extensions)
        if following is None:
            break
        block, offset, size = following
        area = file.read(block * layout.SECTOR_SIZE + offset, min(size, layout.SECTOR_SIZE))
    return {"rockRidge": True, "extensions": extensions}


def _susp_entries(area: bytes, extensions: list[str]) -> tuple[int, int, int] | None:
    """Collect the identifiers of ER entries; return where a continuation area is: block, offset, length."""
    following = None
    position = 0
    while position + 4 <= len(area):
        kind, length = area[position : position + 2], area[position + 2]
        if length < 4:
            break
        entry = area[position : position + length]
        if kind == b"ST":
            break
        if kind == b"ER" and len(entry) > 8:
            name = entry[8 : 8 + entry[4]].decode("ascii", "replace")
            extensions.append("".join(char if char.isprintable() else "?" for char in name))
        if kind == b"CE":
            following = _continuation(entry) or following
        position += length
    return following


def _continuation(entry: bytes) -> tuple[int, int, int] | None:
    try:
        place = layout.SUSP_CONTINUATION.parse(entry)
    except ConstructError:
        return None
    return place.block, place.offset, place.length


def _sessions(file: FlatFile, volume: VolumeDescriptors, content_size: int) -> list[int]:
    """Return the first sectors of the sessions that can be told; an ordinary image has one, at sector 0.

    xorriso keeps the first session's descriptors at sector 32 of an image that it lets grow; those at sector 16 speak
    of the last session then. Otherwise a further session begins behind the volume.
    """
    copy = _session_size(file, layout.FIRST_SESSION_COPY, content_size)
    sessions = [0 if copy is None else layout.FIRST_SESSION_COPY]
    size = volume.volume_space_size if copy is None else copy
    while len(sessions) < layout.MAX_SESSIONS:
        # A session's volume is counted from where the session begins.
        end = sessions[-1] + size
        for start in (-(-end // alignment) * alignment for alignment in layout.SESSION_ALIGNMENTS):
            following = _session_size(file, start, content_size)
            if following is not None and start > sessions[-1]:
                sessions.append(start)
                size = following
                break
        else:
            break
    return sessions


def _session_size(file: FlatFile, start: int, content_size: int) -> int | None:
    """Return the length in sectors of the volume of a session at sector ``start``, or None where there is none."""
    offset = (start + layout.FIRST_DESCRIPTOR) * layout.SECTOR_SIZE
    data = file.read(offset, layout.SECTOR_SIZE)
    if not data.startswith(layout.DESCRIPTOR_MARK) or offset + layout.SECTOR_SIZE > content_size:
        return None
    try:
        return int(layout.PRIMARY_DESCRIPTOR.parse(data).volume_space_size)
    except ConstructError:
        return None
