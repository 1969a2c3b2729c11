"""What `run`, `serve`, `compose` and `ctl` refuse, where their output goes, and what a terminal shows."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from control_world import vmgraft
from test_ctl_program import guest

from vmgraft.vmmhost.nbd.serve import Serving

#: Sends lines to COM1, waits a moment, sends more, and powers off.
TEXT = b"first line of the guest\r\nsecond line\r\n"
SHOW = (
    bytes.fromhex("be187cbaf803ac84c07403eeebf8ba0406b80020efebfe")  # si=7C18h: out COM1 until NUL, then power off
    .ljust(0x18, b"\x90") + TEXT + b"\0"
)  # fmt: skip


@pytest.fixture
def shown(studio: Any) -> list[str]:
    """The command line of a run that sends text and ends."""
    studio.boot_code(SHOW)
    studio.graft(studio.wat(studio.ONES))
    return ["run", str(studio.image), "--policy", str(studio.policy), "--cpu", "soft", "--state", "none",
            "--timeout", "20"]  # fmt: skip


def on_a_terminal(command: list[str]) -> tuple[int, bytes]:
    """Run the program with a pseudo-terminal as stdout and stderr; return its exit code and what was shown."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vmgraft", *command], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 30
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    seen += os.read(ours, 65536)
                except OSError:  # the other end is closed
                    break
        return process.wait(10), seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_the_bar_is_gone_before_the_guest_speaks(shown: list[str]) -> None:
    code, seen = on_a_terminal(shown)
    assert code == 0, seen
    assert b"verify" in seen, "there was a bar"
    before, text, after = seen.partition(TEXT.replace(b"\r\n", b"\r\r\n"))
    assert text, f"the guest's lines came through whole: {seen!r}"
    assert b"verify" not in after and b"\x1b[?25h" in before, "the cursor was given back first"
    assert b"\x1b[?25l" not in after and b"\x1b[2K" not in after and b"\x1b[1A" not in after


def test_a_server_says_where_it_listens_without_the_bar(studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar has ended when the address is printed."""
    from contextlib import contextmanager

    seen: list[str] = []

    @contextmanager
    def bar(label: str, *, quiet: bool = False) -> Any:
        yield None
        seen.append("bar ended")

    def run(self: Serving) -> None:
        assert seen == [] and self._ready is not None
        self._ready("nbd:here")
        assert seen == ["bar ended"]
        raise KeyboardInterrupt

    monkeypatch.setattr("vmgraft.cli.output.progress_bar", bar)
    monkeypatch.setattr(Serving, "run", run)
    done = vmgraft("serve", studio.image, "--policy", studio.policy, "--listen", "0", code=130)
    assert done.stdout == b"nbd:here\n" and seen == ["bar ended"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--engine", "qemu", "--pin", "0"], "--pin does not go with --engine qemu"),
        (["--engine", "qemu", "--firmware", "trap"], "--firmware does not go with --engine qemu"),
        (["--engine", "qemu", "--debug", "-"], "--debug does not go with --engine qemu"),
        (["--screen-format", "png"], "--screen-format goes with --screen"),
        (["--screen", "-", "--serial", "-"], "stdout takes one of them"),
        (["--debug", "-", "--serial", "-"], "stdout takes one of them"),
        (["--record", "t", "--control", "s"], "--record does not go with --control"),
        (["--replay", "t", "--console"], "--replay does not go with --console"),
        (["--record", "t", "--cpu", "kvm"], "--record does not go with --cpu kvm"),
        (["--audit-log", "-"], "a file with a name"),
        (["--record", "-"], "a file with a name"),
        (["--control", "-"], "a file with a name"),
    ],
)
def test_what_a_run_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = vmgraft("run", "none.img", "--policy", "none.json", *options, code=2)
    assert words in done.stderr.decode(), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["serve", "i", "--policy", "p", "--listen", "0", "--overlay-size", "5"], "--overlay-size goes with --overlay"),
        (["serve", "i", "--policy", "p", "--socket", "-"], "a file with a name"),
        (["serve", "i", "--policy", "p", "--listen", "0", "--audit-log", "-"], "a file with a name"),
        (["ctl", "s", "snapshot", "-"], "a file with a name"),
        (["audit-log", "verify", "-"], "a file with a name"),
        (["check-log", "-"], "a file with a name"),
        (["compose", "i", "-o", "-", "--policy", "p", "--json"], "a volume goes to a file or a pipe"),
    ],
)
def test_what_others_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    done = vmgraft(*command, code=2)
    assert words in (done.stderr + done.stdout).decode()
    assert list(tmp_path.iterdir()) == []


def test_the_hint_of_a_console_names_what_was_given(tmp_path: Path) -> None:
    line = ("run", "none.img", "--policy", "none.json", "--console")
    assert b"hint: leave --console out\n" in vmgraft(*line, code=2).stderr
    assert b"hint: leave --serial out\n" in vmgraft(*line, "--serial", tmp_path / "s", code=2).stderr


def test_a_device_takes_the_serial_port_and_stays(shown: list[str], tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    command = [sys.executable, "-m", "vmgraft", *shown, "--serial", "/dev/null", "--audit-log", str(log)]
    done = subprocess.run(command, check=False, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, b"") and Path("/dev/null").is_char_device()
    head = json.loads(log.read_text().splitlines()[-1])["hash"]
    assert f"audit log {log}: head {head}\n" in done.stderr.decode()


def test_a_terminal_is_no_such_device(shown: list[str]) -> None:
    ours, theirs = pty.openpty()
    try:
        done = vmgraft(*shown, "--serial", os.ttyname(theirs), code=2)
        assert b"a terminal gets no output as it is" in done.stderr
    finally:
        os.close(ours)
        os.close(theirs)


def test_looks_end_with_the_guest(studio: Any) -> None:
    with guest(studio) as (process, listening):
        screen = json.loads(vmgraft("ctl", listening, "screen", "--json").stdout)
        assert screen["ok"] and screen["file"] is None and len(screen["lines"]) == 25
        picture = studio.folder / "now.png"
        screen = json.loads(vmgraft("ctl", listening, "screen", "--json", "-o", picture).stdout)
        assert screen["file"] == str(picture) and picture.read_bytes().startswith(b"\x89PNG")
        assert vmgraft("ctl", listening, "screen", "--json", "--format", "png", code=2)
        command = [sys.executable, "-m", "vmgraft", "ctl", str(listening), "stats", "--watch", "0.1"]
        watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert watching.stdout is not None and watching.stdout.readline().startswith(b"time")
            vmgraft("ctl", listening, "stop")
            out, err = watching.communicate(timeout=20)
        finally:
            watching.kill()
            watching.wait()
        assert (watching.returncode, err) == (0, b"") and out.endswith(b"the guest has ended\n")
        assert process.wait(20) == 0


def test_looks_at_a_killed_guest_fail(studio: Any) -> None:
    with guest(studio) as (process, listening):
        command = [sys.executable, "-m", "vmgraft", "ctl", str(listening), "stats", "--watch", "0.1"]
        watching = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert watching.stdout is not None and watching.stdout.readline().startswith(b"time")
            process.kill()
            _out, err = watching.communicate(timeout=20)
        finally:
            watching.kill()
            watching.wait()
        assert watching.returncode == 20 and b"went away" in err
