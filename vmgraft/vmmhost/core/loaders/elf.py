"""ELF executables, 32 and 64 bits, little-endian, for x86: what of them goes into memory, and their notes.

Source: System V ABI, chapters 4 and 5 (ELF header, program header).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vmgraft.vmmhost.core.loaders.contract import DirectBoot
from vmgraft.vmmhost.core.loaders.layout import Layout

MAGIC: Final = b"\x7fELF"
#: After the 16 bytes of identification: type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum.
_HEADER: Final = {1: struct.Struct("<16xHHIIIIIHHH"), 2: struct.Struct("<16xHHIQQQIHHH")}
#: Program header: type, offset, vaddr, paddr, filesz, memsz; flags and alignment are left out.
_SEGMENTS: Final = {1: struct.Struct("<IIIIII8x"), 2: struct.Struct("<I4xQQQQQ8x")}
_MACHINES: Final = {3: "i386", 62: "x86-64"}
_EXECUTABLE: Final = 2
_LITTLE_ENDIAN: Final = 1
_LOAD: Final = 1
_NOTE: Final = 4
#: More than any kernel has.
_SEGMENTS_MAX: Final = 64
_NOTES_MAX: Final = 64
_NOTE_HEADER: Final = struct.Struct("<III")


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header."""

    kind: int
    offset: int
    virtual: int
    physical: int
    file_size: int
    memory_size: int


@dataclass(frozen=True, slots=True)
class Elf:
    """An executable whose program headers all lie inside the file."""

    entry: int
    segments: tuple[Segment, ...]

    def place(self, direct: DirectBoot, layout: Layout) -> None:
        """Put every loadable segment at its physical address.

        Raises:
            NotBootableError: when there is nothing to load, or it does not fit.
        """
        view, loaded = memoryview(direct.kernel), False
        for segment in self.segments:
            if segment.kind == _LOAD and segment.memory_size:
                data = view[segment.offset : segment.offset + segment.file_size]
                zeros = segment.memory_size - segment.file_size
                layout.place(segment.physical, data, zeros, "an ELF segment", segment.offset)
                loaded = True
        if not loaded:
            raise direct.refuse("no segment of the ELF file is loadable", field="program headers", offset=0)

    def physical_entry(self) -> int:
        """Return the entry point as a physical address: by the segment whose virtual addresses hold it, if one does."""
        for segment in self.segments:
            if segment.kind == _LOAD and segment.virtual <= self.entry < segment.virtual + segment.memory_size:
                return self.entry - segment.virtual + segment.physical
        return self.entry

    def notes(self, kernel: bytes) -> Iterator[tuple[bytes, int, bytes]]:
        """Give (name, type, description) of every note; a damaged note ends its segment."""
        for segment in self.segments:
            if segment.kind == _NOTE:
                yield from _notes(kernel[segment.offset : segment.offset + segment.file_size])


def _notes(raw: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    position = 0
    for _ in range(_NOTES_MAX):
        if position + _NOTE_HEADER.size > len(raw):
            return
        name_size, size, kind = _NOTE_HEADER.unpack_from(raw, position)
        name_at = position + _NOTE_HEADER.size
        description_at = name_at + (name_size + 3 & ~3)
        if description_at + size > len(raw):
            return
        yield raw[name_at : name_at + name_size].rstrip(b"\0"), kind, raw[description_at : description_at + size]
        position = description_at + (size + 3 & ~3)


def parse(direct: DirectBoot) -> Elf | None:
    """Read the headers; None when the file is no ELF file.

    Raises:
        NotBootableError: when it is one that is damaged or not for this machine.
    """
    raw = direct.kernel
    if raw[:4] != MAGIC:
        return None
    if len(raw) < 16 + _HEADER[1].size or raw[4] not in _HEADER or raw[5] != _LITTLE_ENDIAN:
        raise direct.refuse("no little-endian ELF file of 32 or 64 bits", field="e_ident", offset=4)
    form, header = _SEGMENTS[raw[4]], _HEADER[raw[4]]
    if len(raw) < header.size:
        raise direct.refuse("the file ends within its ELF header", field="e_ident", offset=len(raw))
    kind, machine, _version, entry, table, _shoff, _flags, _size, entry_size, count = header.unpack_from(raw)
    if kind != _EXECUTABLE or machine not in _MACHINES:
        message = f"ELF type {kind} for machine {machine} is no x86 kernel"
        raise direct.refuse(message, field="e_type", offset=16, hint="it must be an executable for i386 or x86-64")
    if entry_size < form.size or not 0 < count <= _SEGMENTS_MAX or table + entry_size * count > len(raw):
        message = f"{count} program headers of {entry_size} bytes at {table:#x} do not lie in the file"
        raise direct.refuse(message, field="e_phoff", offset=table)
    found = (form.unpack_from(raw, table + index * entry_size) for index in range(count))
    segments = tuple(Segment(*fields) for fields in found)
    for segment in segments:
        beyond = segment.offset + segment.file_size > len(raw) and segment.kind in (_LOAD, _NOTE)
        if beyond or (segment.kind == _LOAD and segment.file_size > segment.memory_size):
            message = f"a segment of {segment.file_size} bytes at {segment.offset:#x} does not lie in the file"
            raise direct.refuse(message, field="p_filesz", offset=segment.offset, hint="the file is truncated")
    return Elf(entry, segments)
