"""What the operator hands over, and what every loader answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from vmgraft.errors import NotBootableError

#: One line of the memory map: base, length, E820 type.
MemoryMap = Sequence[tuple[int, int, int]]

#: Longest command line taken, in bytes, whatever the kernel says.
COMMAND_LINE_MAX: Final = 4096
#: Modules beside the initial ramdisk.
MODULES_MAX: Final = 16


class Protocol(StrEnum):
    """How to enter a kernel; ``AUTO`` looks for a Linux, a multiboot, then a PVH header."""

    AUTO = "auto"
    MULTIBOOT = "multiboot"
    PVH = "pvh"
    LINUX64 = "linux64"
    LINUX32 = "linux32"


@dataclass(frozen=True, slots=True)
class BootModule:
    """A file that a multiboot or PVH kernel finds in memory, with a text of its own."""

    data: bytes = field(repr=False)
    text: str = ""


@dataclass(frozen=True, slots=True)
class DirectBoot:
    """A kernel to enter without a boot program.

    Attributes:
        kernel: The file.
        initrd: The initial ramdisk; for multiboot and PVH the first module.
        cmdline: The command line, as the kernel gets it.
        modules: Further modules; Linux takes none.
        name: What messages call the kernel, usually its path.
        protocol: How to enter it.
    """

    kernel: bytes = field(repr=False)
    initrd: bytes = field(default=b"", repr=False)
    cmdline: str = ""
    modules: tuple[BootModule, ...] = ()
    name: str = "kernel"
    protocol: Protocol = Protocol.AUTO

    @property
    def all_modules(self) -> tuple[BootModule, ...]:
        """The initial ramdisk, if there is one, and the modules."""
        return (BootModule(self.initrd), *self.modules) if self.initrd else self.modules

    def refuse(self, message: str, *, field: str, offset: int | None = None, hint: str = "") -> NotBootableError:
        """Return the error that this kernel cannot be loaded, for raising."""
        return NotBootableError(
            message, file=self.name, offset=offset, field=field, hint=hint or "the file is damaged or no such kernel"
        )


def encode_text(direct: DirectBoot, text: str, limit: int) -> bytes:
    """Return a command line with its final zero.

    Raises:
        NotBootableError: when it is longer than ``limit`` bytes, or holds a zero.
    """
    raw = text.encode("utf-8", "surrogateescape")
    limit = min(limit, COMMAND_LINE_MAX)
    if b"\0" in raw:
        raise direct.refuse("a command line cannot hold a zero byte", field="append", hint="take it out")
    if len(raw) > limit:
        message = f"a command line of {len(raw)} bytes; this kernel takes {limit}"
        raise direct.refuse(message, field="append", hint="shorten it")
    return raw + b"\0"
