"""A virtio device behind memory-mapped registers, version 2 (VIRTIO 1.2, 4.2), as a worker serves it.

Registers, status and queues are here; what the device does is the module's. What the driver may do wrong costs it the
device at most: the status then says DEVICE_NEEDS_RESET (2.1.2) until the driver resets it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from vmgraft.vmmhost.layer.virtioring import Memory, RingError, SplitQueue
from vmgraft.vmmhost.layer.virtioshape import CONFIG_AT, VirtioShape

MAGIC: Final = 0x74726976  #: 4.2.2: "virt"
VERSION: Final = 2
VENDOR: Final = 0x54464756  #: "VGFT"; 4.2.2 leaves the vendor's number open

# Device status, 2.1
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
#: Each bit that leads on, and what must be set before it (3.1.1).
_STEPS: Final = ((ACKNOWLEDGE, 0), (DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK))

F_INDIRECT: Final = 1 << 28  # 6: VIRTIO_F_INDIRECT_DESC
F_VERSION_1: Final = 1 << 32  # 6: VIRTIO_F_VERSION_1
#: Interrupt status, 4.2.2: a used buffer, a change of configuration.
_USED, _CHANGED = 1, 2
_ONES32: Final = 0xFFFFFFFF

# Registers, 4.2.2
_QUEUE_ADDRESSES: Final = {
    0x080: (0, 0), 0x084: (0, 32), 0x090: (1, 0), 0x094: (1, 32), 0x0A0: (2, 0), 0x0A4: (2, 32),
}  # fmt: skip
_QUEUE_NUM, _QUEUE_READY = 0x038, 0x044
#: What never changes; all ones from SHMLenLow to SHMBaseHigh say that there is no shared memory.
_CONSTANT: Final = {0x000: MAGIC, 0x004: VERSION, 0x00C: VENDOR, **dict.fromkeys(range(0x0B0, 0x0C0, 4), _ONES32)}

_HEAD: Final = struct.Struct("<4sIBBBQIII")
_QUEUE: Final = struct.Struct("<HBQQQH")
_TAG: Final = b"VGV1"


class Device(Protocol):
    """What a module does as a virtio device."""

    def queue(self, index: int, request: bytes, room: int) -> bytes | None:
        """Serve a request with at most ``room`` bytes, or leave it in the queue with None."""

    def config_read(self, offset: int, size: int) -> int:
        """Return bytes of the configuration space."""

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Change them."""

    def status(self, status: int, features: int) -> None:
        """Learn of a reset (0), of a driver that is ready with these features, or of one that broke a rule."""


@dataclass(slots=True)
class _Queue:
    """The registers of one queue, and the queue itself while it is in use."""

    most: int
    size: int
    addresses: list[int]
    ready: bool = False
    ring: SplitQueue | None = None


