"""Instructions of the guest at which the software CPU must look up: HLT, and STI when an interrupt waits.

Unicorn tells neither why it stopped nor when the interrupt flag is set. A hook on the very instruction does: it is
called only if an instruction starts there. Both instructions end a translated block, so the ends of fresh blocks are
looked at, and watched where they may be one. (POPF and IRET may set the flag too. They are so frequent that watching
them costs more than it is worth: where they let interrupts in, the end of a slice soon finds them let in.)
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

_HLT: Final = b"\xf4"
_STI: Final = b"\xfb"
#: Addresses watched before the list starts anew.
WATCHED_MAX: Final = 1024
#: Instructions until the interrupt flag counts: STI holds interrupts off for one more.
_STI_STEPS: Final = 2


class SoftWatch:
    """Watches the ends of translated blocks.

    Args:
        uc: The engine.
        unicorn: Its module.
        code: Gives code bytes at a linear address, nothing where they are out of reach.
    """

    def __init__(self, uc: Any, unicorn: ModuleType, code: Callable[[int, int], bytes]) -> None:
        self._uc, self._unicorn, self._code = uc, unicorn, code
        self._watched: dict[int, int] = {}  # linear address -> hook
        self._fresh: int | None = None
        #: Linear address of the HLT that was about to run when the slice ended.
        self.halt_at: int | None = None
        #: Set while an interrupt waits for the guest to take interrupts again.
        self.wanted = False
        #: Instructions to run one by one in the next slice, because interrupts may be let in then.
        self.steps = 0

    def prepare(self) -> None:
        """Forget what the last slice ended with."""
        self._fresh = self.halt_at = None
        self.steps = 0

    @property
    def stopped_for_fresh(self) -> bool:
        """Whether the slice ended only so that an instruction can be watched from now on."""
        return self._fresh is not None

    def look_at(self, last: int) -> bool:
        """Look at the last byte of a fresh block; True to stop before it runs, so that it is watched."""
        if last not in self._watched and self._code(last, 1) in (_HLT, _STI):
            self._fresh = last
        return self._fresh is not None

    def settle(self) -> None:
        """Between two slices: watch what was found."""
        address = self._fresh
        if address is None:
            return
        if len(self._watched) >= WATCHED_MAX:
            self.forget()
        hook = self._uc.hook_add(self._unicorn.UC_HOOK_CODE, self._before, None, address, address)
        self._watched[address] = hook
        self._uc.ctl_remove_cache(address, address + 1)

    def forget(self) -> None:
        """Start anew, as if nothing had been translated yet."""
        for hook in self._watched.values():
            self._uc.hook_del(hook)
        self._watched.clear()
        self._uc.ctl_flush_tb()

    def _before(self, uc: Any, address: int, size: int, _data: Any) -> None:
        code = self._code(address, 1) if size == 1 else b""
        if code == _HLT:
            self.halt_at = address
        elif code == _STI and self.wanted:
            self.steps = _STI_STEPS
            uc.emu_stop()
