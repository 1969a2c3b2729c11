"""The legacy PCI transport of virtio (VIRTIO 1.2, 4.1.4.8): one I/O region, up to three queues, INTA#."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from vmgraft.vmmhost.core.devices.pci import PciDevice
from vmgraft.vmmhost.core.devices.virtqueue import Chain, QueueError, Virtqueue
from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.core.state import State, number, refuse

VENDOR: Final = 0x1AF4
#: Descriptors a queue has.
QUEUE_SIZE: Final = 128
#: Bytes that one request may move, each way; a longer one fails.
REQUEST_MAX: Final = 4 << 20
_FEATURES, _DRIVER_FEATURES, _QUEUE_PAGE, _QUEUE_SIZE, _QUEUE_SELECT, _NOTIFY, _STATUS, _ISR = (
    *(0x00, 0x04, 0x08, 0x0C, 0x0E, 0x10, 0x12, 0x13),
)
#: Where the device's own configuration begins while MSI-X is off.
CONFIG: Final = 0x14
_STATUS_NEEDS_RESET: Final = 0x40
_ALL_ONES: Final = 0xFFFFFFFF


class VirtioPci(PciDevice):
    """One virtio device; a subclass serves requests.

    Args:
        ram: The guest's memory.
        device: PCI device ID of the transitional range.
        kind: Virtio device type, shown as PCI subsystem.
        class_code: PCI class.
        features: Offered features.
        go_on: Asked between requests: may be slow; False when the run has ended.
    """

    QUEUES: ClassVar[int] = 1

    def __init__(
        self, ram: GuestRam, device: int, kind: int, class_code: int, *, features: int, go_on: Callable[[], bool]
    ) -> None:
        super().__init__(VENDOR, device, class_code, subsystem=(VENDOR, kind))
        self.ram, self._features, self._go_on = ram, features, go_on
        self.queues = [Virtqueue(ram, QUEUE_SIZE) for _ in range(self.QUEUES)]
        self._driver_features = self._selected = self._status = self._isr = 0
        self._busy = False
        #: The device's own configuration, which the guest can read only.
        self.settings = b""
        #: Requests served so far.
        self.requests = 0

    def serve(self, queue: int, chain: Chain) -> int:
        """Do what a request asks for; return how many bytes of guest memory were written, counted from the start."""
        raise NotImplementedError

    # --- registers --------------------------------------------------------------------------------------------------

    def io_read(self, offset: int, size: int) -> int:
        """Read registers or configuration."""
        if offset == _ISR:
            value, self._isr = self._isr, 0
            self.set_interrupt(False)
            return value
        if offset >= CONFIG:
            start = offset - CONFIG
            return int.from_bytes(self.settings[start : start + size], "little")
        return int.from_bytes(self._registers()[offset : offset + size], "little")

    def _registers(self) -> bytes:
        queue = self.queues[self._selected] if self._selected < len(self.queues) else None
        return (
            self._features.to_bytes(4, "little")
            + self._driver_features.to_bytes(4, "little")
            + (0 if queue is None else queue.page).to_bytes(4, "little")
            + (0 if queue is None else queue.size).to_bytes(2, "little")
            + self._selected.to_bytes(2, "little")
            + bytes(2)
            + bytes((self._status, 0))
        )

    def io_write(self, offset: int, size: int, value: int) -> None:
        """Write a register in its own width; anything else is dropped."""
        if (offset, size) == (_STATUS, 1):
            self._set_status(value)
        elif (offset, size) == (_QUEUE_SELECT, 2):
            self._selected = value
        elif (offset, size) == (_QUEUE_PAGE, 4) and self._selected < len(self.queues):
            self.queues[self._selected].place(value)
        elif (offset, size) == (_DRIVER_FEATURES, 4):
            self._driver_features = value & self._features
        elif (offset, size) == (_NOTIFY, 2) and value < len(self.queues):
            self._work(value)

    def _set_status(self, value: int) -> None:
        if value:
            self._status = value | self._status & _STATUS_NEEDS_RESET
            return
        self._driver_features = self._selected = self._status = self._isr = 0
        for queue in self.queues:
            queue.place(0)
        self.set_interrupt(False)

    # --- requests ---------------------------------------------------------------------------------------------------

    def _work(self, number_: int) -> None:
        """Serve what waits in a queue, at most as many requests as it can hold."""
        if self._status & _STATUS_NEEDS_RESET or self._busy:
            return
        self._busy, queue, wanted = True, self.queues[number_], False
        try:
            for _ in range(queue.size):
                chain = queue.take()
                if chain is None:
                    break
                self.requests += 1
                wanted |= queue.give_back(chain.head, self.serve(number_, chain))
                if not self._go_on():
                    break
        except QueueError:
            self._status |= _STATUS_NEEDS_RESET
        finally:
            self._busy = False
        if wanted:
            self._isr |= 1
            self.set_interrupt(True)

    # --- keeping ----------------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Return configuration space, registers and queues."""
        return super().state() | {
            "driverFeatures": self._driver_features,
            "selected": self._selected,
            "status": self._status,
            "isr": self._isr,
            "asserted": int(self.asserted),
            "queues": [queue.state() for queue in self.queues],
        }

    def set_state(self, state: State) -> None:
        """Remember that instead."""
        queues = state.get("queues")
        if (
            type(queues) is not list
            or len(queues) != len(self.queues)
            or not all(type(each) is dict for each in queues)
        ):
            raise refuse("queues")
        super().set_state(state)
        self._driver_features = number(state, "driverFeatures", range(1 << 32)) & self._features
        self._selected = number(state, "selected", range(1 << 16))
        self._status = number(state, "status", range(256))
        self._isr = number(state, "isr", range(256))
        self.asserted = bool(number(state, "asserted", range(2)))
        for queue, remembered in zip(self.queues, queues, strict=True):
            queue.set_state(remembered)
