"""The default hypercalls 1-15: what any guest may ask of a host whose doorbell is there.

======  ===========================================================  =====================================
number  arguments (EBX, ECX, ESI)                                    result (EDX:EAX)
======  ===========================================================  =====================================
1       none                                                         64 random bits
2       none                                                         virtual nanoseconds since boot
3       guest-physical address, bytes (at most 4096)                 bytes written to the console
4       n from 0, guest-physical address, bytes there                bytes of "id version" of extension n
======  ===========================================================  =====================================

All ones stand for "no": an unknown number, memory that is not RAM, no such extension. Number 0 is the discovery leaf,
which the bus answers (docs/host.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmgraft.vmmhost.core.contract import GuestMemory
from vmgraft.vmmhost.core.services import ServiceTable

#: Numbers that are the host's own; extensions claim from the next one on.
DEFAULTS: Final = range(1, 16)
#: Bytes that one console write may carry.
CONSOLE_MAX: Final = 4096
#: Bytes of an extension's name that are told.
NAME_MAX: Final = 256
REFUSED: Final = (1 << 64) - 1


class DefaultHypercalls:
    """Answers numbers 1-15 (core contract ``HypercallHandler``), unless a handler of the service does.

    Args:
        services: Asked first.
        memory: Guest RAM.
        clock: Virtual nanoseconds since boot.
        console: Takes what the guest writes.
        names: Gives the texts of number 4, in order.
    """

    def __init__(
        self,
        services: ServiceTable,
        memory: GuestMemory,
        clock: Callable[[], int],
        *,
        console: Callable[[bytes], None],
        names: Callable[[], tuple[str, ...]],
    ) -> None:
        self._services, self._memory, self._clock = services, memory, clock
        self._console, self._names = console, names

    def hypercall(self, number: int, args: tuple[int, int, int, int]) -> int:
        """Answer one of the default numbers."""
        answer = self._services.hypercall(number, args)
        if answer is not None:
            return answer
        match number:
            case 1:
                return self._services.entropy()
            case 2:
                return self._clock()
            case 3:
                return self._write(args[0], args[1])
            case 4:
                return self._name(args[0], args[1], args[2])
            case _:
                return REFUSED

    def _write(self, gpa: int, length: int) -> int:
        if length > CONSOLE_MAX:
            return REFUSED
        try:
            data = self._memory.read(gpa, length)
        except ValueError:
            return REFUSED
        self._console(data)
        return length

    def _name(self, index: int, gpa: int, room: int) -> int:
        names = self._names()
        if index >= len(names):
            return REFUSED
        text = names[index].encode()[: min(room, NAME_MAX)]
        try:
            self._memory.write(gpa, text)
        except ValueError:
            return REFUSED
        return len(text)
