"""Looking at the guest's code around the instruction pointer, for what the software CPU does not tell."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from vmgraft.vmmhost.core.softint import DeliveryError

#: Instructions after which interrupts are held off for one more (Intel SDM volume 2: STI, POP SS, MOV to SS).
_STI: Final = 0xFB
_POP_SS: Final = 0x17
_MOV_SREG: Final = 0x8E
_INT: Final = 0xCD


class SoftCode:
    """Reads code at linear addresses.

    Args:
        uc: The engine.
        unicorn: Its module.
        physical: Gives the guest-physical address of a linear one; raises DeliveryError where no page is.
    """

    def __init__(self, uc: Any, unicorn: ModuleType, physical: Callable[[int], int]) -> None:
        self._uc, self._unicorn, self._physical = uc, unicorn, physical

    def at(self, linear: int, size: int) -> bytes:
        """Return code bytes, or nothing where they are out of reach."""
        try:
            return bytes(self._uc.mem_read(self._physical(linear), size))
        except (self._unicorn.UcError, DeliveryError):
            return b""

    def calls(self, following: int, vector: int) -> bool:
        """Whether an INT of this vector stands before the address."""
        return self.at(following - 2, 2) == bytes((_INT, vector))

    def shadows(self, following: int) -> bool:
        """Whether the instruction before the address holds interrupts off for one more: STI, MOV SS, POP SS."""
        code = self.at(following - 2, 2)
        if len(code) < 2:
            return False
        return code[1] in (_STI, _POP_SS) or (code[0] == _MOV_SREG and code[1] & 0xF8 == 0xD0)
