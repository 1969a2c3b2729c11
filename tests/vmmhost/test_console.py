"""The terminal as a serial console: keys reach the guest, only harmless bytes the terminal, and it is put back."""

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from control_world import vmgraft

from vmgraft.cli.sequences import SequenceFilter
from vmgraft.cli.terminal import Terminal
from vmgraft.errors import UsageError
from vmgraft.vmmhost.core.devices.serial import BACKLOG, LSR_EMPTY, Serial

#: Waits for bytes on COM1 by polling, and sends each back plus one; powers off at 'q'.
ECHO = bytes.fromhex("bafd03 ec a801 74fb baf803 ec 3c71 7405 fec0 ee ebeb ba0406 b80020 ef f4".replace(" ", ""))


# --- the port --------------------------------------------------------------------------------------------------------


class Line:
    """Notes what the interrupt line does."""

    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.sent = bytearray()
        self.port = Serial(self.sent.extend, None, self.levels.append)

    def read(self, offset: int) -> int:
        return self.port.pio_read(offset, 1)

    def write(self, offset: int, value: int) -> None:
        self.port.pio_write(offset, 1, value)


def test_a_port_nobody_feeds_is_quiet() -> None:
    line = Line()
    assert [line.read(offset) for offset in range(8)] == [0, 0, 0x01, 0, 0, LSR_EMPTY, 0xB0, 0]
    line.write(0, 0x41)
    assert (line.sent, line.levels) == (b"A", [])


def test_received_bytes_by_polling_and_by_interrupt() -> None:
    line = Line()
    assert line.port.feed(b"abc") == 3
    assert line.levels == [], "interrupts are off"
    assert line.read(5) == LSR_EMPTY | 1
    assert line.read(0) == ord("a")
    line.write(1, 1)
    assert line.levels == [], "OUT2 holds the line back"
    line.write(4, 0x08)
    assert line.levels == [True]
    assert line.read(2) == 0x04
    assert [line.read(0), line.read(0)] == [ord("b"), ord("c")]
    assert line.levels == [True, False]
    assert (line.read(2), line.read(5), line.read(0)) == (0x01, LSR_EMPTY, 0)


def test_the_empty_transmitter_interrupts_once_a_byte() -> None:
    line = Line()
    line.write(4, 0x08)
    line.write(1, 2)
    assert line.levels == [True], "enabling it raises it"
    assert line.read(2) == 0x02
    assert line.levels == [True, False], "reading the identification acknowledges it"
    line.write(0, 0x41)
    line.write(0, 0x42)
    assert line.levels == [True, False, True, False, True]
    line.port.feed(b"x")
    line.write(1, 3)
    assert line.read(2) == 0x04, "received data goes first"
    line.read(0)
    assert line.read(2) == 0x02
    assert line.read(2) == 0x01


def test_fifo_and_backlog() -> None:
    line = Line()
    line.write(2, 1)
    assert line.read(2) == 0xC1
    text = bytes(index & 0x7F for index in range(BACKLOG + 100))
    taken = line.port.feed(text)
    assert BACKLOG <= taken < len(text)
    assert line.port.feed(b"x" * 100) <= 16, "what has no room is not taken"
    line.write(2, 3)  # empties the FIFO, not what waits before it
    assert line.read(0) == text[16]
    count = 1
    while line.read(5) & 1:
        line.read(0)
        count += 1
    assert count == BACKLOG


def test_loop_back_is_not_mixed_up_with_what_is_fed() -> None:
    line = Line()
    line.write(4, 0x18)
    line.port.feed(b"z")
    line.write(0, 0x41)
    assert [line.read(0), line.read(0)] == [0x41, ord("z")]
    assert line.sent == b""


# --- what may reach a terminal ---------------------------------------------------------------------------------------

HARMLESS = [
    b"plain text\r\n\ttab\x08\x07", b"\x1b[1;31mred\x1b[0m", b"\x1b[2J\x1b[10;20H", b"\x1b[?25l\x1b[?1049h",
    "Größe ☃ 漢".encode(), b"\x1b7\x1b8\x1bM", b"\x1b(0lqk\x1b(B", b"\x1b[K", b"\x1b[3;10r",
]  # fmt: skip
HARMFUL = {
    b"\x1b[?ux": b"x",  # kitty tells its keyboard flags
    b"\x1b[>1ux": b"x",  # and changes them
    b"\x1b[?1;1;0Sx": b"x",  # xterm tells its graphics
    b"\x1b[?4mx": b"x",  # and its key modifiers
    b"\x1b[>4;2mx": b"x",  # and changes them
    b"\x1b[2hx": b"x",  # locks the keyboard
    b"\x1b[#Px": b"x",
    b"\x1b[?99999hx": b"x",
    b"\x1b[?1000rx": b"x",
    b"\x1b]0;title\x07after": b"after",
    b"\x1b]52;c;ZXZpbA==\x1b\\after": b"after",
    b"\x1bP+q544e\x1b\\x": b"x",
    b"\x1b_apc\x1b\\x": b"x",
    b"\x1b^pm\x1b\\x": b"x",
    b"\x1b[6n\x1b[c\x1b[>c\x1b[5nx": b"x",
    b"\x1b[21tx": b"x",
    b"\x1b[4ix": b"x",
    b"\x1b[!px": b"x",
    b"\x1bcx": b"x",
    b"\x1bZx": b"x",
    b"\xc2\x9b6nx": b"6nx",
    b"\xc2\x9d0;t\x07x": b"0;t\x07x",
    b"\x00\x01\x05\x0e\x0f\x7fx": b"x",
    b"\x1b[" + b"1" * 100 + b"mx": b"mx",
    b"\x1b]" + b"x" * 100_000: b"",
    b"\x1b[1\x1b[31mx": b"\x1b[31mx",
    b"\x1b]0;a\x1b[31mx": b"\x1b[31mx",
}


