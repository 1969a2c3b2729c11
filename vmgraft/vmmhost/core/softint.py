"""Delivery of interrupts for the software CPU, which has none of its own.

Real mode through the vector table; protected and long mode through same-privilege interrupt and trap gates (Intel SDM
volume 3, chapter 6). What needs a task switch or a stack switch is refused with a clear word, not guessed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from vmgraft.vmmhost.core.cpu import FLAG_INTERRUPT, FLAG_TRAP

#: Vectors for which the CPU pushes an error code, which the engine does not tell: SDM volume 3, table 6-1.
WITH_ERROR_CODE: Final = frozenset({8, 10, 11, 12, 13, 14, 17, 21})
GATE_INTERRUPT_16: Final = 6
GATE_INTERRUPT_32: Final = 14
_CR0_PE: Final = 1
_EFER: Final = 0xC0000080
_EFER_LMA: Final = 1 << 10
_FLAG_NESTED: Final = 1 << 14
_CR4_PSE: Final = 1 << 4
_CR4_PAE: Final = 1 << 5


class DeliveryError(Exception):
    """This interrupt cannot be delivered here."""


class TripleFaultError(DeliveryError):
    """No table holds a gate for this interrupt, nor for the faults that follow: the CPU shuts down."""


class Deliverer:
    """Pushes the frame and goes to the handler.

    Args:
        uc: The Unicorn engine.
        names: Its module of x86 register numbers.
        segment_base: Gives the linear base of a segment register.
        write: Writes guest-physical memory as the CPU itself does.
    """

    def __init__(
        self, uc: Any, names: Any, segment_base: Callable[[str], int], write: Callable[[int, bytes], None]
    ) -> None:
        self._uc, self._names, self._base, self._put = uc, names, segment_base, write

    def _get(self, name: str) -> int:
        return int(self._uc.reg_read(getattr(self._names, f"UC_X86_REG_{name}")))

    def _set(self, name: str, value: int) -> None:
        self._uc.reg_write(getattr(self._names, f"UC_X86_REG_{name}"), value)

    def _table(self) -> tuple[int, int]:
        """Return base and limit of the interrupt descriptor table."""
        table = self._uc.reg_read(self._names.UC_X86_REG_IDTR)
        return int(table[1]), int(table[2])

    def deliver(self, vector: int, *, exception: bool) -> None:
        """Enter the handler of ``vector``; ``exception`` says that the CPU would push an error code.

        Raises:
            DeliveryError: when the tables do not allow it, or it is beyond this engine.
        """
        if not self._get("CR0") & _CR0_PE:
            self._real(vector)
        elif exception:
            raise DeliveryError(f"exception {vector} with an error code")
        elif self._uc.msr_read(_EFER) & _EFER_LMA:
            self._long(vector)
        else:
            self._protected(vector)

    def _read(self, linear: int, size: int) -> bytes:
        return bytes(self._uc.mem_read(self._within_page(linear, size), size))

    def _write(self, linear: int, data: bytes) -> None:
        self._put(self._within_page(linear, len(data)), data)

    def physical(self, linear: int) -> int:
        """Return the guest-physical address of a linear one, through the page tables when paging is on.

        Raises:
            DeliveryError: when no page is mapped there.
        """
        if not self._get("CR0") >> 31 & 1:
            return linear
        return walk(self._get("CR3"), self._get("CR4"), self._uc.msr_read(_EFER), linear, self._uc.mem_read)

    def _within_page(self, linear: int, size: int) -> int:
        physical = self.physical(linear)
        if physical != linear and (linear & 0xFFF) + size > 0x1000:
            raise DeliveryError("an interrupt frame or gate crosses a page")
        return physical

    def _real(self, vector: int) -> None:
        base, limit = self._table()
        if vector * 4 + 3 > limit:
            raise TripleFaultError(f"interrupt {vector} is beyond the vector table")
        ip, cs = struct.unpack("<HH", self._uc.mem_read(base + vector * 4, 4))
        flags, sp = self._get("EFLAGS"), (self._get("ESP") - 6) & 0xFFFF
        frame = struct.pack("<HHH", self._get("EIP") & 0xFFFF, self._get("CS"), flags & 0xFFFF)
        if sp > 0x10000 - len(frame):
            raise DeliveryError("the stack of an interrupt frame wraps around")
        self._put(self._base("ss") + sp, frame)
        self._set("SP", sp)
        self._set("EFLAGS", flags & ~(FLAG_INTERRUPT | FLAG_TRAP))
        self._set("CS", cs)
        self._set("EIP", ip)

    def _gate(self, vector: int, size: int) -> bytes:
        base, limit = self._table()
        if (vector + 1) * size - 1 > limit:
            raise TripleFaultError(f"interrupt {vector} is beyond the descriptor table")
        gate = self._read(base + vector * size, size)
        if not gate[5] & 0x80:
            raise DeliveryError(f"the gate of interrupt {vector} is not present")
        if int.from_bytes(gate[2:4], "little") != self._get("CS"):
            raise DeliveryError(f"the gate of interrupt {vector} changes the code segment")
        return gate

    def _protected(self, vector: int) -> None:
        gate = self._gate(vector, 8)
        kind = gate[5] & 0x0F
        if kind & ~1 not in (GATE_INTERRUPT_32, GATE_INTERRUPT_16):
            raise DeliveryError(f"the gate of interrupt {vector} has type {kind:#x}")
        wide = kind & 8
        target = int.from_bytes(gate[:2] + (gate[6:8] if wide else b"\0\0"), "little")
        flags = self._get("EFLAGS")
        mask = 0xFFFFFFFF if wide else 0xFFFF
        values = (self._get("EIP") & mask, self._get("CS"), flags & mask)
        frame = struct.pack("<III" if wide else "<HHH", *values)
        esp = (self._get("ESP") - len(frame)) & 0xFFFFFFFF
        self._write(self._base("ss") + esp, frame)
        self._set("ESP", esp)
        self._enter(flags, kind)
        self._set("EIP", target)

    def _long(self, vector: int) -> None:
        gate = self._gate(vector, 16)
        kind = gate[5] & 0x0F
        if kind & ~1 != GATE_INTERRUPT_32 or gate[4] & 7:
            raise DeliveryError(f"the gate of interrupt {vector} has type {kind:#x}, stack {gate[4] & 7}")
        target = int.from_bytes(gate[:2] + gate[6:12], "little")
        flags, rsp = self._get("EFLAGS"), self._get("ESP")
        frame = struct.pack("<5Q", self._get("EIP"), self._get("CS"), flags, rsp, self._get("SS"))
        top = (rsp & ~0xF) - len(frame)
        if target >> 32 or top < 0:
            raise DeliveryError(f"the handler of interrupt {vector} or its stack lies beyond 4 GiB")
        self._write(top, frame)
        self._set("ESP", top)
        self._enter(flags, kind)
        self._set("EIP", target)

    def _enter(self, flags: int, kind: int) -> None:
        cleared = FLAG_TRAP | _FLAG_NESTED | (0 if kind & 1 else FLAG_INTERRUPT)
        self._set("EFLAGS", flags & ~cleared)


def walk(cr3: int, cr4: int, efer: int, linear: int, read: Callable[[int, int], bytes | bytearray]) -> int:
    """Translate a linear address through the guest's page tables (SDM volume 3, chapter 4).

    Args:
        cr3: Root of the tables.
        cr4: Bit 5 (PAE) and bit 4 (PSE) count.
        efer: Bit 10 (long mode active) counts.
        linear: The address.
        read: ``read(physical, size)`` of guest memory.

    Raises:
        DeliveryError: when a table entry is not present.
    """
    large_allowed = bool(cr4 & (_CR4_PAE | _CR4_PSE))
    size, mask, table = (8, 0xFFFFFFFFFF000, cr3 & 0xFFFFFFFFFF000) if cr4 & _CR4_PAE else (4, 0xFFFFF000, cr3 & ~0xFFF)
    levels: tuple[tuple[int, int], ...] = ((22, 10), (12, 10))
    large: tuple[int, ...] = (22,)
    if cr4 & _CR4_PAE and efer & _EFER_LMA:
        levels, large = ((39, 9), (30, 9), (21, 9), (12, 9)), (30, 21)
    elif cr4 & _CR4_PAE:
        levels, large, table = ((30, 2), (21, 9), (12, 9)), (21,), cr3 & 0xFFFFFFE0
    for low, bits in levels:
        index = linear >> low & ((1 << bits) - 1)
        entry = int.from_bytes(read(table + index * size, size), "little")
        if not entry & 1:
            break
        table = entry & mask
        if low == 12 or (entry & 0x80 and low in large and large_allowed):
            return (table & ~((1 << low) - 1)) | (linear & ((1 << low) - 1))
    raise DeliveryError(f"no page for address {linear:#x}")
