"""Recordings: a run is repeated bit for bit, and nothing but the very recording of the very run is played."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmgraft.cli.ctlview import show_extension
from vmgraft.errors import FileError, HostError, UsageError, VmgraftError
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.launch import Launcher, RunReport
from vmgraft.vmmhost.layer.protocol import Kind
from vmgraft.vmmhost.layer.zygote import Zygote
from vmgraft.vmmhost.plan import RunOptions
from vmgraft.vmmhost.tape.replay import DivergedError

#: Reads port 510h 200 times and sends what it reads to COM1, then the time of day (CMOS 0), then powers off.
READ_AND_SEND = bytes.fromhex("b9c800 ba1005 ec baf803 ee e2f6 30c0 e670 e471 ee ba0406 b80020 ef f4".replace(" ", ""))

IMPORTS = """(import "vmgraft" "random" (func $random (param i32 i32)))
  (import "vmgraft" "set_tick" (func $tick (param i64)))
  (import "vmgraft" "now" (func $now (result i64)))
  (import "vmgraft" "guest_read" (func $read (param i64 i32 i32) (result i32)))
  (import "vmgraft" "guest_write" (func $write (param i64 i32 i32) (result i32)))"""
#: Answers with randomness, virtual time, what ticks counted, and a byte of guest memory that it changes each time.
BODY = """(global $ticks (mut i32) (i32.const 0))
  (func (export "on_start") (param i32) (result i32) (call $tick (i64.const 10000000)) (i32.const 0))
  (func (export "on_tick") (param i64) (global.set $ticks (i32.add (global.get $ticks) (i32.const 1))))
  (func (export "on_pio_read") (param i32 i32) (result i64)
    (call $random (i32.const 0) (i32.const 1))
    (drop (call $read (i64.const 0x10000) (i32.const 4) (i32.const 1)))
    (i32.store8 (i32.const 4) (i32.add (i32.load8_u (i32.const 4)) (i32.const 3)))
    (drop (call $write (i64.const 0x10000) (i32.const 4) (i32.const 1)))
    (i64.extend_i32_u (i32.xor (i32.xor (i32.load8_u (i32.const 0)) (i32.load8_u (i32.const 4)))
      (i32.xor (global.get $ticks) (i32.wrap_i64 (call $now))))))"""
CAPABILITIES = ["random", "tick", "now", "guest:0x10000+0x1000:rw", "pio:0x510-0x517"]


@pytest.fixture
def noisy(studio: Any) -> Any:
    """An image whose guest shows on the serial port what an unpredictable extension says."""
    studio.boot_code(READ_AND_SEND)
    studio.graft(studio.wat(BODY, IMPORTS), capabilities=CAPABILITIES)
    return studio


@pytest.fixture(scope="module")
def recorded(make_studio: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Such an image and one recording of it, for tests that only change the file."""
    studio = make_studio(tmp_path_factory.mktemp("recorded"))
    studio.boot_code(READ_AND_SEND)
    studio.graft(studio.wat(BODY, IMPORTS), capabilities=CAPABILITIES)
    tape = studio.folder / "tape"
    run(studio, record=tape)
    return studio, tape


def run(studio: Any, **chosen: Any) -> RunReport:
    options = RunOptions(**({"cpu": "soft", "timeout": 60} | chosen))
    return Launcher(studio.image, studio.policy, options).run()


def output(report: RunReport) -> tuple[bytes, tuple[str, ...], int, list[Any]]:
    assert report.result is not None
    assert report.result.reason is EndReason.SHUTDOWN
    return report.result.serial, report.result.screen, report.result.virtual_ns, list(report.result.trace)


