"""Guests assembled from source, disks in memory, and the engines to run them on."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine, MachineResult
from vmgraft.vmmhost.core.probe import Engine, probe_kvm

sys.path.insert(0, str(Path(__file__).parent))  # the helper modules of this folder

from assembling import CORE_GUESTS, MemoryContent, booting, nasm  # of the folder above


@functools.cache
def _assemble(name: str) -> bytes:
    return nasm(CORE_GUESTS / f"{name}.asm")


@functools.cache
def _kvm() -> tuple[bool, str]:
    info = probe_kvm()
    return info.usable, info.reason


@pytest.fixture(params=[Engine.SOFT, pytest.param(Engine.KVM, marks=pytest.mark.kvm)], ids=["soft", "kvm"])
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.param
    if chosen is Engine.KVM and not _kvm()[0]:
        pytest.skip(f"KVM: {_kvm()[1]}")
    return chosen


@pytest.fixture
def kvm() -> Engine:
    if not _kvm()[0]:
        pytest.skip(f"KVM: {_kvm()[1]}")
    return Engine.KVM


@pytest.fixture
def content():
    """Give the class of in-memory guest contents."""
    return MemoryContent


@pytest.fixture
def guest():
    """Give ``guest(name, size)``: the content of a disk that boots an assembled guest."""

    def build(name: str, size: int = 1 << 20) -> MemoryContent:
        return booting(_assemble(name), size)

    return build


@pytest.fixture
def make_machine(guest):
    """Give ``make_machine(engine, name or content, **options)``: a machine that trusts its disk."""
    machines = []

    def build(engine: Engine, what, **options) -> Machine:
        reader = guest(what) if isinstance(what, str) else what
        options = {"timeout": 60, "memory_mib": 16} | options
        machine = Machine(engine, VerifiedDisk(reader, lambda _index, _block: True), **options)
        machines.append(machine)
        return machine

    yield build
    for machine in machines:
        machine.close()


@pytest.fixture
def run_guest(make_machine):
    """Give ``run_guest(engine, name or content, **options)``: the result of a run."""

    def run(engine: Engine, what, **options) -> MachineResult:
        return make_machine(engine, what, **options).run()

    return run
