"""What no extension can reach: the core's code, ports, memory and lines, under either firmware."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import CapabilityError
from vmgraft.vmmhost import core, report
from vmgraft.vmmhost.core.bus import CORE, CORE_IRQS, DOORBELL_PORT, HYPERCALL_MAX, IRQCHIP_PORTS, MMIO_END, Bus
from vmgraft.vmmhost.core.claims import Reserved
from vmgraft.vmmhost.core.kvmcpu import IDENTITY_MAP_ADDRESS, TSS_ADDRESS
from vmgraft.vmmhost.core.memory import HIGH_BASE, LOW_END, MIB, ROM_BASE, GuestRam
from vmgraft.vmmhost.core.portmap import SEABIOS_IRQS, FirmwareKind, planning_bus, ports
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.core.shadow import FLASH_SIZE, PCI_HOLE, ShadowedRam

FIRMWARE = pytest.mark.parametrize("firmware", list(FirmwareKind), ids=[kind.value for kind in FirmwareKind])
CORE_FOLDER = Path(str(core.__file__)).parent

_IMPORT_ALL = """
import importlib, pkgutil, sys
import vmgraft.vmmhost.core as core
for module in pkgutil.walk_packages(core.__path__, core.__name__ + "."):
    importlib.import_module(module.name)
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("vmgraft", "wasmtime", "construct", "pycdlib")))
"""


def test_the_core_loads_nothing_but_itself():
    """All its modules, imported in a process of their own, bring along the error families and nothing else."""
    output = subprocess.run([sys.executable, "-c", _IMPORT_ALL], check=True, capture_output=True, text=True).stdout
    loaded = set(output.split())
    modules = {name for name in loaded if name.startswith("vmgraft.vmmhost.core.")}
    assert loaded - modules == {"vmgraft", "vmgraft.errors", "vmgraft.vmmhost", "vmgraft.vmmhost.core"}
    files = {path for path in CORE_FOLDER.rglob("*.py") if path.name != "__init__.py"}
    assert {name.rsplit(".", 1)[1] for name in modules} >= {path.stem for path in files}


def test_the_core_digest_covers_every_file(tmp_path, monkeypatch):
    host = tmp_path / "vmmhost"
    for folder in ("core", "data"):
        ignore = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(CORE_FOLDER.parent / folder, host / folder, ignore=ignore)
    original = report.core_digest()
    monkeypatch.setattr(report.resources, "files", lambda _package: host)
    assert report.core_digest() == original
    files = [path for path in host.rglob("*") if path.is_file() and path.suffix != ".asm"]
    assert {path.suffix for path in files} == {".py", ".bin"}
    assert {"trapbios.bin", "vgafont.bin", "machine.py", "fwcfg.py", "entry.py"} <= {path.name for path in files}
    seen = {original}
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content + b"\n")
        seen.add(report.core_digest())
        path.write_bytes(content)
    (host / "core" / "another.py").write_bytes(b"")
    seen.add(report.core_digest())
    assert len(seen) == len(files) + 2


# --- claims ----------------------------------------------------------------------------------------------------------


class Nothing:
    def mmio_read(self, offset, size):
        return 0

    def mmio_write(self, offset, size, value):
        pass

    def hypercall(self, number, args):
        return 0


def core_ports(firmware: FirmwareKind) -> set[int]:
    """Everything that devices answer to, as the tables and the documentation tell, and not as the bus does."""
    ranges = [*ports(firmware).values(), *IRQCHIP_PORTS, (DOORBELL_PORT, DOORBELL_PORT + 3)]
    return {port for first, last in ranges for port in range(first, last + 1)}


def refused(claim, *arguments) -> bool:
    try:
        claim(*arguments)
    except CapabilityError as error:
        assert error.field
        return True
    return False


@FIRMWARE
def test_each_single_port_is_the_cores_or_free(firmware):
    bus, taken = planning_bus(16 * MIB, firmware), set()
    for port in range(0x10000):
        if refused(bus.claim_pio, port, port, Reserved(), "a"):
            taken.add(port)
        else:
            bus.release("a")
    assert taken == core_ports(firmware)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(FirmwareKind)),
    st.lists(st.tuples(st.integers(-2, 0x10002), st.one_of(st.integers(-1, 40), st.integers(0, 0x10000))), max_size=12),
)
def test_no_range_of_ports_covers_one_of_the_cores(firmware, ranges):
    bus, held = planning_bus(16 * MIB, firmware), core_ports(firmware)
    for first, length in ranges:
        if not refused(bus.claim_pio, first, first + length, Reserved(), "a"):
            assert held.isdisjoint(range(first, first + length + 1))


def forbidden_memory(firmware: FirmwareKind, mib: int) -> Iterator[range]:
    """Where memory is, is emulated by the kernel, or may come to be when the guest moves a PCI region."""
    made = ShadowedRam(mib, rom=bytes(FLASH_SIZE)) if firmware is FirmwareKind.SEABIOS else GuestRam(mib)
    yield from (range(span.gpa, span.gpa + span.size) for span in made.spans())
    made.close()
    yield range(0xFEC00000, 0xFEC01000)  # I/O APIC
    yield range(0xFEE00000, 0xFEE01000)  # local APIC
    yield range(TSS_ADDRESS, TSS_ADDRESS + 0x3000)
    yield range(IDENTITY_MAP_ADDRESS, IDENTITY_MAP_ADDRESS + 0x1000)
    yield range(0xFFFC0000, 1 << 32)  # firmware
    if firmware is FirmwareKind.SEABIOS:
        yield range(LOW_END, HIGH_BASE)  # all PAM segments, whatever they say
        yield range(*PCI_HOLE)


EDGES = st.sampled_from(
    (
        0,
        655360,
        LOW_END,
        ROM_BASE,
        HIGH_BASE,
        16 * MIB,
        3072 * MIB,
        *PCI_HOLE,
        4275044352,
        4276092928,
        4277141504,
        IDENTITY_MAP_ADDRESS,
        TSS_ADDRESS,
        4294705152,
        MMIO_END,
    )
)
ADDRESS = st.one_of(
    st.integers(0, MMIO_END + 1), st.tuples(EDGES, st.integers(-0x1001, 0x1001)).map(lambda pair: pair[0] + pair[1])
)
SIZE = st.one_of(st.integers(-1, 0x2000), st.sampled_from((1 << 20, 1 << 28, 1 << 31, 1 << 32, 1 << 64)))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(list(FirmwareKind)), st.sampled_from((2, 16, 3072)), st.lists(st.tuples(ADDRESS, SIZE), max_size=9)
)
def test_no_range_of_memory_covers_the_cores(firmware, mib, claims):
    bus, forbidden = planning_bus(mib * MIB, firmware), tuple(forbidden_memory(firmware, mib))
    accepted: list[range] = []
    for base, size in claims:
        if refused(bus.claim_mmio, base, size, Nothing(), "a"):
            continue
        taken = range(base, base + size)
        assert size > 0
        assert 0 <= taken.start < taken.stop <= MMIO_END
        for other in (*forbidden, *accepted):
            assert taken.stop <= other.start or other.stop <= taken.start, (taken, other)
        accepted.append(taken)


@FIRMWARE
def test_free_memory_can_be_claimed(firmware):
    """The other side of it: what is documented as free is."""
    free = [(16 * MIB, 0x7FFFFFFF)]
    if firmware is FirmwareKind.TRAP:
        free = [(LOW_END, ROM_BASE - 1), (16 * MIB, 0xFEBFFFFF), (0xFED00000, 0xFEDFFFFF), (0xFEF00000, 0xFFFBBFFF)]
    bus = planning_bus(16 * MIB, firmware)
    for first, last in free:
        bus.claim_mmio(first, last + 1 - first, Nothing(), "a")


@FIRMWARE
def test_interrupt_lines_of_the_core(firmware):
    bus = planning_bus(16 * MIB, firmware)
    held = {*CORE_IRQS, *(SEABIOS_IRQS if firmware is FirmwareKind.SEABIOS else ())}
    taken = {line for line in range(-1, 18) if refused(bus.claim_irq, line, "a")}
    assert taken == {-1, 16, 17} | held


def test_hypercalls_of_the_core():
    for first, last, free in ((0, 0, False), (15, 16, False), (0, HYPERCALL_MAX, False), (16, HYPERCALL_MAX, True)):
        assert refused(Bus(MIB).claim_hypercall, first, last, Nothing(), "a") is not free


@FIRMWARE
def test_a_machine_refuses_what_the_plan_refused(make_machine, firmware):
    machine, planned = make_machine(Engine.SOFT, "halt", firmware=firmware), planning_bus(16 * MIB, firmware)
    for base in (
        0xC0000,
        0xE0000,
        0xEF000,
        ROM_BASE,
        15 * MIB,
        16 * MIB,
        *PCI_HOLE,
        0xFEBFF000,
        0xFED00000,
        0xFFFBB000,
    ):
        verdicts = {refused(bus.claim_mmio, base, 0x1000, Nothing(), "a") for bus in (machine.bus, planned)}
        assert len(verdicts) == 1, hex(base)
    for line in range(16):
        assert refused(machine.bus.claim_irq, line, "a") is refused(planned.claim_irq, line, "a")
    with pytest.raises(ValueError, match="core keeps"):
        machine.bus.release(CORE)
