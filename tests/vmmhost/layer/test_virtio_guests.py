"""Virtio devices from modules, driven by small guests on both engines."""

import hashlib
import tomllib

import pytest
from assembling import GUESTS, booting, nasm

from vmgraft.signing.contract import VerifiedExtension
from vmgraft.signing.manifest import manifest_from
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.plan import check_claims, to_spec


def assemble(name):
    return nasm(GUESTS / f"{name}.asm")


@pytest.fixture
def example(examples):
    """Give ``example(name)``: an example as the layer is told of it once verified and granted whole."""

    def load(name):
        folder = examples / name
        document = tomllib.loads((folder / "manifest.toml").read_text())
        manifest = manifest_from(document)
        module = (folder / "module.wasm").read_bytes()
        return to_spec(
            VerifiedExtension(
                manifest.id, manifest.version, document, module, hashlib.sha256(module).hexdigest(),
                tuple(document["capabilities"]), manifest.limits, manifest.on_fault,
            )
        )  # fmt: skip

    return load


@pytest.fixture
def run(bench):
    """Run a guest with extensions; give the result, and the machine's memory at its end."""

    def go(cpu, sector, *specs, options=None, during=None):
        seen = bytearray()

        def serial(data):
            seen.extend(data)
            if during is not None:
                during(machine, host, bytes(seen))

        disk = VerifiedDisk(booting(sector), lambda _index, _data: True)
        check_claims(specs, 16)
        with Machine(Engine(cpu), disk, memory_mib=16, timeout=20, serial=serial, rtc_epoch=0) as machine:
            bench.ram = machine.memory
            host = bench.host(*specs, **(options or {}))
            host.claim(machine.bus)
            machine.add_tick(host.tick)
            try:
                return machine.run()
            finally:
                host.close()

    return go


@pytest.mark.parametrize("mapped", [True, False])
def test_the_entropy_device_fills_buffers(run, bench, example, cpu, mapped):
    options = {"deterministic_seed": b"seed", "map_windows": mapped}
    result = run(cpu, assemble("virtiorng"), example("virtiorng"), options=options)
    assert bench.records("fault") == []
    assert result.reason is EndReason.SHUTDOWN
    assert result.serial[0] == len(result.serial) - 1 == 48
    assert len(set(result.serial[1:])) > 24
    again = run(cpu, assemble("virtiorng"), example("virtiorng"), options={**options, "map_windows": not mapped})
    assert again.serial == result.serial  # the same stream, whichever way it came


def test_the_console_takes_lines_and_answers(run, bench, example, cpu):
    result = run(cpu, assemble("virtioconsole"), example("virtioconsole"))
    assert bench.records("fault") == []
    assert result.reason is EndReason.SHUTDOWN
    assert result.serial.decode() == "hello, guest\n10 bytes\n10 bytes\n"
    assert [record["text"] for record in bench.records("log")] == ["first line", "the second"]


def test_both_devices_at_once(run, bench, example):
    result = run("soft", assemble("virtioconsole"), example("virtiorng"), example("virtioconsole"))
    assert bench.records("fault") == []
    assert result.serial.decode() == "hello, guest\n10 bytes\n10 bytes\n"


def test_a_console_that_is_replaced_goes_on(run, bench, example):
    """Registers and queues, and what waits in them, go over to the successor."""
    replaced = []

    def during(machine, host, seen):
        if seen == b"hello, guest\n" and not replaced:
            replaced.append(True)
            machine.at_rest(lambda: host.replace(example("virtioconsole")))

    result = run("soft", assemble("virtioconsole"), example("virtioconsole"), during=during)
    assert replaced
    assert bench.records("fault") == []
    assert [record["action"] for record in bench.records("extension-change")] == ["replace"]
    assert result.serial.decode() == "hello, guest\n10 bytes\n10 bytes\n"


def test_without_its_device_the_guest_says_so(run):
    assert run("soft", assemble("virtiorng")).serial == b"!"
