"""The host's end of one worker: start it, call it, serve its requests, and never wait without a deadline."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Final, NoReturn

from vmgraft.errors import CapabilityError, GraftFormatError, HostError, VmgraftError
from vmgraft.vmmhost.core.contract import GuestMemory
from vmgraft.vmmhost.layer.abi import MASK64, MIN_LOG_COST
from vmgraft.vmmhost.layer.faults import FaultKind, WorkerFaultError
from vmgraft.vmmhost.layer.grants import grant_of, told_windows, windows_of
from vmgraft.vmmhost.layer.linkevents import LinkEvents
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
    data_frames,
    frame,
    module_packets,
    parse_worker_frame,
    plain_call,
    plain_result,
    setup,
)
from vmgraft.vmmhost.layer.readiness import Ready, ready_from
from vmgraft.vmmhost.layer.sandbox import Mechanism
from vmgraft.vmmhost.layer.sight import Sight
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.windows import Shared, close_shared, share_windows
from vmgraft.vmmhost.layer.zygote import WorkerProcess, Zygote, describe_status

_EXIT_WAIT_SECONDS: Final = 0.5
_REFUSALS: Final[dict[int, type[VmgraftError]]] = {Refusal.CAPABILITY: CapabilityError, Refusal.ISOLATION: HostError}
_NO_ARGS: Final = (0, 0, 0, 0)


class WorkerLink:
    """One worker process and the protocol with it.

    Args:
        spec: The extension.
        process: Its worker, fresh from the zygote.
        zygote: Asked how the worker ended.
        memory: Guest RAM, reached through the windows of the spec only.
        events: Where requests are left.
        map_windows: Whether the worker may have windows of whole pages mapped; else it asks for every copy.
    """

    def __init__(
        self,
        spec: ExtensionSpec,
        process: WorkerProcess,
        zygote: Zygote | None,
        memory: GuestMemory,
        events: LinkEvents,
        *,
        map_windows: bool = True,
    ) -> None:
        self._map_windows = map_windows
        #: Mapped windows that the worker may change without a word.
        self._changeable: tuple[tuple[int, int], ...] = ()
        self._spec, self._process, self._zygote, self._memory, self._events = spec, process, zygote, memory, events
        self._socket = process.socket
        self._fd = -1
        self._seq = 0
        self._call_seconds, self._most_fuel = spec.limits.call_ms / 1000, spec.limits.fuel_per_call
        self._data, self._room = bytearray(), 0

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
        deadline = time.monotonic() + seconds
        early = Mechanism(self._expect(Kind.LOCKED, deadline).value)
        shared = self._share()
        try:
            self._introduce(shared, seed, cpu_seconds, deadline)
        finally:
            close_shared(shared)
        for packet in module_packets(self._spec.module):
            self._wait_until(deadline, "start")
            self._send(packet, "start")
        reply = self._expect(Kind.READY, deadline)
        sight, left = Sight(), max(deadline - time.monotonic(), 0.1)
        if self._zygote is not None:
            sight = self._zygote.look(self.pid, left, [each.inode for each in shared])
        self._socket.settimeout(self._call_seconds)
        if isinstance(self._socket, socket.socket):  # with a time limit it never blocks; a recording's has none to show
            self._fd = self._socket.fileno()
        return ready_from(reply, early, self._process.namespaces, sight)

    def _share(self) -> list[Shared]:
        """Make files of the windows that are to be mapped; where the kernel has none to give, messages do."""
        try:
            return share_windows(self._memory, windows_of(self._spec)) if self._map_windows else []
        except OSError:
            return []

    def _introduce(self, shared: list[Shared], seed: bytes, cpu_seconds: int, deadline: float) -> None:
        """Tell the worker what it is to be, and hand its windows over."""
        spec, limits = self._spec, self._spec.limits
        windows = told_windows(windows_of(spec), shared)
        message = Setup(
            grant_of(spec), spec.config, len(spec.module), limits.memory_mib, self._events.log_left,
            limits.fuel_per_call, cpu_seconds, spec.min_isolation, seed, sum(1 << line for line in set(spec.irqs)),
            windows, spec.virtio,
        )  # fmt: skip
        self._changeable = tuple((each.window.gpa, each.window.size) for each in shared if each.window.writable)
        self._wait_until(deadline, "start")
        self._send(setup(message), "start")
        for number, window in enumerate(windows):
            if window.mapped:
                fd = next(each.fd for each in shared if each.window == window._replace(mapped=False))
                self._wait_until(deadline, "start")
                self._send(frame(Kind.WINDOW, 0, number), "start", (fd,))

    def _refresh(self) -> None:
        """Let the engine know that the worker changed what it has mapped."""
        refresh: Callable[[int, int], None] | None = getattr(self._memory, "refresh", None)
        if refresh is not None:
            for gpa, size in self._changeable:
                refresh(gpa, size)

    def _expect(self, kind: Kind, deadline: float) -> Frame:
        """Wait for a packet of the start, which may be a refusal instead."""
        self._wait_until(deadline, "start")
        reply = self._parse(self._receive("start"), 0)
        if reply.kind == Kind.REFUSED:
            self._refused(reply)
        if reply.kind != kind:
            raise WorkerFaultError(FaultKind.PROTOCOL, f"{Kind(reply.kind).name} in place of {kind.name}")
        return reply

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
        deadline = time.monotonic() + self._call_seconds
        posted = self._post(plain_call(kind, seq, now & MASK64, address, size, value, args), deadline)
        packet = self._receive("call")
        plain = plain_result(packet, seq) if posted else None
        if plain is not None:
            touched, answer, used = plain
            self._burn(used)
            if touched:
                self._refresh()
            return answer
        reply = self._serve_until_result(self._parse(packet, seq), deadline)
        if reply.flag:
            self._refresh()
        return reply.value

    def exchange(
        self, kind: Kind, now: int, *, address: int = 0, size: int = 0, value: int = 0, data: bytes = b"", room: int = 0
    ) -> tuple[int, bytes]:
        """Call one export that takes data, or answers with up to ``room`` bytes of it.

        Returns:
            The export's result as an unsigned 64-bit integer, and the data of its answer.

        Raises:
            WorkerFaultError: of any kind; the worker must not be used again.
        """
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        self._data, self._room = bytearray(), room
        deadline = time.monotonic() + self._call_seconds
        frames, rest = data_frames(seq, data)
        last = call(Call(kind, size, seq, now & MASK64, address, value, (room, 0, 0, 0), rest))
        for packet in (*frames, last):
            self._wait_until(deadline, "call")
            self._send(packet, "call")
        self._wait_until(deadline, "call")
        reply = self._serve_until_result(self._parse(self._receive("call"), seq), deadline)
        if reply.flag:
            self._refresh()
        taken, self._data, self._room = bytes(self._data), bytearray(), 0
        return reply.value, taken

    def kill(self) -> bool:
        """End the worker and close what belongs to it; False if the kernel did not end it in time."""
        self._fd = -1  # the number may soon be that of another file
        gone = self._process.kill()
        self._refresh()  # what it did last it did not tell
        self._changeable = ()
        return gone

    # --- packets ---

    def _serve_until_result(self, reply: Frame, deadline: float) -> Frame:
        for _ in range(MAX_REQUESTS):
            match reply.kind:
                case Kind.RESULT | Kind.ANSWER:
                    if reply.kind == Kind.ANSWER:
                        self._take(reply, len(self._data))
                    else:
                        self._burn(int.from_bytes(reply.payload, "little"))
                    self._socket.settimeout(self._call_seconds)
                    return reply
                case Kind.TRAP:
                    raise WorkerFaultError(FaultKind.TRAP, printable(reply.payload))
                case Kind.FUEL:
                    self._burn(self._spec.limits.fuel_per_call)
                    raise WorkerFaultError(FaultKind.FUEL, f"more than {self._spec.limits.fuel_per_call} units")
                case _:
                    self._serve(reply)
            self._wait_until(deadline, "call")
            reply = self._parse(self._receive("call"), self._seq)
        raise WorkerFaultError(FaultKind.QUOTA, f"more than {MAX_REQUESTS} requests in one call")

    def _burn(self, units: int) -> None:
        """Note what a call used, as the worker tells: a statistic, which it can falsify within the limit."""
        self._events.on_fuel(units if units < self._most_fuel else self._most_fuel)

    def _take(self, reply: Frame, offset: int) -> None:
        """Add a piece of data to the answer."""
        if offset != len(self._data) or offset + reply.length > self._room:
            message = f"{reply.length} bytes at {offset}, where {len(self._data)} came and {self._room} have room"
            raise WorkerFaultError(FaultKind.PROTOCOL, message)
        self._data += reply.payload

    def _serve(self, request: Frame) -> None:
        match request.kind:
            case Kind.USED:
                self._burn(request.value)
            case Kind.DATA if self._room:
                self._take(request, request.value)
            case Kind.IRQ if request.value >> 1 in self._spec.irqs:
                self._events.on_irq(request.value >> 1, bool(request.value & 1))
            case Kind.KV_GET | Kind.KV_PUT if self._spec.kv:
                self._serve_store(request)
            case Kind.METRIC if self._spec.metric:
                signed = request.value - (request.value >> 63 << 64)
                if not self._events.metrics.put(printable(request.payload), signed):
                    self._events.on_metrics_full()
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

    def _serve_store(self, request: Frame) -> None:
        store = self._events.store
        if request.kind == Kind.KV_GET:
            found = store.get(request.payload)
            reply = frame(Kind.KV_DATA, self._seq, 0, found or b"", flag=found is not None)
        else:
            size = request.flag
            if not 0 < size <= request.length:
                raise WorkerFaultError(FaultKind.PROTOCOL, f"a key of {size} bytes in {request.length}")
            kept = store.put(request.payload[:size], request.payload[size:])
            reply = frame(Kind.KV_DONE, self._seq, flag=kept)
        self._send(reply, "call")

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

    def _post(self, packet: bytes, deadline: float) -> bool:
        """Send a call; where there is room for it, as there is for an honest worker, without asking first.

        Returns False where that took the long way, which leaves what remains of the call's time as the socket's limit.
        """
        try:
            os.write(self._fd, packet)
        except OSError:  # no descriptor, no room, or nobody there: the long way tells which
            self._wait_until(deadline, "call")
            self._send(packet, "call")
            self._wait_until(deadline, "call")
            return False
        return True

    def _send(self, packet: bytes, phase: str, fds: tuple[int, ...] = ()) -> None:
        try:
            if fds:
                socket.send_fds(self._socket, [packet], fds)
            else:
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


def printable(data: bytes) -> str:
    """Decode text from a worker; what is not printable is escaped, so that no terminal or log line can be forged."""
    text = data.decode("utf-8", "replace")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
