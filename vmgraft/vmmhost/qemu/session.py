"""A run whose machine is an installed QEMU: verified content over NBD, extensions over virtio-serial, one audit log."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from socket import socket, socketpair
from typing import Any, Final

from vmgraft.errors import EngineUnavailableError, HostError, NotBootableError
from vmgraft.vmmhost.core.boot import BootSource
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.drives import Disk, DriveKind
from vmgraft.vmmhost.core.endsignals import end_signals
from vmgraft.vmmhost.core.geometry import FLOPPY_FORMATS, SECTOR, is_floppy
from vmgraft.vmmhost.core.probe import probe_kvm
from vmgraft.vmmhost.core.result import MachineResult
from vmgraft.vmmhost.layer.abi import Event
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.confine import confine_host, host_record, require_host_level
from vmgraft.vmmhost.layer.proxy import State
from vmgraft.vmmhost.layer.zygote import Zygote
from vmgraft.vmmhost.nbd.content import CheckedContent
from vmgraft.vmmhost.nbd.negotiation import NbdExport
from vmgraft.vmmhost.nbd.server import NbdLimits, NbdServer
from vmgraft.vmmhost.qemu.command import Direct, NbdDrive, QemuMachine
from vmgraft.vmmhost.qemu.guestapi import GuestApi
from vmgraft.vmmhost.qemu.loop import Guest, Loop
from vmgraft.vmmhost.qemu.memfd import sealed
from vmgraft.vmmhost.qemu.process import QemuProcess, find_qemu
from vmgraft.vmmhost.qemu.qmp import Qmp
from vmgraft.vmmhost.qemu.screen import lines_of
from vmgraft.vmmhost.qemu.watch import SerialPort
from vmgraft.vmmhost.setup import LayerLog, Setup
from vmgraft.vmmhost.supplements.media import CD_SECTOR
from vmgraft.vmmhost.supplements.present import Presented
from vmgraft.vmmhost.supplements.wire import present_plan

#: Name of the boot disk's export.
BOOT_EXPORT: Final = "disk"
#: Time for QEMU to load, connect to its disks and greet.
_START_SECONDS: Final = 60.0


class _NoMemory:
    """Guest memory is QEMU's own; no extension has a window here, and this is what one would find."""

    def read(self, gpa: int, length: int) -> bytes:
        raise ValueError("guest memory is not shared with extensions here")

    def write(self, gpa: int, data: bytes) -> None:
        raise ValueError("guest memory is not shared with extensions here")


