"""What extensions can have of a machine that is QEMU's, and what a run there cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmgraft.errors import CapabilityError, UsageError
from vmgraft.vmmhost.layer.spec import ExtensionSpec

if TYPE_CHECKING:
    from vmgraft.vmmhost.plan import RunOptions


def check_specs(specs: Sequence[ExtensionSpec]) -> None:
    """Refuse claims on parts of the machine that only the core engine can give.

    An extension that cannot be what it was signed as is not started as something less.

    Raises:
        CapabilityError: an extension claims ports, addresses, guest memory, an interrupt line or a default service.
    """
    for spec in specs:
        kinds = {
            "pio": spec.pio, "mmio": spec.mmio, "guest": spec.windows, "irq": spec.irqs, "service": spec.services,
        }  # fmt: skip
        for kind, claims in kinds.items():
            if claims:
                raise CapabilityError(
                    f"{spec.id} claims {kind}, which the engine qemu cannot give",
                    field=kind,
                    hint="use --engine core; here extensions answer hypercalls, on a virtio-serial port",
                )


def check_options(options: RunOptions) -> None:
    """Refuse options that mean nothing to this engine, rather than pass over them.

    Raises:
        UsageError: one was given.
    """
    given = {
        "--keys": bool(options.keys), "--control": options.control is not None,
        "--record": options.record is not None, "--replay": options.replay is not None,
        "--firmware": options.firmware != "trap", "--pin": options.pin is not None, "trace": options.trace,
    }  # fmt: skip
    for name, there in given.items():
        if there:
            raise UsageError(f"{name} does not go with the engine qemu", field=name, hint="leave it out, or use core")
