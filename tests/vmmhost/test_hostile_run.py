"""Hostile extensions in a real run: each ends as documented, the guest's other I/O is unchanged, the log names them."""

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from vmgraft.errors import CapabilityError, ExtensionFaultError, GraftFormatError, VmgraftError
from vmgraft.vmmhost.core.contract import EndReason, PioEvent
from vmgraft.vmmhost.launch import Launcher, RunReport
from vmgraft.vmmhost.plan import RunOptions

#: What the extension claims; everything else is the core's.
CLAIMED = range(0x510, 0x518)
CULPRIT = "org.example.culprit"
LOOP = '(func (export "on_pio_read") (param i32 i32) (result i64) (loop $l (br $l)) (i64.const 0))'
TRAP = '(func (export "on_pio_read") (param i32 i32) (result i64) unreachable)'
ALL_ONES = """
  (func (export "on_pio_read") (param i32 i32) (result i64) (i64.const -1))
  (func (export "on_hypercall") (param i32 i32 i32 i32 i32) (result i64) (i64.const -1))"""
OUTSIDE = """
  (func (export "on_pio_read") (param i32 i32) (result i64)
    (drop (call $read (i64.const 0x20000) (i32.const 0) (i32.const 16))) (i64.const 0))"""
GUEST_READ = '(import "vmgraft" "guest_read" (func $read (param i64 i32 i32) (result i32)))'
LOG = '(import "vmgraft" "log" (func $log (param i32 i32)))'
FLOOD = """
  (data (i32.const 0) "flood flood flood flood flood flood flood flood flood flood over")
  (func (export "on_pio_read") (param i32 i32) (result i64) (local i32)
    (loop $l (call $log (i32.const 0) (i32.const 64))
      (local.set 2 (i32.add (local.get 2) (i32.const 1))) (br_if $l (i32.lt_u (local.get 2) (i32.const 500))))
    (i64.const -1))
  (func (export "on_hypercall") (param i32 i32 i32 i32 i32) (result i64) (i64.const -1))"""
BOMB = """
  (func (export "on_pio_read") (param i32 i32) (result i64)
    (if (i32.eq (memory.grow (i32.const 60000)) (i32.const -1)) (then unreachable)) (i64.const -1))"""


class Outcome:
    def __init__(self, report: RunReport, audit: list[dict[str, Any]]) -> None:
        assert report.result is not None
        self.result = report.result
        self.faults = [record for record in audit if record["event"] == "fault"]
        self.audit = audit

    def trace_outside(self) -> list[PioEvent]:
        return [event for event in self.result.trace if event.port not in CLAIMED]


def run(studio, cpu: str = "soft", **options: Any) -> Outcome:
    log = studio.audit_log
    log.unlink(missing_ok=True)
    chosen = RunOptions(cpu=cpu, timeout=60, trace=True, audit_log=log, seed=b"test", **options)
    report = Launcher(studio.image, studio.policy, chosen).run()
    return Outcome(report, studio.log())


@pytest.fixture
def harmless(studio) -> Outcome:
    """A run with an extension of the same claims that answers as an absent device does."""
    studio.graft(studio.wat(ALL_ONES))
    outcome = run(studio)
    assert outcome.result.reason is EndReason.SHUTDOWN
    assert not outcome.faults
    assert len(outcome.trace_outside()) > 50
    return outcome


@pytest.mark.parametrize(
    ("imports", "body", "kind"),
    [("", LOOP, "fuel"), ("", TRAP, "trap"), (GUEST_READ, OUTSIDE, "window"), ("", BOMB, "trap")],
    ids=["infinite loop", "trap", "outside its window", "memory bomb"],
)
def test_a_fault_leaves_the_rest_of_the_machine_alone(studio, harmless, imports: str, body: str, kind: str) -> None:
    studio.graft(studio.wat(body, imports))
    outcome = run(studio)
    assert outcome.result.reason is EndReason.SHUTDOWN
    assert [(fault["id"], fault["kind"]) for fault in outcome.faults] == [(CULPRIT, kind)]
    assert outcome.trace_outside() == harmless.trace_outside()
    assert b"clock: absent" in outcome.result.serial


def test_slow_calls_end_by_the_wall_clock(studio, harmless) -> None:
    limits = {"memoryMiB": 1, "fuelPerCall": 1_000_000_000, "callMs": 50, "logBytes": 1024}
    studio.graft(studio.wat(LOOP), limits=limits)
    outcome = run(studio)
    assert [(fault["id"], fault["kind"]) for fault in outcome.faults] == [(CULPRIT, "deadline")]
    assert outcome.trace_outside() == harmless.trace_outside()


def test_a_log_flood_is_cut(studio, harmless) -> None:
    studio.graft(studio.wat(FLOOD, LOG))
    outcome = run(studio)
    assert outcome.trace_outside() == harmless.trace_outside()
    written = sum(len(record["text"]) for record in outcome.audit if record["event"] == "log")
    assert 0 < written <= 1024
    assert [record["id"] for record in outcome.audit if record["event"] == "quota"] == [CULPRIT]


