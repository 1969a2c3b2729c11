"""Bytes for QEMU that nobody can change any more, in a file without a name."""

from __future__ import annotations

import fcntl
import os

from vmgraft.errors import HostError


def sealed(name: str, data: bytes) -> int:
    """Return the descriptor of a sealed file in memory.

    Raises:
        HostError: there is no memory for it.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise HostError(f"no memory for {name}: {error.strerror}") from error
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    except OSError as error:
        os.close(fd)
        raise HostError(f"no memory for {name}: {error.strerror}") from error
    return fd
