"""Guests as machine code."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

GUESTS = Path(__file__).parent / "guests"


def nasm(source: Path, *options: str) -> bytes:
    """Assemble a flat binary.

    It goes through a file: nasm removes its output when it fails, and run as root that may be /dev/stdout itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "guest.bin")
        command = ["nasm", "-f", "bin", "-I", f"{GUESTS}/", *options, "-o", str(target), str(source)]
        subprocess.run(command, check=True, capture_output=True)
        return target.read_bytes()