def test_a_worker_that_is_killed(studio, harmless, monkeypatch: pytest.MonkeyPatch) -> None:
    from vmgraft.vmmhost.layer.proxy import ExtensionProxy

    answer = ExtensionProxy.pio_read

    def kill_then_answer(self: ExtensionProxy, port: int, size: int) -> int:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
        return answer(self, port, size)

    monkeypatch.setattr(ExtensionProxy, "pio_read", kill_then_answer)
    studio.graft(studio.wat(ALL_ONES))
    outcome = run(studio)
    assert [(fault["id"], fault["kind"]) for fault in outcome.faults] == [(CULPRIT, "died")]
    assert outcome.trace_outside() == harmless.trace_outside()


@pytest.mark.parametrize("when", ["before", "in the midst of", "after"])
def test_a_worker_that_is_killed_at_any_moment(studio, harmless, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    from vmgraft.vmmhost.layer.link import WorkerLink

    calls = sum(record["calls"] for record in harmless.audit if record["event"] == "extension-end")
    assert calls >= 2
    real_call, real_post, state = WorkerLink.call, WorkerLink._post, {"made": 0, "victim": 0}

    def kill(link: WorkerLink, moment: str) -> None:
        if moment == when and state["made"] == state["victim"]:
            os.kill(link.pid, signal.SIGKILL)

    def call(self: WorkerLink, *args: Any, **named: Any) -> int:
        state["made"] += 1
        kill(self, "before")
        answer = real_call(self, *args, **named)
        kill(self, "after")
        return answer

    def post(self: WorkerLink, packet: bytes, deadline: float) -> bool:
        sent = real_post(self, packet, deadline)
        kill(self, "in the midst of")
        return sent

    monkeypatch.setattr(WorkerLink, "call", call)
    monkeypatch.setattr(WorkerLink, "_post", post)
    studio.graft(studio.wat(ALL_ONES))
    for victim in range(1, calls + 1):
        state.update(made=0, victim=victim)
        outcome = run(studio)
        assert outcome.result.reason is EndReason.SHUTDOWN
        assert outcome.trace_outside() == harmless.trace_outside()
        assert {fault["kind"] for fault in outcome.faults} <= {"died"}


def test_on_fault_stop_ends_the_guest(studio) -> None:
    studio.graft(studio.wat(TRAP), onFault="stop")
    outcome = run(studio)
    assert outcome.result.reason is EndReason.FAULT
    assert b"done" not in outcome.result.serial


def test_on_fault_restart_gives_a_fresh_worker(studio) -> None:
    once = """
      (global $n (mut i32) (i32.const 0))
      (func (export "on_hypercall") (param i32 i32 i32 i32 i32) (result i64) (i64.const -1))
      (func (export "on_pio_read") (param i32 i32) (result i64) unreachable)"""
    studio.graft(studio.wat(once), onFault="restart(1)")
    outcome = run(studio)
    assert outcome.result.reason is EndReason.FAULT
    assert len(outcome.faults) == 2
    assert len([record for record in outcome.audit if record["event"] == "extension-start"]) == 2


@pytest.mark.parametrize(
    ("imports", "error"),
    [
        ('(import "env" "system" (func (param i32) (result i32)))', (CapabilityError, GraftFormatError)),
        ('(import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))',
         (CapabilityError, GraftFormatError)),
        ('(import "vmgraft" "random" (func (param i32 i32)))', (CapabilityError,)),
    ],
    ids=["unknown import", "WASI", "import without grant"],
)  # fmt: skip
def test_imports_that_are_not_granted(studio, imports: str, error: tuple[type[VmgraftError], ...]) -> None:
    studio.graft(studio.wat(ALL_ONES, imports))
    with pytest.raises(error):
        run(studio)
    assert '"event": "boot"' not in (studio.audit_log).read_text()


def test_a_compile_bomb_ends_before_the_guest_starts(studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions just below the size limit with many live locals keep a register allocator busy for a minute."""
    from vmgraft.vmmhost import session

    monkeypatch.setattr(session, "ExtensionHost", functools.partial(session.ExtensionHost, compile_cpu_seconds=1))
    count = 400
    local = [f"(local.get {1 + n})" for n in range(count)]
    steps = "".join(
        f"(local.set {1 + i % count} (i32.add (i32.mul {local[i * 7 % count]} {local[i * 13 % count]})"
        f" (i32.rem_s {local[i * 29 % count]} (local.get 0))))"
        for i in range(3500)
    )
    bomb = f"(func (param i32) {'(local i32)' * count} (loop $l {steps} (br_if $l (local.get 5))))"
    studio.graft(studio.wat(ALL_ONES + bomb * 12), onFault="stop")
    with pytest.raises(ExtensionFaultError, match="CPU time"):
        run(studio)
    records = studio.log()
    assert not [record for record in records if record["event"] == "boot"]
    assert [record["id"] for record in records if record["event"] == "fault"] == [CULPRIT]


def test_a_claim_on_a_core_device_is_refused_before_any_worker(studio) -> None:
    studio.graft(studio.wat(ALL_ONES), capabilities=["pio:0x3f8-0x3ff"])
    with pytest.raises(CapabilityError, match="core"):
        run(studio)
    assert "extension-start" not in (studio.audit_log).read_text()


def children() -> set[int]:
    """Return the PIDs of this process's children, zombies among them."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"PPid:\t{os.getpid()}\n" in text:
            found.add(int(status.parent.name))
    return found


def test_no_process_is_left_behind(studio) -> None:
    before = children()
    studio.graft(studio.wat(LOOP))
    run(studio)
    assert children() <= before
