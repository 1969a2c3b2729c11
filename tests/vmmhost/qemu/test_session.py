"""Small guests in QEMU: the same report and log as with the core, whatever ends the run."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from vmgraft.errors import CapabilityError, EngineUnavailableError, HostError, NotBootableError, UsageError
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.probe import EngineInfo
from vmgraft.vmmhost.qemu import command, session
from vmgraft.vmmhost.qemu.process import QemuProcess

from ..test_confined import ROOT, ordinary, program
from .conftest import children

API = ["hypercall:16-17"]
#: sti; hlt; jump back
IDLE = bytes.fromhex("fbf4ebfc")
#: mov al, 'x'; mov dx, 3f8h; out dx, al: a sign of life on the serial port; then as above
ALIVE = bytes.fromhex("b078baf803ee") + IDLE
#: cli; hlt
HALT = bytes.fromhex("faf4")
#: mov al, 6; out 70h, al ... the reset line: mov al, 1; out 92h, al
RESET = bytes.fromhex("b001e692ebfe")
#: mov ax, 4200h; mov dl, 80h; mov si, 7c10h; int 13h; jmp $ ; address packet: 1 sector from LBA 1024 to 0000:8000
READ_FAR = bytes.fromhex("b80042b280be107ccd13ebfe").ljust(16, b"\0") + bytes.fromhex(
    "10000100008000000004000000000000"
)
#: mov al, dl; add al, 30h; mov dx, 3f8h; out dx, al: the drive it was booted from, on the serial port
WHICH = bytes.fromhex("88d00430baf803ee") + RESET


def test_a_guest_boots_and_ends(studio, launch) -> None:
    studio.graft(studio.wat(studio.ONES), capabilities=API)
    said = bytearray()
    report = launch(serial=said.extend).run()
    result = report.result
    assert report.error is None
    assert (result.reason, result.detail) == (EndReason.SHUTDOWN, "QEMU says guest-shutdown")
    assert (result.engine, result.emulated) == ("qemu-tcg", True)
    assert "vmgraft guest" in "\n".join(result.screen)
    assert b"vmgraft guest" in said == bytearray(result.serial)
    assert result.blocks_checked >= 1
    assert [item["state"] for item in report.extensions] == ["running"]
    records = studio.log()
    assert [record["event"] for record in records] == [
        "start", "verification", "plan", "extension-start", "nbd-open", "boot", "nbd-close", "extension-end", "end",
    ]  # fmt: skip
    boot = records[5]
    assert boot["engine"] == "qemu-tcg"
    assert boot["why"] == "TCG was asked for"
    assert "no-new-privs" in boot["qemuConfinement"]


def test_until_is_seen_on_screen_and_serial_port(studio, launch) -> None:
    studio.graft(studio.wat(""), capabilities=API)
    report = launch(until="done").run()
    assert report.result.until_seen
    assert report.error is None
    studio.audit_log.unlink()
    studio.boot_code(HALT)
    studio.image.unlink()
    studio.graft(studio.wat(""), capabilities=API)
    report = launch(until="Booting from", timeout=30).run()  # said by the firmware, on the screen alone
    assert (report.result.reason, report.result.until_seen) == (EndReason.UNTIL, True)
    assert report.result.detail == "on the screen"


def test_a_reset_ends_the_run(studio, launch) -> None:
    studio.boot_code(RESET)
    studio.graft(studio.wat(""), capabilities=API)
    result = launch().run().result
    assert (result.reason, result.detail) == (EndReason.RESET, "QEMU says guest-reset")


def test_the_time_limit(studio, launch) -> None:
    studio.boot_code(IDLE)
    studio.graft(studio.wat(""), capabilities=API)
    began = time.monotonic()
    result = launch(timeout=1.0).run().result
    assert (result.reason, result.detail) == (EndReason.TIMEOUT, "after 1 s")
    assert time.monotonic() - began < 15


def test_a_block_that_changed_after_the_verification_ends_the_run(studio, launch) -> None:
    studio.boot_code(READ_FAR)
    studio.guest = studio.guest.ljust(1024 * 512 + 1, b"\1")
    studio.graft(studio.wat(""), capabilities=API)

    def spoil(_verdict: object) -> None:
        with studio.image.open("r+b") as file:
            file.seek(1024 * 512)
            file.write(b"\2")

    report = launch(judged=spoil).run()
    assert report.result.reason is EndReason.DISK
    assert report.error == "content-mismatch"
    (failure,) = [record for record in studio.log() if record["event"] == "nbd-failure"]
    assert failure["field"] == "block 8"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_run_in_order(studio, launch, number: int) -> None:
    studio.boot_code(ALIVE)
    studio.graft(studio.wat(""), capabilities=API)
    report = launch(serial=lambda _data: os.kill(os.getpid(), number)).run()
    assert report.result.reason is EndReason.INTERRUPTED
    assert studio.log()[-1]["event"] == "end"


def _qemu() -> int:
    """Return the PID of the QEMU that this process runs."""
    (pid,) = [pid for pid, name in children().items() if name.startswith("qemu-system")]
    return pid


def test_qemu_holds_sockets_and_no_image(studio, launch) -> None:
    studio.graft(studio.wat(""), capabilities=API)
    seen: list[str] = []
    status: list[str] = []

    def look(_data: bytes) -> None:
        if not seen:
            folder = Path(f"/proc/{_qemu()}")
            for entry in (folder / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    seen.append(str(entry.readlink()))
            status.extend((folder / "status").read_text().splitlines())
            status.append((folder / "cmdline").read_text())

    launch(serial=look).run()
    assert any(name.startswith("socket:") for name in seen)
    paths = [name for name in seen if name.startswith("/") and not name.startswith("/memfd:")]
    assert set(paths) <= {"/dev/null"}
    assert str(studio.folder) not in status[-1]
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    if os.geteuid() == 0:
        assert any(line.startswith("Uid:\t65534\t65534") for line in status)


def test_a_qemu_that_dies_ends_the_run(studio, launch) -> None:
    studio.boot_code(ALIVE)
    studio.graft(studio.wat(""), capabilities=API)
    report = launch(serial=lambda _data: os.kill(_qemu(), signal.SIGKILL)).run()
    assert report.result.reason is EndReason.ERROR
    assert report.error == "host"
    assert "-9" in report.result.detail


def test_a_qemu_that_does_not_start_says_why(studio, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    studio.graft(studio.wat(""), capabilities=API)
    monkeypatch.setattr(command, "_MACHINE", "no-such-machine")
    with pytest.raises(HostError, match="unsupported machine type"):
        launch().run()
    assert studio.log()[-1]["event"] == "error"


def test_without_qemu_nothing_starts(studio, launch, monkeypatch: pytest.MonkeyPatch) -> None:
    studio.graft(studio.wat(""), capabilities=API)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EngineUnavailableError, match="not installed"):
        launch().run()


@pytest.mark.parametrize("claim", ["pio:0x510-0x517", "mmio:0xd0000+0x100", "guest:0x10000+0x1000:r", "irq:5"])
def test_claims_that_qemu_cannot_give_are_refused(studio, launch, claim: str) -> None:
    studio.graft(studio.wat(""), capabilities=[*API, claim])
    with pytest.raises(CapabilityError, match="engine qemu") as caught:
        launch().run()
    assert caught.value.field == claim.partition(":")[0]
    with pytest.raises(CapabilityError):
        launch(audit_log=None).plan()


@pytest.mark.parametrize("chosen", [{"keys": "x"}, {"trace": True}, {"record": Path("x")}, {"replay": Path("x")}])
def test_options_that_mean_nothing_here_are_refused(studio, launch, chosen: dict[str, object]) -> None:
    studio.graft(studio.wat(""), capabilities=API)
    with pytest.raises(UsageError, match="engine qemu"):
        launch(audit_log=None, **chosen).plan()


def test_which_accelerator_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    native = EngineInfo("kvm", usable=True, emulated=False, reason="native")
    found = [native]
    monkeypatch.setattr(session, "probe_kvm", lambda: found[0])
    assert session.choose_kvm("auto") == (True, "KVM: native")
    assert session.choose_kvm("soft")[0] is False
    found[0] = dataclasses.replace(native, emulated=True)
    assert session.choose_kvm("auto")[0] is False
    assert session.choose_kvm("kvm")[0] is True
    found[0] = dataclasses.replace(native, usable=False, emulated=None, reason="no /dev/kvm")
    assert session.choose_kvm("auto")[0] is False
    with pytest.raises(EngineUnavailableError, match="no /dev/kvm"):
        session.choose_kvm("kvm")


def test_qemu_does_not_outlive_the_host(tmp_path: Path) -> None:
    """The host is killed: QEMU is gone too, though nobody could tell it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        import socket

        ends = [socket.socketpair() for _ in range(2)]
        machine = command.QemuMachine(False, 16, ends[0][1].fileno(), ends[1][1].fileno(), None, ())
        process = QemuProcess(machine)
        ends[0][0].recv(10)  # it greets: it is QEMU by now
        os.write(writer, str(process.pid).encode())
        time.sleep(60)
        os._exit(0)
    qemu = int(os.read(reader, 20))
    watch = os.pidfd_open(qemu)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        assert _gone(watch, 5.0)
    finally:
        for fd in (reader, writer, watch):
            os.close(fd)


