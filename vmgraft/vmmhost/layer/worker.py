"""A worker's life: lock down, receive and check the module, compile it, drop the last rights, answer calls."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Final, NoReturn

from vmgraft.errors import CapabilityError, GraftFormatError
from vmgraft.vmmhost.layer import seccomp
from vmgraft.vmmhost.layer.abi import EXPORTS, MASK32, MEMORY, Grant, Hook
from vmgraft.vmmhost.layer.engine import EngineError, FuelError, Invoke, Machine, ModuleTrapError
from vmgraft.vmmhost.layer.filters import WORKER_FD
from vmgraft.vmmhost.layer.protocol import (
    CALL_BYTES,
    MAX_PAYLOAD,
    MAX_TEXT,
    WORKER_RECV_BYTES,
    Call,
    Kind,
    ProtocolError,
    Refusal,
    Setup,
    data_frames,
    frame,
    is_data,
    parse_access,
    parse_answer,
    parse_call,
    parse_data,
    parse_module_packet,
    parse_setup,
    parse_value,
    parse_window_packet,
    result,
)
from vmgraft.vmmhost.layer.sandbox import (
    Mechanism,
    install_worker_filter,
    level_of,
    limit_compile_cpu,
    lock_down,
    seal_code,
)
from vmgraft.vmmhost.layer.services import Services
from vmgraft.vmmhost.layer.virtiomodule import attach_virtio
from vmgraft.vmmhost.layer.wasmcheck import MAX_MODULE_BYTES, ModuleInfo, check_module
from vmgraft.vmmhost.layer.windows import GuestView, map_window

#: Exit statuses of a worker that ends on its own; the host sees them in its ``died`` faults.
EXIT_HOST_GONE: Final = 0
EXIT_PROTOCOL: Final = 3
EXIT_REFUSED: Final = 4
EXIT_BUG: Final = 5

READY_MECHANISMS_SHIFT: Final = 16
READY_FAST_BIT: Final = 1 << 63

_HOOK_OF: Final[dict[int, Hook]] = {
    Kind.CALL_START: Hook.START,
    Kind.CALL_PIO_READ: Hook.PIO_READ,
    Kind.CALL_PIO_WRITE: Hook.PIO_WRITE,
    Kind.CALL_MMIO_READ: Hook.MMIO_READ,
    Kind.CALL_MMIO_WRITE: Hook.MMIO_WRITE,
    Kind.CALL_HYPERCALL: Hook.HYPERCALL,
    Kind.CALL_TICK: Hook.TICK,
    Kind.CALL_EVENT: Hook.EVENT,
    Kind.CALL_SERVICE: Hook.SERVICE,
    Kind.CALL_SNAPSHOT: Hook.SNAPSHOT,
    Kind.CALL_RESTORE: Hook.RESTORE,
}


#: Calls that a guest's access waits for: those with a place and, where they write, a value.
_ACCESSES: Final[dict[int, Hook]] = {
    Kind.CALL_PIO_READ: Hook.PIO_READ,
    Kind.CALL_PIO_WRITE: Hook.PIO_WRITE,
    Kind.CALL_MMIO_READ: Hook.MMIO_READ,
    Kind.CALL_MMIO_WRITE: Hook.MMIO_WRITE,
}
_WRITES: Final[frozenset[int]] = frozenset({Kind.CALL_PIO_WRITE, Kind.CALL_MMIO_WRITE})


class _HostGoneError(Exception):
    """The socket is closed."""


class Channel:
    """The worker's end of the socket, and the requests a module makes during a call."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seq = 0

    def receive(self) -> bytes:
        """Wait for a packet."""
        packet = os.read(self.fd, WORKER_RECV_BYTES)
        if not packet:
            raise _HostGoneError
        return packet

    def receive_descriptor(self) -> tuple[bytes, int]:
        """Wait for a packet that brings a descriptor; not possible any more once the filter is in place."""
        end = socket.socket(fileno=self.fd)
        try:
            packet, fds, _flags, _address = socket.recv_fds(end, WORKER_RECV_BYTES, 1)
        finally:
            end.detach()
        if not packet:
            raise _HostGoneError
        if len(fds) != 1:
            raise ProtocolError("a packet without its descriptor")
        return packet, fds[0]

    def send(self, packet: bytes) -> None:
        """Send a packet whole."""
        os.write(self.fd, packet)

    def tell(self, kind: Kind, value: int = 0, payload: bytes = b"") -> None:
        """Send a request that has no answer."""
        self.send(frame(kind, self.seq, value, payload))

    def read_guest(self, gpa: int, length: int) -> bytes:
        """Ask for guest memory; where it is not granted, the host ends this process instead of answering."""
        self.send(frame(Kind.GUEST_READ, self.seq, gpa, length=length))
        return parse_answer(self.receive(), Kind.GUEST_DATA, self.seq, length)

    def write_guest(self, gpa: int, data: bytes) -> None:
        """Change guest memory, on the same terms."""
        self.send(frame(Kind.GUEST_WRITE, self.seq, gpa, data))
        parse_answer(self.receive(), Kind.GUEST_DONE, self.seq, 0)

    def get_value(self, key: bytes) -> bytes | None:
        """Ask for a value of the extension's store; None where there is none."""
        self.send(frame(Kind.KV_GET, self.seq, 0, key))
        return parse_value(self.receive(), Kind.KV_DATA, self.seq)

    def put_value(self, key: bytes, value: bytes) -> bool:
        """Keep a value in the extension's store; False where there is no room."""
        self.send(frame(Kind.KV_PUT, self.seq, 0, key + value, flag=len(key)))
        return parse_value(self.receive(), Kind.KV_DONE, self.seq) is not None

    def whole_call(self, packet: bytes) -> Call:
        """Return the call that a packet is, or is the beginning of the data of."""
        data = b""
        while is_data(packet):
            data += parse_data(packet, len(data))
            packet = self.receive()
        return parse_call(packet, data)


