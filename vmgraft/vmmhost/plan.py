"""The launch plan: what will run, with what rights, decided before anything is started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from vmgraft.errors import CapabilityError, FileError, UsageError
from vmgraft.imagefmt.contract import PROBE, Opening
from vmgraft.signing.capabilities import (
    Flag,
    GuestWindow,
    HypercallRange,
    IrqLine,
    MmioRange,
    PioRange,
    ServiceClaim,
    parse_capability,
)
from vmgraft.signing.contract import Limits, VerifiedExtension
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.files import read_regular
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.virtio import virtio_of
from vmgraft.vmmhost.core.memory import HIGH_BASE, LOW_END, is_ram, ram_bytes
from vmgraft.vmmhost.core.portmap import FirmwareKind, planning_bus
from vmgraft.vmmhost.core.services import Service
from vmgraft.vmmhost.layer import spec as layer
from vmgraft.vmmhost.layer.virtioshape import VirtioShape
from vmgraft.vmmhost.supplements.compose import Composed
from vmgraft.vmmhost.supplements.present import planned
from vmgraft.vmmhost.verification import BEFORE

#: Longest kernel or initial RAM disk, in bytes.
DIRECT_MAX: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to boot an image; see ``vmgraft run --help``.

    Attributes:
        cpu: ``auto``, ``kvm`` or ``soft``.
        boot: ``auto``, ``disk``, ``cdrom`` or ``floppy``.
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
        engine: ``core`` for the host of this package, ``qemu`` for an installed QEMU.
        firmware: ``trap`` or ``seabios``.
        bios: File of the stock firmware; None for the installed one.
        kernel: File of a kernel to start in place of the disk's own boot record. It is the operator's, not verified.
        initrd: File of the initial RAM disk that goes with it.
        append: Its command line.
        supplements: Whether what extensions add to the disk is presented to the guest.
        require_isolation: Least isolation level of every worker, and of the host itself (docs/sandbox.md).
        layers: Images whose files are shown as one more volume, the lowest first; each must satisfy the policy.
        control: Path of a Unix socket to listen on for ``vmgraft ctl``.
        record: File that gets every packet between host and workers.
        replay: Such a file, which answers in place of workers.
        restore: A snapshot of this guest, from where it goes on.
        pin: Number of the processor that guest and extensions are kept on; None leaves it to the system.
        verify_all: Read all of the content before the start, also where the record holds the signed content tree.
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
    engine: str = "core"
    firmware: str = "trap"
    bios: Path | None = None
    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    supplements: bool = True
    layers: tuple[Path, ...] = ()
    require_isolation: int = 0
    control: Path | None = None
    record: Path | None = None
    replay: Path | None = None
    restore: Path | None = None
    pin: int | None = None
    verify_all: bool = False


@dataclass(frozen=True, slots=True)
class DirectFiles:
    """A kernel of the operator's, read once: what the plan names by digest is what is started.

    Attributes:
        kernel: Its bytes.
        initrd: The bytes of its initial RAM disk; empty for none.
        append: Its command line.
    """

    kernel: bytes
    initrd: bytes
    append: str

    def to_dict(self) -> dict[str, Any]:
        """Return what the plan shows of it."""
        return {
            "kernelSha256": hashlib.sha256(self.kernel).hexdigest(),
            "initrdSha256": hashlib.sha256(self.initrd).hexdigest() if self.initrd else None,
            "append": self.append,
        }


def read_direct(options: RunOptions) -> DirectFiles | None:
    """Read the kernel and initial RAM disk that the options name; None where they name none.

    Raises:
        UsageError: something goes with a kernel, but no kernel is named.
        FileError: a file is no regular one, cannot be read, or is too long.
    """
    if options.kernel is None:
        if options.initrd is not None or options.append:
            raise UsageError("an initial RAM disk and a command line go with a kernel", hint="name one: --kernel FILE")
        return None
    initrd = b"" if options.initrd is None else _read_bounded(options.initrd, "the initial RAM disk")
    return DirectFiles(_read_bounded(options.kernel, "the kernel"), initrd, options.append)


def _read_bounded(path: Path, what: str) -> bytes:
    data = read_regular(path, DIRECT_MAX, what=what, error=FileError)
    if not 0 < len(data) <= DIRECT_MAX:
        raise FileError(f"a file of 1 to {DIRECT_MAX} bytes is expected", file=path)
    return data


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
    engine: str = "core"
    firmware: str = "trap"
    supplements: bool = True
    direct: DirectFiles | None = None
    union: Composed | None = None
    firmware_sha256: str | None = None
    video_bios_sha256: str | None = None
    restore_sha256: str | None = None
    content_check: str = BEFORE

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as printed by ``run --dry-run``, without its own digest."""
        return {
            "image": self.image,
            "format": self.format,
            "virtualSize": self.virtual_size,
            "contentTree": self.tree_digest,
            "contentCheck": self.content_check,
            "statementSha256": self.statement_sha256,
            "policy": self.policy,
            "signers": list(self.signers),
            "memoryMiB": self.memory_mib,
            "boot": self.boot,
            "engine": self.engine,
            "firmware": self.firmware,
            "firmwareSha256": self.firmware_sha256,
            "videoBiosSha256": self.video_bios_sha256,
            "direct": None if self.direct is None else self.direct.to_dict(),
            "union": None if self.union is None else self.union.to_dict(),
            "cpu": self.cpu,
            "supplements": self.supplements,
            "restoreSha256": self.restore_sha256,
            "extensions": [_extension(item) for item in self.extensions],
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the plan in canonical JSON (sorted keys, no spaces)."""
        body = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(body.encode()).hexdigest()


class Enveloped(Protocol):
    """A graft, or anything else that holds envelopes."""

    def envelopes(self) -> Sequence[bytes]: ...  # noqa: D102


def statement_digest(graft: Enveloped) -> str:
    """Return the SHA-256 of the signed statement, in hex."""
    return hashlib.sha256(parse_envelope(graft.envelopes()[0]).payload).hexdigest()


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
        "supplements": planned(item),
    }


def to_spec(item: VerifiedExtension) -> layer.ExtensionSpec | None:
    """Translate a verified extension into what the layer is told; None where it has no module to run."""
    if item.module is None:
        return None
    claims = [parse_capability(text) for text in item.capabilities]
    flags = {claim.name for claim in claims if isinstance(claim, Flag)}
    # Who may take a service over need not be asked before it as well.
    chained = {claim.name: claim.chain for claim in claims if isinstance(claim, ServiceClaim) and claim.chain}
    services = chained | {claim.name: False for claim in claims if isinstance(claim, ServiceClaim) and not claim.chain}
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
        kv="kv" in flags,
        metric="metric" in flags,
        irqs=tuple(claim.line for claim in claims if isinstance(claim, IrqLine)),
        services=tuple(layer.ServiceUse(name, chain) for name, chain in services.items()),
        virtio=_virtio(item),
    )


def _virtio(item: VerifiedExtension) -> VirtioShape | None:
    """Translate the virtio device that an extension declares."""
    table = virtio_of(item.manifest)
    if table is None:
        return None
    features = sum(1 << bit for bit in table.features)
    return VirtioShape(table.device, table.mmio, table.irq, table.queues, features)


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

    def serve(self, service: Service, a0: int, a1: int, data: bytes) -> None:
        return


def check_claims(specs: Sequence[layer.ExtensionSpec], memory_mib: int, firmware: str = FirmwareKind.TRAP) -> None:
    """Try every claim on a bus without a machine, so that a collision is found before anything is started.

    Args:
        specs: The extensions.
        memory_mib: RAM that the machine will have.
        firmware: Its firmware, which brings devices of its own.

    Raises:
        CapabilityError: a range overlaps the core's devices, its memory, or another extension's claim, or a window is
            not wholly RAM.
        UsageError: the memory size is out of bounds.
    """
    ram_end = ram_bytes(memory_mib)
    trial, nothing = planning_bus(ram_end, FirmwareKind(firmware)), _Nothing()
    for spec in specs:
        for window in spec.windows:
            _check_window(window, spec.id, ram_end)
        for ports in spec.pio:
            trial.claim_pio(ports.first, ports.last, nothing, spec.id)
        for area in spec.mmio:
            trial.claim_mmio(area.base, area.size, nothing, spec.id)
        for numbers in spec.hypercalls:
            trial.claim_hypercall(numbers.first, numbers.last, nothing, spec.id)
        for line in spec.irqs:
            trial.claim_irq(line, spec.id)
        for use in spec.services:
            trial.claim_service(Service[use.name.upper()], nothing, spec.id, chain=use.chain)


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
