"""How a run ended, and what was seen."""

from __future__ import annotations

from dataclasses import dataclass

from vmgraft.vmmhost.core.contract import EndReason, PioEvent
from vmgraft.vmmhost.core.drives import DriveKind


@dataclass(frozen=True, slots=True)
class DriveUse:
    """What became of one drive in a run; blocks are those of 64 KiB.

    Attributes:
        name: What the drive is called; ``boot`` for the boot medium.
        kind: What it is to the guest.
        blocks_checked: Blocks read from the image and compared with what was verified.
        blocks_written: Blocks that the guest changed in the overlay.
    """

    name: str
    kind: DriveKind
    blocks_checked: int
    blocks_written: int


@dataclass(frozen=True, slots=True)
class MachineResult:
    """How a run ended and what was seen.

    Attributes:
        reason: Why it ended.
        detail: The same in words; may be empty.
        engine: ``kvm`` or ``soft``.
        emulated: Whether guest instructions were emulated; None when unknown.
        wall_seconds: Duration of the run.
        virtual_ns: Virtual time the guest lived.
        exits: How often the guest left for the host, by kind.
        bios_calls: BIOS calls by "vector/function" in hex.
        unknown_calls: Those of them that nobody served.
        screen: The 25 lines of the text screen.
        serial: What the guest sent to COM1, up to 4 MiB.
        debug: What it sent to the debug ports.
        trace: Port accesses, when tracing was asked for.
        trace_dropped: Accesses that the trace had no room for.
        blocks_checked: 64 KiB blocks of all drives, read from the images and compared with what was verified.
        blocks_written: 64 KiB blocks of all drives that the guest changed in the overlays.
        until_seen: Whether the text waited for was seen, even if the guest ended by itself then.
        why: Why this engine was taken; what the probe found.
        drives: The same drive by drive, the boot medium first; empty where the engine does not tell.
    """

    reason: EndReason
    detail: str
    engine: str
    emulated: bool | None
    wall_seconds: float
    virtual_ns: int
    exits: dict[str, int]
    bios_calls: dict[str, int]
    unknown_calls: dict[str, int]
    screen: tuple[str, ...]
    serial: bytes
    debug: bytes
    trace: tuple[PioEvent, ...]
    trace_dropped: int
    blocks_checked: int
    blocks_written: int
    until_seen: bool = False
    why: str = ""
    drives: tuple[DriveUse, ...] = ()
