"""The host's end of one worker: start it, call it, serve its requests, and never wait without a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from vmgraft.errors import CapabilityError, GraftFormatError, HostError, VmgraftError
from vmgraft.vmmhost.core.contract import GuestMemory
from vmgraft.vmmhost.layer.abi import MASK64, MIN_LOG_COST, Grant, Hook
from vmgraft.vmmhost.layer.faults import FaultKind, WorkerFaultError
from vmgraft.vmmhost.layer.protocol import (
    MAX_REQUESTS,
    RECV_BYTES,
    Call,
    Frame,
    Kind,
    ProtocolError,
    Refusal,
    Setup,
    call,
    frame,
    module_packets,
    parse_worker_frame,
    setup,
)
from vmgraft.vmmhost.layer.sandbox import Mechanism, level_of
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.zygote import WorkerProcess, Zygote, describe_status

_READY_FAST_BIT: Final = 1 << 63
_READY_MECHANISMS_SHIFT: Final = 16
_EXIT_WAIT_SECONDS: Final = 0.5
_REFUSALS: Final[dict[int, type[VmgraftError]]] = {Refusal.CAPABILITY: CapabilityError, Refusal.ISOLATION: HostError}
_NO_ARGS: Final = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a worker reports once its module is loaded and its last rights are gone."""

    level: int
    mechanisms: Mechanism
    hooks: Hook
    fast: bool


@dataclass(slots=True)
class LinkEvents:
    """Where a link leaves what a module asked for; shared by the workers that succeed each other for one extension.

    Attributes:
        on_log: Called with each line and whether it used up the quota.
        log_left: Bytes of log text still allowed.
        stop_asked: The module called ``stop``.
        tick_ns: The interval that ``set_tick`` asked for, or None while it was not called.
    """

    on_log: Callable[[bytes, bool], None]
    log_left: int
    stop_asked: bool = False
    tick_ns: int | None = None