def test_a_replay_repeats_the_run(noisy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tape = tmp_path / "tape"
    recorded = output(run(noisy, record=tape, trace=True))
    assert len(set(recorded[0])) > 20, "the extension says something else each time"
    assert output(run(noisy, trace=True))[0] != recorded[0], "and in each run"
    with monkeypatch.context() as patch:
        patch.setattr(Zygote, "start", lambda: pytest.fail("a worker was started"))
        for _ in range(2):
            assert output(run(noisy, replay=tape, trace=True, audit_log=noisy.audit_log)) == recorded
            last = [record for record in noisy.log() if record["event"] == "replay"]
            assert last[0]["sha256"] in tape.read_text().splitlines()[-1]
            assert last[1]["whole"] is True
            (start,) = [record for record in noisy.log() if record["event"] == "extension-start"]
            assert (start["replayed"], start["pid"], start["isolation"], start["mechanisms"]) == (True, None, None, [])
            assert not {"seen", "unseen", "seccomp"} & set(start)
            noisy.audit_log.unlink()


def test_ticks_come_back_where_they_were(studio: Any, tmp_path: Path) -> None:
    """The guest polls until two ticks are counted: how often it must is decided by the wall clock, once."""
    code = "ba1005 ec 88c4 baf803 ee 80fc03 72f1 ba0406 b80020 ef f4"
    studio.boot_code(bytes.fromhex(code.replace(" ", "")))
    body = BODY.replace("(call $random (i32.const 0) (i32.const 1))", "(return (i64.extend_i32_u (global.get $ticks)))")
    studio.graft(studio.wat(body, IMPORTS), capabilities=CAPABILITIES)
    recorded = output(run(studio, record=tmp_path / "tape"))
    assert set(recorded[0]) == {0, 1, 2, 3}
    assert '["at",' in (tmp_path / "tape").read_text()
    assert output(run(studio, replay=tmp_path / "tape")) == recorded


@pytest.mark.parametrize("wish", ["restart(1)", "stop"])
def test_faults_come_back(studio: Any, tmp_path: Path, wish: str) -> None:
    studio.boot_code(READ_AND_SEND)
    studio.graft(studio.wat('(func (export "on_pio_read") (param i32 i32) (result i64) unreachable)'), onFault=wish)
    reports = [run(studio, record=tmp_path / "tape"), run(studio, replay=tmp_path / "tape")]
    first, second = (report.result for report in reports)
    assert first is not None and second is not None
    assert (first.reason, first.detail, first.serial[:-1]) == (second.reason, second.detail, second.serial[:-1])
    assert reports[0].extensions[0]["faults"] == reports[1].extensions[0]["faults"] > 0


def test_a_worker_that_is_too_slow_comes_back(studio: Any, tmp_path: Path) -> None:
    studio.boot_code(READ_AND_SEND)
    limits = {"memoryMiB": 1, "fuelPerCall": 1_000_000_000, "callMs": 100, "logBytes": 1024}
    loop = '(func (export "on_pio_read") (param i32 i32) (result i64) (loop $l (br $l)) (i64.const 0))'
    studio.graft(studio.wat(loop), limits=limits)
    recorded = output(run(studio, record=tmp_path / "tape"))
    assert '["late",0,"recv"]' in (tmp_path / "tape").read_text()
    assert output(run(studio, replay=tmp_path / "tape")) == recorded


def test_a_replay_is_not_remembered(noisy: Any, tmp_path: Path) -> None:
    run(noisy, record=tmp_path / "tape")
    report = run(noisy, replay=tmp_path / "tape", state=tmp_path / "state" / "state.db")
    assert report.memory == {"file": str(tmp_path / "state" / "state.db"), "created": False, "raised": []}


def test_a_replay_claims_no_isolation(noisy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tape = tmp_path / "tape"
    (lived,) = run(noisy, record=tape).extensions
    report = run(noisy, replay=tape)
    (played,) = report.extensions
    assert (lived["replayed"], played["replayed"], played["isolation"], played["mechanisms"]) == (False, True, None, [])
    assert lived["isolation"] is not None
    assert played["calls"] == lived["calls"]
    show_extension(played, err=False)
    assert ": running, replayed, " in capsys.readouterr().out


# --- what is not played ----------------------------------------------------------------------------------------------


def refused(studio: Any, tape: Path, kind: type[VmgraftError], words: str, **chosen: Any) -> None:
    with pytest.raises(kind, match=words):
        run(studio, replay=tape, **chosen)


def reseal(lines: list[str]) -> str:
    """Return a recording with an honest end."""
    body = "".join(line + "\n" for line in lines)
    end = ["end", len(lines) - 1, hashlib.sha256(body.encode()).hexdigest()]
    return body + json.dumps(end, separators=(",", ":")) + "\n"


def test_another_run_is_not_played(recorded: Any, studio: Any) -> None:
    made, tape = recorded
    refused(made, tape, UsageError, "memoryMiB differs", memory_mib=65)
    refused(made, tape, UsageError, "keys differs", keys="x")
    refused(made, tape, UsageError, "other extensions", extensions=False)
    studio.boot_code(READ_AND_SEND)
    studio.graft(studio.wat(BODY + "(func)", IMPORTS), capabilities=CAPABILITIES)
    refused(studio, tape, UsageError, "other extensions")
    studio.image.unlink()
    studio.graft(studio.wat(BODY, IMPORTS), capabilities=[*CAPABILITIES, "log"])  # the same module, with more rights
    refused(studio, tape, UsageError, "statementSha256 differs")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", "not a recording"),
        (lambda text: text.replace("vmgraftRecording", "something"), "not a recording"),
        (lambda text: text[:-20], "not an event|cut or was changed"),
        (lambda text: "\n".join(text.splitlines()[:-1]) + "\n", "cut or was changed"),
        (lambda text: text.replace('["recv",0,"4', '["recv",0,"f', 1), "cut or was changed"),
        (lambda text: text + text.splitlines()[-2] + "\n", "cut or was changed"),
        (lambda text: text.replace('["spawn"', '["spawm"', 1), "not an event"),
        (lambda text: text.replace('["spawn",0', '["spawn",true', 1), "not an event"),
        (lambda text: text.replace('["recv",0,"', '["recv",0,"g', 1), "not an event"),
        (lambda text: text.replace('["recv",0,"', '["recv",7000,"', 1), "not an event"),
        (lambda text: text.replace('["recv",0,"', '["recv",0,"' + "00" * 9000, 1), "not an event"),
        (lambda text: text.replace('"seed": "', '"seed": "zz', 1), "clock or seed"),
        (lambda text: text.replace('"rtcEpoch": ', '"rtcEpoch": -', 1), "clock or seed"),
        (lambda text: text.split("\n", 1)[0] + "\n" + "[" * 5000 + "\n", "not an event"),
        (lambda text: "[" * 5000 + "\n", "not a recording"),
    ],
)  # fmt: skip
def test_a_changed_file_is_not_played(recorded: Any, tmp_path: Path, change: Callable[[str], str], words: str) -> None:
    made, honest = recorded
    changed = change(honest.read_text())
    assert changed != honest.read_text()
    (tmp_path / "tape").write_text(changed)
    refused(made, tmp_path / "tape", FileError, words)


