"""The assembled filters, run through an interpreter of classic BPF, on both machines' numbers."""

import hashlib
import mmap
import platform
import re
import struct
from pathlib import Path

import pytest

from vmgraft.vmmhost.layer import callnumbers, filters, seccomp
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
        elif opcode == 0x54:
            accumulator &= k
        elif opcode == 0x06:
            return k
        else:
            test = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: bool(accumulator & k)}[opcode]
            at += yes if test else no


@pytest.mark.parametrize("machine", list(ARCHES))
def test_worker_filter(machine):
    column = list(ARCHES).index(machine)
    rules = filters.worker_rules(5)
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
    program = seccomp.deny_only(filters.HOST_DENIED, machine="x86_64")
    assert run(program, ARCHES["x86_64"], 0x40000000 | NUMBERS["execve"][0]) == RET_KILL_PROCESS


@pytest.mark.parametrize("machine", list(ARCHES))
def test_the_hosts_list_of_what_it_never_needs(machine):
    column = list(ARCHES).index(machine)
    program = seccomp.deny_only(filters.HOST_DENIED, machine=machine)
    for name, numbers in NUMBERS.items():
        if numbers[column] >= 0:
            expected = RET_EPERM if name in filters.HOST_DENIED else RET_ALLOW
            assert run(program, ARCHES[machine], numbers[column]) == expected, name


def test_an_unknown_machine_has_no_filter(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not seccomp.supported()
    with pytest.raises(OSError, match="riscv64"):
        seccomp.allow_only(filters.worker_rules(3), RET_EPERM)


@pytest.mark.parametrize("machine", list(ARCHES))
def test_the_hosts_allow_list(machine):
    column = list(ARCHES).index(machine)
    program = filters.host_program(machine)
    enosys = 0x50000 | 38

    def verdict(name, *args):
        return run(program, ARCHES[machine], NUMBERS[name][column], args)

    refused = {**callnumbers.REFUSED, **callnumbers.REFUSED_TOO}
    rules = filters.host_rules()
    for name, numbers in NUMBERS.items():
        if numbers[column] < 0:
            continue
        if name in refused or rules.get(name):
            assert verdict(name, 0xFFFF_FFFF & ~0x10000, 0x5412) == RET_EPERM, name
        else:
            assert verdict(name) == (RET_ALLOW if name in rules else enosys), name
    known = {numbers[column] for numbers in NUMBERS.values()}
    assert all(run(program, ARCHES[machine], number) == enosys for number in range(600) if number not in known)
    assert verdict("ioctl", 5, 0xAE80) == RET_ALLOW  # KVM_RUN
    assert verdict("ioctl", 0, 0x5413) == RET_ALLOW
    assert verdict("ioctl", 0, 0x5412) == RET_EPERM  # TIOCSTI
    assert verdict("clone", 0x3D0F00) == RET_ALLOW  # what glibc makes a thread with
    assert verdict("clone", 17) == RET_EPERM  # what it forks with
    assert verdict("socketpair", 1) == RET_ALLOW
    assert verdict("socketpair", 2) == RET_EPERM
    assert verdict("prctl", 15) == RET_ALLOW
    assert verdict("prctl", 4, 1) == RET_EPERM


def test_what_is_refused_is_nowhere_allowed():
    allowed = {*callnumbers.HOST, *callnumbers.WORKER}
    assert not allowed & {*callnumbers.REFUSED, *callnumbers.REFUSED_TOO}
    assert set(callnumbers.WORKER) <= {*callnumbers.HOST}


@pytest.mark.parametrize(
    ("machine", "header", "prefix"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "__NR_"),
     ("aarch64", "/usr/include/asm-generic/unistd.h", "__NR_|__NR3264_")],
)  # fmt: skip
def test_the_numbers_are_the_kernels(machine, header, prefix):
    """The generic header calls two of them by the names that 32-bit machines have."""
    found = re.findall(rf"^#define (?:{prefix})(\w+)\s+(\d+)", Path(header).read_text(), re.MULTILINE)
    kernel = {name: int(number) for name, number in found}
    for name, numbers in NUMBERS.items():
        assert numbers[list(ARCHES).index(machine)] == kernel.get(
            name, kernel.get("fstatat" if name == "newfstatat" else name, -1)
        ), name


def test_filters_are_the_same_for_every_worker():
    assert filters.worker_program("x86_64") == filters.worker_program("x86_64")
    described = filters.described()
    if described["worker"] is None:
        pytest.skip("this machine's numbers are not known")
    assert described["worker"]["sha256"] == hashlib.sha256(filters.worker_program()).hexdigest()
    assert described["worker"]["arch"] == platform.machine()
    assert described["worker"]["sha256"] != described["host"]["sha256"]
    assert "read: on its socket" in described["worker"]["allowed"]


@pytest.mark.parametrize(("mark", "rules"), [("worker", filters.worker_rules(3)), ("host", filters.host_rules())])
def test_the_documentation_lists_what_is_allowed(mark, rules):
    text = (Path(__file__).parents[3] / "docs" / "sandbox.md").read_text()
    block = text.split(f"<!-- {mark} -->\n```\n")[1].split("\n```\n<!-- end -->")[0]
    assert block.splitlines() == list(filters.listing(rules))