@pytest.mark.parametrize("cut", [1, 2, 1000])
def test_only_harmless_sequences_pass(cut: int) -> None:
    """Also when they come byte by byte, as a serial port sends them."""
    for data, expected in [*((each, each) for each in HARMLESS), *HARMFUL.items()]:
        filter_ = SequenceFilter()
        pieces = [data[at : at + cut] for at in range(0, len(data), cut)]
        shown = b"".join(map(filter_.pass_on, pieces))
        if data.startswith(b"\x1b[" + b"1" * 100):
            assert b"\x1b" not in shown
        else:
            assert shown == expected, data[:40]


def test_modes_are_taken_back() -> None:
    filter_ = SequenceFilter()
    assert filter_.undo() == b"", "plain text changes nothing"
    shown = filter_.pass_on(b"\x1b[?1000;1006h\x1b[?25l\x1b[?7l\x1b[?7h\x1b[?2004h\x1b[?2004l\x1b[3;9r\x1b[4h\x1b[2h")
    assert b"[4h" in shown and b"[2h" not in shown
    undo = filter_.undo()
    for part in (b"\x1b[?1000l", b"\x1b[?1006l", b"\x1b[?25h", b"\x1b[4l", b"\x1b[0m", b"\x1b[r"):
        assert part in undo
    for part in (b"?7", b"?2004"):
        assert part not in undo
    assert SequenceFilter().pass_on(b"\x1b[?2l\x1b[?1001h\x1b[?25;1036lx") == b"x", "what has no way back is dropped"


def test_bytes_that_are_no_utf8_are_marked() -> None:
    assert SequenceFilter().pass_on(b"a\xffb\x80c").decode() == "a\ufffdb\ufffdc"


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_only_a_terminal_is_one(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(UsageError, match="needs a terminal"):
        Terminal(file.fileno())


def test_keys_and_the_escape_key() -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    with Terminal(theirs) as terminal:
        assert terminal.poll() == b""
        os.write(ours, b"ab\x03\x1a")
        time.sleep(0.05)
        assert terminal.poll() == b"ab\x03\x1a", "Ctrl-C and Ctrl-Z are the guest's"
        os.write(ours, b"cd\x1dignored")
        time.sleep(0.05)
        assert (terminal.poll(), terminal.escaped) == (b"cd", True)
        assert termios.tcgetattr(theirs) != before
    assert termios.tcgetattr(theirs) == before
    with Terminal(theirs) as terminal:
        os.close(ours)
        assert (terminal.poll(), terminal.escaped) == (b"", True), "it was hung up"
    os.close(theirs)


@contextmanager
def console(studio: Any, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """Run the program on a pseudo-terminal; give it, and both ends."""
    studio.boot_code(ECHO)
    studio.graft(studio.wat(studio.ONES))
    ours, theirs = pty.openpty()
    command = [
        sys.executable, "-m", "vmgraft", "run", str(studio.image), "--policy", str(studio.policy), "--cpu", "soft",
        "--state", "none", "--timeout", "60", "--console", "--audit-log", str(studio.audit_log), *more,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while not (studio.audit_log.exists() and '"event": "boot"' in studio.audit_log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr and process.stderr.read()
            time.sleep(0.01)
        yield process, ours, theirs
    finally:
        process.kill()
        process.communicate()
        os.close(ours)
        os.close(theirs)


def is_raw(fd: int) -> bool:
    return not termios.tcgetattr(fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def test_a_guest_is_talked_to(studio: Any) -> None:
    with console(studio) as (process, ours, theirs):
        assert is_raw(theirs)
        os.write(ours, b"HAL")
        seen = b""
        while len(seen) < 3:
            seen += os.read(ours, 100)
        assert seen == b"IBM"
        os.write(ours, b"q")
        assert process.wait(20) == 0
        assert not is_raw(theirs)


@pytest.mark.parametrize("how", ["escape", signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT])
def test_the_terminal_is_as_it_was(studio: Any, how: str | signal.Signals) -> None:
    with console(studio) as (process, ours, theirs):
        assert is_raw(theirs)
        os.write(ours, b"H")
        assert os.read(ours, 1) == b"I", "the guest runs"
        if isinstance(how, str):
            os.write(ours, b"a\x1d")
        else:
            process.send_signal(how)
        assert process.wait(20) == (-signal.SIGQUIT if how == signal.SIGQUIT else 130)
        assert not is_raw(theirs)
    if how != signal.SIGQUIT:
        assert (studio.log()[-1]["event"], studio.log()[-1]["reason"]) == ("end", "interrupted")


def test_a_console_needs_the_terminal_for_itself(studio: Any) -> None:
    studio.graft(studio.wat(studio.ONES))
    for more in ([], ["--json"], ["--serial", "-"]):
        done = vmgraft("run", studio.image, "--policy", studio.policy, "--console", *more, code=2)
        assert b"--console needs" in done.stdout + done.stderr
