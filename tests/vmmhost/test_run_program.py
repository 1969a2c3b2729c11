"""The program ``vmgraft run``: signals, and a host that has given up its rights."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from assembling import GUESTS, nasm

LONG_CALLS = {"memoryMiB": 1, "fuelPerCall": 1_000_000_000, "callMs": 3000, "logBytes": 1024}
SPIN = bytes.fromhex("ebfe")


def running(pid: int) -> bool:
    """Whether a process is there and not just waiting to be reaped."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError("waited in vain")


@contextmanager
def program(studio, cpu: str = "soft") -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """Run the command line program until the guest spins; give it, and the PIDs of zygote and worker."""
    studio.boot_code(SPIN)
    studio.graft(studio.wat(studio.ONES))
    path = studio.audit_log
    command = [
        sys.executable, "-m", "vmgraft", "run", str(studio.image), "--policy", str(studio.policy), "--cpu", cpu,
        "--audit-log", str(path), "--timeout", "60",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: path.exists() and '"event": "boot"' in path.read_text())
        worker = next(json.loads(line)["pid"] for line in path.read_text().splitlines() if '"extension-start"' in line)
        zygote = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        time.sleep(0.1)
        assert running(worker)
        yield process, [zygote, worker]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_in_order(studio, number: signal.Signals) -> None:
    with program(studio) as (process, others):
        process.send_signal(number)
        assert process.wait(10) == 130
        assert not any(map(running, others))
    assert (studio.log()[-1]["event"], studio.log()[-1]["reason"]) == ("end", "interrupted")


def test_sigkill_leaves_no_process_behind(studio, cpu: str) -> None:
    with program(studio, cpu) as (process, others):
        process.kill()
        process.wait(10)
        wait_for(lambda: not any(map(running, others)), 5)


def test_sigterm_while_a_worker_starts(studio) -> None:
    """Before the guest runs a signal unwinds: workers end, and the log says so."""
    body = '(func (export "on_start") (param i32) (result i32) (loop $l (br $l)) (i32.const 0))'
    studio.graft(studio.wat(body), limits=LONG_CALLS)
    path = studio.audit_log
    script = (
        "import sys; from pathlib import Path; from vmgraft.vmmhost.launch import Launcher;"
        "from vmgraft.vmmhost.plan import RunOptions;"
        "Launcher(Path(sys.argv[1]), Path(sys.argv[2]), RunOptions(cpu='soft', audit_log=Path(sys.argv[3]))).run()"
    )
    command = [sys.executable, "-c", script, str(studio.image), str(studio.policy), str(path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for(lambda: path.exists() and '"extension-start"' in path.read_text())
    process.terminate()
    _out, errors = process.communicate(timeout=10)
    assert b"KeyboardInterrupt: SIGTERM" in errors
    records = studio.log()
    assert (records[-1]["event"], records[-1]["code"]) == ("error", "interrupted")
    assert not running(next(record["pid"] for record in records if record["event"] == "extension-start"))


def test_the_confined_program_has_all_it_needs(studio, cpu: str) -> None:
    """Backing files are read late, workers restarted and outputs written after rights are given up."""
    code = nasm(GUESTS / "far.asm")
    base, image, folder = studio.folder / "base.img", studio.folder / "over.qcow2", studio.folder
    base.write_bytes(b"".join(b"%05d" % number + bytes(65531) if number else code + bytes(65024)
                              for number in range(64)))  # fmt: skip
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", image]
    subprocess.run(create, check=True)
    trap = studio.wat('(func (export "on_pio_read") (param i32 i32) (result i64) unreachable)')
    studio.graft(trap, image, onFault="restart(2)")
    command = [
        sys.executable, "-m", "vmgraft", "run", image, "--policy", studio.policy, "--root", folder, "--cpu", cpu,
        "--audit-log", folder / "audit.jsonl", "--serial", folder / "serial", "--screen", folder / "screen", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert (report["exitCode"], report["end"]["reason"]) == (0, "shutdown")
    assert {"no-new-privs", "seccomp"} <= set(report["confinement"])
    assert (folder / "serial").read_text() == "00003000230004300063"
    assert (folder / "screen").exists()
    assert [item["restarts"] for item in report["layer"]] == [2]
    assert studio.log()[-1]["event"] == "end"
