"""KVM, the software CPU, the probe, and what the machine does around them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vmgraft.errors import EngineUnavailableError, HostError, UsageError
from vmgraft.vmmhost.core import kvm as kvm_module
from vmgraft.vmmhost.core import kvm_abi as abi
from vmgraft.vmmhost.core import probe as probe_module
from vmgraft.vmmhost.core import softwatch
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.core.probe import NATIVE_RATE, Engine, EngineInfo, detect, open_cpu, probe_kvm


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# --- probe and choice -----------------------------------------------------------------------------------------------


def test_probe_is_quick_and_says_why():
    durations = []
    for _ in range(3):  # the promise is for a computer that is not busy with something else
        start = time.perf_counter()
        found = detect()
        durations.append(time.perf_counter() - start)
    assert min(durations) < 1
    assert [info.name for info in found] == ["kvm", "soft"]
    for info in found:
        assert info.reason
        assert info.usable == (info.emulated is not None)
    assert found[1].usable


def test_kvm_probe_measures(kvm):
    info = probe_kvm()
    assert info.rate > 10_000
    assert info.emulated is (info.rate < NATIVE_RATE)


@pytest.fixture
def no_kvm(monkeypatch, tmp_path):
    monkeypatch.setattr(kvm_module, "DEVICE", str(tmp_path / "kvm"))


@pytest.fixture
def no_unicorn(monkeypatch):
    monkeypatch.setitem(sys.modules, "unicorn", None)


@pytest.mark.usefixtures("no_kvm")
def test_auto_takes_the_software_cpu_without_kvm(run_guest):
    result = run_guest(Engine.AUTO, "serial")
    assert result.engine == "soft"
    assert "No such file" in result.why
    with pytest.raises(EngineUnavailableError, match="No such file"):
        open_cpu(Engine.KVM, GuestRam(2))


@pytest.mark.parametrize(("emulated", "engine"), [(False, "kvm"), (True, "soft")])
def test_auto_prefers_kvm_where_it_is_native(kvm, run_guest, monkeypatch, emulated, engine):
    found = EngineInfo("kvm", usable=True, emulated=emulated, reason="found so", rate=1)
    monkeypatch.setattr(probe_module, "probe_kvm", lambda: found)
    result = run_guest(Engine.AUTO, "serial")
    assert (result.engine, result.why) == (engine, "KVM found so")
    for chosen in (kvm, Engine.SOFT):
        assert run_guest(chosen, "serial").engine == chosen.value


@pytest.mark.usefixtures("no_unicorn")
def test_auto_takes_a_kvm_that_emulates_where_there_is_nothing_else(kvm, run_guest, monkeypatch):
    found = EngineInfo("kvm", usable=True, emulated=True, reason="found so", rate=1)
    monkeypatch.setattr(probe_module, "probe_kvm", lambda: found)
    assert run_guest(Engine.AUTO, "serial").engine == kvm.value


@pytest.mark.usefixtures("no_unicorn")
def test_missing_unicorn_names_the_extra(make_machine):
    with pytest.raises(EngineUnavailableError) as caught:
        make_machine(Engine.SOFT, "serial")
    assert caught.value.hint == "pip install 'vmgraft[soft]'"
    assert not detect()[1].usable


@pytest.mark.usefixtures("no_kvm", "no_unicorn")
def test_no_engine_at_all(make_machine):
    with pytest.raises(EngineUnavailableError, match=r"no CPU engine works here: .*No such file.*software CPU"):
        make_machine(Engine.AUTO, "serial")


def test_a_device_that_is_not_kvm(monkeypatch):
    monkeypatch.setattr(kvm_module, "DEVICE", "/dev/null")
    before = descriptors()
    with pytest.raises(EngineUnavailableError, match="KVM_GET_API_VERSION failed"):
        kvm_module.Kvm()
    assert descriptors() == before


def test_importing_the_core_loads_neither_engine_nor_layer():
    code = (
        "import sys, vmgraft.vmmhost.core.machine\n"
        "heavy = {'unicorn', 'wasmtime', 'numpy', 'cryptography', 'vmgraft.vmmhost.layer', 'vmgraft.signing'}\n"
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- KVM ------------------------------------------------------------------------------------------------------------


def test_layouts_have_the_kernels_sizes():
    assert abi.MEMORY_REGION.size == 32
    assert abi.SEGMENT.size == 24
    assert abi.REGS_SIZE == 144
    assert abi.SREGS_CR0 == 224
    assert abi.PIT_CONFIG.size == 64
    # numbers as in the kernel's documentation of strace and others
    assert abi.KVM_RUN == 0xAE80
    assert abi.KVM_SET_USER_MEMORY_REGION == 0x4020AE46
    assert abi.KVM_GET_SREGS == 0x8138AE83


def test_kvm_leaves_no_descriptor_behind(kvm, make_machine):
    before = descriptors()
    machine = make_machine(kvm, "serial")
    assert descriptors() >= before + 3
    machine.run()
    machine.close()
    machine.close()
    assert descriptors() == before


def test_kvm_needs_the_main_thread(kvm, make_machine):
    machine, caught = make_machine(kvm, "serial"), []

    def run():
        try:
            machine.run()
        except HostError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(caught[0])


def test_soft_runs_in_any_thread(make_machine):
    machine, results = make_machine(Engine.SOFT, "serial"), []
    thread = threading.Thread(target=lambda: results.append(machine.run()))
    thread.start()
    thread.join()
    assert results[0].reason is EndReason.SHUTDOWN


def test_signals_and_timer_are_as_before(engine, run_guest):
    def handler(_number, _frame):
        raise AssertionError

    old, timer = signal.signal(signal.SIGALRM, handler), signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        run_guest(engine, "spin", timeout=0.3)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] < 499.8
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, old)


def test_ctrl_c_ends_the_run(engine, make_machine):
    machine = make_machine(engine, "spin")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    result = machine.run()
    timer.join()
    assert result.reason is EndReason.INTERRUPTED
    assert result.wall_seconds < 5


# --- the machine ----------------------------------------------------------------------------------------------------


def test_ticks_come_about_every_ten_milliseconds(engine, make_machine):
    machine, seen = make_machine(engine, "spin", timeout=1), []
    machine.add_tick(seen.append)
    machine.run()
    assert 20 < len(seen) <= 110
    assert seen == sorted(seen)


def test_plugged_in_interrupts_reach_the_guest(engine, make_machine):
    machine = make_machine(engine, "irq")

    def tick(_now):
        machine.set_irq(11, True)
        machine.set_irq(11, False)

    machine.add_tick(tick)
    result = machine.run()
    assert (result.reason, result.serial) == (EndReason.SHUTDOWN, b"three")
    with pytest.raises(ValueError, match="line 16"):
        machine.set_irq(16, True)


def test_without_the_interrupt_the_guest_waits(engine, run_guest):
    result = run_guest(engine, "irq", timeout=0.4)
    assert (result.reason, result.serial) == (EndReason.TIMEOUT, b"")


def test_a_machine_runs_once(make_machine):
    machine = make_machine(Engine.SOFT, "serial")
    machine.run()
    with pytest.raises(HostError, match="once"):
        machine.run()
    machine.close()
    with pytest.raises(HostError, match="closed"):
        machine.now_ns()


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"until": ""}, {"memory_mib": 1}, {"memory_mib": 4096}, {"rtc_epoch": -1}]
)
def test_options_out_of_bounds(make_machine, options):
    with pytest.raises(UsageError):
        make_machine(Engine.SOFT, "serial", **options)


def test_guest_memory_is_bounded():
    ram = GuestRam(2)
    ram.write(0x1FFFF0, bytes(16))
    for gpa, length in ((0x1FFFF1, 16), (0xBFFFF, 2), (0xD0000, 1), (-1, 1), (1 << 40, 1), (0xF0000, 1)):
        with pytest.raises(ValueError, match="not RAM"):
            ram.write(gpa, bytes(length))
    with pytest.raises(ValueError, match="not memory"):
        ram.read(0xC0000, 1)
    with pytest.raises(ValueError, match="ROM has"):
        ram.load_rom(b"short")
    assert len(ram.read(0xF0000, 0x20000)) == 0x20000
    ram.close()


def test_code_watch_list_is_bounded(monkeypatch, run_guest):
    monkeypatch.setattr(softwatch, "WATCHED_MAX", 1)
    assert run_guest(Engine.SOFT, "modes").serial == b"RPITL"
    assert run_guest(Engine.SOFT, "halt").reason is EndReason.HALT


def test_stop_from_a_port_access_keeps_the_rest_of_the_guest_from_running(engine, make_machine):
    machine = make_machine(engine, "serial", until="hello")
    machine.run()
    assert machine.cpu.get("rax") & 0xFF == ord("o")


@pytest.mark.parametrize("nth", [1, 2], ids=["in the probe", "in the machine"])
@pytest.mark.parametrize(
    "request_name",
    [
        *("KVM_CHECK_EXTENSION", "KVM_CREATE_VM", "KVM_GET_VCPU_MMAP_SIZE", "KVM_SET_USER_MEMORY_REGION"),
        *("KVM_CREATE_VCPU", "KVM_GET_SREGS", "KVM_SET_SREGS", "KVM_SET_REGS"),
    ],
)
def test_kvm_that_is_busy_is_reported_and_leaks_nothing(kvm, make_machine, monkeypatch, request_name, nth):
    real, wanted, seen = fcntl.ioctl, getattr(abi, request_name), []

    def busy(fd, request, *arguments):
        seen.append(request)
        if request == wanted and seen.count(wanted) == nth:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return real(fd, request, *arguments)

    before = sorted(Path("/proc/self/fd").iterdir())
    monkeypatch.setattr(kvm_module.fcntl, "ioctl", busy)
    with pytest.raises(EngineUnavailableError, match="busy") as caught:
        make_machine(kvm, "halt")
    assert str(caught.value).count("/dev/kvm") == 1
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    seen.clear()
    assert make_machine(Engine.AUTO, "halt").cpu.engine == "soft"