class VirtioMmio:
    """The registers and queues of one device.

    Args:
        shape: What was declared of it.
        memory: Guest memory inside the granted windows.
        device: What the module does.
        irq: Drives the interrupt line.
        note: Gets a sentence when a driver breaks a rule.
    """

    def __init__(
        self,
        shape: VirtioShape,
        memory: Memory,
        device: Device,
        irq: Callable[[bool], None],
        note: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._shape, self._memory, self._device, self._irq, self._note = shape, memory, device, irq, note
        self._offered = shape.features | F_VERSION_1 | F_INDIRECT
        self._kicked: set[int] = set()
        self._clear()

    def _clear(self) -> None:
        self._status = self._interrupts = self._accepted = 0
        self._offered_word = self._accepted_word = self._selected = 0
        self._queues = [_Queue(most, most, [0, 0, 0]) for most in self._shape.queues]
        self._kicked.clear()

    @property
    def _running(self) -> bool:
        return self._status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK

    # --- registers ----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Answer a read; registers have 32 bits and are read whole (4.2.2.2)."""
        if offset >= CONFIG_AT:
            return self._device.config_read(offset - CONFIG_AT, size)
        return 0 if size != 4 or offset % 4 else self._register(offset) & _ONES32

    def _register(self, offset: int) -> int:
        queue = self._queues[self._selected] if self._selected < len(self._queues) else _Queue(0, 0, [])
        match offset:
            case 0x008:
                value = self._shape.device
            case 0x010:
                value = self._offered >> 32 * self._offered_word if self._offered_word < 2 else 0
            case 0x034:
                value = queue.most
            case 0x044:
                value = int(queue.ready)
            case 0x060:
                value = self._interrupts
            case 0x070:
                value = self._status
            case _:
                value = _CONSTANT.get(offset, 0)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a write; what makes no sense is dropped."""
        if offset >= CONFIG_AT:
            self._device.config_write(offset - CONFIG_AT, size, value)
            return
        if size != 4 or offset % 4:
            return
        match offset:
            case 0x014:
                self._offered_word = value
            case 0x020:
                self._accept(value)
            case 0x024:
                self._accepted_word = value
            case 0x030:
                self._selected = value
            case 0x050:
                self._drain(value)
            case 0x064:
                self._acknowledge(value)
            case 0x070:
                self._set_status(value)
            case _:
                self._write_queue(offset, value)

    def _accept(self, value: int) -> None:
        if self._accepted_word < 2 and not self._status & FEATURES_OK:
            shift = 32 * self._accepted_word
            self._accepted = self._accepted & ~(_ONES32 << shift) | value << shift

    def _set_status(self, value: int) -> None:
        """Take a step of the dance, or all of them at once; a step before its time is not taken, and none back."""
        if not value:
            self._clear()
            self._irq(False)
            self._device.status(0, 0)
            return
        before = self._status
        for bit, needed in _STEPS:
            allowed = self._status & needed == needed and (bit != FEATURES_OK or self._features_fit())
            if value & bit and allowed and not self._status & FAILED:
                self._status |= bit
        self._status |= value & FAILED
        if self._status & ~before & DRIVER_OK:
            self._device.status(self._status, self._accepted)
            if self._status & NEEDS_RESET:  # a queue was wrong before: told now that somebody listens (2.1.2)
                self._interrupt(_CHANGED)

    def _features_fit(self) -> bool:
        return not self._accepted & ~self._offered and bool(self._accepted & F_VERSION_1)

    def _acknowledge(self, value: int) -> None:
        left = self._interrupts & ~value
        if left == self._interrupts:
            return
        self._interrupts = left
        self._irq(False)
        if left:  # the controllers of a PC see edges
            self._irq(True)

    def _interrupt(self, bit: int) -> None:
        if not self._interrupts:
            self._irq(True)
        self._interrupts |= bit

    # --- queues -------------------------------------------------------------------------------------------------------

    def _write_queue(self, offset: int, value: int) -> None:
        if self._selected >= len(self._queues):
            return
        queue = self._queues[self._selected]
        if offset == _QUEUE_READY:
            self._set_ready(queue, bool(value & 1))
        elif queue.ready:
            return  # 4.2.2.2: not while the queue is in use
        elif offset == _QUEUE_NUM:
            queue.size = value
        elif offset in _QUEUE_ADDRESSES:
            ring, shift = _QUEUE_ADDRESSES[offset]
            queue.addresses[ring] = queue.addresses[ring] & ~(_ONES32 << shift) | value << shift

    def _set_ready(self, queue: _Queue, ready: bool) -> None:
        if not ready:
            queue.ready, queue.ring = False, None
        elif not queue.ready and self._status & FEATURES_OK:  # 3.1.1: queues come after features
            queue.ready = True
            try:
                queue.ring = self._open(queue)
            except RingError as error:
                self._break(str(error))

    def _open(self, queue: _Queue, taken: int = 0) -> SplitQueue:
        size = queue.size
        if not 1 <= size <= queue.most or size & (size - 1):
            raise RingError(f"a queue of {size} descriptors, where powers of two up to {queue.most} are possible")
        table, driver, device = queue.addresses
        indirect = bool(self._accepted & F_INDIRECT)
        return SplitQueue(self._memory, size, (table, driver, device), indirect=indirect, taken=taken)

    def _drain(self, index: int) -> None:
        """Serve what waits in a queue: at most as many requests as it has descriptors."""
        ring = self._queues[index].ring if index < len(self._queues) else None
        if ring is None or not self._running:
            return
        served = 0
        try:
            ring.begin()
            while served < ring.size and (chain := ring.next()) is not None:
                answer = self._device.queue(index, ring.data(chain), chain.room)
                if answer is None:
                    break
                ring.finish(chain, answer)
                served += 1
            if served and ring.wants_interrupt():
                self._interrupt(_USED)
        except RingError as error:
            self._break(str(error))

    def _break(self, why: str) -> None:
        if not self._status & NEEDS_RESET:
            self._status |= NEEDS_RESET
            self._note(f"virtio: {why}")
            if self._status & DRIVER_OK:
                self._device.status(self._status, self._accepted)
                self._interrupt(_CHANGED)

    def kick(self, index: int) -> None:
        """Look at a queue again once the call is over: the module has something for it now."""
        if index < len(self._queues):
            self._kicked.add(index)

    def settle(self) -> None:
        """Do what `kick` asked for; what is asked for meanwhile has to wait for the next call."""
        kicked, self._kicked = self._kicked, set()
        for index in sorted(kicked):
            self._drain(index)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return registers and places in the queues, for `load`."""
        head = _HEAD.pack(
            _TAG, self._shape.device, len(self._queues), self._status, self._interrupts, self._accepted,
            self._offered_word, self._accepted_word, self._selected,
        )  # fmt: skip
        return head + b"".join(self._save_queue(queue) for queue in self._queues)

    @staticmethod
    def _save_queue(queue: _Queue) -> bytes:
        taken = 0 if queue.ring is None else queue.ring.taken
        in_use = queue.ready + 2 * (queue.ring is not None)
        return _QUEUE.pack(min(queue.size, 0xFFFF), in_use, *queue.addresses, taken)

    @property
    def saved_bytes(self) -> int:
        """Length of what `save` gives."""
        return _HEAD.size + len(self._queues) * _QUEUE.size

    def load(self, data: bytes) -> bool:
        """Take back what `save` gave; False, with the device reset, where it is of another device."""
        self._clear()
        if len(data) != self.saved_bytes:
            return False
        tag, device, count, status, interrupts, accepted, *words = _HEAD.unpack_from(data)
        if (tag, device, count) != (_TAG, self._shape.device, len(self._queues)) or accepted & ~self._offered:
            return False
        self._status, self._interrupts, self._accepted = status, interrupts & (_USED | _CHANGED), accepted
        self._offered_word, self._accepted_word, self._selected = words
        try:
            for number, queue in enumerate(self._queues):
                self._load_queue(queue, data[_HEAD.size + number * _QUEUE.size :])
        except RingError:
            self._clear()
            return False
        return True

    def _load_queue(self, queue: _Queue, data: bytes) -> None:
        queue.size, in_use, *queue.addresses, taken = _QUEUE.unpack_from(data)
        queue.ready = bool(in_use & 1)
        queue.ring = self._open(queue, taken) if in_use & 2 else None
