"""Guests as machine code, and disks in memory that boot them."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CORE_GUESTS = HERE / "core" / "guests"  # where lib.inc is
GUESTS = HERE / "guests"
LAYER_GUESTS = HERE / "layer" / "guests"


def nasm(source: Path, *options: str) -> bytes:
    """Assemble a flat binary; include files are looked for beside the source and among the core's guests.

    It goes through a file: nasm removes its output when it fails, and run as root that may be /dev/stdout itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "guest.bin")
        includes = ["-I", f"{source.parent}/", "-I", f"{CORE_GUESTS}/"]
        command = ["nasm", "-f", "bin", *includes, *options, "-o", str(target), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        return target.read_bytes()


class MemoryContent:
    """Guest content held in memory, and what was read of it."""

    def __init__(self, data: bytes, sector_size: int = 512) -> None:
        self.data, self.virtual_size, self.sector_size = bytearray(data), len(data), sector_size
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return bytes(self.data[offset : offset + length])


def booting(code: bytes, size: int = 1 << 20) -> MemoryContent:
    """Return a disk that begins with this."""
    return MemoryContent(code.ljust(size, b"\0"))