def _gone(pidfd: int, seconds: float) -> bool:
    import select

    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def test_an_iso_image_boots_as_a_cd(studio, launch) -> None:
    rescue = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")
    studio.image = studio.folder / "grub.iso"
    studio.image.write_bytes(rescue.read_bytes())
    studio.graft(studio.wat(""), image=studio.image, capabilities=API)
    report = launch(until="GNU GRUB", memory_mib=128).run()
    assert report.error is None
    assert report.result.blocks_checked > 10
    assert report.result.blocks_written == 0
    assert any("GNU GRUB" in line for line in report.result.screen)


@pytest.mark.parametrize(("boot", "drive"), [("floppy", 0), ("auto", 0), ("disk", 0x80)])
def test_a_floppy_is_a_floppy(studio, launch, boot: str, drive: int) -> None:
    studio.boot_code(WHICH)
    studio.guest = studio.guest.ljust(80 * 2 * 18 * 512, b"\0")
    studio.graft(studio.wat(""), capabilities=API)
    result = launch(boot=boot).run().result
    assert result.reason is EndReason.RESET
    assert result.serial == bytes([0x30 + drive])


def test_what_is_no_floppy_is_not_shown_as_one(studio, launch) -> None:
    studio.graft(studio.wat(""), capabilities=API)
    with pytest.raises(NotBootableError, match="1048576 bytes is no floppy"):
        launch(boot="floppy").run()
    assert studio.log()[-1]["event"] == "error"


