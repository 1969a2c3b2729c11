"""What a guest's port access costs when the core answers it, against a loop that does nothing but KVM_RUN."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
import time
from ctypes import addressof, c_char

from _measure import Bench

from vmgraft.vmmhost.core import kvm_abi as abi
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.kvm import Kvm
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine, probe_kvm

#: Accesses in a round.
ACCESSES = 100_000
#: mov dx, PORT / mov ecx, ACCESSES / in al, dx or out dx, al / dec ecx / jnz back / cli / hlt; 16-bit code.
CODE = "ba{port}66b9{count}{access}664975fbfaf4"
BOOT = 0x7C00
#: A port of the core: what the CRTC's cursor register holds.
PORT = 0x3D5


def code(access: str, port_number: int = PORT, accesses: int = ACCESSES) -> bytes:
    port, count = struct.pack("<H", port_number).hex(), struct.pack("<I", accesses).hex()
    return bytes.fromhex(CODE.format(port=port, count=count, access=access))


class Content:
    sector_size = 512

    def __init__(self, data: bytes) -> None:
        self.data, self.virtual_size = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def disk_of(program: bytes) -> VerifiedDisk:
    """Return a disk that boots the program."""
    content = Content(program.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 16))
    return VerifiedDisk(content, lambda _index, _block: True)


def bare(program: bytes, accesses: int = ACCESSES) -> None:
    """Run the guest by KVM_RUN alone: the value of the port is whatever lies in the run area."""
    memory = mmap.mmap(-1, 1 << 16)
    memory[BOOT : BOOT + len(program)] = program
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.place_helpers(0xFFFBD000, 0xFFFBC000)
        vm.set_memory(0, 0, len(memory), addressof(c_char.from_buffer(memory)))
        with vm.create_vcpu() as vcpu:
            sregs = vcpu.get_sregs()
            struct.pack_into("<QIH", sregs, 0, 0, 0xFFFF, 0)
            vcpu.set_sregs(sregs)
            vcpu.set_regs(rip=BOOT, rsp=0x800, rflags=2)
            fd, ioctl, run = vcpu.fd, fcntl.ioctl, abi.KVM_RUN
            for _ in range(accesses):
                ioctl(fd, run, 0)
    memory.close()


def core(program: bytes, engine: Engine = Engine.KVM) -> None:
    """Run the guest on the machine, which boots it as a disk."""
    with Machine(engine, disk_of(program), memory_mib=2) as machine:
        result = machine.run()
    if result.exits["pio"] < ACCESSES:
        raise SystemExit(f"the guest ended early: {result.reason}, {result.detail}")


def main() -> None:
    bench = Bench("exits", "port accesses answered by the core and by nobody")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    kvm = probe_kvm()
    for name, access in (("IN", "ec"), ("OUT", "ee")):
        program = code(access)
        if not kvm.usable:
            print(f"no comparison: {kvm.reason}", file=sys.stderr)
            began = time.perf_counter()
            core(program, Engine.SOFT)
            bench.fact(f"{name}, core, soft CPU", (time.perf_counter() - began) / ACCESSES * 1e6, "microseconds")
            continue
        title = f"{ACCESSES} times {name}"
        medians = bench.compare(title, {"bare KVM_RUN": lambda p=program: bare(p), "core": lambda p=program: core(p)})  # type: ignore[misc]
        for peer, median in medians.items():
            bench.fact(f"{name}, {peer}", median / ACCESSES * 1e6, "microseconds")
    bench.end()


if __name__ == "__main__":
    main()