class WorkerLink:
    """One worker process and the protocol with it.

    Args:
        spec: The extension.
        process: Its worker, fresh from the zygote.
        zygote: Asked how the worker ended.
        memory: Guest RAM, reached through the windows of the spec only.
        events: Where requests are left.
    """

    def __init__(
        self,
        spec: ExtensionSpec,
        process: WorkerProcess,
        zygote: Zygote | None,
        memory: GuestMemory,
        events: LinkEvents,
    ) -> None:
        self._spec, self._process, self._zygote, self._memory, self._events = spec, process, zygote, memory, events
        self._socket = process.socket
        self._seq = 0
        self._call_seconds = spec.limits.call_ms / 1000

    @property
    def pid(self) -> int:
        """The worker's PID."""
        return self._process.pid

    def start(self, seed: bytes, seconds: float, cpu_seconds: int) -> Ready:
        """Send the module and wait until it is compiled and the worker is locked in.

        Args:
            seed: 32 bytes for the random generator.
            seconds: Wall-clock time for all of it.
            cpu_seconds: CPU time for compiling.

        Raises:
            WorkerFaultError: DIED, DEADLINE or PROTOCOL.
            GraftFormatError: the module is malformed or breaks the ABI.
            CapabilityError: the module imports what is not granted.
            HostError: the isolation is below the minimum; the module was not touched.
        """
        spec, limits = self._spec, self._spec.limits
        message = Setup(
            grant_of(spec), spec.config, len(spec.module), limits.memory_mib, self._events.log_left,
            limits.fuel_per_call, cpu_seconds, spec.min_isolation, seed,
        )  # fmt: skip
        deadline = time.monotonic() + seconds
        for packet in (setup(message), *module_packets(spec.module)):
            self._wait_until(deadline, "start")
            self._send(packet, "start")
        self._wait_until(deadline, "start")
        reply = self._parse(self._receive("start"), 0)
        if reply.kind == Kind.REFUSED:
            self._refused(reply)
        if reply.kind != Kind.READY:
            raise WorkerFaultError(FaultKind.PROTOCOL, f"{Kind(reply.kind).name} in place of READY")
        self._socket.settimeout(self._call_seconds)
        return _ready(reply)

    def call(
        self, kind: Kind, now: int, *, address: int = 0, size: int = 0, value: int = 0,
        args: tuple[int, int, int, int] = _NO_ARGS,
    ) -> int:  # fmt: skip
        """Call one export and serve the requests it makes meanwhile.

        Returns:
            The export's result as an unsigned 64-bit integer.

        Raises:
            WorkerFaultError: of any kind; the worker must not be used again.
        """
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        self._send(call(Call(kind, size, seq, now & MASK64, address, value, args)), "call")
        reply = self._parse(self._receive("call"), seq)
        if reply.kind != Kind.RESULT:
            reply = self._serve_until_result(reply, time.monotonic() + self._call_seconds)
        return reply.value

    def kill(self) -> bool:
        """End the worker and close what belongs to it; False if the kernel did not end it in time."""
        return self._process.kill()

    # --- packets ---

    def _serve_until_result(self, reply: Frame, deadline: float) -> Frame:
        for _ in range(MAX_REQUESTS):
            match reply.kind:
                case Kind.RESULT:
                    self._socket.settimeout(self._call_seconds)
                    return reply
                case Kind.TRAP:
                    raise WorkerFaultError(FaultKind.TRAP, printable(reply.payload))
                case Kind.FUEL:
                    raise WorkerFaultError(FaultKind.FUEL, f"more than {self._spec.limits.fuel_per_call} units")
                case _:
                    self._serve(reply)
            self._wait_until(deadline, "call")
            reply = self._parse(self._receive("call"), self._seq)
        raise WorkerFaultError(FaultKind.QUOTA, f"more than {MAX_REQUESTS} requests in one call")

    def _serve(self, request: Frame) -> None:
        match request.kind:
            case Kind.GUEST_READ:
                self._window(request.value, request.length, write=False)
                self._send(frame(Kind.GUEST_DATA, self._seq, 0, self._read_guest(request)), "call")
            case Kind.GUEST_WRITE:
                self._window(request.value, request.length, write=True)
                self._write_guest(request)
                self._send(frame(Kind.GUEST_DONE, self._seq), "call")
            case Kind.LOG if self._spec.log and 0 < request.length <= self._events.log_left:
                self._events.log_left = max(0, self._events.log_left - max(request.length, MIN_LOG_COST))
                self._events.on_log(request.payload, not self._events.log_left)
            case Kind.STOP if self._spec.stop:
                self._events.stop_asked = True
            case Kind.SET_TICK if self._spec.tick:
                self._events.tick_ns = request.value
            case _:
                raise WorkerFaultError(FaultKind.PROTOCOL, f"{Kind(request.kind).name} is not allowed here")

    def _window(self, gpa: int, length: int, *, write: bool) -> None:
        for window in self._spec.windows:
            if window.covers(gpa, length) and (window.writable or not write):
                return
        verb = "write" if write else "read"
        raise WorkerFaultError(FaultKind.WINDOW, f"{verb} of {length} bytes at {gpa:#x} is outside the granted windows")

    def _read_guest(self, request: Frame) -> bytes:
        try:
            return self._memory.read(request.value, request.length)
        except ValueError as error:
            raise WorkerFaultError(FaultKind.WINDOW, f"no guest memory there: {error}") from error

    def _write_guest(self, request: Frame) -> None:
        try:
            self._memory.write(request.value, request.payload)
        except ValueError as error:
            raise WorkerFaultError(FaultKind.WINDOW, f"no guest memory there: {error}") from error

    def _parse(self, packet: bytes, seq: int) -> Frame:
        try:
            return parse_worker_frame(packet, seq)
        except ProtocolError as error:
            raise WorkerFaultError(FaultKind.PROTOCOL, error.message) from error

    def _send(self, packet: bytes, phase: str) -> None:
        try:
            self._socket.send(packet)
        except TimeoutError:
            self._late(phase)
        except OSError:
            # What the worker said last, such as why it refuses the module, is still to be read.
            if phase == "call":
                self._died()

    def _receive(self, phase: str) -> bytes:
        try:
            packet = self._socket.recv(RECV_BYTES)
        except TimeoutError:
            self._late(phase)
        except OSError:
            self._died()
        if not packet:
            self._died()
        return packet

    def _wait_until(self, deadline: float, phase: str) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            self._late(phase)
        self._socket.settimeout(left)

    def _late(self, phase: str) -> NoReturn:
        if phase == "start":
            raise WorkerFaultError(FaultKind.DEADLINE, "the module was not ready in time") from None
        raise WorkerFaultError(FaultKind.DEADLINE, f"a call took more than {self._spec.limits.call_ms} ms") from None

    def _died(self) -> NoReturn:
        status = None if self._zygote is None else self._zygote.exit_status(self.pid, _EXIT_WAIT_SECONDS)
        raise WorkerFaultError(FaultKind.DIED, f"the worker {describe_status(status)}") from None

    def _refused(self, reply: Frame) -> NoReturn:
        texts = [printable(text) for text in reply.payload.split(b"\0")]
        message, field, hint = [*texts, "", "", ""][:3]
        offset = reply.value - 1 if reply.value else None
        error = _REFUSALS.get(reply.flag, GraftFormatError)
        raise error(message, file=self._spec.id, offset=offset, field=field or None, hint=hint or None)


def _ready(reply: Frame) -> Ready:
    mechanisms = Mechanism((reply.value & ~_READY_FAST_BIT) >> _READY_MECHANISMS_SHIFT)
    hooks = Hook(reply.value & ((1 << _READY_MECHANISMS_SHIFT) - 1))
    return Ready(level_of(mechanisms), mechanisms, hooks, bool(reply.value & _READY_FAST_BIT))


def grant_of(spec: ExtensionSpec) -> Grant:
    """Return the capability bits of a spec."""
    flags = (
        (spec.log, Grant.LOG),
        (spec.now, Grant.NOW),
        (spec.random, Grant.RANDOM),
        (spec.tick, Grant.TICK),
        (spec.stop, Grant.STOP),
        (bool(spec.windows), Grant.GUEST_READ),
        (any(window.writable for window in spec.windows), Grant.GUEST_WRITE),
    )
    grant = Grant(0)
    for granted, bit in flags:
        if granted:
            grant |= bit
    return grant


def printable(data: bytes) -> str:
    """Decode text from a worker; what is not printable is escaped, so that no terminal or log line can be forged."""
    text = data.decode("utf-8", "replace")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def check_isolation(spec: ExtensionSpec, ready: Ready) -> None:
    """Hold what was achieved against the policy's minimum: seccomp comes last, after the worker's own check.

    Raises:
        HostError: the level is too low.
    """
    if ready.level < spec.min_isolation:
        raise HostError(
            f"isolation level {ready.level} is below the {spec.min_isolation} that the policy demands",
            file=spec.id,
            hint=f"this kernel gave: {', '.join(ready.mechanisms.names())}; see docs/sandbox.md",
        )