def _settle(socket_fd: int) -> int:
    """Move the socket to the descriptor that the filter names."""
    if socket_fd != WORKER_FD:
        os.dup2(socket_fd, WORKER_FD, inheritable=False)
    return WORKER_FD


def _open_maps() -> int | None:
    """Open the list of this process's own mappings, beside the socket; None where there is no /proc."""
    try:
        found = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    return found


def run_worker(socket_fd: int, memory_mib: int, namespaces: Mechanism, *, fast: bool) -> NoReturn:
    """Be a worker until the host hangs up; never returns into the zygote whose fork it is."""
    status = EXIT_BUG
    try:
        fd, maps_fd = _settle(socket_fd), _open_maps()
        mechanisms = lock_down(fd, memory_mib, namespaces, maps_fd)
        _serve(Channel(fd), mechanisms, fast=fast, maps_fd=maps_fd)
    except (_HostGoneError, OSError):
        status = EXIT_HOST_GONE
    except ProtocolError:
        status = EXIT_PROTOCOL
    except _RefusedError:
        status = EXIT_REFUSED
    finally:
        os._exit(status)


class _RefusedError(Exception):
    """The module was refused, and the host was told why."""


def _serve(channel: Channel, mechanisms: Mechanism, *, fast: bool, maps_fd: int | None = None) -> NoReturn:
    channel.tell(Kind.LOCKED, mechanisms)  # from here on there is something to read, and no more to be believed
    setup, view, module = _receive(channel)
    _check_isolation(channel, setup, mechanisms)
    services = Services(setup, channel, view)
    try:
        info = check_module(module, Grant(setup.grant), setup.memory_mib)
        limit_compile_cpu(setup.cpu_seconds)
        hooks = _instantiate(setup, module, info, services, fast=fast)
        hooks = attach_virtio(setup, hooks, view, services, channel.tell)
        limit_compile_cpu(0)
    except (GraftFormatError, CapabilityError) as error:
        kind = Refusal.CAPABILITY if isinstance(error, CapabilityError) else Refusal.MALFORMED
        _refuse(channel, kind, error.offset, (error.message, error.field or "", error.hint or ""))
    except EngineError as error:
        _refuse(channel, Refusal.ENGINE, None, (str(error), "module", "the engine refuses the module"))
    except MemoryError:
        _refuse(channel, Refusal.ENGINE, None, ("out of memory while compiling", "module", ""))
    if maps_fd is not None:
        mechanisms |= seal_code(maps_fd)
    mechanisms |= install_worker_filter(channel.fd)
    value = sum(hooks) | mechanisms << READY_MECHANISMS_SHIFT | (READY_FAST_BIT if fast else 0)
    channel.send(frame(Kind.READY, 0, value, flag=level_of(mechanisms)))
    accesses = {kind: hooks[hook] for kind, hook in _ACCESSES.items() if hook in hooks}
    while True:
        packet = channel.receive()
        if packet[0] in accesses and len(packet) == CALL_BYTES:
            _access(channel, services, accesses, packet)
        else:
            _answer(channel, services, hooks, channel.whole_call(packet))


