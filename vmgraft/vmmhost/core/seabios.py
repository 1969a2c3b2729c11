"""Stock SeaBIOS: finding it on this computer, and the devices by which it finds memory, disks and boot order.

What it asks for is what QEMU's ``pc`` machine offers; see docs/host.md for what of that is here.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmgraft.errors import HostError, NotBootableError, UsageError
from vmgraft.vmmhost.core.boot import BootPlan, BootSource, drive_only, find_boot
from vmgraft.vmmhost.core.bus import CORE, Bus
from vmgraft.vmmhost.core.contract import PioHandler
from vmgraft.vmmhost.core.devices import pci
from vmgraft.vmmhost.core.devices.fwcfg import Fixed, FwCfg, Item, Padded
from vmgraft.vmmhost.core.devices.i8042 import KeyboardController
from vmgraft.vmmhost.core.devices.virtioblk import VirtioBlk
from vmgraft.vmmhost.core.devices.virtioscsi import VirtioScsi
from vmgraft.vmmhost.core.drives import Disk, Drive, DriveKind
from vmgraft.vmmhost.core.firmware.keyboard import key_code
from vmgraft.vmmhost.core.geometry import SECTOR, floppy_format
from vmgraft.vmmhost.core.memory import E820_RAM
from vmgraft.vmmhost.core.portmap import SEABIOS_PORTS
from vmgraft.vmmhost.core.shadow import FLASH_SIZE, ShadowedRam
from vmgraft.vmmhost.core.state import State, flag, part

#: Where distributions put the firmware and its text-mode video BIOS.
BIOS_PATHS: Final = ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin")
VIDEO_PATHS: Final = ("/usr/share/seabios/vgabios-isavga.bin", "/usr/share/qemu/vgabios.bin")
INSTALL_HINT: Final = "install the package seabios, or name the file with --bios"
#: Longest option ROM: its size byte counts 512 bytes and firmware keeps 128 KiB for them.
VIDEO_MAX: Final = 64 << 10
#: First slot of a drive, and how many find one.
FIRST_SLOT: Final = 3
DRIVES_MAX: Final = 24
#: Less memory than that leaves the firmware no room to work in.
MEMORY_MIN_MIB: Final = 4
#: Head and tail of the keyboard buffer in the BIOS data area.
_BUFFER_HEAD, _BUFFER_TAIL = 0x41A, 0x41C
_SHIFT: Final = 0x2A
_SHIFTED: Final = frozenset('!@#$%^&*()_+{}:"~|<>?')
#: Milliseconds until firmware that found nothing to boot resets the machine, which ends the run.
_FAIL_WAIT_MS: Final = 1
_NOTHING_BOOTS: Final = b"No bootable device."
_BOOTING: Final = b"Booting from "


@dataclass(frozen=True, slots=True)
class FirmwareImage:
    """The firmware and the video BIOS that goes with it.

    Attributes:
        path: Where the firmware was read from.
        rom: The firmware, 256 KiB.
        video: The video BIOS; empty where there is none, and then no text screen.
    """

    path: str
    rom: bytes
    video: bytes = b""

    @property
    def sha256(self) -> str:
        """SHA-256 of the firmware, in hex."""
        return hashlib.sha256(self.rom).hexdigest()

    @property
    def video_sha256(self) -> str | None:
        """SHA-256 of the video BIOS, in hex."""
        return hashlib.sha256(self.video).hexdigest() if self.video else None

    def to_dict(self) -> dict[str, str | None]:
        """Return what plan and audit log say of it."""
        return {"path": self.path, "sha256": self.sha256, "videoSha256": self.video_sha256}


def load_firmware(path: Path | None = None) -> FirmwareImage:
    """Read SeaBIOS.

    Args:
        path: The file; None for the distribution's.

    Raises:
        HostError: when it is missing, cannot be read, or is not a PC firmware of 256 KiB.
    """
    chosen = path or next((Path(each) for each in BIOS_PATHS if Path(each).exists()), None)
    if chosen is None:
        raise HostError("SeaBIOS is not installed", file=BIOS_PATHS[0], hint=INSTALL_HINT)
    rom = _read(chosen, FLASH_SIZE)
    if len(rom) != FLASH_SIZE:
        hint = "take a build of 256 KiB, such as bios-256k.bin"
        raise HostError(f"a firmware of {len(rom)} bytes, not {FLASH_SIZE}", file=chosen, hint=hint)
    if rom[-16] not in (0xEA, 0xE9):
        raise HostError("no jump at the reset vector: this is no PC firmware", file=chosen, offset=FLASH_SIZE - 16)
    video = next((Path(each) for each in VIDEO_PATHS if Path(each).exists()), None)
    return FirmwareImage(str(chosen), rom, _video(video))


def _video(path: Path | None) -> bytes:
    if path is None:
        return b""
    rom = _read(path, VIDEO_MAX)
    if rom[:2] != b"\x55\xaa" or len(rom) < 512:
        raise HostError("no option ROM", file=path, offset=0, hint=INSTALL_HINT)
    return rom


def _read(path: Path, limit: int) -> bytes:
    try:
        # A pipe is not waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise HostError("not a file", file=path, hint=INSTALL_HINT)
            data = file.read(limit + 1)
    except OSError as error:
        raise HostError(f"cannot be read: {error.strerror}", file=path, hint=INSTALL_HINT) from error
    if len(data) > limit:
        raise HostError(f"more than {limit} bytes", file=path, hint="take a build of 256 KiB, such as bios-256k.bin")
    return data


def offer(disk: Disk, source: BootSource) -> BootPlan:
    """Return which drive ``disk`` is to stock firmware; whether it boots, the firmware finds out.

    Raises:
        ContentMismatchError: when the content is not what was verified.
    """
    try:
        return find_boot(disk, source)
    except NotBootableError:
        return drive_only(disk, source)


@dataclass(frozen=True, slots=True)
class Host:
    """What the devices ask of the machine.

    Attributes:
        stop: Ends the run.
        set_irq: Drives an ISA line.
        go_on: Asked between two disk requests; False when the run has ended.
        debug: What the firmware wrote to its debug port so far.
    """

    stop: pci.Stop
    set_irq: Callable[[int, bool], None]
    go_on: Callable[[], bool]
    debug: bytearray


class SeaBios:
    """The devices that SeaBIOS finds beside the board's own.

    Args:
        bus: Gets fw_cfg, PCI and keyboard.
        ram: The machine's memory, with the firmware in it.
        image: Firmware and video BIOS.
        drives: All drives, the one to boot from first.
        keyboard: The board's keyboard.
        keys: Text to type, as soon as the guest takes keys.
        host: The machine.

    Raises:
        UsageError: too many drives, a second floppy, or too little memory.
    """

    def __init__(
        self,
        bus: Bus,
        ram: ShadowedRam,
        image: FirmwareImage,
        *,
        drives: Sequence[Drive],
        keyboard: KeyboardController,
        keys: str,
        host: Host,
    ) -> None:
        if len(drives) > DRIVES_MAX:
            raise UsageError(f"{len(drives)} drives, of which at most {DRIVES_MAX} find a PCI slot")
        if ram.size < MEMORY_MIN_MIB << 20:
            raise UsageError(f"SeaBIOS needs {MEMORY_MIN_MIB} MiB of guest memory", hint="--memory")
        self._ram, self._host, self._booting = ram, host, False
        self.image = image
        #: The firmware serves its calls itself; nothing is counted here.
        self.calls: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self._order: list[str] = []
        self._files: dict[str, Item] = {}
        self._functions: dict[tuple[int, int], pci.PciFunction] = self._board(ram)
        for slot, drive in enumerate(drives, FIRST_SLOT):
            self._attach(slot, drive)
        self.pci = pci.PciBus(self._functions, self._functions[1, 0], host.set_irq, host.stop)
        self.keyboard = keyboard
        self._typed = deque(keys)
        self.fw_cfg = FwCfg(ram, self._files | self._described(ram, image))
        devices: dict[str, PioHandler] = {
            "fw_cfg": self.fw_cfg,
            "pci configuration": self.pci,
            "pci devices": self.pci.window,
        }
        for name, device in devices.items():
            bus.claim_pio(*SEABIOS_PORTS[name], device, CORE)

    @staticmethod
    def _board(ram: ShadowedRam) -> dict[tuple[int, int], pci.PciFunction]:
        return {
            (0, 0): pci.HostBridge(ram.set_segment),
            (1, 0): pci.isa_bridge(),
            (1, 3): pci.power_function(SEABIOS_PORTS["pm events"][0]),
        }

    def _attach(self, slot: int, drive: Drive) -> None:
        """Put a drive where the firmware finds it: disks and CDs on PCI, a floppy as an image that it copies."""
        name = drive.name or f"drive{slot - FIRST_SLOT}"
        if drive.kind is DriveKind.FLOPPY:
            if any(each.startswith("floppyimg/") for each in self._files):
                raise UsageError("SeaBIOS takes one floppy image", field=name)
            self._files["floppyimg/a"] = Padded(drive.disk, floppy_format(drive.disk).geometry.total * SECTOR)
            self._order.append("/rom@floppyimg/a")
        elif drive.kind is DriveKind.CDROM:
            self._functions[slot, 0] = VirtioScsi(self._ram, drive.disk, go_on=self._host.go_on)
            self._order.append(f"/pci@i0cf8/scsi@{slot:x}/channel@0/disk@0,0")
        else:
            self._functions[slot, 0] = VirtioBlk(
                self._ram, drive.disk, read_only=drive.read_only, name=name, go_on=self._host.go_on
            )
            self._order.append(f"/pci@i0cf8/scsi@{slot:x}/disk@0,0")

    def _described(self, ram: ShadowedRam, image: FirmwareImage) -> dict[str, Item]:
        """Return the files by which the machine describes itself; names as QEMU's."""
        memory = b"".join(
            (first.to_bytes(8, "little") + length.to_bytes(8, "little") + E820_RAM.to_bytes(4, "little"))
            for first, length in ((0, ram.size),)
        )
        files: dict[str, Item] = {
            "bootorder": Fixed("\n".join((*self._order, "HALT")).encode() + b"\0"),
            "etc/boot-fail-wait": Fixed(_FAIL_WAIT_MS.to_bytes(4, "little")),
            "etc/e820": Fixed(memory),
            "etc/show-boot-menu": Fixed(bytes(2)),
        }
        if image.video:
            files["vgaroms/vgabios.bin"] = Fixed(image.video)
        return files

    def poll(self) -> None:
        """Type the next key when the guest took the one before; called between guest instructions."""
        if not self._typed or not self.keyboard.idle:
            return
        self._booting = self._booting or _BOOTING in self._host.debug
        if not self._booting:  # the firmware drops what is typed before
            return
        if self._ram.get(_BUFFER_HEAD, 2) == self._ram.get(_BUFFER_TAIL, 2):
            self.keyboard.type_codes(scan_codes(self._typed.popleft()))

    def why(self) -> str | None:
        """Return what the firmware said when it gave up, None when it did not."""
        return "the firmware found nothing to boot" if _NOTHING_BOOTS in self._host.debug[-256:] else None

    def state(self) -> State:
        """Return what the devices remember."""
        return {
            "pci": self.pci.state(),
            "fwCfg": self.fw_cfg.state(),
            "keys": "".join(self._typed),
            "booting": self._booting,
        }

    def set_state(self, state: State) -> None:
        """Remember that instead."""
        self.pci.set_state(part(state, "pci"))
        self.fw_cfg.set_state(part(state, "fwCfg"))
        self._booting = flag(state, "booting")
        keys = state.get("keys")
        self._typed = deque(keys if type(keys) is str else "")


def scan_codes(char: str) -> tuple[int, ...]:
    """Return what a keyboard sends when a key is pressed and released; nothing for what no key has."""
    code = key_code(char) >> 8
    if not code:
        return ()
    pressed = (code, code | 0x80)
    return (_SHIFT, *pressed, _SHIFT | 0x80) if char.isupper() or char in _SHIFTED else pressed