class QemuSession:
    """Carries out a plan with QEMU (``session.Session``), whose claims and options were checked (``claims``).

    Args:
        setup: What was decided.
        stack: Gets everything that must be closed.
    """

    def __init__(self, setup: Setup, stack: ExitStack) -> None:
        self._setup, self._stack = setup, stack
        self._logging = threading.Lock()
        self._layer = LayerLog(self._write)
        self._loop = Loop(setup.options.timeout, setup.options.until, setup.console)

    def run(self) -> None:
        """Start the layer and QEMU, remember, boot, and fill in the report.

        Raises:
            CapabilityError: an extension imports what it was not granted.
            EngineUnavailableError: QEMU is not installed, or KVM was asked for and does not work.
            HostError: QEMU or a worker does not start.
            GraftFormatError: a module is malformed.
            RollbackError: a newer version got ready in the meantime.
        """
        setup, stack = self._setup, self._stack
        find_qemu()
        # Before anything is opened that a worker has no business with.
        zygote = stack.enter_context(Zygote.start()) if setup.specs else None
        kvm, why = choose_kvm(setup.options.cpu)
        content = CheckedContent(setup.image, setup.tree)
        presented = self._present(content)
        host = self._start_layer(zygote)
        guest = self._start_qemu(kvm, presented)
        if guest.api is not None:
            for proxy in host.proxies:
                for numbers in proxy.spec.hypercalls:
                    guest.api.claim_hypercall(numbers.first, numbers.last, proxy, proxy.spec.id)
        setup.remember({proxy.spec.id for proxy in host.proxies if proxy.state is State.RUNNING})
        self._boot(guest, host, {"engine": _engine(kvm), "emulated": not kvm, "why": why})
        setup.report.result = self._result(guest, content, kvm, why)

    def _present(self, content: CheckedContent) -> Presented:
        """Add what extensions put over the disk and beside it."""
        setup = self._setup
        return present_plan(setup.plan, setup.report.verification.statement, content, self._write)

    def _start_layer(self, zygote: Zygote | None) -> ExtensionHost:
        """Take every extension to its ready mark, before there is a QEMU."""
        host = ExtensionHost(
            self._setup.specs,
            memory=_NoMemory(),
            audit=self._layer.write,
            stop=lambda detail: self._loop.stop(self._layer.stop_reason(), detail),
            clock=self._loop.now_ns,
            time_left=self._loop.time_left,
            deterministic_seed=self._setup.options.seed,
            zygote=zygote,
            min_isolation=self._setup.options.require_isolation,
        )
        self._stack.callback(host.close)
        host.start()
        return host

    def _start_qemu(self, kvm: bool, presented: Presented) -> Guest:
        """Start QEMU; it stands still, and waits for its disks, which are served once this process is confined."""
        setup, stack = self._setup, self._stack
        kind = medium_of(setup.plan.boot, presented.disk)
        exports = [NbdExport(BOOT_EXPORT, presented.disk, read_only=kind is DriveKind.CDROM)]
        exports += [
            NbdExport(f"volume{number}", drive.disk, read_only=drive.read_only, description=drive.name)
            for number, drive in enumerate(presented.drives)
        ]
        server = stack.enter_context(NbdServer(exports, audit=self._write, limits=NbdLimits(len(exports))))
        with ExitStack() as theirs:  # descriptors that only QEMU keeps
            drives = []
            for number, export in enumerate(exports):
                fd = self._pair(theirs, server.attach)
                first = number == 0
                shown = kind if first else DriveKind.HARD_DISK
                drives.append(NbdDrive(fd, export.name, shown, export.read_only, boot=first))
            ours: list[socket] = []
            qmp_fd, serial_fd = self._pair(theirs, ours.append), self._pair(theirs, ours.append)
            api_fd = self._pair(theirs, ours.append) if any(spec.hypercalls for spec in setup.specs) else None
            qmp, serial, api = self._wrap(ours)
            direct = self._direct(theirs, presented)
            machine = QemuMachine(kvm, setup.plan.memory_mib, qmp_fd, serial_fd, api_fd, tuple(drives), direct)
            process = stack.enter_context(QemuProcess(machine))
        return Guest(process, qmp, serial, api, server)

    def _wrap(self, ours: list[socket]) -> tuple[Qmp, SerialPort, GuestApi | None]:
        """Put our ends of the sockets into the hands that serve them."""
        qmp, serial = Qmp(ours[0]), SerialPort(ours[1], self._setup.serial, self._setup.options.until)
        api = GuestApi(ours[2], self._loop.over) if len(ours) > 2 else None
        self._stack.callback(qmp.close)
        self._stack.callback(serial.close)
        if api is not None:
            self._stack.callback(api.close)
        return qmp, serial, api

    @staticmethod
    def _pair(theirs: ExitStack, keep: Callable[[socket], None]) -> int:
        """Make a pair of connected sockets; keep one, and return the descriptor of the other."""
        our_end, their_end = socketpair()
        theirs.callback(their_end.close)
        keep(our_end)
        return their_end.fileno()

    def _direct(self, theirs: ExitStack, presented: Presented) -> Direct | None:
        files = self._setup.plan.direct
        if files is None:
            return None
        initrd = presented.with_initrd(files.initrd)
        fds = [sealed("vmgraft-kernel", files.kernel), *([sealed("vmgraft-initrd", initrd)] if initrd else [])]
        for fd in fds:
            theirs.callback(os.close, fd)
        return Direct(fds[0], fds[1] if initrd else None, files.append)

    def _boot(self, guest: Guest, host: ExtensionHost, engine: dict[str, Any]) -> None:
        setup, loop = self._setup, self._loop
        if setup.confine:
            setup.report.confinement = confine_host()
        require_host_level(setup.report.confinement, setup.options.require_isolation)
        guest.server.start()
        version = self._greet(guest)
        guest.process.read_messages()
        engine |= {"qemu": version, "qemuConfinement": guest.process.mechanisms()}
        engine |= host_record(setup.report.confinement)
        with end_signals(loop.stop):
            self._write("boot", engine)
            host.event(Event.BOOT)
            loop.start()
            guest.qmp.execute("cont")
            loop.run(guest, host.tick if setup.specs else None)
            loop.finish(guest)
        host.event(Event.RESET if loop.reason is EndReason.RESET else Event.SHUTDOWN)
        setup.report.extensions = host.summary()
        setup.report.cells = loop.cells

    def _greet(self, guest: Guest) -> str:
        try:
            return guest.qmp.start(_START_SECONDS)
        except HostError as error:
            guest.process.wait(1.0)
            said = guest.process.complaint()
            raise HostError(f"QEMU does not start: {said or error.message}") from error

    def _result(self, guest: Guest, content: CheckedContent, kvm: bool, why: str) -> MachineResult:
        loop, api = self._loop, guest.api
        guest.server.close()  # so that its last records stand before the end
        exits = {"nbd": guest.server.counters.requests}
        if api is not None:
            exits |= {"api": api.calls, "api-malformed": api.malformed}
        return MachineResult(
            reason=loop.reason or EndReason.ERROR, detail=loop.detail, engine=_engine(kvm), emulated=not kvm,
            wall_seconds=loop.now_ns() / 1e9, virtual_ns=loop.now_ns(), exits=exits, bios_calls={}, unknown_calls={},
            screen=tuple(lines_of(loop.cells)), serial=bytes(guest.serial.kept), debug=b"", trace=(), trace_dropped=0,
            blocks_checked=content.blocks_checked, blocks_written=content.blocks_written, until_seen=loop.until_seen,
            why=why,
        )  # fmt: skip

    def _write(self, event: str, detail: dict[str, Any]) -> None:
        """Write to the audit log, which NBD's threads do too."""
        with self._logging:
            self._setup.log.write(event, detail)


