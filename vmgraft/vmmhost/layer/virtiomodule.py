"""Between a virtio device's registers and the module that is the device: a module's hooks, with the device in front.

Every hook may have asked to look at a queue again (``virtio_kick``), which is done when it has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from vmgraft.errors import GraftFormatError
from vmgraft.vmmhost.layer.abi import MASK32, MASK64, MAX_BUFFER_BYTES, Grant, Hook
from vmgraft.vmmhost.layer.engine import Invoke, ModuleTrapError
from vmgraft.vmmhost.layer.protocol import MAX_TEXT, Kind, Setup
from vmgraft.vmmhost.layer.virtio import VirtioMmio
from vmgraft.vmmhost.layer.virtioshape import BLOCK_BYTES, VirtioShape
from vmgraft.vmmhost.layer.windows import GuestView


class CallData(Protocol):
    """The data of the call that runs (`services.Services`)."""

    data: bytes
    answer: bytes
    room: int
    kick: Callable[[int], None]

    def refuel(self) -> None: ...  # noqa: D102


class ModuleDevice:
    """A module's hooks as a virtio device.

    Args:
        hooks: The module's exports.
        call: The data of the call that runs.
    """

    def __init__(self, hooks: Mapping[Hook, Invoke], call: CallData) -> None:
        self._hooks, self._call = hooks, call

    def queue(self, index: int, request: bytes, room: int) -> bytes | None:
        """Have a request served, with the data of the call around it kept."""
        call = self._call
        around = call.data, call.answer, call.room
        call.data, call.answer, call.room = request, b"", room
        try:
            written = self._hooks[Hook.VIRTIO_QUEUE](index, len(request), room)
            answer = call.answer
        finally:
            call.data, call.answer, call.room = around
        if written == MASK32:
            return None
        if written != len(answer):
            raise ModuleTrapError(f"on_virtio_queue says {written} bytes and gives {len(answer)}")
        return answer

    def config_read(self, offset: int, size: int) -> int:
        """Return bytes of the configuration space; zeros where the module has none."""
        hook = self._hooks.get(Hook.VIRTIO_CONFIG_READ)
        return 0 if hook is None else hook(offset, size) & ((1 << 8 * size) - 1)

    def config_write(self, offset: int, size: int, value: int) -> None:
        """Change them."""
        hook = self._hooks.get(Hook.VIRTIO_CONFIG_WRITE)
        if hook is not None:
            hook(offset, size, value)

    def status(self, status: int, features: int) -> None:
        """Tell the module what became of its driver."""
        hook = self._hooks.get(Hook.VIRTIO_STATUS)
        if hook is not None:
            hook(status, features)


def attach_virtio(
    setup: Setup, hooks: dict[Hook, Invoke], view: GuestView, call: CallData, tell: Callable[[Kind, int, bytes], None]
) -> dict[Hook, Invoke]:
    """Return the hooks of a module with its virtio device in front; as they are where none was declared.

    Raises:
        GraftFormatError: one was declared, and the module is none.
    """
    shape = setup.virtio
    if shape is None:
        return hooks
    if Hook.VIRTIO_QUEUE not in hooks:
        message = "the manifest declares a virtio device, and the module has no on_virtio_queue"
        raise GraftFormatError(message, field="virtio", hint="export it, or leave the table out")

    def irq(level: bool) -> None:
        tell(Kind.IRQ, shape.irq << 1 | level, b"")

    def note(text: str) -> None:
        if setup.grant & Grant.LOG:
            tell(Kind.LOG, 0, text.encode()[:MAX_TEXT])

    device = VirtioMmio(shape, view, ModuleDevice(hooks, call), irq, note)
    call.kick = device.kick
    fronted = {**hooks, **_registers(shape, device, hooks), **_keeping(device, hooks, call)}
    return {hook: _settled(device, call, invoke) for hook, invoke in fronted.items()}


def _settled(device: VirtioMmio, call: CallData, invoke: Invoke) -> Invoke:
    def settled(*args: int) -> int:
        call.refuel()
        result = invoke(*args)
        device.settle()
        return result

    return settled


def _registers(shape: VirtioShape, device: VirtioMmio, hooks: Mapping[Hook, Invoke]) -> dict[Hook, Invoke]:
    """Return what answers accesses to memory: the device in its block, the module's own hooks elsewhere."""
    read, write = hooks.get(Hook.MMIO_READ), hooks.get(Hook.MMIO_WRITE)

    def mmio_read(gpa: int, size: int) -> int:
        if 0 <= gpa - shape.base <= BLOCK_BYTES - size:
            return device.read(gpa - shape.base, size)
        return MASK64 if read is None else read(gpa, size)

    def mmio_write(gpa: int, size: int, value: int) -> int:
        if 0 <= gpa - shape.base <= BLOCK_BYTES - size:
            device.write(gpa - shape.base, size, value)
            return 0
        return 0 if write is None else write(gpa, size, value)

    return {Hook.MMIO_READ: mmio_read, Hook.MMIO_WRITE: mmio_write}


def _keeping(device: VirtioMmio, hooks: Mapping[Hook, Invoke], call: CallData) -> dict[Hook, Invoke]:
    """Return what saves the device before the module's own state, and brings both back."""
    own_snapshot, own_restore = hooks.get(Hook.SNAPSHOT), hooks.get(Hook.RESTORE)

    def snapshot() -> int:
        length = 0
        if own_snapshot is not None:
            call.room = min(call.room, MAX_BUFFER_BYTES) - device.saved_bytes
            length = own_snapshot()
            if length == MASK32:
                return length
            if length != len(call.answer):
                raise ModuleTrapError(f"on_snapshot says {length} bytes and gives {len(call.answer)}")
        call.answer = device.save() + call.answer
        return length + device.saved_bytes

    def restore(_length: int) -> int:
        saved, rest = call.data[: device.saved_bytes], call.data[device.saved_bytes :]
        if not device.load(saved) or (rest and own_restore is None):
            return 1
        call.data = rest
        return 0 if own_restore is None else own_restore(len(rest))

    return {Hook.SNAPSHOT: snapshot, Hook.RESTORE: restore}
