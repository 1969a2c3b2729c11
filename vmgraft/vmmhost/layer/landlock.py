"""Landlock: take from this process what it may open, bind and connect to (linux/landlock.h)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from typing import Final

from vmgraft.vmmhost.layer.syscalls import (
    SYS_LANDLOCK_ADD_RULE,
    SYS_LANDLOCK_CREATE_RULESET,
    SYS_LANDLOCK_RESTRICT_SELF,
    syscall,
)

_VERSION_FLAG: Final = 1
_RULE_PATH_BENEATH: Final = 1
_READ_FILE: Final = 1 << 2
_READ_DIR: Final = 1 << 3
_WRITE_FILE: Final = 1 << 1
_TRUNCATE: Final = 1 << 14
_REMOVE_FILE: Final = 1 << 5
_EXECUTE: Final = 1 << 0
_IOCTL_DEV: Final = 1 << 15
_MAKE_REG: Final = 1 << 8
#: ABI version → number of file system rights it knows (1: 13, 2: REFER, 3: TRUNCATE, 5: IOCTL_DEV).
_FS_BITS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_BITS_LATEST: Final = 16
_FILE_RIGHTS: Final = 1 | _WRITE_FILE | _READ_FILE | _TRUNCATE | 1 << 15  # what a rule on a plain file may carry


def abi_version() -> int:
    """Return the kernel's Landlock ABI version, 0 where there is none."""
    try:
        return syscall(SYS_LANDLOCK_CREATE_RULESET, 0, 0, _VERSION_FLAG)
    except OSError:
        return 0


def restrict(
    *,
    read: Iterable[str] = (),
    write: Iterable[str] = (),
    remove: Iterable[str] = (),
    execute: Iterable[str] = (),
    devices: Iterable[str] = (),
    network: bool = True,
    scope: bool = True,
) -> int:
    """Deny this thread, and all it starts, every new use of the file system but what is named.

    Args:
        read: Files and directories below which reading stays allowed; missing ones are passed over.
        write: Likewise for reading, writing and making plain files.
        remove: Directories in which files may be removed.
        execute: Programs, and what loads them, that may be read and started.
        devices: Device nodes that may be read, written and controlled.
        network: Deny TCP bind and connect too (ABI 4 and up).
        scope: Deny signals and abstract sockets to the outside too (ABI 6 and up).

    Returns:
        The ABI version in force.

    Raises:
        OSError: the kernel has no Landlock, or refuses.
    """
    abi = abi_version()
    if not abi:
        raise OSError("the kernel has no Landlock")
    rights = (1 << _FS_BITS.get(abi, _FS_BITS_LATEST)) - 1
    attributes = struct.pack("<QQQ", rights, 3 if network and abi >= 4 else 0, 3 if scope and abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = syscall(SYS_LANDLOCK_CREATE_RULESET, attributes[:size], size, 0)
    try:
        for path in read:
            _allow(ruleset, path, (_READ_FILE | _READ_DIR) & rights)
        for path in write:
            _allow(ruleset, path, (_READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _MAKE_REG) & rights)
        for path in devices:
            _allow(ruleset, path, (_READ_FILE | _WRITE_FILE | _IOCTL_DEV) & rights)
        for path in execute:
            _allow(ruleset, path, (_EXECUTE | _READ_FILE | _READ_DIR) & rights)
        for path in remove:
            _allow(ruleset, path, _REMOVE_FILE & rights)
        syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return abi


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):  # noqa: PTH112 - a string from sys.path, not worth a Path
            rights &= _FILE_RIGHTS
        syscall(SYS_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("<Qi", rights, fd), 0)
    finally:
        os.close(fd)
