"""The command line of QEMU: which machine a guest gets. Pure: what goes in are descriptors and sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from vmgraft.vmmhost.core.drives import DriveKind

#: Name of the virtio-serial port that extensions answer on.
API_PORT: Final = "org.vmgraft.0"
#: What QEMU may not do once it runs (qemu(1), -sandbox): old system calls, gain rights, start programs, set priorities.
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
#: Q35's predecessor: every guest and firmware knows it. Nothing of it that a server does not need.
_MACHINE: Final = "pc,usb=off,vmport=off"
_DEVICES: Final = {DriveKind.HARD_DISK: "virtio-blk-pci", DriveKind.CDROM: "ide-cd", DriveKind.FLOPPY: "floppy"}


@dataclass(frozen=True, slots=True)
class NbdDrive:
    """One drive: a connected NBD socket and what the guest sees of it.

    Attributes:
        fd: Descriptor of the connection, in QEMU.
        export: Name of the export, also the node's name.
        kind: A CD drive on IDE, a floppy in the first drive, or a virtio disk.
        read_only: Whether the guest can write.
        boot: Whether the firmware starts from it.
    """

    fd: int
    export: str
    kind: DriveKind = DriveKind.HARD_DISK
    read_only: bool = True
    boot: bool = False


@dataclass(frozen=True, slots=True)
class Direct:
    """A kernel that is started without the firmware's boot; all descriptors are sealed memory."""

    kernel_fd: int
    initrd_fd: int | None
    append: str


@dataclass(frozen=True, slots=True)
class QemuMachine:
    """Everything that the command line says.

    Attributes:
        kvm: Hardware virtualization; else TCG.
        memory_mib: Guest RAM.
        qmp_fd, serial_fd: Connected stream sockets for control and for the first serial port.
        api_fd: Likewise for the extensions' port, or None for a machine without it.
        drives: In the order in which the guest finds them.
        direct: A kernel to start.
    """

    kvm: bool
    memory_mib: int
    qmp_fd: int
    serial_fd: int
    api_fd: int | None
    drives: tuple[NbdDrive, ...]
    direct: Direct | None = None

    def arguments(self) -> list[str]:
        """Return the arguments behind the program's name.

        The guest stands still until it is told to go on, and again at its end, so that a last look at it is possible.
        """
        arguments = [
            "-nodefaults", "-no-user-config", "-display", "none", "-sandbox", _SANDBOX,
            "-S", "-no-reboot", "-no-shutdown",
            "-machine", _MACHINE, "-accel", "kvm" if self.kvm else "tcg", "-cpu", "host" if self.kvm else "max",
            "-smp", "1", "-m", f"{self.memory_mib}M", "-vga", "std",
            "-chardev", f"socket,id=qmp,fd={self.qmp_fd}", "-mon", "chardev=qmp,mode=control",
            "-chardev", f"socket,id=serial0,fd={self.serial_fd}", "-serial", "chardev:serial0",
        ]  # fmt: skip
        for number, drive in enumerate(self.drives):
            arguments += _drive(number, drive)
        if self.api_fd is not None:
            arguments += [
                "-device", "virtio-serial-pci,max_ports=2", "-chardev", f"socket,id=api,fd={self.api_fd}",
                "-device", f"virtserialport,chardev=api,name={API_PORT}",
            ]  # fmt: skip
        return arguments + _direct(self.direct)

    def fds(self) -> Sequence[int]:
        """Return every descriptor that QEMU must inherit."""
        direct = self.direct
        found = [self.qmp_fd, self.serial_fd, *(drive.fd for drive in self.drives)]
        found += [] if self.api_fd is None else [self.api_fd]
        found += [] if direct is None else [direct.kernel_fd]
        found += [] if direct is None or direct.initrd_fd is None else [direct.initrd_fd]
        return found


def _drive(number: int, drive: NbdDrive) -> list[str]:
    node = f"drive{number}"
    # JSON, so that no name of ours can be taken for another option.
    blockdev: dict[str, Any] = {
        "driver": "nbd", "node-name": node, "export": drive.export, "read-only": drive.read_only,
        "server": {"type": "fd", "str": str(drive.fd)},
    }  # fmt: skip
    device = {"driver": _DEVICES[drive.kind], "drive": node, "id": f"guest-{node}"}
    more: list[str] = []
    if drive.kind is not DriveKind.FLOPPY:  # which has neither; it reports errors anyway
        # A block that fails its check is an I/O error in the guest; the host ends the run.
        device |= {"rerror": "report", "werror": "report"}
        if drive.boot:
            device["bootindex"] = "1"  # 0 is taken by a kernel that is started directly
    elif drive.boot:
        more = ["-boot", "order=a"]
    shown = ",".join(f"{key}={value}" for key, value in device.items())
    return [*more, "-blockdev", json.dumps(blockdev), "-device", shown]


def _direct(direct: Direct | None) -> list[str]:
    if direct is None:
        return []
    arguments = ["-kernel", f"/dev/fd/{direct.kernel_fd}"]
    if direct.initrd_fd is not None:
        arguments += ["-initrd", f"/dev/fd/{direct.initrd_fd}"]
    return [*arguments, "-append", direct.append] if direct.append else arguments
