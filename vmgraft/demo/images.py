"""Makes the three bootable images of the demo without any outside tool."""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path
from typing import Final

from vmgraft.demo.assets import example
from vmgraft.imagefmt.qcow2.create import create_qcow2

SECTOR: Final = 512
#: Size of the demo's disk: small, and large enough to have untouched blocks.
DISK_SIZE: Final = 8 << 20
#: Where the demo's file data starts, and how much there is.
DATA_OFFSET: Final = 1 << 20
DATA_SIZE: Final = 256 << 10
#: A partition entry begins at this offset of the master boot record (PC BIOS convention).
PARTITION_TABLE: Final = 446


def make_images(folder: Path) -> list[Path]:
    """Write ``disk.img`` (raw), ``disk.qcow2`` and ``cdrom.iso``, each of which boots the example guest."""

    guest = (example("guest") / "guest.bin").read_bytes()
    disk = _disk(guest)
    raw, qcow2, iso = folder / "disk.img", folder / "disk.qcow2", folder / "cdrom.iso"
    raw.write_bytes(disk)
    create_qcow2(qcow2, disk)
    _make_iso(iso, guest)
    return [raw, qcow2, iso]


def _disk(guest: bytes) -> bytes:
    """Return a disk: boot sector with one partition, and some data in it."""
    disk = bytearray(DISK_SIZE)
    disk[:SECTOR] = guest[:SECTOR]
    first, count = DATA_OFFSET // SECTOR, (DISK_SIZE - DATA_OFFSET) // SECTOR
    # Status 0x80 (active), type 0x83, CHS fields unused (all ones), LBA start and count.
    entry = struct.pack("<B3sB3sII", 0x80, b"\xff\xff\xff", 0x83, b"\xff\xff\xff", first, count)
    disk[PARTITION_TABLE : PARTITION_TABLE + len(entry)] = entry
    disk[DATA_OFFSET : DATA_OFFSET + DATA_SIZE] = _noise(DATA_SIZE)
    return bytes(disk)


def _noise(size: int) -> bytes:
    """Return bytes that look like data and are the same every time."""
    return b"".join(hashlib.sha256(struct.pack("<Q", n)).digest() for n in range(-(-size // 32)))[:size]


def _make_iso(path: Path, guest: bytes) -> None:
    """Write an ISO 9660 volume with an El Torito no-emulation boot entry."""
    import pycdlib

    boot, data = guest.ljust(2048, b"\0"), _noise(DATA_SIZE)
    iso = pycdlib.PyCdlib()
    iso.new(vol_ident="VMGRAFT_DEMO")
    iso.add_fp(io.BytesIO(boot), len(boot), "/BOOT.;1")
    iso.add_fp(io.BytesIO(data), len(data), "/DATA.BIN;1")
    iso.add_eltorito("/BOOT.;1", bootcatfile="/BOOT.CAT;1", boot_load_size=4)
    iso.write(str(path))
    iso.close()
