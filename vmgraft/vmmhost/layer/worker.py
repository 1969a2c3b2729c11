"""A worker's life: lock down, receive and check the module, compile it, drop the last rights, answer calls."""

from __future__ import annotations

import os
from typing import Final, NoReturn

from vmgraft.errors import CapabilityError, GraftFormatError
from vmgraft.vmmhost.layer import seccomp
from vmgraft.vmmhost.layer.abi import EXPORTS, MASK32, MEMORY, Grant, Hook
from vmgraft.vmmhost.layer.engine import EngineError, FuelError, Invoke, Machine, ModuleTrapError
from vmgraft.vmmhost.layer.protocol import (
    MAX_PAYLOAD,
    MAX_TEXT,
    RECV_BYTES,
    Call,
    Kind,
    ProtocolError,
    Refusal,
    Setup,
    frame,
    parse_answer,
    parse_call,
    parse_module_packet,
    parse_setup,
)
from vmgraft.vmmhost.layer.sandbox import Mechanism, install_worker_filter, level_of, limit_compile_cpu, lock_down
from vmgraft.vmmhost.layer.services import Services
from vmgraft.vmmhost.layer.wasmcheck import MAX_MODULE_BYTES, ModuleInfo, check_module

#: Exit statuses of a worker that ends on its own; the host sees them in its ``died`` faults.
EXIT_HOST_GONE: Final = 0
EXIT_PROTOCOL: Final = 3
EXIT_REFUSED: Final = 4
EXIT_BUG: Final = 5

READY_MECHANISMS_SHIFT: Final = 16
READY_FAST_BIT: Final = 1 << 63

_HOOK_OF: Final = {
    Kind.CALL_START: Hook.START,
    Kind.CALL_PIO_READ: Hook.PIO_READ,
    Kind.CALL_PIO_WRITE: Hook.PIO_WRITE,
    Kind.CALL_MMIO_READ: Hook.MMIO_READ,
    Kind.CALL_MMIO_WRITE: Hook.MMIO_WRITE,
    Kind.CALL_HYPERCALL: Hook.HYPERCALL,
    Kind.CALL_TICK: Hook.TICK,
    Kind.CALL_EVENT: Hook.EVENT,
}


class _HostGoneError(Exception):
    """The socket is closed."""


class Channel:
    """The worker's end of the socket, and the requests a module makes during a call."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seq = 0

    def receive(self) -> bytes:
        """Wait for a packet."""
        packet = os.read(self.fd, RECV_BYTES)
        if not packet:
            raise _HostGoneError
        return packet

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


def run_worker(socket_fd: int, memory_mib: int, namespaces: Mechanism, *, fast: bool) -> NoReturn:
    """Be a worker until the host hangs up; never returns into the zygote whose fork it is."""
    status = EXIT_BUG
    try:
        mechanisms = lock_down(socket_fd, memory_mib, namespaces)
        _serve(Channel(socket_fd), mechanisms, fast=fast)
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


def _serve(channel: Channel, mechanisms: Mechanism, *, fast: bool) -> NoReturn:
    setup, module = _receive(channel)
    _check_isolation(channel, setup, mechanisms)
    services = Services(setup, channel)
    try:
        info = check_module(module, Grant(setup.grant), setup.memory_mib)
        limit_compile_cpu(setup.cpu_seconds)
        hooks = _instantiate(setup, module, info, services, fast=fast)
        limit_compile_cpu(0)
    except (GraftFormatError, CapabilityError) as error:
        kind = Refusal.CAPABILITY if isinstance(error, CapabilityError) else Refusal.MALFORMED
        _refuse(channel, kind, error.offset, (error.message, error.field or "", error.hint or ""))
    except EngineError as error:
        _refuse(channel, Refusal.ENGINE, None, (str(error), "module", "the engine refuses the module"))
    except MemoryError:
        _refuse(channel, Refusal.ENGINE, None, ("out of memory while compiling", "module", ""))
    mechanisms |= install_worker_filter(channel.fd)
    value = info.hooks | mechanisms << READY_MECHANISMS_SHIFT | (READY_FAST_BIT if fast else 0)
    channel.send(frame(Kind.READY, 0, value, flag=level_of(mechanisms)))
    while True:
        _answer(channel, services, hooks, parse_call(channel.receive()))


def _check_isolation(channel: Channel, setup: Setup, mechanisms: Mechanism) -> None:
    """Refuse before a byte of the module is looked at, if the level cannot be reached any more."""
    level = level_of(mechanisms | (Mechanism.SECCOMP if seccomp.supported() else Mechanism(0)))
    if level < setup.min_isolation:
        message = f"isolation level {level} is below the {setup.min_isolation} that the policy demands"
        hint = f"this kernel gave: {', '.join(mechanisms.names())}; see docs/sandbox.md"
        _refuse(channel, Refusal.ISOLATION, None, (message, "isolation", hint))


def _receive(channel: Channel) -> tuple[Setup, bytes]:
    setup = parse_setup(channel.receive())
    if setup.module_bytes > MAX_MODULE_BYTES:
        raise ProtocolError("a module over the limit")
    module = bytearray()
    while len(module) < setup.module_bytes:
        module += parse_module_packet(channel.receive(), len(module))
    return setup, bytes(module)


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


def _answer(channel: Channel, services: Services, hooks: dict[Hook, Invoke], call: Call) -> None:
    kind = Kind(call.kind)
    hook = hooks.get(_HOOK_OF[kind])
    if hook is None:
        raise ProtocolError(f"a call of {kind.name}, which the module lacks")
    channel.seq, services.now = call.seq, call.now
    try:
        value = hook(*_arguments(kind, call))
    except FuelError:
        channel.send(frame(Kind.FUEL, call.seq))
    except ModuleTrapError as error:
        channel.send(frame(Kind.TRAP, call.seq, 0, str(error).encode()[:MAX_TEXT]))
    else:
        channel.send(frame(Kind.RESULT, call.seq, value))


def _arguments(kind: Kind, call: Call) -> tuple[int, ...]:
    match kind:
        case Kind.CALL_PIO_READ | Kind.CALL_MMIO_READ:
            return call.address, call.size
        case Kind.CALL_PIO_WRITE | Kind.CALL_MMIO_WRITE:
            return call.address, call.size, call.value
        case Kind.CALL_HYPERCALL:
            return call.address & MASK32, *call.args
        case _:
            return (call.value,)
