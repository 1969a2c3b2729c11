"""The launch plan: what will run, with what rights, decided before anything is started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmgraft.errors import CapabilityError
from vmgraft.imagefmt.contract import PROBE, Opening
from vmgraft.signing.capabilities import (
    Flag,
    GuestWindow,
    HypercallRange,
    MmioRange,
    PioRange,
    parse_capability,
)
from vmgraft.signing.contract import Limits, VerifiedExtension
from vmgraft.signing.keys import PublicKey
from vmgraft.vmmhost.core.memory import HIGH_BASE, LOW_END, is_ram, ram_bytes
from vmgraft.vmmhost.core.portmap import planning_bus
from vmgraft.vmmhost.layer import spec as layer


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to boot an image; see ``vmgraft run --help``.

    Attributes:
        cpu: ``auto``, ``kvm`` or ``soft``.
        boot: ``auto``, ``disk`` or ``cdrom``.
        memory_mib: Guest RAM.
        timeout: Wall-clock seconds until the guest is stopped; None for no limit.
        until: Stop as soon as this text stands on the screen or came out of the serial port.
        keys: Typed into the guest's keyboard.
        extensions: False boots the verified image without loading its extensions.
        opening: How to open the image.
        audit_log: File for the audit log.
        seed: Makes what extensions draw from ``random`` repeatable.
        trace: Keep the I/O trace of the guest in the result.
        state: The rollback memory; None compares with nothing and remembers nothing.
        policy_keys: Keys of which one must have signed the policy.
        signed_policy: Refuse an unsigned policy.
    """

    cpu: str = "auto"
    boot: str = "auto"
    memory_mib: int = 64
    timeout: float | None = None
    until: str | None = None
    keys: str = ""
    extensions: bool = True
    opening: Opening = PROBE
    audit_log: Path | None = None
    seed: bytes | None = None
    trace: bool = False
    state: Path | None = None
    policy_keys: tuple[PublicKey, ...] = ()
    signed_policy: bool = False


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything that decides how a guest is started. ``digest`` names it in the audit log."""

    image: str
    format: str
    virtual_size: int
    tree_digest: str
    statement_sha256: str
    policy: str | None
    signers: tuple[str, ...]
    memory_mib: int
    boot: str
    cpu: str
    extensions: tuple[VerifiedExtension, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as printed by ``run --dry-run``, without its own digest."""
        return {
            "image": self.image,
            "format": self.format,
            "virtualSize": self.virtual_size,
            "contentTree": self.tree_digest,
            "statementSha256": self.statement_sha256,
            "policy": self.policy,
            "signers": list(self.signers),
            "memoryMiB": self.memory_mib,
            "boot": self.boot,
            "cpu": self.cpu,
            "extensions": [_extension(item) for item in self.extensions],
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the plan in canonical JSON (sorted keys, no spaces)."""
        body = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()


def _extension(item: VerifiedExtension) -> dict[str, Any]:
    """Return an extension as the plan shows it."""
    return {
        "id": item.id,
        "version": item.version,
        "moduleSha256": item.module_sha256,
        "capabilities": list(item.capabilities),
        "limits": {
            "memoryMiB": item.limits.memory_mib,
            "fuelPerCall": item.limits.fuel_per_call,
            "callMs": item.limits.call_ms,
            "callsPerSecond": item.limits.calls_per_second,
            "logBytes": item.limits.log_bytes,
        },
        "onFault": item.on_fault,
        "minIsolation": item.isolation,
    }


def to_spec(item: VerifiedExtension) -> layer.ExtensionSpec | None:
    """Translate a verified extension into what the layer is told; None where it has no module to run."""
    if item.module is None:
        return None
    claims = [parse_capability(text) for text in item.capabilities]
    flags = {claim.name for claim in claims if isinstance(claim, Flag)}
    return layer.ExtensionSpec(
        id=item.id,
        version=item.version,
        module=item.module,
        config=str(item.manifest.get("config", "")).encode(),
        limits=_limits(item.limits),
        on_fault=item.on_fault,
        pio=tuple(layer.PioRange(claim.first, claim.last) for claim in claims if isinstance(claim, PioRange)),
        mmio=tuple(layer.MmioRange(claim.gpa, claim.size) for claim in claims if isinstance(claim, MmioRange)),
        hypercalls=tuple(
            layer.HypercallRange(claim.first, claim.last) for claim in claims if isinstance(claim, HypercallRange)
        ),
        windows=tuple(
            layer.GuestWindow(claim.gpa, claim.size, claim.writable)
            for claim in claims
            if isinstance(claim, GuestWindow)
        ),
        log="log" in flags,
        now="now" in flags,
        random="random" in flags,
        tick="tick" in flags,
        stop="stop" in flags,
        min_isolation=item.isolation,
    )


class _Nothing:
    """Stands for a handler while claims are tried."""

    def pio_read(self, offset: int, size: int) -> int:
        return 0

    def pio_write(self, offset: int, size: int, value: int) -> None:
        return

    def mmio_read(self, offset: int, size: int) -> int:
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        return

    def hypercall(self, number: int, args: tuple[int, int, int, int]) -> int:
        return 0


def check_claims(specs: Sequence[layer.ExtensionSpec], memory_mib: int) -> None:
    """Try every claim on a bus without a machine, so that a collision is found before anything is started.

    Args:
        specs: The extensions.
        memory_mib: RAM that the machine will have.

    Raises:
        CapabilityError: a range overlaps the core's devices, its memory, or another extension's claim, or a window is
            not wholly RAM.
        UsageError: the memory size is out of bounds.
    """
    ram_end = ram_bytes(memory_mib)
    trial, nothing = planning_bus(ram_end), _Nothing()
    for spec in specs:
        for window in spec.windows:
            _check_window(window, spec.id, ram_end)
        for ports in spec.pio:
            trial.claim_pio(ports.first, ports.last, nothing, spec.id)
        for area in spec.mmio:
            trial.claim_mmio(area.base, area.size, nothing, spec.id)
        for numbers in spec.hypercalls:
            trial.claim_hypercall(numbers.first, numbers.last, nothing, spec.id)


def _check_window(window: layer.GuestWindow, owner: str, ram_end: int) -> None:
    if is_ram(window.gpa, window.size, ram_end):
        return
    raise CapabilityError(
        f"{owner} asks for guest memory {window.gpa:#x}-{window.gpa + window.size - 1:#x}, which is not all RAM",
        field="guest",
        hint=f"RAM is 0-{LOW_END - 1:#x} and {HIGH_BASE:#x}-{ram_end - 1:#x} here; more with --memory",
    )


def _limits(limits: Limits) -> layer.LayerLimits:
    """Translate quotas."""
    return layer.LayerLimits(
        memory_mib=limits.memory_mib,
        fuel_per_call=limits.fuel_per_call,
        call_ms=limits.call_ms,
        calls_per_second=limits.calls_per_second,
        log_bytes=limits.log_bytes,
    )
