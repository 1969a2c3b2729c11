"""``vmgraft ctl`` against ``vmgraft run``, as programs: the host has given up its rights, and changes all the same."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from control_world import vmgraft

SPIN = bytes.fromhex("ba1005 ec ebfd".replace(" ", ""))


@contextmanager
def guest(studio: Any, cpu: str = "soft") -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    studio.boot_code(SPIN)
    studio.graft(studio.wat(studio.ONES))
    listening = studio.folder / "guest.sock"
    command = [
        sys.executable, "-m", "vmgraft", "run", str(studio.image), "--policy", str(studio.policy), "--cpu", cpu,
        "--audit-log", str(studio.audit_log), "--timeout", "60", "--control", str(listening),
        "--state", str(studio.folder / "state" / "state.db"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while '"event": "boot"' not in (studio.audit_log.read_text() if studio.audit_log.exists() else ""):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
            time.sleep(0.01)
        yield process, listening
    finally:
        process.kill()
        process.communicate()


def test_the_journey(studio: Any, cpu: str) -> None:
    with guest(studio, cpu) as (process, listening):
        status = json.loads(vmgraft("ctl", listening, "status", "--json").stdout)
        assert (status["ok"], status["extensions"][0]["version"]) == (True, "1.0")
        newer = studio.folder / "newer.img"
        newer.write_bytes(studio.guest.ljust(1 << 20, b"\0"))
        studio.graft(studio.wat(studio.ONES), newer, version="2.0", securityVersion=2)
        told = vmgraft("ctl", listening, "replace", newer)
        assert told.stdout == b"org.example.culprit 2.0 runs in place of the one before\n"
        older = vmgraft("ctl", listening, "replace", studio.image, "--json", code=16)
        assert json.loads(older.stdout)["error"]["code"] == "rollback"
        assert b"org.example.culprit 2.0: running" in vmgraft("ctl", listening, "status").stdout
        looks = vmgraft("ctl", listening, "stats", "--watch", "0.1", "--count", "2").stdout.decode()
        assert looks.count("exits") == 2 and "(+" in looks and "p99" in looks
        assert " in a call)" in looks and "fuel 0" not in looks
        picture = studio.folder / "screen.png"
        vmgraft("ctl", listening, "screen", "-o", picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
        vmgraft("ctl", listening, "unload", "org.example.culprit")
        assert json.loads(vmgraft("ctl", listening, "stats", "--json").stdout)["extensions"] == []
        vmgraft("ctl", listening, "load", newer)
        vmgraft("ctl", listening, "stop")
        assert process.wait(20) == 0, process.stderr and process.stderr.read()
        assert not listening.exists()
    assert sorted(path.name for path in (studio.folder / "state").iterdir()) == ["state.db"]
    shown = json.loads(vmgraft("state", "show", "--state", studio.folder / "state" / "state.db", "--json").stdout)
    assert [entry["securityVersion"] for entry in shown["extensions"]] == [2]
    boot = next(record for record in studio.log() if record["event"] == "boot")
    assert {"landlock", "seccomp"} <= set(boot["host"]), "it was confined all the while"


def test_nobody_there(tmp_path: Path) -> None:
    refused = vmgraft("ctl", tmp_path / "none", "status", "--json", code=20)
    assert json.loads(refused.stdout)["error"]["code"] == "host"


def test_an_audit_log_is_read(studio: Any) -> None:
    with guest(studio) as (process, listening):
        # A log of a run that goes on can be shown, and is not whole yet.
        assert b"boot" in vmgraft("audit-log", "show", studio.audit_log).stdout
        vmgraft("audit-log", "verify", studio.audit_log, code=3)
        vmgraft("ctl", listening, "stop")
        process.wait(20)
    lines = vmgraft("audit-log", "show", studio.audit_log).stdout.decode().splitlines()
    assert [line.split()[2] for line in lines][:4] == ["start", "verification", "plan", "extension-start"]
    assert lines[1].split(" ", 3)[3].strip().startswith("verification") or "accepted, " in lines[1]
    assert [line.split()[2] for line in lines][-1] == "end"
    only = vmgraft("audit-log", "show", studio.audit_log, "--event", "control", "--json")
    assert [record["op"] for record in json.loads(only.stdout)["records"]] == ["stop"]
    about = vmgraft("audit-log", "show", studio.audit_log, "--extension", "org.example.culprit").stdout.decode()
    assert {line.split()[2] for line in about.splitlines()} == {"extension-start", "extension-end"}
    for command in (["audit-log", "verify"], ["check-log"]):
        assert b"the chain holds" in vmgraft(*command, studio.audit_log).stdout
    data = studio.audit_log.read_bytes()
    studio.audit_log.write_bytes(data.replace(b'"shutdown"', b'"timeout"', 1))
    shown = vmgraft("audit-log", "show", studio.audit_log, code=3)
    assert shown.stdout.decode().splitlines() == lines[:-1], "what the chain holds is shown, what it does not is not"
    assert b"was changed" in shown.stderr


@pytest.mark.parametrize("arguments", [["stats", "--count", "2"], ["load"], ["explode"], ["stats", "--watch", "0"]])
def test_wrong_command_lines(tmp_path: Path, arguments: list[str]) -> None:
    vmgraft("ctl", tmp_path / "none", *arguments, code=2)
