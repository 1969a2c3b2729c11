"""The extension ABI ``vmgraft/1`` as a table: what a module may export and import. Reference: docs/extensions.md.

Type codes are those of the WebAssembly core specification, section 5.3.1 (number types).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

ABI_NAME: Final = "vmgraft/1"
IMPORT_MODULE: Final = "vmgraft"
MARKER: Final = "vmgraft_abi_1"
MEMORY: Final = "memory"
PAGE_BYTES: Final = 65536  #: WebAssembly core specification 2.0, section 4.2.8

I32: Final = 0x7F
I64: Final = 0x7E

MASK32: Final = (1 << 32) - 1
MASK64: Final = (1 << 64) - 1

#: Longest piece of guest memory that one protocol message carries; longer copies are split.
MAX_ACCESS_BYTES: Final = 4096
#: Longest copy that one ``guest_read``, ``guest_write`` or ``random`` call may ask for.
MAX_COPY_BYTES: Final = 65536
#: Longest line that one ``log`` call may write; the rest of it is cut off.
MAX_LOG_BYTES: Final = 1024
#: What a line counts at least against ``logBytes``: its record in the audit log is longer than its text.
MIN_LOG_COST: Final = 64
#: Longest data of one call: ``get_buffer``, ``set_buffer``, a saved state.
MAX_BUFFER_BYTES: Final = 65536
#: Longest key and value of the key-value store; together they fit one message.
MAX_KEY_BYTES: Final = 64
MAX_VALUE_BYTES: Final = 4000
#: Longest name of a metric.
MAX_NAME_BYTES: Final = 64
#: What ``on_service`` returns to leave the answer to whoever is next: -1.
PASS: Final = MASK64
#: Shortest interval that ``set_tick`` can ask for: the host's own tick, in nanoseconds.
MIN_TICK_NS: Final = 10_000_000


class Hook(IntFlag):
    """Optional exports a module may have, as the bits a worker reports."""

    START = 1
    PIO_READ = 2
    PIO_WRITE = 4
    MMIO_READ = 8
    MMIO_WRITE = 16
    HYPERCALL = 32
    TICK = 64
    EVENT = 128
    SERVICE = 256
    SNAPSHOT = 512
    RESTORE = 1024
    VIRTIO_QUEUE = 2048
    VIRTIO_CONFIG_READ = 4096
    VIRTIO_CONFIG_WRITE = 8192
    VIRTIO_STATUS = 16384


class Event(IntEnum):
    """Argument of ``on_event``."""

    BOOT = 0
    RESET = 1
    SHUTDOWN = 2


@dataclass(frozen=True, slots=True)
class Signature:
    """A function type: parameter and result type codes."""

    params: tuple[int, ...]
    results: tuple[int, ...] = ()

    def __str__(self) -> str:
        def names(codes: tuple[int, ...]) -> str:
            return " ".join({I32: "i32", I64: "i64"}.get(code, hex(code)) for code in codes) or "nothing"

        return f"{names(self.params)} -> {names(self.results)}"


#: Export name → (type, hook); the hook is None for the marker, which is never called.
EXPORTS: Final[dict[str, tuple[Signature, Hook | None]]] = {
    MARKER: (Signature(()), None),
    "on_start": (Signature((I32,), (I32,)), Hook.START),
    "on_pio_read": (Signature((I32, I32), (I64,)), Hook.PIO_READ),
    "on_pio_write": (Signature((I32, I32, I32), (I32,)), Hook.PIO_WRITE),
    "on_mmio_read": (Signature((I64, I32), (I64,)), Hook.MMIO_READ),
    "on_mmio_write": (Signature((I64, I32, I64), (I32,)), Hook.MMIO_WRITE),
    "on_hypercall": (Signature((I32, I32, I32, I32, I32), (I64,)), Hook.HYPERCALL),
    "on_tick": (Signature((I64,)), Hook.TICK),
    "on_event": (Signature((I32,)), Hook.EVENT),
    "on_service": (Signature((I32, I64, I64), (I64,)), Hook.SERVICE),
    "on_snapshot": (Signature((), (I32,)), Hook.SNAPSHOT),
    "on_restore": (Signature((I32,), (I32,)), Hook.RESTORE),
    "on_virtio_queue": (Signature((I32, I32, I32), (I32,)), Hook.VIRTIO_QUEUE),
    "on_virtio_config_read": (Signature((I32, I32), (I64,)), Hook.VIRTIO_CONFIG_READ),
    "on_virtio_config_write": (Signature((I32, I32, I64)), Hook.VIRTIO_CONFIG_WRITE),
    "on_virtio_status": (Signature((I32, I64)), Hook.VIRTIO_STATUS),
}

#: Import name → (type, capability); None where no capability is needed.
IMPORTS: Final[dict[str, tuple[Signature, str | None]]] = {
    "config_read": (Signature((I32, I32, I32), (I32,)), None),
    "log": (Signature((I32, I32)), "log"),
    "now": (Signature((), (I64,)), "now"),
    "random": (Signature((I32, I32)), "random"),
    "set_tick": (Signature((I64,)), "tick"),
    "stop": (Signature(()), "stop"),
    "guest_read": (Signature((I64, I32, I32), (I32,)), "guest:r"),
    "guest_write": (Signature((I64, I32, I32), (I32,)), "guest:rw"),
    "get_buffer": (Signature((I32, I32, I32), (I32,)), None),
    "set_buffer": (Signature((I32, I32)), None),
    "irq": (Signature((I32, I32)), "irq"),
    "kv_get": (Signature((I32, I32, I32, I32), (I32,)), "kv"),
    "kv_put": (Signature((I32, I32, I32, I32), (I32,)), "kv"),
    "metric": (Signature((I32, I32, I64)), "metric"),
    "virtio_kick": (Signature((I32,)), "virtio"),
}

#: Imports that take a pointer: a module that uses one must export its memory.
POINTER_IMPORTS: Final = frozenset({
    "config_read", "log", "random", "guest_read", "guest_write", "get_buffer", "set_buffer", "kv_get", "kv_put",
    "metric",
})  # fmt: skip


class Grant(IntFlag):
    """Capabilities as the bits that the host sends to a worker."""

    LOG = 1
    NOW = 2
    RANDOM = 4
    TICK = 8
    STOP = 16
    GUEST_READ = 32
    GUEST_WRITE = 64
    IRQ = 128
    KV = 256
    METRIC = 512
    VIRTIO = 1024

    def allows(self, capability: str | None) -> bool:
        """Say whether the capability named in `IMPORTS` is among the granted ones."""
        return capability is None or bool(self & _GRANT_OF[capability])


_GRANT_OF: Final = {
    "log": Grant.LOG,
    "now": Grant.NOW,
    "random": Grant.RANDOM,
    "tick": Grant.TICK,
    "stop": Grant.STOP,
    "guest:r": Grant.GUEST_READ,
    "guest:rw": Grant.GUEST_WRITE,
    "irq": Grant.IRQ,
    "kv": Grant.KV,
    "metric": Grant.METRIC,
    "virtio": Grant.VIRTIO,
}
