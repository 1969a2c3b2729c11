"""What the host does while a guest runs in QEMU: listen to everything, wait for nothing long, decide the end."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vmgraft.errors import HostError
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.nbd.server import NbdServer
from vmgraft.vmmhost.qemu.guestapi import GuestApi
from vmgraft.vmmhost.qemu.process import QemuProcess
from vmgraft.vmmhost.qemu.qmp import Qmp
from vmgraft.vmmhost.qemu.screen import BLANK, last_cells, lines_of, read_cells
from vmgraft.vmmhost.qemu.watch import SerialPort

if TYPE_CHECKING:
    from vmgraft.vmmhost.setup import Console

#: Longest wait between two looks at everything, in seconds: with extensions, which tick, and without.
_TICK, _IDLE = 0.01, 0.1
#: Between two looks at the screen, which costs the guest a moment.
_SCREEN: Final = 0.5
#: For QEMU to end by itself once it is told to.
_QUIT_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True)
class Guest:
    """A QEMU that runs, and everything it is reached through."""

    process: QemuProcess
    qmp: Qmp
    serial: SerialPort
    api: GuestApi | None
    server: NbdServer


class Loop:
    """Watches one guest until something ends the run; what ended it first stands.

    Args:
        timeout: Wall-clock seconds; None for no limit.
        until: Text that ends the run when it stands on the screen or came out of the serial port.
        console: Gives keys for the serial port.
    """

    def __init__(self, timeout: float | None, until: str | None, console: Console | None) -> None:
        self._timeout, self._until, self._console = timeout, until, console
        self._began: float | None = None
        self.reason: EndReason | None = None
        self.detail = ""
        self.cells = BLANK
        self.until_seen = False

    def start(self) -> None:
        """Let time begin."""
        self._began = time.monotonic()

    def now_ns(self) -> int:
        """Return nanoseconds since the guest was told to go."""
        return 0 if self._began is None else int((time.monotonic() - self._began) * 1e9)

    def time_left(self) -> float:
        """Return seconds until the run is stopped anyway."""
        if self._timeout is None:
            return math.inf
        return self._timeout - self.now_ns() / 1e9

    def over(self) -> bool:
        """Say whether something has ended the run, or its time is up."""
        return self.reason is not None or self.time_left() <= 0

    def stop(self, reason: EndReason, detail: str = "") -> None:
        """End the run, unless something else did before."""
        if self.reason is None:
            self.reason, self.detail = reason, detail

    def run(self, guest: Guest, tick: Callable[[int], None] | None) -> None:
        """Watch until the run is over; the guest still exists then, if it did not end QEMU."""
        next_tick = next_screen = 0.0
        while self.reason is None:
            self._turn(guest, _TICK if tick is not None else _IDLE)
            now = time.monotonic()
            if tick is not None and now >= next_tick:
                next_tick = now + _TICK
                tick(self.now_ns())
            if self._until is not None and now >= next_screen and self.reason is None:
                next_screen = now + _SCREEN
                self._look(guest)
            self._judge(guest)

    def finish(self, guest: Guest) -> None:
        """Take a last look at the guest, and end QEMU in order."""
        if not guest.qmp.closed:
            self.cells = last_cells(guest.qmp, self.cells)
            self._quit(guest)
        guest.serial.drain()
        seen = self._until is not None and self._until in "\n".join(lines_of(self.cells))
        self.until_seen = self.until_seen or guest.serial.seen or seen

    def _quit(self, guest: Guest) -> None:
        try:
            guest.qmp.execute("quit", seconds=_QUIT_SECONDS)
        except HostError:
            return  # it will be killed
        guest.process.wait(_QUIT_SECONDS)

    def _turn(self, guest: Guest, longest: float) -> None:
        """Wait a little for something to happen, and take in what did."""
        poller = select.poll()
        takers: dict[int, Callable[[], Any]] = {}
        if not guest.process.silent:
            takers[guest.process.messages_fd] = guest.process.read_messages
        if not guest.qmp.closed:
            takers[guest.qmp.fileno()] = lambda: self._events(guest)
        if not guest.serial.closed:
            takers[guest.serial.fileno()] = guest.serial.receive
        for fd in takers:
            poller.register(fd, select.POLLIN)
        api = guest.api
        if api is not None and not api.closed:
            wanted = (select.POLLIN if api.receiving else 0) | (select.POLLOUT if api.sending else 0)
            poller.register(api.fileno(), wanted)
            takers[api.fileno()] = api.serve
        seconds = 0.0 if api is not None and api.busy else min(longest, max(0.0, self.time_left()))
        poller.register(guest.process.pidfd, select.POLLIN)
        for fd, _event in poller.poll(int(seconds * 1000)):
            if fd in takers:
                takers[fd]()
        if api is not None and api.busy:
            api.serve()
        if self._console is not None:
            guest.serial.type(self._console.poll())

    def _events(self, guest: Guest) -> None:
        try:
            guest.qmp.receive()
        except HostError as error:
            self.stop(EndReason.ERROR, error.message)
        while guest.qmp.events:
            event = guest.qmp.events.popleft()
            data = event.get("data")
            if event["event"] == "SHUTDOWN":
                why = data.get("reason") if isinstance(data, dict) else None
                reason = EndReason.RESET if why == "guest-reset" else EndReason.SHUTDOWN
                self.stop(reason, f"QEMU says {why}" if isinstance(why, str) else "QEMU says no reason")
            elif event["event"] == "GUEST_PANICKED":
                self.stop(EndReason.HALT, "the guest says that it panicked")

    def _look(self, guest: Guest) -> None:
        try:
            self.cells = read_cells(guest.qmp)
        except HostError as error:
            self.stop(EndReason.ERROR, error.message)
        if self._until is not None and any(self._until in line for line in lines_of(self.cells)):
            self.until_seen = True

    def _judge(self, guest: Guest) -> None:
        """Say whether something that was seen ends the run."""
        failure = guest.server.failure
        if failure is not None:
            wrong = failure.code == "content-mismatch"
            self.stop(EndReason.DISK if wrong else EndReason.ERROR, failure.message)
        if guest.serial.seen or self.until_seen:
            self.until_seen = True
            self.stop(EndReason.UNTIL, "on the serial port" if guest.serial.seen else "on the screen")
        if self._console is not None and self._console.escaped:
            self.stop(EndReason.INTERRUPTED, "the escape key of the console")
        if self.time_left() <= 0:
            self.stop(EndReason.TIMEOUT, f"after {self._timeout:g} s")
        if self.reason is None and (status := guest.process.wait(0)) is not None:
            self.stop(EndReason.ERROR, f"QEMU ended with {status}: {guest.process.complaint()}")
