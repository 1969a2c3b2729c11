"""What ships in examples/ is what its source says, and the guest finds it."""

import json
import shutil
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import unicorn
from assembling import nasm
from unicorn import x86_const as x86

import vmgraft.schemas
from vmgraft.vmmhost.core.bus import Bus
from vmgraft.vmmhost.layer.abi import EXPORTS, IMPORTS
from vmgraft.vmmhost.layer.spec import ExtensionSpec, HypercallRange, LayerLimits, MmioRange, PioRange, ServiceUse

NAMES = ["clock", "entropy", "timeshift", "virtiorng", "virtioconsole", "readahead"]


@pytest.mark.parametrize("name", NAMES)
def test_module_is_rebuilt_byte_for_byte(examples, tmp_path, name):
    folder = tmp_path / name
    shutil.copytree(examples / name, folder)
    (folder / "module.wasm").unlink()
    run = subprocess.run(["make", "-C", str(folder)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (folder / "module.wasm").read_bytes() == (examples / name / "module.wasm").read_bytes()


def test_guest_is_reassembled_byte_for_byte(examples):
    image = nasm(examples / "guest/guest.asm")
    assert image == (examples / "guest/guest.bin").read_bytes()
    assert len(image) == 512
    assert image[510:] == b"\x55\xaa"
    assert image[440:510] == bytes(70)


@pytest.mark.parametrize("name", NAMES)
def test_manifest_follows_the_schema(examples, name):
    schema = json.loads((Path(vmgraft.schemas.__file__).parent / "manifest.schema.json").read_text())
    manifest = tomllib.loads((examples / name / "manifest.toml").read_text())
    jsonschema.validate(manifest, schema)
    assert (examples / name / manifest["module"]).is_file()
    assert manifest["id"] == f"org.vmgraft.{name}"


def test_the_examples_have_the_same_header(examples):
    clock, *others = ((examples / name / "vmgraft.h").read_text() for name in NAMES)
    assert others == [clock] * (len(NAMES) - 1)
    for name in IMPORTS:
        assert f"VMGRAFT_IMPORT({name})" in clock
    for name in EXPORTS:
        assert f"VMGRAFT_EXPORT({name})" in clock


class Pc:
    """Just enough of a PC on Unicorn to run the guest: ports, teletype, an MMIO hole, the doorbell."""

    def __init__(self, image, clock=None, entropy=None):
        self.clock, self.entropy = clock, entropy
        self.serial, self.screen, self.off = bytearray(), bytearray(), False
        self.mu = mu = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_16)
        mu.mem_map(0, 0xC0000)
        mu.mmio_map(0xD0000, 0x1000, self._mmio_read, None, lambda *_args: None, None)
        mu.mem_write(0x7C00, image)
        mu.hook_add(unicorn.UC_HOOK_INSN, self._in, None, 1, 0, x86.UC_X86_INS_IN)
        mu.hook_add(unicorn.UC_HOOK_INSN, self._out, None, 1, 0, x86.UC_X86_INS_OUT)
        mu.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)
        mu.emu_start(0x7C00, 0x8000, timeout=20_000_000)

    def _mmio_read(self, _uc, offset, size, _data):
        return self.entropy.mmio_read(0xD0000 + offset, size) if self.entropy else (1 << 8 * size) - 1

    def _in(self, _uc, port, size, _data):
        if self.clock and 0x510 <= port <= 0x517:
            return self.clock.pio_read(port, size)
        return (1 << 8 * size) - 1

    def _out(self, uc, port, size, value, _data):
        if port == 0x3F8:
            self.serial.append(value)
        elif (port, size, value) == (0x604, 2, 0x2000):
            self.off = True
            uc.emu_stop()
        elif port == 0x564 and (self.clock or self.entropy):
            self._doorbell(uc, value)

    def _doorbell(self, uc, number):
        if number == 0:
            result = 0x56474654 | (bool(self.clock) + bool(self.entropy)) << 32
        else:
            result = self.clock.hypercall(number, (0, 0, 0, 0)) if self.clock else (1 << 64) - 1
        uc.reg_write(x86.UC_X86_REG_EAX, result & 0xFFFFFFFF)
        uc.reg_write(x86.UC_X86_REG_EDX, result >> 32)

    def _interrupt(self, uc, number, _data):
        assert number == 0x10
        self.screen.append(uc.reg_read(x86.UC_X86_REG_AL))


