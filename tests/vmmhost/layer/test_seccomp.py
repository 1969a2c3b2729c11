"""The assembled filters, run through an interpreter of classic BPF, on both machines' numbers."""

import mmap
import platform
import struct

import pytest

from vmgraft.vmmhost.layer import seccomp
from vmgraft.vmmhost.layer.seccomp import NUMBERS, RET_ALLOW, RET_EPERM, RET_KILL_PROCESS

ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def run(program, arch, number, args=()):
    data = struct.pack("<IIQ6Q", number, arch, 0, *args, *[0] * (6 - len(args)))
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at = accumulator = 0
    while True:
        opcode, yes, no, k = code[at]
        at += 1
        if opcode == 0x20:
            accumulator = struct.unpack_from("<I", data, k)[0]
        elif opcode == 0x06:
            return k
        else:
            test = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[opcode]
            at += yes if test else no


@pytest.mark.parametrize("machine", list(ARCHES))
def test_worker_filter(machine):
    column = list(ARCHES).index(machine)
    rules = seccomp.worker_rules(5)
    program = seccomp.allow_only(rules, RET_KILL_PROCESS, machine)

    def verdict(name, *args):
        return run(program, ARCHES[machine], NUMBERS[name][column], args)

    assert verdict("read", 5) == RET_ALLOW
    assert verdict("write", 6) == RET_KILL_PROCESS
    assert verdict("mmap", 0, 4096, mmap.PROT_READ | mmap.PROT_WRITE) == RET_ALLOW
    assert verdict("mmap", 0, 4096, mmap.PROT_READ | mmap.PROT_EXEC) == RET_KILL_PROCESS
    assert verdict("mprotect", 0, 4096, mmap.PROT_EXEC) == RET_KILL_PROCESS
    assert verdict("exit_group", 0) == RET_ALLOW
    allowed = {NUMBERS[name][column] for name in rules}
    for number in range(600):
        if number not in allowed:
            assert run(program, ARCHES[machine], number, (5,)) == RET_KILL_PROCESS
    other = next(arch for name, arch in ARCHES.items() if name != machine)
    assert run(program, other, NUMBERS["read"][column], (5,)) == RET_KILL_PROCESS


def test_the_x32_abi_is_no_way_around():
    program = seccomp.deny_only(seccomp.HOST_DENIED, machine="x86_64")
    assert run(program, ARCHES["x86_64"], 0x40000000 | NUMBERS["execve"][0]) == RET_KILL_PROCESS


@pytest.mark.parametrize("machine", list(ARCHES))
def test_host_filter(machine):
    column = list(ARCHES).index(machine)
    program = seccomp.deny_only(seccomp.HOST_DENIED, machine=machine)
    for name, numbers in NUMBERS.items():
        if numbers[column] >= 0:
            expected = RET_EPERM if name in seccomp.HOST_DENIED else RET_ALLOW
            assert run(program, ARCHES[machine], numbers[column]) == expected, name


def test_an_unknown_machine_has_no_filter(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not seccomp.supported()
    with pytest.raises(OSError, match="riscv64"):
        seccomp.allow_only(seccomp.worker_rules(3), RET_EPERM)
