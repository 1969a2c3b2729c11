"""What is declared of a virtio device: the same for the host, which checks the grants, and the worker, which is it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

#: The register block and the configuration space behind it (VIRTIO 1.2, 4.2.2): what must lie in a claimed range.
BLOCK_BYTES: Final = 0x200
#: Registers end, and configuration space begins, here.
CONFIG_AT: Final = 0x100
MAX_QUEUES: Final = 8
#: Most descriptors of one queue here; VIRTIO 1.2, 2.7 allows 32768.
MAX_QUEUE_SIZE: Final = 256
#: Feature bits that are the device type's own and that a module may offer (VIRTIO 1.2, 2.2: 0 to 23).
FEATURE_BITS: Final = 24
MAX_DEVICE: Final = 63

_SHAPE: Final = struct.Struct("<IQBBI8H")


@dataclass(frozen=True, slots=True)
class VirtioShape:
    """A virtio device behind a claimed range of addresses.

    Attributes:
        device: The device type (VIRTIO 1.2, 5).
        base: First guest-physical address of the registers.
        irq: The ISA interrupt line it raises.
        queues: Most descriptors of each queue, powers of two.
        features: Device-type feature bits it offers.
    """

    device: int
    base: int
    irq: int
    queues: tuple[int, ...]
    features: int = 0

    def problem(self) -> str | None:
        """Say what is out of bounds, or None."""
        odd = [size for size in self.queues if not 1 <= size <= MAX_QUEUE_SIZE or size & (size - 1)]
        base_fits = not self.base % 4 and 0 <= self.base <= (1 << 52) - BLOCK_BYTES
        checks = (
            (1 <= self.device <= MAX_DEVICE, f"device type {self.device} is not between 1 and {MAX_DEVICE}"),
            (base_fits, f"registers at {self.base:#x}, which is no address for them"),
            (0 <= self.irq <= 15, f"interrupt line {self.irq} does not exist"),
            (1 <= len(self.queues) <= MAX_QUEUES, f"{len(self.queues)} queues, where 1 to {MAX_QUEUES} are possible"),
            (not odd, f"a queue of {odd[0] if odd else 0}, which is no power of two up to {MAX_QUEUE_SIZE}"),
            (0 <= self.features < 1 << FEATURE_BITS, f"feature bits {self.features:#x} beyond 0 to {FEATURE_BITS - 1}"),
        )
        return next((words for fine, words in checks if not fine), None)

    def pack(self) -> bytes:
        """Return the form in which a worker is told."""
        queues = (*self.queues, *(0,) * (MAX_QUEUES - len(self.queues)))
        return _SHAPE.pack(self.device, self.base, self.irq, len(self.queues), self.features, *queues)

    @classmethod
    def unpack(cls, data: bytes) -> VirtioShape:
        """Take that in.

        Raises:
            ValueError: it is none.
        """
        if len(data) != _SHAPE.size:
            raise ValueError(f"{len(data)} bytes are no virtio device")
        device, base, irq, count, features, *queues = _SHAPE.unpack(data)
        shape = cls(device, base, irq, tuple(queues[:count]), features)
        problem = shape.problem()
        if problem is not None:
            raise ValueError(problem)
        return shape