def test_a_process_that_cannot_be_held_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def none_left(_pid: int) -> int:
        raise OSError(24, "Too many open files")

    with socket.socket() as one:
        monkeypatch.setattr(os, "pidfd_open", none_left)
        with pytest.raises(HostError, match="Too many open files"):
            QemuProcess(command.QemuMachine(False, 16, one.fileno(), one.fileno(), None, ()))


def test_an_ordinary_user_runs_it(studio) -> None:
    """Nothing of it is root's: not the jail, not the sockets, not the content."""
    studio.graft(studio.wat(studio.ONES), capabilities=API)
    before = ordinary(studio)
    arguments = [
        "--audit-log",
        studio.audit_log,
        "--engine",
        "qemu",
        "--cpu",
        "soft",
        "--state",
        "none",
        "--timeout",
        "60",
        "--json",
    ]
    done = subprocess.run(
        [*before, *program(), "run", studio.image, "--policy", studio.policy, *arguments],
        capture_output=True, text=True, timeout=60, check=False, cwd=studio.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["ok"] is True
    (boot,) = [record for record in studio.log() if record["event"] == "boot"]
    assert {"ns-net", "no-new-privs"} <= set(boot["qemuConfinement"])
    assert (boot["engine"], boot["hostLevel"]) == ("qemu-tcg", 3)


def test_a_faulty_extension_stops_the_guest(studio, launch) -> None:
    studio.boot_code(IDLE)
    body = """(func (export "on_start") (param i32) (result i32) (call $tick (i64.const 1000000)) (i32.const 0))
      (func (export "on_tick") (param i64) unreachable)"""
    module = studio.wat(body, '(import "vmgraft" "set_tick" (func $tick (param i64)))')
    studio.graft(module, capabilities=[*API, "tick"], onFault="stop")
    report = launch(timeout=30).run()
    assert report.result.reason is EndReason.FAULT
    assert report.error == "extension-fault"
    (fault,) = [record for record in studio.log() if record["event"] == "fault"]
    assert fault["kind"] == "trap"