@pytest.mark.parametrize("what", ["call", "answer", "fewer", "more", "window"])
def test_a_forged_recording_goes_nowhere(recorded: Any, tmp_path: Path, what: str) -> None:
    """With the end made anew, so that only what is played tells: the host checks packets as those of a worker."""
    made, honest = recorded
    tape, log = tmp_path / "tape", tmp_path / "log"
    lines = honest.read_text().splitlines()[:-1]
    read = f'["send",0,"{Kind.CALL_PIO_READ:02x}'
    calls = [at for at, line in enumerate(lines) if line.startswith(read)]
    replies = [at for at, line in enumerate(lines) if at > calls[0] and line.startswith('["recv"')]
    if what == "call":
        lines[calls[3]] = lines[calls[3]].replace(read, read[:-2] + "ff")
    elif what == "answer":
        lines[replies[0] :] = ['["recv",0,"ff"]', '["kill",0]', '["at",1]']
    elif what == "fewer":
        del lines[calls[5] :]
    elif what == "more":
        lines.insert(calls[5], lines[calls[5]])
    else:  # guest memory outside the window, as GUEST_READ asks for it
        head = bytes.fromhex(json.loads(lines[replies[0]])[2])
        forged = head[:8] + (0x7C00).to_bytes(8, "little")
        lines[replies[0] :] = [json.dumps(["recv", 0, forged.hex()]), '["kill",0]', '["at",1]']
    tape.write_text(reseal(lines))
    if what in ("answer", "window"):  # the worker is to blame, and dropped
        report = run(made, replay=tape, audit_log=log)
        records = [json.loads(line) for line in log.read_text().splitlines()]
        faults = [record["kind"] for record in records if record["event"] == "fault"]
        assert faults == [{"answer": "protocol", "window": "window"}[what]]
        assert [record["whole"] for record in records if "whole" in record] == [False]
        assert report.extensions[0]["state"] == "detached"
    else:
        refused(made, tape, DivergedError, "the run differs")


def test_what_cannot_be_repeated_is_not_recorded(noisy: Any, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="KVM"):
        run(noisy, record=tmp_path / "tape", cpu="kvm")
    with pytest.raises(HostError, match="is not recorded"):
        run(noisy, record=tmp_path / "tape", control=tmp_path / "socket")
    with pytest.raises(UsageError, match="one of the two"):
        run(noisy, record=tmp_path / "tape", replay=tmp_path / "tape")
    assert not (tmp_path / "tape").exists()


def test_a_recording_does_not_overwrite(noisy: Any, tmp_path: Path) -> None:
    (tmp_path / "tape").write_text("mine")
    with pytest.raises(FileError, match="cannot create"):
        run(noisy, record=tmp_path / "tape")
    assert (tmp_path / "tape").read_text() == "mine"
    with pytest.raises(FileError, match="cannot read"):
        run(noisy, replay=tmp_path / "nowhere")
