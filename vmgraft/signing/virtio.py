"""The ``virtio`` table of a manifest: a device that the extension is, inside what it declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from vmgraft.errors import GraftFormatError, VmgraftError
from vmgraft.signing.capabilities import Capability, GuestWindow, IrqLine, MmioRange

#: Registers and configuration space of the MMIO transport (VIRTIO 1.2, 4.2.2), as hosts lay them out.
REGISTER_BYTES = 0x200


@dataclass(frozen=True, slots=True)
class VirtioTable:
    """A virtio device as it is declared.

    Attributes:
        device: The device type (VIRTIO 1.2, 5).
        mmio: First guest-physical address of its registers.
        irq: The ISA interrupt line it raises.
        queues: Most descriptors of each queue, powers of two.
        features: Numbers of the device-type feature bits it offers.
    """

    device: int
    mmio: int
    irq: int
    queues: tuple[int, ...]
    features: tuple[int, ...] = ()


def virtio_of(document: Mapping[str, Any]) -> VirtioTable | None:
    """Return the device of a manifest that passed the schema; None where it declares none."""
    table = document.get("virtio")
    if table is None:
        return None
    return VirtioTable(
        table["device"], int(table["mmio"], 16), table["irq"], tuple(table["queues"]), tuple(table.get("features", ()))
    )


def check_virtio(
    document: Mapping[str, Any],
    claims: Sequence[Capability],
    *,
    file: str | PathLike[str] | None = None,
    error: type[VmgraftError] = GraftFormatError,
) -> None:
    """Hold a manifest's device against the capabilities that are declared beside it.

    Raises:
        VmgraftError: (of class ``error``) what it needs is not declared.
    """
    table = virtio_of(document)
    if table is None:
        return
    if document.get("module") is None:
        raise error("a virtio device needs a module", file=file, field="virtio")
    end = table.mmio + REGISTER_BYTES
    areas = (claim for claim in claims if isinstance(claim, MmioRange))
    if table.mmio % 4 or not any(area.gpa <= table.mmio and end <= area.gpa + area.size for area in areas):
        hint = f"declare mmio:{table.mmio & -4:#x}+{REGISTER_BYTES:#x}, or more"
        message = f"the registers at {table.mmio:#x} are not inside a declared range"
        raise error(message, file=file, field="virtio.mmio", hint=hint)
    if IrqLine(table.irq) not in claims:
        hint = f"declare irq:{table.irq}"
        raise error("the interrupt line is not declared", file=file, field="virtio.irq", hint=hint)
    if not any(isinstance(claim, GuestWindow) and claim.writable for claim in claims):
        hint = "declare guest:ADDRESS+SIZE:rw for queues and buffers"
        raise error("there is no writable window of guest memory", file=file, field="virtio", hint=hint)
