"""A run from start to end: what is refused before anything starts, time limits, and the log's last word."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmgraft.errors import CapabilityError, ContentMismatchError, EngineUnavailableError, FileError
from vmgraft.vmmhost import session
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.launch import Launcher, RunReport
from vmgraft.vmmhost.layer.zygote import Zygote
from vmgraft.vmmhost.plan import RunOptions

#: mov al, 1; out 92h, al
RESET = bytes.fromhex("b001e692")
#: mov dx, 604h; mov ax, 2000h; out dx, ax
POWER_OFF = bytes.fromhex("ba0406b80020ef")
#: mov dx, 510h; mov cx, FFFFh; mov di, 8000h; cld; rep insb; cli; hlt
REP_INS = bytes.fromhex("ba1005b9ffffbf0080fcf36cfaf4")
#: mov ax, 0201h; mov cx, 0101h; mov dx, 80h; mov bx, 8000h; int 13h; cli; hlt
READ_FAR_SECTOR = bytes.fromhex("b80102b90101ba8000bb0080cd13faf4")
#: mov dx, 510h; in al, dx; jmp back
READ_FOR_EVER = bytes.fromhex("ba1005ecebfd")


def options(studio, **chosen: Any) -> RunOptions:
    return RunOptions(**({"cpu": "soft", "timeout": 60, "audit_log": studio.audit_log} | chosen))


def launcher(studio, **chosen: Any) -> Launcher:
    return Launcher(studio.image, studio.policy, options(studio, **chosen))


# --- before anything starts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        (["pio:0x3f8-0x3ff"], "core"),
        (["pio:0x510-0x604"], "core"),
        (["pio:0x564-0x567"], "doorbell"),
        (["mmio:0xf0000+0x100"], "not free"),
        (["mmio:0xfee00000+0x1000"], "core"),
        (["guest:0x4000000+0x1000:r"], "not all RAM"),
        (["guest:0xbf000+0x1001:r"], "not all RAM"),
        (["guest:0xf0000+0x1000:r"], "not all RAM"),
    ],
)
def test_claims_are_tried_before_anything_starts(studio, monkeypatch, claims: list[str], words: str) -> None:
    studio.graft(studio.wat(studio.ONES), capabilities=claims)
    monkeypatch.setattr(Zygote, "start", lambda: pytest.fail("the layer was started"))
    for attempt in (launcher(studio).plan, launcher(studio).run):
        with pytest.raises(CapabilityError, match=words):
            attempt()
    assert [record["event"] for record in studio.log()] == ["start", "verification", "plan", "error"]


def test_a_window_fits_into_more_memory(studio) -> None:
    studio.graft(studio.wat(studio.ONES), capabilities=["guest:0x4000000+0x1000:r"])
    assert launcher(studio, memory_mib=65).plan().error is None
    with pytest.raises(CapabilityError):
        launcher(studio, memory_mib=64).plan()


def test_kvm_in_a_thread_is_refused_and_auto_goes_on_without(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    seen: list[Any] = []

    def work(engine: str) -> None:
        try:
            result = launcher(studio, cpu=engine, audit_log=None).run().result
            seen.append(None if result is None else (result.engine, result.reason))
        except EngineUnavailableError as error:
            seen.append(error.message)

    for engine in ("kvm", "auto"):
        thread = threading.Thread(target=work, args=(engine,))
        thread.start()
        thread.join()
    assert "main thread" in seen[0]
    assert seen[1] == ("soft", EndReason.SHUTDOWN)


# --- the time limit --------------------------------------------------------------------------------------------------


def test_string_io_to_a_slow_extension_ends_in_time(studio, cpu: str) -> None:
    studio.boot_code(REP_INS)
    limits = {"memoryMiB": 1, "fuelPerCall": 1_000_000, "callMs": 500, "callsPerSecond": 2, "logBytes": 1024}
    studio.graft(studio.wat(studio.ONES), limits=limits)
    began = time.monotonic()
    report = launcher(studio, cpu=cpu, timeout=1.0).run()
    assert report.result is not None
    assert report.result.reason is EndReason.TIMEOUT
    assert time.monotonic() - began < 6
    assert [record["quota"] for record in studio.log() if record["event"] == "quota"] == ["callsPerSecond"]


def test_restarts_end_with_the_time_limit(studio) -> None:
    """The first worker starts; all others find a mark in guest memory and hang in on_start."""
    imports = """(import "vmgraft" "guest_read" (func $read (param i64 i32 i32) (result i32)))
                 (import "vmgraft" "guest_write" (func $write (param i64 i32 i32) (result i32)))"""
    body = """(data (i32.const 0) "mark")
      (func (export "on_start") (param i32) (result i32)
        (drop (call $read (i64.const 0x10000) (i32.const 16) (i32.const 4)))
        (loop $l (br_if $l (i32.eq (i32.load (i32.const 16)) (i32.load (i32.const 0))))) (i32.const 0))
      (func (export "on_pio_read") (param i32 i32) (result i64)
        (drop (call $write (i64.const 0x10000) (i32.const 0) (i32.const 4))) unreachable)"""
    studio.boot_code(READ_FOR_EVER)
    limits = {"memoryMiB": 1, "fuelPerCall": 1_000_000_000, "callMs": 200, "logBytes": 1024}
    studio.graft(studio.wat(body, imports), onFault="restart(99)", limits=limits)
    began = time.monotonic()
    report = launcher(studio, timeout=1.0).run()
    assert time.monotonic() - began < 6
    assert report.result is not None
    assert report.result.reason is EndReason.FAULT
    assert 2 <= len([record for record in studio.log() if record["event"] == "fault"]) < 20


# --- the log's last word ---------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_end(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    report = launcher(studio).run()
    records = studio.log()
    assert (records[-1]["event"], records[-1]["reason"]) == ("end", "shutdown")
    assert records[-2]["event"] == "extension-end"
    assert report.audit_head == records[-1]["hash"]


@pytest.mark.parametrize(("code", "event"), [(RESET, 1), (POWER_OFF, 2)])
def test_extensions_are_told_how_the_guest_ended(studio, code: bytes, event: int) -> None:
    studio.boot_code(code)
    body = f"""(func (export "on_event") (param i32)
      (if (i32.eq (local.get 0) (i32.const {event})) (then (call $log (i32.const 0) (i32.const 1)))))"""
    studio.graft(studio.wat(body, '(import "vmgraft" "log" (func $log (param i32 i32)))'))
    launcher(studio).run()
    assert len([record for record in studio.log() if record["event"] == "log"]) == 1


def test_a_refused_image_ends_with_an_error(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    data = bytearray(studio.image.read_bytes())
    data[0x8000] ^= 1
    studio.image.write_bytes(data)
    report = launcher(studio).run()
    records = studio.log()
    assert (records[-1]["event"], records[-1]["code"]) == ("error", "content-mismatch")
    assert report.audit_head == records[-1]["hash"]


@pytest.mark.parametrize("when", ["boot record", "later"])
def test_a_disk_that_changes_under_the_guest(studio, monkeypatch, when: str) -> None:
    studio.boot_code(READ_FAR_SECTOR)
    studio.graft(studio.wat(studio.ONES))
    real = session.VerifiedDisk

    class Changed(real):
        def __init__(self, reader: Any, _check: Any) -> None:
            super().__init__(reader, lambda index, _block: when == "later" and index == 0)

    monkeypatch.setattr(session, "VerifiedDisk", Changed)
    if when == "later":
        report = launcher(studio).run()
        assert report.error == "content-mismatch"
        assert (studio.log()[-1]["event"], studio.log()[-1]["reason"]) == ("end", "content-mismatch")
    else:
        with pytest.raises(ContentMismatchError):
            launcher(studio).run()
        assert (studio.log()[-1]["event"], studio.log()[-1]["code"]) == ("error", "content-mismatch")


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), "interrupted"), (OSError("no"), "file"), (ZeroDivisionError(), "internal")],
)
def test_whatever_ends_a_run_stands_in_the_log(studio, monkeypatch, error: BaseException, code: str) -> None:
    studio.graft(studio.wat(studio.ONES))

    def fail(_machine: object) -> None:
        raise error

    monkeypatch.setattr(session.Machine, "run", fail)
    with pytest.raises(type(error)):
        launcher(studio).run()
    records = studio.log()
    assert (records[-1]["event"], records[-1]["code"]) == ("error", code)
    assert "extension-end" in [record["event"] for record in records]


def test_a_serial_sink_that_fails_ends_the_run(studio) -> None:
    studio.graft(studio.wat(studio.ONES))

    def full(_data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        Launcher(studio.image, studio.policy, options(studio), serial=full).run()
    assert (studio.log()[-1]["event"], studio.log()[-1]["code"]) == ("error", "file")


def test_a_second_signal_ends_a_run_that_is_held_up(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    timers = [threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)) for seconds in (0.6, 0.9)]

    def full_pipe(_data: bytes) -> None:
        for timer in timers:
            if not timer.ident:
                timer.start()
        time.sleep(30)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        Launcher(studio.image, studio.policy, options(studio), serial=full_pipe).run()
    assert time.monotonic() - began < 10
    assert (studio.log()[-1]["event"], studio.log()[-1]["code"]) == ("error", "interrupted")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the kernel refuse to grow any file beyond ``size``, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_log_that_cannot_be_written_stops_the_guest(studio) -> None:
    log_line = """
      (func (export "on_pio_read") (param i32 i32) (result i64)
        (call $log (i32.const 0) (i32.const 64)) (i64.const -1))"""
    studio.boot_code(READ_FOR_EVER)
    studio.graft(studio.wat(log_line, '(import "vmgraft" "log" (func $log (param i32 i32)))'), limits={
        "memoryMiB": 1, "fuelPerCall": 1_000_000, "callMs": 500, "logBytes": 1 << 20})  # fmt: skip
    launcher(studio, timeout=0.2, audit_log=studio.folder / "first").run()
    records = [json.loads(line) for line in (studio.folder / "first").read_text().splitlines()]
    before_guest = sum(len(json.dumps(item)) for item in records if item["event"] != "log")
    began = time.monotonic()
    with file_size_limit(before_guest + 2000), pytest.raises(FileError, match="audit log"):
        launcher(studio, timeout=30).run()
    assert time.monotonic() - began < 10
    assert '"event": "end"' not in (studio.audit_log).read_text()


def test_one_byte_lines_do_not_flood_the_log(studio) -> None:
    body = """(func (export "on_pio_read") (param i32 i32) (result i64) (local i32)
      (loop $l (call $log (i32.const 0) (i32.const 1)) (local.set 2 (i32.add (local.get 2) (i32.const 1)))
        (br_if $l (i32.lt_u (local.get 2) (i32.const 60000)))) (i64.const -1))"""
    studio.graft(studio.wat(body, '(import "vmgraft" "log" (func $log (param i32 i32)))'))
    launcher(studio).run()
    assert len([record for record in studio.log() if record["event"] == "log"]) == 1024 // 64


def test_text_seen_just_before_power_off_counts(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    report = launcher(studio, until="never shown").run()
    assert report.error == "expectation"
    assert report.result is not None
    seen = dataclasses.replace(report.result, reason=EndReason.SHUTDOWN, until_seen=True)
    assert RunReport(report.verification, result=seen, until="never shown").error is None


# --- what a run leaves, and what a worker holds ----------------------------------------------------------------------


def test_many_runs_leak_nothing(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    launcher(studio, audit_log=None).run()
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = [*sorted(Path("/proc/self/fd").iterdir()), children.read_text()]
    for _ in range(25):
        launcher(studio, audit_log=None).run()
    assert [*sorted(Path("/proc/self/fd").iterdir()), children.read_text()] == before


def test_a_worker_holds_no_kvm_and_no_disk(studio, monkeypatch, cpu: str) -> None:
    studio.graft(studio.wat(studio.ONES))
    held: list[str] = []
    real = session.Machine.run

    def look(machine: session.Machine) -> Any:
        records = map(json.loads, studio.audit_log.read_text().splitlines())
        pid = next(record["pid"] for record in records if record["event"] == "extension-start")
        try:
            descriptors = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
            maps = Path(f"/proc/{pid}/maps").read_text()
        except PermissionError:
            pytest.skip("a worker is not dumpable: only root may look into it")
        held.extend([*descriptors, maps])
        return real(machine)

    monkeypatch.setattr(session.Machine, "run", look)
    launcher(studio, cpu=cpu).run()
    *descriptors, maps = held
    assert [target.partition(":")[0] for target in descriptors] == ["socket"]
    assert "libc" in maps
    for word in ("kvm", studio.image.name, "unicorn", "vmgraft-zygote-errors"):
        assert word not in maps


# --- what speaks against an image that boots all the same


def revoke_and_let_pass(studio) -> None:
    document = json.loads(studio.policy.read_text())
    document["trustPolicies"][0]["signatureVerification"] = {"level": "audit"}
    document["revocations"] = {"keys": [studio.key.keyid]}
    studio.policy.write_text(json.dumps(document))


def test_warnings_come_before_anything_starts(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    revoke_and_let_pass(studio)
    heard: list[tuple[tuple[str, ...], list[str]]] = []

    def judged(verdict: Any) -> None:
        events = [json.loads(line)["event"] for line in studio.audit_log.read_text().splitlines()]
        heard.append((verdict.warnings, events))

    report = Launcher(studio.image, studio.policy, options(studio), judged=judged).run()
    ((warnings, events),) = heard
    assert any("revoked" in warning for warning in warnings), warnings
    assert events == ["start", "verification"]
    assert report.result is not None, "the level lets it boot"
    assert studio.log()[1]["warnings"] == list(warnings)


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--timeout", "20", "--state", "none"]])
def test_the_program_shows_warnings(studio, arguments: list[str]) -> None:
    studio.graft(studio.wat(studio.ONES))
    revoke_and_let_pass(studio)
    command = [sys.executable, "-m", "vmgraft", "run", studio.image, "--policy", studio.policy, "--cpu", "soft"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("warning: ") and "revoked" in done.stderr, lines
    assert "warning:" not in done.stdout
    assert ("ended:" in lines[-1]) == ("--dry-run" not in arguments)