def _check_isolation(channel: Channel, setup: Setup, mechanisms: Mechanism) -> None:
    """Refuse before a byte of the module is looked at, if the level cannot be reached any more."""
    level = level_of(mechanisms | (Mechanism.SECCOMP if seccomp.supported() else Mechanism(0)))
    if level < setup.min_isolation:
        message = f"isolation level {level} is below the {setup.min_isolation} that the policy demands"
        hint = f"this kernel gave: {', '.join(mechanisms.names())}; see docs/sandbox.md"
        _refuse(channel, Refusal.ISOLATION, None, (message, "isolation", hint))


def _receive(channel: Channel) -> tuple[Setup, GuestView, bytes]:
    setup = parse_setup(channel.receive())
    if setup.module_bytes > MAX_MODULE_BYTES:
        raise ProtocolError("a module over the limit")
    areas = {}
    for number, window in enumerate(setup.windows):
        if window.mapped:
            packet, fd = channel.receive_descriptor()
            areas[number] = map_window(fd, window)
            parse_window_packet(packet, number)
    module = bytearray()
    while len(module) < setup.module_bytes:
        module += parse_module_packet(channel.receive(), len(module))
    return setup, GuestView(setup.windows, areas, channel), bytes(module)


def _instantiate(
    setup: Setup, module: bytes, info: ModuleInfo, services: Services, *, fast: bool
) -> dict[Hook, Invoke]:
    machine = Machine(setup.memory_mib, setup.fuel, fast=fast)
    exports = machine.instantiate(module, services.imports(info.imports))
    services.connect(machine, exports.get(MEMORY))
    hooks = {}
    for name, (signature, hook) in EXPORTS.items():
        if hook is not None and hook in info.hooks:
            hooks[hook] = machine.bind(exports[name], signature)
    return hooks


def _refuse(channel: Channel, kind: Refusal, offset: int | None, texts: tuple[str, str, str]) -> NoReturn:
    payload = "\0".join(text.replace("\0", " ") for text in texts).encode()[:MAX_PAYLOAD]
    channel.send(frame(Kind.REFUSED, 0, 0 if offset is None else offset + 1, payload, flag=kind))
    raise _RefusedError


def _access(channel: Channel, services: Services, accesses: dict[int, Invoke], packet: bytes) -> None:
    """Do what `_answer` does for an access of the guest to a port or an address: in few steps, since it waits."""
    kind = packet[0]
    size, seq, now, address, value = parse_access(packet)
    channel.seq, services.now, services.room, services.answer = seq, now, 0, b""
    services.data, services.view.touched = b"", False
    try:
        answer = accesses[kind](address, size, value) if kind in _WRITES else accesses[kind](address, size)
    except (FuelError, ModuleTrapError) as error:
        _fail(channel, seq, error)
    else:
        channel.send(result(seq, answer, services.fuel_used(), touched=services.view.touched))


def _fail(channel: Channel, seq: int, error: FuelError | ModuleTrapError) -> None:
    if isinstance(error, FuelError):
        channel.send(frame(Kind.FUEL, seq))
    else:
        channel.send(frame(Kind.TRAP, seq, 0, str(error).encode()[:MAX_TEXT]))


def _answer(channel: Channel, services: Services, hooks: dict[Hook, Invoke], call: Call) -> None:
    kind = call.kind
    hook = hooks.get(_HOOK_OF[kind])
    if hook is None:
        raise ProtocolError(f"a call of {Kind(kind).name}, which the module lacks")
    channel.seq, services.now = call.seq, call.now
    services.data, services.room, services.answer = call.data, call.room, b""
    services.view.touched = False
    try:
        value = hook(*_ARGUMENTS.get(kind, _value_of)(call))
    except (FuelError, ModuleTrapError) as error:
        _fail(channel, call.seq, error)
    else:
        if services.answer:
            frames, rest = data_frames(call.seq, services.answer)
            for packet in frames:
                channel.send(packet)
            channel.send(frame(Kind.USED, call.seq, services.fuel_used()))
            channel.send(frame(Kind.ANSWER, call.seq, value, rest, flag=services.view.touched))
        else:
            channel.send(result(call.seq, value, services.fuel_used(), touched=services.view.touched))


def _value_of(call: Call) -> tuple[int, ...]:
    return (call.value,)


#: What an export is called with; the value alone where none is named.
_ARGUMENTS: Final[dict[int, Callable[[Call], tuple[int, ...]]]] = {
    Kind.CALL_HYPERCALL: lambda call: (call.address & MASK32, *call.args),
    Kind.CALL_SERVICE: lambda call: (call.size, call.address, call.value),
    Kind.CALL_SNAPSHOT: lambda _call: (),
}