@pytest.fixture
def image(examples):
    return (examples / "guest/guest.bin").read_bytes()


@pytest.fixture
def devices(bench, examples):
    limits = LayerLimits(memory_mib=1, fuel_per_call=100_000)
    clock = ExtensionSpec(
        "org.vmgraft.clock", "1", (examples / "clock/module.wasm").read_bytes(), limits=limits, log=True, now=True,
        pio=(PioRange(0x510, 0x517),), hypercalls=(HypercallRange(16, 17),),
    )  # fmt: skip
    entropy = ExtensionSpec(
        "org.vmgraft.entropy", "1", (examples / "entropy/module.wasm").read_bytes(), limits=limits, random=True,
        mmio=(MmioRange(0xD0000, 0x1000),),
    )  # fmt: skip
    return bench.host(clock, entropy).proxies


def test_guest_alone(image):
    pc = Pc(image)
    assert pc.off
    expected = "vmgraft guest\r\nextensions: none\r\nclock: absent\r\nentropy: absent\r\ndone\r\n"
    assert pc.serial.decode() == pc.screen.decode() == expected


def test_guest_with_both(image, devices, bench):
    bench.now = 0x1_0203_0405
    pc = Pc(image, *devices)
    lines = pc.serial.decode().split("\r\n")
    assert lines[:3] == ["vmgraft guest", "extensions: 2", "clock: 0x0000000102030405 ok"]
    assert lines[3].startswith("entropy: 0x")
    assert len(lines[3]) == len("entropy: 0x12345678")
    assert int(lines[3].split()[1], 16) >= 0
    assert lines[4:] == ["done", ""]
    assert pc.off


def test_guest_with_one(image, devices):
    _clock, entropy = devices
    lines = Pc(image, entropy=entropy).serial.decode().split("\r\n")
    assert lines[1:3] == ["extensions: 1", "clock: absent"]
    assert "0x" in lines[3]


def test_guest_sees_a_clock_that_runs_backwards(image):
    class Backwards:
        def pio_read(self, port, _size):
            return 100 if port == 0x510 else 0

        def hypercall(self, _number, _args):
            return 99

    assert "clock: 0x0000000000000064 bad\r\n" in Pc(image, clock=Backwards()).serial.decode()


@pytest.mark.parametrize(
    ("config", "seconds", "shown"),
    [
        ("seconds=-3600", 10_000, 6_400),
        ("seconds=86400", 10_000, 96_400),
        ("seconds=-3600", 3_599, 3_599),
        ("seconds=40000000000", 10_000, 10_000),
    ],
)
def test_timeshift_moves_the_clock_within_its_years(bench, examples, config, seconds, shown):
    bus, host = Bus(1 << 24), bench.host(timeshift(examples, config))
    host.claim(bus)
    assert bus.services.rtc(seconds) == shown
    assert host.proxies[0].summary()["metrics"] == ({} if seconds == shown else {"looks": 1})
    assert bench.records("fault") == []


@pytest.mark.parametrize("config", ["", "seconds", "second=5", "seconds=5 ", "seconds=--5", "seconds=" + "9" * 22])
def test_timeshift_refuses_a_config_that_says_nothing(bench, examples, config):
    host = bench.host(timeshift(examples, config))
    assert host.proxies[0].state.value == "detached"
    assert [record["kind"] for record in bench.records("fault")] == ["start"]


def test_timeshift_hands_its_count_on(bench, examples):
    bus, host = Bus(1 << 24), bench.host(timeshift(examples, "seconds=1"))
    host.claim(bus)
    bus.services.rtc(5)
    host.replace(timeshift(examples, "seconds=2"))
    assert bus.services.rtc(5) == 7
    assert host.proxies[0].summary()["metrics"] == {"looks": 2}


def timeshift(examples, config):
    module = (examples / "timeshift/module.wasm").read_bytes()
    return ExtensionSpec(
        "org.vmgraft.timeshift", "1.0.0", module, config.encode(), on_fault="detach", metric=True,
        services=(ServiceUse("rtc", chain=True),),
    )  # fmt: skip
