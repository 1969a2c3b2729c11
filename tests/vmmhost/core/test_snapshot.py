"""A guest that is kept and brought back goes on as if nothing had been."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmgraft.errors import HostError
from vmgraft.vmmhost.core import keeping, snapshot
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.portmap import FirmwareKind
from vmgraft.vmmhost.core.probe import Engine

BINDINGS = {"image": "11" * 32, "org.example.clock": "22" * 32}
EXTRA = {"x": b"extra"}
LETTERS = bytes(ord("a") + index % 16 for index in range(24))


@pytest.fixture
def kept(make_machine):
    """Give ``kept(engine, after, **options)``: a finished run, and a snapshot taken in it after some serial bytes."""

    def run(engine, after=7, what="keep", **options):
        taken, seen = [], bytearray()

        def serial(data):
            seen.extend(data)
            if len(seen) == after:
                machine.at_rest(lambda: taken.append((machine.save(BINDINGS, EXTRA), len(machine.bus.events))))

        machine = make_machine(engine, what, trace=True, rtc_epoch=0, serial=serial, **options)
        result = machine.run()
        (snap, events) = taken[0]
        return result, snap, result.trace[events:]

    return run


@pytest.fixture
def resumed(make_machine):
    def run(engine, snap, what="keep", **options):
        machine = make_machine(engine, what, trace=True, rtc_epoch=12345, **options)
        assert machine.load(snap, BINDINGS) == EXTRA
        return machine.run()

    return run


FIRMWARE = pytest.mark.parametrize("firmware", list(FirmwareKind))


@FIRMWARE
def test_the_software_cpu_goes_on_bit_by_bit(kept, resumed, firmware):
    whole, snap, tail = kept(Engine.SOFT, firmware=firmware)
    assert (whole.reason, whole.serial) == (EndReason.SHUTDOWN, LETTERS)
    again = resumed(Engine.SOFT, snap, firmware=firmware)
    assert again.reason is EndReason.SHUTDOWN
    assert again.serial == LETTERS[7:]
    assert len(tail) > 80
    assert again.trace == tail
    assert again.virtual_ns == whole.virtual_ns
    assert again.screen == whole.screen
    assert again.blocks_written == whole.blocks_written == 1


@FIRMWARE
def test_kvm_goes_on(kvm, kept, resumed, firmware):
    whole, snap, _tail = kept(kvm, firmware=firmware)
    assert whole.serial == LETTERS
    again = resumed(kvm, snap, firmware=firmware)
    assert (again.reason, again.serial) == (EndReason.SHUTDOWN, LETTERS[7:]), again.detail
    assert again.debug == whole.debug[-len(again.debug) :]
    assert again.virtual_ns > 0.5 * whole.virtual_ns


def test_a_guest_that_has_not_run_can_be_kept(make_machine, resumed):
    snap = make_machine(Engine.SOFT, "keep").save(BINDINGS, EXTRA)
    assert resumed(Engine.SOFT, snap).serial == LETTERS


def test_protected_mode_comes_back(make_machine):
    """The modes guest goes from real to protected mode; 64-bit mode, at its end, cannot be kept."""
    told = {}

    def serial(data):
        letter = data.decode()
        machine.at_rest(lambda: told.update({letter: attempt()}))

    def attempt():
        try:
            return machine.save(BINDINGS)
        except HostError as error:
            return error

    machine = make_machine(Engine.SOFT, "modes", serial=serial)
    assert machine.run().serial == b"RPITL"
    assert "64-bit mode" in str(told["L"])
    for letter, rest in (("R", b"PITL"), ("P", b"ITL"), ("I", b"TL"), ("T", b"L")):
        again = make_machine(Engine.SOFT, "modes")
        again.load(told[letter], BINDINGS)
        assert again.run().serial == rest, letter


def test_every_register_comes_back(make_machine):
    from vmgraft.vmmhost.core import softstate

    machine, other = make_machine(Engine.SOFT, "keep"), make_machine(Engine.SOFT, "halt")
    cpu = machine.cpu
    for number in range(8):
        cpu._uc.reg_write(getattr(cpu._names, f"UC_X86_REG_XMM{number}"), 0xFEDC << 100 | number)
        cpu._uc.reg_write(getattr(cpu._names, f"UC_X86_REG_FP{number}"), (1 << 63 | number, 0x3FFF + number))
    for name, value in {"EAX": 0x12345678, "DS": 0x1234, "CS": 0xF123, "FPCW": 0x27F, "CR2": 0xABC000}.items():
        cpu._uc.reg_write(getattr(cpu._names, f"UC_X86_REG_{name}"), value)
    state = softstate.save(cpu._uc, cpu._names)
    softstate.load(other.cpu._uc, cpu._names, json.loads(json.dumps(state)))
    assert softstate.save(other.cpu._uc, cpu._names) == state
    assert (state["XMM3"], state["FP2"]) == (0xFEDC << 100 | 3, [1 << 63 | 2, 0x4001])


def test_what_the_kernel_keeps_comes_back(kvm, make_machine):
    machine, other = make_machine(kvm, "keep"), make_machine(kvm, "keep")
    machine.cpu._vcpu.set_regs(rip=0x7C00, rax=0x1122334455667788, rflags=2)
    state = machine.cpu.state()
    other.cpu.set_state(json.loads(json.dumps(state)))
    again = other.cpu.state()
    passing = {"clock", "pit", "lapic", "msrs"}  # they hold the time
    assert {name: each for name, each in again["kernel"].items() if name not in passing} == {
        name: each for name, each in state["kernel"].items() if name not in passing
    }
    for name in ("regs", "xsave", "irqchip2", "clock"):
        damaged = json.loads(json.dumps(state))
        damaged["kernel"][name] = damaged["kernel"][name][2:]
        with pytest.raises(HostError) as caught:
            other.cpu.set_state(damaged)
        assert caught.value.field == name


def test_shadow_ram_is_protected_as_it_was(make_machine):
    machine, other = (make_machine(Engine.SOFT, "keep", firmware=FirmwareKind.SEABIOS) for _ in range(2))
    machine.bus.pio_write(0xCF8, 4, 0x8000005C)
    machine.bus.pio_write(0xCFE, 1, 0x33)  # PAM5: the shadow at 0xE0000 and 0xE4000
    machine.ram.write(0xE4000, b"kept")
    other.load(machine.save(BINDINGS), BINDINGS)
    assert other.ram.read(0xE4000, 4) == b"kept"
    assert other.ram.writable(0xE0000, 0x8000)
    assert not other.ram.writable(0xE8000, 1)
    regions = {begin: access for begin, _end, access in other.cpu._uc.mem_regions()}
    assert (regions[0xE0000], regions[0xE8000]) == (7, 5)


def test_running_guests_are_refused(make_machine):
    caught = []

    def serial(_data):
        for act in (lambda: machine.save(BINDINGS), lambda: machine.load(b"", BINDINGS)):
            with pytest.raises(HostError) as error:
                act()
            caught.append(error.value.message)

    machine = make_machine(Engine.SOFT, "serial", serial=serial)
    machine.run()
    assert set(caught) == {"a running guest cannot be kept", "the guest runs already"}


def test_a_stop_goes_before_a_rest(make_machine):
    def serial(_data):
        machine.at_rest(lambda: pytest.fail("the run had ended"))
        machine.stop(EndReason.SHUTDOWN, "enough")

    machine = make_machine(Engine.SOFT, "serial", serial=serial)
    assert machine.run().detail == "enough"


def test_it_goes_back_only_where_it_came_from(kept, make_machine):
    _whole, snap, _tail = kept(Engine.SOFT)
    for options, message in (
        ({"memory_mib": 32}, "built differently"),
        ({"firmware": FirmwareKind.SEABIOS}, "built differently"),
    ):
        with pytest.raises(HostError, match=message):
            make_machine(Engine.SOFT, "keep", **options).load(snap, BINDINGS)
    for bindings in ({}, BINDINGS | {"image": "33" * 32}, BINDINGS | {"more": ""}):
        with pytest.raises(HostError, match="another image"):
            make_machine(Engine.SOFT, "keep").load(snap, bindings)


def test_kvm_and_soft_do_not_mix(kvm, kept, make_machine):
    _whole, snap, _tail = kept(Engine.SOFT)
    with pytest.raises(HostError, match="built differently"):
        make_machine(kvm, "keep").load(snap, BINDINGS)


def test_after_an_error_the_machine_does_not_run(make_machine):
    machine = make_machine(Engine.SOFT, "keep")
    with pytest.raises(HostError, match="is none"):
        machine.load(b"something else", BINDINGS)
    with pytest.raises(HostError, match="once"):
        machine.run()


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample():
    return {}


@pytest.fixture
def snap(sample, kept):
    if not sample:
        sample["snap"] = kept(Engine.SOFT)[1]
    return sample["snap"]


def rebuilt(snap, change):
    """Return a snapshot whose sections were changed and whose hashes are right again."""
    length = struct.unpack_from("<I", snap, 8)[0]
    header, position, sections = json.loads(snap[12 : 12 + length]), 12 + length, {}
    for name, size, _digest in header["sections"]:
        sections[name], position = snap[position : position + size], position + size
    change(header, sections)
    import hashlib

    header["sections"] = [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in sections.items()]
    encoded = json.dumps(header).encode()
    return b"".join((snapshot.MAGIC, struct.pack("<I", len(encoded)), encoded, *sections.values()))


def with_state(edit):
    def change(_header, sections):
        state = json.loads(sections["state"])
        edit(state)
        sections["state"] = json.dumps(state).encode()

    return change


def piece(number, data, length=None):
    import zlib

    small = zlib.compress(data)
    return struct.pack("<QI", number, len(small) if length is None else length) + small


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda _header, sections: sections.pop("ram"), "sections"),
        (lambda _header, sections: sections.update(more=b""), "sections"),
        (lambda _header, sections: sections.update(ram=b"short"), "ram"),
        (lambda _header, sections: sections.update(ram=piece(256, bytes(65536))), "ram"),
        (lambda _header, sections: sections.update(ram=piece(1, bytes(65536)) + piece(1, bytes(65536))), "ram"),
        (lambda _header, sections: sections.update(ram=piece(0, bytes(65535))), "ram"),
        (lambda _header, sections: sections.update(ram=piece(0, bytes(1 << 24))), "ram"),
        (lambda _header, sections: sections.update(ram=piece(0, bytes(65536), 1 << 30)), "ram"),
        (lambda _header, sections: sections.update(ram=struct.pack("<QI", 0, 4) + b"junk"), "ram"),
        (lambda _header, sections: sections.update(disk0=piece(16, bytes(65536))), "disk0"),
        (lambda _header, sections: sections.update(state=b"[" * 100_000), "state"),
        (lambda _header, sections: sections.update(state=b"[]"), "state"),
        (lambda header, _sections: header.update(machine=None), "machine"),
        (with_state(lambda state: state.pop("cpu")), "cpu"),
        (with_state(lambda state: state["cpu"].update(now=-1)), "now"),
        (with_state(lambda state: state["cpu"].update(steps=7)), "steps"),
        (with_state(lambda state: state["cpu"].update(chips=[])), "chips"),
        (with_state(lambda state: state["cpu"]["registers"].update(EAX=1 << 32)), "EAX"),
        (with_state(lambda state: state["cpu"]["registers"].update(GDTR=[0])), "GDTR"),
        (with_state(lambda state: state["board"].pop("cmos")), "cmos"),
        (with_state(lambda state: state["board"]["cmos"].update(store="00")), "store"),
        (with_state(lambda state: state["board"]["serial"].update(received=[0] * 17)), "received"),
        (with_state(lambda state: state["board"]["serial"].update(line=1)), "line"),
        (with_state(lambda state: state["firmware"].update(emulating=True)), "emulating"),
    ],
)
def test_parts_that_make_no_sense_are_named(snap, make_machine, change, field):
    with pytest.raises(HostError) as caught:
        make_machine(Engine.SOFT, "keep").load(rebuilt(snap, change), BINDINGS)
    assert caught.value.field == field


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_found(snap, make_machine, data):
    raw = bytearray(snap)
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    machine = make_machine(Engine.SOFT, "keep", memory_mib=16)
    with pytest.raises(HostError):
        machine.load(raw, BINDINGS)
    machine.close()


#: Attributes that a machine wires anew: other parts, callbacks, configuration.
WIRED = {
    *("_sink", "_services", "_irq", "_clock", "_stop", "_probe", "_limit", "_pics", "_clock", "counters"),
    *("_cmos", "_cpu", "_bus", "_disk", "_plan", "_host", "kernel", "_stop_on_key_wait", "calls", "unknown"),
    *("video", "keyboard", "system", "disk_services"),
}


@FIRMWARE
def test_every_attribute_of_every_device_is_kept_or_wired(make_machine, firmware):
    machine = make_machine(Engine.SOFT, "keep", firmware=firmware)
    devices = [machine.board.cmos, machine.board.serial, *machine.board.devices.values(), *machine.cpu._chips()]
    if firmware is FirmwareKind.TRAP:
        devices += [machine.firmware, machine.firmware.keyboard, machine.firmware.system]
    checked = 0
    for device in devices:
        shapes = keeping.SHAPES.get(type(device))
        if shapes is not None:
            assert set(vars(device)) <= set(shapes) | WIRED, type(device)
            checked += 1
    assert checked > 10