def choose_kvm(cpu: str) -> tuple[bool, str]:
    """Return whether QEMU is to use KVM, and why; ``auto`` takes it where it runs guest code on the hardware.

    Args:
        cpu: ``auto``, ``kvm`` or ``soft``.

    Raises:
        EngineUnavailableError: KVM was asked for and does not work.
    """
    if cpu == "soft":
        return False, "TCG was asked for"
    found = probe_kvm()
    if cpu == "kvm" and not found.usable:
        raise EngineUnavailableError(f"KVM does not work: {found.reason}", hint="--cpu auto takes TCG then")
    if cpu == "kvm":
        return True, f"KVM was asked for: {found.reason}"
    return bool(found.usable and not found.emulated), f"KVM: {found.reason}"


def medium_of(boot: str, disk: Disk) -> DriveKind:
    """Return what the image is shown as: what was asked for, or what it looks like.

    Args:
        boot: ``auto``, ``disk``, ``cdrom`` or ``floppy``.
        disk: What the guest is to see.

    Raises:
        NotBootableError: it is to be a floppy, and has not the size of one.
        ContentMismatchError, FileError: what reading raises.
    """
    if boot == BootSource.FLOPPY and disk.size not in {each.geometry.total * SECTOR for each in FLOPPY_FORMATS}:
        message = f"an image of {disk.size} bytes is no floppy"
        raise NotBootableError(message, field="size", hint="QEMU knows floppies of 160 KB to 2.88 MB by their size")
    if boot == BootSource.AUTO and disk.sector_size == CD_SECTOR:
        return DriveKind.CDROM
    if boot == BootSource.AUTO and is_floppy(disk):
        return DriveKind.FLOPPY
    return {BootSource.CDROM: DriveKind.CDROM, BootSource.FLOPPY: DriveKind.FLOPPY}.get(
        BootSource(boot), DriveKind.HARD_DISK
    )


def _engine(kvm: bool) -> str:
    return "qemu-kvm" if kvm else "qemu-tcg"
